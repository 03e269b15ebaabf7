"""Every family under every update: losses written out, what moves, whole runs, memory, middle steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import varl.loading
from families import Family, actions_of, every, prepared, prompts, shaken
from learning import stage
from small import counting
from tiny_runs import score
from varl import Sampling, log_probs, updates
from varl.config import (
    EvaluationConfig,
    MethodConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptConfig,
    RunConfig,
    TrainConfig,
)
from varl.learner import Batch, Learner
from varl.loading import frozen_copy
from varl.models.infinity.config import InfinityConfig
from varl.models.switti import Switti
from varl.models.switti.policy import SwittiConfig
from varl.models.tokenflow import TokenFlow
from varl.models.var import Var
from varl.models.var.policy import VarConfig
from varl.policy import Condition, Policy, Prompt
from varl.rewards import RewardOutput
from varl.schedule import ScaleSchedule
from varl.trainer import Trainer

KINDS = ("full", "prefix", "suffix")
ALPHA, BETA, CLIP, ETA, MIDDLE = 0.6, 0.3, 0.2, 1.0, 3


@dataclass
class Update:
    """One real update: what was drawn, learned and logged."""

    policy: Policy
    reference: Policy
    batch: Batch
    log: dict[str, Any]
    before: dict[str, Tensor]


def reward(images: Tensor, given: Sequence[Prompt]) -> RewardOutput:
    """How bright the left half is, less the right; one region a picture, from its first corner on."""
    size = np.array(images.shape[-1:-3:-1], np.float32)
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    regions = [[square * size * (0.1, 0.4, 0.6)[i % 3]] for i in range(len(images))]
    output = score(images, given)
    return RewardOutput(output.score * 10, output.failed, regions, {})


def make_batch(policy: Policy, kind: Any, method: MethodConfig) -> Batch:
    """Drawn, scored and masked as the trainer does it; the advantages by formulas of their own."""
    condition = policy.condition(prompts(method.prompts))
    schedule = condition.schedule
    plan = updates.plan(kind, method, schedule)
    drawn = updates.draw(policy, condition, plan, Sampling(top_p=0.95), (0, 0))
    shown = [prompt for prompt in prompts(method.prompts) for _ in range(plan.pictures)]
    output = reward(policy.decode(drawn.whole.actions, schedule), shown)
    of_rows = updates.returns(output, drawn, plan, method, policy, None, 4)
    value, valid = (rows.view(-1, plan.group) for rows in of_rows)
    found = updates.advantages(value, valid, method)
    value = (output.score.view(method.prompts, method.group, -1) / ETA).exp().mean(-1).log() * ETA
    expected = (value - value.mean(1, keepdim=True)) / (value.std(1, unbiased=False, keepdim=True) + 1e-6)
    torch.testing.assert_close(found.advantage_PG, expected, atol=1e-3, rtol=1e-3)
    mask = updates.masks(output, plan, schedule, method.mask, schedule.image_size)
    assert mask is not None
    mask = mask[:, schedule.span(plan.steps)]
    assert 0 < mask.mean() < 1
    return Batch(
        drawn.trained,
        plan.steps,
        found.advantage_PG.flatten(),
        ~found.dropped_P.repeat_interleave(plan.group),
        mask,
        shared=plan.tails if kind == "suffix" else 1,
    )


def update(
    family: Family,
    kind: Any,
    monkeypatch: pytest.MonkeyPatch,
    epochs: int = 1,
    rate: float = 1e-3,
    bf16: bool = False,
    decay: float = 0.0,
) -> Update:
    policy = prepared(family, monkeypatch)
    reference = shaken(frozen_copy(policy), 0.02)
    own = {"middle": MIDDLE} if kind == "suffix" else {"middle": MIDDLE, "eta": ETA} if kind == "prefix" else {}
    clip = {"clip": CLIP} if epochs > 1 else {}
    method = MethodConfig(update=kind, prompts=2, group=3, alpha=ALPHA, beta=BETA, epochs=epochs, **own, **clip)
    batch = make_batch(policy, kind, method)
    before = {name: value.clone() for name, value in cast(nn.Module, policy).state_dict().items()}
    optimizer = OptimizerConfig(learning_rate=rate, warmup_updates=0, weight_decay=decay, clip_norm=1e9)
    learner = Learner(policy, reference, method, optimizer, Sampling(), 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        log = learner.learn(batch, stage)
    return Update(policy, reference, batch, log, before)


def with_weights(family: Family, weights: dict[str, Tensor]) -> Policy:
    policy = cast(nn.Module, family.make())
    policy.load_state_dict(weights)
    return cast(Policy, policy)


def plain_loss(policy: Policy, old: Policy, reference: Policy, batch: Batch) -> Tensor:
    """Clipped ratio times advantage, masked, plus k3, weighted by 1 / n^alpha over the trained steps."""
    condition, actions = batch.sequences.condition, batch.sequences.actions
    logp = log_probs(policy, condition, actions, batch.steps).logp
    with torch.no_grad():
        old_logp, reference_logp = (
            log_probs(model, condition, actions, batch.steps).logp for model in (old, reference)
        )
    counts = [condition.schedule.counts[step] for step in batch.steps]
    per_token = torch.tensor([n**-ALPHA for n in counts for _ in range(n)])
    weight = per_token / per_token.sum()
    ratio, advantage = (logp - old_logp).exp(), batch.advantage_B[:, None]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    difference = reference_logp - logp
    assert batch.mask_BL is not None
    assert batch.valid_B.all()
    tokens = weight * (-batch.mask_BL * gain + BETA * (difference.exp() - difference - 1))
    return tokens.sum() / len(actions)


@every
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_written_out(family: Family, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = update(family, kind, monkeypatch)
    start = with_weights(family, found.before)
    loss = plain_loss(start, start, found.reference, found.batch)
    assert found.log["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert abs(loss.item()) > 1e-3
    # On policy: each ratio is exactly 1.
    assert set(found.log["log_ratio_by_step"]) == {0.0}
    assert found.log["log_ratio_max"] == found.log["clip_fraction"] == found.log["skipped"] == 0
    assert min(found.log["kl_by_step"]) > 0

    loss.backward()
    norms = {n: p.grad.square().sum() for n, p in start.trainable.named_parameters() if p.grad is not None}
    norm = sum(float(square) for name, square in norms.items() if name not in family.frozen) ** 0.5
    assert found.log["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.numeric
@every
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_update_moves(family: Family, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the transformer but what is fixed or not read; nothing else, and nothing of the reference."""
    found = update(family, kind, monkeypatch)
    own = {f"transformer.{name}" for name, _ in found.policy.trainable.named_parameters()}
    after = cast(nn.Module, found.policy).state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, found.before[name])}
    still = {f"transformer.{name}" for name in family.frozen | family.idle.get(kind, set())}
    assert moved == own - still
    for name, parameter in cast(nn.Module, found.policy).named_parameters():
        assert parameter.requires_grad == (name in own and name.removeprefix("transformer.") not in family.frozen)
    untouched = shaken(frozen_copy(with_weights(family, found.before)), 0.02).trainable.state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in found.reference.trainable.state_dict().items())


