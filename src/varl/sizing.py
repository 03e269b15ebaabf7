"""How many sequences a forward and backward pass should take: measured on an update's own sequences."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator

import torch

from varl.clock import Clock
from varl.learner import Batch, Learner
from varl.rollout import Rollout

__all__ = ["FIRST", "fastest_micro_batch"]

FIRST = 8
"""Sequences in a pass before anything is measured."""
ROOM = 0.85
"""Share of the memory that a pass may fill."""
NEARLY = 1.03
"""A smaller micro-batch is taken if it costs no more than this times the fastest a sequence."""


def fastest_micro_batch(learner: Learner, sequences: Rollout, steps: range, shared: int = 1) -> int:
    """The number of sequences in a pass that costs the least time a sequence, and fits in memory.

    Sizes double from 1 until memory would run out, or larger ones only get slower. Gradients are thrown away, and no
    step is taken. Several processes try the same sizes together and find the same one: the slowest counts.

    Args:
        shared: adjacent sequences that share their tokens before ``steps``.

    Raises:
        RuntimeError: if not even one sequence fits; or, where weights are sharded, if memory ran out: then the others
            wait for this process in the middle of a pass.
    """
    kept, seconds = learner.micro_batch, dict[int, float]()
    try:
        for size in _sizes(len(sequences)):
            learner.micro_batch = size
            own = _fastest_of_two(learner, sequences, steps, shared)
            slowest = max(learner.distributed.gather_values(own))
            if slowest == math.inf:
                break
            seconds[size] = slowest / size
            filled = max(learner.distributed.gather_values(_filled(sequences.actions.device)))
            if filled * 2 > ROOM or seconds[size] > 1.2 * min(seconds.values()):
                break
    finally:
        learner.micro_batch = kept
        learner.distributed.let_go()
        learner.zero_grad()
    if not seconds:
        raise RuntimeError("run.micro_batch auto: not even one sequence fits into memory; try policy.checkpointing")
    return min(size for size, cost in seconds.items() if cost <= NEARLY * min(seconds.values()))


def _sizes(rows: int) -> Iterator[int]:
    size = 1
    while size < rows:
        yield size
        size *= 2
    yield rows


def _fastest_of_two(learner: Learner, sequences: Rollout, steps: range, shared: int) -> float:
    """Seconds of a pass, or infinity if it does not fit into memory."""
    try:
        return min(_seconds(learner, sequences, steps, shared) for _ in range(2))
    except torch.OutOfMemoryError:
        if learner.distributed.sharded:
            raise
        torch.cuda.empty_cache()  # nothing where there is no GPU
        return math.inf


def _seconds(learner: Learner, sequences: Rollout, steps: range, shared: int) -> float:
    """Of a pass over the first micro-batch, forward and backward."""
    span, rows = sequences.condition.schedule.span(steps), len(sequences)
    batch = Batch(
        sequences,
        steps,
        torch.ones(rows),
        torch.ones(rows, dtype=torch.bool),
        shared=shared,
        reference_logp_BL=torch.zeros(rows, span.stop - span.start, device=sequences.actions.device),
    )
    clock = Clock(sequences.actions.device)
    with clock.stage("pass"):
        learner.backward_of_first(batch)
    return clock.seconds()["pass"]


def _filled(device: torch.device) -> float:
    """The share of the device's memory that was filled at most, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / whole
