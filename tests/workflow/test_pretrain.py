"""`snakemake pretrain`: what it would run, and all of it in small, up to a main job on its models."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from moa.hashing import ROOT
from moa.miniature import cards, pretrain
from tests.workflow.conftest import Run

pytestmark = pytest.mark.slow

PRIOR = ("vae", "decoder", "clip", "unet", "details", "finish", "text", "polish", "props", "props_decoder")
SHIPPED = yaml.safe_load((ROOT / "config/miniature.yaml").read_text())["pretrain"]


def small() -> dict[str, Any]:
    """Changes to the miniature's configuration: the same models, two steps on 30 pictures each."""
    few = {"steps": 2, "batch_size": 4, "warmup": 1}
    models = {
        name: {"images": 30, "threads": 1, "budget": {**settings["budget"], **few}}
        for name, settings in SHIPPED.items()
    }
    return {"pretrain": models, "gates": {"images": 12, "generated": 2, "steps": 2, "threads": 1}}


def test_the_target_trains_every_model_before_what_needs_it(snakemake: Run) -> None:
    """Also where no model is shipped yet."""
    done = snakemake("-n", "-p", "pretrain", config={"weights": "nowhere"})
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan
    commands = re.findall(r"Shell command: (.+)", plan)

    def place(start: str) -> int:
        found = [i for i, command in enumerate(commands) if re.match(start, command)]
        assert len(found) == 1, f"{start}: {found}"
        return found[0]

    train = {m: place(rf"python -m moa pretrain .*--model {m} ") for m in get_args(pretrain.Model)}
    publish = {m: place(rf"cp -r \S*/parts/{m} \S*/weights/{m} ") for m in train if m not in PRIOR}
    assemble, measured, cards_ = (place(rf"python -m moa {s} ") for s in ("assemble", "gates", "cards"))
    for model, needed in pretrain.NEEDS.items():
        assert all(train[part] < train[model] for part in needed)
    for model in train:
        options = dict(re.findall(r"--(\w+) (results/pretrain/parts/\S+)", commands[train[model]]))
        assert options.pop("output") == f"results/pretrain/parts/{model}"
        assert options == {p: f"results/pretrain/parts/{p}" for p in pretrain.NEEDS.get(model, ())}
    assert all(train[model] < publish[model] < measured for model in publish)
    assert max(train[part] for part in PRIOR) < assemble < measured < cards_
    assert set(publish) | {"prior"} == set(cards.ABOUT)


def test_every_model_is_made_measured_and_taken_by_the_main_job(snakemake: Run, project: Path) -> None:
    done = snakemake("pretrain", "--cores", "1", "--quiet", "all", config=small())
    logs = "\n".join(f"{f}\n{f.read_text()[-1500:]}" for f in project.glob("results/pretrain/logs/*.log"))
    assert done.returncode == 0, done.stderr + logs
    made = project / "results/pretrain"
    weights = made / "weights"
    assert {folder.name for folder in weights.iterdir()} == set(cards.ABOUT)
    with (made / "gates.csv").open() as file:
        measured = list(csv.DictReader(file))
    for name in cards.ABOUT:
        text = (weights / name / "README.md").read_text()
        rows = [row for row in measured if row["gate"] in cards.GATES[name]]
        assert rows
        assert all(f"| {row['gate']} | {row['measure']} | {row['value']} |" in text for row in rows)
        assert "2 steps of 4 pictures" in text
    assert (made / "prior.png").stat().st_size > 0
    assert not list((made / "runs").iterdir())  # no checkpoints are left of what is done

    again = snakemake("pretrain", "--dry-run", config=small())
    assert "Nothing to be done" in again.stdout + again.stderr
    main = snakemake("--dry-run", "-p", config={"weights": "results/pretrain/weights"})
    assert main.returncode == 0, main.stderr
    assert '"results/pretrain/weights/prior"' in main.stdout + main.stderr
    assert "moa/miniature/weights" not in main.stdout + main.stderr
    load_as_the_main_job_does(weights)


def load_as_the_main_job_does(weights: Path) -> None:
    """Every model that the configuration names, by the code of the stage that uses it."""
    import numpy as np
    from PIL import Image

    from moa.data.caption import CaptionConfig, Captioner
    from moa.data.segment import SegmentConfig
    from moa.evaluation.identity import AutoEmbedder
    from moa.evaluation.persons import PersonFinder
    from moa.evaluation.prompt import ClipJudge
    from moa.methods import ModelSource
    from moa.miniature.gates import AttributeJudge
    from moa.sampling import load_image_encoder, load_prior

    def source(name: str) -> ModelSource:
        return ModelSource(id=str(weights / name))

    photo = Image.fromarray(np.full((64, 64, 3), 127, np.uint8))
    prior = load_prior(source("prior"), "cpu")
    prior.set_progress_bar_config(disable=True)
    assert prior("a man", num_inference_steps=1).images[0].size == (64, 64)
    encoder, processor = load_image_encoder(source("image_encoder"), "cpu")
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
    assert encoder(pixels).image_embeds.shape[-1] == encoder.config.projection_dim
    assert isinstance(Captioner(CaptionConfig(model=source("captioner")))([photo])[0], str)
    assert len(PersonFinder(SegmentConfig(model=source("segmenter")))([photo])) == 1
    assert ClipJudge(source("clip_judge")).image_features([photo]).shape[0] == 1
    assert AutoEmbedder(source("identity")).embed([photo]).shape[0] == 1
    judged = AttributeJudge(weights / "attributes")([np.asarray(photo)], [(0, 0, 64, 64)])
    assert all(len(values) == 1 for values in judged.values())
