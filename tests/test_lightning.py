"""The recipe of docs/trainer.md for Lightning, resume included. Its strategy takes no CPU, so three of its methods are replaced."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_childtune
from tests.support.documentation import blocks
from tests.support.engines import Weights
from tests.support.ranks import RankPool
from tests.support.trainers import whole_weights

ROWS, STEPS = 12, 6


@dataclass(frozen=True)
class Run:
    before: Weights
    after: Weights
    masks: Weights
    step: int


def recipe() -> Any:
    """The callback that the page shows."""
    names: dict[str, Any] = {"ds_childtune": ds_childtune}
    (shown,) = [b for b in blocks() if b.page == "docs/trainer.md" and "on_fit_start" in b.text]
    exec(shown.text, names)
    return names["ChildTuning"]()


def strategy_on_cpu(stage: int) -> Any:
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

    class OnCPU(DeepSpeedStrategy):
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)  # whose index DeepSpeed compares with 0

        def setup_environment(self) -> None:
            DDPStrategy.setup_environment(self)  # without "only supported on CUDA GPUs"

        def setup_distributed(self) -> None:
            self.set_world_ranks()  # without a look at CUDA_VISIBLE_DEVICES
            self._init_deepspeed_distributed()

    buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    zero = {"stage": stage, **buckets, "stage3_param_persistence_threshold": 0}
    return OnCPU(config={"zero_optimization": zero, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0})


def module() -> Any:
    import lightning

    class Net(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
            self.head = nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            for layer in self.layers:
                x = torch.relu(layer(x))
            loss = nn.functional.cross_entropy(self.head(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    return Net()


def fit(folder: str, stage: int, resume: str | None = None) -> Run:
    """Two epochs, each of which is saved. Ranks have their rows in order: Lightning's own sampler depends on where a run began."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    torch.manual_seed(1)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows = torch.randn(ROWS, 8), torch.randint(0, 2, (ROWS,))
    data = torch.utils.data.TensorDataset(*(each[rank::world_size] for each in rows))
    loader = torch.utils.data.DataLoader(data, batch_size=2 * ROWS // STEPS // world_size)
    callback, net = recipe(), module()
    before = whole_weights(net)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy_on_cpu(stage),
        callbacks=[callback, ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)],
        max_epochs=2,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(net, loader, ckpt_path=resume)
    child = callback.child
    masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
    run = Run(before, whole_weights(net), masks, child.step)
    child.detach()
    return run


def interrupted(folder: str, stage: int) -> tuple[Run, Run]:
    """A whole run; and one that goes on from where that was after its first epoch."""
    elastic = {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, about torch, its own loaders and loggers
        for name, value in (elastic | here).items():
            patch.setitem(os.environ, name, value)
        whole = fit(f"{folder}/whole", stage)
        return whole, fit(f"{folder}/resumed", stage, f"{folder}/whole/epoch=0.ckpt")


@pytest.mark.parametrize("stage", [2, 3])
def test_lightning(pool: RankPool, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("lightning")
    for whole, resumed in pool[2].run(interrupted, str(tmp_path), stage):
        assert whole.step == resumed.step == STEPS
        moved = {n: whole.before[n] != whole.after[n] for n in whole.before}
        assert not any((moved[n] & ~mask).any() for n, mask in whole.masks.items())
        assert any((~mask).any() for mask in whole.masks.values()), "vacuous: everything is in the child"
        assert all(moved[n][mask].any() for n, mask in whole.masks.items() if n.startswith("head"))
        for name, weight in whole.after.items():
            assert torch.equal(whole.masks[name], resumed.masks[name]), name
            assert torch.equal(weight, resumed.after[name]), name


def test_what_stands_in_the_way_on_a_cpu(tmp_path: Path) -> None:
    """When this fails, Lightning takes a CPU, and `strategy_on_cpu` can go."""
    lightning = pytest.importorskip("lightning")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(accelerator="cpu", strategy="deepspeed", logger=False, default_root_dir=tmp_path)
        with pytest.raises(RuntimeError, match="only supported on CUDA GPUs"):
            trainer.fit(module(), torch.utils.data.DataLoader([torch.zeros(1)]))
