"""The workflow as a user meets it: what would run, what is refused, and what happens after a SIGKILL."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from moa.config import merge
from moa.hashing import ROOT, file_hash
from tests.workflow.conftest import Run, start

pytestmark = pytest.mark.slow

MINIATURE = yaml.safe_load((ROOT / "config/miniature.yaml").read_text())


def jobs(said: str) -> dict[str, int]:
    """How many jobs each rule would have, of the table that a dry run prints."""
    return {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE)}


@pytest.mark.parametrize("preset", ["miniature", "paper"])
def test_dry_run(snakemake: Run, weights: Path, preset: str) -> None:
    arguments = ["--dry-run", "--quiet", "host", "reason"]
    changed = {"weights": str(weights)} if preset == "miniature" else None
    if preset == "paper":
        arguments += ["--configfile", "config/paper.yaml"]
    done = snakemake(*arguments, config=changed)
    assert done.returncode == 0, done.stderr
    planned = jobs(done.stdout)
    assert planned["train"] == 2  # moa and fastcomposer
    assert ("render" in planned) == (preset == "miniature")
    assert "results/benchmark" not in done.stdout + done.stderr


def test_the_benchmark_runs_alone_when_asked_for(snakemake: Run) -> None:
    done = snakemake("benchmark", "--dry-run", "--printshellcmds", config={"weights": "nowhere"})
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "results/benchmark/unet.csv" in said
    assert "python -m moa benchmark-unet --config" in said
    assert jobs(done.stdout) == {"benchmark": 1, "total": 1}


def test_wrong_key_stops_before_anything_runs(snakemake: Run) -> None:
    done = snakemake("--dry-run", config={"train": {"moa": {"learning_rate": 1}}})
    assert done.returncode == 1
    assert "unknown key train.moa.learning_rate" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("test", "kinds", "single", "images"), 0, "test.kinds.single.images must be a whole number"),
        (("validation", "kinds"), None, "validation.kinds must be a mapping"),
    ],
)
def test_wrong_protocol_stops_before_anything_runs(
    snakemake: Run, project: Path, key: tuple[str, ...], value: object, message: str
) -> None:
    protocol = yaml.safe_load((ROOT / MINIATURE["protocol"]).read_text())
    section = protocol
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = value
    (project / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    done = snakemake("--dry-run", config={"protocol": "protocol.yaml"})
    assert done.returncode == 1
    assert f"protocol.yaml: {message}" in done.stdout + done.stderr


def test_missing_weights_are_named(snakemake: Run) -> None:
    done = snakemake("--dry-run", config={"weights": "nowhere"})
    assert done.returncode == 1
    assert ".id: there is no model in nowhere/" in done.stdout + done.stderr
    assert "snakemake pretrain" in done.stdout + done.stderr


def test_tuning_trains_once_for_trials_that_sample_differently(snakemake: Run) -> None:
    """Every trial is generated and scored; only changes to `train` need a training of their own."""
    slow = {"train": {"lr": 1e-6}}
    added = {"slow": slow, "slow-guided": slow | {"sampling": {"guidance": 2.0}}}
    done = snakemake("--dry-run", "tune", config={"tuning": {"moa": added}})
    assert done.returncode == 0, done.stderr
    tuning = MINIATURE["tuning"]
    grid = [
        (method, t) for method in tuning for t in (tuning | {"moa": tuning["moa"] | added})[method].values()
    ]
    trained = {(method, json.dumps(trial["train"])) for method, trial in grid if "train" in trial}
    jobs = dict(re.findall(r"^(tun\w+|trial\w+) +(\d+)$", done.stdout, re.MULTILINE))
    each = dict.fromkeys(("trial_generate", "trial_score", "trial_kept"), str(len(grid)))
    assert jobs == each | {"tune": "1", "trial_train": str(len(trained)), "tuning_table": "1"}
    looked = re.findall(r"^look_at_references +(\d+)$", done.stdout, re.MULTILINE)
    assert set(looked) == {"1"}  # for all trials


def test_the_full_run_trains_generates_and_scores_what_its_configuration_says(snakemake: Run) -> None:
    """Two trainings of each method, one of each ablation that trains, and one set of the prior's images."""
    full = yaml.safe_load((ROOT / "config/full.yaml").read_text())
    assert full["methods"] == yaml.safe_load((ROOT / "tests/workflow/full.yaml").read_text())["methods"]
    arguments = ["full", "--dry-run", "--printshellcmds", "--configfile", "config/full.yaml"]
    done = snakemake(*arguments, "--set-threads", "train=1")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    jobs = {name: int(n) for name, n in re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE)}
    ablations = full["ablations"]["moa"].values()
    assert jobs["train"] == 2 * len(full["train_seeds"])
    other_priors = sum("models" in changes for changes in ablations)
    assert jobs["trial_train"] == sum("train" in changes for changes in ablations) + other_priors
    assert jobs["trial_generate"] == jobs["trial_score"] == len(ablations) + 1 + other_priors
    assert jobs["earlier_prior"] == other_priors == 1
    assert (
        jobs["look_at_references"] == 2
    )  # of the test subjects, and of those of validation for the ablations
    assert jobs["trial_preserved"] == len(ablations)
    assert "--output results/full/train/moa-seed-1 " in said
    assert "--folder fastcomposer-seed-1" in said
    assert "--trained results/full/train/moa --root results/full/ablations/moa/null-prior" in said
    assert "--ablations results/full/ablations/measures.parquet" in said
    command = "snakemake --cores all full --configfile config/full.yaml --set-threads train=1"
    assert f"--command '{command}'" in said
    wanted = [f"tables/{n}.{f}" for n in ("table3", "multi", "ablations", "cost", "claims", "seeds")
              for f in ("csv", "md", "tex")]  # fmt: skip
    assert [name for name in [*wanted, "made.json"] if f"results/full/{name}" not in said] == []
    assert not re.search(r"validation-\w+-000.*results/full/made/", said)


