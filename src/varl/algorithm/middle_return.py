"""Value as Middle Return: the reward of a prefix, estimated from K continuations of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["ESTIMATORS", "Estimator", "EstimatorNeeds", "middle_return"]

Estimator = Literal["soft", "soft-reference", "policy", "mean", "max"]


@dataclass(frozen=True)
class EstimatorNeeds:
    """What an estimator is computed from besides the rewards; whoever prepares its inputs or checks a recipe asks here.

    Attributes:
        log_ratio: the log-probabilities of every continuation's suffix, under the distribution that drew it and under
            the reference. Such an estimator differs from the reward with one continuation, too.
        eta: the temperature.
    """

    log_ratio: bool = False
    eta: bool = False


ESTIMATORS: dict[str, EstimatorNeeds] = {
    "soft": EstimatorNeeds(eta=True),
    "soft-reference": EstimatorNeeds(log_ratio=True, eta=True),
    "policy": EstimatorNeeds(log_ratio=True, eta=True),
    "mean": EstimatorNeeds(),
    "max": EstimatorNeeds(),
}


@torch.no_grad()
def middle_return(
    rewards_K: Tensor,
    *,
    estimator: Estimator = "soft",
    eta: float = 1.0,
    logp: Tensor | None = None,
    reference_logp: Tensor | None = None,
    self_normalised: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    """The middle return V_m of prefixes s_m, from the rewards R_k of K continuations of each (Eq. 10).

    With w_k = exp(reference_logp_k - logp_k):

    * ``soft``            eta log mean_k exp(R_k / eta): the paper's Eq. 10. Its continuations are drawn on
                          policy, while Def. 1 averages under the reference, so it overstates V* as the suffix
                          improves (method.md 3a).
    * ``soft-reference``  eta log [sum_k w_k exp(R_k / eta) / sum_k w_k]; with ``self_normalised=False`` the
                          divisor is K, and exp(V_m / eta) is then unbiased for exp(V* / eta). With
                          continuations drawn from the reference itself, w = 1 and this is ``soft``.
    * ``policy``          mean_k [R_k - eta (logp_k - reference_logp_k)]: the value of the current suffix
                          policy, which tends to the constrained value V+ as the suffix converges. eta
                          multiplies the log-ratio of a *whole* suffix: tie it to the KL's own scale (beta),
                          or it drowns R.
    * ``mean``, ``max``   of R_k.

    Limits: one continuation gives R (``soft``, ``mean``, ``max``, and ``soft-reference`` where it is
    self-normalised, whose single weight is 1), R - eta (logp - reference_logp) (``policy``, and
    ``soft-reference`` where it is not). eta = inf gives the (weighted) mean and eta = 0 the maximum, both
    allowed exactly. Tiny and huge eta are computed without overflow or cancellation.

    Args:
        rewards_K: [..., K] rewards of the continuations, any range.
        estimator: see above.
        eta: temperature, in units of the reward, 0 <= eta <= inf. Unused by ``mean`` and ``max``.
        logp: [..., K] log-probability of each continuation's *whole* suffix (summed over its tokens) under
            the policy that drew it; needed by ``soft-reference`` and ``policy``.
        reference_logp: [..., K] the same under the reference policy.
        self_normalised: for ``soft-reference`` only.
        valid: [..., K] bool, False where the reward failed; None if none did. The return is then estimated
            from the valid continuations alone. Log-mean-exp of fewer draws is lower in expectation, so a
            trainer that compares prefixes should rather drop those that lost one
            (``valid_PG = valid_PGK.all(-1)``).

    Returns:
        [...] returns, in units of the reward and the dtype of ``rewards_K`` (at least float32); NaN where no
        continuation is valid, which ``group_advantages`` counts as failed.

    Raises:
        ValueError: if a shape differs from that of ``rewards_K``, log-probabilities that the estimator needs
            are missing, eta is negative or NaN, eta is inf with ``policy`` or un-normalised
            ``soft-reference`` (no limit), or the estimator is unknown.
    """
    _check(rewards_K, estimator, eta, logp, reference_logp, self_normalised, valid)
    reward = rewards_K.to(torch.promote_types(rewards_K.dtype, torch.float32))
    valid = torch.ones_like(reward, dtype=torch.bool) if valid is None else valid
    some = valid.any(-1)
    # A row without a valid continuation is computed on zeros and overwritten, so that no NaN or inf gets in
    # its way.
    usable = valid | ~some[..., None]
    reward = torch.where(valid, reward, 0.0)
    log_ratio = torch.zeros_like(reward)
    if logp is not None and reference_logp is not None and ESTIMATORS[estimator].log_ratio:
        log_ratio = torch.where(valid, (reference_logp - logp).to(reward.dtype), 0.0)

    count = usable.sum(-1).to(reward.dtype)
    if estimator == "mean":
        value = reward.sum(-1) / count
    elif estimator == "policy":
        value = (reward + eta * log_ratio).sum(-1) / count
    elif estimator == "max" or eta == 0:
        value = reward.masked_fill(~usable, -math.inf).amax(-1)
    else:
        log_weight = log_ratio.masked_fill(~usable, -math.inf)
        value = _log_mean_exp(reward, log_weight.log_softmax(-1), usable, eta)
        if estimator == "soft-reference" and not self_normalised:
            value = value + eta * (log_weight.logsumexp(-1) - count.log())
    return torch.where(some, value, math.nan)


def _log_mean_exp(reward: Tensor, log_weight: Tensor, usable: Tensor, eta: float) -> Tensor:
    """eta log sum_k weight_k exp(R_k / eta) for weights that sum to 1, at any eta in (0, inf]."""
    weight = log_weight.exp()
    if eta == math.inf:
        return (weight * reward).sum(-1)
    top = reward.masked_fill(~usable, -math.inf).amax(-1, keepdim=True)
    below = torch.where(usable, reward - top, 0.0) / eta
    # Where rewards differ by less than eta the logarithm is of a number close to 1: log1p and expm1 keep the
    # digits that eta then multiplies. Elsewhere logsumexp is the stable form.
    close = eta * (weight * below.clamp(min=-1).expm1()).sum(-1).log1p()
    apart = eta * (below + log_weight).logsumexp(-1)
    return top.squeeze(-1) + torch.where(below.amin(-1) > -1, close, apart)


def _check(
    rewards: Tensor,
    estimator: str,
    eta: float,
    logp: Tensor | None,
    reference_logp: Tensor | None,
    self_normalised: bool,
    valid: Tensor | None,
) -> None:
    if rewards.ndim < 1 or rewards.shape[-1] < 1:
        raise ValueError(f"rewards_K must be [..., K] with K >= 1 continuations, got shape {tuple(rewards.shape)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if not eta >= 0:
        raise ValueError(f"eta must be between 0 and inf, got {eta}")
    for name, tensor in (("logp", logp), ("reference_logp", reference_logp), ("valid", valid)):
        if tensor is not None and tensor.shape != rewards.shape:
            raise ValueError(
                f"{name} must have the shape of rewards_K {tuple(rewards.shape)}, got {tuple(tensor.shape)}"
            )
    if ESTIMATORS[estimator].log_ratio:
        if logp is None or reference_logp is None:
            raise ValueError(f"estimator {estimator!r} needs logp and reference_logp of every continuation's suffix")
        if eta == math.inf and (estimator == "policy" or not self_normalised):
            raise ValueError(f"estimator {estimator!r} has no limit at eta = inf here; use a finite eta or 'mean'")
