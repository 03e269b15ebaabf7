"""The arithmetic of the results report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from benchmarks.communication import policy_on_meta, sent, size_of
from benchmarks.curves import Curve, interval, level_at, load, mean_over, reaching, read_curve
from benchmarks.noise import signal_share
from benchmarks.results import ALL, METHODS, RECIPE
from benchmarks.scale import count_flips

from varl import load_policy
from varl.config import MethodConfig, ParallelConfig, PolicyConfig, RunConfig, TrainConfig
from varl.effects import NoEffect
from varl.updates import kind_of_update, plan


def test_budgets_are_equal_in_pictures():
    for method in METHODS.values():
        assert method.updates_for(4 * 7 * 32) * method.pictures / method.updates == 4 * 7 * 32


@pytest.mark.parametrize("name", ALL)
def test_the_pictures_of_a_method_are_those_that_its_updates_score(name: str):
    recipe = yaml.safe_load((Path(__file__).parents[1] / RECIPE).read_text())["method"]
    changes = {
        key.removeprefix("method."): value
        for key, value in ALL[name].overrides.items()
        if key.startswith("method.") and key != "method.mask.enabled"
    }
    given = {**recipe, **changes}
    try:
        method = MethodConfig(**given)
    except NoEffect as error:  # the command line leaves out what its words make idle in the recipe
        method = MethodConfig(**{k: v for k, v in given.items() if f"method.{k}" not in error.defaults})
    schedule = load_policy("inkling").default_schedule
    # A cycle of prefix and suffix updates, or as many of one kind as the recipe's cycle has.
    cycle = method.prefix_updates + method.suffix_updates
    plans = [plan(kind_of_update(method, update), method, schedule) for update in range(cycle)]
    scored = sum(method.prompts * one.pictures for one in plans if not one.reuses)
    assert scored / cycle == ALL[name].pictures / ALL[name].updates


def test_interval_is_students_t():
    mean, half = interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert mean == 3.0
    assert half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=2e-3)


@pytest.mark.parametrize(
    ("level", "expected"), [(0.4, 0.0), (0.5, 10.0), (0.55, 15.0), (0.65, 25.0), (0.9, float("inf"))]
)
def test_reaching_interpolates_the_first_crossing(level: float, expected: float):
    assert reaching(np.array([0.0, 10, 20, 30]), np.array([0.4, 0.5, 0.6, 0.7]), level) == pytest.approx(expected)


def test_the_level_is_the_mean_of_the_last_three_within_the_budget():
    x, accuracy = np.array([0.0, 10, 20, 30, 40]), np.array([0.1, 0.2, 0.3, 0.7, 0.9])
    assert level_at(x, accuracy, 30.0) == pytest.approx(0.4)
    assert level_at(x, accuracy, 39.0) == pytest.approx(0.4)
    assert level_at(x, accuracy, 40.0) == pytest.approx(1.9 / 3)


def test_the_mean_over_a_budget_is_the_area_under_the_curve():
    x, accuracy = np.array([0.0, 10, 20]), np.array([0.2, 0.6, 0.6])
    assert mean_over(x, accuracy, 10.0) == pytest.approx(0.4)
    assert mean_over(x, accuracy, 20.0) == pytest.approx(0.5, abs=1e-3)
    assert mean_over(x, accuracy, 99.0) == pytest.approx(0.5, abs=1e-3)


def test_a_curve_counts_updates_by_kind(tmp_path: Path):
    kinds = ["prefix", "prefix", "suffix", "prefix"]
    lines = [{"update": u, "kind": kind} for u, kind in enumerate(kinds, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "evaluations").mkdir()
    for update, accuracy in ((0, 0.3), (2, 0.5), (4, 0.6)):
        record = {
            "update": update,
            "training_pictures": 32 * update,
            "metrics": {"word_accuracy": {"value": accuracy}},
        }
        (tmp_path / "evaluations" / f"update-{update:06d}.json").write_text(json.dumps(record))
    curve = read_curve(tmp_path)
    assert curve.pictures.tolist() == [0, 64, 128]
    assert curve.updates == [{}, {"prefix": 2}, {"prefix": 3, "suffix": 1}]
    assert curve.seconds({"prefix": 1.5, "suffix": 4.0}).tolist() == [0.0, 3.0, 8.5]
    assert curve.accuracy.tolist() == [0.3, 0.5, 0.6]


def kept(data: Path, name: str, seed: int, base: str = "b") -> None:
    run = {"pictures": [0, 32], "updates": [{}, {"full": 1}], "accuracy": [0.1, 0.2], "budget": 32, "base": base}
    (data / f"{name}-{seed}.json").write_text(json.dumps(run))


def test_only_seeds_that_every_method_has_are_compared(tmp_path: Path):
    for name, seed in (("a", 0), ("a", 1), ("a", 2), ("b", 2), ("b", 0)):
        kept(tmp_path, name, seed)
    curves = load(tmp_path, ["a", "b", "not run"])
    assert {name: len(runs) for name, runs in curves.items()} == {"a": 2, "b": 2}
    assert isinstance(curves["a"][0], Curve)
    kept(tmp_path, "b", 1, base="another")
    with pytest.raises(SystemExit, match="differ in base or budget"):
        load(tmp_path, ["a", "b"])


def test_the_share_of_signal_is_found():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator, dtype=torch.double)
    noise = 3 * torch.randn(4000, 50, generator=generator, dtype=torch.double)
    g = mean + noise
    true = float(mean.square().sum() / (mean.square().sum() + 9 * 50))
    share, error = signal_share(g @ g.T)
    assert share == pytest.approx(true, abs=0.01)
    assert 0 < error < 0.01
    assert abs(signal_share(noise @ noise.T)[0]) < 0.001


def test_flips_are_counted_once_and_not_after_the_first():
    differ = torch.zeros(6, 5, dtype=torch.bool)
    differ[0, 1] = differ[1, 1] = differ[0, 3] = True  # the prefix of both, drawn once
    differ[3, 3] = differ[3, 4] = True
    # Prefixes of 2 tokens: 2 + 2 + 2 draws, one flipped; then 2 of the fourth row, flipped, and 3 of rows 2, 4, 5.
    assert count_flips(differ, tails=2, prefix=2) == (6 + 2 + 9, 2)
    assert count_flips(torch.zeros(4, 5, dtype=torch.bool), tails=1, prefix=5) == (20, 0)


def test_a_large_models_communication_is_counted_on_the_meta_device():
    config = TrainConfig(
        policy=PolicyConfig("var", config={"size": "d16"}, precision="bfloat16"),
        method=MethodConfig(prompts=16, group=16, middle="grid:8"),
        run=RunConfig(micro_batch=4),
    )
    policy = policy_on_meta(config)
    size, schedule = size_of(policy), policy.default_schedule
    assert size.all == size.trained == 310_283_520
    assert size.blocks == 16 * size.last
    assert sent(config, "prefix", size, schedule, 8).per_process(8) == 2 * 4 * size.all * 7 / 8
    halved = replace(config, parallel=ParallelConfig("fsdp2", "bfloat16"))
    found = sent(halved, "prefix", size, schedule, 64)
    root = 4 * (size.all - size.blocks)
    assert found.gathered_to_draw == root + 2 * size.blocks
    assert found.gathered_to_learn == root + 4 * size.blocks
    assert found.reduce_scattered == 4 * size.all
    with pytest.raises(ValueError, match="7 processes cannot share 256 sequences equally"):
        sent(halved, "prefix", size, schedule, 7)
