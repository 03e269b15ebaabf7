"""From advantages to a gradient step: log-probabilities, loss, backward, optimizer; in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from varl.algorithm import LossInput, LossOutput, policy_loss, token_weights
from varl.config import MethodConfig, OptimizerConfig
from varl.policy import Policy
from varl.rollout import Rollout
from varl.sampling import Sampling
from varl.scoring import Scores, log_probs

__all__ = ["Batch", "Learner"]

Stage = Callable[[str], AbstractContextManager[Any]]


@dataclass
class Batch:
    """What a gradient step learns from; B sequences, L tokens of the trained steps.

    Attributes:
        sequences: the trained sequences.
        steps: the trained steps.
        advantage_B, valid_B: of every sequence; sequences that are not valid carry no term at all.
        mask_BL: propagated masks, or None.
        rate: factor on the learning rate.
        shared: adjacent sequences whose tokens before ``steps`` are the same.
        reference_logp_BL: what ``Learner.reference_logp`` gives, if that is known already.
    """

    sequences: Rollout
    steps: range
    advantage_B: Tensor
    valid_B: Tensor
    mask_BL: Tensor | None = None
    rate: float = 1.0
    shared: int = 1
    reference_logp_BL: Tensor | None = None


class Learner:
    """Holds the optimizer and takes gradient steps on the policy's trainable part.

    Args:
        policy, reference: the policy, and the frozen initial one (None if beta is 0).
        sampling: the sampling distribution, used when ``method.logp`` is ``sampling``.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        method: MethodConfig,
        optimizer: OptimizerConfig,
        sampling: Sampling,
        micro_batch: int,
    ) -> None:
        self.policy, self.reference, self.method, self.config = policy, reference, method, optimizer
        self.guidance = sampling if method.logp == "sampling" and not sampling.is_plain else None
        self.micro_batch, self.steps_taken = micro_batch, 0
        self.parameters = [p for p in policy.trainable.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            _groups(policy.trainable),
            optimizer.learning_rate,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def rate(self) -> float:
        """The learning rate of the next step: linear warm-up, then constant."""
        c = self.config
        share = min(1.0, self.steps_taken / c.warmup_updates) if c.warmup_updates else 1.0
        return min(c.warmup_from, c.learning_rate) * (1 - share) + c.learning_rate * share

    def learn(self, batch: Batch, stage: Stage, diagnose: bool = False) -> dict[str, Any]:
        """One optimizer step an epoch on a batch; returns what there is to log.

        A non-finite loss or gradient skips the step and is counted in ``skipped``; so does a batch in which no sequence
        carries a term, where momentum and weight decay alone would move the weights.
        """
        if batch.reference_logp_BL is None:
            with stage("reference"):
                found = self.reference_logp(batch.sequences, batch.steps, batch.shared)
            batch = replace(batch, reference_logp_BL=found)
        rows = self._micro_batches(batch)
        old: dict[int, Tensor] = {}
        log: dict[str, Any] = {"skipped": 0}
        for epoch in range(self.method.epochs):
            self.optimizer.zero_grad(set_to_none=True)
            outputs: list[LossOutput] = []
            scored: list[Scores] = []
            weights: list[Tensor] = []
            for index, part in enumerate(rows):
                with stage("logp"):
                    inputs, scores = self._inputs(batch, part, old.get(index))
                old.setdefault(index, inputs.logp_BL.detach())
                with stage("backward"):
                    output = self._loss(inputs, len(batch.sequences))
                    if diagnose and epoch == 0 and index == 0:
                        share = len(part) / sum(map(len, rows))
                        log["gradient_norm_by_step"] = self._norms_by_step(inputs, share * len(batch.sequences))
                    output.loss.backward()
                outputs.append(output)
                weights.append(_policy_weight(inputs))
                scored.append(scores)
            with stage("optimizer"):
                norm, taken = self._step(outputs, batch.rate)
            log["skipped"] += not taken
            log["gradient_norm"] = norm
            if not outputs:
                return log | {"loss": 0.0}
            log |= _summary(outputs, batch, [int(batch.valid_B[part].sum()) for part in rows])
            log["loss_share_by_step"] = self._share_by_step(torch.cat(weights), batch)
            if epoch == 0:
                log["entropy_by_step"] = self._entropy_by_step(scored, batch)
        return log

    def backward_of_first(self, batch: Batch) -> None:
        """A forward and backward pass over the first micro-batch, to see what it costs; the gradients are added."""
        inputs, _ = self._inputs(batch, self._micro_batches(batch)[0], None)
        self._loss(inputs, len(batch.sequences)).loss.backward()

    @torch.no_grad()
    def reference_logp(self, sequences: Rollout, steps: range, shared: int = 1) -> Tensor | None:
        """Log-probabilities of the reference, [B, L], if the loss has a term of them.

        They ask for no reward, so they can be computed while the pictures are scored.
        """
        if self.reference is None or self.method.beta == 0 or self.method.kl == "exact":
            return None
        rows = self._groups(torch.ones(len(sequences), dtype=torch.bool), shared)
        return torch.cat([self._scores(self.reference, sequences, steps, shared, part).logp for part in rows])

    def _micro_batches(self, batch: Batch) -> list[Tensor]:
        """Rows of every forward and backward pass: those that carry a term.

        A sequence that is not valid carries none, nor does one without advantage where no KL is asked for.
        """
        carries = batch.valid_B if self.method.beta > 0 else batch.valid_B & (batch.advantage_B != 0)
        return self._groups(carries, batch.shared)

    def _groups(self, wanted_B: Tensor, shared: int) -> list[Tensor]:
        """The wanted rows in micro-batches, those that share a prefix together as far as they fit."""
        groups = torch.arange(len(wanted_B)).view(-1, shared)[wanted_B.view(-1, shared).any(1)]
        if shared > self.micro_batch:
            return [part for group in groups for part in group.split(self.micro_batch)]
        return [part.flatten() for part in groups.split(self.micro_batch // shared)] if len(groups) else []

    def _scores(
        self, policy: Policy, sequences: Rollout, steps: range, shared: int, rows: Tensor, **options: Any
    ) -> Scores:
        return log_probs(
            policy,
            sequences.condition.select(rows),
            sequences.actions[rows],
            steps,
            guidance=self.guidance,
            shared=min(shared, len(rows)),
            prefix_gradient=self.method.prefix_gradient,
            **options,
        )

    def _inputs(self, batch: Batch, rows: Tensor, old_logp: Tensor | None) -> tuple[LossInput, Scores]:
        method, steps, schedule = self.method, batch.steps, batch.sequences.condition.schedule
        counts = [schedule.counts[s] for s in steps]
        mask = None if batch.mask_BL is None else batch.mask_BL[rows]
        watched = None if old_logp is not None else _watched(counts)
        exact = method.kl == "exact" and method.beta > 0
        scores = self._scores(
            self.policy,
            batch.sequences,
            steps,
            batch.shared,
            rows,
            keep=self._keep(mask, watched),
            entropy=False if watched is None else watched,
            reference=self.reference if exact else None,
        )
        device = scores.logp.device
        mask = None if mask is None else mask.to(device)
        plain = token_weights(counts, method.alpha, rescale=method.rescale, device=device)
        weight, kl_weight = plain, None
        if mask is not None and method.mask.count == "masked":
            weight = token_weights(counts, method.alpha, rescale=method.rescale, mask_BL=mask, count="masked")
            kl_weight = None if method.mask.kl else plain
        inputs = LossInput(
            logp_BL=scores.logp,
            old_logp_BL=scores.logp.detach() if old_logp is None else old_logp,
            advantage_B=batch.advantage_B[rows].to(device),
            weight_BL=weight,
            step_of_token_L=[s for s in steps for _ in range(schedule.counts[s])],
            mask_BL=mask,
            reference_logp_BL=None if batch.reference_logp_BL is None else batch.reference_logp_BL[rows],
            exact_kl_BL=scores.kl,
            valid_B=batch.valid_B[rows].to(device),
            kl_weight_BL=kl_weight,
        )
        return inputs, scores

    def _keep(self, mask: Tensor | None, watched: Tensor | None) -> Tensor | None:
        """The tokens that the head must see, bool [B, L]; None for all.

        Only where unmasked tokens carry no term at all: no KL on them, no ratio of a whole step; and only on policy,
        where the ratio of a token that was not scored is known to be 1.
        """
        m = self.method
        if mask is None or m.epochs > 1 or m.ratio != "token" or (m.beta > 0 and not m.mask.kl):
            return None
        return mask > 0 if watched is None else (mask > 0) | watched

    def _loss(self, inputs: LossInput, divisor: float) -> LossOutput:
        m = self.method
        return policy_loss(inputs, clip=m.clip, beta=m.beta, kl=m.kl, mask_kl=m.mask.kl, ratio=m.ratio, divisor=divisor)

    def _norms_by_step(self, inputs: LossInput, divisor: float) -> list[float]:
        """The norm of the parameters' gradient that each trained step's terms give, from one micro-batch."""
        norms = []
        step_of_token = torch.as_tensor(inputs.step_of_token_L, device=inputs.logp_BL.device)
        for step in dict.fromkeys(step_of_token.tolist()):
            own = (step_of_token == step).to(inputs.weight_BL.dtype)
            kl_weight = None if inputs.kl_weight_BL is None else inputs.kl_weight_BL * own
            part = replace(inputs, weight_BL=inputs.weight_BL * own, kl_weight_BL=kl_weight)
            loss = self._loss(part, divisor).loss
            gradients = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
            norms.append(math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None)))
        return norms

    def _step(self, outputs: list[LossOutput], rate: float) -> tuple[float, bool]:
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm))
        finite = math.isfinite(norm) and all(math.isfinite(o.loss.item()) for o in outputs)
        if not (finite and outputs):
            self.optimizer.zero_grad(set_to_none=True)
            return norm, False
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * rate
        self.optimizer.step()
        # Autocast keeps its casts of the weights until it is left: the next epoch would score with the old ones.
        torch.clear_autocast_cache()
        self.steps_taken += 1
        return norm, True

    @staticmethod
    def _entropy_by_step(scored: list[Scores], batch: Batch) -> list[float]:
        """Means over the tokens that were watched."""
        counts = [batch.sequences.condition.schedule.counts[s] for s in batch.steps]
        values, watched = torch.cat([cast(Tensor, s.entropy) for s in scored]), _watched(counts)
        parts = zip(values.split(counts, 1), watched.split(counts), strict=True)
        return [float(part[:, own].mean()) for part, own in parts]

    @staticmethod
    def _share_by_step(values_BL: Tensor, batch: Batch) -> list[float]:
        counts = [batch.sequences.condition.schedule.counts[s] for s in batch.steps]
        sums = torch.stack([part.sum() for part in values_BL.split(counts, 1)])
        return [float(share) for share in sums / sums.sum().clamp(min=1e-12)]


