"""What a machine lacks, computed from made-up packages."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tools.gpu.closure import Missing, Target, Wheel, missing, read_installed

H100 = Target("3.12", "manylinux_2_28_x86_64")


class Index:
    """Made-up packages: requirements by ``name==version``; gives the newest in range."""

    def __init__(self, packages: dict[str, list[str]]) -> None:
        self.packages = {(name, Version(version)): requires for key, requires in packages.items()
                         for name, version in [key.split("==")]}  # fmt: skip

    def __call__(self, name: str, specifier: SpecifierSet) -> Wheel:
        fitting = [version for known, version in self.packages if known == name and version in specifier]
        if not fitting:
            raise Missing(f"no {name}{specifier}")
        return Wheel(name, max(fitting), tuple(self.packages[name, max(fitting)]), 10)


def lacking(
    requirements: list[str], installed: str, packages: dict[str, list[str]], target: Target = H100
) -> list[str]:
    found = missing(requirements, read_installed(installed), target, Index(packages))
    return sorted(f"{name}=={wheel.version}" for name, wheel in found.items())


def test_what_is_fetched_brings_what_it_requires_and_what_is_installed_counts_as_complete() -> None:
    packages = {"a==1": ["b>=2", "there"], "b==2": ["c"], "b==1": [], "c==1": ["a"]}
    assert lacking(["a", "there"], "there==1", packages) == ["a==1", "b==2", "c==1"]


def test_names_are_the_same_however_they_are_written() -> None:
    assert lacking(["Typing_Extensions", "Ruamel.YAML"], "typing.extensions\nruamel_yaml==1", {}) == []


@pytest.mark.parametrize(
    ("marker", "holds"),
    [
        ("python_version >= '3.12'", True),
        ("python_version < '3.12'", False),
        ("python_full_version < '3.12.1'", True),
        ("platform_machine == 'aarch64'", True),
        ("sys_platform == 'linux' and os_name == 'posix'", True),
        ("platform_system == 'Windows'", False),
        ("implementation_name == 'pypy'", False),
        ("extra == 'more'", False),
    ],
)
def test_markers_hold_for_the_machine_and_not_for_this_one(marker: str, holds: bool) -> None:
    target = Target("3.12", "manylinux_2_34_aarch64")
    found = lacking(["a"], "z", {"a==1": [f"b; {marker}"], "b==1": []}, target)
    assert found == (["a==1", "b==1"] if holds else ["a==1"])


def test_the_minor_version_of_python_is_compared_when_it_is_given() -> None:
    packages = {"a==1": ["b; python_full_version < '3.12.4'"], "b==1": []}
    assert lacking(["a"], "z", packages, Target("3.12.3", H100.platform)) == ["a==1", "b==1"]
    assert lacking(["a"], "z", packages, Target("3.12.4", H100.platform)) == ["a==1"]


def test_extras_bring_their_own_through_other_extras_whoever_asks_last() -> None:
    packages = {
        "a==1": ["plain", "a[inner]; extra == 'outer'", "deep; extra == 'inner'", "no; extra == 'other'"],
        "b==1": ["a[outer]"],
        "plain==1": [],
        "deep==1": [],
    }
    assert lacking(["a", "b"], "z", packages) == ["a==1", "b==1", "deep==1", "plain==1"]
    assert lacking(["a"], "z", packages) == ["a==1", "plain==1"]


def test_extras_that_several_ask_for_are_all_brought() -> None:
    packages = {
        "a==1": ["b[first]"],
        "b==1": ["one; extra == 'first'", "two; extra == 'second'"],
        "one==1": [],
        "two==1": [],
    }
    assert lacking(["a", "b[second]"], "z", packages) == ["a==1", "b==1", "one==1", "two==1"]
    assert lacking(["b[second]", "a"], "b==1", packages) == ["a==1", "one==1", "two==1"]
    assert lacking(["b[second]", "b"], "b==1", packages) == ["two==1"]


def test_extras_of_what_is_installed_are_fetched_and_the_rest_of_it_is_not() -> None:
    packages = {"a==1": ["plain", "deep; extra == 'more'"], "a==2": [], "deep==1": []}
    assert lacking(["a[more]>=1"], "a==1", packages) == ["deep==1"]
    assert lacking(["a>=1"], "a==1", packages) == []


def test_a_light_one_that_is_too_old_is_replaced_and_one_without_a_version_is_taken_as_it_is() -> None:
    packages = {"a==3": []}
    assert lacking(["a>=2"], "a==1.9", packages) == ["a==3"]
    assert lacking(["a>=2"], "a==2.0.1+local", packages) == []
    assert lacking(["a>=2"], "a", packages) == []


def test_a_requirement_of_something_fetched_can_make_an_installed_one_too_old() -> None:
    assert lacking(["a", "b"], "b==1", {"a==1": ["b>=2"], "b==2": []}) == ["a==1", "b==2"]


def test_one_version_of_each_is_carried_that_all_who_ask_accept() -> None:
    packages = {"a==1": ["c"], "b==1": ["c<2"], "c==1": [], "c==2": []}
    assert lacking(["a", "b"], "z", packages) == ["a==1", "b==1", "c==1"]


def test_what_only_a_version_needs_that_gave_way_is_not_carried() -> None:
    packages = {
        "a==1": ["d"],
        "c==1": [],
        "c==2": ["only-of-two"],
        "only-of-two==1": [],
        "d==1": ["e"],
        "e==1": ["c<2"],
    }
    assert lacking(["a", "c"], "z", packages) == ["a==1", "c==1", "d==1", "e==1"]


def test_ranges_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(Missing, match="no c<2,>=2"):
        lacking(["a", "b"], "z", {"a==1": ["c>=2"], "b==1": ["c<2"], "c==1": [], "c==2": []})


def test_packages_that_change_each_other_s_minds_end_in_a_refusal_that_names_them() -> None:
    calls = 0

    def fickle(name: str, specifier: SpecifierSet) -> Wheel:
        nonlocal calls
        calls += 1
        return Wheel(name, Version(str(calls)), (f"a!={calls - 1},!={calls}", "b"), 1)

    with pytest.raises(Missing, match="satisfy each other; asked for by several: a by varl"):
        missing(["a", "b"], read_installed("z"), H100, fickle)


@pytest.mark.parametrize(
    "name", ["opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv_contrib_python_headless"]
)
def test_any_distribution_of_opencv_counts(name: str) -> None:
    assert lacking(["ocr", "opencv-python-headless>=4.5"], f"{name}==4.9", {"ocr==1": ["opencv-python>=4.5"]}) == [
        "ocr==1"
    ]


def test_onnxruntime_for_gpus_counts_as_onnxruntime() -> None:
    assert lacking(["onnxruntime>=1.18"], "onnxruntime-gpu==1.20", {}) == []


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (
            "numpy",
            r"torch is not in the list of what is installed, and is too heavy to carry: asked for by varl",
        ),
        ("torch==2.8.1+cu126", r"torch 2.8.1\+cu126 is installed and is too heavy to replace, but is out of range"),
    ],
)
def test_heavy_ones_must_be_there(installed: str, message: str) -> None:
    with pytest.raises(Missing, match=message):
        lacking(["torch>=2.9"], installed, {"torch==2.9": ["nvidia-cublas"]})


def test_a_list_as_pip_prints_it() -> None:
    text = """# what is there
