"""A reward that ends the process, or leaves it changed, costs its pictures at most; the run goes on unharmed."""

from __future__ import annotations

import asyncio
import gc
import locale
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny_runs
from patience import PATIENCE
from varl.config import EvaluationConfig, MethodConfig, PolicyConfig, PromptConfig, RunConfig, TrainConfig
from varl.policy import Prompt
from varl.rewards import RewardOutput
from varl.rewards.engine import Line
from varl.rewards.guard import undisturbed
from varl.rewards.ocr import OcrReward
from varl.rewards.python import PythonReward
from varl.rewards.scoring import Scoring
from varl.run.metrics import read_metrics
from varl.trainer import Trainer

PROMPTS = [Prompt(words=("TEA",)), Prompt(words=("BUS",)), Prompt(words=("CAT",))]


class Odd(BaseException):
    pass


def leave() -> None:
    raise GeneratorExit


def own() -> None:
    raise Odd("odd")


def cancelled() -> None:
    raise asyncio.CancelledError


def in_a_helper() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(os._exit, 0).result()


ENDS: list[Callable[[], Any]] = [
    lambda: sys.exit(0), lambda: sys.exit("bye"), lambda: os._exit(0), lambda: os._exit(3), in_a_helper, leave, own,
    cancelled,
]  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("timeout_s", [None, 30.0])
@pytest.mark.parametrize("end", ENDS)
def test_what_would_end_the_run_fails_the_pictures(
    end: Callable[[], Any], timeout_s: float | None, overlap: bool
) -> None:
    calls = []

    def fn(images: Tensor, prompts: list[Prompt]) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1:
            end()
        return images.mean((1, 2, 3))

    reward, real = PythonReward(fn, timeout_s=timeout_s), os._exit
    with ThreadPoolExecutor(1) as pool:
        scoring = Scoring(reward, PROMPTS, pool if overlap else None)
        for part in torch.full((3, 3, 4, 4), 0.5).split(1):
            scoring.add(part)
        images, output = scoring.result()
    assert images.shape == (3, 3, 4, 4)
    assert output.failed.tolist() == ([True, False, False] if overlap else [True] * 3)
    assert reward.failures.total == int(output.failed.sum())
    assert os._exit is real
    assert not reward(images, PROMPTS).failed.any()  # it goes on


def test_the_reason_says_what_it_was() -> None:
    reward = PythonReward(lambda images, prompts: os._exit(7))
    reward(torch.zeros(3, 3, 4, 4), PROMPTS)
    assert reward.failures.reasons == {"SystemExit: os._exit(7)": 3}


def test_ctrl_c_passes() -> None:
    def fn(images: Tensor, prompts: list[Prompt]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PythonReward(fn)(torch.zeros(3, 3, 4, 4), PROMPTS)


def test_processes_that_a_reward_forks_end_by_their_own_exit_code() -> None:
    def fn(images: Tensor, prompts: list[Prompt]) -> list[float]:
        child = os.fork()
        if child == 0:
            os._exit(5)
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))] * 3

    assert PythonReward(fn)(torch.zeros(3, 3, 4, 4), PROMPTS).score.tolist() == [5.0] * 3


SPOIL: list[Callable[[Tensor, list[Prompt]], Any]] = [
    lambda images, prompts: images.zero_(),
    lambda images, prompts: images.resize_(0),
    lambda images, prompts: images.numpy().fill(7),
    lambda images, prompts: images.set_(torch.zeros(1)),
    lambda images, prompts: prompts.clear(),
    lambda images, prompts: prompts.__setitem__(0, None),
]


@pytest.mark.parametrize("spoil", SPOIL)
def test_what_a_reward_does_to_its_input_stays_with_it(spoil: Callable[[Tensor, list[Prompt]], Any]) -> None:
    def fn(images: Tensor, prompts: list[Prompt]) -> list[float]:
        spoil(images, prompts)
        return [1.0, 2.0, 3.0]

    images, prompts = torch.rand(3, 3, 4, 4), list(PROMPTS)
    before = images.clone()
    assert PythonReward(fn)(images, prompts).score.tolist() == [1, 2, 3]
    assert torch.equal(images, before)
    assert prompts == PROMPTS


