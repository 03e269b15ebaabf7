"""An update written without any of the method's savings: what ``python -m benchmarks`` compares with.

Every continuation is drawn from scratch, its prefix again each time; the policy and the reference are run forward over
all tokens of a sequence, and the policy backward; logits are held whole, [batch, tokens, vocabulary]; the loss is
written out from its formula. It is no straw man: it draws with a key/value cache, its attention skips what the mask
hides, and sequences are drawn and trained in the same batches as the library's.

Only what the benchmarks need: one index a token, the k3 estimate of the KL, ratios of tokens, one epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.measure import generators, now
from varl.config import MethodConfig
from varl.learner import Batch
from varl.policy import Condition, Policy
from varl.sampling import Sampling, draw, filter_logits
from varl.updates import Plan

__all__ = ["Clock", "draw_from_scratch", "learn", "loss"]


@dataclass
class Clock:
    """Seconds by stage."""

    device: str = "cpu"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = now(self.device)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - start


@torch.no_grad()
def draw_from_scratch(
    policy: Policy, condition: Condition, plan: Plan, sampling: Sampling, seed: tuple[int, ...], at_once: int = 0
) -> Tensor:
    """The finished sequences of an update, int64 [rows, tokens], each drawn from its first grid on.

    They are those of ``varl.updates.draw``: the same generators up to the middle step, others from there.

    Args:
        condition: one row a sequence, ``plan.tails`` adjacent rows for each of the plan's heads.
        at_once: sequences drawn together; 0 is all.
    """
    rows = condition.batch
    heads = [generators(policy, (*seed, 0), rows // plan.tails) for _ in range(plan.tails)]
    first = [heads[row % plan.tails][row // plan.tails] for row in range(rows)]
    second = generators(policy, (*seed, 1), rows)
    sequences = []
    for part in torch.arange(rows).split(at_once or rows):
        state, drawn = policy.start(condition.select(part), sampling.guidance), []
        for step in range(len(condition.schedule)):
            logits = filter_logits(policy.next_logits(state), sampling)
            drawn.append(draw(logits, [(first if step < plan.branch_at else second)[row] for row in part]))
            policy.advance(state, drawn[-1])
        sequences.append(torch.cat(drawn, 1))
    return torch.cat(sequences)


def loss(
    policy: Policy, reference: Policy | None, condition: Condition, actions: Tensor, batch: Batch, rows: Tensor,
    method: MethodConfig,
) -> Tensor:  # fmt: skip
    """The loss of some rows of a batch (method, sections 4 and 5), from logits of all tokens of all steps.

    Args:
        condition, actions: of the whole batch; actions [B, tokens of all steps].
        batch: advantages, validity, masks and the trained steps.
        rows: which of its rows.
    """
    schedule, device = condition.schedule, actions.device
    some, actions = condition.select(rows), actions[rows]

    def logp_of(model: Policy) -> Tensor:
        logits = model.logits(model.hidden(some, actions, range(len(schedule))))
        return logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    trained = schedule.span(batch.steps)
    logp = logp_of(policy)[:, trained]
    counts = torch.tensor([schedule.counts[step] for step in batch.steps], dtype=torch.float32, device=device)
    k = counts**-method.alpha
    if method.rescale:
        k = k / (k * counts).sum()
    weight_L = k.repeat_interleave(counts.long())
    advantage = batch.advantage_B[rows].to(device)[:, None]
    ratio = (logp - logp.detach()).exp()
    term = -torch.minimum(ratio * advantage, ratio.clamp(1 - method.clip, 1 + method.clip) * advantage)
    if batch.mask_BL is not None:
        term = term * batch.mask_BL[rows].to(device)
    if reference is not None:
        with torch.no_grad():
            reference_logp = logp_of(reference)[:, trained]
        difference = reference_logp - logp
        term = term + method.beta * (difference.exp() - difference - 1)
    term = term * batch.valid_B[rows].to(device)[:, None]
    return (term * weight_L).sum() / len(batch.valid_B)


def learn(
    policy: Policy, reference: Policy | None, condition: Condition, actions: Tensor, batch: Batch, method: MethodConfig,
    optimizer: torch.optim.Optimizer, micro_batch: int, clock: Clock,
) -> tuple[float, float]:  # fmt: skip
    """One gradient step; returns the loss and the gradient's norm."""
    parameters = [p for p in policy.trainable.parameters() if p.requires_grad]
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    with clock.stage("update"):
        for rows in torch.arange(len(actions)).split(micro_batch):
            part = loss(policy, reference, condition, actions, batch, rows, method)
            part.backward()
            total += float(part.detach())
    with clock.stage("optimizer"):
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()
    return total, norm
