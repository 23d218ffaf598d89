"""Rendered scenes in memory, for training and judging the miniature's own models.

A corpus is a pure function of (split, size, seed): the same arguments give the same bytes. It is cached in a
folder, because two cores need minutes for tens of thousands of pictures.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moa.files import write_atomically
from moa.hashing import code_hash, settings_hash
from moa.miniature.captions import Caption, loose_caption, task_caption, web_caption
from moa.miniature.render import render
from moa.miniature.world import Scene, Split, identities, labels, sample_scene

CHUNK = 250  # scenes rendered by one process at a time
PAIR_SHARE, PROP_SHARE = 0.3, 0.05  # of all scenes; a prop may be in either kind


@dataclass(frozen=True)
class Corpus:
    """N scenes with their pixels; captions are drawn anew at every use."""

    images: np.ndarray  # uint8 [N, 64, 64, 3]
    masks: np.ndarray  # uint8 [N, 64, 64]; 0 = background, i + 1 = figure i
    scenes: tuple[Scene, ...]
    sha256: str  # of images and masks: the data hash in model cards

    def __len__(self) -> int:
        return len(self.scenes)

    @cached_property
    def _by_figures(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the scenes with one figure, and of those with two."""
        counts = np.array([len(scene.identities) for scene in self.scenes])
        return np.flatnonzero(counts == 1), np.flatnonzero(counts == 2)

    def draw(self, rng: np.random.Generator, size: int, pairs: float) -> np.ndarray:
        """Indices [size] of random scenes, each with two figures with probability `pairs`."""
        single, double = self._by_figures
        return np.where(rng.random(size) < pairs, rng.choice(double, size), rng.choice(single, size))

    def captions(
        self, indices: np.ndarray, rng: np.random.Generator, web_share: float, loose_share: float = 0.0
    ) -> list[Caption]:
        """A new caption for each scene: a loose one with probability `loose_share`; of all others, a web
        caption with probability `web_share`, else a task caption."""

        def one(scene: Scene) -> Caption:
            if loose_share and rng.random() < loose_share:
                return loose_caption(scene, rng)
            return (web_caption if rng.random() < web_share else task_caption)(scene, rng)

        return [one(self.scenes[i]) for i in indices]

    def labels(self, figure: int = 0) -> dict[str, np.ndarray]:
        """Class index [N] of every attribute of one figure; −1 where the scene lacks that figure."""
        rows = [labels(s, figure) if figure < len(s.identities) else None for s in self.scenes]
        names = labels(self.scenes[0]).keys()
        return {n: np.array([-1 if row is None else row[n] for row in rows]) for n in names}


def scene(
    split: Split, index: int, seed: int, pair_share: float = PAIR_SHARE, prop_share: float = PROP_SHARE
) -> Scene:
    """Scene number `index` of a corpus."""
    rng = np.random.default_rng([seed, index, *hashlib.sha256(split.encode()).digest()[:4]])
    figures = 2 if rng.random() < pair_share else 1
    return sample_scene(rng, identities(split), figures, bool(rng.random() < prop_share))


def _chunk(task: tuple[Split, int, int, int, float, float]) -> tuple[np.ndarray, np.ndarray, list[Scene]]:
    split, start, stop, seed, pair_share, prop_share = task
    scenes = [scene(split, i, seed, pair_share, prop_share) for i in range(start, stop)]
    pictures = [render(s) for s in scenes]
    return np.stack([p.image for p in pictures]), np.stack([p.mask for p in pictures]), scenes


def _make(
    split: Split, count: int, seed: int, pair_share: float, prop_share: float
) -> tuple[np.ndarray, np.ndarray, list[Scene]]:
    tasks = [(split, i, min(i + CHUNK, count), seed, pair_share, prop_share) for i in range(0, count, CHUNK)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        parts = list(tqdm(pool.map(_chunk, tasks), total=len(tasks), desc=f"render {split}", unit="chunk"))
    images, masks, scenes = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(masks), [s for part in scenes for s in part]


def drawing() -> str:
    """Hash of the code that pictures follow from: the renderer with the world, and how scenes are chosen."""
    sources = [inspect.getsource(function) for function in (scene, _chunk)]
    return settings_hash([code_hash("moa.miniature.render"), *sources])


def load(
    split: Split,
    count: int,
    seed: int,
    cache: Path,
    pair_share: float = PAIR_SHARE,
    prop_share: float = PROP_SHARE,
) -> Corpus:
    """The corpus, from `cache` when it is there, else rendered and kept there (atomically)."""
    name = f"{split}-{count}-{seed}-{pair_share:g}-{prop_share:g}-{drawing()}"
    file = cache / f"{name}.npz"
    if not file.exists():
        images, masks, drawn = _make(split, count, seed, pair_share, prop_share)
        text = np.array(json.dumps([s.to_dict() for s in drawn]))
        write_atomically(file, lambda part: np.savez(part, images=images, masks=masks, scenes=text))
    with np.load(file, allow_pickle=False) as data:
        images, masks, scenes = data["images"], data["masks"], json.loads(str(data["scenes"]))
    digest = hashlib.sha256(images.tobytes() + masks.tobytes()).hexdigest()
    return Corpus(images, masks, tuple(Scene.from_dict(s) for s in scenes), digest)
