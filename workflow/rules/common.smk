# What all rules share: where results go, and what a stage gets of the configuration.
import json
from pathlib import Path

from moa import stages
from moa.config import load, resolve
from moa.data.sources import celeba, listing
from moa.data.sources.celeba import SubjectsConfig
from moa.data.sources.config import KINDS as PHOTO_SOURCES, PhotosConfig
from moa.hashing import code_hash
from moa.trained import PER_SUBJECT, TRAINED
from moa.training.operational import OPERATIONAL

CONFIG = resolve(config)
OUT = CONFIG["output"]
SEEDS = stages.train_seeds(CONFIG)  # of trainings: addition to their names: changes
TRIED = {grid: CONFIG.get(grid, {}) for grid in ("tuning", "ablations")}  # grid: method: trial: changes
TRIALS = {grid: [(m, name) for m, names in TRIED[grid].items() for name in names] for grid in TRIED}
TRIAL = f"{OUT}/{{grid}}/{{method}}/{{trial}}"
WANTED = {"tuning": ("single", "swap"), "ablations": ("single", "multi", "swap")}  # grid: kinds of images
GPU = int(CONFIG["device"] != "cpu")
PROCESSES = CONFIG.get("processes", 1)  # of a training, each with a GPU
TAKEN_IN = CONFIG["source"] in PHOTO_SOURCES
PASSED = [f"{OUT}/data/{name}" for name in ("photos.checked", "quarantine.passed")] if TAKEN_IN else []
PASSED += [f"{OUT}/models.passed"]
EARLIER_PRIOR = "results/earlier_prior"  # rule earlier_prior
FACENET, LPIPS = (stages.weights(CONFIG, role) for role in ("identity", "lpips"))  # files; models.smk
WEIGHED = ancient(f"{OUT}/models.checked")  # before a GPU is used; models.smk
LPIPS_GPU = GPU if LPIPS else 0  # comparisons use no other model


wildcard_constraints:
    split="train|validation|test",
    shard=r"\d{3}",
    method="|".join({"prior", "moa", "fastcomposer", *CONFIG["methods"]}),
    seed=f"(?:{'|'.join(SEEDS)})",  # also of the empty one
    grid="|".join(TRIED),
    trial=stages.TRIAL_NAME,
    kind=r"\w+",


def settings(stage, **fixed):
    """A stage's settings as JSON: a job runs again if, and only if, one of them changes."""
    return lambda wildcards: json.dumps(
        stages.read_settings(stage, CONFIG, **{**dict(wildcards.items()), **fixed}), sort_keys=True
    )


def training(wildcards):
    """The settings of a training: with one of `train_seeds`, or of a trial."""
    stage = f"train-{wildcards.method}"
    if "trial" in wildcards.keys():
        return stages.settings(stage, trial_config(wildcards))
    return stages.settings(stage, CONFIG) | SEEDS[wildcards.seed]


def trains(wildcards):
    """Those settings of a training, as JSON, that decide on what comes out."""
    chosen = training(wildcards)
    return json.dumps({key: chosen[key] for key in chosen if key not in OPERATIONAL}, sort_keys=True)


# Snakemake takes a parameter that depends on `threads` for no reason to run a job again.
def works(wildcards, threads):
    """The other settings of a training, as JSON: a finished one stays when they change."""
    chosen = training(wildcards)
    return json.dumps({key: chosen[key] for key in chosen if key in OPERATIONAL}, sort_keys=True)


def launch(wildcards, threads):
    """What stands between `python -m` and the package: Accelerate's launcher, if a training has several processes."""
    if PROCESSES == 1:
        return ""
    about = "--multi_gpu --main_process_port 0 --mixed_precision no --dynamo_backend no"
    return f"accelerate.commands.launch --num_processes {PROCESSES} {about} -m "


def code(stage):
    """A hash of the modules that a stage uses: a job runs again when one of them changes."""
    return lambda wildcards: stages.code(stage)


def models(*roles):
    """The files of models that lie in local folders; models from the hub are pinned by their revision."""
    return lambda wildcards: model_inputs(CONFIG, roles)


