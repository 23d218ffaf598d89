"""Architectures of the miniature's models, as data, of the classes that the paper's preset loads.

Each builder returns a randomly initialised model; `pretrain.py` trains it, `random_models` saves it untrained
(for tests of plumbing, never for results).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from torch import Tensor
from transformers import (
    AddedToken,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SwinConfig,
    ViTImageProcessor,
)

from moa.miniature.tokenizer import MAX_LENGTH, load_tokenizer
from moa.miniature.world import ATTRIBUTES

IMAGE_SIZE, LATENT_SIZE, LATENT_CHANNELS, WIDTH = 64, 16, 8, 128

VAE: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=LATENT_CHANNELS,
    block_out_channels=(32, 64, 96),
    layers_per_block=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    norm_num_groups=16,
    mid_block_add_attention=False,
    sample_size=IMAGE_SIZE,
)
UNET: dict[str, Any] = dict(
    sample_size=LATENT_SIZE,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    block_out_channels=(64, 128, 192),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=WIDTH,
    attention_head_dim=2,  # heads, by diffusers' historical name; on a CPU their maps cost half of a step
    norm_num_groups=16,
)
SCHEDULER: dict[str, Any] = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,  # DDPM's linear schedule: as little is left to see at 800 as at SD1.5's last timestep
    beta_end=0.02,
    beta_schedule="linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=False,
    steps_offset=1,
)
TEXT: dict[str, Any] = dict(
    hidden_act="gelu",
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=3,
    num_attention_heads=4,
)
VISION: dict[str, Any] = dict(
    hidden_act="gelu",
    hidden_size=WIDTH,
    intermediate_size=4 * WIDTH,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=IMAGE_SIZE,
    patch_size=8,
)


def vae() -> AutoencoderKL:
    return AutoencoderKL(**VAE)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET)


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(**SCHEDULER)


def clip(layers: int = 4) -> CLIPModel:
    """A CLIP of which the prior takes the text tower and the subject encoder the vision tower."""
    tokenizer = load_tokenizer()
    special: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(
        text_config=CLIPTextConfig(**TEXT, **special, projection_dim=WIDTH).to_dict(),
        vision_config=CLIPVisionConfig(
            **VISION | {"num_hidden_layers": layers}, projection_dim=WIDTH
        ).to_dict(),
        projection_dim=WIDTH,
    )
    return CLIPModel._from_config(config, attn_implementation="eager")  # SDPA's backward is slow on CPU


def image_processor() -> CLIPImageProcessor:
    """Images of any size to normalised 64 × 64 pixels."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)


def text_encoder(model: CLIPModel) -> CLIPTextModel:
    """The text tower of a CLIP, as Stable Diffusion takes it."""
    tower = CLIPTextModel(model.config.text_config)  # type: ignore[arg-type]
    tower.load_state_dict(model.text_model.state_dict(), strict=True)
    return tower


def vision_tower(model: CLIPModel) -> CLIPVisionModelWithProjection:
    """The vision tower of a CLIP with its projection, as the subject encoder."""
    tower = CLIPVisionModelWithProjection(model.config.vision_config)  # type: ignore[arg-type]
    tower.vision_model.load_state_dict(model.vision_model.state_dict())
    tower.visual_projection.load_state_dict(model.visual_projection.state_dict())
    return tower


