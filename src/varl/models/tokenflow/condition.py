"""Prompts as the language model reads them: pieces of Llama's tokenizer, padded on the left, and those of ``<img>``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varl.models.text import load_text
from varl.models.tokenflow.config import TransformerConfig

__all__ = ["PromptReader", "prompt_row"]

START = 1
OPEN = "<img>"


def prompt_row(pieces: Sequence[int], opening: Sequence[int], config: TransformerConfig) -> list[int]:
    """Ids of one prompt: ``max_text_token_num`` positions, and the pieces of ``<img>``.

    Args:
        pieces: ids of the text, <s> first; those beyond ``max_text_token_num`` are cut off.
        opening: ids of ``<img>``; the last one predicts the first code.
    """
    kept = list(pieces)[: config.max_text_token_num]
    return [config.pad_token_id] * (config.max_text_token_num - len(kept)) + kept + list(opening)


class PromptReader:
    """Llama's tokenizer from a local folder, read when the first prompt comes; every distinct prompt is read once.

    Args:
        path: the folder, such as that of the published language model.
        config: says how long prompts are, and what pads them.
    """

    def __init__(self, path: str | Path, config: TransformerConfig) -> None:
        self.path, self.config = Path(path), config
        self._tokenizer: Any = None
        self._rows: dict[str, list[int]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptReader:
        """Itself: copies of a policy, such as its reference, share what never changes."""
        return self

    def row(self, text: str) -> list[int]:
        """Ids of a prompt; see ``prompt_row``.

        Raises:
            ImportError: if transformers is not installed.
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds no tokenizer.
        """
        if text not in self._rows:
            tokenizer = self._load()
            opening = self.config.img_open_ids
            if opening is None:
                # Not a special token: pieces of ordinary text, as upstream's training had them.
                opening = tuple(tokenizer(OPEN, add_special_tokens=False).input_ids)
            pieces = list(tokenizer(text).input_ids)
            if pieces[:1] != [START]:
                raise ValueError(
                    f"{self.path} holds no tokenizer of Llama: texts begin with {pieces[:1]}, not <s>, [1]"
                )
            self._rows[text] = prompt_row(pieces, opening, self.config)
        return self._rows[text]

    def count(self, text: str) -> tuple[int, int]:
        """The pieces of a text, <s> included, and how many of them are read."""
        return len(self._load()(text).input_ids), self.config.max_text_token_num

    def _load(self) -> Any:
        if self._tokenizer is None:
            options: dict[str, Any] = {"use_fast": False, "trust_remote_code": False}
            self._tokenizer, _ = load_text(self.path, "text tokenizer", "tokenflow", "AutoTokenizer", **options)
        return self._tokenizer
