"""A reward written by the user: any Python callable, named as "module:attribute"."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varl.policy import Prompt
from varl.rewards.base import FailureLog, RewardOutput

__all__ = ["PythonReward", "import_callable"]


def import_callable(spec: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The callable named by "module:attribute" (dots allowed in both; the current directory is importable).

    A class is instantiated with ``options``; a function gets them as keyword arguments with each call.

    Raises:
        ValueError: if ``spec`` is not of this form.
        ModuleNotFoundError: if there is no such module (an error inside the module is raised as it is).
        AttributeError: if the module has no such attribute.
        TypeError: if it cannot be called, or not with these options.
    """
    module_name, colon, path = spec.partition(":")
    if not colon or not module_name or not path:
        raise ValueError(f'a Python reward is named "module:attribute", got {spec!r}')
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there; what it imports is not
        raise ModuleNotFoundError(
            f"reward {spec!r}: no module {error.name!r} in {here} or on the Python path", name=error.name
        ) from error
    for name in path.split("."):
        if not hasattr(target, name):
            raise AttributeError(f"reward {spec!r}: {target!r} has no attribute {name!r}")
        target = getattr(target, name)
    options = dict(options or {})
    if inspect.isclass(target):
        _check_call(spec, target, (), options)
        target = target(**options)
    elif options:
        if callable(target):
            _check_call(spec, target, (None, None), options)
        target = partial(target, **options) if callable(target) else target
    if not callable(target):
        raise TypeError(f"reward {spec!r} is a {type(target).__name__}, which cannot be called")
    return target


def _check_call(spec: str, target: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(target)
    except ValueError:  # builtins without a signature
        return
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise TypeError(f"reward {spec!r} cannot take the options {sorted(options)}: {error}") from error


class PythonReward:
    """Guards a plain callable: whatever goes wrong in it fails pictures, with the reason kept, and ends no
    run.

    The callable is called as ``fn(images [B, 3, H, W] in [0, 1], prompts)`` and returns B numbers (a tensor,
    array or list) or a ``RewardOutput``. All B pictures fail if it raises, returns something of another
    length or shape, or takes too long; those with a non-finite number fail alone. None is scored 0.

    Args:
        fn: the callable.
        name: how the run's record and the warnings name it.
        timeout_s: seconds a call may take; None: no limit. The callable then runs in a thread, and a thread
            cannot be killed: one that hangs stays (and whatever it holds), and until it returns further calls
            fail at once.

    Attributes:
        failures: how many pictures failed so far, and why.
    """

    def __init__(self, fn: Callable[..., Any], name: str | None = None, timeout_s: float | None = None) -> None:
        if not callable(fn):
            raise TypeError(f"a reward must be callable, got {type(fn).__name__}")
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.fn, self.timeout_s = fn, timeout_s
        self.name = name or getattr(fn, "__qualname__", type(fn).__qualname__)
        self.failures = FailureLog(f"reward {self.name}")
        self._hung: threading.Thread | None = None

    def describe(self) -> dict[str, str]:
        """The callable's name, and what it says of itself if it has a ``describe()``."""
        own = getattr(self.fn, "describe", None)
        said = {str(k): str(v) for k, v in own().items()} if callable(own) else {}
        return {"reward": str(self.name), **said}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score B pictures; never raises for what the callable does (``KeyboardInterrupt`` and the like
        pass)."""
        batch = len(prompts)
        try:
            result = self.fn(images, prompts) if self.timeout_s is None else self._limited(images, prompts)
            output = result if isinstance(result, RewardOutput) else RewardOutput.from_scores(result, batch)
            output = checked(output, batch)
        except Exception as error:
            self.failures.add(f"{type(error).__name__}: {error}", batch)
            return RewardOutput(torch.full((batch,), torch.nan), torch.ones(batch, dtype=torch.bool))
        if output.failed.any():
            self.failures.add("no finite score, or marked as failed by the reward", int(output.failed.sum()))
        return output

    def _limited(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        if self._hung is not None and self._hung.is_alive():
            raise TimeoutError("an earlier call still hangs")
        outcome: dict[str, Any] = {}

        def call() -> None:
            try:
                outcome["result"] = self.fn(images, prompts)
            except BaseException as error:  # handed over to the caller's thread, whatever it is
                outcome["error"] = error

        thread = threading.Thread(target=call, name=f"reward {self.name}", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if thread.is_alive():
            self._hung = thread
            raise TimeoutError(f"no answer after {self.timeout_s:g} s")
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]


def checked(output: RewardOutput, batch: int) -> RewardOutput:
    """The output on the CPU, with non-finite scores marked as failed and failed scores NaN.

    Raises:
        ValueError: if a field does not hold ``batch`` entries, or a region is no polygon.
        TypeError: if a text is none.
    """

    def vector(name: str, value: Any, dtype: torch.dtype) -> Tensor:
        tensor = torch.as_tensor(value).detach().to("cpu", dtype)
        if tensor.shape != (batch,):
            raise ValueError(f"{name} must hold {batch} numbers for {batch} pictures, has shape {tuple(tensor.shape)}")
        return tensor

    score = vector("score", output.score, torch.float32)
    failed = vector("failed", output.failed, torch.bool) | ~score.isfinite()
    for name, field in (("regions", output.regions), ("texts", output.texts)):
        if field is not None and len(field) != batch:
            raise ValueError(f"{name} must hold {batch} entries for {batch} pictures, has {len(field)}")
    for polygon in (polygon for regions in output.regions or [] for polygon in regions):
        points = np.asarray(polygon, np.float32)
        if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
            raise ValueError(f"regions hold polygons [points, 2] of finite numbers, not {points.tolist()!r:.100}")
    for text in output.texts or []:
        if not isinstance(text, str):
            raise TypeError(f"texts hold texts, not {text!r:.100}")
    parts = {name: vector(f"parts[{name!r}]", value, torch.float32) for name, value in output.parts.items()}
    return RewardOutput(score.masked_fill(failed, torch.nan), failed, output.regions, parts, output.texts)
