"""Prompts to ids: with a stand-in for transformers, and with a real tokenizer where transformers is installed."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from models.tokenflow.test_policy import TOKENIZER, TRANSFORMER
from varl import Prompt
from varl.models.tokenflow import TokenFlow
from varl.models.tokenflow.condition import PromptReader, prompt_row
from varl.models.tokenflow.config import TransformerConfig, read_config

CONFIG = TransformerConfig(pad_token_id=20, max_text_token_num=5, img_open_ids=(7, 8))


def test_rows_are_padded_on_the_left_and_cut_on_the_right() -> None:
    assert prompt_row([1, 5], [7, 8], CONFIG) == [20, 20, 20, 1, 5, 7, 8]
    assert prompt_row([1, 5, 6, 9, 3, 4, 2], [7, 8], CONFIG) == [1, 5, 6, 9, 3, 7, 8]


class Letters:
    """A tokenizer with a piece for each letter, that counts its calls."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        self.read.append(text)
        pieces = [2 + ord(c) % 18 for c in text]
        return SimpleNamespace(input_ids=[1, *pieces] if add_special_tokens else pieces)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    own, module = Letters(), ModuleType("transformers")

    def from_pretrained(path: str, **options: Any) -> Letters:
        assert options["local_files_only"]
        assert not options["use_fast"]
        return own

    module.AutoTokenizer = SimpleNamespace(from_pretrained=from_pretrained)  # type: ignore[attr-defined]
    log = {name: lambda *_: None for name in ("get_verbosity", "set_verbosity", "set_verbosity_error")}
    bars = {name: lambda: None for name in ("is_progress_bar_enabled", "disable_progress_bar")}
    module.logging = SimpleNamespace(**log, **bars)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", module)
    return own


def test_prompts(letters: Letters, tmp_path: Path) -> None:
    changes = {"transformer": TRANSFORMER | {"img_open_ids": None}, "tokenizer": TOKENIZER, "negative_prompt": "z"}
    policy = TokenFlow(read_config(changes), text=tmp_path)
    condition = policy.condition([Prompt("ab"), Prompt("abcdefg"), Prompt("ab")])
    prompt = condition.features["prompt"]
    opening = [2 + ord(c) % 18 for c in "<img>"]
    assert prompt[0].tolist() == [20, 20, 1, 2 + 97 % 18, 2 + 98 % 18, *opening]
    assert prompt[1, :5].tolist() == [1, *(2 + ord(c) % 18 for c in "abcd")]
    assert torch.equal(prompt[2], prompt[0])
    assert condition.null["prompt"].tolist() == [[20, 20, 20, 1, 2 + 122 % 18, *opening]]
    policy.condition([Prompt("abcdefg")])
    assert sorted(set(letters.read) - {"<img>"}) == ["ab", "abcdefg", "z"]
    assert len([text for text in letters.read if text != "<img>"]) == 3
    assert policy.next_logits(policy.start(condition, 1.0)).shape == (3, 1, 37)


def test_ids_of_the_opening_may_be_given(letters: Letters, tmp_path: Path) -> None:
    assert PromptReader(tmp_path, CONFIG).row("ab")[-2:] == [7, 8]
    assert "<img>" not in letters.read


def test_a_folder_is_needed(letters: Letters, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no text tokenizer at"):
        PromptReader(tmp_path / "none", CONFIG).row("ab")


def test_another_tokenizer(letters: Letters, tmp_path: Path) -> None:
    """Any tokenizer reads any text; Llama's starts with <s>."""
    reader = PromptReader(tmp_path, CONFIG)
    reader._tokenizer = lambda text, **_: SimpleNamespace(input_ids=[4, 5])
    with pytest.raises(ValueError, match=r"holds no tokenizer of Llama: texts begin with \[4\], not <s>, \[1\]"):
        reader.row("ab")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'varl\[tokenflow\]'"):
        PromptReader(tmp_path, CONFIG).row("ab")


def test_a_real_tokenizer(tmp_path: Path) -> None:
    """A sentencepiece model as Llama's: <s> first, then the pieces that sentencepiece itself finds."""
    pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["a red cat sits on the mat", "the word KEBA <img> on a sign </img>"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=80, model_type="bpe",
        byte_fallback=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "add_eos_token": false, "legacy": true,'
        ' "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    config = TransformerConfig(pad_token_id=99, max_text_token_num=12)
    row = PromptReader(tmp_path, config).row("the red sign")
    text = [1, *pieces.encode("the red sign")]
    assert row == [99] * (12 - len(text)) + text + pieces.encode("<img>")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no text tokenizer"):
        PromptReader(tmp_path / "empty", config).row("the red sign")
