import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import varl
from varl.models import save_policy
from varl.models.var import Var
from varl.models.var.model import Transformer, TransformerConfig, initialise
from varl.models.var.policy import SIZES
from varl.models.vqvae import VQVAE, VQVAEConfig
from vectors import table

from .test_policy import GRIDS_SMALL, SHAPE, TOKENIZER, make

CONFIG: dict[str, Any] = {"transformer": {**SHAPE, "patch_nums": GRIDS_SMALL}, "tokenizer": TOKENIZER}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_policy(make(), tmp_path / "weights")
    return tmp_path / "weights"


def same(one: Var, other: Var) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("size", list(SIZES))
def test_published_transformers(size: str) -> None:
    expected = json.loads(table(f"shapes/var_{size}.json").read_text())
    weights = {
        key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for key, entry in expected["state_dict"].items()
    }
    vae = json.loads(table("shapes/vae_ch160v4096z32.json").read_text())["state_dict"]
    tokenizer = {key: torch.empty(entry["shape"], device="meta") for key, entry in vae.items()}
    policy = varl.load_policy("var", {"size": size}, {"transformer": weights, "tokenizer": tokenizer})
    assert isinstance(policy, Var)
    parameters = dict(policy.transformer.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == expected["n_parameters"]
    assert parameters.keys() == {k for k, entry in expected["state_dict"].items() if entry["kind"] == "parameter"}
    dtypes = {k: str(v.dtype).removeprefix("torch.") for k, v in policy.transformer.state_dict().items()}
    assert dtypes == {k: entry["dtype"] for k, entry in expected["state_dict"].items()}
    assert not [name for name, buffer in policy.named_buffers() if name not in policy.state_dict()]
    hyper = expected["hyper"]
    found = policy.config.transformer
    assert (found.embed_dim, found.num_heads, found.patch_nums) == (
        hyper["embed_dim"],
        hyper["num_heads"],
        tuple(hyper["patch_nums"]),
    )


@pytest.mark.parametrize(
    ("size", "parameters", "keys"),
    [
        ("d16", 310283520, 220),
        ("d20", 600.92e6, 272),
        ("d24", 1033.40e6, 324),
        ("d30", 2010.02e6, 402),
        ("d36-s", 2353893904, 446),
    ],
)
def test_sizes(size: str, parameters: float, keys: int) -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(**SIZES[size]), 4096, 32)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-5)
    assert len(model.state_dict()) == keys


def test_the_published_tokenizer() -> None:
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig())
    assert len(model.state_dict()) == 324
    assert sum(p.numel() for p in model.parameters()) == 108948355


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"share_quant_resi": 4}, [f"qresi_ls.{i}" for i in range(4)]),
        ({"share_quant_resi": 2}, [f"qresi_ls.{i}" for i in range(2)]),
        ({"share_quant_resi": 1}, ["qresi"]),
        ({"share_quant_resi": 0}, [str(i) for i in range(10)]),
        ({"share_quant_resi": 0, "default_qresi_counts": 3}, ["0", "1", "2"]),
        ({"quant_resi": 0.0}, []),
        ({"share_quant_resi": 1, "quant_resi": 1e-7}, []),
    ],
)
def test_smoothing_convolutions(options: dict[str, Any], keys: list[str]) -> None:
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig(**options))
    found = [key for key in model.state_dict() if key.startswith("quantize.quant_resi.")]
    assert found == [f"quantize.quant_resi.{key}.{kind}" for key in keys for kind in ("weight", "bias")]


def test_without_smoothing_a_grid_is_only_enlarged() -> None:
    policy = make({"quant_resi": 0.0})
    quantizer = policy.tokenizer.quantize
    codes = torch.randn(1, 16, 4)
    assert torch.equal(quantizer.contribution_of(codes, 3), codes.transpose(1, 2).view(1, 4, 4, 4))


