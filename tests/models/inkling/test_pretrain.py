from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from varl.models.inkling import Inkling, InklingConfig
from varl.models.inkling.pretrain import (
    PretrainConfig,
    StageConfig,
    _Stage,
    pretrain,
    sample_batch,
    tokenizer_loss,
    transformer_loss,
)
from varl.models.inkling.text import is_held_out
from varl.policy import Prompt

TINY = InklingConfig(grids=(1, 6, 12), codes=16, coarse=4, fine=2, decoder=4, width=8, depth=1, heads=2)


def config(out: Path, **options) -> PretrainConfig:
    stages = {"tokenizer": StageConfig(4, 4, 2e-3, 2), "transformer": StageConfig(4, 4, 2e-3, 2)}
    return PretrainConfig(**({"out": out, "model": TINY, "save_every": 0.0, **stages} | options))


@pytest.fixture(autouse=True, scope="module")
def few_pictures_to_fit() -> Iterator[None]:
    """The tokenizer's 1,024 pictures take seconds to draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("varl.models.inkling.pretrain.sample_batch", lambda seed, size: sample_batch(seed, min(size, 48)))
        yield


class Stop(Exception):
    pass


def stopping(stage: str, step: int):
    def progress(name: str, done: int, total: int, loss: float) -> None:
        if (name, done) == (stage, step):
            raise Stop

    return progress


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list]:
    seen: list = []
    policy = pretrain(config(tmp_path_factory.mktemp("whole")), lambda *args: seen.append(args))
    return policy.state_dict(), seen


def test_both_stages_run(in_one_go: tuple[dict[str, torch.Tensor], list]) -> None:
    state, seen = in_one_go
    assert [entry[:3] for entry in seen] == [(s, i, 4) for s in ("tokenizer", "transformer") for i in (1, 2, 3, 4)]
    assert all(np.isfinite(entry[3]) for entry in seen)
    torch.manual_seed(0)
    start = Inkling(TINY).state_dict()
    for part in ("tokenizer.decoder.0.weight", "tokenizer.quantizer.embedding.weight", "transformer.head.weight"):
        assert not torch.equal(state[part], start[part])


@pytest.mark.parametrize("stops", [[("tokenizer", 3)], [("tokenizer", 1), ("transformer", 2)], [("transformer", 4)]])
def test_a_stopped_run_goes_on_to_the_same_numbers(
    tmp_path: Path, in_one_go: tuple[dict[str, torch.Tensor], list], stops: list[tuple[str, int]]
) -> None:
    for stop in stops:
        with pytest.raises(Stop):
            pretrain(config(tmp_path), stopping(*stop))
        torch.rand(7)  # what else was drawn does not matter
    seen: list = []
    state = pretrain(config(tmp_path), lambda *args: seen.append(args)).state_dict()
    expected, whole = in_one_go
    assert state.keys() == expected.keys()
    for key in expected:
        assert torch.equal(state[key], expected[key]), key
    assert seen == whole[-len(seen) :]
    assert len(seen) < 8


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    state = pretrain(config(tmp_path)).state_dict()
    again = pretrain(config(tmp_path), stopping("transformer", 4)).state_dict()
    assert all(torch.equal(state[k], again[k]) for k in state)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model": replace(TINY, width=16)},
        {"transformer": StageConfig(5, 4, 2e-3, 2)},
        {"drop_condition": 0.2},
    ],
)
def test_another_configuration_does_not_go_on(tmp_path: Path, change: dict) -> None:
    with pytest.raises(Stop):
        pretrain(config(tmp_path), stopping("tokenizer", 2))
    with pytest.raises(ValueError, match="made with another configuration"):
        pretrain(config(tmp_path, **change))
    with pytest.raises(Stop):
        pretrain(config(tmp_path, save_every=9.0), stopping("tokenizer", 3))


def test_batches_are_of_their_seed_and_hold_nothing_out() -> None:
    images, prompts = sample_batch((0, 1, 2), 300)
    assert images.shape == (300, 3, 48, 48)
    assert len(prompts) == 300
    assert not any(is_held_out(w) for p in prompts for w in p.words)
    again, same = sample_batch((0, 1, 2), 300)
    assert torch.equal(images, again)
    assert prompts == same
    assert not torch.equal(images[:5], sample_batch((0, 1, 3), 5)[0])
    _, held_out = sample_batch((0, 1, 2), 20, held_out=True)
    assert all(is_held_out(w) for p in held_out for w in p.words)


def test_the_transformers_loss_written_out(inkling: Inkling, prompts: list[Prompt]) -> None:
    images = sample_batch((0,), 3)[0]
    drop = torch.tensor([False, True, False])
    loss = transformer_loss(inkling, images, prompts[:3], range(1, 4), drop)
    actions, condition = inkling.encode(images), inkling.condition(prompts[:3])
    condition.features["cells"][1] = condition.null["cells"][0]
    with torch.no_grad():
        logp = inkling.logits(inkling.hidden(condition, actions, range(1, 4))).log_softmax(-1)
    expected = -sum(float(logp[b, l, actions[b, l + 1]]) for b in range(3) for l in range(49)) / (3 * 49)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_tokenizers_loss_is_the_pictures_error_at_first(inkling: Inkling) -> None:
    images = sample_batch((0,), 2)[0]
    tokenizer = inkling.tokenizer
    actions = inkling.encode(images)
    for last in (4, 3):
        total = tokenizer.quantizer.features(actions[:, : inkling.default_schedule.offsets[last + 1]])
        picture_error = F.mse_loss(tokenizer.picture(total), images)
        loss = tokenizer_loss(inkling, images, last)
        assert loss.item() > picture_error.item()
        loss.backward()
    assert tokenizer.quantizer.embedding.weight.grad.abs().sum() > 0
    inkling.zero_grad(set_to_none=True)


def test_the_learning_rate_rises_and_falls() -> None:
    stage = _Stage("x", StageConfig(100, 1, 1e-3, 10), torch.nn.Linear(1, 1), 0.0)
    rates = []
    for step in range(101):
        stage.step = step
        rates.append(stage.rate())
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3, rel=0.03)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[50] == pytest.approx(0.55e-3)
    assert rates[100] == pytest.approx(1e-4)
