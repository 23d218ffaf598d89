"""What captions and masks cost: `snakemake benchmark_data`.

Entry point, called by `python -m moa benchmark-data`:

    run(config, output)

Four kinds of rows, on rendered photos, each measured in a process of its own:

    miniature     the stages' batches against the plain loop of transformers, one photo at a time, same models
    mixed sizes   as the first, no two photos equally large
    true widths   as the first, with random models of BLIP-2's and Mask2Former's true widths
    scale         the stages, shard by shard, over more and more photos: time, memory, the lines through them

The plain loop ends in transformers' own post-processing, the stages in rows ready to be written, with encoded
masks of `moa.data.segment.panoptic`.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from moa.benchmark import alone, clocked
from moa.data import caption, segment
from moa.data.caption import CaptionConfig, Captioner
from moa.data.records import RAW, Row, decode_image, encode_image, read_rows, write_rows
from moa.data.segment import SegmentConfig, Segmenter
from moa.files import write_atomically
from moa.machine import peak_memory, processor
from moa.methods import ModelSource
from moa.miniature.dataset import RenderConfig
from moa.miniature.dataset import run as draw

COLUMNS = (
    "kind", "variant", "models", "photos", "batch_size", "seconds", "images_per_second", "ratio",
    "cpu_seconds", "cpu_ratio", "fit_cpu_seconds", "residual", "peak_mb", "fit_peak_mb", "peak_residual",
    "peak_growth", "device", "repeats", "torch", "processor",
)  # fmt: skip
VARIANTS = ("loop", "stages")
BLIP2_LAYERS = {"vision": 39, "qformer": 12, "text": 32}  # BLIP-2 with ViT-g and OPT-2.7B
SWIN_L_DEPTHS = (2, 2, 18, 2)
MASK2FORMER_LAYERS = {"encoder": 6, "decoder": 10}
FEW = 2  # layers of each part without `true_size`


@dataclass(frozen=True)
class DataBenchmarkConfig:
    """Settings of the stage `benchmark-data`."""

    captioner: ModelSource = field(default_factory=lambda: ModelSource("moa/miniature/weights/captioner"))
    segmenter: ModelSource = field(default_factory=lambda: ModelSource("moa/miniature/weights/segmenter"))
    photos: int = 256  # of the comparison, at 64 pixels
    batch_size: int = 64  # photos a pass of the stages
    repeats: int = 3  # turns of the comparisons
    counts: tuple[int, ...] = (500, 1000, 2000, 5000)  # photos, of `scale`; empty leaves it out
    shard: int = 500  # photos a shard, of `scale`
    true_size: bool = (
        False  # all layers: 20 GB of memory, 16 of disk; otherwise few layers of the true widths
    )
    true_photos: int = 8  # of the comparison at true widths; 0 leaves it out
    true_batch: int = 4
    true_side: int = 384  # pixels that Mask2Former sees
    workers: int = 0  # processes that decode and resize ahead of the model
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("photos", "batch_size", "repeats", "shard", "true_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if any(count < 1 or count % self.shard for count in self.counts) or len(set(self.counts)) == 1:
            raise ValueError(f"counts {self.counts} must be several, or no, multiples of shard {self.shard}")
        if self.true_side % 32 or self.true_photos < 0:
            raise ValueError(f"true_side ({self.true_side}) must be a multiple of 32, true_photos at least 0")

    def annotators(self, captioner: ModelSource, segmenter: ModelSource, size: int) -> Settings:
        """Settings of both stages."""
        shared: dict[str, Any] = {"batch_size": size, "workers": self.workers, "device": self.device}
        return CaptionConfig(captioner, **shared), SegmentConfig(segmenter, **shared)


Settings = tuple[CaptionConfig, SegmentConfig]


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    seconds: float  # by the clock
    cpu_seconds: float  # that the cores worked
    peak: int = 0  # bytes, resident


# --- What is measured -------------------------------------------------------------------------------------


def stages(captioner: Captioner, segmenter: Segmenter, rows: Sequence[Row]) -> list[str]:
    """The captions of photos whose people were found, in the stages' batches."""
    said = {row["id"]: row["caption"] for row in caption.captions(captioner, rows, "caption")}
    segment.segments(segmenter, rows, "segment")
    return [said[row["id"]] for row in rows]


