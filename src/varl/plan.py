"""How much memory a training run will need, computed from its recipe alone: no weights are read, no GPU is used.

The policy is built without memory (on torch's meta device) and its parameters are counted exactly. What a run holds
besides follows from one formula. Saved for the backward pass, with rows R of L tokens, width C, feed-forward width F,
depth D, and e bytes an element (4, or 2 where autocast computes in bf16)::

    one block   = R L (4 full C + e (working C + ffn F) + 2 rounded C, in bf16 only) + R T e text C
    all blocks  = D * one block                      without checkpointing
                = R L 4 C D                          with it: the blocks' inputs, and one block while it runs again
    edges       = R L 4 edges C                      embedding, last norm

``full``, ``working``, ``rounded``, ``ffn``, ``text`` and ``edges`` are numbers of a family (``SAVED``): how many
tensors of width C (F) its block keeps in fp32, in the type it computes in, as rounded copies, in the feed-forward,
for each of T tokens of text, and how many are kept outside the blocks. They were counted on small models with
hooks on saved tensors, and the tests count them again, by a GPU's rules: under autocast it normalises in fp32, where a
CPU would stay in bf16. What only a GPU has is in no item: CUDA's own share, about 0.5 GB, the workspaces of its
libraries, about 0.1 GB, and what lies unused between tensors. It is what ``HEADROOM`` leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from varl import updates
from varl.adapters import adapter_parameters, with_adapters
from varl.config import TrainConfig
from varl.models import load_policy
from varl.models.autoencoder import Upsample
from varl.models.blocks import blocks_of
from varl.policy import Policy
from varl.sampling import LOGITS
from varl.schedule import ScaleSchedule

__all__ = ["SAVED", "Estimate", "Item", "Saved", "Shape", "block_bytes", "estimate", "saved_bytes"]

GB = 1e9
HEADROOM = 0.9
"""Share of a GPU's memory that may be planned for: the rest goes to fragments and the libraries' workspaces."""
MAX_GPUS = 4096
AUTO = 1
"""Sequences in a pass that are counted where the run will measure: it takes more only if they fit."""
MAPS, WIDE_MAPS = 4, 3
"""Feature maps of the full size, in fp32, that a convolutional decoder holds at once: of the channels that it ends
with, and, where that is more, of those that the last doubling of the size comes with."""
TEXT_ENCODERS = {"infinity": 2 * 1_223_527_424, "switti": 4 * (123_060_480 + 693_021_440)}
"""Bytes of the frozen text encoders: that of flan-t5-xl in fp16; CLIP ViT-L and OpenCLIP ViT-bigG in fp32."""

Phase = Literal["always", "rollout", "decode", "update", "optimizer"]


@dataclass(frozen=True)
class Saved:
    """Tensors that a family's block saves for the backward pass; see the module's formula."""

    full: float
    working: float
    rounded: float
    ffn: float
    text: float = 0.0
    edges: float = 2.0


SAVED = {
    "inkling": Saved(full=2.06, working=7.0, rounded=0.0, ffn=2),
    "var": Saved(full=8.2, working=8.0, rounded=1.9, ffn=2),
    "infinity": Saved(full=9.2, working=11.0, rounded=1.9, ffn=2, text=2),
    "switti": Saved(full=13.1, working=16.1, rounded=5.8, ffn=2, text=5),
    "tokenflow": Saved(full=4.1, working=11.0, rounded=3.5, ffn=4, edges=3.5),
}
GATED = 4
"""``ffn`` of Switti's gated feed-forward, the published one."""


@dataclass(frozen=True)
class Shape:
    """What the formula needs of a policy.

    Attributes:
        width, ffn, depth: C, F and D.
        prompt: tokens of text in the sequence itself, before the grids.
        text: tokens of text that the blocks attend to beside it.
        saved: the family's numbers.
        cache: bytes of the keys and values of one row.
        classes: logits of a token.
        maps: numbers a pixel that the decoder holds at once.
        linear: weights of linear layers, which autocast copies.
    """

    width: int
    ffn: int
    depth: int
    prompt: int
    text: int
    saved: Saved
    cache: int
    classes: int
    maps: int
    linear: int


