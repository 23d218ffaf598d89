"""What the miniature's models can do, measured on held-out identities, before anything is built on them.

Each `measure_*` returns rows (gate, measure, value, goal, count). A missed goal is reported, not hidden.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from moa.data.annotators import ModelSource
from moa.data.caption import CaptionConfig, Captioner
from moa.data.segment import SegmentConfig
from moa.evaluation.identity import AutoEmbedder, ColorEmbedder, Embedder
from moa.evaluation.persons import PersonFinder, Persons
from moa.evaluation.prompt import ClipJudge
from moa.files import write_atomically
from moa.losses import masked_loss
from moa.miniature import corpus, models
from moa.miniature.annotation import caption_cases, overlaps
from moa.miniature.captions import Caption, Wording, caption, loose_caption, task_caption
from moa.miniature.recipes.clip import changed
from moa.miniature.recipes.judges import FIGURE_ATTRIBUTES, box, crop
from moa.miniature.recipes.prior import encode_texts
from moa.miniature.recipes.vae import encode_latents
from moa.miniature.render import background, render
from moa.miniature.world import (
    ATTRIBUTES,
    CONTEXT_ATTRIBUTES,
    IDENTITY_ATTRIBUTES,
    Identity,
    Scene,
    identities,
    labels,
    mutate,
    sample_scene,
)
from moa.sampling import load_image_encoder

PROBED = 4  # times as many pictures of pretraining identities for the probes of the image encoder
Row = tuple[str, str, float, float | None, int]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, the last two exclusive
PROMPT = Wording(context=1.0, generic=0.0, prefix=0.0)
LOOKS = Wording(context=1.0, generic=0.0, prefix=0.0, identity=1.0)  # and all of who it is


@dataclass(frozen=True)
class GatesConfig:
    """How much is measured."""

    images: int = 600  # rendered scenes of validation identities, for judges, annotators and autoencoder
    generated: int = 200  # pictures drawn by the prior, single figures; half as many again for pairs
    steps: int = 25  # sampling steps of the prior
    guidance: float = 3.0
    detector_threshold: float = 0.5  # least score of a person: that of `models.detector`
    threads: int = 2
    seed: int = 1


# --- Identity ---------------------------------------------------------------------------------------------


def figure_crop(scene: Scene, figure: int = 0) -> Image.Image:
    """The rendered figure's box."""
    picture = render(scene)
    bounds = box(picture.mask, figure)
    if bounds is None:
        raise ValueError(f"figure {figure} of {scene} cannot be seen")
    return Image.fromarray(picture.image).crop(bounds)


def _photo(identity: Identity, rng: np.random.Generator) -> Image.Image:
    return figure_crop(sample_scene(rng, [identity], 1))


