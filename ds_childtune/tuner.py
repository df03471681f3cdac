"""`attach`, the one verb, and the `ChildTuner` that it returns: where the pure parts and DeepSpeed's engine meet."""

from __future__ import annotations

import difflib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_childtune.attachment import Attached, Policy
from ds_childtune.checkpoint import Checkpoints
from ds_childtune.checkpoint.run_record import Progress
from ds_childtune.checkpoint.state import ChildState, Resumed
from ds_childtune.child.compact import CompactChild
from ds_childtune.child.dense import DenseChild
from ds_childtune.child.optimizer_check import put_back, tried
from ds_childtune.child.self_check import SelfCheck
from ds_childtune.child.task_free import TaskFreeChild
from ds_childtune.child_files.export import export_child
from ds_childtune.config import ChildTuningConfig, parse_config
from ds_childtune.gathering import count_kept, gather
from ds_childtune.random_states import kept_random_states
from ds_childtune.ranks import check_same, device, raising_together, sum_over_ranks, tell
from ds_childtune.report import ParameterReport, Report
from ds_childtune.selection.eligible import eligible_names
from ds_childtune.selection.fisher import Fisher
from ds_childtune.selection.fisher_pass import LossFunction, check_batches, default_loss, estimate_fisher
from ds_childtune.selection.selectors import (
    ShardScores,
    cut_at,
    magnitudes,
    masks_inside,
    positive,
    random_numbers,
    reverse_order,
)
from ds_childtune.shards import FlatShard, Fragment, mark_eligible
from ds_childtune.zero.clip import NormOfChild, refuse_unsupported_clip
from ds_childtune.zero.compact_depth import Depth, refuse_lean
from ds_childtune.zero.compact_reads import Reads, redirect
from ds_childtune.zero.engine import (
    applied_steps,
    base_optimizer,
    child_tuning_block,
    empty_param_groups,
    inside_accumulation,
)
from ds_childtune.zero.flat_shards import read_flat_shards, read_parameters
from ds_childtune.zero.layout_check import check_layout
from ds_childtune.zero.masters import separate_masters, share_masters
from ds_childtune.zero.supported import check_engine, missing_groups, refuse_unsupported_engine


def attach(engine: Any, config: ChildTuningConfig | Mapping[str, Any] | None = None) -> ChildTuner:
    """Make `engine` train a child network. A collective: call it on every rank, after `deepspeed.initialize`.

    ChildTuning-F acts from the next step on; ChildTuning-D needs `select` first. An engine whose config has the block refuses to
    step before `attach`, see [Note: a block without a child].

    Args:
        engine: what `deepspeed.initialize` returned.
        config: replaces the `"child_tuning"` block of the DeepSpeed config.

    Raises:
        ValueError: for a wrong config, or what is not an engine; on every rank, naming key, value and remedy.
        NotImplementedError: for a set-up that is not supported; on every rank, with a remedy.
        RuntimeError: when the engine has a child already.
    """
    check_engine(engine)
    with raising_together():
        if getattr(engine, "child_tuner", None) is not None:
            raise RuntimeError("attach: this engine has a ChildTuner already. Remedy: call its detach() first.")
        parsed = parse_config(config if config is not None else child_tuning_block(engine))
        refuse_unsupported_engine(engine)
        parameters = read_parameters(engine)
        eligible = eligible_names(engine.module, tuple(parameters.by_name), parsed)
        shards = mark_eligible(read_flat_shards(engine, parameters), eligible)
        if parsed.clip == "child":
            refuse_unsupported_clip(engine)
        refuse_lean(engine, compact=parsed.optimizer_state == "compact", clip=parsed.clip)
        check_layout(engine, parameters.by_name, shards)
        with kept_random_states():
            behaviour = tried(base_optimizer(engine), shards, parsed)
    check_same(parsed.model_dump_json(), "child_tuning")
    check_same(repr(sorted(parameters.shapes.items())), "the model's parameter names and shapes")
    check_same(repr(sorted(parameters.by_name)), "the parameters that the optimizer holds")
    empty_param_groups(engine)
    for shard in shards:
        # At ZeRO-3 it is whatever was in memory: an optimizer that takes a norm of the whole shard (Adafactor) comes to inf by it.
        for start, numel in shard.padding():
            shard.flat().narrow(0, start, numel).zero_()
    if parsed.optimizer_state == "compact":
        share_masters(engine)
    return ChildTuner(Attached(engine, parsed, parameters, eligible, shards, behaviour))


