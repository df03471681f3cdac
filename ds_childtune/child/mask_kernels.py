"""Kernels that draw ChildTuning-F's masks and apply them in one pass: see [Note: the generator].

Three implementations of the same arithmetic, bit-identical. On CPUs `torch.compile` fuses hash, comparison and multiply into one pass
over a fragment's gradient; on accelerators `mask_triton.py` does so for all fragments of a shard in one launch; where no compiler is
found the eager form runs over tiles.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ds_childtune.child.generator import (
    MULTIPLIERS,
    bits,
    eager_tile,
    keep_limit,
)
from ds_childtune.shards import Fragment

_LANES, _FEW_LANES = 1 << 12, 1 << 6
"""Elements of a row in the compiled kernel, at most; and at least where a fragment's size has such a divisor."""


MaskKernel = Callable[[Tensor, Tensor, int, float], None]
"""`kernel(grad, key, limit, scale)`: mask and rescale a fragment's 1-D `grad` in place; `key` is int32 [2]."""

ShardKernel = Callable[[Tensor, Tensor, int, float], None]
"""`kernel(grad, keys, limit, scale)`: the same for all fragments of a flat shard; `keys` is int32 [pieces, 2]."""


def _mask_and_scale(grad: Tensor, lane: Tensor, key: Tensor, limit: int, scale: float) -> Tensor:
    """`grad`: [rows, lanes], a 1-D gradient folded; `lane`: int32 [lanes], 0, 1, 2, ... .

    Folded, because a vector of consecutive integers costs a CPU more than the hash itself: the lanes are read from a core's cache, and
    a row is one scalar.
    """
    row = torch.arange(grad.shape[0], dtype=torch.int32, device=grad.device) * grad.shape[1]
    return grad.copy_(torch.where(bits(row[:, None] + lane, key) <= limit, grad * scale, 0.0))


def _fold(numel: int) -> tuple[int, int]:
    """(rows, lanes) of a fold of all `numel` elements, or of all but fewer than 2 * `_LANES` at the end.

    At least two rows, or none: the compiler makes a separate kernel for sizes of 0 and 1, and gives up after a few kernels.
    """
    lanes = min(math.gcd(numel, _LANES), numel // 2)
    if lanes < _FEW_LANES:
        lanes = _LANES
    rows = numel // lanes
    return (rows, lanes) if rows > 1 else (0, lanes)


def _eager_kernel(grad: Tensor, key: Tensor, limit: int, scale: float) -> None:
    """Tiled, in place in three small buffers: unfused integer ops over a whole shard would be memory-bound."""
    step = eager_tile(grad.device)
    size = min(step, grad.numel())
    counter = torch.arange(size, dtype=torch.int32, device=grad.device)
    word, scratch = torch.empty_like(counter), torch.empty_like(counter)
    dropped = torch.empty(size, dtype=torch.bool, device=grad.device)
    for begin in range(0, grad.numel(), step):
        tile = grad[begin : begin + step]
        n = tile.numel()
        x, t = word[:n], scratch[:n]
        torch.mul(counter[:n], key[1], out=x)
        _finalise_(x.add_(key[0] + key[1] * begin), t)
        tile.mul_(scale).masked_fill_(torch.gt(x, limit, out=dropped[:n]), 0.0)


def _finalise_(x: Tensor, scratch: Tensor) -> None:
    """`finalise` in place."""
    for shift, multiplier in ((16, MULTIPLIERS[0]), (15, MULTIPLIERS[1])):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)


def shard_kernel(pieces: Sequence[Fragment], device: torch.device, dtype: torch.dtype) -> ShardKernel:
    """The fastest kernel that works for a flat shard's gradient of `dtype` on `device`.

    Args:
        pieces: of the shard's fragments, from `split_blocks`.
    """
    if device.type != "cpu" and _triton_works(device, dtype):
        from ds_childtune.child import mask_triton

        return mask_triton.TritonKernel(pieces, device, MULTIPLIERS)
    # Triton is what torch.compile would use on accelerators, too.
    kernel = mask_kernel(device.type, dtype, allow_compile=device.type == "cpu")

    runs = [_Run(pieces, first, last, device) for first, last in _runs(pieces, eager_tile(device))]

    def run_by_run(grad: Tensor, keys: Tensor, limit: int, scale: float) -> None:
        for run in runs:
            if run.last - run.first == 1:
                kernel(pieces[run.first].of(grad), keys[run.first], limit, scale)
            else:
                run(grad, keys, limit, scale)

    return run_by_run


