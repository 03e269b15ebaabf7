"""Scoring the pictures of an update: all at once when they are there, or while the next ones are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from varl.policy import Prompt
from varl.rewards.base import Reward, RewardOutput

__all__ = ["Scoring"]


class Scoring:
    """The pictures of one update on their way to their scores.

    Args:
        reward: called with all pictures at once; with a pool, with each part that is added, in order.
        prompts: one a picture, in the order of the pictures.
        pool: a pool of one thread, in which the reward works while the caller goes on.
    """

    def __init__(self, reward: Reward, prompts: Sequence[Prompt], pool: ThreadPoolExecutor | None = None) -> None:
        self.reward, self.prompts, self.pool = reward, prompts, pool
        self._parts: list[Tensor] = []
        self._scores: list[Future[RewardOutput]] = []

    def add(self, images: Tensor) -> None:
        """The next finished pictures, [batch, 3, H, W]."""
        if self.pool is not None:
            start = sum(map(len, self._parts))
            shown = self.prompts[start : start + len(images)]
            self._scores.append(self.pool.submit(self.reward, images, shown))
        self._parts.append(images)

    def result(self) -> tuple[Tensor, RewardOutput]:
        """All pictures and their scores; what the reward raised is raised here."""
        images = torch.cat(self._parts)
        if self.pool is None:
            return images, self.reward(images, self.prompts)
        return images, RewardOutput.joined([score.result() for score in self._scores])