@pytest.mark.slow
@pytest.mark.numeric
@every
@pytest.mark.parametrize("kind", KINDS)
def test_decay_leaves_alone_what_has_no_gradient(family: Family, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also single rows of a table, such as the embeddings of classes and words that no prompt names."""
    rate, decay = 0.01, 0.5
    found, without = (update(family, kind, monkeypatch, rate=rate, decay=d) for d in (decay, 0.0))
    start = with_weights(family, found.before)
    plain_loss(start, start, found.reference, found.batch).backward()
    after, other, still = found.policy.trainable.state_dict(), without.policy.trainable.state_dict(), 0
    for name, parameter in start.trainable.named_parameters():
        before = parameter.detach()
        gradient = torch.zeros_like(before) if parameter.grad is None or name in family.frozen else parameter.grad
        rows = (gradient == 0).all(-1) if before.ndim > 1 else (gradient == 0).all().expand(len(before))
        assert torch.equal(after[name][rows], before[rows]), name
        still += int(rows.sum())
    assert still > 0
    block = next(
        name for name, _ in start.trainable.named_parameters() if name.endswith("fc2.weight") or "down" in name
    )
    expected = other[block] - rate * decay * start.trainable.get_parameter(block).detach()
    torch.testing.assert_close(after[block], expected)


@pytest.mark.slow
@pytest.mark.numeric
@every
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_second_epoch_is_clipped(family: Family, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It scores with the weights that the first one left, against what the first one scored."""
    one, two = (update(family, "prefix", monkeypatch, epochs, rate=0.01, bf16=bf16) for epochs in (1, 2))
    old = with_weights(family, one.before)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = plain_loss(one.policy, old, one.reference, two.batch)
    assert two.log["clip_fraction"] > 0
    assert two.log["loss"] == pytest.approx(loss.item(), abs=1e-4, rel=1e-5)
    assert two.log["loss"] != pytest.approx(one.log["loss"], abs=1e-2)


@pytest.mark.slow
@pytest.mark.numeric
@every
def test_a_run(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer itself: a prefix update and a suffix update in bf16, saved."""
    lines = [json.dumps({"text": p.text, "words": p.words, "label": p.label}) for p in prompts(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(varl.loading, "load_policy", lambda *_: family.make())
    config = TrainConfig(
        policy=PolicyConfig(family.make().family, precision="bfloat16", checkpointing=True),
        prompts=PromptConfig(source=str(tmp_path / "prompts.jsonl")),
        reward="tiny_runs:score",
        sampling=Sampling(guidance=1.0),
        method=MethodConfig(prompts=2, group=2, middle=MIDDLE, prefix_updates=1, epochs=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=0),
        evaluation=EvaluationConfig(enabled=False),
        run=RunConfig(out=tmp_path / "run", updates=2, micro_batch=3, device="cpu", gallery_every=0),
    )
    trainer, records = Trainer(config), []
    trainer.run(records.append)
    assert [record["kind"] for record in records] == ["prefix", "suffix"]
    for record in records:
        assert record["skipped"] == 0
        assert math.isfinite(record["loss"])
        assert record["gradient_norm"] > 0
    stopped = replace(
        config, method=replace(config.method, prefix_gradient=False), run=replace(config.run, out=tmp_path / "stopped")
    )
    if trainer.policy.shares_keys:
        Trainer(stopped).folder.close()
    else:
        with pytest.raises(ValueError, match="prefix_gradient false has no effect on this switti"):
            Trainer(stopped)
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    first = family.make().trainable.state_dict()
    assert weights.keys() == first.keys()
    assert sum(not torch.equal(value, first[name]) for name, value in weights.items()) > len(weights) / 2


def saved_bytes(policy: Policy, condition: Condition, actions: Tensor, m: int) -> int:
    """Bytes that the backward pass of a prefix holds: storages counted once, parameters not."""
    own = {p.untyped_storage().data_ptr() for p in cast(nn.Module, policy).parameters()}
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        scores = log_probs(policy, condition, actions, range(m))
    assert scores.logp.requires_grad
    return sum(kept.values())


@every
@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("until", [1, 3])
def test_a_prefilled_state_is_one_that_drew(family: Family, until: int, guidance: float) -> None:
    policy = family.make()
    condition = policy.condition(prompts(3))
    actions = actions_of(policy, 3, condition.schedule.tokens)
    state = policy.start(condition, guidance)
    for step in range(until):
        policy.next_logits(state)
        policy.advance(state, actions[:, condition.schedule.tokens_of(step)])
    with torch.no_grad():
        read = policy.prefill(condition, actions, until, guidance)
    assert (read.step, read.batch) == (until, 3)
    rows = [2, 0, 2]
    found, expected = (policy.next_logits(one.select(rows)) for one in (read, state))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if guidance:
        with pytest.raises(ValueError, match="it takes no guidance"):
            policy.prefill(condition, actions, until, guidance)


@every
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_group_that_shares_its_prefix(family: Family, checkpointing: bool) -> None:
    """Scored and differentiated as whole sequences are; the prefix is computed once a prompt."""
    policy = family.make()
    policy.trainable.checkpointing = checkpointing  # type: ignore[assignment]
    schedule, steps, shared = policy.default_schedule, range(2, 4), 3
    condition = policy.condition(prompts(2)).repeat(shared)
    actions = actions_of(policy, 2 * shared, schedule.tokens)
    before = schedule.offsets[2]
    actions[:, :before] = actions[::shared, :before].repeat_interleave(shared, 0)
    weight = torch.randn(2 * shared, schedule.tokens - before, generator=torch.Generator().manual_seed(0))

    def run(**options: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        tokens: list[int] = []
        hook = family.block(policy).register_forward_pre_hook(lambda _, given: tokens.append(given[0][..., 0].numel()))
        policy.trainable.zero_grad()
        logp = log_probs(policy, condition, actions, steps, **options).logp
        hook.remove()
        (logp * weight).sum().backward()
        named = policy.trainable.named_parameters()
        return logp.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}, sum(tokens)

    logp, gradients, tokens = run()
    shared_logp, shared_gradients, shared_tokens = run(shared=shared)
    torch.testing.assert_close(shared_logp, logp, atol=1e-5, rtol=1e-5)
    assert shared_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, atol=2e-5, rtol=1e-3, msg=name)
    saved = (2 * shared - 2) * (before + family.text) if policy.shares_keys else 0
    assert tokens - shared_tokens == saved
    stopped_logp, stopped, _ = run(shared=shared, prefix_gradient=False)
    torch.testing.assert_close(stopped_logp, logp, atol=1e-5, rtol=1e-5)
    same = stopped.keys() == gradients.keys() and all(torch.equal(stopped[name], gradients[name]) for name in stopped)
    assert same != policy.shares_keys


@every
def test_memory_and_tokens_of_a_prefix(family: Family) -> None:
    policy, rows = family.make(), 2
    condition = policy.condition(prompts(rows))
    schedule = condition.schedule
    actions, lengths = actions_of(policy, rows, schedule.tokens), range(1, len(schedule) + 1)
    log_probs(policy, condition, actions)  # tables that are made once
    with counting(family.block(policy)) as counts:
        held = [saved_bytes(policy, condition, actions, m) for m in lengths]
    tokens = [schedule.prefix_tokens(m) for m in lengths]
    assert counts == [rows * (family.text + n) for n in tokens]
    # In proportion to the tokens, over what the prompt alone costs.
    for n, found in zip(tokens, held, strict=True):
        share = (n - tokens[0]) / (tokens[-1] - tokens[0])
        assert found - held[0] == pytest.approx(share * (held[-1] - held[0]), rel=0.1)
    assert held[0] < 0.25 * held[-1]
    assert held[1] < (0.25 if family.text == 0 else 0.35) * held[-1]


def published(family: str) -> ScaleSchedule:
    """The default schedule of the published weights; nothing is computed."""
    if family == "infinity":
        return InfinityConfig().schedule
    with torch.device("meta"):
        models = {"var": lambda: Var(VarConfig()), "switti": lambda: Switti(SwittiConfig()), "tokenflow": TokenFlow}
        return cast(Any, models[family])().default_schedule


@pytest.mark.parametrize(
    ("family", "m", "side", "pixels", "tokens", "total"),
    [
        ("var", 4, 4, 64, 30, 680),
        ("switti", 5, 6, 96, 66, 2240),
        ("infinity", 7, 16, 256, 521, 10521),
        ("tokenflow", 3, 4, 64, 21, 817),
    ],
)
def test_the_middle_step(family: str, m: int, side: int, pixels: int, tokens: int, total: int) -> None:
    schedule = published(family)
    assert schedule.tokens == total
    names = ("quarter", f"grid:{side}", f"pixels:{pixels}", m, str(m))
    assert [schedule.middle(name) for name in names] == [m] * 5
    assert schedule.grids[m - 1] == (side, side)
    assert schedule.prefix_tokens(m) == tokens
    # Further along than the quarter is another step.
    assert schedule.grids[m][0] * 4 > schedule.grids[-1][0]
    with pytest.raises(ValueError, match="no step of the schedule has grid 11"):
        schedule.middle("grid:11")
    plan = updates.plan("prefix", MethodConfig(), schedule)
    assert (plan.steps, plan.branch_at) == (range(m), m)
    assert updates.plan("suffix", MethodConfig(), schedule).steps == range(m, len(schedule))
