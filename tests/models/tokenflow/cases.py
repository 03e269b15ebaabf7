"""Reference vectors of TokenFlow: the packaged case, and those of a folder beside the repository."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import varl
from varl.models.tokenflow import TokenFlow

GOLDEN = Path(__file__).parents[2] / "golden" / "tokenflow"
PARITY = Path(os.environ.get("VARL_PARITY") or Path(__file__).parents[3].parent / "shared" / "parity")


@dataclass(frozen=True)
class Case:
    """A folder with a manifest, tensors, and weights of the language model or of the tokenizer."""

    path: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / "manifest.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / "tensors.safetensors")

    @property
    def tokenizer_weights(self) -> dict[str, Tensor]:
        name = self.manifest.get("tokenizer", "tokenizer.safetensors")
        return with_usage(load_file(self.path / name))


def with_usage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packaged weights leave out the statistics of use, which are large and which nothing reads."""
    return {"quantize.codebook_used": torch.zeros(131072)} | tensors


def _cases(key: str) -> list[Any]:
    """pytest parameters: the cases whose manifest has ``key``."""
    import pytest

    found = [pytest.param(Case(GOLDEN / name), id=f"golden-{name}") for name in ("tokenflow_lm", "tokenflow_tokenizer")]
    beside = sorted(path.parent for path in PARITY.glob("tokenflow_*/manifest.json"))
    found += [pytest.param(Case(path), id=path.name) for path in beside]
    found = [param for param in found if key in param.values[0].manifest]
    if not beside:
        reason = f"no further reference vectors at {PARITY}"
        found.append(pytest.param(None, id="parity", marks=pytest.mark.skip(reason=reason)))
    return found


LM_CASES, TOKENIZER_CASES = _cases("config"), _cases("sizes")
LM = LM_CASES[0].values[0]


def lm_config(case: Case, **changes: Any) -> dict[str, Any]:
    return {
        "transformer": case.manifest["config"] | changes,
        "tokenizer": case.manifest["tokenizer_sizes"],
    }


@lru_cache
def lm_policy(case: Case) -> TokenFlow:
    """Shared: tests must not change it."""
    return new_policy(case)


def new_policy(case: Case, **changes: Any) -> TokenFlow:
    weights = {"transformer": case.path / "model.safetensors", "tokenizer": case.tokenizer_weights}
    policy = varl.load_policy("tokenflow", lm_config(case, **changes), weights)
    assert isinstance(policy, TokenFlow)
    return policy


def prompts_of(case: Case) -> dict[str, Tensor]:
    """Features for ``condition_from``."""
    rows = [case.tensors[f"in.prefix.{i}"] for i in range(len(case.tensors["in.codes"]))]
    return {"prompt": torch.stack(rows), "null": case.tensors["in.neg_prefix"]}
