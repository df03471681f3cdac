"""The Fisher pass on engines that are not as simple as the grid's: routes, dtypes, streams, checkpointing, buffers, failures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ds_childtune
from ds_childtune.selection import fisher_pass
from ds_childtune.zero.reduction import fill
from tests.support import reference
from tests.support.engines import Setup, Weights, model_weights
from tests.support.ranks import RankPool
from tests.support.reference import worst_difference

EVERYTHING = {"mode": "ChildTuning-D", "reserve_p": 0.3, "include": ["*"]}
WIDTH = 6

Batch = dict[str, Any]


# ---------------------------------------------------------------- a model with some of everything


class Routed(nn.Module):
    """Two linear maps, of which a micro-batch uses those that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor, route: tuple[int, ...]) -> Tensor:
        return x + sum(torch.tanh(self.experts[i](x)) for i in route)


class Net(nn.Module):
    """Regression through two routed layers, a shared block, and a head whose weight may be read past the head."""

    def __init__(self, *, layer: type[nn.Module] = Routed, reentrant: bool | None = None, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.layers = nn.ModuleList([layer() for _ in range(2)])
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, 3, bias=False)
        self.reentrant = reentrant

    def forward(self, x: Tensor, route: tuple[int, ...] = (0, 1), scale: float = 1.0, bare: bool = False) -> Tensor:
        hidden = self.norm(self.first(x.to(self.first.weight.dtype)))
        for layer in self.layers:
            hidden = layer(hidden, route)
        for _ in range(3):
            hidden = hidden + self._shared(hidden)
        out = nn.functional.linear(hidden, self.head.weight) if bare else self.head(hidden)
        return out.float().square().mean() * scale

    def _shared(self, hidden: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            return torch.tanh(self.shared(h))

        if self.reentrant is None:
            return block(hidden)
        return checkpoint(block, hidden, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def build(**options: Any) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(**options)


def batches_of(rank: int, count: int, **more: Any) -> list[Batch]:
    generator = torch.Generator().manual_seed(1000 + rank)
    return [{"x": torch.randn(3, 5, generator=generator), **more} for _ in range(count)]


@contextlib.contextmanager
def engine_of(model: nn.Module, setup: Setup, **extra: Any) -> Iterator[Any]:
    config = setup.config() | extra
    config["zero_optimization"] = setup.config()["zero_optimization"] | extra.get("zero_optimization", {})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    try:
        yield engine
    finally:
        engine.destroy()


def train(engine: Any, items: list[Batch]) -> None:
    for batch in items:
        engine.backward(engine(**batch))
        engine.step()


def fisher_of(engine: Any, items: list[Batch], block: dict[str, Any] | None = None) -> Weights:
    child = ds_childtune.attach(engine, block or EVERYTHING)
    fisher = child.estimate_fisher(items)
    found = {p: child.gather_fisher(fisher, p) for p in child.attachment.parameters.by_name}
    child.detach()
    return found


def oracle(items: list[Batch], model: nn.Module | None = None, *, train_mode: bool = False) -> Weights:
    """Mean over micro-batches of squared gradients, in one process."""
    model = model or build()
    model.train(train_mode)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for batch in items:
        for name, gradient in reference.gradients(model, [batch]).items():
            total[name] += gradient**2 / len(items)
    return total


def everyone(world_size: int, of_rank: Callable[[int], list[Batch]]) -> list[Batch]:
    return [batch for rank in range(world_size) for batch in of_rank(rank)]


# ---------------------------------------------------------------- ranks that use different parameters


def routed(rank: int) -> list[Batch]:
    """Ranks take turns: in no round do all of them use the same experts, and each expert is used."""
    routes = [(0,), (1,), (0, 1), (1,)]
    return [batch | {"route": routes[(rank + i) % 4]} for i, batch in enumerate(batches_of(rank, 4))]


def fisher_of_routes(setup: Setup, leaves: bool) -> tuple[Weights, Weights]:
    """Fisher information, and the weights that this rank has after some training of the child chosen by it."""
    model = build()
    if leaves:
        deepspeed.utils.set_z3_leaf_modules(model, [Routed])
    with engine_of(model, setup) as engine:
        found = fisher_of(engine, routed(dist.get_rank()))
        child = ds_childtune.attach(engine, EVERYTHING)
        child.select(routed(dist.get_rank()))
        train(engine, routed(dist.get_rank()))
        return found, model_weights(engine)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 3])
