"""What the README promises about its two commands."""

from __future__ import annotations

import re

from moa.hashing import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def quick_start() -> list[str]:
    section = README.split("## Quick start", 1)[1].split("\n## ", 1)[0]
    block = re.search(r"```\w*\n(.*?)```", section, re.DOTALL)
    assert block, "the section Quick start has no code block"
    return block[1].strip().splitlines()


def test_quick_start_is_two_commands() -> None:
    run, test = quick_start()
    assert run.endswith("snakemake --cores all")
    assert "-r requirements.lock" in run
    assert test.endswith("pytest -n 2")
    assert "-r requirements-test.lock" in test


def test_files_that_the_readme_links_exist() -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"README.md links to {missing}"


def test_nothing_is_left_to_be_filled_in() -> None:
    left = [line for line in README.splitlines() if re.search("FILL|TODO|@@", line)]
    assert not left, f"README.md has placeholders: {left}"
