"""FastComposer (Xiao et al., arXiv 2305.10431): subject features fused into the text, the U-Net trained.

Written from the paper and the published facts about its code. The frozen text encoder embeds the prompt; at
the token of each subject's word an MLP fuses the embedding with the subject's image feature. In training, a
localization loss ties the cross-attention of that token to the subject's mask. In sampling, the first steps
see the text alone ("delayed subject conditioning"), so that the layout follows the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from moa.attention import run_expert, subject_maps
from moa.conditioner import SubjectConditioner
from moa.methods import MethodConfig, Request, Sampling, register
from moa.prompts import FuseMLP
from moa.sampling import Pipeline, in_batches, load_image_encoder, load_prior, run

WEIGHTS = "model.safetensors"


@dataclass
class Localization:
    """Handed through `cross_attention_kwargs`: where to look, and what was seen."""

    tokens: Tensor  # [B, S] places of the subjects' words
    attention: dict[str, Tensor] = field(default_factory=dict)  # {layer: [B, S, P]}, mean over heads


class LocalizedProcessor:
    """diffusers' attention, which keeps the probabilities at the subjects' tokens when asked to."""

    def __init__(self, name: str, records: bool, explicit: bool) -> None:
        self.name, self.records = name, records
        self.plain = AttnProcessor() if explicit else AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        localization: Localization | None = None,
    ) -> Tensor:
        if localization is None or not self.records or encoder_hidden_states is None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        modules = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        output, probabilities = run_expert(
            modules, hidden_states, encoder_hidden_states, attn.heads, None, explicit=True
        )
        assert probabilities is not None
        everyone = torch.ones_like(localization.tokens, dtype=torch.bool)
        localization.attention[self.name] = subject_maps(probabilities, localization.tokens, everyone)
        return attn.to_out[1](output) / attn.rescale_output_factor


def localize(unet: Any, layers: Sequence[str], explicit: bool) -> None:
    """Give the U-Net processors that can record the cross-attentions called `layers` (module names)."""
    names = {name: name.removesuffix(".processor") for name in unet.attn_processors}
    processors = {n: LocalizedProcessor(layer, layer in layers, explicit) for n, layer in names.items()}
    unet.set_attn_processor(processors)


class FastComposer(nn.Module):
    """The trained parts: the U-Net, the fusion and the last layers of the image encoder."""

    def __init__(
        self,
        unet: Any,
        image_encoder: CLIPVisionModelWithProjection,
        image_encoder_layers: int = 2,
    ) -> None:
        super().__init__()
        self.unet, self.image_encoder = unet, image_encoder
        self.image_encoder_layers = image_encoder_layers
        text_dim, image_dim = unet.config.cross_attention_dim, image_encoder.config.projection_dim
        self.fusion = FuseMLP(text_dim + image_dim, text_dim)

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name; no frozen one is among them."""
        layers = self.image_encoder.vision_model.encoder.layers
        first = len(layers) - self.image_encoder_layers
        if first < 0:
            raise ValueError(
                f"image_encoder_layers is {self.image_encoder_layers}, but the encoder has {len(layers)}"
            )
        chosen: dict[str, nn.Module] = {"unet": self.unet, "fusion": self.fusion}
        chosen |= {f"image_encoder.layers.{i}": layers[i] for i in range(first, len(layers))}
        return {f"{prefix}.{n}": p for prefix, module in chosen.items() for n, p in module.named_parameters()}

    def features(self, pixels: Tensor) -> Tensor:
        """Images [N, 3, side, side], normalised, to projected features [N, F]."""
        if not len(pixels):
            return pixels.new_zeros(0, self.image_encoder.config.projection_dim)
        return self.image_encoder(pixels).image_embeds

    def fuse(self, text: Tensor, tokens: Tensor, slots: Tensor, features: Tensor) -> Tensor:
        """Put fused embeddings into the text.

        Args:
            text: [B, T, D] embeddings of the prompts.
            tokens: [B, S] places of the subjects' words.
            slots: [N, 2] (sample, subject) of each feature.
            features: [N, F].

        Returns:
            [B, T, D]; equal to `text` outside the N places.
        """
        if not len(slots):
            return text
        rows, places = slots[:, 0], tokens[slots[:, 0], slots[:, 1]]
        words = text[rows, places]
        fused = self.fusion(torch.cat([words, features.to(text.dtype)], -1), words)
        return text.index_put((rows, places), fused.to(text.dtype))

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the trained parameters to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"class": "FastComposer", "image_encoder_layers": self.image_encoder_layers}
        (folder / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
        tensors = {n: p.detach().cpu().contiguous().clone() for n, p in self.trained().items()}
        save_file(tensors, folder / WEIGHTS)

    def load_trained(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote. Raises FileNotFoundError or ValueError naming the file."""
        path = folder / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: train again with `python -m moa train-fastcomposer`")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is broken ({error}): delete its folder and train again") from error
        own = self.trained()
        if set(tensors) != set(own):
            wrong = sorted(set(tensors) ^ set(own))
            raise ValueError(
                f"{path} was trained with other models: {wrong[0]} and {len(wrong) - 1} more differ"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def load_fastcomposer(
    folder: Path, pipe: Pipeline, image_encoder: CLIPVisionModelWithProjection
) -> FastComposer:
    """A trained FastComposer in the place of the pipeline's U-Net."""
    settings = json.loads((folder / "config.json").read_text())
    if settings.get("class") != "FastComposer":
        raise ValueError(f"{folder / 'config.json'} is of {settings.get('class')!r}, not of FastComposer")
    model = FastComposer(pipe.unet, image_encoder, settings["image_encoder_layers"])
    model.load_trained(folder)
    return model.to(pipe.device, pipe.unet.dtype).requires_grad_(False).eval()


class FastComposerMethod:
    """FastComposer with delayed subject conditioning; `sampling.alpha` of the steps see the subjects."""

    name = "fastcomposer"

    def __init__(
        self,
        pipe: Pipeline,
        model: FastComposer,
        processor: CLIPImageProcessor,
        sampling: Sampling,
    ) -> None:
        self.pipe, self.model, self.sampling = pipe, model, sampling
        self.inputs = SubjectConditioner(
            pipe.tokenizer,
            pipe.text_encoder,
            model.image_encoder,
            processor,
            adapter=None,  # type: ignore[arg-type]
        )

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        return [i for part in in_batches(requests, self.sampling.batch_size) for i in self._batch(part)]

    def _batch(self, requests: Sequence[Request]) -> list[Image.Image]:
        sampling = self.sampling
        text = self.inputs.encode_text([r.prompt for r in requests])
        negative = self.inputs.encode_text([sampling.negative_prompt] * len(requests))
        fused = self._fused(text, requests)
        both = torch.cat([negative, fused]) if sampling.guidance > 1 else fused
        start = sampling.steps - round(sampling.alpha * sampling.steps)  # first step that sees the subjects
        return run(
            self.pipe,
            sampling,
            requests,
            prompt_embeds=text if start else fused,
            negative_prompt_embeds=negative,
            callback_on_step_end=_switch(start, both),
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )

    @torch.no_grad()
    def _fused(self, text: Tensor, requests: Sequence[Request]) -> Tensor:
        slots = [(b, s) for b, request in enumerate(requests) for s in range(len(request.subjects))]
        if not slots:
            return text
        tokens = torch.zeros(len(requests), max(len(r.spans) for r in requests), dtype=torch.int64)
        for b, request in enumerate(requests):
            found = self.inputs.token_indices(request.prompt, request.spans)
            tokens[b, : len(found)] = torch.tensor(found)
        photos = [requests[b].subjects[s].image for b, s in slots]
        features = self.model.features(self.inputs.pixel_values(photos))
        where = torch.tensor(slots, device=text.device)
        return self.model.fuse(text, tokens.to(text.device), where, features)

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.model.trained().values())


def _switch(start: int, embeddings: Tensor) -> Callable[..., dict[str, Tensor]]:
    """A callback after which step `start` and all later ones see other embeddings."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": embeddings} if step + 1 == start else {}

    return callback


@register("fastcomposer")
def make(config: MethodConfig) -> FastComposerMethod:
    """The trained FastComposer that the config names."""
    pipe = load_prior(config.prior, config.device, config.dtype)
    encoder, processor = load_image_encoder(config.image_encoder, config.device, config.dtype)
    model = load_fastcomposer(config.trained_folder("fastcomposer"), pipe, encoder)
    return FastComposerMethod(pipe, model, processor, config.sampling)
