"""The prior: a small Stable Diffusion, trained on web captions so that it knows hair from hat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, LossFunction, fit
from moa.miniature.recipes.vae import Weigh, encode_latents, head_weights
from moa.miniature.tokenizer import load_tokenizer

DROP = 0.1  # captions replaced by the empty text, for guidance
LOOSE_SHARE = 0.2  # of the captions in the last two trainings
WEB_SHARE = 0.6  # web captions name appearance, task captions do not: prompts at use are of the second kind


@torch.no_grad()
def encode_texts(text: CLIPTextModel, prompts: list[str]) -> Tensor:
    """Prompts → [B, T, D], padded to the full length as diffusers' pipelines do."""
    tokens = load_tokenizer()(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return text(tokens["input_ids"])[0]


def timestep_density(alphas: Tensor) -> Tensor:
    """How often the second training draws each timestep, [T], summing to 1: in proportion to √ᾱ.

    √ᾱ is how much signal is left: under DDPM's linear schedule half of all timesteps (ᾱ < .08) show hardly
    more than where a figure stands, which the first training has taught.
    """
    return alphas.sqrt() / alphas.sqrt().sum()


def loss_function(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    latents: Tensor,
    corpus: Corpus,
    budget: Budget,
    density: Tensor,
    weigh: Weigh,
    loose_share: float = 0.0,
) -> LossFunction:
    """The loss on v, timesteps drawn with `density` [T], latent pixels weighted as `weigh` says."""
    alphas = models.scheduler().alphas_cumprod
    weights = F.avg_pool2d(weigh(corpus), models.IMAGE_SIZE // models.LATENT_SIZE)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        texts = [c.text for c in corpus.captions(indices, rng, WEB_SHARE, loose_share)]
        texts = ["" if rng.random() < DROP else t for t in texts]
        rows = torch.from_numpy(indices)
        x, noise = latents[rows], torch.randn(budget.batch_size, *latents.shape[1:])
        t = torch.multinomial(density, budget.batch_size, replacement=True)
        a = alphas[t].sqrt()[:, None, None, None]
        s = (1 - alphas[t]).sqrt()[:, None, None, None]
        output = unet(a * x + s * noise, t, encode_texts(text, texts)).sample.float()
        error = (output - (a * noise - s * x)).square() * weights[rows]
        return {"v": error.mean()}

    return loss


def train(
    budget: Budget,
    corpus: Corpus,
    folder: Path,
    vae: AutoencoderKL,
    text: CLIPTextModel,
    unet: UNet2DConditionModel | None = None,
    loose_share: float = 0.0,
    weigh: Weigh = head_weights,
) -> tuple[nn.Module, float]:
    """Train the U-Net on latents and texts of frozen models; returns it and the seconds spent.

    From nothing, all timesteps are drawn alike, and the noisiest, whose error stays large whatever is learnt,
    teach who and where. A `unet` that has learnt that is trained on with `timestep_density`, for the details.
    """
    torch.manual_seed(budget.seed)
    alphas = models.scheduler().alphas_cumprod
    density = torch.ones_like(alphas) / len(alphas) if unet is None else timestep_density(alphas)
    unet = unet or models.unet()
    unet.set_attn_processor(AttnProcessor())  # on CPU, SDPA's backward would be 40 % of a step
    latents = encode_latents(vae.eval(), corpus.images)
    text = text.eval().requires_grad_(False)
    loss = loss_function(unet, text, latents, corpus, budget, density, weigh, loose_share)
    seconds = fit(unet, loss, budget, folder)
    return unet.eval(), seconds