def auc(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """Probability that a positive scores above a negative (ties count half)."""
    difference = positive[:, None] - negative[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def measure_identity(name: str, embedder: Embedder, seed: int, goals: bool) -> list[Row]:
    """R@1 among the validation identities, and AUC against people who differ in one attribute."""
    rng = np.random.default_rng(seed)
    people = identities("validation")
    gallery, probe = (embedder.embed([_photo(p, rng) for p in people]) for _ in range(2))
    hits = (probe @ gallery.T).argmax(1) == np.arange(len(people))
    others = embedder.embed([_photo(mutate(p, rng), rng) for p in people])
    same, different = (probe * gallery).sum(1), (others * gallery).sum(1)
    count = len(people)
    return [
        (name, "R@1", float(hits.mean()), 0.85 if goals else None, count),
        (name, "AUC, one attribute apart", auc(same, different), 0.95 if goals else None, count),
    ]


def probe(known: Tensor, classes: Tensor, other: Tensor) -> Tensor:
    """Classes [M] of features [M, D] by a linear classifier (ridge 1e-2) fitted to other features [N, D]."""
    mean, std = known.mean(0), known.std(0)
    known, other = (known - mean) / std, (other - mean) / std
    head = nn.Linear(known.shape[1], int(classes.max()) + 1)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(known), classes) + 1e-2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head(other).argmax(1)


def measure_image_encoder(source: ModelSource, known: corpus.Corpus, data: corpus.Corpus) -> list[Row]:
    """How well its embeddings of whole photos of `data` tell who somebody is, by probes fitted to `known`."""
    encoder, processor = load_image_encoder(source)

    @torch.no_grad()
    def embed(images: NDArray[np.uint8]) -> Tensor:
        pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        return torch.cat([encoder(part).image_embeds for part in pixels["pixel_values"].split(64)])

    chosen = _singles(data)
    seen, other = embed(known.images), embed(data.images[chosen])
    rows: list[Row] = []
    for name in ("class", *IDENTITY_ATTRIBUTES):
        found = probe(seen, torch.from_numpy(known.labels(0)[name]), other).numpy()
        right = found == data.labels(0)[name][chosen]
        rows.append(("image_encoder", f"linear probe: {name}", float(right.mean()), None, len(chosen)))
    return rows


# --- Attributes -------------------------------------------------------------------------------------------


class AttributeJudge:
    """The attribute classifier: figures from their boxes, the background from the whole picture."""

    def __init__(self, folder: Path):
        self.model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def _predict(self, pictures: NDArray[np.uint8]) -> dict[str, NDArray[np.int64]]:
        parts = [
            self.model(pixel_values=models.judge_pixels(pictures[i : i + 64])).logits
            for i in range(0, len(pictures), 64)
        ]
        split = models.split_logits(torch.cat(parts))
        return {name: logits.argmax(1).numpy() for name, logits in split.items()}

    def __call__(
        self, images: Sequence[NDArray[np.uint8]], boxes: Sequence[Box]
    ) -> dict[str, NDArray[np.int64]]:
        """Class index [N] of every attribute, for one figure a picture."""
        size = models.JUDGE_SIZE
        figures = self._predict(np.stack([crop(i, b, size) for i, b in zip(images, boxes, strict=True)]))
        whole = self._predict(np.stack([crop(i, (0, 0, i.shape[1], i.shape[0]), size) for i in images]))
        return {n: (figures if n in FIGURE_ATTRIBUTES else whole)[n] for n in ATTRIBUTES}


def _accuracy(found: dict[str, NDArray[Any]], true: Iterable[dict[str, int]]) -> dict[str, float]:
    rows = list(true)
    return {n: float(np.mean([f == r[n] for f, r in zip(found[n], rows, strict=True)])) for n in ATTRIBUTES}


def _singles(data: corpus.Corpus) -> list[int]:
    return [
        i
        for i, s in enumerate(data.scenes)
        if len(s.identities) == 1 and s.prop is None and data.masks[i].any()
    ]


def measure_autoencoder(judge: AttributeJudge, pipeline: Any, data: corpus.Corpus) -> list[Row]:
    """The classifier's accuracy on originals, and on reconstructions as a share of it (NaN where it is 0)."""
    chosen = _singles(data)
    images = [data.images[i] for i in chosen]
    boxes = [box(data.masks[i], 0) or (0, 0, 64, 64) for i in chosen]
    truth = [labels(data.scenes[i]) for i in chosen]
    rebuilt = reconstruct(pipeline.vae, np.stack(images))
    before, after = (_accuracy(judge(pictures, boxes), truth) for pictures in (images, list(rebuilt)))
    names = [n for n in ATTRIBUTES if n != "prop"]
    kept = {n: after[n] / before[n] if before[n] else float("nan") for n in names}
    error = ((np.stack(images).astype(float) - rebuilt) / 255) ** 2
    psnr = float(np.mean(-10 * np.log10(error.mean(axis=(1, 2, 3)))))
    return [
        *(("attributes", f"accuracy: {n}", before[n], None, len(chosen)) for n in names),
        *(("autoencoder", f"kept: {n}", kept[n], 0.95, len(chosen)) for n in names),
        ("autoencoder", "PSNR, dB", psnr, None, len(chosen)),
    ]


@torch.inference_mode()
def reconstruct(vae: Any, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] → the same through the autoencoder."""
    parts = []
    for i in range(0, len(images), 64):
        x = models.judge_pixels(images[i : i + 64])
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        parts.append(((y.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


# --- Annotators and the judge of prompts ------------------------------------------------------------------


def find_figures(finder: PersonFinder, data: corpus.Corpus) -> tuple[NDArray[Any], list[bool]]:
    """IoU of every true figure with its best segment (0 where it was not found), and whether counts agree."""
    best: list[float] = []
    agree: list[bool] = []
    for start in range(0, len(data), 64):
        part = slice(start, start + 64)
        found = finder([Image.fromarray(image) for image in data.images[part]])
        for scene, mask, persons in zip(data.scenes[part], data.masks[part], found, strict=True):
            ids = np.zeros_like(mask)
            for k, person in enumerate(persons.masks):
                ids[person] = k + 1
            best += [float(row.max(initial=0.0)) for row in overlaps(ids, mask, len(scene.identities))]
            agree.append(len(persons.masks) == len(scene.identities))
    return np.array(best), agree


def measure_segmenter(finder: PersonFinder, data: corpus.Corpus) -> list[Row]:
    """Mean IoU of every true figure with its best segment, and how often as many are found as there are."""
    ious, agree = find_figures(finder, data)
    return [
        ("segmenter", "IoU", float(ious.mean()), 0.9, len(ious)),
        ("segmenter", "right number of people", float(np.mean(agree)), None, len(agree)),
    ]


FOUND = 0.5  # least IoU of a person with a figure that it is said to be


def garbage(data: corpus.Corpus, seed: int) -> dict[str, NDArray[np.uint8]]:
    """Pictures of nobody, as many of each kind as of the corpus: uint8 [N, H, W, 3]."""
    rng = np.random.default_rng(seed)
    count, size = len(data), data.images.shape[1]
    patches = data.images.reshape(count, size // 8, 8, size // 8, 8, 3).swapaxes(2, 3)
    shuffled = np.stack([rng.permutation(cut.reshape(-1, 8, 8, 3)) for cut in patches])
    return {
        "empty backgrounds": np.stack([background(scene.context, size) for scene in data.scenes]),
        "shuffled patches": shuffled.reshape(patches.shape).swapaxes(2, 3).reshape(data.images.shape),
        "noise": rng.integers(0, 256, data.images.shape, dtype=np.uint8),
    }


def measure_detector(finder: PersonFinder, data: corpus.Corpus, seed: int) -> list[Row]:
    """Share of the figures that are found, and of pictures of nobody in which somebody is."""
    best, _ = find_figures(finder, data)
    rows: list[Row] = [("detector", "recall, IoU above .5", float(np.mean(best > FOUND)), None, len(best))]
    for name, pictures in garbage(data, seed).items():
        parts = [pictures[i : i + 64] for i in range(0, len(pictures), 64)]
        seen = [len(p.masks) > 0 for part in parts for p in finder([Image.fromarray(x) for x in part])]
        rows.append(("detector", f"somebody found in {name}", float(np.mean(seen)), None, len(seen)))
    return rows


STATED = ("people", "class", "prop", *CONTEXT_ATTRIBUTES)  # what a caption may be right about


def measure_captioner(captioner: Captioner, data: corpus.Corpus) -> list[Row]:
    """How often an attribute is named, and how often what is said of it is right.

    What is never said has the row NaN with the count 0: its goal is missed.
    """
    cases: dict[str, list[float]] = {f"caption.{name}.right": [] for name in STATED}
    for i in range(0, len(data), 64):
        texts = captioner([Image.fromarray(x) for x in data.images[i : i + 64]])
        for text, scene in zip(texts, data.scenes[i : i + 64], strict=True):
            caption_cases(text, scene, cases)
    return [
        (
            "captioner",
            name.removeprefix("caption."),
            float(np.mean(v)) if v else float("nan"),
            0.9 if name.endswith("right") else None,
            len(v),
        )
        for name, v in sorted(cases.items())
    ]


def measure_clip_judge(judge: ClipJudge, data: corpus.Corpus, seed: int) -> list[Row]:
    """How often a picture is closer to its own prompt than to one with a single context attribute changed."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    chosen = _singles(data)
    features = judge.image_features([Image.fromarray(data.images[i]) for i in chosen])
    for name in CONTEXT_ATTRIBUTES:
        right, wrong = [], []
        for i in chosen:
            scene, key = data.scenes[i], int(rng.integers(2**31))
            right.append(task_caption(scene, np.random.default_rng(key), PROMPT).text)
            wrong.append(task_caption(changed(scene, name, rng), np.random.default_rng(key), PROMPT).text)
        a, b = ((features * judge.text_features(texts)).sum(1) for texts in (right, wrong))
        rows.append(("clip_judge", f"prefers the right {name}", float((a > b).mean()), 0.9, len(chosen)))
    return rows


# --- Prior ------------------------------------------------------------------------------------------------


def draw(pipeline: Any, prompts: Sequence[str], settings: GatesConfig) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3]; picture i from seed i."""
    parts = []
    for i in tqdm(range(0, len(prompts), 32), "draw", unit="batch"):
        batch = list(prompts[i : i + 32])
        generators = [
            torch.Generator().manual_seed(settings.seed * 100_000 + i + k) for k in range(len(batch))
        ]
        out = pipeline(
            batch,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type="np",
        )
        parts.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def figure_box(found: Persons) -> Box | None:
    """The box of the largest person; None if nobody was found."""
    return box(found.masks[0].astype(np.uint8), 0) if len(found.masks) else None


def _judged(
    judge: AttributeJudge, images: NDArray[np.uint8], boxes: Sequence[Box | None]
) -> dict[str, NDArray[np.int64]]:
    """Class index [N] of every attribute; pictures are judged whole where nobody was found."""
    return judge(list(images), [b or (0, 0, 64, 64) for b in boxes])


def _drawn_right(
    judge: AttributeJudge, images: NDArray[np.uint8], boxes: Sequence[Box | None], scenes: Sequence[Scene]
) -> dict[str, float]:
    """The share of pictures that show each attribute as their scene has it."""
    return _accuracy(_judged(judge, images, boxes), map(labels, scenes))


def _looks_right(
    found: dict[str, NDArray[np.int64]], scenes: Sequence[Scene], said: Sequence[Caption]
) -> list[Row]:
    """Of each attribute of identity, the share drawn as named among pictures whose caption names it.

    No caption names what somebody lacks, a beard or glasses: there the prior is free.
    """
    rows: list[Row] = []
    for name in IDENTITY_ATTRIBUTES:
        named = [i for i, c in enumerate(said) if name in c.facts["figures"][0]]
        right = [found[name][i] == labels(scenes[i])[name] for i in named]
        value = float(np.mean(right)) if right else float("nan")
        rows.append(("prior", f"drawn as named: {name}", value, 0.8, len(named)))
    return rows


def measure_prior(
    pipeline: Any, judge: AttributeJudge, finder: PersonFinder, settings: GatesConfig
) -> tuple[list[Row], NDArray[np.uint8]]:
    """Whether named context attributes are drawn, and two people where two are named; and 64 samples."""
    scenes = [
        corpus.scene("validation", i, 77, pair_share=0.0, prop_share=0.0) for i in range(settings.generated)
    ]
    pairs = [
        corpus.scene("validation", i, 78, pair_share=1.0, prop_share=0.0)
        for i in range(settings.generated // 2)
    ]
    rng = np.random.default_rng(settings.seed)
    texts, pair_texts = ([task_caption(s, rng, PROMPT).text for s in group] for group in (scenes, pairs))
    images, pair_images = draw(pipeline, texts, settings), draw(pipeline, pair_texts, settings)
    people = finder([Image.fromarray(i) for i in images])
    right = _drawn_right(judge, images, [figure_box(p) for p in people], scenes)
    loose_images = draw(pipeline, [loose_caption(s, rng).text for s in pairs], settings)
    two, loose = (
        float(np.mean([len(p.masks) == 2 for p in finder([Image.fromarray(i) for i in drawn])]))
        for drawn in (pair_images, loose_images)
    )
    rows: list[Row] = [
        ("prior", f"drawn as named: {n}", right[n], 0.8, len(scenes)) for n in ("class", *CONTEXT_ATTRIBUTES)
    ]
    rows += [
        (
            "prior",
            "one person where one is named",
            float(np.mean([len(p.masks) == 1 for p in people])),
            None,
            len(people),
        ),
        ("prior", "two people where two are named", two, 0.9, len(pairs)),
        ("prior", "two people where two are named loosely", loose, 0.9, len(pairs)),
    ]
    return rows, np.concatenate([images[:40], pair_images[:16], loose_images[:8]])


def measure_props(
    pipeline: Any, judge: AttributeJudge, finder: PersonFinder, settings: GatesConfig
) -> list[Row]:
    """Whether what somebody holds is told apart, kept by the autoencoder, and drawn where it is named."""
    count = settings.generated
    scenes = [corpus.scene("validation", i, 80, pair_share=0.0, prop_share=1.0) for i in range(count)]
    rendered = [render(scene) for scene in scenes]
    true, boxes = np.stack([r.image for r in rendered]), [box(r.mask, 0) for r in rendered]
    before, after = (
        _drawn_right(judge, images, boxes, scenes)["prop"]
        for images in (true, reconstruct(pipeline.vae, true))
    )
    rng = np.random.default_rng(settings.seed)
    drawn = draw(pipeline, [caption(scene, rng, PROMPT).text for scene in scenes], settings)
    found = [figure_box(p) for p in finder([Image.fromarray(i) for i in drawn])]
    right = _drawn_right(judge, drawn, found, scenes)["prop"]
    return [
        ("attributes", "accuracy: prop", before, None, count),
        ("autoencoder", "kept: prop", after / before if before else float("nan"), 0.95, count),
        ("prior", "drawn as named: prop", right, 0.8, count),
    ]


def measure_likeness(
    pipeline: Any, judge: AttributeJudge, embedder: Embedder, finder: PersonFinder, settings: GatesConfig
) -> list[Row]:
    """Whether looks that the prompt names are drawn, and IP when it names all of them, and none.

    How well the prior could draw people whom it knew: what personalization can reach without drawing better.
    Who is not found has an IP of 0.
    """
    scenes = [
        corpus.scene("validation", i, 79, pair_share=0.0, prop_share=0.0) for i in range(settings.generated)
    ]
    rng = np.random.default_rng(settings.seed)
    photos = embedder.embed([_photo(scene.identities[0], rng) for scene in scenes])
    rows: list[Row] = []
    for name, wording in (("named", LOOKS), ("not named", PROMPT)):
        said = [caption(scene, rng, wording) for scene in scenes]
        images = draw(pipeline, [c.text for c in said], settings)
        pictures = [Image.fromarray(i) for i in images]
        boxes = [figure_box(p) for p in finder(pictures)]
        if wording is LOOKS:
            rows += _looks_right(_judged(judge, images, boxes), scenes, said)
        drawn = embedder.embed([p.crop(b) if b else p for p, b in zip(pictures, boxes, strict=True)])
        likeness = (photos * drawn).sum(1) * [b is not None for b in boxes]
        rows.append(("prior", f"IP, looks {name}", float(likeness.mean()), None, len(scenes)))
    return rows


TIMESTEPS = (100, 300, 500, 700, 900)


@torch.inference_mode()
def measure_decided(pipeline: Any, data: corpus.Corpus, seed: int) -> list[Row]:
    """At which timesteps it is decided whom a picture shows: the loss saved by naming the looks.

    `masked_loss` of v on the figure, with a caption of the context alone, less that with a caption that names
    the looks, too; same pictures, same noise.
    """
    chosen = _singles(data)
    latents = encode_latents(pipeline.vae, data.images[chosen])
    figures = torch.from_numpy((data.masks[chosen] > 0).astype(np.float32))[:, None]
    mask = F.avg_pool2d(figures, models.IMAGE_SIZE // models.LATENT_SIZE)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    alphas = models.scheduler().alphas_cumprod
    rows: list[Row] = []
    words = [
        [caption(data.scenes[i], np.random.default_rng(i), wording).text for i in chosen]
        for wording in (PROMPT, LOOKS)
    ]
    silent, told = (encode_texts(pipeline.text_encoder, texts) for texts in words)
    for t in TIMESTEPS:
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        losses = [
            masked_loss(pipeline.unet(a * latents + s * noise, t, text).sample, a * noise - s * latents, mask)
            for text in (silent, told)
        ]
        saved = float(losses[0] - losses[1])
        rows.append(("prior", f"loss saved by naming looks, t = {t}", saved, None, len(chosen)))
    return rows


def sheet(images: NDArray[np.uint8], columns: int = 8, zoom: int = 2) -> Image.Image:
    """A contact sheet of equal pictures, white where the last row ends early."""
    blank = np.full((-len(images) % columns, *images.shape[1:]), 255, np.uint8)
    images = np.concatenate([images, blank])
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    picture = Image.fromarray(np.concatenate(rows))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


# --- All --------------------------------------------------------------------------------------------------


def evaluation_finder(weights: Path, settings: GatesConfig) -> PersonFinder:
    """The segmenter as the evaluation's detector: with a lower threshold, for what is drawn is less clear."""
    model = ModelSource(id=str(weights / "segmenter"))
    return PersonFinder(SegmentConfig(model=model, threshold=settings.detector_threshold))


