"""Loading pretrained models and sampling with them: what all methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors import SafetensorError
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from moa.adapter import MoAAdapter
from moa.methods import ModelSource, Request, Sampling

Pipeline = Any  # diffusers' StableDiffusionPipeline, whose components its types do not know

SCHEDULERS = {"unipc": UniPCMultistepScheduler, "ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}


def _load(loader: Callable[..., Any], role: str, folder: str | Path, cure: str, **options: Any) -> Any:
    """Load a model, turning what libraries say of missing and broken files into what to do.

    Raises:
        FileNotFoundError: no such folder or hub repository, or a file missing from it.
        ValueError: a weight file that is there but broken.
    """
    if (Path(folder).is_absolute() or str(folder).count("/") != 1) and not Path(folder).is_dir():
        raise FileNotFoundError(f"{role}: folder {folder} does not exist; {cure}")
    try:
        return loader(folder, **options)
    except (SafetensorError, OSError) as error:
        if isinstance(error, SafetensorError) or "Unable to load weights" in str(error):  # diffusers' words
            raise ValueError(f"{role}: a weight file in {folder} is broken ({error}); {cure}") from error
        raise FileNotFoundError(f"{role}: cannot load {folder}: {error}; {cure}") from error


def _pretrained(loader: Callable[..., Any], role: str, source: ModelSource, **options: Any) -> Any:
    """Load a model that the config names; raises as `_load`."""
    cure = f"check `models.{role}` in the config, or make the weights again with `snakemake pretrain`"
    return _load(loader, role, source.id, cure, revision=source.revision, **options)


def load_prior(
    source: ModelSource, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Pipeline:
    """The frozen prior, quiet, in evaluation mode. Raises as `_load`."""
    pipe = _pretrained(
        StableDiffusionPipeline.from_pretrained,
        "prior",
        source,
        dtype=dtype,
        safety_checker=None,
        requires_safety_checker=False,
        use_safetensors=True,
    ).to(device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_image_encoder(
    source: ModelSource, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """The subject encoder, frozen, and what prepares its images. Raises as `_load`."""
    encoder = _pretrained(CLIPVisionModelWithProjection.from_pretrained, "image_encoder", source, dtype=dtype)
    processor = _pretrained(CLIPImageProcessor.from_pretrained, "image_encoder", source)
    return encoder.to(device).requires_grad_(False).eval(), processor


@contextmanager
def sampler(pipe: Pipeline, sampling: Sampling) -> Iterator[Pipeline]:
    """The pipeline with a fresh scheduler of the chosen kind on the prior's noise schedule, for a while."""
    own = pipe.scheduler
    pipe.scheduler = SCHEDULERS[sampling.scheduler].from_config(own.config)
    try:
        yield pipe
    finally:
        pipe.scheduler = own


def load_adapter(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> MoAAdapter:
    """A trained MoA adapter. Raises FileNotFoundError or ValueError naming the folder."""
    cure = "train again with `python -m moa train`"
    adapter = _load(MoAAdapter.from_pretrained, "moa", folder, cure, dtype=dtype)
    return adapter.to(device).requires_grad_(False).eval()


def crop_side(processor: CLIPImageProcessor) -> int:
    """Side, in pixels, of the images that an image encoder takes."""
    return int(processor.crop_size["height"])


def latent_shape(pipe: Pipeline) -> tuple[int, int, int]:
    """Channels, height and width of the latents that the prior was trained on."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return pipe.unet.config.in_channels, height, width


def initial_latents(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Starting noise [B, C, H, W], float32 on the CPU: row b depends on `seeds[b]` and `shape` only."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def in_batches(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """Requests in groups of at most `size`, in order."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def run(
    pipe: Pipeline, sampling: Sampling, requests: Sequence[Request], **conditions: Any
) -> list[Image.Image]:
    """Sample one image a request, each from noise of its own seed; `conditions` go to the pipeline."""
    latents = initial_latents([r.seed for r in requests], latent_shape(pipe))
    with sampler(pipe, sampling):
        made = pipe(
            latents=latents.to(pipe.device, pipe.vae.dtype),  # in training the U-Net alone has 16 bits
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            **conditions,
        )
    return list(made.images)
