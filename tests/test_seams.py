"""What ds_childtune takes for granted about DeepSpeed and torch, and how its own modules may depend on each other.

After an upgrade, look here first: each failure names the attribute that `zero/` reads and no longer finds.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_childtune
from ds_childtune.zero.engine import wrapper_of
from tests.support.engines import Optimizer, Setup, engine_of, train_step
from tests.support.models import batches
from tests.support.ranks import RankPool

PACKAGE = Path(ds_childtune.__file__).parent

# ---------------------------------------------------------------- attributes

ENGINE = (
    "_config._param_dict",
    "_config.zero_config.offload_optimizer",
    "_take_model_step()",
    "_copy_recovery_script()",
    "_get_ckpt_name()",
    "_load_checkpoint()",
    "_load_zero_checkpoint()",
    "_get_zero_ckpt_name()",
    "_is_gradient_accumulation_boundary",
    "_unmanaged_backward_count",
    "_config.zero_config.reduce_bucket_size",
    "autotp_size()",
    "backward()",
    "basic_optimizer._optimizer_step_pre_hooks",
    "basic_optimizer.param_groups",
    "basic_optimizer.register_step_post_hook()",
    "basic_optimizer.register_step_pre_hook()",
    "basic_optimizer.state",
    "clip_fp32_gradients()",
    "checkpoint_engine.is_decoupled()",
    "checkpoint_engine.makedirs()",
    "checkpoint_engine.save()",
    "config",
    "get_data_types()",
    "global_samples",
    "global_steps",
    "gradient_clipping()",
    "gradient_accumulation_steps()",
    "has_moe_layers",
    "inside_no_sync_ctxt",
    "is_deepcompile_enabled()",
    "is_gradient_accumulation_boundary()",
    "load_checkpoint()",
    "load_module_state_dict()",
    "load_universal_checkpoint()",
    "lr_scheduler",
    "managed_gradient_accumulation()",
    "micro_steps",
    "monitor.enabled",
    "monitor.write_events()",
    "module",
    "mpu",
    "pipeline_parallelism",
    "save_checkpoint()",
    "save_non_zero_checkpoint",
    "save_zero_checkpoint",
    "seq_data_parallel_group",
    "sequence_parallel_size",
    "skipped_steps",
    "super_offload()",
    "torch_autocast_z0_gradscaler",
    "use_node_local_storage()",
    "zero_elastic_checkpoint()",
    "zenflow",
    "zero_grad()",
    "zero_optimization_stage()",
    "zero_partial_offload()",
)
"""Read on every engine; a method ends in ()."""

ADAMW = Optimizer()
FUSED = Optimizer("AdamW", {"lr": 1e-2, "eps": 1e-3})

WRAPPERS: dict[str, tuple[Setup, tuple[str, ...]]] = {
    "AdamW": (Setup("odd", stage=0), ("param_groups",)),
    "FP16_UnfusedOptimizer": (
        Setup("odd", stage=0, bf16=True),
        ("optimizer", "fp32_groups", "fp16_groups", "loss_scale_config.cur_scale"),
    ),
    "FP16_Optimizer": (
        Setup("odd", stage=0, bf16=True, optimizer=FUSED),
        (
            "optimizer",
            "fp32_groups_flat",
            "fp16_groups",
            "fp16_groups_flat",
            "state_dict()",
            "load_state_dict()",
            "loss_scale_config.cur_scale",
            "fused_adam_legacy",
        ),
    ),
    "BF16_Optimizer": (
        Setup("odd", stage=1, bf16=True, fp32_accumulation=True),
        (
            "_grad_acc_hooks",
            "optimizer",
            "fp32_groups_flat_partition",
            "bf16_groups",
            "_is_gradient_accumulation_boundary",
            "_backward_active_depth",
            "accumulate_hp_grads_and_remove_lp()",
            "backward_epilogue()",
            "backward_prologue()",
            "clear_backward_seen_flag()",
            "exit_backward()",
            "scale_if_loss()",
            "dp_process_group",
            "update_lp_params()",
        ),
    ),
    "DeepSpeedZeroOptimizer": (
        Setup("odd", stage=2),
        (
            "_grad_acc_hooks",
            "_global_grad_norm",
            "clip_grad",
            "optimizer",
            "single_partition_of_fp32_groups",
            "bit16_groups",
            "round_robin_gradients",
            "round_robin_bit16_groups",
            "round_robin_bit16_offsets",
            "offload_gradient_dict",
            "_backward_active_depth",
            "_is_gradient_accumulation_boundary",
            "backward_epilogue()",
            "clear_backward_seen_flag()",
            "exit_backward()",
            "loss_scaler.cur_scale",
            "micro_step_id",
            "partition_gradients",
            "process_gradients()",
            "scale_if_loss()",
            "torch_autocast_gradscaler",
            "averaged_gradients",
            "cpu_offload",
            "cpu_offload_pin_memory",
            "_get_preflattened_grad_partition()",
            "device",
            "params_in_partition",
            "get_param_id()",
            "scaled_global_norm()",
            "_restore_from_bit16_weights()",
            "dtype",
            "gradient_accumulation_dtype",
            "master_weights_and_grads_dtype",
            "offload_states()",
            "parallel_partitioned_bit16_groups",
            "real_dp_process_group",
            "unscale_and_clip_grads()",
            "_clear_param_grad_only()",
            "_epilogue_ran_this_backward",
            "_lazy_init_hp_params_optimizer_state()",
            "_release_ipg_buffers()",
            "_update_model_bit16_weights()",
            "bit16_groups_flat",
            "exit_backward()",
            "finalize_gradient_accumulation_boundary()",
            "gradient_average",
            "gradient_predivide_factor",
            "ipg_buckets",
            "is_gradient_accumulation_boundary()",
            "overflow",
            "overlapping_partition_gradients_reduce_epilogue()",
            "partition_size",
            "postscale_gradients",
            "reduce_ready_partitions_and_remove_grads()",
            "reduce_scatter",
            "set_gradient_accumulation_boundary()",
            "step()",
            "zero_grad()",
            "dp_process_group",
            "update_lp_params()",
        ),
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        Setup("odd", stage=3, sub_group_size=20),
        (
            "_grad_acc_hooks",
            "optimizer",
            "fp32_partitioned_groups_flat",
            "fp16_groups",
            "grad_position",
            "get_param_id()",
            "_backward_active_depth",
            "_epilogue_ran_this_backward",
            "_get_param_partition_rank()",
            "_clear_fp32_optimizer_param_groups()",
            "_is_gradient_accumulation_boundary",
            "_partition_all_parameters()",
            "clear_backward_seen_flag()",
            "exit_backward()",
            "grad_partitions_flat_buffer",
            "loss_scaler.cur_scale",
            "micro_step_id",
            "parameter_offload.get_param_coordinator()",
            "persistent_parameters",
            "scale_if_loss()",
            "dp_process_group",
            "sub_group_to_group_id",
            "checkpoint_event_prologue()",
            "checkpoint_event_epilogue()",
            "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
            "_get_norm_groups()",
            "_unflatten_partitioned_parameters()",
            "averaged_gradients",
            "device",
            "dtype",
            "fp16_partitioned_groups_flat",
            "gradient_accumulation_dtype",
            "master_weights_and_grads_dtype",
            "offload_optimizer",
            "offload_param",
            "all2all_process_group",
            "contiguous_gradients",
            "get_param_comm_dtype()",
            "gradient_predivide_factor",
            "invalidate_secondary_tensor()",
            "ipg_buckets",
            "max_param_reduce_events",
            "param_reduce_events",
            "partition_count",
            "partition_grads()",
            "postscale_gradients",
            "reduce_and_partition_stream",
        ),
    ),
}
OFFLOADED: dict[str, tuple[str, ...]] = {
    "DeepSpeedZeroOptimizer": (
        "_get_offload_gradient_dict()",
        "_offload_accumulated_param_ids",
        "accumulated_grads_in_cpu",
        "param_buffer_of_bit16_for_cpu_offload_groups",
        "reset_cpu_buffers()",
        "temp_grad_buffer_for_cpu_offload",
        "temp_grad_buffer_for_gpu_offload",
        "update_offload_overflow_tracker()",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (),
}
WRAPPERS |= {
    f"{name}, offload": (replace(WRAPPERS[name][0], offload=True), ("norm_for_param_grads", "grad_position", *more))
    for name, more in OFFLOADED.items()
}
"""By the class of `engine.optimizer`: an engine that has it, and what is read on it."""

PARTITIONED = (
    "ds_numel",
    "ds_process_group",
    "ds_shape",
    "ds_tensor.ds_numel",
    "ds_tensor.final_location",
    "ds_secondary_tensor",
    "ds_secondary_tensor_num_of_groups",
)
"""Read on a parameter of ZeRO-3."""


OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "_create_fp32_partitions": (),
    "_setup_for_real_optimizer": (),
    "partition_grads": ("params_to_release", "grad_partitions"),
    "reduce_ready_partitions_and_remove_grads": ("param",),
    "scale_if_loss": ("value",),
    "reduce_independent_p_g_buckets_and_remove_grads": ("param",),
    "independent_gradient_partition_epilogue": (),
    "zero_grad": ("set_to_none",),
    "_pre_step": (),
    "_post_step": ("timer_names",),
    "_prepare_fp32_grad_for_sub_group": ("sub_group_id",),
    "_reassign_or_swap_out_partitioned_parameters": ("sub_group_id",),
    "_get_fp32_opt_state_partition": ("param", "release_swap_buffers", "optim_state_key"),
    "_get_fp32_grad_state_partition": ("param", "release_swap_buffers"),
    "_restore_from_bit16_weights": (),
    "offload_states": ("include", "device", "pin_memory", "non_blocking"),
    "set_fp32_grad_for_param": ("value", "param"),
    "set_full_hp_param": ("value", "param", "optim_state_key"),
    "set_local_grad_for_param": ("value", "param"),
    "set_local_hp_param": ("value", "param", "optim_state_key"),
    "update_fp32_grad_for_param_vectorized": ("update_func", "param_list"),
}
"""Methods of ZeRO-3's optimizer that are replaced, on the instance or for a lean start, and what they are called with."""


