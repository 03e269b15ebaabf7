"""The clipped policy loss with its KL term, as one pure function of log-probabilities.

On KL as a loss. With x drawn on policy and d = logp - reference_logp, the *values* k1 = d and k3 = exp(-d) +
d - 1 are unbiased for the reverse KL(pi || reference). What trains is the gradient of the sampled term, which
is another matter:

* k1: its expected gradient is E[grad logp] = 0. It only adds noise, so it is offered for reports and not as a
  loss.
* k2 = d^2 / 2: its expected gradient is E[d grad logp], that of the *reverse* KL, the one in the objective J.
* k3: its expected gradient is that of the *forward* KL(reference || pi).
* exact: the reverse KL summed over the classes; no sampling noise.

All of this supposes draws from the distribution whose log-probabilities are used. Under guided or truncated
draws (the paper's rollouts) neither the values nor the gradients of k1, k2 and k3 are unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from varl.transfer import sent

__all__ = [
    "KL",
    "KLS",
    "KLNeeds",
    "LossInput",
    "LossOutput",
    "Ratio",
    "entropy",
    "exact_kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "policy_loss",
]

KL = Literal["k3", "k2", "exact"]
Ratio = Literal["token", "step"]


def kl_k1(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """logp - reference_logp, elementwise, any shape. Zero expected gradient: for reports, not as a loss."""
    return logp - reference_logp


def kl_k2(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """(logp - reference_logp)^2 / 2, elementwise, any shape. Its expected gradient is the reverse KL's."""
    return (logp - reference_logp).square() / 2


