"""The command line: ``varl train | plan | generate | evaluate | pretrain | probe | doctor``."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, cast

import jsonargparse
from rich.console import Console
from rich.text import Text

from varl import commands
from varl.effects import NoEffect
from varl.ending import end
from varl.errors import InputError, Interrupted, RunError, checking
from varl.recipes import check_recipe, check_settings, check_words, parse_yaml, recipes_in, split_recipes
from varl.rewards.guard import no_exit, told

__all__ = ["main", "run"]

console = Console(stderr=True, markup=False)


Options = dict[tuple[str, ...], Any]
"""Options of a reward by their paths: ``("engine", "threads")``."""


@dataclass(frozen=True)
class Command:
    """A command: the function that carries it out, and its settings."""

    run: Callable[[Any], int | None]
    config: type
    help: str


COMMANDS = {
    "train": Command(commands.train, commands.TrainConfig, "tune a policy with reinforcement learning"),
    "plan": Command(commands.plan, commands.PlanConfig, "estimate the memory of a recipe"),
    "generate": Command(commands.generate, commands.GenerateConfig, "draw pictures"),
    "evaluate": Command(commands.evaluate, commands.EvaluateConfig, "score a policy on held-out prompts"),
    "pretrain": Command(commands.pretrain, commands.PretrainConfig, "train the embedded model from nothing"),
    "probe": Command(commands.probe, commands.ProbeConfig, "measure which steps decide the reward"),
    "doctor": Command(commands.doctor, commands.DoctorConfig, "check a policy and the reward"),
}


def _overview() -> str:
    lines = ["usage: varl COMMAND [RECIPE] [--key value ...]", "", "commands:"]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "varl COMMAND --help explains a command and each of its settings. RECIPE is a file of varl train's settings;",
    ]
    lines += ["pretrain has recipes of its own.", ""]
    lines += ["examples:", "  varl doctor", "  varl train recipes/inkling-ocr.yaml --run.out runs/first"]
    return "\n".join(lines)


def _parser(name: str, command: Command) -> jsonargparse.ArgumentParser:
    about = (command.run.__doc__ or "").strip()
    parser = jsonargparse.ArgumentParser(
        prog=f"varl {name}",
        usage=f"varl {name} [RECIPE] [--key value ...]",
        description=about,
        allow_abbrev=False,  # what is checked of words goes by their full names
    )
    parser.add_argument("--config", action="config", help="settings (YAML); those named after it override them")
    parser.add_class_arguments(command.config, as_group=False)
    return parser


def _read(name: str, command: Command, words: Sequence[str]) -> Any:
    parser = _parser(name, command)
    options: Options = {}
    with checking():
        if any(field.name == "reward" for field in fields(command.config)):
            words, options = _options_of_reward(words)
        for word in words:
            if deep := re.match(r"--policy\.config\.([^.=]+)\.", word):
                raise ValueError(
                    f"{word} would replace all of policy.config.{deep[1]}: set it in the recipe, or give "
                    f"--policy.config.{deep[1]} as a whole, '{{...}}'"
                )
        for path in recipes_in(words):
            check_recipe(path, command.config)
        check_words(words, command.config)
        values = parser.parse_args(words)
        _own_reward(parser, words, values, options)
        check_settings(command.config, {k: v for k, v in values.as_dict().items() if k != "config"})
        while True:  # one section after the other may have settings to leave out
            try:
                return _made(parser, command, values)
            except NoEffect as error:
                _leave_out(parser, command, words, values, error)


def _made(parser: jsonargparse.ArgumentParser, command: Command, values: Any) -> Any:
    parsed = parser.instantiate(values)
    parsed.pop("config", None)
    return command.config(**vars(parsed))


def _leave_out(
    parser: jsonargparse.ArgumentParser, command: Command, words: Sequence[str], values: Any, error: NoEffect
) -> None:
    """Set what a recipe says back to its default where words after it leave it without effect, and say so.

    Raises:
        NoEffect: if those words name it themselves, or the recipe alone is refused too.
    """
    recipe, own = split_recipes(words)
    given = [word.removeprefix("--").partition("=")[0] for word in own if word.startswith("--")]
    if not recipe or any(name == word or name.startswith(f"{word}.") for name in error.defaults for word in given):
        raise error
    _made(parser, command, parser.parse_args(recipe))
    for name, default in error.defaults.items():
        values[name] = default
        console.print(
            Text(f"{name} of the recipe has no effect beside {' '.join(own)}, and is left out"), soft_wrap=True
        )


def _options_of_reward(words: Sequence[str]) -> tuple[list[str], Options]:
    """The words without ``--reward.OPTION VALUE`` and ``--reward.OPTION.FIELD VALUE``; and these, by their paths."""
    rest, options, waiting = list[str](), Options(), ""
    for word in words:
        path, given, value = word.partition("=")
        if waiting:
            options[tuple(waiting.split("."))], waiting = parse_yaml(word), ""
        elif not word.startswith("--reward."):
            rest.append(word)
        elif given:
            options[tuple(path.removeprefix("--reward.").split("."))] = parse_yaml(value)
        else:
            waiting = word.removeprefix("--reward.")
    if waiting:
        raise ValueError(f"--reward.{waiting} needs a value")
    return rest, options


def _own_reward(parser: jsonargparse.ArgumentParser, words: Sequence[str], values: Any, options: Options) -> None:
    """The reward with the options that words give it. Those of the recipe stay only with the recipe's reward."""
    recipe, own = split_recipes(words)
    named = parser.parse_args(own).reward if any(re.match("--reward(=|$)", word) for word in own) else None
    if ("name",) in options:
        named = options[("name",)]
    if named is not None and _name_of(named) != _name_of(parser.parse_args(recipe).reward):
        values.reward = named
    if options:
        values.reward = dict(values.reward) if isinstance(values.reward, dict) else {"name": values.reward}
    for (*sections, last), value in options.items():
        inner = values.reward
        for section in sections:
            inner[section] = dict(inner[section]) if isinstance(inner.get(section), dict) else {}
            inner = inner[section]
        inner[last] = value