@torch.inference_mode()
def loop(captioner: Captioner, segmenter: Segmenter, rows: Sequence[Row]) -> list[str]:
    """The same, as transformers' documentation does it: photo by photo."""
    said = []
    for row in tqdm(rows, desc="loop", unit="image"):
        image = decode_image(row["image"])
        inputs = captioner.processor(images=image, return_tensors="pt").to(captioner.config.device)
        tokens = captioner.model.generate(**inputs, **captioner.config.decoding)
        said.append(captioner.processor.batch_decode(tokens, skip_special_tokens=True)[0])
        inputs = segmenter.processor(images=image, return_tensors="pt").to(segmenter.config.device)
        segmenter.processor.post_process_panoptic_segmentation(
            segmenter.model(**inputs),
            threshold=segmenter.config.threshold,
            mask_threshold=segmenter.config.mask_threshold,
            overlap_mask_area_threshold=segmenter.config.overlap,
            label_ids_to_fuse=set(),
            target_sizes=[(image.height, image.width)],
        )
    return said


def compare(settings: Settings, raw: Path, repeats: int) -> dict[str, Cost]:
    """Both variants in turns over a raw shard, the models loaded before: medians over the turns."""
    captioner, segmenter, rows = Captioner(settings[0]), Segmenter(settings[1]), read_rows(raw, RAW)
    runs = {"loop": loop, "stages": stages}
    for variant in VARIANTS:  # warms up
        runs[variant](captioner, segmenter, rows[: settings[0].batch_size])
    taken: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant in VARIANTS:
            turn = runs[variant]
            taken[variant].append(
                clocked(lambda turn=turn: turn(captioner, segmenter, rows), settings[0].device)  # type: ignore[misc]
            )
    medians = {
        variant: [statistics.median(column) for column in zip(*pairs, strict=True)]
        for variant, pairs in taken.items()
    }
    return {variant: Cost(seconds, cpu) for variant, (seconds, cpu) in medians.items()}


def annotate_shards(settings: Settings, raws: Sequence[Path], folder: Path) -> Cost:
    """Both stages as the workflow runs them, from loading the models to writing the tables, over shards."""

    def all_shards() -> None:
        caption.run(settings[0], raws, [folder / f"captions-{raw.name}" for raw in raws])
        segment.run(settings[1], raws, [folder / f"segments-{raw.name}" for raw in raws])

    return Cost(*clocked(all_shards, settings[0].device), peak_memory())


# --- Models of true widths --------------------------------------------------------------------------------


