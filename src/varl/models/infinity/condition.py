"""Infinity's text: flan-T5 through transformers, and features that were made elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from varl.models.text import load_text
from varl.policy import Condition
from varl.schedule import ScaleSchedule

__all__ = ["Features", "TextEncoder", "make_condition", "split_features"]

Features = Sequence[Tensor] | tuple[Any, ...] | Mapping[str, Tensor]
"""A text's features [length, E] for every row, or upstream's compact form; see ``split_features``."""
REMEMBERED = 8192


class TextEncoder:
    """A flan-T5 encoder from a local folder, loaded when first needed; every distinct prompt is encoded once.

    Prompts are encoded one by one, padded to ``tokens``, and without autocast, so that a prompt's features depend
    neither on its neighbours nor on who asked for them first.

    Args:
        path: folder with the tokenizer and the weights, as transformers saves them.
        tokens: prompts are truncated to this many.
        dtype: of the encoder's weights; upstream's is float16.
    """

    def __init__(self, path: str | Path, tokens: int = 512, dtype: torch.dtype = torch.float16) -> None:
        self.path, self.tokens, self.dtype = Path(path), tokens, dtype
        self._model: Any = None
        self._tokenizer: Any = None
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> TextEncoder:
        """Itself: copies of a policy, such as its reference, share what is frozen and large."""
        return self

    def _load(self) -> None:
        self._tokenizer, self._model = load_text(
            self.path, "text encoder", "infinity", "AutoTokenizer", "T5EncoderModel", dtype=self.dtype
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], device: torch.device) -> list[Tensor]:
        """Features of prompts, as they are written: fp32 [length, E] each, the end token included."""
        with torch.autocast(device.type, enabled=False):
            return [self._one(prompt, device) for prompt in prompts]

    def count(self, prompt: str) -> tuple[int, int]:
        """The tokens of a prompt, the end token included, and how many of them are read."""
        if self._tokenizer is None:
            self._load()
        return len(self._tokenizer(prompt, truncation=False, verbose=False)["input_ids"]), self.tokens

    def _one(self, prompt: str, device: torch.device) -> Tensor:
        if prompt not in self._known:
            if self._model is None:
                self._load()
            made = self._tokenizer(
                [prompt], max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
            )
            ids, mask = made["input_ids"].to(device), made["attention_mask"].to(device)
            states = self._model.to(device)(input_ids=ids, attention_mask=mask).last_hidden_state
            self._known[prompt] = states[0, : int(mask.sum())].cpu()
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt].to(device).float()


def split_features(features: Features) -> list[Tensor]:
    """One tensor [length, E] for every row.

    Args:
        features: a sequence of such tensors; or upstream's tuple (rows of all prompts [sum of lengths, E], lengths,
            ...); or a mapping with ``kv_compact`` and ``lens``; or one with ``text`` [B, T, E] and ``length`` [B].

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(features, Mapping) and {"text", "length"} <= features.keys():
        pairs = zip(features["text"], features["length"].tolist(), strict=True)
        return [text[: int(length)] for text, length in pairs]
    if isinstance(features, Mapping) and {"kv_compact", "lens"} <= features.keys():
        features = (features["kv_compact"], features["lens"])
    if isinstance(features, tuple) and len(features) in (2, 4) and _is_lengths(features[1]):
        rows, lengths = features[0], [int(length) for length in features[1]]
        if sum(lengths) != len(rows):
            raise ValueError(
                f"lengths {lengths} sum to {sum(lengths)}, but there are {len(rows)} rows of text features"
            )
        return list(rows.split(lengths))
    if isinstance(features, Sequence) and all(isinstance(f, Tensor) and f.ndim == 2 for f in features):
        return list(features)
    raise ValueError(
        "text features are a sequence of tensors [length, channels], one a row, or upstream's compact tuple "
        "(rows, lengths, ...)"
    )


def _is_lengths(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.ndim == 1) or (
        isinstance(value, list) and all(isinstance(v, int) for v in value)
    )


def make_condition(
    texts: Sequence[Tensor],
    negative: Sequence[Tensor] | None,
    schedule: ScaleSchedule,
    limit: int,
    channels: int,
    device: torch.device,
) -> Condition:
    """A condition of ragged texts, padded with zeros to the longest.

    Args:
        texts: [length, E] a row.
        negative: what the unconditional rows read instead of the learned text; one a row, or one for all.
        limit, channels: the longest text allowed, and E.

    Raises:
        ValueError: if there is no row, or a text does not fit the transformer.
    """
    if not texts:
        raise ValueError("a condition needs at least one prompt")
    if negative is not None and len(negative) == 1:
        negative = list(negative) * len(texts)
    if negative is not None and len(negative) != len(texts):
        raise ValueError(f"{len(negative)} negative prompts were given for {len(texts)} prompts")
    for text in [*texts, *(negative or [])]:
        if text.ndim != 2 or text.shape[1] != channels or not 1 <= len(text) <= limit:
            raise ValueError(
                f"text features must be [1 to {limit} tokens, {channels} channels], got {list(text.shape)}"
            )
    longest = max(len(text) for text in [*texts, *(negative or [])])

    def padded(rows: Sequence[Tensor], dropped: bool) -> dict[str, Tensor]:
        text = torch.stack([F.pad(row.to(device).float(), (0, 0, 0, longest - len(row))) for row in rows])
        length = torch.tensor([len(row) for row in rows], device=device)
        return {"text": text, "length": length, "dropped": torch.full((len(rows),), dropped, device=device)}

    features = padded(texts, False)
    if negative is not None:
        return Condition(schedule, features, padded(negative, False))
    return Condition(schedule, features, features | {"dropped": torch.ones_like(features["dropped"])})
