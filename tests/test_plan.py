"""The estimate of memory, against what small real models take on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from memory import LiveStorage, saved_storages, storage_bytes
from small import make_prompts
from varl import Prompt, load_policy
from varl.adapters import adapter_parameters, add_adapters
from varl.cli import main
from varl.config import (
    AdapterConfig,
    EvaluationConfig,
    MethodConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.models import FAMILIES, save_policy
from varl.plan import TEXT_ENCODERS, Estimate, Item, estimate, saved_bytes, shape_of
from varl.policy import Condition, Policy
from varl.sampling import Sampling
from varl.trainer import Trainer

GRIDS = (1, 4, 8, 12)
TEXT = 12


def config_of(family: str, width: int = 128, ffn: int = 512, depth: int = 3, **options: Any) -> dict[str, Any]:
    """A small shape whose proportions are those of a published one."""
    heads, own = width // 32, options
    if family == "inkling":
        return {"width": width, "depth": depth, "heads": heads, "codes": 64, "coarse": 8, "fine": 4, "decoder": 8}
    if family == "infinity":
        trunk = {"embed_dim": width, "depth": depth, "num_heads": heads, "block_chunks": 1, "mlp_ratio": ffn / width}
        text = {"text_channels": 128, "text_maxlen": TEXT}
        tokenizer = {"codebook_dim": 4, "base_ch": 24, "ch_mult": (1, 1, 1, 1, 1), "num_res_blocks": 1}
        grids = [[side, side] for side in GRIDS]
        return {"transformer": trunk | text | own, "tokenizer": tokenizer, "scale_schedule": grids}
    if family == "tokenflow":
        shape = {"hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": depth}
        ids = {"vocab_size": 200, "pad_token_id": 100, "image_token_start": 101, "tokenizer_model_max_length": 512}
        text = {"num_attention_heads": heads, "max_text_token_num": TEXT - 4}
        vit = {"vit_width": 32, "vit_layers": 1, "vit_heads": 2, "vit_dec_width": 32, "vit_dec_depth": 1}
        vq = {"codebook_size": 64, "enc_ch": 32, "dec_ch": 32, "vit_dec_heads": 2, "z_channels": 16, "scales": GRIDS}
        return {"transformer": shape | ids | text | own, "tokenizer": vit | vq}
    shape = {"depth": depth, "embed_dim": width, "num_heads": heads, "patch_nums": GRIDS, "mlp_ratio": ffn / width}
    if family == "switti":
        shape |= {"Cvae": 4, "V": 64, "context_dim": 64, "pooled_dim": 12}
        return {"transformer": shape | own, "tokenizer": {"ch": 32}}
    return {
        "transformer": shape | {"num_classes": 5} | own,
        "tokenizer": {"vocab_size": 64, "z_channels": 4, "ch": 32},
    }


def condition_of(policy: Policy, rows: int = 2) -> Condition:
    made: Any = policy
    generator = torch.Generator().manual_seed(0)
    if policy.family == "inkling":
        return policy.condition(make_prompts(rows))
    if policy.family == "var":
        return policy.condition([Prompt(label=0)] * rows)
    if policy.family == "infinity":
        return made.condition_from([torch.randn(TEXT, 128, generator=generator) for _ in range(rows)])
    if policy.family == "tokenflow":
        return made.condition_from(torch.randint(0, 90, (rows, TEXT), generator=generator))
    text = {"prompt_embeds": torch.randn(rows, 77, 64), "pooled": torch.randn(rows, 12)}
    return made.condition_from(text | {"attn_bias": torch.zeros(rows, 77)})


VARIANTS = [
    pytest.param("inkling", {}, id="inkling"),
    pytest.param("var", {}, id="var"),
    pytest.param("var", {"shared_aln": True}, id="var-shared"),
    pytest.param("infinity", {}, id="infinity"),
    pytest.param("switti", {"use_ar": False}, id="switti"),
    pytest.param("switti", {"use_ar": True}, id="switti-ar"),
    pytest.param("switti", {"use_swiglu_ffn": False}, id="switti-gelu"),
    pytest.param("tokenflow", {}, id="tokenflow"),
]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_saved_activations(family: str, options: dict[str, Any], half: bool, checkpointing: bool) -> None:
    policy = load_policy(family, config_of(family, **options), "random")
    module = cast(nn.Module, policy)
    module.requires_grad_(False)
    policy.trainable.requires_grad_(True)
    cast(Any, policy.trainable).checkpointing = checkpointing
    condition, schedule = condition_of(policy), policy.default_schedule
    actions = torch.randint(policy.classes, (2, schedule.tokens, *policy.event))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        saved_storages([*module.parameters(), *module.buffers()]) as found,
    ):
        policy.hidden(condition, actions, range(len(schedule)))
    shape = shape_of(policy, schedule)
    found = {key: t for key, t in found.items() if t.ndim and not _is_weight(t, policy)}
    expected = saved_bytes(shape, 2, shape.prompt + schedule.tokens, half, checkpointing)
    assert expected == pytest.approx(storage_bytes(found.values()), rel=0.15)


def _is_weight(tensor: torch.Tensor, policy: Policy) -> bool:
    """Whether a saved tensor is a bf16 copy of a weight, which is an item of its own."""
    sizes = {tuple(sorted(p.shape)) for p in policy.trainable.parameters() if p.ndim == 2}
    return tensor.dtype == torch.bfloat16 and tuple(sorted(tensor.shape)) in sizes


def test_every_family_has_its_numbers() -> None:
    from varl.plan import SAVED

    assert SAVED.keys() == FAMILIES.keys()


@contextmanager
def tracking(trainer: Trainer) -> Iterator[LiveStorage]:
    """Follow a trainer's memory, with what it holds already."""
    live = LiveStorage()
    modules = [trainer.policy, trainer.reference] if trainer.reference is not None else [trainer.policy]
    for module in cast(list[nn.Module], modules):
        for tensor in [*module.parameters(), *module.buffers()]:
            live.see(tensor)
            if tensor.grad is not None:
                live.see(tensor.grad)
    for state in trainer.learner.optimizer.state.values():
        for value in state.values():
            live.see(value)
    with live:
        yield live


