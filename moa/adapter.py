"""MoAAdapter owns all that MoA trains. Installed, it turns a diffusers U-Net into a MoA U-Net, and back.

While installed the adapter's modules are children of the U-Net too (moves and offload reach them there), but
only the adapter saves them. A forward pre-hook on the U-Net takes the timestep to Eq. 8 and checks the batch.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any, Self, get_args

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from huggingface_hub import file_exists
from torch import Tensor, nn

from moa.attention import (
    AttentionKind,
    LayerInput,
    LayerSizes,
    MoAAttnProcessor,
    MoAContext,
    MoALayer,
    RouterKind,
    take,
)
from moa.layers import attention_layers, last_layers, named_layers, select_loss_layers, sizes_of
from moa.prompts import MultimodalPrompt

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")

CARD = """---
library_name: diffusers
{base_model}tags: [mixture-of-attention, text-to-image, personalization]
---

# MoA adapter

Mixture-of-Attention for a diffusion U-Net: {experts} experts (the prior is the U-Net itself) in {layers}
attention layers, {parameters:,} trained parameters, image features of {image_feature_dim} channels. The
U-Net and the image encoder are not in this folder: it was made for the prior `{prior}` and the image encoder
`{image_encoder}`.

```python
from moa import MoAPipeline

pipe = MoAPipeline.from_pretrained("{prior}", adapter="<this folder>", image_encoder="{image_encoder}")
pipe("a man riding a horse", subjects=[photo], subject_words=["man"]).images[0]
```
"""


class MoAAdapter(ModelMixin, ConfigMixin):
    """Personalization experts and routers of every attention layer, and the multimodal prompt (Eq. 4–8)."""

    @register_to_config
    def __init__(
        self,
        layers: dict[str, dict[str, Any]],
        image_feature_dim: int,
        experts: int = 2,
        router: RouterKind = "linear",
        router_width: int = 64,
        frequencies: int = 8,
        spacetime: bool = True,
        personalize_below: int = 1000,
        loss_layers: list[str] | None = None,
        image_encoder_shapes: dict[str, list[int]] | None = None,
        prior: dict[str, str | None] | None = None,
        image_encoder: dict[str, str | None] | None = None,
    ):
        """Called by `from_unet` and `from_pretrained`: the decisions, and the sizes of the U-Net.

        layers: {qualified name of an attention layer: its LayerSizes as a dict}, in the order in which
        they run.
        image_feature_dim: channels F of a subject's image feature.
        experts: N of Eq. 4, the prior included (paper: 2).
        router, router_width: "linear", or "mlp" with one hidden layer of that width (Eq. 7); "none" is the
        paper's ablation without the MoA layer: the personalization expert draws every pixel by itself.
        frequencies: octaves of the Fourier features of t and of l in PE(t, l).
        spacetime: False leaves PE(t, l) out of Eq. 8 (the paper's ablation).
        personalize_below: the router is meant to be fixed to the prior at this timestep and above, where the
        adapter was not trained; what samples takes it as its default. 1000: nowhere.
        loss_layers: qualified names, or beginnings of them ("mid_block"), of the losses' layers L; None
        for all.
        image_encoder_shapes: {parameter: shape} of the image encoder's layers that are trained too.
        prior, image_encoder: {"id": hub name or folder, "revision": commit or None} of the models that it was
        trained with, for the card; None if unknown.
        """
        super().__init__()
        if experts < 2:
            raise ValueError(
                f"experts: {experts}; there are the prior and at least one personalization expert"
            )
        if router not in get_args(RouterKind):
            raise ValueError(f"router: {router!r}; it is {', '.join(map(repr, get_args(RouterKind)))}")
        if router == "none" and experts != 2:
            raise ValueError(f"experts: {experts}; without a router there is one path beside the prior: 2")
        sizes = {name: LayerSizes(**layer) for name, layer in layers.items()}
        self.sizes = sizes
        self.cross_layers = [name for name in sizes if sizes[name].cross]
        if not self.cross_layers:
            raise ValueError("layers: none is a cross-attention layer, so no subject could enter the U-Net")
        self.loss_layers = named_layers(list(sizes), list(sizes) if loss_layers is None else loss_layers)
        self.mixtures = nn.ModuleDict(
            {module_key(name): MoALayer(sizes[name], experts, router, router_width) for name in sizes}
        )
        text_dim = sizes[self.cross_layers[0]].condition_dim
        self.prompt = MultimodalPrompt(
            image_feature_dim, text_dim, len(self.cross_layers), frequencies, spacetime
        )
        self.image_encoder_layers = nn.ParameterDict(
            {module_key(name): torch.empty(shape) for name, shape in (image_encoder_shapes or {}).items()}
        )

    # ── Made from a U-Net ──────────────────────────────────────────────────────────────────────

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        image_feature_dim: int | None = None,
        image_encoder: nn.Module | None = None,
        image_layers: int = 0,
        loss_layers: Sequence[str] | None = None,
        sources: Mapping[str, Any] | None = None,
        **decisions: Any,
    ) -> Self:
        """An adapter sized for `unet`, on its device and dtype, whose experts are copies of its attention.

        image_encoder: needed if image_layers > 0, or in place of image_feature_dim (its projection_dim is
        read).
        image_layers: how many of the encoder's last layers are trained too (FastComposer: 2), as copies.
        loss_layers: None takes `select_loss_layers(unet)`.
        decisions: the constructor's experts, router, router_width, frequencies, spacetime, personalize_below.
        sources: the constructor's prior and image_encoder, under these names.

        Raises:
            ValueError, TypeError: a U-Net that MoA does not fit, or has a LoRA in the projections to be
            copied.
        """
        if image_feature_dim is None:
            if image_encoder is None:
                raise ValueError("give image_feature_dim, or the image_encoder to read it from")
            image_feature_dim = int(image_encoder.config.projection_dim)  # type: ignore[union-attr, arg-type]
        attentions = attention_layers(unet)
        trained = last_layers(image_encoder, image_layers)
        parameter = next(unet.parameters())
        with torch.device(parameter.device):
            adapter = cls(
                layers={name: asdict(sizes_of(name, attn)) for name, attn in attentions.items()},
                image_feature_dim=image_feature_dim,
                loss_layers=select_loss_layers(unet, loss_layers),
                image_encoder_shapes={name: list(p.shape) for name, p in trained.items()},
                **(sources or {}),
                **decisions,
            )
        for name, attn in attentions.items():
            adapter.mixture(name).copy_from(attn)
        with torch.no_grad():
            for name, p in trained.items():
                adapter.image_encoder_layers[module_key(name)].copy_(p)
        return adapter if parameter.dtype == adapter.dtype else adapter.to(parameter.dtype)

    def mixture(self, name: str) -> MoALayer:
        """Experts and router of the attention layer of that qualified name."""
        return self.mixtures[module_key(name)]  # type: ignore[return-value]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters of the adapter: nothing frozen is in it."""
        return list(self.parameters())

    def image_encoder_overrides(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """{parameter of the image encoder: trained tensor in its place}, for `torch.func.functional_call`."""
        names = self.config["image_encoder_shapes"] or {}
        return {name: self.image_encoder_layers[module_key(name)].to(device, dtype) for name in names}

    def check_image_encoder(self, encoder: nn.Module) -> None:
        """ValueError unless the encoder has the layers of which the adapter holds trained copies."""
        shapes = self.config["image_encoder_shapes"] or {}
        found = {name: list(p.shape) for name, p in encoder.named_parameters()} if shapes else {}
        for name, shape in shapes.items():
            if found.get(name) != shape:
                about = f"{found[name]}" if name in found else "not there"
                raise ValueError(
                    f"the adapter trained the image encoder's {name}, {shape}; in this one it is {about}: "
                    f"load the image encoder that the adapter was made for, {self._source('image_encoder')}"
                )

    def _source(self, role: str) -> str:
        """Name of the prior or image encoder that it was made for."""
        return (self.config[role] or {}).get("id") or f"<{role.replace('_', ' ')}>"

    # ── In and out of a U-Net ──────────────────────────────────────────────────────────────────

    def install(self, unet: UNet2DConditionModel, attention: AttentionKind = "sdpa") -> None:
        """Put the MoA layers into `unet` and freeze its own parameters. Once more repairs an installation.

        attention: "sdpa", or "explicit" softmax(QKᵀ)V: equal to rounding, faster to train on a CPU.

        Raises:
            ValueError: the U-Net has other layers or sizes than the adapter, or foreign attention processors.
        """
        if attention not in ("sdpa", "explicit"):
            raise ValueError(f"attention: {attention!r}; it is 'sdpa' or 'explicit'")
        previous = installation(unet)
        if previous is not None and previous.adapter is not self:
            raise ValueError("another MoA adapter is installed in this U-Net: uninstall it first")
        if previous is not None:
            self.uninstall(unet)
        attentions = attention_layers(unet)
        self._check_fits(attentions)
        unet.moa_installation = Installation(self, unet, attentions, attention)
        unet.requires_grad_(False)
        for name, attn in attentions.items():
            index = self.cross_layers.index(name) if name in self.cross_layers else 0
            attn.set_processor(MoAAttnProcessor(name, self.mixture(name), index, attention))
        unet.moa_prompt = self.prompt
        unet.save_pretrained = CleanSave(unet)

    def uninstall(self, unet: UNet2DConditionModel) -> None:
        """Take the MoA layers out: the U-Net is bit for bit as before. ValueError if they are not in it."""
        previous = installation(unet)
        if previous is None or previous.adapter is not self:
            raise ValueError("this adapter is not installed in this U-Net")
        previous.handle.remove()
        for name, processor in previous.processors.items():
            attn = unet.get_submodule(name)
            if isinstance(attn.processor, MoAAttnProcessor):
                attn.set_processor(processor)
        del unet.moa_prompt, unet.moa_installation, unet.save_pretrained
        for parameter in previous.trained:
            parameter.requires_grad_(True)

    @contextmanager
    def removed(self, unet: UNet2DConditionModel) -> Iterator[None]:
        """Within the `with` block `unet` is the base U-Net, without the adapter's modules."""
        previous = installation(unet)
        self.uninstall(unet)
        try:
            yield
        finally:
            self.install(unet, previous.attention if previous else "sdpa")

    def assert_installed(self, unet: UNet2DConditionModel) -> None:
        """RuntimeError, with the cure, unless `unet` runs this adapter in all its attention layers."""
        previous = installation(unet)
        if previous is None or previous.adapter is not self:
            raise RuntimeError("the MoA adapter is not in this U-Net: call adapter.install(unet) first")
        previous.check(unet)

    def _check_fits(self, attentions: Mapping[str, Attention]) -> None:
        cure = "load the U-Net that the adapter was made for"
        odd = sorted(set(self.sizes) ^ set(attentions))
        if odd:
            which = "adapter" if odd[0] in self.sizes else "U-Net"
            raise ValueError(f"only the {which} has a layer {odd[0]} ({len(odd)} such in all): {cure}")
        for name, attn in attentions.items():
            found = sizes_of(name, attn)
            if found != self.sizes[name]:
                raise ValueError(f"{name} of the U-Net is {found}, the adapter's {self.sizes[name]}: {cure}")
            if type(attn.processor) not in (AttnProcessor, AttnProcessor2_0):
                raise ValueError(
                    f"{name} has a {type(attn.processor).__name__}, and MoA replaces plain attention only. "
                    "Unload IP-Adapters, switch off xformers, slicing and fused projections, or call "
                    "unet.set_attn_processor(AttnProcessor2_0()); then install"
                )

    # ── What a forward gets ────────────────────────────────────────────────────────────────────

    def layer_input(self, context: MoAContext, sample: Tensor, timestep: Tensor | float) -> LayerInput:
        """For this forward: which rows are personalized, and m_{t,l} of their subjects (Eq. 8).

        sample: [B, C, H, W], the U-Net's. timestep: a number or [B]. ValueError if the context's batch
        differs, or sparse experts would be trained.
        """
        batch = check_layout(context, sample)
        self._check_threshold(context.sparse_threshold)
        device = sample.device
        time = torch.as_tensor(timestep, device=device).expand(batch)
        fixed = context.prior_only.to(device) | (time >= context.personalize_below)
        text, token, present = context.text.to(device), context.token.to(device), context.present.to(device)
        count = int(fixed.sum())
        if count == batch:
            return LayerInput(text, None, token, present, None, False, context.recorder)
        rows = torch.nonzero(~fixed)[:, 0] if count else None
        text, time, present = take(text, rows), take(time, rows), take(present, rows)
        token = take(token, rows).masked_fill(~present, 0)
        prompts = None
        if token.shape[1] > 0:
            own = text.gather(1, token[..., None].expand(-1, -1, text.shape[-1]))
            prompts = self.prompt(take(context.features.to(device), rows), own, time)
            prompts = torch.where(present[..., None], prompts.to(text.dtype), own)
        return LayerInput(
            text, prompts, token, present, rows, True, context.recorder, context.sparse_threshold
        )

    def _check_threshold(self, threshold: float) -> None:
        check_sparse_threshold(threshold)
        if threshold > 0 and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError(
                f"sparse_threshold: {threshold} is for sampling, for pixels below it give no gradient: leave "
                "it at 0 in training, or run under torch.no_grad()"
            )

    # ── Saving ─────────────────────────────────────────────────────────────────────────────────

    @wraps(ModelMixin.save_pretrained, assigned=())  # pipelines hand on the arguments of the signature alone
    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """config.json, the trained tensors as safetensors, and a model card unless the folder has one."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(self.model_card(), "utf-8")

    def model_card(self) -> str:
        """README.md of the adapter's folder."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        names = {role: self._source(role) for role in ("prior", "image_encoder")}
        hub = HUB_NAME.fullmatch(names["prior"]) and not Path(names["prior"]).exists()
        known = {"layers": len(self.sizes), "parameters": parameters, **names}
        base_model = f"base_model: {names['prior']}\n" if hub else ""
        return CARD.format(**{**self.config, **known, "base_model": base_model})

    def _upload_folder(self, working_dir: str | Path, repo_id: str, **kwargs: Any) -> Any:
        """diffusers' upload, which has put an empty card over ours if the repository has none yet."""
        if not file_exists(repo_id, "README.md", token=kwargs.get("token")):
            (Path(working_dir) / "README.md").write_text(self.model_card(), "utf-8")
        return super()._upload_folder(working_dir, repo_id, **kwargs)


# ── The U-Net's side ───────────────────────────────────────────────────────────────────────────


class Installation:
    """What `install` leaves on the U-Net: its hook, and what `uninstall` needs to undo it."""

    def __init__(
        self,
        adapter: MoAAdapter,
        unet: UNet2DConditionModel,
        attentions: Mapping[str, Attention],
        attention: AttentionKind,
    ):
        self.adapter = adapter
        self.attention = attention
        self.processors = {name: attn.processor for name, attn in attentions.items()}
        self.processor_names = [f"{name}.processor" for name in attentions]
        self.trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self.handle = unet.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def check(self, unet: UNet2DConditionModel) -> None:
        """RuntimeError if something put its own processor in the place of ours."""
        for name in self.processors:
            processor = unet.get_submodule(name).processor
            if not isinstance(processor, MoAAttnProcessor):
                raise RuntimeError(
                    f"{name} lost its MoA layer to a {type(processor).__name__}: attention slicing, "
                    "xformers, fused projections and IP-Adapters replace attention processors. Leave them "
                    "out or switch them off, then call adapter.install(unet) again"
                )

    def before_forward(
        self, unet: UNet2DConditionModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict]:
        """Replace the MoAContext in cross_attention_kwargs by this forward's LayerInput."""
        self.check(unet)
        given = kwargs.get("cross_attention_kwargs") or {}
        context = given.get("moa")
        if context is None:
            return args, kwargs
        for module in (unet, *map(unet.get_submodule, self.processor_names)):
            bring_weights(module)
        sample = args[0] if args else kwargs["sample"]
        check_precision(self.adapter, sample)
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        prepared = self.adapter.layer_input(context, sample, timestep)
        return args, {**kwargs, "cross_attention_kwargs": {**given, "moa": prepared}}


class CleanSave:
    """Stands in for the U-Net's `save_pretrained` while MoA is installed: saves the base U-Net alone."""

    def __init__(self, unet: UNet2DConditionModel):
        self.unet = unet

    @wraps(ModelMixin.save_pretrained, assigned=())  # as the adapter's
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        previous = installation(self.unet)
        assert previous is not None
        with previous.adapter.removed(self.unet):
            self.unet.save_pretrained(*args, **kwargs)


def check_sparse_threshold(value: float) -> float:
    """The value; ValueError unless it can be compared with a router weight."""
    if not 0 <= value < 1:
        raise ValueError(f"sparse_threshold: {value}; it is a weight of the router, 0 <= weight < 1")
    return value


def installation(unet: UNet2DConditionModel) -> Installation | None:
    return getattr(unet, "moa_installation", None)


def bring_weights(module: nn.Module) -> None:
    """accelerate and diffusers bring offloaded weights inside `forward`: here they are needed before it."""
    registry = getattr(module, "_diffusers_hook", None)
    group = None if registry is None else registry.get_hook("group_offloading")
    for offload in (getattr(module, "_hf_hook", None), group):
        if offload is not None:
            offload.pre_forward(module)


def check_precision(adapter: MoAAdapter, sample: Tensor) -> None:
    """ValueError, with the cure, if adapter and U-Net differ in precision; autocast joins them."""
    if adapter.dtype != sample.dtype and not torch.is_autocast_enabled(sample.device.type):
        raise ValueError(
            f"the U-Net runs in {sample.dtype}, the MoA adapter in {adapter.dtype}: call "
            "adapter.to(unet.device, unet.dtype), or run under torch.autocast"
        )


def check_layout(context: MoAContext, sample: Tensor) -> int:
    """The batch size, which every tensor of the context must have; ValueError says which one has not."""
    batch = sample.shape[0]
    for what in ("text", "features", "token", "present", "prior_only"):
        rows = getattr(context, what).shape[0]
        if rows != batch:
            raise ValueError(
                f"the U-Net runs a batch of {batch}, but the MoA context's `{what}` has {rows} rows. Make "
                "the context with the guidance (on or off) of the pipeline call; a Conditioning is repeated "
                "for num_images_per_prompt already, so leave the pipeline's at 1. A callback that ends "
                "guidance halfway must halve the context as well: moa.conditioner.without_guidance"
            )
    return batch


def module_key(name: str) -> str:
    """A qualified name as a key of a ModuleDict, which may hold no dot."""
    return name.replace(".", "-")
