"""Textual Inversion (Gal et al., arXiv 2208.01618): new words for the frozen prior, learned for each subject.

Nothing of the prior changes. For each subject the input embeddings of a few new tokens are learned with the
prior's own loss on the one photo, which templates such as "a photo of a {subject}" describe. In sampling the
tokens stand before the subject's word: "a <tokens> man in a red hoodie".

Entry points:

    run(config, requests, subjects, output, …)      learn the subjects of a shard; `train-textual_inversion`
    join(parts, output)                             one folder of all shards; `join-textual_inversion`
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from moa.baselines.prior import Prior
from moa.data.records import sha256
from moa.data.subjects import read_subjects
from moa.evaluation import samples
from moa.files import write_atomically
from moa.hashing import code_hash, model_hash
from moa.machine import libraries, peak_gpu_memory, peak_memory
from moa.methods import MethodConfig, ModelSource, Request, Sampling, Subject, register
from moa.sampling import Pipeline, latent_shape, load_prior
from moa.training.checkpoint import key, locked, replace_folder

SUBJECT = "{subject}"


@dataclass(frozen=True)
class InversionConfig:
    """Settings of the stage `train-textual_inversion`."""

    prior: ModelSource  # a StableDiffusionPipeline; frozen
    device: str = "cpu"
    seed: int = 0  # of noise, timesteps, templates and mirroring, for each subject apart
    steps: int = 3000  # optimizer steps a subject [diffusers' example; the paper has 5,000]
    batch_size: int = 4  # noisy copies of the photo a step [the paper's]
    lr: float = 2e-3  # of AdamW [diffusers' example: 5e-4, scaled by a batch of 4]
    weight_decay: float = 1e-2  # [diffusers' example]
    tokens: int = 1  # new tokens a subject [paper]
    init_word: str | None = None  # its embedding is where they start; null = the subject's own word
    keep_word: bool = True  # prompts say "<tokens> man", not "<tokens>"
    flip: float = 0.5  # probability that the photo is mirrored [diffusers' example]
    templates: tuple[str, ...] = (f"a photo of a {SUBJECT}", f"a portrait of a {SUBJECT}", f"a {SUBJECT}")
    log_every: int = 10  # steps a row of log.csv, which holds their mean

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "tokens", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not self.lr > 0 or not 0 <= self.flip <= 1:
            raise ValueError(f"lr ({self.lr}) must be above 0, and flip ({self.flip}) is a probability, 0..1")
        if not self.templates:
            raise ValueError("templates: give at least one")
        for template in self.templates:
            if SUBJECT not in template:
                raise ValueError(f"templates: {template!r} lacks the placeholder {SUBJECT}")


def placeholder(name: str) -> str:
    """The token of the subject called `name`: no text of a prompt, and the same whatever its spelling."""
    return f"<{key(subject=name)}>"


def phrase(name: str, word: str, keep_word: bool) -> str:
    """What prompts say in the place of a subject's word: its token, and the word behind if that is kept."""
    return f"{placeholder(name)} {word}" if keep_word else placeholder(name)


def photo_hash(subject: Subject) -> str:
    """SHA-256 of the photo's pixels."""
    return sha256(subject.image.tobytes())


# --- Learning ---------------------------------------------------------------------------------------------


def first_vectors(pipe: Pipeline, word: str, count: int) -> Tensor:
    """[count, D], float32: the mean input embedding of a word's tokens, so many times."""
    ids = pipe.tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"init_word: {word!r} is no word")
    mean = pipe.text_encoder.get_input_embeddings().weight[ids].detach().float().mean(0)
    return mean.repeat(count, 1)


