"""A stand-in for VAR's published files: the same keys, random weights, a few kilobytes; to rehearse docs/guide.md with.

    python -m examples.tiny_var checkpoints/tiny

writes ``var_tiny.pth``, ``vae_tiny.pth`` and ``recipe.yaml``, which tunes them in seconds on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from varl import load_policy

GRIDS = [1, 2, 3, 4]
CONFIG: dict[str, Any] = {
    "transformer": {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10, "patch_nums": GRIDS},
    "tokenizer": {"vocab_size": 64, "z_channels": 8, "ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1},
}


def write(folder: Path) -> Path:
    """Write the two files and the recipe; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    policy: Any = load_policy("var", CONFIG, "random")
    for parameter in policy.transformer.parameters():
        parameter.data.normal_(std=0.2)
    torch.save(policy.transformer.state_dict(), folder / "var_tiny.pth")
    torch.save(policy.tokenizer.state_dict(), folder / "vae_tiny.pth")
    weights = {"transformer": str(folder / "var_tiny.pth"), "tokenizer": str(folder / "vae_tiny.pth")}
    recipe = {
        "policy": {"family": "var", "config": CONFIG, "weights": weights},
        "prompts": {"source": "labels:0-9"},
        "reward": "examples.rewards:colourfulness",
        "sampling": {"guidance": 1.5, "top_k": 32, "top_p": 0.96},
        "method": {"middle": "grid:2", "prefix_updates": 1, "prompts": 2, "group": 4},
        "optimizer": {"learning_rate": 1e-3, "warmup_updates": 0},
        "evaluation": {"source": "labels:0-3"},
        "run": {"out": str(folder / "run"), "updates": 2, "micro_batch": 8, "gallery_every": 0},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny")))
