"""Rewards that end the process they are called in, if it is the second."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import tiny_runs
from varl.policy import Prompt
from varl.rewards import RewardOutput

__all__ = ["killing", "killing_once"]


def killing(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    """``score``, but the second process is killed."""
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return tiny_runs.score(images, prompts)


def killing_once(images: Tensor, prompts: Sequence[Prompt], marker: str) -> RewardOutput:
    """``killing``, unless the file ``marker`` is there; it then is."""
    if os.environ.get("RANK") == "1" and not Path(marker).exists():
        Path(marker).touch()
        return killing(images, prompts)
    return tiny_runs.score(images, prompts)


def __getattr__(name: str) -> object:
    """A reward that only the first process finds."""
    if name == "here_only" and os.environ.get("RANK") != "1":
        return tiny_runs.score
    raise AttributeError(name)
