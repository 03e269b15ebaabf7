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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@each
def test_weights_of_any_floating_type_load(name: str, part: str, dtype: torch.dtype) -> None:
    state = states(name)[1][part]
    cast_state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    found = loaded(name, part, cast_state)
    assert all(torch.equal(found[key], value.to(found[key].dtype)) for key, value in cast_state.items())


def wrapped(state: State, prefix: str, inside: bool) -> State:
    """Keys as DDP, FSDP and torch.compile write them: a prefix, and something after the first module's name."""
    first = {key: key.split(".", 1) for key in state}
    inner = {k: "._orig_mod.".join(names) if inside else k for k, names in first.items()}
    return {prefix + inner[key]: value for key, value in state.items()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
@each
def test_prefixes_of_ddp_and_compile_are_taken_off(
    name: str, part: str, prefix: str, inside: bool, tmp_path: Path
) -> None:
    state = states(name)[1][part]
    assert same(loaded(name, part, wrapped(state, prefix, inside)), state)


@each
def test_a_weight_that_is_there_with_and_without_prefix_is_refused(name: str, part: str) -> None:
    state = states(name)[1][part]
    key = weight_of(state)
    with pytest.raises(ValueError, match="twice"):
        loaded(name, part, state | {f"module.{key}": state[key]})


def ema(state: State) -> State:
    return {k: v * 0.5 if v.is_floating_point() and v.abs().max() < torch.inf else v for k, v in state.items()}


def training_files() -> dict[str, tuple[str, str, Callable[[State], Any]]]:
    """What the trainers of the families write, each as a function of the state that is to be found in it."""
    cases: dict[str, tuple[str, str, Callable[[State], Any]]] = {}
    for name in ("var", "switti"):
        cases[f"{name} transformer"] = (name, "transformer", lambda s: {"trainer": {"var_wo_ddp": s, "config": {}}})
        cases[f"{name} tokenizer"] = (name, "tokenizer", lambda s: {"trainer": {"var_wo_ddp": None, "vae_local": s}})
    for kept in ("gpt_fsdp", "gpt_wo_ddp"):
        both: Callable[[State], Any] = lambda s, kept=kept: {  # type: ignore[misc]
            "trainer": {"gpt_ema_fsdp": ema(s), "gpt_ema_for_vis": ema(s), kept: s}
        }
        cases[f"infinity {kept} and its average"] = ("infinity", "transformer", both)
    for average in ("gpt_ema_fsdp", "gpt_ema_for_vis", "gpt_wo_ddp_ema"):
        alone: Callable[[State], Any] = lambda s, average=average: {"trainer": {"gpt_fsdp": None, average: s}}  # type: ignore[misc]
        cases[f"infinity {average} alone"] = ("infinity", "transformer", alone)
    cases["infinity tokenizer"] = ("infinity", "tokenizer", lambda s: {"trainer": {"vae_local": s}})
    cases["tokenflow ema"] = ("tokenflow", "tokenizer", lambda s: {"model": ema(s), "ema": s})
    for name, part in CASES:
        cases[f"{name} {part} state_dict"] = (name, part, lambda s: {"state_dict": s, "epoch": 3})
    return cases


@pytest.mark.parametrize("case", training_files())
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_training_load(case: str, legacy: bool, tmp_path: Path) -> None:
    name, part, file_of = training_files()[case]
    state = states(name)[1][part]
    content = file_of(wrapped(state, "module.", inside=False))
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert same(loaded(name, part, tmp_path / "a.pth"), state)
