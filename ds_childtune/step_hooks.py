"""What happens around the base optimizer's step: gradients are masked, steps are counted, and the first ones are checked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint.run_record import Progress
from ds_childtune.child.compact import CompactChild
from ds_childtune.child.dense import DenseChild
from ds_childtune.child.finite_check import FiniteCheck
from ds_childtune.child.network import ChildNetwork, FixedChild, Group, Stepped
from ds_childtune.child.self_check import SelfCheck
from ds_childtune.child.step_numbers import StepMeter, StepNumbers
from ds_childtune.child.task_free import TaskFreeChild
from ds_childtune.gathering import KeptCounts, unlike_masks
from ds_childtune.ranks import device, raising_together, sum_over_ranks, tell, to_host, world_size
from ds_childtune.shards import FlatShard
from ds_childtune.zero import clip, compact_reads
from ds_childtune.zero.compact_parts import CompactParts
from ds_childtune.zero.engine import (
    after_a_failed_step,
    after_destroy,
    applied_steps,
    base_optimizer,
    before_each_step,
    empty_param_groups,
    wrapper_of,
)
from ds_childtune.zero.flat_shards import held_parameters
from ds_childtune.zero.other_engines import HOOKS
from ds_childtune.zero.supported import missing_groups


class _Override(Protocol):
    def remove(self) -> None: ...


class StepHooks:
    """The hooks of one engine, until `remove`; they own the child, its progress and its self-check."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self.progress = Progress()
        self._child: ChildNetwork | None = None
        self._half_way = False
        """Whether an exception has come while a child was put in place."""
        self.half_loaded: str | None = None
        """The checkpoint whose load has begun and not ended."""
        self._fixed: FixedChild | None = None
        """The same child, where it is fixed."""
        self.kept: list[int] = []
        """Eligible elements inside a fixed child, for each of the optimizer's parameters, over all ranks."""
        self._self_check: SelfCheck | None = None
        self._finite_check: FiniteCheck | None = None
        self._overrides: list[_Override] = []
        """On DeepSpeed's objects, for the child that trains."""
        self._stepped: set[Tensor] = set()
        """Flat shards that the base optimizer has stepped in the current applied step."""
        self.step_failed = False
        """Whether the base optimizer's last step ended in an exception: its gradients are lost anyway."""
        self._meter: StepMeter | None = None
        """Of the applied step that is being taken."""
        self._measures_next = False
        self._measured: Tensor | None = None
        """On the host: the sums of the last step that was measured, as soon as `_arrived`."""
        self._arrived: Any = None
        """An event of the accelerator; None on a CPU."""
        self._looks_for_thawed = True
        engine, config, shards = attachment.engine, attachment.config, attachment.shards
        base = base_optimizer(engine)
        self._shard_of = {s.tensor: s for s in shards}
        """The flat shard of every tensor that the base optimizer may be handed."""
        self._steps_at_start = applied_steps(engine)
        """DeepSpeed's count of applied steps when ours was at `progress.step`."""
        if config.mode == "ChildTuning-F":
            self.child = TaskFreeChild(shards, base, seed=config.seed, reserve_p=config.reserve_p)
        self._handles: list[RemovableHandle] = [
            base.register_step_pre_hook(self._before_step),
            base.register_step_post_hook(self._after_step),
            engine.module.register_forward_pre_hook(_checking_before_forward(self)),
        ]
        self._around_steps = [after_a_failed_step(engine, self._recover), before_each_step(engine, self._check_child)]
        self._end = after_destroy(engine, self._engine_is_gone)

    # ---------------------------------------------------------------- the child

    @property
    def child(self) -> ChildNetwork | None:
        """None: a ChildTuning-D child that is not chosen yet. RuntimeError where none is whole."""
        self._check_whole()
        return self._child

    @child.setter
    def child(self, child: ChildNetwork | None) -> None:
        self._child = child

    def _check_whole(self) -> None:
        if self._half_way:
            raise RuntimeError(
                "ChildTuner: expected a child that was put in place as a whole, got one at which an exception came half-way, as for"
                " want of memory; the one before is gone. Remedy: make a new engine, and load the last checkpoint."
            )

    @property
    def none_in_place(self) -> bool:
        """Whether no child, and no half of one, is where DeepSpeed looks."""
        return self._child is None and not self._half_way

    def chosen_child(self) -> ChildNetwork:
        """The child; RuntimeError where it is not chosen yet."""
        if self.child is None:
            raise RuntimeError(
                "ChildTuning-D has no child yet. Remedy: call child.select(calibration_batches) before training and before"
                " asking for masks."
            )
        return self.child

    def fix(self, masks: Iterable[Tensor]) -> None:
        """Train the child of these masks from the next step on; elements that stay keep their state. A collective.

        Args:
            masks: bool 1-D, one for each flat shard, True = inside the child, or not eligible.

        Raises:
            RuntimeError, NotImplementedError: on every rank, where it cannot be made; the child so far then trains on. Later, while it
                is put in place, on one rank only: from then on nothing trains.
            ValueError: likewise, where ranks that step the same elements have been given other masks of them.
        """
        counts = KeptCounts(self._attachment.parameters.by_name)
        config = self._attachment.config
        compact = None
        if config.optimizer_state == "compact":
            compact = CompactParts.of(self._attachment.engine, config.clip, config.sends)
        with raising_together():  # memory may be short on one rank only
            child = self._made(self._counted(masks, counts), compact)
        self._check_replicas(child)
        self._half_way = True
        self._take_back_overrides()
        child.take_over()
        if compact is not None:
            tell(f"compact: {compact}")
        self.child = self._fixed = child
        self._shard_of = {s.tensor: s for s in self._attachment.shards}
        self._shard_of |= {s.tensor: s.flat for s in child.shards.values()}
        self._override(child)
        # The original lets weight decay move what is outside the child: there is nothing to check then.
        self._self_check = SelfCheck() if config.compat is None else None
        self._look_for_nan()
        self.kept = counts.over_ranks()
        self._half_way = False

    def _counted(self, masks: Iterable[Tensor], counts: KeptCounts) -> Iterator[Tensor]:
        for shard, mask in zip(self._attachment.shards, masks, strict=True):
            for fragment in shard.eligible:
                counts.add(fragment, fragment.of(mask))
            yield mask

    def _made(self, masks: Iterable[Tensor], compact: CompactParts | None) -> FixedChild:
        """A child, beside the one that trains so far."""
        config, shards = self._attachment.config, self._attachment.shards
        base, behaviour = base_optimizer(self._attachment.engine), self._attachment.behaviour
        if compact is None:
            return DenseChild(shards, masks, base, behaviour, decay_outside=config.compat == "original")
        previous = cast("CompactChild | None", self.child)  # as the config says
        return CompactChild.made(shards, masks, base, compact.plumbing, previous, behaviour.rest_values)

    def _check_replicas(self, child: FixedChild) -> None:
        """Without ZeRO every rank steps every element, so other masks on one would be other weights there. A collective."""
        if wrapper_of(self._attachment.engine).is_zero:
            return
        shards = self._attachment.shards
        unlike = unlike_masks((f, child.child_mask(s, f, 0)) for s in shards for f in s.eligible)
        if unlike:
            raise ValueError(
                f"select: expected the same masks on every rank, as each steps every element without ZeRO, got other ones of"
                f" {len(unlike)} parameters ({', '.join(unlike[:3])}{', ...' if len(unlike) > 3 else ''}). Remedy: draw random masks"
                " from a generator with the same seed on every rank, or use ZeRO-1, where each element has one owner."
            )

    def _look_for_nan(self) -> None:
        """In the steps of `child_tuning.finite_check_every`, and not in a Fisher pass before."""
        if self._finite_check is not None:
            self._finite_check.end()
        every = self._attachment.config.finite_check_every
        parameters = self._attachment.parameters.by_name
        self._finite_check = FiniteCheck(parameters, every) if every is not None and self._fixed is not None else None
        if self._finite_check is not None:
            self._overrides.append(before_each_step(self._attachment.engine, self._judge_gradients))

    def _override(self, child: FixedChild) -> None:
        engine = self._attachment.engine
        if self._attachment.config.optimizer_state == "compact":
            reads = compact_reads.redirect(engine, cast("CompactChild", child))
            self._overrides += [reads] if reads is not None else []
        if self._attachment.config.clip == "child" and not child.norm_is_child:
            parameters = self._attachment.parameters.by_name
            self._overrides.append(clip.NormOfChild(engine, self._attachment.shards, parameters, child))

    def _take_back_overrides(self) -> None:
        for override in self._overrides:
            override.remove()
        self._overrides.clear()

    # ---------------------------------------------------------------- another state

    def forget(self, *, another_follows: bool = False) -> None:
        """Be as after `attach`: no step, and no fixed child.

        Args:
            another_follows: a compact child is loaded next, so that nothing needs to become dense in between.
        """
        self.adopt(Progress())
        if self._fixed is None:
            return
        if another_follows:
            self._fixed.discard()
        else:
            self._fixed.release()
        self._take_back_overrides()
        self._shard_of = {s.tensor: s for s in self._attachment.shards}
        self.child = self._fixed = self._self_check = None
        self._look_for_nan()
        self.kept = []

    def adopt(self, progress: Progress) -> None:
        """Go on from a checkpoint's count of steps. `fix` gives its child."""
        self.progress = progress
        self._steps_at_start = applied_steps(self._attachment.engine)
        self._stepped.clear()

    def remove(self) -> None:
        """Plain DeepSpeed again. The optimizer's state stays; a compact one becomes dense."""
        if self._fixed is not None:
            self._fixed.release()
        self._take_back_overrides()
        self._let_go()
        for override in (*reversed(self._around_steps), self._end):  # one is on top of the other
            override.remove()

    def _engine_is_gone(self) -> None:
        """Nothing of the child stays in memory, though what was around DeepSpeed's objects does."""
        if self._fixed is not None:
            self._fixed.discard()
        self._take_back_overrides()
        self._let_go()

    def _let_go(self) -> None:
        """Leave the model to another engine, and the child's memory."""
        for handle in self._handles:
            handle.remove()
        if self._finite_check is not None:
            self._finite_check.end()
        self._child = self._fixed = self._self_check = None
        self._shard_of = {}

    # ---------------------------------------------------------------- around a step

    def _recover(self) -> None:
        """Param groups as the user has them: after a failed step another child, a checkpoint or plain DeepSpeed may follow."""
        if self._child is not None:
            self._child.recover()
        empty_param_groups(self._attachment.engine)

    def _check_child(self) -> None:
        """Before a step: in the hook of the base optimizer DeepSpeed would be in the middle of it."""
        self.check_loaded()
        self.chosen_child()

    def check_loaded(self) -> None:
        """Raise RuntimeError after a load that has not ended."""
        if self.half_loaded is not None:
            raise RuntimeError(
                f"ChildTuner: expected a checkpoint that is loaded as a whole, got {self.half_loaded}, whose load ended in an"
                " exception: weights, masters and moments may be of two runs. Remedy: load this or another checkpoint, or make a new"
                " engine."
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.step_failed = True  # until it has ended
        child = self.chosen_child()
        child.recover()
        stepped = [Stepped(group, self._shards_in(group)) for group in optimizer.param_groups]
        stepped = [each for each in stepped if each.shards]
        shards = [shard for each in stepped for shard in each.shards]
        if not self._stepped:  # the first call of this applied step
            self._meter = self._new_meter(child) if self._measures_next else None
            self._measures_next = False
        if self._meter is not None:
            self._meter.before(shards)
        child.before_step(optimizer, stepped, self.progress.step)
        if self._meter is not None:
            self._meter.after_mask(shards)
        if self._fixed is not None and self._self_check is not None and self._self_check.looks:
            for shard in shards:
                self._self_check.before_step(shard, self._fixed)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.chosen_child().after_step()
        if self._meter is not None:
            self._meter.after_step()
        if self._self_check is not None and self._self_check.looks:
            # Adafactor's may be None.
            self._self_check.after_step(max(float(group["lr"] or 0) for group in optimizer.param_groups))
        tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
        self._stepped.update(tensor for tensor in tensors if self._is_stepped(tensor))
        if len(self._stepped) == len(self._attachment.shards):
            self._stepped.clear()
            self.progress = replace(self.progress, step=self.progress.step + 1)
            self._judge()
            self._end_measurement()
        self.step_failed = False

    def measure_next_step(self) -> None:
        """See [Note: numbers of a step]. On every rank, as it makes that step a collective more."""
        self._measures_next = True
        self._measured = None

    def measured(self) -> StepNumbers | None:
        """Of the last step that was measured. Waits for that step only."""
        if self._measured is None:
            return None
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepNumbers.of(self._measured.tolist())

    def _new_meter(self, child: ChildNetwork) -> StepMeter:
        config = self._attachment.config
        return StepMeter(
            child,
            self._fixed,
            self._attachment.shards,
            reserve_p=config.reserve_p,
            norm_is_child=child.norm_is_child or config.clip == "child",
            device=device(),
        )

    def _end_measurement(self) -> None:
        if self._meter is not None:
            if not (self._meter.norm_is_child or self.chosen_child().flat_gradients):
                norm = clip.handed_norm(self._attachment.engine)
                if norm is not None:
                    self._meter.add_whole(norm, world_size())
            sums, self._meter = self._meter.sums, None
            sum_over_ranks(sums)
            self._measured, self._arrived = to_host(sums)

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

    def _judge_gradients(self) -> None:
        """A collective in the steps that the config says."""
        check, step = self._finite_check, self.progress.step + 1
        if check is not None and check.looks_at(step):
            verdict = check.verdict(device())
            sum_over_ranks(verdict)
            check.judge(verdict.tolist(), step)

    def _shards_in(self, group: Group) -> list[FlatShard]:
        return [self._known(tensor) for tensor in group["params"] if self._is_stepped(tensor)]

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

    # ---------------------------------------------------------------- before a forward pass

    def check_before_forward(self) -> None:
        """What was attached to is still there; and a step that DeepSpeed says it applied must have come by here."""
        engine = self._attachment.engine
        self._check_whole()
        self.check_loaded()
        if (problem := missing_groups(engine)) is not None:
            raise RuntimeError(f"ChildTuner: {problem}")
        self._warn_of_thawed()
        if self._finite_check is not None and self._finite_check.looks_at(self.progress.step + 1):
            self._finite_check.begin()
        if self.progress.step == 0 and applied_steps(engine) > self._steps_at_start:
            raise RuntimeError(
                "ds_childtune self-check: DeepSpeed applied a step, but its base optimizer's step hooks did not fire, so no"
                f" mask acted. Remedy: report this set-up ({type(engine.optimizer).__name__} around"
                f" {type(base_optimizer(engine)).__name__}); until then it is not supported."
            )

    def _warn_of_thawed(self) -> None:
        """Once: parameters that were frozen at `deepspeed.initialize` and thawed since do not train, in plain DeepSpeed either."""
        if not self._looks_for_thawed:
            return
        thawed = {name: p for name, p in self._attachment.parameters.frozen.items() if p.requires_grad}
        if not thawed:
            return
        # Without ZeRO the optimizer may hold what was frozen at attach, and then trains it now.
        held = held_parameters(self._attachment.engine) if not wrapper_of(self._attachment.engine).is_zero else set()
        if late := [name for name, param in thawed.items() if id(param) in held]:
            raise RuntimeError(
                f"ChildTuner: expected parameters that were frozen at attach to stay so, got {len(late)} that train now"
                f" ({', '.join(late[:4])}{', ...' if len(late) > 4 else ''}), and the child does not know them. Remedy: call detach()"
                " and attach(engine) again after thawing; or attach first, and freeze afterwards."
            )
        self._looks_for_thawed = False
        tell(
            f"WARNING: {len(thawed)} parameters do not train ({', '.join([*thawed][:4])}{', ...' if len(thawed) > 4 else ''}):"
            " they were frozen at deepspeed.initialize, so the optimizer does not hold them. Remedy: call requires_grad_(True)"
            " before deepspeed.initialize, give the optimizer all that is to train at any time, and freeze it after attach."
        )

    @property
    def module(self) -> nn.Module:
        """The engine's."""
        return self._attachment.engine.module  # type: ignore[no-any-return]


def _checking_before_forward(hooks: StepHooks) -> Callable[..., None]:
    """A hook for the engine's module that is of no effect on copies of it.

    A copy of a module has its hooks. Python copies functions as they are, but a bound method with all that it is bound to.
    """
    of = weakref.ref(hooks)

    def check(module: nn.Module, *_: object) -> None:
        hooks = of()
        if hooks is not None and module is hooks.module:
            hooks.check_before_forward()

    # Traced, it would change the optimizer: dynamo makes param groups "capturable" when it reads them.
    untraced: Any = torch.compiler.disable(check)
    setattr(untraced, HOOKS, of)
    return untraced  # type: ignore[no-any-return]
