"""The layers of a U-Net by name: which there are, their sizes, and which of them the losses look at."""

import re
from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from moa.attention import LayerSizes

PARTS = ("down_blocks", "mid_block", "up_blocks")
"""Parts of a U-Net in the order in which it runs them; diffusers lists the middle last."""

UNFIT = ("added_kv_proj_dim", "spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
"""What a diffusers Attention may have besides its four projections, and MoA does not compute."""


def attention_layers(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """{qualified name: module} of a U-Net's attention layers, in the order in which they run.

    Raises:
        TypeError, ValueError: the model is no diffusers U-Net, or its attention is of another kind.
    """
    if not hasattr(unet, "attn_processors"):
        raise TypeError(f"{type(unet).__name__} has no attn_processors: MoA fits diffusers' U-Nets")
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    outside = [name for name in names if name.split(".")[0] not in PARTS]
    if outside or not names:
        where = f", it is in {outside[0]}" if outside else ""
        raise ValueError(f"{type(unet).__name__} has no attention in {', '.join(PARTS)} alone{where}")
    names.sort(key=lambda name: PARTS.index(name.split(".")[0]))
    layers = {name: unet.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if not isinstance(layer, Attention):
            raise TypeError(f"{name} is a {type(layer).__name__}, not diffusers' Attention")
    return layers


def sizes_of(name: str, attn: Attention) -> LayerSizes:
    """Sizes read off the module. ValueError if it computes more than plain attention."""
    unfit = [what for what in UNFIT if getattr(attn, what, None) not in (None, False)]
    if unfit:
        raise ValueError(
            f"{name} has {', '.join(unfit)}, which MoA does not compute: it fits plain attention, as in "
            "Stable Diffusion 1.x, 2.x, XL and their kind"
        )
    return LayerSizes(
        query_dim=attn.to_q.in_features,
        condition_dim=attn.to_k.in_features,
        inner_dim=attn.to_q.out_features,
        out_dim=attn.to_out[0].out_features,
        bias=attn.to_q.bias is not None,
        out_bias=attn.to_out[0].bias is not None,
        cross=attn.is_cross_attention,
    )


def select_loss_layers(unet: UNet2DConditionModel, chosen: Sequence[str] | None = None) -> list[str]:
    """The layers L: `chosen`, or all but those of the highest-resolution level that has attention.

    The paper leaves out "the first two and last three attention layers" (sec. 3.3.1), which on SD1.5 is that
    level: 11 of 16 blocks stay. A U-Net with attention at one resolution only has all its layers in L.
    """
    names = list(attention_layers(unet))
    if chosen is not None:
        return named_layers(names, chosen)
    levels = {name: resolution_level(unet, name) for name in names}
    top = min(levels.values())
    return [name for name, level in levels.items() if level > top] or names


def named_layers(names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The names that are or begin with one of `chosen` ("mid_block"); ValueError if one of those fits
    none.
    """
    for prefix in chosen:
        if not any(_within(name, prefix) for name in names):
            raise ValueError(
                f"loss_layers: {prefix!r} names no attention layer; there are {', '.join(names)}"
            )
    return [name for name in names if any(_within(name, prefix) for prefix in chosen)]


def resolution_level(unet: UNet2DConditionModel, name: str) -> int:
    """0 for the U-Net's full resolution, one more for each halving; up blocks mirror the down blocks."""
    part, number = name.split(".")[:2]
    if part == "mid_block":
        return len(unet.down_blocks)
    return int(number) if part == "down_blocks" else len(unet.up_blocks) - 1 - int(number)


def last_layers(image_encoder: nn.Module | None, count: int) -> dict[str, nn.Parameter]:
    """{name: parameter} of the last `count` transformer layers of an image encoder; {} for 0."""
    if count == 0:
        return {}
    if image_encoder is None:
        raise ValueError("image_layers > 0 needs the image_encoder whose last layers are to be trained")
    numbered = {name: re.match(r".*\blayers?\.(\d+)\.", name) for name, _ in image_encoder.named_parameters()}
    number = {name: int(match[1]) for name, match in numbered.items() if match}
    layers = sorted(set(number.values()))
    if not 0 < count <= len(layers):
        raise ValueError(f"image_layers: {count}, but the image encoder has {len(layers)} layers")
    parameters = dict(image_encoder.named_parameters())
    return {name: parameters[name] for name, layer in number.items() if layer in layers[-count:]}


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
