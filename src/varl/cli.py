"""The command line: ``varl train | plan | generate | evaluate | pretrain | probe | doctor``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jsonargparse
from rich.console import Console
from rich.text import Text

from varl import commands
from varl.errors import InputError, Interrupted, RunError, checking
from varl.recipes import check_nulls, check_recipe, recipes_in

__all__ = ["main"]

console = Console(stderr=True)


@dataclass(frozen=True)
class Command:
    """A command: the function that carries it out, and whether its first word is a recipe."""

    run: Callable[[Any], int | None]
    config: type
    recipe: bool
    help: str


COMMANDS = {
    "train": Command(commands.train, commands.TrainConfig, True, "tune a policy with reinforcement learning"),
    "plan": Command(commands.plan, commands.PlanConfig, True, "estimate the memory of a recipe"),
    "generate": Command(commands.generate, commands.GenerateConfig, False, "draw pictures"),
    "evaluate": Command(commands.evaluate, commands.EvaluateConfig, False, "score a policy on held-out prompts"),
    "pretrain": Command(commands.pretrain, commands.PretrainConfig, True, "train the embedded model from nothing"),
    "probe": Command(commands.probe, commands.ProbeConfig, False, "measure which steps decide the reward"),
    "doctor": Command(commands.doctor, commands.DoctorConfig, False, "check a policy and the reward"),
}


def _overview() -> str:
    lines = ["usage: varl COMMAND ...", "", "commands:"]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    lines += ["", "varl COMMAND --help explains a command and each of its settings.", ""]
    lines += ["examples:", "  varl doctor", "  varl train recipes/inkling-ocr.yaml --run.out runs/first"]
    return "\n".join(lines)


def _parser(name: str, command: Command) -> jsonargparse.ArgumentParser:
    usage = f"varl {name} RECIPE [--key value ...]" if command.recipe else f"varl {name} [--key value ...]"
    about = (command.run.__doc__ or "").strip()
    parser = jsonargparse.ArgumentParser(prog=f"varl {name}", usage=usage, description=about)
    parser.add_argument("--config", action="config", help="a recipe (YAML); the settings named after it override it")
    parser.add_class_arguments(command.config, as_group=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failed check or run, 2 for bad input, 128 + signal."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        import varl

        print(varl.__version__)
        return 0
    if name not in COMMANDS:
        console.print(f"[red]error:[/] there is no command {name!r}; there are {', '.join(COMMANDS)}", soft_wrap=True)
        return 2
    command = COMMANDS[name]
    if command.recipe and rest and not rest[0].startswith("-"):
        rest = ["--config", *rest]
    parser = _parser(name, command)
    try:
        with checking():
            for path in recipes_in(rest):
                check_recipe(path)
            values = parser.parse_args(rest)
            check_nulls(command.config, values.as_dict())
            parsed = parser.instantiate(values)
            parsed.pop("config", None)
            config = command.config(**vars(parsed))
        return command.run(config) or 0
    except InputError as error:
        console.print("[red]error:[/]", Text(str(error)), soft_wrap=True)
        return 2
    except RunError as error:
        console.print("[red]stopped:[/]", Text(str(error)), soft_wrap=True)
        return 1
    except Interrupted as stop:
        console.print("stopped, with a checkpoint; the same command goes on from there")
        return 128 + stop.signal
    except KeyboardInterrupt:
        console.print("stopped; train and pretrain go on from their last checkpoint when called again")
        return 130


if __name__ == "__main__":
    sys.exit(main())
