"""The state of partly drawn sequences, as all families hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varl.models.blocks import Cache, KeyValueCache
from varl.policy import row_index
from varl.schedule import ScaleSchedule
from varl.transfer import sent

__all__ = ["DrawState"]


@dataclass
class DrawState:
    """What ``policy.start`` makes, ``next_logits`` reads and ``advance`` moves on.

    With guidance every sequence has two rows in the transformer: first all conditional ones, then all unconditional.

    Attributes:
        schedule: the grids.
        passes: tensors with a row for every row of the transformer, [copies * batch, ...]: the condition.
        drawn: tensors with a row for every sequence, [batch, ...]: what was drawn so far, as features.
        cache: keys and values, [copies * batch] rows; None for a family whose scales share none. What ``prefill`` made
            with gradients can be scored from, not drawn from.
        copies: 2 with guidance, 1 without.
        guidance: as in ``varl.Sampling``.
        step: the next step to draw.
    """

    schedule: ScaleSchedule
    passes: dict[str, Tensor]
    drawn: dict[str, Tensor]
    cache: Cache | None
    copies: int = 1
    guidance: float = 0.0
    step: int = 0

    @property
    def batch(self) -> int:
        return next(iter(self.drawn.values())).shape[0]

    def fork(self, k: int) -> DrawState:
        """Every row ``k`` times, copies adjacent.

        Raises:
            ValueError: if ``k`` is less than 1.
        """
        if k < 1:
            raise ValueError(f"a state is forked into 1 or more, not {k}")
        return self.select(torch.arange(self.batch, device="cpu").repeat_interleave(k))

    def select(self, rows: Tensor | Sequence[int]) -> DrawState:
        """The given rows, in that order (repeats allowed), as ``row_index`` reads them; the original stays usable."""
        if self.cache is not None and not isinstance(self.cache, KeyValueCache):
            raise ValueError("a prefix that was read with gradients can be scored from, not drawn from")
        index = row_index(rows, self.batch)
        both = torch.cat([index + copy * self.batch for copy in range(self.copies)])
        device = next(iter(self.drawn.values())).device
        own, all_rows = sent(index, device), sent(both, device)
        return replace(
            self,
            passes={name: value[all_rows] for name, value in self.passes.items()},
            drawn={name: value[own] for name, value in self.drawn.items()},
            cache=None if self.cache is None else self.cache.select(both),
        )
