"""What the functions of the paper take, and by default: recipes and other people's code rest on it."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

from varl import algorithm

NEEDED = inspect.Parameter.empty
MASK = {"continuations": 1, "merge": "union", "empty": "ones"}
RASTER = {"mode": "overlap", "shape": "polygon", "dilation": 0.0}

EXPECTED: dict[str, dict[str, Any]] = {
    "group_advantages": {"rewards_PG": NEEDED, "valid_PG": None, "kind": "std", "eps": 1e-6},
    "policy_loss": {
        "inputs": NEEDED,
        "clip": 0.2,
        "beta": 0.01,
        "kl": "k3",
        "mask_kl": False,
        "ratio": "token",
        "divisor": None,
    },
    "middle_return": {
        "rewards_K": NEEDED,
        "estimator": "soft",
        "eta": 1.0,
        "logp": None,
        "reference_logp": None,
        "self_normalised": True,
        "valid": None,
    },
    "scale_weights": {"counts": NEEDED, "alpha": 0.6},
    "step_shares": {"counts": NEEDED, "alpha": 0.6},
    "token_weights": {"counts": NEEDED, "alpha": 0.6, "rescale": True, "mask_BL": None, "count": "grid"},
    "rasterise": {"polygons": NEEDED, "image_size": NEEDED, "grid": NEEDED, **RASTER},
    "propagate": {"mask_hw": NEEDED, "schedule": NEEDED},
    "token_masks": {
        "regions": NEEDED,
        "image_size": NEEDED,
        "schedule": NEEDED,
        **MASK,
        "propagation": "sequential",
        **RASTER,
    },
    "gradient_mask": {"image_grad_B3HW": NEEDED, "quantile": NEEDED, "schedule": NEEDED, **MASK},
    "merge_masks": {"mask_KL": NEEDED, "nonempty_K": None, "how": "union", "empty": "ones"},
    "entropy": {"logits": NEEDED},
    "exact_kl": {"logits": NEEDED, "reference_logits": NEEDED},
    "kl_k1": {"logp": NEEDED, "reference_logp": NEEDED},
    "kl_k2": {"logp": NEEDED, "reference_logp": NEEDED},
    "kl_k3": {"logp": NEEDED, "reference_logp": NEEDED},
}

CHOICES = {
    "AdvantageKind": ("std", "mean", "leave_one_out", "batch_std"),
    "KL": ("k3", "k2", "exact"),
    "Ratio": ("token", "step"),
    "Estimator": ("soft", "soft-reference", "policy", "mean", "max"),
    "Count": ("grid", "masked"),
    "Coverage": ("overlap", "soft"),
    "RegionShape": ("polygon", "box"),
    "Propagation": ("sequential", "direct"),
    "Empty": ("ones", "skip"),
    "Merge": ("union", "mean", "intersection"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_arguments_and_their_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(algorithm, name)).parameters
    found = {key: one.default for key, one in parameters.items() if key not in ("dtype", "device")}
    assert {key: found.get(key, "missing") for key in EXPECTED[name]} == EXPECTED[name]


def test_every_function_is_listed() -> None:
    functions = {name for name in algorithm.__all__ if inspect.isfunction(getattr(algorithm, name))}
    assert functions == set(EXPECTED), "what a new function takes, and by default, belongs above"


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    assert set(CHOICES[name]) <= set(get_args(getattr(algorithm, name)))
