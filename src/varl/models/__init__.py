"""The model families. A family is one folder and one entry of ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from varl.policy import Policy

__all__ = ["FAMILIES", "load_policy", "save_policy"]

FAMILIES = {
    "inkling": "varl.models.inkling",
    "infinity": "varl.models.infinity",
    "switti": "varl.models.switti",
    "var": "varl.models.var",
    "tokenflow": "varl.models.tokenflow",
}
"""Family name -> the module whose ``load(config, weights)`` builds a policy; imported when first used."""

Weights = str | Path | Mapping[str, Any] | None


def load_policy(family: str, config: Mapping[str, Any] | None = None, weights: Weights = None) -> Policy:
    """Build a policy of a family and load its weights.

    Args:
        family: a name of ``FAMILIES``.
        config: the family's own settings, to build other shapes than the weights' or the family's default.
        weights: a path, or a mapping of part name to path or state dict, for families of several parts. None loads
            the weights that come with the package, where a family has some; ``"random"`` leaves random weights.

    Raises:
        ValueError: if the family is unknown, or the weights do not fit it.
        FileNotFoundError: if a file is missing.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"no model family {family!r}; there are {', '.join(sorted(FAMILIES))}")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"the config of {family} must be a mapping of settings, not {type(config).__name__}")
    return import_module(FAMILIES[family]).load(config, weights)


def save_policy(policy: Policy, path: Path) -> None:
    """Write a policy's weights as a file that ``load_policy`` reads."""
    import_module(FAMILIES[policy.family]).save(policy, path)
