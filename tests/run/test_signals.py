"""SIGTERM and SIGINT: the update is finished and saved, the exit code says which signal, a second one exits at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmarks.kills import RECIPE, begin, outcome, recipe

from varl.errors import Interrupted
from varl.run.checkpoint import read_manifest
from varl.run.metrics import read_metrics
from varl.run.signals import Interrupts


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def updates(folder: Path) -> list[int]:
    path = folder / "run" / "metrics.jsonl"
    return [line["update"] for line in read_metrics(path)] if path.exists() else []


def test_a_run_told_to_stop_saves_and_goes_on(tmp_path: Path) -> None:
    whole, told = tmp_path / "whole", tmp_path / "told"
    for folder in (whole, told):
        folder.mkdir()
    process = begin(recipe(whole, 9))
    process.join(120)
    assert process.exitcode == 0
    path = recipe(told, 9)
    for number, code, after in ((signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 5)):
        process = begin(path)
        wait_for(lambda after=after: after in updates(told))  # type: ignore[misc]
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == code
        reached = updates(told)[-1]
        assert reached < 9
        newest = max((told / "run" / "checkpoints").glob("update-*"))
        assert read_manifest(newest)["update"] == reached  # nothing that was done is lost
    process = begin(path)
    process.join(60)
    assert process.exitcode == 0
    assert outcome(told / "run") == outcome(whole / "run")


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    """In the middle of an update that takes a minute."""
    path, marker = tmp_path / "recipe.yaml", tmp_path / "marker"
    text = RECIPE.format(out=tmp_path / "run", updates=3).replace("count: 4, every: 4", "enabled: false")
    reward = f'{{name: "tiny_runs:slow", marker: {marker}, seconds: 60}}'
    path.write_text(text.replace('"benchmarks.kills:noisy_brightness"', reward))
    process = begin(path)
    wait_for(marker.exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.5)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
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
