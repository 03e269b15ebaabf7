"""Pictures, quantizers, masks, the loss, and caches on the device."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.measuring import Report
from gpu.pairs import Pair, every
from varl import rollout
from varl.algorithm import LossInput, exact_kl, gradient_mask, merge_masks, policy_loss, propagate, token_weights
from varl.models.blocks import KeyValueCache
from varl.models.quantizer import CodebookQuantizer, MultiScaleQuantizer
from varl.plan import shape_of
from varl.rollout import row_generators
from varl.schedule import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 2), (6, 4)), stride=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every
def test_pictures_and_their_tokens(pair: Pair, report: Report) -> None:
    """All steps, an early exit, and encoding, where a near tie may go the other way."""
    actions = pair.actions(2)
    schedule = pair.cpu.default_schedule
    for steps in (len(schedule), 2):
        part = actions[:, : schedule.offsets[steps]]
        found, expected = pair.there.decode(part.to(pair.device)), pair.cpu.decode(part)
        assert found.device == pair.device
        report.near(f"{pair.name}: pictures of {steps} steps", found, expected, 1e-4)
    pictures = torch.rand(2, 3, *schedule.image_size, generator=seeded())
    tokens, wanted = pair.there.encode(pictures.to(pair.device)), pair.cpu.encode(pictures)
    report.within(f"{pair.name}: tokens of pictures", float((tokens.cpu() != wanted).double().mean()), 0.02)


@pytest.mark.parametrize(("enlarge", "cosine"), list(product(["bicubic", "nearest", "bilinear"], [False, True])))
@torch.no_grad()
def test_quantizers(enlarge: str, cosine: bool, device: torch.device, report: Report) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = [CodebookQuantizer(19, 5, SCHEDULE, enlarge, cosine), MultiScaleQuantizer(19, 5, SCHEDULE, 0.3, enlarge)]
    features = 2 * torch.randn(3, 5, 6, 4, generator=seeded(1))
    for quantizer in made:
        name, expected = f"{type(quantizer).__name__}, {enlarge}{', cosine' * cosine}", quantizer.encode(features)
        total, maps = quantizer.accumulate(expected, 4)
        there = copy.deepcopy(quantizer).to(device)
        assert torch.equal(there.encode(features.to(device)).cpu(), expected)
        found, maps_there = there.accumulate(expected.to(device), 4)
        report.near(f"{name}: features", found, total, 1e-5)
        for one, other in zip(maps_there, maps, strict=True):
            report.near(f"{name}: maps", one, other, 1e-5)


def test_masks(device: torch.device) -> None:
    finest = (torch.rand(5, 6, 4, generator=seeded()) < 0.1).float()
    found = propagate(finest.to(device), SCHEDULE)
    assert found.device == device
    assert torch.equal(found.cpu(), propagate(finest, SCHEDULE))
    gradient = torch.randn(6, 3, 12, 8, generator=seeded(1))
    gradient[0] = 0
    gradient[1, 0, 0, 0] = torch.nan
    for merge in ("union", "mean", "intersection"):
        options: dict[str, Any] = {"continuations": 3, "merge": merge}
        found = gradient_mask(gradient.to(device), 0.95, SCHEDULE, **options)
        assert found.device == device
        torch.testing.assert_close(found.cpu(), gradient_mask(gradient, 0.95, SCHEDULE, **options))
        mask = found.view(2, -1).repeat(2, 1)
        torch.testing.assert_close(merge_masks(mask, how=merge).cpu(), merge_masks(mask.cpu(), how=merge))


def loss_inputs(per_event: bool, count: Any, device: torch.device) -> LossInput:
    counts, rows = SCHEDULE.counts[1:], 5
    length, generator = sum(counts), seeded(2)
    shape = (rows, length, 3) if per_event else (rows, length)
    logp = -2 * torch.rand(shape, generator=generator)
    logits, reference = (2 * torch.randn(*shape, 7, generator=generator) for _ in range(2))
    mask = (torch.rand(rows, length, generator=generator) < 0.5).float()
    weight = token_weights(counts, 0.6, mask_BL=mask.to(device), count=count, device=device)

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return LossInput(
        there(logp).requires_grad_(),
        there(logp + 0.3 * torch.randn(shape, generator=generator)),
        there(torch.randn(rows, generator=generator)),
        weight,
        [step for step, n in enumerate(counts, 1) for _ in range(n)],
        mask_BL=there(mask),
        reference_logp_BL=there(logp + 0.2 * torch.randn(shape, generator=generator)),
        exact_kl_BL=exact_kl(there(logits), there(reference)),
        valid_B=there(torch.arange(rows) != 3),
    )


@pytest.mark.parametrize("per_event", [False, True])
@pytest.mark.parametrize("count", ["grid", "masked"])
@pytest.mark.parametrize("kl", ["k2", "k3", "exact"])
@pytest.mark.parametrize("ratio", ["token", "step"])
def test_the_loss(per_event: bool, count: str, kl: Any, ratio: Any, device: torch.device, report: Report) -> None:
    if per_event and ratio == "step":
        pytest.skip("a step's ratio is of tokens")
    found = []
    for place in (torch.device("cpu"), device):
        inputs = loss_inputs(per_event, count, place)
        output = policy_loss(inputs, clip=0.2, beta=0.3, kl=kl, ratio=ratio)
        output.loss.backward()
        assert output.loss.device == place
        found.append((output.loss, inputs.logp_BL.grad, output.clip_fraction, output.log_ratio_mean_T))
    assert float(found[0][0].detach().abs()) > 1e-3
    name = f"loss, {kl}, {ratio}, {count}{', per event' * per_event}"
    for what, one, other in zip(("", " gradient", " clipped", " ratios"), found[1], found[0], strict=True):
        assert one is not None
        assert other is not None
        report.near(f"{name}{what}", torch.as_tensor(one), torch.as_tensor(other), 1e-5)


@every
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_caches(pair: Pair, half: bool) -> None:
    """On the device, in bf16 under autocast, and as large as ``varl plan`` says, but for longer or shorter texts."""
    if not pair.cpu.shares_keys:
        pytest.skip("its steps share no keys")
    rows, last = 2, len(pair.cpu.default_schedule) - 1
    condition = pair.there.condition(pair.prompts(rows))
    own = row_generators((0,), rows, pair.device)
    with torch.autocast(pair.device.type, torch.bfloat16, half):
        drawn = rollout(pair.there, condition, None, own, until=last, keep_state=True)
    for state in (drawn.state, drawn.state.fork(3)):
        cache = state.cache
        assert isinstance(cache, KeyValueCache)
        for tensor in (cache.keys, cache.values):
            assert tensor.device == pair.device
            assert tensor.dtype == (torch.bfloat16 if half else torch.float32)
            assert tensor.shape[1] == state.batch
    cache, shape = drawn.state.cache, shape_of(pair.there, condition.schedule, half)
    planned = shape.cache
    if pair.name == "switti":  # of which the plan counts the text too, 77 tokens, in fp32
        planned -= shape.depth * 2 * 77 * shape.width * 4
    if pair.name == "tokenflow":  # whose plan is for the longest prompt
        longest = shape.prompt - 1 + condition.schedule.tokens
        planned = planned * (condition.features["prompt"].shape[1] - 1 + condition.schedule.tokens) // longest
    assert cache.keys.nbytes + cache.values.nbytes == rows * planned
