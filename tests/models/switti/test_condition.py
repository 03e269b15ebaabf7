"""Switti's text condition, with small random encoders of the published ones' classes."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import varl
from varl import Prompt
from varl.models import save_policy
from varl.models.switti import Switti
from varl.models.switti.condition import TextEncoders

from .test_checkpoint import CONFIG
from .test_policy import make

WIDTHS = (8, 12)


def save_encoder(folder: Path, width: int, pad: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>", "!"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token=pad)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(width)
        config = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=words.index("<|startoftext|>"),
            eos_token_id=words.index("<|endoftext|>"),
        )
        CLIPTextModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("transformers", reason="the text encoders need transformers")
    folder = tmp_path_factory.mktemp("parts")
    save_policy(make(), folder / "weights")
    for name, width, pad in [("text_encoder", 8, "<|endoftext|>"), ("text_encoder_2", 12, "!")]:
        save_encoder(folder / name, width, pad)
    whole = {name: folder / "weights" / f"{name}.safetensors" for name in ("transformer", "tokenizer")}
    return {**whole, "text_encoder": folder / "text_encoder", "text_encoder_2": folder / "text_encoder_2"}


@pytest.fixture
def policy(parts: dict[str, Any]) -> Switti:
    policy = varl.load_policy("switti", CONFIG, parts)
    assert isinstance(policy, Switti)
    return policy


def test_features_are_those_of_both_encoders(policy: Switti, parts: dict[str, Any]) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    texts = ["a dog", "ox", "a dog"]
    condition = policy.condition([Prompt(text) for text in texts])
    states = []
    for name in ("text_encoder", "text_encoder_2"):
        tokenizer, model = CLIPTokenizer.from_pretrained(parts[name]), CLIPTextModel.from_pretrained(parts[name])
        for row, text in enumerate([*texts, ""]):
            # One text without padding: padding must not matter to it.
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                out = model(ids)
            length = ids.shape[1]
            features = {k: v[row] for k, v in condition.features.items()} if row < 3 else condition.null
            features = {k: v if row < 3 else v[0] for k, v in features.items()}
            span = slice(0, 8) if name == "text_encoder" else slice(8, 20)
            found = features["prompt_embeds"][:length, span]
            torch.testing.assert_close(found, out.last_hidden_state[0], atol=1e-5, rtol=1e-4)
            if name == "text_encoder_2":
                torch.testing.assert_close(features["pooled"], out.pooler_output[0], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(features["pooled"], out.last_hidden_state[0, -1], atol=1e-5, rtol=1e-4)
                assert features["attn_bias"].tolist() == [0.0] * length + [-torch.inf] * (77 - length)
            states.append(found)
    assert condition.features["prompt_embeds"].shape == (3, 77, 20)
    assert condition.features["crop"].tolist() == [[512, 512, 0, 0]] * 3
    assert condition.null["prompt_embeds"].shape == (1, 77, 20)


def test_long_texts_are_cut(policy: Switti) -> None:
    condition = policy.condition([Prompt("a " * 200)])
    assert condition.features["attn_bias"].tolist() == [[0.0] * 77]


def test_every_text_is_encoded_once(policy: Switti, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    encode = TextEncoders._encode
    monkeypatch.setattr(TextEncoders, "_encode", lambda self, t, d: (asked.extend(t), encode(self, t, d))[1])
    one = policy.condition([Prompt("ox"), Prompt("a dog"), Prompt("ox")])
    two = policy.condition([Prompt("a dog"), Prompt("cat")])
    assert asked == ["", "ox", "a dog", "cat"]
    assert torch.equal(one.features["prompt_embeds"][1], two.features["prompt_embeds"][0])
    monkeypatch.setattr("varl.models.switti.condition.CACHED", 2)
    policy.condition([Prompt("cat")])
    policy.condition([Prompt("ox")])
    assert asked[4:] == ["ox"]


def test_what_a_text_becomes_does_not_depend_on_who_asks(policy: Switti, parts: dict[str, Any]) -> None:
    folders = (parts["text_encoder"], parts["text_encoder_2"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = TextEncoders(folders)(["a dog"], torch.device("cpu"))
    for name, value in TextEncoders(folders)(["a dog"], torch.device("cpu")).items():
        assert torch.equal(inside[name], value), name


def test_a_drawing_from_a_text(policy: Switti) -> None:
    condition = policy.condition([Prompt("a dog"), Prompt("ox")])
    rollout = varl.rollout(policy, condition, varl.Sampling(guidance=2.0), torch.Generator().manual_seed(0))
    assert policy.decode(rollout.actions).shape == (2, 3, 64, 64)


def test_encoders_are_no_part_of_the_weights_and_not_copied(policy: Switti) -> None:
    policy.condition([Prompt("ox")])
    assert {name.split(".")[0] for name in policy.state_dict()} == {"transformer", "tokenizer"}
    assert copy.deepcopy(policy).encoders is policy.encoders


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    encoders = TextEncoders((tmp_path, tmp_path))
    with pytest.raises(ImportError, match=r"varl\[switti\]"):
        encoders(["a dog"], torch.device("cpu"))
