"""Images from requests, one PNG each, so that a killed run goes on where it was.

Entry points:

    run(config, method, requests, subjects, output, trained)     a shard of requests → images and their rows
    generate_one(config, subject, prompt, out, …)                one image, for a person's own try

Every PNG carries, as a text chunk, a key of all that it depends on. An image is kept if it is whole and its
key is right; so neither a half-written file nor one of another adapter is ever taken for a result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from moa.conditioner import find_words
from moa.data.errors import BrokenImage
from moa.data.phrases import person_phrases
from moa.data.records import decode_image, sha256
from moa.data.subjects import read_subjects
from moa.evaluation import samples
from moa.files import write_atomically
from moa.hashing import code_hash, file_hash, model_hash, registering
from moa.machine import libraries, peak_gpu_memory, peak_memory
from moa.methods import MethodConfig, ModelSource, Request, Sampling, Subject, build
from moa.trained import trained_folder
from moa.training.checkpoint import key

KEY = "moa-key"  # PNG text chunk: what the image depends on
SECONDS = "moa-seconds"  # PNG text chunk: wall time of its batch, divided by the batch's size
PEAK = "moa-peak-bytes"  # PNG text chunk: the most resident memory of its process until then
GPU_PEAK = "moa-peak-gpu-bytes"  # PNG text chunk: the most memory of its GPU likewise


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of the stage `generate-shard`."""

    prior: ModelSource  # a StableDiffusionPipeline
    image_encoder: ModelSource  # a CLIPVisionModelWithProjection with its CLIPImageProcessor
    sampling: Sampling = field(default_factory=Sampling)
    device: str = "cpu"

    def method(self, trained: Path | None, pool: Sequence[Subject]) -> MethodConfig:
        """What a method's factory needs."""
        return MethodConfig(
            prior=self.prior,
            image_encoder=self.image_encoder,
            trained=trained,
            sampling=self.sampling,
            pool=tuple(pool),
            device=self.device,
        )


@dataclass(frozen=True)
class TryConfig(GenerateConfig):
    """Settings of the stage `generate`, which also looks for trained weights where a run leaves them."""

    output: Path = Path("results/miniature")  # results folder of the run


def run(
    config: GenerateConfig,
    method: str,
    requests: Sequence[Path],
    subjects: Path,
    output: Path,
    root: Path,
    trained: Path | None = None,
    memory: Path | None = None,
    folder: str = "",
) -> None:
    """Carry out shards of requests with one method.

    Args:
        config: settings.
        method: a name in `moa.methods.METHODS`.
        requests: parquet files of the `REQUEST` schema.
        subjects: parquet of the subjects that the requests name; the wrong subject is one of them.
        output: parquet of the `MADE` schema to write, at the end.
        root: results folder; images go to `root`/images/<folder>/…, where `path` of a row points.
        trained: folder of trained weights, for methods that have any.
        memory: JSON file to write: the most memory that a process making these images has had.
        folder: by default the method's name; another keeps the images of its several trainings apart.

    Raises:
        ValueError, FileNotFoundError: broken inputs or missing weights; the message says what to do.
    """
    people = read_subjects(subjects)
    rows = sorted(samples.read(list(requests), samples.REQUEST), key=samples.sort_key)
    settings = config.method(trained, list(people.values()))
    made = [samples.made(row, method, 0.0, seed_of(trained), folder) for row in rows]
    jobs = [
        Job(samples.to_request(row, people), root / one["path"]) for row, one in zip(rows, made, strict=True)
    ]
    spent = make_images(method, settings, jobs)
    if memory is not None:
        peak = {
            "peak_memory_bytes": max((one.peak for one in spent), default=0),
            "peak_gpu_bytes": max((one.gpu_peak for one in spent), default=0),
        }
        write_atomically(memory, lambda part: part.write_text(json.dumps(peak) + "\n"))
    rows = [row | {"seconds": one.seconds} for row, one in zip(made, spent, strict=True)]
    samples.write(output, rows, samples.MADE)


def generate_one(
    config: TryConfig,
    subject: Sequence[Path],
    prompt: str,
    out: Path,
    word: Sequence[str] = (),
    seed: int = 0,
    method: str = "moa",
    trained: Path | None = None,
) -> None:
    """Make one image of one or more subjects, bound to words of the prompt.

    Args:
        config: settings.
        subject: a photo each.
        prompt: such as "a man in a red hoodie".
        out: PNG to write.
        word: what the prompt calls each subject; by default its first words for people (man, child, ...).
        seed: of the starting noise.
        method: a name in `moa.methods.METHODS`.
        trained: folder of trained weights; by default the one below the configuration's `output`.

    Raises:
        ValueError, FileNotFoundError: a broken photo, a word that is not in the prompt, missing weights.
    """
    spans = find_words(prompt, word) if word else first_words(prompt, len(subject))
    if len(spans) != len(subject):
        raise ValueError(
            f"{len(subject)} photos need as many words, not {len(spans)}: --word man --word woman"
        )
    people = [
        Subject(path.stem, prompt[start:end], read_photo(path))
        for path, (start, end) in zip(subject, spans, strict=True)
    ]
    maker = build(method, config.method(trained or trained_folder(config.output, method), people))
    image = maker.generate([Request(prompt, tuple(spans), tuple(people), seed)])[0]
    save(image, out, {})


