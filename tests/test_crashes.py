"""Whatever is killed, and whenever: the next start goes on from the last whole checkpoint, and ends with the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.soak import Tally, soak
from tests.support.bits import equal_bits
from tests.support.blocks import BLOCKS
from tests.support.lives import Job, Trip, live
from tests.support.places import Place

STEPS, SAVE_EVERY = 6, 2
PLACE = Place(2, 3)


@dataclass(frozen=True)
class Kill:
    """Before which event, in shares of what one save, one step or one Fisher pass has of them."""

    kind: str
    share: float
    rank: int = 0
    everyone: bool = False

    def trip(self, events: list[dict[str, int]]) -> Trip:
        units = {"calibration": 1, "step": STEPS}.get(self.kind, STEPS // SAVE_EVERY)
        count = 1 + int(self.share * events[self.rank][self.kind] / units)
        return Trip(self.kind, count, self.rank, self.everyone)  # type: ignore[arg-type]


KILLS = {
    "D-compact": [
        Kill("calibration", 0.5, rank=1),
        Kill("calibration", 0.0, everyone=True),
        Kill("file", 0.5),  # no checkpoint is there yet
        Kill("step", 1.5, rank=1),
        Kill("file", 1.8),  # one is, and the second one is almost there
        Kill("file", 0.4, rank=1, everyone=True),
    ],
    "F": [
        Kill("torch.save", 1.0),
        Kill("torch.save", 0.5, rank=1, everyone=True),
        Kill("file", 0.95, everyone=True),
        Kill("file", 0.9, everyone=True),
    ],
}


@pytest.mark.parametrize("mode", KILLS)
def test_killed_and_started_again(mode: str, tmp_path: Path) -> None:
    expected = live(Job(str(tmp_path / "whole"), BLOCKS[mode], STEPS, SAVE_EVERY), PLACE)
    assert expected.state is not None
    job = Job(str(tmp_path / "job"), BLOCKS[mode], STEPS, SAVE_EVERY)
    for kill in KILLS[mode]:
        life = live(job, PLACE, kill.trip(expected.events))
        assert life.codes[kill.rank] == -9, f"vacuous: {kill} killed nobody, exit codes {life.codes}"
    end = live(job, PLACE)
    assert end.state is not None
    assert equal_bits(end.state.masters, expected.state.masters)
    assert equal_bits(end.state.masks, expected.state.masks)
    assert end.state.step == expected.state.step == STEPS
    assert not list(Path(job.folder).glob(".*")), "something was left behind"


def test_a_short_soak(tmp_path: Path) -> None:
    """`python -m tests.soak` for long ones."""
    tally = Tally()
    soak(tmp_path, 5, tally, steps=8)
    assert tally.kills, "vacuous: nobody was killed"
    assert tally.moves, "vacuous: never at another world size or stage"
    assert tally.mismatches == 0
