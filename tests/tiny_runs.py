"""What tests of whole runs share: a tiny random checkpoint, cheap deterministic rewards, the commands' parsers."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.kills import noisy_brightness
from torch import Tensor

from patience import PATIENCE, wait_for
from varl.cli import COMMANDS, _parser
from varl.models.inkling import Inkling, InklingConfig, save
from varl.policy import Prompt
from varl.rewards import RewardOutput

SHAPE = {
    "grids": [1, 2, 3, 6, 12],
    "codes": 32,
    "coarse": 8,
    "fine": 4,
    "decoder": 8,
    "width": 32,
    "depth": 2,
    "heads": 2,
}
TINY = InklingConfig(**SHAPE)


def tiny_weights(path: Path, config: InklingConfig = TINY) -> Path:
    """Write a random policy whose draws and pictures vary."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = Inkling(config)
        policy.transformer.head.weight.data.mul_(20)
    save(policy, path)
    return path


def parse(command: str, *words: str) -> Any:
    """The configuration that a command is given, by its own parser."""
    parser = _parser(command, COMMANDS[command])
    parsed = parser.instantiate(parser.parse_args(words))
    config = COMMANDS[command].config
    return config(**{field.name: parsed[field.name] for field in fields(config)})


def score(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    """How much brighter the left half is, times the prompt's number of words; regions at the brightest pixels.

    A fifth of the pictures or so get no region, the others one to three: slanted, off the grid, partly outside.
    """
    width = images.shape[-1]
    brightness = images.mean(1)
    words = torch.tensor([len(p.words) for p in prompts])
    value = (brightness[:, :, : width // 2] - brightness[:, :, width // 2 :]).mean((1, 2)) * 20 * words
    regions = []
    for own in brightness.flatten(1):
        order = own.argsort(descending=True, stable=True).tolist()
        count = min(int(own.sum() * 30) % 5, 3)
        quad = np.array([[-7.3, -2.1], [6.2, -3.4], [7.9, 1.8], [-5.6, 4.05]], np.float32)
        regions.append([quad + np.array([i % width, i // width], np.float32) for i in order[:: width + 7][:count]])
    return RewardOutput(value, torch.zeros(len(images), dtype=torch.bool), regions, {"word_accuracy": value.sigmoid()})


def noisy(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    """``score`` with noise from torch's global generator."""
    output = score(images, prompts)
    output.score = output.score + 0.1 * torch.rand(len(images))
    return output


class Failing:
    """``score``, but the pictures of some calls fail.

    Args:
        raises: these calls raise (0 is the first).
        nans: in these calls the first picture has no number.
    """

    def __init__(self, raises: Sequence[int] = (), nans: Sequence[int] = ()) -> None:
        self.raises, self.nans, self.calls = raises, nans, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        call, self.calls = self.calls, self.calls + 1
        if call in self.raises:
            raise RuntimeError("the engine is gone")
        output = score(images, prompts)
        if call in self.nans:
            output.score[0] = torch.nan
        return output


def without_regions(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """The scores of ``noisy`` alone."""
    return noisy(images, prompts).score


def told_to_stop() -> bool:
    """Whether the run in this process has noted a signal."""
    interrupts = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(interrupts, "received", None) is not None


def awaiting(images: Tensor, prompts: Sequence[Prompt], folder: str, after: Sequence[int] = ()) -> Tensor:
    """The score of ``benchmarks.kills``; after these numbers of updates it is given only once a signal was noted.

    Args:
        folder: that of the run's folder; a file ``waits-N`` is made there before the wait.
    """
    metrics = Path(folder) / "run" / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    if done in after and not (marker := Path(folder) / f"waits-{done}").exists():
        marker.touch()
        wait_for(told_to_stop)
    return noisy_brightness(images, prompts)


def endless(images: Tensor, prompts: Sequence[Prompt], folder: str) -> RewardOutput:
    """Never comes back; makes a file ``called``, and ``noted`` once a signal was noted."""
    (Path(folder) / "called").touch()
    wait_for(told_to_stop)
    (Path(folder) / "noted").touch()
    time.sleep(2 * PATIENCE)
    return score(images, prompts)
