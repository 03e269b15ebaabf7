import pytest
import torch
from torch import Tensor

from bits import Bits, labels
from small import SMALL, make_inkling
from varl import Prompt
from varl.doctor import check_policy, check_reader
from varl.models.blocks import KeyValueCache
from varl.models.inkling import Inkling
from varl.models.state import DrawState
from varl.policy import Condition
from varl.rewards import RewardOutput


def failures(policy: Inkling, prompts: list[Prompt]) -> set[str]:
    checks = list(check_policy(policy, prompts))
    assert len(checks) == len(policy.default_schedule) + 5
    assert all(c.name and c.found for c in checks)
    return {c.name for c in checks if not c.fine}


def test_a_sound_policy_passes(inkling: Inkling, prompts: list[Prompt]) -> None:
    assert failures(inkling, prompts[:3]) == set()
    assert failures(Bits(), labels(3)) == set()


def sabotage(inkling: Inkling, cls: type[Inkling]) -> Inkling:
    made = cls(SMALL)
    made.load_state_dict(inkling.state_dict())
    return made.eval()


class ShiftedCache(KeyValueCache):
    """Stores every grid one position late."""

    def write(self, layer: int, start: int, keys_BHLD: Tensor, values_BHLD: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().write(layer, start, keys_BHLD, values_BHLD)
        self.keys[layer] = self.keys[layer].roll(1, 2)
        return keys.clone(), values


def test_a_cache_that_is_off_by_one_is_found(prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_inkling()
    monkeypatch.setattr("varl.models.inkling.transformer.KeyValueCache", ShiftedCache)
    found = failures(policy, prompts[:3])
    assert {f"rollout = replay, step {i + 1} ({s}x{s})" for i, s in enumerate((2, 3, 6, 12), 1)} <= found
    assert "rollout = replay, step 1 (1x1)" not in found


def test_features_that_depend_on_the_batch_are_found(inkling: Inkling, prompts: list[Prompt]) -> None:
    class Coupled(Inkling):
        def hidden(self, *arguments, **options) -> Tensor:
            hidden = super().hidden(*arguments, **options)
            return hidden + 0.1 * hidden.mean(0, keepdim=True)

    assert "a row does not depend on its batch" in failures(sabotage(inkling, Coupled), prompts[:3])


def test_a_fork_that_mixes_up_rows_is_found(inkling: Inkling, prompts: list[Prompt]) -> None:
    class Tiled(Inkling):
        def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
            state = super().start(condition, guidance)
            state.fork = lambda k: state.select(torch.arange(state.batch).repeat(k))  # type: ignore[method-assign]
            return state

    assert failures(sabotage(inkling, Tiled), prompts[:3]) == {"continuations of a fork = replay"}


def test_a_guidance_that_cannot_be_replayed_is_found(inkling: Inkling, prompts: list[Prompt]) -> None:
    class Stronger(Inkling):
        def start(self, condition: Condition, guidance: float = 0.0) -> DrawState:
            return super().start(condition, 1.1 * guidance)

    assert failures(sabotage(inkling, Stronger), prompts[:3]) == {"guided, truncated rollout = replay"}


def test_a_fork_that_forgets_a_cache_is_found(
    inkling: Inkling, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = KeyValueCache.select

    def forgetful(self: KeyValueCache, rows: Tensor) -> KeyValueCache:
        chosen = whole(self, rows)
        chosen.keys[..., chosen.filled - 1, :] = 0
        return chosen

    monkeypatch.setattr(KeyValueCache, "select", forgetful)
    assert failures(inkling, prompts[:3]) == {"continuations of a fork = replay"}


def test_noise_is_found(inkling: Inkling, prompts: list[Prompt]) -> None:
    class Noisy(Inkling):
        def logits(self, hidden: Tensor) -> Tensor:
            logits = super().logits(hidden)
            return logits + torch.rand_like(logits)

    found = failures(sabotage(inkling, Noisy), prompts[:3])
    assert {"on-policy ratio is exactly 1", "seeded draws repeat"} <= found


def test_dropout_in_training_only_is_found(inkling: Inkling, prompts: list[Prompt]) -> None:
    class Recorded(Inkling):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden * 1.01 if torch.is_grad_enabled() else hidden)

    assert failures(sabotage(inkling, Recorded), prompts[:3]) == {"on-policy ratio is exactly 1"}


def test_nan_is_no_agreement(inkling: Inkling, prompts: list[Prompt]) -> None:
    class Broken(Inkling):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden) * float("nan")

    assert len(failures(sabotage(inkling, Broken), prompts[:3])) >= 8


def test_one_prompt_shows_no_batch_invariance(inkling: Inkling, prompts: list[Prompt]) -> None:
    with pytest.raises(ValueError, match="at least 2 prompts"):
        list(check_policy(inkling, prompts[:1]))


class Reader:
    def __init__(self, text: str | None, failed: bool = False) -> None:
        self.text, self.failed = text, failed

    def __call__(self, images: Tensor, prompts: list[Prompt]) -> RewardOutput:
        assert images.shape == (1, 3, 64, 192)
        assert images.min() < 0.1
        assert images.max() == 1
        # Ink where the word is, none on the edges.
        ink = (images < 0.5).all(1)[0]
        assert ink[16:48, 24:160].float().mean() > 0.1
        assert not ink[:, :20].any()
        texts = None if self.text is None else [self.text]
        return RewardOutput(torch.tensor([0.5]), torch.tensor([self.failed]), texts=texts)

    def describe(self) -> dict[str, str]:
        return {}


def test_reading() -> None:
    assert check_reader(Reader("HARBEL")).fine
    assert check_reader(Reader("say Harbel")).fine
    assert not check_reader(Reader("")).fine
    assert not check_reader(Reader("HARSEL")).fine
    assert not check_reader(Reader("HARBEL", failed=True)).fine
    # A reward that does not read is alive if it scores.
    assert check_reader(Reader(None)).fine
