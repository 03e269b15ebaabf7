"""Breaks what a part checks. A test copies this file, with lines that break something, to a folder on the path of the
rehearsal's processes; Python runs it in each of them as ``sitecustomize``, before all else."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

__all__ = ["after"]


def after(name: str, change: Callable[[ModuleType], object]) -> None:
    """Change a module as soon as it has been imported."""
    sys.meta_path.insert(0, _After(name, change))


class _After(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, change: Callable[[ModuleType], object]) -> None:
        self.name = name
        self.change = change

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"there is no module {name} to break"
        loader = spec.loader
        assert loader is not None
        run = loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            self.change(module)

        loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec
