"""A few rendered photos with their truth, annotations made from it, and tiny random annotators in folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AddedToken,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    SwinConfig,
)

from moa.data.records import CAPTION, SEGMENT, TRUTH, bounding_box, decode_mask, read_rows, write_rows
from moa.methods import ModelSource
from moa.miniature import dataset
from moa.miniature.tokenizer import load_tokenizer

LABELS = {0: "background", 1: "person"}


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


def true_segments(mask: np.ndarray) -> list[dict]:
    """What a faultless segmenter would say."""
    return [
        {
            "segment_id": k,
            "label": "person",
            "score": 1.0,
            "bbox": bounding_box(mask == k),
            "area": int((mask == k).sum()),
        }
        for k in range(1, mask.max() + 1)
    ]


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
def captioner(tmp_path_factory, tokenizer) -> ModelSource:
    """A random BLIP-2 with an OPT decoder."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(tokenizer.id)
    words.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {
        "model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2,
        "num_hidden_layers": 1, "word_embed_proj_dim": 16, "vocab_size": len(words), "init_std": 0.3,
        "max_position_embeddings": 64, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    model = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config=dict(**size, image_size=32, patch_size=8, initializer_range=0.5),
            qformer_config=dict(
                **size, encoder_hidden_size=16, cross_attention_frequency=1, initializer_range=0.5
            ),
            text_config=text,
            num_query_tokens=4,
            image_token_index=len(words) - 1,
        )
    )
    with torch.no_grad():  # otherwise the picture is drowned out, and every caption is the same
        model.query_tokens.normal_(), model.language_projection.weight.normal_()
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 32, "width": 32}), words, num_query_tokens=4
    )
    return _saved(tmp_path_factory.mktemp("captioner"), model, processor)


@pytest.fixture(scope="session", params=["mask2former", "maskformer"])
def segmenter(request, tmp_path_factory) -> ModelSource:
    """A random segmenter of either family, on a Swin backbone."""
    torch.manual_seed(0)
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    backbone = SwinConfig(**swin, window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"])
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    if request.param == "mask2former":
        config = Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
            encoder_feedforward_dim=16, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
            num_queries=6, init_std=1.0, **labels,
        )  # fmt: skip
        model, kind = Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor
    else:
        detr = {
            "model_type": "detr", "d_model": 16, "decoder_layers": 1, "encoder_layers": 1,
            "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "encoder_ffn_dim": 16,
            "encoder_attention_heads": 2, "num_queries": 6,
        }  # fmt: skip
        config = MaskFormerConfig(
            backbone_config=backbone, decoder_config=detr, fpn_feature_size=32, mask_feature_size=32,
            init_std=1.0, **labels,
        )  # fmt: skip
        model, kind = MaskFormerForInstanceSegmentation(config), MaskFormerImageProcessor
    with torch.no_grad():  # otherwise most queries see nothing, and few tests would test anything
        model.class_predictor.bias += torch.tensor([0.0, 20.0, 0.0])
    processor = kind(size={"height": 64, "width": 64}, ignore_index=255)
    return _saved(tmp_path_factory.mktemp(request.param), model, processor)


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
    return _saved(tmp_path_factory.mktemp("clip"), model, processor)


def _saved(folder: Path, model, processor) -> ModelSource:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return ModelSource(str(folder))
