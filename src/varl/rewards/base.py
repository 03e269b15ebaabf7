"""The contract of a reward: pictures and prompts in, scores and the regions that set them out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from varl.policy import Prompt

__all__ = ["FailureLog", "Polygon", "Reward", "RewardOutput"]

logger = logging.getLogger(__name__)

Polygon = np.ndarray
"""A polygon as float32 [points, 2] of (x, y) in pixels of the scored picture, origin at its top left
corner."""


@dataclass
class RewardOutput:
    """What a reward returns for a batch of B pictures.

    Attributes:
        score: [B] float32, any range; higher is better. NaN for failed pictures, so that nobody averages
            them in.
        failed: [B] bool; pictures that could not be scored. Their groups are dropped and counted, never
            scored 0.
        regions: per picture, the polygons of the picture that set its score, for mask propagation; an empty
            list means "none found". None if this reward has no notion of regions.
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
            raise ValueError(
                f"a reward must return {batch} numbers for {batch} pictures, got shape {tuple(score.shape)}"
            )
        failed = ~torch.isfinite(score)
        return cls(score=score.masked_fill(failed, torch.nan), failed=failed)

    def holding(self, parts: Sequence[str], regions: bool, texts: bool) -> RewardOutput:
        """The output with more fields, where it lacks them: parts that are NaN, no region found, no text read."""
        count = len(self.score)
        lacking = {name: torch.full((count,), torch.nan) for name in parts if name not in self.parts}
        return RewardOutput(
            self.score,
            self.failed,
            [[] for _ in range(count)] if regions and self.regions is None else self.regions,
            self.parts | lacking,
            [""] * count if texts and self.texts is None else self.texts,
        )

    @classmethod
    def joined(cls, outputs: Sequence[RewardOutput]) -> RewardOutput:
        """The outputs of parts of a batch, in order, as one."""
        regions = [output.regions for output in outputs if output.regions is not None]
        texts = [output.texts for output in outputs if output.texts is not None]
        return cls(
            torch.cat([output.score for output in outputs]),
            torch.cat([output.failed for output in outputs]),
            [region for part in regions for region in part] if len(regions) == len(outputs) else None,
            {name: torch.cat([output.parts[name] for output in outputs]) for name in outputs[0].parts},
            [text for part in texts for text in part] if len(texts) == len(outputs) else None,
        )


class FailureLog:
    """Counts why pictures could not be scored: warns once a reason, keeps a bounded number of reasons.

    Attributes:
        total: pictures that failed so far.
        reasons: how many failed for each reason; what comes after the first ``most`` reasons is counted as
            "other".
    """

    def __init__(self, source: str, most: int = 20) -> None:
        self.source, self.most = source, most
        self.total = 0
        self.reasons: dict[str, int] = {}

    def add(self, reason: str, pictures: int = 1) -> None:
        reason = reason if len(reason) <= 500 else reason[:497] + "..."
        if reason not in self.reasons and len(self.reasons) >= self.most:
            reason = "other"
        if reason not in self.reasons:
            logger.warning("%s: pictures failed and are left out, not scored 0: %s", self.source, reason)
        self.total += pictures
        self.reasons[reason] = self.reasons.get(reason, 0) + pictures


class Reward(Protocol):
    """A reward: ``reward(images [B, 3, H, W] in [0, 1], prompts of length B) -> RewardOutput``.

    ``describe()`` names what made the scores (engine, model, version), for the run's record.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput: ...

    def describe(self) -> dict[str, str]: ...
