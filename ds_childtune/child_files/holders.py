"""Who holds which elements of a parameter, in three numbers, whatever the number of ranks.

[Note: holders]
At every ZeRO stage the ranks that hold elements of a parameter are neighbours, and each has one run of them, in the order of ranks:
the first `head`, every further one `each`, the last what is left.

    parameter of 30 elements     rank 3: [0, 4)   rank 4: [4, 14)   rank 5: [14, 24)   rank 6: [24, 30)
                                 first 3, head 4, each 10

So a manifest says for every parameter which files have its elements, in as many bytes for a thousand files as for one, and a reader
opens only the files that it needs. The numbers are checked: by the ranks before they are written, and by a reader in every file that
it opens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

_Count = Annotated[int, Field(ge=0, le=2**62)]


@dataclass(frozen=True)
class Run:
    """Elements of one parameter."""

    name: str
    start: int
    """First element, in the flattened parameter."""
    end: int
    """Last + 1."""


@dataclass(frozen=True)
class Held:
    """One parameter. See [Note: holders]."""

    first: int
    """Rank."""
    head: int
    """0: nobody holds it."""
    each: int

    def run_of(self, rank: int, numel: int) -> tuple[int, int]:
        """First element and last + 1 that a rank has of a parameter of `numel`; equal when it has none."""
        if rank < self.first or not self.head:
            return 0, 0
        if rank == self.first:
            return 0, min(self.head, numel)
        start = min(self.head + (rank - self.first - 1) * self.each, numel)
        return start, min(start + self.each, numel)

    def ranks(self, start: int, end: int, numel: int) -> Iterator[tuple[int, int, int]]:
        """The ranks that hold [start, end), in order, each with the part of it that it has: first element, last + 1."""
        rank = self.first if start < self.head else self.first + 1 + (start - self.head) // max(self.each, 1)
        while start < end:
            stop = min(self.run_of(rank, numel)[1], end)
            if stop <= start:
                return
            yield rank, start, stop
            rank, start = rank + 1, stop


@dataclass(frozen=True)
class Holders:
    """All parameters of a manifest, in its order, as columns."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    first: tuple[_Count, ...]
    head: tuple[_Count, ...]
    each: tuple[_Count, ...]

    @classmethod
    def of(cls, held: Sequence[Held]) -> Holders:
        return cls(tuple(h.first for h in held), tuple(h.head for h in held), tuple(h.each for h in held))

    def __getitem__(self, position: int) -> Held:
        return Held(self.first[position], self.head[position], self.each[position])

    def fault(self, numels: Sequence[int]) -> int | None:
        """The position of a parameter whose numbers are none of [Note: holders]; -1 when there are not as many as parameters."""
        if not len(self.first) == len(self.head) == len(self.each) == len(numels):
            return -1
        for position, numel in enumerate(numels):
            head, each = self.head[position], self.each[position]
            if head > numel or (0 < head < numel and not each):
                return position
        return None


class HoldersByRank:
    """How many parameters each rank holds elements of."""

    def __init__(self, holders: Holders, numels: Sequence[int], counted: Sequence[bool]) -> None:
        """
        Args:
            counted: which of the parameters matter.
        """
        held = [i for i, counts in enumerate(counted) if counts and holders.head[i]]
        # Python's integers, as forged ones may be near 2**62; ranks beyond any file count are all the same.
        last = [_last_rank(holders[i], numels[i]) for i in held]
        self._first: NDArray[np.int64] = np.array([holders.first[i] for i in held], dtype=np.int64)
        self._last: NDArray[np.int64] = np.array([min(rank, 2**62) for rank in last], dtype=np.int64)

    def count(self, rank: int) -> int:
        return int(np.count_nonzero((self._first <= rank) & (self._last >= rank)))


def _last_rank(held: Held, numel: int) -> int:
    rest = numel - held.head
    return held.first + (-(-rest // held.each) if rest > 0 and held.each else 0)


def ranks_with(holders: Holders, numels: Mapping[str, int], runs: Iterable[Run]) -> list[int]:
    """The ranks that hold elements of some runs, ascending.

    Args:
        numels: elements of every parameter, in the order of `holders`. Runs of other parameters are held by nobody.
    """
    position = {name: i for i, name in enumerate(numels)}
    ranks: set[int] = set()
    for run in runs:
        if run.name in position:
            numel = numels[run.name]
            held = holders[position[run.name]]
            ranks.update(rank for rank, _, _ in held.ranks(run.start, min(run.end, numel), numel))
    return sorted(ranks)
