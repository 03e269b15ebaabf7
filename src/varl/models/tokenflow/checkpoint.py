"""TokenFlow's weights on disk, as upstream reads and writes them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from varl.models.parts import find_parts, read_part, state_of, write_tensors
from varl.models.tokenflow.config import read_config
from varl.models.tokenflow.policy import TokenFlow
from varl.models.weights import Source, load_strict

__all__ = ["load", "save"]

PARTS = ("transformer", "tokenizer", "text")
NESTED = [("ema",), ("model",), ("state_dict",)]
OWN = ("model.layers.", "model.embed_tokens.", "model.norm.", "model.mm_projector.", "model.lvl_embed.", "lm_head.")


def load(config: Mapping[str, Any] | None = None, weights: Any = None) -> TokenFlow:
    """See ``varl.load_policy``; parts are ``transformer``, ``tokenizer`` and ``text``, the folder of Llama's tokenizer.

    The published folder of the language model holds its text tokenizer too, so ``text`` is by default that folder.

    Raises:
        ValueError: if a part is missing: what the transformer reads are codes of the tokenizer, so both are needed.
    """
    shape = read_config(config)
    if isinstance(weights, str) and weights == "random":
        return TokenFlow(shape).eval()
    sources = find_parts(weights, PARTS, PARTS[:2], "TokenFlow")
    with torch.device("meta"):
        policy = TokenFlow(shape, _text(sources))
    tensors, source = read_part(sources["transformer"], NESTED)
    load_strict(policy.transformer, {k: v for k, v in tensors.items() if not _not_the_model(k)}, source)
    # Checkpoints of the tokenizer's training keep its command line beside the tensors: a plain bag of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_strict(policy.tokenizer, *read_part(sources["tokenizer"], NESTED))
    return policy.eval()


def _text(sources: dict[str, Source]) -> str | Path | None:
    text: Any = sources.get("text")
    model = sources["transformer"]
    if text is None and isinstance(model, str | Path) and (Path(model) / "tokenizer_config.json").is_file():
        return model
    if text is not None and not isinstance(text, str | Path):
        raise ValueError(f"TokenFlow's text tokenizer is given by its folder, not {type(text).__name__}")
    return text


def _not_the_model(key: str) -> bool:
    """Whether a key of the language model's checkpoint is none of its parameters: counters, tables, other modules."""
    return key.endswith("inv_freq") or not (key.startswith(OWN) or key == "model.pos_1LC")


def save(policy: TokenFlow, path: Path) -> None:
    """Write the weights, in fp32, under upstream's keys.

    Args:
        path: a ``.safetensors`` file, which then holds the language model, the part that is tuned; or a folder (no
            suffix), which gets ``transformer/model.safetensors``, to be put beside the ``config.json`` of the published
            model, and ``tokenizer.pt``.

    Raises:
        ValueError: if the path ends otherwise.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ""):
        raise ValueError(f"TokenFlow's weights are written to a .safetensors file or a folder, not to {path}")
    model = path if path.suffix else path / "transformer" / "model.safetensors"
    # The format is what transformers asks for before it reads a file.
    write_tensors(state_of(policy.transformer), model, {"format": "pt"})
    if not path.suffix:
        write_tensors({"model": state_of(policy.tokenizer)}, path / "tokenizer.pt")
