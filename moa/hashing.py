"""Content hashes: of the modules that a stage uses, of JSON-able settings, of files and of models.

Snakemake does not see that a Python module changed. The workflow therefore puts `code_hash` of a stage's
module into the rule's `params`: editing a file reruns exactly the stages that import it, directly or not.
Imports are read from the source, so nothing heavy is loaded to compute a hash.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the folder that holds the package
REGISTERED = (
    "moa.baselines.*",
    "moa.miniature.ceiling",
)  # where methods register themselves, in `moa.methods`


def _file(module: str, root: Path) -> Path | None:
    """The source of a module or package below `root`; None when there is none."""
    path = root.joinpath(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    """The module that `from … import` names, with a relative import's dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


@cache
def _import_statements(source: str, filename: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a source, anywhere in it. Parsing is most of the work; stages share modules."""
    nodes = ast.walk(ast.parse(source, filename))
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def _imports(module: str, file: Path, root: Path) -> Iterator[str]:
    """Modules of the same package that a file imports, anywhere in it, lazily or not."""
    package = module.split(".")[0]
    for node in _import_statements(file.read_text(encoding="utf-8"), str(file)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            source = _absolute(node, module, file.name == "__init__.py")
            for alias in node.names:
                child = f"{source}.{alias.name}"
                names.append(child if _file(child, root) else source)
        yield from (name for name in names if name.split(".")[0] == package and _file(name, root))


def _submodules(package: str, root: Path) -> list[str]:
    """Every module in a package's folder, for packages whose modules register themselves."""
    folder = root.joinpath(*package.split("."))
    relative = [path.relative_to(root).with_suffix("") for path in folder.rglob("*.py")]
    return [".".join(path.parts).removesuffix(".__init__") for path in relative]


def _named(modules: Iterable[str], root: Path) -> list[str]:
    """Modules by their names; `moa.baselines.*` names a whole package."""
    return [m for name in modules for m in (_submodules(name[:-2], root) if name.endswith(".*") else [name])]


def _registers(file: Path, method: str) -> bool:
    """Whether a file calls `register` with the method's name."""
    calls = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    return any(
        isinstance(call.func, ast.Name)
        and call.func.id == "register"
        and [a.value for a in call.args if isinstance(a, ast.Constant)] == [method]
        for call in calls
    )


def registering(method: str, root: Path = ROOT) -> tuple[str, ...]:
    """The module that registers a method; all that could, if none does it by a name that can be read."""
    modules = [(module, _file(module, root)) for module in _named(REGISTERED, root)]
    found = tuple(sorted(module for module, file in modules if file and _registers(file, method)))
    return found or REGISTERED


def used_modules(*modules: str, root: Path = ROOT) -> dict[str, Path]:
    """Modules that `modules` use, themselves included, sorted by name.

    `moa.baselines.*` names a whole package. A package's `__init__` counts only where something is
    imported from it by name, not for being a parent.
    """
    todo = _named(modules, root)
    found: dict[str, Path] = {}
    while todo:
        module = todo.pop()
        if module in found:
            continue
        file = _file(module, root)
        if file is None:
            raise ModuleNotFoundError(f"{module}: no such module below {root}: name what the rule runs")
        found[module] = file
        todo.extend(_imports(module, file, root))
    return dict(sorted(found.items()))


@cache
def code_hash(*modules: str, root: Path = ROOT) -> str:
    """16 hex digits of the sources that `modules` use (see `used_modules`)."""
    digest = hashlib.sha256()
    for name, file in used_modules(*modules, root=root).items():
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def settings_hash(settings: Any) -> str:
    """16 hex digits of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(model: Path) -> list[Path]:
    """Files of a model's folder that can change what the model does, sorted: no cards, recipes, logs.

    Nor what is hidden, or lies in a hidden folder, such as the notes of a download. A model that is one file
    has this one; a model that is not there has none.
    """
    if model.is_file():
        return [model]
    files = (file for file in model.rglob("*") if file.is_file())
    return sorted(file for file in files if _counts(file.relative_to(model)))


def _counts(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.suffix not in (".md", ".csv") and not file.name.endswith("recipe.json")


def model_hash(model: Path) -> str:
    """SHA-256 over the names below `model` and the bytes of `model_files`."""
    digest = hashlib.sha256()
    for file in model_files(model):
        digest.update(f"{file.relative_to(model).as_posix()}\0{file_hash(file)}\n".encode())
    return digest.hexdigest()
