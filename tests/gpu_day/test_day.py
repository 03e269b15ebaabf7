"""A day from outside: its parts in their order, whatever becomes of them. The parts are stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tools.gpu.parts import FILES, PARTS

from gpu_day.made_up import make_tree
from patience import PATIENCE, alive, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def day(tmp_path: Path) -> Path:
    """``day.sh`` of a tree of stand-ins, at a path with spaces."""
    return make_tree(tmp_path / "a tree")


def environment(faults: dict[int, str] | None = None, **others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VARL_NO_NETWORK")}
    return {**kept, "FAULTS": json.dumps(faults or {}), **others}


def run(
    day: Path, *words: str, faults: dict[int, str] | None = None, **others: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(day), "--python", sys.executable, *words]
    place = day.parents[3]
    return subprocess.run(
        command, cwd=place, env=environment(faults, **others), capture_output=True, text=True, timeout=PATIENCE
    )


def results(out: Path) -> list[str]:
    """The result of each part, as the table of the day gives it."""
    lines = re.findall(r"^\| \d \| .+$", (out / "day.md").read_text(), re.MULTILINE)
    return [line.split("|")[3].strip() for line in lines]


def of(out: Path, number: int) -> dict[str, object]:
    found = json.loads((out / PARTS[number - 1].file).read_text())
    assert isinstance(found, dict)
    return found


def test_every_part_runs_with_what_it_needs_and_leaves_its_result(day: Path) -> None:
    ended = run(day, "--out", "some results")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    out = day.parents[3] / "some results"
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert results(out) == ["passed"] * 5
    seen = [of(out, part.number)["seen"] for part in PARTS]
    assert [each["words"] for each in seen] == [
        ["--device", "cuda", "--out", f"{out}/1-machine.json"],
        [
            "-m",
            "gpu",
            "tests/gpu",
            "-p",
            "no:cacheprovider",
            "--gpu-device",
            "cuda",
            "--gpu-report",
            f"{out}/2-tests.json",
        ],
        ["--device", "cuda", "--out", f"{out}"],
        ["--device", "cuda", "--machine", f"{out}/1-machine.json", "--out", f"{out}/4-sizes.json"],
        ["--device", "cuda", "--short", "--out", f"{out}/5-benchmarks.json"],
    ]
    root = day.parents[2]
    for each in seen:
        assert each["folder"] == str(root)
        assert each["offline"] == "1"
        places = [path for path in each["path"] if path.startswith(str(root)) and path != str(root)]
        assert places == [f"{root}/tools/gpu/.site", f"{root}/src"]
        assert str(root) in each["path"]
    log = (out / "day.log").read_text()
    assert log == ended.stdout
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in log.splitlines())
    assert [log.count(f"stand-in {number} runs") for number in range(1, 6)] == [1] * 5
    tail = log.splitlines()[-6:-1]
    assert [re.sub(r"\S+ part (\d), .*: (\w+), \d+ s of (\d+)", r"\1 \2 \3", line) for line in tail] == [
        f"{part.number} passed {part.seconds}" for part in PARTS
    ]


def test_parts_that_fail_in_any_way_cost_the_others_nothing(day: Path, tmp_path: Path) -> None:
    parts = day.with_name("parts.py")
    parts.write_text(parts.read_text().replace("        120,", "        1,"))
    ended = run(day, "--out", str(tmp_path / "out"), faults={1: "fail", 2: "half", 3: "hang", 4: "silent"})
    assert ended.returncode == 1
    found = [result.partition(" after ")[0] for result in results(tmp_path / "out")]
    assert found == ["failed", "failed", "failed: ended", "failed", "passed"]
    assert "part 4 did not write 4-sizes.json" in ended.stdout
    assert "part 2 was ended by signal 9, SIGKILL" in ended.stdout
    assert of(tmp_path / "out", 1)["figure"] == 0.5
    assert "the part did not write its file to the end" in (tmp_path / "out" / "day.md").read_text()
    assert not alive(int((tmp_path / "out" / "pid").read_text()))


def test_a_part_that_does_not_listen_is_killed_before_the_next_begins(day: Path, tmp_path: Path) -> None:
    parts = day.with_name("parts.py")
    parts.write_text(parts.read_text().replace("        120,", "        1,"))
    ended = run(day, "--out", str(tmp_path / "out"), "--only", "3", faults={3: "deaf"})
    assert ended.returncode == 1
    assert results(tmp_path / "out")[2].startswith("failed: ended after ")
    assert not alive(int((tmp_path / "out" / "pid").read_text()))


def test_one_part_is_repeated_and_the_results_of_the_others_stay(day: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "1-machine.json").write_text('{"figure": 7, "day": {"result": "passed", "seconds": 5}}')
    (out / "4-sizes.json").write_text('{"figure": 8, "day": {"result": "passed", "seconds": 6}}')
    (out / "day.log").write_text("of the first time\n")
    ended = run(day, "--only", "4", "--out", str(out), faults={4: "silent"})
    assert ended.returncode == 1
    assert results(out) == ["passed", "not run", "not run", "failed", "not run"]
    assert of(out, 1)["figure"] == 7
    assert set(of(out, 4)) == {"day"}, "a figure of the first time was kept"
    assert (out / "day.log").read_text().startswith("of the first time\n")

    assert run(day, "--only", "4", "--out", str(out)).returncode == 0
    assert results(out) == ["passed", "not run", "not run", "passed", "not run"]


def test_a_new_day_starts_without_the_results_of_another(day: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text('{"figure": 7, "day": {"result": "passed", "seconds": 5}}')
    (out / "mine.txt").write_text("kept")
    process = start(day, out, {1: "hang"})
    wait_for((out / "pid").exists)
    assert sorted(path.name for path in out.iterdir()) == ["day.log", "day.md", "mine.txt", "pid"]
    assert results(out) == ["not run"] * 5
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 130


@pytest.mark.parametrize("at_a_terminal", [True, False])
def test_an_interrupted_day_ends_its_part_and_keeps_the_others(day: Path, tmp_path: Path, at_a_terminal: bool) -> None:
    """Control-C at a terminal reaches all processes of the day; another process ends the script alone."""
    out = tmp_path / "out"
    process = start(day, out, {2: "hang"})
    wait_for((out / "pid").exists)
    if at_a_terminal:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert results(out) == ["passed", "interrupted", "not run", "not run", "not run"]
    assert not alive(int((out / "pid").read_text()))
    assert "part 2, Tests against the CPU's numbers: interrupted" in said.splitlines()[-2]


def start(day: Path, out: Path, faults: dict[int, str]) -> subprocess.Popen[str]:
    command = ["bash", str(day), "--python", sys.executable, "--out", str(out)]
    return subprocess.Popen(command, env=environment(faults), stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("permitted", [True, False], ids=["unshare", "hook"])
def test_a_rehearsal_is_small_and_on_the_cpu_and_reaches_nothing(day: Path, tmp_path: Path, permitted: bool) -> None:
    path = os.environ["PATH"]
    if not permitted:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "unshare").write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "bin" / "unshare").chmod(0o755)
        path = f"{tmp_path / 'bin'}:{path}"
    ended = run(day, "--rehearse", "--only", "3", PATH=path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    if permitted and "a hook in Python" in ended.stdout:
        pytest.skip("unshare is not permitted here")
    assert ("the network is cut off by unshare" if permitted else "a hook in Python") in ended.stdout
    seen = of(day.parents[2] / "runs" / "gpu-rehearsal", 3)["seen"]
    assert isinstance(seen, dict)
    assert seen["words"][:2] == ["--device", "cpu"]
    assert seen["words"][-1] == "--small"
    assert seen["blocked"]


def test_a_rehearsal_begins_in_any_folder(day: Path) -> None:
    """Also in its own, where its name has no folder before it."""
    command = ["bash", day.name, "--rehearse", "--only", "3", "--python", sys.executable]
    ended = subprocess.run(command, cwd=day.parent, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_rehearsal_that_is_not_cut_off_runs_nothing(day: Path, tmp_path: Path) -> None:
    network = day.with_name("network.py")
    network.write_text(network.read_text().replace('("192.0.2.1", 9)', '("127.0.0.1", 9)'))
    ended = run(day, "--rehearse", "--out", str(tmp_path / "out"))
    assert ended.returncode == 1
    assert "the network is not blocked" in ended.stdout
    assert results(tmp_path / "out") == ["not run"] * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "6"], "--only must be the number of a part, got 6"),
        (["--only", "."], "--only must be the number of a part, got ."),
        (["--only", ""], "--only needs a value"),
        (["--only"], "--only needs a value"),
        (["--twice"], "--twice is not known; see --help"),
        (["--python", "no-such-python"], "--python must be Python 3.11 or newer, and there is no no-such-python"),
        (["--python", "no/such/python"], "--python must be Python 3.11 or newer, and there is no no/such/python"),
        (["--python", "false"], "--python must be Python 3.11 or newer, got false"),
    ],
)
def test_words_that_it_does_not_know_are_refused(day: Path, words: list[str], message: str) -> None:
    ended = run(day, *words)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert not (day.parents[2] / "runs").exists() or not any((day.parents[2] / "runs").rglob("*.json"))


def test_help_says_how_it_is_used(day: Path) -> None:
    ended = run(day, "--help")
    assert ended.returncode == 0
    assert "tools/gpu/day.sh [--only N] [--rehearse] [--out FOLDER] [--python PYTHON]" in ended.stdout
    assert "#" not in ended.stdout
