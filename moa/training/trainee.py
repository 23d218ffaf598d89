"""What the loop trains: an interface with two implementations, and the frozen prior as both see it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from moa.conditioner import PromptEncoder
from moa.losses import snr_weights
from moa.methods import Method, Sampling
from moa.sampling import Pipeline, crop_side, latent_shape, load_image_encoder
from moa.training.config import TrainConfig
from moa.training.dataset import Batch, Records, Sizes

ENCODED_AT_ONCE = 64  # images or captions; fixed, because rounding follows the size of a batch


class FrozenPrior:
    """The parts of the prior that never train: latents and text are encoded once when `cache` is set."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.words = PromptEncoder(pipe.tokenizer, pipe.text_encoder)
        self.find_tokens = self.words.token_indices
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        if self.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the prior predicts {self.scheduler.config.prediction_type!r}; "
                "training knows epsilon and v_prediction"
            )
        self.captions: dict[str, Tensor] = {}
        self.posteriors: Tensor | None = None  # [records, 2, C, h, w], mean and standard deviation

    def sizes(self, crop: int) -> Sizes:
        """Sizes for the data set; raises ValueError unless latents are square."""
        channels, height, width = latent_shape(self.pipe)
        if height != width:
            raise ValueError(f"the prior's latents are {height} x {width}; training needs square ones")
        return Sizes(image=height * self.pipe.vae_scale_factor, latent=height, channels=channels, crop=crop)

    @torch.no_grad()
    def fill(self, data: Records) -> None:
        """Encode all records, in their order, so that every run and process holds the same values."""
        numbers = range(len(data))
        captions = sorted({data.example(n).caption for n in numbers} | {""})
        for start in range(0, len(captions), ENCODED_AT_ONCE):
            part = captions[start : start + ENCODED_AT_ONCE]
            self.captions |= dict(zip(part, self.words.encode_text(part), strict=True))
        parts = [numbers[i : i + ENCODED_AT_ONCE] for i in range(0, len(numbers), ENCODED_AT_ONCE)]
        bar = tqdm(parts, "encode records", unit="batch")
        self.posteriors = torch.cat([self._encode(torch.stack([data.pixels(n) for n in p])) for p in bar])

    def _encode(self, pixels: Tensor) -> Tensor:
        posterior = self.pipe.vae.encode(pixels.to(self.pipe.device, self.pipe.vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], 1).float()

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings, [B, T, D]."""
        if all(c in self.captions for c in captions):
            return torch.stack([self.captions[c] for c in captions])
        return self.words.encode_text(captions)

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents [B, C, h, w], drawn from the autoencoder's posterior with the batch's own noise."""
        if batch.pixels is None:
            assert self.posteriors is not None, "latents are neither cached nor in the batch"
            posterior = self.posteriors[batch.index.to(self.posteriors.device)].to(batch.noise.device)
        else:
            posterior = self._encode(batch.pixels)
        drawn = posterior[:, 0] + posterior[:, 1] * batch.posterior_noise
        return drawn * self.pipe.vae.config.scaling_factor

    def diffuse(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noisy latents and what the U-Net should answer (noise or velocity), [B, C, h, w] each."""
        latents = self.latents(batch)
        noisy = self.scheduler.add_noise(latents, batch.noise, batch.timesteps)
        if self.scheduler.config.prediction_type == "epsilon":
            return noisy, batch.noise
        return noisy, self.scheduler.get_velocity(latents, batch.noise, batch.timesteps)


def timestep_weights(prior: FrozenPrior, batch: Batch, gamma: float) -> Tensor:
    """Weight of each sample's masked loss, [B]."""
    scheduler = prior.scheduler
    return snr_weights(scheduler.alphas_cumprod, batch.timesteps, scheduler.config.prediction_type, gamma)


def image_encoder(
    config: TrainConfig, device: str
) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessor]:
    """The subject encoder, with attention as the U-Net's, and what prepares its images."""
    encoder, processor = load_image_encoder(config.image_encoder, device)
    encoder.set_attn_implementation("eager" if config.attention == "explicit" else config.attention)
    return encoder, processor


class Trainee(nn.Module):
    """Something that the loop can train; `forward` gives the losses, so that wrappers for many GPUs work."""

    name: ClassVar[str]

    def __init__(self, config: TrainConfig, prior: FrozenPrior, processor: CLIPImageProcessor) -> None:
        """processor: what prepares images for the image encoder."""
        super().__init__()
        self.config, self.prior, self.processor = config, prior, processor
        if config.gradient_checkpointing:
            prior.pipe.unet.enable_gradient_checkpointing()

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by stable names; everything else must not require gradients."""

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars `loss` (to minimise), `loss_masked`, `loss_router`, `loss_object`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write config.json and the trained parameters, as they are, to the folder that methods load."""

    @abstractmethod
    def method(self, sampling: Sampling) -> Method:
        """The trainee, as it is now, as a method."""

    def crop_side(self) -> int:
        """Side in pixels of the subject images that it wants."""
        return crop_side(self.processor)

    def encoder_input(self, batch: Batch) -> Tensor:
        """The batch's subject images [N, 3, side, side] as the image encoder wants them."""
        return normalised(batch.crops, self.processor.image_mean, self.processor.image_std)


def union(masks: Tensor, subjects: Tensor) -> Tensor:
    """[B, S, h, w] masks of the chosen subjects [B, S] as one [B, 1, h, w], in 0..1."""
    return (masks * subjects[..., None, None]).sum(1, keepdim=True).clamp(max=1)


def normalised(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Crops [N, 3, side, side] in 0..1 as an image encoder wants them."""
    shape = (1, 3, 1, 1)
    return (crops - crops.new_tensor(mean).view(shape)) / crops.new_tensor(std).view(shape)
