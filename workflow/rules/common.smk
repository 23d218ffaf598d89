# What all rules share: where results go, and what a stage gets of the configuration.
import json
from pathlib import Path

from moa import stages
from moa.config import load, resolve
from moa.data.sources import celeba, listing
from moa.data.sources.celeba import SubjectsConfig
from moa.data.sources.config import KINDS as PHOTO_SOURCES, PhotosConfig
from moa.hashing import code_hash
from moa.trained import TRAINED

CONFIG = resolve(config)
OUT = CONFIG["output"]
TUNING = CONFIG.get("tuning", {})  # method: trial: changes
GPU = int(CONFIG["device"] != "cpu")


wildcard_constraints:
    split="train|validation|test",
    shard=r"\d{3}",
    method="|".join({"moa", "fastcomposer", *CONFIG["methods"]}),
    kind=r"\w+",


def settings(stage, **fixed):
    """A stage's settings as JSON: a job runs again if, and only if, one of them changes."""
    return lambda wildcards: json.dumps(
        stages.settings(stage, CONFIG, **{**dict(wildcards.items()), **fixed}), sort_keys=True
    )


def code(stage):
    """A hash of the modules that a stage uses: a job runs again when one of them changes."""
    return lambda wildcards: stages.code(stage)


def models(*roles):
    """The files of models that lie in local folders; models from the hub are pinned by their revision."""
    return lambda wildcards: [file for role in roles for file in stages.model_files(CONFIG, role)]


def shards(folder, split):
    """All shards of a split in one of the data folders."""
    return [f"{OUT}/data/{folder}/{split}-{n:03d}.parquet" for n in range(stages.shards(CONFIG, split))]


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


def option(name, values):
    """An option of a stage with its values; nothing if there are none."""
    return " ".join([name, *values]) if values else ""


def changes(method, trial, section):
    """What a trial changes of `train` or `sampling`."""
    return TUNING[method][trial].get(section, {})


def training_of(method, trial):
    """The folder of a trial's weights: the main training's, or that of the first trial with the same changes."""
    wanted = changes(method, trial, "train")
    if not wanted:
        return f"{OUT}/train/{method}"
    first = next(name for name in TUNING[method] if changes(method, name, "train") == wanted)
    return f"{OUT}/tuning/{method}/{first}/{method}"
