"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_runs
from varl.models import load_policy

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path: Path) -> None:
    command = "pretrain" if "pretrain" in path.stem else "train"
    config = tiny_runs.parse(command, "--config", str(path))
    if command == "train":
        with torch.device("meta"):
            policy = load_policy(config.policy.family, config.policy.config, "random")
        schedule = policy.schedules(config.policy.resolution, config.policy.aspect_ratio)
        assert 0 < schedule.middle(config.method.middle) < len(schedule)
        assert config.sampling.top_k <= policy.classes


def test_there_are_recipes() -> None:
    assert {"inkling-ocr", "inkling-pretrain"} <= {path.stem for path in RECIPES}
