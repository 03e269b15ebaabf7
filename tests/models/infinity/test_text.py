"""Texts: ragged features, dropped texts, and flan-T5 through transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import varl
from models.infinity.cases import SMALL, difference, draw_bits, make_policy, make_texts
from varl.models.infinity.condition import TextEncoder, split_features
from varl.models.infinity.training import bitwise_loss, drop_text, self_correction
from varl.scoring import log_probs


def test_every_form_of_features_is_one_condition() -> None:
    policy, texts = make_policy(), make_texts([3, 7])
    rows, lens = torch.cat(texts), torch.tensor([3, 7])
    first = policy.condition_from(texts)
    assert first.features["text"].shape == (2, 7, 128)
    assert first.features["text"][0, 3:].abs().max() == 0
    forms = [
        (rows, lens),
        (rows, [3, 7], torch.tensor([0, 3, 10]), 7),
        {"kv_compact": rows, "lens": lens},
        {"text": first.features["text"], "length": lens},
        [text.half().float() for text in texts],
    ]
    for form in forms[:-1]:
        found = policy.condition_from(form)
        assert all(torch.equal(found.features[k], first.features[k]) for k in first.features)
        assert [len(text) for text in split_features(form)] == [3, 7]
    assert difference(policy.condition_from(forms[-1]).features["text"], first.features["text"]) < 1e-2
    two = policy.condition_from(tuple(texts))
    assert torch.equal(two.features["text"], first.features["text"])
    with pytest.raises(ValueError, match="sum to 9, but there are 10 rows"):
        policy.condition_from((rows, [3, 6]))
    with pytest.raises(ValueError, match="one a row"):
        policy.condition_from("a cat")  # type: ignore[arg-type]


def test_dropped_texts_read_the_learned_one_and_train_it() -> None:
    policy = make_policy()
    condition, actions = policy.condition_from(make_texts([3, 7, 5, 4])), draw_bits(policy, 4)
    generator = torch.Generator().manual_seed(2)
    dropped = drop_text(condition, 0.5, generator)
    rows = dropped.features["dropped"]
    assert 0 < rows.sum() < 4
    assert not condition.features["dropped"].any()
    null = varl.Condition(condition.schedule, condition.null, condition.null)
    hidden = [policy.hidden(c, actions, range(4)) for c in (condition, null, dropped)]
    wanted = torch.where(rows[:, None, None], hidden[1], hidden[0])
    assert difference(hidden[2], wanted) < 1e-5
    log_probs(policy, dropped, actions).logp.sum().backward()
    gradient = policy.transformer.cfg_uncond.grad
    assert gradient is not None
    longest = int(dropped.features["length"][rows].max())
    assert (gradient[:longest].abs().sum(1) > 0).all()
    assert gradient[longest:].abs().max() == 0


def test_self_correction_flips_bits_of_the_first_scales() -> None:
    policy, generator = make_policy(), torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 96, 64, generator=generator)
    plain = policy.encode(images)
    drawn, labels = self_correction(policy, images, noise_apply_layers=3, strength=1.0, generator=generator)
    flipped = (drawn != labels).float().mean((0, 2))
    assert (flipped[:11] > 0).any()
    assert flipped[11:].max() == 0
    assert torch.equal(labels[:, :1], plain[:, :1])
    assert not torch.equal(labels, plain)
    assert torch.equal(self_correction(policy, images, strength=0.0)[0], plain)
    seen = [self_correction(policy, images[:1], noise_apply_layers=1, strength=0.02)[0] for _ in range(3)]
    assert all(one.shape == (1, 35, 4) for one in seen)


def test_how_often_bits_are_flipped() -> None:
    """A scale's rate is uniform on 0, 1, ..., 30 percent: 15 on average, and never above."""
    policy, generator = make_policy(), torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 96, 64, generator=generator)
    rates = []
    for _ in range(20):
        drawn, labels = self_correction(policy, images, generator=generator)
        rates.append((drawn != labels)[:, 11:].float().mean())
    measured = torch.stack(rates)
    assert 0.09 < measured.mean() < 0.21
    assert measured.max() < 0.42
    assert measured.std() > 0.04


