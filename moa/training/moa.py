"""MoA as a trainee: Eq. 11 on the frozen prior.

Entry point, called by `python -m moa train`: `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from moa.adapter import MoAAdapter
from moa.attention import MoAContext, Recorder
from moa.baselines.moa import MoA
from moa.conditioner import SubjectConditioner
from moa.data.subjects import read_subjects
from moa.losses import masked_loss, object_loss, router_loss
from moa.methods import Sampling
from moa.sampling import load_prior
from moa.training import loop
from moa.training.config import TrainConfig
from moa.training.dataset import Batch
from moa.training.trainee import FrozenPrior, Trainee, image_encoder, timestep_weights, union


class MoATrainee(Trainee):
    """Trains the adapter: experts, routers, multimodal prompt and the last layers of the image encoder."""

    name = "moa"

    def __init__(self, config: TrainConfig, device: str) -> None:
        pipe = load_prior(config.prior, device)
        encoder, processor = image_encoder(config, device)
        super().__init__(config, FrozenPrior(pipe), processor)
        self.adapter = MoAAdapter.from_unet(
            pipe.unet,
            image_encoder=encoder,
            image_layers=config.image_encoder_layers,
            loss_layers=None if config.loss_layers is None else list(config.loss_layers),
            personalize_below=config.personalize_below,
            experts=config.experts,
            router=config.router,
            router_width=config.router_width,
            frequencies=config.frequencies,
            spacetime=config.spacetime,
            sources={"prior": asdict(config.prior), "image_encoder": asdict(config.image_encoder)},
        )
        nn.Module.to(pipe.unet, config.frozen_dtype)  # its own `to` warns of parts it does not have
        self.adapter.install(pipe.unet, config.attention)
        self.unet = pipe.unet
        self.inputs = SubjectConditioner(pipe.tokenizer, pipe.text_encoder, encoder, processor, self.adapter)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.adapter.named_parameters())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Eq. 11. A sample without condition is still looked at through its subjects' masks.

        Otherwise the null branch would never get a gradient, for the loss of a sample without mask is zero.
        """
        noisy, target = self.prior.diffuse(batch)
        text = self.prior.text(batch.captions)
        recorder = Recorder(layers=self.adapter.loss_layers)
        context = MoAContext(
            text=text,
            features=self._features(batch, text),
            token=batch.tokens,
            present=batch.present,
            prior_only=torch.zeros_like(batch.dropped),
            recorder=recorder,
        )
        answer = self.unet(
            noisy, batch.timesteps, encoder_hidden_states=text, cross_attention_kwargs={"moa": context}
        ).sample
        mask = union(batch.masks, batch.exists)
        weights = timestep_weights(self.prior, batch, self.config.snr_gamma)
        masked = masked_loss(answer, target, mask if batch.masked else torch.ones_like(mask), weights)
        router = router_loss(recorder.router, mask)
        attention = object_loss(recorder.attention, batch.masks, batch.present) * batch.object_share
        loss = masked + self.config.router_weight * router + self.config.object_weight * attention
        return {"loss": loss, "loss_masked": masked, "loss_router": router, "loss_object": attention}

    def _features(self, batch: Batch, text: Tensor) -> Tensor:
        """[B, S, F] features of the present subjects, zero elsewhere."""
        width = self.adapter.config["image_feature_dim"]
        features = text.new_zeros(*batch.tokens.shape, width)
        if not len(batch.slots):
            return features
        encoded = self.inputs.encode_images(self.encoder_input(batch))
        return features.index_put((batch.slots[:, 0], batch.slots[:, 1]), encoded.to(features.dtype))

    def save(self, folder: Path) -> None:
        self.adapter.save_pretrained(folder)

    def method(self, sampling: Sampling) -> MoA:
        self.inputs.null_branch = sampling.null_branch
        self.inputs.personalize_below = sampling.personalize_below
        self.inputs.sparse_threshold = sampling.sparse_threshold
        return MoA(self.prior.pipe, self.inputs, self.adapter, sampling)


def run(
    config: TrainConfig,
    records: Sequence[Path],
    subjects: Path,
    output: Path,
    checkpoints: Path | None = None,
    resume: str = "latest",
    keep_checkpoints: bool = False,
) -> None:
    """Train MoA from shards of records; `subjects` (a parquet) are shown in the validation grids.

    A killed run goes on when it is started again; see `moa.training.loop.run` for the other options.
    """
    shown = list(read_subjects(subjects).values())
    loop.run(config, MoATrainee, "moa", records, shown, output, checkpoints, resume, keep_checkpoints)
