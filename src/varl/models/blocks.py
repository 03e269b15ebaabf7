"""What the transformers of several families share: attention over scales and its key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varl.policy import row_index
from varl.transfer import sent

__all__ = [
    "Cache",
    "Eager",
    "Grids",
    "KeyValueCache",
    "PrefixKeys",
    "ScaleAttention",
    "WithinScale",
    "attend_by_scale",
    "attend_within_scale",
    "blocks_of",
    "run_block",
]


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """A transformer's blocks, first to last; every family calls them ``Block``."""
    return [module for module in transformer.modules() if type(module).__name__ == "Block"]


def run_block(checkpointing: bool, block: nn.Module, *arguments: Any) -> Any:
    """Run a block; with checkpointing, while gradients are recorded, keep only its inputs and run it again backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


class Eager(nn.Module):
    """A part of a block, without parameters, that stays out of its graph where blocks are compiled.

    What depends on layer, position, number of grids and kind of cache: a graph would be made anew for each.
    """


class KeyValueCache:
    """Keys and values of all layers, for drawing: allocated once for a whole schedule, as the first ones are written.

    Args:
        layers, tokens: how many.

    Attributes:
        keys, values: [layers, rows, heads, tokens, head width], of the type that attention computes in: that of the
            first keys, or that of autocast.
        filled: positions that hold something: the end of the last write.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layers: int, tokens: int) -> None:
        self.layers, self.tokens, self.filled = layers, tokens, 0

    def write(self, layer: int, start: int, keys_BHLD: Tensor, values_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of positions from ``start`` on; return all up to their end."""
        if not hasattr(self, "keys"):
            rows, heads, _, width = keys_BHLD.shape
            device, dtype = keys_BHLD.device, values_BHLD.dtype
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
            shape = (self.layers, rows, heads, self.tokens, width)
            self.keys = torch.empty(shape, dtype=dtype, device=device)
            self.values = torch.empty_like(self.keys)
        end = start + keys_BHLD.shape[2]
        self.keys[layer, :, :, start:end] = keys_BHLD
        self.values[layer, :, :, start:end] = values_BHLD
        self.filled = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor | Sequence[int]) -> KeyValueCache:
        """A new cache with the given rows, as ``row_index`` reads them; only positions that are filled are copied."""
        chosen = KeyValueCache(self.layers, self.tokens)
        if self.filled:
            _, batch, heads, tokens, width = self.keys.shape
            rows = sent(row_index(rows, batch), self.keys.device)
            chosen.keys = self.keys.new_empty(self.layers, len(rows), heads, tokens, width)
            chosen.values = torch.empty_like(chosen.keys)
            chosen.filled = self.filled
            chosen.keys[:, :, :, : self.filled] = self.keys[:, rows, :, : self.filled]
            chosen.values[:, :, :, : self.filled] = self.values[:, rows, :, : self.filled]
        return chosen

    def shared(self, rows: int, copies: int) -> PrefixKeys:
        """The first ``rows`` rows, each for ``copies`` adjacent rows that go on from it."""
        keys, values = (list(x[:, :rows, :, : self.filled]) for x in (self.keys, self.values))
        return PrefixKeys(keys, values, copies)


class PrefixKeys:
    """Keys and values of a prefix, with their graph if there is one, that many rows read and none changes.

    Used as a cache twice: by the pass over the prefix, which starts at position 0 and leaves its keys here, and by the
    pass over what follows, for a batch of ``copies`` times as many rows.

    Attributes:
        keys, values: of each layer, [rows, heads, positions, head width].
        copies: adjacent rows that go on from each row.
    """

    def __init__(self, keys: list[Tensor] | None = None, values: list[Tensor] | None = None, copies: int = 1) -> None:
        self.keys, self.values, self.copies = keys or [], values or [], copies

    def write(self, layer: int, start: int, keys_BHLD: Tensor, values_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all positions up to the end of the given ones, which start at ``start``."""
        if start == 0:
            # A checkpointed block comes here again in the backward pass: what the first pass left holds the graph.
            if layer == len(self.keys):
                self.keys.append(keys_BHLD)
                self.values.append(values_BHLD)
            return keys_BHLD, values_BHLD
        return self._join(self.keys[layer], keys_BHLD), self._join(self.values[layer], values_BHLD)

    def _join(self, known_RHLD: Tensor, new_BHLD: Tensor) -> Tensor:
        known = known_RHLD.unsqueeze(1).expand(-1, self.copies, -1, -1, -1)
        return torch.cat([known, new_BHLD.unflatten(0, (-1, self.copies))], 3).flatten(0, 1)

    def shared(self, rows: int, copies: int) -> PrefixKeys:
        """The same, for ``copies`` adjacent rows that go on from each."""
        return PrefixKeys(self.keys, self.values, copies)


Cache = KeyValueCache | PrefixKeys
"""What attention writes its keys and values to, and reads those of coarser grids from."""


@dataclass(eq=False)
class Grids:
    """The grids that one pass of a transformer computes.

    Attributes:
        counts: tokens of each.
        start: position of the first token.
        cache: of the keys and values, read, and written at the positions of the grids.
    """

    counts: Sequence[int]
    start: int
    cache: Cache | None


class ScaleAttention(Eager):
    """Attention in which a token sees its own grid and all coarser ones, those in a cache too.

    Args:
        scale: of the scores; by default one over the root of the head's width.
    """

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, grids: Grids, layer: int) -> Tensor:
        """[B, L, H * D]."""
        if grids.cache is not None:
            k_BHLD, v_BHLD = grids.cache.write(layer, grids.start, k_BHLD, v_BHLD)
        return attend_by_scale(q_BHLD, k_BHLD, v_BHLD, grids.counts, self.scale).transpose(1, 2).flatten(2)


