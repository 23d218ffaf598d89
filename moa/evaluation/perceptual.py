"""LPIPS (Zhang et al. 2018, version 0.1 on AlexNet) as a map, so that it can be averaged beside the subjects.

It needs two files that are no part of this project: AlexNet's ImageNet weights and the metric's linear heads.
Without them LPIPS is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.models import alexnet

from moa.data.errors import DataError
from moa.evaluation.identity import fit, read_weights
from moa.lockfile import verify

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
    heads: str | None = None  # the linear heads: weights/v0.1/alex.pth of the package lpips 0.1.4
    lock: Path = Path("data/models.sha256")  # text file with the SHA-256 of both; keep it
    device: str = "cpu"

    def __post_init__(self) -> None:
        if (self.id is None) != (self.heads is None):
            raise ValueError("models.lpips needs both files: `id`, AlexNet's weights, and `heads`")


NO_LPIPS = PerceptualConfig()


class Perceptual:
    """LPIPS of two images of the same size."""

    def __init__(self, config: PerceptualConfig):
        """Load both files, without running any code of theirs. Raises DataError for other weights."""
        if config.id is None or config.heads is None:
            raise ValueError("models.lpips names no weights: set both `id` and `heads`")
        network = alexnet(weights=None)
        fit(network, read_weights(config.id), config.id)
        self.layers = network.features[: TAPS[-1] + 1].to(config.device).requires_grad_(False).eval()
        heads = read_weights(config.heads)
        names = [f"lin{n}.model.1.weight" for n in range(len(TAPS))]
        shapes = [tuple(heads[name].shape) for name in names if name in heads]
        if shapes != [(1, channels, 1, 1) for channels in CHANNELS]:
            raise DataError(f"{config.heads} has heads of {shapes}: they are not AlexNet's")
        self.heads = [heads[name].to(config.device) for name in names]
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
    """LPIPS, or None where the configuration names no weights. Raises as `Perceptual` and `verify`."""
    if config.id is None or config.heads is None:
        return None
    verify(config.lock, config.id, "models.lpips.id")
    verify(config.lock, config.heads, "models.lpips.heads")
    return Perceptual(config)
