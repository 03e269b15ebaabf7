"""Families' settings from mappings: of a recipe, of the authors' files, of a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from varl import load_policy
from varl.models.fields import fill


@dataclass(frozen=True)
class Inner:
    width: int = 1


@dataclass(frozen=True)
class Shape:
    depth: int = 2
    ratio: float = 4.0
    causal: bool = True
    grids: tuple[int, ...] = (1, 2)
    pairs: tuple[tuple[int, int], ...] | None = None
    name: str = "x"
    inner: Inner = field(default_factory=Inner)


def test_values_as_recipes_and_command_lines_write_them() -> None:
    given = {"depth": "4", "ratio": "1e-3", "causal": "false", "grids": "[1, 3]", "pairs": [[1, 1], ["2", 3]]}
    made = fill(Shape, given | {"name": "7", "inner": Inner(3)}, "a shape")
    assert made == Shape(4, 0.001, False, (1, 3), ((1, 1), (2, 3)), "7", Inner(3))
    assert [type(value) for value in (made.depth, made.ratio, made.causal)] == [int, float, bool]
    assert fill(Shape, {"ratio": 3, "causal": 1, "pairs": None}, "a shape") == Shape(ratio=3.0)
    assert fill(Shape, made, "a shape") is made
    assert fill(Shape, None, "a shape") == Shape()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": "four"}, "a shape: depth must be int, got 'four'"),
        ({"depth": 4.5}, r"a shape: depth must be int, got 4\.5"),
        ({"ratio": "wide"}, "a shape: ratio must be float, got 'wide'"),
        ({"causal": 2}, "a shape: causal must be bool, got 2"),
        ({"grids": 3}, r"a shape: grids must be tuple\[int, \.\.\.\], got 3"),
        ({"grids": [1, "x"]}, r"a shape: grids must be tuple\[int, \.\.\.\], got \[1, 'x'\]"),
        ({"pairs": [[1]]}, "a shape: pairs must be tuple"),
        ({"grids": "["}, r"a shape: grids must be .*got '\['"),
        ({"name": 3}, "a shape: name must be str, got 3"),
        ({"inner": 3}, "a shape: inner must be Inner, got 3"),
        ({"deep": 3, 4: 5}, r"a shape has no 4, 'deep'; it has depth, ratio, .*inner"),
        ([1], r"the settings of a shape must be a mapping, not \[1\]"),
    ],
)
def test_values_that_cannot_be_used(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(Shape, given, "a shape")


@pytest.mark.parametrize("family", ["var", "switti", "infinity", "tokenflow"])
def test_every_family_names_the_setting(family: str) -> None:
    name = {"infinity": "norm_eps", "tokenflow": "rms_norm_eps"}.get(family, "depth")
    with pytest.raises(ValueError, match=f"(VAR|Switti|Infinity|TokenFlow)'s transformer: {name} must be .*got 'deep'"):
        load_policy(family, {"transformer": {name: "deep"}}, "random")
