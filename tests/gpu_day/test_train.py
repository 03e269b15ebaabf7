"""The demo on another machine: what is read of a run, and what is no proof."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tools.gpu import train
from tools.gpu.train import faults, main, summary

pytestmark = pytest.mark.slow


def evaluation(value: float, update: int = 0, failed: int = 0) -> dict[str, Any]:
    words = {"value": value, "low": value - 0.1, "high": value + 0.1}
    return {"update": update, "metrics": {"word_accuracy": words}, "failed": failed, "alarm": []}


def record(update: int, kind: str = "prefix", **changes: Any) -> dict[str, Any]:
    seconds = {"rollout": 1.0 + update, "reward": 2.0}
    own = {"update": update, "kind": kind, "seconds": seconds, "pictures": 8 * update, "failed_pictures": 0}
    return own | {"loss": 0.1, "gradient_norm": 1.0, "skipped": 0} | changes


def write_run(run: Path, records: list[dict[str, Any]], evaluations: list[dict[str, Any]], asked: int = 6) -> None:
    (run / "evaluations").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"config": {"run": {"updates": asked}}}))
    (run / "starts.jsonl").write_text(json.dumps({"versions": {"torch": "2.11"}}) + "\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for each in evaluations:
        (run / "evaluations" / f"update-{each['update']:06d}.json").write_text(json.dumps(each))


STILL = "the held-out word accuracy was 0.400 before and is 0.400 after: nothing was learned"
GOOD = [record(i, "suffix" if i == 6 else "prefix") for i in range(1, 7)]
PAIR = [evaluation(0.4), evaluation(0.7, update=6)]


def test_what_a_run_says(tmp_path: Path) -> None:
    write_run(tmp_path, GOOD, PAIR)
    found = summary(tmp_path)
    assert (found["updates"], found["asked_updates"], found["pictures"]) == (6, 6, 48)
    # The first two updates warm up: of prefix updates, 3 to 5 are left.
    stages = found["median_seconds_by_stage"]
    assert stages == {"prefix": {"rollout": 5.0, "reward": 2.0}, "suffix": {"rollout": 7.0, "reward": 2.0}}
    assert found["seconds_of_stages"] == {"reward": 12.0, "rollout": 27.0}
    assert found["pictures_a_second"] == 48 / 39
    assert found["versions"] == {"torch": "2.11"}
    assert [e["update"] for e in found["evaluations"]] == [0, 6]
    assert faults(found, 0, small=False) == []


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    assert summary(tmp_path)["updates"] == 0
    write_run(tmp_path / "run", GOOD[:2], PAIR[:1])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "ki')
    assert summary(tmp_path / "run")["updates"] == 2


@pytest.mark.parametrize(
    ("changes", "code", "why"),
    [
        ({}, None, "the time limit came before the end"),
        ({}, 3, "varl train ended with code 3"),
        ({"updates": 5}, 0, "5 updates were made of 6"),
        ({"failed_pictures": 2}, 0, "2 pictures could not be scored"),
        ({"evaluations": [evaluation(0.4), evaluation(0.7, failed=1)]}, 0, "1 pictures could not be scored"),
        ({"not_finite": [4]}, 0, "numbers of update 4 are not finite"),
        ({"evaluations": PAIR[:1]}, 0, "there are 1 held-out evaluations, not 2"),
        ({"evaluations": [evaluation(0.4), evaluation(0.4)]}, 0, STILL),
    ],
)  # fmt: skip
def test_what_is_no_proof(changes: dict[str, Any], code: int | None, why: str, tmp_path: Path) -> None:
    write_run(tmp_path, GOOD, PAIR)
    assert faults(summary(tmp_path) | changes, code, small=False) == [why]


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    write_run(tmp_path, [*GOOD[:5], record(6, loss=None)], PAIR)
    assert summary(tmp_path)["not_finite"] == [6]


def test_a_small_run_need_not_learn(tmp_path: Path) -> None:
    write_run(tmp_path, GOOD, [evaluation(0.4), evaluation(0.3, update=6)])
    assert faults(summary(tmp_path), 0, small=True) == []


def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Another command in place of ``varl train``, which leaves a run of two updates, and then does as it is told."""
    write_run(tmp_path / "made", GOOD[:2], PAIR[:1])
    code = f"import shutil, sys, time; shutil.copytree({str(tmp_path / 'made')!r}, sys.argv[1]); {script}"
    monkeypatch.setattr(train, "command", lambda device, run, small: [sys.executable, "-c", code, str(run)])


def test_at_the_time_limit_what_is_known_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "EVERY_S", 0.0)
    stand_in(monkeypatch, tmp_path, "time.sleep(60)")
    written = []
    write = train._write
    monkeypatch.setattr(train, "_write", lambda file, result: (written.append(result["updates"]), write(file, result)))
    assert main(["--device", "cpu", "--out", str(tmp_path / "day"), "--limit", "1"]) == 1
    result = json.loads((tmp_path / "day" / "3-train.json").read_text())
    assert len(written) > 2  # on the way too
    assert written[-2:] == [2, 2]
    assert result["failed"][:2] == ["the time limit came before the end", "2 updates were made of 6"]
    assert 0 < result["reached_after_s"]["first update"] < result["seconds"] < 10


def test_a_run_that_fails_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, tmp_path, "print('no GPU'); sys.exit(4)")
    assert main(["--device", "cpu", "--out", str(tmp_path / "day")]) == 1
    result = json.loads((tmp_path / "day" / "3-train.json").read_text())
    assert result["failed"][0] == "varl train ended with code 4"
    assert result["log"] == ["no GPU"]
    assert not result["finished"]


@pytest.mark.slow
def test_a_small_run_proves_that_all_works(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path), "--small"]) == 0
    result = json.loads((tmp_path / "3-train.json").read_text())
    assert (result["updates"], result["finished"], result["failed"]) == (4, True, [])
    assert set(result["median_seconds_by_stage"]) == {"prefix", "suffix"}
    assert (tmp_path / "before_after.png").stat().st_size > 1000
