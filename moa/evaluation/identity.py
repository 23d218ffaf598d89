"""Identity preservation (IP): how like its reference a generated face is.

Faces are found, embedded and compared by cosine, as FastComposer's evaluation does. One subject: the largest
face. Several: as many of the largest faces, matched greedily, and the worst match counts. A missing face or a
cosine below 0 scores 0. (FastComposer embeds a black crop for a missing face, which leaks a score above 0.)
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

from moa.choose import greedy_pairs
from moa.data.annotators import load
from moa.data.errors import DataError
from moa.data.records import bounding_box
from moa.data.segment import SegmentConfig
from moa.evaluation.boxes import Detection, tidy
from moa.evaluation.persons import PersonFinder, Persons
from moa.lockfile import verify
from moa.methods import ModelSource

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """How an image does against its references."""

    ip: float  # 0..1
    found: bool  # as many faces as references
    faces: int
    face_size: float  # smallest matched box, as a fraction of the image's area; 0 when one is missing


class Detector(Protocol):
    """Images to boxes."""

    def detect(self, images: Sequence[Image.Image]) -> list[Detection]: ...


class Embedder(Protocol):
    """Crops to unit vectors [N, D]."""

    def embed(self, crops: Sequence[Image.Image]) -> Floats: ...


@dataclass(frozen=True)
class DetectorConfig:
    """Which detector finds the faces."""

    kind: Literal["mtcnn", "segmenter"] = "mtcnn"
    id: str | None = None  # segmenter: folder or hub name; mtcnn's weights come with facenet-pytorch
    revision: str | None = None
    label: str = "person"  # segmenter: the class that is wanted
    threshold: float = 0.8  # segmenter: least score
    min_area: float = 0.01  # segmenter: least area, fraction of the image

    def segmenter(self, device: str) -> SegmentConfig:
        """The segmenter's settings. Raises ValueError naming the missing key."""
        if self.id is None:
            raise ValueError(
                "models.detector: kind segmenter needs the key id, the segmenter's folder or hub name"
            )
        model = ModelSource(self.id, self.revision)
        return SegmentConfig(model, label=self.label, threshold=self.threshold, device=device)


@dataclass(frozen=True)
class EmbedderConfig:
    """Which network says who it is."""

    kind: Literal["facenet", "auto", "color"] = "facenet"
    id: str | None = None  # facenet: the weights file; auto: folder or hub name of a transformers model
    revision: str | None = None
    lock: Path = Path("data/models.sha256")  # facenet: text file with the weights' SHA-256; keep it


# --- Detectors --------------------------------------------------------------------------------------------


SMALLEST_FACE = 20  # pixels: MTCNN looks for no smaller face, and for none in an image with a shorter side


class MTCNNDetector:
    """facenet-pytorch's MTCNN with FastComposer's settings; its weights are part of the package."""

    def __init__(self, device: str = "cpu"):
        from facenet_pytorch import MTCNN  # here, because the miniature does not need it

        self.model = MTCNN(
            image_size=160,
            margin=0,
            min_face_size=SMALLEST_FACE,
            thresholds=[0.6, 0.7, 0.7],
            factor=0.709,
            keep_all=True,
            device=torch.device(device),
        )

    def detect(self, images: Sequence[Image.Image]) -> list[Detection]:
        """Faces of RGB images; images of the same size go through the network together.

        There are none in an image with a side below `SMALLEST_FACE`, in which the network itself fails.
        """
        nobody = tidy(np.zeros((0, 4)), np.zeros(0), (1, 1))
        found = dict.fromkeys(range(len(images)), nobody)
        for size in {image.size for image in images if min(image.size) >= SMALLEST_FACE}:
            same = [index for index, image in enumerate(images) if image.size == size]
            boxes, scores = self.model.detect([images[index] for index in same])
            for index, box, score in zip(same, boxes, scores, strict=True):
                if box is not None:
                    found[index] = tidy(box, score, size)
        return [found[index] for index in range(len(images))]


def person_boxes(persons: Persons, image: Image.Image) -> Detection:
    """The boxes of a segmenter's persons."""
    boxes = np.array([bounding_box(mask) for mask in persons.masks], dtype=float)
    return tidy(boxes, persons.scores, image.size)


class PersonDetector:
    """A segmenter as a detector."""

    def __init__(self, finder: PersonFinder):
        self.finder = finder

    def detect(self, images: Sequence[Image.Image]) -> list[Detection]:
        """Persons of RGB images."""
        return [person_boxes(p, image) for p, image in zip(self.finder(images), images, strict=True)]


