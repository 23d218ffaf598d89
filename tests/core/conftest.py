"""Tiny random models of Stable Diffusion's classes: they test the plumbing and the algebra, never quality."""

import copy

import numpy as np
import pytest
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

from moa import MoAAdapter, MoAContext, MoAPipeline, SubjectConditioner

TEXT_DIM, IMAGE_DIM, TOKENS = 24, 20, 20

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
WORDS = [
    "a",
    "man",
    "woman",
    "men",
    "and",
    "with",
    "red",
    "hat",
    "on",
    "horse",
    "photo",
    "of",
    "the",
    "person",
]


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_single():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    """A CLIPTokenizer that knows WORDS whole and spells everything else."""
    letters = [chr(i) for i in range(33, 127)]
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:  # merge from the end: m, an</w> → man</w>
            pair = (parts[-2], parts[-1])
            parts[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault(parts[-1], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


@pytest.fixture(scope="session")
def text_encoder(tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def image_encoder():
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=IMAGE_DIM,
    )
    torch.manual_seed(2)
    return CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def image_processor():
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="session")
def _unet():
    torch.manual_seed(3)
    return UNet2DConditionModel(**UNET).eval()


@pytest.fixture
def unet(_unet):
    """A U-Net of three levels with attention on the two upper ones and in the middle."""
    return copy.deepcopy(_unet)


@pytest.fixture(scope="session")
def vae():
    torch.manual_seed(4)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    ).eval()


@pytest.fixture
def base(vae, text_encoder, tokenizer, unet):
    """The prior: a plain StableDiffusionPipeline."""
    pipe = StableDiffusionPipeline(
        vae,
        text_encoder,
        tokenizer,
        unet,
        DDIMScheduler(clip_sample=False, steps_offset=1),
        None,
        None,
        None,
        False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    """One generator a seed, as a pipeline takes them."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def plain_parts(pipe):
    """The models of a MoAPipeline that diffusers' own pipelines take."""
    parts = {name: part for name, part in pipe.components.items() if name != "adapter"}
    return parts | {"requires_safety_checker": False}


def scramble(adapter, scale=0.1, seed=5):
    """As if trained: experts away from the prior, routers that prefer one or the other, random prompts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            size = 1.0 if "router" in name else scale
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return adapter


@pytest.fixture
def make_adapter():
    """make_adapter(unet, trained=True, **decisions): an adapter, scrambled as training would do it."""

    def make(unet, trained=True, **decisions):
        torch.manual_seed(6)
        decisions = {"image_feature_dim": IMAGE_DIM} | decisions
        adapter = MoAAdapter.from_unet(unet, **decisions)
        return scramble(adapter) if trained else adapter

    return make


@pytest.fixture
def pipe(base, unet, make_adapter, image_encoder, image_processor):
    """`base`'s models with an adapter as if trained."""
    parts = {name: part for name, part in base.components.items() if part is not None}
    parts |= {
        "image_encoder": image_encoder,
        "feature_extractor": image_processor,
        "adapter": make_adapter(unet),
    }
    pipe = MoAPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs():
    """(latents, timesteps, text) of a batch of 3 for the tiny U-Net."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    return latents, torch.tensor([3, 500, 990]), torch.randn(3, TOKENS, TEXT_DIM, generator=generator)


@pytest.fixture
def make_context(inputs):
    """make_context(present=[…], prior_only=[…]): a context for `inputs`, two subjects at tokens 2, 5."""

    def make(present=((True, True), (True, False), (False, False)), prior_only=(False, False, False), **rest):
        generator = torch.Generator().manual_seed(8)
        return MoAContext(
            text=inputs[2],
            features=torch.randn(3, 2, IMAGE_DIM, generator=generator),
            token=torch.tensor([[2, 5]] * 3),
            present=torch.tensor(present),
            prior_only=torch.tensor(prior_only),
            **rest,
        )

    return make


@pytest.fixture
def run(inputs):
    """run(unet, context): the U-Net's answer to `inputs`."""

    def forward(unet, context=None):
        kwargs = {} if context is None else {"cross_attention_kwargs": {"moa": context}}
        return unet(*inputs[:2], encoder_hidden_states=inputs[2], **kwargs).sample

    return forward


@pytest.fixture
def photo():
    """photo(seed, mode="RGB", size=(40, 30)): a random photo."""

    def make(seed=0, mode="RGB", size=(40, 30)):
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(mode)

    return make


@pytest.fixture
def make_conditioner(tokenizer, text_encoder, image_encoder, image_processor):
    def make(adapter, **settings):
        return SubjectConditioner(
            tokenizer, text_encoder, image_encoder, image_processor, adapter, **settings
        )

    return make
