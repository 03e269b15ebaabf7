"""Callables of one's own, case by case: how they are found, what their options become, and what is said of them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from patience import PATIENCE
from varl.errors import InputError
from varl.policy import Prompt
from varl.rewards import RewardOutput
from varl.rewards.python import NoSuchAttribute, PythonReward, UnknownOption, import_callable
from varl.run.signals import Interrupts

MINE = """
import json
from others_module import Elsewhere, OfNoSigns
NUMBER = 3
def one(images): return images
def kept(images, prompts, **options): return options
def typed(images, prompts, whole: float = 1, nothing: None = None, either: "int | float" = 1, few: bool | None = None,
          plain=1, on=False, name="x", missing=None): return {
    "whole": whole, "nothing": nothing, "either": either, "few": few, "plain": plain, "on": on, "name": name,
    "missing": missing}
class Made:
    def __init__(self, text="{"):
        json.loads(text)
    def __call__(self, images, prompts): return [1.0] * len(prompts)
class OfNowhere(Made):
    __module__ = "no_module_of_this_name.inside"
of_no_signs = OfNoSigns()
"""
OTHERS = """
import json
from pathlib import Path
class Elsewhere:
    def __init__(self):

        json.loads("{")
class OfNoSigns:
    @property
    def __signature__(self):
        return Path("/there/is/none").read_text()
    def __call__(self, images, prompts): return []
