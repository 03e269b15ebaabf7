"""What the transformers of several families share: attention over scales and its key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["KeyValueCache", "attend_by_scale", "attend_within_scale", "run_block"]


def run_block(checkpointing: bool, block: nn.Module, *arguments: Any) -> Any:
    """Run a block; with checkpointing, while gradients are recorded, keep only its inputs and run it again backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False)
    return block(*arguments)


class KeyValueCache:
    """Keys and values of all layers, allocated once for a whole schedule.

    Args:
        layers, rows, heads, tokens, head_width: the shape.
        like: a tensor that gives dtype and device.

    Attributes:
        filled: positions that hold something: the end of the last write.
    """

    def __init__(self, layers: int, rows: int, heads: int, tokens: int, head_width: int, like: Tensor) -> None:
        self.keys = like.new_empty(layers, rows, heads, tokens, head_width)
        self.values = torch.empty_like(self.keys)
        self.filled = 0

    def write(self, layer: int, start: int, keys_BHLD: Tensor, values_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of positions from ``start`` on; return all up to their end.

        While gradients are recorded nothing is stored: autograd forbids writing in place.
        """
        if torch.is_grad_enabled():
            known = self.keys[layer, :, :, :start], self.values[layer, :, :, :start]
            return torch.cat([known[0], keys_BHLD], 2), torch.cat([known[1], values_BHLD], 2)
        end = start + keys_BHLD.shape[2]
        self.keys[layer, :, :, start:end] = keys_BHLD
        self.values[layer, :, :, start:end] = values_BHLD
        self.filled = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> KeyValueCache:
        """A new cache with the given rows; only positions that are filled are copied."""
        chosen = object.__new__(KeyValueCache)
        layers, _, heads, tokens, width = self.keys.shape
        chosen.keys = self.keys.new_empty(layers, len(rows), heads, tokens, width)
        chosen.values = torch.empty_like(chosen.keys)
        chosen.filled = self.filled
        chosen.keys[:, :, :, : self.filled] = self.keys[:, rows, :, : self.filled]
        chosen.values[:, :, :, : self.filled] = self.values[:, rows, :, : self.filled]
        return chosen


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
    end = k_BHKD.shape[2] - q_BHLD.shape[2]
    out, start = [], 0
    for count in counts:
        end += count
        q = q_BHLD[:, :, start : start + count]
        mask = None if mask_B11K is None else mask_B11K[..., :end]
        out.append(F.scaled_dot_product_attention(q, k_BHKD[:, :, :end], v_BHKD[:, :, :end], mask, scale=scale))
        start += count
    return torch.cat(out, 2) if len(out) > 1 else out[0]


def attend_within_scale(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, counts: Sequence[int]) -> Tensor:
    """Attention in which a token sees its own grid only; queries and keys are whole grids of ``counts`` tokens."""
    grids = zip(*(x.split(list(counts), 2) for x in (q_BHLD, k_BHLD, v_BHLD)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in grids], 2)
