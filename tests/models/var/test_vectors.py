"""VAR against numbers of the published code: logits, guidance, tokens, pictures, losses, gradients."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import varl
from varl import Prompt, Sampling
from varl.models.var import Var
from varl.models.vqvae import VQVAE, VQVAEConfig
from varl.policy import Condition
from vectors import cases

CASES = [case for case in cases("var", "var_*") if "trunk" not in str(case.id)]  # type: ignore[attr-defined]
MAPS, PIXELS, LOGITS, GUIDED, STRONGLY = 2e-5, 5e-5, 5e-5, 1e-4, 2e-4


class Case:
    """One folder of vectors and the policy that it describes."""

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        files = [folder / name for name in manifest["vae_state_dict_merge_order"]]
        self.whole = all(file.is_file() for file in files)
        # A small copy lacks the convolutional parts: only its tokens can be tested.
        tokenizer: Any = files
        if not self.whole:
            tokenizer = VQVAE(VQVAEConfig(**manifest["vqvae_args"])).state_dict() | load_file(files[-1])
        self.policy = varl.load_policy(
            "var",
            {"transformer": manifest["var_args"], "tokenizer": manifest["vqvae_args"]},
            {"transformer": folder / "var.safetensors", "tokenizer": tokenizer},
        )
        assert isinstance(self.policy, Var)
        self.tensors: dict[str, Tensor] = {}
        for name in ("inputs", "expected", "images"):
            if (folder / f"{name}.safetensors").is_file():
                self.tensors |= load_file(folder / f"{name}.safetensors")
        self.sampler = manifest["sampler_for_sampled_cfg4"]
        self.gradients = json.loads((folder / "grad_norms.json").read_text())
        labels = [Prompt(label=int(label)) for label in self.tensors["labels"]]
        self.condition = self.policy.condition(labels)
        self.steps = range(len(self.condition.schedule))
        self.actions = self.joined("idx")

    def joined(self, name: str) -> Tensor:
        return torch.cat([self.tensors[f"{name}_s{step}"] for step in self.steps], 1)

    def close(self, found: Tensor, name: str, tolerance: float) -> None:
        if name not in self.tensors:
            found, name = found[..., ::2, ::2], f"{name}_every2"
        torch.testing.assert_close(found, self.tensors[name], atol=tolerance, rtol=0)


@lru_cache(maxsize=1)
def _load(folder: Path) -> Case:
    return Case(folder)


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return _load(request.param)


@pytest.fixture
def whole(case: Case) -> Case:
    if not case.whole:
        pytest.skip("the small copy has no encoder and decoder")
    return case


@torch.no_grad()
def test_teacher_forced_logits(case: Case) -> None:
    given = case.condition
    null = Condition(given.schedule, {"label": given.null["label"].expand(given.batch)}, given.null)
    for condition, name in [(given, "logits_cond"), (null, "logits_uncond")]:
        case.close(case.policy.logits(case.policy.hidden(condition, case.actions, case.steps)), name, LOGITS)


@pytest.mark.parametrize(
    ("guidance", "name", "tolerance"), [(0, "0", LOGITS), (1.5, "1p5", GUIDED), (4, "4", STRONGLY)]
)
def test_cached_logits(case: Case, guidance: float, name: str, tolerance: float) -> None:
    state, found = case.policy.start(case.condition, guidance), []
    for step in case.steps:
        found.append(case.policy.next_logits(state))
        case.policy.advance(state, case.tensors[f"idx_s{step}"])
    case.close(torch.cat(found, 1), f"cached_logits_cfg{name}", tolerance)


@pytest.mark.parametrize(("guidance", "name"), [(1.5, "1p5"), (4.0, "4")])
def test_greedy_generation(case: Case, guidance: float, name: str) -> None:
    found = varl.rollout(case.policy, case.condition, Sampling(guidance=guidance, top_k=1)).actions
    assert torch.equal(found, case.joined(f"greedy_cfg{name}_idx"))
    if case.whole:
        case.close(case.policy.decode(found), f"greedy_cfg{name}_image01", PIXELS)


def test_generate_draws_the_tokens_of_upstream(case: Case) -> None:
    """Seen through the pictures; the draws depend on torch's CPU generator, as it has been for many releases."""
    sampling = Sampling(guidance=case.sampler["cfg"], top_k=case.sampler["top_k"], top_p=case.sampler["top_p"])
    generator = torch.Generator().manual_seed(case.sampler["g_seed"])
    found = case.policy.generate(case.condition, sampling, generator)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, case.policy.decode(case.joined("sampled_cfg4_idx")), atol=PIXELS, rtol=0)


def test_tokens_to_features(case: Case) -> None:
    quantizer = case.policy.tokenizer.quantize  # type: ignore[attr-defined]
    for step in case.steps:
        total, maps = quantizer.accumulate(
            case.actions[:, : case.condition.schedule.offsets[step + 1]], len(case.steps)
        )
        case.close(total, f"fhat_s{step}", MAPS)
        if f"next_map_s{step}" in case.tensors:
            case.close(maps[step], f"next_map_s{step}", MAPS)
    case.close(torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2), "tf_input", MAPS)


def test_encode(whole: Case) -> None:
    pictures = (whole.tensors["image"] + 1) / 2
    found = whole.policy.encode(pictures)
    assert torch.equal(found, whole.joined("enc_idx"))
    tokenizer = whole.policy.tokenizer  # type: ignore[attr-defined]
    whole.close(tokenizer.features(pictures), "enc_f", PIXELS)
    whole.close(tokenizer.quantize.features(found), "enc_fhat_last", MAPS)
    whole.close(whole.policy.decode(found) * 2 - 1, "recon_image", PIXELS)


def test_decode(whole: Case) -> None:
    whole.close(whole.policy.decode(whole.actions) * 2 - 1, "image_from_tokens", PIXELS)
    assert whole.tensors["image_from_tokens"].abs().max() == 1, "some pixels are clamped"


def test_loss_and_gradients(case: Case) -> None:
    transformer = case.policy.trainable
    transformer.zero_grad()
    logits = case.policy.logits(case.policy.hidden(case.condition, case.actions, case.steps))
    loss = F.cross_entropy(logits.flatten(0, 1), case.actions.flatten())
    loss.backward()
    assert loss.item() == pytest.approx(case.tensors["loss"].item(), abs=1e-5)
    found = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    assert found.keys() == case.gradients.keys()
    for name, expected in case.gradients.items():
        assert found[name].norm().item() == pytest.approx(expected["l2"], rel=1e-3), name
        assert found[name].abs().max().item() == pytest.approx(expected["absmax"], rel=1e-3), name
