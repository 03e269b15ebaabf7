"""Drawing actions: to a step, branching there, and on to the end. The only place where policies are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varl.policy import Condition, Policy
from varl.sampling import LOGITS, Sampling, draw, filter_logits

__all__ = ["Rollout", "Rows", "replay", "rollout", "row_generators"]

Rows = torch.Generator | Sequence[torch.Generator] | None
"""Where draws come from: one generator for the batch, one a row, or torch's global one."""


@dataclass
class Rollout:
    """Drawn sequences.

    Attributes:
        condition: rows aligned with ``actions``.
        actions: int64 [batch, tokens of the first ``steps`` steps, *event].
        steps: how many steps are drawn.
        logp: [batch, tokens], log-probabilities of the drawn tokens under the sampling distribution (guided and
            truncated as asked), if they were asked for.
        state: the policy's state after ``steps`` steps, if it was asked for: what ``rollout(start=...)`` goes on from.
        guidance: what the state was started with, and so what goes on from it.
    """

    condition: Condition
    actions: Tensor
    steps: int
    logp: Tensor | None = None
    state: Any = None
    guidance: float = 0.0

    def __len__(self) -> int:
        return len(self.actions)


def row_generators(
    seed: Sequence[int], rows: int | Sequence[int], device: torch.device | None = None
) -> list[torch.Generator]:
    """One generator a row, each seeded by (seed..., row): a row's draws depend on nothing else.

    Args:
        rows: how many, from row 0 on; or their numbers.
        device: where they draw, best where the logits are: else every grid's numbers are sent there. By default the
            CPU. Generators of two kinds of device draw differently from the same seed.
    """
    # The 1 at the end: to numpy, (0, 5) and (0, 5, 0, 0) are the same seed.
    numbers = range(rows) if isinstance(rows, int) else rows
    words = (np.random.SeedSequence((*seed, row, 1)).generate_state(1, np.uint64)[0] for row in numbers)
    return [torch.Generator(device or "cpu").manual_seed(int(word >> np.uint64(1))) for word in words]


@torch.no_grad()
def rollout(
    policy: Policy,
    condition: Condition,
    sampling: Sampling | None = None,
    generator: Rows = None,
    *,
    until: int | None = None,
    start: Rollout | None = None,
    fork: int = 1,
    logp: bool = False,
    keep_state: bool = False,
) -> Rollout:
    """Draw sequences for every row of a condition, or go on with sequences drawn to some step.

    Args:
        policy: the policy; its mode (train, eval) is left alone.
        condition: the prompts, one row a sequence. With ``start``, the condition that ``start`` was drawn with.
        sampling: guidance and truncation; by default the policy's own distribution.
        generator: where the draws come from; the same generators give the same draws. A list has one a row drawn.
        until: draw this many steps in all; by default every step.
        start: sequences to go on with, drawn with ``keep_state=True``; they stay usable.
        fork: branch: this many continuations of every row of ``start``, copies adjacent. The prefix is not recomputed.
        logp: also return the log-probabilities of all drawn tokens under the sampling distribution.
        keep_state: also return the state, to go on from.

    Raises:
        ValueError: if there is nothing to draw, or ``start`` cannot be gone on with.
    """
    sampling = sampling or Sampling()
    until = len(condition.schedule) if until is None else until
    first = 0 if start is None else start.steps
    if not first < until <= len(condition.schedule):
        raise ValueError(f"cannot draw steps {first} to {until} of a schedule of {len(condition.schedule)} steps")
    if start is None and fork != 1:
        raise ValueError("fork branches the sequences given as start, and none were given")
    if fork < 1:
        raise ValueError(f"fork must be at least 1 continuation, got {fork}")
    if start is None:
        state = policy.start(condition, sampling.guidance)
        drawn, scored = [], []
    else:
        if start.state is None or (logp and start.logp is None):
            raise ValueError("start was drawn without keep_state=True, or without the logp that is asked for now")
        if start.guidance != sampling.guidance:
            raise ValueError(
                f"start was drawn with guidance {start.guidance}, and cannot go on with {sampling.guidance}"
            )
        state = start.state.fork(fork)
        condition = start.condition.repeat(fork)
        drawn = [start.actions.repeat_interleave(fork, 0)]
        scored = [start.logp.repeat_interleave(fork, 0)] if logp and start.logp is not None else []
    for _ in range(first, until):
        actions, chosen = _draw_grid(policy.next_logits(state), sampling, generator, logp)
        policy.advance(state, actions)
        drawn.append(actions)
        if chosen is not None:
            scored.append(chosen)
    return Rollout(
        condition,
        torch.cat(drawn, 1),
        until,
        torch.cat(scored, 1) if logp else None,
        state if keep_state else None,
        sampling.guidance,
    )


def _draw_grid(logits: Tensor, sampling: Sampling, generator: Rows, logp: bool) -> tuple[Tensor, Tensor | None]:
    """Draw a grid's tokens [batch, tokens, *event] from [batch, tokens, *event, classes], a few rows at a time.

    What is made of the logits on the way is several times their size. Also the log-probabilities [batch, tokens], if
    they are asked for.
    """
    if isinstance(generator, Sequence) and len(generator) != len(logits):
        raise ValueError(f"{len(generator)} generators were given for {len(logits)} rows")
    actions, scored = [], []
    count = max(LOGITS // logits[0].numel(), 1)
    for first, part in zip(range(0, len(logits), count), logits.split(count), strict=True):
        part = filter_logits(part.to(torch.promote_types(part.dtype, torch.float32)), sampling)
        own = list(generator[first : first + count]) if isinstance(generator, Sequence) else generator
        actions.append(draw(part, own))
        if logp:
            chosen = part.log_softmax(-1).gather(-1, actions[-1].unsqueeze(-1))
            scored.append(chosen.flatten(2).sum(-1))
    return torch.cat(actions), torch.cat(scored) if logp else None


@torch.no_grad()
def replay(policy: Policy, condition: Condition, actions: Tensor, until: int, guidance: float = 0.0) -> Rollout:
    """Bring a policy to the state after given actions, to go on from: as if it had drawn them.

    Args:
        condition: [batch] rows.
        actions: [batch, tokens, *event], at least all tokens of the first ``until`` steps.
        until: the number of steps to take over.
        guidance: as in ``Sampling``, for what will be drawn afterwards.

    Raises:
        ValueError: if the actions do not cover the steps.
    """
    state = policy.prefill(condition, actions, until, guidance)
    span = condition.schedule.span(range(until))
    return Rollout(condition, actions[:, span], until, state=state, guidance=guidance)
