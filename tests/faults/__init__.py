"""Damage, full disks and kills, thousands of them: `python -m tests.faults --seed 0 --minutes 5`.

Each case is drawn from the seed and its number. It fails by a traceback, a hang, or a result that is wrong
without a word.
"""
