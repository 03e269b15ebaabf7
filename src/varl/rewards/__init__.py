"""Rewards: the contract, the OCR reward, and plain Python callables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from varl.models.fields import fill
from varl.policy import Prompt
from varl.rewards.base import FailureLog, Polygon, Reward, RewardOutput
from varl.rewards.checks import MOST_CHARACTERS

__all__ = ["FailureLog", "Polygon", "Reward", "RewardOutput", "check_reward", "load_reward"]


@dataclass(frozen=True)
class _Calling:
    """Options of every Python reward; see ``PythonReward`` and ``ProcessCall``."""

    timeout_s: float | None = None
    process: bool = False


def load_reward(spec: str | Mapping[str, Any]) -> Reward:
    """The reward that a recipe names.

    Args:
        spec: a name, or ``{"name": name, **options}``. The name is "ocr" (options: those of ``OcrReward``) or
            "module:attribute" for a Python callable of one's own, found from the current directory too
            (options: ``timeout_s`` of ``PythonReward``, and ``process``, to call it in a process of its own; the
            others go to the callable, or to the class that makes it).

    Raises:
        ValueError: if the name or the value of an option is not valid, or the user's module or class raises.
        TypeError: if an option is unknown, or what is named cannot be called.
        ModuleNotFoundError, AttributeError: if what "module:attribute" names is not there.
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'a reward needs a name: "ocr" or "module:attribute", got {spec!r}')
    strange = [key for key in options if not isinstance(key, str)]
    if strange:
        raise ValueError(f"reward {name!r}: options go by names, got {strange[0]!r:.80}")
    if name == "ocr":
        return _ocr_reward(options)
    if ":" in name:
        return _python_reward(name, options)
    raise ValueError(f'no reward {name!r}; there are "ocr" and "module:attribute" for a Python callable')


def _ocr_reward(options: dict[str, Any]) -> Reward:
    from varl.rewards.ocr import OcrReward
    from varl.rewards.python import UnknownOption

    try:
        return OcrReward(**options)
    except TypeError as error:
        raise UnknownOption(f"reward 'ocr': {error}") from error
    except ValueError as error:
        raise ValueError(f"reward 'ocr': {error}") from error


def _python_reward(name: str, options: dict[str, Any]) -> Reward:
    from varl.rewards.python import PythonReward, import_callable

    own: Mapping[str, Any] = {key: options.pop(key) for key in ("timeout_s", "process") if key in options}
    calling = fill(_Calling, own, f"reward {name!r}")
    if not calling.process:
        return PythonReward(import_callable(name, options), name=name, timeout_s=calling.timeout_s)
    from varl.rewards.process import ProcessCall

    return PythonReward(ProcessCall(name, options, calling.timeout_s), name=name)


def check_reward(reward: Reward, prompts: Sequence[Prompt], source: object = "") -> None:
    """Ask a reward that has a ``check(prompts)`` whether it can score all these prompts, before any picture is drawn.

    Args:
        source: where the prompts are from, for the message.

    Raises:
        ValueError: if it cannot, or a prompt wants more than ``MOST_CHARACTERS`` in its picture.
    """
    try:
        _check(reward, prompts)
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from error


def _check(reward: Reward, prompts: Sequence[Prompt]) -> None:
    for number, prompt in enumerate(prompts, 1):
        characters = sum(map(len, prompt.words))
        if characters > MOST_CHARACTERS:
            raise ValueError(
                f"prompt {number} of {len(prompts)} ({prompt.text!r:.80}) wants {characters:,} characters of text in "
                f"its picture; {MOST_CHARACTERS:,} are the most that are compared with what is read"
            )
    check = getattr(reward, "check", None)
    if callable(check) and prompts:
        check(prompts)