def test_the_loss_of_certain_logits() -> None:
    schedule = make_policy().default_schedule
    labels = torch.randint(2, (2, 35, 4), generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(2, 35, 4, 2)
    for reweight in (False, True):
        assert float(bitwise_loss(logits, labels, schedule, reweight)) == pytest.approx(0.6931472)
    logits[:, 0] = torch.nn.functional.one_hot(labels[:, 0], 2) * 100.0
    weights = [0.5 / 2] * 4 + [6**-0.5] * 6 + [24**-0.5] * 24
    share = sum(w for w in [0.5] * 4 + weights[4:]) / (1 + sum([0.5] * 4 + weights[4:]))
    assert float(bitwise_loss(logits, labels, schedule)) == pytest.approx(0.6931472 * 34 / 35)
    assert float(bitwise_loss(logits, labels, schedule, True)) == pytest.approx(0.6931472 * share)


def test_without_transformers_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"varl\[infinity\].*condition_from"):
        TextEncoder(tmp_path)(["a cat"], torch.device("cpu"))


@pytest.fixture
def flan_t5(tmp_path: Path) -> Path:
    """A small random T5 with a tokenizer of whole words, saved as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "that", "sits", "on", "the", "mat", "red"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=128, d_kv=16, d_ff=64, num_layers=2, num_heads=2, is_gated_act=True
    )
    transformers.T5EncoderModel(config).half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["d_model"] == 128
    return tmp_path


def test_prompts_through_flan_t5(flan_t5: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    config = {**SMALL["transformer"], **SMALL["tokenizer"], "scale_schedule": SMALL["scale_schedule"]}
    weights = {"transformer": "random", "tokenizer": "random", "text_encoder": flan_t5}
    policy = varl.load_policy("infinity", config, weights)
    prompts = [varl.Prompt("a cat that sits on the mat"), varl.Prompt("a dog"), varl.Prompt("the red " * 10)]
    condition = policy.condition(prompts)
    assert condition.features["length"].tolist() == [8, 3, 12]  # with the end token; the last is cut
    model = T5EncoderModel.from_pretrained(flan_t5, dtype=torch.float16).eval()
    made = AutoTokenizer.from_pretrained(flan_t5)(
        [p.text for p in prompts], max_length=12, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).last_hidden_state.float()
    for row, length in enumerate([8, 3, 12]):
        assert difference(condition.features["text"][row, :length], states[row, :length]) < 5e-3
        assert condition.features["text"][row, length:].abs().sum() == 0
    assert condition.features["text"].dtype == torch.float32
    alone = policy.condition(prompts[1:2], negative=[varl.Prompt("red")])
    assert torch.equal(alone.features["text"][0, :3], condition.features["text"][1, :3])
    assert alone.null["length"].tolist() == [2]
    assert not alone.null["dropped"].any()
    assert "text_encoder" not in "".join(policy.state_dict())


def test_a_prompt_is_encoded_once(flan_t5: Path) -> None:
    encoder, device = TextEncoder(flan_t5, 12), torch.device("cpu")
    first = encoder(["a cat", "a dog", "a cat"], device)
    calls: list[int] = []
    encoder._model.register_forward_hook(lambda *_: calls.append(1))
    again = encoder(["a dog", "the mat"], device)
    assert torch.equal(again[0], first[1])
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        inside = TextEncoder(flan_t5, 12)(["a cat"], device)
    assert torch.equal(inside[0], first[0])
    with pytest.raises(FileNotFoundError, match="a local folder is needed"):
        TextEncoder(flan_t5 / "google" / "flan-t5-xl")(["a cat"], device)
