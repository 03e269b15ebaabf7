"""What the processes of an update send each other, in closed form: from the parameters' numbers, no device needed.

Sizes are of what is sent as a whole: of an all-gather or reduce-scatter of n bytes, and of each of the two halves of an
all-reduce, every process sends and receives n (N - 1) / N. U is all parameters of the trained module, U_b those of its
blocks, l those of the last block, p the passes (micro-batches) of a process, s 2 where a suffix group shares a prefix,
which is then read in a pass of its own, and else 1.

    ddp     all-reduce      trained, once an optimizer step
    fsdp2   all-gather      U to draw; U - U_b + 2 s p U_b - (s p - 1) l to learn; U - U_b + s p U_b for the reference
            reduce-scatter  trained, once a pass

The last block and what is no block are kept whole between passes: see ``varl.distributed``. Scores, returns and the
numbers of the log are a few kilobytes and left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from varl.config import TrainConfig
from varl.models import load_policy
from varl.models.blocks import blocks_of
from varl.policy import Policy
from varl.schedule import ScaleSchedule
from varl.updates import Kind, plan

__all__ = ["Sent", "Size", "Work", "sent", "size_of", "work"]


@dataclass(frozen=True)
class Size:
    """Numbers of parameters: all, those in blocks, those of the last block, and those that are trained."""

    all: int
    blocks: int
    last: int
    trained: int


@dataclass(frozen=True)
class Sent:
    """Bytes of an update's collectives, each as a whole."""

    gathered_to_draw: float = 0.0
    gathered_to_learn: float = 0.0
    gathered_for_reference: float = 0.0
    reduce_scattered: float = 0.0
    all_reduced: float = 0.0

    def per_process(self, processes: int) -> float:
        """Bytes that a process sends, and receives."""
        gathered = self.gathered_to_draw + self.gathered_to_learn + self.gathered_for_reference
        return (gathered + self.reduce_scattered + 2 * self.all_reduced) * (processes - 1) / processes


def size_of(policy: Policy, adapters: int = 0) -> Size:
    """The size of a policy, which may be on the meta device; ``adapters`` is what they train, if there are any."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(policy.trainable)]
    parameters = list(policy.trainable.parameters())
    trained = adapters or sum(p.numel() for p in parameters if p.requires_grad)
    return Size(sum(p.numel() for p in parameters), sum(blocks), blocks[-1], trained)


def sent(config: TrainConfig, kind: Kind, size: Size, schedule: ScaleSchedule, processes: int) -> Sent:
    """The bytes of one update of a kind, with one epoch.

    Raises:
        ValueError: if the processes cannot share the update's sequences equally.
    """
    if config.parallel.mode == "ddp":
        return Sent(all_reduced=4 * size.trained)
    made = plan(kind, config.method, schedule)
    rows = config.method.prompts * made.sequences
    if rows % processes:
        raise ValueError(f"{processes} processes cannot share {rows} sequences equally")
    rows //= processes
    micro = config.run.micro_batch
    assert isinstance(micro, int)
    shared = math.gcd(made.tails, rows) if kind == "suffix" else 1
    groups = rows // shared
    passes = groups * -(-shared // micro) if shared > micro else -(-groups // (micro // shared))
    s = 2 if shared > 1 and micro > 1 else 1
    e = 2 if config.parallel.param_dtype == "bfloat16" else 4
    root = 4 * (size.all - size.blocks)
    learn = root + e * (2 * s * passes * size.blocks - (s * passes - 1) * size.last)
    method = config.method
    reads = method.needs_reference and method.beta > 0 and method.kl != "exact"
    return Sent(
        gathered_to_draw=root + e * size.blocks,
        gathered_to_learn=learn,
        gathered_for_reference=root + e * s * passes * size.blocks if reads else 0.0,
        reduce_scattered=4 * passes * size.trained,
    )


@dataclass(frozen=True)
class Work:
    """Floating-point operations of an update, of all processes together: 2 a parameter and token, and 6 to learn.

    Attention among the tokens is left out, which makes estimates of scaling the more careful.
    """

    draw: float
    learn: float


def work(config: TrainConfig, kind: Kind, size: Size, schedule: ScaleSchedule) -> Work:
    """The operations of one update of a kind."""
    method, made = config.method, plan(kind, config.method, schedule)
    heads, rows = method.prompts * made.heads, method.prompts * made.sequences
    before = schedule.span(range(made.branch_at)).stop
    after = schedule.span(range(made.until)).stop - before
    drawn = (heads * before + heads * made.tails * after) * (1 + (config.sampling.guidance > 0))
    span = schedule.span(made.steps)
    scored = rows * (span.stop - span.start) + (rows // made.tails * span.start if kind == "suffix" else 0)
    reference = method.needs_reference and method.beta > 0
    passes = 3 + reference + config.policy.checkpointing
    return Work(2.0 * size.all * drawn, 2.0 * size.all * scored * passes)


def policy_on_meta(config: TrainConfig) -> Policy:
    """The policy of a recipe without memory."""
    with torch.device("meta"):
        return load_policy(config.policy.family, config.policy.config, "random")
