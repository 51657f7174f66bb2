"""Damage to bytes, as disks, transfers and careless edits do it."""

from __future__ import annotations

import random

INTERESTING = (b"\x00", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00" * 64)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one damage; never the same bytes."""
    while True:
        changed = rng.choice(WAYS)(bytearray(data), rng)
        if bytes(changed) != data:
            return bytes(changed)


def _flip(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)
    return data


def _overwrite(data: bytearray, rng: random.Random) -> bytearray:
    place, what = _place(data, rng), rng.choice(INTERESTING)
    data[place : place + len(what)] = what
    return data


def _cut(data: bytearray, rng: random.Random) -> bytearray:
    return data[: _place(data, rng)]


def _remove(data: bytearray, rng: random.Random) -> bytearray:
    place = _place(data, rng)
    del data[place : place + rng.choice((1, 4, 64, 512))]
    return data


def _repeat(data: bytearray, rng: random.Random) -> bytearray:
    place, length = _place(data, rng), rng.choice((1, 16, 512))
    return data[:place] + data[place : place + length] * 2 + data[place + length :]


def _insert(data: bytearray, rng: random.Random) -> bytearray:
    place = _place(data, rng)
    return data[:place] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 32)))) + data[place:]


def _zeroed(data: bytearray, rng: random.Random) -> bytearray:
    """A block that never reached the disk."""
    block = rng.randrange(len(data) // 512 + 1) * 512
    data[block : block + 512] = bytes(len(data[block : block + 512]))
    return data


def _place(data: bytearray, rng: random.Random) -> int:
    """Return a place; half of the time near the beginning, where headers are."""
    return rng.randrange(min(len(data), 128) if rng.random() < 0.5 else len(data))


WAYS = (_flip, _flip, _flip, _overwrite, _cut, _remove, _repeat, _insert, _zeroed)
