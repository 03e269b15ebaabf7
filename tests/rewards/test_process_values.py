"""What a reward's own process is asked and answers, word for word; both ends without a process between them."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from varl.policy import Prompt
from varl.rewards import RewardOutput, process
from varl.rewards.guard import Told
from varl.rewards.host import NotStarted
from varl.rewards.process import ProcessCall, _Answers

PROMPTS = [Prompt("a"), Prompt("b")]


class Line:
    """Stands for the other process: keeps what it is asked, and answers what it is told to."""

    made: ClassVar[list[Line]] = []
    fault: Exception | None = None

    def __init__(self, make: Any, name: str, over: str, timeout_s: float | None) -> None:
        self.given, self.asked, self.answer = (make, name, over, timeout_s), list[Any](), Any
        self.starts, self.closed = 0, list[float]()
        self.made.append(self)

    def start(self) -> None:
        self.starts += 1
        if self.fault is not None:
            raise self.fault

    def ask(self, request: Any) -> Any:
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self, patience: float = 0.0) -> None:
        self.closed.append(patience)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is to be done at the end of the process."""
    kept: list[Any] = []
    monkeypatch.setattr(process, "Host", Line)
    monkeypatch.setattr(process, "Finalize", lambda *given, **named: kept.append((given, named)))
    monkeypatch.setattr(Line, "fault", None)
    yield kept
    Line.made.clear()


