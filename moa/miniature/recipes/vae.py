"""The autoencoder: L1 on pixels and on their differences, so that mouths and spectacle rims stay sharp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, LossFunction, fit

KL_WEIGHT = 1e-6  # as in latent diffusion: latents stay smooth and near unit scale
EDGE_WEIGHT = 1.0


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float [B, 3, H, W] in −1 … 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def edge_loss(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of two batches [B, C, H, W]."""
    difference = a - b
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def loss_function(model: AutoencoderKL, corpus: Corpus, budget: Budget) -> LossFunction:
    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = rng.integers(len(corpus), size=budget.batch_size)
        target = pixels(corpus.images[indices])
        posterior = model.encode(target).latent_dist
        output = model.decode(posterior.sample()).sample.float()
        kl = posterior.kl().mean() / target[0].numel()
        return {
            "l1": (output - target).abs().mean(),
            "edge": EDGE_WEIGHT * edge_loss(output, target),
            "kl": KL_WEIGHT * kl * target[0].numel(),
        }

    return loss


@torch.no_grad()
def set_scaling(model: AutoencoderKL, corpus: Corpus) -> None:
    """Record the factor that brings latents to unit variance, as Stable Diffusion does."""
    latents = model.encode(pixels(corpus.images[:512])).latent_dist.mode()
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))


def train(budget: Budget, corpus: Corpus, folder: Path) -> tuple[nn.Module, float]:
    """Train on single and pair scenes alike; returns the model and the seconds spent."""
    model = models.vae()
    seconds = fit(model, loss_function(model, corpus, budget), budget, folder)
    model.eval()
    set_scaling(model, corpus)
    return model, seconds
