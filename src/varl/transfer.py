"""Numbers on their way between the host and the device, so that neither waits for the other where it need not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Returning", "read", "sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; what goes to a GPU goes through pinned memory, and the host does not wait for it.

    Unlike ``tensor.to(device)`` or ``torch.tensor(numbers, device=device)``, which wait for all that the GPU has to do.
    """
    here = tensor.device.type == "cpu"
    if here and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=here)


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU in float64, in one read of their device for all of them."""
    if not tensors:
        return []
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class Returning:
    """Tensors that come back to the host while the device goes on with what comes next."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._device = torch.device("cpu")

    def add(self, tensor: Tensor) -> None:
        """Begin to bring a tensor back."""
        self._device = tensor.device
        self._parts.append(_brought(tensor))

    def all(self) -> Tensor:
        """All of them in order, joined, when they are there."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return torch.cat(self._parts)


def _brought(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return there.copy_(tensor, non_blocking=True)
