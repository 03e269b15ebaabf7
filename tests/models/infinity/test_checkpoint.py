"""Configurations, published sizes, and upstream's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import varl
from models.infinity.cases import GOLDEN, SMALL, draw_bits, make_policy, make_texts, needs_parity
from varl.models import save_policy
from varl.models.infinity import Infinity, InfinityConfig, TokenizerConfig
from varl.models.infinity.config import SIZES, read_config

SHAPE = {**SMALL["transformer"], **SMALL["tokenizer"], "scale_schedule": SMALL["scale_schedule"]}
PUBLISHED = {
    # size: (keys, parameters in all, bits of a token, stride of the tokenizer)
    "125M": (274, 125_185_696, 32, 16),
    "layer16": (358, 361_633_792, 32, 16),
    "1B": (526, 940_944_832, 32, 16),
    "2b": (694, 2_204_564_032, 32, 16),
    "8b": (862, 8_375_791_824, 56, 8),
}
TABLES = {"125M": "125M_layer12", "1B": "1B_layer24"}


@pytest.fixture(scope="module")
def policy() -> Infinity:
    return make_policy()


def states(policy: Infinity) -> dict[str, dict[str, Tensor]]:
    assert policy.tokenizer is not None
    return {"transformer": policy.transformer.state_dict(), "tokenizer": policy.tokenizer.state_dict()}


def same(a: Infinity, b: Infinity) -> bool:
    pairs = zip(states(a).values(), states(b).values(), strict=True)
    return all(x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x) for x, y in pairs)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    keys, parameters, bits, stride = PUBLISHED[size]
    with torch.device("meta"):
        policy = varl.load_policy("infinity", {"size": size}, "random")
    assert isinstance(policy, Infinity)
    assert policy.event == (bits,)
    assert policy.config.tokenizer.patch_size == stride
    assert policy.default_schedule.stride == 16
    state = policy.transformer.state_dict()
    assert len(state) == keys
    assert sum(p.numel() for p in policy.trainable.parameters()) == parameters
    assert not [name for name, buffer in policy.transformer.named_buffers() if name not in state]
    assert sorted({name.rpartition(".")[2] for name, _ in policy.transformer.named_buffers()}) == ["zero_k_bias"]


def described(file: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's description, and its tensors on the meta device."""
    table = json.loads(needs_parity(f"shapes/{file}.json").read_text())
    entries = table["state_dict"].items()
    return table, {k: torch.empty(v["shape"], dtype=getattr(torch, v["dtype"]), device="meta") for k, v in entries}


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_published_transformer_loads_strictly(size: str) -> None:
    table, tensors = described(f"infinity_{TABLES.get(size, size)}")
    for config in ({"size": size}, table["hyper"]):
        policy = varl.load_policy("infinity", config, {"transformer": tensors})
        state = policy.trainable.state_dict()
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in tensors.items()}
        assert sum(p.numel() for p in policy.trainable.parameters()) == table["n_parameters"]


@pytest.mark.parametrize(
    ("name", "bits", "keys"),
    [("d16", 16, 270), ("d24", 24, 270), ("d32", 32, 270), ("d64", 64, 270), ("d56_f8_14_patchify", 14, 226)],
)
def test_every_published_tokenizer_loads_strictly(name: str, bits: int, keys: int) -> None:
    patchify = "patchify" in name
    config = {"transformer": SMALL["transformer"], "vae_type": bits, "apply_spatial_patchify": patchify}
    shape = read_config(config)
    assert shape.bits == (56 if patchify else bits)
    with torch.device("meta"):
        policy = varl.load_policy("infinity", config, "random")
    assert isinstance(policy, Infinity)
    assert len(states(policy)["tokenizer"]) == keys
    table, tensors = described(f"infinity_vae_{name}")
    assert read_config(table["hyper"]).tokenizer == shape.tokenizer
    with torch.device("meta"):
        policy = varl.load_policy("infinity", config, {"transformer": "random", "tokenizer": {"vae": tensors}["vae"]})
    assert {k: (v.shape, v.dtype) for k, v in states(policy)["tokenizer"].items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }


def test_masks_are_powers_of_two_top_bit_first() -> None:
    for bits in (4, 64):
        policy = make_policy(codebook_dim=bits)
        mask = states(policy)["tokenizer"]["quantize.lfq.mask"]
        assert mask.dtype == torch.int64
        assert mask[1:].tolist() == [2**i for i in range(bits - 2, -1, -1)]


