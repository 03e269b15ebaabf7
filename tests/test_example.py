"""examples/var_grpo.py gives the library's numbers, update by update."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiny_runs
from varl import Sampling, load_policy
from varl.algorithm import token_masks
from varl.config import (
    EvaluationConfig,
    MethodConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.prompts import inkling_prompts
from varl.rewards.python import PythonReward
from varl.schedule import ScaleSchedule
from varl.trainer import Trainer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("var_grpo", ROOT / "examples" / "var_grpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["var_grpo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library_config(settings: Any, weights: Path, out: Path, reward: Any) -> TrainConfig:
    """The library's configuration for the example's settings."""
    s = settings
    method = MethodConfig(
        prompts=s.prompts, group=s.group, continuations=s.continuations, middle=s.middle, eta=s.eta, alpha=s.alpha,
        prefix_updates=s.prefix_updates, suffix_updates=s.suffix_updates, clip=s.clip, beta=s.beta,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        s.learning_rate, s.warmup_from, s.warmup_updates, 1.0, s.betas, s.weight_decay, s.clip_norm
    )
    return TrainConfig(
        policy=PolicyConfig(weights=str(weights)),
        prompts=PromptConfig(count=11),
        reward=reward,
        sampling=Sampling(s.guidance, s.top_k, s.top_p),
        method=method,
        optimizer=optimizer,
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(out=out, seed=s.seed, device="cpu", gallery_every=0, diagnose_every=0),
    )


CASES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "guided-truncated": {"guidance": 1.5, "top_k": 12, "top_p": 0.9, "seed": 3, "alpha": 1.0},
    "failing-rewards": {"eta": 0.3, "beta": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_example_gives_the_librarys_numbers(example: ModuleType, tmp_path: Path, case: str) -> None:
    settings = replace(
        example.Settings(prompts=3, group=4, warmup_updates=2, prefix_updates=3, continuations=2), **CASES[case]
    )
    failures = {"raises": [1], "nans": [0, 3]} if case == "failing-rewards" else {}
    weights, updates = tiny_runs.tiny_weights(tmp_path / "tiny.safetensors"), 5

    trainer = Trainer(library_config(settings, weights, tmp_path / "run", {"name": "tiny_runs:Failing", **failures}))
    batches, outputs = [], []
    learn, judge = trainer.learner.learn, trainer.reward

    def noted(batch: Any, *rest: Any) -> dict[str, Any]:
        batches.append(batch)
        return learn(batch, *rest)

    def judged(*given: Any) -> Any:
        outputs.append(judge(*given))
        return outputs[-1]

    trainer.learner.learn, trainer.reward = noted, judged  # type: ignore[method-assign, assignment]
    records = [trainer.step() for _ in range(updates)]

    policy = load_policy("inkling", weights=weights)
    reward = PythonReward(tiny_runs.Failing(**failures))
    mine = list(example.train(policy, reward, inkling_prompts(11), settings, updates))

    assert [r["kind"] for r in mine] == ["prefix", "prefix", "prefix", "suffix", "prefix"]
    for own, record, batch, output in zip(mine, records, batches, outputs, strict=True):
        assert own["kind"] == record["kind"]
        torch.testing.assert_close(own["reward"], output.score, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(own["advantage"].flatten(), batch.advantage_B, rtol=0, atol=1e-6)
        assert own["dropped_groups"] / settings.prompts == pytest.approx(record["dropped_groups"])
        assert own["loss"] == pytest.approx(record["loss"], abs=1e-6)
        assert own["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-6, abs=1e-6)
    start, theirs = (
        load_policy("inkling", weights=weights).trainable.state_dict(),
        trainer.policy.trainable.state_dict(),
    )
    for name, value in policy.trainable.state_dict().items():
        torch.testing.assert_close(_felt(name, value), _felt(name, theirs[name]), rtol=0, atol=1e-6)
    assert max(float((theirs[name] - start[name]).abs().max()) for name in start) > 1e-4
    if failures:
        assert [r["dropped_groups"] for r in mine] == [1, 3, 0, 1, 0]
    else:
        assert any(0.01 < r["masked"] < 0.99 for r in mine)


def _felt(name: str, value: Tensor) -> Tensor:
    """Without the biases of keys: softmax cancels them, so their gradient is rounding, which Adam makes steps of."""
    return torch.cat([value[:32], value[64:]]) if name.endswith("qkv.bias") else value


def test_masks_of_any_polygon_are_the_librarys(example: ModuleType) -> None:
    schedule = ScaleSchedule.square((1, 2, 3, 5, 8), stride=4)
    rng = np.random.default_rng(0)
    drawn = [rng.uniform(-8, 40, (int(rng.integers(3, 6)), 2)).astype(np.float32) for _ in range(40)]
    # Taken around their middle, points make a polygon whose edges do not cross.
    wound = [p[np.argsort(np.arctan2(*(p - p.mean(0)).T))] for p in drawn]
    arrow = np.array([[2, 2], [30, 4], [20, 9], [30, 14]], np.float32)
    on_the_grid = np.array([[4, 4], [12, 4], [12, 8], [4, 8]], np.float32)
    line = np.array([[5, 5], [9, 9]], np.float32)
    lists = [[p] for p in [*wound, arrow, on_the_grid, line]] + [[], wound[:2], [on_the_grid, arrow]]
    expected = token_masks(lists, schedule.image_size, schedule)
    for polygons, mask in zip(lists, expected, strict=True):
        assert torch.equal(example.token_mask(polygons, schedule), mask)
    assert 0.1 < expected.mean() < 0.9


def test_its_settings_are_the_recipes(example: ModuleType) -> None:
    recipe = tiny_runs.parse("train", "--config", str(ROOT / "recipes" / "inkling-ocr.yaml"))
    settings = example.Settings()
    expected = library_config(settings, Path(), Path(), None)
    assert recipe.method == expected.method
    assert recipe.optimizer == expected.optimizer
    assert recipe.sampling == expected.sampling
    assert recipe.run.seed == settings.seed
    assert recipe.prompts == PromptConfig(count=2048)
    assert recipe.reward == {"name": "ocr", "engine": {"threads": 2}}
    assert settings.prompts * settings.group <= recipe.run.micro_batch


def test_its_command_leaves_weights_and_a_picture(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = tiny_runs.tiny_weights(tmp_path / "tiny.safetensors"), tmp_path / "out"
    monkeypatch.setattr(example, "OcrReward", lambda engine: tiny_runs.score)
    words = ["--updates", "2", "--weights", str(weights), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["var_grpo.py", *words])
    example.main()
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:2]] == [["1", "prefix"], ["2", "prefix"]]
    before, after = (load_policy("inkling", weights=w).state_dict() for w in (weights, out / "weights.safetensors"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"transformer"}
    with Image.open(out / "before_after.png") as picture:
        assert picture.size == (8 * 52 * 3, 2 * 52 * 3)