def test_a_training_of_several_processes_goes_through_the_launcher(snakemake: Run) -> None:
    told = {}
    for processes in (1, 2):
        config = {"processes": processes, "device": "cuda"}
        done = snakemake("results/miniature/train/moa", "--dry-run", "--printshellcmds", config=config)
        assert done.returncode == 0, done.stdout + done.stderr
        (told[processes],) = re.findall(r"^Shell command: (.*) train-moa ", done.stdout, re.MULTILINE)
    assert told[1] == "python -m moa"
    assert told[2].startswith("python -m accelerate.commands.launch --num_processes 2 --multi_gpu ")
    assert told[2].endswith(" -m moa")
    assert "gpu=GPU * PROCESSES," in (ROOT / "workflow/rules/train.smk").read_text()


EARLIER = "results/earlier_prior/model_index.json"


def has_history() -> bool:
    """Whether this is a clone with the commit that the earlier prior is taken from."""
    (commit,) = re.findall(r'commit="(\w{40})"', (ROOT / "workflow/rules/pretrain.smk").read_text())
    asked = ["git", "-C", str(ROOT), "cat-file", "-e", commit]
    return (ROOT / ".git").exists() and subprocess.run(asked, capture_output=True).returncode == 0


@pytest.mark.skipif(not has_history(), reason="the earlier prior is taken from the history")
def test_the_earlier_prior_is_taken_from_the_history(snakemake: Run, project: Path) -> None:
    (project / ".git").symlink_to(ROOT / ".git")
    done = snakemake("--cores", "1", "--", EARLIER)
    assert done.returncode == 0, done.stderr
    earlier, shipped = project / "results/earlier_prior", ROOT / "moa/miniature/weights/prior"
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (earlier / weights).stat().st_size == (shipped / weights).stat().st_size
    assert file_hash(earlier / weights) != file_hash(shipped / weights)
    assert "Nothing to be done" in snakemake("--cores", "1", "--", EARLIER).stderr


def test_without_the_history_the_earlier_prior_says_what_to_do(snakemake: Run, project: Path) -> None:
    assert snakemake("--cores", "1", "--", EARLIER).returncode == 1
    assert "git fetch --unshallow" in (project / "results/logs/earlier_prior.log").read_text()
    assert not (project / EARLIER).exists()


