"""Every family twice: a tiny policy on the CPU and the same one on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import families
import varl
from small import make_inkling, make_prompts
from varl.policy import Condition, Policy, Prompt

__all__ = ["EMBEDDED", "NAMES", "Pair", "every", "make_pair"]

EMBEDDED = "inkling-embedded"
NAMES = ["inkling", EMBEDDED, *(family.name for family in families.FAMILIES)]

every = pytest.mark.parametrize("pair", NAMES, indirect=True)


@dataclass(eq=False)
class Pair:
    """A policy on the CPU and on the device; tests that change one make their own.

    Attributes:
        name: of the family.
        make: the policy anew, on the CPU.
        prompts: so many that it reads.
        device: the other one's.
    """

    name: str
    make: Callable[[], Policy]
    prompts: Callable[[int], list[Prompt]]
    device: torch.device

    def made(self, device: torch.device) -> Policy:
        """The policy anew, on a device."""
        return cast(Policy, cast(nn.Module, self.make()).eval().to(device))

    @cached_property
    def cpu(self) -> Policy:
        return self.made(torch.device("cpu"))

    @cached_property
    def there(self) -> Policy:
        return self.made(self.device)

    @property
    def both(self) -> tuple[Policy, Policy]:
        """On the CPU, on the device."""
        return self.cpu, self.there

    def conditions(self, rows: int, same: int = 1) -> tuple[Condition, Condition]:
        """Of so many prompts, each ``same`` times: on the CPU, on the device."""
        cpu, there = (policy.condition(self.prompts(rows)) for policy in self.both)
        return cpu.repeat(same), there.repeat(same)

    def actions(self, rows: int, seed: int = 1) -> Tensor:
        """Fixed ones, on the CPU."""
        return families.actions_of(self.cpu, rows, self.cpu.default_schedule.tokens, seed)


def make_pair(name: str, device: torch.device) -> Pair:
    """The pair of a name of ``NAMES``."""
    if name == "inkling":
        return Pair(name, make_inkling, make_prompts, device)
    if name == EMBEDDED:
        return Pair(name, lambda: varl.load_policy("inkling"), make_prompts, device)
    family: Any = next(family for family in families.FAMILIES if family.name == name)
    return Pair(name, family.make, families.prompts, device)
