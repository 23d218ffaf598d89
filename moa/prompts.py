"""Multimodal prompts: image feature and text embedding in one token, for each timestep and layer (Eq. 8).

    m = [f ; c],   m̄_{t,l} = LayerNorm(m) + LayerNorm(PE(t, l)),   m_{t,l} = LN(m2(m1(m̄_{t,l}) + c))

f is the image feature of the subject, c the text embedding of the token that it is bound to.
"""

import math

import torch
from torch import Tensor, nn

TIMESTEPS = 1000
"""Timesteps of the noise schedule; t / TIMESTEPS is the position in [0, 1]."""


class ResidualMLP(nn.Module):
    """LayerNorm → Linear → GELU → Linear, FastComposer's block; with a residual if asked for."""

    def __init__(self, in_dim: int, out_dim: int, residual: bool):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
        return x + y if self.residual else y


class FuseMLP(nn.Module):
    """FastComposer's fuse module, LN(m2(m1(x) + c)); 2,958,336 parameters for widths of 1,536 and 768.

    joined x: [.., in_dim], an image feature and a text embedding side by side; text c: [.., text_dim].
    """

    def __init__(self, in_dim: int, text_dim: int):
        super().__init__()
        self.m1 = ResidualMLP(in_dim, text_dim, residual=False)
        self.m2 = ResidualMLP(text_dim, text_dim, residual=True)
        self.norm = nn.LayerNorm(text_dim)

    def forward(self, joined: Tensor, text: Tensor) -> Tensor:
        return self.norm(self.m2(self.m1(joined) + text))


def fourier_features(position: Tensor, frequencies: int) -> Tensor:
    """sin and cos of 2^k π x for k < frequencies: x [..] in [0, 1] → [.., 2 · frequencies], in float32."""
    octaves = 2.0 ** torch.arange(frequencies, device=position.device, dtype=torch.float32)
    angles = position.float()[..., None] * (math.pi * octaves)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PositionEncoding(nn.Module):
    """PE(t, l): Fourier features of timestep and depth, then a learned linear layer (our decision)."""

    def __init__(self, layers: int, frequencies: int, dim: int):
        super().__init__()
        self.layers = layers
        self.frequencies = frequencies
        self.linear = nn.Linear(4 * frequencies, dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep [B] in [0, TIMESTEPS] → [L, B, dim], for all layers in the order in which they run.

        dtype: what the linear layer computes in; its weights may be stored in another (layerwise casting).
        """
        depth = torch.arange(self.layers, device=timestep.device) / max(self.layers - 1, 1)
        of_time = fourier_features(timestep.float() / TIMESTEPS, self.frequencies)
        of_layer = fourier_features(depth, self.frequencies)
        shape = (self.layers, timestep.shape[0], 2 * self.frequencies)
        features = torch.cat([of_time.expand(shape), of_layer[:, None].expand(shape)], dim=-1)
        return self.linear(features.to(dtype))


class MultimodalPrompt(nn.Module):
    """m_{t,l} of Eq. 8, for every cross-attention layer l of the U-Net at once.

    m = [f ; c] has F + D channels (1,536 on SD1.5, FastComposer's width). f is not projected first, as the
    MLP's first linear layer does that; so an image feature of any width fits any text. One MLP serves all t
    and l, as in the paper: they enter by PE alone. `spacetime=False` leaves PE out (the paper's ablation,
    appendix B).
    """

    def __init__(
        self, image_dim: int, text_dim: int, layers: int, frequencies: int = 8, spacetime: bool = True
    ):
        super().__init__()
        width = image_dim + text_dim
        self.layers = layers
        self.norm = nn.LayerNorm(width)
        self.position = PositionEncoding(layers, frequencies, width) if spacetime else None
        self.position_norm = nn.LayerNorm(width) if spacetime else None
        self.fuse = FuseMLP(width, text_dim)

    def forward(self, features: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """features f [B, S, F], text c [B, S, D], timestep [B] → m_{t,l} [L, B, S, D]."""
        dtype = self.norm.weight.dtype  # no hook casts norms
        joined = self.norm(torch.cat([features, text], dim=-1).to(dtype))
        if self.position is None or self.position_norm is None:
            return self.fuse(joined, text.to(joined.dtype)).expand(self.layers, *text.shape)
        joined = joined + self.position_norm(self.position(timestep, dtype))[:, :, None]
        return self.fuse(joined, text.to(joined.dtype))
