"""Processes that a run forks, such as those of a reward's pool, can be ended, and hold nothing of the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from patience import PATIENCE
from varl.policy import Prompt
from varl.rewards.guard import Told
from varl.rewards.host import Host
from varl.rewards.python import PythonReward
from varl.run.files import FolderLock
from varl.run.signals import Interrupts

POOL = """
import multiprocessing, threading, time
from concurrent.futures import ProcessPoolExecutor
from varl.run.signals import Interrupts

def busy(_=None):
    time.sleep(600)

def pool(make=lambda: multiprocessing.get_context("fork").Pool(2)):
    with make() as workers:
        workers.map_async(busy, range(2))
        time.sleep(0.2)
    workers.join()  # for ever, if they do not end

def executor():
    workers = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    workers.submit(busy)
    time.sleep(0.2)
    for process in workers._processes.values():
        process.terminate()
    workers.shutdown()

def in_a_thread():
    thread = threading.Thread(target=pool)
    thread.start()
    thread.join()

def made_before():
    earlier = multiprocessing.get_context("fork").Pool(2)
    with Interrupts():
        pool(lambda: earlier)

made_before()
for kind in (pool, executor, in_a_thread):
    with Interrupts():
        kind()
    print(kind.__name__, "ended", flush=True)
"""


@pytest.mark.slow
def test_workers_that_a_run_forks_can_be_terminated() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", POOL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"its workers did not end: {process.communicate()}")
    assert out.decode().splitlines() == ["pool ended", "executor ended", "in_a_thread ended"], err
    assert b"this update is finished" not in err


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_fork_handles_signals_as_any_python_process() -> None:
    with Interrupts() as interrupts, ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as workers:
        assert workers.submit(handlers).result(30) == [signal.SIG_DFL, signal.default_int_handler]
        assert signal.getsignal(signal.SIGTERM) == interrupts._handle  # in the run, nothing changed


def test_a_fork_keeps_handlers_that_are_not_the_runs() -> None:
    earlier = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as workers:
            assert workers.submit(handlers).result(30)[0] == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, earlier)


class Parent:
    """Starts a program and ends it."""

    def __call__(self, _: object) -> tuple[int, list[object]]:
        program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        time.sleep(0.2)
        program.terminate()
        code = program.wait(PATIENCE)
        with multiprocessing.get_context("fork").Pool(1) as workers:
            return code, workers.apply(_names)


def _names() -> list[str]:
    return [str(handler) for handler in handlers()]


def test_a_process_of_a_reward_leaves_signals_to_the_run_but_its_own_children_do_not() -> None:
    host = Host(Parent, "process", "a request", timeout_s=60)
    try:
        code, names = host.ask(None)
    finally:
        host.close(2.0)
    assert code == -signal.SIGTERM
    assert names == [str(signal.SIG_DFL), str(signal.default_int_handler)]


def test_a_fork_that_outlives_a_run_does_not_hold_its_folder(tmp_path: Path) -> None:
    lock, (reading, writing) = FolderLock(tmp_path), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"up")
        threading.Event().wait(PATIENCE)
        os._exit(0)
    try:
        os.read(reading, 2)
        with pytest.raises(ValueError, match="another process trains"):
            FolderLock(tmp_path)  # the fork did not let go of what the run holds
        lock.release()
        FolderLock(tmp_path).release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("timeout_s", [None, PATIENCE])
@pytest.mark.parametrize(
    ("leave", "code"),
    [
        (lambda: [0.0], 0),
        (lambda: sys.exit(), 0),
        (lambda: sys.exit(3), 3),
        (lambda: sys.exit("no"), 1),
        (lambda: 1 / 0, 1),
    ],
)
def test_a_child_that_a_reward_lets_go_on_ends(leave: Callable[[], Any], code: int, timeout_s: float | None) -> None:
    children: list[int] = []

    def fn(images: Any, prompts: Any) -> Any:
        children.append(os.fork())
        return [1.0] if children[0] else leave()

    here = os.getpid()
    try:
        output = PythonReward(fn, timeout_s=timeout_s)(torch.zeros(1, 3, 4, 4), [Prompt()])
    finally:
        if os.getpid() != here:
            os._exit(99)
    assert output.score.tolist() == [1]
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == code


class Forks:
    """Answers how many requests there were; children answer too, or stay when this is killed."""

    def __init__(self) -> None:
        self.requests = 0

    def __call__(self, request: str) -> int:
        self.requests += 1
        if os.fork() == 0:
            if request == "stay":
                threading.Event().wait(PATIENCE)
            self.requests += 10
        elif request == "stay":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.requests


def test_children_of_a_process_answer_nothing_and_do_not_hide_its_end() -> None:
    host = Host(Forks, "process", "a request", timeout_s=PATIENCE)
    try:
        assert [host.ask("one"), host.ask("two"), host.ask("three")] == [1, 2, 3]
        with pytest.raises(Told, match=r"crashed \(exit code -9\)"):
            host.ask("stay")
        assert host.ask("one") == 1
    finally:
        host.close(2.0)


def test_a_child_can_be_ended_from_its_first_moment() -> None:
    for _ in range(20):
        reading, writing = os.pipe()
        with Interrupts():
            child = os.fork()
            if child == 0:
                os.close(writing)
                os.read(reading, 1)  # nothing, once the signal was sent
                os._exit(1)
            os.kill(child, signal.SIGTERM)
        os.close(writing)
        os.close(reading)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
