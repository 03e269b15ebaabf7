"""Families' settings of any value: ValueError before anything is built, and nothing that no memory holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import pytest

import varl
from varl.models.fields import fill
from varl.models.infinity import config as infinity
from varl.models.inkling import InklingConfig
from varl.models.switti.model import TransformerConfig as SwittiTransformer
from varl.models.switti.policy import SwittiConfig
from varl.models.tokenflow import config as tokenflow
from varl.models.var.model import TransformerConfig as VarTransformer
from varl.models.var.policy import VarConfig
from varl.models.vqvae import VQVAEConfig

READ: dict[str, tuple[Callable[[Any], Any], list[Any], dict[str, type]]] = {
    "inkling": (lambda config: fill(InklingConfig, config, "Inkling"), [InklingConfig], {}),
    "var": (VarConfig.of, [VarConfig], {"transformer": VarTransformer, "tokenizer": VQVAEConfig}),
    "infinity": (
        infinity.read_config,
        [infinity.InfinityConfig],
        {"transformer": infinity.TransformerConfig, "tokenizer": infinity.TokenizerConfig},
    ),
    "switti": (SwittiConfig.of, [SwittiConfig], {"transformer": SwittiTransformer, "tokenizer": VQVAEConfig}),
    "tokenflow": (
        tokenflow.read_config,
        [tokenflow.TokenFlowConfig],
        {"transformer": tokenflow.TransformerConfig, "tokenizer": tokenflow.TokenizerConfig},
    ),
}
VALUES: list[Any] = [
    *(None, True, 3, -1, 0, 10**9, 2**70, float("nan"), float("inf"), 1.5, "mini", "", "1_x", "[1"),
    *([], [1], ["a"], [0], [[1, 2]], [1, 2, 10**9], [1] * 2000, {}, {"a": 1}, {1: 2}),
]


def settings_of(family: str) -> list[Mapping[Any, Any]]:
    _, (top,), parts = READ[family]
    names = [*(field.name for field in fields(top)), "size", "vae_type", "d_vae", "codebook_size", "reso", 1]
    return [
        *({name: value} for name in names for value in VALUES),
        *({part: {f.name: value}} for part, kind in parts.items() for f in fields(kind) for value in VALUES),
    ]


@pytest.mark.parametrize("family", READ)
def test_settings_of_any_value_give_a_configuration_or_one_kind_of_error(family: str) -> None:
    for config in settings_of(family):
        try:
            READ[family][0](config)
        except ValueError as error:
            assert 0 < len(str(error)) < 2000  # noqa: PT017


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("config", [[("size", "x")], "mini", 3], ids=str)
def test_a_configuration_is_a_mapping(family: str, config: Any) -> None:
    with pytest.raises(ValueError, match=f"the config of {family} must be a mapping"):
        varl.load_policy(family, config, "random")


@pytest.mark.parametrize(
    ("family", "known"), [("var", "d16, d20"), ("infinity", "2b, 8b"), ("switti", "512-ar"), ("tokenflow", "7b")]
)
@pytest.mark.parametrize("size", ["mini", ["d16"], 3.5, {}, ""])
def test_sizes_that_are_none_are_answered_with_those_that_are(family: str, known: str, size: Any) -> None:
    with pytest.raises(ValueError, match=f"has no size .*; there (are|is) .*{known}"):
        varl.load_policy(family, {"size": size}, "random")


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("inkling", {"grids": [1] * 100_000 + [12]}, "grids must be 1 to 64 whole numbers from 1 to 512"),
        ("inkling", {"grids": [1, 2**30, 12]}, "grids must be"),
        ("var", {"transformer": {"depth": 10**9}}, "depth must be a whole number from 1 to 256, got 1000000000"),
        ("var", {"transformer": {"patch_nums": [1] * 10**5}}, "patch_nums must be 1 to 64"),
        ("infinity", {"depth": 10**6, "block_chunks": 10**6}, "depth must be"),
        ("infinity", {"codebook_dim": 10**9}, "codebook_dim must be a whole number from 1 to 64"),
        ("infinity", {"scale_schedule": [[1, 1]] * 10**5}, "scale_schedule has 1 to 64 grids"),
        ("switti", {"transformer": {"depth": 10**9}}, "depth must be"),
        ("switti", {"tokenizer": {"num_res_blocks": 10**9}}, "num_res_blocks must be"),
        ("tokenflow", {"transformer": {"num_hidden_layers": 10**9}}, "num_hidden_layers must be"),
        ("tokenflow", {"tokenizer": {"vit_layers": 10**9}}, "vit_layers must be"),
    ],
)
def test_nothing_is_built_that_no_memory_holds(family: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varl.load_policy(family, config, "random")
