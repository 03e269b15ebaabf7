"""What a start notes of the code's state, and that asking git for it executes nothing of the folder's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from varl.run import environment

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def git(folder: Path, *words: str) -> None:
    user = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(folder), *user, *words], check=True, capture_output=True)


def state(folder: Path, tracked: str = ".") -> dict[str, object] | None:
    environment._git.cache_clear()
    return environment._git(folder, tracked)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "file").write_text("1")
    (folder / "sub").mkdir()
    (folder / "sub" / "inner").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        git(folder, *words)
    return folder


def test_the_state_of_the_code(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert state(tmp_path) is None
    found = state(repository, "file")
    assert found is not None
    assert len(str(found["commit"])) == 40
    assert found["dirty"] is False
    assert state(repository / "sub") == found
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of git's
    assert state(repository) == found
    (repository / ".git" / "info").mkdir(exist_ok=True)
    (repository / ".git" / "info" / "exclude").write_text("runs\n")
    (repository / "runs").write_text("left out")
    assert state(repository) == found
    (repository / "new").write_text("not left out")
    assert state(repository) == found | {"dirty": True}
    (repository / "new").unlink()
    (repository / "file").write_text("2")
    assert state(repository, "file") == found | {"dirty": True}
    assert state(repository, "other") is None


def test_a_second_work_tree(tmp_path: Path, repository: Path) -> None:
    git(repository, "worktree", "add", str(tmp_path / "second"))
    found = state(tmp_path / "second")
    assert found == state(repository)
    (tmp_path / "second" / "file").write_text("2")
    assert state(tmp_path / "second") != found


def fsmonitor(folder: Path, trap: Path) -> None:
    git(folder, "config", "core.fsmonitor", str(trap))


def filters(folder: Path, trap: Path) -> None:
    (folder / ".gitattributes").write_text("* filter=mine diff=mine\n")
    for key in ("filter.mine.clean", "filter.mine.process", "diff.mine.textconv", "diff.mine.command", "diff.external"):
        git(folder, "config", key, str(trap))


def hooks(folder: Path, trap: Path) -> None:
    for name in ("post-index-change", "post-checkout", "reference-transaction"):
        shutil.copy(trap, folder / ".git" / "hooks" / name)
    git(folder, "config", "core.hooksPath", str(folder / ".git" / "hooks"))


def aliases(folder: Path, trap: Path) -> None:
    for name in ("status", "rev-parse", "ls-files"):
        git(folder, "config", f"alias.{name}", f"!{trap}")
    for key in ("core.pager", "pager.status", "core.editor", "core.sshCommand", "core.askPass", "credential.helper"):
        git(folder, "config", key, str(trap))


def included(folder: Path, trap: Path) -> None:
    (folder / "more").write_text(f"[core]\nfsmonitor = {trap}\n")
    git(folder, "config", "include.path", "../more")


def submodule(folder: Path, trap: Path) -> None:
    inner = folder.parent / "inner"
    shutil.copytree(folder, inner)
    git(folder, "submodule", "add", str(inner), "inner")
    git(folder, "commit", "-qm", "two")
    fsmonitor(folder / "inner", trap)
    (folder / "inner" / "file").write_text("2")


def promised(folder: Path, trap: Path) -> None:
    """Objects that are not there are asked of a remote, through a program that the configuration names."""
    for key, value in (("url", str(folder)), ("promisor", "true"), ("uploadpack", str(trap))):
        git(folder, "config", f"remote.origin.{key}", value)
    git(folder, "config", "extensions.partialClone", "origin")
    tree = subprocess.check_output(["git", "-C", str(folder), "rev-parse", "HEAD^{tree}"], text=True).strip()
    git(folder, "rm", "-q", "--cached", "sub/inner")
    (folder / ".git" / "objects" / tree[:2] / tree[2:]).unlink()


@pytest.mark.parametrize("lay", [fsmonitor, filters, hooks, aliases, included, submodule, promised])
def test_nothing_of_the_folder_is_executed(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lay: Callable[[Path, Path], None]
) -> None:
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    trap.write_text(f"#!/bin/sh\ntouch {sprung}\nexit 1\n")
    trap.chmod(0o755)
    lay(repository, trap)
    sprung.unlink(missing_ok=True)
    (repository / "file").write_text("2")
    monkeypatch.chdir(repository)
    environment._git.cache_clear()
    found = environment.environment()["git"]["working_directory"]
    assert not sprung.exists()
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["dirty"] is not False
    # The trap is one: git alone springs it.
    subprocess.run(["git", "-C", str(repository), "status"], capture_output=True, check=False)
    subprocess.run(["git", "-C", str(repository), "diff"], capture_output=True, check=False)
    assert sprung.exists() or lay in (aliases, hooks)
