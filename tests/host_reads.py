"""What updates and draws read of a device, counted on a device apart, for ``test_host_reads``: its own process.

python host_reads.py CASE FOLDER, in the folder of the tests; prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import tiny_runs
from apart import APART, apart
from families import FAMILIES, actions_of, prompts
from test_trainer import make_config
from varl import Sampling, log_probs, rollout, updates
from varl.config import MaskConfig, TrainConfig
from varl.evaluation import held_out
from varl.models.inkling import InklingConfig
from varl.rollout import row_generators
from varl.trainer import Trainer

COARSE, FINE = [1, 2, 3, 6, 12], [1, 2, 3, 4, 5, 6, 12]
KINDS: dict[str, dict[str, Any]] = {
    "suffix": {"update": "suffix"},
    "reused": {"suffix_state": "reused", "prefix_updates": 1},
    "exact KL, twice": {"update": "suffix", "kl": "exact", "epochs": 2},
    "truncated": {"update": "prefix", "logp": "sampling", "value": "soft-reference", "mask": MaskConfig(kl=True)},
}
SAMPLING = Sampling(guidance=1.5, top_k=5, top_p=0.9)


def on_the_host(seed: Sequence[int], rows: int | Sequence[int], device: Any = None) -> list[torch.Generator]:
    """A device made of Python has no generators of its own."""
    return row_generators(seed, rows)


def update(kind: str, folder: Path, grids: list[int], micro_batch: int, device: torch.device) -> dict[str, Any]:
    """Two updates of a tiny run: the gradient's norm of the first one, and what the second one read."""
    shape = InklingConfig(**(tiny_runs.SHAPE | {"grids": grids}))
    weights = tiny_runs.tiny_weights(folder / "weights.safetensors", shape)
    name = f"{kind} {len(grids)} {micro_batch} {device.type}"
    run = {"micro_batch": micro_batch, "updates": 2, "diagnose_every": 2}
    config = make_config(weights, folder / name, run=run)
    return _steps(replace(config, sampling=SAMPLING, method=replace(config.method, **KINDS[kind])), device)


def _steps(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    sys.modules["varl.trainer"].choose_device = lambda name: device  # type: ignore[attr-defined]
    if device.type == "cpu":
        return {"norm": Trainer(config).step()["gradient_norm"]}
    with apart() as traffic:
        trainer = Trainer(config)
        norm = trainer.step()["gradient_norm"]
        traffic.reads.clear()
        trainer.step()
    return {"norm": norm, "reads": dict(Counter(traffic.reads))}


def drawing() -> dict[str, list[str]]:
    """What drawing with every filter, branching and scoring read, by family."""
    found = {}
    for family in FAMILIES:
        with apart() as traffic:
            policy = family.make().to(APART)  # type: ignore[attr-defined]
            condition = policy.condition(prompts(2))
            sampling = Sampling(1.5, min(5, policy.classes - 1), 0.9)
            traffic.reads.clear()
            own = row_generators((0,), 2)
            start = rollout(policy, condition, sampling, own, until=2, logp=True, keep_state=True)
            whole = rollout(policy, condition, sampling, row_generators((1,), 4), start=start, fork=2, logp=True)
            steps = range(2, len(condition.schedule))
            scored = condition.schedule.span(steps)
            keep = torch.rand(scored.stop - scored.start) > 0.5
            options = {"guidance": sampling, "reference": policy, "entropy": True, "keep": keep, "shared": 2}
            log_probs(policy, whole.condition, whole.actions, steps, **options).logp.sum().backward()  # type: ignore
            policy.decode(whole.actions)
            found[family.name] = list(traffic.reads)
    return found


def mixed() -> str:
    """What is said where tensors of two devices meet."""
    with apart():
        policy = FAMILIES[0].make().to(APART)  # type: ignore[attr-defined]
        condition = policy.condition(prompts(2))
        actions = actions_of(policy, 2, condition.schedule.tokens)
        try:
            policy.hidden(condition, actions, range(2))
        except RuntimeError as error:
            return str(error)
    return ""


def main(case: str, folder: Path) -> Any:
    """What a case found, as JSON holds it."""
    if case == "drawing":
        return drawing()
    if case == "mixed":
        return mixed()
    updates.row_generators = held_out.row_generators = on_the_host  # type: ignore[attr-defined]
    cpu = torch.device("cpu")
    ways = {"few": (COARSE, 7, APART), "many": (FINE, 7, APART), "small": (COARSE, 3, APART), "cpu": (COARSE, 7, cpu)}
    return {name: update(case, folder, *way) for name, way in ways.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
