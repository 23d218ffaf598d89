"""Losses as pure functions (Eq. 9–12). Each returns a scalar; masks are 1 on the subjects, 0 elsewhere.

L = L_masked + λ_r L_router + λ_o L_object   (Eq. 11; λ_r = λ_o = 1e-4 in the paper)
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """‖M ⊙ (ε − ε_θ)‖², mean over all latent pixels and channels, not over the mask's area (FastComposer).

    prediction, target: [B, C, H, W], ε or v. mask: [B, 1, H, W] in [0, 1], the subjects at latent size.
    weights: [B], of the samples, such as `snr_weights`; None weighs all alike, as the paper does.
    """
    if mask.shape[-2:] != prediction.shape[-2:]:
        sizes = f"{tuple(mask.shape[-2:])}, the latents {tuple(prediction.shape[-2:])}"
        raise ValueError(f"the mask has size {sizes}: resize the mask to the latents")
    per_sample = (mask.float() * (prediction.float() - target.float())).square().mean(dim=(1, 2, 3))
    return per_sample.mean() if weights is None else (weights * per_sample).mean()


def snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str, gamma: float) -> Tensor:
    """Min-SNR-γ weights [B] of samples at timesteps [B] (Hang et al., arXiv 2303.09556); ones for γ = 0.

    min(SNR, γ) times what turns an ε or v loss into one on the clean latents: 1/SNR for ε, 1/(SNR + 1) for v.
    """
    if not gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    alphas = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def router_loss(router: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """‖(1 − M) ⊙ (1 − R)‖², the mean over pixels and samples (Eq. 9); in [0, 1].

    R is the mean over the layers of R_0, each resized bilinearly to the largest of them (Eq. 10; the
    resizing is our decision). 0 when the background goes wholly to the prior.

    router: {layer of L: R_0 [B, P]}, as a Recorder collects it. ValueError if empty.
    mask: [B, 1, H, W] in [0, 1], H × W the latents' size or a power of two times it.
    """
    if not router:
        raise ValueError("no router weights: hand the U-Net a Recorder over the layers L")
    sizes = {name: map_size(weights.shape[-1], *mask.shape[-2:]) for name, weights in router.items()}
    largest = max(sizes.values())
    maps = [weights.float().unflatten(-1, sizes[name])[:, None] for name, weights in router.items()]
    prior = torch.stack([resize(one, largest) for one in maps]).mean(0)
    background = 1 - resize(mask.float(), largest)
    return (background * (1 - prior)).square().mean()


def object_loss(attention: Mapping[str, Tensor], masks: Tensor, present: Tensor) -> Tensor:
    """Mean attention on the background less that on the subject (Eq. 12), FastComposer's balanced L1; −1
    to 1.

    The mean over the subjects of a sample, then over the layers and the samples that have a subject. −1
    for an ideal map (up to resizing of the mask), 0 for a uniform one, and 0 if no sample has a subject.

    attention: {layer of L: A [B, S, P]}, probabilities at each subject's token. ValueError if empty.
    masks: [B, S, H, W] in [0, 1], H × W the latents' size or a power of two times it.
    present: [B, S] bool, False for padding and for dropped conditions.
    """
    if not attention:
        raise ValueError("no attention maps: hand the U-Net a Recorder(maps=True) over the layers L")
    subjects = present.sum(1)
    samples = (subjects > 0).sum().clamp(min=1)
    per_subject = torch.stack([_balance(maps, masks) for maps in attention.values()]).mean(0)
    per_sample = torch.where(present, per_subject, 0).sum(1) / subjects.clamp(min=1)
    return per_sample.sum() / samples


def _balance(maps: Tensor, masks: Tensor) -> Tensor:
    """mean_bg(A_s) − mean_fg(A_s) of each subject: maps [B, S, P], masks [B, S, H, W] → [B, S]."""
    maps = maps.float()
    inside = resize(masks.float(), map_size(maps.shape[-1], *masks.shape[-2:])).flatten(-2)
    outside = 1 - inside
    foreground = (maps * inside).sum(-1) / (inside.sum(-1) + EPS)
    background = (maps * outside).sum(-1) / (outside.sum(-1) + EPS)
    return background - foreground


def map_size(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a map of `pixels` pixels, given the size of a mask of the same picture.

    A U-Net halves sizes, rounding up, so the mask's size is halved until it fits; ValueError if it never
    does.
    """
    h, w = height, width
    while h * w > pixels:
        h, w = (h + 1) // 2, (w + 1) // 2
    if h * w != pixels:
        raise ValueError(
            f"a map of {pixels} pixels is no halving of the mask's {height} × {width}: "
            "give the mask at the latents' size or a power of two times it"
        )
    return h, w


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, K, H, W] → [B, K, *size], bilinear, antialiased when shrinking; unchanged if the size fits."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", antialias=True, align_corners=False)
