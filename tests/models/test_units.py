"""Filters, resizing and norms against small reference vectors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from varl import Sampling
from varl.models.autoencoder import Residual
from varl.models.quantizer import resize_area, resize_up
from varl.models.var.model import FinalNorm
from varl.models.vqvae import phi_of_steps
from varl.sampling import filter_logits
from vectors import GOLDEN

FILTERS = json.loads((GOLDEN / "filters" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def units() -> dict[str, Tensor]:
    return load_file(Path(GOLDEN) / "units" / "units.safetensors")


@pytest.mark.parametrize("case", FILTERS["cases"], ids=lambda case: case["name"])
def test_filters(case: dict[str, object]) -> None:
    tensors = load_file(GOLDEN / "filters" / "filters.safetensors")
    top_p = float(case["top_p"])  # type: ignore[arg-type]
    kept = filter_logits(tensors["logits"], Sampling(top_k=int(case["top_k"]), top_p=top_p or 1.0))  # type: ignore
    expected, probabilities = tensors[f"kept_{case['name']}"].bool(), tensors[f"probs_{case['name']}"]
    assert kept[0, 1].isfinite().sum() == expected[0, 1].sum()
    # Which of equal logits top-p keeps is up to the sort: that row counts by number.
    kept[0, 1], expected[0, 1], probabilities[0, 1] = 0, True, 1 / 40
    assert torch.equal(kept.isfinite(), expected)
    torch.testing.assert_close(kept.softmax(-1), probabilities, atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", FILTERS["phi_index_by_number_of_convs_and_scales"])
def test_which_convolution_smooths_a_step(count: str) -> None:
    table = FILTERS["phi_index_by_number_of_convs_and_scales"][count]
    for name, expected in table.items():
        if name != "ticks":
            assert phi_of_steps(int(count), int(name[1:])) == expected, name


@pytest.mark.parametrize("steps", [5, 7, 9, 13])
def test_a_tie_in_the_middle_goes_where_float64_puts_it(steps: int) -> None:
    assert phi_of_steps(4, steps)[steps // 2] == 2


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 10, 13])
def test_area(units: dict[str, Tensor], side: int) -> None:
    found = resize_area(units["resize_x"], (side, side))
    torch.testing.assert_close(found, units[f"area_16_to_{side}"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 13])
def test_bicubic(units: dict[str, Tensor], side: int) -> None:
    found = resize_up(units["resize_x"][:, :, :side, :side], (16, 16))
    torch.testing.assert_close(found, units[f"bicubic_{side}_to_16"], atol=2e-6, rtol=0)


def test_the_norm_before_the_head(units: dict[str, Tensor]) -> None:
    norm = FinalNorm(32, 1e-6)
    norm.load_state_dict({k.removeprefix("head_nm."): v for k, v in units.items() if k.startswith("head_nm.")})
    found = norm(units["head_nm_x"], units["head_nm_cond"])
    torch.testing.assert_close(found, units["head_nm_out"], atol=1e-5, rtol=0)


def test_group_norm(units: dict[str, Tensor]) -> None:
    norm = Residual(64, 64).norm1
    assert isinstance(norm, nn.GroupNorm)
    norm.load_state_dict({"weight": units["groupnorm_weight"], "bias": units["groupnorm_bias"]})
    torch.testing.assert_close(norm(units["groupnorm_x"]), units["groupnorm_out"], atol=1e-5, rtol=0)
