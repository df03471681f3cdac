"""ChildTuning-F's masks: a counter-based generator keyed by the element, not by the rank.

The task-free child of Xu et al. (EMNLP 2021, arXiv 2109.05687, section 3.1) draws, at every step t, a mask M_t whose
elements are Bernoulli(p), and updates with g_t * M_t / p. Here an element's bit is a pure function of

    (seed, applied step, parameter name, index in the flattened parameter)

so that the same mask comes at any world size and ZeRO stage and on resume, with nothing stored and nothing sent.

[Note: the generator]
A 64-bit digest of (seed, name, index block) gives two 32-bit base keys per fragment. `step_keys` mixes the step into
them: an odd multiplier and an increment. `_bits` sends the index through this affine map, a function of its own for
every key and not a window on one sequence, and then through a 32-bit finaliser (constants of C. Wellons' "lowbias32",
public domain) less its last xor-shift, which would change low bits alone. An element is kept when its 32 bits are at or
below a limit that stands for p.

Three implementations of the same arithmetic, bit-identical. On CPUs `torch.compile` fuses hash, comparison and multiply into one pass
over a fragment's gradient; on accelerators `mask_triton.py` does so for all fragments of a shard in one launch; where no compiler is
found the eager form runs over tiles.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ds_childtune.shards import Fragment

INDEX_BLOCK = 1 << 30
"""Elements of a parameter that share one key: indices inside a block fit in int32."""

_CPU_TILE, _DEVICE_TILE = 1 << 15, 1 << 22
"""Elements per eager tile. Three int32 buffers and the gradient stay in a core's second-level cache; accelerators want few."""

_LANES, _FEW_LANES = 1 << 12, 1 << 6
"""Elements of a row in the compiled kernel, at most; and at least where a fragment's size has such a divisor."""

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)
_WEYL = 0x9E3779B9

MaskKernel = Callable[[Tensor, Tensor, int, float], None]
"""`kernel(grad, key, limit, scale)`: mask and rescale a fragment's 1-D `grad` in place; `key` is int32 [2]."""

ShardKernel = Callable[[Tensor, Tensor, int, float], None]
"""`kernel(grad, keys, limit, scale)`: the same for all fragments of a flat shard; `keys` is int32 [pieces, 2]."""


def keep_limit(reserve_p: float) -> int:
    """The largest signed 32-bit value that is kept, so that a uniform value is kept with probability `reserve_p`."""
    return max(1, round(reserve_p * 2**32)) - 1 - 2**31


def base_keys(pieces: Sequence[Fragment], seed: int, *, device: torch.device) -> Tensor:
    """Static part of the keys of `pieces` (see `split_blocks`).

    Returns:
        int32 [len(pieces), 3]: two key words, and the index of the piece's first element inside its block.
    """
    rows = []
    for piece in pieces:
        block, start = divmod(piece.param_start, INDEX_BLOCK)
        text = f"{seed}/{block}/{piece.name}".encode()
        digest = hashlib.blake2b(text, digest_size=8, person=b"child-mask").digest()
        words = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
        rows.append([*words, start])
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 3).to(device)


def split_blocks(fragment: Fragment) -> list[Fragment]:
    """Cut a fragment where the parameter's index crosses a multiple of `INDEX_BLOCK`."""
    pieces = []
    done = 0
    while done < fragment.numel:
        start = fragment.param_start + done
        numel = min(fragment.numel - done, INDEX_BLOCK - start % INDEX_BLOCK)
        pieces.append(fragment.narrow(done, numel))
        done += numel
    return pieces


def step_keys(base: Tensor, step: int) -> Tensor:
    """Keys of the `step`-th applied step, on the device of `base` and without a copy from the host.

    Args:
        base: int32 [n, 3] from `base_keys`.
        step: applied steps so far.

    Returns:
        int32 [n, 2]: increment, and odd multiplier, of the affine map; the piece's start is folded in.
    """
    weyl = (step * _WEYL) & 0xFFFFFFFF
    signed = weyl - (1 << 32) if weyl >= 1 << 31 else weyl
    increment = _finalise(base[:, 0] + signed)
    multiplier = _finalise((base[:, 1] ^ increment) + signed) | 1
    return torch.stack([increment + base[:, 2] * multiplier, multiplier], dim=1)