def model_inputs(config, roles):
    """The files of the models that play `roles`; those of the earlier prior are a rule's, there or not."""
    earlier = lambda role: config["models"][role].get("id") == EARLIER_PRIOR
    files = [
        rules.earlier_prior.output if earlier(role) else stages.model_files(config, role) for role in roles
    ]
    return [file for some in files for file in some]


def shards(folder, split):
    """All shards of a split in one of the data folders."""
    return [f"{OUT}/data/{folder}/{split}-{n:03d}.parquet" for n in range(stages.shards(CONFIG, split))]


def all_shards(folder, *splits):
    """As `shards` of several splits, as `python -m moa` takes them in a word: a shell takes no line of 2,000 paths."""
    last = {split: stages.shards(CONFIG, split) - 1 for split in splits}
    return lambda wildcards: " ".join(
        f"'{OUT}/data/{folder}/{split}-{{000..{n:03d}}}.parquet'" for split, n in last.items()
    )


def stamp(wildcards):
    """What changes when a file behind a shard of photos does; without a shard, when any of them does."""
    source = load(PhotosConfig, stages.settings("photos", CONFIG), "data.photos")
    counts = {split: stages.shards(CONFIG, split) for split in ("train", "validation")}
    shard = (wildcards.split, int(wildcards.shard)) if "shard" in wildcards.keys() else ()
    return listing.stamp(source, counts, *shard)


def subjects_stamp(wildcards):
    """What changes when the photo of a test subject does."""
    chosen = load(SubjectsConfig, stages.settings("celeba-subjects", CONFIG), "data.subjects.test")
    return celeba.stamp(stages.subjects(CONFIG), chosen)


def workers(stage):
    """Threads of a stage that looks at photos: one for the model, and those that decode and resize ahead of it."""
    return 1 + CONFIG["data"].get(stage, {}).get("workers", 0)


def results(wildcards):
    """The folder that everything of a run lies in."""
    return OUT


def parts(kind, *folder):
    """The shards of a kind of requests, or of what a method made of them, below a folder."""
    return [f"{'/'.join([OUT, *folder])}/test-{kind}-{n:03d}.parquet" for n in range(CONFIG["shards"][kind])]


def subject_photos(wildcards):
    """The subjects' photos that a method is shown: partly hidden ones for the kind `occluded`."""
    occluded = "-occluded" if wildcards.kind == "occluded" else ""
    return f"{OUT}/subjects/{wildcards.split}{occluded}.parquet"


def option(name, values):
    """An option of a stage with its values; nothing if there are none."""
    values = list(values)
    return " ".join([name, *values]) if values else ""


def trial_config(wildcards):
    """The configuration of a trial."""
    return stages.trial(CONFIG, wildcards.grid, wildcards.method, wildcards.trial)


def trial_models(*roles):
    """The files of a trial's models that lie in local folders."""
    return lambda wildcards: model_inputs(trial_config(wildcards), roles)


def trial_settings(stage):
    """A stage's settings in a trial, as JSON."""
    return lambda wildcards: json.dumps(stages.settings(stage, trial_config(wildcards)), sort_keys=True)


def trial_training(wildcards):
    """The folder of a trial's weights; none for the prior."""
    grid, method, trial = wildcards.grid, wildcards.method, wildcards.trial
    if method not in TRAINED:
        return []
    changed = stages.changes(CONFIG, grid, method, trial)
    if not changed.get("train") and not changed.get("models"):
        return f"{OUT}/train/{method}"
    first = stages.first_alike(CONFIG, grid, method, trial, "train", "models")
    return f"{OUT}/{grid}/{method}/{first}/{method}"


def trial_requests(wildcards):
    """What is asked of every trial of a grid."""
    known = stages.kinds(CONFIG, "validation")
    return [
        f"{OUT}/requests/validation-{kind}-000.parquet" for kind in WANTED[wildcards.grid] if kind in known
    ]


def trial_prior(file):
    """A file of the prior's images that a trial is compared with."""
    return lambda wildcards: (
        f"{OUT}/{wildcards.grid}/prior/"
        f"{stages.prior_trial(CONFIG, wildcards.grid, wildcards.method, wildcards.trial)}/{file}"
    )


def trial_folder(wildcards):
    """The folder of a trial."""
    return TRIAL.format(**wildcards)
