"""The versions that are tested satisfy every conda environment, the package's bounds and the lock files."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


# --- What the environments lack ---------------------------------------------------------------------------

ALONE = """
import json, sys
from importlib.machinery import PathFinder
from moa import __main__ as command_line
lacking, stages, commands = json.loads(sys.argv[1])
class Held:
    finders = list(sys.meta_path)
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return None if name.split(".")[0] in lacking else next(filter(None, found), None)
sys.meta_path[:] = [Held()]
for stage in stages:
    command_line._function(stage)
for command in commands:
    command_line.run(command)
"""


def lacking(path: Path) -> list[str]:
    """Importable names that are installed here, and that an environment has not, not even as a dependency."""
    entries = yaml.safe_load(path.read_text())["dependencies"]
    lines = [line for e in entries for line in (e["pip"] if isinstance(e, dict) else [e])]
    todo, held = [re.split(r"[ <>=]", line)[0] for line in lines], {"moa"}
    while todo:
        name = canonicalize_name(todo.pop())
        if name in held:
            continue
        held.add(name)
        try:
            needs = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # python; or what this machine does not need
            continue
        todo += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    owners = packages_distributions()
    ours = canonicalize_name(owners["moa"][0]) if "moa" in owners else "moa"
    return [
        name for name, own in owners.items() if not ({canonicalize_name(o) for o in own} & (held | {ours}))
    ]


def rules() -> Iterator[tuple[str, str]]:
    """Name and text of every rule; one that is `used as` another has that text, too, its own behind."""
    texts: dict[str, str] = {}
    written = "\n".join(file.read_text() for file in sorted((ROOT / "workflow/rules").glob("*.smk")))
    for used, text in re.findall(r"^ *(use )?rule (.*?)(?=^ *(?:use )?rule |\Z)", written, re.M | re.S):
        names = re.findall(r"\w+", text.split(":")[0])  # of `old as new with`: both
        texts[names[2 if used else 0]] = (texts[names[0]] if used else "") + text
    yield from texts.items()


def stages_of(rule: str) -> set[str]:
    """Stages that a rule calls; `{…}` in their names stands for each that there is."""
    from moa.stages import STAGES

    called = re.findall(r"python -m (?:\{params\.launch\})?moa ([\w{}.-]+)", rule)
    patterns = [re.sub(r"\{[^}]*\}", r"\\w+", name) for name in called]
    return {name for name in STAGES for pattern in patterns if re.fullmatch(pattern, name)}


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_stages_start_with_what_their_environment_holds(path: Path, tmp_path: Path) -> None:
    """Those that draw also run: some imports are put off until then."""
    stages = {stage for _, rule in rules() if f"envs/{path.name}" in rule for stage in stages_of(rule)}
    gone = lacking(path)
    assert "snakemake" in gone and "numpy" not in gone
    settings = json.dumps({"train": 1, "validation": 1, "shard_size": 1, "subjects_validation": 1})
    to = [str(tmp_path / name) for name in ("raw", "truth", "subjects")]
    commands = {
        "render": ["--split", "train", "--shard", "0", "--raw", to[0], "--truth", to[1]],
        "render-subjects": ["--split", "validation", "--output", to[2]],
    }
    drawn = [[name, "--config", settings, *options] for name, options in commands.items() if name in stages]
    assert len(drawn) == (2 if path.stem == "miniature" else 0)
    assert stages == set(commands) if path.stem == "miniature" else len(stages) > 30
    argument = json.dumps([gone, sorted(stages), drawn])
    command = [sys.executable, "-c", ALONE, argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- What a cluster gives them ----------------------------------------------------------------------------


def test_a_cluster_gives_every_rule_that_loads_models_what_the_paper_preset_needs() -> None:
    """What rules ask for themselves is the miniature's need, and comes before a profile's defaults."""
    from moa.stages import STAGES

    def loads_models(rule: str) -> bool:
        keys = [
            key
            for stage in stages_of(rule)
            for key in (STAGES[stage].section, *STAGES[stage].shared.values())
        ]
        local = "localrule: True" in rule  # it does not go to the cluster
        return "gpu=" in rule or (not local and any(key.startswith("models.") for key in keys))

    needy = {name for name, rule in rules() if loads_models(rule)}
    assert needy >= {"caption", "align", "train", "trial_train", "trial_score", "learn_subjects", "benchmark"}
    profile = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())
    given = profile["set-resources"]
    assert sorted(given) == sorted({*needy, "photos", "measure"})  # which load none, but hold a lot
    for name, resources in given.items():
        own = max(map(int, re.findall(r"mem_mb=(\d+)", dict(rules())[name])))
        assert (
            resources["mem_mb"] > own and resources["runtime"] >= profile["default-resources"]["runtime"]
        ), name
    assert given["trial_train"] == given["train"]


def test_rules_that_run_a_stage_have_a_log_a_code_hash_and_a_benchmark_under_their_name() -> None:
    run = {name: rule for name, rule in rules() if re.search(r"python -m .*moa |notebook:", rule)}
    assert len(run) > 50
    for name, rule in run.items():
        assert "log:" in rule and "benchmark:" in rule and "code=" in rule, name
        for path in re.findall(r"\{OUT\}/benchmarks/(.+)", rule)[-1:]:  # of a used rule, its own
            assert re.split(r"/|\.tsv", path)[0] == name
