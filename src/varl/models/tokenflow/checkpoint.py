"""TokenFlow's weights on disk, as upstream reads and writes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from varl.models.tokenflow.config import read_config
from varl.models.tokenflow.policy import TokenFlow
from varl.models.weights import Source, describe, load_strict, part_sources, read_tensors

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
    if weights is None:
        raise ValueError(
            "TokenFlow's weights do not come with the package: give local paths for the parts transformer and "
            'tokenizer (and text, a folder), or "random"'
        )
    if isinstance(weights, str) and weights == "random":
        return TokenFlow(shape).eval()
    sources = part_sources(_folder(weights), PARTS, "TokenFlow")
    for part in ("transformer", "tokenizer"):
        if sources.get(part) is None:
            raise ValueError(f"TokenFlow needs weights for its {part}; the parts given are {', '.join(sources)}")
    with torch.device("meta"):
        policy = TokenFlow(shape, _text(sources))
    load_strict(policy.transformer, *_read(sources["transformer"], foreign=_not_the_model))
    # Checkpoints of the tokenizer's training keep its command line beside the tensors: a plain bag of values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        load_strict(policy.tokenizer, *_read(sources["tokenizer"]))
    return policy.eval()


def _folder(weights: Any) -> Any:
    """A folder that ``save`` wrote, as its parts."""
    if isinstance(weights, str | Path) and (Path(weights) / "transformer").is_dir():
        found = {path.stem: path for path in Path(weights).iterdir() if path.stem in PARTS}
        return found or weights
    return weights


def _text(sources: dict[str, Source]) -> str | Path | None:
    text: Any = sources.get("text")
    model = sources["transformer"]
    if text is None and isinstance(model, str | Path) and (Path(model) / "tokenizer_config.json").is_file():
        return model
    if text is not None and not isinstance(text, str | Path):
        raise ValueError(f"TokenFlow's text tokenizer is given by its folder, not {type(text).__name__}")
    return text


def _read(source: Source, foreign: Callable[[str], bool] | None = None) -> tuple[dict[str, Tensor], str]:
    """Tensors that nobody else holds, without the foreign ones, and the name of their source."""
    tensors = read_tensors(source, NESTED)
    if foreign is not None:
        tensors = {key: value for key, value in tensors.items() if not foreign(key)}
    if isinstance(source, Mapping):
        tensors = {key: value.detach().clone() for key, value in tensors.items()}
    return tensors, describe(source)


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
    _write(model, lambda to: save_file(_plain(policy.transformer), to, metadata={"format": "pt"}))
    if not path.suffix:
        _write(path / "tokenizer.pt", lambda to: torch.save({"model": _plain(policy.tokenizer)}, to))


def _plain(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        key: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).contiguous()
        for key, value in module.state_dict().items()
    }


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside and rename: the tensors may be mapped from the very file that is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    write(beside)
    os.replace(beside, path)
