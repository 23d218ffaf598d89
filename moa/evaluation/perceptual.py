"""LPIPS (Zhang et al. 2018, version 0.1 on AlexNet) as a map, so that it can be averaged beside the subjects.

It needs two files that are no part of this project: AlexNet's ImageNet weights and the metric's linear heads.
Without them LPIPS is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.models import alexnet

from moa.evaluation.identity import verify

Pixels = NDArray[np.uint8]

TAPS = (1, 4, 7, 9, 11)  # of AlexNet's `features`: behind each ReLU
CHANNELS = (64, 192, 384, 256, 256)
SHIFT, SCALE = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # of colours -1..1, as ImageNet's are normalised


@dataclass(frozen=True)
class PerceptualConfig:
    """Where LPIPS's weights are; with `id: null` it is not measured."""

    id: str | None = None  # AlexNet's weights: torchvision's alexnet-owt-7be5be79.pth
    sha256: str | None = None  # of that file
    heads: str | None = None  # the linear heads: weights/v0.1/alex.pth of the package lpips 0.1.4
    heads_sha256: str = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"
    device: str = "cpu"


NO_LPIPS = PerceptualConfig()


class Perceptual:
    """LPIPS of two images of the same size."""

    def __init__(self, config: PerceptualConfig):
        """Load both files, without running any code of theirs.

        Raises:
            FileNotFoundError: no such file. ValueError: a key is missing, a SHA-256 another, or a weight.
        """
        if config.id is None or config.heads is None:
            raise ValueError("models.lpips needs both files: `id`, AlexNet's weights, and `heads`")
        verify(config.id, config.sha256, "models.lpips")
        verify(config.heads, config.heads_sha256, "models.lpips", "heads")
        network = alexnet(weights=None)
        network.load_state_dict(torch.load(config.id, map_location="cpu", weights_only=True))
        self.layers = network.features[: TAPS[-1] + 1].to(config.device).requires_grad_(False).eval()
        heads = torch.load(config.heads, map_location="cpu", weights_only=True)
        self.heads = [heads[f"lin{n}.model.1.weight"].to(config.device) for n in range(len(TAPS))]
        for head, channels in zip(self.heads, CHANNELS, strict=True):
            if head.shape != (1, channels, 1, 1):
                raise ValueError(f"{config.heads} has a head of {tuple(head.shape)}: it is not AlexNet's")
        self.device = config.device

    @torch.inference_mode()
    def __call__(self, one: Pixels, other: Pixels) -> NDArray[np.float64]:
        """Distances [H, W], 0 for equal images, of two [H, W, 3] images of at least 64 pixels a side."""
        size = one.shape[:2]
        total = torch.zeros(size, device=self.device)
        features = self._features(torch.stack([self._prepared(image) for image in (one, other)]))
        for head, maps in zip(self.heads, features, strict=True):
            unit = maps / (maps.norm(dim=1, keepdim=True) + 1e-10)
            distance = functional.conv2d((unit[:1] - unit[1:]) ** 2, head)
            total += functional.interpolate(distance, size=size, mode="bilinear", align_corners=False)[0, 0]
        return total.cpu().numpy().astype(float)

    def _prepared(self, image: Pixels) -> Tensor:
        """[3, H, W], shifted and scaled."""
        pixels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1) / 127.5 - 1
        shift, scale = (pixels.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
        return (pixels - shift) / scale

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Behind each ReLU: [2, C, h, w]."""
        found = []
        for number, layer in enumerate(self.layers):
            pixels = layer(pixels)
            if number in TAPS:
                found.append(pixels.clone())  # the next layer could write into it
        return found


def load_perceptual(config: PerceptualConfig) -> Perceptual | None:
    """LPIPS, or None where the configuration names no weights. Raises as `Perceptual`."""
    return None if config.id is None and config.heads is None else Perceptual(config)
