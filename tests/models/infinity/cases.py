"""Reference vectors of upstream's Infinity, and small random policies."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import varl
from varl.models.infinity import Infinity
from varl.policy import Condition
from varl.schedule import ScaleSchedule

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "infinity"
PARITY = Path(os.environ.get("VARL_PARITY") or TESTS.parent.parent / "shared" / "parity")
SMALL: dict[str, Any] = {
    "transformer": {
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "block_chunks": 2,
        "text_channels": 128,
        "text_maxlen": 12,
        "mlp_ratio": 8.0,
    },
    "tokenizer": {"codebook_dim": 4, "base_ch": 24, "ch_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1},
    "scale_schedule": [[1, 1], [2, 2], [3, 2], [6, 4]],
}


def needs_parity(name: str) -> Path:
    """A file or folder of the reference vectors; skips the test without it."""
    path = PARITY / name
    if not path.exists():
        pytest.skip(f"no reference vectors at {path}; set VARL_PARITY to their folder")
    return path


@dataclass
class Case:
    """One configuration that upstream was run with."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    @cached_property
    def tokenizer(self) -> Path | None:
        return (self.folder / self.manifest["vae"]).resolve() if "vae" in self.manifest else None

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return load_file(self.folder / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        images = self.folder / "images.safetensors"
        return load_file(self.folder / "expected.safetensors") | (load_file(images) if images.exists() else {})

    @cached_property
    def policy(self) -> Infinity:
        return self.load()

    def load(self, **options: Any) -> Infinity:
        names = ("scale_schedule", "h_div_w", "pn")
        config = {"transformer": self.manifest["infinity_args"]} | {k: self.manifest[k] for k in names} | options
        weights: dict[str, Path] = {"transformer": self.folder / "infinity.safetensors"}
        if self.tokenizer is not None:
            config["tokenizer"] = json.loads((self.tokenizer / "manifest.json").read_text())["args"]
            weights["tokenizer"] = self.tokenizer / "vae.safetensors"
        policy = varl.load_policy("infinity", config, weights)
        assert isinstance(policy, Infinity)
        return policy

    @property
    def schedule(self) -> ScaleSchedule:
        return self.policy.default_schedule

    @property
    def steps(self) -> range:
        return range(len(self.schedule))

    def bits(self, name: str) -> Tensor:
        """The bits ``{name}_s{i}`` [B, 1, h, w, d] of all scales, as actions."""
        tensors = self.inputs if f"{name}_s0" in self.inputs else self.expected
        maps = (tensors[f"{name}_s{step}"].squeeze(1).permute(0, 3, 1, 2).float() for step in self.steps)
        return torch.cat([self.policy.quantizer.to_tokens(one) for one in maps], 1).long()

    @cached_property
    def actions(self) -> Tensor:
        return self.bits("bits")

    @cached_property
    def condition(self) -> Condition:
        return self.policy.condition_from((self.inputs["kv_compact"], self.inputs["lens"]))

    @property
    def null(self) -> Condition:
        return Condition(self.schedule, self.condition.null, self.condition.null)


def case_names() -> list[str]:
    found = [p.parent.name for p in PARITY.glob("inf_*/manifest.json") if not p.parent.name.startswith("inf_vae")]
    return ["golden", *sorted(found)] if found else ["golden", "parity"]


_CASES: dict[str, Case] = {}


def get_case(name: str) -> Case:
    if name not in _CASES:
        _CASES[name] = Case(GOLDEN if name == "golden" else needs_parity(name))
    return _CASES[name]


def make_policy(seed: int = 0, **changes: Any) -> Infinity:
    """A small random policy whose distributions are far from uniform, and depend on what was drawn and asked for.

    ``changes`` are to any field of the configuration.
    """
    config = {**SMALL["transformer"], **SMALL["tokenizer"], "scale_schedule": SMALL["scale_schedule"]} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = varl.load_policy("infinity", config, "random")
        assert isinstance(policy, Infinity)
        with torch.no_grad():
            for name, parameter in policy.transformer.named_parameters():
                if "scale_mul" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for layer in policy.transformer.head.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.mul_(1.5)
    return policy


def make_texts(lengths: list[int], seed: int = 0, channels: int = 128) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, channels, generator=generator) for length in lengths]


def draw_bits(policy: Infinity, rows: int, seed: int = 0, schedule: ScaleSchedule | None = None) -> Tensor:
    tokens = (schedule or policy.default_schedule).tokens
    return torch.randint(2, (rows, tokens, *policy.event), generator=torch.Generator().manual_seed(seed))


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max())
