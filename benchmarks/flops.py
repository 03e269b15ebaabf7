"""Floating-point operations of VAR's transformer, counted exactly: matrix products and attention.

A product of [n, k] and [k, m] is 2 n k m operations. Backward costs two products for each of forward's: the gradient of
the input and that of the weight. What an implementation computes twice (attention's scores in its backward pass) or
reads from memory is not counted: these are the operations that the method asks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.bound import Needs
from benchmarks.shapes import Bench, Kind
from varl.schedule import ScaleSchedule

__all__ = ["Width", "attention", "forward", "linear", "of", "update"]


@dataclass(frozen=True)
class Width:
    """What the counts depend on: width C, depth D, hidden width F of the feed-forward, codes V, channels of a code."""

    width: int
    depth: int
    hidden: int
    codes: int
    code_width: int

    @classmethod
    def of(cls, transformer: Any) -> Width:
        """Of a VAR transformer."""
        enter, hidden = transformer.word_embed, transformer.blocks[0].ffn.fc1.out_features
        return cls(
            enter.out_features, len(transformer.blocks), hidden, transformer.head.out_features, enter.in_features
        )


def linear(shape: Width, schedule: ScaleSchedule, steps: range) -> float:
    """Matrix products of one row's tokens of ``steps``, and of its modulation (once a row)."""
    c, span = shape.width, schedule.span(steps)
    tokens = span.stop - span.start
    entered = tokens - (schedule.counts[0] if steps.start == 0 else 0)  # the first grid has no input map
    block = 2 * c * (3 * c + c + 2 * shape.hidden)
    modulation = 2 * c * 6 * c * shape.depth + 2 * c * 2 * c
    return tokens * (block * shape.depth + 2 * c * shape.codes) + entered * 2 * shape.code_width * c + modulation


def attention(shape: Width, schedule: ScaleSchedule, steps: range) -> float:
    """Scores and weighted sums of one row: a token of a step sees that step and all before it."""
    pairs = sum(schedule.counts[s] * schedule.offsets[s + 1] for s in steps)
    return 4 * shape.width * pairs * shape.depth


def forward(shape: Width, schedule: ScaleSchedule, steps: range) -> float:
    """One row's tokens of ``steps``, given the keys and values of the steps before."""
    return linear(shape, schedule, steps) + attention(shape, schedule, steps)


def update(shape: Width, schedule: ScaleSchedule, m: int, needs: Needs) -> float:
    """All that an update needs of the transformer (``bound.needs``), with m steps in the prefix."""
    factor = {"draw": 1, "reference": 1, "train": 3}
    segments = {"prefix": range(m), "suffix": range(m, len(schedule))}
    total = 0.0
    for name, tokens in needs.items():
        kind, _, segment = name.partition(" ")
        if segment and (steps := segments[segment]):
            span = schedule.span(steps)
            total += factor[kind] * forward(shape, schedule, steps) * tokens / (span.stop - span.start)
    return total


def of(bench: Bench, kind: Kind, needs: Needs) -> float:
    """What a bench's update of a kind needs of its transformer."""
    trainer = bench.trainer
    return update(Width.of(trainer.policy.trainable), trainer.schedule, bench.plan(kind).branch_at, needs)