def test_ranks_that_use_different_parameters(pool: RankPool, stage: int, world_size: int) -> None:
    """At ZeRO-3 with leaf modules: the remedy that the other stages' error names, as is stage 0."""
    expected = oracle(everyone(world_size, routed))
    outcomes = pool[world_size].run(fisher_of_routes, Setup(stage=stage, sub_group_size=40), stage == 3)
    for found, weights in outcomes:
        assert worst_difference(found, expected) < 1e-5
        for name, weight in outcomes[0][1].items():
            assert torch.equal(weights[name], weight), f"replicas have drifted apart in {name}"
    used_by_all = oracle(everyone(world_size, lambda rank: [b | {"route": (0, 1)} for b in routed(rank)]))
    assert worst_difference(used_by_all, expected) > 0.1, "vacuous: routes do not matter"


def refused_routes(setup: Setup) -> tuple[str, float]:
    """What is said, and how far the engine's weights move in plain training afterwards."""
    with engine_of(build(), setup) as engine:
        child = ds_childtune.attach(engine, EVERYTHING)
        with pytest.raises(NotImplementedError) as error:
            child.select(routed(dist.get_rank()))
        child.detach()
        before = model_weights(engine)
        train(engine, batches_of(dist.get_rank(), 2))
        return str(error.value), reference.distance(model_weights(engine), before)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_routes_are_refused_where_deepspeed_mixes_gradients(pool: RankPool, stage: int) -> None:
    for said, moved in pool[2].run(refused_routes, Setup(stage=stage)):
        for words in ("same parameters", "experts", "set_z3_leaf_modules", "stage 0", "batch 0"):
            assert words in said, said
        assert moved > 1e-3, "the engine does not train any more"


# ---------------------------------------------------------------- the bucket


@given(st.data())
def test_columns_of_the_bucket_are_those_of_the_padded_matrix(data: st.DataObject) -> None:
    partitions, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    numel = data.draw(st.integers(0, partitions * columns))
    first = data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, columns - first))
    flat = torch.arange(3.0, 3.0 + numel + 2)[2:]  # with a storage offset
    padded = torch.cat([flat, torch.zeros(partitions * columns - numel)]).view(partitions, columns)
    out = torch.full((partitions, count), -1.0)
    fill(out, flat, first, columns)
    assert torch.equal(out, padded[:, first : first + count])


# ---------------------------------------------------------------- the dtype of the reduction

DTYPES: dict[str, dict[str, Any]] = {
    "comm-fp16": {"communication_data_type": "fp16"},
    "comm-bf16": {"communication_data_type": "bf16"},
    "accum-fp16": {"data_types": {"grad_accum_dtype": "fp16"}},
}
SMALL = 1e-5
"""Gradients of about 1e-5, as transformers have: their squares are below what fp16 can tell from zero."""


def fisher_in_dtype(setup: Setup, extra: dict[str, Any]) -> tuple[Weights, list[str]]:
    """Fisher information, and the dtypes of all the floating-point tensors that were reduced for it."""
    dtypes: list[str] = []

    def watch(name: str) -> Any:
        original = getattr(dist, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
            dtypes.extend(str(t.dtype) for t in tensors)
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, watched)

    with engine_of(build(), setup, **extra) as engine, contextlib.ExitStack() as stack:
        for name in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter", "reduce", "all_to_all_single"):
            stack.enter_context(watch(name))
        return fisher_of(engine, batches_of(dist.get_rank(), 2, scale=SMALL)), dtypes


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *((stage, name) for stage in (0, 1, 2, 3) for name in ("comm-fp16", "comm-bf16")),
        (2, "accum-fp16"),
        (3, "accum-fp16"),
    ],
)
def test_squares_are_reduced_in_fp32(pool: RankPool, stage: int, name: str) -> None:
    """Whatever training communicates or accumulates in."""
    expected = oracle(everyone(2, lambda rank: batches_of(rank, 2, scale=SMALL)))
    assert max(float(score.max()) for score in expected.values()) < 6e-8, "vacuous: fp16 holds these squares"
    for found, dtypes in pool[2].run(fisher_in_dtype, Setup(stage=stage), DTYPES[name]):
        assert worst_difference(found, expected) < 1e-5
        assert set(dtypes) == {"torch.float32"}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_squares_of_16_bit_gradients_are_made_and_reduced_in_fp32(pool: RankPool, stage: int) -> None:
    expected = oracle(everyone(2, lambda rank: batches_of(rank, 2)), build().bfloat16())
    for found, dtypes in pool[2].run(fisher_in_dtype_of_bf16, Setup(stage=stage, bf16=True)):
        assert worst_difference(found, expected) < 1e-5
        assert set(dtypes) == {"torch.float32"}


