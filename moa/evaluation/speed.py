"""What scoring in batches saves, and that it changes nothing: `snakemake benchmark_scoring`.

    look    the judges of the configuration on drawn pictures: each by itself, or in batches
    score   the same with what belongs to a score: the reference's photo and the prompt's text. One at a time,
            nothing is kept from one image to the next; in batches, every photo and every text is seen once
    facenet, clip, mask2former    judges of true size with random weights, since time does not depend on them
    mtcnn   with the weights of its package, for what its cascade looks at does

Both ways take turns, so that what else the machine does falls on both; the medians over the turns are kept.
"""

from __future__ import annotations

import csv
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from moa.data.benchmark import random_mask2former
from moa.data.segment import SegmentConfig
from moa.evaluation.identity import FaceNetEmbedder, MTCNNDetector
from moa.evaluation.judges import Judges, ScoreConfig
from moa.evaluation.persons import PersonFinder
from moa.evaluation.prompt import ClipJudge
from moa.evaluation.references import faces_of, look_at_photos
from moa.evaluation.samples import Row
from moa.evaluation.score import score_row
from moa.files import write_atomically
from moa.machine import processor
from moa.methods import ModelSource
from moa.miniature.captions import Wording, task_caption
from moa.miniature.dataset import generator
from moa.miniature.render import render, render_subject
from moa.miniature.world import Identity, Scene, identities, sample_appearance, sample_scene

Values = NDArray[np.float64]  # [N, …]: what was computed of each image
Way = Callable[[], Values]
SCORES = ("ip", "ip_color", "pc", "face_size")
COLUMNS = (
    "models",
    "what",
    "images",
    "batch_size",
    "seconds_one",
    "seconds_batch",
    "speedup",
    "largest_difference",
    "repeats",
    "threads",
    "torch",
    "processor",
)
VIT_L14: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
"""The image tower of CLIP ViT-L/14."""
SIDE = 512  # pixels of Stable Diffusion 1.5's images, which MTCNN looks at as they are
SEGMENTER_SIDE = 384  # pixels that Mask2Former's image processor makes of them


