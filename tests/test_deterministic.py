"""``run.deterministic``: what it asks of torch, and that it changes no number but by rounding."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from test_trainer import make_config
from varl.config import TrainConfig
from varl.trainer import Trainer

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run sets all of this for its whole process."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    cuda, kinds = torch.backends.cuda, ("flash", "mem_efficient", "cudnn")
    before = [getattr(cuda, f"{kind}_sdp_enabled")() for kind in kinds]
    yield
    torch.use_deterministic_algorithms(False)
    for kind, on in zip(kinds, before, strict=True):
        getattr(cuda, f"enable_{kind}_sdp")(on)
    os.environ.pop(WORKSPACE, None)


def step(config: TrainConfig) -> dict[str, Any]:
    """The record of a run's first update."""
    trainer = Trainer(config)
    record = trainer.step()
    trainer.folder.close()
    return record


def test_a_run_that_computes_alike(weights: Path, tmp_path: Path) -> None:
    config = make_config(weights, tmp_path / "plain", update="full", run={"updates": 1})
    record = step(config)
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
    alike = replace(config.run, deterministic=True, out=tmp_path / "alike")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of operators that have no such way
        found = step(replace(config, run=alike))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ[WORKSPACE] == ":4096:8"
    cuda = torch.backends.cuda
    assert not any(on() for on in (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled))
    for key in ("loss", "gradient_norm", "return"):
        assert found[key] == pytest.approx(record[key], rel=1e-4)


def test_a_run_may_go_on_with_it(weights: Path, tmp_path: Path) -> None:
    config = make_config(weights, tmp_path, update="prefix", run={"updates": 1})
    Trainer(config).run()
    later = Trainer(replace(config, run=replace(config.run, updates=2, deterministic=True)))
    later.folder.close()
    assert later.update == 1
