"""A tiny random policy of every published family, with prompts that it reads."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import varl.loading
from models.infinity import cases as infinity
from models.switti import test_policy as switti
from models.tokenflow import test_policy as tokenflow
from models.var import test_policy as var
from varl import log_probs
from varl.config import PolicyConfig
from varl.loading import prepare
from varl.policy import Policy, Prompt

__all__ = ["FAMILIES", "Family", "actions_of", "assert_same", "every", "prepared", "prompts", "scored", "shaken"]

GRIDS = (1, 2, 3, 4)
TOKENIZER = {"ch": 32, "ch_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1}


def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def _t5(texts: Sequence[str], device: torch.device) -> list[Tensor]:
    """Stands in for Infinity's text encoder: random features of each text, as many tokens as it has words."""
    channels = infinity.SMALL["transformer"]["text_channels"]
    return [torch.randn(len(text.split()) + 1, channels, generator=_generator(text)) for text in texts]


def _clip(texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Stands in for Switti's text encoders."""
    rows: dict[str, list[Tensor]] = {"prompt_embeds": [], "pooled": [], "attn_bias": []}
    for text in texts:
        generator = _generator(text)
        rows["prompt_embeds"].append(torch.randn(switti.TEXT, switti.CONTEXT, generator=generator))
        rows["pooled"].append(torch.randn(switti.POOLED, generator=generator))
        padded = torch.arange(switti.TEXT) > len(text.split())
        rows["attn_bias"].append(torch.zeros(switti.TEXT).masked_fill(padded, -torch.inf))
    return {name: torch.stack(values) for name, values in rows.items()}


class _Llama:
    """Stands in for TokenFlow's reader of prompts."""

    def row(self, text: str) -> list[int]:
        kept = [1, *(2 + zlib.crc32(word.encode()) % 5 for word in text.split())][:5]
        return [tokenflow.PAD] * (5 - len(kept)) + kept + [7, 8]


def _infinity() -> Policy:
    policy = infinity.make_policy()
    policy.text_encoder = cast(Any, _t5)
    return policy


def _switti(kind: str) -> Policy:
    policy = switti.make(kind, GRIDS, tokenizer=TOKENIZER)
    policy.encoders = cast(Any, _clip)
    return policy


def _tokenflow() -> Policy:
    policy = tokenflow.make()
    policy._reader = cast(Any, _Llama())
    return policy


@dataclass(frozen=True)
class Family:
    """A family's tiny policy.

    Attributes:
        name: of the test.
        make: the policy, the same each time; its distributions are far from uniform.
        config: what it was made with, for ``load_policy``.
        text: positions that a row computes besides the tokens of its grids.
        frozen: parameters of the trainable part that training leaves alone.
        idle: parameters that no update gives a gradient: what only guidance or a coarser step reads.
    """

    name: str
    make: Callable[[], Policy]
    config: dict[str, Any]
    text: int = 0
    frozen: set[str] = field(default_factory=set)
    idle: dict[str, set[str]] = field(default_factory=dict)

    def block(self, policy: Policy) -> nn.Module:
        """The first block's feed-forward, which computes every token once."""
        names = [name for name, _ in policy.trainable.named_modules() if name.endswith((".ffn", ".mlp"))]
        return policy.trainable.get_submodule(names[0])


def _switti_config(kind: str) -> dict[str, Any]:
    shape = {**switti.SHAPE, **switti.KINDS[kind], "patch_nums": GRIDS}
    return {"transformer": shape, "tokenizer": TOKENIZER}


FAMILIES = [
    Family(
        "var",
        lambda: var.make(TOKENIZER, patch_nums=GRIDS),
        {"transformer": {**var.SHAPE, "patch_nums": GRIDS}, "tokenizer": var.TOKENIZER | TOKENIZER},
    ),
    Family(
        "infinity",
        _infinity,
        infinity.SMALL,
        idle={kind: {"cfg_uncond"} for kind in ("full", "prefix", "suffix")},
    ),
    Family("switti", lambda: _switti("ar"), _switti_config("ar"), frozen={"crop_embed.weight"}),
    Family(
        "switti-nonar",
        lambda: _switti("nonar"),
        _switti_config("nonar"),
        frozen={"crop_embed.weight"},
        # Where scales share no keys, the suffix does not read what starts the first step.
        idle={"suffix": {"pos_start"}},
    ),
    Family(
        "tokenflow",
        _tokenflow,
        {"transformer": tokenflow.TRANSFORMER, "tokenizer": tokenflow.TOKENIZER},
        text=tokenflow.PROMPTS.shape[1] - 1,
    ),
]


def prompts(count: int = 2) -> list[Prompt]:
    """Prompts that every family reads, of different lengths."""
    texts = ["a red cat", "two", "the word KEBA on", "dogs in rain"]
    return [Prompt(text, ("LUX", "KEBA")[: 1 + i % 2], label=i) for i, text in enumerate(texts[:count])]


every = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def prepared(family: Family, monkeypatch: pytest.MonkeyPatch, **policy: Any) -> Policy:
    """The policy as a run has it, frozen where it must be."""
    monkeypatch.setattr(varl.loading, "load_policy", lambda *_: family.make())
    return prepare(PolicyConfig(family.make().family, **policy), torch.device("cpu"))


def shaken(policy: Policy, by: float, seed: int = 0) -> Policy:
    """With all weights of the trainable part moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable.parameters():
            parameter.mul_(1 + by * torch.randn(parameter.shape, generator=generator))
    return policy


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal, but for the last bits, which on some processors follow where in memory a weight lies."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)


def actions_of(policy: Policy, rows: int, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(policy.classes, (rows, tokens, *policy.event), generator=generator)


def scored(policy: Policy, rows: int = 3) -> Tensor:
    """Log-probabilities of fixed actions for all prompts."""
    condition = policy.condition(prompts(rows))
    return log_probs(policy, condition, actions_of(policy, rows, condition.schedule.tokens)).logp
