"""A reward that fails on one process alone: the others wait for nothing, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import one_rank
import processes
import tiny_runs
from varl.distributed import Distributed
from varl.rewards import RewardOutput

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs")
    tiny_runs.tiny_weights(made / "tiny.safetensors")
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return processes.run(2, "one_rank.ailing", folder)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_every_way_of_failing_on_one_process_costs_its_pictures(found: list[dict[str, Any]], mode: str) -> None:
    lines = found[0][mode]["metrics"]
    assert len(lines) == len(one_rank.WAYS)
    for way, line in zip(one_rank.WAYS, lines, strict=True):
        pictures = 12 if line["kind"] == "suffix" else 24
        assert line["failed_pictures"] == (0 if way in one_rank.FINE else pictures // 2), way
        # The second process has the second half of the second of three groups, and the third.
        assert line["dropped_groups"] == pytest.approx(0 if way in one_rank.FINE else 2 / 3), way
        assert line["skipped"] == 0, way
        # The first process's regions are known in every update, so masks are on in all of them.
        assert len(line["masked_share_by_step"]) == len(line["gradient_norm_by_step"]), way
    assert lines[one_rank.WAYS.index("other parts")]["reward"].keys() == {"score", "word_accuracy", "mine"}
    assert found[0][mode]["files"] == [
        "update-000000.json",
        "update-000000.pt",
        "update-000010.json",
        "update-000010.pt",
    ]


def test_ddp_keeps_the_processes_equal(found: list[dict[str, Any]]) -> None:
    one, two = (each["ddp"]["weights"] for each in found)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_masks_are_on_for_all_if_any_process_has_regions(folder: Path) -> None:
    one, two = processes.run(2, "one_rank.regions_of_one", folder)
    assert one == two
    assert one == pytest.approx(one_rank.regions_of_one(folder), rel=1e-6)
    assert min(one) < 1


def test_one_process_has_what_its_reward_gave() -> None:
    output = RewardOutput(torch.zeros(2), torch.zeros(2, dtype=torch.bool))
    assert Distributed().alike(output).regions is None
    held = output.holding(RewardOutput(torch.zeros(0), None, [], {"part": torch.zeros(0)}, []))
    assert held.regions == [[], []]
    assert held.texts == ["", ""]
    assert held.parts["part"].isnan().all()