def test_how_it_is_started(ends: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    call = ProcessCall("module:fn", MappingProxyType({"a": 1}), 2.5)
    [line] = Line.made
    make, *rest = line.given
    assert rest == ["process of reward 'module:fn'", "a call", 2.5]
    assert (make.func, make.args, make.keywords) == (_Answers, ("module:fn", {"a": 1}, os.getcwd(), 7), {})
    pickle.dumps(make)
    assert line.starts == 1
    # Two seconds to end by itself, before those ends that wait for processes, whose priority is 0.
    assert ends == [((call, line.close, (2.0,)), {"exitpriority": 10})]
    call.close()
    assert line.closed == [2.0]


def test_what_does_not_start_is_bad_input(ends: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Line, "fault", NotStarted("no luck"))
    with pytest.raises(ValueError, match=r"^no luck$"):
        ProcessCall("module:fn", {})


@pytest.mark.parametrize("timeout_s", [0, -1.0, 2.1e6, 1e9, float("inf"), float("nan")])
def test_limits_that_are_none(ends: list[Any], timeout_s: float) -> None:
    with pytest.raises(ValueError, match=r"^reward 'module:fn': timeout_s must be positive, and at most 2e\+06"):
        ProcessCall("module:fn", {}, timeout_s)
    assert not Line.made


@pytest.mark.parametrize(
    ("timeout_s", "words"),
    [
        (None, "no time limit"),
        (0.5, "time limit 0.5 s a call"),
        (2e6, "time limit 2e+06 s a call"),
    ],
)
def test_what_it_says_of_itself(ends: list[Any], timeout_s: float | None, words: str) -> None:
    call = ProcessCall("module:fn", {}, timeout_s)
    [line] = Line.made
    line.answer = {"version": "7", "process": "mine"}
    assert call.describe() == {"version": "7", "process": words}
    assert line.asked == [("describe",)]


def test_what_it_checks(ends: list[Any]) -> None:
    call = ProcessCall("module:fn", {})
    [line] = Line.made
    line.answer = None
    assert call.check(tuple(PROMPTS)) is None  # type: ignore[func-returns-value]
    assert line.asked == [("check", PROMPTS)]
    line.answer = Told("ValueError: no words", "a.py, line 3")
    with pytest.raises(ValueError, match=r"^ValueError: no words$"):
        call.check(PROMPTS)


def test_what_it_asks_for_and_makes_of_the_answer(ends: list[Any]) -> None:
    call = ProcessCall("module:fn", {})
    [line] = Line.made
    polygon = np.ones((4, 2), np.float32)
    line.answer = {
        "score": np.array([1.0, 4.0], np.float32),
        "failed": np.array([False, True]),
        "regions": [[polygon], []],
        "parts": {"a": np.array([2.0, 3.0], np.float32)},
        "texts": ["x", "y"],
    }
    images = torch.linspace(0, 1, 24, dtype=torch.float64, requires_grad=True).view(2, 3, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        output = call(images, tuple(PROMPTS))
        torch.manual_seed(3)
        wanted = int(torch.randint(2**31, ()))
    [(kind, pixels, prompts, seed)] = line.asked
    assert (kind, prompts, seed) == ("score", PROMPTS, wanted)
    assert type(pixels) is np.ndarray
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, images.detach().float().numpy())
    assert isinstance(output, RewardOutput)
    assert torch.equal(output.score, torch.tensor([1.0, 4.0]))
    assert torch.equal(output.failed, torch.tensor([False, True]))
    assert output.regions == [[polygon], []]
    assert list(output.parts) == ["a"]
    assert torch.equal(output.parts["a"], torch.tensor([2.0, 3.0]))
    assert output.texts == ["x", "y"]


def test_seeds_are_drawn_from_the_numbers_of_31_bits(ends: list[Any]) -> None:
    call = ProcessCall("module:fn", {})
    [line] = Line.made
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for _ in range(16):
            line.answer = {"score": np.zeros(2, np.float32), "failed": np.zeros(2, bool), "parts": {}}
            call(torch.zeros(2, 3, 2, 2), PROMPTS)
        torch.manual_seed(5)
        wanted = [int(torch.randint(2**31, ())) for _ in range(16)]
    seeds = [request[3] for request in line.asked]
    assert seeds == wanted
    assert {type(seed) for seed in seeds} == {int}


MODULE = """
import itertools, random
import numpy as np, torch
from varl.rewards import RewardOutput
def draws(images, prompts):
    prompts.clear()
    return [torch.rand(()).item(), np.random.rand()]
def draws_more(images, prompts):
    return np.array([random.random()] * len(prompts))
def plain(images, prompts):
    assert type(images) is torch.Tensor
    return images.mean((1, 2, 3))
def full(images, prompts):
    score = images.mean((1, 2, 3)).requires_grad_()
    return RewardOutput(score, [False, True], [[[[1, 2], [3, 4]]], []], {"a": [5, 6], "b": score}, ["x", "y"])
def endless(images, prompts):
    empty = itertools.repeat(np.zeros((0, 2)))
    return RewardOutput(images.mean((1, 2, 3)), regions=[empty] * 2 if prompts[0].text else itertools.repeat([]))
class Said:
    given = []
    def __init__(self, label="7"): self.label = label
    def __call__(self, images, prompts): return []
    def describe(self): return {1: 2, "a": self.label}
    def check(self, prompts):
        self.given.append(prompts)
        return {"no": "answer"}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.mktemp("answers")
    (own / "answered_module.py").write_text(MODULE)
    return own


@pytest.fixture
def threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the number of threads was set to; the working directory and the path are put back."""
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.chdir(Path.cwd())
    monkeypatch.syspath_prepend(str(folder))
    return found


def answers(name: str, folder: Path) -> _Answers:
    return _Answers(f"answered_module:{name}", {}, str(folder), 3)


IMAGES = np.full((2, 3, 2, 2), 0.5, np.float32)


def test_it_works_where_it_was_called(folder: Path, threads: list[int]) -> None:
    answers("plain", folder)
    assert os.getcwd() == str(folder)
    assert threads == [3]
    given = _Answers("answered_module:Said", {"label": "b"}, str(folder), 3)
    assert given(("describe",)) == {"1": "2", "a": "b"}


@pytest.fixture
def generators() -> Iterator[None]:
    """All are put back."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        yield
    np.random.set_state(states[0])
    random.setstate(states[1])


def test_each_generator_is_seeded_for_each_call(folder: Path, threads: list[int], generators: None) -> None:
    torch.manual_seed(11)
    wanted = [torch.rand(()).item(), np.random.RandomState(11).rand(), random.Random(11).random()]
    draws, more = answers("draws", folder), answers("draws_more", folder)
    for _ in range(2):
        found = draws(("score", IMAGES, list(PROMPTS), 11))
        assert found["score"].tolist() == pytest.approx(wanted[:2])
        assert found["failed"].tolist() == [False, False]
        assert more(("score", IMAGES, list(PROMPTS), 11))["score"].tolist() == pytest.approx([wanted[2]] * 2)


def test_answers_are_arrays(folder: Path, threads: list[int], generators: None) -> None:
    plain = answers("plain", folder)(("score", IMAGES, PROMPTS, 1))
    assert (plain["score"].tolist(), plain["failed"].tolist()) == ([0.5, 0.5], [False, False])
    assert (plain["regions"], plain["parts"], plain["texts"]) == (None, {}, None)
    full = answers("full", folder)(("score", IMAGES, PROMPTS, 1))
    assert list(full) == ["score", "failed", "regions", "parts", "texts"]
    arrays = {"score": full["score"], "failed": full["failed"], **full["parts"]}
    assert {name: type(array) for name, array in arrays.items()} == dict.fromkeys(arrays, np.ndarray)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "score": [0.5, 0.5], "failed": [False, True], "a": [5, 6], "b": [0.5, 0.5],
    }  # fmt: skip
    [[polygon], none] = full["regions"]
    assert (polygon.dtype, polygon.tolist(), none) == (np.float32, [[1, 2], [3, 4]], [])
    assert full["texts"] == ["x", "y"]


@pytest.mark.parametrize(("text", "counts"), [("a", [5001, 5001]), ("", [0, 0, 0])])
def test_regions_without_end_are_sent_as_one_too_many(
    text: str, counts: list[int], folder: Path, threads: list[int], generators: None
) -> None:
    found = answers("endless", folder)(("score", IMAGES, [Prompt(text)] * 2, 1))
    assert [len(own) for own in found["regions"]] == counts


def test_what_a_callable_says_is_text(folder: Path, threads: list[int]) -> None:
    said = answers("Said", folder)
    assert said(("describe",)) == {"1": "2", "a": "7"}
    assert said(("check", PROMPTS)) is None
    assert said.fn.given == [PROMPTS]  # type: ignore[attr-defined]
    plain = answers("plain", folder)
    assert plain(("describe",)) == {}
    assert plain(("check", PROMPTS)) is None
    plain.fn.describe = "no method"  # type: ignore[attr-defined]
    assert plain(("describe",)) == {}
