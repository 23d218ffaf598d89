"""The JSON schema of the configuration, made from the stages' dataclasses: `python -m moa schema --output …`.

`workflow/schemas/config.schema.json` is its output, kept in git so that Snakemake can check a configuration
without importing torch; a test says when it is out of date.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moa.methods import method_names
from moa.stages import DEVICE, OPTIONAL, STAGES, TOP_LEVEL, Stage

Schema = dict[str, Any]
SCALARS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    Path: "string",
    types.NoneType: "null",
}


def of_type(kind: Any) -> Schema:
    """The schema of an annotated type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [of_type(arm) for arm in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if is_dataclass(kind):
        return of_dataclass(kind)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": of_type(arguments[1])}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return {"type": "array", "items": of_type(arguments[0])}
    return {"type": SCALARS[kind]}


def of_dataclass(kind: Any, without: Sequence[str] = ()) -> Schema:
    """The schema of a dataclass's fields, but for those that come from elsewhere."""
    kinds, entries = get_type_hints(kind), [entry for entry in fields(kind) if entry.name not in without]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {entry.name: of_type(kinds[entry.name]) for entry in entries},
        "required": [entry.name for entry in entries if _required(entry)],
    }


def _required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def settings_class(stage: Stage) -> Any:
    """The dataclass of a stage's settings; None if it has none."""
    module, name = stage.target.split(":")
    function = getattr(import_module(module), name)
    hints = get_type_hints(function)
    return next((hints[p] for p in signature(function).parameters if is_dataclass(hints.get(p))), None)


def _place(schema: Schema, section: str, part: Schema) -> None:
    """Put the schema of a section where its dotted key says; `{…}` stands for any name."""
    *parents, last = section.split(".")
    for key in parents:
        schema = schema["properties"].setdefault(
            key, {"type": "object", "additionalProperties": False, "properties": {}}
        )
    if last.startswith("{"):
        schema["additionalProperties"] = part
    else:
        schema["properties"][last] = part


def configuration() -> Schema:
    """The schema of a whole configuration file."""
    schema: Schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of the MoA workflow",
        "type": "object",
        "additionalProperties": False,
        "properties": json.loads(json.dumps(TOP_LEVEL)),
        "required": [key for key in TOP_LEVEL if key not in OPTIONAL],
    }
    for stage in STAGES.values():
        kind = settings_class(stage) if stage.section else None
        if kind is None:
            continue
        _place(schema, stage.section, of_dataclass(kind, (*stage.shared, *DEVICE)))
        for setting, key in stage.shared.items():
            if key.startswith("models."):
                _place(schema, key, of_dataclass(_dataclass(get_type_hints(kind)[setting])))
    for name in sorted(method_names()):
        _place(schema, f"methods.{name}", of_type(list[str]))
        schema["properties"]["rivals"]["items"]["enum"].append(name)
    schema["properties"]["models"]["required"] = list(schema["properties"]["models"]["properties"])
    return schema


def _dataclass(kind: Any) -> Any:
    """The dataclass in `X` or `X | None`."""
    return next(arm for arm in (kind, *get_args(kind)) if is_dataclass(arm))


def write(output: Path) -> None:
    """Write the schema to a file.

    Args:
        output: JSON file.
    """
    output.write_text(json.dumps(configuration(), indent=1) + "\n", encoding="utf-8")
