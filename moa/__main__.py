"""`python -m moa <stage>`: a command line derived from the stages' signatures. The only place that prints."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moa import runlock
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
    mapping = json.loads(text) if text.lstrip().startswith("{") else settings(name, _read(text), **values)
    loaded: Any = load(kind, mapping | json.loads(change), STAGES[name].section.format(**values))
    check_device(getattr(loaded, "device", "cpu"))
    return loaded


def _read(path: str) -> dict[str, Any]:
    """A configuration file, checked whole: no stage would miss a mistyped section of another name."""
    config = read(path)
    if SCHEMA.is_file():
        check(config, SCHEMA)
    return config


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
    parser.add_argument("-h", "--help", action="help")
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
    runlock.hold_from_environment()
    for key in configured:
        given, change = options.pop("config"), options.pop("change")
        options[key] = _load(given, name, kinds[key], options, change)
    function(**options)


def main() -> int:
    """Exit status 0, or 1 after an error that a user can mend, said in one line."""
    try:
        run(sys.argv[1:])
    except (ValueError, ArithmeticError, OSError, KeyError, RuntimeError) as error:
        import traceback

        traceback.print_exc()
        print(f"\nerror: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