def run(settings: GatesConfig, weights: Path, cache: Path, output: Path, samples: Path) -> None:
    """Measure every gate on the models in `weights`; write a CSV and a sheet of the prior's pictures."""
    torch.set_num_threads(settings.threads)
    data = corpus.load("validation", settings.images, settings.seed, cache)
    judge = AttributeJudge(weights / "attributes")
    finder = PersonFinder(SegmentConfig(model=ModelSource(id=str(weights / "segmenter"))))
    pipeline = StableDiffusionPipeline.from_pretrained(
        weights / "prior", dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    embedder = AutoEmbedder(ModelSource(id=str(weights / "identity")))
    rows = measure_identity("identity", embedder, settings.seed, True)
    rows += measure_identity("mean colours", ColorEmbedder(), settings.seed, False)
    known = corpus.load("pretrain", PROBED * settings.images, settings.seed, cache, 0.0, 0.0)
    rows += measure_image_encoder(ModelSource(id=str(weights / "image_encoder")), known, data)
    rows += measure_segmenter(finder, data)
    rows += measure_detector(evaluation_finder(weights, settings), data, settings.seed)
    rows += measure_captioner(
        Captioner(CaptionConfig(model=ModelSource(id=str(weights / "captioner")))), data
    )
    rows += measure_clip_judge(ClipJudge(ModelSource(id=str(weights / "clip_judge"))), data, settings.seed)
    rows += measure_autoencoder(judge, pipeline, data)
    drawn, pictures = measure_prior(pipeline, judge, finder, settings)
    sheet(pictures).save(samples)
    rows += drawn + measure_props(pipeline, judge, finder, settings)
    rows += measure_likeness(pipeline, judge, embedder, finder, settings)
    write(rows + measure_decided(pipeline, data, settings.seed), output)


def write(rows: Sequence[Row], output: Path) -> None:
    """The gates as CSV: gate, measure, value, goal, reached, count."""

    def csv_to(path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["gate", "measure", "value", "goal", "reached", "count"])
            for gate, measure, value, goal, count in rows:
                reached = "" if goal is None else "yes" if value >= goal else "no"
                writer.writerow([gate, measure, f"{value:.4f}", "" if goal is None else goal, reached, count])

    write_atomically(output, csv_to)