@contextmanager
def in_place_of(pipe: Pipeline, ids: Sequence[int], vectors: Tensor) -> Iterator[None]:
    """Within the `with` block, the text encoder reads row k of `vectors` [n, D] for the token `ids[k]`."""

    def exchange(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for token, vector in zip(ids, vectors, strict=True):
            output = torch.where((inputs[0] == token)[..., None], vector.to(output.dtype), output)
        return output

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def encode_photo(pipe: Pipeline, photo: Image.Image) -> Tensor:
    """[2, 2, C, h, w]: of the photo, cut to the prior's format, and of its mirror image, the posterior's mean
    and standard deviation."""
    _, height, width = latent_shape(pipe)
    side = (width * pipe.vae_scale_factor, height * pipe.vae_scale_factor)
    cut = ImageOps.fit(photo.convert("RGB"), side)
    pixels = pipe.image_processor.preprocess([cut, ImageOps.mirror(cut)])
    posterior = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latent_dist
    return torch.stack([posterior.mean, posterior.std], 1).float().cpu()


class Example:
    """Draws noisy copies of a photo, and what the prior should answer; from its own seed alone."""

    def __init__(self, pipe: Pipeline, subject: Subject, config: InversionConfig) -> None:
        self.pipe, self.config = pipe, config
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the prior predicts {self.scheduler.config.prediction_type!r}; "
                "textual_inversion knows epsilon and v_prediction"
            )
        self.posterior = encode_photo(pipe, subject.image)
        said = phrase(subject.id, subject.word, config.keep_word)
        self.prompts = [template.replace(SUBJECT, said) for template in config.templates]
        seed = int(key(seed=config.seed, subject=subject.id), 16)
        self.generator = torch.Generator().manual_seed(seed)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _whole(self, below: int) -> Tensor:
        """[batch] whole numbers below a bound."""
        return torch.randint(below, (self.config.batch_size,), generator=self.generator)

    def loss(self) -> Tensor:
        """The prior's denoising loss on the next batch, a mean."""
        mirrored = torch.rand(self.config.batch_size, generator=self.generator) < self.config.flip
        mean, spread = self.posterior[mirrored.long()].unbind(1)
        latents = (mean + spread * self._normal(*mean.shape)) * self.pipe.vae.config.scaling_factor
        noise, timesteps = self._normal(*mean.shape), self._whole(len(self.scheduler.alphas_cumprod))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        if self.scheduler.config.prediction_type == "v_prediction":
            noise = self.scheduler.get_velocity(latents, noise, timesteps)
        prompts = [self.prompts[n] for n in self._whole(len(self.prompts)).tolist()]
        device, dtype = self.pipe.device, self.pipe.unet.dtype
        text, _ = self.pipe.encode_prompt(prompts, device, 1, False)
        answer = self.pipe.unet(noisy.to(device, dtype), timesteps.to(device), text).sample
        return functional.mse_loss(answer.float(), noise.to(device))


def learn(pipe: Pipeline, subject: Subject, config: InversionConfig) -> tuple[Tensor, list[float]]:
    """Learn one subject, whose token `pipe` knows afterwards.

    Returns:
        Input embeddings [tokens, D], float32 on the CPU, and the mean loss of each `log_every` steps.

    Raises:
        FloatingPointError: a gradient is not finite. ValueError: a template that is too long, or `init_word`.
    """
    start = first_vectors(pipe, config.init_word or subject.word, config.tokens)
    add_words(pipe, {subject.id: start})
    example = Example(pipe, subject, config)
    check_lengths(pipe, example.prompts)
    name = pipe.maybe_convert_prompt(placeholder(subject.id), pipe.tokenizer)
    ids = pipe.tokenizer.convert_tokens_to_ids(name.split())
    vectors = nn.Parameter(start.to(pipe.device))
    optimizer = torch.optim.AdamW([vectors], lr=config.lr, weight_decay=config.weight_decay)
    losses: list[float] = []
    with in_place_of(pipe, ids, vectors):
        for step in tqdm(range(config.steps), desc=f"learn {subject.id}", unit="step", mininterval=5):
            loss = example.loss()
            loss.backward()
            check_finite(vectors.grad, f"the gradient of {subject.id} at step {step}")
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    check_finite(vectors, f"the embedding of {subject.id}")
    parts = [losses[i : i + config.log_every] for i in range(0, len(losses), config.log_every)]
    return vectors.detach().cpu(), [sum(part) / len(part) for part in parts]


