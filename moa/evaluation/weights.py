"""Weights that no hub pins, before a GPU is used: FaceNet's for IP, and LPIPS's two files.

    fetch_identity(config)    FaceNet's file, from where facenet-pytorch takes it, unless it is there
    lock(config)              each file held against its lock, and loaded once; a new one is noted

`python -m moa fetch-identity` and `lock-models` call them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moa import lockfile
from moa.data.errors import DataError
from moa.evaluation.identity import EmbedderConfig, FaceNetEmbedder
from moa.evaluation.lpips import LPIPS
from moa.evaluation.perceptual import PerceptualConfig
from moa.hashing import file_hash

ALEXNET = "7be5be79"  # how the SHA-256 of AlexNet's file begins, by the name that torchvision gives it
LPIPS_HEADS = "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0"  # in the package lpips 0.1.4
LOCK_HEADING = "# weights of models: SHA-256 of every file at the first fetch; see docs/metrics.md"


@dataclass(frozen=True)
class WeightsConfig:
    """Settings of the stage `lock-models`."""

    identity: EmbedderConfig
    lpips: PerceptualConfig


def address() -> str:
    """Where facenet-pytorch itself downloads the weights trained on VGGFace2.

    Raises DataError if its code does not show it.
    """
    from facenet_pytorch.models import inception_resnet_v1

    try:
        constants = inception_resnet_v1.load_weights.__code__.co_consts
        [url] = [text for text in constants if re.fullmatch(r"https://.*-vggface2\.pt", str(text))]
    except (AttributeError, ValueError) as error:
        raise DataError(
            "the installed facenet-pytorch does not show where it downloads its weights (vggface2) from; "
            "download them by hand and put the file where models.identity.id says"
        ) from error
    return str(url)


def fetch_identity(config: EmbedderConfig) -> None:
    """Download FaceNet's weights, unless they are there.

    Raises DataError, saying where to put the file, if they cannot be fetched, or as `address`.
    """
    if config.kind != "facenet" or config.id is None:
        raise ValueError("models.identity names no weights file: only kind facenet with an id has one")
    file = Path(config.id)
    if file.is_file():
        return
    url = address()
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{file} is not there, and {url} cannot be fetched ({error}); download it by hand and put it "
            f"there, or correct models.identity.id"
        ) from error


def lock(config: WeightsConfig) -> None:
    """Hold weights files against their locks, load each once, and note those that no lock knows yet.

    Raises:
        FileNotFoundError: a file is missing. DataError: it is not what its lock says, or no such weights.
    """
    identity, lpips = config.identity, config.lpips
    if identity.kind == "facenet" and identity.id is not None:
        file = identity.id
        _hold({"models.identity.id": (file, "")}, identity.lock, lambda: FaceNetEmbedder(file))
    if lpips.id is not None and lpips.heads is not None:
        alexnet, heads = lpips.id, lpips.heads
        files = {"models.lpips.id": (alexnet, ALEXNET), "models.lpips.heads": (heads, LPIPS_HEADS)}
        _hold(files, lpips.lock, lambda: LPIPS(alexnet, heads))


def _hold(files: Mapping[str, tuple[str, str]], lock: Path, load: Callable[[], object]) -> None:
    """Verify files that the lock knows; note the others, if `load` takes them.

    `files` has, by key, the file and how its published SHA-256 begins; "" if none is published.
    """
    comments, hashes = lockfile.read(lock)
    new = {
        file: _hash(file, published, key) for key, (file, published) in files.items() if file not in hashes
    }
    for key, (file, _) in files.items():
        if file not in new:
            lockfile.verify(lock, file, key)
    load()
    if new:
        lockfile.write(lock, comments or [LOCK_HEADING], hashes | new)


def _hash(file: str, published: str, key: str) -> str:
    """SHA-256 of a file that is there. Raises FileNotFoundError, or DataError if another one is published."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is missing; put it there, or correct {key}")
    actual = file_hash(Path(file))
    if not actual.startswith(published):
        raise DataError(
            f"{file} has SHA-256 {actual}, but the published one begins with {published}; fetch it again, or "
            f"correct {key}"
        )
    return actual
