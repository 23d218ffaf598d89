"""Render the miniature's photos: what a download is for the paper preset.

Entry points, called by `python -m moa render`:

    run(config, split, shard, raw, truth)      one shard of photos and, apart from it, the truth about them
    run_subjects(config, split, output, …)     one photo of each evaluation subject, free or partly hidden

The truth file is read only by `moa.miniature.annotation`, which measures the annotators against it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moa.data.records import RAW, SUBJECT, TRUTH, Row, encode_image, encode_mask, sha256, write_rows
from moa.miniature.captions import task_caption
from moa.miniature.render import Rendered, render, render_subject
from moa.miniature.world import (
    Identity,
    Scene,
    identities,
    labels,
    sample_appearance,
    sample_prop,
    sample_scene,
)


@dataclass(frozen=True)
class RenderConfig:
    """How many photos of whom."""

    seed: int = 0
    size: int = 64  # side of a photo, pixels
    train: int = 3000  # photos for training, of the train identities
    validation: int = 300  # photos held out, of the validation identities
    shard_size: int = 500  # photos a file
    pairs: float = 0.3  # share of photos with two people
    props: float = 0.15  # share of photos in which something is held before a face or chest
    subjects_validation: int = 24  # identities on which choices are made, one photo each
    subjects_test: int = 30  # identities that are scored, one photo each

    def __post_init__(self) -> None:
        for name in ("size", "train", "validation", "shard_size", "subjects_validation", "subjects_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("pairs", "props"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share between 0 and 1, not {getattr(self, name)}")

    def photos(self, split: str) -> int:
        """Number of photos of "train" or "validation"; ValueError for another split."""
        if split not in ("train", "validation"):
            raise ValueError(f"photos are rendered for train and validation, not {split!r}")
        return self.train if split == "train" else self.validation

    def shards(self, split: str) -> int:
        """Number of files of a split."""
        return -(-self.photos(split) // self.shard_size)


def generator(seed: int, split: str, index: int) -> np.random.Generator:
    """The random generator of one photo; it depends on nothing else, shard size included."""
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def draw_scene(config: RenderConfig, split: str, index: int) -> tuple[Scene, str]:
    """Photo number `index` of a split, and a true caption of it."""
    rng = generator(config.seed, split, index)
    figures = 1 + int(rng.random() < config.pairs)
    scene = sample_scene(rng, identities(split), figures, prop=bool(rng.random() < config.props))  # type: ignore[arg-type]
    return scene, task_caption(scene, rng).text


def _photo(config: RenderConfig, split: str, index: int) -> tuple[Row, Row]:
    """The raw row and the truth row of a photo."""
    scene, caption = draw_scene(config, split, index)
    drawn, name = render(scene, config.size), f"{split}-{index:06d}"
    image = encode_image(drawn.image, f"{name}.png")
    raw = {
        "id": name,
        "image": image,
        "sha256": sha256(image["bytes"]),
        "width": config.size,
        "height": config.size,
        "source": "miniature",
    }
    figures = [labels(scene, figure) for figure in range(len(scene.identities))]
    truth = {
        "id": name,
        "scene": json.dumps(scene.to_dict(), sort_keys=True),
        "caption": caption,
        "mask": encode_mask(drawn.mask),
        "labels": json.dumps(figures),
    }
    return raw, truth


def run(config: RenderConfig, split: str, shard: int, raw: str | Path, truth: str | Path) -> None:
    """Write one shard, numbered from 0. Raises ValueError for a split or shard that there is not."""
    if not 0 <= shard < config.shards(split):
        raise ValueError(f"{split} has shards 0..{config.shards(split) - 1}, not {shard}")
    first = shard * config.shard_size
    indices = range(first, min(first + config.shard_size, config.photos(split)))
    pairs = [
        _photo(config, split, i) for i in tqdm(indices, desc=f"render {split}-{shard:03d}", unit="image")
    ]
    write_rows(raw, [pair[0] for pair in pairs], RAW)
    write_rows(truth, [pair[1] for pair in pairs], TRUTH)


def choose_subjects(split: str, count: int) -> list[Identity]:
    """`count` identities spread evenly over a split, men and women in turn, whatever their shares in it."""
    pool = identities(split)  # type: ignore[arg-type]
    men, women = ([i for i in pool if i.class_word == word] for word in ("man", "woman"))
    wanted = (-(-count // 2), count // 2)
    if wanted[0] > len(men) or wanted[1] > len(women):
        raise ValueError(f"{split} has {len(men)} men and {len(women)} women, too few for {count} subjects")
    chosen = [
        [group[i * len(group) // n] for i in range(n)] for group, n in zip((men, women), wanted, strict=True)
    ]
    return [chosen[i % 2][i // 2] for i in range(count)]


def subject_photo(config: RenderConfig, identity: Identity, occluded: bool = False) -> Rendered:
    """The photo of an evaluation subject; `occluded`, the same with something held before face or chest."""
    rng = generator(config.seed, f"subject/{identity.id}", 0)
    appearance, seed = sample_appearance(rng), int(rng.integers(2**31))
    prop = sample_prop(generator(config.seed, f"occluded/{identity.id}", 0)) if occluded else None
    return render_subject(identity, appearance, config.size, seed, prop)


def run_subjects(config: RenderConfig, split: str, output: str | Path, occluded: bool = False) -> None:
    """Write one photo each of the subjects of "validation" or "test"; `occluded` as in `subject_photo`."""
    if split not in ("validation", "test"):
        raise ValueError(f"evaluation subjects are those of validation or test, not of {split!r}")
    count = config.subjects_validation if split == "validation" else config.subjects_test
    rows = []
    for identity in choose_subjects(split, count):
        image = encode_image(subject_photo(config, identity, occluded).image, f"{identity.id}.png")
        rows.append(
            {
                "id": identity.id,
                "identity": identity.id,
                "word": identity.class_word,
                "image": image,
                "sha256": sha256(image["bytes"]),
            }
        )
    write_rows(output, rows, SUBJECT)
