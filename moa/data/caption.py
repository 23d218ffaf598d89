"""Caption photos with BLIP-2.

Entry point, called by `python -m moa caption`:

    run(config, raw, output)      raw shards → as many caption shards, a row for every photo

A photo that cannot be read, or about which the model says nothing, keeps its row with `problem` set;
alignment rejects and counts it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from moa.data.annotators import (
    DTYPES,
    Precision,
    annotate,
    check_positive,
    check_workers,
    load,
    paired,
    pixel_values,
    revision,
)
from moa.data.records import CAPTION, RAW, Row, read_rows, write_rows
from moa.methods import ModelSource


@dataclass(frozen=True)
class CaptionConfig:
    """How captions are decoded; greedy or by beams, never sampled, so a photo always gets the same one."""

    model: ModelSource  # a Blip2ForConditionalGeneration with its processor
    batch_size: int = 64  # photos a pass
    max_new_tokens: int = 40  # longest caption, tokens of the captioner
    num_beams: int = 1  # 1 = greedy
    precision: Precision = "no"  # "no" = 32-bit floats
    workers: int = 0  # processes that decode and resize ahead of the model
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_workers(self)
        check_positive(self, "batch_size", "max_new_tokens", "num_beams")

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of `generate`; recorded in every row."""
        return {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": False}


def mend(text: str) -> str:
    """Single spaces, and none before punctuation, where tokenizers like CLIP's put one."""
    return re.sub(r" (?=[,.;:!?])", "", " ".join(text.split()))


class Captioner:
    """A loaded captioner: images in, captions out. Raises DataError if the model cannot be loaded."""

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.processor = load(AutoProcessor, config.model, "captioner")
        self.prepare = partial(pixel_values, self.processor)
        model = load(Blip2ForConditionalGeneration, config.model, "captioner", dtype=DTYPES[config.precision])
        self.model = model.to(config.device).eval()
        self.revision = revision(config.model, model)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption an RGB image, spaces mended; empty where the model says nothing."""
        return self.look(self.prepare(images))

    @torch.inference_mode()
    def look(self, pixels: torch.Tensor, sizes: Sequence[tuple[int, int]] = ()) -> list[str]:
        """The same of what `prepare` made of the images, whose sizes do not matter."""
        pixels = pixels.to(self.config.device, DTYPES[self.config.precision])
        tokens = self.model.generate(pixel_values=pixels, **self.config.decoding)
        tokens = tokens[:, self._prefix(tokens) :]
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [mend(text) for text in texts]

    def _prefix(self, tokens: torch.Tensor) -> int:
        """How many leading tokens stand for the image: decoder-only models give them back."""
        image = getattr(self.model.config, "image_token_index", None)
        return int((tokens[0] == image).cumprod(0).sum()) if image is not None and len(tokens) else 0


def captions(captioner: Captioner, photos: Sequence[Row], title: str) -> list[Row]:
    """A row of `CAPTION` for each photo."""
    config = captioner.config
    said: dict[str, Row] = {}
    for name, text, problem in annotate(captioner, photos, config.batch_size, config.workers, title):
        silent = None if text or problem else "empty_caption: the model said nothing"
        said[name] = {"caption": text or None, "problem": problem or silent}
    made_by = {
        "model": config.model.id,
        "revision": captioner.revision,
        "settings": json.dumps(config.decoding | {"precision": config.precision}, sort_keys=True),
    }
    return [{"id": photo["id"]} | said[photo["id"]] | made_by for photo in photos]


def run(config: CaptionConfig, raw: Sequence[Path], output: Sequence[Path]) -> None:
    """Caption every photo of raw shards, each shard to the table of its place; the model is loaded once.

    Raises DataError for a bad shard or model, ValueError unless there are as many tables as shards.
    """
    shards = paired(raw, output)
    captioner = Captioner(config)
    for shard, table in shards:
        write_rows(table, captions(captioner, read_rows(shard, RAW), f"caption {shard.stem}"), CAPTION)
