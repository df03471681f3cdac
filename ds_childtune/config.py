"""The `"child_tuning"` block of a DeepSpeed config, checked.

The block does nothing by itself: `attach` reads it. Until then the engine refuses to step, once ds_childtune is imported (see
[Note: a block without a child]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

ONLY_CHILDTUNING_D = ("others", "selector", "clip", "sends", "finite_check_every", "compat", "fisher")
"""Keys that have no effect with ChildTuning-F, which refuses them."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class FisherConfig(_Block):
    """How ChildTuning-D estimates the diagonal empirical Fisher information.

    A pass costs, beside forward and backward, its scores (`score_dtype`) and a bucket of fp32 sums: as many elements as training's
    `reduce_bucket_size`, and at most 128 MiB; with ZeRO-3 a second one of a rank's share of it; in fp16 4 more bytes for each score,
    while a micro-batch may overflow. Gradients and squares are summed in fp32, on the wire too, whatever training communicates in.
    """

    estimator: Literal["per_micro_batch", "per_global_batch"] = "per_micro_batch"
    """`per_micro_batch` squares each rank's gradient before the reduction: the same at any world size. `per_global_batch`
    squares the reduced gradient: signal plus noise divided by the number of ranks, hence another child for every world size."""

    max_batches: Annotated[int, Field(ge=1)] | None = None
    """Micro-batches to use, counted over all ranks; null uses all that the iterables give."""

    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Clip each parameter's micro-batch gradient to this norm before squaring it, as the original code does with 1.0;
    null does not clip."""

    score_dtype: Literal["fp32", "e8m8"] = "fp32"
    """What an element's score is kept in during the pass: 4 bytes, or 2 with the range of fp32 and 8 bits of mantissa, rounded
    stochastically."""

    model_mode: Literal["eval", "train"] = "eval"
    """`eval`: no dropout, so that the child does not depend on random numbers. `train`: dropout as in the original code;
    also what activation checkpointing needs to be active in transformers."""

    unreached: Literal["zero", "error"] = "zero"
    """Mixture-of-experts models: what an expert means that no calibration token reached. `zero`: its elements have scores of zero, and
    a warning counts such experts. `error`: `select` refuses. A parameter that can have no gradient is an error with both."""

    @model_validator(mode="after")
    def _clip_needs_the_whole_gradient(self) -> Self:
        if self.max_grad_norm is not None and self.estimator != "per_micro_batch":
            raise ValueError(
                "fisher.max_grad_norm needs whole gradients, which exist only before the reduction:"
                ' use fisher.estimator "per_micro_batch", or remove fisher.max_grad_norm'
            )
        return self


class ChildTuningConfig(_Block):
    """What to train, and how it is chosen."""

    mode: Literal["ChildTuning-F", "ChildTuning-D"]
    """`ChildTuning-F` draws a child at every step; `ChildTuning-D` picks one by Fisher information before training."""

    reserve_p: Annotated[float, Field(gt=0, le=1)]
    """Share of the eligible elements that is kept, in (0, 1]."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of ChildTuning-F's masks, and of the `random` selector."""

    include: tuple[str, ...] | None = None
    """Glob patterns of eligible parameter names. Null: ChildTuning-F takes every parameter, ChildTuning-D those inside the
    model's repeated blocks. What the others do is `others`."""

    exclude: tuple[str, ...] = ()
    """Glob patterns taken out of `include` again."""

    others: Literal["dense", "frozen"] = "dense"
    """ChildTuning-D: whether parameters that are not eligible train in full, or not at all."""

    selector: Literal["fisher", "random", "lowest_fisher", "magnitude", "contrast"] = "fisher"
    """ChildTuning-D: what the child maximises. `random`, `lowest_fisher` and `magnitude` are the paper's ablations: random elements,
    the lowest Fisher information, and the largest pretrained weights. `contrast` needs `select(batches, against=general_batches)`:
    the most Fisher information on the task for the least on general text."""

    optimizer_state: Literal["dense", "compact"] = "dense"
    """`dense`: moments for every element, as in plain DeepSpeed. `compact`, ChildTuning-D: only for the child."""

    clip: Literal["dense", "child"] | None = None
    """ChildTuning-D: the norm that `gradient_clipping` compares and `engine.get_global_grad_norm()` returns: of the whole
    gradient, as in the original code, or of the child's. Null is `dense` where gradients are clipped. Where they are not, a
    compact child at ZeRO 1 to 3 keeps only its own gradient, so that only its norm is known."""

    sends: Literal["child", "whole"] = "child"
    """`optimizer_state` `compact`, ZeRO-1 to 3: what ranks send. `child`: only the child, where its gradients are all that is kept.
    Every rank then keeps every rank's mask: an eighth of a byte for each element of the model, at most. `whole`: whole gradients,
    as plain DeepSpeed, and no masks of others."""

    finite_check_every: Annotated[int, Field(ge=1)] | None = None
    """ChildTuning-D: in every so many steps look for NaN and inf in whole gradients, outside the child too, and end training with an
    error that names the parameters. Null, the default, does not look: where gradients are compact, DeepSpeed then sees the child's
    only, and others can do no harm to the weights. Not with fp16, whose loss scale makes gradients overflow on purpose."""

    compat: Literal["original"] | None = None
    """`original`: with ChildTuning-D, weight decay moves the elements outside the child too, as in the original code."""

    fisher: FisherConfig = FisherConfig()
    """Only for ChildTuning-D."""

    @model_validator(mode="before")
    @classmethod
    def _json_lists(cls, data: Any) -> Any:
        """JSON and YAML have lists where this class has tuples."""
        if not isinstance(data, Mapping):
            return data
        return {k: tuple(v) if k in ("include", "exclude") and isinstance(v, list) else v for k, v in data.items()}

    @model_validator(mode="after")
    def _keys_of_the_other_mode(self) -> Self:
        if self.mode == "ChildTuning-F":
            for key in ONLY_CHILDTUNING_D:
                if key in self.model_fields_set:
                    raise ValueError(
                        f'{key} has no effect with mode "ChildTuning-F": remove it, or use mode "ChildTuning-D"'
                    )
            if self.optimizer_state == "compact":
                raise ValueError(
                    'optimizer_state "compact" needs a fixed child: remove it, or use mode "ChildTuning-D"'
                )
        if self.optimizer_state == "compact" and self.compat == "original":
            raise ValueError(
                'optimizer_state "compact" leaves nothing that weight decay could move outside the child, as compat'
                ' "original" asks: remove one of them'
            )
        if "sends" in self.model_fields_set and self.optimizer_state == "dense":
            raise ValueError('sends has no effect with optimizer_state "dense": remove it, or use "compact"')
        if self.include == ():
            raise ValueError("include is an empty list, so nothing would be eligible: add patterns, or remove the key")
        return self


