"""A tiny family whose tokens are three bits each: the policy contract without anything of Inkling's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varl.policy import Condition, Prompt
from varl.schedule import ScaleSchedule

BITS = 3
WIDTH = 6
SCHEDULE = ScaleSchedule(((1, 1), (1, 2), (2, 3)), stride=2)


class BitsState:
    def __init__(self, features: Tensor, null: Tensor, context: Tensor, step: int, guidance: float) -> None:
        self.features, self.null, self.context = features, null, context
        self.step, self.guidance, self.schedule = step, guidance, SCHEDULE

    @property
    def batch(self) -> int:
        return len(self.context)

    def fork(self, k: int) -> BitsState:
        return self.select(torch.arange(self.batch).repeat_interleave(k))

    def select(self, rows: Tensor | Sequence[int]) -> BitsState:
        index = torch.as_tensor(rows)
        return BitsState(self.features[index], self.null, self.context[index], self.step, self.guidance)


class Bits(nn.Module):
    """A token's features are those of the sum of all coarser tokens, its position and the prompt's label."""

    family, classes, event, default_schedule = "bits", 2, (BITS,), SCHEDULE
    shares_keys = False

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.label = nn.Embedding(8, WIDTH)
            self.enter = nn.Linear(BITS, WIDTH)
            self.position = nn.Parameter(torch.randn(SCHEDULE.tokens, WIDTH))
            self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
            self.head = nn.Linear(WIDTH, BITS * 2)
            self.head.weight.data.mul_(3)

    @property
    def trainable(self) -> nn.Module:
        return self

    def schedules(self, resolution: int | None = None, aspect_ratio: float | None = None) -> ScaleSchedule:
        return SCHEDULE

    def guidance_ramp(self, schedule: ScaleSchedule) -> list[float]:
        return [0.5, 1.0, 1.5]

    def condition(self, prompts: Sequence[Prompt], schedule: ScaleSchedule | None = None) -> Condition:
        labels = torch.tensor([p.label or 0 for p in prompts])
        return Condition(SCHEDULE, {"label": labels}, {"label": torch.tensor([7])})

    def start(self, condition: Condition, guidance: float = 0.0) -> BitsState:
        labels = condition.features["label"]
        context = self.position.new_zeros(len(labels), WIDTH)
        return BitsState(labels, condition.null["label"], context, 0, guidance)

    def _step(self, label: Tensor, context: Tensor, step: int) -> Tensor:
        place = self.position[SCHEDULE.tokens_of(step)]
        return self.body((self.label(label) + torch.tanh(context))[:, None] + place)

    def next_logits(self, state: BitsState) -> Tensor:
        logits = self.logits(self._step(state.features, state.context, state.step))
        if not state.guidance:
            return logits
        t = state.guidance * self.guidance_ramp(SCHEDULE)[state.step]
        null = state.null.expand(state.batch)
        return (1 + t) * logits - t * self.logits(self._step(null, state.context, state.step))

    def _sum(self, actions: Tensor) -> Tensor:
        return self.enter(2 * actions.to(self.position.dtype) - 1).sum(1)

    def advance(self, state: BitsState, actions: Tensor) -> None:
        state.context = state.context + self._sum(actions)
        state.step += 1

    def hidden(self, condition: Condition, actions: Tensor, steps: range, prefix: BitsState | None = None) -> Tensor:
        if prefix is None:
            context = self._sum(actions[:, : SCHEDULE.offsets[steps.start]])
        else:
            context = prefix.context.repeat_interleave(len(actions) // prefix.batch, 0)
        out = []
        for step in steps:
            out.append(self._step(condition.features["label"], context, step))
            if step + 1 < steps.stop:
                context = context + self._sum(actions[:, SCHEDULE.tokens_of(step)])
        return torch.cat(out, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden).unflatten(-1, (BITS, 2))

    def decode(self, actions: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        """A channel a bit: four sevenths of step 1's, two of step 2's, one of step 3's."""
        picture = torch.zeros(len(actions), 3, *SCHEDULE.image_size)
        for step, weight in enumerate((4, 2, 1)):
            if actions.shape[1] >= SCHEDULE.offsets[step + 1]:
                grid = actions[:, SCHEDULE.tokens_of(step)].transpose(1, 2).unflatten(2, SCHEDULE.grids[step])
                picture += weight / 7 * nn.functional.interpolate(grid.float(), SCHEDULE.image_size)
        return picture

    def encode(self, images: Tensor, schedule: ScaleSchedule | None = None) -> Tensor:
        raise NotImplementedError


def labels(count: int) -> list[Prompt]:
    return [Prompt(label=i % 6) for i in range(count)]
