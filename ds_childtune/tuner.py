"""`attach`, the one verb, and the `ChildTuner` that it returns: where the pure parts and DeepSpeed's engine meet."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_childtune.attachment import Attachment
from ds_childtune.checkpoint import Checkpoints
from ds_childtune.checkpoint.given import find_child, saved_masks
from ds_childtune.checkpoint.run_record import Progress
from ds_childtune.child.network import ChildNetwork
from ds_childtune.child.optimizer_check import put_back, tried
from ds_childtune.child.step_numbers import StepNumbers
from ds_childtune.child_files.export import export_child
from ds_childtune.child_files.export_info import KIND, refuse_moved_outside
from ds_childtune.child_files.patches import CheckpointWeightPatch, Only, live_patches, pieces_of
from ds_childtune.child_files.reader import open_child
from ds_childtune.config import ChildTuningConfig, FisherConfig, parse_config
from ds_childtune.gathering import KeptCounts, gather
from ds_childtune.random_states import kept_random_states
from ds_childtune.ranks import check_same, device, raising_together, tell
from ds_childtune.report import ParameterReport, Report
from ds_childtune.selection.contrast import check_against, contrast
from ds_childtune.selection.eligible import eligible_names
from ds_childtune.selection.experts import Experts
from ds_childtune.selection.fisher import Fisher
from ds_childtune.selection.fisher_pass import FisherPass
from ds_childtune.selection.given import GivenMask, Unnamed, check_arguments, given_masks, match_names, must_be_alike
from ds_childtune.selection.loss import LossFunction, default_loss
from ds_childtune.selection.rounds import check_batches
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
from ds_childtune.step_hooks import StepHooks
from ds_childtune.zero.calibration import hands_on
from ds_childtune.zero.clip import refuse_unsupported_clip
from ds_childtune.zero.compact_parts import refuse_lean
from ds_childtune.zero.engine import (
    base_optimizer,
    child_tuning_block,
    empty_param_groups,
    gradients_wait,
    inside_accumulation,
    wrapper_of,
    write_events,
)
from ds_childtune.zero.flat_shards import read_flat_shards, read_parameters
from ds_childtune.zero.layout_check import check_layout
from ds_childtune.zero.masters import separate_masters, share_masters
from ds_childtune.zero.other_engines import refuse_parameters_of_another
from ds_childtune.zero.supported import check_engine, refuse_finite_check, refuse_unsupported_engine


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
        RuntimeError: when the engine has a child already, or an earlier engine takes its model's gradients; on every rank.
    """
    check_engine(engine)
    with raising_together():
        if getattr(engine, "child_tuner", None) is not None:
            raise RuntimeError("attach: this engine has a ChildTuner already. Remedy: call its detach() first.")
        parsed = parse_config(config if config is not None else child_tuning_block(engine))
        refuse_unsupported_engine(engine)
        parameters = read_parameters(engine)
        refuse_parameters_of_another(engine, parameters.by_name)
        candidates = eligible_names(engine.module, tuple(parameters.by_name), parsed)
        eligible = frozenset(parameters.by_name) if parsed.others == "frozen" else candidates
        shards = mark_eligible(read_flat_shards(engine, parameters), eligible)
        if parsed.clip == "child":
            refuse_unsupported_clip(engine)
        if parsed.finite_check_every is not None:
            refuse_finite_check(engine)
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
    return ChildTuner(Attachment(engine, parsed, parameters, candidates, eligible, shards, behaviour))


