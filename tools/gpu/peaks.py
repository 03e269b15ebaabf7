"""The memory that an update takes, phase by phase, as ``varl.plan`` divides it."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from benchmarks.live import LiveStorage
from torch import nn

from varl.trainer import Trainer

__all__ = ["Counted", "Counter", "Reported", "by_phase", "counter"]

PHASES = {
    "rollout": "rollout",
    "decode": "decode",
    "reference": "update",
    "logp": "update",
    "backward": "update",
    "optimizer": "optimizer",
}
"""The phase of the plan that a stage of an update belongs to."""


class Reported:
    """What torch reports of a GPU, beside what was there when this was made.

    Attributes:
        reserved: the most bytes that torch had taken from the GPU, fragments and all.
    """

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        self._before, self.reserved = torch.cuda.memory_allocated(), 0

    @contextmanager
    def following(self, trainer: Trainer) -> Iterator[None]:
        """Where a trainer's updates are counted."""
        torch.cuda.reset_peak_memory_stats()
        yield

    def read(self) -> int:
        """The most bytes alive at once since the call before."""
        peak = torch.cuda.max_memory_allocated() - self._before
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        return peak


class Counted:
    """The same on a CPU: what operators return in the calling thread, and what a trainer holds before.

    Attributes:
        reserved: nothing is known of it.
    """

    def __init__(self) -> None:
        self._live, self.reserved = LiveStorage(), None

    @contextmanager
    def following(self, trainer: Trainer) -> Iterator[None]:
        """Where a trainer's updates are counted, from its first one on."""
        policies: list[Any] = [trainer.policy, trainer.reference]
        for policy in policies:
            if isinstance(policy, nn.Module):  # the reference is none where it is the weights without adapters
                for tensor in [*policy.parameters(), *policy.buffers()]:
                    self._live.see(tensor)
        with self._live:
            yield

    def read(self) -> int:
        """The most bytes alive at once since the call before."""
        peak, self._live.peak = self._live.peak, self._live.live
        return peak


Counter = Reported | Counted


def counter(device: torch.device) -> Counter:
    """A counter of a device's memory; to be made before the trainer is."""
    return Counted() if device.type == "cpu" else Reported()


@contextmanager
def by_phase(trainer: Trainer, memory: Counter) -> Iterator[dict[str, int]]:
    """The peak of every phase that the trainer goes through inside, in bytes; what is in no stage is ``between``."""
    found: dict[str, int] = defaultdict(int)
    open_stages = ["between"]
    stage = trainer.stage

    def note() -> None:
        phase = PHASES.get(open_stages[-1], "between")
        found[phase] = max(found[phase], memory.read())

    @contextmanager
    def watched(name: str) -> Iterator[None]:
        note()
        open_stages.append(name)
        try:
            with stage(name):
                yield
        finally:
            note()
            open_stages.pop()

    cast(Any, trainer).stage = watched
    memory.read()
    try:
        yield found
        note()
    finally:
        del cast(Any, trainer).stage