def assemble_prior(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel
) -> StableDiffusionPipeline:
    """The frozen prior in diffusers' folder layout."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=load_tokenizer(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_half(model: torch.nn.Module, folder: Path) -> None:
    """Save weights as fp16 safetensors, leaving `model` as it is."""
    copy.deepcopy(model).half().save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]


JUDGE_SIZE = 96  # pixels; figures are enlarged, since a ResNet's stem shrinks fourfold
EMBEDDING = 256  # channels of the identity network's output
RESNET: dict[str, Any] = dict(
    embedding_size=48,
    hidden_sizes=[48, 96, 160, EMBEDDING],
    depths=[1, 2, 2, 1],
    layer_type="basic",
    hidden_act="relu",
)


def embedder() -> ResNetModel:
    """The identity network: figure crop → `pooler_output` [B, 256, 1, 1]."""
    return ResNetModel(ResNetConfig(**RESNET))


def attribute_classifier() -> ResNetForImageClassification:
    """One logit for each value of each attribute; `split_logits` takes them apart."""
    names = [f"{attribute}={value}" for attribute, values in ATTRIBUTES.items() for value in values]
    config = ResNetConfig(  # type: ignore[call-arg]  # labels are keywords of its base
        **RESNET | {"hidden_sizes": [48, 80, 112, 144]},
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    return ResNetForImageClassification(config)


def split_logits(logits: Tensor) -> dict[str, Tensor]:
    """[B, all values] → for each attribute [B, its values]."""
    parts = logits.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    return dict(zip(ATTRIBUTES, parts, strict=True))


def judge_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] → −1 … 1, [B, 3, S, S]; the same as `judge_processor`'s normalisation."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def judge_processor() -> ViTImageProcessor:
    """Crops of any size to normalised 96 × 96 pixels."""
    return ViTImageProcessor(
        size={"height": JUDGE_SIZE, "width": JUDGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=2,
    )


QUERY_TOKENS = 8  # that BLIP-2 reads a picture through
IMAGE_TOKEN = "<image>"


def image_token_id() -> int:
    """The id of BLIP-2's image placeholder: the first after the tokenizer's vocabulary."""
    return len(load_tokenizer())


def captioner() -> Blip2ForConditionalGeneration:
    """A BLIP-2 of 2 M parameters: vision tower, Q-Former, OPT decoder."""
    tokenizer = load_tokenizer()
    size: dict[str, Any] = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
    config = Blip2Config(
        vision_config=dict(
            **size, num_hidden_layers=4, image_size=IMAGE_SIZE, patch_size=8, hidden_act="gelu"
        ),
        qformer_config=dict(
            **size, num_hidden_layers=2, encoder_hidden_size=WIDTH, cross_attention_frequency=1
        ),
        text_config=dict(
            model_type="opt",
            hidden_size=WIDTH,
            ffn_dim=4 * WIDTH,
            num_attention_heads=4,
            num_hidden_layers=3,
            word_embed_proj_dim=WIDTH,
            vocab_size=len(tokenizer) + 1,
            max_position_embeddings=128,
            dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        num_query_tokens=QUERY_TOKENS,
        image_token_index=image_token_id(),
    )
    model = Blip2ForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding[:, 1:] = grid_positions(IMAGE_SIZE // 8, WIDTH)
    return model


def grid_positions(side: int, width: int, scale: float = 0.3) -> Tensor:
    """[side², width]: sines and cosines of row and column, as large as patch embeddings are at the start.

    Positions drawn with transformers' 0.02 are lost beside the patches, and attention learns late where to
    look.
    """
    frequencies = 100 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    return scale * torch.cat([rows, columns], dim=2).reshape(side * side, width)


def captioner_processor() -> Blip2Processor:
    """Pictures (and prompts) to the captioner's inputs."""
    tokenizer = copy.deepcopy(load_tokenizer())
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERY_TOKENS)


LABELS = ("background", "person")
SEGMENTER_SIZE = 128  # pixels; masks come at a quarter of it


def segmenter() -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former of about 1 M parameters on a Swin backbone."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(  # type: ignore[call-arg]  # out_features is a keyword of its base
            image_size=SEGMENTER_SIZE,
            embed_dim=24,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 4, 8],
            window_size=4,
            drop_path_rate=0.0,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=128,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        dim_feedforward=128,
        num_queries=8,
        train_num_points=1024,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    return Mask2FormerForUniversalSegmentation(config)


def segmenter_processor() -> Mask2FormerImageProcessor:
    """Pictures of any size to normalised 128 × 128 pixels."""
    size = {"height": SEGMENTER_SIZE, "width": SEGMENTER_SIZE}
    return Mask2FormerImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, ignore_index=255)


def segmenter_pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → what `segmenter_processor` makes of them, [B, 3, 128, 128]."""
    return torch.nn.functional.interpolate(judge_pixels(images), SEGMENTER_SIZE, mode="bilinear")


def clip_processor() -> CLIPProcessor:
    """Pictures and texts to the inputs of both CLIPs."""
    return CLIPProcessor(image_processor(), load_tokenizer())


def random_models(folder: Path, seed: int = 0) -> None:
    """Save every model untrained, with its processor, in the layout of the shipped weights: for tests."""
    torch.manual_seed(seed)
    both = clip()
    assemble_prior(vae(), unet(), text_encoder(both)).save_pretrained(folder / "prior")
    vision_tower(both).save_pretrained(folder / "image_encoder")
    image_processor().save_pretrained(folder / "image_encoder")
    for name, model, processor in (
        ("identity", embedder(), judge_processor()),
        ("attributes", attribute_classifier(), judge_processor()),
        ("clip_judge", clip(3), clip_processor()),
        ("segmenter", segmenter(), segmenter_processor()),
        ("captioner", captioner(), captioner_processor()),
    ):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
