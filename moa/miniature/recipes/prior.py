"""The prior: a small Stable Diffusion, trained on web captions so that it knows hair from hat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, LossFunction, fit
from moa.miniature.recipes.vae import pixels
from moa.miniature.tokenizer import load_tokenizer

DROP = 0.1  # captions replaced by the empty text, for guidance
WEB_SHARE = 0.6  # web captions name appearance, task captions do not: prompts at use are of the second kind
SNR_GAMMA = 5.0  # min-SNR weighting (Hang et al., 2023)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """uint8 [N, 64, 64, 3] → scaled latents [N, 8, 16, 16], the posterior's mode."""
    parts = [
        vae.encode(pixels(images[i : i + batch_size])).latent_dist.mode()
        for i in tqdm(range(0, len(images), batch_size), desc="latents", mininterval=5)
    ]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def encode_texts(text: CLIPTextModel, prompts: list[str]) -> Tensor:
    """Prompts → [B, T, D], padded to the full length as diffusers' pipelines do."""
    tokens = load_tokenizer()(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return text(tokens["input_ids"])[0]


def v_loss_weights(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """min(SNR, γ) / (SNR + 1): min-SNR for v-prediction, [B]."""

    class Schedule:  # what compute_snr reads
        pass

    schedule = Schedule()
    schedule.alphas_cumprod = alphas_cumprod  # type: ignore[attr-defined]
    snr = compute_snr(schedule, timesteps)
    return snr.clamp(max=SNR_GAMMA) / (snr + 1)


def loss_function(
    unet: UNet2DConditionModel, text: CLIPTextModel, latents: Tensor, corpus: Corpus, budget: Budget
) -> LossFunction:
    scheduler = models.scheduler()
    alphas = scheduler.alphas_cumprod

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        texts = [c.text for c in corpus.captions(indices, rng, WEB_SHARE)]
        texts = ["" if rng.random() < DROP else t for t in texts]
        x, noise = latents[torch.from_numpy(indices)], torch.randn(budget.batch_size, *latents.shape[1:])
        t = torch.randint(0, len(alphas), (budget.batch_size,))
        a = alphas[t].sqrt()[:, None, None, None]
        s = (1 - alphas[t]).sqrt()[:, None, None, None]
        output = unet(a * x + s * noise, t, encode_texts(text, texts)).sample.float()
        error = (output - (a * noise - s * x)).square().mean(dim=(1, 2, 3))
        return {"v": (error * v_loss_weights(alphas, t)).mean()}

    return loss


def train(
    budget: Budget, corpus: Corpus, folder: Path, vae: AutoencoderKL, text: CLIPTextModel
) -> tuple[nn.Module, float]:
    """Train the U-Net on latents and texts of frozen models; returns it and the seconds spent."""
    torch.manual_seed(budget.seed)
    unet = models.unet()
    unet.set_attn_processor(AttnProcessor())  # on CPU, SDPA's backward would be 40 % of a step
    latents = encode_latents(vae.eval(), corpus.images)
    text = text.eval().requires_grad_(False)
    seconds = fit(unet, loss_function(unet, text, latents, corpus, budget), budget, folder)
    return unet.eval(), seconds
