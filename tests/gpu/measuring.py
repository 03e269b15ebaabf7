"""What the tests on a GPU share: differences from the CPU's numbers, the report of them, and precisions."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

__all__ = ["PRECISIONS", "Precision", "Report", "difference", "differences"]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, by the largest number expected; infinite where one is finite and the other is not."""
    found, expected = (x.detach().cpu().double() for x in (found, expected))
    assert found.shape == expected.shape, f"{list(found.shape)} is not {list(expected.shape)}"
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    if not finite.any():
        return 0.0
    return float((found - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-30))


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of gradients by name: the largest of the norms of their differences, by their own norms.

    A gradient counts as having a tenth of the norm of all together at least: some are zero but for rounding.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    whole = sum(float(value.double().square().sum()) for value in expected.values()) ** 0.5
    assert 0 < whole < float("inf")
    worst = 0.0
    for name, value in expected.items():
        away = float((found[name].cpu().double() - value.cpu().double()).norm())
        worst = max(worst, away / max(float(value.double().norm()), whole / 10))
    return worst


@dataclass
class Report:
    """What a session measured.

    Attributes:
        device: the device's name.
        measured: by name, a difference from the CPU's numbers and what is allowed of it.
        facts: by name, anything else: seconds, shares, what is not exact.
        outcomes: how many tests ended how.
        failed: the tests that failed.
    """

    device: str
    measured: dict[str, tuple[float, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def within(self, name: str, found: float, allowed: float) -> None:
        """Note a difference, and refuse one that is larger than allowed."""
        self.measured[name] = found, allowed
        assert found <= allowed, f"{name}: {found:.2e} away from the CPU's numbers, {allowed:.0e} is allowed"

    def near(self, name: str, found: Tensor, expected: Tensor, allowed: float) -> None:
        """Note the difference of two tensors, and refuse one that is larger than allowed."""
        self.within(name, difference(found, expected), allowed)

    def write(self, path: Path) -> None:
        """Write all as JSON, the largest differences first."""
        ordered = sorted(self.measured.items(), key=lambda item: -item[1][0])
        cuda = torch.cuda.is_available()
        made = {
            "device": self.device,
            "card": torch.cuda.get_device_name() if cuda and self.device.startswith("cuda") else None,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "seconds": round(time.perf_counter() - self.began, 1),
            "outcomes": dict(self.outcomes),
            "failed": self.failed,
            "differences": [{"name": n, "found": found, "allowed": most} for n, (found, most) in ordered],
            "facts": self.facts,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(made, indent=1) + "\n")
        os.replace(partial, path)


@dataclass(frozen=True)
class Precision:
    """How a device computes, and how far from the CPU's fp32 its numbers may then be.

    Attributes:
        name: ``fp32``, ``tf32`` or ``bf16`` (autocast).
        logits: of logits, by the largest one.
        scores: of log-probabilities, entropies and losses.
        kl: of the KL, which is a small difference of scores.
        gradients: of gradients, by their norms.
    """

    name: str
    logits: float
    scores: float
    kl: float
    gradients: float

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Where the device computes in it. A CPU has no tf32: products there round what they are given."""
        tf32 = self.name == "tf32"
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        try:
            with torch.autocast(device.type, torch.bfloat16, self.name == "bf16"):
                if tf32 and device.type == "cpu":
                    with _Rounding():
                        yield
                else:
                    yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


PRECISIONS = [
    Precision("fp32", 1e-4, 1e-4, 1e-4, 1e-4),
    Precision("tf32", 1e-2, 5e-3, 3e-2, 3e-2),
    Precision("bf16", 1e-1, 8e-2, 3e-1, 5e-1),
]
"""About two to four times what rounding products to tf32, and the CPU's autocast, were measured to differ by."""


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_scaled_dot_product")


class _Rounding(TorchDispatchMode):
    """Rounds what products are given to tf32: ten bits behind the point."""

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(PRODUCTS):
            args = tree_map(_rounded, args)
        return function(*args, **(kwargs or {}))


def _rounded(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
