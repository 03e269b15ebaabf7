"""Everything that decides a run's next number, as named tensors and plain values, and back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from varl.adapters import adapter_state
from varl.evaluation.held_out import asked
from varl.policy import Prompt
from varl.prompts import PromptStream
from varl.run.checkpoint import Checkpoint
from varl.run.pending import pending_pictures, restored_pictures

if TYPE_CHECKING:
    from varl.trainer import Trainer

__all__ = [
    "collected",
    "fingerprint",
    "foreign",
    "forget_removed",
    "new_moments",
    "own_generators",
    "restore",
    "rng_state",
    "seed_all",
    "set_rng_state",
    "stored_moments",
]


def collected(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A run's state: tensors by name (those that training goes on to change are not copied), and values for JSON.

    The kind of the next update and the learning rate follow from the numbers of updates and optimizer steps.
    """
    values = {
        "pictures": trainer.pictures,
        "updates_taken": trainer.learner.updates_taken,
        "prompts": trainer.stream.state_dict(),
        "evaluated": trainer.evaluated,
        "best": trainer.best,
        "failures": list(trainer.failures.shares),
        "fingerprint": trainer.fingerprint,
        "run": trainer.folder.identity,
        "held_out": digest(trainer.held_out),
    }
    pending, values["pending"] = pending_pictures(trainer)
    moments = {name: stored_moments(_trained(trainer), own) for name, own in _optimizers(trainer).items()}
    # Rewards may draw from the generators, which are each process's own.
    groups = {**moments, f"rng{trainer.distributed.rank}": rng_state(), "pending": pending}
    return _weights(trainer) | {k: v for name, own in groups.items() for k, v in _named(name, own).items()}, values


def foreign(trainer: Trainer, values: Mapping[str, Any]) -> str:
    """Why a checkpoint with such values is of another run than the trainer's; empty if it is of this one."""
    if values.get("fingerprint") != trainer.fingerprint:
        return "it began from other weights than policy.weights now holds"
    try:
        PromptStream(trainer.stream.prompts, trainer.stream.seed).load_state_dict(values["prompts"])
    except ValueError as error:
        return str(error)
    if values.get("run", trainer.folder.identity) != trainer.folder.identity:
        return "its configuration is another one"
    return ""