class WithinScale(Eager):
    """Attention in which a token sees its own grid only, as ``attend_within_scale``; it needs no cache."""

    def forward(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, grids: Grids, layer: int) -> Tensor:
        """[B, L, H * D]."""
        return attend_within_scale(q_BHLD, k_BHLD, v_BHLD, grids.counts).transpose(1, 2).flatten(2)


def attend_by_scale(
    q_BHLD: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    counts: Sequence[int],
    scale: float | None = None,
    mask_B11K: Tensor | None = None,
) -> Tensor:
    """Attention in which a token sees its own grid and all coarser ones.

    The queries are whole grids of ``counts`` tokens; the keys end with the queries' own positions and may begin with
    more (a cached prefix). One call a grid: exact, and no work on pairs that a mask would discard.

    Args:
        mask_B11K: what ``scaled_dot_product_attention`` takes, for keys that no query may see (padding of a prompt).

    Returns:
        [B, H, L, D].
    """
    if len(counts) == 1:
        return F.scaled_dot_product_attention(q_BHLD, k_BHKD, v_BHKD, mask_B11K, scale=scale)
    before = k_BHKD.shape[2] - q_BHLD.shape[2]
    ends = [before + end for end in accumulate(counts)]
    out = []
    for q, k, v, end in zip(
        q_BHLD.split(list(counts), 2),
        _Beginnings.apply(k_BHKD, *ends),
        _Beginnings.apply(v_BHKD, *ends),
        ends,
        strict=True,
    ):
        mask = None if mask_B11K is None else mask_B11K[..., :end]
        out.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale))
    return torch.cat(out, 2)


class _Beginnings(torch.autograd.Function):
    """The first positions of keys or values, up to each of several ends, as views.

    Slices would do; but each makes its gradient a tensor of the whole length, mostly zeros, to be added up.
    """

    @staticmethod
    def forward(ctx: Any, x_BHKD: Tensor, *ends: int) -> tuple[Tensor, ...]:
        ctx.ends, ctx.length = ends, x_BHKD.shape[2]
        return tuple(x_BHKD[:, :, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *shorter, longest = gradients
        total = F.pad(longest, (0, 0, 0, ctx.length - longest.shape[2]))
        for gradient, end in zip(shorter, ctx.ends, strict=False):
            total[:, :, :end] += gradient
        return total, *(None for _ in ctx.ends)


def attend_within_scale(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, counts: Sequence[int]) -> Tensor:
    """Attention in which a token sees its own grid only; queries and keys are whole grids of ``counts`` tokens."""
    grids = zip(*(x.split(list(counts), 2) for x in (q_BHLD, k_BHLD, v_BHLD)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in grids], 2)