class ChildTuner:
    """A child network on a DeepSpeed engine. Made by `attach`.

    The life of a ChildTuner, in phases:

    1. `attach` reads where every gradient element lives and hooks the base optimizer's `step`.
    2. ChildTuning-D: `select` runs the Fisher pass and fixes the child. Stepping before that is an error.
    3. Training. Before each `step` of the base optimizer the gradients of its flat shards are masked.
    4. `detach` removes the hooks: plain DeepSpeed again, bitwise.
    """

    config: ChildTuningConfig

    step: int
    """Applied optimizer steps since `attach`; steps that DeepSpeed skips for an overflow do not count."""

    def __init__(self, attached: Attached) -> None:
        self.engine = engine = attached.engine
        self.config = config = attached.config
        self._parameters = attached.parameters
        self._eligible = attached.eligible
        self._behaviour = attached.behaviour
        self._shards = shards = attached.shards
        self.step = 0
        self._shard_of = {s.tensor: s for s in shards}
        self._stepped: set[Tensor] = set()
        """Flat shards that the base optimizer has stepped in the current applied step."""
        self._selected_at = 0
        """The applied step at which the child was chosen."""
        self._earlier_children = False
        """Whether another child was trained before this one."""
        self._looks_for_thawed = True
        self._self_check: SelfCheck | None = None
        self._report: Report | None = None
        self._policy: Policy | None = None
        self._norm: NormOfChild | None = None
        self._reads: Reads | None = None
        if config.mode == "ChildTuning-F":
            self._policy = TaskFreeChild(shards, seed=config.seed, reserve_p=config.reserve_p)
        base = base_optimizer(engine)
        self._handles: list[RemovableHandle | Checkpoints] = [
            base.register_step_pre_hook(self._before_step),
            base.register_step_post_hook(self._after_step),
        ]
        self._steps_at_attach = applied_steps(engine)
        self._handles.append(engine.module.register_forward_pre_hook(_checking_before_forward(self)))
        self._handles.append(Checkpoints(attached, read=self._state, resume=self._resume))
        engine.child_tuner = self
        tell(self._eligibility())
        decays = any(group.get("weight_decay") for group in base.param_groups)
        if (told := put_back(attached.behaviour, config, decays)) is not None:
            tell(told)

    # ---------------------------------------------------------------- ChildTuning-D

    def estimate_fisher(self, batches: Iterable[Any], loss_fn: LossFunction | None = None) -> Fisher:
        """Empirical Fisher information of the eligible parameters. A collective; the engine is as before afterwards.

        Args:
            batches: this rank's micro-batches; ranks may have different numbers of them, but each at least one. A mapping is
                passed as `engine(**batch)`, a sequence as `engine(*batch)`; the output has `.loss`, is the loss, or begins with it.
            loss_fn: `loss_fn(engine, batch) -> scalar loss`, for anything else.

        Raises:
            ValueError, RuntimeError: on every rank; see `select`.
        """
        self._check_attached()
        with raising_together():
            check_batches(batches)
        return estimate_fisher(
            self.engine,
            self._parameters,
            self._open_shards(),
            self._open(),
            batches,
            self.config.fisher,
            loss_fn or default_loss,
        )

    def gather_fisher(self, fisher: Fisher, name: str) -> Tensor:
        """fp32 of the eligible parameter's full shape, on every rank. A collective."""
        name = self._eligible_name(name)
        values = [
            (f, total.float() / fisher.terms)
            for shard, sums in zip(self._open_shards(), fisher.sums, strict=True)
            for f, total in zip(shard.eligible, sums, strict=True)
            if f.name == name
        ]
        return gather(name, self._parameters.shapes[name], values, torch.float32)

    def select(self, batches: Iterable[Any] | None = None, loss_fn: LossFunction | None = None) -> Report:
        """Fix the child: exactly round(reserve_p * eligible) elements with the largest scores. A collective.

        Args:
            batches: calibration micro-batches, see `estimate_fisher`; may be None for a selector that needs none.
            loss_fn: see `estimate_fisher`.

        Raises:
            ValueError: on every rank, for no batches, NaN or inf, or an eligible parameter that never got a gradient.
            NotImplementedError: on every rank, for ranks that use different parameters in a micro-batch at ZeRO 1 to 3.
            RuntimeError: on every rank, with ChildTuning-F, between a micro-batch and its step, or when `batches` raises. The child
                so far, if there is one, then trains on.
        """
        if self.config.mode != "ChildTuning-D":
            raise RuntimeError(
                'select: mode "ChildTuning-F" draws its child at every step. Remedy: do not call select.'
            )
        self._check_attached()
        self._check_between_steps("select")
        self._check_some_are_open()
        started = time.perf_counter()
        scores, terms = self._scores(batches, loss_fn)
        scored = time.perf_counter()
        eligible = self._open()
        numel = sum(self._parameters.shapes[name].numel() for name in eligible)
        cut = cut_at(scores, sorted(eligible), numel, self.config.reserve_p)
        known = positive(scores, sorted(eligible)) if self.config.selector in ("fisher", "magnitude") else None
        with raising_together():  # memory may be short on one rank only, and the child so far is to train on then
            child = self._made_child(self._without_frozen(masks_inside(self._open_shards(), scores, cut)))
        self._earlier_children |= self._policy is not None and self.step > self._selected_at
        self._selected_at = self.step
        self._policy = self._fix(child)
        # The original lets weight decay move the complement: there is nothing to check then.
        self._self_check = SelfCheck() if self.config.compat is None else None
        chosen = time.perf_counter()
        self._report = Report(
            self.config.mode,
            self.config.reserve_p,
            self._count(self._fragment_masks(self._policy)),
            fisher_seconds=scored - started if terms else 0.0,
            selection_seconds=chosen - scored,
            calibration_batches=terms,
            threshold=None if self.config.selector == "lowest_fisher" else cut.threshold / max(terms, 1),
            zero_parameters=() if known is None else known.without,
            zero_kept=0 if known is None else max(0, round(self.config.reserve_p * numel) - known.total),
        )
        tell(str(self._report))
        return self._report

    def _scores(self, batches: Iterable[Any] | None, loss_fn: LossFunction | None) -> tuple[ShardScores, int]:
        """What the selector maximises, and the terms of Fisher's mean."""
        selector = self.config.selector
        if selector == "magnitude":
            return magnitudes(self._open_shards()), 0
        if selector == "random":
            return random_numbers(self._open_shards(), self.config.seed), 0
        with raising_together():
            if batches is None:
                raise ValueError(
                    f'select: expected calibration batches for selector "{selector}", got None.'
                    " Remedy: pass an iterable of micro-batches of the task's training set."
                )
        assert batches is not None
        fisher = self.estimate_fisher(batches, loss_fn)
        if selector == "lowest_fisher":
            reverse_order(fisher.sums)
        return fisher.sums, fisher.terms

    def _open(self) -> frozenset[str]:
        """Eligible parameters that are not frozen at the moment: a child is chosen from these, and the others are outside of it."""
        return frozenset(name for name in self._eligible if self._parameters.by_name[name].requires_grad)

    def _open_shards(self) -> tuple[FlatShard, ...]:
        return mark_eligible(self._shards, self._open())

    def _check_some_are_open(self) -> None:
        """A collective."""
        with raising_together():
            if not self._open():
                raise ValueError(
                    f"select: expected eligible parameters that train, got {len(self._eligible)} that are all frozen."
                    " Remedy: call requires_grad_(True) on some of them first."
                )
        check_same(repr(sorted(self._open())), "the eligible parameters that are not frozen")
        frozen = sorted(self._eligible - self._open())
        if frozen:
            tell(
                f"select: {len(frozen)} eligible parameters are frozen ({frozen[0]} .. {frozen[-1]}): they are outside of the child"
                " until it is chosen again"
            )

    def _without_frozen(self, masks: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same masks, with what is frozen outside."""
        frozen = self._eligible - self._open()
        for shard, mask in zip(self._shards, masks, strict=True):
            for fragment in shard.eligible:
                if fragment.name in frozen:
                    fragment.of(mask).fill_(False)
            yield mask

    def _made_child(self, masks: Iterable[Tensor]) -> DenseChild | CompactChild:
        """A child, beside the one that trains so far. Elements that stay keep their state."""
        base = base_optimizer(self.engine)
        if self.config.optimizer_state == "dense":
            original = self.config.compat == "original"
            return DenseChild(self._shards, masks, base, self._behaviour, decay_outside=original)
        depth = Depth.of(self.engine, self.config.clip)
        tell(f'optimizer_state "compact" is at depth {depth.reason}')
        previous = self._policy if isinstance(self._policy, CompactChild) else None
        return CompactChild.made(self._shards, masks, base, depth.plumbing, previous, self._behaviour.rest_values)

    def _fix(self, child: DenseChild | CompactChild) -> DenseChild | CompactChild:
        """It trains from here on."""
        self._take_back_overrides()
        child.take_over()
        if isinstance(child, CompactChild):
            self._shard_of = child.shard_of()
            self._reads = redirect(self.engine, child)
        if self.config.clip == "child" and not (isinstance(child, CompactChild) and child.norm_is_child):
            self._norm = NormOfChild(self.engine, self._shards, self._parameters.by_name, child)
        return child

    def _take_back_overrides(self) -> None:
        """What a fixed child has overridden on the engine, apart from a compact child's own plumbing."""
        for override in (self._reads, self._norm):
            if override is not None:
                override.remove()
        self._reads = self._norm = None

    # ---------------------------------------------------------------- checkpoints

    def _state(self) -> ChildState:
        progress = Progress(self.step, self._selected_at, self._earlier_children)
        if self._report is not None:
            batches = self._report.calibration_batches
            progress = replace(progress, threshold=self._report.threshold, calibration_batches=batches)
        return ChildState(progress, self._policy)

    def _resume(self, to: Resumed) -> Policy | None:
        """Become what a checkpoint holds. A collective."""
        self.step = to.progress.step
        self._selected_at = to.progress.selected_at
        self._earlier_children = to.progress.earlier_children
        self._steps_at_attach = applied_steps(self.engine)
        self._stepped.clear()
        if self.config.mode == "ChildTuning-F":
            return self._policy
        if to.masks is None:
            if isinstance(self._policy, CompactChild) and to.another_follows:
                self._policy.discard()
            elif isinstance(self._policy, (DenseChild, CompactChild)):
                self._policy.release()
            self._take_back_overrides()
            self._shard_of = {s.tensor: s for s in self._shards}
            self._policy = self._self_check = self._report = None
            return None
        with raising_together():
            child = self._made_child(to.masks)
        self._policy = self._fix(child)
        self._self_check = SelfCheck() if self.config.compat is None else None
        self._report = Report(
            self.config.mode,
            self.config.reserve_p,
            self._count(self._fragment_masks(self._policy)),
            calibration_batches=to.progress.calibration_batches,
            threshold=to.progress.threshold,
        )
        return self._policy

    # ---------------------------------------------------------------- the child alone

    def export(self, path: str | Path) -> None:
        """Write ChildTuning-D's child alone, in Hugging Face names: see [Note: export], and `apply_child`. A collective.

        Args:
            path: a folder that every rank sees. A child that it had before is replaced in one instant.

        Raises:
            NotImplementedError: on every rank, where elements outside the child have moved, or weights are not in memory.
            RuntimeError: on every rank, before `select`, or when the system refuses, for example with a full disk.
        """
        policy = self._chosen_policy()
        reason = ""
        if isinstance(policy, TaskFreeChild) or self.config.compat is not None:
            reason = f'{self.config.mode} with compat "{self.config.compat}", which moves every element'
        elif self._earlier_children:
            reason = "a child that was chosen after another one had been trained, whose elements have moved too"
        if isinstance(policy, TaskFreeChild) or reason:
            raise NotImplementedError(
                f"export: expected a fixed child, outside of which nothing has moved since attach, got {reason}."
                " Remedy: save the whole model with engine.save_16bit_model."
            )
        masks = ((f, policy.mask(s.tensor, f)) for s in self._shards for f in s.fragments)
        export_child(Path(path), self.engine.module, masks, self.config.model_dump(mode="json"), self.step)

    # ---------------------------------------------------------------- inspection

    def gather_mask(self, name: str) -> Tensor:
        """The child's mask of one parameter: bool of its full shape, True = trained, on every rank. A collective.

        For ChildTuning-F, the mask that the next applied step will use. Dense parameters are True throughout, those that the
        optimizer does not hold False.

        Raises:
            ValueError: on every rank, for a name that the model does not have.
            RuntimeError: on every rank, before `select`.
        """
        first = self._first_name(name)
        policy = self._chosen_policy()
        shape = self._parameters.shapes[first]
        if first not in self._eligible:
            return torch.full(shape, first in self._parameters.by_name, dtype=torch.bool, device=device())
        if isinstance(policy, TaskFreeChild):
            whole = Fragment(first, 0, 0, shape.numel())
            return policy.mask(whole, device(), self.step).view(shape)
        masks = ((f, policy.mask(s.tensor, f)) for s in self._shards for f in s.fragments if f.name == first)
        return gather(first, shape, masks, torch.uint8).bool()

    def report(self) -> Report:
        """Eligible and kept elements and density, per parameter and in total. A collective.

        For ChildTuning-F, those of the mask that the next applied step will use.
        """
        policy = self._chosen_policy()
        if isinstance(policy, TaskFreeChild):
            masks = ((f, policy.mask(f, device(), self.step)) for s in self._shards for f in s.eligible if f.counted)
            return Report(self.config.mode, self.config.reserve_p, self._count(masks))
        assert self._report is not None
        return self._report

    def _fragment_masks(self, child: DenseChild | CompactChild) -> Iterator[tuple[Fragment, Tensor]]:
        """Every fragment with its bool mask, one at a time."""
        return ((f, child.mask(s.tensor, f)) for s in self._shards for f in s.fragments)

    def _count(self, masks: Iterable[tuple[Fragment, Tensor]]) -> tuple[ParameterReport, ...]:
        """Every parameter that the optimizer steps. A collective."""
        names = list(self._parameters.by_name)
        numels = [self._parameters.shapes[name].numel() for name in names]
        return tuple(
            ParameterReport(name, numel, numel if name in self._eligible else 0, kept)
            for name, numel, kept in zip(names, numels, count_kept(names, masks), strict=True)
        )

    def _first_name(self, name: str) -> str:
        """The name that a tied parameter is known by. A collective: one rank's slip must not leave the others in a sum."""
        with raising_together():
            if name not in self._parameters.aliases:
                close = difflib.get_close_matches(name, self._parameters.aliases, n=3, cutoff=0)
                raise ValueError(
                    f"expected the name of a parameter, got {name!r}. Remedy: use for example {', '.join(close)}."
                )
            first = self._parameters.aliases[name]
        check_same(first, "the parameter's name")
        return first

    def _eligible_name(self, name: str) -> str:
        first = self._first_name(name)
        if first not in self._eligible:
            raise ValueError(f"expected an eligible parameter, got {name!r}, which is dense, or does not train.")
        return first

    def _eligibility(self) -> str:
        dense = [n for n in self._parameters.by_name if n not in self._eligible]
        count = sum(self._parameters.shapes[n].numel() for n in self._eligible)
        names = sorted(self._eligible)
        return (
            f"{self.config.mode} attached, reserve_p {self.config.reserve_p}: {count:,} elements in {len(names)} parameters"
            f" are eligible ({names[0]} .. {names[-1]}); {len(dense)} parameters train dense"
            f" ({', '.join(dense[:4])}{', ...' if len(dense) > 4 else ''}){self._outside_the_optimizer()}"
        )

    def _outside_the_optimizer(self) -> str:
        names = self._parameters.not_held
        if not names:
            return ""
        count = sum(self._parameters.shapes[n].numel() for n in names)
        return (
            f"; {len(names)} trainable parameters of {count:,} elements are not in the optimizer, so they do not train"
            f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        )

    # ---------------------------------------------------------------- around the base optimizer's step

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        policy = self._chosen_policy()
        if isinstance(policy, CompactChild):
            policy.put_back()
        for group in optimizer.param_groups:
            shards = [self._known(tensor) for tensor in group["params"] if self._is_stepped(tensor)]
            if shards:
                policy.before_step(optimizer, group, shards, self.step)
            if (
                self._self_check is not None
                and self._self_check.looks
                and isinstance(policy, (DenseChild, CompactChild))
            ):
                for shard in shards:
                    self._self_check.before_step(shard, policy)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        policy = self._chosen_policy()
        policy.after_step()
        if self._self_check is not None and self._self_check.looks:
            # Adafactor may have none of its own.
            self._self_check.after_step(max(float(group["lr"] or 0) for group in optimizer.param_groups))
        tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
        self._stepped.update(tensor for tensor in tensors if self._is_stepped(tensor))
        if len(self._stepped) == len(self._shards):
            self._stepped.clear()
            self.step += 1
            self._judge()

    def _judge(self) -> None:
        """Go on with the self-check, or end it. A collective in the few applied steps that are looked at."""
        check = self._self_check
        if check is None:
            return
        if check.looks:
            verdict = check.verdict(device())
            sum_over_ranks(verdict)
            if check.judge(verdict.tolist()):
                self._self_check = None
        check.count_step()

    def _is_stepped(self, tensor: Tensor) -> bool:
        """Without ZeRO the base optimizer may hold parameters that are frozen, which no flat shard has and no step moves."""
        return tensor.requires_grad or tensor in self._shard_of

    def _known(self, tensor: Tensor) -> FlatShard:
        shard = self._shard_of.get(tensor)
        if shard is None:
            raise RuntimeError(
                f"the base optimizer steps a tensor of {tensor.numel()} elements that was not there at attach."
                " Remedy: call detach() and attach(engine) again after changing the model or the optimizer."
            )
        return shard

    def _check_before_forward(self) -> None:
        """What was attached to is still there; and a step that DeepSpeed says it applied must have come by here."""
        if (problem := missing_groups(self.engine)) is not None:
            raise RuntimeError(f"ChildTuner: {problem}")
        self._tell_of_thawed()
        if self.step == 0 and applied_steps(self.engine) > self._steps_at_attach:
            raise RuntimeError(
                "ds_childtune self-check: DeepSpeed applied a step, but its base optimizer's step hooks did not fire, so no"
                f" mask acted. Remedy: report this set-up ({type(self.engine.optimizer).__name__} around"
                f" {type(base_optimizer(self.engine)).__name__}); until then it is not supported."
            )

    def _tell_of_thawed(self) -> None:
        """Once: parameters that were frozen at `deepspeed.initialize` and thawed since do not train, in plain DeepSpeed either."""
        if not self._looks_for_thawed:
            return
        thawed = [name for name, param in self._parameters.frozen.items() if param.requires_grad]
        if thawed:
            self._looks_for_thawed = False
            tell(
                f"WARNING: {len(thawed)} parameters do not train ({', '.join(thawed[:4])}{', ...' if len(thawed) > 4 else ''}):"
                " they were frozen at deepspeed.initialize, so the optimizer does not hold them. Remedy: call requires_grad_(True)"
                " before deepspeed.initialize, give the optimizer all that is to train at any time, and freeze it afterwards."
            )

    def _chosen_policy(self) -> Policy:
        if self._policy is None:
            raise RuntimeError(
                "ChildTuning-D has no child yet. Remedy: call child.select(calibration_batches) before training and before"
                " asking for masks."
            )
        return self._policy

    def _check_attached(self) -> None:
        if not self._handles:
            raise RuntimeError("this ChildTuner is detached. Remedy: call attach(engine) again.")

    def _check_between_steps(self, what: str) -> None:
        if inside_accumulation(self.engine):
            raise RuntimeError(
                f"{what}: called between a micro-batch and its optimizer step, whose gradients would be lost."
                " Remedy: call it before training, or right after the step that ends an accumulation."
            )

    def detach(self) -> None:
        """Remove every hook: the engine is plain DeepSpeed again.

        The base optimizer's state stays as it is; a compact one becomes dense, zero outside the child.

        Raises:
            RuntimeError: with a compact child, between a micro-batch and its step.
        """
        if isinstance(self._policy, CompactChild):
            self._check_between_steps("detach")
        if isinstance(self._policy, (DenseChild, CompactChild)):
            self._policy.release()
        self._take_back_overrides()
        if self.config.optimizer_state == "compact":
            separate_masters(self.engine)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.engine.child_tuner = None


def _checking_before_forward(tuner: ChildTuner) -> Callable[..., None]:
    """A hook for the engine's module that is of no effect on copies of it.

    A copy of a module has its hooks. Python copies functions as they are, but a bound method with all that it is bound to.
    """
    of = weakref.ref(tuner)

    def check(module: nn.Module, *_: object) -> None:
        tuner = of()
        if tuner is not None and module is tuner.engine.module:
            tuner._check_before_forward()

    return check
