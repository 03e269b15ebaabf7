"""Wheels got by pip for another machine: from a folder of made-up ones, and, in the whole suite, from the registry."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tools.gpu.closure import Missing, Target, Wheel
from tools.gpu.needs import MODULES, ROOT, requirements
from tools.gpu.wheels import LIMIT, PipFetch, check_size, main, pins, read_wheel, replace, table

from gpu_day.made_up import make_wheel
from gpu_day.pythons import python312

pytestmark = pytest.mark.slow

H100 = Target("3.12", "manylinux_2_28_x86_64")
EXPECTED = {"rich", "jsonargparse", "rapidocr", "rapidfuzz", "peft"}
"""What an image for GPUs lacks; all else that is fetched are small parts of these."""
SMALL = 2.5 * 2**20
"""Bytes of a small part, at most."""
TREE = 26 * 2**20
"""Bytes that the repository may have: it travels beside the wheels."""


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks for wheels in, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


def test_a_wheel_for_the_machine_is_chosen_and_not_one_for_this_or_a_newer_one(shelf: Path, tmp_path: Path) -> None:
    make_wheel(shelf, "part", "5", tag="cp311-cp311-manylinux_2_28_x86_64")
    make_wheel(shelf, "part", "4", tag="cp312-cp312-manylinux_2_34_x86_64")
    make_wheel(shelf, "part", "3", tag="cp312-cp312-manylinux_2_28_aarch64")
    make_wheel(shelf, "part", "2", ("other>=1",), tag="cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64")
    make_wheel(shelf, "part", "1")
    found = PipFetch(H100, tmp_path / "out", {})("part", SpecifierSet())
    assert (found.name, found.version, found.requires) == ("part", Version("2"), ("other>=1",))
    assert found.path is not None
    assert found.size == found.path.stat().st_size


def test_pinned_versions_are_preferred_where_they_hold(shelf: Path, tmp_path: Path) -> None:
    for version in ("1", "2", "3"):
        make_wheel(shelf, "part", version)
    fetch = PipFetch(H100, tmp_path / "out", {"part": Version("2")})
    assert fetch("part", SpecifierSet(">=1")).version == Version("2")
    assert fetch("part", SpecifierSet(">=3")).version == Version("3")


def test_a_pin_that_the_machine_has_no_wheel_for_is_passed_over(shelf: Path, tmp_path: Path) -> None:
    make_wheel(shelf, "part", "2", tag="cp311-cp311-manylinux_2_28_x86_64")
    make_wheel(shelf, "part", "1")
    assert PipFetch(H100, tmp_path / "out", {"part": Version("2")})("part", SpecifierSet()).version == Version("1")


def test_what_cannot_be_had_is_named_with_what_pip_said(shelf: Path, tmp_path: Path) -> None:
    make_wheel(shelf, "part", "1", tag="cp311-cp311-manylinux_2_28_x86_64")
    with pytest.raises(Missing, match=r"no wheel of part>=1 for the machine: .*No matching distribution.*nor a source"):
        PipFetch(H100, tmp_path / "out", {})("part", SpecifierSet(">=1"))


def test_a_damaged_wheel_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad-1-py3-none-any.whl").write_bytes(b"PK\3\4 and no more")
    with pytest.raises(Missing, match=r"bad-1-py3-none-any\.whl is no wheel"):
        read_wheel(tmp_path / "bad-1-py3-none-any.whl")


def test_the_folder_has_the_new_wheels_and_no_earlier_ones(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    replace(folder, [read_wheel(make_wheel(tmp_path / "a", "part", "1"))])
    replace(folder, [read_wheel(make_wheel(tmp_path / "a", "part", "2"))])
    assert [path.name for path in folder.iterdir()] == ["part-2-py3-none-any.whl"]


def test_the_table_says_name_version_and_size_and_what_is_replaced() -> None:
    wheels = [Wheel("small", Version("1.5"), (), 2**18), Wheel("large", Version("2"), (), 3 * 2**20)]
    lines = table(wheels, {"small": Version("1.0")}).splitlines()
    assert [line.split() for line in lines] == [
        ["package", "version", "MiB"],
        ["large", "2", "3.00"],
        ["small", "1.5", "0.25", "instead", "of", "1.0"],
        ["together", "3.25", "of", "at", "most", "36"],
    ]


def test_wheels_that_are_too_large_together_are_refused() -> None:
    a, b = (Wheel(name, Version("1"), (), LIMIT // 2) for name in ("a", "b"))
    check_size([a, b])
    with pytest.raises(Missing, match=r"larger than 36 MiB together; the largest are b, a"):
        check_size([a, b._replace(size=LIMIT // 2 + 1)])


def test_faults_end_the_command_with_one_line(tmp_path: Path) -> None:
    words = ["--python", "3.12", "--platform", H100.platform, "--out", str(tmp_path / "wheels"), "--installed"]
    with pytest.raises(SystemExit, match=r"^wheels: .*No such file.*absent\.txt"):
        main([*words, str(tmp_path / "absent.txt")])
    (tmp_path / "list.txt").write_text("numpy\n")
    with pytest.raises(SystemExit, match=r"^wheels: torch is not in the list"):
        main([*words, str(tmp_path / "list.txt")])
    assert not (tmp_path / "wheels").exists()


def test_requirements_are_those_of_the_package_with_lora_and_the_tests() -> None:
    found = requirements()
    names = {line.split(">")[0].split("[")[0] for line in found}
    assert names >= {"torch", "jsonargparse", "rapidocr", "peft", "transformers", "pytest", "hypothesis"}
    assert not names & {"ruff", "mypy", "varl", "sentencepiece"}
    assert "jsonargparse[signatures]>=4.40" in found


def test_every_requirement_has_a_module_that_must_import() -> None:
    names = {line.split(">")[0].split("[")[0] for line in requirements()}
    assert names <= set(MODULES)
    for module in ("docstring_parser", "typeshed_client"):
        assert importlib.util.find_spec(module)


def test_pins_are_those_of_the_repository() -> None:
    assert pins((ROOT / "constraints.txt").read_text())["rapidocr"] >= Version("3.4")


def test_the_repository_is_small_enough_to_travel() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"git does not say what belongs to the repository: {listed.stderr.strip()}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert len(paths) > 100
    assert sum(path.lstat().st_size for path in paths if os.path.lexists(path)) <= TREE


@pytest.mark.usefixtures("registry")
def test_the_example_of_an_image_lacks_what_the_wheels_are_for(tmp_path: Path) -> None:
    """They are few, small enough together, and installable without an index on their Python where that is at hand."""
    folder = tmp_path / "some wheels"
    words = ["--python", "3.12", "--platform", H100.platform, "--installed", ROOT / "tools" / "gpu" / "image.txt"]
    command = [ROOT / "tools" / "gpu" / "wheels.sh", *words, "--out", folder]
    ended = subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    wheels = [read_wheel(path) for path in folder.iterdir()]
    assert len({wheel.name for wheel in wheels}) == len(wheels)
    assert {wheel.name for wheel in wheels} >= EXPECTED
    assert [wheel.name for wheel in wheels if wheel.name not in EXPECTED and wheel.size > SMALL] == []
    assert sum(wheel.size for wheel in wheels) <= LIMIT

    python = python312()
    if python is None:
        pytest.skip("the wheels are as they should be; they were not installed, since no Python 3.12 is at hand")
    options = ["--no-index", "--no-deps", "--no-compile", "--target", tmp_path / "site"]
    subprocess.run([python, "-m", "pip", "--isolated", "install", "--quiet", *options, *folder.iterdir()], check=True)
    code = "import rapidfuzz.fuzz_cpp, pyclipper, psutil, colorlog, docstring_parser, mdurl"
    subprocess.run([python, "-c", code], env={"PYTHONPATH": str(tmp_path / "site")}, check=True)


@pytest.mark.usefixtures("registry")
def test_pure_python_that_exists_as_a_source_alone_is_built(tmp_path: Path) -> None:
    found = PipFetch(H100, tmp_path, {})("antlr4-python3-runtime", SpecifierSet("==4.9.*"))
    assert found.path is not None
    assert found.path.name.endswith("-py3-none-any.whl")