def random_blip2(folder: Path, words: ModelSource, true_size: bool, **changes: Mapping[str, Any]) -> str:
    """Save a random BLIP-2 of OPT-2.7B's geometry, with the tokenizer of `words`; how many layers it has.

    `changes` of `vision_config`, `qformer_config` and `text_config` make it smaller.
    """
    tokenizer = AutoProcessor.from_pretrained(words.id).tokenizer
    layers = {part: count if true_size else FEW for part, count in BLIP2_LAYERS.items()}
    vision: dict[str, Any] = {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    qformer: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    text: dict[str, Any] = {
        "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_attention_heads": 32,
        "word_embed_proj_dim": 2560, "vocab_size": 50304, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    parts: dict[str, Any] = {
        "vision_config": vision | {"image_size": 224, "num_hidden_layers": layers["vision"]},
        "qformer_config": qformer | {"num_hidden_layers": layers["qformer"]},
        "text_config": text | {"num_hidden_layers": layers["text"]},
    }
    parts = {name: part | dict(changes.get(name, {})) for name, part in parts.items()}
    parts["qformer_config"]["encoder_hidden_size"] = parts["vision_config"]["hidden_size"]
    image = parts["text_config"]["vocab_size"] - 1
    model = Blip2ForConditionalGeneration(Blip2Config(**parts, num_query_tokens=32, image_token_index=image))
    model.save_pretrained(folder)
    side = parts["vision_config"]["image_size"]
    images = BlipImageProcessor(size={"height": side, "width": side})
    Blip2Processor(images, tokenizer, num_query_tokens=32).save_pretrained(folder)
    counts = ", ".join(f"{part} {layers[part]} of {count}" for part, count in BLIP2_LAYERS.items())
    return f"BLIP-2 OPT-2.7B ({counts} layers)"


def random_mask2former(folder: Path, side: int, true_size: bool, **changes: Any) -> str:
    """Save a random Mask2Former of Swin-L's geometry; how many layers it has."""
    depths = SWIN_L_DEPTHS if true_size else (FEW,) * 4
    swin: dict[str, Any] = {
        "embed_dim": 192,
        "depths": depths,
        "num_heads": (6, 12, 24, 48),
        "window_size": 12,
    }
    names = {0: "person"} | {index: f"label {index}" for index in range(1, 133)}
    stated: dict[str, Any] = {
        "num_queries": 200,
        "id2label": names,
        "label2id": {name: n for n, name in names.items()},
    }
    layers = {part: count if true_size else FEW + 1 for part, count in MASK2FORMER_LAYERS.items()}
    stated |= {f"{part}_layers": count for part, count in layers.items()}
    out = ["stage1", "stage2", "stage3", "stage4"]
    swin |= {"image_size": side, "out_features": out} | changes.pop("swin", {})
    backbone = SwinConfig(**swin)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=backbone, **stated | changes)
    )
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": side, "width": side}, ignore_index=255).save_pretrained(folder)
    counts = ", ".join(f"{part} {layers[part]} of {count}" for part, count in MASK2FORMER_LAYERS.items())
    return f"Mask2Former Swin-L (Swin {sum(depths)} of {sum(SWIN_L_DEPTHS)}, {counts} layers)"


# --- The table --------------------------------------------------------------------------------------------


def straight(counts: Sequence[int], costs: Sequence[float]) -> list[tuple[float, float]]:
    """For each count the least-squares line's cost, and by what share of it the measured one is off."""
    line = np.polyval(np.polyfit(counts, costs, 1), counts)
    return [(float(fit), float(abs(real - fit) / fit)) for fit, real in zip(line, costs, strict=True)]


def _row(config: DataBenchmarkConfig, photos: int, cost: Cost, **stated: Any) -> dict[str, Any]:
    """A row of the table; columns that say nothing of it stay empty."""
    return dict.fromkeys(COLUMNS, "") | {
        "photos": photos,
        "seconds": f"{cost.seconds:.4g}",
        "images_per_second": f"{photos / cost.seconds:.4g}",
        "cpu_seconds": f"{cost.cpu_seconds:.4g}",
        "peak_mb": round(cost.peak / 1e6),
        "device": config.device,
        "torch": torch.__version__,
        "processor": processor(config.device),
        **stated,
    }


def comparison(
    config: DataBenchmarkConfig, kind: str, models: str, settings: Settings, raw: Path
) -> list[dict[str, Any]]:
    """Rows of the loop and of the stages; ratio: the loop's time over a variant's, larger is faster."""
    photos = len(read_rows(raw, RAW))
    costs = alone(compare, settings, raw, config.repeats)
    return [
        _row(
            config,
            photos,
            costs[variant],
            kind=kind,
            variant=variant,
            models=models,
            batch_size=settings[0].batch_size if variant == "stages" else 1,
            ratio=f"{costs['loop'].seconds / costs[variant].seconds:.3f}",
            cpu_ratio=f"{costs['loop'].cpu_seconds / costs[variant].cpu_seconds:.3f}",
            repeats=config.repeats,
            peak_mb="",  # both ran in one process
        )
        for variant in VARIANTS
    ]


