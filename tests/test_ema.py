"""The moving average of trained weights: its closed form, and where a run uses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny_runs
from test_trainer import make_config, run_until
from varl.config import RunConfig
from varl.ema import Average
from varl.trainer import Trainer


def test_the_average_is_the_geometric_sum_of_all_values() -> None:
    module, decay = nn.Linear(3, 2), 0.7
    module.bias.requires_grad_(False)
    average, seen = Average(module, decay), [module.weight.detach().clone()]
    for step in range(5):
        with torch.no_grad():
            module.weight.copy_(torch.full((2, 3), float(step**2)))
        average.update()
        seen.append(module.weight.detach().clone())
    shares = [decay**5] + [(1 - decay) * decay ** (5 - n) for n in range(1, 6)]
    expected = sum(share * value for share, value in zip(shares, seen, strict=True))
    assert average.state_dict().keys() == {"weight"}
    torch.testing.assert_close(average.state_dict()["weight"], expected)
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, seen[-1])
    torch.testing.assert_close(average.state_dict()["weight"], expected)


@pytest.mark.slow
def test_a_run_exports_its_average_and_goes_on_with_it(tmp_path: Path) -> None:
    weights = tiny_runs.tiny_weights(tmp_path / "tiny.safetensors")

    def made(name: str, ema: float = 0.5) -> Trainer:
        torch.manual_seed(0)
        return Trainer(make_config(weights, tmp_path / name, update="full", run={"ema": ema, "updates": 4}))

    plain = made("plain", ema=0.0)
    plain.run()
    whole = made("whole")
    whole.run()
    exported = {name: load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "plain")}
    trained = {f"transformer.{name}": value for name, value in whole.policy.trainable.state_dict().items()}
    assert whole.ema is not None
    for name, value in whole.ema.state_dict().items():
        name = f"transformer.{name}"
        assert torch.equal(exported["whole"][name], value)
        assert torch.equal(exported["plain"][name], trained[name])
        assert not torch.equal(value, trained[name])
    run_until(made("killed"), 4)
    torch.manual_seed(1)
    made("killed").run()
    for name, value in load_file(tmp_path / "killed" / "weights.safetensors").items():
        assert torch.equal(value, exported["whole"][name])


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"run\.ema must be 0 or more, and less than 1"):
        replace(RunConfig(), ema=value)
