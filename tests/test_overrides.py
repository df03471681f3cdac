"""What is replaced on DeepSpeed's objects comes back, and wrappers that others have put there go on working."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param

import ds_childtune
from ds_childtune.zero.overrides import Overrides
from tests.support.engines import Setup, engine_of, on_device, train_step
from tests.support.models import batches, deal
from tests.support.ranks import RankPool


class Thing:
    value = 1

    def double(self, number: int, *, plus: int = 0) -> int:
        return 2 * number + plus


def test_what_the_class_has_comes_back() -> None:
    thing = Thing()
    with Overrides() as overrides:
        overrides.attribute(thing, "value", 2)
        overrides.method(thing, "double", lambda number: 10 * number)
        assert (thing.value, thing.double(1)) == (2, 10)
    assert vars(thing) == {}
    assert (thing.value, thing.double(1)) == (1, 2)


def test_what_the_instance_had_comes_back_and_is_called() -> None:
    thing = Thing()
    thing.double = mine = lambda number, **_: 3 * number  # type: ignore[method-assign, assignment]
    thing.value = None  # type: ignore[assignment]
    overrides = Overrides()
    overrides.attribute(thing, "value", 2)
    overrides.around(thing, "double", lambda original, number: original(number) + 1)
    assert thing.double(1) == 4
    overrides.remove()
    assert vars(thing) == {"double": mine, "value": None}


def test_a_wrapper_that_was_put_on_top_since_stays_and_passes_on() -> None:
    thing = Thing()
    overrides = Overrides()
    overrides.method(thing, "double", lambda number: 10 * number)
    below = thing.double
    thing.double = wrapper = lambda number: below(number) + 1  # type: ignore[method-assign, assignment, misc]
    assert thing.double(1) == 11
    overrides.remove()
    assert vars(thing)["double"] is wrapper
    assert thing.double(1) == 3, "the wrapper still calls what is taken back"
    overrides.around(thing, "double", lambda original, number: -original(number))
    assert thing.double(1) == -3
    overrides.remove()
    assert vars(thing)["double"] is wrapper
    del thing.double
    assert thing.double(1) == 2


def test_two_on_one_name_are_taken_back_in_order() -> None:
    thing = Thing()
    first, second = Overrides(), Overrides()
    first.around(thing, "double", lambda original, number: original(number) + 1)
    second.around(thing, "double", lambda original, number: original(number) * 10)
    assert thing.double(1) == 30
    second.remove()
    second.remove()
    assert thing.double(1) == 3
    first.remove()
    assert vars(thing) == {}


def test_methods_of_a_class_and_after_an_exception() -> None:
    double = Thing.double

    def interrupted() -> None:
        with Overrides() as overrides:
            overrides.around(Thing, "double", lambda original, thing, number: original(thing, number, plus=1))
            assert Thing().double(1) == 3
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert vars(Thing)["double"] is double


def test_signatures_are_those_of_the_method() -> None:
    thing = Thing()
    with Overrides() as overrides:
        overrides.around(thing, "double", lambda original, *args, **kwargs: original(*args, **kwargs))
        assert list(inspect.signature(thing.double).parameters) == ["number", "plus"]


# ---------------------------------------------------------------- on engines


@dataclass(frozen=True)
class Case:
    setup: Setup
    child: dict[str, Any]
    extended: frozenset[str]
    """Names of methods that ds_childtune extends: what was there before is still called."""
    replaced: frozenset[str]
    """Names of methods whose place it takes, and of attributes."""


EVERYWHERE = {
    "checkpoint_engine.save",
    "checkpoint_engine.makedirs",
    "engine._load_checkpoint",
    "engine._take_model_step",
    "engine.load_module_state_dict",
    "engine.load_checkpoint",
    "engine.save_checkpoint",
}
WITH_ZERO = {"engine._copy_recovery_script", "engine._load_zero_checkpoint"}
COMPACT = {"mode": "ChildTuning-D", "reserve_p": 0.3, "optimizer_state": "compact"}
THREE = Setup("odd", stage=3, sub_group_size=20)
SENDING_2 = {"step", "zero_grad", "exit_backward", "clear_backward_seen_flag", "engine.zero_grad"}
STEPS_3 = {"_prepare_fp32_grad_for_sub_group", "_get_fp32_grad_state_partition"}
SENDING_3 = STEPS_3 | {"independent_gradient_partition_epilogue", "zero_grad", "_pre_step"}
READS_3 = {
    "_get_fp32_opt_state_partition",
    "_restore_from_bit16_weights",
    "set_full_hp_param",
    "set_local_hp_param",
    "offload_states",
    "set_fp32_grad_for_param",
    "set_local_grad_for_param",
    "update_fp32_grad_for_param_vectorized",
}
PASS_2 = {"process_gradients", "backward_epilogue", "scale_if_loss"}
READS_2 = {"offload_states", "single_partition_of_fp32_groups"} | {
    "parameter.set_full_hp_param",
    "mapping.get_hp_fragment",
}
STEPS_2 = {
    "reduce_ready_partitions_and_remove_grads",
    "overlapping_partition_gradients_reduce_epilogue",
    "finalize_gradient_accumulation_boundary",
    "partition_size",
    "parallel_partitioned_bit16_groups",
    "bit16_groups_flat",
    "_update_model_bit16_weights",
    "_lazy_init_hp_params_optimizer_state",
    "parameter.set_full_hp_grad",
    "mapping.get_lp_grad_fragment",
}
"""`step` replaces some of them, while it runs."""
PASS_3 = {"reduce_ready_partitions_and_remove_grads", "scale_if_loss"}


def case(setup: Setup, child: dict[str, Any], extended: set[str], replaced: set[str]) -> Case:
    def named(names: set[str]) -> set[str]:
        return {name if "." in name else f"optimizer.{name}" for name in names}

    (extended if setup.stage else replaced).update(WITH_ZERO)
    return Case(setup, COMPACT | child, frozenset(EVERYWHERE | named(extended)), frozenset(named(replaced)))


DEEP_3 = case(
    THREE,
    {},
    SENDING_3,
    READS_3
    | PASS_3
    | {"_reassign_or_swap_out_partitioned_parameters", "fp32_partitioned_groups_flat"}
    | {"reduce_independent_p_g_buckets_and_remove_grads"},
)
CASES = {
    "zero3": DEEP_3,
    "zero3-lean": replace(DEEP_3, setup=replace(THREE, lean=True)),
    "zero3-whole": case(
        THREE,
        {"sends": "whole"},
        STEPS_3 | {"partition_grads"},
        READS_3 | PASS_3 | {"_reassign_or_swap_out_partitioned_parameters", "fp32_partitioned_groups_flat"},
    ),
    "zero3-dense-clip": case(
        replace(THREE, clip=0.1),
        {"optimizer_state": "dense", "clip": "child"},
        {"_get_norm_groups"},
        PASS_3 | {"fp32_partitioned_groups_flat"},
    ),
    "zero2-dense-clip": case(
        Setup("odd", stage=2, clip=0.1, bf16=True),
        {},
        {"unscale_and_clip_grads", "_restore_from_bit16_weights"},
        PASS_2 | READS_2,
    ),
    "zero2": case(
        Setup("odd", stage=2, clip=0.1, bf16=True),
        {"clip": "child"},
        SENDING_2 | {"_restore_from_bit16_weights"},
        PASS_2 | READS_2 | STEPS_2,
    ),
    "zero2-offload": case(
        Setup("odd", stage=2, bf16=True, offload=True),
        {},
        SENDING_2 | {"_restore_from_bit16_weights", "scaled_global_norm"},
        PASS_2 | READS_2 | STEPS_2 | {"cpu_offload", "device", "_get_preflattened_grad_partition"},
    ),
    "bf16-optimizer": case(
        Setup("odd", stage=1, bf16=True, fp32_accumulation=True),
        {},
        {"parameter.set_full_hp_param"},
        {"accumulate_hp_grads_and_remove_lp", "backward_prologue", "backward_epilogue", "scale_if_loss"}
        | {"offload_states", "mapping.get_hp_fragment"},
    ),
    "zero0-clip": case(Setup("odd", clip=0.1), {"clip": "child"}, {"engine.clip_fp32_gradients"}, set()),
    "zero0-bf16-clip": case(Setup("odd", clip=0.1, bf16=True), {"clip": "child"}, {"step"}, set()),
}


def share(setup: Setup, seed: int, count: int) -> list[Any]:
    return deal(batches(setup.family, count, seed=seed), dist.get_rank(), dist.get_world_size())


def owners(engine: Any) -> dict[str, Any]:
    mapped = (p for p in engine.module.parameters() if getattr(p, "_hp_mapping", None) is not None)
    parameter = next(mapped, None)
    return {
        "engine": engine,
        "optimizer": engine.optimizer,
        "checkpoint_engine": engine.checkpoint_engine,
        "parameter": parameter,
        "mapping": getattr(parameter, "_hp_mapping", None),
    }


def counting(method: Callable[..., Any], name: str, calls: Counter[str]) -> Callable[..., Any]:
    """A user's own wrapper."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return method(*args, **kwargs)

    return wrapper