def parse_config(block: object) -> ChildTuningConfig:
    """The checked config.

    Args:
        block: a `ChildTuningConfig`, or a mapping with its keys.

    Raises:
        ValueError: naming the key, what was expected, what came, and what to do.
    """
    if isinstance(block, ChildTuningConfig):
        return block
    if block is None:
        raise ValueError(
            'child_tuning: expected a "child_tuning" block in the DeepSpeed config, or the `config` argument of'
            ' `attach`, got neither. Remedy: add for example {"mode": "ChildTuning-D", "reserve_p": 0.2}.'
        )
    if not isinstance(block, Mapping):
        raise ValueError(
            f"child_tuning: expected a mapping or a ChildTuningConfig, got {type(block).__name__} {block!r}."
            ' Remedy: pass for example {"mode": "ChildTuning-D", "reserve_p": 0.2}.'
        )
    try:
        return ChildTuningConfig.model_validate(block)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    """One pydantic error as: key, what was expected, what came, remedy."""
    path = [str(p) for p in error["loc"] if not str(p).startswith(("constrained-", "function-", "none"))]
    model: type[BaseModel] = FisherConfig if path[:1] == ["fisher"] and len(path) > 1 else ChildTuningConfig
    name = path[1] if model is FisherConfig else (path[0] if path else "")
    key = ".".join(["child_tuning", *path])
    known = model.model_fields.get(name)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key. Remedy: use one of {', '.join(model.model_fields)}."
    if error["type"] == "missing":
        return f"{key}: required, and missing. Remedy: add it. {_doc(known)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}."
    return f"{key}: expected otherwise ({message}), got {error['input']!r}. Remedy: {_doc(known)}"


def _doc(field: Any) -> str:
    return " ".join((field.description or "").split()) if field is not None else "see ds_childtune/config.py."
