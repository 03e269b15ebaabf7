"""Tokenizers and text encoders in local folders, through transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from varl.models.files import plain
from varl.models.weights import check_finite

__all__ = ["load_text"]

FLOATS = ("F64", "F32", "F16", "BF16")


def load_text(
    folder: Path, what: str, extra: str, tokenizer: str, model: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """The tokenizer of a folder, and its model, frozen; whole, and without the notices that transformers prints.

    Args:
        what: how errors name them, for example ``text encoder``.
        extra: of this package, that installs what is needed.
        tokenizer, model: names of transformers' classes; without a model None stands for it.
        options: of the model if there is one, otherwise of the tokenizer.

    Raises:
        ImportError: if transformers is missing.
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds something else, or weights that are not finite floating numbers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the {what} needs transformers: pip install 'varl[{extra}]'; or give made features to condition_from"
        ) from error
    if not folder.is_dir():
        raise FileNotFoundError(f"no {what} at {folder}: a local folder is needed")
    try:
        with _quiet(transformers):
            own = {} if model else options
            reader = getattr(transformers, tokenizer).from_pretrained(str(folder), local_files_only=True, **own)
            if model is None:
                return reader, None
            found, info = getattr(transformers, model).from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(f"{folder} holds no {what} that transformers can read as {tokenizer}: {reason}") from error
    _check(f"{folder} holds no {what} of transformers' class {model}", reader, found, info)
    _check_kinds(folder)
    check_finite(dict(found.named_parameters()), str(folder))
    return reader, found.eval().requires_grad_(False)


def _check(what: str, reader: Any, model: Any, info: Mapping[str, Any]) -> None:
    """transformers fills what a file lacks with random weights, and reads any tokenizer as any other."""
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise ValueError(f"{what}: {len(missing)} of its weights are missing ({', '.join(missing[:3])}, ...)")
    if len(reader) > model.config.vocab_size:
        raise ValueError(f"{what}: its tokenizer has {len(reader)} pieces, its weights {model.config.vocab_size}")


def _check_kinds(folder: Path) -> None:
    """transformers casts whatever numbers a file has: whole ones are no weights, quantised ones lack their scale."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        for key, kind in kinds.items():
            if key.endswith((".weight", ".bias")) and kind not in FLOATS:
                raise ValueError(f"weights of {path} cannot be used: {plain(key)} is {kind}, not {' or '.join(FLOATS)}")


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    log = transformers.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
