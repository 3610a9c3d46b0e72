"""Hostile checkpoints: valid ones, changed by one to three mutations, all of it decided by a seed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .hostile_folder import MAKERS, Folder, Maker, build
from .hostile_mutations import MUTATIONS

# What a mutation may raise over a folder that an earlier one has damaged.
DOES_NOT_APPLY = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error)


@dataclass(frozen=True)
class Hostile:
    """One case of the corpus: :func:`hostile` gives the same for the same seed."""

    seed: int
    maker: Maker
    folder: Folder
    steps: tuple[str, ...]


def hostile(seed: int, makers: Sequence[Maker] = MAKERS) -> Hostile:
    """The case of this seed."""
    rng = Random(seed)
    maker = rng.choice(makers)
    folder = build(maker, rng)
    steps: list[str] = []
    wanted = rng.choice([1, 1, 1, 1, 1, 2, 2, 3])
    while len(steps) < wanted:
        mutation = rng.choice(MUTATIONS)
        before = dict(folder)
        try:
            mutation(rng, folder)
        except DOES_NOT_APPLY:
            folder.clear()
            folder.update(before)
            continue
        steps.append(mutation.__name__)
    return Hostile(seed, maker, folder, tuple(steps))
