"""Upstream's numbers: logits, cached logits, guidance, bits, pictures, losses and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import varl
from models.infinity.cases import Case, case_names, difference, get_case
from varl.models.infinity.training import bitwise_loss


@pytest.fixture(params=case_names())
def case(request: pytest.FixtureRequest) -> Case:
    return get_case(request.param)


@pytest.fixture
def with_pictures(case: Case) -> Case:
    if case.tokenizer is None:
        pytest.skip("this case comes without a tokenizer")
    return case


def teacher_forced(case: Case, condition: varl.Condition) -> Tensor:
    with torch.no_grad():
        return case.policy.logits(case.policy.hidden(condition, case.actions, case.steps)).flatten(2)


def cached(case: Case, cfg: list[float], tau: list[float], insertion: tuple[int, ...] = (0,)) -> Tensor:
    state = case.policy.start(case.condition, float(any(c != 1 for c in cfg)))
    found = []
    for step in case.steps:
        found.append(case.policy.guided_logits(state, cfg[step], tau[step], insertion).flatten(2))
        case.policy.advance(state, case.actions[:, case.schedule.tokens_of(step)])
    return torch.cat(found, 1)


def test_positions(case: Case) -> None:
    table = load_file(case.folder / "rope.safetensors")["cos_sin"]
    assert difference(case.policy.transformer.rotary(case.schedule, case.steps), table) < 5e-6


def test_maps(case: Case) -> None:
    quantizer, expected = case.policy.quantizer, case.expected
    total, inputs = quantizer.accumulate(case.actions, case.schedule, len(case.schedule))
    assert difference(torch.cat(inputs, 1), expected["tf_input"]) < 2e-5
    assert difference(total, expected[f"summed_s{len(case.schedule) - 1}"].squeeze(2)) < 2e-5
    for step in case.steps[:-1]:
        wanted = quantizer.to_tokens(expected[f"next_map_s{step}"].squeeze(2))
        assert difference(inputs[step], wanted) < 2e-5


def test_teacher_forced_logits(case: Case) -> None:
    assert difference(teacher_forced(case, case.condition), case.expected["logits_cond"]) < 1e-4
    assert difference(teacher_forced(case, case.null), case.expected["logits_uncond"]) < 1e-4


def test_cross_attention_rounded_as_upstream_rounds_it(case: Case) -> None:
    rounded = case.load(transformer={**case.manifest["infinity_args"], "bf16ca": True})
    for name, condition in (("cond", case.condition), ("uncond", case.null)):
        with torch.no_grad():
            logits = rounded.logits(rounded.hidden(condition, case.actions, case.steps)).flatten(2)
        assert difference(logits, case.expected[f"logits_{name}_bf16ca"]) < 1e-2
        assert difference(logits, case.expected[f"logits_{name}"]) > 1e-2


def test_cached_logits(case: Case) -> None:
    steps = len(case.schedule)
    plain, guided = cached(case, [1] * steps, [1] * steps), cached(case, [4] * steps, [0.5] * steps)
    assert difference(plain, case.expected["cached_logits_cfg1_tau1"]) < 1e-4
    assert difference(guided, case.expected["cached_logits_cfg4_tau0p5"]) < 1e-3
    ramped = cached(case, [1 + 0.5 * i for i in case.steps], [1 - 0.1 * i for i in case.steps])
    assert difference(ramped, case.expected["cached_logits_cfg_list"]) < 5e-4
    inserted = cached(case, [3] * steps, [1] * steps, (-1,))
    assert difference(inserted, case.expected["cached_logits_cfg3_layer-1"]) < 5e-4


def test_guidance_by_the_contract(case: Case) -> None:
    """The same numbers from ``start(guidance)`` and from the configuration's lists, where scoring sees them too."""
    lists = {"cfg_list": [1 + 0.5 * i for i in case.steps], "tau_list": [1 - 0.1 * i for i in case.steps]}
    for policy, guidance, tau, name, close in (
        (case.policy, 3.0, 0.5, "cfg4_tau0p5", 1e-3),
        (case.load(**lists), 1.0, 1.0, "cfg_list", 5e-4),
    ):
        sampling, found = varl.Sampling(guidance=guidance, temperature=tau), []
        state = policy.start(case.condition, sampling.guidance)
        for step in case.steps:
            found.append(policy.next_logits(state) / tau)
            policy.advance(state, case.actions[:, case.schedule.tokens_of(step)])
        logits = torch.cat(found, 1)
        assert difference(logits.flatten(2), case.expected[f"cached_logits_{name}"]) < close
        with torch.no_grad():
            scored = varl.log_probs(policy, case.condition, case.actions, guidance=sampling, per_event=True).logp
        wanted = logits.log_softmax(-1).gather(-1, case.actions.unsqueeze(-1)).squeeze(-1)
        assert difference(scored, wanted) < close