WATCHED = 32
"""Tokens of a step, evenly spaced, whose entropy is logged: enough for a mean, and no softmax is made for the rest."""


def _watched(counts: list[int]) -> Tensor:
    """Which tokens' entropy is logged, bool [L]."""
    return torch.cat([torch.arange(n) * min(WATCHED, n) % n < min(WATCHED, n) for n in counts])


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    """What weight decay shrinks, and what it leaves alone, where rows without a gradient must not move."""
    undecayed = set(getattr(module, "undecayed", ()))
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for name, parameter in trained if name not in undecayed]},
        {"params": [parameter for name, parameter in trained if name in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _policy_weight(inputs: LossInput) -> Tensor:
    """How much each token's policy term weighs, [B, L]: step weight x mask x |advantage|."""
    weight = inputs.weight_BL * inputs.advantage_B.abs()[:, None]
    weight = weight if inputs.mask_BL is None else weight * inputs.mask_BL
    return weight if inputs.valid_B is None else weight * inputs.valid_B[:, None]


def _summary(outputs: list[LossOutput], batch: Batch, sizes: list[int]) -> dict[str, Any]:
    """One record of all micro-batches, of ``sizes`` valid rows: sums of loss terms, means and extremes of the rest."""
    total = max(float(sum(sizes)), 1.0)

    def mean(values: list[Tensor]) -> Tensor:
        return sum((v.double().cpu() * n for v, n in zip(values, sizes, strict=True)), torch.zeros(())) / total

    log: dict[str, Any] = {
        "loss": float(sum(o.loss.item() for o in outputs)),
        "log_ratio_by_step": mean([o.log_ratio_mean_T for o in outputs]).tolist(),
        "log_ratio_max": max(float(o.log_ratio_max_T.max()) for o in outputs),
        "clip_fraction": float(mean([torch.as_tensor(o.clip_fraction) for o in outputs])),
    }
    kl_means = [o.kl_mean_T for o in outputs if o.kl_mean_T is not None]
    if len(kl_means) == len(outputs):
        log["kl_by_step"] = mean(kl_means).tolist()
    if batch.mask_BL is not None:
        counts = [batch.sequences.condition.schedule.counts[s] for s in batch.steps]
        log["masked_share_by_step"] = [float(part.mean()) for part in batch.mask_BL.split(counts, 1)]
    return log
