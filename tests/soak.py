"""A long training of a tiny model that is saved, killed and moved to other world sizes and ZeRO stages at random.

    python -m tests.soak --minutes 10 [--seed 0]

At the end of every job its weights, masks and counters must equal those of the same job without a stop, bit for bit; and in a life of
many saves resident memory must be flat. Everything that is random comes from the seed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS
from tests.support.engines import Weights
from tests.support.lives import Job, Life, Trip, live
from tests.support.places import Place, State

PLACES = [Place(w, s) for w in (1, 2, 4) for s in (1, 2, 3)] + [Place(2, 3, 40), Place(1, 3, 10**9)]
LIVES = 12
"""At most, of one job; the last one is not killed."""


@dataclass
class Tally:
    """What has happened."""

    jobs: int = 0
    lives: int = 0
    kills: int = 0
    """Lives that ended by SIGKILL."""
    moves: int = 0
    """Lives that began from a checkpoint of another world size or stage."""
    steps: int = 0
    mismatches: int = 0

    def __str__(self) -> str:
        return (
            f"{self.jobs} jobs, {self.lives} lives, {self.kills} killed, {self.moves} moved to another world size or stage,"
            f" {self.steps} steps, {self.mismatches} bitwise mismatches"
        )


def soak(folder: Path, seed: int, tally: Tally, *, steps: int) -> None:
    """One job, against the same job without a stop.

    Raises:
        AssertionError: when the two differ, naming the seed.
    """
    draw = random.Random(seed)
    mode, bf16 = draw.choice(list(BLOCKS)), draw.random() < 0.4
    job = Job(str(folder / "job"), BLOCKS[mode], steps, draw.choice([1, 2, 3]), bf16)
    plain = live(replace(job, folder=str(folder / "plain"), save_every=steps), Place(2, 3))
    place: Place | None = None
    end: Life | None = None
    for attempt in range(LIVES):
        before, place = place, draw.choice(PLACES)
        saved = (folder / "job" / "latest").exists()
        trip = _trip(draw, place) if attempt < LIVES - 1 else None
        life = live(job, place, trip)
        tally.lives += 1
        tally.moves += saved and place != before
        if life.state is not None:
            end = life
            break
        tally.kills += 1
    assert end is not None
    assert end.state is not None
    assert plain.state is not None
    tally.jobs += 1
    tally.steps += steps
    same = (
        equal_bits(_masters(end.state, mode, bf16), _masters(plain.state, mode, bf16))
        and equal_bits(end.state.forward, plain.state.forward)
        and equal_bits(end.state.masks, plain.state.masks)
        and (end.state.step, end.state.lr) == (plain.state.step, plain.state.lr)
    )
    tally.mismatches += not same
    assert same, f"seed {seed}: {mode}, bf16 {bf16}, last at {place}: another end than without a stop"


def _masters(state: State, mode: str, bf16: bool) -> Weights:
    """Outside a compact child in bf16, there are finer masters than the weights where only moments are compact; nothing reads them."""
    if mode != "D-compact" or not bf16:
        return state.masters
    return {name: master[state.masks[name]] for name, master in state.masters.items()}


def _trip(draw: random.Random, place: Place) -> Trip:
    kind = draw.choices(["file", "torch.save", "step", "calibration"], [5, 2, 3, 1])[0]
    most = {"file": 60, "torch.save": 6, "step": 24, "calibration": 4 // place.world_size}[kind]
    return Trip(kind, draw.randint(1, most), draw.randrange(place.world_size), draw.random() < 0.5)  # type: ignore[arg-type]


def resident_growth(folder: Path, saves: int) -> tuple[int, int]:
    """Bytes resident after a tenth of the saves of one life, and after all of them."""
    job = Job(str(folder / "memory"), BLOCKS["D-compact"], saves, 1)
    life = live(job, Place(2, 3), seconds=3600)
    return life.resident[saves // 10], life.resident[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24, help="of each job")
    parser.add_argument("--saves", type=int, default=300, help="of the life whose memory is watched")
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        early, late = resident_growth(Path(scratch), arguments.saves)
        print(
            f"resident after {arguments.saves // 10} saves {early >> 20} MiB, after {arguments.saves} {late >> 20} MiB"
        )
        seed = arguments.seed
        while time.monotonic() - started < 60 * arguments.minutes:
            folder = Path(scratch) / str(seed)
            folder.mkdir()
            soak(folder, seed, tally, steps=arguments.steps)
            shutil.rmtree(folder)
            seed += 1
            print(f"{(time.monotonic() - started) / 60:.1f} min: {tally}", flush=True)


if __name__ == "__main__":
    main()
