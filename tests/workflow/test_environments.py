"""The versions that are tested satisfy every conda environment, the package's bounds and the lock files."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from moa.hashing import ROOT

ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))
LOCKS = (ROOT / "requirements.lock", ROOT / "requirements-test.lock")


def installed(name: str) -> str:
    return platform.python_version() if name == "python" else version(name)


def locked() -> list[Requirement]:
    lines = [line for path in LOCKS for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if "==" in line]


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_conda_environments_hold_the_tested_versions(path: Path) -> None:
    from rattler import MatchSpec, Version, VersionSpec

    environment = yaml.safe_load(path.read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    specs = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    for spec in map(MatchSpec, specs):
        name = spec.name.normalized if hasattr(spec.name, "normalized") else str(spec.name)
        if name == "pip":
            continue
        assert spec.version, f"{path.name}: {name} has no version"
        bound = VersionSpec(str(spec.version))
        assert bound.matches(Version(installed(name))), (
            f"{path.name}: {name} {installed(name)} is outside {bound}"
        )


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_pip_parts_of_conda_environments_hold_the_tested_versions(path: Path) -> None:
    environment = yaml.safe_load(path.read_text())
    lines = [
        line for entry in environment["dependencies"] if isinstance(entry, dict) for line in entry["pip"]
    ]
    assert lines
    for need in map(Requirement, lines):
        assert need.specifier, f"{path.name}: {need.name} has no version"
        assert need.specifier.contains(version(need.name)), f"{path.name}: {need.name}"


def test_locks_are_what_is_tested() -> None:
    for need in locked():
        if need.marker is None or need.marker.evaluate():
            assert need.specifier.contains(version(need.name)), f"{need}; installed: {version(need.name)}"


def test_locks_hold_versions_only() -> None:
    for path in LOCKS:
        text = path.read_text()
        assert not re.search(r"https?:|--index-url|--find-links|@ ", text), f"{path.name} names a URL"


def test_locks_satisfy_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {need.name.lower().replace("_", "-"): str(need.specifier)[2:] for need in locked()}
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        need = Requirement(line)
        assert need.specifier.contains(versions[need.name.lower().replace("_", "-")]), line
