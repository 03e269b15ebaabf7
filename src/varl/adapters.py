"""LoRA adapters beside the model (Hu et al., arXiv 2106.09685), through peft.

With adapters the policy's own weights stay frozen, so the same weights with the adapters switched off are the reference
policy: no second copy of the model is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from varl.config import AdapterConfig, PolicyConfig
from varl.models.files import plain, read_safetensors, write_safetensors
from varl.models.weights import check_finite, check_fit, load_strict, unwrapped
from varl.policy import Policy

__all__ = [
    "WithoutAdapters",
    "adapter_parameters",
    "adapter_state",
    "adapters_off",
    "add_adapters",
    "load_adapter_state",
    "load_adapters",
    "merged",
    "read_adapters",
    "save_adapters",
    "with_adapters",
]


def add_adapters(policy: Policy, config: AdapterConfig) -> None:
    """Put adapters on a policy's linear layers and freeze everything else; they change nothing until trained.

    Args:
        config: rank, alpha, and the names of layers (ends of their full names); by default those the family names.

    Raises:
        ImportError: if peft is missing.
        ValueError: if no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'varl[lora]'") from error
    targets = list(config.targets or policy.lora_targets)
    _adapted(policy, targets)
    for parameter in policy.trainable.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=config.rank, lora_alpha=cast(int, config.alpha), target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(lora, policy.trainable)
    for _, layer in _layers(policy):
        for part in (layer.lora_A, layer.lora_B):
            part.float()


def _adapted(policy: Policy, targets: list[str]) -> dict[str, nn.Linear]:
    """The linear layers whose full names end with one of the targets."""
    linear = {name: module for name, module in policy.trainable.named_modules() if isinstance(module, nn.Linear)}
    if len(targets) > len(linear):
        raise ValueError(f"{len(targets)} targets are named for adapters; there are only {len(linear)} linear layers")
    ends = {target: [n for n in linear if n == target or n.endswith(f".{target}")] for target in targets}
    for target, found in ends.items():
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(f"no linear layer is called {plain(target)!r}; there are {', '.join(known)}")
    return {name: linear[name] for name in sorted({name for found in ends.values() for name in found})}


def adapter_parameters(policy: Policy, config: AdapterConfig) -> int:
    """How many numbers the adapters of a configuration would train, without putting them there.

    Raises:
        ValueError: if no layer has one of the names.
    """
    layers = _adapted(policy, list(config.targets or policy.lora_targets))
    return sum(config.rank * (layer.in_features + layer.out_features) for layer in layers.values())


def _layers(policy: Policy) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in policy.trainable.named_modules() if isinstance(module, LoraLayer)]


@contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """The policy as it was before its adapters were trained."""
    layers = [layer for _, layer in _layers(policy)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class WithoutAdapters:
    """A policy with its adapters off, as a policy of its own over the same weights: the reference."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._policy, name)
        if not callable(value) or isinstance(value, nn.Module):
            return value

        @wraps(value)
        def off(*arguments: Any, **options: Any) -> Any:
            with adapters_off(self._policy):
                return value(*arguments, **options)

        return off


def adapter_state(policy: Policy) -> dict[str, Tensor]:
    """The adapters' weights alone."""
    return {key: value for key, value in policy.trainable.state_dict().items() if ".lora_" in key}


def load_adapter_state(policy: Policy, state: dict[str, Tensor], source: str = "the checkpoint") -> None:
    """Load what ``adapter_state`` gave.

    Raises:
        ValueError: if keys or shapes are not those of the policy's adapters.
    """
    load_strict(_AdapterWeights(policy), state, source)


class _AdapterWeights(nn.Module):
    """The adapters' weights as a module, so that they load as strictly as any."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self._state = adapter_state(policy)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self._state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        for key, value in state_dict.items():
            self._state[key].copy_(value)


def save_adapters(policy: Policy, config: AdapterConfig, path: Path) -> None:
    """Write the adapters as a safetensors file that says their family, rank, alpha and targets."""
    targets = list(config.targets or policy.lora_targets)
    about = {"rank": config.rank, "alpha": config.alpha, "targets": targets}
    metadata = {"family": policy.family, "lora": json.dumps(about)}
    tensors = {key: value.detach().contiguous().cpu() for key, value in adapter_state(policy).items()}
    write_safetensors(tensors, path, metadata)


def read_adapters(path: Path, family: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and the weights of a file that ``save_adapters`` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not whole, or holds no adapters of this family.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no adapters at {path}")
    tensors, about = read_safetensors(path)
    if about.get("family") != family or "lora" not in about:
        raise ValueError(f"{path} holds no adapters of {family} but of {plain(about.get('family', 'no family'))}")
    try:
        config = _saved(json.loads(about["lora"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} does not say what adapters it holds: {plain(repr(error))}") from error
    return config, unwrapped(tensors, str(path))


def _saved(about: Mapping[str, Any]) -> AdapterConfig:
    rank, alpha, targets = about["rank"], about["alpha"], about["targets"]
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {plain(rank)}")
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise ValueError("targets must be a list of the names of layers")
    return AdapterConfig(rank, float(alpha), tuple(dict.fromkeys(targets)))


def with_adapters(config: PolicyConfig) -> PolicyConfig:
    """The configuration with ``lora`` as it is in the file that ``adapters`` names, if it names one.

    Raises:
        FileNotFoundError, ValueError: as ``read_adapters``, or if another ``lora`` is asked for.
    """
    if config.adapters is None:
        return config
    saved, asked = read_adapters(Path(config.adapters), config.family)[0], config.lora
    if asked.rank and (asked.rank, asked.alpha, asked.targets or saved.targets) != (*astuple(saved),):
        raise ValueError(
            f"policy.lora asks for rank {asked.rank} and alpha {asked.alpha:g}, but {config.adapters} holds some of "
            f"rank {saved.rank} and alpha {saved.alpha:g} on {', '.join(saved.targets)}; leave policy.lora out"
        )
    return replace(config, lora=saved)


def load_adapters(policy: Policy, path: Path) -> None:
    """Put the adapters of a file on a policy.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no adapters of this family and shape.
    """
    config, state = read_adapters(path, policy.family)
    try:
        expected = _expected(policy, config)
    except ValueError as error:
        raise ValueError(f"the adapters of {path} do not fit: {error}") from error
    check_fit(expected, state, str(path))  # before memory is taken for what the file does not hold
    check_finite(state, str(path))
    add_adapters(policy, config)
    load_adapter_state(policy, state, str(path))


def _expected(policy: Policy, config: AdapterConfig) -> dict[str, Tensor]:
    """What ``adapter_state`` will give once a configuration's adapters are there, without memory."""
    shapes = {}
    for name, layer in _adapted(policy, list(config.targets or policy.lora_targets)).items():
        shapes[f"{name}.lora_A.default.weight"] = (config.rank, layer.in_features)
        shapes[f"{name}.lora_B.default.weight"] = (layer.out_features, config.rank)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@contextmanager
@torch.no_grad()
def merged(policy: Policy) -> Iterator[None]:
    """The policy as a plain model whose weights hold the adapters' change, to be saved; afterwards all is as before."""
    kept: list[tuple[nn.Module, str, Any, Tensor]] = []
    for name, layer in _layers(policy):
        parent, _, child = name.rpartition(".")
        weight = cast(Tensor, layer.base_layer.weight)
        kept.append((policy.trainable.get_submodule(parent), child, layer, weight.detach().clone()))
        weight.add_(layer.get_delta_weight("default").to(weight.dtype))
    for parent_module, child, layer, _ in kept:
        setattr(parent_module, child, layer.base_layer)
    try:
        yield
    finally:
        for parent_module, child, layer, weight in kept:
            layer.base_layer.weight.copy_(weight)
            setattr(parent_module, child, layer)
