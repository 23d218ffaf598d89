"""Train the miniature's models from nothing: one stage a model, then `assemble` into shipped folders."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTextModel

from moa.hashing import code_hash, model_hash, settings_hash
from moa.miniature import corpus, models
from moa.miniature.fit import Budget
from moa.miniature.recipes import annotators, clip, judges, prior, text, vae
from moa.miniature.recipes.vae import Weigh, head_weights, prop_weights

Model = Literal[
    "vae",
    "decoder",
    "clip",
    "unet",
    "details",
    "finish",
    "text",
    "polish",
    "props",
    "props_decoder",
    "image_encoder",
    "identity",
    "attributes",
    "clip_judge",
    "segmenter",
    "captioner",
]


@dataclass(frozen=True)
class PretrainConfig:
    """How one model is trained."""

    budget: Budget
    images: int = 24000  # rendered scenes of the pretraining identities
    corpus_seed: int = 0
    prop_share: float = corpus.PROP_SHARE  # of the scenes, in which somebody holds something
    threads: int = 2  # CPU threads; results depend on it in the last bits

    def __post_init__(self) -> None:
        if not 0 <= self.prop_share <= 1:
            raise ValueError(f"prop_share {self.prop_share} is outside 0..1")


Parts = Mapping[str, Path]  # trained models that another one stands on, by name
NEEDS: dict[str, tuple[str, ...]] = {
    "decoder": ("vae",),
    "unet": ("vae", "clip"),
    "details": ("vae", "clip", "unet"),
    "finish": ("vae", "clip", "details"),
    "text": ("clip",),
    "polish": ("vae", "text", "finish"),
    "props": ("vae", "text", "polish"),
    "props_decoder": ("decoder",),
    "image_encoder": ("clip",),
}


def check_parts(model: str, parts: Parts) -> None:
    """Raises ValueError naming the options that `model` lacks, FileNotFoundError a missing folder."""
    missing = [f"--{name}" for name in NEEDS.get(model, ()) if name not in parts]
    if missing:
        raise ValueError(f"{model} needs {', '.join(missing)}: folders that `pretrain` made for those models")
    for name, folder in parts.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"--{name}: there is no folder {folder}; train it with `pretrain` first")


def _clip(folder: Path) -> CLIPModel:
    """A saved CLIP in single precision, whatever it was saved in."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32)


def _tower(parts: Parts) -> CLIPTextModel:
    """The text tower that a U-Net is trained with: the one trained on, where there is one."""
    if "text" in parts:
        return CLIPTextModel.from_pretrained(parts["text"], dtype=torch.float32)
    return models.text_encoder(_clip(parts["clip"]))


def _train_unet(budget: Budget, data: corpus.Corpus, folder: Path, parts: Parts) -> tuple[nn.Module, float]:
    return prior.train(budget, data, folder, AutoencoderKL.from_pretrained(parts["vae"]), _tower(parts))


def _train_on(
    start: str,
    budget: Budget,
    data: corpus.Corpus,
    folder: Path,
    parts: Parts,
    loose_share: float = 0.0,
    weigh: Weigh = head_weights,
) -> tuple[nn.Module, float]:
    """Train the U-Net `start` on, for the details."""
    unet = UNet2DConditionModel.from_pretrained(parts[start])
    autoencoder = AutoencoderKL.from_pretrained(parts["vae"])
    return prior.train(budget, data, folder, autoencoder, _tower(parts), unet, loose_share, weigh)


def _train_decoder(
    start: str, weigh: Weigh, budget: Budget, data: corpus.Corpus, folder: Path, parts: Parts
) -> tuple[nn.Module, float]:
    """Train the decoder of the autoencoder `start` on."""
    return vae.train_decoder(budget, data, folder, AutoencoderKL.from_pretrained(parts[start]), weigh)


def _train_text(budget: Budget, data: corpus.Corpus, folder: Path, parts: Parts) -> tuple[nn.Module, float]:
    return text.train(budget, data, folder, models.text_encoder(_clip(parts["clip"])))


def _train_image_encoder(
    budget: Budget, data: corpus.Corpus, folder: Path, parts: Parts
) -> tuple[nn.Module, float]:
    return clip.train_vision(budget, data, folder, _clip(parts["clip"]))


