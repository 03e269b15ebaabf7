"""The tests on a GPU, where there is none: they are found, say why they do not run, and can be rehearsed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from gpu import conftest, measuring
from gpu.measuring import PRECISIONS, Report, difference, differences

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py"))


def given(**options: Any) -> pytest.Config:
    """What pytest is given on its command line."""
    return cast(Any, SimpleNamespace(getoption=lambda name: options.get(name.strip("-").replace("-", "_")), stash={}))


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_they_are_there() -> None:
    named = [importlib.import_module(f"gpu.{name}") for name in MODULES]
    tests = [name for module in named for name in vars(module) if name.startswith("test_")]
    assert len(MODULES) > 6
    assert len(tests) > 25


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_they_skip_and_say_why() -> None:
    config = given()
    assert conftest.chosen(config) is None
    with pytest.raises(pytest.skip.Exception, match="torch sees no GPU; --gpu-device cpu rehearses this without one"):
        conftest.pytest_runtest_setup(cast(Any, SimpleNamespace(config=config)))
    with pytest.raises(pytest.UsageError, match="--gpu-device: the device is cuda, but torch sees no GPU"):
        conftest.chosen(given(gpu_device="cuda"))
    assert conftest.chosen(given(gpu_device="cpu")) == torch.device("cpu")


def test_a_difference_is_found(tmp_path: Path) -> None:
    expected = torch.tensor([1.0, -4.0, torch.inf])
    assert difference(expected * torch.tensor([1.1, 1, 1]), expected) == pytest.approx(0.025, rel=1e-6)
    assert difference(torch.tensor([1.0, -4.0, 3.0]), expected) == torch.inf
    with pytest.raises(AssertionError, match=r"\[2\] is not \[3\]"):
        difference(expected[:2], expected)
    gradients = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0, 1e-9])}
    assert differences({"a": gradients["a"], "b": torch.tensor([0.0, 0.1])}, gradients) == pytest.approx(0.2)
    report = Report("cpu")
    report.near("small", expected[:2] * 1.001, expected[:2], 1e-2)
    with pytest.raises(AssertionError, match=r"large: 5\.00e-01 away from the CPU's numbers, 1e-01 is allowed"):
        report.near("large", expected[:2] * 1.5, expected[:2], 1e-1)
    report.write(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in written["differences"]] == ["large", "small"]


def test_a_rehearsal_rounds_products_to_tf32() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(64, 64, generator=generator) for _ in range(2))
    exact = one.double() @ other.double()
    with PRECISIONS[1].on(torch.device("cpu")):
        found = one @ other
    assert 1e-5 < difference(found, exact) < 1e-2
    assert difference(one @ other, exact) < 1e-6
    rounded = measuring._rounded(one)
    # Ten bits of 23 are left, and no number moves by more than half of the last one.
    assert ((rounded.view(torch.int32) & 0x1FFF) == 0).all()
    assert ((rounded - one).abs() <= one.abs() * 2**-11).all()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-m", "gpu"], ["-m", "not slow", "tests/gpu"]])
def test_all_of_them_skip_without_a_gpu(words: list[str]) -> None:
    ended = pytest_run(*words)
    assert ended.returncode == 0, ended.stdout
    assert "passed" not in ended.stdout.splitlines()[-1]
    assert "torch sees no GPU; --gpu-device cpu rehearses this without one" in ended.stdout
    # One line says it for all of them.
    assert ended.stdout.count("torch sees no GPU") == 1


@pytest.mark.slow
def test_a_rehearsal_writes_its_report(tmp_path: Path) -> None:
    words = ["-m", "gpu", "tests/gpu", "-k", "test_masks or test_filters", "--gpu-device", "cpu"]
    ended = pytest_run(*words, "--gpu-report", str(tmp_path / "own" / "report.json"))
    assert ended.returncode == 0, ended.stdout
    report = json.loads((tmp_path / "own" / "report.json").read_text())
    assert report["device"] == "cpu"
    assert report["outcomes"] == {"passed": 13}
    assert report["failed"] == []
    assert len(report["differences"]) == 12


def pytest_run(*words: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own that sees no GPU, from the root of the repository."""
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