def missing_on(root: Any, paths: tuple[str, ...], what: str) -> list[str]:
    """One line for each dotted path that does not lead anywhere, or to no method where one is called."""
    lines = []
    for path in paths:
        place = root
        for name in path.removesuffix("()").split("."):
            if not hasattr(place, name):
                lines.append(f"{what}: expected .{path}, but {type(place).__name__} has no attribute {name!r}")
                break
            place = getattr(place, name)
        else:
            if path.endswith("()") and not callable(place):
                lines.append(f"{what}: expected .{path} to be a method, got {type(place).__name__}")
    return lines


def missing_after_a_step(name: str) -> list[str]:
    """Attributes of the engine, of its optimizer, and the layout of fragments."""
    setup, paths = WRAPPERS[name]
    name = name.partition(",")[0]
    with engine_of(setup) as engine:
        train_step(engine, batches(setup.family, 1))
        optimizer = engine.optimizer
        lines = missing_on(engine, ENGINE, "engine") + missing_on(optimizer, paths, name)
        if type(optimizer).__name__ != name:
            lines.append(f"expected DeepSpeed to choose {name} here, got {type(optimizer).__name__}")
        if wrapper_of(engine) != ("plain" if name == "AdamW" else name):
            lines.append(f"expected wrapper_of to give {name}, got {wrapper_of(engine)}")
        trainable = [p for p in engine.module.parameters() if p.requires_grad]
        if name in ("BF16_Optimizer", "DeepSpeedZeroOptimizer"):
            lines += missing_on(trainable[0], ("_hp_mapping", "set_full_hp_param()"), "parameter")
            mappings = [p._hp_mapping for p in trainable if getattr(p, "_hp_mapping", None) is not None]
            addresses = ("lp_fragment_address.start", "hp_fragment_address.start", "hp_fragment_address.numel")
            addresses += ("hp_fragment", "optim_fragment", "get_hp_fragment()", "set_optim_state_fragment()")
            lines += missing_on(mappings[0], addresses, "_hp_mapping") if mappings else ["no parameter has a fragment"]
        if name == "DeepSpeedZeroOptimizer_Stage3":
            lines += missing_on(trainable[0], (*PARTITIONED, "ds_id", "partition_numel()"), "parameter")
            lines += missing_on(optimizer.fp32_partitioned_groups_flat[0], ("ds_id",), "flat shard")
            position = optimizer.grad_position[optimizer.get_param_id(trainable[0])]
            coordinator = optimizer.parameter_offload.get_param_coordinator()
            tracing = ("is_invalid_trace()", "_invalidate_trace()", "release_backward_leftovers()")
            lines += missing_on(coordinator, tracing, "parameter coordinator")
            lines += missing_on(engine.module._parameters, ("_in_forward",), "ZeRO-3's dictionary of parameters")
            if len(position) != 3:
                lines.append(f"grad_position: expected (sub-group, offset, numel), got {position}")
    return lines