RECIPES: dict[str, Callable[[Budget, corpus.Corpus, Path, Parts], tuple[nn.Module, float]]] = {
    "vae": lambda budget, data, folder, parts: vae.train(budget, data, folder),
    "clip": lambda budget, data, folder, parts: clip.train(budget, data, folder),
    "decoder": partial(_train_decoder, "vae", head_weights),
    "unet": _train_unet,
    "details": partial(_train_on, "unet"),
    "finish": partial(_train_on, "details"),
    "text": _train_text,
    "polish": partial(_train_on, "finish", loose_share=prior.LOOSE_SHARE),
    "props": partial(_train_on, "polish", loose_share=prior.LOOSE_SHARE, weigh=prop_weights),
    "props_decoder": partial(_train_decoder, "decoder", prop_weights),
    "image_encoder": _train_image_encoder,
    "identity": lambda budget, data, folder, parts: judges.train_identity(budget, data, folder),
    "attributes": lambda budget, data, folder, parts: judges.train_attributes(budget, data, folder),
    "clip_judge": lambda budget, data, folder, parts: clip.train(
        budget, data, folder, layers=3, web_share=clip.JUDGE_WEB_SHARE
    ),
    "segmenter": lambda budget, data, folder, parts: annotators.train_segmenter(budget, data, folder),
    "captioner": lambda budget, data, folder, parts: annotators.train_captioner(budget, data, folder),
}


def save_processor(model: str, folder: Path) -> None:
    """What turns pictures or texts into the model's inputs, saved beside it."""
    if model in ("identity", "attributes"):
        models.judge_processor().save_pretrained(folder)
    elif model == "segmenter":
        models.segmenter_processor().save_pretrained(folder)
    elif model == "captioner":
        models.captioner_processor().save_pretrained(folder)
    elif model == "image_encoder":
        models.image_processor().save_pretrained(folder)
    elif model in ("clip", "clip_judge"):
        models.clip_processor().save_pretrained(folder)


def run(
    settings: PretrainConfig,
    model: Model,
    output: Path,
    cache: Path,
    checkpoints: Path,
    vae: Path | None = None,
    clip: Path | None = None,
    unet: Path | None = None,
    details: Path | None = None,
    finish: Path | None = None,
    text: Path | None = None,
    decoder: Path | None = None,
    polish: Path | None = None,
) -> None:
    """Train one model and save it in half precision.

    `cache` keeps rendered scenes; `checkpoints` keeps the training's state, from which a killed run with the
    same settings, data, code and parts goes on, until the model is saved. Parts that are missing are named
    before any scene is rendered; see `check_parts`.
    """
    given = {
        "vae": vae,
        "clip": clip,
        "unet": unet,
        "details": details,
        "finish": finish,
        "text": text,
        "decoder": decoder,
        "polish": polish,
    }
    parts = {name: folder for name, folder in given.items() if folder is not None}
    check_parts(model, parts)
    torch.set_num_threads(settings.threads)
    data = corpus.load(
        "pretrain", settings.images, settings.corpus_seed, cache, prop_share=settings.prop_share
    )
    torch.manual_seed(settings.budget.seed)
    key = settings_hash(
        {
            "settings": asdict(settings),
            "data": data.sha256,
            "code": code_hash("moa.miniature.pretrain"),
            "parts": [model_hash(part) for part in parts.values()],
        }
    )
    state = checkpoints / f"{model}-{key}"
    trained, seconds = RECIPES[model](settings.budget, data, state, parts)
    unfinished = output.with_name(output.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    models.save_half(trained, unfinished)
    save_processor(model, unfinished)
    shutil.copy(state / "log.csv", unfinished / "log.csv")
    recipe = {
        "model": model,
        "parameters": sum(p.numel() for p in trained.parameters()),
        "settings": asdict(settings),
        "data_sha256": data.sha256,
        "seconds": round(seconds),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    (unfinished / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    shutil.rmtree(output, ignore_errors=True)
    unfinished.rename(output)
    shutil.rmtree(state)


def assemble(
    vae: Path,
    decoder: Path,
    clip: Path,
    unet: Path,
    details: Path,
    finish: Path,
    text: Path,
    polish: Path,
    props: Path,
    props_decoder: Path,
    prior: Path,
) -> None:
    """Join trained parts into the prior in diffusers' folder layout."""
    pipeline = models.assemble_prior(
        AutoencoderKL.from_pretrained(props_decoder),
        UNet2DConditionModel.from_pretrained(props),
        CLIPTextModel.from_pretrained(text, dtype=torch.float32),
    )
    pipeline.to(dtype=torch.float16).save_pretrained(prior, safe_serialization=True)
    sources = {
        "vae": vae,
        "decoder": decoder,
        "clip": clip,
        "unet": unet,
        "details": details,
        "finish": finish,
        "text": text,
        "polish": polish,
        "props": props,
        "props_decoder": props_decoder,
    }
    for name, source in sources.items():
        for file in ("recipe.json", "log.csv"):
            shutil.copy(source / file, prior / f"{name}-{file}")
