"""What the command line says of each option of a stage.

It is the option's line below `Args` in the docstring of the stage's function. Where there is none, it stands
here: those are modules that data, trainings or images are made with, and a changed docstring counts as a
change of the module, after which all of them would be made again.

    summary(function)                     what a stage does
    help_of(stage, function, option)      what its option is
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

# option: help, in every stage that has neither its own below nor a docstring that says it
COMMON = {
    "split": "which part of the photos.",
    "shard": "number of the shard, from 0.",
    "shards": "how many shards there are.",
    "raw": "parquet file with the photos of a shard.",
    "captions": "parquet file that the `caption` stage wrote.",
    "segments": "parquet file that the `segment` stage wrote.",
    "records": "parquet files of training records.",
    "rejected": "parquet file to write: the photos that became no record, each with its reason.",
    "subjects": "the split's subjects file.",
    "index": "parquet file of the `lock-photos` stage, one row a photo.",
    "protocol": "YAML file with subjects, prompts and images, as in config/protocol/.",
    "weights": "folder that holds a folder for each of the miniature's models.",
    "cache": "folder that keeps rendered scenes from one call to the next.",
}

TRAINING = {
    "records": "shards of training records, parquet files.",
    "subjects": "parquet file of the subjects that the validation grids show.",
    "output": "folder to make; replaced when it is there.",
    "checkpoints": "folder of checkpoint folders; by default `.checkpoints` beside the parent of `output`.",
    "resume": "`latest` goes on from the newest checkpoint of the same training, or begins it; `none` begins "
    "anew; the path of a checkpoint goes on from that one, whatever settings it was made with.",
    "keep_checkpoints": "leave the last checkpoints where they are, for another training to go on from.",
}

PARTS = {
    "vae": "folder of the trained autoencoder.",
    "decoder": "folder of the autoencoder with its decoder trained further.",
    "clip": "folder of the trained CLIP.",
    "unet": "folder of the trained U-Net.",
    "details": "folder of the U-Net after its second training.",
    "finish": "folder of the U-Net after its third training.",
    "text": "folder of the trained text tower.",
    "polish": "folder of the U-Net after its fourth training.",
    "props": "folder of the U-Net after its last training.",
    "props_decoder": "folder of the autoencoder with its decoder trained further still.",
}

# stage: option: help
OWN: dict[str, dict[str, str]] = {
    "render": {
        "split": "train or validation.",
        "raw": "parquet file of photos to write.",
        "truth": "parquet file to write: what was drawn in each photo, to measure annotators against.",
    },
    "render-subjects": {
        "split": "validation or test.",
        "output": "parquet file of subjects to write, a photo each.",
        "occluded": "hold something before the subject's face or chest.",
    },
    "quarantine": {
        "quarantined": "parquet files that the `photos` stage wrote, of all shards.",
        "output": "CSV file to write.",
    },
    "held-out-subjects": {
        "records": "parquet files of records of the validation split.",
        "output": "parquet file of subjects to write.",
    },
    "archive-records": {
        "root": "folder of FastComposer's archive, unpacked.",
        "lock": "the archive's lock, which the `lock-photos` stage wrote.",
        "records": "parquet file of training records to write.",
        "archived": "parquet file to write: the archive's own annotation and mask of every photo.",
    },
    "export-archive": {"output": "folder to write the archive to; one that is there already is an error."},
    "restore-archive": {
        "raw": "parquet files that the `photos` stage wrote.",
        "archived": "parquet files of the `archive-records` stage, of the same photos.",
        "output": "folder to write the archive to; one that is there already is an error.",
    },
    "caption": {
        "raw": "parquet files with photos, one a shard.",
        "output": "parquet files to write, one for each of `raw`: a caption a photo.",
    },
    "segment": {
        "raw": "parquet files with photos, one a shard.",
        "output": "parquet files to write, one for each of `raw`: the masks of each photo's people.",
    },
    "align": {
        "records": "parquet file of training records to write.",
        "phrases": "parquet file to write: the phrases for people that were read in each caption.",
    },
    "card": {
        "rejected": "parquet files of the photos that became no record.",
        "json_path": "JSON file of the card to write.",
        "markdown": "the same as Markdown.",
        "sheet": "PNG file to write: photos with masks and captions, to look at.",
        "quarantined": "parquet files of the photos that were put aside before, if the source has any.",
        "phrases": "parquet files of the phrases that were read in the captions, which name the parser.",
    },
    "annotation": {
        "raw": "parquet files of photos that the `render` stage wrote.",
        "truth": "parquet files that the `render` stage wrote with the photos.",
        "captions": "parquet files of the `caption` stage, of the same photos.",
        "segments": "parquet files of the `segment` stage, of the same photos.",
        "records": "parquet files of the `align` stage, of the same photos.",
        "train": "truth of the photos for training, with which these may share nobody.",
        "output": "CSV file to write.",
    },
    "train-moa": TRAINING,
    "train-fastcomposer": TRAINING,
    "train-textual_inversion": {
        "shard": "number of the shard of subjects, from 0.",
        "shards": "how many shards the subjects are split into.",
    },
    "join-textual_inversion": {
        "parts": "folders that `train-textual_inversion` made, of all shards.",
        "output": "folder to make.",
    },
    "plan": {
        "split": "validation or test.",
        "kind": "of images, as the protocol calls it: single, multi, swap, ...",
        "output": "parquet file of requests to write.",
    },
    "router-table": {
        "rows": "parquet file of rows that the `router` stage wrote.",
        "output": "table to write; its ending says the format: .csv, .md or .tex.",
        "timesteps": "likewise the table by timestep.",
    },
    "merge": {"parts": "samples files of the `score` stage.", "output": "parquet file to write."},
    "tables": {"output": "folder to write the tables to."},
    "gates": {
        "output": "CSV file to write, one row a measure.",
        "samples": "PNG file to write: pictures of the prior.",
    },
    "pretrain": {part: PARTS[part] for part in PARTS if part not in ("props", "props_decoder")}
    | {
        "model": "which model to train.",
        "output": "folder of the model to make.",
        "checkpoints": "folder of the training's state, from which a killed run goes on.",
    },
    "assemble": PARTS | {"prior": "folder of the prior to make, in diffusers' layout."},
    "benchmark-unet": {"output": "CSV file to write."},
    "benchmark-data": {"output": "CSV file to write."},
    "benchmark-scoring": {"output": "CSV file to write."},
}


def summary(function: Callable[..., Any]) -> str:
    """What a docstring says, without the part on parameters, which stands beside the options."""
    text = inspect.getdoc(function) or ""
    return re.sub(r"\n*^Args:\n(?: {4}.*\n?)+", "\n", text, flags=re.M).strip()


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says below `Args`, by parameter; "rows, prompts: …" is said of both."""
    lines = (inspect.getdoc(function) or "").splitlines()
    if "Args:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Args:") + 1 :]:
        if not line.startswith("    "):
            break
        if entry := re.fullmatch(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def help_of(stage: str, function: Callable[..., Any], option: str) -> str:
    """The help of one option of a stage; empty if nothing is said of it anywhere."""
    return (COMMON | OWN.get(stage, {}) | documented(function)).get(option, "")
