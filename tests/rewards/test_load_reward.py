"""Rewards by name, and Python callables whose faults fail pictures instead of scoring them 0."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import torch

import tiny_runs
from patience import PATIENCE
from varl.errors import InputError
from varl.policy import Prompt
from varl.rewards import RewardOutput, check_reward, load_reward
from varl.rewards.engine import OcrConfig
from varl.rewards.ocr import OcrReward
from varl.rewards.python import PythonReward

IMAGES, PROMPTS = torch.zeros(3, 3, 8, 8), [Prompt()] * 3

MODULE = """
import torch
NOT_CALLABLE = 3
def brightness(images, prompts):
    return images.mean((1, 2, 3))
def scaled(images, prompts, factor=1.0):
    return [factor] * len(prompts)
class Constant:
    def __init__(self, value=1.0):
        self.value = value
    def __call__(self, images, prompts):
        return [self.value] * len(prompts)
    def describe(self):
        return {"version": "7"}
constant = Constant(0.25)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_reward_module.py").write_text(MODULE)
    (tmp_path / "imports_nothing.py").write_text("import there_is_no_such_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("my_reward_module", None)


def test_ocr_by_name_and_with_options():
    assert isinstance(load_reward("ocr"), OcrReward)
    reward = load_reward({"name": "ocr", "bag": "one-sided", "engine": {"threads": 2}})
    assert isinstance(reward, OcrReward)
    assert reward.options["bag"] == "one-sided"
    assert reward.reader.config.threads == 2


def test_functions_objects_and_classes_of_ones_own(module):
    assert load_reward("my_reward_module:brightness")(IMAGES + 0.5, PROMPTS).score.tolist() == [0.5] * 3
    assert load_reward("my_reward_module:constant")(IMAGES, PROMPTS).score.tolist() == [0.25] * 3
    made = load_reward({"name": "my_reward_module:Constant", "value": 2.0})
    assert made(IMAGES, PROMPTS).score.tolist() == [2.0] * 3
    assert made.describe() == {"reward": "my_reward_module:Constant", "version": "7"}
    scaled = load_reward({"name": "my_reward_module:scaled", "factor": 3.0, "timeout_s": 30.0})
    assert scaled(IMAGES, PROMPTS).score.tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("hpsv9", ValueError, "hpsv9"),
        ({"bag": "l1"}, ValueError, "needs a name"),
        ({"name": "ocr", "colour": "red"}, TypeError, "colour"),
        ({"name": "ocr", "engine": {"colour": "red"}}, TypeError, "colour"),
        ("no_such_module_at_all:fn", ModuleNotFoundError, "no_such_module_at_all"),
        ("imports_nothing:fn", ModuleNotFoundError, "^No module named 'there_is_no_such_module'"),
        ("my_reward_module:nothing", AttributeError, "nothing"),
        ("my_reward_module:NOT_CALLABLE", TypeError, "cannot be called"),
        (":fn", ValueError, "module:attribute"),
        ({"name": "my_reward_module:Constant", "colour": 1}, TypeError, "colour"),
        ({"name": "my_reward_module:scaled", "colour": 1}, TypeError, "colour"),
        ({"name": "my_reward_module:scaled", "timeout_s": -1}, ValueError, "timeout_s"),
    ],
)
def test_clear_errors(module, spec, error, words):
    with pytest.raises(error, match=words):
        load_reward(spec)


def all_failed(reward, reason):
    out = reward(IMAGES, PROMPTS)
    assert out.failed.tolist() == [True] * 3
    assert out.score.isnan().all()
    assert reward.failures.total == 3
    (kept,) = reward.failures.reasons
    assert reason in kept


def raises(images, prompts):
    raise RuntimeError("server is down")


def half_regions(images, prompts):
    return RewardOutput(torch.ones(3), torch.zeros(3, dtype=torch.bool), regions=[[]])


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (raises, "RuntimeError: server is down"),
        (lambda images, prompts: [1.0, 2.0], "3 numbers for 3 pictures"),
        (lambda images, prompts: torch.ones(3, 1), "shape (3, 1)"),
        (lambda images, prompts: None, "Error"),
        (lambda images, prompts: ["good"] * 3, "Error"),
        (half_regions, "regions must hold 3"),
        (lambda images, prompts: RewardOutput(torch.ones(2), torch.zeros(2)), "score must hold 3"),
    ],
)
def test_faults_fail_all_pictures(fn, reason):
    all_failed(PythonReward(fn), reason)


def test_a_number_that_is_not_finite_fails_its_picture_only():
    reward = PythonReward(lambda images, prompts: [1.0, float("nan"), float("inf")])
    out = reward(IMAGES, PROMPTS)
    assert out.failed.tolist() == [False, True, True]
    assert out.score[0] == 1
    assert out.score[1:].isnan().all()
    assert reward.failures.total == 2