@dataclass(frozen=True)
class SpeedConfig(ScoreConfig):
    """Settings of the stage `benchmark-scoring`: those of the judges, and what they look at."""

    subjects: int = 8  # of whom pictures are drawn
    prompts: int = 12  # pictures of each
    repeats: int = 5  # turns
    true_size_images: int = 8  # for judges of true size, all in one batch; 0 leaves these out

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("subjects", "prompts", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")


@dataclass(frozen=True)
class Pictures:
    """Rows to be scored, their images, and the subjects' photos."""

    rows: list[Row]
    images: list[Image.Image]
    photos: dict[str, Image.Image]


def draw(config: SpeedConfig) -> Pictures:
    """True pictures of validation identities in the same contexts; the captions of the first are prompts."""
    found = Pictures([], [], {})
    people = identities("validation")[: config.subjects]
    prompts = [
        task_caption(_scene(people[0], number), generator(0, "speed", number), Wording(1.0, 0.0, 0.0)).text
        for number in range(config.prompts)
    ]
    for person in people:
        rng = generator(0, f"speed/{person.id}", 0)
        found.photos[person.id] = Image.fromarray(render_subject(person, sample_appearance(rng)).image)
        for number, prompt in enumerate(prompts):
            text = re.sub(r"\b(wo)?man\b", person.class_word, prompt)
            found.rows.append({"subjects": [person.id], "prompt": text})
            found.images.append(Image.fromarray(render(_scene(person, number)).image))
    return found


def _scene(person: Identity, number: int) -> Scene:
    """Someone in the context of that number."""
    return sample_scene(generator(0, "speed", number), [person])


def in_parts(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Values in groups of at most `size`, in order."""
    return (values[start : start + size] for start in range(0, len(values), size))


# --- What is compared: the same work, both ways -----------------------------------------------------------


def look(judges: Judges, images: Sequence[Image.Image], size: int) -> Values:
    """CLIP's vector and the largest face's of each image, `size` images at once."""
    seen = [features for part in in_parts(images, size) for features in judges.look(part)]
    nobody = np.zeros(max((f.identity.shape[1] for f in seen), default=0))
    return np.stack([np.concatenate([f.clip, f.identity[0] if len(f.identity) else nobody]) for f in seen])


def score(judges: Judges, pictures: Pictures, size: int) -> Values:
    """`SCORES` of each image, `size` images, with all that they need, at once."""
    found = []
    for part in in_parts(list(zip(pictures.rows, pictures.images, strict=True)), size):
        rows, images = zip(*part, strict=True)
        names = {name for row in rows for name in row["subjects"]}
        photos = {name: pictures.photos[name] for name in names}
        references = faces_of(look_at_photos(judges, photos), names)
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        texts = dict(zip(prompts, judges.clip.text_features(prompts), strict=True))
        seen = [f for few in in_parts(images, judges.config.batch_size) for f in judges.look(few)]
        scored = [
            score_row(row, f, references, texts[row["prompt"]]) for row, f in zip(rows, seen, strict=True)
        ]
        found += [[row[name] for name in SCORES] for row in scored]
    return np.array(found)


class RandomFaceNet(FaceNetEmbedder):
    """InceptionResnetV1 with random weights."""

    def __init__(self, device: str) -> None:
        from facenet_pytorch import InceptionResnetV1

        self.model, self.device = InceptionResnetV1(pretrained=None).to(device).eval(), device


class RandomClip(ClipJudge):
    """CLIP ViT-L/14's image tower with random weights; its text tower, which is not timed, is small."""

    def __init__(self, device: str) -> None:
        config = CLIPConfig(text_config={"num_hidden_layers": 1}, vision_config=VIT_L14, projection_dim=768)
        self.model, self.device = CLIPModel(config).eval(), device
        self.model.to(device)  # type: ignore[arg-type]  # its stub hides the argument
        self.processor = CLIPImageProcessorPil()


def faces(device: str, images: Sequence[Image.Image]) -> Callable[[int], Values]:
    """FaceNet's vectors of images, as a function of how many it takes at once."""
    judge = RandomFaceNet(device)
    return lambda size: np.concatenate([judge.embed(part) for part in in_parts(images, size)])


def whole(device: str, images: Sequence[Image.Image]) -> Callable[[int], Values]:
    """CLIP's vectors likewise."""
    judge = RandomClip(device)
    return lambda size: np.concatenate([judge.image_features(part) for part in in_parts(images, size)])


def enlarged(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Images of the size of those that the paper preset scores."""
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]


def detected(device: str, images: Sequence[Image.Image]) -> Callable[[int], Values]:
    """MTCNN's faces likewise: how many, and box and score of the largest, 0 if there is none."""
    judge, images = MTCNNDetector(device), enlarged(images)

    def look(size: int) -> Values:
        seen = [faces for part in in_parts(images, size) for faces in judge.detect(part)]
        largest = [np.r_[f.boxes[0], f.scores[0]] if len(f.boxes) else np.zeros(5) for f in seen]
        return np.stack([np.r_[len(f.boxes), one] for f, one in zip(seen, largest, strict=True)])

    return look


def segments(device: str, images: Sequence[Image.Image]) -> Callable[[int], Values]:
    """Mask2Former's queries likewise, classes and masks as logits, and what is made of them."""
    with tempfile.TemporaryDirectory() as folder:
        random_mask2former(Path(folder), SEGMENTER_SIDE, true_size=True)
        judge = PersonFinder(SegmentConfig(ModelSource(folder), device=device))
    images, queries = enlarged(images), []

    def keep(model: object, given: object, out: Any) -> None:
        logits = (out.class_queries_logits, out.masks_queries_logits)
        queries.append(torch.cat([values.flatten(1) for values in logits], dim=1).float().cpu().numpy())

    judge.segmenter.model.register_forward_hook(keep)

    def look(size: int) -> Values:
        queries.clear()
        for part in in_parts(images, size):
            judge(part)
        return np.concatenate(queries)

    return look


TRUE_SIZE = {"facenet": faces, "clip": whole, "mtcnn": detected, "mask2former": segments}


# --- The stage --------------------------------------------------------------------------------------------


def compare(one: Way, batch: Way, repeats: int, name: str) -> dict[str, float]:
    """Median seconds of both ways, taken in turns after one turn of each to warm up, and how they differ."""
    values = [way() for way in (one, batch)]
    taken: list[list[float]] = [[], []]
    for _ in tqdm(range(repeats), f"time: {name}"):
        for seconds, way in zip(taken, (one, batch), strict=True):
            started = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - started)
    alone, together = map(statistics.median, taken)
    return {
        "seconds_one": alone,
        "seconds_batch": together,
        "speedup": alone / together,
        "largest_difference": float(np.abs(values[0] - values[1]).max()),
    }


def measure(config: SpeedConfig) -> Iterator[dict[str, Any]]:
    """The table's rows."""
    pictures, judges = draw(config), Judges(config)
    images, size = pictures.images, config.batch_size
    about = {"models": "configured", "images": len(images), "batch_size": size, "repeats": config.repeats}
    ways: dict[str, tuple[Way, Way]] = {
        "look": (lambda: look(judges, images, 1), lambda: look(judges, images, size)),
        "score": (lambda: score(judges, pictures, 1), lambda: score(judges, pictures, len(images))),
    }
    for name, (one, batch) in ways.items():
        yield about | {"what": name} | compare(one, batch, config.repeats, name)
    some = images[: config.true_size_images]
    if not some:
        return
    about |= {"images": len(some), "batch_size": len(some)}
    for name, load in TRUE_SIZE.items():
        about["models"] = "facenet-pytorch's" if name == "mtcnn" else "true size, random"
        torch.manual_seed(0)
        way = load(config.device, some)
        times = compare(partial(way, 1), partial(way, len(some)), config.repeats, name)
        yield about | {"what": name} | times


def run(config: SpeedConfig, output: Path) -> None:
    """Write scoring.csv. Raises DataError for a judge that cannot be loaded."""
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "processor": processor(config.device),
    }
    rows = [_written(row | machine) for row in measure(config)]

    def write(part: Path) -> None:
        with part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    write_atomically(output, write)


def _written(row: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits of every number that was measured."""
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
