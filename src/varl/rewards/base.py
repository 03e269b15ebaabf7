"""The contract of a reward: pictures and prompts in, scores and the regions that set them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varl.policy import Prompt

__all__ = ["Polygon", "Reward", "RewardOutput"]

Polygon = np.ndarray
"""A polygon as float32 [points, 2] of (x, y) in pixels of the scored picture, origin at its top left corner."""


@dataclass
class RewardOutput:
    """What a reward returns for a batch of B pictures.

    Attributes:
        score: [B] float32, any range; higher is better. Entries of failed pictures are ignored.
        failed: [B] bool; pictures that could not be scored. Their groups are dropped and counted, never scored 0.
        regions: per picture, the polygons of the picture that set its score, for mask propagation; an empty list
            means "none found". None if this reward has no notion of regions.
        parts: named terms of the score, each [B] float32, for the log.
        texts: per picture, what was read in it (for captions of the gallery); None if nothing is read.
    """

    score: Tensor
    failed: Tensor
    regions: list[list[Polygon]] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] | None = None

    @classmethod
    def from_scores(cls, scores: Tensor | Sequence[float], batch: int) -> RewardOutput:
        """Wrap a plain list or tensor of ``batch`` numbers; a non-finite one counts as failed.

        Raises:
            ValueError: if there are not exactly ``batch`` numbers.
        """
        score = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
        if score.shape != (batch,):
            raise ValueError(f"a reward must return {batch} numbers for {batch} pictures, got shape {tuple(score.shape)}")
        return cls(score=score, failed=~torch.isfinite(score))


class Reward(Protocol):
    """A reward: ``reward(images [B, 3, H, W] in [0, 1], prompts of length B) -> RewardOutput``.

    ``describe()`` names what made the scores (engine, model, version), for the run's record.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput: ...

    def describe(self) -> dict[str, str]: ...
