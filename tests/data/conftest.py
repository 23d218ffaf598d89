"""A few rendered photos with their truth, annotations made from it, and tiny random annotators in folders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

from moa.data.records import CAPTION, SEGMENT, TRUTH, decode_mask, read_rows, write_rows
from moa.methods import ModelSource
from moa.miniature import dataset
from moa.miniature.annotation import true_segments
from moa.miniature.tokenizer import load_tokenizer
from tests.data import tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> SimpleNamespace:
    """One shard of 24 photos, half of them pairs: paths `raw` and `truth`."""
    folder = tmp_path_factory.mktemp("rendered")
    config = dataset.RenderConfig(train=24, shard_size=24, pairs=0.5, props=0.2)
    shard = SimpleNamespace(raw=folder / "raw.parquet", truth=folder / "truth.parquet", config=config)
    dataset.run(config, "train", 0, shard.raw, shard.truth)
    return shard


@pytest.fixture(scope="session")
def annotated(rendered, tmp_path_factory) -> SimpleNamespace:
    """The shard with the truth as its captions and segments."""
    folder = tmp_path_factory.mktemp("annotated")
    truth = read_rows(rendered.truth, TRUTH)
    common = {"problem": None, "model": "truth", "revision": "0", "settings": "{}"}
    captions = [{"id": t["id"], "caption": t["caption"], **common} for t in truth]
    segments = [
        {"id": t["id"], "mask": t["mask"], "segments": true_segments(decode_mask(t["mask"])), **common}
        for t in truth
    ]
    paths = SimpleNamespace(raw=rendered.raw, truth=rendered.truth)
    paths.captions, paths.segments = folder / "captions.parquet", folder / "segments.parquet"
    write_rows(paths.captions, captions, CAPTION)
    write_rows(paths.segments, segments, SEGMENT)
    return paths


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> ModelSource:
    """A folder with the miniature's tokenizer at its top."""
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer().save_pretrained(folder)
    return ModelSource(str(folder))


@pytest.fixture(scope="session")
def captioner(tmp_path_factory) -> ModelSource:
    """A random BLIP-2 with an OPT decoder."""
    return tiny.captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="session", params=["mask2former", "maskformer"])
def segmenter(request, tmp_path_factory) -> ModelSource:
    """A random segmenter of either family, on a Swin backbone."""
    return tiny.segmenter(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def clip(tmp_path_factory, tokenizer) -> ModelSource:
    """A random CLIP."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(tokenizer.id)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(**size, **text, max_position_embeddings=words.model_max_length),
            vision_config=dict(**size, image_size=32, patch_size=8),
            projection_dim=16,
        )
    )
    side = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False), words)
    return tiny.saved(tmp_path_factory.mktemp("clip"), model, processor)
