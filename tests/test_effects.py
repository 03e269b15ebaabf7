"""Settings that change nothing beside the others of their recipe are refused, by name and all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from varl import cli
from varl.config import (
    AdapterConfig,
    EvaluationConfig,
    MaskConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from varl.effects import NoEffect
from varl.errors import InputError
from varl.sampling import Sampling

IDLE: dict[str, tuple[type, dict[str, Any], set[str]]] = {
    "full updates have no middle": (
        MethodConfig,
        {"update": "full", "middle": 3, "value_at": "grid:3", "continuations": 3, "value": "mean"},
        {"method.middle", "method.value_at", "method.continuations", "method.value"},
    ),
    "nor anything that asks for a reference": (
        MethodConfig,
        {"update": "full", "beta": 0, "value": "policy", "continuations_by": "policy"},
        {"method.value"},
    ),
    "suffixes have no value": (
        MethodConfig,
        {"update": "suffix", "eta": 0.5, "continuations_by": "reference"},
        {"method.eta", "method.continuations_by"},
    ),
    "prefixes have no suffix state": (
        MethodConfig,
        {"update": "prefix", "suffix_state": "independent", "prefix_gradient": False},
        {"method.suffix_state", "method.prefix_gradient"},
    ),
    "one kind does not alternate": (
        MethodConfig,
        {"update": "prefix", "prefix_updates": 9, "suffix_updates": 2},
        {"method.prefix_updates", "method.suffix_updates"},
    ),
    "one continuation is its reward": (
        MethodConfig,
        {"continuations": 1, "value": "max", "eta": 2.0, "mask": MaskConfig(merge="mean")},
        {"method.value", "method.eta"},
    ),
    "a mean has no temperature": (MethodConfig, {"value": "mean", "eta": 2.0}, {"method.eta"}),
    "no KL has no estimator": (
        MethodConfig,
        {"beta": 0, "kl": "exact", "zero_variance": "kl"},
        {"method.kl", "method.zero_variance"},
    ),
    "no KL has no mask": (MethodConfig, {"beta": 0, "mask": MaskConfig(kl=True)}, {"method.mask.kl"}),
    "one mask is not merged": (
        MethodConfig,
        {"update": "suffix", "mask": MaskConfig(merge="mean")},
        {"method.mask.merge"},
    ),
    "plain means count no tokens": (
        MethodConfig,
        {"alpha": 0, "rescale": False, "mask": MaskConfig(count="masked")},
        {"method.mask.count"},
    ),
    "one step per batch has no ratio": (
        MethodConfig,
        {"clip": 0.3, "ratio": "step"},
        {"method.clip", "method.ratio"},
    ),
    "no mask": (
        MaskConfig,
        {"enabled": False, "kl": True, "dilation": 2.0, "shape": "box"},
        {"method.mask.kl", "method.mask.dilation", "method.mask.shape"},
    ),
    "a warm-up does not go down": (
        OptimizerConfig,
        {"warmup_from": 1e-3, "learning_rate": 1e-4},
        {"optimizer.warmup_from"},
    ),
    "no warm-up": (OptimizerConfig, {"warmup_updates": 0, "warmup_from": 1e-7}, {"optimizer.warmup_from"}),
    "no adapters": (
        AdapterConfig,
        {"alpha": 8.0, "targets": ("qkv",)},
        {"policy.lora.alpha", "policy.lora.targets"},
    ),
    "no evaluation": (
        EvaluationConfig,
        {"enabled": False, "every": 5, "source": "held-out.jsonl", "alarm_stops": True},
        {"evaluation.every", "evaluation.alarm_stops"},
    ),
    "no alarm": (EvaluationConfig, {"alarm_window": 0, "alarm_stops": True}, {"evaluation.alarm_stops"}),
    "nothing is too much": (RunConfig, {"max_failed_share": 1.0, "failure_window": 3}, {"run.failure_window"}),
    "any failure is too much": (RunConfig, {"max_failed_share": 0.0, "failure_window": 3}, {"run.failure_window"}),
    "two evaluations are no window": (
        TrainConfig,
        {"evaluation": EvaluationConfig(alarm_window=4, alarm_stops=True)},
        {"evaluation.alarm_window", "evaluation.alarm_stops"},
    ),
    "nor are three": (
        TrainConfig,
        {"evaluation": EvaluationConfig(every=10, alarm_window=5), "run": RunConfig(updates=20)},
        {"evaluation.alarm_window"},
    ),
    "draws are the policy's own": (TrainConfig, {"method": MethodConfig(logp="sampling")}, {"method.logp"}),
    "no suffix": (
        TrainConfig,
        {
            "method": MethodConfig(update="prefix"),
            "optimizer": OptimizerConfig(suffix_scale=0.5, moments="segment"),
        },
        {"optimizer.suffix_scale", "optimizer.moments"},
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_setting_without_effect_is_refused(case: str) -> None:
    kind, settings, expected = IDLE[case]
    with pytest.raises(NoEffect, match="has no effect") as error:
        kind(**settings)
    assert set(error.value.defaults) == expected
    for name in expected:
        assert name in str(error.value)


@pytest.mark.parametrize("case", IDLE)
def test_at_its_default_it_is_not(case: str) -> None:
    """The settings that the others make idle are the only ones that were wrong."""
    kind, settings, expected = IDLE[case]
    idle = {name.rpartition(".")[2] for name in expected}
    mended = {name: value for name, value in settings.items() if name not in idle}
    sections = {"mask": MaskConfig, "method": MethodConfig, "optimizer": OptimizerConfig}
    sections |= {"evaluation": EvaluationConfig}
    for name in mended.keys() & sections.keys():
        mended[name] = sections[name]()
    kind(**mended)


def test_what_is_said() -> None:
    with pytest.raises(
        NoEffect,
        match=r"method\.value_at grid:3 has no effect with method\.update full; leave it out, or set it to its "
        "default, end",
    ):
        MethodConfig(update="full", value_at="grid:3")


def test_the_scale_of_suffix_updates_needs_moments_of_their_own() -> None:
    scaled = OptimizerConfig(suffix_scale=0.1)
    with pytest.raises(ValueError, match=r"suffix_scale 0.1 needs optimizer.moments segment"):
        TrainConfig(optimizer=scaled)
    TrainConfig(optimizer=OptimizerConfig(suffix_scale=0.1, moments="segment"))
    TrainConfig(optimizer=scaled, method=MethodConfig(update="suffix"))


def test_values_that_have_no_limit() -> None:
    with pytest.raises(ValueError, match=r"method\.value policy needs a finite method\.eta"):
        MethodConfig(value="policy", eta=float("inf"))
    with pytest.raises(ValueError, match=r"method\.value soft-reference needs a finite method\.eta here"):
        MethodConfig(value="soft-reference", eta=float("inf"), continuations=1)
    MethodConfig(value="soft-reference", eta=float("inf"))
    MethodConfig(value="soft", eta=float("inf"))


@pytest.mark.parametrize(("value", "same"), [("policy", "mean"), ("soft-reference", "max")])
@pytest.mark.parametrize("continuations", [1, 2])
def test_an_estimator_that_would_be_another_is_refused(value: Any, same: str, continuations: int) -> None:
    with pytest.raises(ValueError, match=f"method.value {value} with method.eta 0 is method.value {same}"):
        MethodConfig(value=value, eta=0, continuations=continuations)
    MethodConfig(value=value, eta=1e-9, continuations=continuations)


def test_log_probabilities_that_are_all_0_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.logp sampling needs a sampling\.top_k other than 1"):
        TrainConfig(method=MethodConfig(logp="sampling"), sampling=Sampling(top_k=1))
    TrainConfig(sampling=Sampling(top_k=1))
    TrainConfig(method=MethodConfig(logp="sampling"), sampling=Sampling(top_k=2))


def test_as_many_evaluations_as_the_alarm_looks_at_are_enough() -> None:
    TrainConfig(evaluation=EvaluationConfig(alarm_window=2, alarm_stops=True))
    for every, updates in ((10, 21), (10, 30), (1, 2)):
        TrainConfig(evaluation=EvaluationConfig(every=every, alarm_stops=True), run=RunConfig(updates=updates))


RECIPE = """
method: {prefix_updates: 9, middle: grid:6, continuations: 3, value: mean, mask: {merge: mean}}
optimizer: {moments: segment, suffix_scale: 0.5}
"""


def read(tmp_path: Path, recipe: str, *words: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    return cli._settings("train", cli.COMMANDS["train"], [str(path), *words])


def test_what_the_command_line_makes_idle_in_a_recipe_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or nobody could try another update on a recipe without writing it anew."""
    found = read(tmp_path, RECIPE, "--method.update", "full")
    assert found.method == MethodConfig(update="full")
    assert found.optimizer == OptimizerConfig()
    said = capsys.readouterr().err
    for name in ("prefix_updates", "middle", "continuations", "value", "mask.merge"):
        assert f"method.{name} of the recipe has no effect beside --method.update full" in said
    assert "optimizer.suffix_scale of the recipe" in said


@pytest.mark.parametrize(
    ("recipe", "words", "named"),
    [
        (RECIPE, ["--method.update", "full", "--method.value_at", "grid:3"], "method.value_at grid:3"),
        (RECIPE, ["--method.mask.enabled=false", "--method.mask.kl=true"], "method.mask.kl true"),
        ("method: {update: full, middle: 3}", ["--run.seed", "3"], "method.middle 3"),
        ("method: {update: full, middle: 3}", [], "method.middle 3"),
    ],
)
def test_what_was_named_with_it_is_refused(tmp_path: Path, recipe: str, words: list[str], named: str) -> None:
    with pytest.raises(InputError, match=f"{named} has no effect"):
        read(tmp_path, recipe, *words)