absl-py==2.1
Jinja2 @ file:///croot/jinja2_1/work   # built there
-e git+https://somewhere/x#egg=x
torch==2.11.0a0+gitabc

setuptools
weird===1.0
"""
    found = {name: version and str(version) for name, version in read_installed(text).items()}
    expected = {"absl-py": "2.1", "jinja2": None, "torch": "2.11.0a0+gitabc", "setuptools": None, "weird": "1.0"}
    assert found == expected


@pytest.mark.parametrize("line", ["torch 2.11.0", "torch>=2", "torch==two", "Package    Version"])
def test_lines_that_pip_freeze_does_not_print_are_named(line: str) -> None:
    with pytest.raises(Missing, match=r"installed\.txt, line 2: expected NAME or NAME==VERSION, got") as error:
        read_installed(f"numpy\n{line}\n", "installed.txt")
    assert repr(line) in str(error.value)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(Missing, match="names no package"):
        read_installed("# nothing\n")


def test_a_mark_of_the_encoding_is_no_name() -> None:
    assert list(read_installed("\ufeffnumpy==2.5\r\nrich\r\n")) == ["numpy", "rich"]


def test_a_machine_runs_wheels_for_older_libraries_of_its_processor() -> None:
    names = [tag.removesuffix("_x86_64") for tag in H100.platforms()]
    assert names[:2] == ["manylinux_2_28", "manylinux_2_27"]
    assert names[11:13] == ["manylinux_2_17", "manylinux2014"]
    assert names[-3:] == ["manylinux_2_5", "manylinux1", "linux"]
    assert set(names) >= {"manylinux_2_24", "manylinux_2_12", "manylinux2010"}
    assert len(names) == 24 + 3 + 1


@pytest.mark.parametrize(
    ("python", "platform", "message"),
    [("py312", H100.platform, "--python must be"), ("2.7", H100.platform, "--python"), ("3.12", "win32", "--platform")],
)
def test_machines_that_cannot_be_are_refused(python: str, platform: str, message: str) -> None:
    with pytest.raises(Missing, match=message):
        Target(python, platform)
