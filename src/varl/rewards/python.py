"""A reward written by the user: any Python callable, named as "module:attribute"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import torch
import yaml
from torch import Tensor

from varl.errors import InputError
from varl.models.fields import read
from varl.policy import Prompt
from varl.rewards.base import FailureLog, RewardOutput
from varl.rewards.checks import checked
from varl.rewards.guard import said, told, undisturbed, where

__all__ = ["NoSuchAttribute", "PythonReward", "UnknownOption", "import_callable"]


class UnknownOption(InputError, TypeError, ValueError):
    """An option that there is not, or something that cannot be called."""


class NoSuchAttribute(InputError, AttributeError):
    """What "module:attribute" names is not in the module."""


def import_callable(spec: str, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The callable named by "module:attribute" (dots allowed in both; the current directory is importable).

    A class is instantiated with ``options``; a function gets them as keyword arguments with each call. Options that are
    text become what the parameter's annotation, or its default, says: numbers are text on a command line.

    Raises:
        ValueError: if ``spec`` is not of this form, an option has a value that it cannot have, or the module or the
            class raises anything: with the type, the message and the line of the error.
        ModuleNotFoundError: if there is no such module, or a module that it imports is not there.
        AttributeError: if the module has no such attribute.
        TypeError: if it cannot be called, or not with these options.
    """
    module_name, _, path = spec.partition(":")
    if not module_name or not path:
        raise ValueError(f'a Python reward is named "module:attribute", got {spec!r}')
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    with _own_faults(spec, "imported"):
        target = _imported(spec, module_name, here)
    for name in path.split("."):
        with _own_faults(spec, "found"):
            if not hasattr(target, name):
                raise NoSuchAttribute(f"reward {spec!r}: {target!r} has no attribute {name!r}")
            target = getattr(target, name)
    options = dict(options or {})
    if inspect.isclass(target):
        options = _taken(spec, target, (), options)
        with _own_faults(spec, "made", target):
            target = target(**options)
    elif options and callable(target):
        target = partial(target, **_taken(spec, target, (None, None), options))
    if not callable(target):
        raise UnknownOption(f"reward {spec!r} is a {type(target).__name__}, which cannot be called")
    return cast(Callable[..., Any], target)


def _imported(spec: str, module_name: str, here: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            # The module is there; what it imports is not.
            line = where(error, _file(module_name))
            raise ModuleNotFoundError(f"{error}, which reward {spec!r} imports ({line})", name=error.name) from error
        raise ModuleNotFoundError(
            f"reward {spec!r}: no module {error.name!r} in {here} or on the Python path", name=error.name
        ) from error


@contextmanager
def _own_faults(spec: str, done: str, target: Any = None) -> Iterator[None]:
    """Whatever the user's code raises is an error in the input, which says what and where."""
    try:
        with undisturbed():
            yield
    except (InputError, ModuleNotFoundError, KeyboardInterrupt):
        raise
    except BaseException as error:
        line = where(error, _file(getattr(target, "__module__", spec.partition(":")[0])))
        raise ValueError(f"reward {spec!r} cannot be {done}: {told(error)} ({line})") from error


def _file(module_name: str) -> str | None:
    try:
        found = importlib.util.find_spec(module_name)
    except (ImportError, ValueError, AttributeError):
        return None
    return None if found is None else found.origin


def _taken(spec: str, target: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the target takes them."""
    with _own_faults(spec, "called", target):
        try:
            signature = inspect.signature(target)
        except (ValueError, TypeError):  # builtins without a signature
            return dict(options)
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        raise UnknownOption(f"reward {spec!r} cannot take the options {sorted(options)}: {error}") from error
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names that are there for type checkers only
        hints = {}
    return {
        name: _typed(spec, name, value, hints.get(name), signature.parameters.get(name))
        for name, value in options.items()
    }


def _typed(spec: str, name: str, value: Any, hint: Any, parameter: inspect.Parameter | None) -> Any:
    """A text as the number or truth value that a parameter wants."""
    if hint is None and parameter is not None:
        hint = type(parameter.default)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    wanted = [kind for kind in kinds if kind is not type(None)]
    if not isinstance(value, str) or not wanted or not all(kind in (bool, int, float) for kind in wanted):
        return value
    try:
        return read(hint, value)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        right = " or ".join(kind.__name__ for kind in wanted)
        raise ValueError(f"reward {spec!r}: {name} must be {right}, got {value!r}") from error


class PythonReward:
    """Guards a plain callable: whatever goes wrong in it fails pictures, with the reason kept, and ends no
    run.

    The callable is called as ``fn(images [B, 3, H, W] in [0, 1], prompts)``, both copies, and returns B numbers (a
    tensor, array or list) or a ``RewardOutput``. All B pictures fail if it raises, returns something of another
    length or shape, or takes too long; those with a non-finite number fail alone. None is scored 0. Fields that it has
    once given, parts, regions and texts, are in every later output: those of failed pictures are NaN and empty.

    Args:
        fn: the callable. Where it has a ``check(prompts)``, that is called before a run; it raises ValueError for
            prompts that it cannot score.
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
        self.name = name or getattr(fn, "__qualname__", type(fn).__qualname__)
        if timeout_s is not None and not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"reward {self.name!r}: timeout_s must be positive, got {timeout_s}")
        self.fn, self.timeout_s = fn, timeout_s
        self.failures = FailureLog(f"reward {self.name}")
        self._hung: threading.Thread | None = None
        self._given: RewardOutput | None = None

    def describe(self) -> dict[str, str]:
        """The callable's name, and what it says of itself if it has a ``describe()``."""
        own, said = getattr(self.fn, "describe", None), {}
        if callable(own):
            try:
                with undisturbed():
                    said = {str(k): str(v) for k, v in own().items()}
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                said = {"describe() failed": f"{told(error)} ({where(error)})"}
        return {"reward": str(self.name), **said}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """What the callable's own ``check(prompts)`` says, if it has one.

        Raises:
            ValueError: for prompts that it cannot score, or if the check itself fails.
        """
        own = getattr(self.fn, "check", None)
        if not callable(own):
            return
        try:
            with undisturbed():
                own(list(prompts))
        except (InputError, KeyboardInterrupt):
            raise
        except ValueError as error:
            raise ValueError(f"reward {self.name!r}: {said(error) or told(error)}") from error
        except BaseException as error:
            raise ValueError(f"reward {self.name!r}: its check failed: {told(error)} ({where(error)})") from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> RewardOutput:
        """Score B pictures; never raises for what the callable does (a ``KeyboardInterrupt`` passes outside of runs).
        It leaves the process as it was: see ``undisturbed``."""
        batch = len(prompts)
        try:
            given = images.clone(), list(prompts)
            with undisturbed():  # what it gives may be code too (generators, numbers of its own)
                with undisturbed():
                    result = self.fn(*given) if self.timeout_s is None else self._limited(*given)
                output = result if isinstance(result, RewardOutput) else RewardOutput.from_scores(result, batch)
                output = checked(output, batch, self.failures)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.failures.add(told(error), batch, where(error))
            return RewardOutput.failed_like(batch, self._given)
        if not output.failed.all():
            self._given = RewardOutput(torch.zeros(0)).holding(output, *([self._given] if self._given else []))
        return output.holding(self._given) if self._given else output

    def _limited(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        if self._hung is not None and self._hung.is_alive():
            raise TimeoutError("an earlier call still hangs")
        outcome: dict[str, Any] = {}

        def call() -> None:
            try:
                with undisturbed():
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