@dataclass(frozen=True)
class Item:
    """Something that takes memory.

    Attributes:
        name: what it is.
        bytes: on one GPU, if there is only one.
        phase: when it is there.
        sharded: whether several GPUs share it.
        gathered: whether it is there only where several GPUs share the weights: each holds them whole to draw.
    """

    name: str
    bytes: float
    phase: Phase = "always"
    sharded: bool = False
    gathered: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a run takes. Phases follow one another, so the peak holds the largest of them only."""

    items: list[Item]
    trainable: int

    def of(self, phase: Phase, gpus: int = 1) -> float:
        """Bytes on one GPU of all items of a phase."""
        there = [item for item in self.items if item.phase == phase and (gpus > 1 or not item.gathered)]
        return sum(item.bytes / (gpus if item.sharded else 1) for item in there)

    def peak(self, gpus: int = 1) -> float:
        """Most bytes that one GPU holds at a time."""
        return self.of("always", gpus) + self.of(self.largest_phase(gpus), gpus)

    def largest_phase(self, gpus: int = 1) -> Phase:
        """The phase in which the peak is."""
        phases: tuple[Phase, ...] = ("rollout", "decode", "update", "optimizer")
        return max(phases, key=lambda phase: self.of(phase, gpus))

    def gpus(self, memory: float) -> int | None:
        """The fewest GPUs of ``memory`` GB that fit, weights fully sharded; None if no number of them does.

        What a GPU holds of its own (caches, activations) is not divided: a GPU more draws more pictures.
        """
        return next((n for n in range(1, MAX_GPUS + 1) if self.peak(n) <= HEADROOM * memory * GB), None)


def block_bytes(shape: Shape, rows: int, tokens: float, half: bool) -> float:
    """Saved by one block for R rows of L tokens; ``half`` under autocast to bf16."""
    s, e = shape.saved, 2 if half else 4
    own = (
        4 * s.full * shape.width
        + e * (s.working * shape.width + s.ffn * shape.ffn)
        + 2 * half * s.rounded * shape.width
    )
    return rows * (tokens * own + shape.text * e * s.text * shape.width)


def saved_bytes(shape: Shape, rows: int, tokens: float, half: bool, checkpointing: bool) -> float:
    """Saved by the whole transformer for the backward pass, without what runs again."""
    edges = rows * tokens * 4 * shape.saved.edges * shape.width
    if checkpointing:
        return edges + rows * tokens * 4 * shape.width * shape.depth
    return edges + shape.depth * block_bytes(shape, rows, tokens, half)


def _maps(decoder: nn.Module | None) -> int:
    """Numbers a pixel that a decoder of pictures holds at once; 0 for one that doubles no size, which is small."""
    parts = [] if decoder is None else list(decoder.modules())
    doubling = [part for part in parts if isinstance(part, Upsample)]
    if not doubling:
        return 0
    wide = min(next(c.out_channels for c in part.modules() if isinstance(c, nn.Conv2d)) for part in doubling)
    last = [part for part in parts if isinstance(part, nn.Conv2d)][-1].in_channels
    return max(MAPS * last, WIDE_MAPS * wide)


def shape_of(policy: Policy, schedule: ScaleSchedule, half: bool) -> Shape:
    """The shape of a policy, which may be on the meta device, that draws in bf16 (``half``) or fp32."""
    model: Any = policy.trainable
    blocks = blocks_of(model)
    layers = dict(blocks[0].named_modules())
    enter = next(layer for name, layer in layers.items() if name.split(".")[-1] in ("up", "fc1", "up_proj"))
    saved, prompt, text = SAVED[policy.family], 0, 0
    config: Any = getattr(model, "config", None)
    tokenizer = cast(Any, policy).tokenizer
    kept_width, positions = enter.in_features, schedule.tokens
    if policy.family == "infinity":
        text = config.text_maxlen
    elif policy.family == "switti":
        text = 77
        if config.use_swiglu_ffn:
            saved = replace(saved, ffn=GATED)
    elif policy.family == "tokenflow":
        prompt = config.max_text_token_num + len(config.img_open_ids or range(4))
        kept_width, positions = config.key_heads * config.head_width, positions + prompt - 1
    elements = 2 * len(blocks) * positions * kept_width if getattr(policy, "shares_keys", True) else 0
    state = elements * (2 if half else 4)
    if policy.family == "switti":
        state += len(blocks) * 2 * text * enter.in_features * 4
    return Shape(
        width=enter.in_features,
        ffn=enter.out_features,
        depth=len(blocks),
        prompt=prompt,
        text=text,
        saved=saved,
        cache=state,
        classes=math.prod(policy.event) * policy.classes,
        maps=_maps(getattr(tokenizer, "decoder", None)),
        linear=sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear),
    )


def estimate(config: TrainConfig) -> Estimate:
    """The memory that a recipe's run will take.

    Raises:
        ValueError: if the recipe names no policy, size, middle step or layers that there are, or a family of which it
            is not known what its blocks save.
        FileNotFoundError: if its adapters are not there, and ``policy.lora`` does not say either what they are.
    """
    if config.policy.adapters and (Path(config.policy.adapters).is_file() or not config.policy.lora.rank):
        config = replace(config, policy=with_adapters(config.policy))
    with torch.device("meta"):
        policy = load_policy(config.policy.family, config.policy.config, "random")
    if policy.family not in SAVED:
        known = ", ".join(SAVED)
        raise ValueError(f"the memory of {policy.family} cannot be planned: varl plan knows {known} (varl.plan.SAVED)")
    schedule = policy.schedules(config.policy.resolution, config.policy.aspect_ratio)
    shape, lora = shape_of(policy, schedule, _half(config, "rollout")), config.policy.lora
    weights = _bytes(policy.trainable)
    trained = sum(p.numel() for p in policy.trainable.parameters() if p.requires_grad)
    adapters = adapter_parameters(policy, lora) if lora.rank else 0
    trained = adapters or trained
    items = [
        Item("trainable transformer", weights + 4 * adapters, sharded=True),
        Item("frozen tokenizer", _bytes(cast(nn.Module, cast(Any, policy).tokenizer))),
        Item("gradients", 4 * trained, sharded=True),
        Item("AdamW's moments", 8 * trained * (2 if config.optimizer.moments == "segment" else 1), sharded=True),
    ]
    if isinstance(config.policy.weights, dict) and "text_encoder" in config.policy.weights:
        items.append(Item("frozen text encoders", TEXT_ENCODERS.get(policy.family, 0)))
    if config.method.needs_reference and not lora.rank:
        items.append(Item("frozen reference", weights, sharded=True))
    whole = weights * (1 + (config.method.continuations_by == "reference" and not lora.rank))
    whole = whole // 2 if config.parallel.param_dtype == "bfloat16" else whole
    items.append(Item("weights gathered to draw", whole, "rollout", gathered=True))
    kinds = ("prefix", "suffix") if config.method.update == "alternate" else (config.method.update,)
    plans = [updates.plan(cast(updates.Kind, kind), config.method, schedule) for kind in kinds]
    items += max((_rollout(config, shape, schedule, plan) for plan in plans), key=_total)
    maps = 4 * shape.maps * math.prod(schedule.image_size)
    items.append(Item("pictures decoded at once", config.run.picture_batch * maps, "decode"))
    shares = getattr(policy, "shares_keys", True)
    items += max((_update(config, shape, schedule, plan, shares) for plan in plans), key=_total)
    # Clipping and AdamW work in place, beside the copies that autocast still keeps.
    if not lora.rank:
        items.append(_copies(config, shape, "optimizer"))
    return Estimate(items, trained)


def _bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def _total(items: Iterable[Item]) -> float:
    return sum(item.bytes for item in items)


def _half(config: TrainConfig, phase: Phase) -> bool:
    """Whether a phase computes in bf16."""
    drawn = config.policy.rollout_precision if phase == "rollout" else None
    return (drawn or config.policy.precision) == "bfloat16"


def _copies(config: TrainConfig, shape: Shape, phase: Phase) -> Item:
    """The bf16 copies of weights that autocast makes: of trained ones it keeps all until the phase ends."""
    half, frozen = _half(config, phase), config.policy.lora.rank > 0
    kept = not frozen or (phase == "update" and not config.policy.checkpointing)
    return Item("weights in bf16", half * 2 * shape.linear / (1 if kept else shape.depth), phase, sharded=kept)


def _rollout(config: TrainConfig, shape: Shape, schedule: ScaleSchedule, plan: updates.Plan) -> list[Item]:
    """At the last step: the prefixes' caches and those of their continuations, the grid's logits, one block."""
    method, sampling, half = config.method, config.sampling, _half(config, "rollout")
    heads, guided = method.prompts * plan.heads, sampling.guidance > 0
    size = config.run.rollout_batch or heads * plan.tails
    together = min(max(size // plan.tails, 1), heads)
    pictures = together * min(size, plan.tails)
    held = pictures
    if plan.branch_at < len(schedule):
        held += together * (2 if plan.kind == "prefix" and method.continuations_by == "reference" else 1)
    rows, last = pictures * (1 + guided), max(schedule.counts)
    # All rows' logits, of both halves; those of a few rows filtered; and of some positions what draws make of them: the
    # softmax, its sum. Top-p: sorted ones, int64 order.
    row = last * shape.classes
    some = min(pictures * row, max(LOGITS, row))
    logits = (1 + guided) * pictures * row + some + (5 if sampling.top_p < 1 else 2) * min(some, LOGITS)
    # SDPA reads a layer's keys and values in bf16, however they are kept.
    read = rows * shape.cache / shape.depth / 2 if half else 0
    return [
        Item("keys and values (prefixes and continuations)", held * (1 + guided) * shape.cache, "rollout"),
        Item("logits of the last grid", 4 * logits, "rollout"),
        Item("a block at work on the last grid", block_bytes(shape, rows, last, half) / 2 + read, "rollout"),
        _copies(config, shape, "rollout"),
    ]


def _update(
    config: TrainConfig, shape: Shape, schedule: ScaleSchedule, plan: updates.Plan, shares_keys: bool
) -> list[Item]:
    """One micro-batch, between its forward and backward pass: what is saved, and the head or a block at work."""
    method, half = config.method, _half(config, "update")
    guided = method.logp == "sampling" and config.sampling.guidance > 0
    size = AUTO if config.run.micro_batch == "auto" else config.run.micro_batch
    sequences = min(size, method.prompts * plan.group)
    span = schedule.span(plan.steps)
    scored = span.stop - span.start
    # The sequences of a suffix group share one prefix.
    sharing = min(sequences, plan.tails) if plan.kind == "suffix" else 1
    tokens = scored + ((shape.prompt + span.start) / sharing if shares_keys else 0)
    rows = sequences * (1 + guided)
    # Logits, log-probabilities, and their gradients, with what selects the chosen ones; with guidance its products.
    copies = 4 + 2 * guided + 3 * (method.kl == "exact" and method.beta > 0)
    head = min(sequences * scored * shape.classes, LOGITS) * 4 * copies
    block = block_bytes(shape, rows, tokens, half)
    at_work = (1.5 if config.policy.checkpointing else 0.5) * block
    return [
        Item(
            "activations of a micro-batch",
            saved_bytes(shape, rows, tokens, half, config.policy.checkpointing),
            "update",
        ),
        Item("the head's logits, or a block at work", max(head, at_work), "update"),
        _copies(config, shape, "update"),
    ]