def test_configurations() -> None:
    arguments = json.loads((GOLDEN / "manifest.json").read_text())["infinity_args"]
    assert read_config(arguments) == read_config({"transformer": arguments})
    assert read_config(arguments).transformer.embed_dim == 64
    assert read_config(None) == InfinityConfig()
    assert read_config({"size": "8b"}).tokenizer == TokenizerConfig(14, 128, (1, 2, 4, 4), 2, 8)
    assert read_config({"size": "8b_512"}).schedule.image_size == (512, 512)
    assert read_config({"size": "2b", "depth": 8}).transformer.depth == 8
    assert read_config({"d_vae": 56, "apply_spatial_patchify": 1}).tokenizer.codebook_dim == 14
    assert read_config({"scale_schedule": [[1, 1, 1], [1, 4, 2]]}).schedule.grids == ((1, 1), (4, 2))
    widths = {size: read_config({"size": size}).transformer for size in SIZES}
    assert {size: widths[size].embed_dim // widths[size].num_heads for size in ("layer32", "8b")} == {
        "layer32": 104,
        "8b": 128,
    }
    assert [read_config({"embed_dim": w, "num_heads": 2}).transformer.ffn_hidden for w in (96, 160)] == [512, 512]
    assert widths["8b"].text_pool_heads == 16
    assert read_config({"embed_dim": 4608, "num_heads": 36}).transformer.text_pool_heads == 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "3b"}, "no size '3b'; there are layer12"),
        ({"dept": 3}, "no setting 'dept'; there are .*depth.*embed_dim.*size"),
        ({"transformer": {"heads": 3}}, "no setting 'heads'"),
        ({"transformer": 3}, "must be a mapping"),
        ({"swiglu": True}, "swiglu = True is not supported"),
        ({"head_depth": 3}, "head_depth must be 1 or 2"),
        ({"rope2d_normalized_by_hw": 3}, "0, 1 or 2"),
        ({"depth": 5, "block_chunks": 2}, "multiple of block_chunks"),
        ({"embed_dim": 60, "num_heads": 7}, "7 heads of a multiple of 4"),
        ({"embed_dim": 32, "num_heads": 2}, "rounds to no 256 channels"),
        ({"text_channels": 100}, "no whole heads"),
        ({"patch_size": 12}, "power of two"),
        ({"patch_size": 32}, "power of two below"),
        ({"base_ch": 20}, "multiples of 32 or 24"),
        ({"pn": "2M"}, "pn must be one of 0.06M"),
        ({"tau_list": [1, 0]}, "tau_list must be positive"),
        ({"V_head": 63}, "V_head is 64 by its other settings, not 63"),
        ({"scale_schedule": [[2, 1, 1]]}, "must be 1"),
    ],
)
def test_configurations_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varl.load_policy("infinity", config, "random")


def test_saving_and_loading_again(policy: Infinity, tmp_path: Path) -> None:
    save_policy(policy, tmp_path / "new" / "whole")
    again = varl.load_policy("infinity", SHAPE, tmp_path / "new" / "whole")
    assert isinstance(again, Infinity)
    assert same(policy, again)
    save_policy(again, tmp_path / "twice")
    assert same(varl.load_policy("infinity", SHAPE, str(tmp_path / "twice")), policy)  # type: ignore[arg-type]
    saved = torch.load(tmp_path / "twice" / "infinity_vae.pth", weights_only=True)
    assert saved.keys() == {"vae"}
    assert saved["vae"]["quantize.lfq.mask"].dtype == torch.int64
    transformer = torch.load(tmp_path / "twice" / "infinity.pth", weights_only=True)
    assert transformer.keys() == policy.transformer.state_dict().keys()
    assert {value.dtype for value in transformer.values()} == {torch.float32}
    assert not any(p.requires_grad for p in again.tokenizer.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in again.trainable.parameters())
    assert not again.training


def test_given_tensors_stay_the_givers(policy: Infinity) -> None:
    loaded = varl.load_policy("infinity", SHAPE, states(policy))
    assert isinstance(loaded, Infinity)
    assert same(loaded, policy)
    with torch.no_grad():
        loaded.transformer.pos_start += 1
    assert not torch.equal(loaded.transformer.pos_start, policy.transformer.pos_start)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_file_holds_the_transformer(policy: Infinity, tmp_path: Path, name: str) -> None:
    save_policy(policy, tmp_path / name)
    for weights in (tmp_path / name, {"transformer": tmp_path / name}):
        again = varl.load_policy("infinity", SHAPE, weights)
        assert isinstance(again, Infinity)
        state = again.transformer.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in policy.transformer.state_dict().items())
        condition, actions = again.condition_from(make_texts([3])), draw_bits(policy, 1)
        with torch.no_grad():
            assert torch.equal(again.hidden(condition, actions, range(4)), policy.hidden(condition, actions, range(4)))
        for act in (lambda: again.decode(actions), lambda: again.encode(torch.rand(1, 3, 96, 64))):  # noqa: B023
            with pytest.raises(ValueError, match="no tokenizer: load it with weights"):
                act()