def _name_of(reward: Any) -> Any:
    return reward.get("name") if isinstance(reward, dict) else reward


def _settings(name: str, command: Command, words: Sequence[str]) -> Any:
    """A command's settings: those of its recipe, if the first word is one, overridden by the words after it."""
    if not words or words[0].startswith("-"):
        return _read(name, command, words)
    path, *rest = words
    with checking():
        if not Path(path).is_file():
            raise FileNotFoundError(f"no recipe {path}")
    if issubclass(command.config, commands.TrainConfig | commands.PretrainConfig):
        return _read(name, command, ["--config", path, *rest])
    recipe = _read("train", COMMANDS["train"], ["--config", path])
    return _read(name, command, ["--config", json.dumps(commands.from_recipe(recipe, command.config)), *rest])


def _one_voice(name: str, command: Command, words: Sequence[str]) -> Any:
    """``_settings``; of the processes that torchrun started on a machine, which all read the same, one complains."""
    try:
        return _settings(name, command, words)
    except InputError:
        if int(os.environ.get("LOCAL_RANK", 0)):
            raise SystemExit(2) from None
        raise


def _say(what: str, message: str) -> None:
    """Print an error. What a file or name brings into it is shown, and steers no terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message)
    console.print(Text(what, "red"), Text(shown), soft_wrap=True)


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
        _say("error:", f"there is no command {name!r}; there are {', '.join(COMMANDS)}")
        return 2
    command = COMMANDS[name]
    try:
        config = _one_voice(name, command, rest)
        with no_exit():
            return _carried_out(command, config)
    except InputError as error:
        _say("error:", str(error))
        return 2
    except RunError as error:
        _say("stopped:", str(error))
        return 1
    except Interrupted as stop:
        console.print("stopped, with a checkpoint; the same command goes on from there")
        return 128 + stop.signal
    except KeyboardInterrupt:
        console.print("stopped; train and pretrain go on from their last checkpoint when called again")
        return 130


def _carried_out(command: Command, config: Any) -> int:
    try:
        return command.run(config) or 0
    except SystemExit as end:
        if end.code:  # of several processes, another one says why
            raise
        raise RunError(
            f"{told(end)} ended the work before it was done; the same command goes on or begins again"
        ) from end


def run() -> NoReturn:
    """``main`` as a process of its own: it ends with that exit code, whatever user code has left running."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a name or a bar is not in the terminal's encoding
    try:
        status: object = main()
        print(end="", flush=True)
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        status = 1
        if isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC):  # files raise a RunError
            if error.errno != errno.EPIPE:  # which is no fault: "varl | head -1"
                _say("stopped:", f"the output cannot be written: {error.strerror}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more
        else:
            sys.excepthook(*cast(Any, sys.exc_info()))
    end(status)


if __name__ == "__main__":
    run()
