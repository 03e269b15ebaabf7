"""Runs of two processes whose reward fails on the second one alone, in another way each update."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import distributed_runs
import tiny_runs
from varl.policy import Prompt
from varl.rewards import RewardOutput
from varl.run.metrics import read_metrics
from varl.trainer import Trainer

WAYS = ["raises", "ends", "too few", "NaN", "no regions", "no parts", "other parts", "texts", "nothing", "empties"]
"""What the second process's reward does in each update; in every way but four all its pictures fail."""
FINE = {"no regions", "no parts", "other parts", "texts"}


class Ailing:
    """``tiny_runs.score`` with a text; from the second call on the second process's has something else each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> Any:
        call, self.calls = self.calls, self.calls + 1
        output = tiny_runs.score(images, prompts)
        output.texts = ["read"] * len(images)
        # The first call is the evaluation before the run, the last the one after it.
        ways = ["", *WAYS, "raises"]
        if os.environ.get("RANK") != "1" or call >= len(ways):
            return output
        return self.fail(ways[call], output, images, prompts)

    def fail(self, way: str, output: RewardOutput, images: Tensor, prompts: list[Prompt]) -> Any:
        if way == "raises":
            raise RuntimeError("the engine is gone")
        if way == "ends":
            raise SystemExit(0)
        if way == "empties":
            images.resize_(0)
            prompts.clear()
            raise RuntimeError("nothing is left")
        return {
            "too few": output.score[1:],
            "NaN": output.score * torch.nan,
            "no regions": replace(output, regions=None),
            "no parts": replace(output, parts={}),
            "other parts": replace(output, parts={"mine": output.score}),
            "texts": replace(output, texts=None),
            "nothing": None,
        }.get(way, output)


def unlike(images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
    """Regions from the first process, none at all from the second; from a process alone, as from the two together."""
    output = tiny_runs.score(images, prompts)
    quad = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], np.float32)
    half = len(images) // 2
    regions = {"0": [[quad] for _ in images], "1": None}
    output.regions = regions.get(os.environ.get("RANK", ""), [[quad]] * half + [[]] * (len(images) - half))
    return output


def ailing(folder: Path) -> dict[str, Any]:
    """In each mode: the metrics, the weights of this process, and what was evaluated."""
    return {mode: _ailing(folder, mode) for mode in ("ddp", "fsdp2")}


def _ailing(folder: Path, mode: str) -> dict[str, Any]:
    run = {"updates": len(WAYS), "ema": 0.0, "diagnose_every": 1, "gallery_every": 1, "max_failed_share": 1.0}
    made = replace(distributed_runs.config(folder, f"ailing-{mode}", mode, **run), reward="one_rank:Ailing")
    trainer = Trainer(made)
    trainer.run()
    state = nn.Module.state_dict(trainer.policy.trainable)
    return {
        "metrics": read_metrics(made.run.out),
        "weights": {name: trainer.distributed.whole(value) for name, value in state.items()},
        "files": sorted(path.name for path in (made.run.out / "evaluations").iterdir()),
    }


def regions_of_one(folder: Path) -> list[float]:
    """The masked shares of an update in which only the first process's reward gives regions."""
    run = {"updates": 1, "ema": 0.0}
    made = replace(distributed_runs.config(folder, "unlike", **run), reward="one_rank:unlike")
    trainer = Trainer(made)
    return trainer.step()["masked_share_by_step"]