@pytest.mark.parametrize(("tag", "cfg"), [("cfg3_tau1", 3), ("cfg1_tau1", 1)])
def test_greedy_bits(case: Case, tag: str, cfg: int) -> None:
    wanted = case.bits(f"greedy_{tag}_bits")
    assert torch.equal(
        varl.rollout(case.policy, case.condition, varl.Sampling(guidance=cfg - 1, top_k=1)).actions, wanted
    )
    assert torch.equal(case.policy.generate(case.condition, varl.Sampling(top_k=1), cfg_list=cfg), wanted)
    pictures = case.expected.get(f"greedy_{tag}_bgr_u8")
    if pictures is not None:
        found = (case.policy.decode(wanted) * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)
        off = (found.int() - pictures.int()).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() <= 1e-3


def test_decoding(with_pictures: Case) -> None:
    pictures = with_pictures.policy.decode(with_pictures.actions) * 2 - 1
    assert difference(pictures, with_pictures.expected["image_from_bits"]) < 5e-5
    found = with_pictures.policy.decode(with_pictures.bits("enc_bits")) * 2 - 1
    every = 1 if "recon_image" in with_pictures.expected else 2
    wanted = with_pictures.expected["recon_image" if every == 1 else "recon_image_every2"]
    assert difference(found[..., ::every, ::every], wanted) < 5e-5


def test_encoding(with_pictures: Case) -> None:
    policy, images = with_pictures.policy, with_pictures.inputs["image"]
    assert difference(policy._autoencoder.features(images), with_pictures.expected["enc_raw"]) < 5e-5
    assert torch.equal(policy.encode((images + 1) / 2), with_pictures.bits("enc_bits"))


def test_labels_of_features(case: Case) -> None:
    """Without mistakes, and correcting the mistakes given."""
    quantizer, raw, steps = case.policy.quantizer, case.expected["enc_raw"], len(case.schedule)
    labels, drawn = quantizer.encode(raw, case.schedule)
    assert torch.equal(labels, case.expected["train_labels_clean"].long())
    assert torch.equal(labels, case.bits("enc_bits"))
    total, inputs = quantizer.accumulate(drawn, case.schedule, steps)
    assert difference(total, case.expected["enc_z"]) < 5e-5
    assert difference(torch.cat(inputs, 1), case.expected["train_input_clean"]) < 2e-5
    flipped = case.bits("noisy_pred_bits")
    labels, drawn = quantizer.encode(raw, case.schedule, lambda step, _: flipped[:, case.schedule.tokens_of(step)])
    assert torch.equal(labels, case.expected["train_labels_noisy"].long())
    assert torch.equal(drawn, flipped)
    _, inputs = quantizer.accumulate(drawn, case.schedule, steps)
    assert difference(torch.cat(inputs, 1), case.expected["train_input_noisy"]) < 2e-5


def test_losses_and_gradients(case: Case) -> None:
    policy = case.policy
    logits = policy.logits(policy.hidden(case.condition, case.actions, case.steps))
    assert difference(bitwise_loss(logits, case.actions, case.schedule), case.expected["loss_mean"][0]) < 1e-5
    loss = bitwise_loss(logits, case.actions, case.schedule, reweight=True)
    assert difference(loss, case.expected["loss_reweighted"][0]) < 1e-5
    parameters = dict(policy.transformer.named_parameters())
    norms = json.loads((case.folder / "grad_norms.json").read_text())
    assert norms.keys() == parameters.keys()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        wanted = norms[name] if isinstance(norms[name], float) else norms[name]["l2"]
        assert float(gradient.norm()) == pytest.approx(wanted, rel=1e-3), name
