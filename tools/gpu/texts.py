"""Texts without their encoders: random features of the right shapes, the same ones for the same text."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from varl.models import load_policy
from varl.policy import Policy

__all__ = ["TOKENS", "random_texts"]

TOKENS = {"infinity": 64, "switti": 77}
"""Tokens of a text: those of a prompt of two sentences; and all that CLIP reads, padding included."""


def _drawn(text: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def _with_texts(family: str, config: Mapping[str, Any] | None, weights: Any) -> Policy:
    """``varl.load_policy``, with something that reads texts in place of encoders that are not there."""
    policy: Any = load_policy(family, config, weights)
    shape: Any = getattr(policy.trainable, "config", None)
    if family == "infinity":
        tokens = min(TOKENS[family], shape.text_maxlen)

        def states(texts: Sequence[str], device: torch.device) -> list[Tensor]:
            """fp32 [tokens, E] each."""
            return [_drawn(text, tokens, shape.text_channels).to(device) for text in texts]

        policy.text_encoder = states
    elif family == "switti":

        def both(texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
            """See ``varl.models.switti.condition.TextEncoders``."""
            found = {
                "prompt_embeds": [_drawn(text, TOKENS[family], shape.context_dim) for text in texts],
                "pooled": [_drawn(text, shape.pooled_dim) for text in texts],
                "attn_bias": [torch.zeros(TOKENS[family]) for _ in texts],
            }
            return {name: torch.stack(rows).to(device) for name, rows in found.items()}

        policy.encoders = both
    return policy


@contextmanager
def random_texts() -> Iterator[None]:
    """Where runs that are made read texts without encoders."""
    with patch("varl.loading.load_policy", _with_texts):
        yield