def fisher_in_dtype_of_bf16(setup: Setup) -> tuple[Weights, list[str]]:
    with mock.patch.dict(globals(), SMALL=1.0):
        return fisher_in_dtype(setup, {})


SET_UPS: dict[str, dict[str, Any]] = {
    "callers-boundaries": {"managed_gradient_accumulation": False},
    "quantized-gradients": {"zero_optimization": {"zero_quantized_gradients": True}},
    "prescaled": {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
}


def fisher_between_steps(setup: Setup, extra: dict[str, Any]) -> tuple[Weights, float]:
    """Fisher information, and how far a step moves the weights afterwards."""
    with engine_of(build(), setup, **extra) as engine:
        found = fisher_of(engine, batches_of(dist.get_rank(), 2))
        before = model_weights(engine)
        if "zero_optimization" not in extra:  # DeepSpeed has no kernel for int4 on a CPU
            train(engine, batches_of(dist.get_rank(), 1))
        return found, reference.distance(model_weights(engine), before)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (0, "prescaled"),
        (2, "callers-boundaries"),
        (3, "callers-boundaries"),
        (3, "quantized-gradients"),
    ],
)
def test_what_training_does_to_gradients_is_not_done_to_squares(pool: RankPool, stage: int, name: str) -> None:
    expected = oracle(everyone(2, lambda rank: batches_of(rank, 2)))
    for found, moved in pool[2].run(fisher_between_steps, Setup(stage=stage), SET_UPS[name]):
        assert worst_difference(found, expected) < 1e-5
        assert moved > 1e-3 or name == "quantized-gradients"


def fisher_with_a_loss_scale(setup: Setup, estimator: str, scale: float) -> tuple[Weights, int]:
    """As in fp16, which DeepSpeed does not run on a CPU: the pass scales losses, and finds a scale that does not overflow."""
    with (
        engine_of(build(), setup) as engine,
        mock.patch.object(fisher_pass, "model_dtype", return_value=torch.float16),
        mock.patch.object(fisher_pass, "loss_scale", return_value=scale),
    ):
        child = ds_childtune.attach(engine, EVERYTHING | {"fisher": {"estimator": estimator}})
        fisher = child.estimate_fisher(batches_of(dist.get_rank(), 8))
        found = {name: child.gather_fisher(fisher, name) for name in child.attachment.parameters.by_name}
        child.detach()
        return found, fisher.terms


@pytest.mark.parametrize("scale", [2.0**10, 2.0**130])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_scale_is_taken_out_and_batches_that_overflow_do_not_count(
    pool: RankPool, stage: int, scale: float
) -> None:
    for found, terms in pool[2].run(fisher_with_a_loss_scale, Setup(stage=stage), "per_micro_batch", scale):
        rounds = terms // 2
        assert rounds == 8 if scale == 2.0**10 else 0 < rounds < 8
        expected = oracle([batch for rank in range(2) for batch in batches_of(rank, 8)[8 - rounds :]])
        assert worst_difference(found, expected) < 1e-5


# ---------------------------------------------------------------- streams


class Streams:
    """An accelerator with streams, on a CPU: which of them is current, and what is recorded on which."""

    def __init__(self) -> None:
        self.current: object = "compute"
        self.recorded: set[tuple[int, object]] = set()

    def patches(self) -> list[Any]:
        accelerator = type(get_accelerator())

        class Stream:
            def wait_stream(self, other: object) -> None: ...
            def synchronize(self) -> None: ...

        class Event:
            def __init__(self, *_: object, **__: object) -> None: ...
            def record(self, *_: object) -> None: ...
            def wait(self, *_: object) -> None: ...
            def synchronize(self) -> None: ...
            def query(self) -> bool:
                return True

        self.current = compute = Stream()

        @contextlib.contextmanager
        def stream(_: object, other: object) -> Iterator[None]:
            self.current, before = other, self.current
            try:
                yield
            finally:
                self.current = before

        def current_stream(*_: object) -> object:
            return self.current

        return [
            mock.patch.object(accelerator, "stream", stream),
            mock.patch.object(accelerator, "current_stream", current_stream),
            mock.patch.object(accelerator, "default_stream", return_value=compute),
            mock.patch.object(accelerator, "Stream", property(lambda _: Stream)),
            mock.patch.object(accelerator, "Event", property(lambda _: Event)),
            mock.patch.object(accelerator, "is_synchronized_device", return_value=False),
            mock.patch.object(accelerator, "resolves_data_dependency", return_value=False),
            mock.patch.object(Tensor, "record_stream", lambda t, s: self.recorded.add((t.data_ptr(), s))),
        ]