def test_what_a_reward_gave_is_its_own_no_more() -> None:
    """A buffer used again for the next part of an update."""
    buffer, polygon = torch.zeros(3), np.zeros((4, 2), np.float32)

    def fn(images: Tensor, prompts: list[Prompt]) -> Any:
        buffer.add_(1)
        polygon.__iadd__(1)
        return RewardOutput(buffer, regions=[[polygon]] * 3, parts={"part": buffer})

    reward = PythonReward(fn)
    first, second = (reward(torch.zeros(3, 3, 4, 4), PROMPTS) for _ in range(2))
    assert (first.score.tolist(), second.score.tolist()) == ([1.0] * 3, [2.0] * 3)
    assert first.parts["part"].tolist() == [1.0] * 3
    assert first.regions is not None
    assert first.regions[0][0].max() == 1


HELD: list[Any] = []
"""What was entered: torch leaves an inference mode whose object is gone."""


def enter(context: Any) -> None:
    HELD.append(context)
    context.__enter__()


def set_handlers() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def leave_an_alarm() -> None:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.2)


MODES: dict[str, Callable[[], Any]] = {
    "grad": lambda: torch.set_grad_enabled(False),
    "inference": lambda: enter(torch.inference_mode()),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(3),
    "determinism": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "cudnn": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: enter(torch.autocast("cpu", torch.bfloat16)),
    "autocast type": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "numpy errors": lambda: np.seterr(all="raise"),
    "folder": lambda: os.chdir("/"),
    "handlers": set_handlers,
    "alarm": leave_an_alarm,
    "garbage": gc.disable,
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
}


def precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set in two ways that disagree
        return "mixed"


def modes() -> dict[str, Any]:
    nesting = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": (torch.get_default_device(), torch._C._len_torch_function_stack()),
        "threads": torch.get_num_threads(),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "matmul precision": precision(),
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "anomalies": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), nesting),
        "autocast type": torch.get_autocast_dtype("cpu"),
        "numpy errors": np.geterr(),
        "folder": os.getcwd(),
        "handlers": (
            signal.getsignal(signal.SIGTERM),
            signal.getsignal(signal.SIGINT),
            signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        ),
        "alarm": (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)),
        "garbage": gc.isenabled(),
        "locale": locale.setlocale(locale.LC_ALL),
    }


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_what_a_reward_changes_in_the_process_is_put_back(name: str, raises: bool) -> None:
    before, inside = modes(), {}

    def fn(images: Tensor, prompts: list[Prompt]) -> Any:
        MODES[name]()
        inside.update(modes())
        if raises:
            raise SystemExit
        return [1.0, 2.0, 3.0]

    output = PythonReward(fn)(torch.zeros(3, 3, 4, 4), PROMPTS)
    assert {key for key in before if inside[key] != before[key]} >= {name}
    assert modes() == before
    assert output.score.nan_to_num(-1).tolist() == ([-1.0] * 3 if raises else [1.0, 2.0, 3.0])
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert not weight.is_inference()


def test_modes_of_the_caller_hold_inside() -> None:
    with torch.no_grad(), undisturbed():
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), undisturbed():
        assert torch.is_inference_mode_enabled()


def test_a_call_that_hangs_leaves_the_working_directory() -> None:
    gate, here = threading.Event(), os.getcwd()

    def fn(images: Tensor, prompts: list[Prompt]) -> Any:
        os.chdir("/")
        gate.wait(PATIENCE)

    reward = PythonReward(fn, timeout_s=0.1)
    reward(torch.zeros(3, 3, 4, 4), PROMPTS)
    assert os.getcwd() == here
    gate.set()
    assert reward._hung is not None
    reward._hung.join()
    assert os.getcwd() == here


class Reader:
    """Does something, then reads TEA in every picture."""

    def __init__(self, do: Callable[[], Any], **line: Any) -> None:
        self.do, self.line = do, {"text": "TEA", "confidence": 1.0, "polygon": np.zeros((4, 2), np.float32)} | line

    def read(self, images: Tensor) -> list[list[Line]]:
        self.do()
        images.zero_()
        return [[Line(**self.line)]] * len(images)

    def describe(self) -> dict[str, str]:
        return {}


