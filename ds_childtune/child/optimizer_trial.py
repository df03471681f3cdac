"""What a base optimizer does to weights, found out by trying one of its kind: see [Note: trying an optimizer].

[Note: trying an optimizer]
A child rests on what the base optimizer does, and its name does not say that. So a new instance of the same class, with the
hyper-parameters of a param group, takes six steps on made-up tensors, with gradients that grow here and shrink there:

    does an element that never has a gradient stay where it is, bit for bit        else it is put back after each step
    what its state holds: a number for each element, or counters                   else no compact child
    what that is where there never was a gradient: one number, or the weight       else state is not cleared
    do some elements come to the same values as separate tensors                   else no compact child
    and if a new instance takes them over half-way, with their state               else no compact child
    how it decays weights: w <- (1 - lr * decay) * w, or g <- g + decay * w        else it decays everything, which is put back

There are a small and a large tensor, as some keep 8-bit state from a size on. Nothing of the user's optimizer is touched. One that
cannot be tried, since its constructor asks for more than hyper-parameters, is taken for the worst.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_childtune.child.base_optimizer import per_element, share_counters
from ds_childtune.child.optimizer_twin import Twin, _arguments, hyper_parameters
from ds_childtune.child.weight_decay import Decay, decay_gradient_, decay_weights_

Optimizer = torch.optim.Optimizer
Group = dict[str, Any]

_LARGE = (1 << 8, 1 << 8)
_SMALL = (8, 5)
_WEIGHT_DECAY = 0.1
_HALF = 3
"""Steps until state is cleared, or moved; and steps after that."""
_NEVER, _CLEARED, _CHILD = 0, 1, 2
"""Kinds of elements, by index modulo 5: never a gradient; none once its state was cleared half-way; the child. And others."""


@dataclass(frozen=True)
class Behaviour:
    """What is known of a base optimizer."""

    name: str
    """Its class's."""

    rests: bool = False
    """Whether an element without gradient and moments, and without weight decay, stays where it is."""

    decay: Decay = "other"

    rest_values: Mapping[str, float] | None = None
    """Per-element entries of its state, and what they are where there never was a gradient; None where that is not one number."""

    keeps_weights: bool = False
    """Whether its state holds copies of weights."""

    against_compact: str | None = "it was not tried"
    """Why it cannot step a child's elements in place of all of them, or None."""

    untried: str | None = None
    """Why it could not be tried, or None."""

    @property
    def moves_outside(self) -> bool:
        """Whether what is outside a child may move even without weight decay."""
        return not self.rests or self.rest_values is None


def behaviour_of(optimizer: Optimizer, tensors: Sequence[Tensor], *, compact: bool) -> Behaviour:
    """Try `optimizer`. See [Note: trying an optimizer]. It draws from the global generators of random numbers.

    Args:
        tensors: what it steps: their shape, dtype and device count.
        compact: whether the question is about child shards, too.
    """
    shaped = any(t.dim() > 1 for t in tensors)
    like = next((t for t in tensors if t.numel()), tensors[0])
    found: list[Behaviour] = []
    for group in optimizer.param_groups:
        key = (
            type(optimizer),
            repr(hyper_parameters(group)),
            repr(_arguments(optimizer)),
            like.device,
            like.dtype,
            shaped,
            compact,
        )
        if key not in _tried:
            _tried[key] = _tried_once(optimizer, group, like, shaped=shaped, compact=compact)
        found.append(_tried[key])
    return _of_all(found)


_tried: dict[tuple[Any, ...], Behaviour] = {}


def _of_all(groups: Sequence[Behaviour]) -> Behaviour:
    """Of an optimizer whose param groups may differ: the worst."""
    rest_values: dict[str, float] | None = {}
    for each in groups:
        for key, value in (each.rest_values or {}).items():
            if rest_values is not None and rest_values.setdefault(key, value) != value:
                rest_values = None
        if each.rest_values is None:
            rest_values = None
    decays = {each.decay for each in groups}
    return Behaviour(
        groups[0].name,
        rests=all(each.rests for each in groups),
        decay=decays.pop() if len(decays) == 1 else "other",
        rest_values=rest_values,
        keeps_weights=any(each.keeps_weights for each in groups),
        against_compact=next((each.against_compact for each in groups if each.against_compact), None),
        untried=next((each.untried for each in groups if each.untried), None),
    )


def _tried_once(optimizer: Optimizer, group: Group, like: Tensor, *, shaped: bool, compact: bool) -> Behaviour:
    name, hyper = type(optimizer).__name__, hyper_parameters(group)
    # A group may hold counters of earlier steps, with which a new instance does not begin.
    bare = {k: v for k, v in hyper.items() if k in optimizer.defaults}
    untried = ""
    for entries in (hyper, bare):
        try:
            with torch.no_grad():
                return _Trial(optimizer, entries, like, shaped=shaped).run(compact=compact)
        except Exception as error:  # whatever a foreign constructor or step raises
            text = (str(error).strip().splitlines() or [""])[0][:200]
            untried = untried or f"a new {name} could not be tried on small tensors ({type(error).__name__}: {text})"
    return Behaviour(name, against_compact=untried, untried=untried)