class Reads(TorchDispatchMode):
    """Gradients that operations read on another stream than the one that frees them."""

    def __init__(self, streams: Streams, gradients: set[int]) -> None:
        super().__init__()
        self._streams, self._gradients = streams, gradients
        self._compute = streams.current
        self.elsewhere: set[tuple[int, object]] = set()
        self.here = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        for value in flat:
            if isinstance(value, Tensor) and value.data_ptr() in self._gradients:
                if self._streams.current is self._compute:
                    self.here += 1
                else:
                    self.elsewhere.add((value.data_ptr(), self._streams.current))
        return func(*args, **(kwargs or {}))


def gradients_on_other_streams(calibrates: bool) -> tuple[int, int, int]:
    """Reads on the backward's own stream; reads elsewhere, and how many of them were not recorded before the gradient was freed."""
    streams, model = Streams(), build()
    gradients: set[int] = set()
    kept: list[Tensor] = []

    def made(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradients.add(parameter.grad.data_ptr())
        kept.append(parameter.grad.detach())  # so that no other tensor gets its address

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(made)  # before DeepSpeed's own
    zero = {"reduce_bucket_size": 10, "overlap_comm": True}
    with contextlib.ExitStack() as stack:
        for patch in streams.patches():
            stack.enter_context(patch)
        engine = stack.enter_context(engine_of(model, Setup(stage=3), zero_optimization=zero))
        child = ds_childtune.attach(engine, EVERYTHING)
        with Reads(streams, gradients) as reads:
            if calibrates:
                child.estimate_fisher(batches_of(dist.get_rank(), 1))
            else:
                engine.backward(engine(**batches_of(dist.get_rank(), 1)[0]))
        child.detach()
    return reads.here, len(reads.elsewhere), len(reads.elsewhere - streams.recorded)


def test_no_gradient_is_freed_while_another_stream_reads_it(pool: RankPool) -> None:
    """Parameters larger than the bucket, whose gradients DeepSpeed reduces in place on a separate stream, and records."""
    for _, elsewhere, unrecorded in pool[2].run(gradients_on_other_streams, False):
        assert elsewhere > 0, "vacuous: DeepSpeed reads no gradient on another stream"
        assert unrecorded == 0, "the test does not see what DeepSpeed records"
    for here, _, unrecorded in pool[2].run(gradients_on_other_streams, True):
        assert here > 0, "vacuous: no gradient was read at all"
        assert unrecorded == 0


# ---------------------------------------------------------------- gradients that come in parts


def fisher_under_checkpointing(setup: Setup, reentrant: bool) -> Weights | str:
    with engine_of(build(reentrant=reentrant), setup) as engine:
        try:
            return fisher_of(engine, [b | {"x": b["x"].requires_grad_()} for b in batches_of(dist.get_rank(), 2)])
        except NotImplementedError as error:
            return str(error)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_shared_layer_under_reentrant_checkpointing(pool: RankPool, stage: int) -> None:
    """Its gradient comes in three parts: their sum is squared, or it is refused; not checkpointed that way, it is right anywhere."""
    expected = oracle(everyone(2, lambda rank: batches_of(rank, 2)))
    for found in pool[2].run(fisher_under_checkpointing, Setup(stage=stage), False):
        assert isinstance(found, dict)
        assert worst_difference(found, expected) < 1e-5
    for found in pool[2].run(fisher_under_checkpointing, Setup(stage=stage), True):
        if isinstance(found, dict):
            assert stage < 2
            assert worst_difference(found, expected) < 1e-5
        else:
            assert stage >= 2
            assert "shared.weight" in found or "shared.bias" in found
            assert "use_reentrant=False" in found


# ---------------------------------------------------------------- buffers, sparse gradients


class SparseNet(Net):
    """With a lookup whose gradient is sparse, and whose rows repeat in a micro-batch."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.lookup = nn.Embedding(7, 5, sparse=True)

    def forward(self, x: Tensor, **more: Any) -> Tensor:  # type: ignore[override]
        rows = torch.arange(len(x), device=x.device) // 2
        return super().forward(x + self.lookup(rows), **more)


def build_sparse() -> SparseNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SparseNet()


def pass_of_a_sparse_model(include: list[str]) -> tuple[Weights, bool]:
    """Fisher information in training mode, and whether all buffers are as before, which the pass has changed."""
    with engine_of(build_sparse(), Setup(stage=0)) as engine:
        changed: list[Tensor] = []
        norm = engine.module.norm
        norm.register_forward_hook(lambda *_: changed.append(norm.running_mean.clone()))
        buffers = {name: (b, b.clone()) for name, b in engine.module.named_buffers()}
        block = EVERYTHING | {"include": include, "fisher": {"model_mode": "train"}}
        child = ds_childtune.attach(engine, block)
        fisher = child.estimate_fisher(batches_of(dist.get_rank(), 2))
        found = {name: child.gather_fisher(fisher, name) for name in sorted(child.attachment.eligible)}
        child.detach()
        assert not torch.equal(changed[-1], buffers["norm.running_mean"][1]), "vacuous: the pass changes no buffer"
        now = dict(engine.module.named_buffers())
        return found, all(now[n] is b and torch.equal(b, before) for n, (b, before) in buffers.items())


@pytest.mark.parametrize("include", [["*"], ["layers.*"]], ids=["eligible", "dense"])
def test_buffers_come_back_and_sparse_gradients_count(pool: RankPool, include: list[str]) -> None:
    expected = oracle(everyone(2, lambda rank: batches_of(rank, 2)), build_sparse(), train_mode=True)
    for found, same in pool[2].run(pass_of_a_sparse_model, include):
        assert same, "buffers have changed"
        assert ("lookup.weight" in found) == (include == ["*"])
        assert worst_difference(found, {name: expected[name] for name in found}) < 1e-5


# ---------------------------------------------------------------- after the pass


def bare_head_after_a_pass(count: int) -> float:
    """How far training moves the weights that reads the head's weight past the head, after a pass that calls the head."""
    with engine_of(build(), Setup(stage=3, persistence_threshold=100_000)) as engine:
        before = model_weights(engine)
        child = ds_childtune.attach(engine, EVERYTHING)
        child.select(batches_of(dist.get_rank(), count))
        train(engine, batches_of(dist.get_rank(), 2, bare=True))
        return reference.distance(model_weights(engine), before)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_parameters_are_whole_after_a_pass(pool: RankPool, count: int) -> None:
    """ZeRO-3 gathers persistent parameters at the end of a step, and frees them in a backward pass that it records.

    Losses that save memory read the head's weight by itself.
    """
    for moved in pool[2].run(bare_head_after_a_pass, count):
        assert moved > 1e-3


class OutOfMemory(RuntimeError):
    pass


def failing_pass(setup: Setup, who: tuple[int, ...]) -> tuple[str, Weights, Weights]:
    """What is said when the pass's backward fails in its middle on some ranks; then a selection, training, and detached training."""
    rank = dist.get_rank()
    with engine_of(build(), setup) as engine:
        child = ds_childtune.attach(engine, EVERYTHING)
        calls: list[None] = []

        def fail(grad: Tensor) -> None:
            calls.append(None)
            if rank in who and len(calls) == 2:  # in the second micro-batch
                raise OutOfMemory("tried to allocate 2.00 GiB")

        handle = engine.module.layers[1].experts[0].weight.register_hook(fail)
        with pytest.raises(RuntimeError) as error:
            child.select(batches_of(rank, 3))
        handle.remove()
        ends = life_after(engine, child)
    with engine_of(build(), setup) as engine:
        return str(error.value), ends, life_after(engine, ds_childtune.attach(engine, EVERYTHING))


def life_after(engine: Any, child: Any) -> Weights:
    rank = dist.get_rank()
    child.select(batches_of(rank, 2))
    train(engine, batches_of(rank, 3))
    child.select(batches_of(rank, 2))
    train(engine, batches_of(rank, 2))
    child.detach()
    train(engine, batches_of(rank, 2))
    return model_weights(engine)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("stage", "who"), [(0, (0, 1)), (0, (1,)), (1, (1,)), (2, (0,)), (2, (0, 1)), (3, (0, 1))])
