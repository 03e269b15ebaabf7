"""SIGTERM and SIGINT: the update is finished and saved, the exit code says which signal, a second one exits at once."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.kills import begin, outcome, recipe

from patience import PATIENCE, wait_for
from varl.errors import Interrupted
from varl.run.checkpoint import read_manifest
from varl.run.metrics import read_metrics
from varl.run.signals import Interrupts


def with_reward(path: Path, reward: dict[str, Any]) -> Path:
    """A recipe of ``benchmarks.kills`` with another reward."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"reward": reward}))
    return path


@pytest.mark.slow
def test_a_run_told_to_stop_saves_and_goes_on(tmp_path: Path) -> None:
    whole, told = tmp_path / "whole", tmp_path / "told"
    for folder in (whole, told):
        folder.mkdir()
    process = begin(with_reward(recipe(whole, 9), {"name": "tiny_runs:awaiting", "folder": str(whole)}))
    process.join(PATIENCE)
    assert process.exitcode == 0
    path = with_reward(recipe(told, 9), {"name": "tiny_runs:awaiting", "folder": str(told), "after": [1, 5]})
    for number, code, after in ((signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 5)):
        process = begin(path)
        wait_for((told / f"waits-{after}").exists)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(PATIENCE)
        assert process.exitcode == code
        # The update that was under way is finished, and nothing that was done is lost.
        assert read_metrics(told / "run")[-1]["update"] == after + 1
        newest = max((told / "run" / "checkpoints").glob("update-*"))
        assert read_manifest(newest)["update"] == after + 1
    process = begin(path)
    process.join(PATIENCE)
    assert process.exitcode == 0
    left = [outcome(folder / "run") for folder in (told, whole)]
    for values in (values for of in left for values in of["values"]):
        values.pop("run")  # a hash of the settings, among which the rewards' folders differ
    assert left[0] == left[1]


@pytest.mark.slow
def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    """In the middle of an update that does not end."""
    process = begin(with_reward(recipe(tmp_path, 3), {"name": "tiny_runs:endless", "folder": str(tmp_path)}))
    wait_for((tmp_path / "called").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    wait_for((tmp_path / "noted").exists)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == 130


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with Interrupts() as interrupts:
        assert interrupts.error is None
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: interrupts.received is not None)
        error = interrupts.error
        assert isinstance(error, Interrupted)
        assert error.signal == signal.SIGTERM
    assert {number: signal.getsignal(number) for number in before} == before


def test_what_torchrun_passes_on_is_one_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends Ctrl-C to every process, and torchrun then SIGTERM to its workers."""
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert (interrupts.received, left) == (signal.SIGINT, [])
        interrupts._when -= 2
        signal.raise_signal(signal.SIGTERM)
    assert left == [143]


def test_other_threads_catch_no_signal() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler]