def load_detector(config: DetectorConfig, device: str = "cpu") -> Detector:
    """The configured detector. Raises ValueError naming the missing key."""
    if config.kind == "mtcnn":
        return MTCNNDetector(device)
    return PersonDetector(PersonFinder(config.segmenter(device), config.min_area))


# --- Embedders --------------------------------------------------------------------------------------------


def unit(vectors: NDArray) -> Floats:
    """Rows [N, D] scaled to length 1; a row of zeros stays one, so that it resembles nothing."""
    vectors = np.asarray(vectors, dtype=float)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class ColorEmbedder:
    """The mean colours of a 4 × 4 grid, less mid-grey: a judge must beat it to have seen more."""

    def embed(self, crops: Sequence[Image.Image]) -> Floats:
        """[N, 48] for RGB crops."""
        if not crops:
            return np.zeros((0, 48))
        cells = [
            np.asarray(c.convert("RGB").resize((4, 4), Image.Resampling.BOX), dtype=float) for c in crops
        ]
        return unit(np.stack(cells).reshape(len(crops), -1) / 127.5 - 1)


class FaceNetEmbedder:
    """InceptionResnetV1 trained on VGGFace2, on faces of 160 × 160 pixels."""

    def __init__(self, file: str | Path, device: str = "cpu"):
        """Load weights, without running any code of the file. Raises as `read_weights` and `fit`."""
        from facenet_pytorch import InceptionResnetV1

        state = read_weights(file)
        self.model = InceptionResnetV1(pretrained=None)
        fit(self.model, {k: v for k, v in state.items() if not k.startswith("logits.")}, file)
        self.model.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def embed(self, crops: Sequence[Image.Image]) -> Floats:
        """[N, 512] for RGB crops of any sizes, which are squeezed to squares."""
        if not crops:
            return np.zeros((0, 512))
        faces = [np.asarray(c.resize((160, 160), Image.Resampling.BILINEAR), dtype=np.float32) for c in crops]
        pixels = (torch.from_numpy(np.stack(faces)).permute(0, 3, 1, 2) - 127.5) / 128
        return unit(self.model(pixels.to(self.device)).cpu().numpy())


class AutoEmbedder:
    """Any transformers vision model whose pooled output tells identities apart."""

    def __init__(self, source: ModelSource, device: str = "cpu"):
        """Load model and image processor. Raises DataError naming the key and the cure if that fails."""
        self.processor = load(AutoImageProcessor, source, "identity", backend="pil")
        self.model = load(AutoModel, source, "identity", dtype=torch.float32).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def embed(self, crops: Sequence[Image.Image]) -> Floats:
        """[N, D] for RGB crops of any sizes; the model's own image processor resizes them."""
        if not crops:
            return np.zeros((0, 1))
        pixels = self.processor(images=list(crops), return_tensors="pt")["pixel_values"]
        return unit(self.model(pixel_values=pixels.to(self.device)).pooler_output.flatten(1).cpu().numpy())


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """Tensors by name of a file that PyTorch wrote; nothing of it is run. Raises DataError if it is none."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise DataError(
            f"{file} is no file of weights alone ({reason}); delete it, and fetch it again"
        ) from error
    if not isinstance(state, dict):
        raise DataError(f"{file} holds a {type(state).__name__}, no weights by name; take another file")
    return state


def fit(network: torch.nn.Module, state: Mapping[str, torch.Tensor], file: str | Path) -> None:
    """Put weights into a network. Raises DataError naming the file if they are another network's."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{file} holds no weights of {type(network).__name__}; take another file") from error


def load_embedder(config: EmbedderConfig, device: str = "cpu") -> Embedder:
    """The configured embedder. Raises ValueError naming the missing key, or as `lockfile.verify`."""
    if config.kind == "color":
        return ColorEmbedder()
    if config.id is None:
        raise ValueError(
            f"models.identity: kind {config.kind} needs the key id: a folder, a hub name or a weights file"
        )
    if config.kind == "facenet":
        verify(config.lock, config.id, "models.identity.id")
        return FaceNetEmbedder(config.id, device)
    return AutoEmbedder(ModelSource(config.id, config.revision), device)


# --- The score --------------------------------------------------------------------------------------------


def score(references: Floats, faces: Floats, sizes: Floats) -> Score:
    """Compare an image's faces with its references.

    Args:
        references: [S, D] unit vectors, one a subject.
        faces: [N, D] unit vectors, the largest face first.
        sizes: [N] areas of the faces' boxes, as fractions of the image's area.
    """
    wanted, number = len(references), len(faces)
    if number < wanted:
        return Score(0.0, False, number, 0.0)
    similarity = references @ faces[:wanted].T
    worst = min(float(similarity[match]) for match in greedy_pairs(similarity))
    return Score(max(worst, 0.0), True, number, float(sizes[:wanted].min()))
