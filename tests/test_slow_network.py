"""Ranks on separate hosts: what really goes over their links, and what happens when one of them is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ds_childtune
from tests.support import hosts as on_hosts
from tests.support.bits import equal_bits
from tests.support.engines import Setup, Weights, engine_of, model_weights, train_step
from tests.support.hosts import Hosts
from tests.support.ranks import RankFailure, Ranks
from tests.support.resuming import share
from tests.support.traffic import Traffic

SECONDS = 2.0
"""That a collective may wait for a rank, once a link is about to be cut."""

SETUP = Setup("llama", stage=2, bf16=True, bucket=200_000)

BLOCK = {
    "mode": "ChildTuning-D",
    "reserve_p": 0.1,
    "include": ["*"],
    "selector": "random",
    "optimizer_state": "compact",
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if reason := on_hosts.missing():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts


def three_sums(numel: int) -> tuple[int, int]:
    """Bytes that this host has sent, and that were counted."""
    dist.barrier()
    before = on_hosts.bytes_sent()
    with Traffic() as traffic:
        for _ in range(3):
            dist.all_reduce(torch.ones(numel))
    dist.barrier()
    return on_hosts.bytes_sent() - before, traffic.total


def cut_off_in_a_step(cutter: Hosts, folder: str) -> None:
    """Raises: two steps, a checkpoint, and a third step in which rank 1 loses its link."""
    torch.manual_seed(0)
    with engine_of(SETUP) as engine:
        ds_childtune.attach(engine, BLOCK).select()
        for step in range(2):
            train_step(engine, share(SETUP, step, 2))
        engine.save_checkpoint(folder)
        first = next(iter(engine.module.parameters()))

        ds_childtune.limit_waits(SECONDS)

        def cut(_: torch.Tensor) -> None:
            if dist.get_rank() == 1:
                cutter.cut_off(1)

        first.register_hook(cut)
        train_step(engine, share(SETUP, 2, 2))
        raise AssertionError("the step was taken")


def end_of(first: int, folder: str | None) -> Weights:
    """Weights after four steps; with a folder, from its checkpoint on."""
    torch.manual_seed(0)
    with engine_of(SETUP) as engine:
        child = ds_childtune.attach(engine, BLOCK)
        if folder is None:
            child.select()
        else:
            assert engine.load_checkpoint(folder)[0] is not None
        for step in range(first, 4):
            train_step(engine, share(SETUP, step, 2))
        return model_weights(engine)


def test_hosts_that_train_a_child(hosts: Hosts, tmp_path: Path) -> None:
    """One test, as ranks are made once for all of it.

    Links carry what the counter counts. A host that is cut off ends the run on both with an error within the time-out, and the run
    goes on from its checkpoint to the same end.
    """
    folder = str(tmp_path)
    ranks = Ranks(2, hosts)
    try:
        for sent, counted in ranks.run(three_sums, 100_000):
            assert counted / 2 <= sent <= 1.1 * counted / 2
        whole = ranks.run(end_of, 0, None)
        with pytest.raises(RankFailure) as failure:
            ranks.run(cut_off_in_a_step, hosts, folder)
        text = str(failure.value)
        assert text.count("Traceback") == 2, text
        assert "the step was taken" not in text
        assert "did not return" not in text
        assert text.count("Timed out waiting 2000ms") == 2
        hosts.join_again(1)
        resumed = ranks.run(end_of, 2, folder)
        assert equal_bits(whole[0], resumed[0])
        assert equal_bits(whole[1], resumed[1])
        assert not equal_bits(whole[0], ranks.run(end_of, 3, folder)[0]), "vacuous"
    finally:
        ranks.close()
