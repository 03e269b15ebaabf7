"""A device apart, without hardware: its tensors live in the CPU's memory, but torch takes them for another device's.

So what a GPU would do can be seen where there is none: tensors of two devices in one operation are refused, and every
read of the device by the host is counted, be it a copy, a number, or an operation whose output's shape is the data's;
and so is every number sent there for which the host waits, as it does without ``non_blocking``.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import varl

__all__ = ["APART", "AVAILABLE", "Apart", "Traffic", "apart"]

AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch lets a device be made of Python alone."""
SOURCE = Path(varl.__file__).parent

aten = torch.ops.aten
SHAPED_BY_DATA = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.bincount, aten.is_nonzero}
SHAPED_BY_DATA |= {aten.repeat_interleave}
"""Operations that wait for the device, since the host must know how large their output is, or what it says; unless it
is told by ``output_size``."""
ACROSS = {aten.copy_, aten._to_copy}
"""Operations that may see tensors of two devices."""
INDEXED = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_}
"""Operations whose indices may lie on the CPU."""


class _Module:
    """What torch asks of a device's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """It has no generator of its own."""

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """It has no generator of its own."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


if AVAILABLE:
    backend_registration._setup_privateuseone_for_python_backend("apart", _Module())
    APART = torch.device("apart", 0)


@dataclass
class Traffic:
    """What went between the host and the device.

    Attributes:
        reads: lines of the library, with the operation, that waited for the device: one entry a wait.
        sent: numbers that were copied to the device, one entry a copy.
    """

    reads: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


class Apart(Tensor):
    """A tensor of the device; ``inner`` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Apart:
        strides, offset = inner.stride(), inner.storage_offset()
        options = {"dtype": inner.dtype, "device": APART, "requires_grad": inner.requires_grad}
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides, offset, **options)  # type: ignore[attr-defined]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner.detach()

    def __repr__(self, **_: Any) -> str:
        return f"Apart({self.inner})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = Apart(self.inner.clone())
        return copied.requires_grad_(self.requires_grad)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the device apart to numpy; copy it to the host first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("tensors of the device apart need its context")


class _Dispatch(TorchDispatchMode):
    """Carries out what is asked of the device on the CPU."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [leaf for leaf in leaves if isinstance(leaf, Apart)]
        wanted = kwargs.get("device")
        there = bool(own) if wanted is None else torch.device(wanted).type == "apart"
        if not own and not there:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in ACROSS:
            there = isinstance(args[0], Apart) if packet is aten.copy_ else there
            self._across(packet, args, kwargs, there)
        elif packet in INDEXED:
            _need_one_device(func, [x for x in (args[0], *args[2:3]) if isinstance(x, Tensor)])
            given = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool if isinstance(i, Apart) else isinstance(args[0], Apart) for i in given):
                self._read(func)  # to learn how many are chosen; or till the host's numbers have arrived
        else:
            _need_one_device(func, leaves)
            told = kwargs.get("output_size") is not None
            if (packet in SHAPED_BY_DATA and not told) or packet in (aten._local_scalar_dense, aten.equal):
                self._read(func)
        plain_args, plain = tree_map(lambda x: x.inner if isinstance(x, Apart) else x, (args, kwargs))
        if wanted is not None:
            plain["device"] = torch.device("cpu")
        out = func(*plain_args, **plain)
        if there:
            out = tree_map(lambda x: Apart(x) if isinstance(x, Tensor) else x, out)
            return return_and_correct_aliasing(func, args, kwargs, out) if own else out
        return out

    def _across(self, packet: Any, args: Any, kwargs: Any, there: bool) -> None:
        source = args[1] if packet is aten.copy_ else args[0]
        if isinstance(source, Apart) and not there:
            self._read(packet)
        elif there and not isinstance(source, Apart):
            self.traffic.sent.append(source.numel())
            if not (kwargs.get("non_blocking") or (packet is aten.copy_ and args[2:] == (True,))):
                self._read(packet)

    def _read(self, func: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if SOURCE in Path(frame.filename).parents]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "outside"
        self.traffic.reads.append(f"{where}: {func}")


class _Made(TorchFunctionMode):
    """Makes tensors of Python's numbers on the host first: how torch makes them a device of Python cannot follow."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _need_one_device(func: Any, tensors: list[Tensor]) -> None:
    """Refuse what a GPU would: numbers of the CPU, but for single ones, beside those of the device."""
    if any(isinstance(x, Apart) for x in tensors) and any(not isinstance(x, Apart) and x.ndim for x in tensors):
        raise RuntimeError(f"{func} was given tensors on two devices, apart and cpu")


@contextmanager
def apart() -> Iterator[Traffic]:
    """Within it the device ``APART`` can be used; yields what goes to and fro."""
    traffic = Traffic()
    with _Made(), _Dispatch(traffic):
        yield traffic
