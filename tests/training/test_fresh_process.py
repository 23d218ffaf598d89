"""An adapter trained on the miniature draws in a new process what it draws where it was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa.data.phrases import person_phrases
from moa.data.records import RECORD, encode_image, encode_mask, write_rows
from moa.methods import ModelSource, Request, Sampling, Subject
from moa.miniature import corpus
from moa.miniature.captions import task_caption
from moa.miniature.render import render
from moa.training import loop
from moa.training.config import TrainConfig
from moa.training.moa import MoATrainee

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "moa/miniature/weights"
SAMPLING = Sampling(steps=3, batch_size=1)
PROMPT, WORD = "a woman in a green hoodie", (2, 7)


def record(number: int) -> dict:
    """A rendered photo of one figure, with its true caption and mask."""
    scene = corpus.scene("pretrain", number, 0, pair_share=0.0, prop_share=0.0)
    caption = task_caption(scene, np.random.default_rng(number)).text
    picture, (person,) = render(scene), person_phrases(caption)
    segment = {
        "segment_id": 1, "word": person.word, "start": person.end - len(person.word), "end": person.end,
        "bbox": [0, 0, 64, 64], "label": "person", "score": 1.0,
    }  # fmt: skip
    row = dict.fromkeys(RECORD.names, "x")
    return row | {
        "id": str(number), "image": encode_image(Image.fromarray(picture.image)), "width": 64, "height": 64,
        "caption": caption, "segments": [segment], "mask": encode_mask(picture.mask),
    }  # fmt: skip


@pytest.mark.slow
def test_a_new_process_draws_the_same_images(tmp_path):
    prior, encoder = (ModelSource(str(WEIGHTS / name)) for name in ("prior", "image_encoder"))
    config = TrainConfig(prior, encoder, steps=2, batch_size=2, lr=1e-2, validate_every=0)
    write_rows(tmp_path / "records.parquet", [record(n) for n in range(4)], RECORD)
    photo = Image.fromarray(render(corpus.scene("validation", 1, 0, 0.0, 0.0)).image)
    photo.save(tmp_path / "photo.png")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    accelerator = loop.make_accelerator(config)
    trainer = loop.build(
        config, MoATrainee, [tmp_path / "records.parquet"], tmp_path / "checkpoints", accelerator, []
    )
    request = Request(PROMPT, (WORD,), (Subject("photo", "woman", photo),), seed=5)
    untrained = trainer.trainee.method(SAMPLING).generate([request])[0]
    trainer.train()
    trained = trainer.trainee.method(SAMPLING).generate([request])[0]
    trainer.finish(tmp_path / "moa")
    torch.set_num_threads(threads)

    settings = {
        "prior": {"id": prior.id}, "image_encoder": {"id": encoder.id},
        "sampling": {"steps": SAMPLING.steps, "batch_size": 1},
    }  # fmt: skip
    command = [
        *(
            "-m",
            "moa",
            "generate",
            "--config",
            json.dumps(settings),
            "--subject",
            str(tmp_path / "photo.png"),
        ),
        *(
            "--prompt",
            PROMPT,
            "--seed",
            "5",
            "--trained",
            str(tmp_path / "moa"),
            "--out",
            str(tmp_path / "a.png"),
        ),
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = np.asarray(Image.open(tmp_path / "a.png")).astype(int)
    assert np.abs(drawn - trained).max() <= 1  # weights read from a file lie elsewhere: sums round apart
    assert np.abs(drawn - untrained).max() > 1
