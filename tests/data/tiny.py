"""Annotators with random weights, of a few thousand parameters, in folders as `models` takes them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AddedToken,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from moa.methods import ModelSource
from moa.miniature.tokenizer import load_tokenizer

LABELS = {0: "background", 1: "person"}
# So lenient that random weights find somebody: settings of `data.segment`.
LENIENT = {"threshold": 0.0, "mask_threshold": 0.3, "overlap": 0.0}


def few_words() -> PreTrainedTokenizerFast:
    """So few that random weights name somebody now and then."""
    words = ["<pad>", "<s>", "</s>", "a", "man", "woman", "and", "in", "red", "hat", "blue", "hoodie"]
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def captioner(folder: Path, words: PreTrainedTokenizerBase | None = None) -> ModelSource:
    """A random BLIP-2 with an OPT decoder that speaks these words, else the miniature's."""
    torch.manual_seed(0)
    words = copy.deepcopy(words or load_tokenizer())  # others share it
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
    return saved(folder, model, processor)


def segmenter(folder: Path, family: str = "mask2former") -> ModelSource:
    """A random segmenter, "mask2former" or "maskformer", on a Swin backbone."""
    torch.manual_seed(0)
    swin = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    backbone = SwinConfig(**swin, window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"])
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    if family == "mask2former":
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
    return saved(folder, model, processor)


def saved(folder: Path, model, processor) -> ModelSource:
    """The folder that a model and its processor were written to."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return ModelSource(str(folder))
