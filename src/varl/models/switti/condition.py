"""Switti's text condition: two frozen CLIP text encoders, and the cut of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varl.models.text import load_text

__all__ = ["CROP", "TextEncoders", "crop_values"]

TOKENS = 77
CACHED = 1024
CROP = (512, 512, 0, 0)
"""The cut that pictures are drawn with: height and width before it, top and left of it."""


def crop_values(heights: Tensor, widths: Tensor) -> Tensor:
    """The crop condition of training pictures by their size in pixels, int64 [B, 4].

    A picture is scaled until its shorter side is 512 (also for the 1024 models), and its middle cut out. Sides are
    truncated after a product in float32, so that a side of 512 may come out as 511, as it did in training.
    """
    heights, widths = heights.float(), widths.float()
    scale = 512 / torch.minimum(heights, widths)
    height, width = (scale * heights).long(), (scale * widths).long()
    top, left = (((side - 512) / 2).floor().long().clamp(min=0) for side in (height, width))
    return torch.stack([height, width, top, left], 1)


class TextEncoders:
    """CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, in that order, each with its tokenizer; loaded when first used.

    Every distinct text is encoded once, without autocast, so that its features do not depend on who asked for them
    first; the ``CACHED`` last used are kept, on the CPU.

    Args:
        folders: local folders of the two, as transformers saves them.

    Raises:
        FileNotFoundError: if a folder is missing.
    """

    def __init__(self, folders: tuple[str | Path, str | Path]) -> None:
        self.folders = tuple(Path(folder) for folder in folders)
        for folder in self.folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"no text encoder at {folder}: a local folder is needed")
        self._loaded: list[tuple[Any, Any]] = []
        self._known: dict[str, dict[str, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoders:
        """Itself: copies of a policy, such as its reference, share what is frozen and large."""
        return self

    def _load(self, device: torch.device) -> list[tuple[Any, Any]]:
        if not self._loaded:
            self._loaded = [
                load_text(folder, "text encoder", "switti", "CLIPTokenizer", "CLIPTextModel", dtype=torch.float32)
                for folder in self.folders
            ]
        for _, model in self._loaded:
            model.to(device)
        return self._loaded

    def count(self, text: str) -> tuple[int, int]:
        """The tokens of a text, its ends included, as the encoder counts that has more; and how many are read."""
        loaded = self._loaded or self._load(torch.device("cpu"))
        return max(len(reader(text, truncation=False, verbose=False)["input_ids"]) for reader, _ in loaded), TOKENS

    @torch.no_grad()
    def _encode(self, texts: list[str], device: torch.device) -> dict[str, Tensor]:
        states = []
        for tokenizer, model in self._load(device):
            given = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
            mask = given["attention_mask"].to(device)
            with torch.autocast(device.type, enabled=False):
                out = model(input_ids=given["input_ids"].to(device), attention_mask=mask)
            states.append(out.last_hidden_state)
        # The summary and the mask are those of the second encoder; its mask serves for the tokens of both.
        bias = torch.zeros(mask.shape, device=device).masked_fill(mask == 0, -torch.inf)
        return {"prompt_embeds": torch.cat(states, -1), "pooled": out.pooler_output, "attn_bias": bias}

    def __call__(self, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """``prompt_embeds`` [B, 77, 2048], ``pooled`` [B, 1280] and ``attn_bias`` [B, 77] (0, -inf for padding)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            encoded = self._encode(new, device)
            for row, text in enumerate(new):
                self._known[text] = {name: value[row].cpu() for name, value in encoded.items()}
        for text in texts:
            self._known[text] = self._known.pop(text)
        found = [self._known[text] for text in texts]
        for text in list(self._known)[: max(len(self._known) - CACHED, 0)]:
            del self._known[text]
        return {name: torch.stack([row[name] for row in found]).to(device) for name in found[0]}
