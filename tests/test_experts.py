"""Mixture-of-experts models of transformers: experts that no calibration token reached, and parameters that no input can reach."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

import ds_childtune
from ds_childtune.config import ChildTuningConfig
from ds_childtune.report import Report
from ds_childtune.selection.eligible import eligible_names
from ds_childtune.selection.experts import fused_experts, unfused_experts
from tests.support import reference
from tests.support.engines import Setup, Weights
from tests.support.ranks import RankPool
from tests.support.reference import worst_difference

VOCABULARY, HIDDEN, EXPERTS, LAYERS = 31, 12, 6, 2
MISSED = 3
"""The expert of every layer that no token reaches."""

ZERO3 = Setup(stage=3, sub_group_size=200)
D: dict[str, Any] = {"mode": "ChildTuning-D", "reserve_p": 0.3}
FAMILIES = ("mixtral", "qwen2_moe")

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="fused experts came with transformers 5")


class Expert(nn.Module):
    """One expert with parameters of its own, as in transformers 4."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(gate_up.clone())
        self.down = nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, self.gate_up).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down)


class Unfused(nn.ModuleList):
    """The same experts as transformers' fused ones. Only those that tokens are sent to run."""

    def __init__(self, fused: Any) -> None:
        super().__init__(
            Expert(a.detach(), b.detach()) for a, b in zip(fused.gate_up_proj, fused.down_proj, strict=True)
        )

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for i in index.unique().tolist():
            token, place = torch.where(index == i)
            out = out.index_add(0, token, self[i](hidden[token]) * weights[token, place, None])
        return out