def test_an_exception_in_the_pass_s_backward(pool: RankPool, stage: int, who: tuple[int, ...], bf16: bool) -> None:
    """All ranks raise it, and the engine selects, trains and detaches as one that has never seen it."""
    setup = Setup(stage=stage, bf16=bf16, sub_group_size=40)
    for said, after, undisturbed in pool[2].run(failing_pass, setup, who):
        assert "OutOfMemory" in said or "tried to allocate" in said
        assert f"[rank {who[0]}" in said
        for name, weight in undisturbed.items():
            assert torch.equal(after[name], weight), name


def host_waits(stage: int, layers: int) -> int:
    """How often our own lines wait for the device in a pass of three micro-batches."""
    model = build()
    model.layers = nn.ModuleList([Routed() for _ in range(layers)])
    waits: list[str] = []

    def watch(name: str) -> Any:
        original = getattr(Tensor, name)

        def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("ds_childtune"):
                waits.append(name)
            return original(tensor, *args, **kwargs)

        return mock.patch.object(Tensor, name, watched)

    with engine_of(model, Setup(stage=stage)) as engine, contextlib.ExitStack() as stack:
        child = ds_childtune.attach(engine, EVERYTHING)
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
            stack.enter_context(watch(name))
        child.estimate_fisher(batches_of(dist.get_rank(), 3))
        child.detach()
    return len(waits)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_host_waits_as_often_for_a_large_model(pool: RankPool, stage: int) -> None:
    few, many = (pool[2].run(host_waits, stage, layers)[0] for layers in (1, 5))
    assert few == many
    assert 3 <= few <= 30, "vacuous, or more than a few for a micro-batch"


