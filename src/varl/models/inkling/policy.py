"""Inkling as a policy: the embedded family, small enough to be trained and tuned on a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varl.models.blocks import Cache
from varl.models.fields import grid_sides
from varl.models.forcing import TeacherForced
from varl.models.inkling.text import ALPHABET, CELL, PICTURE, layout, parse_prompt
from varl.models.inkling.tokenizer import Tokenizer
from varl.models.inkling.transformer import Transformer
from varl.models.quantizer import resize_area
from varl.models.state import DrawState
from varl.policy import Condition, Prompt
from varl.schedule import ScaleSchedule

__all__ = ["Inkling", "InklingConfig"]


@dataclass(frozen=True)
class InklingConfig:
    """The shape of an Inkling.

    Attributes:
        grids: sides of the square grids; the last times 4 is the picture's side, 48.
        codes: codebook size.
        coarse: components of the tokenizer's encoder, for the coarse grids.
        fine: components for the last grid.
        decoder: channels of the tokenizer's decoder.
        width: channels of the transformer.
        depth: its blocks.
        heads: of attention, in a block.
    """

    grids: tuple[int, ...] = (1, 2, 3, 6, 12)
    codes: int = 1024
    coarse: int = 40
    fine: int = 16
    decoder: int = 48
    width: int = 160
    depth: int = 5
    heads: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple(self.grids))
        sides = self.grids
        for name, most in (("codes", 2**20), ("coarse", 2**12), ("fine", 2**12), ("decoder", 2**12), ("width", 2**14),
                           ("depth", 2**8), ("heads", 2**8)):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"Inkling's {name} must be a whole number from 1 to {most}, got {value!r}")
        grid_sides(self, "Inkling", "grids")
        if len(sides) < 2 or min(sides) < 1 or sides[-1] not in (6, 12, 24) or sides[-1] % sides[-2]:
            raise ValueError(
                f"Inkling's grids must be two at least, the last of side 6, 12 or 24 and a multiple of the one before; "
                f"got {sides}"
            )
        if self.width % self.heads:
            raise ValueError(f"Inkling's width {self.width} must be a multiple of its {self.heads} heads")


class Inkling(TeacherForced):
    """The embedded next-scale policy. See ``varl.policy.Policy`` for the contract its methods fulfil."""

    family = "inkling"
    event: tuple[int, ...] = ()
    lora_targets = ("qkv", "out", "up", "down")

    def __init__(self, config: InklingConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or InklingConfig()
        self._schedule = ScaleSchedule.square(c.grids, PICTURE // c.grids[-1])
        self._parts = (c.grids[-1] * CELL // PICTURE) ** 2
        self._null = (1 + 2 * len(ALPHABET)) * self._parts
        self.tokenizer = Tokenizer(self._schedule, c.codes, c.coarse, c.fine, c.decoder)
        self.transformer = Transformer(
            self._schedule, c.codes, c.coarse + c.fine, self._null + 1, c.width, c.depth, c.heads
        )
        self.classes = c.codes

    @property
    def default_schedule(self) -> ScaleSchedule:
        return self._schedule

    @property
    def trainable(self) -> nn.Module:
        """The part that reinforcement learning tunes; the tokenizer stays frozen."""
        return self.transformer

    def schedules(self, resolution: int | str | None = None, aspect_ratio: float | None = None) -> ScaleSchedule:
        """Inkling's only schedule.

        Raises:
            ValueError: if another resolution or aspect ratio is asked for.
        """
        if resolution not in (None, PICTURE, str(PICTURE)) or aspect_ratio not in (None, 1.0):
            raise ValueError(f"Inkling draws {PICTURE}x{PICTURE} pictures only, not {resolution} at {aspect_ratio}")
        return self._schedule

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]:
        """Guidance grows linearly from nothing at the first step to its full weight at the last."""
        return [step / max(len(schedule) - 1, 1) for step in range(len(schedule))]

    def condition(self, prompts: Sequence[Prompt], schedule: ScaleSchedule | None = None) -> Condition:
        """Encode prompts such as ``the words 'KEBA' at the top, 'LUX' at the bottom``.

        Raises:
            ValueError: if there is no prompt, or one that Inkling cannot read.
        """
        if not prompts:
            raise ValueError("a condition needs at least one prompt")
        letters = torch.from_numpy(np.stack([layout(parse_prompt(p.text)) for p in prompts]))
        device = self.transformer.first.device
        null = torch.full((1, *self._schedule.grids[-1]), self._null, device=device)
        return Condition(self._schedule, {"cells": self._cells(letters).to(device)}, {"cells": null})

    def _cells(self, letters_BHW: Tensor) -> Tensor:
        per_side = int(self._parts**0.5)
        part = torch.arange(self._parts).view(per_side, per_side).repeat(*letters_BHW.shape[1:])
        return letters_BHW.repeat_interleave(per_side, 1).repeat_interleave(per_side, 2) * self._parts + part

    @torch.no_grad()
    def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
        """An empty sequence; ``guidance`` is that of ``Sampling``, ramped over the steps."""
        cells = condition.features["cells"]
        copies = 2 if guidance > 0 else 1
        size = (len(cells), self.config.coarse + self.config.fine, *self._schedule.grids[-1])
        if copies == 2:
            cells = torch.cat([cells, condition.null["cells"].expand(len(cells), -1, -1)])
        cache = self.transformer.new_cache()
        total = torch.zeros(size, device=cells.device)
        return DrawState(self._schedule, {"cells": cells}, {"total": total}, cache, copies, guidance)

    @torch.no_grad()
    def next_logits(self, state: DrawState) -> Tensor:
        """Logits of the next grid, [batch, tokens, classes], guided as the state asks."""
        step = state.step
        inputs = []
        if step > 0:
            now = resize_area(state.drawn["total"], self._schedule.grids[step])
            inputs = [now.repeat(state.copies, 1, 1, 1)]
        logits = self.logits(self.transformer(state.passes["cells"], inputs, range(step, step + 1), state.cache))
        if state.copies == 1:
            return logits
        t = state.guidance * self.guidance_ramp(self._schedule)[step]
        conditional, unconditional = logits.chunk(2)
        return conditional.mul_(1 + t).sub_(unconditional.mul_(t))

    @torch.no_grad()
    def advance(self, state: DrawState, actions: Tensor) -> None:
        """Consume the grid that was drawn, [batch, tokens of the step]; ``next_logits`` must have been called."""
        state.drawn["total"] = state.drawn["total"] + self.tokenizer.quantizer.contribution(actions, state.step)
        state.step += 1

    def features(self, condition: Condition, actions: Tensor, steps: range, cache: Cache | None) -> Tensor:
        """See ``TeacherForced``."""
        known = actions[:, : self._schedule.offsets[steps.stop - 1]]
        with torch.no_grad():
            maps = self.tokenizer.quantizer.accumulate(known, steps.stop)[1] if known.shape[1] else []
        return self.transformer(condition.features["cells"], maps[max(steps.start - 1, 0) :], steps, cache)

    def drawn(self, actions: Tensor, schedule: ScaleSchedule, steps: int) -> dict[str, Tensor]:
        """See ``TeacherForced``."""
        return {"total": self.tokenizer.quantizer.features(actions)}

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., width] -> [..., classes], in fp32."""
        return self.transformer.head(hidden).float()

    @torch.no_grad()
    def decode(self, actions: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Pictures [batch, 3, 48, 48] in [0, 1] from all steps, or from the first ones."""
        return self.tokenizer.decode(actions)

    @torch.no_grad()
    def encode(self, images: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """Actions [batch, tokens] of pictures [batch, 3, 48, 48] in [0, 1]."""
        return self.tokenizer.encode(images)


def build(config: dict[str, Any] | None) -> Inkling:
    """An Inkling with random weights, from a plain configuration."""
    return Inkling(InklingConfig(**(config or {})))