class ChildTuner:
    """A child network on a DeepSpeed engine. Made by `attach`.

    The life of a ChildTuner, in phases:

    1. `attach` reads where every gradient element lives and hooks the base optimizer's `step`.
    2. ChildTuning-D: `select` runs the Fisher pass and fixes the child. Stepping before that is an error.
    3. Training. Before each `step` of the base optimizer the gradients of its flat shards are masked.
    4. `detach` removes the hooks: plain DeepSpeed again, bitwise.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.engine = engine = attachment.engine
        self.config = config = attachment.config
        self._hooks = StepHooks(attachment)
        self._checkpoints = Checkpoints(attachment, self._hooks)
        self._selected: tuple[weakref.ref[ChildNetwork], Report] | None = None
        """The last child that `select` chose, and what it reported of it. A child that has been replaced is large."""
        self._attached = True
        engine.child_tuner = self
        tell(str(attachment))
        decays = any(group.get("weight_decay") for group in base_optimizer(engine).param_groups)
        if (text := put_back(attachment.behaviour, config, decays)) is not None:
            tell(text)

    @property
    def step(self) -> int:
        """Applied optimizer steps since `attach`, or since the run began whose checkpoint was loaded; steps that DeepSpeed skips for
        an overflow do not count."""
        return self._hooks.progress.step

    @property
    def chosen(self) -> bool:
        """Whether there is a child: always with ChildTuning-F, else after `select`, or the load of a checkpoint that has one."""
        return self._hooks.child is not None

    @property
    def norm_is_child(self) -> bool:
        """Whether `engine.get_global_grad_norm()` is that of the child's gradient, rather than of the whole one."""
        child = self._hooks.child
        return child is not None and (child.norm_is_child or self.config.clip == "child")

    def measure_next_step(self) -> None:
        """Measure the next applied step: see `measured`. On every rank; it costs a pass over gradients and a small all-reduce."""
        self._check_attached()
        self._hooks.measure_next_step()

    def measured(self) -> StepNumbers | None:
        """How large the child's gradient and update were in the step that was asked for: see [Note: numbers of a step].

        None where it has not been applied, as DeepSpeed skips a step for an overflow. The host waits for that step, if it is still
        under way, and for nothing else.
        """
        return self._hooks.measured()

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
        return self._estimate(batches, loss_fn, self.config.fisher)

    def _estimate(self, batches: Iterable[Any], loss_fn: LossFunction | None, config: FisherConfig) -> Fisher:
        with raising_together():
            self._check_attached()
            self._check_between_steps("estimate_fisher", self._waits)
            check_batches(batches)
            attachment = self.attachment
            names = sorted(attachment.trainable())
            # Memory for the sums may be short on one rank only.
            calibration = FisherPass(self.engine, attachment.parameters, attachment.trainable_shards(), names, config)
        return calibration.estimate(batches, loss_fn or default_loss)

    def gather_fisher(self, fisher: Fisher, name: str) -> Tensor:
        """Mean Fisher information: fp32 of the eligible parameter's full shape, on every rank. A collective.

        Args:
            fisher: what `estimate_fisher` has returned.

        Raises:
            ValueError: for a name that no eligible parameter has, or whose parameter was frozen then.
        """
        name = self.attachment.eligible_name(name)
        with raising_together():
            if name not in fisher.names:
                raise ValueError(
                    f"gather_fisher: expected a parameter that trained when the Fisher information was estimated, got {name!r}."
                    " Remedy: thaw it, and call estimate_fisher again."
                )
        shards = mark_eligible(self.attachment.shards, fisher.names)
        values = [
            (f, total.float() / fisher.terms)
            for shard, sums in zip(shards, fisher.sums, strict=True)
            for f, total in zip(shard.eligible, sums, strict=True)
            if f.name == name
        ]
        return gather(name, self.attachment.parameters.shapes[name], values, torch.float32)

    def select(
        self,
        batches: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = None,
        *,
        against: Iterable[Any] | None = None,
        masks: Mapping[str, GivenMask] | None = None,
        child: str | Path | None = None,
        unnamed: Unnamed = "frozen",
    ) -> Report:
        """Fix the child. A collective.

        Of Fisher information, or another `selector`: exactly round(reserve_p * eligible) elements with the largest scores. Or your
        own child, `masks`; or that of an export or a checkpoint, `child`. `reserve_p` and `selector` have no part in these.

        Args:
            batches: calibration micro-batches, see `estimate_fisher`; may be None for a selector that needs none.
            loss_fn: see `estimate_fisher`.
            against: for selector `contrast`, micro-batches of general text that the model is to keep; see [Note: contrast] in
                selection/contrast.py.
            masks: which elements train, by the name of an eligible parameter or a glob pattern: a bool tensor of its shape, row
                numbers, "nonzero", or a function of its shape; see [Note: masks that are given] in selection/given.py.
            child: a folder: what `export` wrote, a checkpoint's tag, or a checkpoint folder, whose latest tag is taken. Only its
                mask is read.
            unnamed: "frozen" or "dense": whether eligible parameters that `masks` or `child` does not have are outside the child or
                train in full.

        Returns:
            What `report()` gives, which rank 0 also prints, with the times of this selection.

        Raises:
            ValueError: on every rank, for no batches, NaN or inf, or an eligible parameter that can have no gradient;
                see [Note: experts that no token reached].
            NotImplementedError: on every rank, for ranks that use different parameters in a micro-batch at ZeRO 1 to 3.
            RuntimeError: on every rank, with ChildTuning-F, between a micro-batch and its step, or when `batches` raises. The child
                so far, if there is one, then trains on.
            ChildFileError: on every rank, a ValueError for a folder `child` that is damaged or of another model.
        """
        if self.config.mode != "ChildTuning-D":
            raise RuntimeError(
                'select: mode "ChildTuning-F" draws its child at every step. Remedy: do not call select.'
            )
        with raising_together():
            self._check_attached()
            self._check_between_steps("select", self._waits)
            check_arguments(batches, against, masks, child, unnamed, loss_fn)
        check_same(must_be_alike(masks, child, unnamed), "select", "pass the same on every rank")
        self._check_some_are_open()
        if masks is not None or child is not None:
            return self._select_given(masks, child, unnamed)
        started = time.perf_counter()
        scores, fisher = self._scores(batches, loss_fn, against)
        terms, experts = (fisher.terms, fisher.experts) if fisher is not None else (0, Experts())
        scored = time.perf_counter()
        eligible = sorted(self.attachment.trainable())
        numel = self._trainable_numel()
        cut = cut_at(scores, eligible, numel, self.config.reserve_p)
        known = positive(scores, eligible) if self.config.selector in ("fisher", "magnitude", "contrast") else None
        inside = masks_inside(self.attachment.trainable_shards(), scores, cut)
        threshold = None if self.config.selector == "lowest_fisher" else cut.threshold / max(terms, 1)
        self._fix(inside, threshold, terms)
        report = replace(
            self._report_of(self._hooks.kept),
            fisher_seconds=scored - started if terms else 0.0,
            selection_seconds=time.perf_counter() - scored,
            zero_parameters=() if known is None else known.without,
            zero_kept=0 if known is None else max(0, round(self.config.reserve_p * numel) - known.total),
            experts=experts.total,
            unreached_experts=experts.unreached,
        )
        self._selected = (weakref.ref(self._hooks.chosen_child()), report)
        tell(str(report))
        write_events(self.engine, report.numbers())
        return report

    def _select_given(
        self, masks: Mapping[str, GivenMask] | None, child: str | Path | None, unnamed: Unnamed
    ) -> Report:
        """See [Note: masks that are given]."""
        started = time.perf_counter()
        shards, trainable = self.attachment.trainable_shards(), self.attachment.trainable()
        shapes = self.attachment.parameters.shapes
        if masks is not None:
            with raising_together():
                found = match_names(masks, trainable, self.attachment.parameters.aliases)
            self._fix(given_masks(shards, found, shapes, unnamed), None, 0)
        else:
            assert child is not None
            self._fix(saved_masks(find_child(Path(child)), shards, shapes, unnamed), None, 0)
        report = replace(self._report_of(self._hooks.kept), selection_seconds=time.perf_counter() - started)
        self._selected = (weakref.ref(self._hooks.chosen_child()), report)
        tell(str(report))
        write_events(self.engine, report.numbers())
        return report

    def _fix(self, masks: Iterable[Tensor], threshold: float | None, terms: int) -> None:
        """Train the child of these masks, and note where it was chosen."""
        before = self._hooks.progress
        trained_before = self._hooks.child is not None and before.step > before.selected_at
        self._hooks.fix(self.attachment.without_frozen(masks))
        self._hooks.progress = Progress(
            before.step,
            selected_at=before.step,
            earlier_children=before.earlier_children or trained_before,
            threshold=threshold,
            calibration_batches=terms,
        )

    def _scores(
        self, batches: Iterable[Any] | None, loss_fn: LossFunction | None, against: Iterable[Any] | None
    ) -> tuple[ShardScores, Fisher | None]:
        """What the selector maximises, and the Fisher information that it is made of."""
        selector = self.config.selector
        with raising_together():
            check_against(selector, against)
        with raising_together():  # memory for scores may be short on one rank only
            if selector == "magnitude":
                return magnitudes(self.attachment.trainable_shards()), None
            if selector == "random":
                return random_numbers(self.attachment.trainable_shards(), self.config.seed), None
            if batches is None:
                raise ValueError(
                    f'select: expected calibration batches for selector "{selector}", got None.'
                    " Remedy: pass an iterable of micro-batches of the task's training set."
                )
        assert batches is not None
        # First, as it is the smaller of the two to keep meanwhile.
        small = self.config.fisher.model_copy(update={"score_dtype": "e8m8"})
        general = None if against is None else self._estimate(against, loss_fn, small)
        fisher = self.estimate_fisher(batches, loss_fn)
        if general is not None:
            contrast(fisher.sums, general.sums, self._trainable_numel())
        if selector == "lowest_fisher":
            reverse_order(fisher.sums)
        return fisher.sums, fisher

    def _trainable_numel(self) -> int:
        return sum(self.attachment.parameters.shapes[name].numel() for name in self.attachment.trainable())

    def _check_some_are_open(self) -> None:
        """A collective."""
        eligible, trainable = self.attachment.candidates, self.attachment.trainable()
        with raising_together():
            if not trainable:
                raise ValueError(
                    f"select: expected eligible parameters that train, got {len(eligible)} that are all frozen."
                    " Remedy: call requires_grad_(True) on some of them first."
                )
        check_same(repr(sorted(trainable)), "the eligible parameters that are not frozen")
        frozen = sorted(eligible - trainable)
        if frozen:
            tell(
                f"select: {len(frozen)} eligible parameters are frozen ({frozen[0]} .. {frozen[-1]}): they are outside the child"
                " until it is chosen again"
            )

    # ---------------------------------------------------------------- the child on its own

    def export(self, path: str | Path) -> None:
        """Write only ChildTuning-D's child, in Hugging Face names: see [Note: export] in child_files/export.py,
        and `apply_child`. A collective.

        Args:
            path: a folder that every rank sees. A child that it had before is replaced in one instant.

        Raises:
            NotImplementedError: on every rank, where elements outside the child have moved, or weights are not in memory.
            RuntimeError: on every rank, before `select`, or when the system refuses, for example with a full disk.
        """
        child = self._exportable("export")
        masks = ((f, child.child_mask(s, f, self.step)) for s in self.attachment.shards for f in s.fragments)
        export_child(Path(path), self.engine.module, masks, self.config.model_dump(mode="json"), self.step)

    def patches(
        self, *, since: str | Path | Iterable[CheckpointWeightPatch] | None = None, only: Only | None = None
    ) -> Iterator[CheckpointWeightPatch]:
        """The child as an inference server takes it, on every rank, tensor after tensor: see [Note: patches] in patches.py.

        Each `next` is a collective: every rank goes through all of them, or wraps this in a list.

        Args:
            since: an earlier `export` of this child, or all patches that were made of it then: only what has changed is sent.
            only: "whole": dense patches of the tensors that train in full; "partial": sparse ones of the others.
                None: sparse patches of all.

        Raises:
            ValueError: on every rank, for NaN, or an integer buffer unless `only` says what it becomes.
            NotImplementedError, RuntimeError: on every rank; see `export`.
        """
        child = self._exportable("patches")
        check_same(
            f"since {'None' if since is None else 'earlier patches'}, only {only!r}",
            "patches",
            "pass the same on every rank",
        )
        fragments: dict[str, list[tuple[FlatShard, Fragment]]] = {}
        for shard in self.attachment.shards:
            for fragment in shard.fragments:
                if fragment.counted:
                    fragments.setdefault(fragment.name, []).append((shard, fragment))
        with raising_together():
            if since is None or not isinstance(since, (str, Path)):
                before = None if since is None else pieces_of(since)
            else:
                before = open_child(since, kind=KIND).read
        return live_patches(
            self.engine.module,
            list(self.attachment.parameters.by_name),
            lambda name: [(f, child.child_mask(s, f, self.step)) for s, f in fragments.get(name, ())],
            before,
            only,
        )

    def _exportable(self, what: str) -> ChildNetwork:
        """The child, outside of which nothing has moved. Raises NotImplementedError, see `export`."""
        with raising_together():  # one rank may have detached
            if not self._attached:
                raise RuntimeError(
                    f"{what}: expected a child that is attached, as plain steps may have moved other elements since detach()."
                    " Remedy: export before detach()."
                )
        child = self._hooks.chosen_child()
        refuse_moved_outside(what, self.config.mode, self.config.compat, self._hooks.progress.earlier_children)
        return child

    # ---------------------------------------------------------------- inspection

    def gather_mask(self, name: str) -> Tensor:
        """The child's mask of one parameter: bool of its full shape, True = trained, on every rank. A collective.

        For ChildTuning-F, the mask that the next applied step will use. Dense parameters are True throughout, those that the
        optimizer does not hold False.

        Raises:
            ValueError: on every rank, for a name that the model does not have.
            RuntimeError: on every rank, before `select` and after `detach`.
        """
        with raising_together():
            self._check_attached()
        first = self.attachment.first_name(name)
        child = self._hooks.chosen_child()
        parameters = self.attachment.parameters
        if first not in self.attachment.eligible:
            trained = first in parameters.by_name
            return torch.full(parameters.shapes[first], trained, dtype=torch.bool, device=device())
        return gather(first, parameters.shapes[first], self._masks(child, {first}), torch.uint8).bool()

    def report(self) -> Report:
        """Eligible and kept elements and density, per parameter and in total. A collective.

        For ChildTuning-F, those of the mask that the next applied step will use.

        Raises:
            RuntimeError: on every rank, before `select` and after `detach`.
        """
        # Of a fixed child every rank knows all. Of a random one ranks add up, and one may have detached.
        with raising_together() if self.config.mode == "ChildTuning-F" else nullcontext():
            self._check_attached()
        child = self._hooks.chosen_child()
        if self._selected is not None and self._selected[0]() is child:
            return self._selected[1]
        if child.fixed:
            return self._report_of(self._hooks.kept)
        counts = KeptCounts(self.attachment.parameters.by_name)
        for fragment, mask in self._masks(child, self.attachment.eligible):
            counts.add(fragment, mask)
        return self._report_of(counts.over_ranks())

    def _masks(self, child: ChildNetwork, names: Set[str]) -> Iterator[tuple[Fragment, Tensor]]:
        """This rank's counted fragments of eligible parameters with their bool masks, one at a time."""
        for shard in self.attachment.shards:
            for fragment in shard.eligible:
                if fragment.counted and fragment.name in names:
                    yield fragment, child.child_mask(shard, fragment, self.step)

    def _report_of(self, kept: Iterable[int]) -> Report:
        """`kept`: for each parameter that the optimizer steps."""
        shapes, candidates = self.attachment.parameters.shapes, self.attachment.candidates
        frozen = self.config.others == "frozen"
        parameters = tuple(
            ParameterReport(
                name,
                shapes[name].numel(),
                eligible=shapes[name].numel() if name in candidates else 0,
                kept=count,
                frozen=frozen and name not in candidates,
            )
            for name, count in zip(self.attachment.parameters.by_name, kept, strict=True)
        )
        progress = self._hooks.progress
        return Report(
            self.config.mode,
            self.config.reserve_p,
            parameters,
            model_numel=sum(shape.numel() for shape in shapes.values()),
            calibration_batches=progress.calibration_batches,
            threshold=progress.threshold,
        )

    # ---------------------------------------------------------------- the end

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this ChildTuner is detached. Remedy: call attach(engine) again.")

    @property
    def _waits(self) -> Callable[[Any], bool]:
        """Before the first child every step ends in an error, after which `select` is the remedy."""
        return gradients_wait if self.chosen else inside_accumulation

    def _check_between_steps(self, what: str, waits: Callable[[Any], bool]) -> None:
        if waits(self.engine) and not self._hooks.step_failed:
            # DeepSpeed's buckets at ZeRO 2 and 3 stay half full after half a backward pass, and the next one fails.
            after_exception = (
                "make a new engine, and load the last checkpoint"
                if hands_on(self.engine)
                else "call engine.zero_grad() first, and inside an accumulation run its other micro-batches and their step, too"
            )
            raise RuntimeError(
                f"{what}: called between a micro-batch and its optimizer step, whose gradients would be lost. Remedy: call it before"
                " training, or right after the step that ends an accumulation; after an exception in a backward pass"
                f" {after_exception}."
            )

    def detach(self) -> None:
        """Remove every hook: the engine is plain DeepSpeed again.

        The base optimizer's state stays as it is; a compact one becomes dense, zero outside the child.

        Raises:
            RuntimeError: with a compact child, between a micro-batch and its step.
        """
        if not self._attached:
            return
        if self._hooks.child is not None and self._hooks.child.shards:
            # Without ZeRO gradients stay where they are.
            waits = gradients_wait if wrapper_of(self.engine).is_zero else inside_accumulation
            self._check_between_steps("detach", waits)
        self._hooks.remove()
        if self.config.optimizer_state == "compact":
            separate_masters(self.engine)
        self._checkpoints.remove()
        self._attached = False
        self.engine.child_tuner = None
