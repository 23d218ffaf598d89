"""Settings: from YAML to frozen dataclasses. Unknown keys and wrong types are errors that name the key."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
DEFAULT = Path("config/miniature.yaml")


def read(path: str | Path) -> dict[str, Any]:
    """A configuration file, completed, with `{weights}` put in. Raises as `complete`."""
    return resolve(complete(_mapping(path)))


def _yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises ValueError naming the file if it is none."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def _mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file as it is. Raises ValueError naming the file if it is no mapping."""
    config = _yaml(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    return config


def read_list(path: str | Path) -> list[dict[str, Any]]:
    """A YAML file that is a list of mappings. Raises ValueError naming file and entry if it is not."""
    entries = _yaml(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of entries such as `- key: value`")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}[{n}] must be a mapping of keys to values, not {entry!r}")
    return entries


def complete(config: Mapping[str, Any], default: Path = DEFAULT) -> dict[str, Any]:
    """A configuration with the key `preset` as it is; one without it as changes to the default.

    Raises:
        FileNotFoundError, ValueError: the default is needed and is not there, or is no mapping.
    """
    if "preset" in config:
        return dict(config)
    if not default.is_file():
        raise FileNotFoundError(
            f"{default} is missing, which a configuration without the key `preset` changes: "
            "run from the project's folder, or write out a whole configuration"
        )
    return merge(_mapping(default), config)


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: mappings are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with `{weights}`, in any text, replaced by the value of the key `weights`."""

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{weights}", str(config.get("weights", "{weights}")))
        if isinstance(value, Mapping):
            return {key: replace(item) for key, item in value.items()}
        return [replace(item) for item in value] if isinstance(value, list) else value

    return replace(config)


def load(cls: type[T], mapping: Mapping[str, Any], key: str = "") -> T:
    """A dataclass from a mapping; `key` is where the mapping stands in the configuration.

    Raises:
        ValueError: an unknown, missing or mistyped key, named in full, or a value that the class refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{key or cls.__name__} must be a mapping of keys to values, not {mapping!r}")
    kinds = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    for name in mapping:
        if name not in known:
            raise ValueError(f"unknown key {_join(key, name)}; there are {', '.join(sorted(known))}")
    for name, entry in known.items():
        if name not in mapping and entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"missing key {_join(key, name)}")
    return cls(**{name: convert(kinds[name], value, _join(key, name)) for name, value in mapping.items()})


def convert(kind: Any, value: Any, key: str) -> Any:
    """`value`, as YAML or JSON gives it, as the annotated type. Raises ValueError naming `key`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first(arguments, value, key)
    if origin is Literal:
        return _check(value in arguments, value, key, "one of " + ", ".join(map(repr, arguments)))
    if is_dataclass(kind):
        return load(kind, value, key)  # type: ignore[arg-type]
    if kind is types.NoneType:
        return _check(value is None, value, key, "null")
    if kind is Path:
        return Path(_check(isinstance(value, str), value, key, "a path"))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _check(isinstance(value, Mapping), value, key, "a mapping")
        return {name: convert(arguments[1], item, _join(key, name)) for name, item in value.items()}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _sequence(origin, arguments, value, key)
    return _scalar(kind, value, key)


def _scalar(kind: Any, value: Any, key: str) -> Any:
    """A bool, int, float or str; whole numbers are numbers, but truth values are not."""
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    hint = "; write 1.0e-4, for 1e-4 is text in YAML" if kind is float and isinstance(value, str) else ""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return _check(fits, value, key, names.get(kind, str(kind)) + hint)


def _sequence(origin: type, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    """A tuple or list; `tuple[X, Y]` has exactly so many items."""
    _check(isinstance(value, Sequence) and not isinstance(value, str), value, key, "a list")
    fixed = origin is tuple and arguments[-1] is not Ellipsis
    if fixed:
        _check(len(value) == len(arguments), value, key, f"a list of {len(arguments)} items")
    items = [convert(arguments[i if fixed else 0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    return items if origin is list else tuple(items)


def _first(arms: Sequence[Any], value: Any, key: str) -> Any:
    """The value as the first alternative that it fits; if none, what the alternatives say."""
    problems = []
    for arm in arms:
        try:
            return convert(arm, value, key)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; or ".join(problems))


def _check(fits: bool, value: Any, key: str, wanted: str) -> Any:
    if not fits:
        raise ValueError(f"{key} must be {wanted}, not {value!r}")
    return value


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def check(config: Mapping[str, Any], schema: str | Path) -> None:
    """Check a whole configuration against its JSON schema. Raises ValueError naming the wrong keys."""
    import json

    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(json.loads(Path(schema).read_text(encoding="utf-8")))
    plain = json.loads(json.dumps(config))
    problems = sorted({_problem(error) for error in validator.iter_errors(plain)})
    if problems:
        raise ValueError("the configuration is wrong:\n  " + "\n  ".join(problems))


def _problem(error: Any) -> str:
    """One schema error in a line: the dotted key, and what is wrong with it."""
    key = ".".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        known = sorted(error.schema.get("properties", ()))
        unknown = sorted(set(error.instance) - set(known))
        return f"unknown key {_join(key, unknown[0])}; there are {', '.join(known)}"
    hint = "; write 1.0e-4, for 1e-4 is text in YAML" if error.validator_value == "number" else ""
    return f"{key or 'the file'}: {error.message}{hint if isinstance(error.instance, str) else ''}"
