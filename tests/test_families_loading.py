"""Weights of every family: values that cannot be weights are refused by name, and files of training load."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import families
import varl
from small import SMALL, make_inkling

State = dict[str, Tensor]
NAMES = ("var", "infinity", "switti", "tokenflow", "inkling")
PARTS = {name: ("model",) if name == "inkling" else ("transformer", "tokenizer") for name in NAMES}
CASES = [(name, part) for name in NAMES for part in PARTS[name]]
each = pytest.mark.parametrize(("name", "part"), CASES)


@cache
def _made(name: str) -> tuple[dict[str, Any], dict[str, State]]:
    if name == "inkling":
        return vars(SMALL), {"model": make_inkling().state_dict()}
    family = next(family for family in families.FAMILIES if family.name == name)
    policy = cast(nn.Module, family.make())
    return family.config, {part: policy.get_submodule(part).state_dict() for part in PARTS[name]}


def states(name: str) -> tuple[dict[str, Any], dict[str, State]]:
    """A family's configuration, and the state dict of each of its parts."""
    config, parts = _made(name)
    return config, {
        part: {key: value.detach().clone() for key, value in state.items()} for part, state in parts.items()
    }


def loaded(name: str, part: str, source: Any) -> State:
    """The state of a part that was loaded from a source, the others being as they were made."""
    config, parts = states(name)
    policy = cast(nn.Module, varl.load_policy(name, config, {**parts, part: source}))
    return policy.state_dict() if part == "model" else policy.get_submodule(part).state_dict()


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weight_of(state: State) -> str:
    """The key of some weight."""
    return next(key for key in reversed(state) if state[key].is_floating_point() and state[key].ndim > 1)


def one(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight.view(-1)[-1] = value
        return weight

    return change


def quantized(weight: Tensor) -> Tensor:
    return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (one(float("nan")), "NaN or infinity"),
    "infinity": (one(float("inf")), "NaN or infinity"),
    "beyond fp32": (lambda weight: one(1e300)(weight.double()), "NaN or infinity"),
    "nan in half": (lambda weight: one(float("nan"))(weight.half()), "NaN or infinity"),
    "int8": (lambda weight: weight.to(torch.int8), "int8"),
    "bool": (lambda weight: weight > 0, "bool"),
    "complex": (lambda weight: weight.to(torch.complex64), "complex64"),
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "quantised": (quantized, "qint8"),
    "sparse": (lambda weight: weight.to_sparse(), "sparse"),
}


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("case", REFUSED)
@each
def test_values_that_are_no_weights_are_refused_by_name(name: str, part: str, case: str) -> None:
    change, message = REFUSED[case]
    state = states(name)[1][part]
    key = weight_of(state)
    state[key] = change(state[key])
    with pytest.raises(ValueError, match=message) as refused:
        loaded(name, part, state)
    assert key in str(refused.value)


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each
def test_weights_of_any_floating_type_load(name: str, part: str, dtype: torch.dtype) -> None:
    state = states(name)[1][part]
    cast_state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    found = loaded(name, part, cast_state)
    assert all(torch.equal(found[key], value.to(found[key].dtype)) for key, value in cast_state.items())


def ema(state: State) -> State:
    return {k: v * 0.5 if v.is_floating_point() and v.abs().max() < torch.inf else v for k, v in state.items()}


def wrapped(state: State, prefix: str, inside: bool) -> State:
    """Keys as DDP, FSDP and torch.compile write them: a prefix, and something after the first module's name."""
    first = {key: key.split(".", 1) for key in state}
    inner = {k: "._orig_mod.".join(names) if inside else k for k, names in first.items()}
    return {prefix + inner[key]: value for key, value in state.items()}


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@each
def test_prefixes_of_ddp_and_compile_are_taken_off(name: str, part: str, prefix: str, inside: bool) -> None:
    state = states(name)[1][part]
    assert same(loaded(name, part, wrapped(state, prefix, inside)), state)


@each
def test_a_weight_that_is_there_with_and_without_prefix_is_refused(name: str, part: str) -> None:
    state = states(name)[1][part]
    key = weight_of(state)
    with pytest.raises(ValueError, match="twice"):
        loaded(name, part, state | {f"module.{key}": state[key]})


STATE, EMA = "the state", "its running average"
TRAINING: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{name} transformer": (name, "transformer", {"trainer": {"var_wo_ddp": STATE, "config": {}}})
    for name in ("var", "switti")
}
TRAINING |= {
    f"{name} tokenizer": (name, "tokenizer", {"trainer": {"var_wo_ddp": None, "vae_local": STATE}})
    for name in ("var", "switti", "infinity")
}
TRAINING |= {
    f"infinity {name}, its average too": ("infinity", "transformer", {"trainer": {"gpt_ema_fsdp": EMA, name: STATE}})
    for name in ("gpt_fsdp", "gpt_wo_ddp")
}
TRAINING |= {
    f"infinity {name} alone": ("infinity", "transformer", {"trainer": {"gpt_fsdp": None, name: STATE}, "epoch": 1})
    for name in ("gpt_ema_fsdp", "gpt_ema_for_vis", "gpt_wo_ddp_ema")
}
TRAINING["tokenflow ema"] = ("tokenflow", "tokenizer", {"model": EMA, "ema": STATE})
TRAINING |= {f"{name} {part} alone": (name, part, {"state_dict": STATE, "epoch": 3}) for name, part in CASES}


def filled(template: Any, state: State) -> Any:
    """What a trainer writes, with the state and its running average where they belong."""
    if isinstance(template, dict):
        return {key: filled(value, state) for key, value in template.items()}
    return {STATE: state, EMA: ema(state)}.get(template, template)


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.parametrize("case", TRAINING)
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_training_load(case: str, legacy: bool, tmp_path: Path) -> None:
    name, part, template = TRAINING[case]
    state = states(name)[1][part]
    content = filled(template, wrapped(state, "module.", inside=False))
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert same(loaded(name, part, tmp_path / "a.pth"), state)
