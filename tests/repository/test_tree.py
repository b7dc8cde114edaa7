"""What the tree must look like for packaging, for pytest and for a reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"nsa_dist": ROOT / "nsa_dist", "nsa_kernels": ROOT / "kernels" / "nsa_kernels"}


OWN_SETS = {"torchtitan": "constraints-torchtitan.txt"}
"""Extras that cannot be installed beside the others."""


def _pins(file: str) -> dict[str, list[str]]:
    """Pinned versions by distribution; more than one where they depend on the Python version."""
    pins: dict[str, list[str]] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9a-z.]+)(; python_version (<|>=) '3\.11')?", line)
        assert match, f"{file}: {line!r} is not a pin"
        pins.setdefault(match[1], []).append(match[2])
    return pins


def test_kernels_is_a_source_root_and_no_package() -> None:
    """A top-level package `kernels` would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/*.py")} == {"nsa_kernels"}


def test_pytest_collects_every_test_folder() -> None:
    """pytest skips `dist` and `build` without a word; `kernels` would be the shadow again."""
    names = {path.name for path in (ROOT / "tests").rglob("*") if path.is_dir()}
    assert not names & {"dist", "build", "venv", "node_modules", "kernels"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_folder_of_a_package_is_packaged(package: str) -> None:
    """setuptools leaves out a folder without __init__.py."""
    folders = {path.parent for path in PACKAGES[package].rglob("*.py")}
    assert {str(folder) for folder in folders if not (folder / "__init__.py").exists()} == set()
    assert (PACKAGES[package] / "py.typed").exists()


def test_programs_stay_out_of_the_wheel() -> None:
    setuptools = pytest.importorskip("setuptools")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    find = tomllib.loads(text)["tool"]["setuptools"]["packages"]["find"]
    packages = [
        name
        for where in find["where"]
        for name in setuptools.find_namespace_packages(str(ROOT / where), include=find["include"])
    ]
    assert {name.split(".")[0] for name in packages} == set(PACKAGES)


def test_every_kernel_has_its_test() -> None:
    kernels = (PACKAGES["nsa_kernels"] / "pytorch").glob("[!_]*.py")
    expected = {f"test_{path.name}" for path in kernels}
    assert expected
    assert expected - {path.name for path in (ROOT / "tests" / "ops").glob("test_*.py")} == set()


@pytest.mark.parametrize("file", ["constraints.txt", *OWN_SETS.values()])
def test_constraints_pin_every_requirement(file: str) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for name, extra in project["optional-dependencies"].items():
        if OWN_SETS.get(name, "constraints.txt") == file:
            wanted += extra
    pins = _pins(file)
    for requirement in map(requirements.Requirement, wanted):
        assert requirement.name in pins
        for version in pins[requirement.name]:
            assert requirement.specifier.contains(version), f"{requirement}: pinned {version}"
