"""Counting what processes send each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Collectives"]


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within it.

    Attributes:
        calls, numbers: of each kind, how many, and of how many numbers as a whole: what an all-gather gives each
            process, a reduce-scatter or all-reduce takes of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            whole = args[1] if name == "reduce_scatter_base" else args[0]
            parts = whole if isinstance(whole, list) else [whole]
            self.calls[name] += 1
            self.numbers[name] += sum(part.numel() for part in parts if isinstance(part, torch.Tensor))
        return func(*args, **(kwargs or {}))
