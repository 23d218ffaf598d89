"""FastComposer as a trainee: diffusion loss on the subjects or the whole picture, and the localization loss.

Entry point, called by `python -m moa train-fastcomposer`: `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moa.baselines.fastcomposer import FastComposer, FastComposerMethod, Localization, localize
from moa.data.subjects import read_subjects
from moa.layers import attention_layers, select_loss_layers
from moa.losses import masked_loss, object_loss
from moa.methods import Sampling
from moa.sampling import load_prior
from moa.training import loop
from moa.training.config import TrainConfig
from moa.training.dataset import Batch
from moa.training.trainee import FrozenPrior, Trainee, image_encoder, timestep_weights, union


class FastComposerTrainee(Trainee):
    """Trains the U-Net, the fusion and the last layers of the image encoder."""

    name = "fastcomposer"

    def __init__(self, config: TrainConfig, device: str) -> None:
        pipe = load_prior(config.prior, device)
        encoder, processor = image_encoder(config, device)
        super().__init__(config, FrozenPrior(pipe), processor)
        self.model = FastComposer(pipe.unet, encoder, config.image_encoder_layers).to(device)
        for parameter in self.model.trained().values():
            parameter.requires_grad_(True)
        cross = [n for n, a in attention_layers(pipe.unet).items() if a.is_cross_attention]
        self.layers = [n for n in select_loss_layers(pipe.unet, config.loss_layers) if n in cross]
        localize(pipe.unet, self.layers, explicit=config.attention == "explicit")

    def trained(self) -> dict[str, nn.Parameter]:
        return self.model.trained()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """FastComposer's losses; samples without condition weigh nothing when masked."""
        noisy, target = self.prior.diffuse(batch)
        features = self.model.features(self.encoder_input(batch))
        text = self.model.fuse(self.prior.text(batch.captions), batch.tokens, batch.slots, features)
        seen = Localization(batch.tokens)
        answer = self.model.unet(
            noisy, batch.timesteps, encoder_hidden_states=text, cross_attention_kwargs={"localization": seen}
        ).sample
        mask = union(batch.masks, batch.present) if batch.masked else torch.ones_like(noisy[:, :1])
        weights = timestep_weights(self.prior, batch, self.config.snr_gamma)
        denoising = masked_loss(answer, target, mask, weights)
        localization = object_loss(seen.attention, batch.masks, batch.present) * batch.object_share
        loss = denoising + self.config.object_weight * localization
        return {
            "loss": loss,
            "loss_masked": denoising,
            "loss_router": torch.zeros_like(loss),
            "loss_object": localization,
        }

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def method(self, sampling: Sampling) -> FastComposerMethod:
        return FastComposerMethod(self.prior.pipe, self.model, self.processor, sampling)


def run(
    config: TrainConfig,
    records: Sequence[Path],
    subjects: Path,
    output: Path,
    checkpoints: Path | None = None,
    resume: str = "latest",
    keep_checkpoints: bool = False,
) -> None:
    """Train FastComposer from shards of records; `subjects` (a parquet) are shown in the validation grids.

    A killed run goes on when it is started again; see `moa.training.loop.run` for the other options.
    """
    shown = list(read_subjects(subjects).values())
    trainee = FastComposerTrainee
    loop.run(config, trainee, "fastcomposer", records, shown, output, checkpoints, resume, keep_checkpoints)