# --- Words and photos -------------------------------------------------------------------------------------


def first_words(prompt: str, count: int) -> list[tuple[int, int]]:
    """Where the words for the first `count` people stand. Raises ValueError if there are fewer."""
    found = person_phrases(prompt)
    if len(found) < count:
        raise ValueError(
            f"{prompt!r} names {len(found)} of {count} subjects by words such as man, woman, child: "
            "say what it calls them with --word"
        )
    return [(person.end - len(person.word), person.end) for person in found[:count]]


def read_photo(path: Path) -> Image.Image:
    """A photo as RGB. Raises ValueError or FileNotFoundError naming the file."""
    try:
        return decode_image({"bytes": path.read_bytes()})
    except BrokenImage as error:
        raise ValueError(f"{path}: {error}; give another photo") from error


# --- Images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One image to make, and where to put it."""

    request: Request
    path: Path


@dataclass(frozen=True)
class Spent:
    """What an image cost when it was made, be it by a process that was killed since."""

    seconds: float  # wall time of its batch, divided by the batch's size
    peak: int  # bytes, the most resident memory that its process had had
    gpu_peak: int  # bytes, the most memory of its GPU; 0 on a CPU


def make_images(name: str, config: MethodConfig, jobs: Sequence[Job]) -> list[Spent]:
    """Make the images that are not there yet; returns what each cost, now or when it was made.

    Images are made in batches that follow from `jobs` alone, so that one made after a kill equals, to the
    last bit, one made without: rounding follows the size of a batch.
    """
    base = base_key(name, config)
    keys = [key(base=base, **describe(job.request)) for job in jobs]
    spent = {i: s for i, job in enumerate(jobs) if (s := finished(job.path, keys[i])) is not None}
    size = config.sampling.batch_size
    batches = [range(i, min(i + size, len(jobs))) for i in range(0, len(jobs), size)]
    missing = [batch for batch in batches if any(i not in spent for i in batch)]
    method = build(name, config) if missing else None
    for batch in tqdm(missing, desc=f"generate {name}", unit="batch", mininterval=5):
        assert method is not None
        started = time.monotonic()
        images = method.generate([jobs[i].request for i in batch])
        seconds = round((time.monotonic() - started) / len(batch), 6)
        each = Spent(seconds, peak_memory(), peak_gpu_memory())
        for i, image in zip(batch, images, strict=True):
            peaks = {PEAK: str(each.peak), GPU_PEAK: str(each.gpu_peak)}
            save(image, jobs[i].path, {KEY: keys[i], SECONDS: f"{seconds:.6f}", **peaks})
            spent[i] = each
    return [spent[i] for i in range(len(jobs))]


def base_key(name: str, config: MethodConfig) -> str:
    """Hash of what all images of a method depend on: settings, weights, pool, code, libraries, device."""
    folders = [Path(source.id) for source in (config.prior, config.image_encoder)]
    return key(
        method=name,
        sampling=asdict(config.sampling),
        models=[model_hash(f) if f.exists() else str(f) for f in folders],
        revisions=[config.prior.revision, config.image_encoder.revision],
        trained=trained_hash(config.trained),
        pool=[_described(subject) for subject in config.pool],
        code=code_hash("moa.generation", *registering(name)),
        libraries=libraries(),
        device=config.device,
    )


def trained_hash(folder: Path | None) -> str:
    """Hash of trained weights and their config; the log beside them, with its times, does not count."""
    if folder is None:
        return ""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return key(files=[[f.name, file_hash(f)] for f in files if f.is_file()])


def describe(request: Request) -> dict[str, Any]:
    """What one image depends on, as JSON."""
    return {
        "prompt": request.prompt,
        "spans": request.spans,
        "seed": request.seed,
        "subjects": [_described(subject) for subject in request.subjects],
    }


def _described(subject: Subject) -> list[str]:
    return [subject.id, subject.word, sha256(subject.image.tobytes())]


def save(image: Image.Image, path: Path, texts: Mapping[str, str]) -> None:
    """Write an image as PNG with text chunks, whole or not at all."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    write_atomically(path, lambda part: image.convert("RGB").save(part, format="PNG", pnginfo=info))


def finished(path: Path, wanted: str) -> Spent | None:
    """What the image at `path` cost, or None if it is missing, broken or of another key."""
    try:
        with Image.open(path) as image:
            image.load()
            texts = image.info
    except (OSError, SyntaxError, ValueError):
        return None
    if texts.get(KEY) != wanted:
        return None
    return Spent(float(texts[SECONDS]), int(texts[PEAK]), int(texts[GPU_PEAK]))


def seed_of(trained: Path | None) -> int | None:
    """The seed of a training, from the `train.json` beside its weights; None without training."""
    path = trained / "train.json" if trained else None
    return int(json.loads(path.read_text())["config"]["seed"]) if path and path.is_file() else None