def restore(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Set a run's state to that of a checkpoint which is not ``foreign``.

    Raises:
        ValueError: if it has other tensors.
    """
    values = checkpoint.values
    trainer.stream.load_state_dict(values["prompts"])
    moments: dict[str, Tensor] = {}
    for group, own_moments in _optimizers(trainer).items():
        stored = [name.removeprefix(f"{group}.") for name in checkpoint.names() if name.startswith(f"{group}.")]
        moments |= _named(group, new_moments(_trained(trainer), own_moments, stored))
    pending, own = checkpoint.empty("pending"), f"rng{trainer.distributed.rank}"
    if f"{own}.torch" not in checkpoint.names():  # a process more than there were
        own = "rng0"
    # One that was written without a GPU holds no state of its generator: the run's seed stands for it.
    rng = {name: value for name, value in rng_state().items() if f"{own}.{name}" in checkpoint.names()}
    checkpoint.load(_weights(trainer) | moments | _named(own, rng) | pending)
    set_rng_state(rng)
    if values["pending"] is not None:
        tensors = {name.removeprefix("pending."): value for name, value in pending.items()}
        trainer.kept = restored_pictures(trainer, tensors, values["pending"])
    trainer.update, trainer.pictures = checkpoint.update, values["pictures"]
    # Earlier checkpoints counted optimizer steps, which are as many with one epoch.
    trainer.learner.updates_taken = values["updates_taken" if "updates_taken" in values else "steps_taken"]
    trainer.evaluated = values["evaluated"]
    trainer.best = None if values["best"] is None else (values["best"][0], values["best"][1])
    trainer.failures.shares.extend((pictures, steps) for pictures, steps in values["failures"])
    if values.get("held_out", now := digest(trainer.held_out)) != now:
        # What was measured on other prompts is no measure of these: a new baseline is evaluated, and a new best found.
        trainer.evaluated = trainer.best = None


def forget_removed(trainer: Trainer) -> None:
    """Have measured anew what evaluations had left in the run folder and is gone. Collective, as evaluating is."""
    found = trainer.folder.name_removed(trainer.evaluated, trainer.best) if trainer.distributed.main else [False, False]
    no_evaluation, no_best = trainer.distributed.gather_values(found)[0]
    trainer.evaluated = None if no_evaluation else trainer.evaluated
    trainer.best = None if no_best else trainer.best


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    """Of the policy (or its adapters), of the reference where it has its own, and the average if one is kept."""
    policy, reference = trainer.policy, trainer.reference
    tensors = _named("policy", adapter_state(policy) if trainer.lora else policy.trainable.state_dict())
    if reference is not None and not trainer.lora:
        tensors |= _named("reference", reference.trainable.state_dict())
    if trainer.ema is not None:
        tensors |= _named("ema", trainer.ema.state_dict())
    return tensors


def _trained(trainer: Trainer) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in trainer.policy.trainable.named_parameters() if p.requires_grad]


def _optimizers(trainer: Trainer) -> dict[str, torch.optim.Optimizer]:
    """By the group that their moments have in a checkpoint."""
    return {f"optimizer_{name}" if name else "optimizer": own for name, own in trainer.learner.optimizers.items()}


def _named(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}.{name}": value for name, value in tensors.items()}


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def rng_state() -> dict[str, Tensor]:
    """The states of the global generators."""
    numbers: Any = np.random.get_state(legacy=False)
    key, position = numbers["state"]["key"].tolist(), numbers["state"]["pos"]
    _, internal, spare = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*key, position, numbers["has_gauss"], _bits(numbers["gauss"])]),
        "python": torch.tensor([*internal, spare is not None, _bits(spare or 0.0)]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Tensor]) -> None:
    """Set what ``rng_state`` gave."""
    torch.set_rng_state(state["torch"].cpu())
    *key, position, has_gauss, gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, _float(gauss)))
    *internal, has_spare, spare = state["python"].tolist()
    random.setstate((3, tuple(internal), _float(spare) if has_spare else None))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def own_generators(seed: int) -> Iterator[None]:
    """Seed the global generators for what is inside; afterwards they are as they were."""
    before = rng_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_rng_state(before)


def _bits(value: float) -> int:
    return int(np.array(value, np.float64).view(np.int64))


def _float(bits: int) -> float:
    return float(np.array(bits, np.int64).view(np.float64))


def stored_moments(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """An optimizer's tensors by ``parameter.slot``; a parameter that was never stepped has none."""
    return {
        f"{name}.{slot}": value
        for name, parameter in parameters
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def new_moments(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, names: Iterable[str]
) -> dict[str, Tensor]:
    """Give an optimizer empty tensors under the names of ``stored_moments``, and return them to be filled.

    AdamW's ``step`` is a number, on its parameter's device, where the fused kernels read it; the other slots are of
    their parameter's shape (and sharding).

    Raises:
        ValueError: if a name is of no parameter.
    """
    owners = dict(parameters)
    found: dict[str, Tensor] = {}
    for full in names:
        name, _, slot = full.rpartition(".")
        if name not in owners:
            raise ValueError(f"the optimizer has no parameter {name!r}")
        owner = owners[name]
        value = torch.zeros((), device=owner.device) if slot == "step" else torch.zeros_like(owner)
        found[full] = optimizer.state[owner][slot] = value
    return found


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of what prompts ask for."""
    return hashlib.sha256(repr(asked(prompts)).encode()).hexdigest()


def fingerprint(module: nn.Module) -> str:
    """A hash of the names and shapes of a module's tensors and of up to 1,024 numbers of each, evenly spread."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        flat = value.detach().flatten()
        some = flat[:: max(1, -(-len(flat) // 1024))]
        found.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        found.update(some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
