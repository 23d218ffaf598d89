"""Write requirements.lock and requirements-test.lock from the environment that this runs in.

python3 -m venv /tmp/new && /tmp/new/bin/pip install -e '.[test]' && /tmp/new/bin/python .ci/lock.py
"""

from importlib.metadata import distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "moa-mixture-of-attention"
ROOT = Path(__file__).resolve().parent.parent
LINUX_ONLY = ("cuda-", "nvidia-", "triton")  # as torch's own metadata marks them
LINUX = ' ; sys_platform == "linux"'
ONLY_PYTHON_312 = {  # what papermill wants there only; written by hand, from a dry run
    "aiohttp": "3.14.5", "aiohappyeyeballs": "2.7.1", "aiosignal": "1.4.0", "frozenlist": "1.8.0",
    "multidict": "7.2.1", "propcache": "0.5.4", "yarl": "1.25.1",
}  # fmt: skip
HEADS = {
    "requirements.lock": "# What the workflow runs with: tested versions. Written by .ci/lock.py",
    "requirements-test.lock": "# What the tests need besides: tested versions. Written by .ci/lock.py\n"
    "-r requirements.lock",
}


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Versions of everything that `name` needs with `extras`, by canonical name."""
    found: dict[str, str] = {}
    todo, seen = [(name, extras)], set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[canonicalize_name(name)] = distribution(name).version
        for text in requires(name) or ():
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras | {""}):
                todo.append((need.name, frozenset(need.extras)))
    found.pop(PROJECT, None)
    return found


def line(name: str, version: str) -> str:
    """One line of a lock file."""
    return f"{name}=={version}" + (LINUX if name.startswith(LINUX_ONLY) else "")


def main() -> None:
    run = closure(PROJECT, frozenset())
    test = {k: v for k, v in closure(PROJECT, frozenset({"test"})).items() if k not in run}
    extra = [f'{k}=={v} ; python_version == "3.12"' for k, v in ONLY_PYTHON_312.items() if k not in run]
    for (file, head), versions, more in zip(HEADS.items(), (run, test), (extra, []), strict=True):
        lines = sorted([line(name, version) for name, version in versions.items()] + more)
        (ROOT / file).write_text("\n".join([head, *lines, ""]))


if __name__ == "__main__":
    main()
