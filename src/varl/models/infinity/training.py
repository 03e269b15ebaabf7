"""Infinity's pretraining targets: bits with self-correction, the loss over bits, and dropped texts.

Teacher-forced training reads the bits that were drawn and is held to the labels:
``bitwise_loss(policy.logits(policy.hidden(condition, drawn, steps)), labels, schedule)``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.infinity.policy import Infinity
from varl.policy import Condition
from varl.schedule import ScaleSchedule

__all__ = ["bitwise_loss", "drop_text", "self_correction"]


def self_correction(
    policy: Infinity,
    images: Tensor,
    schedule: ScaleSchedule | None = None,
    noise_apply_layers: int = 13,
    strength: float = 0.3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Actions with random mistakes, and the labels that make up for them.

    Each of the first ``noise_apply_layers`` scales draws p, a whole percentage from 0 to ``strength``, and flips every
    bit with probability p. The flipped bits enter the running sum, so finer scales learn to correct them.

    Args:
        images: [B, 3, H, W] in [0, 1].

    Returns:
        int64 [B, L, bits] twice: the flipped bits (what ``policy.hidden`` reads), and the labels.
    """

    def flip(step: int, bits: Tensor) -> Tensor:
        if step >= noise_apply_layers:
            return bits
        p = int(torch.randint(round(100 * strength) + 1, (), generator=generator)) / 100
        chance = torch.rand(bits.shape, generator=generator).to(bits.device)
        return torch.where(chance < p, 1 - bits, bits)

    labels, drawn = policy.encode_with(images, schedule, flip)
    return drawn, labels


def bitwise_loss(logits: Tensor, labels: Tensor, schedule: ScaleSchedule, reweight: bool = False) -> Tensor:
    """Two-class cross-entropy: mean over bits, then over the tokens, then over the batch.

    Args:
        logits: [B, L, bits, 2] of all tokens.
        labels: [B, L, bits].
        reweight: weigh tokens by 1 / sqrt(h w) of their grid, normalised to sum 1, instead of equally.
    """
    per_token = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape).mean(-1)
    if not reweight:
        return per_token.mean()
    weights = [count**-0.5 for count in schedule.counts for _ in range(count)]
    weight = torch.tensor(weights, device=logits.device)
    return (per_token * (weight / weight.sum())).sum(-1).mean()


def drop_text(condition: Condition, rate: float, generator: torch.Generator | None = None) -> Condition:
    """The condition with each row's text replaced, with probability ``rate``, by the learned unconditional one."""
    dropped = condition.features["dropped"]
    chance = torch.rand(len(dropped), generator=generator).to(dropped.device)
    return replace(condition, features=condition.features | {"dropped": dropped | (chance < rate)})
