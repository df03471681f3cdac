"""`callbacks=[ChildTuningCallback()]`: a stock Trainer with that line, and what its users switch on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.data_loader import DataLoaderShard

import ds_childtune
from ds_childtune import callback
from tests.support.documentation import blocks
from tests.support.ranks import RankPool
from tests.support.trainers import Run, arguments, config, fresh_accelerate, rows, run_of, tiny_gpt2, whole_weights

D = {"mode": "ChildTuning-D", "reserve_p": 0.3}
COMPACT = D | {"optimizer_state": "compact", "clip": "child"}
F = {"mode": "ChildTuning-F", "reserve_p": 0.3}


def train(
    folder: str,
    stage: int,
    block: dict[str, Any] | None,
    *,
    resume: str | bool | None = None,
    callback: dict[str, Any] | None = None,
    model: Any = tiny_gpt2,
    data: Any = None,
    **options: Any,
) -> Run:
    with fresh_accelerate():
        args = arguments(folder, config(stage, block), **options)
        module = model()
        before = whole_weights(module)
        line = ds_childtune.ChildTuningCallback(**(callback or {}))
        trainer = transformers.Trainer(
            module, args, train_dataset=data or rows(40), eval_dataset=rows(8, seed=1), callbacks=[line]
        )
        trainer.train(resume_from_checkpoint=resume)
        return run_of(trainer, line, before)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (D, {}),
    "compact, bf16": (COMPACT, {"bf16": True}),
    "accumulation, checkpointing, label smoothing": (
        COMPACT,
        {"gradient_checkpointing": True, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3},
    ),
    "evaluation, best model": (
        D,
        {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss"},
    ),
}


def run_and_resume(folder: str, stage: int) -> dict[str, tuple[Run, Run]]:
    found = {}
    for name, (block, options) in OPTIONS.items():
        place = f"{folder}/{name}"
        run = train(place, stage, block, **options)
        found[name] = run, train(place, stage, block, resume=f"{place}/checkpoint-2", **options)
    return found


def check_masked(run: Run, name: str, *, moved: float = 0.5) -> None:
    assert run.outside_moved() == 0, name
    assert run.inside_moved() > moved, name
    assert run.report.density == pytest.approx(0.3, abs=0.01), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stock_trainer_with_one_line(pool: RankPool, tmp_path: Path, stage: int) -> None:
    """Masked, logged, and resumed by the Trainer's own `resume_from_checkpoint`, bit for bit, by one load."""
    for found in pool[2].run(run_and_resume, str(tmp_path), stage):
        for name, (run, resumed) in found.items():
            check_masked(run, name, moved=0.2)
            assert run.step == resumed.step == (2 if "best" in name and run.step == 2 else 4), name
            assert all(torch.equal(run.end[n], resumed.end[n]) for n in run.end), name
            assert all(torch.equal(run.masks[n], resumed.masks[n]) for n in run.masks), name
            first = next(line for line in run.logs if "loss" in line)
            assert first["child_density"] == run.report.density, name
            assert first["child_fisher_seconds"] > 0, name
            assert first["child_trained_share"] == run.report.trained_share, name
            of_child = "clip" in OPTIONS[name][0]
            assert ("child_grad_share" in first) != of_child, name
            for line in (line for line in run.logs if "loss" in line):
                share = line.get("child_grad_share", 1.0)
                assert line["child_grad_norm"] == pytest.approx(line["grad_norm"] * share**0.5), name
                assert (share == 1.0) == of_child, name
                assert 0 < line["child_update"] < 1, name
            assert sum("child_density" in line for line in run.logs) == 1, name


def interrupted(folder: str) -> Run:
    return train(folder, 3, COMPACT, max_steps=2)


def resumed_elsewhere(folder: str, stage: int) -> Run:
    return train(folder, stage, COMPACT, resume=True)


