"""The stages of the workflow: what each runs, and which part of the configuration it gets.

The command line and the Snakemake rules both read this table, so a stage is wired in one place. A stage is a plain
function; its first parameter is its settings (a frozen dataclass), the others become options of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa.hashing import code_hash

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage."""

    target: str  # "module:function"
    help: str
    section: str = ""  # dotted key of its section; "{…}" is replaced by an option's value
    shared: Mapping[str, str] = field(
        default_factory=dict
    )  # setting: dotted key elsewhere in the configuration
    registers: tuple[str, ...] = ()  # modules that it uses without importing them by name

    @property
    def module(self) -> str:
        return self.target.split(":")[0]


STAGES: dict[str, Stage] = {
    "render": Stage("moa.miniature.dataset:run", "draw a shard of the miniature's photos", "render"),
    "render-subjects": Stage(
        "moa.miniature.dataset:run_subjects", "draw a photo of each evaluation subject", "render"
    ),
    "caption": Stage(
        "moa.data.caption:run",
        "caption a shard of photos",
        "data.caption",
        {"model": "models.captioner", "device": "device"},
    ),
    "segment": Stage(
        "moa.data.segment:run",
        "find the people in a shard of photos",
        "data.segment",
        {"model": "models.segmenter", "device": "device"},
    ),
    "align": Stage(
        "moa.data.align:run",
        "match captions' words with segments: training records",
        "data.align",
        {"tokenizer": "models.prior", "clip": "models.clip_judge"},
    ),
}


def get(config: Config, key: str) -> Any:
    """The value of a dotted key; KeyError naming the whole key if it is missing."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(f"the configuration lacks the key {key!r}")
        value = value[part]
    return value


def settings(name: str, config: Config, **options: str) -> dict[str, Any]:
    """The settings that stage `name` gets from the whole configuration, as JSON-able values."""
    stage = STAGES[name]
    section = dict(get(config, stage.section.format(**options))) if stage.section else {}
    return section | {setting: get(config, key.format(**options)) for setting, key in stage.shared.items()}


def code(name: str) -> str:
    """Hash of the modules that stage `name` uses."""
    stage = STAGES[name]
    return code_hash(stage.module, *stage.registers)


def model_files(config: Config, role: str) -> list[str]:
    """Files of the model that plays `role`, sorted; none for a model of the hub, whose revision is a setting.

    Raises FileNotFoundError naming the key if the model should lie in a folder and does not.
    """
    source = get(config, f"models.{role}.id")
    path = Path(source)
    if path.is_file():
        return [source]
    files = sorted(str(file) for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    if not files and source.count("/") != 1:
        raise FileNotFoundError(
            f"models.{role}.id: no model in the folder {source}; correct the key `weights`, or run "
            "`snakemake pretrain` and set `weights` to the folder that it fills"
        )
    return files
