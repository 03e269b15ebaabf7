"""The carried wheels are installed into a folder, once, and what stands in the way is named."""

from __future__ import annotations

import importlib.abc
import sys
import zipfile
from pathlib import Path

import pytest
from tools.gpu import install as module
from tools.gpu.install import install

from gpu_day.made_up import make_wheel

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """varl is installed where the tests run, but not on the machines that the wheels are for."""
    monkeypatch.setattr(module, "_varl_is_installed", lambda: False)


@pytest.fixture(params=[True, False], ids=["pip", "no-pip"])
def _with_and_without_pip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_pip_is_here", lambda: request.param)


@pytest.mark.usefixtures("_with_and_without_pip")
def test_wheels_are_installed_once_and_again_when_they_change(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wheels, site = tmp_path / "some wheels", tmp_path / "site"
    make_wheel(wheels, "part", "1", ("never-fetched",))
    make_wheel(wheels, "other", "1")
    assert install(wheels, site)
    assert "2 wheels were installed" in capfd.readouterr().out
    assert (site / "part.py").read_text().startswith("VERSION = '1'")
    assert (site / "other-1.dist-info" / "METADATA").is_file()
    made = (site / "part.py").stat().st_mtime_ns
    assert install(wheels, site)
    assert "installed already" in capfd.readouterr().out
    assert (site / "part.py").stat().st_mtime_ns == made

    (wheels / "other-1-py3-none-any.whl").unlink()
    (wheels / "part-1-py3-none-any.whl").unlink()
    make_wheel(wheels, "part", "2")
    assert install(wheels, site)
    assert (site / "part.py").read_text().startswith("VERSION = '2'")
    assert not (site / "other.py").exists()


@pytest.mark.usefixtures("_with_and_without_pip")
def test_a_damaged_wheel_is_named_and_nothing_of_it_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = make_wheel(tmp_path / "wheels", "part", "1", padding=5000)
    whole.write_bytes(whole.read_bytes()[:300])
    assert not install(tmp_path / "wheels", tmp_path / "site")
    said = capfd.readouterr()
    assert "part-1-py3-none-any.whl" in said.out + said.err
    assert not (tmp_path / "site").exists()


def test_pip_is_not_looked_for_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setuptools gives up its ``distutils`` to a process that does, and ``torch.compile`` fails there from then on."""
    looked_for = []

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> None:
            looked_for.append(fullname)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    make_wheel(tmp_path / "wheels", "part", "1")
    assert install(tmp_path / "wheels", tmp_path / "site")
    assert "pip" not in looked_for


def test_a_wheel_for_another_python_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel(tmp_path / "wheels", "part", "1", tag="cp39-cp39-manylinux_2_28_x86_64")
    assert not install(tmp_path / "wheels", tmp_path / "site")
    assert "part-1-cp39-cp39-manylinux_2_28_x86_64.whl is not a supported wheel" in capfd.readouterr().err


def test_what_wheels_put_aside_for_the_library_folders_is_unpacked_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_pip_is_here", lambda: False)
    with zipfile.ZipFile(make_wheel(tmp_path / "wheels", "part", "1"), "a") as archive:
        archive.writestr("part-1.data/platlib/inner/deep.py", "A = 1\n")
        archive.writestr("part-1.data/purelib/flat.py", "B = 1\n")
    assert install(tmp_path / "wheels", tmp_path / "site")
    assert (tmp_path / "site" / "inner" / "deep.py").is_file()
    assert (tmp_path / "site" / "flat.py").is_file()


def test_without_wheels_it_says_what_is_missing_and_what_makes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tools.gpu.needs.MODULES", {"rich": "rich", "some-part": "some_part", "inner": "absent.inner"})
    assert not install(tmp_path / "wheels", tmp_path / "site")
    said = capfd.readouterr().out
    assert "missing: some-part, inner\n" in said
    assert f"no wheels in {tmp_path / 'wheels'}; make them with tools/gpu/wheels.sh" in said


def test_without_wheels_nothing_is_done_where_nothing_is_missing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert install(tmp_path / "wheels", tmp_path / "site")
    assert "nothing is missing" in capfd.readouterr().out
    assert not (tmp_path / "site").exists()


def test_nothing_is_installed_beside_varl_itself_and_what_an_earlier_machine_left_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_varl_is_installed", lambda: True)
    make_wheel(tmp_path / "wheels", "part", "1", tag="cp39-cp39-manylinux_2_28_x86_64")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "part.py").write_text("of another Python")
    assert install(tmp_path / "wheels", tmp_path / "site")
    assert not (tmp_path / "site").exists()