def test_save_and_load_are_bitwise(saved: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["tokenizer.safetensors", "transformer.safetensors"]
    once = varl.load_policy("var", CONFIG, saved)
    assert same(once, make())  # type: ignore[arg-type]
    save_policy(once, tmp_path / "again")
    for name in ("transformer", "tokenizer"):
        assert (tmp_path / f"again/{name}.safetensors").read_bytes() == (saved / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["weights.safetensors", "var.pth"])
def test_a_file_takes_the_transformer(saved: Path, tmp_path: Path, name: str) -> None:
    policy = make()
    policy.transformer.to(torch.bfloat16)
    rounded = {k: v.float() if v.is_floating_point() else v for k, v in policy.transformer.state_dict().items()}
    save_policy(policy, tmp_path / name)
    written = load_file(tmp_path / name) if name.endswith("s") else torch.load(tmp_path / name, weights_only=True)
    assert {str(v.dtype) for v in written.values()} == {"torch.float32", "torch.int64"}
    parts = {"transformer": tmp_path / name, "tokenizer": saved / "tokenizer.safetensors"}
    found = varl.load_policy("var", CONFIG, parts).trainable.state_dict()
    assert found.keys() == rounded.keys()
    assert all(torch.equal(found[k], rounded[k]) and found[k].dtype == rounded[k].dtype for k in found)
    with pytest.raises(ValueError, match=r"\.safetensors or \.pth"):
        save_policy(policy, tmp_path / "weights.bin")


def test_float16_files_are_upcast(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "transformer.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(half, tmp_path / "half.safetensors")
    parts = {"transformer": tmp_path / "half.safetensors", "tokenizer": saved / "tokenizer.safetensors"}
    found = varl.load_policy("var", CONFIG, parts).trainable
    assert all(torch.equal(p, half[k].float()) for k, p in found.named_parameters())


def test_a_state_dict_stays_the_callers(saved: Path) -> None:
    tensors = load_file(saved / "transformer.safetensors")
    parts = {"transformer": tensors, "tokenizer": saved / "tokenizer.safetensors"}
    one, other = (varl.load_policy("var", CONFIG, parts) for _ in range(2))
    with torch.no_grad():
        for parameter in one.trainable.parameters():
            parameter.add_(1)
    assert same(other, make())  # type: ignore[arg-type]
    assert torch.equal(tensors["head.weight"], dict(other.trainable.named_parameters())["head.weight"])
    assert all(p.requires_grad for p in other.trainable.parameters())


def test_statistics_of_another_number_of_steps_are_left_out(saved: Path) -> None:
    tokenizer = load_file(saved / "tokenizer.safetensors")
    tokenizer["quantize.ema_vocab_hit_SV"] = torch.ones(7, 24)
    policy = varl.load_policy("var", CONFIG, {"transformer": saved / "transformer.safetensors", "tokenizer": tokenizer})
    assert torch.equal(policy.tokenizer.quantize.ema_vocab_hit_SV, torch.zeros(4, 24))  # type: ignore[attr-defined]


def test_wrong_files(saved: Path, tmp_path: Path) -> None:
    good = {"transformer": saved / "transformer.safetensors", "tokenizer": saved / "tokenizer.safetensors"}

    def refused(match: str, error: type[Exception] = ValueError, config: Any = None, **parts: Any) -> None:
        with pytest.raises(error, match=match):
            varl.load_policy("var", config or CONFIG, {**good, **parts})

    refused("do not fit: .* keys are missing .* keys are not this model's", transformer=good["tokenizer"])
    refused("do not fit: .* keys are missing", tokenizer=good["transformer"])
    refused("no weights at", FileNotFoundError, transformer=tmp_path / "none.pth")
    refused("no part 'text'; its parts are transformer, tokenizer", text=tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(good["transformer"].read_bytes()[:5000])
    refused("not a whole safetensors file", transformer=tmp_path / "cut.safetensors")
    (tmp_path / "cut.pth").write_bytes(b"PK")
    refused("not a whole torch file", transformer=tmp_path / "cut.pth")
    deeper = {**CONFIG, "transformer": {**CONFIG["transformer"], "depth": 3}}
    refused("keys are missing", config=deeper)
    wider = {**CONFIG, "transformer": {**CONFIG["transformer"], "embed_dim": 32}}
    refused(r"shapes differ \(.* is \[.*\], not", config=wider)
    for key in ("lvl_1L", "attn_bias_for_masking"):
        tensors = load_file(good["transformer"])
        tensors[key] = tensors[key].flip(-1)
        refused("trained for other grids|trained with another attention", transformer=tensors)


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({}, None, 'without weights: give local paths for transformer, tokenizer, or "random"'),
        ({}, {"transformer": {"a": torch.zeros(1)}}, "needs weights for its tokenizer; given are transformer"),
        ({"size": "d17"}, "random", "no size 'd17'; there are d16, d20, d24, d30, d36-s"),
        ({"depth": 2}, "random", "no setting 'depth'; it has size, transformer, tokenizer"),
        ({"transformer": {"dept": 2}}, "random", "VAR's transformer has no 'dept'; it has num_classes, depth"),
        ({"tokenizer": {"V": 2}}, "random", "VAR's tokenizer has no 'V'; it has vocab_size"),
        ({"tokenizer": {"ch": 20}}, "random", "multiple of 32"),
        ({"tokenizer": 3}, "random", "must be a mapping"),
        ({"transformer": {"embed_dim": 10, "num_heads": 3}}, "random", "multiple of its num_heads"),
        ({"tokenizer": {"v_patch_nums": [1, 2]}}, "random", "different grids"),
    ],
)
def test_settings_refused(config: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        varl.load_policy("var", config, weights)


@pytest.mark.parametrize("shared", [False, True])
def test_random_weights_start_as_upstream_does(shared: bool) -> None:
    config = TransformerConfig(depth=4, shared_aln=shared, patch_nums=(1, 2, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Transformer(config, 512, 32)
        initialise(model, gate=1e-3)
    std = (1 / (3 * 256)) ** 0.5
    found = dict(model.named_parameters())
    expected = {
        "class_emb.weight": std,
        "pos_1LC": std,
        "word_embed.weight": std,
        "blocks.0.attn.mat_qkv.weight": std,
        "blocks.3.attn.proj.weight": std / 8**0.5,
        "blocks.3.ffn.fc2.weight": std / 8**0.5,
        "blocks.1.ffn.fc1.weight": std,
        "head.weight": 0.02 * std,
        "head_nm.ada_lin.1.weight": 0.5 * std,
    }
    for name, value in expected.items():
        assert found[name].std().item() == pytest.approx(value, rel=0.1), name
    if shared:
        assert found["shared_ada_lin.1.weight"].std().item() == pytest.approx(std, rel=0.1)
        chunks, unit = found["blocks.2.ada_gss"][0, 0], 1 / 16
    else:
        chunks, unit = found["blocks.2.ada_lin.1.weight"].unflatten(0, (6, -1)), std
    assert chunks[:2].std().item() == pytest.approx(1e-3 * unit, rel=0.15)
    assert chunks[2:].std().item() == pytest.approx(0.5 * unit, rel=0.1)
    assert all(not p.any() for name, p in found.items() if name.endswith("bias"))
    assert found["blocks.0.attn.scale_mul_1H11"].unique().item() == pytest.approx(1.3863, abs=1e-4)
