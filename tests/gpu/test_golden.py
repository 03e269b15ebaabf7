"""The reference vectors of ``tests/golden`` on the device: the tests of every family, with all tensors moved there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpu.measuring import Report
from models import test_units as units
from models.infinity import cases as infinity_cases
from models.infinity import test_vectors as infinity
from models.switti import test_vectors as switti
from models.tokenflow import cases as tokenflow_cases
from models.tokenflow import test_vectors as tokenflow
from models.var import test_vectors as var
from vectors import GOLDEN

MORE = 4.0
"""What the tests allow is for a CPU's ways of adding up; another device's may differ by so many times that."""
Calls = dict[str, Callable[[Any], None]]
"""A name, and what is to be called with a case."""


def moved(value: Any, device: torch.device) -> Any:
    """Tensors and modules on the device, also those in mappings."""
    if isinstance(value, Tensor | nn.Module):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(one, device) for key, one in value.items()}
    return value


@pytest.fixture(autouse=True)
def _compared_here(monkeypatch: pytest.MonkeyPatch, report: Report, request: pytest.FixtureRequest) -> None:
    """Tests compare with numbers of another device, allow ``MORE``, and note the largest difference."""
    name, worst = f"golden: {request.node.name.removeprefix('test_')}", [0.0]

    def away(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return float((found.detach().cpu().double() - expected.detach().cpu().double()).abs().max())

    def close(found: Tensor, expected: Tensor, *, atol: float, **_: Any) -> None:
        worst[0] = max(worst[0], away(found, expected))
        report.within(name, worst[0], MORE * atol)

    def difference(found: Tensor, expected: Tensor) -> float:
        measured = away(found, expected)
        worst[0] = max(worst[0], measured if measured < 1e-3 else 0.0)
        report.measured[name] = worst[0], 1e-3
        return measured / (MORE if measured < 1e-3 else 1)

    monkeypatch.setattr(torch.testing, "assert_close", close)
    monkeypatch.setattr(infinity, "difference", difference)


VAR: Calls = {
    "forced": var.test_teacher_forced_logits,
    "cached": lambda case: var.test_cached_logits(case, 0, "0", var.LOGITS),
    "guided": lambda case: var.test_cached_logits(case, 1.5, "1p5", var.GUIDED),
    "strongly guided": lambda case: var.test_cached_logits(case, 4, "4", var.STRONGLY),
    "greedy": lambda case: var.test_greedy_generation(case, 1.5, "1p5"),
    "strongly greedy": lambda case: var.test_greedy_generation(case, 4.0, "4"),
    "features": var.test_tokens_to_features,
    "gradients": var.test_loss_and_gradients,
}


@pytest.fixture(scope="module", params=["var_small", "var_nol2"])
def var_case(request: pytest.FixtureRequest, device: torch.device) -> var.Case:
    case = var.Case(GOLDEN / "var" / request.param)
    case.policy, case.tensors = moved(case.policy, device), moved(case.tensors, device)
    case.condition = case.policy.condition([var.Prompt(label=int(label)) for label in case.tensors["labels"]])
    case.actions = case.joined("idx")
    return case


@pytest.mark.parametrize("name", VAR)
def test_var(var_case: var.Case, name: str) -> None:
    VAR[name](var_case)


SWITTI: Calls = {
    "forced": switti.test_teacher_forced_logits,
    "guided": switti.test_guided_logits,
    "greedy": switti.test_greedy_generation,
    "unconditional": switti.test_unconditional_rows,
}


@pytest.fixture(scope="module")
def switti_case(device: torch.device) -> switti.Case:
    case = switti.Case(GOLDEN / "switti" / "switti_ar_rope_swiglu_crop")
    load = case.load
    case.load = lambda **options: moved(load(**options), device)  # type: ignore[method-assign]
    case.policy, case.tensors, case.features = (moved(x, device) for x in (case.policy, case.tensors, case.features))
    case.condition, case.actions = case.policy.condition_from(case.features), case.joined("tf.idx")
    return case


@pytest.mark.parametrize("name", SWITTI)
def test_switti(switti_case: switti.Case, name: str) -> None:
    SWITTI[name](switti_case)


INFINITY: Calls = {
    "positions": infinity.test_positions,
    "maps": infinity.test_maps,
    "forced": infinity.test_teacher_forced_logits,
    "rounded": infinity.test_cross_attention_rounded_as_upstream_rounds_it,
    "cached": infinity.test_cached_logits,
    "guided": infinity.test_guidance_by_the_contract,
    "greedy": lambda case: infinity.test_greedy_bits(case, "cfg1_tau1", 1),
    "guided greedy": lambda case: infinity.test_greedy_bits(case, "cfg3_tau1", 3),
    "labels": infinity.test_labels_of_features,
    "gradients": infinity.test_losses_and_gradients,
}


@pytest.fixture(scope="module")
def infinity_case(device: torch.device) -> infinity_cases.Case:
    case = infinity_cases.Case(infinity_cases.GOLDEN)
    load = case.load
    case.load = lambda **options: moved(load(**options), device)  # type: ignore[method-assign]
    vars(case).update(inputs=moved(case.inputs, device), expected=moved(case.expected, device))
    return case


@pytest.mark.parametrize("name", INFINITY)
def test_infinity(infinity_case: infinity_cases.Case, name: str) -> None:
    INFINITY[name](infinity_case)


TOKENFLOW: Calls = {
    "features": tokenflow.test_features_of_drawn_grids,
    "forced": tokenflow.test_teacher_forced_logits,
    "guided": tokenflow.test_guided_logits_from_the_cache,
    "greedy": lambda case: tokenflow.test_greedy_generation(case, "greedy"),
    "refined": lambda case: tokenflow.test_greedy_generation(case, "greedy_loop2"),
}


def tokenflow_case(name: str, device: torch.device) -> tokenflow_cases.Case:
    case = tokenflow_cases.Case(tokenflow_cases.GOLDEN / name)
    vars(case).update(tensors=moved(case.tensors, device))
    return case


@pytest.fixture(scope="module")
def tokenflow_lm(device: torch.device) -> tuple[tokenflow_cases.Case, Any]:
    """The case, and its policy on the device."""
    case = tokenflow_case("tokenflow_lm", device)
    return case, moved(tokenflow_cases.new_policy(case), device)


@pytest.mark.parametrize("name", TOKENFLOW)
def test_tokenflow(tokenflow_lm: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, policy = tokenflow_lm
    monkeypatch.setattr(tokenflow, "lm_policy", lambda _: policy)
    TOKENFLOW[name](case)


def test_tokenflows_tokenizer(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tokenflow.Tokenizer
    monkeypatch.setattr(tokenflow, "Tokenizer", lambda config: moved(make(config), device))
    tokenflow.test_tokenizer(tokenflow_case("tokenflow_tokenizer", device))


def test_resizing(device: torch.device) -> None:
    tensors = moved(load_file(Path(GOLDEN) / "units" / "units.safetensors"), device)
    for side in (1, 2, 3, 5, 6, 10, 13):
        units.test_area(tensors, side)
    for side in (1, 2, 3, 5, 6, 13):
        units.test_bicubic(tensors, side)
