"""`python -m moa <stage>`: a command line derived from the stages' signatures. The only place that prints."""

from __future__ import annotations

import argparse
import inspect
import json
import linecache
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moa import gpus, runlock
from moa.config import DEFAULT, check, load, read
from moa.hashing import ROOT
from moa.options import help_of, summary
from moa.stages import STAGES, settings

SCHEMA = ROOT / "workflow/schemas/config.schema.json"  # not there where only the package is installed


def _simple(kind: Any) -> Any:
    """The type of which an option's text becomes one: of `str | Path | None` and the like, the first."""
    if get_origin(kind) in (Union, types.UnionType):
        return _simple(next(arm for arm in get_args(kind) if arm is not types.NoneType))
    return kind


def _takes_files(kind: Any) -> bool:
    """Whether an option of this type is a list of paths, which Python's callers may also give as text."""
    kind = _simple(kind)
    origin = get_origin(kind)
    if not (isinstance(origin, type) and issubclass(origin, Sequence)):
        return False
    item = get_args(kind)[0]
    return Path in (item, *get_args(item))


def _help(said: str, default: Any) -> str:
    """An option's help, with its default as it would be typed; the text says what none stands for."""
    if default in (inspect.Parameter.empty, None, False, "", ()):
        return said.replace("%", "%%")
    typed = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{said} Default: {typed}.".replace("%", "%%")


def _add_option(parser: argparse.ArgumentParser, parameter: inspect.Parameter, kind: Any, said: str) -> None:
    """The option for one parameter of a stage, of which `said` is the help."""
    options: dict[str, Any] = {"required": parameter.default is parameter.empty}
    options["help"] = _help(said, parameter.default)
    if not options["required"]:
        options["default"] = parameter.default
    kind = _simple(kind)
    origin = get_origin(kind)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif origin is Literal:
        options["choices"] = get_args(kind)
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        options |= {"nargs": "+", "type": _simple(get_args(kind)[0])}
        if not options.get("default"):  # then it may be given several times
            options |= {"action": "extend", "default": []}
    else:
        options["type"] = kind
    parser.add_argument(f"--{parameter.name.replace('_', '-')}", dest=parameter.name, **options)


def _function(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A stage's function and the types of its parameters."""
    module, function = STAGES[name].target.split(":")
    stage = getattr(import_module(module), function)
    return stage, get_type_hints(stage)


def _load(text: str, name: str, kind: type, options: dict[str, Any], change: str = "{}") -> Any:
    """Settings of a stage, from its section as JSON or from a whole configuration file, with `change`."""
    from moa.machine import check_device

    values = {key: value for key, value in options.items() if isinstance(value, str)}
    given = _json("--config", text) if text.lstrip().startswith("{") else None
    mapping = settings(name, _read(text), **values) if given is None else given
    loaded: Any = load(kind, mapping | _json("--change", change), STAGES[name].section.format(**values))
    if getattr(loaded, "device", "cpu") == "cuda":
        gpus.take_one()
        check_device("cuda")
    return loaded


def _json(option: str, text: str) -> dict[str, Any]:
    """Settings that were typed behind an option. Raises ValueError naming it if they are no JSON object."""
    try:
        typed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: {text} is no JSON ({error})") from error
    if not isinstance(typed, dict):
        raise ValueError(f'{option} must be a JSON object such as {{"steps": 7}}, not {text}')
    return typed


def _read(path: str) -> dict[str, Any]:
    """A configuration file, checked whole: no stage would miss a mistyped section of another name."""
    config = read(path)
    if SCHEMA.is_file():
        check(config, SCHEMA)
    return config


def numbered(argument: str) -> list[str]:
    """What a file with `{000..139}` stands for: as many, numbered with as many digits, as in bash.

    The workflow writes its shards so, since a shell takes no line of thousands of paths. An option that takes
    one file, or a text, is left as it is.
    """
    found = re.fullmatch(r"([^{}]*)\{(\d+)\.\.(\d+)\}([^{}]*)", argument)
    if not found:
        return [argument]
    before, first, last, after = found.groups()
    return [f"{before}{n:0{len(first)}d}{after}" for n in range(int(first), int(last) + 1)]


def run(arguments: Sequence[str]) -> None:
    """Run one stage. Raises whatever the stage raises."""
    top = argparse.ArgumentParser(prog="python -m moa", description="Stages of the MoA workflow.")
    stages = top.add_subparsers(dest="stage", required=True, metavar="stage")
    parsers = {
        name: stages.add_parser(
            name, aliases=[stage.alias] if stage.alias else [], help=stage.help, add_help=False
        )
        for name, stage in STAGES.items()
    }
    called = top.parse_known_args(arguments[:1])[0].stage
    name = next(name for name, stage in STAGES.items() if called in (name, stage.alias))
    function, kinds = _function(name)
    parser = parsers[name]
    parser.add_argument("-h", "--help", action="help", help="show this text and end")
    parser.description = summary(function)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    configured = [key for key, kind in kinds.items() if is_dataclass(kind)]
    if configured:
        help = f"a configuration file, whole or with changes to {DEFAULT}, or the stage's settings as JSON"
        parser.add_argument("--config", default=str(DEFAULT), help=help)
        help = "settings of the stage as JSON that take the place of those in --config"
        parser.add_argument("--change", default="{}", help=help)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in configured:
            _add_option(parser, parameter, kinds[parameter.name], help_of(name, function, parameter.name))
    options = vars(top.parse_args(arguments))
    options.pop("stage")
    for option in (key for key, kind in kinds.items() if options.get(key) and _takes_files(kind)):
        options[option] = [Path(file) for given in options[option] for file in numbered(str(given))]
    runlock.hold_from_environment()
    for key in configured:
        given, change = options.pop("config"), options.pop("change")
        options[key] = _load(given, name, kinds[key], options, change)
    function(**options)


def is_expected(error: BaseException) -> bool:
    """Whether a user can mend an error from its message: this package raised it, or the system for a file.

    What Python or a library raised below us is a mistake of ours, or a broken machine, as far as we know.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return True
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    raised = linecache.getline(file, line).lstrip().startswith("raise ")
    return raised and Path(file).resolve().is_relative_to(ROOT / "moa")


def said(error: BaseException) -> str:
    """An error in a line, as far as its own message is one."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def main() -> int:
    """Exit status 0, or 1 after an error, said in the last line.

    The traceback stands before it if the error is none that a user can mend, or if $MOA_TRACEBACK is set.
    """
    try:
        run(sys.argv[1:])
    except Exception as error:
        if os.environ.get("MOA_TRACEBACK") or not is_expected(error):
            traceback.print_exception(error)
        print(f"error: {said(error) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
