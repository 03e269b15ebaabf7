"""Rewards: the contract, the OCR reward, and plain Python callables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from varl.rewards.base import FailureLog, Polygon, Reward, RewardOutput

__all__ = ["FailureLog", "Polygon", "Reward", "RewardOutput", "load_reward"]


def load_reward(spec: str | Mapping[str, Any]) -> Reward:
    """The reward that a recipe names.

    Args:
        spec: a name, or ``{"name": name, **options}``. The name is "ocr" (options: those of ``OcrReward``) or
            "module:attribute" for a Python callable of one's own, found from the current directory too
            (options: ``timeout_s`` of ``PythonReward``; the others go to the callable, or to the class that
            makes it).

    Raises:
        ValueError: if the name or the value of an option is not valid.
        TypeError: if an option is unknown, or what is named cannot be called.
        ModuleNotFoundError, AttributeError: if what "module:attribute" names is not there.
    """
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'a reward needs a name: "ocr" or "module:attribute", got {spec!r}')
    if name == "ocr":
        from varl.rewards.ocr import OcrReward

        try:
            return OcrReward(**options)
        except TypeError as error:
            raise TypeError(f"reward 'ocr': {error}") from error
    if ":" in name:
        from varl.rewards.python import PythonReward, import_callable

        timeout_s = options.pop("timeout_s", None)
        return PythonReward(import_callable(name, options), name=name, timeout_s=timeout_s)
    raise ValueError(f'no reward {name!r}; there are "ocr" and "module:attribute" for a Python callable')
