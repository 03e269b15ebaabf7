import math
from typing import Any

import pytest

from varl.config import (
    AdapterConfig,
    EvaluationConfig,
    MaskConfig,
    MethodConfig,
    OptimizerConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)


def test_the_papers_defaults() -> None:
    """method.md, sections 3, 5, 7 and 8."""
    method = MethodConfig()
    assert (method.update, method.prefix_updates, method.suffix_updates) == ("alternate", 3, 1)
    assert (method.middle, method.value, method.eta, method.continuations) == ("quarter", "soft", 1, 2)
    assert (method.alpha, method.rescale, method.clip, method.epochs) == (0.6, True, 0.2, 1)
    assert (method.beta, method.kl, method.ratio, method.logp) == (0.01, "k3", "token", "policy")
    assert (method.advantage, method.suffix_state) == ("std", "shared")
    mask = MaskConfig()
    assert (mask.enabled, mask.propagation, mask.empty, mask.merge) == (True, "sequential", "ones", "union")
    assert (mask.coverage, mask.shape, mask.dilation, mask.count, mask.kl) == ("overlap", "polygon", 0, "grid", False)
    optimizer = OptimizerConfig()
    assert (optimizer.warmup_from, optimizer.learning_rate, optimizer.warmup_updates) == (1e-6, 1e-5, 20)
    assert (optimizer.betas, optimizer.weight_decay) == ((0.9, 0.95), 0.05)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (PromptConfig, {"count": 0}),
        (MethodConfig, {"prompts": 0}),
        (MethodConfig, {"group": 1}),
        (MethodConfig, {"continuations": 0}),
        (MethodConfig, {"epochs": 0}),
        (MethodConfig, {"prefix_updates": 0}),
        (MethodConfig, {"suffix_updates": -1}),
        (MethodConfig, {"eta": -1.0}),
        (MethodConfig, {"eta": math.nan}),
        (MethodConfig, {"beta": -0.1}),
        (MethodConfig, {"beta": math.nan}),
        (MethodConfig, {"clip": 0.0}),
        (OptimizerConfig, {"learning_rate": 0.0}),
        (OptimizerConfig, {"learning_rate": math.inf}),
        (OptimizerConfig, {"suffix_scale": -1.0}),
        (OptimizerConfig, {"warmup_from": -1e-6}),
        (OptimizerConfig, {"weight_decay": -0.1}),
        (OptimizerConfig, {"betas": (0.9, 1.0)}),
        (MethodConfig, {"beta": math.inf}),
        (OptimizerConfig, {"clip_norm": 0.0}),
        (OptimizerConfig, {"warmup_updates": -1}),
        (PromptConfig, {"seed": -1}),
        (MaskConfig, {"dilation": -1.0}),
        (MethodConfig, {"alpha": math.inf}),
        (EvaluationConfig, {"count": 0}),
        (EvaluationConfig, {"seed": -1}),
        (EvaluationConfig, {"every": -1}),
        (RunConfig, {"seed": -1}),
        (RunConfig, {"threads": -1}),
        (RunConfig, {"updates": 0}),
        (RunConfig, {"micro_batch": 0}),
        (RunConfig, {"save_every": 0}),
        (RunConfig, {"keep": 0}),
        *((MethodConfig, {name: 10**12}) for name in ("prompts", "group", "continuations", "epochs", "prefix_updates")),
        (MethodConfig, {"suffix_updates": 10**12}),
        *((RunConfig, {name: 10**20}) for name in ("updates", "save_every", "keep", "failure_window", "micro_batch")),
        *((RunConfig, {name: 10**20}) for name in ("rollout_batch", "gallery_every", "diagnose_every")),
        (EvaluationConfig, {"every": 10**20}),
        (OptimizerConfig, {"warmup_updates": 10**20}),
        (AdapterConfig, {"rank": 10**20}),
    ],
)
def test_impossible_values(config: type, options: dict[str, float]) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"\.{name} must be"):
        config(**options)


def test_an_update_of_too_many_pictures() -> None:
    assert MethodConfig(prompts=10, group=10**4, continuations=10).group == 10**4
    with pytest.raises(ValueError, match=r"continuations of method must be at most 1000000 pictures, got 4000000"):
        MethodConfig(prompts=4, group=10**5, continuations=10)


def test_when_a_reference_is_held() -> None:
    assert MethodConfig().needs_reference
    assert not MethodConfig(beta=0).needs_reference
    assert MethodConfig(beta=0, value="soft-reference").needs_reference
    assert MethodConfig(beta=0, value="policy").needs_reference
    assert MethodConfig(beta=0, continuations_by="reference").needs_reference


@pytest.mark.parametrize("value", ["soft-reference", "policy"])
def test_estimators_of_the_policys_own_continuations(value: str) -> None:
    with pytest.raises(ValueError, match="continuations_by"):
        MethodConfig(value=value, continuations_by="reference")


def test_configurations_are_values() -> None:
    assert TrainConfig() == TrainConfig()
    assert MethodConfig(alpha=0.6) != MethodConfig(alpha=0.7)
    with pytest.raises(AttributeError):
        MethodConfig().alpha = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("micro", "rollout", "expected"), [(32, 0, 32), (32, 2, 2), (1, 8, 1), (4, 0, 4), ("auto", 0, 32), ("auto", 2, 2)]
)
def test_an_evaluation_draws_no_more_at_once_than_training(micro: Any, rollout: int, expected: int) -> None:
    assert RunConfig(micro_batch=micro, rollout_batch=rollout).picture_batch == expected