@pytest.mark.parametrize("end", ENDS)
def test_a_reader_of_ones_own_cannot_end_the_run(end: Callable[[], Any]) -> None:
    output = OcrReward(Reader(end))(torch.zeros(3, 3, 4, 4), PROMPTS)
    assert output.failed.all()
    assert output.regions == [[], [], []]
    assert set(output.parts) == {"completeness", "similarity", "penalty", "word_accuracy"}


def test_a_reader_of_ones_own_leaves_all_as_it_was() -> None:
    images, before = torch.ones(3, 3, 4, 4), modes()
    output = OcrReward(Reader(lambda: [do() for name, do in MODES.items()]))(images, PROMPTS)
    assert output.score[0] > 1.9
    assert modes() == before
    assert (images == 1).all()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"polygon": np.zeros((200_000, 2))}, "5,000 points"),
        ({"polygon": np.full((4, 2), np.nan)}, "finite"),
        ({"polygon": np.zeros((4, 3))}, "polygons"),
        ({"text": "a" * 100_000}, "100,000"),
        ({"text": None}, "TypeError"),
    ],
)
def test_a_reader_of_ones_own_fails_pictures_with_what_is_no_reading(line: dict[str, Any], reason: str) -> None:
    reward = OcrReward(Reader(lambda: None, **line))
    assert reward(torch.zeros(3, 3, 4, 4), PROMPTS).failed.all()
    (kept,) = reward.failures.reasons
    assert reason in kept


LEAVING = """
import os, posix, tiny_runs
from os import _exit
from pathlib import Path
def once(images, prompts, marker, leave=_exit):
    if Path(marker + "1").exists() and not Path(marker + "2").exists():
        Path(marker + "2").touch()
        leave(0)
    Path(marker + "1").touch()
    return tiny_runs.score(images, prompts)
def uncaught(images, prompts, marker):
    return once(images, prompts, marker, posix._exit)
"""


def leaving(folder: Path, name: str) -> Trainer:
    """A run of 3 updates whose reward exits with code 0 in the second."""
    weights = folder / "w.safetensors"
    return Trainer(
        TrainConfig(
            policy=PolicyConfig(weights=str(weights if weights.exists() else tiny_runs.tiny_weights(weights))),
            prompts=PromptConfig(count=2),
            reward={"name": f"leaving:{name}", "marker": str(folder / "called")},
            method=MethodConfig(prompts=2, group=2, update="full", beta=0),
            evaluation=EvaluationConfig(enabled=False),
            run=RunConfig(out=folder / "run", updates=3, save_every=1, device="cpu", gallery_every=0),
        )
    )


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    (tmp_path / "leaving.py").write_text(LEAVING)
    tests = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(tmp_path)
    yield [str(tests), str(tests.parent / "src"), str(tests.parent), str(tmp_path)]
    sys.modules.pop("leaving", None)


def failed_pictures(folder: Path) -> list[int]:
    return [line["failed_pictures"] for line in read_metrics(folder / "run")]


def test_a_run_whose_reward_exits_with_0_goes_on(tmp_path: Path, places: list[str]) -> None:
    """By a name that its module has imported."""
    leaving(tmp_path, "once").run()
    assert failed_pictures(tmp_path) == [0, 4, 0]


@pytest.mark.slow
def test_an_exit_that_cannot_be_caught_does_not_look_finished(tmp_path: Path, places: list[str]) -> None:
    code = "import sys; from pathlib import Path; from rewards.test_unkind import leaving; "
    code += "leaving(Path(sys.argv[1]), 'uncaught').run()"
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (tmp_path / "called2").exists(), ended.stderr
    assert failed_pictures(tmp_path) == [0]
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    leaving(tmp_path, "uncaught").run()
    assert failed_pictures(tmp_path) == [0, 0, 0]
    assert (tmp_path / "run" / "weights.safetensors").exists()