def test_ablations_of_the_paper_preset_are_asked_for_by_a_file_of_their_own(snakemake: Run) -> None:
    arguments = ["tables", "--dry-run", "--configfile", "config/paper.yaml"]
    assert "results/paper/ablations" not in snakemake(*arguments).stdout
    done = snakemake(*arguments, "config/paper_ablations.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "results/paper/tables/ablations.md" in done.stdout + done.stderr


def test_both_presets_have_the_ablations_of_the_papers_appendix() -> None:
    for name in ("full", "paper_ablations"):
        ablations = yaml.safe_load((ROOT / f"config/{name}.yaml").read_text())["ablations"]["moa"]
        assert {"no-moa-layer", "no-spacetime", "another-prior"} <= set(ablations), name


def test_a_wrong_ablation_stops_before_anything_runs(snakemake: Run) -> None:
    wrong = {"ablations": {"moa": {"default": {}, "odd": {"train": {"rooter": "none"}}}}}
    done = snakemake("--dry-run", config=wrong)
    assert done.returncode == 1
    assert "unknown key train.moa.rooter" in done.stdout + done.stderr


EVERY = MINIATURE["methods"]


@pytest.mark.parametrize(
    ("methods", "gone", "left"),
    [
        (
            {"fastcomposer": []},
            ["fastcomposer", "scores/shared"],
            ["figures/swap.png", "figures/router.png", "context.csv", "tables/claims.csv", "moa-preserved"],
        ),
        (
            {"prior": []},
            ["made/prior", "-preserved"],
            ["tables/claims.csv", "moa-measures", "main.csv", "scores/shared"],
        ),
        (
            {name: ["single", "multi"] for name in EVERY},
            ["test-swap", "context", "figures/swap"],
            ["figures/pairs.png", "tables/multi.csv", "made/ceiling/test-multi", "figures/router.png"],
        ),
        (
            {"moa": [], "moa_wrong_subject": []},
            ["train/moa", "router", "made/moa"],
            ["tables/main.csv", "figures/training.png", "tables/cost.csv", "tables/claims.csv"],
        ),
        (
            {name: [] for name in EVERY} | {"prior": ["swap"]},
            ["train/", "router", "main.csv", "differences", "scores.png", "test-single"],
            ["context.csv", "figures/swap.png", "tables/cost.csv"],
        ),
    ],
    ids=["no baseline", "no prior", "no swap", "no moa", "only the prior's swaps"],
)
def test_what_is_left_out_leaves_the_rest(
    snakemake: Run, weights: Path, methods: dict, gone: list[str], left: list[str]
) -> None:
    done = snakemake("--dry-run", config={"weights": str(weights), "methods": methods})
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert [name for name in ["report.html", "data/card.md", *left] if name not in said] == []
    assert [name for name in gone if name in said] == []


def test_the_methods_that_are_compared_over_the_same_pixels_are_configured(
    snakemake: Run, weights: Path
) -> None:
    changed = {"weights": str(weights), "rivals": ["ceiling", "moa"]}
    done = snakemake("tables", "--dry-run", "--printshellcmds", config=changed)
    assert done.returncode == 0, done.stdout + done.stderr
    [command] = re.findall(r"python -m moa compare-methods .*", done.stdout)
    assert "--made results/miniature/scores/ceiling.parquet results/miniature/scores/moa.parquet " in command


def test_without_a_method_that_trains_no_spread_over_trainings_is_promised(
    snakemake: Run, weights: Path
) -> None:
    """`tables` could not write it."""
    methods = {name: [] for name in EVERY} | {"prior": ["single"]}
    changed = {"weights": str(weights), "methods": methods, "train_seeds": [0, 1]}
    done = snakemake("--dry-run", "tables", config=changed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tables/main.csv" in done.stdout and "tables/seeds" not in done.stdout


def test_the_kind_occluded_is_made_from_hidden_photos_and_scored_against_others(
    snakemake: Run, weights: Path
) -> None:
    methods = {name: [] for name in EVERY} | {"moa": ["single", "occluded"]}
    done = snakemake("--dry-run", "--printshellcmds", config={"weights": str(weights), "methods": methods})
    assert done.returncode == 0, done.stdout + done.stderr
    hidden, free = "subjects/test-occluded.parquet", "subjects/test.parquet"
    commands = [line for line in done.stdout.splitlines() if "python -m moa" in line]

    def of(stage: str, kind: str = "") -> str:
        return next(line for line in commands if f"moa {stage} " in line and kind in line)

    assert hidden in of("generate-shard", "test-occluded") and free not in of(
        "generate-shard", "test-occluded"
    )
    assert free in of("generate-shard", "test-single") and hidden not in of("generate-shard", "test-single")
    assert free in of("score") and hidden not in of("score")
    drawn = [line for line in commands if "moa render-subjects " in line and "--split test" in line]
    assert sorted(("--occluded" in line, hidden in line) for line in drawn) == [(False, False), (True, True)]


def test_a_method_that_learns_each_subject_gets_every_table(snakemake: Run, weights: Path) -> None:
    methods = {name: [] for name in EVERY} | {"prior": ["single", "multi"]}
    methods |= {"textual_inversion": ["single", "multi"]}
    shards = MINIATURE["shards"] | {"subjects": 3}
    done = snakemake("--dry-run", config={"weights": str(weights), "methods": methods, "shards": shards})
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    assert (jobs["learn_subjects"], jobs["join_subjects"], jobs["score"]) == ("3", "1", "2")
    assert "train" not in jobs
    said = done.stdout + done.stderr
    wanted = ["learned/textual_inversion-002", "made/textual_inversion/test-multi-000.parquet", "main.csv"]
    wanted += ["textual_inversion-preserved.parquet", "textual_inversion-measures.parquet", "tables/cost.csv"]
    assert [name for name in wanted if name not in said] == []


def test_the_configuration_of_textual_inversion_trains_nothing_else(snakemake: Run) -> None:
    table = "results/textual_inversion/tables/main.md"
    done = snakemake("--dry-run", "--configfile", "config/textual_inversion.yaml", "--", table)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout, re.MULTILINE))
    assert (jobs["learn_subjects"], jobs["score"], "train" in jobs) == ("5", "2", False)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"photoshop": ["single"]}, "unknown key methods.photoshop"),
        ({"moa": ["swop"]}, "methods.moa: unknown kind"),
    ],
)
def test_unknown_methods_and_kinds_stop_before_anything_runs(
    snakemake: Run, methods: dict, message: str
) -> None:
    done = snakemake("--dry-run", config={"methods": methods})
    assert done.returncode == 1
    assert message in done.stdout + done.stderr