def test_a_failed_score_reads_nan():
    out = RewardOutput.from_scores([1.0, float("inf")], 2)
    assert out.failed.tolist() == [False, True]
    assert out.score.isnan().tolist() == [False, True]


def test_a_full_output_passes_through():
    def full(images, prompts):
        return RewardOutput(
            torch.tensor([1.0, 2.0, float("nan")]),
            torch.tensor([False, True, False]),
            regions=[[], [], []],
            parts={"a": torch.ones(3)},
            texts=["x", "y", "z"],
        )

    out = PythonReward(full)(IMAGES, PROMPTS)
    assert out.failed.tolist() == [False, True, True]
    assert out.texts == ["x", "y", "z"]
    assert out.parts["a"].tolist() == [1, 1, 1]
    assert out.regions == [[], [], []]


def test_each_reason_is_warned_of_once_and_reasons_are_bounded(caplog):
    count = iter(range(100))

    def new_fault(images, prompts):
        raise RuntimeError(f"fault {next(count) // 2}")

    reward = PythonReward(new_fault)
    with caplog.at_level(logging.WARNING):
        for _ in range(60):
            reward(IMAGES, PROMPTS)
    assert reward.failures.total == 180
    assert len(reward.failures.reasons) == 21
    assert reward.failures.reasons["RuntimeError: fault 0"] == 6
    assert reward.failures.reasons["other"] == 60
    assert len(caplog.records) == 21


def test_a_hanging_callable_hits_the_time_limit():
    gate = threading.Event()
    calls = []

    def hangs(images, prompts):
        calls.append(1)
        gate.wait(PATIENCE)
        return [1.0] * 3

    reward = PythonReward(hangs, timeout_s=0.1)
    all_failed(reward, "no answer after 0.1 s")
    assert reward(IMAGES, PROMPTS).failed.all()  # at once: the first call still hangs
    assert len(calls) == 1
    gate.set()
    reward._hung.join()
    reward.timeout_s = PATIENCE
    assert not reward(IMAGES, PROMPTS).failed.any()
    assert "TimeoutError: an earlier call still hangs" in reward.failures.reasons


FAULTY = """
import sys, typing
CONSTANT = None
class Models:
    def __init__(self, size):
        self.models = {"large": 1}[size]
class Leaves:
    def __init__(self):
        sys.exit(0)
class Made:
    def __init__(self, value: float = 1.0, many: int | None = None, on: bool = False, plain=0.5, label: str = ""):
        self.given = value, many, on, plain, label
    def __call__(self, images, prompts):
        return [0.0] * len(prompts)
    def describe(self):
        raise KeyError("version")
    def check(self, prompts):
        if not prompts[0].words:
            raise ValueError("no words")
        raise KeyError("check")
def later(images, prompts, rate: "float" = 1.0):
    return [rate] * len(prompts)
def __getattr__(name):
    if name == "moody":
        raise RuntimeError("not today")
    raise AttributeError(name)
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty_rewards.py").write_text(FAULTY)
    (tmp_path / "breaks_on_import.py").write_text('import os\nsizes = {}\nsizes["mini"]\n')
    (tmp_path / "leaves_on_import.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "no_python.py").write_text("x = 1\ndef broken(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("faulty_rewards", "breaks_on_import", "leaves_on_import", "no_python"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("process", [False, pytest.param(True, id="process")])
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "breaks_on_import:fn"}, r"cannot be imported: KeyError: 'mini' \(breaks_on_import.py, line 3\)"),
        (
            {"name": "faulty_rewards:Models", "size": "mini"},
            r"cannot be made: KeyError: 'mini' \(faulty_rewards.py, line 6\)",
        ),
    ],
)
def test_errors_of_ones_own_code_keep_type_name_and_line(faulty, spec, words, process):
    with pytest.raises(ValueError, match=f"reward '{spec['name']}' {words}"):
        load_reward(spec | {"process": process})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("leaves_on_import:fn", r"cannot be imported: SystemExit: 0 \(leaves_on_import.py, line 2\)"),
        ("no_python:fn", r"cannot be imported: SyntaxError: .* \(no_python.py, line 2\)"),
        ("faulty_rewards:Leaves", r"cannot be made: SystemExit: 0 \(faulty_rewards.py, line 9\)"),
        ("faulty_rewards:moody", r"cannot be found: RuntimeError: not today \(faulty_rewards.py, line 25\)"),
    ],
)
def test_whatever_ones_own_code_raises_is_bad_input(faulty, spec, words):
    with pytest.raises(ValueError, match=words):
        load_reward(spec)


def test_a_module_that_is_missing_inside_is_named_with_its_line(module):
    with pytest.raises(
        ModuleNotFoundError, match=r"reward 'imports_nothing:fn' imports \(imports_nothing.py, line 1\)"
    ):
        load_reward("imports_nothing:fn")


def test_unknown_things_are_errors_of_the_input(faulty):
    """Also where only those of the library's own classes are."""
    for spec in (
        {"name": "faulty_rewards:Made", "colour": 1},
        "faulty_rewards:nothing",
        "faulty_rewards:CONSTANT",
        {"name": "ocr", "colour": 1},
    ):
        with pytest.raises(InputError):
            load_reward(spec)


