"""A worker that crashes or hangs costs the picture at hand only."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal

import pytest
import torch

from patience import PATIENCE, alive, wait_for
from varl.policy import Prompt
from varl.rewards.engine import OcrEngine, Unread
from varl.rewards.ocr import OcrReward
from varl.rewards.worker import OcrWorker

from .moody import Moody, Unstartable
from .rendering import draw_many, stack


def moods(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8) / 255


def said(readings):
    return [r.reason if isinstance(r, Unread) else r[0].text for r in readings]


@pytest.fixture(scope="module")
def worker():
    with OcrWorker(make_reader=Moody, timeout_s=PATIENCE) as worker:
        yield worker


def test_a_crash_fails_one_picture_and_the_next_are_read(worker):
    before = worker.crashes
    assert said(worker.read(moods(9, 1, 8))) == ["9", "the OCR worker crashed (exit code 7)", "8"]
    assert worker.crashes == before + 1


def test_an_exception_in_the_worker_fails_one_picture_and_no_process(worker):
    worker.read(moods(9))
    pids = worker.pids
    assert said(worker.read(moods(3, 8))) == ["ValueError: bad mood", "8"]
    assert worker.pids == pids


def test_killed_in_the_middle_of_a_reading(worker):
    worker.read(moods(9))
    (pid,) = worker.pids
    first, second = said(worker.read(moods(4, 8)))
    assert first == "the OCR worker crashed (exit code -9)"
    assert second == "8"
    assert said(worker.read(moods(6))) == ["6"]
    assert worker.pids != [pid]


def test_killed_between_readings(worker):
    worker.read(moods(9))
    (pid,) = worker.pids
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid) and not worker._seats[0].process.is_alive())  # the fork server has heard
    assert said(worker.read(moods(6))) == ["6"]


def test_signals_that_ask_the_run_to_stop_leave_its_reader_alone(worker):
    worker.read(moods(9))
    pids = worker.pids
    for pid, number in itertools.product(pids, (signal.SIGINT, signal.SIGTERM)):
        os.kill(pid, number)
    assert said(worker.read(moods(9))) == ["9"]
    assert worker.pids == pids


def _leave_open(connection):
    globals()["held to the end"] = worker = OcrWorker(make_reader=Moody)
    worker.read(moods(9))
    connection.send(worker.pids)


@pytest.mark.slow
def test_a_process_ends_with_its_reader_still_open():
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(target=_leave_open, args=(theirs,))
    process.start()
    (pid,) = mine.recv()
    process.join(PATIENCE)
    assert process.exitcode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_hang_hits_the_time_limit(worker, monkeypatch):
    worker.read(moods(9))
    (pid,) = worker.pids
    monkeypatch.setattr(worker._seats[0], "timeout_s", 0.5)
    assert said(worker.read(moods(2))) == ["the OCR worker took longer than 0.5 s over a picture"]
    monkeypatch.undo()
    assert said(worker.read(moods(9))) == ["9"]
    assert worker.timeouts == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_reward_in_a_worker_scores_as_in_process():
    pictures = draw_many(3, seed=8)
    prompts = [Prompt(words=tuple(p.words)) for p in pictures]
    inside = OcrReward()(stack(pictures), prompts)
    reward = OcrReward(timeout_s=PATIENCE)
    outside = reward(stack(pictures), prompts)
    torch.testing.assert_close(outside.score, inside.score, rtol=0, atol=0)
    assert outside.texts == inside.texts
    assert reward.describe()["worker"] == f"time limit {PATIENCE:g} s a picture"
    assert reward.describe()["det_model"] == OcrEngine().describe()["det_model"]
    reward.reader.close()


def test_an_interrupted_reading_leaves_no_stale_answer(worker, monkeypatch):
    worker.read(moods(9))
    connection = worker._seats[0].connection

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(connection), "poll", lambda self, timeout: interrupted(timeout))
    with pytest.raises(KeyboardInterrupt):
        worker.read(moods(5))
    monkeypatch.undo()
    assert said(worker.read(moods(6))) == ["6"]


def test_no_restart_fails_the_pictures_left_over(worker, monkeypatch):
    worker.read(moods(9))
    monkeypatch.setattr(worker._seats[0], "make_reader", Unstartable)
    lost = "no OCR worker could be started again"
    assert said(worker.read(moods(9, 1, 8, 7))) == ["9", "the OCR worker crashed (exit code 7)", lost, lost]


def test_a_worker_that_cannot_start_is_an_error_not_a_failed_picture():
    with OcrWorker(make_reader=Unstartable) as worker, pytest.raises(RuntimeError, match="did not start"):
        worker.read(moods(9))
