"""Cases: how one is run, and what became of all of them."""

from __future__ import annotations

import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from domainstudio.errors import DomainStudioError

LIMIT, LONGEST = 60.0, 600.0
"""A case hangs after so many seconds of a processor, or of a clock where other work takes the processor."""


class Kind(Protocol):
    """A kind of fault."""

    name: str
    weight: float
    """Its share of the cases."""

    def case(self, rng: random.Random) -> str:
        """Try one fault, and return what became of it in a word.

        Raises:
            WrongError: a wrong result without a word.
            DomainStudioError: it was refused.
        """
        ...


class WrongError(Exception):
    """A result is wrong, and nothing said so."""


class HangError(Exception):
    """A case took too long."""


@dataclass
class Tally:
    """What became of the cases of a kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(self.outcomes.values())


def try_case(kind: Kind, seed: int, number: int, tally: Tally) -> None:
    """Try the case of a number, and count what becomes of it."""
    rng = random.Random(f"{seed}/{kind.name}/{number}")
    started = time.monotonic()
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = kind.case(rng)
    except DomainStudioError:
        outcome = "refused"
    except WrongError as error:
        outcome = "silently wrong"
        tally.failures.append(f"{kind.name} {number}: {error}")
    except HangError:
        outcome = "hang"
        tally.failures.append(f"{kind.name} {number}: more than {LIMIT:g} s of a processor")
    except Exception:
        outcome = "traceback"
        tally.failures.append(f"{kind.name} {number}: {traceback.format_exc(limit=-4)}")
    tally.outcomes[outcome] += 1
    tally.seconds += time.monotonic() - started


@contextmanager
def _limited() -> Iterator[None]:
    def stop(signum: int, frame: object) -> None:
        raise HangError

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, LIMIT), signal.SIGALRM: (signal.ITIMER_REAL, LONGEST)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