def small_run(family: str, folder: Path, **changes: Any) -> TrainConfig:
    """A run of a small policy whose files are in the folder; its second update is one of a full run."""
    shape = config_of(family, width=64, ffn=256, depth=4)
    weights = folder / ("weights.safetensors" if family == "inkling" else "weights")
    save_policy(load_policy(family, shape, "random"), weights)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"text": f"the word '{w}' at the top", "label": 1}) for w in ("AB", "CD")))
    method: dict[str, Any] = {"prompts": 2, "group": 8, "middle": 2, **changes.pop("method", {})}
    run: dict[str, Any] = {"micro_batch": 16, "gallery_every": 0, "diagnose_every": 0, "device": "cpu"}
    return TrainConfig(
        policy=PolicyConfig(family=family, weights=str(weights), config=shape, **changes.pop("policy", {})),
        prompts=PromptConfig(source=str(prompts)),
        reward="tiny_runs:noisy",
        sampling=changes.pop("sampling", Sampling()),
        method=MethodConfig(**method),
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(out=folder / "run", **{**run, **changes.pop("run", {})}),
    )


RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": {"update": "full"}},
    "suffix": {"method": {"update": "suffix"}, "run": {"micro_batch": 8}},
    "full-bf16": {"method": {"update": "full"}, "policy": {"precision": "bfloat16"}},
    "full-checkpointing": {"method": {"update": "full"}, "policy": {"checkpointing": True}},
    "rollout": {
        "method": {"update": "prefix", "group": 16, "continuations": 4},
        "run": {"micro_batch": 2},
        "sampling": Sampling(guidance=2.0, top_p=0.9),
    },
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("family", ["inkling", "var"])
def test_the_peak_of_an_update(family: str, kind: str, tmp_path: Path) -> None:
    config = small_run(family, tmp_path, **{key: value for key, value in RUNS[kind].items()})
    trainer = Trainer(config)
    trainer.step()
    with tracking(trainer) as live:
        trainer.step()
    found = estimate(config)
    print(family, kind, found.peak() / live.peak, found.largest_phase(), {i.name: i.bytes / live.peak for i in found.items})
    assert found.largest_phase() == ("rollout" if kind == "rollout" else "update")
    assert found.peak() == pytest.approx(live.peak, rel=0.2)
