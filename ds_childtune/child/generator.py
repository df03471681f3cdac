"""ChildTuning-F's masks: a counter-based generator keyed by the element, not by the rank.

The task-free child of Xu et al. (EMNLP 2021, arXiv 2109.05687, section 3.1) draws, at every step t, a mask M_t whose
elements are Bernoulli(p), and updates with g_t * M_t / p. Here an element's bit is a pure function of

    (seed, applied step, parameter name, index in the flattened parameter)

so that the same mask comes at any world size and ZeRO stage and on resume, with nothing stored and nothing sent.

[Note: the generator]
A 64-bit digest of (seed, name, index block) gives two 32-bit base keys per fragment. `step_keys` mixes the step into
them: an odd multiplier and an increment. `bits` sends the index through this affine map, which is another function for
every key and not a window on one sequence, and then through a 32-bit finaliser (constants of C. Wellons' "lowbias32",
public domain) less its last xor-shift, which would change only low bits. An element is kept when its 32 bits are at or
below a limit that stands for p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_childtune.shards import Fragment

INDEX_BLOCK = 1 << 30
"""Elements of a parameter that share one key: indices inside a block fit in int32."""


_CPU_TILE, _DEVICE_TILE = 1 << 15, 1 << 22
"""Elements per eager tile. Three int32 buffers and the gradient fit a core's second-level cache; accelerators are faster with few."""


MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
"""Of `finalise`."""


_WEYL = 0x9E3779B9


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
    increment = finalise(base[:, 0] + signed)
    multiplier = finalise((base[:, 1] ^ increment) + signed) | 1
    return torch.stack([increment + base[:, 2] * multiplier, multiplier], dim=1)


def finalise(x: Tensor) -> Tensor:
    """Mix 32-bit words; the high bits of the result depend on every bit of `x`. int32 in and out; products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * MULTIPLIERS[0]
    x = x ^ ((x >> 15) & 0x1FFFF)
    return x * MULTIPLIERS[1]


def bits(index: Tensor, key: Tensor) -> Tensor:
    """32 uniform bits for every int32 `index`, under the int32 [2] `key`."""
    return finalise(index * key[1] + key[0])


def bernoulli_mask(fragment: Fragment, seed: int, step: int, reserve_p: float, *, device: torch.device) -> Tensor:
    """The mask of one fragment at one applied step, written plainly: the reference for `mask_kernel`.

    Returns:
        bool [fragment.numel], True = this element's gradient survives.
    """
    pieces = split_blocks(fragment)
    keys = step_keys(base_keys(pieces, seed, device=device), step)
    mask = torch.empty(fragment.numel, dtype=torch.bool, device=device)
    done = 0
    tile = eager_tile(device)
    for piece, key in zip(pieces, keys, strict=True):
        for begin in range(0, piece.numel, tile):
            end = min(begin + tile, piece.numel)
            index = torch.arange(begin, end, dtype=torch.int32, device=device)
            torch.le(bits(index, key), keep_limit(reserve_p), out=mask[done + begin : done + end])
        done += piece.numel
    return mask


def random_scores(fragment: Fragment, seed: int, *, device: torch.device) -> Tensor:
    """fp32 1-D [fragment.numel]: random finite numbers >= 0, keyed by the element."""
    scores = torch.empty(fragment.numel, dtype=torch.float32, device=device)
    pieces = split_blocks(fragment)
    done, tile = 0, eager_tile(device)
    for piece, key in zip(pieces, step_keys(base_keys(pieces, seed, device=device), 0), strict=True):
        for begin in range(0, piece.numel, tile):
            end = min(begin + tile, piece.numel)
            index = torch.arange(begin, end, dtype=torch.int32, device=device)
            scores[done + begin : done + end] = (bits(index, key) & 0x3FFFFFFF).view(torch.float32)
        done += piece.numel
    return scores


def eager_tile(device: torch.device) -> int:
    return _CPU_TILE if device.type == "cpu" else _DEVICE_TILE