def kl_k3(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = reference_logp - logp, elementwise, any shape, >= 0 (method.md section 4;
    Schulman, "Approximating KL divergence"). Its expected gradient is the forward KL's."""
    difference = reference_logp - logp
    return difference.expm1() - difference


@dataclass(frozen=True)
class KLNeeds:
    """A KL estimator and what it is computed from; whoever prepares its inputs asks here.

    Attributes:
        estimate: of the log-probabilities (logp, reference_logp) of the drawn actions; None if it is computed from the
            whole distributions, as ``LossInput.exact_kl_BL``.
    """

    estimate: Callable[[Tensor, Tensor], Tensor] | None

    @property
    def input(self) -> str:
        """The field of ``LossInput`` that it needs."""
        return "exact_kl_BL" if self.estimate is None else "reference_logp_BL"


KLS: dict[str, KLNeeds] = {"k3": KLNeeds(kl_k3), "k2": KLNeeds(kl_k2), "exact": KLNeeds(None)}


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(pi || reference) of every event, summed over its classes.

    Args:
        logits, reference_logits: [..., classes]; -inf excludes a class.

    Returns:
        [...] >= 0, in nats; inf where pi allows a class that the reference excludes.

    Raises:
        ValueError: if the shapes differ.
    """
    if logits.shape != reference_logits.shape:
        raise ValueError(
            "logits and reference_logits must have one shape, "
            f"got {tuple(logits.shape)} and {tuple(reference_logits.shape)}"
        )
    logp = logits.log_softmax(-1)
    probability = logp.exp()
    difference = torch.where(probability > 0, logp - reference_logits.log_softmax(-1), 0.0)
    return (probability * difference).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of every event: logits [..., classes] -> [...], between 0 and log(classes)."""
    logp = logits.log_softmax(-1)
    probability = logp.exp()
    return -(probability * torch.where(probability > 0, logp, 0.0)).sum(-1)


@dataclass(frozen=True)
class LossInput:
    """What the loss is computed from. B samples, L trained tokens, E events a token (bits), T trained steps.

    Attributes:
        logp_BL: [B, L], or [B, L, E] for ratio, clip and KL per event: log-probability of the sampled actions
            under the policy being trained. The only differentiable input besides ``exact_kl_BL``.
        old_logp_BL: like ``logp_BL``, under the policy as it was at the rollout, in the *same* distribution
            (unguided and untruncated, or whatever ``logp_BL`` uses). Fully on policy: ``logp_BL.detach()``.
        advantage_B: [B].
        weight_BL: [L] or [B, L] from ``token_weights``: PANW and its normaliser.
        step_of_token_L: [L] integers, the step of each token, ascending without gaps; need not begin at 0.
        mask_BL: [B, L] in [0, 1], which tokens carry the policy term; None for all.
        reference_logp_BL: like ``logp_BL``, under the reference policy; for ``k2`` and ``k3``.
        exact_kl_BL: [B, L] or [B, L, E], differentiable, from ``exact_kl``; for ``exact``.
        valid_B: [B] bool; a False sample (of a dropped group) carries nothing, not even KL. None for all. A
            sample with advantage 0 still carries its KL.
        kl_weight_BL: [L] or [B, L], the KL term's weights if not ``weight_BL``: with
            ``token_weights(count="masked")`` and an unmasked KL, the ``grid`` ones.
    """

    logp_BL: Tensor
    old_logp_BL: Tensor
    advantage_B: Tensor
    weight_BL: Tensor
    step_of_token_L: Tensor | Sequence[int]
    mask_BL: Tensor | None = None
    reference_logp_BL: Tensor | None = None
    exact_kl_BL: Tensor | None = None
    valid_B: Tensor | None = None
    kl_weight_BL: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """The loss and what it is made of. All but ``loss`` is detached; ``_T`` is one entry a trained step.

    Attributes:
        loss: scalar, differentiable.
        steps: the trained steps.
        policy_term_T, kl_term_T: [T] each step's part of the loss (divided alike, KL times beta): together
            they sum to ``loss``, and over micro-batches with one divisor they add up.
        kl_mean_T: [T] mean KL of a token by the chosen estimator, unweighted, over valid samples (with
            ``mask_kl``, tokens outside the mask count as 0); None if there is nothing to compute it from.
        log_ratio_mean_T, log_ratio_max_T: [T] mean and largest absolute value of logp - old_logp of a token,
            over valid samples. Both are 0 in a fully on-policy step; drift between the rollout's and the
            trainer's numbers shows here.
        ratio_mean, ratio_min, ratio_max: scalars, of the ratio as used, over the tokens (or events) that
            carry the policy term; 1 if none does.
        clip_fraction: scalar in [0, 1], how many of those have no gradient because they are clipped.
        carrying: scalar, how many there are.
    """

    loss: Tensor
    steps: range
    policy_term_T: Tensor
    kl_term_T: Tensor
    kl_mean_T: Tensor | None
    log_ratio_mean_T: Tensor
    log_ratio_max_T: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    clip_fraction: Tensor
    carrying: Tensor


def policy_loss(
    inputs: LossInput,
    *,
    clip: float | tuple[float, float] = 0.2,
    beta: float = 0.01,
    kl: KL = "k3",
    mask_kl: bool = False,
    ratio: Ratio = "token",
    divisor: float | None = None,
) -> LossOutput:
    """The loss of a batch (method.md sections 4 and 5; GRPO's clipped objective under PANW, Eq. 9, and MP).

        loss = 1/divisor sum_B sum_L w (M pg + beta kl)        pg = -min(rho A, clip(rho, 1 - low, 1 + high)
        A)

    The ratio rho is that of a token, exp(logp - old_logp); or of an event, if log-probabilities are given per
    event, in which case pg and kl are summed over a token's events; or of a step: the geometric mean of the
    token ratios over the step's tokens, weighted by the mask, and equal for all of them (as GSPO, arXiv
    2507.18071, does over a sequence). The latter is straight-through: its gradient reaches every token of the
    mask as if the ratio were its own, which, as weights are equal inside a step, is also its true derivative.
    A raw product over a step is not offered: thousands of tokens make it 0 or inf.

    Args:
        inputs: see ``LossInput``.
        clip: the ratio's range below and above 1, >= 0: one number for both, or (low, high); inf never clips.
        beta: the KL's factor, >= 0. At 0 no reference is needed, and the KL is only reported if one is given.
        kl: estimator; see this module's docstring.
        mask_kl: the KL of a token is multiplied by its mask, too.
        ratio: ``token`` or ``step``.
        divisor: what the sum over samples is divided by; None: B, dropped samples included. Give the whole
            batch's number of samples when it comes in micro-batches; then the gradients add up to those of
            one large batch.

    Returns:
        ``LossOutput``. Non-finite values are passed on: what to do with them is the trainer's decision. Those
        of invalid samples, and those of the policy term outside the mask, do not count.

    Raises:
        ValueError: if a shape does not fit, an option is out of range, ``ratio="step"`` gets events, or
            ``beta > 0`` without what ``kl`` needs.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    _check(inputs, low, high, beta, kl, ratio, divisor)
    logp = inputs.logp_BL
    batch, length = logp.shape[:2]
    first, count, step_L = _relative_steps(inputs.step_of_token_L, logp.device)
    divisor = float(batch) if divisor is None else divisor
    ones_BL = logp.new_ones(batch, length)
    valid_BL = ones_BL > 0 if inputs.valid_B is None else inputs.valid_B[:, None].expand(batch, length)
    mask_BL = ones_BL if inputs.mask_BL is None else inputs.mask_BL.detach().to(logp.dtype)
    mask_BL = torch.where(valid_BL, mask_BL, 0.0)

    log_ratio = _select(valid_BL, logp - inputs.old_logp_BL.detach())
    carried = _select(mask_BL > 0, log_ratio)
    if ratio == "step":
        carried = _step_log_ratio(carried, mask_BL, step_L, count)
    advantage_B = torch.where(valid_BL[:, 0], inputs.advantage_B.detach(), 0.0).to(logp.dtype)
    policy_BL, ratios, clipped = _policy_term(carried, advantage_B, low, high)
    policy_BL = policy_BL * mask_BL * inputs.weight_BL / divisor

    kl_BL = _kl_term(inputs, kl, valid_BL & (mask_BL > 0) if mask_kl else valid_BL)
    term_BL = torch.zeros_like(policy_BL)
    if beta > 0 and kl_BL is not None:
        term_BL = kl_BL * (inputs.weight_BL if inputs.kl_weight_BL is None else inputs.kl_weight_BL)
        term_BL = (term_BL * mask_BL if mask_kl else term_BL) * (beta / divisor)

    token_log_ratio = log_ratio.detach().reshape(batch, length, -1).sum(-1)
    largest = token_log_ratio.abs().amax(0)
    return LossOutput(
        loss=policy_BL.sum() + term_BL.sum(),
        steps=range(first, first + count),
        policy_term_T=_by_step(policy_BL, step_L, count),
        kl_term_T=_by_step(term_BL, step_L, count),
        kl_mean_T=None if kl_BL is None else _step_mean(kl_BL, valid_BL, step_L, count),
        log_ratio_mean_T=_step_mean(token_log_ratio, valid_BL, step_L, count),
        log_ratio_max_T=largest.new_zeros(count).scatter_reduce(0, step_L, largest, "amax"),
        **_ratio_statistics(ratios, clipped, mask_BL > 0),
    )


def _policy_term(log_ratio: Tensor, advantage_B: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """pg [B, L] summed over events; the ratios and which are clipped, both [B, L, E]."""
    ratio = log_ratio.reshape(*log_ratio.shape[:2], -1).exp()
    advantage = advantage_B[:, None, None]
    plain, bounded = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return -torch.minimum(plain, bounded).sum(-1), ratio.detach(), (bounded < plain).detach()


def _step_log_ratio(log_ratio_BL: Tensor, mask_BL: Tensor, step_L: Tensor, count: int) -> Tensor:
    """In value the mask-weighted mean over each step; in gradient each token's own log-ratio."""
    total_BT = mask_BL.new_zeros(mask_BL.shape[0], count).index_add(1, step_L, log_ratio_BL.detach() * mask_BL)
    weight_BT = mask_BL.new_zeros(mask_BL.shape[0], count).index_add(1, step_L, mask_BL)
    mean_BL = torch.where(weight_BT > 0, total_BT / weight_BT, 0.0)[:, step_L]
    return mean_BL + (log_ratio_BL - log_ratio_BL.detach())


def _kl_term(inputs: LossInput, kl: KL, keep_BL: Tensor) -> Tensor | None:
    """The KL of every token [B, L], 0 where not kept; None if there is nothing to compute it from."""
    given: Tensor | None = getattr(inputs, KLS[kl].input)
    if given is None:
        return None
    estimate = KLS[kl].estimate
    if estimate is None:
        value = _select(keep_BL, given)
    else:
        value = estimate(_select(keep_BL, inputs.logp_BL), _select(keep_BL, given.detach()))
    return value.reshape(*value.shape[:2], -1).sum(-1)


def _select(keep: Tensor, value: Tensor) -> Tensor:
    """``value`` [B, L] or [B, L, E] where ``keep`` [B, L], else 0, in value and gradient (0 times NaN
    would be NaN)."""
    return torch.where(keep.reshape(*keep.shape, *[1] * (value.ndim - 2)), value, 0.0)


def _by_step(value_BL: Tensor, step_L: Tensor, count: int) -> Tensor:
    per_token = value_BL.detach().sum(0)
    return per_token.new_zeros(count).index_add(0, step_L, per_token)


def _step_mean(value_BL: Tensor, keep_BL: Tensor, step_L: Tensor, count: int) -> Tensor:
    kept = keep_BL.to(value_BL.dtype)
    return _by_step(value_BL * kept, step_L, count) / _by_step(kept, step_L, count).clamp(min=1)


def _ratio_statistics(ratio: Tensor, clipped: Tensor, carries_BL: Tensor) -> dict[str, Tensor]:
    carries = carries_BL[..., None].expand_as(ratio)
    count = carries.sum()
    one = ratio.new_ones(())
    any_carries = count > 0
    return {
        "ratio_mean": torch.where(any_carries, (ratio * carries).sum() / count.clamp(min=1), one),
        "ratio_min": torch.where(any_carries, ratio.masked_fill(~carries, float("inf")).amin(), one),
        "ratio_max": torch.where(any_carries, ratio.masked_fill(~carries, -float("inf")).amax(), one),
        "clip_fraction": (clipped & carries).sum() / count.clamp(min=1),
        "carrying": count,
    }


def _relative_steps(steps: Tensor | Sequence[int], device: torch.device) -> tuple[int, int, Tensor]:
    """The first step, how many there are, and each token's step counted from the first."""
    given = steps.tolist() if isinstance(steps, Tensor) else [int(step) for step in steps]
    if not all(0 <= after - before <= 1 for before, after in pairwise(given)):
        raise ValueError("step_of_token_L must ascend without gaps, as ScaleSchedule.step_of_token() gives it")
    relative = torch.tensor([step - given[0] for step in given])
    return given[0], given[-1] - given[0] + 1, sent(relative, device)


def _check(inputs: LossInput, low: float, high: float, beta: float, kl: str, ratio: str, divisor: float | None) -> None:
    if not (low >= 0 and high >= 0 and 0 <= beta < float("inf")):
        raise ValueError(f"clip and beta must be at least 0 and beta finite, got clip {(low, high)} and beta {beta}")
    if kl not in KLS or ratio not in get_args(Ratio):
        raise ValueError(
            f"kl must be one of {', '.join(KLS)} and ratio one of {', '.join(get_args(Ratio))}, "
            f"got {kl!r} and {ratio!r}"
        )
    if divisor is not None and not divisor > 0:
        raise ValueError(f"divisor must be a positive number of samples, got {divisor}")
    shape = tuple(inputs.logp_BL.shape)
    if len(shape) not in (2, 3) or 0 in shape or len(inputs.step_of_token_L) != shape[1]:
        raise ValueError(
            "logp_BL must be [batch, tokens] or [batch, tokens, events], not empty, with one entry of "
            f"step_of_token_L a token, got {shape} and {len(inputs.step_of_token_L)} entries"
        )
    if ratio == "step" and len(shape) == 3:
        raise ValueError(
            "ratio='step' needs log-probabilities summed to the token, [batch, tokens]; got them per event"
        )
    tokens = [shape[:2]]
    allowed = {
        "old_logp_BL": [shape],
        "advantage_B": [shape[:1]],
        "weight_BL": [shape[1:2], *tokens],
        "mask_BL": tokens,
        "reference_logp_BL": [shape],
        "exact_kl_BL": [shape, *tokens] if len(shape) == 3 else [(*tokens[0], None), *tokens],
        "valid_B": [shape[:1]],
        "kl_weight_BL": [shape[1:2], *tokens],
    }
    for name, shapes in allowed.items():
        value = getattr(inputs, name)
        if value is not None and not any(_fits(tuple(value.shape), each) for each in shapes):
            raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {tuple(value.shape)}")
    if inputs.valid_B is not None and inputs.valid_B.dtype != torch.bool:
        raise ValueError(f"valid_B must be bool, got {inputs.valid_B.dtype}")
    needed = KLS[kl].input
    if beta > 0 and getattr(inputs, needed) is None:
        raise ValueError(f"beta {beta} with kl={kl!r} needs {needed}; give it, or set beta to 0")


def _fits(shape: tuple[int, ...], allowed: tuple[int | None, ...]) -> bool:
    return len(shape) == len(allowed) and all(a is None or a == s for s, a in zip(shape, allowed, strict=True))