def test_the_trainer_s_load_at_another_world_size_and_stage(pool: RankPool, tmp_path: Path) -> None:
    before = pool[2].run(interrupted, str(tmp_path))[0]
    for world_size, stage in ((1, 3), (2, 2)):
        for run in pool[world_size].run(resumed_elsewhere, str(tmp_path), stage):
            assert all(torch.equal(run.masks[n], before.masks[n]) for n in before.masks), (world_size, stage)
            assert run.step == run.logs[-1]["step"] > 2
            moved = {n: run.end[n] != before.end[n] for n in before.end}
            assert not any((moved[n] & ~m).any() for n, m in before.masks.items()), "outside, between the two runs"
            assert any(m.any() for m in moved.values()), "vacuous"


def without_a_block(folder: str) -> dict[str, Run]:
    """accelerate drops a block that it does not know; then it is an argument. And ChildTuning-F, and selector contrast."""
    general = [dict(torch.utils.data.default_collate(rows(2, seed=3)))]
    return {
        "contrast": train(
            f"{folder}/c", 2, None, callback={"config": D | {"selector": "contrast"}, "against": general}
        ),
        "D": train(f"{folder}/d", 2, None, callback={"config": D}),
        "F": train(f"{folder}/f", 2, None, callback={"config": F}),
        "own batches": train(
            f"{folder}/b", 2, D, callback={"batches": [dict(torch.utils.data.default_collate(rows(2)))]}
        ),
    }


def test_the_block_as_an_argument(pool: RankPool, tmp_path: Path) -> None:
    for found in pool[2].run(without_a_block, str(tmp_path)):
        for name in ("D", "own batches", "contrast"):
            check_masked(found[name], name)
        assert any(not torch.equal(mask, found["D"].masks[n]) for n, mask in found["contrast"].masks.items())
        assert found["own batches"].report.calibration_batches == 2  # one on each rank
        assert found["F"].step == 4
        assert found["F"].report.mode == "ChildTuning-F"


@contextmanager
def one_loop_for_each_loader() -> Iterator[None]:
    """As a loader needs whose workers persist: it has one iterator, and a second loop ends the first one's epoch."""
    original, busy = DataLoaderShard.__iter__, set()

    def loop(self: Any) -> Any:
        assert id(self) not in busy, "a loader in two loops"
        busy.add(id(self))
        try:
            yield from original(self)
        finally:
            busy.remove(id(self))

    with mock.patch.object(DataLoaderShard, "__iter__", loop):
        yield


def lora(folder: str) -> tuple[Run, Run, list[str]]:
    """LoRA's A has a gradient of zero until B has moved, so the child is chosen after two steps."""
    import peft

    def adapted() -> Any:
        transformers.set_seed(0)
        shape = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        return peft.get_peft_model(tiny_gpt2(), shape)

    block = COMPACT | {"include": ["*lora_*"]}
    late: Any = {"model": adapted, "callback": {"select_at": 2}, "max_steps": 6}
    with one_loop_for_each_loader():
        run = train(f"{folder}/at 2", 2, block, save_steps=4, **late)
    again = train(f"{folder}/at 2", 2, block, resume=f"{folder}/at 2/checkpoint-4", **late)
    at_once = train(f"{folder}/at 0", 2, block, model=adapted)
    return run, again, [str(run.report), str(at_once.report)]