# ---------------------------------------------------------------- the trial


class _Trial:
    """Of an optimizer for tensors like one, in one group's hyper-parameters."""

    def __init__(self, optimizer: Optimizer, hyper: Group, like: Tensor, *, shaped: bool) -> None:
        """
        Args:
            hyper: entries of a param group.
            shaped: whether some tensors are matrices, as parameters are without ZeRO.
        """
        self._new: Callable[[], Twin] = lambda: Twin.new(optimizer, hyper, like)
        self._name = type(optimizer).__name__
        self._decays = "weight_decay" in hyper
        self._like = like
        self._shaped = shaped
        self._generator = torch.Generator().manual_seed(0)

    def _make(self, shapes: Sequence[tuple[int, int]]) -> None:
        """The numbers of the trial."""
        numels = [rows * columns for rows, columns in shapes]
        self._shapes = list(shapes) if self._shaped else [(n,) for n in numels]
        self._kinds = [torch.arange(n, device=self._like.device) % 5 for n in numels]
        self._child = [torch.nonzero(k == _CHILD).view(-1).flip(0) for k in self._kinds]
        """int64: the child's elements, in another order."""
        self._start = [self._numbers(n).to(self._like.dtype) for n in numels]
        self._gradients = [self._gradient(step) for step in range(2 * _HALF)]

    def _numbers(self, numel: int) -> Tensor:
        return torch.randn(numel, generator=self._generator).to(self._like.device)

    def _gradient(self, step: int) -> list[Tensor]:
        """Of the child's elements they shrink from step to step, of others they grow."""
        gradients = []
        for kind in self._kinds:
            resting = (kind == _NEVER) | ((kind == _CLEARED) & (step >= _HALF))
            numbers = self._numbers(kind.numel()) * torch.where(kind == _CHILD, 2.0**-step, 2.0**step)
            gradients.append(numbers.masked_fill_(resting, 0.0).to(self._like.dtype))
        return gradients

    def run(self, *, compact: bool) -> Behaviour:
        first, stepper = self._new(), self._new()
        self._make([_SMALL])
        self._begin(first)
        first.step(self._gradients[0])
        if not _odd_state(first):  # which may be a matrix over the elements
            self._make([_LARGE, _SMALL])
        self._begin(stepper)
        resting = [kind == _NEVER for kind in self._kinds]
        rests = self._rests(stepper, range(_HALF), resting)
        half, odd = stepper.weights(), _odd_state(stepper)
        rest_values = None if odd else _rest_values(stepper, resting)
        moved = None if odd else self._child_s_state(stepper)
        if rest_values is not None:
            resting = [kind <= _CLEARED for kind in self._kinds]
            _clear(stepper, rest_values, [kind == _CLEARED for kind in self._kinds])
        rests &= self._rests(stepper, range(_HALF, 2 * _HALF), resting)
        end = stepper.weights()
        if not all(bool(w.isfinite().all()) for w in end):
            raise ValueError("what it made of them is not finite")
        against: str | None = "it was not tried"
        if compact:
            against = f"keeps {odd} in its state" if odd else None
            if against is None and rest_values is None:
                against = "keeps in its state what is neither a moment nor a counter"
            if against is None and moved is not None:
                against = self._against(half, end, moved)
            against = f"{self._name} {against}" if against else None
        decay: Decay = "none"
        if self._decays:
            decay = self._decay(first) if first.group.get("lr") is not None else "other"
        keeps_weights = rest_values is None and not odd
        return Behaviour(self._name, rests, decay, rest_values, keeps_weights, against)

    def _begin(self, stepper: Twin) -> None:
        stepper.begin(w.view(shape) for w, shape in zip(self._start, self._shapes, strict=True))

    def _rests(self, stepper: Twin, steps: Iterable[int], resting: Sequence[Tensor]) -> bool:
        """Take the steps; whether `resting` elements, bool, were where they are after each of them."""
        before = [w[at] for w, at in zip(stepper.weights(), resting, strict=True)]
        rests = True
        for step in steps:
            stepper.step(self._gradients[step])
            after = [w[at] for w, at in zip(stepper.weights(), resting, strict=True)]
            rests &= all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return rests

    def _child_s_state(self, stepper: Twin) -> tuple[Group, list[dict[str, Any]]]:
        """Copies of the group's entries and, by tensor, of the state of the child's elements."""
        share_counters(stepper.optimizer, [stepper.params])
        group = copy.deepcopy({k: v for k, v in stepper.group.items() if k != "params"})
        states = []
        for param, index in zip(stepper.params, self._child, strict=True):
            state = stepper.optimizer.state.get(param, {})
            states.append(
                {k: v.view(-1)[index] if per_element(v, param) else copy.deepcopy(v) for k, v in state.items()}
            )
        return group, states

    def _against(self, half: list[Tensor], end: list[Tensor], moved: tuple[Group, list[dict[str, Any]]]) -> str | None:
        """Whether the child's elements, as separate tensors, come to other values."""
        start = [w[index] for w, index in zip(self._start, self._child, strict=True)]
        middle = [w[index] for w, index in zip(half, self._child, strict=True)]
        stepper = self._new()
        stepper.begin(start)
        self._step_child(stepper, range(_HALF))
        if not self._same(start, middle, stepper.weights()):
            return "does not step element by element: what it does to some depends on others"
        stepper = self._new()
        stepper.begin(middle)
        group, states = moved
        for key, value in group.items():
            stepper.group[key] = value
        stepper.optimizer.state.update(zip(stepper.params, states, strict=True))
        self._step_child(stepper, range(_HALF, 2 * _HALF))
        if not self._same(middle, [w[index] for w, index in zip(end, self._child, strict=True)], stepper.weights()):
            return "keeps more than its state dict, so that a new one cannot go on from it"
        return None

    def _step_child(self, stepper: Twin, steps: Iterable[int]) -> None:
        for step in steps:
            stepper.step(g[index] for g, index in zip(self._gradients[step], self._child, strict=True))

    @staticmethod
    def _same(before: list[Tensor], expected: list[Tensor], got: list[Tensor]) -> bool:
        """Whether nearly all elements agree, up to the rounding of another kernel."""
        return all(_close(g, e, e - b, 1e-3) for b, e, g in zip(before, expected, got, strict=True))

    def _decay(self, stepper: Twin) -> Decay:
        """Which formula comes to the same weights as the optimizer's own decay. In fp32: in 16 bits a decay rounds to nothing."""
        numel = self._start[-1].numel()
        start, gradients = self._numbers(numel), [self._numbers(numel) for _ in range(_HALF)]

        def after(decay: Decay, weight_decay: float) -> Tensor:
            stepper.begin([start], weight_decay=weight_decay)
            for each in gradients:
                gradient = each.clone()
                if decay == "decoupled":
                    decay_weights_(stepper.params[0], None, 1 - stepper.group["lr"] * _WEIGHT_DECAY)
                elif decay == "l2":
                    decay_gradient_(gradient, stepper.params[0], {**stepper.group, "weight_decay": _WEIGHT_DECAY})
                stepper.step([gradient])
            return stepper.weights()[0]

        expected, bare = after("none", _WEIGHT_DECAY), after("none", 0.0)
        if torch.equal(expected, bare):
            return "none"
        candidates: tuple[Decay, ...] = ("l2", "decoupled")
        return next((d for d in candidates if _close(after(d, 0.0), expected, expected - bare, 1e-2)), "other")