def test_what_a_job_does_not_read_makes_none_stale(snakemake: Run, project: Path) -> None:
    """Neither how a training works, nor how many other photos are drawn, undoes what is there; lr does."""
    config = {"output": "results/tiny", "render": {"train": 2, "validation": 2, "shard_size": 2}}
    out = project / "results/tiny"
    targets = ["data/raw/train-000.parquet", "subjects/validation.parquet", "train/moa"]
    for name in [*targets[:2], "data/truth/train-000.parquet", "data/records/train-000.parquet"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "models.checked").touch()
    (out / "train/moa").mkdir(parents=True)
    asked = [f"results/tiny/{name}" for name in targets]
    asked += ["--allowed-rules", "render", "render_subjects", "train"]
    done = snakemake(*asked, "--touch", "--cores", "1", "--forceall", config=config)
    assert done.returncode == 0, done.stdout + done.stderr

    def stale(**changes: dict) -> set[str]:
        done = snakemake(*asked, "--dry-run", config=merge(config, changes))
        assert done.returncode == 0, done.stdout + done.stderr
        return set(jobs(done.stdout)) - {"total"}

    work = {"workers": 1, "checkpoint_every": 7, "checkpoint_seconds": 9.0, "checkpoints_kept": 1}
    assert stale(render={"subjects_test": 16}, train={"moa": work}) == set()
    assert stale(models={"lpips": {"id": "alexnet.pth", "heads": "alex.pth"}}) == set()  # checked before it
    assert stale(render={"subjects_validation": 2}, train={"moa": {"lr": 1e-6}}) == {
        "render_subjects",
        "train",
    }