@dataclass
class Seen:
    overridden: set[str]
    attached: Counter[str]
    """Calls of the wrappers while a child trained."""
    after: Counter[str]
    lost: list[str]
    """Wrappers that were not there any more after `detach`."""
    carries_child: tuple[bool, bool]
    """Whether a checkpoint has a child: one that was saved before `detach`, one after."""


def use(engine: Any, setup: Setup, folder: str, tag: str) -> None:
    """Everything that calls what is overridden: steps, a checkpoint, reads."""
    for step in range(2):
        train_step(engine, share(setup, step, 2))
    safe_get_full_fp32_param(next(engine.module.parameters()))
    if setup.stage == 3:
        safe_get_full_grad(next(engine.module.parameters()))
    if setup.stage == 2:
        for batch in share(setup, 0, 2):
            engine.backward(engine(**on_device(engine, batch)))
            safe_get_full_grad(next(engine.module.parameters()))
            engine.step()
            engine.zero_grad()
        engine.optimizer.refresh_fp32_params()
    if setup.fp32_accumulation:
        for parameter in engine.module.parameters():
            safe_set_full_fp32_param(parameter, safe_get_full_fp32_param(parameter))
    engine.save_checkpoint(folder, tag)
    engine.load_checkpoint(folder, tag)


def wrapped_by_the_user(case: Case, with_child: bool, folder: str) -> Seen:
    overridden: set[str] = set()
    calls: Counter[str] = Counter()
    original = Overrides.attribute
    with engine_of(case.setup) as engine:
        place = owners(engine)
        wrappers = {}
        for name in sorted(case.extended | case.replaced):
            owner, _, attribute = name.partition(".")
            if callable(value := getattr(place[owner], attribute, None)):
                wrappers[name] = counting(value, name, calls)
                setattr(place[owner], attribute, wrappers[name])

        def recording(self: Overrides, owner: Any, name: str, value: Any) -> None:
            overridden.update(f"{kind}.{name}" for kind, of in place.items() if of is owner)
            original(self, owner, name, value)

        Overrides.attribute = recording  # type: ignore[method-assign]
        try:
            if with_child:
                child = ds_childtune.attach(engine, case.child)
                child.select(share(case.setup, 1000, 2))
                calls.clear()  # calibration has backward passes of its own
            use(engine, case.setup, folder, "before")
            attached = calls.copy()
            if with_child:
                child.detach()
        finally:
            Overrides.attribute = original  # type: ignore[method-assign]
        lost = [n for n, w in wrappers.items() if vars(place[n.partition(".")[0]]).get(n.partition(".")[2]) is not w]
        calls.clear()
        use(engine, case.setup, folder, "after")
    carries = tuple((Path(folder) / tag / "child").is_dir() for tag in ("before", "after"))
    return Seen(overridden, attached, calls, lost, carries)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_a_user_s_wrappers_are_called_and_come_back(pool: RankPool, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain_case = replace(case, setup=replace(case.setup, lean=False))
    plain = pool[2].run(wrapped_by_the_user, plain_case, False, str(tmp_path / "plain"))
    with_child = pool[2].run(wrapped_by_the_user, case, True, str(tmp_path / "child"))
    # The first rank writes the recovery script.
    assert all(plain[0].attached[n] for n in case.extended), f"vacuous: {plain[0].attached}"
    for seen, expected in zip(with_child, plain, strict=True):
        # `destroy` ends the engine, so that it is not called here.
        assert seen.overridden == case.extended | case.replaced | {"engine.destroy"}, (
            "a name is not tested here, or is not overridden"
        )
        # DeepSpeed links parameters anew when it loads a checkpoint.
        assert seen.lost == expected.lost
        assert set(seen.lost) <= {"parameter.set_full_hp_param", "parameter.set_full_hp_grad"}
        assert seen.after == expected.after, "after detach, wrappers are called as often as without a child"
        assert {n: seen.attached[n] for n in case.extended} == {n: expected.attached[n] for n in case.extended}
        assert seen.carries_child == (True, False)