def test_a_description_that_fails_is_no_end_of_an_evaluation(faulty):
    said = load_reward("faulty_rewards:Made").describe()
    assert said["describe() failed"] == "KeyError: 'version' (faulty_rewards.py, line 16)"


def test_a_check_of_ones_own(faulty):
    reward = load_reward("faulty_rewards:Made")
    with pytest.raises(ValueError, match=r"source: reward 'faulty_rewards:Made': no words"):
        check_reward(reward, [Prompt()], "source")
    with pytest.raises(ValueError, match=r"its check failed: KeyError: 'check' \(faulty_rewards.py, line 20\)"):
        check_reward(reward, [Prompt(words=("a",))])
    check_reward(load_reward("faulty_rewards:later"), [Prompt()])


def test_options_that_come_as_text_are_what_their_parameters_are(faulty):
    text = {"value": "2", "many": "3", "on": "true", "plain": "0.25", "label": "7", "timeout_s": "2.5"}
    reward = load_reward({"name": "faulty_rewards:Made", **text})
    assert reward.fn.given == (2.0, 3, True, 0.25, "7")
    assert reward.timeout_s == 2.5
    assert load_reward({"name": "faulty_rewards:Made", "many": "null"}).fn.given[1] is None
    assert load_reward({"name": "faulty_rewards:later", "rate": "0.5"})(IMAGES, PROMPTS).score.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "faulty_rewards:Made", "many": "few"}, "reward 'faulty_rewards:Made': many must be int, got 'few'"),
        ({"name": "faulty_rewards:Made", "plain": "x"}, "plain must be float, got 'x'"),
        ({"name": "faulty_rewards:later", "timeout_s": "soon"}, "reward 'faulty_rewards:later': timeout_s must be"),
        ({"name": "faulty_rewards:later", "timeout_s": float("nan")}, "timeout_s must be positive"),
        ({"name": "faulty_rewards:later", "process": "perhaps"}, "process must be bool"),
        ({"name": "ocr", "engine": {"threads": "many"}}, "reward 'ocr': engine: threads must be int, got 'many'"),
        ({"name": "ocr", "engine": {"threads": "0"}}, "reward 'ocr': .*0"),
        ({"name": "ocr", "engine": "large"}, "reward 'ocr': engine is a mapping"),
        ({"name": "ocr", "timeout_s": "soon"}, "reward 'ocr': options: timeout_s must be"),
        ({"name": "ocr", "fold": "perhaps"}, "reward 'ocr': options: fold must be bool"),
        ({"name": "ocr", "timeout_s": float("nan")}, "reward 'ocr': time limits must be positive"),
        ({"name": "ocr", "eps": float("nan")}, "reward 'ocr': eps must be from 0 to 1, got nan"),
        ({"name": "ocr", "eps": -1}, "reward 'ocr': eps must be from 0 to 1, got -1.0"),
        ({"name": "ocr", 5: 6}, "reward 'ocr': options go by names, got 5"),
        ({"name": "faulty_rewards:later", 5: 6}, "reward 'faulty_rewards:later': options go by names, got 5"),
        ({"name": "ocr", "confusables": "0o"}, "reward 'ocr': confusables is a mapping"),
    ],
)
def test_values_that_options_cannot_have(faulty, spec, words):
    with pytest.raises(ValueError, match=words):
        load_reward(spec)


def test_options_of_the_ocr_reward_from_the_command_line():
    words = ("--reward.name", "ocr", "--reward.engine.threads", "2", "--reward.eps", "1e-4", "--reward.fold", "false")
    reward = load_reward(tiny_runs.parse("train", *words).reward)
    assert reward.reader.config == OcrConfig(threads=2)
    assert (reward.options["eps"], reward.fold) == (1e-4, False)
    text = {"threads": "2", "det_thresh": "0.4", "word_boxes": "true", "det_model": "null"}
    assert OcrReward(text).reader.config == OcrConfig(threads=2, det_thresh=0.4, word_boxes=True)