# --- SIGKILL ----------------------------------------------------------------------------------------------

PROTOCOL = {
    "name": "tiny",
    "validation": {"subjects": 1, "kinds": {"single": {"images": 1, "prompts": {"x": ["a {S} in blue"]}}}},
    "test": {
        "subjects": 4,
        "kinds": {
            "single": {"images": 3, "prompts": {"x": ["a {S} in a red hat", "a {S} in blue"]}},
            "swap": {"images": 1, "seed": "prompt", "prompts": {"x": ["a {S} in blue"]}},
        },
    },
}
SETTINGS = {
    "output": "results/tiny",
    "protocol": "protocol.yaml",
    "methods": {"moa": ["single", "swap"]} | {name: [] for name in EVERY if name != "moa"},
    "render": {"train": 12, "validation": 6, "shard_size": 12, "subjects_validation": 1, "subjects_test": 4},
    "train": {"moa": {"steps": 30, "batch_size": 4, "checkpoint_every": 5, "validate_every": 0}},
    "generate": {"sampling": {"steps": 6, "batch_size": 2}},
}
RECORDS = "results/tiny/data/records/train-000.parquet"
TRAINED, TABLE = "results/tiny/train/moa", "results/tiny/tables/main.csv"


def prepare(project: Path) -> None:
    """The configuration, and records to train on."""
    (project / "protocol.yaml").write_text(yaml.safe_dump(PROTOCOL))
    (project / "changes.yaml").write_text(yaml.safe_dump(SETTINGS))
    finish(project, RECORDS)


def kill_when(project: Path, pattern: str, count: int, seconds: float = 900) -> None:
    """SIGKILL the whole process group once `count` files match `pattern` below the results."""
    run, deadline = start(project, TABLE), time.monotonic() + seconds
    while len(list((project / "results/tiny").glob(pattern))) < count:
        assert run.poll() is None, (project / "snakemake.log").read_text()
        assert time.monotonic() < deadline, (project / "snakemake.log").read_text()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def finish(project: Path, target: str = TABLE) -> None:
    run = start(project, target)
    assert run.wait(timeout=900) == 0, (project / "snakemake.log").read_text()


def tables(project: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project / TABLE).parent.iterdir()}


def results(project: Path) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
    """Trained weights, and pixels of the images."""
    trained, images = project / TRAINED, project / "results/tiny/images"
    weights = {path.name: path.read_bytes() for path in trained.glob("*.safetensors")}
    pixels = {
        path.relative_to(images).as_posix(): np.asarray(Image.open(path))
        for path in images.rglob("[!.]*.png")
    }
    return weights, pixels


def test_the_same_command_goes_on_after_a_kill(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prepare(project)
    unbroken = tmp_path_factory.mktemp("unbroken") / "project"
    shutil.copytree(project, unbroken, symlinks=True)
    finish(unbroken)

    kill_when(project, ".checkpoints/*/step-*", 2)
    assert not (project / TRAINED).exists()
    assert list((project / ".snakemake/locks").iterdir()), "the killed run left no lock: nothing was tested"
    kill_when(project, "images/moa/test/single/*.png", 5)
    finish(project)

    (weights, images), (expected_weights, expected_images) = results(project), results(unbroken)
    assert weights
    assert weights == expected_weights
    assert len(images) == 4 * 2 * 3 + 4
    assert images.keys() == expected_images.keys()
    assert all(np.array_equal(images[name], expected_images[name]) for name in images)
    assert b"moa,measured,24," in tables(project)["main.csv"]
    assert tables(project).keys() >= {"main.md", "main.tex", "context.csv", "groups.csv"}
    assert tables(project) == tables(unbroken)

    again = start(project, TABLE)
    assert again.wait(timeout=300) == 0
    assert "Nothing to be done" in (project / "snakemake.log").read_text()