def test_upstreams_ways_to_keep_weights(policy: Infinity, tmp_path: Path) -> None:
    parts = states(policy)
    torch.save({"trainer": {"gpt_fsdp": parts["transformer"]}, "epoch": 3}, tmp_path / "tuned.pth")
    torch.save({"vae": parts["tokenizer"], "args": "text"}, tmp_path / "vae.pth")
    (tmp_path / "sharded").mkdir()
    keys = list(parts["transformer"])
    names = {key: f"part-{i % 3}.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({k: parts["transformer"][k].clone() for k in keys if names[k] == name}, tmp_path / "sharded" / name)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plain = {key.replace(".conv.", ".").replace(".norm.", "."): v for key, v in parts["tokenizer"].items()}
    plain = {
        key.replace("downsample.weight", "downsample.conv.weight")
        .replace("downsample.bias", "downsample.conv.bias")
        .replace("upsample.weight", "upsample.conv.weight")
        .replace("upsample.bias", "upsample.conv.bias"): v
        for key, v in plain.items()
        if "mask" not in key
    }
    for transformer in (tmp_path / "tuned.pth", tmp_path / "sharded", parts["transformer"]):
        for tokenizer in (tmp_path / "vae.pth", plain):
            weights = {"transformer": transformer, "tokenizer": tokenizer}
            assert same(varl.load_policy("infinity", SHAPE, weights), policy)  # type: ignore[arg-type]


def test_half_precision_files_become_fp32_and_bits_are_read_off_them(policy: Infinity, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in policy.transformer.state_dict().items()}
    shape = {key: value for key, value in SHAPE.items() if key != "codebook_dim"}
    for patchify, bits in ((0, 4), (1, 1)):
        loaded = varl.load_policy("infinity", shape | {"apply_spatial_patchify": patchify}, {"transformer": half})
        assert isinstance(loaded, Infinity)
        assert loaded.config.tokenizer.codebook_dim == bits
        assert loaded.event == (4,)
    assert {value.dtype for value in loaded.transformer.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.transformer.cfg_uncond, policy.transformer.cfg_uncond.half().float())


def test_weights_that_do_not_fit(policy: Infinity, tmp_path: Path) -> None:
    def load(weights: Any, **changes: Any) -> None:
        varl.load_policy("infinity", SHAPE | changes, weights)

    save_policy(policy, tmp_path / "whole")
    file = tmp_path / "whole" / "infinity.pth"
    with pytest.raises(ValueError, match='without weights: give local paths for transformer, or "random"'):
        load(None)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load(tmp_path / "gone.pth")
    with pytest.raises(ValueError, match="needs weights for its transformer; given are tokenizer"):
        load({"tokenizer": "random"})
    with pytest.raises(ValueError, match="no part 'vae'; its parts are transformer, tokenizer, text_encoder"):
        load({"vae": file})
    with pytest.raises(ValueError, match=r"2 of .* keys are missing .cfg_uncond, head.bias"):
        load({k: v for k, v in policy.transformer.state_dict().items() if k not in ("head.bias", "cfg_uncond")})
    with pytest.raises(ValueError, match=r"head.weight is \[8, 32\], not \[10, 32\]"):
        load(file, codebook_dim=5)
    with pytest.raises(ValueError, match="do not fit"):
        load(file, shared_aln=False)
    with pytest.raises(ValueError, match=r"180 of 182 keys are missing \(decoder"):
        load({"transformer": file, "tokenizer": file})
    (tmp_path / "torn.pth").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"torn\.pth is not a whole torch file"):
        load(tmp_path / "torn.pth")
    inkling = varl.load_policy("inkling", None, "random")
    save_policy(inkling, tmp_path / "inkling.safetensors")
    with pytest.raises(ValueError, match=r"inkling.safetensors do not fit: .*missing.*not this model's"):
        load(tmp_path / "inkling.safetensors")
    extra = load_file(GOLDEN / "infinity.safetensors") | {"spare": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 of \d+ keys are not this model's \(spare"):
        varl.load_policy("infinity", json.loads((GOLDEN / "manifest.json").read_text())["infinity_args"], extra)


def test_random_weights_are_spread_as_upstreams() -> None:
    torch.manual_seed(0)
    shape = SHAPE | {"embed_dim": 128, "num_heads": 4, "mlp_ratio": 4.0, "text_maxlen": 64}
    for shared in (True, False):
        policy = varl.load_policy("infinity", shape | {"shared_aln": shared}, "random")
        assert isinstance(policy, Infinity)
        found = {name: float(p.detach().std()) for name, p in policy.transformer.named_parameters() if p.numel() > 1}
        std = (1 / 384) ** 0.5
        block = "block_chunks.1.module.0."
        wanted = {
            "cfg_uncond": 0.955 / 128**0.5,
            "pos_start": std,
            "lvl_embed.weight": std,
            "text_proj_for_sos.ca.mat_q": std,
            "head.weight": 0.02 * std,
            "head_nm.ada_lin.1.weight": 1e-3 * std,
            f"{block}sa.mat_qkv.weight": std,
            f"{block}sa.proj.weight": std / 8**0.5,
            f"{block}ffn.fc2.weight": std / 8**0.5,
            f"{block}sa.scale_mul_1H11": 0.0,
        }
        if shared:
            wanted["shared_ada_lin.1.weight"] = std
            table = policy.transformer.layers[0].ada_gss.detach()
            assert table[:, :, :2].std() == pytest.approx(5e-6 * 128**-0.5, rel=0.2)
            assert table[:, :, 2:].std() == pytest.approx(1e-3 * 128**-0.5, rel=0.2)
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=0.2)
        again = varl.load_policy("infinity", shape, "random")
        assert isinstance(again, Infinity)
        assert torch.equal(again.transformer.cfg_uncond, policy.transformer.cfg_uncond)
