"""The contract of a reward: pictures and prompts in, scores and the regions that set them out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

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
            scored 0. If left out: those whose score is not finite.
        regions: per picture, the polygons of the picture that set its score, for mask propagation; an empty
            list means "none found". None if this reward has no notion of regions.
        parts: named terms of the score, each [B] float32, for the log.
        texts: per picture, what was read in it (for captions of the gallery); None if nothing is read.
    """

    score: Tensor
    failed: Tensor = None  # type: ignore[assignment]
    regions: list[list[Polygon]] | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] | None = None

    def __post_init__(self) -> None:
        if cast(Tensor | None, self.failed) is None:
            self.failed = ~torch.as_tensor(self.score).isfinite()

    @classmethod
    def from_scores(cls, scores: Tensor | Sequence[float], batch: int) -> RewardOutput:
        """Wrap a plain list or tensor of ``batch`` numbers; a non-finite one counts as failed.

        Raises:
            ValueError: if there are not exactly ``batch`` numbers, or they are complex.
        """
        score = torch.as_tensor(scores, dtype=torch.float32).detach().cpu()
        if torch.as_tensor(scores).is_complex():
            raise ValueError("a reward must return real numbers, got complex ones")
        if score.shape != (batch,):
            raise ValueError(
                f"a reward must return {batch} numbers for {batch} pictures, got shape {tuple(score.shape)}"
            )
        failed = ~torch.isfinite(score)
        return cls(score=score.masked_fill(failed, torch.nan), failed=failed)

    @classmethod
    def failed_like(cls, batch: int, like: RewardOutput | None = None) -> RewardOutput:
        """``batch`` failed pictures, with every field that ``like`` holds: parts NaN, no region, nothing read."""
        failed = cls(torch.full((batch,), torch.nan), torch.ones(batch, dtype=torch.bool))
        return failed if like is None else failed.holding(like)

    def holding(self, *others: RewardOutput) -> RewardOutput:
        """This output with every field that others hold too: where it has none, parts NaN, no region, nothing read."""
        batch, everyone = len(self.score), (self, *others)
        regions, texts = self.regions, self.texts
        if regions is None and any(one.regions is not None for one in others):
            regions = [[] for _ in range(batch)]
        if texts is None and any(one.texts is not None for one in others):
            texts = [""] * batch
        names = [name for one in everyone for name in one.parts]  # as keys below, each once, in the order met
        unknown = torch.full((batch,), torch.nan)
        return replace(self, regions=regions, parts={n: self.parts.get(n, unknown) for n in names}, texts=texts)

    @classmethod
    def joined(cls, outputs: Sequence[RewardOutput]) -> RewardOutput:
        """The outputs of parts of a batch, in order, as one, which holds every field that any of them holds.

        Raises:
            ValueError: if there is none.
        """
        if not outputs:
            raise ValueError("there is no output to join")
        outputs = [output.holding(*outputs) for output in outputs]
        names = outputs[0].parts
        return cls(
            torch.cat([output.score for output in outputs]),
            torch.cat([output.failed for output in outputs]),
            None if outputs[0].regions is None else [own for output in outputs for own in output.regions or []],
            {name: torch.cat([output.parts[name] for output in outputs]) for name in names},
            None if outputs[0].texts is None else [text for output in outputs for text in output.texts or []],
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

    def add(self, reason: str, pictures: int = 1, where: str = "") -> None:
        """Count pictures that failed for a reason; ``where`` it arose is for the warning."""
        reason = reason if len(reason) <= 500 else reason[:497] + "..."
        if reason not in self.reasons and len(self.reasons) >= self.most:
            reason = "other"
        if reason not in self.reasons:
            place = f" ({where})" if where else ""
            logger.warning("%s: pictures failed and are left out, not scored 0: %s%s", self.source, reason, place)
        self.total += pictures
        self.reasons[reason] = self.reasons.get(reason, 0) + pictures


class Reward(Protocol):
    """A reward: ``reward(images [B, 3, H, W] in [0, 1], prompts of length B) -> RewardOutput``.

    ``describe()`` names what made the scores (engine, model, version), for the run's record. A reward may have a
    ``check(prompts)``, which raises ValueError for prompts that it cannot score; it is called before work starts.
    """

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput: ...

    def describe(self) -> dict[str, str]: ...