"""
MODULES = {
    "mine_module": MINE,
    "others_module": OTHERS,
    "in_json": "import json\n\njson.loads('{')\n",
    "missing_below": "\nimport missing_here\n",
    "missing_here": "\n\n\nimport missing_at_all\n",
    "begins_alike": "import begins\n",
    "no_name": "\nraise ModuleNotFoundError('no wheels')\n",
}
IMAGES, PROMPTS = torch.zeros(2, 3, 4, 4), [Prompt("a"), Prompt("b")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("spec", ["", ":", "mine_module", "mine_module:", ":one", "mine_module;one"])
def test_what_is_no_name_of_a_callable(spec: str) -> None:
    with pytest.raises(ValueError, match=rf"^a Python reward is named \"module:attribute\", got {spec!r}$"):
        import_callable(spec)


def test_the_current_directory_is_importable_and_comes_first(folder: Path) -> None:
    here, before = os.getcwd(), list(sys.path)
    import_callable("mine_module:one")
    assert sys.path == [here, *before]
    import_callable("mine_module:one")
    assert sys.path == [here, *before]
    sys.path[:] = ["", *before]  # it stands for the current directory
    import_callable("mine_module:one")
    assert sys.path == ["", *before]
    sys.path[:] = [*before, here]
    import_callable("mine_module:one")
    assert sys.path == [*before, here]


def test_without_options_a_callable_is_as_it_is() -> None:
    """Whatever it takes."""
    assert import_callable("mine_module:one") is import_callable("mine_module:one", {})
    assert import_callable("mine_module:one")(3) == 3
    assert import_callable("mine_module:kept")(1, 2) == {}
    assert import_callable("mine_module:kept", MappingProxyType({"a": "2", "b": [1]}))(1, 2) == {"a": "2", "b": [1]}
    # Of this one Python cannot say what it takes.
    assert import_callable("builtins:max", {"default": "3"})([]) == "3"


@pytest.mark.parametrize("options", [{}, {"a": 1}])
def test_what_cannot_be_called(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownOption, match=r"^reward 'mine_module:NUMBER' is a int, which cannot be called$"):
        import_callable("mine_module:NUMBER", options)
    with pytest.raises(UnknownOption, match=r"^reward 'builtins:dict' is a dict, which cannot be called$"):
        import_callable("builtins:dict", options)


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(NoSuchAttribute, match=r"^reward 'mine_module:none': <module .*> has no attribute 'none'$"):
        import_callable("mine_module:none")
    with pytest.raises(UnknownOption, match=r"^reward 'mine_module:Made' cannot take the options \['a', 'b'\]: "):
        import_callable("mine_module:Made", {"b": 1, "a": 2})
    with pytest.raises(UnknownOption, match=r"^reward 'mine_module:one' cannot take the options \['a'\]: "):
        import_callable("mine_module:one", {"a": 2})


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        ("absent_module", "absent_module", "reward '{1}': no module '{2}' in {0} or on the Python path"),
        ("absent_one.two", "absent_one", "reward '{1}': no module '{2}' in {0} or on the Python path"),
        ("missing_below", "missing_at_all", "No module named '{2}', which reward '{1}' imports ({3}.py, line 2)"),
        ("begins_alike", "begins", "No module named '{2}', which reward '{1}' imports ({3}.py, line 1)"),
        ("no_name", None, "no wheels, which reward '{1}' imports ({3}.py, line 2)"),
    ],
)
def test_modules_that_are_missing(folder: Path, module: str, name: str | None, words: str) -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        import_callable(f"{module}:fn")
    assert str(caught.value) == words.format(os.getcwd(), f"{module}:fn", name, module)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("in_json:fn", {}, r"imported: JSONDecodeError: .* \(in_json.py, line 3\)"),
        ("mine_module:Made", {}, r"made: JSONDecodeError: .* \(mine_module.py, line 13\)"),
        # A class of another module, which the named one has imported; and one that tells no module there is.
        ("mine_module:Elsewhere", {}, r"made: JSONDecodeError: .* \(others_module.py, line 7\)"),
        ("mine_module:OfNowhere", {}, r"made: JSONDecodeError: .* \(decoder.py, line \d+\)"),
        ("mine_module:of_no_signs", {"a": 1}, r"called: FileNotFoundError: .* \(others_module.py, line 11\)"),
    ],
)
def test_faults_of_ones_own_are_placed_in_ones_own_file(spec: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward '{spec}' cannot be {words}$"):
        import_callable(spec, options)


DEFAULTS = {
    "whole": 1, "nothing": None, "either": 1, "few": None, "plain": 1, "on": False, "name": "x", "missing": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "became"),
    [
        ({"whole": "2.5"}, 2.5),  # the annotation counts before the default
        ({"nothing": "2"}, "2"),
        ({"either": "2"}, 2),
        ({"few": "true"}, True),
        ({"few": "null"}, None),
        ({"plain": "2"}, 2),
        ({"on": "true"}, True),
        ({"name": "2"}, "2"),
        ({"missing": "2"}, "2"),
        ({"whole": [1]}, [1]),  # only texts are read
        ({"plain": 2.5}, 2.5),
    ],
)
def test_texts_become_what_parameters_are(given: dict[str, Any], became: Any) -> None:
    found = import_callable("mine_module:typed", given)(None, None)
    [name] = given
    assert found == DEFAULTS | {name: became}
    assert type(found[name]) is type(became)


@pytest.mark.parametrize(
    ("name", "kinds"), [("whole", "float"), ("either", "int or float"), ("few", "bool"), ("plain", "int")]
)
def test_texts_that_parameters_cannot_be(name: str, kinds: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward 'mine_module:typed': {name} must be {kinds}, got 'odd'$"):
        import_callable("mine_module:typed", {name: "odd"})


def ones(images: Any, prompts: Any) -> list[float]:
    return [1.0] * len(prompts)


class Ones:
    def __call__(self, images: Any, prompts: Any) -> list[float]:
        return ones(images, prompts)


def test_names() -> None:
    assert PythonReward(ones).describe() == {"reward": "ones"}
    assert PythonReward(Ones()).describe() == {"reward": "Ones"}
    assert PythonReward(Ones(), "named").describe() == {"reward": "named"}
    assert PythonReward(Ones(), 7).describe() == {"reward": "7"}  # type: ignore[arg-type]
    assert PythonReward(ones, "named").failures.source == "reward named"
    with pytest.raises(TypeError, match=r"^a reward must be callable, got int$"):
        PythonReward(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), threading.TIMEOUT_MAX * 1.01])
def test_limits_that_are_none(timeout_s: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^reward 'named': timeout_s must be positive, got {timeout_s}$".replace("+", r"\+")
    ):
        PythonReward(ones, "named", timeout_s)  # fmt: skip


@pytest.mark.parametrize("timeout_s", [0.75, threading.TIMEOUT_MAX])
def test_limits_at_the_edge(timeout_s: float) -> None:
    assert PythonReward(ones, timeout_s=timeout_s).timeout_s == timeout_s


def raising(error: BaseException) -> Any:
    """A reward whose own methods raise."""

    def do(*given: Any) -> Any:
        raise error

    fn = Ones()
    fn.describe, fn.check = do, do  # type: ignore[attr-defined]
    return PythonReward(fn, "named")


HERE = Path(__file__).name


def test_what_a_callable_says_of_itself() -> None:
    fn = Ones()
    fn.describe = lambda: {1: 2, "reward": "renamed"}  # type: ignore[attr-defined]
    assert PythonReward(fn, "named").describe() == {"reward": "renamed", "1": "2"}
    fn.describe = "no method"  # type: ignore[attr-defined]
    assert PythonReward(fn, "named").describe() == {"reward": "named"}
    line = raising.__code__.co_firstlineno + 4
    said = {"reward": "named", "describe() failed": f"SystemExit: 0 ({HERE}, line {line})"}
    assert raising(SystemExit(0)).describe() == said
    with pytest.raises(KeyboardInterrupt):
        raising(KeyboardInterrupt()).describe()


def test_what_a_callable_says_of_prompts() -> None:
    line = raising.__code__.co_firstlineno + 4
    with pytest.raises(ValueError, match=r"^reward 'named': no words$"):
        raising(ValueError("no words")).check(PROMPTS)
    with pytest.raises(ValueError, match=rf"^reward 'named': its check failed: SystemExit: 0 \({HERE}, line {line}\)$"):
        raising(SystemExit(0)).check(PROMPTS)
    for error in (KeyboardInterrupt(), InputError("as it is")):
        with pytest.raises(type(error)) as caught:
            raising(error).check(PROMPTS)
        assert caught.value is error
    seen: list[Any] = []
    fn, given = Ones(), tuple(PROMPTS)
    fn.check = seen.append  # type: ignore[attr-defined]
    PythonReward(fn).check(given)
    assert seen == [PROMPTS]
    assert seen[0] is not PROMPTS
    fn.check = "no method"  # type: ignore[attr-defined]
    PythonReward(fn).check(given)


def test_fields_once_given_stay() -> None:
    """Those of outputs of which not one picture was scored are none yet."""
    nan = torch.full((2,), torch.nan)
    outputs = iter(
        [
            RewardOutput(nan, parts={"lost": nan}, texts=["x", "y"]),
            RewardOutput(torch.ones(2)),
            RewardOutput(torch.tensor([1.0, torch.nan]), parts={"a": torch.ones(2)}),
            RewardOutput(torch.ones(2), parts={"b": torch.zeros(2)}, regions=[[], []]),
            RewardOutput(torch.ones(2)),
        ]
    )
    reward = PythonReward(lambda images, prompts: next(outputs))
    found = [reward(IMAGES, PROMPTS) for _ in range(5)]
    assert [set(one.parts) for one in found] == [{"lost"}, set(), {"a"}, {"a", "b"}, {"a", "b"}]
    assert [one.regions for one in found] == [None, None, None, [[], []], [[], []]]
    assert [one.texts for one in found] == [["x", "y"], None, None, None, None]
    assert found[3].parts["b"].tolist() == [0, 0]
    assert found[3].parts["a"].isnan().all()
    assert [one.score.tolist() for one in found[1:2] + found[3:]] == [[1, 1]] * 3


def test_a_call_with_a_limit_is_one_of_a_thread_that_holds_up_no_end() -> None:
    seen: list[Any] = []

    def fn(images: Any, prompts: Any) -> list[float]:
        time.sleep(0.05)
        thread = threading.current_thread()
        seen.append((thread.name, thread.daemon, thread is threading.main_thread(), os.getcwd()))
        return ones(images, prompts)

    assert PythonReward(fn, "named", PATIENCE)(IMAGES, PROMPTS).score.tolist() == [1, 1]
    assert seen == [("reward named", True, False, os.getcwd())]
    PythonReward(fn, "named")(IMAGES, PROMPTS)
    assert seen[1][2]


@pytest.mark.parametrize("timeout_s", [None, PATIENCE])
def test_what_a_callable_raises_is_the_reason(timeout_s: float | None) -> None:
    def fn(images: Any, prompts: Any) -> Any:
        raise KeyError("mini")

    reward = PythonReward(fn, "named", timeout_s)
    assert reward(IMAGES, PROMPTS).failed.tolist() == [True, True]
    assert reward.failures.reasons == {"KeyError: 'mini'": 2}

    def interrupted(images: Any, prompts: Any) -> Any:
        raise KeyboardInterrupt

    reward = PythonReward(interrupted, timeout_s=timeout_s)
    with pytest.raises(KeyboardInterrupt):
        reward(IMAGES, PROMPTS)
    with Interrupts():  # which note Ctrl-C instead
        assert reward(IMAGES, PROMPTS).failed.all()
        with pytest.raises(ValueError, match=r"its check failed: KeyboardInterrupt \("):
            raising(KeyboardInterrupt()).check(PROMPTS)
    assert reward.failures.reasons == {"KeyboardInterrupt": 2}


class Number:
    """Raises when it is looked at."""

    def __float__(self) -> float:
        raise KeyboardInterrupt


def test_what_is_raised_by_what_a_callable_gives_fails_the_pictures() -> None:
    reward = PythonReward(lambda images, prompts: [Number()] * 2)
    with Interrupts():
        assert reward(IMAGES, PROMPTS).failed.all()
    assert reward.failures.reasons == {"KeyboardInterrupt": 2}


def test_a_limit_is_told_without_needless_digits() -> None:
    gate = threading.Event()
    reward = PythonReward(lambda images, prompts: gate.wait(PATIENCE), timeout_s=0.0625)
    for _ in range(2):
        assert reward(IMAGES, PROMPTS).failed.all()
    gate.set()
    assert reward._hung is not None
    reward._hung.join()  # its end puts this test's working directory back
    assert reward.failures.reasons == {
        "TimeoutError: no answer after 0.0625 s": 2,
        "TimeoutError: an earlier call still hangs": 2,
    }