def scale(
    config: DataBenchmarkConfig, settings: Settings, raws: Sequence[Path], folder: Path
) -> list[dict[str, Any]]:
    """Rows of the stages over more and more shards; peak_growth: a peak over that of the first count."""
    costs = [
        alone(annotate_shards, settings, raws[: count // config.shard], folder) for count in config.counts
    ]
    times = straight(config.counts, [cost.cpu_seconds for cost in costs])
    peaks = straight(config.counts, [cost.peak / 1e6 for cost in costs])
    return [
        _row(
            config,
            count,
            cost,
            kind="scale",
            variant="stages",
            models="miniature",
            batch_size=config.batch_size,
            fit_cpu_seconds=f"{time[0]:.4g}",
            residual=f"{time[1]:.4f}",
            fit_peak_mb=round(peak[0]),
            peak_residual=f"{peak[1]:.4f}",
            peak_growth=f"{cost.peak / costs[0].peak:.3f}",
            repeats=1,
        )
        for count, cost, time, peak in zip(config.counts, costs, times, peaks, strict=True)
    ]


def draw_shard(folder: Path, number: int, photos: int, total: int) -> Path:
    """A shard of rendered photos."""
    raw = folder / f"raw-{number}.parquet"
    draw(RenderConfig(train=total, shard_size=photos), "train", number, raw, folder / "truth.parquet")
    return raw


def resized(raw: Path, sizes: Sequence[tuple[int, int]], output: Path) -> Path:
    """The first photos of a shard at other sizes, (width, height), one for each."""
    rows = read_rows(raw, RAW)[: len(sizes)]
    for row, (width, height) in zip(rows, sizes, strict=True):
        image = decode_image(row["image"]).resize((width, height))
        row |= {"image": encode_image(image), "width": width, "height": height}
    write_rows(output, rows, RAW)
    return output


def mixed(photos: int) -> list[tuple[int, int]]:
    """Sizes, (width, height), around 64 pixels, of which 1,023 differ before the first comes again."""
    return [(48 + 7 * n % 33, 48 + 11 * n % 31) for n in range(photos)]


def true_widths(config: DataBenchmarkConfig, raw: Path, folder: Path) -> list[dict[str, Any]]:
    """Rows of the comparison with random models of the true widths."""
    sizes = [(config.true_side, config.true_side)] * config.true_photos
    photos = resized(raw, sizes, folder / "large.parquet")
    names = [
        alone(random_blip2, folder / "captioner", config.captioner, config.true_size),
        alone(random_mask2former, folder / "segmenter", config.true_side, config.true_size),
    ]
    captioner, segmenter = (ModelSource(str(folder / name)) for name in ("captioner", "segmenter"))
    settings = config.annotators(captioner, segmenter, config.true_batch)
    return comparison(config, "true widths", "; ".join(names), settings, photos)


def run(config: DataBenchmarkConfig, output: Path) -> None:
    """Measure and write the table: CSV with `COLUMNS`."""
    settings = config.annotators(config.captioner, config.segmenter, config.batch_size)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = draw_shard(folder, 0, config.photos, config.photos)
        rows += comparison(config, "miniature", "miniature", settings, few)
        varied = resized(few, mixed(config.photos), folder / "mixed.parquet")
        rows += comparison(config, "mixed sizes", "miniature", settings, varied)
        if config.true_photos:
            rows += true_widths(config, few, folder)
        if config.counts:
            most = max(config.counts)
            raws = [draw_shard(folder, n, config.shard, most) for n in range(most // config.shard)]
            rows += scale(config, settings, raws, folder)
    write_atomically(output, lambda part: write_table(part, rows))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