def _finalise(x: Tensor) -> Tensor:
    """Mix 32-bit words; the high bits of the result depend on every bit of `x`. int32 in and out; products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MULTIPLIER_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * _MULTIPLIER_2


def _bits(index: Tensor, key: Tensor) -> Tensor:
    """32 uniform bits for every int32 `index`, under the int32 [2] `key`."""
    return _finalise(index * key[1] + key[0])


def bernoulli_mask(fragment: Fragment, seed: int, step: int, reserve_p: float, *, device: torch.device) -> Tensor:
    """The mask of one fragment at one applied step, written plainly: the reference for `mask_kernel`.

    Returns:
        bool [fragment.numel], True = this element's gradient survives.
    """
    pieces = split_blocks(fragment)
    keys = step_keys(base_keys(pieces, seed, device=device), step)
    mask = torch.empty(fragment.numel, dtype=torch.bool, device=device)
    done = 0
    tile = _tile(device)
    for piece, key in zip(pieces, keys, strict=True):
        for begin in range(0, piece.numel, tile):
            end = min(begin + tile, piece.numel)
            index = torch.arange(begin, end, dtype=torch.int32, device=device)
            torch.le(_bits(index, key), keep_limit(reserve_p), out=mask[done + begin : done + end])
        done += piece.numel
    return mask


def random_scores(fragment: Fragment, seed: int, *, device: torch.device) -> Tensor:
    """fp32 1-D [fragment.numel]: random finite numbers >= 0, keyed by the element."""
    scores = torch.empty(fragment.numel, dtype=torch.float32, device=device)
    pieces = split_blocks(fragment)
    done, tile = 0, _tile(device)
    for piece, key in zip(pieces, step_keys(base_keys(pieces, seed, device=device), 0), strict=True):
        for begin in range(0, piece.numel, tile):
            end = min(begin + tile, piece.numel)
            index = torch.arange(begin, end, dtype=torch.int32, device=device)
            scores[done + begin : done + end] = (_bits(index, key) & 0x3FFFFFFF).view(torch.float32)
        done += piece.numel
    return scores


def _mask_and_scale(grad: Tensor, lane: Tensor, key: Tensor, limit: int, scale: float) -> Tensor:
    """`grad`: [rows, lanes], a 1-D gradient folded; `lane`: int32 [lanes], 0, 1, 2, ... .

    Folded, because a vector of consecutive integers costs a CPU more than the hash itself: the lanes are read from a core's cache, and
    a row is one scalar.
    """
    row = torch.arange(grad.shape[0], dtype=torch.int32, device=grad.device) * grad.shape[1]
    return grad.copy_(torch.where(_bits(row[:, None] + lane, key) <= limit, grad * scale, 0.0))


def _fold(numel: int) -> tuple[int, int]:
    """(rows, lanes) of a fold of all `numel` elements, or of all but fewer than 2 * `_LANES` at the end.

    At least two rows, or none: the compiler makes a kernel of its own for sizes of 0 and 1, and gives up after a few kernels.
    """
    lanes = min(math.gcd(numel, _LANES), numel // 2)
    if lanes < _FEW_LANES:
        lanes = _LANES
    rows = numel // lanes
    return (rows, lanes) if rows > 1 else (0, lanes)


def _tile(device: torch.device) -> int:
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE


def _eager_kernel(grad: Tensor, key: Tensor, limit: int, scale: float) -> None:
    """Tiled, in place in three small buffers: unfused integer ops over a whole shard would be memory-bound."""
    step = _tile(grad.device)
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
    """`_finalise` in place."""
    for shift, multiplier in ((16, _MULTIPLIER_1), (15, _MULTIPLIER_2)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)


def shard_kernel(pieces: Sequence[Fragment], device: torch.device, dtype: torch.dtype) -> ShardKernel:
    """The fastest kernel that works for a flat shard's gradient of `dtype` on `device`.

    Args:
        pieces: of the shard's fragments, from `split_blocks`.
    """
    if device.type != "cpu" and _triton_works(device, dtype):
        from ds_childtune import mask_triton

        return mask_triton.ShardKernel(pieces, device, (_MULTIPLIER_1, _MULTIPLIER_2))
    # Triton is what torch.compile would use on accelerators, too.
    kernel = mask_kernel(device.type, dtype, allow_compile=device.type == "cpu")

    runs = [_Run(pieces, first, last, device) for first, last in _runs(pieces, _tile(device))]

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
    """The eager kernel for neighbouring pieces, each with keys of its own: of thousands of small ones, few are the host's work."""

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
        from ds_childtune import mask_triton

        if dtype not in mask_triton.DTYPES:
            return False
        sizes = (3 * mask_triton.BLOCK + 2, 1, mask_triton.BLOCK)
        starts = (1, 3 * mask_triton.BLOCK + 3, 3 * mask_triton.BLOCK + 7)
        pieces = [Fragment("w", 0, start, numel) for start, numel in zip(starts, sizes, strict=True)]
        kernel = mask_triton.ShardKernel(pieces, device, (_MULTIPLIER_1, _MULTIPLIER_2))
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
