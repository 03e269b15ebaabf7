"""Part 1: what counts as a problem, and what the ceilings are."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from tools.gpu import machine
from tools.gpu.machine import ceilings, main, median_seconds, wrong


def test_a_ceiling_is_a_positive_number_and_anything_else_is_named() -> None:
    assert wrong({"copy": 1e-9, "bf16": 5e3}) == []
    found = wrong({"a": 0.0, "b": -1.0, "c": math.inf, "d": math.nan, "e": 1.0})
    assert [line.split()[2] for line in found] == ["a", "b", "c", "d"]
    assert found[0] == "the ceiling a must be a positive number, got 0.0"


def test_ceilings_count_bytes_read_and_written_and_two_operations_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "median_seconds", lambda work, device: 0.5)
    found = ceilings("cpu", size=3 * 10**6, side=10)
    assert found == {"copy_gb_per_s": 2 * 3e6 / 0.5 / 1e9, "bf16_tflops": 4e-9, "fp32_tflops": 4e-9}


def test_ceilings_are_measured_on_work_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def run_once(work: object, device: str) -> float:
        assert callable(work)
        result = work()
        assert isinstance(result, torch.Tensor)
        kinds.append((result.dtype, tuple(result.shape), bool(result.float().abs().sum() > 0)))
        return 1.0

    monkeypatch.setattr(machine, "median_seconds", run_once)
    ceilings("cpu", size=64, side=8)
    expected = [(torch.uint8, (64,), True), (torch.bfloat16, (8, 8), True), (torch.float32, (8, 8), True)]
    assert kinds == expected


def test_the_time_of_work_is_the_median_after_warming_up() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        calls += 1
        time.sleep({1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2}.get(calls, 0.01))

    assert 0.01 <= median_seconds(work, "cpu", repeats=5) < 0.2
    assert calls == 8


def test_all_is_written_also_when_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.gpu.needs.MODULES", {"rich": "rich", "some-part": "some_part"})
    monkeypatch.setattr(machine, "ceilings", lambda *_: {"copy_gb_per_s": 1.0})
    assert main(["--device", "cpu", "--out", str(tmp_path / "1.json")]) == 1
    found = json.loads((tmp_path / "1.json").read_text())
    assert found["problems"] == [
        "some-part is needed: import some_part raised ModuleNotFoundError: No module named 'some_part'"
    ]
    assert found["ceilings"] == {"copy_gb_per_s": 1.0}
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["card"]["memory_gib"] > found["card"]["free_gib"] > 0
    assert f"problem: {found['problems'][0]}" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu.needs.MODULES", {"torch": "torch"})
    assert main(["--device", "cuda", "--out", str(tmp_path / "1.json")]) == 1
    (problem,) = json.loads((tmp_path / "1.json").read_text())["problems"]
    assert "sees no GPU" in problem


def test_a_machine_without_problems_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.gpu.needs.MODULES", {"torch": "torch", "numpy": "numpy"})
    monkeypatch.setitem(machine.COPY, "cpu", 2**16)
    monkeypatch.setitem(machine.SIDE, "cpu", 32)
    assert main(["--device", "cpu", "--out", str(tmp_path / "1.json")]) == 0
    found = json.loads((tmp_path / "1.json").read_text())
    assert found["problems"] == []
    assert set(found["ceilings"]) == {"copy_gb_per_s", "bf16_tflops", "fp32_tflops"}
