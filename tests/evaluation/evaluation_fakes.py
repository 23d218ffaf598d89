"""Six subjects as flat colours, samples with known scores, and judges that need no training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from PIL import Image

from moa.evaluation import samples
from moa.evaluation.boxes import Detection
from moa.evaluation.features import Features, encode_persons

COLORS = ["red", "green", "blue", "yellow", "cyan", "magenta"]


def people(count: int = 6) -> list[SimpleNamespace]:
    """Subjects s0, s1, ...: women and men in turn."""
    return [SimpleNamespace(id=f"s{n}", word=("woman", "man")[n % 2]) for n in range(count)]


def make_rows(
    kind: str = "single", methods: tuple[str, ...] = ("prior", "moa", "ceiling")
) -> list[samples.Row]:
    """Two prompts for each of six subjects (or pairs); scores differ by method, subject and prompt."""
    names = (
        [(p.id,) for p in people()] if kind != "multi" else [(f"s{n}", f"s{(n + 1) % 6}") for n in range(6)]
    )
    rows = []
    for m, method in enumerate(methods):
        for s, members in enumerate(names):
            for prompt in range(2):
                spans = [[2 + 10 * n, 5 + 10 * n] for n in range(len(members))]
                text = " and ".join(["a man"] * len(members))
                request = {
                    "split": "test",
                    "kind": kind,
                    "subject": "+".join(members),
                    "subjects": list(members),
                    "words": ["man"] * len(members),
                    "prompt_id": f"group-{prompt:02d}",
                    "prompt_group": "group",
                    "prompt": f"{text} {prompt}",
                    "spans": spans,
                    "index": 0,
                    "seed": prompt if kind == "swap" else 10 * s + prompt,
                    "path": f"test/{kind}/{'+'.join(members)}.{prompt}.png",
                }
                scores = {
                    "members": list(members),
                    "ip": 0.2 + 0.3 * m + 0.02 * s - 0.01 * prompt,
                    "ip_color": 0.1,
                    "pc": 0.25 - 0.01 * m + 0.001 * s,
                    "found": s > 0,
                    "faces": len(members),
                    "face_size": 0.3,
                }
                seed = 0 if method == "moa" else None
                rows.append({**samples.made(request, method, 0.5, seed), **scores})
    return rows


class ColorJudges:
    """Judges that see the upper left pixel's colour as the identity, and nobody in a black image."""

    def __init__(self, config: object) -> None:
        self.config = SimpleNamespace(batch_size=4)
        self.clip = SimpleNamespace(text_features=lambda prompts: np.tile([1.0, 0.0], (len(prompts), 1)))

    def look(self, images: list[Image.Image]) -> list[Features]:
        return [self._look(np.asarray(image.convert("RGB"), dtype=float)) for image in images]

    def _look(self, pixels: np.ndarray) -> Features:
        height, width = pixels.shape[:2]
        faces = [pixels[0, 0], pixels[0, -1]] if (pixels[0, 0] != pixels[0, -1]).any() else [pixels[0, 0]]
        faces = [f / np.linalg.norm(f) for f in faces if f.any()]
        boxes = np.array([[0, 0, width / (1 + n), height] for n in range(len(faces))]).reshape(-1, 4)
        vectors = np.array(faces).reshape(-1, 3)
        persons = np.zeros((height, width), dtype=bool)
        persons[:, : width // 4] = bool(faces)
        return Features(
            (width, height),
            Detection(boxes, np.ones(len(faces))),
            vectors,
            vectors,
            np.array([0.6, 0.8]),
            encode_persons(persons),
        )
