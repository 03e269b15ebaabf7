"""From advantages to a gradient step: log-probabilities, loss, backward, optimizer; in micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varl.algorithm import KLS, LossInput, LossOutput, policy_loss, token_weights
from varl.config import MethodConfig, OptimizerConfig
from varl.distributed import Distributed, Stage
from varl.policy import Policy
from varl.rollout import Rollout
from varl.sampling import Sampling
from varl.scoring import Scores, log_probs
from varl.transfer import read, sent

__all__ = ["Batch", "Learner"]


@dataclass
class Batch:
    """What a gradient step learns from; B sequences, L tokens of the trained steps.

    Attributes:
        sequences: the trained sequences.
        steps: the trained steps.
        advantage_B, valid_B: of every sequence; sequences that are not valid carry no term at all.
        mask_BL: propagated masks, or None.
        rate: factor on the learning rate.
        segment: whose moments the step uses, where each segment has its own; see ``OptimizerConfig.moments``.
        shared: adjacent sequences whose tokens before ``steps`` are the same.
        reference_logp_BL: what ``Learner.reference_logp`` gives, if that is known already.
        total: sequences that the loss is divided by; where several processes learn together, those of all.
        cancelled: all that is left of the gradient is rounding: no step is taken.
    """

    sequences: Rollout
    steps: range
    advantage_B: Tensor
    valid_B: Tensor
    mask_BL: Tensor | None = None
    rate: float = 1.0
    segment: str = ""
    shared: int = 1
    reference_logp_BL: Tensor | None = None
    total: int | None = None
    cancelled: bool = False

    @property
    def divisor(self) -> int:
        return len(self.sequences) if self.total is None else self.total


class Learner:
    """Holds the optimizer and takes gradient steps on the policy's trainable part.

    Args:
        policy, reference: the policy, and the frozen initial one (None if beta is 0).
        sampling: the sampling distribution, used when ``method.logp`` is ``sampling``.
        distributed: the processes that learn together, each from as many rows; by default this one alone.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Policy | None,
        method: MethodConfig,
        optimizer: OptimizerConfig,
        sampling: Sampling,
        micro_batch: int,
        distributed: Distributed | None = None,
    ) -> None:
        self.distributed = distributed or Distributed()
        self.policy, self.reference, self.method, self.config = policy, reference, method, optimizer
        self.guidance = sampling if method.logp == "sampling" and not sampling.is_plain else None
        self.micro_batch, self.updates_taken = micro_batch, 0
        self.parameters = [p for p in policy.trainable.parameters() if p.requires_grad]
        segments = ("prefix", "suffix") if optimizer.moments == "segment" else ("",)
        self.optimizers = {segment: self._adamw() for segment in segments}

    def _adamw(self) -> torch.optim.AdamW:
        """An optimizer of all that is trained, with moments of its own."""
        c = self.config
        groups = _groups(self.policy.trainable)
        return torch.optim.AdamW(groups, c.learning_rate, betas=c.betas, weight_decay=c.weight_decay, fused=True)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def rate(self) -> float:
        """The learning rate of the next update: linear warm-up over the updates that took a step, then constant."""
        c = self.config
        share = min(1.0, self.updates_taken / c.warmup_updates) if c.warmup_updates else 1.0
        return min(c.warmup_from, c.learning_rate) * (1 - share) + c.learning_rate * share

    def learn(self, batch: Batch, stage: Stage, diagnose: bool = False) -> dict[str, Any]:
        """One optimizer step an epoch on a batch; returns what there is to log.

        ``skipped`` counts the steps that were not taken: for a loss or gradient that is not finite (``not_finite`` of
        them), or since no sequence carries a term or all terms cancel, where momentum, weight decay or rounding alone
        would move the weights.
        """
        if batch.reference_logp_BL is None:
            with stage("reference"):
                found = self.reference_logp(batch.sequences, batch.steps, batch.shared)
            batch = replace(batch, reference_logp_BL=found)
        own = self._micro_batches(batch)
        rows = own + self._idle(batch, len(own))
        idle = replace(batch, valid_B=torch.zeros_like(batch.valid_B))
        old: dict[int, Tensor] = {}
        passes = [(batch if index < len(own) else idle, part) for index, part in enumerate(rows)]
        log: dict[str, Any] = {"skipped": 0, "not_finite": 0}
        if diagnose and passes:
            with stage("backward"):
                log["gradient_norm_by_step"] = self._norms_by_step(batch, passes)
        for _ in range(self.method.epochs):
            self.zero_grad()
            figures: list[dict[str, Any]] = []
            for index, (whose, part) in enumerate(passes):
                with stage("logp"):
                    inputs, scores = self._inputs(whose, part, old.get(index))
                old.setdefault(index, inputs.logp_BL.detach())
                with stage("backward"):
                    output = self._loss(inputs, batch.divisor)
                    output.loss.backward()
                if whose is batch:
                    figures.append(_figures(inputs, output, scores, batch))
            with stage("optimizer"):
                self.distributed.add_up(self.parameters)
                of_all = [part for given in self.distributed.gather_values(_read(figures)) for part in given]
                norm, taken = self._step(of_all, batch)
            log["skipped"] += not taken
            log["not_finite"] += bool(of_all) and not _finite(norm, of_all)
            log["gradient_norm"] = norm
            log |= _summary(of_all) if of_all else {"loss": 0.0}
        self.updates_taken += log["skipped"] < self.method.epochs
        return log | self._masked_share(batch)

    def _masked_share(self, batch: Batch) -> dict[str, Any]:
        """The mean mask of every trained step over all processes' sequences, if there are masks."""
        mask = batch.mask_BL
        own = None if mask is None else [float(part.mean()) for part in mask.split(_counts(batch), 1)]
        # Every process asks, with masks or without: what waits for the others must not hang on what a reward gave.
        shares = [shares for shares in self.distributed.gather_values(own) if shares is not None]
        return {"masked_share_by_step": torch.tensor(shares).mean(0).tolist()} if shares else {}

    def backward_of_first(self, batch: Batch) -> None:
        """A forward and backward pass over the first micro-batch, to see what it costs; the gradients are added."""
        inputs, _ = self._inputs(batch, self._micro_batches(batch)[0], None)
        self._loss(inputs, batch.divisor).loss.backward()

    def _idle(self, batch: Batch, own: int) -> list[Tensor]:
        """Rows of passes that carry no term: processes that gather weights together make as many passes as any."""
        most = max(self.distributed.gather_values(own))
        pattern = torch.arange(batch.shared).split(self.micro_batch)
        return [pattern[index % len(pattern)] for index in range(own, most)]

    @torch.no_grad()
    def reference_logp(self, sequences: Rollout, steps: range, shared: int = 1) -> Tensor | None:
        """Log-probabilities of the reference, [B, L], if the loss has a term of them.

        They ask for no reward, so they can be computed while the pictures are scored.
        """
        if self.reference is None or self.method.beta == 0 or KLS[self.method.kl].estimate is None:
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
            sequences.actions[sent(rows, sequences.actions.device)],
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
        exact = KLS[method.kl].estimate is None and method.beta > 0
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
        mask = None if mask is None else sent(mask, device)
        known = batch.reference_logp_BL
        plain = token_weights(counts, method.alpha, rescale=method.rescale, device=device)
        weight, kl_weight = plain, None
        if mask is not None and method.mask.count == "masked":
            weight = token_weights(counts, method.alpha, rescale=method.rescale, mask_BL=mask, count="masked")
            kl_weight = None if method.mask.kl else plain
        inputs = LossInput(
            logp_BL=scores.logp,
            old_logp_BL=scores.logp.detach() if old_logp is None else old_logp,
            advantage_B=sent(batch.advantage_B[rows], device),
            weight_BL=weight,
            step_of_token_L=[s for s in steps for _ in range(schedule.counts[s])],
            mask_BL=mask,
            reference_logp_BL=None if known is None else known[sent(rows, known.device)],
            exact_kl_BL=scores.kl,
            valid_B=sent(batch.valid_B[rows], device),
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

    def _norms_by_step(self, batch: Batch, passes: list[tuple[Batch, Tensor]]) -> list[float]:
        """The norm of the gradient that each trained step's terms give, over all sequences.

        Every step has passes of its own, as no graph outlives the sharded weights that it was made with.
        """
        norms: list[Tensor] = []
        for step in batch.steps:
            self.zero_grad()
            for whose, rows in passes:
                inputs, _ = self._inputs(whose, rows, None)
                step_of_token = sent(torch.tensor(inputs.step_of_token_L), inputs.logp_BL.device)
                own = (step_of_token == step).to(inputs.weight_BL.dtype)
                kl_weight = None if inputs.kl_weight_BL is None else inputs.kl_weight_BL * own
                part = replace(inputs, weight_BL=inputs.weight_BL * own, kl_weight_BL=kl_weight)
                self._loss(part, batch.divisor).loss.backward()
            self.distributed.add_up(self.parameters)
            norms.append(self.distributed.clip(self.parameters, math.inf))
        self.zero_grad()
        return [float(norm) for norm in read(norms)]

    def _step(self, parts: list[dict[str, Any]], batch: Batch) -> tuple[float, bool]:
        norm = float(self.distributed.clip(self.parameters, self.config.clip_norm))
        if batch.cancelled or not parts or not _finite(norm, parts):
            self.zero_grad()
            return norm, False
        optimizer = self.optimizers[batch.segment if len(self.optimizers) > 1 else ""]
        for group in optimizer.param_groups:
            group["lr"] = self.rate() * batch.rate
        optimizer.step()
        # Autocast keeps its casts of the weights until it is left: the next epoch would score with the old ones.
        torch.clear_autocast_cache()
        return norm, True


def _finite(norm: float, parts: list[dict[str, Any]]) -> bool:
    """Whether the gradient and every micro-batch's loss are finite."""
    return math.isfinite(norm) and all(math.isfinite(part["loss"]) for part in parts)


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


def _counts(batch: Batch) -> list[int]:
    """Tokens of each trained step."""
    return [batch.sequences.condition.schedule.counts[s] for s in batch.steps]


def _figures(inputs: LossInput, output: LossOutput, scores: Scores, batch: Batch) -> dict[str, Any]:
    """What a micro-batch adds to the record; ``_T`` is one entry a trained step."""
    counts = _counts(batch)
    figures = {
        "valid": len(inputs.advantage_B) if inputs.valid_B is None else inputs.valid_B.sum(),
        "loss": output.loss.detach(),
        "log_ratio_T": output.log_ratio_mean_T,
        "log_ratio_max": output.log_ratio_max_T.max(),
        "clip_fraction": output.clip_fraction,
        "carrying": output.carrying,
        "weight_T": torch.stack([part.double().sum() for part in _policy_weight(inputs).split(counts, 1)]),
    }
    if scores.entropy is not None:
        parts = zip(scores.entropy.split(counts, 1), _watched(counts).split(counts), strict=True)
        figures["rows"] = len(scores.entropy)
        # Tokens whose entropy was not asked for hold 0; to choose the others by place, the host would wait.
        means = [part.double().sum() / (len(part) * int(own.sum())) for part, own in parts]
        figures["entropy_T"] = torch.stack(means)
    if output.kl_mean_T is not None:
        figures["kl_T"] = output.kl_mean_T
    return figures


def _read(figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of all micro-batches as plain values, in one read of the device."""
    found = iter(read([value for part in figures for value in part.values() if isinstance(value, Tensor)]))
    return [
        {name: next(found).tolist() if isinstance(value, Tensor) else value for name, value in part.items()}
        for part in figures
    ]


def _summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of all micro-batches: sums of loss terms, means over rows or valid rows, extremes."""

    def column(name: str) -> Tensor:
        return torch.tensor([part[name] for part in parts], dtype=torch.double)

    def mean(name: str, over: str = "valid") -> Any:
        return (column(over) @ column(name) / column(over).sum().clamp(min=1)).tolist()

    weight_T = column("weight_T").sum(0)
    log: dict[str, Any] = {
        "loss": float(column("loss").sum()),
        "log_ratio_by_step": mean("log_ratio_T"),
        "log_ratio_max": float(column("log_ratio_max").max()),
        "clip_fraction": mean("clip_fraction", "carrying"),
        "loss_share_by_step": (weight_T / weight_T.sum().clamp(min=1e-12)).tolist(),
    }
    if "entropy_T" in parts[0]:
        log["entropy_by_step"] = mean("entropy_T", "rows")
    return log | ({"kl_by_step": mean("kl_T")} if "kl_T" in parts[0] else {})
