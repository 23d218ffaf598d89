"""Whether LPIPS is measured, and by which weights: two files that are no part of this project."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moa.lockfile import verify

if TYPE_CHECKING:
    from moa.evaluation.lpips import LPIPS


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


def load_perceptual(config: PerceptualConfig) -> LPIPS | None:
    """LPIPS, or None where the configuration names no weights. Raises as `LPIPS` and `verify`."""
    if config.id is None or config.heads is None:
        return None
    verify(config.lock, config.id, "models.lpips.id")
    verify(config.lock, config.heads, "models.lpips.heads")
    from moa.evaluation.lpips import LPIPS  # here, because what is without weights needs no PyTorch

    return LPIPS(config.id, config.heads, config.device)
