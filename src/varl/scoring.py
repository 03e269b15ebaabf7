"""Log-probabilities of given actions: teacher-forced, differentiable, and never whole in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from varl.policy import Condition, Policy
from varl.sampling import LOGITS, Sampling, filter_logits
from varl.transfer import sent

__all__ = ["Scores", "log_probs"]


@dataclass
class Scores:
    """What ``log_probs`` returns; B rows, L tokens of the scored steps. Tokens that were not kept hold 0.

    Attributes:
        logp: [B, L], or [B, L, *event] if asked per event.
        entropy: [B, L] in nats, without gradient, if asked for.
        kl: [B, L], the exact KL(policy || reference) of each token's distribution, if a reference was given.
    """

    logp: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None


def log_probs(
    policy: Policy,
    condition: Condition,
    actions: Tensor,
    steps: range | None = None,
    keep: Tensor | None = None,
    guidance: Sampling | None = None,
    *,
    prefix: Any = None,
    shared: int = 1,
    prefix_gradient: bool = True,
    per_event: bool = False,
    entropy: bool | Tensor = False,
    reference: Policy | None = None,
    chunk: int | None = None,
) -> Scores:
    """Score actions under a policy.

    Args:
        condition: [B] rows.
        actions: [B, tokens, *event], at least all tokens up to the end of ``steps``.
        steps: consecutive steps to score; by default all. A prefix costs a prefix.
        keep: bool [L] or [B, L], the tokens to run the head on; by default all.
        guidance: score under this sampling distribution (guided, tempered, renormalised over its support) instead of
            the policy's own conditional one. The scored action always counts as part of the support: rounding, or a
            gradient step since it was drawn, may have moved it out.
        prefix: see ``Policy.hidden``.
        shared: adjacent rows whose tokens before ``steps`` are the same; their prefix is computed once for all of them.
        prefix_gradient: let gradients reach the weights through the tokens before ``steps`` too. False stops them at
            the prefix's keys and values, shared or not: an approximation that spends nothing on the prefix backward.
        per_event: return log-probabilities per event rather than summed to the token.
        entropy: also return entropies; or bool [L], the tokens to return them of.
        reference: also return the exact KL to this policy, over the policy's support.
        chunk: tokens the head is run on at once, by default as many as make ``LOGITS`` logits; with several chunks,
            logits are computed again in the backward pass.

    Raises:
        ValueError: if the actions do not cover the steps, ``shared`` does not divide the rows, ``chunk`` is less than
            1, or ``prefix_gradient`` is False beside a ``prefix``, which has the gradients that it was read with.
    """
    schedule = condition.schedule
    steps = range(len(schedule)) if steps is None else steps
    span = schedule.span(steps)
    if actions.shape[1] < span.stop:
        raise ValueError(f"steps {steps} need {span.stop} tokens, the actions have {actions.shape[1]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 token or more, got {chunk}")
    if prefix is not None and not prefix_gradient:
        raise ValueError("prefix_gradient False has no effect on a prefix that is given; read it without gradients")
    if shared < 1 or len(actions) % shared:
        raise ValueError(f"{len(actions)} rows are no groups of {shared} that share a prefix")
    wanted = actions[:, span]
    weight = _ramp(policy, condition, steps, guidance)

    def flags(given: Tensor) -> Tensor:
        return given.cpu().expand(wanted.shape[:2]).flatten()

    def numbers(chosen: Tensor) -> Tensor:
        return sent(chosen.nonzero().flatten(), wanted.device)

    # Which tokens are chosen is told on the host: on the device it would have to wait to learn how many they are.
    kept = None if keep is None else flags(keep)
    places = None if kept is None else numbers(kept)

    def pick(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        return flat if places is None else flat.index_select(0, places)

    def features(model: Policy, given: Any) -> list[Tensor]:
        rows = [pick(model.hidden(condition, actions, steps, given or before(model, condition)))]
        if weight is not None:
            null = {k: v.expand(condition.batch, *v.shape[1:]) for k, v in condition.null.items()}
            unconditional = Condition(schedule, null, condition.null)
            rows.append(pick(model.hidden(unconditional, actions, steps, before(model, unconditional))))
        return rows

    def before(model: Policy, condition: Condition) -> Any:
        if (shared == 1 and prefix_gradient) or steps.start == 0 or not model.shares_keys:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and prefix_gradient):
            first = condition.select(range(0, len(actions), shared))
            return model.prefill(first, actions[::shared], steps.start)

    inputs = features(policy, prefix)
    if reference is not None:
        with torch.no_grad():
            inputs += features(reference, None)
    target = pick(wanted)
    ramp = None if weight is None else pick(weight.expand(wanted.shape[:2]))
    of = flags(entropy) if isinstance(entropy, Tensor) else None
    asked = of if of is None or kept is None else of[kept]

    def score(
        target: Tensor, ramp: Tensor | None, asked: Tensor | None, hidden: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        half = len(hidden) if reference is None else len(hidden) // 2
        logits = _logits(policy, hidden[:half], ramp)
        support = _support(logits, target, guidance)
        logp = _normalised(logits, guidance, support)
        chosen = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        entropies = kl = None
        if entropy is not False:
            entropies = _entropy(logp.detach() if asked is None else logp.detach().index_select(0, numbers(asked)))
        if reference is not None:
            with torch.no_grad():
                reference_logp = _normalised(_logits(reference, hidden[half:], ramp), guidance, support)
            kl = _per_token(_expectation(logp.exp(), logp - reference_logp))
        return chosen, entropies, kl

    chunk = chunk or max(LOGITS // math.prod((*policy.event, policy.classes)), 1)
    several = len(target) > chunk and torch.is_grad_enabled()
    pieces = []
    for start in range(0, max(len(target), 1), chunk):
        part = slice(start, start + chunk)
        ramp_part, asked_part = (None if x is None else x[part] for x in (ramp, asked))
        arguments = (target[part], ramp_part, asked_part, [h[part] for h in inputs])
        pieces.append(checkpoint(score, *arguments, use_reentrant=False) if several else score(*arguments))
    logp, entropies, kl = zip(*pieces, strict=True)

    def spread(values: tuple[Tensor, ...], where: Tensor | None) -> Tensor:
        joined = torch.cat(values) if per_event or values is not logp else _per_token(torch.cat(values))
        shape = (*wanted.shape[:2], *joined.shape[1:])
        if where is None:
            return joined.view(shape)
        return joined.new_zeros(shape).flatten(0, 1).index_copy(0, where, joined).view(shape)

    if of is not None:
        of = of if kept is None else of & kept
    return Scores(
        spread(logp, places),
        spread(entropies, places if of is None else numbers(of)) if entropy is not False else None,
        spread(kl, places) if reference is not None else None,
    )


def _per_token(values: Tensor) -> Tensor:
    """[N, *event] summed to [N]."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values