def check_finite(values: Tensor | None, what: str) -> None:
    """Raise FloatingPointError, naming `what`, unless there are values and all are finite."""
    if values is None or not bool(values.isfinite().all()):
        raise FloatingPointError(f"{what} is not finite: lower `lr`")


# --- The prior's new words --------------------------------------------------------------------------------


def add_words(pipe: Pipeline, words: Mapping[str, Tensor]) -> None:
    """Teach tokenizer and text encoder the tokens of subjects, {id: [tokens, D]}."""
    if words:
        vectors = {placeholder(name): vector for name, vector in words.items()}
        pipe.load_textual_inversion([{t: v} for t, v in vectors.items()], token=list(vectors))


def check_lengths(pipe: Pipeline, prompts: Sequence[str]) -> None:
    """Raise ValueError naming a prompt that the text encoder would cut, several tokens a subject counted."""
    limit = pipe.tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        count = len(pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids)
        if count > limit:
            raise ValueError(f"{prompt!r} has {count} tokens, but the prior reads {limit}: lower `tokens`")


# --- The stages -------------------------------------------------------------------------------------------


def run(
    config: InversionConfig,
    requests: Sequence[Path],
    subjects: Path,
    output: Path,
    shard: int = 0,
    shards: int = 1,
    checkpoints: Path | None = None,
) -> None:
    """Learn the subjects of a shard, 0 ≤ shard < shards; a killed run goes on with the subject it was at.

    Args:
        config: settings.
        requests: parquet files of the `REQUEST` schema, which name the subjects.
        subjects: parquet of the subjects.
        output: folder to make; replaced when it is there.
        checkpoints: folder for the subjects that are done; by default `.checkpoints` beside `output`.

    Raises:
        RuntimeError: another process learns the same. ValueError, FileNotFoundError: broken inputs or models.
    """
    people = read_subjects(subjects)
    rows = samples.read(list(requests), samples.REQUEST)
    names = sorted({name for row in rows for name in row["subjects"]})
    if not 0 <= shard < shards <= len(names):
        raise ValueError(f"shard {shard} of {shards} of {len(names)} subjects; see the key shards.subjects")
    mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
    root = checkpoints or output.parent / ".checkpoints"
    folder = root / f"textual_inversion-{run_key(config)}-{shard:03d}"
    with locked(folder):
        collect(learn_missing(config, [people[name] for name in mine], folder), output)
    shutil.rmtree(folder)


def run_key(config: InversionConfig) -> str:
    """Names the folder of the subjects that are done: settings, prior, code, libraries."""
    source = Path(config.prior.id)
    return key(
        settings=asdict(config),
        prior=model_hash(source) if source.exists() else str(source),
        code=code_hash("moa.baselines.textual_inversion"),
        libraries=libraries(),
    )


def learn_missing(config: InversionConfig, subjects: Sequence[Subject], folder: Path) -> list[Path]:
    """Learn the subjects that `folder` does not hold yet; returns the files of all, one each."""
    pipe, found = None, []
    for subject in subjects:
        photo = photo_hash(subject)
        path = folder / f"{key(id=subject.id, word=subject.word, photo=photo)}.safetensors"
        if not path.is_file():
            pipe = pipe or load_prior(config.prior, config.device)
            started = time.monotonic()
            vectors, losses = learn(pipe, subject, config)
            seconds = round(time.monotonic() - started, 3)
            about = {"id": subject.id, "photo": photo, "losses": losses, "seconds": seconds}
            about |= {"peak": peak_memory(), "gpu_peak": peak_gpu_memory(), "config": asdict(config)}
            write_json(path.with_suffix(".json"), about)
            write_atomically(path, partial(save_file, {subject.id: vectors}))
        found.append(path)
    return found