def build(family: str, *, fused: bool, kernel: str = "eager") -> Any:
    """Two layers of six experts, two for each token; rows 0 and 1, and 4 and 5, of each router are opposite, and row `MISSED` is
    zero: of the four, two have positive logits for whatever token, so that none is ever sent to `MISSED`."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
        "num_experts_per_tok": 2,
        "experts_implementation": kernel,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "mixtral":
            config: Any = transformers.MixtralConfig(**shared, num_local_experts=EXPERTS, sliding_window=None)
            model: Any = transformers.MixtralForCausalLM(config)
        else:
            config = transformers.Qwen2MoeConfig(
                **shared, num_experts=EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=10
            )
            model = transformers.Qwen2MoeForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight.data
        gate *= 3
        gate[1], gate[5], gate[MISSED] = -gate[0], -gate[4], 0
        if not fused:
            layer.mlp.experts = Unfused(layer.mlp.experts)
    return model.train()


def batches_of(rank: int, count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    drawn = [torch.randint(0, VOCABULARY, (1, 3), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def oracle(model: nn.Module, world_size: int, *, same: bool) -> Weights:
    """Mean over all micro-batches of squared gradients, in one process."""
    every = [b for rank in range(world_size) for b in batches_of(0 if same else rank)]
    return reference.fisher(copy.deepcopy(model), [[batch] for batch in every])


def paths(*, fused: bool) -> tuple[str, ...]:
    expert = f"[{MISSED}]" if fused else f".{MISSED}"
    return tuple(f"model.layers.{i}.mlp.experts{expert}" for i in range(LAYERS))


@contextmanager
def engine_of(model: Any, setup: Setup, *, leaves: bool = True) -> Iterator[Any]:
    if setup.stage == 3 and leaves:
        deepspeed.utils.set_z3_leaf_modules(model, [type(model.model.layers[0].mlp)])
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=setup.config())
    try:
        yield engine
    finally:
        engine.destroy()


@dataclass(frozen=True)
class Outcome:
    fisher: Weights
    report: Report
    kept: dict[str, int]
    """Elements of the child, by parameter."""
    moved: set[str]
    """Parameters that some training moved."""


def select(family: str, fused: bool, setup: Setup, same: bool, kernel: str) -> Outcome:
    items = batches_of(0 if same else dist.get_rank())
    with engine_of(build(family, fused=fused, kernel=kernel), setup, leaves=not fused) as engine:
        child = ds_childtune.attach(engine, D)
        fisher = child.estimate_fisher(items)
        found = {n: child.gather_fisher(fisher, n) for n in sorted(child.attachment.eligible)}
        report = child.select(items)
        kept = {n: int(child.gather_mask(n).sum()) for n in found}
        before = whole(engine)
        for batch in items:
            engine.backward(engine(**batch).loss)
            engine.step()
        after = whole(engine)
        return Outcome(found, report, kept, {n for n in before if not torch.equal(before[n], after[n])})


def whole(engine: Any) -> Weights:
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().float().clone() for name, p in parameters.items()}


SET_UPS = [
    *((family, True, Setup(stage=stage), False, "eager") for family in FAMILIES for stage in (0, 2)),
    *((family, True, ZERO3, False, kernel) for family in FAMILIES for kernel in ("eager", "grouped_mm", "batched_mm")),
    *((family, False, Setup(stage=0), False, "eager") for family in FAMILIES),
    # At ZeRO-2 plain DeepSpeed trains unfused experts only where ranks reach the same ones.
    *((family, False, Setup(stage=2), True, "eager") for family in FAMILIES),
    *((family, False, ZERO3, False, "eager") for family in FAMILIES),
]


@pytest.mark.parametrize(
    ("family", "fused", "setup", "same", "kernel"),
    SET_UPS,
    ids=[
        f"{family}-{'fused' if fused else 'unfused'}-zero{s.stage}-{kernel}" for family, fused, s, _, kernel in SET_UPS
    ],
)
def test_an_expert_that_no_token_reached_scores_zero(
    pool: RankPool, family: str, fused: bool, setup: Setup, same: bool, kernel: str
) -> None:
    model = build(family, fused=fused)
    expected = oracle(model, 2, same=same)
    outcomes = pool[2].run(select, family, fused, setup, same, kernel)
    unreached = paths(fused=fused)
    for outcome in outcomes:
        fisher, report = outcome.fisher, outcome.report
        assert worst_difference(fisher, {n: expected[n] for n in fisher}) < 1e-5
        assert set(unreached) <= set(report.unreached_experts)
        assert report.unreached_experts == tuple(sorted(scoreless(expected, fused=fused), key=natural))
        assert report.experts == LAYERS * EXPERTS
        assert f"no calibration token reached {len(report.unreached_experts)} of {LAYERS * EXPERTS} experts" in str(
            report
        )
        assert "LoRA" not in str(report)
        assert outcome.moved, "vacuous: nothing has trained"
        for name in fisher:
            if name.startswith(tuple(f"{path}." for path in unreached)):
                assert outcome.kept[name] == 0
    assert sum(outcomes[0].kept.values()) == report.kept > 0


def natural(path: str) -> tuple[int, ...]:
    return tuple(int(part) for part in path.replace("[", ".").replace("]", "").split(".") if part.isdigit())


def scoreless(fisher: Weights, *, fused: bool) -> list[str]:
    """Experts of which the oracle has no score but zero."""
    found = []
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts"
        for i in range(EXPERTS):
            if fused:
                scores = [fisher[f"{prefix}.{n}"][i] for n in ("gate_up_proj", "down_proj")]
                path = f"{prefix}[{i}]"
            else:
                scores = [fisher[f"{prefix}.{i}.{n}"] for n in ("gate_up", "down")]
                path = f"{prefix}.{i}"
            if not any(bool(s.any()) for s in scores):
                found.append(path)
    return found


# ---------------------------------------------------------------- what is refused


def refusal(family: str, fused: bool, stage: int, kind: str) -> str:
    model = build(family, fused=fused)
    mlp = model.model.layers[1].mlp
    if kind == "a parameter that no input can reach":
        mlp.register_parameter("unused", nn.Parameter(torch.ones(3)))
    elif kind == "a parameter that no expert uses":
        for expert in mlp.experts:
            expert.register_parameter("unused", nn.Parameter(torch.ones(3)))
    elif kind == "a layer that is skipped":
        model.model.layers[1].forward = lambda hidden, *_, **__: hidden
    block = D | ({"fisher": {"unreached": "error"}} if kind == "an expert" else {})
    with engine_of(model, Setup(stage=stage)) as engine:
        child = ds_childtune.attach(engine, block)
        try:
            child.select(batches_of(dist.get_rank()))
        except (ValueError, NotImplementedError) as error:
            return f"{type(error).__name__}: {error}"
        return ""


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_unreached_experts_can_be_an_error(pool: RankPool, fused: bool) -> None:
    for said in pool[2].run(refusal, "mixtral", fused, 3, "an expert"):
        assert said.startswith("ValueError: select: expected the calibration batches to reach every expert")
        assert paths(fused=fused)[0] in said
        assert 'child_tuning.fisher.unreached "zero"' in said


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("a parameter that no input can reach", "model.layers.1.mlp.unused"),
        ("a parameter that no expert uses", "model.layers.1.mlp.experts.0.unused"),
        ("a layer that is skipped", "model.layers.1.input_layernorm.weight"),
    ],
)
def test_what_can_never_have_a_gradient_is_still_an_error(pool: RankPool, kind: str, name: str) -> None:
    for said in pool[2].run(refusal, "qwen2_moe", False, 0, kind):
        assert said.startswith("ValueError: select:")
        assert "never got a gradient" in said
        assert name in said
        assert paths(fused=False)[0] not in said


@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_reach_different_experts_are_refused_where_deepspeed_mixes_gradients(
    pool: RankPool, stage: int
) -> None:
    for said in pool[2].run(refusal, "mixtral", False, stage, "ranks"):
        assert said.startswith("NotImplementedError")
        assert "set_z3_leaf_modules" in said


# ---------------------------------------------------------------- what is an expert


class Adapted(nn.Module):
    """A block with adapters by name, of which an input uses one, as PEFT's are."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict({"default": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(2, 2) for i in range(3)})


def test_which_modules_are_experts() -> None:
    for family in FAMILIES:
        for fused in (True, False):
            model = build(family, fused=fused)
            shapes = {n: p.shape for n, p in model.named_parameters()}
            eligible = eligible_names(model, list(shapes), ChildTuningConfig(**D))
            lists, modules = unfused_experts(model, eligible), fused_experts(model, shapes, eligible)
            assert [len(members) for members in lists] == ([] if fused else [EXPERTS] * LAYERS)
            assert list(modules) == ([f"model.layers.{i}.mlp.experts" for i in range(LAYERS)] if fused else [])
            assert all(len(names) == 2 for names in modules.values())
    adapted = nn.ModuleDict({"h": nn.ModuleList([Adapted(), Adapted()])})
    lists = unfused_experts(adapted, {n for n, _ in adapted.named_parameters()})
    assert [sorted(members) for members in lists] == [[f"h.{i}.experts.expert_{j}" for j in range(3)] for i in range(2)]
