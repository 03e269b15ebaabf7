"""One process of DDP and of FSDP2: NCCL on a GPU, gloo in the rehearsal; as the run of a process that is alone."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.lone import MODES, RESUMED
from gpu.measuring import Report, difference

SHARED = [name for name in MODES if not name.startswith("alone")]
FIGURES = ("loss", "gradient_norm", "return", "advantage_abs", "kl_by_step", "gradient_norm_by_step")


@pytest.fixture(scope="module")
def found(lone: Future[list[dict[str, Any]]]) -> dict[str, Any]:
    """What every mode's run left."""
    return lone.result()[0]


def alone(name: str) -> str:
    """The mode of the same settings without other processes."""
    return next((f"alone, {kind}" for kind in ("bf16", "adapters") if kind in name), "alone")


def weights_away(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(difference(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", SHARED)
def test_a_run_is_that_of_a_process_alone(name: str, found: dict[str, Any], report: Report) -> None:
    own, expected = found[name], found[alone(name)]
    half = "bf16" in name
    assert [line["update"] for line in own["lines"]] == [1, 2, 3]
    assert all(line["not_finite"] == 0 and line["skipped"] == 0 for line in own["lines"])
    first, wanted = own["lines"][0], expected["lines"][0]
    for key in FIGURES:
        assert (key in first) == (key in wanted)
        if key in first:
            one, other = (torch.tensor(line[key], dtype=torch.double) for line in (first, wanted))
            report.near(f"{name}: {key}", one, other, 0.3 if half else 1e-3)
    # What follows the first update may be drawn otherwise where a draw flips; without that it is the same.
    if not half and all(a["return"] == pytest.approx(b["return"], rel=1e-4) for a, b in lines(own, expected)):
        report.within(f"{name}: weights", weights_away(own["weights"], expected["weights"]), 2e-2)


def lines(own: dict[str, Any], expected: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return list(zip(own["lines"], expected["lines"], strict=True))


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_run_goes_on(name: str, found: dict[str, Any], report: Report) -> None:
    own, expected = found[f"{name}, resumed"], found[name]
    assert [line["update"] for line in own["lines"]] == [1, 2, 3]
    flipped = [a["return"] != pytest.approx(b["return"], rel=1e-4) for a, b in lines(own, expected)]
    report.facts[f"updates drawn otherwise after a stop, {name}"] = sum(flipped)
    if not any(flipped):
        allowed = 5e-2 if "bf16" in name else 2e-2
        report.within(f"{name}: weights after a stop", weights_away(own["weights"], expected["weights"]), allowed)
    assert not any(flipped[:2])


def test_collectives_are_made_where_the_tensors_are(
    found: dict[str, Any], device: torch.device, report: Report
) -> None:
    report.facts["backend"] = found["backend"]
    assert ("nccl" if device.type == "cuda" else "gloo") in found["backend"]
    sent = found["ddp"]["sent"]
    report.facts["collectives of ddp"] = sent
    for name in ("broadcast", "all_reduce"):
        assert sent[f"{name} on {device.type}"] > 0
    assert sent["all_gather on cpu"] > 0
    assert found["alone"]["sent"] == {}