def collect(learned: Sequence[Path], output: Path) -> None:
    """Put subjects' files into one folder, with settings, costs and log as other trainings have them."""
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for path in learned:
        for file in (path, path.with_suffix(".json")):
            shutil.copy(file, part)
    abouts = [json.loads(path.with_suffix(".json").read_text()) for path in learned]
    config = abouts[0]["config"]
    photos = {about["id"]: about["photo"] for about in abouts}
    settings = {"class": "TextualInversion", "keep_word": config["keep_word"], "photos": photos}
    write_json(part / "config.json", settings)
    cost = {
        "method": "textual_inversion",
        "config": config,
        "trained_parameters": sum(v.numel() for path in learned for v in load_file(path).values()),
        "seconds": round(sum(about["seconds"] for about in abouts), 3),
        "peak_memory_bytes": max(about["peak"] for about in abouts),
        "peak_gpu_bytes": max(about["gpu_peak"] for about in abouts),
    }
    write_json(part / "train.json", cost)
    write_log(part / "log.csv", config, np.mean([about["losses"] for about in abouts], axis=0))
    replace_folder(part, output)


def join(parts: Sequence[Path], output: Path) -> None:
    """One folder of what several shards learned."""
    collect([path for part in parts for path in sorted(part.glob("*.safetensors"))], output)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(value, indent=1, sort_keys=True, default=str) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def write_log(path: Path, config: Mapping[str, Any], losses: Iterable[float]) -> None:
    """log.csv: steps and the means of the losses until them."""
    every, steps = config["log_every"], config["steps"]
    with path.open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "loss"])
        log.writerows([min((n + 1) * every, steps), f"{loss:.9g}"] for n, loss in enumerate(losses))


# --- The method -------------------------------------------------------------------------------------------


class TextualInversion:
    """The prior, which has learned a word for each subject."""

    name = "textual_inversion"

    def __init__(
        self, pipe: Pipeline, words: Mapping[str, Tensor], photos: Mapping[str, str], keep_word: bool,
        sampling: Sampling,
    ) -> None:  # fmt: skip
        """words: [tokens, D] of each subject's id; photos: `photo_hash` of what each was learned from."""
        add_words(pipe, words)
        self.prior, self.words, self.photos, self.keep_word = Prior(pipe, sampling), words, photos, keep_word

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        reworded = [self.reworded(request) for request in requests]
        check_lengths(self.prior.pipe, [request.prompt for request in reworded])
        return self.prior.generate(reworded)

    def reworded(self, request: Request) -> Request:
        """The request in the prior's new words, without subjects. Raises ValueError for one not learned."""
        prompt = request.prompt
        for subject, (start, end) in reversed(list(zip(request.subjects, request.spans, strict=True))):
            if self.photos.get(subject.id) != photo_hash(subject):
                raise ValueError(
                    f"textual_inversion has not learned {subject.id!r} from this photo: "
                    "learn it first with `python -m moa train-textual_inversion`"
                )
            prompt = prompt[:start] + phrase(subject.id, prompt[start:end], self.keep_word) + prompt[end:]
        return replace(request, prompt=prompt, spans=(), subjects=())

    def trained_parameters(self) -> int:
        return sum(vectors.numel() for vectors in self.words.values())


@register("textual_inversion")
def make(config: MethodConfig) -> TextualInversion:
    """The prior with the words that the config's folder holds. Raises as `load_words`."""
    folder = config.trained_folder("textual_inversion")
    settings = json.loads((folder / "config.json").read_text())
    if settings.get("class") != "TextualInversion":
        raise ValueError(f"{folder / 'config.json'} is of {settings.get('class')!r}, not of TextualInversion")
    pipe = load_prior(config.prior, config.device, config.dtype)
    words = load_words(folder, settings["photos"])
    return TextualInversion(pipe, words, settings["photos"], settings["keep_word"], config.sampling)


def load_words(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """[tokens, D] of each subject. Raises ValueError or FileNotFoundError naming what is broken or gone."""
    words: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            words |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"textual_inversion: {path} is broken ({error}); learn again") from error
    if missing := sorted(set(names) - set(words)):
        raise FileNotFoundError(f"textual_inversion: {folder} lacks {', '.join(missing)}; learn again")
    return words
