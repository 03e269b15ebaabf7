"""Weights on disk, and configurations."""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import varl
from models.tokenflow.cases import LM, PARITY, lm_config, lm_policy, new_policy
from models.tokenflow.test_policy import TOKENIZER, TRANSFORMER
from varl.models import save_policy
from varl.models.tokenflow import TokenFlow
from varl.models.tokenflow.config import TokenizerConfig, read_config

SMALL = {"transformer": TRANSFORMER, "tokenizer": TOKENIZER}


@pytest.fixture(scope="module")
def _small() -> TokenFlow:
    policy = varl.load_policy("tokenflow", SMALL, "random")
    assert isinstance(policy, TokenFlow)
    return policy


@pytest.fixture
def small(_small: TokenFlow) -> TokenFlow:
    return copy.deepcopy(_small)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def parts(policy: TokenFlow) -> dict[str, Any]:
    return {"transformer": policy.transformer.state_dict(), "tokenizer": policy.tokenizer.state_dict()}


@pytest.mark.parametrize(
    ("file", "part"),
    [("tokenflow_t2i_7b", "transformer"), ("tokenflow_clipb_32k_enhanced_tokenizer", "tokenizer")],
)
def test_published_keys(file: str, part: str) -> None:
    path = PARITY / "real_checkpoint_keys" / f"{file}.json"
    if not path.is_file():
        pytest.skip(f"no table of keys at {path}")
    table = json.loads(path.read_text())
    info = table["info"]
    given = info["ctor"] if "ctor" in info else info["config"]
    with torch.device("meta"):
        policy = TokenFlow(read_config({"size": "7b", part: given}))
    module = getattr(policy, part)
    found = {key: list(value.shape) for key, value in module.state_dict().items()}
    assert found == table["keys"]
    assert sum(parameter.numel() for parameter in module.parameters()) == info["parameters"]
    assert sum(value.numel() for value in module.state_dict().values()) == table["total_elements_incl_buffers"]
    assert all(value.is_meta for value in module.state_dict().values())


def test_the_published_size() -> None:
    """Numbers of the published checkpoints, also where their tables of keys are missing."""
    with torch.device("meta"):
        policy = TokenFlow(read_config({"size": "7b"}))
    assert sum(p.numel() for p in policy.transformer.parameters()) == 7_027_204_096
    assert sum(p.numel() for p in policy.tokenizer.parameters()) == 376_569_643
    assert len(policy.transformer.state_dict()) == 361
    assert len(policy.tokenizer.state_dict()) == 649
    assert read_config(None) == read_config({}) == policy.config


def test_there_and_back_bitwise(tmp_path: Path) -> None:
    policy = lm_policy(LM)
    save_policy(policy, tmp_path / "saved")
    again = varl.load_policy("tokenflow", lm_config(LM), tmp_path / "saved")
    assert same(again, policy)
    assert not again.training
    save_policy(again, tmp_path / "saved")
    files = {"transformer": tmp_path / "saved" / "transformer", "tokenizer": str(tmp_path / "saved" / "tokenizer.pt")}
    assert same(varl.load_policy("tokenflow", lm_config(LM), files), policy)
    given = load_file(LM.path / "model.safetensors")
    written = load_file(tmp_path / "saved" / "transformer" / "model.safetensors")
    assert written.keys() == given.keys()
    assert all(torch.equal(written[key], given[key].float()) for key in given)
    assert torch.load(tmp_path / "saved" / "tokenizer.pt", weights_only=True).keys() == {"model"}
    assert not list(tmp_path.rglob("*.new"))


def test_one_file_holds_what_is_tuned(tmp_path: Path, small: TokenFlow) -> None:
    before = copy.deepcopy(small)
    small.to(torch.bfloat16)
    save_policy(small, tmp_path / "new" / "weights.safetensors")
    loaded = varl.load_policy(
        "tokenflow",
        SMALL,
        {"transformer": tmp_path / "new" / "weights.safetensors", "tokenizer": parts(before)["tokenizer"]},
    )
    assert isinstance(loaded, TokenFlow)
    assert loaded.transformer.model.pos_1LC.dtype == torch.float32
    assert same(loaded.transformer, small.float().transformer)
    with pytest.raises(ValueError, match=r"a \.safetensors file or a folder"):
        save_policy(small, tmp_path / "weights.bin")


def test_given_tensors_stay_the_givers(small: TokenFlow) -> None:
    given = parts(small)
    loaded = varl.load_policy("tokenflow", SMALL, given)
    assert same(loaded, small)
    with torch.no_grad():
        loaded.transformer.model.norm.weight += 1
    assert torch.equal(given["transformer"]["model.norm.weight"], small.transformer.model.norm.weight)
    assert not same(loaded, small)
    assert all(p.requires_grad for p in loaded.transformer.parameters())
    assert not any(p.requires_grad for p in loaded.tokenizer.parameters())


def test_a_folder_of_shards_with_more_than_the_model(tmp_path: Path, small: TokenFlow) -> None:
    """As transformers writes them; counters that training registers, and rotary tables, are passed over."""
    tensors = {k: v.half() for k, v in small.transformer.state_dict().items()}
    tensors |= {"image_token_start": torch.tensor(21), "image_token_end": torch.tensor(59)}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / shard, metadata={"format": "pt"})
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = varl.load_policy("tokenflow", SMALL, {**parts(small), "transformer": tmp_path})
    assert same(loaded.transformer, small.half().float().transformer)