OFFLOAD = [replace(Setup(stage=stage, offload=True), sub_group_size=40) for stage in (2, 3)]


def fisher_with_offload(setup: Setup) -> Weights:
    model = build()
    if setup.stage == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [Routed])
    route = routed if setup.stage == 3 else lambda rank: batches_of(rank, 4)
    with engine_of(model, setup) as engine:
        return fisher_of(engine, route(dist.get_rank()))


@pytest.mark.parametrize("setup", OFFLOAD, ids=str)
def test_offload(pool: RankPool, setup: Setup) -> None:
    expected = oracle(everyone(2, routed if setup.stage == 3 else lambda rank: batches_of(rank, 4)))
    for found in pool[2].run(fisher_with_offload, setup):
        assert worst_difference(found, expected) < 1e-5


# ---------------------------------------------------------------- parameters without a score


class LowRank(nn.Module):
    """x + B A x, with B = 0 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(2, WIDTH))
        self.B = nn.Parameter(torch.zeros(WIDTH, 2))

    def forward(self, x: Tensor, route: object) -> Tensor:
        return x + x @ self.A.T @ self.B.T


LOW_RANK = {"mode": "ChildTuning-D", "include": ["layers.*"], "optimizer_state": "compact"}
HALF = WIDTH * 2 * 2
"""Elements of all A, and of all B."""


def select_low_rank(setup: Setup, block: dict[str, Any], steps: int) -> tuple[tuple[str, ...], int, int, str]:
    with engine_of(build(layer=LowRank), setup) as engine:
        train(engine, batches_of(dist.get_rank(), steps))
        report = ds_childtune.attach(engine, LOW_RANK | block).select(batches_of(dist.get_rank(), 2))
        return report.zero_parameters, report.zero_kept, report.kept, str(report)


@pytest.mark.parametrize("stage", [0, 3])
def test_parameters_without_a_score_are_named_and_so_is_what_they_fill(pool: RankPool, stage: int) -> None:
    """Fisher information of A is zero while B is; and each of the remedies that the report names."""

    def select(reserve_p: float, steps: int = 0, **block: Any) -> tuple[tuple[str, ...], int, int, str]:
        outcomes = pool[2].run(select_low_rank, Setup(stage=stage), {"reserve_p": reserve_p, **block}, steps)
        assert outcomes[0] == outcomes[1] or outcomes[0][:3] == outcomes[1][:3]
        return outcomes[0]

    both = ("layers.0.A", "layers.1.A")
    names, filled, kept, text = select(0.75)
    assert (names, filled, kept) == (both, HALF // 2, HALF * 3 // 2)
    for words in ("2 eligible parameters (layers.0.A, layers.1.A)", "12 of the child's 36", "at most 0.5000", "Remedy"):
        assert words in text, text
    assert select(0.5)[:2] == (both, 0)
    names, filled, _, text = select(0.75, steps=3)
    assert (names, filled) == ((), 0)
    assert "WARNING" not in text
    names, filled, _, text = select(0.75, exclude=["*.A"])
    assert (names, filled) == ((), 0)
