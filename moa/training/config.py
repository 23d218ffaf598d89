"""Settings of training: one frozen dataclass for both trainees; see `config/*.yaml`, section `train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from moa.attention import RouterKind
from moa.machine import has_bf16
from moa.methods import ModelSource, Sampling


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Steps decide when it ends, so that results do not depend on the clock."""

    prior: ModelSource  # a StableDiffusionPipeline; frozen (FastComposer starts from its U-Net)
    image_encoder: ModelSource  # a CLIPVisionModelWithProjection with its CLIPImageProcessor
    device: str = "cpu"  # cpu, or cuda, one GPU a process
    seed: int = 0  # of initial weights, order, noise, timesteps, drops, augmentation
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # images an optimizer step, over all processes and accumulated parts
    accumulation: int = 1  # parts that a process splits its share of the batch into
    # Optimizer: AdamW
    lr: float = 5e-5  # [paper, Table 1]
    lr_warmup: int = 0  # steps of linear rise from 0
    lr_decay: Literal["none", "cosine"] = "none"  # after the warm-up, to 0 at the last step
    weight_decay: float = 1e-2  # [FastComposer]
    clip: float = 1.0  # largest norm of the gradient [FastComposer]
    ema: float = 0.0  # decay of the running mean of the weights that is saved; 0 = save the last weights
    # Accelerate's mixed precision; "no" = 32-bit floats, "auto" = bf16 where the device has it, else no
    precision: Literal["no", "fp16", "bf16", "auto"] = "no"
    # Noise and conditions
    max_timestep: int = 800  # timesteps are drawn from [0, max_timestep) [paper]
    timesteps: Literal["uniform", "cubic"] = "uniform"  # [paper]; cubic: mostly high ones [T2I-Adapter]
    p_drop: float = 0.1  # probability that a sample loses text and subjects [paper]
    keep_object: float = 1.0  # probability that a subject of a kept sample keeps its image [FastComposer: .9]
    masked_probability: float = 1.0  # share of batches with the masked loss [paper: all; FastComposer: .5]
    # Losses
    snr_gamma: float = 0.0  # min-SNR weighting of timesteps, such as 5; 0 = none [paper, FastComposer]
    router_weight: float = 1e-4  # lambda_r of Eq. 11; not read by fastcomposer
    object_weight: float = 1e-4  # lambda_o of Eq. 11; FastComposer's localization weight is 1e-3
    loss_layers: tuple[str, ...] | None = (
        None  # L: names of attention layers or of what holds them; null = all
    )
    # but the highest-resolution level's [paper]
    # Subjects
    max_subjects: int = 4  # the largest segments of a picture [FastComposer]
    subject_background: Literal["noise", "keep"] = "noise"  # of subject crops [FastComposer: noise]
    flip: float = 0.5  # probability that a crop is mirrored
    rotate: float = 0.0  # crops are turned by up to so many degrees
    zoom: float = 1.0  # crops are enlarged up to so many times
    brightness: float = 0.0  # crops are brightened or darkened by at most this share
    personalize_below: int = 1000  # MoA: what the adapter asks of sampling; see `Sampling.personalize_below`
    experts: int = 2  # MoA: N of Eq. 4, the prior included [paper]
    router: RouterKind = "linear"  # MoA: none = one fine-tuned path instead of the mixture [paper, ablation]
    router_width: int = 64  # MoA: of the hidden layer that `router: mlp` has
    frequencies: int = 8  # MoA: octaves of the Fourier features of t and of l in Eq. 8
    spacetime: bool = True  # MoA: false leaves t and l out of Eq. 8 [paper, ablation]
    image_encoder_layers: int = 2  # last layers of the image encoder that train too [FastComposer]
    attention: Literal["explicit", "sdpa"] = "sdpa"  # equal to rounding; which is faster depends on the CPU
    # Work
    gradient_checkpointing: bool = False  # the backward pass runs the U-Net's blocks again: less memory
    cache: bool = True  # encode latents and captions once, in memory; false for large data
    workers: int = 0  # processes that load data; 0 = the training process itself
    log_every: int = 10  # steps a row of log.csv, which holds their mean
    checkpoint_every: int = 250  # steps between checkpoints
    checkpoint_seconds: float = 600.0  # and never longer than this apart
    checkpoints_kept: int = 2
    validate_every: int = 500  # steps between validation grids; 0 = none
    validation_subjects: int = 4  # rows of the grid
    validation_prompts: tuple[str, ...] = ()  # its columns, such as "a {word} on the beach"
    validation_sampling: Sampling = field(default_factory=lambda: Sampling(steps=20))
    trackers: tuple[str, ...] = ()  # Accelerate's, such as tensorboard, wandb: rows of log.csv and the grids

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "max_subjects", "log_every", "checkpoint_every",
                    "checkpoints_kept", "max_timestep"):  # fmt: skip
            if getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but must be at least 1")
        for key in ("p_drop", "keep_object", "masked_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} is {getattr(self, key)}, but a probability is 0..1")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, but a decay is 0 <= ema < 1")
        for prompt in self.validation_prompts:
            if "{word}" not in prompt:
                raise ValueError(f"validation_prompts: {prompt!r} lacks the placeholder {{word}}")

    def on_this_machine(self) -> TrainConfig:
        """With the precision that `auto` means here."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bf16" if has_bf16(self.device) else "no")

    @property
    def frozen_dtype(self) -> torch.dtype:
        """What the frozen U-Net is held in: autocast would compute with this type anyway."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision, torch.float32)

    def part_size(self, processes: int) -> int:
        """Images in one backward pass of one process; raises ValueError unless the batch divides evenly."""
        parts = processes * self.accumulation
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide by {processes} processes "
                f"x {self.accumulation} accumulated parts"
            )
        return self.batch_size // parts

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, 0 <= step < steps."""
        if step < self.lr_warmup:
            return self.lr * (step + 1) / self.lr_warmup
        if self.lr_decay == "none":
            return self.lr
        progress = (step - self.lr_warmup) / max(1, self.steps - self.lr_warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