@pytest.mark.parametrize("name", WRAPPERS)
def test_engines_have_what_is_read(pool: RankPool, name: str) -> None:
    lines = sorted({line for rank in pool[2].run(missing_after_a_step, name) for line in rank})
    assert not lines, "DeepSpeed's attributes have changed:\n" + "\n".join(lines)


def test_overridden_methods_have_the_parameters_that_are_passed() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    for name, expected in OVERRIDDEN.items():
        method = getattr(DeepSpeedZeroOptimizer_Stage3, name)
        # What DeepSpeed times is in a wrapper that hides the signature.
        method = inspect.getclosurevars(method).nonlocals.get("func", method)
        assert tuple(inspect.signature(method).parameters) == ("self", *expected), name


def test_what_a_calibration_pass_replaces_at_other_stages_has_the_parameters_that_are_passed() -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert tuple(inspect.signature(DeepSpeedZeroOptimizer.process_gradients).parameters) == ("self", "param", "i")
    for name in ("accumulate_hp_grads_and_remove_lp", "backward_epilogue", "backward_prologue"):
        assert callable(getattr(BF16_Optimizer, name))
    assert isinstance(parameter_offload.FWD_MODULE_STACK, list)


def test_the_pins_are_what_zero_reads() -> None:
    """An attribute of the engine or of its optimizer that `zero/` newly reads has to be pinned above."""
    pinned = {part.removesuffix("()") for path in ENGINE for part in path.split(".")}
    pinned |= {part.removesuffix("()") for _, paths in WRAPPERS.values() for path in paths for part in path.split(".")}
    pinned |= set(OVERRIDDEN)
    read = set()
    for node in itertools.chain(*(ast.walk(parsed(module)) for module in MODULES if wing(module) == "zero")):
        if isinstance(node, ast.Attribute) and (
            (isinstance(node.value, ast.Name) and node.value.id in ("engine", "optimizer"))
            or (isinstance(node.value, ast.Attribute) and node.value.attr == "_optimizer")
        ):
            read.add(node.attr)
        is_lookup = (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr")
        )
        if is_lookup and isinstance(node.args[0], ast.Name) and node.args[0].id in ("engine", "optimizer", "wrapper"):
            read |= {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    pinned |= {part for path in PARTITIONED for part in path.split(".")}
    for node in ast.walk(ast.parse((PACKAGE / "zero" / "weights.py").read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("ds_"):
            read.add(node.attr)
    # Optional by design: legacy fp16 fusion, and an attribute that ds_childtune itself sets.
    assert read - pinned - {"fused_lamb_legacy", "child_tuner"} == set(), "pin these in tests/test_seams.py"


def test_functions_have_the_parameters_that_are_passed() -> None:
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils.logging import print_dist

    expected = {
        DeepSpeedEngine.backward: ["loss", "scale_wrt_gas"],
        DeepSpeedEngine._take_model_step: ["lr_kwargs"],
        DeepSpeedEngine.load_module_state_dict: ["checkpoint", "strict", "custom_load_fn"],
        deepspeed.comm.all_reduce: ["tensor", "op", "async_op"],
        deepspeed.comm.reduce_scatter_tensor: ["output_tensor", "tensor"],
        deepspeed.comm.all_to_all_single: ["output", "tensor", "output_split_sizes", "input_split_sizes", "group"],
        deepspeed.comm.all_gather_into_tensor: ["output_tensor", "tensor", "group"],
        deepspeed.comm.all_gather_object: ["object_list", "obj"],
        deepspeed.comm.broadcast_object_list: ["object_list", "src"],
        deepspeed.comm.get_rank: ["group"],
        print_dist: ["ranks"],
        torch.optim.Optimizer.register_step_pre_hook: ["hook"],
        torch.optim.Optimizer.register_step_post_hook: ["hook"],
    }
    for function, names in expected.items():
        # DeepSpeed's NVTX decorator hides the signature of what it wraps.
        plain = inspect.getclosurevars(function).nonlocals.get("func", function)
        parameters = inspect.signature(plain).parameters
        for name in names:
            assert name in parameters, f"{function.__qualname__}: expected a parameter {name!r}, has {list(parameters)}"


def test_torch_marks_a_step_that_calls_hooks() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert type(optimizer).step.hooked  # type: ignore[attr-defined]


def hooks_and_groups(stage: int) -> tuple[int, int, bool]:
    """How often the step hook fires in one step; flat shards that it sees; whether all of them had a gradient."""
    with engine_of(Setup("odd", stage=stage, sub_group_size=20)) as engine:
        seen: list[tuple[torch.Tensor, bool]] = []
        calls = []

        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            calls.append(None)
            seen.extend((p, p.grad is not None) for group in optimizer.param_groups for p in group["params"])

        handle = getattr(engine.optimizer, "optimizer", engine.optimizer).register_step_pre_hook(hook)
        train_step(engine, batches("odd", 1))
        handle.remove()
    return len(calls), len({id(tensor) for tensor, _ in seen}), all(has for _, has in seen)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_base_optimizer_is_handed_every_flat_shard_once(pool: RankPool, stage: int) -> None:
    """See [Note: the one place]."""
    for calls, shards, have_gradients in pool[2].run(hooks_and_groups, stage):
        assert have_gradients, "the base optimizer is stepped without gradients"
        assert calls == (shards if stage else 1), f"expected one call per flat shard, got {calls} for {shards} shards"
        assert shards > 1 or stage in (1, 2)


# ---------------------------------------------------------------- the architecture

MAY_IMPORT = {
    "child": {"child", "shards", "config"},
    "zero": {"zero", "child", "shards", "ranks"},
    "selection": {"selection", "child", "zero", "shards", "ranks", "config", "random_states"},
    "child_files": {"child_files", "child", "zero", "shards", "ranks", "gathering", "names", "_version"},
    "planning": {"planning", "selection", "child", "zero", "shards", "config", "names"},
}
"""What each wing's modules import from the package. `checkpoint/` and the top level join them, and nothing below imports those."""

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)


def wing(module: str) -> str:
    """The folder that a module is in, or its own name at the top level."""
    return module.partition(".")[0]


def parsed(module: str) -> ast.Module:
    path = PACKAGE / module.replace(".", "/")
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def imported_by(tree: ast.AST) -> set[str]:
    """Dotted names of the modules that are imported anywhere below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inside if name.removeprefix("ds_childtune.") in MODULES} or {node.module}
    return names


def ours(module: str) -> set[str]:
    """The package's modules that a module imports."""
    return {name.removeprefix("ds_childtune.") for name in imported_by(parsed(module))} & set(MODULES)


def test_the_rules_see_every_wing() -> None:
    assert {wing(m) for m in MODULES} >= {*MAY_IMPORT, "checkpoint"}, "vacuous: a wing has no modules"
    assert "zero.engine" in ours("tuner"), "vacuous: no import was found"


@pytest.mark.parametrize("module", [m for m in MODULES if wing(m) in MAY_IMPORT])
def test_a_wing_imports_what_it_may(module: str) -> None:
    wrong = {name for name in ours(module) if wing(name) not in MAY_IMPORT[wing(module)]}
    assert not wrong, f"{module} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [m for m in MODULES if wing(m) == "zero"])
def test_reading_zero_imports_no_deepspeed(module: str) -> None:
    """Nothing happens at import: `zero/` imports DeepSpeed's runtime inside the functions that need it."""
    body = ast.Module([n for n in parsed(module).body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
    public = ("deepspeed.comm", "deepspeed.accelerator")
    names = [name for name in imported_by(body) if name.partition(".")[0] == "deepspeed"]
    assert not [name for name in names if name != "deepspeed" and not name.startswith(public)]


@pytest.mark.parametrize("module", [m for m in MODULES if wing(m) != "zero"])
def test_deepspeed_is_imported_in_zero_and_where_ranks_talk(module: str) -> None:
    """`ranks` has what others need of its communication, `random_states` asks for the accelerator's generator."""
    allowed = {
        "ranks": {"deepspeed", "deepspeed.accelerator", "deepspeed.utils.logging"},
        "random_states": {"deepspeed.accelerator"},
    }
    found = {name for name in imported_by(parsed(module)) if name.partition(".")[0] == "deepspeed"}
    assert found == allowed.get(module, set())


@pytest.mark.parametrize("module", [m for m in MODULES if wing(m) != "zero"])
def test_only_zero_reads_the_engine_s_insides(module: str) -> None:
    """No private attribute of an engine, and none of the wrappers' names, outside `zero/`."""
    insides = {name.removesuffix("()") for _, names in WRAPPERS.values() for name in names}
    # Names of torch's, too.
    insides -= {"optimizer", "param_groups", "device", "dtype", "state_dict", "load_state_dict", "step", "zero_grad"}
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Attribute):
            assert node.attr not in insides, f"{module} line {node.lineno} reads .{node.attr}"


def probes(tree: ast.AST) -> list[str]:
    """Attributes that an optimizer is asked for whether it has them."""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))
    return [
        ast.unparse(call.args[1])
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id == "hasattr"
        and ast.unparse(call.args[0]) in ("optimizer", "engine.optimizer", "self._optimizer")
        and isinstance(call.args[1], ast.Constant)
    ]


@pytest.mark.parametrize("module", [m for m in MODULES if wing(m) == "zero"])
def test_the_wrapper_is_asked_for_in_one_way(module: str) -> None:
    """By `wrapper_of`, and not by the attributes that one of them has."""
    assert probes(ast.parse("hasattr(engine.optimizer, 'x')")) == ["'x'"], "vacuous"
    found = [name for name in probes(parsed(module)) if name != "'_optimizer_step_pre_hooks'"]  # torch's
    assert not found, f"{module} asks for {found}. Use zero.engine.wrapper_of"


def test_applying_a_child_does_not_import_the_exporter() -> None:
    importers = {m for m in MODULES if "child_files.export" in ours(m)}
    assert importers == {"tuner"}


def test_imports_have_no_circle() -> None:
    """No module reaches itself through what it imports."""
    edges = {module: ours(module) for module in MODULES}

    def reached(module: str, path: tuple[str, ...] = ()) -> None:
        assert module not in path, f"a circle of imports: {' -> '.join([*path, module])}"
        for other in edges[module]:
            reached(other, (*path, module))

    for module in MODULES:
        reached(module)


def test_nothing_imports_a_test_file() -> None:
    """What tests share is in tests/support. Code that a test hands to another process, as a string, counts too."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    assert Path(__file__) in files, "vacuous: the tests were not found"
    of_a_test_file = re.compile(r"\b(?:from tests import|import tests\.|from tests\.)[ ]*test_\w+")
    assert of_a_test_file.search("from tests." + "test_seams import x"), "vacuous: no import would be found"
    found = {path.name: of_a_test_file.findall(path.read_text()) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}, "expected what is shared in tests/support"