def _close(got: Tensor, expected: Tensor, change: Tensor, share: float) -> bool:
    """Whether at least 99 % of the elements agree to a share of the change."""
    spacing = 4 * torch.finfo(expected.dtype).eps * expected.abs()
    return bool(((got - expected).abs() <= share * change.abs() + spacing).float().mean() >= 0.99)


def _odd_state(stepper: Twin) -> str:
    """What the state holds that is neither a value for each element nor a counter, or an empty string."""
    for param in stepper.params:
        for key, value in stepper.optimizer.state.get(param, {}).items():
            counter = value is None or isinstance(value, (bool, int, float))
            if counter or (type(value) is Tensor and (value.dim() == 0 or _is_moment(value, param))):
                continue
            what = f" of dtype {value.dtype} and shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            return f"{key!r}, a {type(value).__name__}{what} for a tensor of shape {tuple(param.shape)},"
    return ""


def _is_moment(value: Tensor, param: Tensor) -> bool:
    return per_element(value, param) and value.dtype.is_floating_point


def _rest_values(stepper: Twin, resting: Sequence[Tensor]) -> dict[str, float] | None:
    """By entry, what it is for every element that never had a gradient; None where that differs between elements."""
    values: dict[str, float] = {}
    for param, at in zip(stepper.params, resting, strict=True):
        for key, value in stepper.optimizer.state.get(param, {}).items():
            if not per_element(value, param):
                continue
            of_resting = value.view(-1)[at]
            first = values.setdefault(key, float(of_resting[0]) + 0.0)  # no -0
            if bool((of_resting != first).any()):
                return None
    return values


def _clear(stepper: Twin, rest_values: Mapping[str, float], cleared: Sequence[Tensor]) -> None:
    for param, at in zip(stepper.params, cleared, strict=True):
        for key, value in stepper.optimizer.state.get(param, {}).items():
            if per_element(value, param):
                value.view(-1).masked_fill_(at, rest_values[key])
