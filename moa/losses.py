"""Training losses as pure functions (Eq. 9–12). All return a scalar; masks are 1 on the subjects and 0 elsewhere.

L = L_masked + λ_r L_router + λ_o L_object   (Eq. 11; λ_r = λ_o = 1e-4 in the paper)
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5


def masked_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """‖M ⊙ (ε − ε_θ)‖², averaged over all latent pixels and channels, not over the mask's area (paper, FastComposer).

    prediction, target: [B, C, H, W], ε or v. mask: [B, 1, H, W] in [0, 1], the union of the subjects at latent size.
    """
    if mask.shape[-2:] != prediction.shape[-2:]:
        raise ValueError(
            f"the mask is {tuple(mask.shape[-2:])}, the latents are {tuple(prediction.shape[-2:])}: "
            "resize the mask to the latents' size"
        )
    return (mask.float() * (prediction.float() - target.float())).square().mean()


def router_loss(router: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """‖(1 − M) ⊙ (1 − R)‖², mean over pixels and samples, with R the layers' mean prior weight (Eq. 9–10); in [0, 1].

    router: {layer: R_0 [B, P]} of the layers in L, as a Recorder collects it.
    mask: [B, 1, H, W] in [0, 1] at latent size or any size of the same shape; it gives the maps' height and width.
    0 when the background goes wholly to the prior. Maps are resized bilinearly to the largest one in L [D].
    """
    if not router:
        raise ValueError("no router weights were recorded: hand a Recorder over the layers L to the U-Net forward")
    sizes = {name: map_size(weights.shape[-1], *mask.shape[-2:]) for name, weights in router.items()}
    largest = max(sizes.values(), key=lambda size: size[0] * size[1])
    maps = [resize(weights.float().unflatten(-1, sizes[name])[:, None], largest) for name, weights in router.items()]
    prior = torch.stack(maps).mean(0)
    background = 1 - resize(mask.float(), largest)
    return (background * (1 - prior)).square().mean()


def object_loss(attention: Mapping[str, Tensor], masks: Tensor, present: Tensor) -> Tensor:
    """Balanced L1 loss of the cross-attention maps (Eq. 12; FastComposer): mean_bg(A_s) − mean_fg(A_s); in [−1, 1].

    attention: {layer: A [B, S, P]}, the personalization expert's probabilities at each subject's token.
    masks: [B, S, H, W] in [0, 1], one a subject. present: [B, S] bool, False for padding and dropped conditions.
    Averaged over the subjects of a sample, then over layers and the samples that have a subject; 0 if none has one.
    −1 for an ideal map, 0 for a uniform one.
    """
    if not attention:
        raise ValueError("no attention maps were recorded: hand a Recorder(maps=True) over the layers L to the U-Net")
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
    """Height and width of a layer's map of `pixels` pixels, for a mask of height × width of the same picture.

    A U-Net halves sizes, rounding up, so the halvings of the mask's size are tried; ValueError if none fits.
    """
    h, w = height, width
    while h * w > pixels:
        h, w = _half(h), _half(w)
    if h * w != pixels:
        raise ValueError(
            f"a map of {pixels} pixels is no halving of the mask's {height} × {width}: "
            "give the mask at latent size, or at a power of two times it"
        )
    return h, w


def _half(size: int) -> int:
    return (size + 1) // 2


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, K, H, W] to [B, K, *size], bilinear, antialiased when shrinking; unchanged when the size fits."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", antialias=True, align_corners=False)