@pytest.mark.parametrize("under", ["ema", "model", "state_dict"])
def test_a_tokenizers_training_checkpoint(tmp_path: Path, small: TokenFlow, under: str) -> None:
    """The average of the weights, where there is one, and a command line beside it."""
    content = {"args": argparse.Namespace(codebook_size=37), "steps": 3, under: small.tokenizer.state_dict()}
    content |= {"state_dict": {"x": torch.zeros(1)}} if under == "ema" else {}
    torch.save(content, tmp_path / "tokenizer.pt")
    loaded = varl.load_policy("tokenflow", SMALL, {**parts(small), "tokenizer": tmp_path / "tokenizer.pt"})
    assert same(loaded, small)


def test_the_text_tokenizer_is_beside_the_model(tmp_path: Path, small: TokenFlow) -> None:
    save_policy(small, tmp_path)
    weights = {"transformer": tmp_path / "transformer", "tokenizer": tmp_path / "tokenizer.pt"}
    assert varl.load_policy("tokenflow", SMALL, weights)._reader is None
    (tmp_path / "transformer" / "tokenizer_config.json").write_text("{}")
    assert varl.load_policy("tokenflow", SMALL, weights)._reader.path == tmp_path / "transformer"
    assert varl.load_policy("tokenflow", SMALL, weights | {"text": str(tmp_path)})._reader.path == tmp_path
    with pytest.raises(ValueError, match="given by its folder"):
        varl.load_policy("tokenflow", SMALL, weights | {"text": {}})


def test_missing_parts(tmp_path: Path, small: TokenFlow) -> None:
    with pytest.raises(ValueError, match='local paths for transformer, tokenizer, or "random"'):
        varl.load_policy("tokenflow", SMALL)
    for part in ("transformer", "tokenizer"):
        rest = {name: source for name, source in parts(small).items() if name != part}
        with pytest.raises(ValueError, match=f"needs weights for its {part}"):
            varl.load_policy("tokenflow", SMALL, rest)
    with pytest.raises(ValueError, match="no part 'vae'; its parts are transformer, tokenizer, text"):
        varl.load_policy("tokenflow", SMALL, {"vae": tmp_path})
    with pytest.raises(FileNotFoundError, match="no weights at"):
        varl.load_policy("tokenflow", SMALL, {**parts(small), "tokenizer": tmp_path / "none.pt"})


def test_wrong_files(tmp_path: Path, small: TokenFlow) -> None:
    save_policy(small, tmp_path)
    model, tokenizer = tmp_path / "transformer" / "model.safetensors", tmp_path / "tokenizer.pt"
    own = parts(small)
    with pytest.raises(ValueError, match=r"keys are missing \(decode_task_layer.*keys are not this model's"):
        varl.load_policy("tokenflow", SMALL, {**own, "tokenizer": model})
    with pytest.raises(ValueError, match="do not fit: 31 of 31 keys are missing"):
        varl.load_policy("tokenflow", SMALL, {**own, "transformer": tokenizer})
    deeper = {**SMALL, "transformer": TRANSFORMER | {"num_hidden_layers": 1}}
    with pytest.raises(ValueError, match=r"keys are not this model's \(model\.layers\.1\."):
        varl.load_policy("tokenflow", deeper, own)
    wider = {**SMALL, "tokenizer": TOKENIZER | {"vit_width": 8}}
    with pytest.raises(ValueError, match=r"shapes differ \(encode_task_layer"):
        varl.load_policy("tokenflow", wider, own)
    for path in (model, tokenizer):
        path.write_bytes(path.read_bytes()[:3000])
    for part, path in (("transformer", model), ("tokenizer", tokenizer)):
        with pytest.raises(ValueError, match="is not a whole"):
            varl.load_policy("tokenflow", SMALL, {**own, part: path})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "13b"}, "no size '13b'; there is 7b"),
        ({"colour": 1}, "TokenFlow has no 'colour'; it has transformer, tokenizer, negative_prompt"),
        ({"transformer": {"colour": 1}}, "TokenFlow's transformer has no 'colour'; it has vocab_size, "),
        ({"tokenizer": {"colour": 1, "ch": 2}}, "TokenFlow's tokenizer has no 'ch', 'colour'; it has scales, "),
        ({"tokenizer": 3}, "must be a mapping"),
        ({"transformer": {"mm_projector_type": "linear"}}, "is mlp2x_gelu, not linear"),
        ({"transformer": {"mm_hidden_size": 8}}, "mm_hidden_size is 8, but codes have 40 channels"),
        ({"transformer": {"vocab_size": 40000}}, "do not fit a vocab_size of 40000"),
        ({"transformer": {"num_attention_heads": 3}}, "multiple of 3 heads"),
        ({"transformer": {"num_key_value_heads": 5}}, "cannot share 5 heads"),
        ({"tokenizer": {"teacher": "siglip_384"}}, "teacher clipb_224 draws, not siglip_384"),
        ({"tokenizer": {"dec_ch": 24}}, "enc_ch 128 and dec_ch 24 must be multiples of 32"),
        ({"tokenizer": {"scales": (2, 4)}}, "first scale is 1"),
        ({"tokenizer": {"scales": (1, 16), "infer_interpolate": False}}, "last scale must be 14"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varl.load_policy("tokenflow", config, "random")


def test_flags_of_the_tokenizer() -> None:
    assert (TokenizerConfig().dec_ch, TokenizerConfig().dec_res) == (256, 4)
    plain = TokenizerConfig(enhanced_decoder=False, infer_interpolate=False)
    assert (plain.dec_ch, plain.dec_res) == (128, 2)
    assert plain.schedule.image_size == (224, 224)


def test_the_case_is_read_from_files() -> None:
    """Weights in float16 become fp32."""
    policy = new_policy(LM)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert policy.classes == LM.manifest["tokenizer_sizes"]["codebook_size"]
