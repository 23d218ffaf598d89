"""docs/training.md: its snippets and commands run as they stand there, in their order, on rendered photos."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moa import __main__ as command_line
from moa.hashing import ROOT
from moa.miniature import corpus
from moa.miniature.captions import task_caption
from moa.miniature.render import render

TEXT = (ROOT / "docs/training.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def arguments(command: str) -> list[str]:
    """What follows `-m moa`."""
    words = shlex.split(command)
    return words[words.index("moa") + 1 :]


def write_photos() -> None:
    """Four rendered photos, two of them of two people, with masks and captions, in the working folder."""
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    captions = {}
    for n in range(1, 5):
        scene = corpus.scene("pretrain", n, 0, pair_share=n % 2, prop_share=0.0)
        picture, name = render(scene), f"{n:04d}"
        captions[name] = task_caption(scene, np.random.default_rng(n)).text
        Image.fromarray(picture.image).save(f"photos/{name}.png")
        Image.fromarray(picture.mask).save(f"masks/{name}.png")
    Path("captions.json").write_text(json.dumps(captions))


@pytest.mark.slow
def test_snippets_and_commands_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config", "moa"):
        Path(name).symlink_to(ROOT / name)
    write_photos()
    (snippet,), (settings,) = blocks("python"), blocks("yaml")
    exec(compile(snippet, "docs/training.md", "exec"), {"__name__": "snippet"})
    Path("mine.yaml").write_text(settings)
    Path("longer.yaml").write_text(settings.replace("steps: 4", "steps: 5"))
    train, generate, launch, anew, longer = blocks("bash")

    command_line.run(arguments(train))
    results = {path.name for path in Path("mine/train/moa").iterdir()}
    assert results >= {"config.json", "log.csv", "train.json", "step-000002.png", "step-000004.png"}
    assert not list(Path("mine/.checkpoints").iterdir())
    command_line.run(arguments(generate))
    assert Image.open("image.png").size == (64, 64)
    assert arguments(launch) == arguments(train)

    command_line.run(arguments(anew))
    (left,) = Path("mine/.checkpoints").iterdir()
    assert sorted(path.name for path in left.glob("step-*")) == ["step-00000002", "step-00000004"]
    left.rename("mine/.checkpoints/moa-0123456789ab")  # the name of a training is a hash
    command_line.run(arguments(longer))
    about = json.loads(Path("mine/train/longer/train.json").read_text())
    assert about["began_with"] == "mine/.checkpoints/moa-0123456789ab/step-00000004"


def test_the_launcher_understands_its_options():
    """The launch itself is in test_processes."""
    from accelerate.commands.launch import launch_command_parser

    command = next(block for block in blocks("bash") if block.startswith("accelerate"))
    parsed = launch_command_parser().parse_args(shlex.split(command)[2:])
    assert (parsed.module, parsed.training_script) == (True, "moa")
    assert (parsed.multi_gpu, parsed.num_processes) == (True, 2)
    assert parsed.training_script_args == arguments(command)
