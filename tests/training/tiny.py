"""Untrained models of a few thousand parameters, and records for them: for plumbing, never for quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from moa.data.records import RECORD, SUBJECT, encode_image, encode_mask, write_rows
from moa.methods import ModelSource, Subject
from moa.training.config import TrainConfig

WORDS = ["a", "man", "woman", "person", "and", "in", "red", "blue", "hat", ","]
SIZE, WIDTH = 32, 16


def tokenizer() -> CLIPTokenizer:
    """Whole words and single letters; 16 tokens long."""
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(c + "</w>" for c in [*letters, ","])]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    names = [*dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])]
    vocabulary = {name: i for i, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=16)


def save_models(folder: Path, prediction_type: str = "v_prediction") -> tuple[ModelSource, ModelSource]:
    """A prior and an image encoder with random weights, as folders: 8 x 8 latents of 4 channels."""
    torch.manual_seed(0)
    words = tokenizer()
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **tower, **special, pad_token_id=words.eos_token_id, vocab_size=len(words), max_position_embeddings=16
    )
    blocks = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKL(
        **blocks,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=SIZE,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
    )
    pipe = StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(text), tokenizer=words, safety_checker=None,
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "prior")
    vision = CLIPVisionConfig(**tower, image_size=16, patch_size=8, projection_dim=12)
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    side = {"height": 16, "width": 16}
    CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False).save_pretrained(
        folder / "image_encoder"
    )
    return ModelSource(str(folder / "prior")), ModelSource(str(folder / "image_encoder"))


def photo(seed: int, size: int = SIZE) -> Image.Image:
    """Noise in colour: unlike any other seed's."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def subject(number: int, word: str = "man") -> Subject:
    return Subject(f"test-{number:04d}", word, photo(1000 + number))


CAPTIONS = ("a man in a red hat", "a man and a woman in blue", "a woman in a blue hat")


def record(number: int) -> dict:
    """A record of one subject, or, each third, of two side by side."""
    caption = CAPTIONS[number % 3]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[8:, 4:14] = 1
    words = [w for w in ("man", "woman") if f"a {w}" in caption]
    if len(words) == 2:
        mask[4:, 18:30] = 2
    return {
        "id": f"{number:05d}",
        "image": encode_image(photo(number), f"{number}.png"),
        "width": SIZE,
        "height": SIZE,
        "caption": caption,
        "segments": [
            {
                "segment_id": k + 1,
                "word": word,
                "start": caption.index(f"a {word}") + 2,
                "end": caption.index(f"a {word}") + 2 + len(word),
                "bbox": [4, 8, 14, SIZE] if k == 0 else [18, 4, 30, SIZE],
                "label": "person",
                "score": 1.0,
            }
            for k, word in enumerate(words)
        ],
        "mask": encode_mask(mask),
        **dict.fromkeys(
            (
                "split",
                "source",
                "sha256",
                "caption_model",
                "caption_revision",
                "segment_model",
                "segment_revision",
            ),
            "x",
        ),
    }


def save_records(folder: Path, count: int = 12) -> list[Path]:
    """Two shards of records."""
    paths = [folder / "train-000.parquet", folder / "train-001.parquet"]
    for shard, path in enumerate(paths):
        write_rows(path, [record(n) for n in range(shard, count, 2)], RECORD)
    return paths


def save_subjects(path: Path, count: int = 4) -> Path:
    """Subjects, men and women by turns."""
    subjects = [subject(n, ("man", "woman")[n % 2]) for n in range(count)]
    rows = [
        {"id": s.id, "identity": s.id, "word": s.word, "image": encode_image(s.image), "sha256": ""}
        for s in subjects
    ]
    write_rows(path, rows, SUBJECT)
    return path


def config(models: tuple[ModelSource, ModelSource], **settings: object) -> TrainConfig:
    """A training of a few steps."""
    quick: dict = {
        "steps": 4,
        "batch_size": 4,
        "lr": 1e-3,
        "log_every": 2,
        "validate_every": 0,
        "p_drop": 0.3,
    }
    return TrainConfig(*models, **(quick | settings))
