"""The autoencoder: L1 on pixels and on their differences, so that mouths and spectacle rims stay sharp.

Its decoder is trained on afterwards, as that of SD1.5 was ("sd-vae-ft"): latents stay as they are, so the
U-Net need not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from moa.miniature import models
from moa.miniature.corpus import Corpus
from moa.miniature.fit import Budget, LossFunction, fit
from moa.miniature.recipes.judges import box
from moa.miniature.render import prop_mask

KL_WEIGHT = 1e-6  # as in latent diffusion: latents stay smooth and near unit scale
EDGE_WEIGHT = 1.0
HEAD_WEIGHT = 3.0  # added to the loss where a figure's head is: a mouth is a few pixels of 4,096
PROP_WEIGHT = 3.0  # likewise, in the last trainings, where somebody holds something
HEAD_SHARE = 0.7  # upper part of a figure's box that counts as its head
Weigh = Callable[[Corpus], Tensor]  # weights of a corpus's pixels, [N, 1, H, W]


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] → float [B, 3, H, W] in −1 … 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def head_weights(corpus: Corpus) -> Tensor:
    """Weights of pixels [N, 1, H, W]: 1, or 1 + HEAD_WEIGHT on the figures' heads."""
    masks = corpus.masks
    heads = np.zeros(masks.shape, bool)
    for mask, head in zip(masks, heads, strict=True):
        for figure in range(int(mask.max())):
            bounds = box(mask, figure)
            if bounds is not None:
                neck = bounds[1] + round(HEAD_SHARE * (bounds[3] - bounds[1]))
                head[:neck] |= mask[:neck] == figure + 1
    return 1 + HEAD_WEIGHT * torch.from_numpy(heads)[:, None].float()


def prop_weights(corpus: Corpus) -> Tensor:
    """Weights of pixels [N, 1, H, W]: those of heads, and 1 + PROP_WEIGHT on props."""
    weights = head_weights(corpus)
    for weight, scene in zip(weights, corpus.scenes, strict=True):
        if scene.prop is not None:
            held = torch.from_numpy(prop_mask(scene, weight.shape[-1]))
            weight[0, held] = weight[0, held].clamp(min=1 + PROP_WEIGHT)
    return weights


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> Tensor:
    """uint8 [N, 64, 64, 3] → scaled latents [N, 8, 16, 16], the posterior's mode."""
    parts = [
        vae.encode(pixels(images[i : i + batch_size])).latent_dist.mode()
        for i in tqdm(range(0, len(images), batch_size), desc="latents", mininterval=5)
    ]
    return torch.cat(parts) * vae.config.scaling_factor


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


def train_decoder(
    budget: Budget, corpus: Corpus, folder: Path, model: AutoencoderKL, weigh: Weigh
) -> tuple[nn.Module, float]:
    """Train the decoder on, pixels weighted as `weigh` says; encoder and latents stay as they are."""
    latents = encode_latents(model.eval(), corpus.images) / model.config.scaling_factor
    weights = weigh(corpus)
    model.requires_grad_(False)
    for part in (model.decoder, model.post_quant_conv):
        part.requires_grad_(True)

    def loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        indices = torch.from_numpy(rng.integers(len(corpus), size=budget.batch_size))
        target, weight = pixels(corpus.images[indices]), weights[indices]
        output = model.decode(latents[indices]).sample.float()
        return {
            "l1": ((output - target).abs() * weight).mean(),
            "edge": EDGE_WEIGHT * edge_loss(output * weight, target * weight),
        }

    seconds = fit(model, loss, budget, folder)
    return model.eval(), seconds