@torch.no_grad()
def _entropy(logp: Tensor) -> Tensor:
    """[N, *event, classes] to [N]."""
    return _per_token(-_expectation(logp.exp(), logp))


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """Sum over classes of p * values, where classes of no probability count nothing, in the gradient too."""
    return (p * torch.where(p > 0, values, 0)).sum(-1)


def _ramp(policy: Policy, condition: Condition, steps: range, guidance: Sampling | None) -> Tensor | None:
    """The guidance weight t of every token of ``steps``, or None without guidance."""
    if guidance is None or guidance.guidance == 0:
        return None
    ramp, counts = policy.guidance_ramp(condition.schedule), condition.schedule.counts
    weights = [guidance.guidance * ramp[s] for s in steps for _ in range(counts[s])]
    return sent(torch.tensor(weights), condition.device)


def _logits(policy: Policy, hidden: list[Tensor], ramp: Tensor | None) -> Tensor:
    """Logits [N, *event, classes] of the kept tokens, guided if there is a ramp, in fp32 at least."""
    logits = policy.logits(hidden[0])
    if ramp is not None:
        t = ramp.view(-1, *(1 for _ in logits.shape[1:]))
        logits = (1 + t) * logits - t * policy.logits(hidden[1])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def _support(logits: Tensor, target: Tensor, guidance: Sampling | None) -> Tensor | None:
    """Which classes may be drawn, bool like ``logits``; None for all."""
    if guidance is None or (guidance.top_k == 0 and guidance.top_p == 1):
        return None
    return filter_logits(logits, guidance).isfinite().scatter(-1, target.unsqueeze(-1), True)


def _normalised(logits: Tensor, guidance: Sampling | None, support: Tensor | None) -> Tensor:
    """Log-probabilities at the sampling temperature, over the support."""
    if guidance is not None and guidance.temperature != 1:
        logits = logits / guidance.temperature
    if support is not None:
        logits = logits.masked_fill(~support, -torch.inf)
    return logits.log_softmax(-1)
