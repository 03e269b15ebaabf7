import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import varl
from varl.models import save_policy
from varl.models.switti import Switti
from varl.models.switti.model import Transformer, TransformerConfig, initialise
from varl.models.switti.policy import GRIDS, SwittiConfig
from vectors import table

from .test_policy import GRIDS_SMALL, KINDS, SHAPE, make

CONFIG: dict[str, Any] = {
    "transformer": {**SHAPE, **KINDS["ar"], "patch_nums": GRIDS_SMALL},
    "tokenizer": {"ch": 32},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_policy(make(), tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.parametrize("resolution", [512, 1024])
@pytest.mark.parametrize("kind", ["", "-ar"])
def test_published_shapes(resolution: int, kind: str) -> None:
    expected = json.loads(table(f"real_checkpoint_keys/switti_2.5b_{resolution}.json").read_text())
    vae = json.loads(table(f"real_checkpoint_keys/switti_vqvae_{resolution}.json").read_text())
    weights, tokenizer = (
        {key: torch.empty(shape, device="meta") for key, shape in part["keys"].items()} for part in (expected, vae)
    )
    config = {"size": f"{resolution}{kind}"}
    policy = varl.load_policy("switti", config, {"transformer": weights, "tokenizer": tokenizer})
    assert isinstance(policy, Switti)
    parameters = dict(policy.transformer.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == expected["info"]["parameters"]
    assert sum(p.numel() for p in policy.tokenizer.parameters()) == vae["info"]["parameters"]
    assert not [name for name, buffer in policy.named_buffers() if name not in policy.state_dict()]
    assert policy.schedules(resolution).tokens == {512: 2240, 1024: 9451}[resolution]
    ctor = dict(expected["info"]["ctor"])
    ctor["use_ar"] = bool(kind)
    assert SwittiConfig.of({"transformer": ctor, "tokenizer": vae["info"]["ctor"]}) == policy.config


def test_the_size_of_the_published_models() -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig())
    assert sum(p.numel() for p in model.parameters()) == 2470518256
    assert [b.shape for b in model.buffers()] == [(1, 2240), (1, 1, 2240, 2240)]


def test_save_and_load_are_bitwise(saved: Path, tmp_path: Path) -> None:
    once = varl.load_policy("switti", CONFIG, saved)
    expected, found = make().state_dict(), once.state_dict()  # type: ignore[attr-defined]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in found)
    save_policy(once, tmp_path / "again")
    for name in ("transformer", "tokenizer"):
        assert (tmp_path / f"again/{name}.safetensors").read_bytes() == (saved / f"{name}.safetensors").read_bytes()
    save_policy(once, tmp_path / "one.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (saved / "transformer.safetensors").read_bytes()
    frozen = {name for name, p in once.trainable.named_parameters() if not p.requires_grad}
    assert frozen == {"crop_embed.weight"}


def test_a_folder_says_its_shape(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    (saved / "transformer.safetensors").rename(folder / "model.safetensors")
    fields = {**CONFIG["transformer"], "patch_nums": "1_2_3_4", "text_encoder_path": "unknown names are passed over"}
    (folder / "config.json").write_text(json.dumps(fields))
    parts = {"transformer": folder, "tokenizer": saved / "tokenizer.safetensors"}
    policy = varl.load_policy("switti", {"tokenizer": {"ch": 32}}, parts)
    assert policy.config == make().config  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="keys are missing"):
        varl.load_policy("switti", {"transformer": {"depth": 3}, "tokenizer": {"ch": 32}}, parts)
    for content, reason in (("{", "not valid JSON"), ('{"depth": 30, "depth": 2}', "gives 'depth' again, 2 after 30")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"is not a configuration: .*{reason}"):
            varl.load_policy("switti", {"tokenizer": {"ch": 32}}, parts)


def test_wrong_files(saved: Path, tmp_path: Path) -> None:
    good = {"transformer": saved / "transformer.safetensors", "tokenizer": saved / "tokenizer.safetensors"}

    def refused(match: str, error: type[Exception] = ValueError, config: Any = None, **parts: Any) -> None:
        with pytest.raises(error, match=match):
            varl.load_policy("switti", config or CONFIG, {**good, **parts})

    refused("do not fit: .* keys are missing .* keys are not this model's", transformer=good["tokenizer"])
    refused("do not fit: .* keys are missing", tokenizer=good["transformer"])
    (tmp_path / "cut.safetensors").write_bytes(good["transformer"].read_bytes()[:5000])
    refused("not a whole safetensors file", transformer=tmp_path / "cut.safetensors")
    refused("needs both text encoders", text_encoder=tmp_path)
    refused("needs both text encoders", text_encoder={}, text_encoder_2={})
    refused("no text encoder at", FileNotFoundError, text_encoder=tmp_path, text_encoder_2=tmp_path / "none")
    refused("no part 'clip'", clip=tmp_path)
    other = {**CONFIG, "transformer": {**CONFIG["transformer"], "use_ar": False}}
    refused("use_ar says which attention.* trained with another attention than inside a grid only", config=other)
    tensors = load_file(good["transformer"])
    tensors["lvl_1L"] = tensors["lvl_1L"].flip(-1)
    refused("trained for other grids", transformer=tensors)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({}, None, 'without weights: give local paths for transformer, tokenizer, or "random"'),
        ({}, {"transformer": {"a": torch.zeros(1)}}, "needs weights for its tokenizer; given are transformer"),
        ({"size": "2048"}, "random", "no size '2048'; there are 512, 512-ar, 1024, 1024-ar"),
        ({"depth": 2}, "random", "no setting 'depth'; it has size, transformer, tokenizer, turn_on_cfg_start_si"),
        ({"transformer": {"dept": 2}}, "random", "Switti's transformer has no 'dept'; it has Cvae, V, depth"),
        ({"tokenizer": {"V": 2}}, "random", "Switti's tokenizer has no 'V'; it has vocab_size"),
        ({"transformer": {"embed_dim": 18, "num_heads": 3}}, "random", "a multiple of 4 for rope"),
        ({"transformer": {"embed_dim": 12, "num_heads": 3}}, "random", "multiple of 8 for the crop"),
        ({"transformer": {"patch_nums": [2, 3]}}, "random", "first grid has side 1"),
        ({"transformer": {"reso": 300}}, "random", "no grids for reso 300; there are 512, 1024"),
        ({"tokenizer": {"reso": 1024}}, "random", "differ: patch_nums is .*v_patch_nums is"),
        ({"tokenizer": {"vocab_size": 8}}, "random", "differ: V is 4096, vocab_size is 8"),
        ({"last_scale_temp": 0.0}, "random", "last_scale_temp must be positive"),
        ({"turn_off_cfg_start_si": -1}, "random", "counted from 0"),
    ],
)
def test_settings_refused(config: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varl.load_policy("switti", config, weights)


def test_sizes() -> None:
    assert SwittiConfig.of({"size": 1024}).transformer.patch_nums == GRIDS[1024]
    assert SwittiConfig.of({"size": "1024-ar"}).transformer.use_ar
    assert not SwittiConfig.of({}).transformer.use_ar
    assert SwittiConfig.of({"transformer": {"reso": 1024}}).tokenizer.v_patch_nums == GRIDS[1024]


def test_random_weights() -> None:
    config = TransformerConfig(depth=4, patch_nums=(1, 2, 3), context_dim=64, pooled_dim=32, rope=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(config)
        initialise(model)
    std = (1 / (3 * 256)) ** 0.5
    found = dict(model.named_parameters())
    for name, value in {
        "blocks.0.attn.to_qkv.weight": std,
        "blocks.0.attn.proj.weight": std / 8**0.5,
        "blocks.0.cross_attn.proj.weight": std / 8**0.5,
        "blocks.0.ffn.down_proj.weight": std / 8**0.5,
        "blocks.1.ada_lin.1.weight": std / 2,
        "pos_1LC": std,
        "head.weight": 0.02 * std,
        "crop_embed.weight": 1.0,
    }.items():
        assert found[name].std().item() == pytest.approx(value, rel=0.25), name
    assert all(torch.all(p == 1) for name, p in found.items() if "norm" in name and "head_nm" not in name)
    assert all(p.isfinite().all() for p in found.values())