def test_a_child_of_lora_is_chosen_later(pool: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for run, again, (later, at_once) in pool[2].run(lora, str(tmp_path)):
        assert run.step == again.step == 4, "of six steps, two were before the child"
        assert all(torch.equal(run.end[n], again.end[n]) for n in run.end), "resumed by the Trainer, bit for bit"
        assert "every score is zero" in at_once
        assert "select_at" in at_once
        assert "every score is zero" not in later


class OneRankFails(transformers.Trainer):
    """The second loader, which a child is chosen on, cannot be made on one rank."""

    made = 0

    def get_train_dataloader(self) -> Any:
        self.made += 1
        if self.made == 2 and dist.get_rank() == 1:
            raise OSError("the share is gone")
        return super().get_train_dataloader()


def loader_on_one_rank(folder: str) -> str:
    with fresh_accelerate():
        args = arguments(folder, config(2, COMPACT), save_strategy="no")
        line = ds_childtune.ChildTuningCallback(select_at=1)
        trainer = OneRankFails(tiny_gpt2(), args, train_dataset=rows(40), callbacks=[line])
        with pytest.raises(RuntimeError, match="the share is gone") as error:
            trainer.train()
        return str(error.value)


def test_a_loader_that_one_rank_cannot_make(pool: RankPool, tmp_path: Path) -> None:
    assert pool[2].run(loader_on_one_rank, str(tmp_path)) == ["[rank 1] OSError: the share is gone"] * 2


def refusals(folder: str) -> list[str]:
    said = []

    def told(action: Any) -> None:
        with pytest.raises((RuntimeError, ValueError), match="Remedy: ") as error:
            action()
        said.append(str(error.value))

    told(lambda: ds_childtune.ChildTuningCallback(select_at=-1))
    told(lambda: ds_childtune.ChildTuningCallback({"mode": "D"}))
    told(lambda: train(folder, 2, None))
    with fresh_accelerate():
        args = transformers.TrainingArguments(output_dir=folder, use_cpu=True, report_to=[], max_steps=1)
        trainer = transformers.Trainer(
            tiny_gpt2(), args, train_dataset=rows(8), callbacks=[ds_childtune.ChildTuningCallback()]
        )
        told(trainer.train)
    return said


def test_what_the_callback_refuses(pool: RankPool, tmp_path: Path) -> None:
    for said in pool[2].run(refusals, str(tmp_path)):
        assert ["select_at" in said[0], "child_tuning" in said[1]] == [True, True]
        assert "ChildTuningCallback({" in said[2]
        assert "deepspeed=" in said[3]


def two_trainers(folder: str) -> tuple[Run, Run, bool]:
    """Both are there before one trains: a plain one, and two with children. And whether the plain one has trained every element."""
    with fresh_accelerate():
        trainers, lines, befores = [], [], []
        for callbacks in ([], [ds_childtune.ChildTuningCallback(COMPACT)], [ds_childtune.ChildTuningCallback(COMPACT)]):
            model = tiny_gpt2()
            befores.append(whole_weights(model))
            lines += callbacks
            args = arguments(folder, config(3, None), save_strategy="no")
            trainers.append(transformers.Trainer(model, args, train_dataset=rows(40), callbacks=callbacks))
        for trainer in trainers:
            trainer.train()
        end = whole_weights(trainers[0].model)
        moved = sum(int((end[n] != w).sum()) for n, w in befores[0].items()) / sum(w.numel() for w in end.values())
        runs = [run_of(t, c, w) for t, c, w in zip(trainers[1:], lines, befores[1:], strict=True)]
        return runs[0], runs[1], moved > 0.9


def test_trainers_do_not_change_each_other_s_engines(pool: RankPool, tmp_path: Path) -> None:
    for first, second, all_moved in pool[2].run(two_trainers, str(tmp_path)):
        assert all_moved
        check_masked(first, "first")
        check_masked(second, "second")


def trained_again(folder: str) -> list[tuple[str, int, Run]]:
    """`train` after `evaluate`, and `train` again: what is said, the remedy, the steps of the child. The block is an argument."""
    found = []
    with fresh_accelerate():
        args = arguments(folder, config(3, None), save_strategy="no")
        line = ds_childtune.ChildTuningCallback(COMPACT)
        trainer = transformers.Trainer(
            tiny_gpt2(), args, train_dataset=rows(40), eval_dataset=rows(8), callbacks=[line]
        )
        trainer.evaluate()
        for _ in range(2):
            before = whole_weights(trainer.model)
            with pytest.raises(RuntimeError) as error:
                trainer.train()
            trainer.model_wrapped = trainer.model
            with mock.patch.object(callback, "tell") as told:
                trainer.train()
            warned = [call.args[0] for call in told.call_args_list]
            assert line.child is not None
            found.append(
                (str(error.value) + "".join(warned), line.child.step, run_of(trainer, line, before, detach=False))
            )
    return found


def steps_that_are_measured() -> tuple[list[int], int, int]:
    """Of two epochs and a bit; steps of an epoch where a loader has no length, and where ranks have loaders of other lengths."""
    args = SimpleNamespace(logging_strategy="epoch", gradient_accumulation_steps=2)
    steps = callback._steps_of_an_epoch(args, range(5))
    states = [SimpleNamespace(global_step=step, max_steps=7) for step in range(7)]
    logged = [state.global_step + 1 for state in states if callback._logs_after_next_step(args, state, steps)]
    return (
        logged,
        callback._steps_of_an_epoch(args, iter([])),
        callback._steps_of_an_epoch(args, range(6 + 4 * dist.get_rank())),
    )


def test_only_steps_that_are_logged_are_measured(pool: RankPool) -> None:
    assert pool[2].run(steps_that_are_measured) == [([3, 6, 7], 1, 1)] * 2


def test_a_trainer_that_has_an_engine_already(pool: RankPool, tmp_path: Path) -> None:
    for found in pool[2].run(trained_again, str(tmp_path)):
        # The first time weights are as they came.
        assert ["has moved weights, so an export of this child needs" in said for said, _, _ in found] == [False, True]
        for said, steps, run in found:
            assert "in an earlier evaluate(), predict() or train()" in said
            assert steps == 4, "those of another engine"
            check_masked(run, "again")


class Interrupts(transformers.TrainerCallback):
    """As Ctrl-C in a notebook, in the fourth step, where the checkpoint is of the second."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


def trained_on(folder: str, stage: int, *, interrupted: bool) -> Run:
    """The same Trainer goes on from its own checkpoint, as in a notebook: the remedy of the error, and more steps."""
    with fresh_accelerate():
        args = arguments(folder, config(stage, COMPACT))
        line, model = ds_childtune.ChildTuningCallback(), tiny_gpt2()
        before = whole_weights(model)
        trainer = transformers.Trainer(model, args, train_dataset=rows(40), callbacks=[line])
        if interrupted:
            trainer.add_callback(Interrupts)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer.remove_callback(Interrupts)
        else:
            trainer.train()
        first = run_of(trainer, line, before)
        trainer.model_wrapped = trainer.model
        trainer.args.max_steps = 6
        trainer.train(resume_from_checkpoint=True)
        second = run_of(trainer, line, before)
        assert all(torch.equal(second.masks[n], first.masks[n]) for n in first.masks)
        return second


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_trainer_goes_on_from_its_checkpoint(pool: RankPool, tmp_path: Path, stage: int, interrupted: bool) -> None:
    for run in pool[2].run(trained_on, str(tmp_path), stage, interrupted=interrupted):
        assert run.step == 6
        check_masked(run, "second")


class Stream(torch.utils.data.IterableDataset[Any]):
    """Without an end."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(rows(40))


class Once(Stream):
    def __init__(self) -> None:
        self.iterator = super().__iter__()

    def __iter__(self) -> Iterator[Any]:
        return self.iterator


def streams(folder: str) -> tuple[dict[str, Run], str]:
    def of(name: str, make: Any, **callback: Any) -> Run:
        options: dict[str, Any] = {"data": make(), "max_steps": 6, "save_strategy": "no"}
        if make is Once:  # else rank 0 reads for all, the iterator of this rank is not used
            options["accelerator_config"] = {"dispatch_batches": False}
        return train(f"{folder}/{name}", 2, COMPACT, callback=callback, **options)

    runs = {"at once": of("at once", Stream), "later": of("later", Stream, select_at=2)}
    with pytest.raises(ValueError, match="Remedy: ") as error:
        of("once", Once)
    runs["once"] = of("remedy", Once, batches=[dict(torch.utils.data.default_collate(rows(2)))])
    return runs, str(error.value)


def test_streams_of_training_data(pool: RankPool, tmp_path: Path) -> None:
    """One without an end calibrates on as many batches as are trained on, and one that is there once is not used up."""
    for runs, said in pool[2].run(streams, str(tmp_path)):
        assert "ChildTuningCallback(batches=[...])" in said
        assert runs["at once"].report.calibration_batches == 6 * 2 * 2, "steps, accumulation, ranks"
        assert [runs[name].step for name in ("at once", "later", "once")] == [6, 4, 6]
        for name in ("at once", "once"):
            check_masked(runs[name], name)
        # Accelerate's loader, which hands out batches from rank 0, is not disturbed in its epoch.
        assert runs["later"].logs[-1]["epoch"] == runs["at once"].logs[-1]["epoch"]


def best_is_the_first(folder: str, stage: int) -> Run:
    """Before there is a child."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_steps": 1}
    worst = {"metric_for_best_model": "loss", "greater_is_better": True}
    return train(folder, stage, COMPACT, callback={"select_at": 2}, **options, **worst)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_best_model_has_the_child(pool: RankPool, tmp_path: Path, stage: int) -> None:
    for run in pool[2].run(best_is_the_first, str(tmp_path), stage):
        assert run.step in (1, 2), "of a step after the choice"
        assert run.report.density == pytest.approx(0.3, abs=0.01)


def two_on_one_model(folder: str) -> tuple[str, Run]:
    """A second Trainer on the model of a first: what is said, and the run after the remedy."""

    def trainer_of(model: Any, line: ds_childtune.ChildTuningCallback) -> transformers.Trainer:
        args = arguments(folder, config(2, None), save_strategy="no")  # accelerate wants new ones for each
        return transformers.Trainer(model, args, train_dataset=rows(40), callbacks=[line])

    with fresh_accelerate():
        model = tiny_gpt2()
        never_trained = trainer_of(model, ds_childtune.ChildTuningCallback(D))
        first = trainer_of(model, ds_childtune.ChildTuningCallback(D))
        first.train()
        before = whole_weights(first.model)
        with pytest.raises(RuntimeError) as error:
            trainer_of(first.model, ds_childtune.ChildTuningCallback(D)).train()
        first.model_wrapped.destroy()
        line = ds_childtune.ChildTuningCallback(D)
        second = trainer_of(first.model, line)
        second.train()
        assert not never_trained.state.global_step
        return str(error.value), run_of(second, line, before)


def test_a_second_trainer_on_the_same_model(pool: RankPool, tmp_path: Path) -> None:
    for said, run in pool[2].run(two_on_one_model, str(tmp_path)):
        assert "trainer.model_wrapped.destroy()" in said
        check_masked(run, "second")


def corrected(folder: str, stage: int) -> tuple[str, Run]:
    """A block that `attach` refuses, and the corrected one in a new Trainer on the same model, as in a notebook."""
    with fresh_accelerate():
        model = tiny_gpt2()
        before = whole_weights(model)
        lines = [ds_childtune.ChildTuningCallback(COMPACT | more) for more in ({"include": ["no.such.name"]}, {})]
        for line in lines:
            args = arguments(folder, config(stage, None), save_strategy="no")
            trainer = transformers.Trainer(model, args, train_dataset=rows(40), callbacks=[line])
            if line is lines[0]:
                with pytest.raises(ValueError, match="Remedy: correct it") as error:
                    trainer.train()
            else:
                trainer.train()
        return str(error.value), run_of(trainer, line, before)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_block_is_corrected_without_a_new_process(pool: RankPool, tmp_path: Path, stage: int) -> None:
    for said, run in pool[2].run(corrected, str(tmp_path), stage):
        assert "no.such.name" in said
        check_masked(run, "corrected")


def shipped(folder: str, name: str) -> tuple[Run, dict[str, Any]]:
    """A Trainer with that file and TrainingArguments' own values."""
    with fresh_accelerate():
        args = transformers.TrainingArguments(
            folder, deepspeed=f"ds_configs/{name}", max_steps=2, report_to=[], use_cpu=True
        )
        line = ds_childtune.ChildTuningCallback()
        model = tiny_gpt2()
        before = whole_weights(model)
        trainer = transformers.Trainer(model, args, train_dataset=rows(80), callbacks=[line])
        trainer.train()
        assert line.child is not None
        kept = {"zero": line.child.engine.zero_optimization_stage(), **line.child.engine.optimizer.param_groups[0]}
        return run_of(trainer, line, before), kept


@pytest.mark.parametrize("name", sorted(path.name for path in Path("ds_configs").glob("*_auto_*.json")))
def test_a_shipped_config_with_the_trainer_s_values(pool: RankPool, tmp_path: Path, name: str) -> None:
    for run, kept in pool[2].run(shipped, str(tmp_path), name):
        assert name.startswith(f"zero{kept['zero']}_")
        assert kept["initial_lr"] == 5e-5, "TrainingArguments' default"
        assert run.report.eligible == run.report.model_numel, "every parameter"
        assert run.report.density == pytest.approx(0.1, abs=0.01)
        assert run.outside_moved() == 0
        assert run.inside_moved() > 0.5, "vacuous"


class Recorder(transformers.TrainerCallback):
    """What a logger such as TensorBoard's is handed."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(dict(kwargs["logs"]))


def logged(folder: str) -> tuple[list[dict[str, Any]], list[str], Run]:
    """By another callback, which was there before ours; and by DeepSpeed's monitor. One step."""
    monitor = {"enabled": True, "output_path": folder, "job_name": "job"}
    with fresh_accelerate():
        args = arguments(f"{folder}/out", config(2, D, csv_monitor=monitor), max_steps=1)
        recorder, line = Recorder(), ds_childtune.ChildTuningCallback()
        module = tiny_gpt2()
        before = whole_weights(module)
        trainer = transformers.Trainer(module, args, train_dataset=rows(40), callbacks=[recorder, line])
        trainer.train()
        run = run_of(trainer, line, before)
    dist.barrier()
    return recorder.seen, sorted(path.name for path in Path(folder).glob("job/*.csv")), run


def test_loggers_see_the_child(pool: RankPool, tmp_path: Path) -> None:
    for seen, files, run in pool[2].run(logged, str(tmp_path)):
        assert 0 < seen[0]["child_density"] < 1
        numbers = ("density", "trained_share", "fisher_seconds", "grad_norm", "grad_share", "update")
        assert {f"Train_child_{name}.csv" for name in numbers} <= set(files)
        moved = sum(float((run.end[n] - run.before[n])[mask].square().sum()) for n, mask in run.masks.items())
        inside = sum(float(run.before[n][mask].square().sum()) for n, mask in run.masks.items())
        assert seen[0]["child_update"] == pytest.approx((moved / inside) ** 0.5, rel=1e-4)


def accelerated(folder: str) -> tuple[int, int, bool, bool]:
    """The function that docs/trainer.md shows: applied steps, then those after `load_state`, weights and masks the same."""
    import accelerate

    names: dict[str, Any] = {"ds_childtune": ds_childtune}
    (shown,) = [b for b in blocks() if b.page == "docs/trainer.md" and "accelerator.prepare" in b.text]
    exec(shown.text, names)
    ends = []
    for resume_from in (None, f"{folder}/state"):
        with fresh_accelerate():
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
            plugin = accelerate.DeepSpeedPlugin(
                hf_ds_config={
                    "train_micro_batch_size_per_gpu": 2,
                    "gradient_accumulation_steps": 1,
                    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
                }
            )
            accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
            model = tiny_gpt2()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            loader = torch.utils.data.DataLoader(rows(8), batch_size=2)
            child = names["train"](accelerator, model, optimizer, loader, resume_from)
            if resume_from is None:
                accelerator.save_state(f"{folder}/state")
            masks = {p.name: child.gather_mask(p.name) for p in child.report().parameters}
            ends.append((child.step, masks))
            child.detach()
    (first, masks), (second, again) = ends
    return first, second, all(torch.equal(masks[n], again[n]) for n in masks), any(m.any() for m in masks.values())


def test_accelerate(pool: RankPool, tmp_path: Path) -> None:
    for first, second, same, some in pool[2].run(accelerated, str(tmp_path)):
        # Without accelerators accelerate takes each rank for the only one, so that both see every batch.
        assert first == 4
        assert second == 8, "counted on from what load_state brought"
        assert same
        assert some


def left_behind() -> tuple[bool, bool, bool]:
    """Whether `deepspeed.initialize` is as it was: after a callback that never trained, and between."""
    original = deepspeed.initialize
    line = ds_childtune.ChildTuningCallback({"mode": "ChildTuning-D", "reserve_p": 0.3})
    during = deepspeed.initialize is original
    del line
    import gc

    gc.collect()
    return during, deepspeed.initialize is original, dist.is_initialized()


def test_initialize_is_not_left_replaced(pool: RankPool) -> None:
    assert pool[2].run(left_behind) == [(False, True, True)] * 2
