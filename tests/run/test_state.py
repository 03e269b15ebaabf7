"""Random generators, the optimizer's tensors and the fingerprint of weights."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from test_trainer import make_config
from varl.run import state
from varl.run.state import (
    fingerprint,
    new_moments,
    own_generators,
    rng_state,
    seed_all,
    set_rng_state,
    stored_moments,
)
from varl.trainer import Trainer


def draws() -> list[float]:
    """An odd number of Gaussians: numpy and Python keep the spare one of a pair."""
    return [float(torch.rand(1)), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)]


def test_generators_come_back() -> None:
    seed_all(3)
    draws()
    state = {name: value.clone() for name, value in rng_state().items()}
    expected = [draws() for _ in range(3)]
    seed_all(4)
    assert draws() != expected[0]
    set_rng_state(state)
    assert [draws() for _ in range(3)] == expected


def test_seeds_decide_all_draws() -> None:
    seed_all(2**40)
    first = draws()
    seed_all(2**40)
    assert draws() == first
    seed_all(1)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_own_generators_leave_those_outside_alone() -> None:
    seed_all(0)
    expected = [draws(), draws()]
    seed_all(0)
    found = [draws()]
    for _ in range(2):
        with own_generators(7):
            inside = draws()
    found.append(draws())
    assert found == expected
    with own_generators(7):
        assert draws() == inside


def test_moments_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    assert stored_moments(model.named_parameters(), optimizer) == {}
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    stored = stored_moments(model.named_parameters(), optimizer)
    slots = ("step", "exp_avg", "exp_avg_sq")
    assert stored.keys() == {f"0.{name}.{slot}" for name in ("weight", "bias") for slot in slots}
    other = torch.optim.AdamW(model.parameters())
    for name, value in new_moments(model.named_parameters(), other, stored).items():
        value.copy_(stored[name])
    assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
    for index, slot in ((index, slot) for index in (0, 1) for slot in slots):
        assert torch.equal(*(o.state_dict()["state"][index][slot] for o in (optimizer, other)))
    with pytest.raises(ValueError, match=r"no parameter '2\.weight'"):
        new_moments(model.named_parameters(), other, ["2.weight.step"])


def test_fingerprints_tell_weights_apart() -> None:
    model = nn.Linear(40, 50)
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.weight.mul_(1.0001)
    assert fingerprint(model) != before
    assert fingerprint(nn.Linear(50, 40)) != before


def test_a_step_is_where_its_parameter_is() -> None:
    """There the fused kernels read it."""
    model = nn.Linear(2, 1, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    found = new_moments(model.named_parameters(), optimizer, ["weight.step", "weight.exp_avg"])
    assert [value.device.type for value in found.values()] == ["meta", "meta"]


def test_a_checkpoint_without_a_gpus_generator_is_gone_on_from_with_one(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(weights, tmp_path, run={"updates": 1})
    Trainer(config).run()
    here = state.rng_state
    monkeypatch.setattr(state, "rng_state", lambda: here() | {"cuda": torch.zeros(16, dtype=torch.uint8)})
    trainer = Trainer(replace(config, run=replace(config.run, updates=2)))
    trainer.folder.close()
    assert trainer.update == 1
