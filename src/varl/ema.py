"""An exponential moving average of what is trained: steadier weights, to evaluate and to export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["Average"]


class Average:
    """The average of a module's trained parameters; it begins with their values.

    Args:
        module: its parameters with gradients are averaged, each process those (or those shards) that it holds.
        decay: the share of the average that a step keeps, in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters' values after a step."""
        for name, parameter in self._parameters.items():
            _own(self._values[name]).lerp_(_own(parameter), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters hold their average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            current = _own(parameter).clone()
            _own(parameter).copy_(_own(self._values[name]))
            _own(self._values[name]).copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the parameters' names; sharded where these are."""
        return dict(self._values)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state_dict()``, sharded as the parameters are."""
        for name, value in self._values.items():
            _own(value).copy_(_own(state[name]))


def _own(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: itself, or its shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
