"""Group-relative advantages: how good a sample is among the samples of its own prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["AdvantageKind", "Advantages", "group_advantages"]

AdvantageKind = Literal["std", "mean", "leave_one_out", "batch_std"]

# Rewards arrive as float32. Group members closer than a few units of its last place are equal for our
# purpose: dividing that noise by its own standard deviation would make advantages of size 1 out of nothing.
_EQUAL = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Advantages:
    """The advantages of P groups of G samples, and what was left out of them.

    Attributes:
        advantage_PG: [P, G]; exactly 0 in groups of zero variance and in dropped groups.
        group_mean_P: [P] mean reward of each group; NaN for a dropped group.
        group_std_P: [P] population standard deviation of each group; exactly 0 where the variance counts as
            zero, NaN for a dropped group.
        zero_variance_P: [P] bool; all rewards of the group are equal, so it teaches nothing. False for
            dropped groups.
        dropped_P: [P] bool; a reward of the group failed. Never true together with ``zero_variance_P``.
    """

    advantage_PG: Tensor
    group_mean_P: Tensor
    group_std_P: Tensor
    zero_variance_P: Tensor
    dropped_P: Tensor


@torch.no_grad()
def group_advantages(
    rewards_PG: Tensor, valid_PG: Tensor | None = None, *, kind: AdvantageKind = "std", eps: float = 1e-6
) -> Advantages:
    """Advantages of every sample against its group (method.md, section 4; GRPO, arXiv 2402.03300, section
    4.1).

    P prompts, G samples (or prefixes) each. With R the reward, mean and std those of the group:

    * ``std``            (R - mean) / (std + eps)
    * ``mean``           R - mean
    * ``leave_one_out``  R - mean of the *other* samples, which is ``mean`` times G / (G - 1) (RLOO, arXiv
      2402.14740)
    * ``batch_std``      (R - mean) / (std over the rewards of all groups not dropped + eps)

    Every standard deviation is the population's (divided by the number, not by it less one).

    Args:
        rewards_PG: [P, G] rewards or returns, any range. Those of failed samples are ignored, whatever they
            are.
        valid_PG: [P, G] bool, False where the reward failed; None if none did. A reward that is not finite
            counts as failed. One failure drops the whole group: advantage 0, ``dropped_P`` true.
        kind: see above.
        eps: added to the standard deviation, in units of the reward; at least 0.

    Returns:
        ``Advantages``, in the dtype of ``rewards_PG`` (float32 if that is an integer or half type). A group
        whose rewards differ by no more than float32 rounding (8 units of the last place of the largest one)
        has zero variance and contributes exactly 0.

    Raises:
        ValueError: if the rewards are not [P, G] with G >= 2, ``valid_PG`` has another shape or is not bool,
            or ``kind`` or ``eps`` is out of range.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape[1] < 2:
        raise ValueError(
            f"rewards_PG must be [prompts, group] with a group of at least 2, got shape {tuple(rewards_PG.shape)}"
        )
    if valid_PG is not None and (valid_PG.shape != rewards_PG.shape or valid_PG.dtype != torch.bool):
        raise ValueError(
            f"valid_PG must be bool of shape {tuple(rewards_PG.shape)} like rewards_PG, "
            f"got {valid_PG.dtype} of shape {tuple(valid_PG.shape)}"
        )
    if kind not in get_args(AdvantageKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(AdvantageKind))}, got {kind!r}")
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")

    reward = rewards_PG.to(torch.promote_types(rewards_PG.dtype, torch.float32))
    finite = reward.isfinite()
    dropped = ~(finite if valid_PG is None else finite & valid_PG).all(1)
    reward = torch.where(dropped[:, None], 0.0, reward)

    spread = reward.amax(1) - reward.amin(1)
    equal = spread <= _EQUAL * reward.abs().amax(1)
    mean = reward.mean(1)
    std = torch.where(equal, 0.0, reward.std(1, unbiased=False))

    advantage = reward - mean[:, None]
    if kind == "std":
        advantage = advantage / (std + eps)[:, None]
    elif kind == "leave_one_out":
        group = reward.shape[1]
        advantage = advantage * (group / (group - 1))
    elif kind == "batch_std" and not bool(dropped.all()):
        advantage = advantage / (reward[~dropped].std(unbiased=False) + eps)
    advantage = torch.where((equal | dropped)[:, None], 0.0, advantage)

    nan = torch.full_like(mean, float("nan"))
    return Advantages(
        advantage_PG=advantage,
        group_mean_P=torch.where(dropped, nan, mean),
        group_std_P=torch.where(dropped, nan, std),
        zero_variance_P=equal & ~dropped,
        dropped_P=dropped,
    )
