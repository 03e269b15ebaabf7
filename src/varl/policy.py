"""The contract of a next-scale policy, and the prompt that conditions it.

Actions of every family travel as one integer tensor ``actions`` [batch, tokens, *event]: all steps flattened coarse to
fine, row-major inside a grid. ``event`` is () for one index a token, and (bits,) for families whose tokens are bits.
Each event has ``classes`` values; the log-probability of a token is summed over its event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from varl.schedule import ScaleSchedule
from varl.transfer import sent

__all__ = ["Box", "Condition", "Policy", "Prompt", "State", "row_index"]

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of the picture's width and height."""


@dataclass(frozen=True)
class Prompt:
    """What a picture should show.

    Attributes:
        text: the prompt as written.
        words: the texts that the picture should contain, one entry a region; used by OCR rewards.
        boxes: where each entry of ``words`` should be, if the prompt says; empty, or one a word.
        label: class index, for class-conditional families.
    """

    text: str = ""
    words: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    label: int | None = None


def row_index(rows: Tensor | Sequence[int], batch: int) -> Tensor:
    """The numbers of chosen rows, int64 [n], each from 0 to ``batch`` - 1.

    Args:
        rows: numbers of rows, negative ones counted from the end; or ``batch`` booleans, which choose the rows that
            are true.

    Raises:
        ValueError: if they are neither, or booleans of another number.
        IndexError: if there is no such row.
    """
    index = rows if isinstance(rows, Tensor) else torch.as_tensor(rows, device="cpu")
    if index.ndim != 1 or (index.is_floating_point() and len(index)) or index.is_complex():
        raise ValueError(f"rows are a list of whole numbers or of booleans, not {list(index.shape)} of {index.dtype}")
    if not isinstance(rows, Tensor) and len({isinstance(row, bool | np.bool_) for row in rows}) > 1:
        raise ValueError("rows are a list of whole numbers or of booleans, not of both")
    if index.dtype == torch.bool:
        if len(index) != batch:
            raise ValueError(f"{len(index)} booleans cannot choose from {batch} rows; one a row is needed")
        return index.nonzero().flatten()
    index = index.long()
    wrong = index[(index < -batch) | (index >= batch)]
    if len(wrong):
        raise IndexError(f"there is no row {int(wrong[0])} in a batch of {batch}")
    return torch.where(index < 0, index + batch, index)


@dataclass
class Condition:
    """The encoded prompts of a batch, made by ``policy.condition`` for one schedule.

    Attributes:
        schedule: the grids that will be drawn.
        features: tensors the family needs, each with the batch first.
        null: their unconditional twin, for guidance: with a batch of 1, or with a row for every row of ``features``.
    """

    schedule: ScaleSchedule
    features: dict[str, Tensor]
    null: dict[str, Tensor]

    @property
    def batch(self) -> int:
        return next(iter(self.features.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.features.values())).device

    def select(self, rows: Tensor | Sequence[int]) -> Condition:
        """The given rows, in that order (repeats allowed): see ``row_index``."""
        index = sent(row_index(rows, self.batch), self.device)
        null = {k: v[index] for k, v in self.null.items()} if self._own_null else self.null
        return Condition(self.schedule, {k: v[index] for k, v in self.features.items()}, null)

    def repeat(self, k: int) -> Condition:
        """Every row ``k`` times, copies adjacent.

        Raises:
            ValueError: if ``k`` is less than 1.
        """
        if k < 1:
            raise ValueError(f"a row is repeated 1 time or more, not {k}")
        null = {key: v.repeat_interleave(k, 0) for key, v in self.null.items()} if self._own_null else self.null
        return Condition(self.schedule, {key: v.repeat_interleave(k, 0) for key, v in self.features.items()}, null)

    @property
    def _own_null(self) -> bool:
        """Whether every row has an unconditional twin of its own."""
        return self.batch > 1 and all(len(v) == self.batch for v in self.null.values())


@runtime_checkable
class State(Protocol):
    """A batch of partly drawn sequences with the key/value caches to go on from.

    ``step`` is the next step to draw; ``fork`` repeats every row k times (copies adjacent), ``select`` picks rows as
    ``row_index`` reads them; both leave the original usable.
    """

    schedule: ScaleSchedule
    step: int

    @property
    def batch(self) -> int: ...

    def fork(self, k: int) -> State: ...

    def select(self, rows: Tensor | Sequence[int]) -> State: ...


class Policy(Protocol):
    """What a family fulfils; a policy is also a ``torch.nn.Module``.

    ``hidden`` is teacher-forced and differentiable: for the tokens of ``steps`` it returns what the head needs, [batch,
    tokens of steps, width], computing no token of a later step. ``prefill`` is the state after given actions, from one
    such pass; with gradients, ``hidden`` may go on from it for a whole group. ``logits`` is the head, on any leading
    shape: [..., width] -> [..., *event, classes]. ``next_logits`` returns the next grid's logits [batch, tokens,
    *event, classes], guided if the state was started with guidance. ``decode`` accepts the actions of the first steps
    only (early exit) and returns [batch, 3, H, W] in [0, 1] at the full size. ``guidance_ramp`` gives the factor of
    ``Sampling.guidance`` at every step. Where there is a method ``text_tokens``, it gives the tokens of a text and how
    many of them a condition holds; the rest is cut. ``trainable`` is the module that reinforcement learning tunes;
    where it has an attribute ``checkpointing``, setting that keeps only its blocks' inputs for the backward pass.
    ``lora_targets`` names the linear layers (ends of their full names) on which adapters matter. ``shares_keys``:
    whether a step reads the keys and values of the steps before it; if not, there is nothing of a prefix to share.
    Where ``trainable`` has an attribute ``undecayed``, it names the parameters that weight decay leaves alone: tables
    of which an update reads few rows, and what only guidance reads.
    """

    family: str
    classes: int
    event: tuple[int, ...]
    lora_targets: tuple[str, ...]
    shares_keys: bool

    @property
    def default_schedule(self) -> ScaleSchedule: ...

    def schedules(self, resolution: int | str | None = None, aspect_ratio: float | None = None) -> ScaleSchedule: ...

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]: ...

    @property
    def trainable(self) -> torch.nn.Module: ...

    def condition(self, prompts: Sequence[Prompt], schedule: ScaleSchedule | None = None) -> Condition: ...

    def start(self, condition: Condition, guidance: float = 0.0) -> State: ...

    def next_logits(self, state: Any) -> Tensor: ...

    def advance(self, state: Any, actions: Tensor) -> None: ...

    def prefill(self, condition: Condition, actions: Tensor, until: int, guidance: float = 0.0) -> Any: ...

    def hidden(self, condition: Condition, actions: Tensor, steps: range, prefix: Any = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def decode(self, actions: Tensor, schedule: ScaleSchedule | None = None) -> Tensor: ...

    def encode(self, images: Tensor, schedule: ScaleSchedule | None = None) -> Tensor: ...
