"""TokenFlow's refinement: a grid is drawn, read, and drawn again. For generation only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varl.models.blocks import KeyValueCache
from varl.policy import Condition
from varl.sampling import Sampling, draw, filter_logits

if TYPE_CHECKING:
    from varl.models.tokenflow.policy import TokenFlow

__all__ = ["draw_refined", "published_passes"]

PUBLISHED = {
    1: ((600, 0.6),),
    2: ((1200, 0.8), (1, 1.0)),
    3: ((1200, 0.8), (100, 0.8), (1, 1.0)),
}
"""Top-k and top-p of every pass, by the number of passes."""


def published_passes(passes: int, guidance: float) -> list[Sampling]:
    """Upstream's settings for 1, 2 or 3 passes.

    Raises:
        ValueError: if there are none for that number.
    """
    if passes not in PUBLISHED:
        raise ValueError(f"there are settings for {', '.join(map(str, PUBLISHED))} passes, not for {passes}")
    return [Sampling(guidance, top_k, top_p) for top_k, top_p in PUBLISHED[passes]]


@torch.no_grad()
def draw_refined(
    policy: TokenFlow,
    condition: Condition,
    passes: Sequence[Sampling],
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Codes [batch, tokens] of the last pass of every step; step 0 has one pass only.

    Raises:
        ValueError: if there is no pass, or their guidance differs.
    """
    if not passes or len({sampling.guidance for sampling in passes}) > 1:
        raise ValueError("refinement needs passes that share one guidance")
    state, drawn = policy.start(condition, passes[0].guidance), []
    cache = state.cache
    assert isinstance(cache, KeyValueCache)
    for step in range(len(condition.schedule)):
        codes = draw(filter_logits(policy.next_logits(state), passes[0]), generator)
        own = slice(-condition.schedule.counts[step], None)
        # What the first pass left in the cache is what later steps see, as they know the features without refinement.
        first = [kept[:, :, :, : cache.filled][:, :, :, own].clone() for kept in (cache.keys, cache.values)]
        for sampling in passes[1:] if step else ():
            read = state.drawn["read"] + policy.tokenizer.quantize.grid(codes, step)
            logits = policy.next_logits(replace(state, drawn={"read": read}))
            codes = draw(filter_logits(logits, sampling), generator)
        for kept, before in zip((cache.keys, cache.values), first, strict=True):
            kept[:, :, :, : cache.filled][:, :, :, own] = before
        policy.advance(state, codes)
        drawn.append(codes)
    return torch.cat(drawn, 1)
