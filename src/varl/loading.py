"""Policies as runs use them: loaded, on their device, what is trained set apart, and a frozen copy as the reference."""

from __future__ import annotations

import copy
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import nn

from varl.adapters import add_adapters, load_adapters, with_adapters
from varl.config import PolicyConfig
from varl.memory import keep_freed
from varl.models import load_policy
from varl.models.blocks import Eager, blocks_of
from varl.policy import Policy

__all__ = ["autocast", "choose_device", "compute_alike", "frozen_copy", "prepare"]

GRAPHS = 32
"""Graphs of one function that may be made before it is no longer compiled."""


def frozen_copy(policy: Policy) -> Policy:
    """A copy of the policy whose trainable part is its own and frozen, and whose other parts are shared."""
    module = cast(nn.Module, policy)
    kept = {id(part): part for part in module.children() if part is not policy.trainable}
    twin = copy.deepcopy(module, memo=dict(kept))
    for parameter in cast(Policy, twin).trainable.parameters():
        parameter.requires_grad_(False)
    if any(block._compiled_call_impl is not None for block in blocks_of(policy.trainable)):
        _compile(cast(Policy, twin))
    return cast(Policy, twin)


def _compile(policy: Policy) -> None:
    """Compile the blocks, for grids of any size, but for the parts of them that stay out of the graph."""
    # Of drawing, training and the reference, each in its precision, with one row or more: more than torch's 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    for block in blocks_of(policy.trainable):
        for part in block.modules():
            if isinstance(part, Eager):
                part.forward = torch.compiler.disable(part.forward)
        block.compile(dynamic=True)


def choose_device(name: str) -> torch.device:
    """``auto`` is a GPU if there is one.

    Raises:
        ValueError: if it is none of ``auto``, ``cpu``, ``cuda`` and ``cuda:0`` with the number of a GPU that is there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", name)
    if number is None:
        raise ValueError(f"there is no device {name!r}; use auto, cpu, cuda or cuda:0")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"the device is {name}, but torch sees no GPU; use auto or cpu")
    if int(number[1] or 0) >= max(torch.cuda.device_count(), 1):
        raise ValueError(f"the device is {name}, but there are only {torch.cuda.device_count()} GPUs, from cuda:0 on")
    return torch.device(name)


def compute_alike() -> None:
    """Have torch compute the same bits each time, on the same device with the same versions; for the whole process.

    An operator that has no such way warns, and works as always.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's first product is computed
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Every other kind of attention sums its gradients in no fixed order, unless operators are to fail and not to warn.
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)


def prepare(config: PolicyConfig, device: torch.device) -> Policy:
    """Load a policy as a run uses it: on its device, only what is trained with gradients, adapters if asked for.

    Weights ``random`` are drawn on the device itself, by its generator: the same seed gives other ones on a GPU than on
    the CPU, so a run that began with them on one kind of device is not gone on with on another.

    Raises:
        ValueError, FileNotFoundError, ImportError: if the configuration cannot be carried out.
    """
    if device.type == "cpu":
        keep_freed()
    config = with_adapters(config)
    with device if config.weights == "random" else nullcontext():
        policy = load_policy(config.family, config.config, config.weights)
    if getattr(policy, "tokenizer", None) is None:
        raise ValueError(f"{config.family} draws no pictures without its tokenizer: give policy.weights one")
    # Not every parameter of the trainable part is one: a family may keep some fixed.
    trained = [parameter for parameter in policy.trainable.parameters() if parameter.requires_grad]
    cast(nn.Module, policy).to(device).eval().requires_grad_(False)
    if config.adapters is not None:
        load_adapters(policy, Path(config.adapters))
    elif config.lora.rank:
        add_adapters(policy, config.lora)
    else:
        for parameter in trained:
            parameter.requires_grad_(True)
    if config.checkpointing:
        if not hasattr(policy.trainable, "checkpointing"):
            raise ValueError(f"policy.checkpointing is not there for {config.family}")
        policy.trainable.checkpointing = True  # type: ignore[assignment]
    if config.compile:
        _compile(policy)
    return policy


def autocast(
    config: PolicyConfig, device: torch.device, drawing: bool = False, keep_casts: bool = True
) -> torch.autocast:
    """The precision that a policy computes in, or draws pictures in.

    Args:
        keep_casts: cast weights once until the context is left. Not for weights that fsdp2 gathers and lets go: a cast
            that outlives them sends its gradient after they were summed, and holds the model whole.
    """
    precision = (config.rollout_precision if drawing else None) or config.precision
    return torch.autocast(device.type, torch.bfloat16, precision == "bfloat16", cache_enabled=keep_casts)
