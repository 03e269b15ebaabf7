"""Floating-point operations of the transformers, counted exactly: matrix products and attention.

A product of [n, k] and [k, m] is 2 n k m operations. Backward costs two products for each of forward's: the gradient of
the input and that of the weight. A frozen weight (LoRA) has no gradient: one product is left, or none where nothing
before it is trained. What an implementation computes twice (attention's scores in its backward pass, blocks that run
again with checkpointing) or reads from memory is not counted: these are the operations that the method asks for.
Infinity's pooling of a text to one vector is left out: it has no matrix of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from benchmarks.bound import Needs
from benchmarks.shapes import Bench, Kind
from varl.models.blocks import blocks_of
from varl.policy import Policy
from varl.schedule import ScaleSchedule
from varl.updates import Plan

__all__ = ["Product", "Shape", "attention", "forward", "learning", "linear", "of", "training", "update"]

COUNTED = ("inkling", "var", "infinity", "switti")
ENTRANCES = {"qkv", "mat_qkv", "to_qkv"}
"""The layers that a block's tokens enter by; with LoRA nothing may be trained before those of the first block."""
Per = Literal["token", "entered", "scored", "text", "row"]
"""What a product is made for: every token; those but the first grid's, which has no input map; those that the head
sees; every token of the text; or a row as a whole (modulation)."""


@dataclass(frozen=True)
class Product:
    """Matrix products with weights.

    Attributes:
        per: what they are made for.
        forward: operations for one of these.
        backward: products of backward for each of forward's: 2, 1 or 0.
    """

    per: Per
    forward: float
    backward: int = 2


@dataclass(frozen=True)
class Shape:
    """What the counts depend on.

    Attributes:
        products: with all weights.
        pair: operations of attention for a token and one that it sees, in all blocks.
        causal: whether a token sees all coarser grids, or its own alone.
        text: tokens of text that every token reads.
    """

    products: tuple[Product, ...]
    pair: float
    causal: bool = True
    text: int = 0

    @classmethod
    def of(cls, policy: Policy, text: int = 0) -> Shape:
        """Of a policy, with its adapters if it has some.

        Args:
            text: tokens of the texts that it will read, for a family that reads some in its blocks.

        Raises:
            ValueError: for a family whose sequences hold more than grids.
        """
        if policy.family not in COUNTED:
            raise ValueError(f"operations are counted for {', '.join(COUNTED)}, not for {policy.family}")
        model: Any = policy.trainable
        width = model.width if policy.family == "inkling" else model.config.embed_dim
        return cls(tuple(_products(model)), 4.0 * width * len(blocks_of(model)), policy.shares_keys, text)


def _products(model: nn.Module) -> Iterator[Product]:
    """One entry a linear layer."""
    blocks = blocks_of(model)
    inside = {id(layer) for block in blocks for layer in block.modules()}
    first = {id(layer) for layer in blocks[0].modules()}
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    # Adapters may reach what makes the blocks' input and modulation.
    early = any(layer.weight.requires_grad and id(layer) not in inside for _, layer in layers)
    for name, layer in layers:
        per = _per(name, id(layer) in inside)
        enters = id(layer) in first and not ENTRANCES.isdisjoint(name.split("."))
        passes = early if enters or per == "row" else per in ("token", "scored")  # something before it is trained
        backward = 2 if layer.weight.requires_grad else int(passes)
        yield Product(per, 2.0 * layer.in_features * layer.out_features, backward)


def _per(name: str, inside: bool) -> Per:
    """What a linear layer is applied to, by its name; ``inside``: of a block."""
    parts = name.split(".")
    if "ada_lin" in parts:
        return "row"
    if {"mat_kv", "to_kv", "text_proj_for_ca"} & set(parts):
        return "text"
    if inside:
        return "token"
    outside: dict[str, Per] = {"head": "scored", "word_embed": "entered", "enter": "entered"}
    return outside.get(parts[0], "row")


def _units(shape: Shape, schedule: ScaleSchedule, steps: range, scored: bool) -> dict[Per, int]:
    """How many of each there are in one row's ``steps``; ``scored``: the head sees them."""
    span = schedule.span(steps)
    tokens = span.stop - span.start
    first = schedule.counts[0] if steps.start == 0 else 0
    return {"token": tokens, "entered": tokens - first, "scored": tokens * scored, "text": shape.text, "row": 1}


def linear(shape: Shape, schedule: ScaleSchedule, steps: range, scored: bool = True) -> float:
    """Matrix products of one row's tokens of ``steps``, and of its text and modulation (once a row)."""
    units = _units(shape, schedule, steps, scored)
    return sum(product.forward * units[product.per] for product in shape.products)


def attention(shape: Shape, schedule: ScaleSchedule, steps: range) -> float:
    """Scores and weighted sums of one row: a token sees its step, all before it (if causal), and the text."""
    seen = {s: schedule.offsets[s + 1] if shape.causal else schedule.counts[s] for s in steps}
    return shape.pair * sum(schedule.counts[s] * (seen[s] + shape.text) for s in steps)


def forward(shape: Shape, schedule: ScaleSchedule, steps: range, scored: bool = True) -> float:
    """One row's tokens of ``steps``, given the keys and values of the steps before."""
    return linear(shape, schedule, steps, scored) + attention(shape, schedule, steps)


def training(shape: Shape, schedule: ScaleSchedule, steps: range, scored: bool = True) -> float:
    """Forward and backward of one row's tokens of ``steps``."""
    units = _units(shape, schedule, steps, scored)
    products = sum(p.forward * (1 + p.backward) * units[p.per] for p in shape.products)
    return products + 3 * attention(shape, schedule, steps)


def learning(shape: Shape, schedule: ScaleSchedule, plan: Plan, sequences: int) -> float:
    """Forward and backward of all sequences that an update trains; a prefix that a group shares counts once a group."""
    total = sequences * training(shape, schedule, plan.steps)
    if plan.steps.start and shape.causal:
        prefixes = sequences // plan.tails
        total += prefixes * training(shape, schedule, range(plan.steps.start), scored=False)
    return total


def update(shape: Shape, schedule: ScaleSchedule, m: int, needs: Needs) -> float:
    """All that an update needs of the transformer (``bound.needs``), with m steps in the prefix."""
    count = {"draw": forward, "reference": forward, "train": training}
    segments = {"prefix": range(m), "suffix": range(m, len(schedule))}
    total = 0.0
    for name, tokens in needs.items():
        kind, _, segment = name.partition(" ")
        if segment and (steps := segments[segment]):
            span = schedule.span(steps)
            total += count[kind](shape, schedule, steps) * tokens / (span.stop - span.start)
    return total


def of(bench: Bench, kind: Kind, needs: Needs) -> float:
    """What a bench's update of a kind needs of its transformer."""
    trainer = bench.trainer
    return update(Shape.of(trainer.policy), trainer.schedule, bench.plan(kind).branch_at, needs)
