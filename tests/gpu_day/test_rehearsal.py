"""A whole day without a GPU, on what would travel to a machine, with no network; and days whose checks are broken."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from tools.gpu.parts import FILES, PARTS

from gpu_day import faults
from gpu_day.rehearsals import Machine, environment, machine, rehearse

pytestmark = pytest.mark.slow

SECONDS = 480
"""A rehearsal takes no longer."""


@pytest.fixture(scope="module")
def bare(registry: None, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine on which nothing was run yet; its environment is kept for the next run of the tests."""
    cache = getattr(pytestconfig, "cache", None)
    folder = cache.mkdir("gpu-rehearsal") if cache else tmp_path_factory.mktemp("environments")
    return machine(tmp_path_factory.mktemp("rehearsal"), environment(folder))


def results(out: Path) -> list[str]:
    """The result of each part, as the table of the day gives it."""
    heading, _, _ = (out / "day.md").read_text().partition("\n## ")
    return re.findall(r"^\| \d \| [^|]+ \| ([^|]+) \|", heading, re.MULTILINE)


def test_a_rehearsal_passes_from_start_to_end(bare: Machine, tmp_path: Path) -> None:
    began = time.monotonic()
    ended = rehearse(bare, tmp_path / "out")
    took = time.monotonic() - began
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert took < SECONDS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert results(tmp_path / "out") == ["passed"] * len(PARTS)
    assert "the network is cut off by" in ended.stdout
    for part in PARTS:
        found = json.loads((tmp_path / "out" / part.file).read_text())
        assert found["day"]["result"] == "passed"
        assert len(found) > 1, f"part {part.number} wrote no figures"
        assert f"## {part.number}. {part.title}" in (tmp_path / "out" / "day.md").read_text()
    assert json.loads((tmp_path / "out" / "1-machine.json").read_text())["problems"] == []


class Fault(NamedTuple):
    """Lines that break what a part checks, in every process of the rehearsal, and what the part then says."""

    part: int
    lines: str
    says: str
    only: str = ""
    """Words for pytest, so that of its part no more is run than what is broken."""


FAULTS = {
    "a ceiling that is none": Fault(
        1,
        "import statistics; statistics.median = lambda seconds: float('inf')",
        "problem: the ceiling copy_gb_per_s must be a positive number, got 0.0",
    ),
    "a package that does not import": Fault(
        1,
        "after('rapidocr', lambda module: 1 / 0)",
        "problem: rapidocr is needed: import rapidocr raised ZeroDivisionError",
    ),
    "a family whose numbers are off by a little": Fault(
        2,
        "after('torch.nn.functional', lambda module: setattr(module, 'layer_norm', "
        "lambda *words, own=module.layer_norm, **named: 1.001 * own(*words, **named)))",
        "test_golden.py",
        "-k golden",
    ),
    "an engine that reads nothing": Fault(
        3,
        "after('varl.rewards.engine', lambda module: setattr(module.OcrEngine, 'read', lambda *words, **named: 1 / 0))",
        "varl train ended with code 1",
    ),
    "updates that teach nothing": Fault(
        4,
        "after('benchmarks.shapes', lambda module: setattr(module, 'brightness', "
        "lambda images, prompts: 0 * images.mean((1, 2, 3))))",
        "var-d16: RuntimeError: first prefix update",
    ),
    "a naive way that computes something else": Fault(
        5,
        "after('benchmarks.naive', lambda module: setattr(module, 'loss', "
        "lambda *words, own=module.loss: 1.01 * own(*words)))",
        "of the library and of the naive way differ",
    ),
}
"""At least one for each part."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_part_fails_when_what_it_checks_is_broken(bare: Machine, tmp_path: Path, name: str) -> None:
    fault = FAULTS[name]
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(Path(faults.__file__).read_text() + fault.lines + "\n")
    part, path = str(fault.part), tmp_path / "path"
    ended = rehearse(bare, tmp_path / "out", "--only", part, path=path, pytest_words=fault.only)
    assert ended.returncode == 1
    assert results(tmp_path / "out") == ["failed" if part.number == fault.part else "not run" for part in PARTS]
    assert fault.says in ended.stdout


def test_every_part_has_a_fault_that_it_finds() -> None:
    assert {fault.part for fault in FAULTS.values()} == {part.number for part in PARTS}


def test_what_the_wheels_lack_is_named(bare: Machine, tmp_path: Path) -> None:
    fresh = bare.copy(tmp_path / "machine")
    next((fresh.tree / "tools" / "gpu" / "wheels").glob("pyclipper-*")).unlink()
    ended = rehearse(fresh, tmp_path / "out", "--only", "1")
    assert ended.returncode == 1
    assert "problem: pyclipper is needed: import pyclipper raised ModuleNotFoundError" in ended.stdout


def test_a_damaged_wheel_is_named(bare: Machine, tmp_path: Path) -> None:
    fresh = bare.copy(tmp_path / "machine")
    wheel = next((fresh.tree / "tools" / "gpu" / "wheels").glob("pyclipper-*"))
    content = wheel.read_bytes()
    wheel.unlink()
    wheel.write_bytes(content[: len(content) // 2])
    ended = rehearse(fresh, tmp_path / "out", "--only", "1")
    assert ended.returncode == 1
    assert wheel.name in ended.stdout
    assert "problem: rapidocr is needed" in ended.stdout


def test_without_wheels_it_says_what_makes_them(bare: Machine, tmp_path: Path) -> None:
    fresh = bare.copy(tmp_path / "machine")
    for wheel in (fresh.tree / "tools" / "gpu" / "wheels").iterdir():
        wheel.unlink()
    ended = rehearse(fresh, tmp_path / "out", "--only", "1")
    assert ended.returncode == 1
    assert "make them with tools/gpu/wheels.sh" in ended.stdout
    assert "problem: jsonargparse is needed" in ended.stdout
