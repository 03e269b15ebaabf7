import pytest
import torch

from small import SMALL
from varl import Prompt
from varl.models.inkling import Inkling, InklingConfig
from varl.models.inkling.text import layout, parse_prompt
from varl.policy import Condition, State


def test_the_default_has_the_shape_the_method_needs() -> None:
    schedule = InklingConfig().grids
    assert len(schedule) >= 5
    assert sum(s * s for s in schedule) >= 180
    assert schedule[-1] >= 12


def test_schedules(inkling: Inkling) -> None:
    schedule = inkling.default_schedule
    assert schedule.image_size == (48, 48)
    assert [h for h, _ in schedule.grids] == list(SMALL.grids)
    assert inkling.schedules() == inkling.schedules(48) == inkling.schedules(48, 1.0) == schedule
    for asked in ((256, None), (48, 1.5)):
        with pytest.raises(ValueError, match="48x48 pictures only"):
            inkling.schedules(*asked)


def test_the_ramp(inkling: Inkling) -> None:
    assert inkling.guidance_ramp(inkling.default_schedule) == [0, 0.25, 0.5, 0.75, 1]


def test_conditions(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts)
    assert condition.batch == 8
    assert condition.schedule == inkling.default_schedule
    cells = condition.features["cells"]
    assert cells.shape == (8, 12, 12)
    letters = torch.from_numpy(layout(parse_prompt(prompts[3].text)))
    for i, j in ((0, 0), (1, 5), (4, 9), (11, 6)):
        # Each letter's half of 8x8 pixels is four cells, each with an embedding of its own.
        assert cells[3, i, j] == letters[i // 2, j // 2] * 4 + 2 * (i % 2) + j % 2
    null = condition.null["cells"]
    assert null.shape == (1, 12, 12)
    assert not torch.isin(null, cells).any()
    assert int(null.max()) == inkling.transformer.cell.num_embeddings - 1
    with pytest.raises(ValueError, match="at least one prompt"):
        inkling.condition([])
    with pytest.raises(ValueError, match="asks for no word"):
        inkling.condition([*prompts, Prompt("a cat")])


def test_conditions_are_selected_and_repeated(inkling: Inkling, prompts: list[Prompt]) -> None:
    condition = inkling.condition(prompts)
    cells = condition.features["cells"]
    assert torch.equal(condition.select([4, 1, 4]).features["cells"], cells[[4, 1, 4]])
    assert torch.equal(condition.select(torch.tensor([2])).features["cells"], cells[2:3])
    repeated = condition.repeat(2)
    assert torch.equal(repeated.features["cells"], cells[[i // 2 for i in range(16)]])
    assert isinstance(repeated, Condition)
    assert repeated.null is condition.null


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_states(inkling: Inkling, prompts: list[Prompt], guidance: float) -> None:
    state = inkling.start(inkling.condition(prompts[:3]), guidance)
    assert isinstance(state, State)
    assert (state.batch, state.step) == (3, 0)
    logits = inkling.next_logits(state)
    assert logits.shape == (3, 1, 64)
    assert logits.dtype == torch.float32
    assert torch.equal(inkling.next_logits(state), logits)
    inkling.advance(state, logits.argmax(-1))
    assert (state.batch, state.step) == (3, 1)
    assert inkling.next_logits(state).shape == (3, 4, 64)
    assert state.fork(2).batch == 6
    assert state.select([1]).batch == 1
    assert state.fork(2).schedule == inkling.default_schedule


def test_guidance_moves_away_from_the_null_condition(inkling: Inkling, prompts: list[Prompt]) -> None:
    """At step s with weight t = g s / 4: (1 + t) conditional - t unconditional, from caches of their own."""
    condition = inkling.condition(prompts[:2])
    empty = Condition(condition.schedule, {"cells": condition.null["cells"].expand(2, -1, -1)}, condition.null)
    states = [inkling.start(condition, 3.0), inkling.start(condition), inkling.start(empty)]
    for step in range(3):
        guided, conditional, unconditional = (inkling.next_logits(s) for s in states)
        t = 3.0 * step / 4
        expected = (1 + t) * conditional - t * unconditional
        torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)
        for state in states:
            inkling.advance(state, conditional.argmax(-1))


def test_only_the_transformer_is_tuned(inkling: Inkling, prompts: list[Prompt]) -> None:
    assert inkling.trainable is inkling.transformer
    actions = torch.randint(64, (2, 194))
    loss = inkling.logits(inkling.hidden(inkling.condition(prompts[:2]), actions, range(5))).sum()
    gradients = torch.autograd.grad(loss, list(inkling.tokenizer.parameters()), allow_unused=True)
    assert all(g is None for g in gradients)


def test_pictures_and_back(inkling: Inkling) -> None:
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    actions = inkling.encode(images)
    assert actions.shape == (2, 194)
    assert actions.dtype == torch.int64
    assert int(actions.min()) >= 0
    assert int(actions.max()) < inkling.classes
    assert inkling.decode(actions).shape == (2, 3, 48, 48)
    assert inkling.decode(actions[:, :14]).shape == (2, 3, 48, 48)


@pytest.mark.parametrize("grids", [(1, 2, 4, 12), (1, 3, 6), (1, 2, 4, 8, 24), (3, 6)])
def test_other_shapes(grids: tuple[int, ...], prompts: list[Prompt]) -> None:
    config = InklingConfig(grids=grids, codes=8, coarse=3, fine=2, decoder=4, width=8, depth=1, heads=2)
    policy = Inkling(config).eval()
    condition = policy.condition(prompts[:2])
    state = policy.start(condition, 1.0)
    drawn = []
    for _ in grids:
        drawn.append(policy.next_logits(state).argmax(-1))
        policy.advance(state, drawn[-1])
    actions = torch.cat(drawn, 1)
    assert actions.shape == (2, sum(g * g for g in grids))
    assert policy.decode(actions).shape == (2, 3, 48, 48)
    assert policy.encode(torch.rand(1, 3, 48, 48)).shape == (1, actions.shape[1])


@pytest.mark.parametrize(
    "grids", [(), (12,), (1, 2, 5), (1, 4, 6), (1, 8, 16), (1, 2, 8), (1, 24, 48), (1, 0, 12), (1, 1, 3)]
)
def test_impossible_grids(grids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="grid"):
        InklingConfig(grids=grids)


def test_impossible_heads() -> None:
    with pytest.raises(ValueError, match="multiple of its 5 heads"):
        InklingConfig(width=32, heads=5)
