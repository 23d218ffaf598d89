"""LPIPS (Zhang et al. 2018, version 0.1 on AlexNet) as a map, so that it can be averaged beside subjects."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.models import alexnet

from moa.data.errors import DataError
from moa.evaluation.identity import fit, read_weights

Pixels = NDArray[np.uint8]

TAPS = (1, 4, 7, 9, 11)  # of AlexNet's `features`: behind each ReLU
CHANNELS = (64, 192, 384, 256, 256)
SHIFT, SCALE = (
    (-0.030, -0.088, -0.188),
    (0.458, 0.448, 0.450),
)  # of colours -1..1, as ImageNet's are normalised


class LPIPS:
    """LPIPS of two images of the same size."""

    def __init__(self, file: str, heads: str, device: str = "cpu"):
        """Load AlexNet's weights and the metric's heads, without running any code of these files.

        Raises DataError for other weights.
        """
        network = alexnet(weights=None)
        fit(network, read_weights(file), file)
        self.layers = network.features[: TAPS[-1] + 1].to(device).requires_grad_(False).eval()
        linear = read_weights(heads)
        names = [f"lin{n}.model.1.weight" for n in range(len(TAPS))]
        shapes = [tuple(linear[name].shape) for name in names if name in linear]
        if shapes != [(1, channels, 1, 1) for channels in CHANNELS]:
            raise DataError(f"{heads} has heads of {shapes}: they are not AlexNet's")
        self.heads = [linear[name].to(device) for name in names]
        self.device = device

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