def _runs(pieces: Sequence[Fragment], size: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of pieces that are masked at once: one large one, or small neighbours of `size` elements in all at most."""
    first = numel = 0
    for i, piece in enumerate(pieces):
        before = pieces[i - 1]
        joins = (
            i > first
            and max(piece.numel, before.numel) < _LANES
            and before.shard_start + before.numel == piece.shard_start
            and numel + piece.numel <= size
        )
        if i > first and not joins:
            yield first, i
            first, numel = i, 0
        numel += piece.numel
    if pieces:
        yield first, len(pieces)


class _Run:
    """The eager kernel for neighbouring pieces, each with its own keys: the host launches one kernel for thousands of small ones."""

    def __init__(self, pieces: Sequence[Fragment], first: int, last: int, device: torch.device) -> None:
        self.first, self.last = first, last
        self._start = pieces[first].shard_start
        numels = [p.numel for p in pieces[first:last]]
        self._numel = sum(numels)
        self._numels = torch.tensor(numels).to(device)
        self._starts = (self._numels.cumsum(0) - self._numels).int()

    def __call__(self, grad: Tensor, keys: Tensor, limit: int, scale: float) -> None:
        increment, multiplier = keys[self.first : self.last].unbind(1)
        # A piece's index is that of the run less its start, which goes into the increment.
        word = torch.arange(self._numel, dtype=torch.int32, device=grad.device)
        word.mul_(multiplier.repeat_interleave(self._numels, output_size=self._numel))
        word.add_((increment - self._starts * multiplier).repeat_interleave(self._numels, output_size=self._numel))
        _finalise_(word, torch.empty_like(word))
        grad.narrow(0, self._start, self._numel).mul_(scale).masked_fill_(word > limit, 0.0)


@functools.cache
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernel gives the eager kernel's bits; warns if it does not."""
    try:
        from ds_childtune.child import mask_triton

        if dtype not in mask_triton.DTYPES:
            return False
        sizes = (3 * mask_triton.BLOCK + 2, 1, mask_triton.BLOCK)
        starts = (1, 3 * mask_triton.BLOCK + 3, 3 * mask_triton.BLOCK + 7)
        pieces = [Fragment("w", 0, start, numel) for start, numel in zip(starts, sizes, strict=True)]
        kernel = mask_triton.TritonKernel(pieces, device, MULTIPLIERS)
        keys = torch.tensor([[0x1234567, -0x7654321], [5, 7], [-9, 11]], dtype=torch.int32, device=device)
        got = torch.linspace(-1, 1, starts[-1] + sizes[-1] + 9, device=device).to(dtype)
        expected = got.clone()
        kernel(got, keys, keep_limit(0.3), 1 / 0.3)
        for piece, key in zip(pieces, keys.unbind(0), strict=True):
            _eager_kernel(piece.of(expected), key, keep_limit(0.3), 1 / 0.3)
        if not torch.equal(got, expected):
            raise RuntimeError("the Triton kernel's bits differ from the eager kernel's")
    except Exception as error:
        _warn_of_eager(device.type, error)
        return False
    return True


@functools.cache
def mask_kernel(device_type: str, dtype: torch.dtype, *, allow_compile: bool = True) -> MaskKernel:
    """The fastest mask kernel that works for gradients of `dtype` on `device_type`; warns once if that is the eager one.

    Compiles, and checks against the eager kernel, on first use for a device type and dtype.
    """
    if not allow_compile:
        return _eager_kernel
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        compiled = torch.compile(_mask_and_scale, fullgraph=True, dynamic=True)
        lane = torch.arange(_LANES, dtype=torch.int32, device=torch.device(device_type))

        def fused(grad: Tensor, key: Tensor, limit: int, scale: float) -> None:
            rows, lanes = _fold(grad.numel())
            done = rows * lanes
            if rows:
                try:
                    with torch.no_grad():  # one of the states that a compiled kernel is tied to
                        compiled(grad.narrow(0, 0, done).view(rows, lanes), lane[:lanes], key, limit, scale)
                except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                    # Raised before the kernel runs; a state that differs from step to step is no reason to end a run.
                    _warn_of_eager(device_type, error)
                    done = 0
            if done < grad.numel():
                # An index is one more than its predecessor, so where the rest begins goes into the increment.
                _eager_kernel(grad[done:], torch.stack([key[0] + key[1] * done, key[1]]), limit, scale)

        _check_kernel(fused, torch.device(device_type), dtype)
    except Exception as error:
        _warn_of_eager(device_type, error)
        return _eager_kernel
    return fused


def _warn_of_eager(device_type: str, error: Exception) -> None:
    warnings.warn(
        f"ChildTuning-F: found no working compiler for {device_type} ({_first_line(error)}); masks are"
        " drawn by the slower eager kernel, with the same bits. Remedy: install a C++ compiler (CPU) or Triton (GPU).",
        RuntimeWarning,
        stacklevel=3,
    )


def _check_kernel(kernel: MaskKernel, device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless `kernel` gives the eager kernel's bits on a gradient with several sizes and a scalar tail."""
    key = torch.tensor([0x1234567, -0x7654321], dtype=torch.int32, device=device)
    for numel in (3 * _LANES + 2, 3 * _FEW_LANES, 3):
        grad = torch.linspace(-1, 1, numel, dtype=torch.float32, device=device).to(dtype)
        got, expected = grad.clone(), grad.clone()
        kernel(got, key, keep_limit(0.3), 1 / 0.3)
        _eager_kernel(expected, key, keep_limit(0.3), 1 / 0.3)
        if not torch.equal(got, expected):
            raise RuntimeError("the compiled kernel's bits differ from the eager kernel's")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
