"""MoAAdapter owns everything that MoA trains; installing it turns a diffusers U-Net into a MoA U-Net and back.

The adapter's modules are shared with the U-Net while installed (device moves and offload reach them there), but only
the adapter saves them. A forward pre-hook on the U-Net hands the timestep to Eq. 8 and checks the batch layout.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from moa.attention import (
    AttentionKind,
    LayerInput,
    MoAAttnProcessor,
    MoAContext,
    MoALayer,
    RouterKind,
    take,
)
from moa.prompts import MultimodalPrompt

CROSS = "cross"
SELF = "self"


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one attention layer, read off the U-Net's modules. kind: "self" or "cross" attention."""

    kind: str
    query_dim: int
    condition_dim: int
    inner_dim: int
    out_dim: int
    bias: bool
    out_bias: bool

    @classmethod
    def of(cls, name: str, attn: Attention) -> Self:
        unfit = [
            what
            for what in ("added_kv_proj_dim", "spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
            if getattr(attn, what, None) is not None and getattr(attn, what) is not False
        ]
        if unfit:
            raise ValueError(
                f"{name} uses {', '.join(unfit)}, which MoA does not know: it fits U-Nets whose attention is plain "
                "(Stable Diffusion 1.x, 2.x, XL and their kind)"
            )
        return cls(
            kind=CROSS if attn.is_cross_attention else SELF,
            query_dim=attn.to_q.in_features,
            condition_dim=attn.to_k.in_features,
            inner_dim=attn.to_q.out_features,
            out_dim=attn.to_out[0].out_features,
            bias=attn.to_q.bias is not None,
            out_bias=attn.to_out[0].bias is not None,
        )


class MoAAdapter(ModelMixin, ConfigMixin):
    """Personalization experts and routers of every attention layer, and the multimodal prompt (Eq. 4–8).

    Made by `from_unet` or `from_pretrained`; its arguments are the decisions and, in `layers`, the U-Net's sizes.

    layers: {qualified name of an attention layer: its LayerSizes as a dict}, in the order in which the U-Net runs them.
    image_feature_dim: channels F of the image feature of a subject.
    experts: N of Eq. 4, the prior included (paper: 2).
    router, router_width: "linear", or "mlp" with one hidden layer of that width (Eq. 7).
    frequencies: octaves of the Fourier features of t and of l in PE(t, l).
    spacetime: False leaves PE(t, l) out of Eq. 8.
    loss_layers: qualified names, or their beginnings ("mid_block"), of the layers L of the losses; None takes all.
        `from_unet` leaves out the blocks of the highest resolution, as the paper does (sec. 3.3.1).
    image_encoder_shapes: {parameter of the image encoder: shape} of the encoder layers that are trained too.
    """

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
        loss_layers: list[str] | None = None,
        image_encoder_shapes: dict[str, list[int]] | None = None,
    ):
        super().__init__()
        if experts < 2:
            raise ValueError(f"experts: {experts}; a mixture has the prior and at least one personalization expert")
        if router not in ("linear", "mlp"):
            raise ValueError(f"router: {router!r}; it is 'linear' or 'mlp'")
        self.sizes = {name: LayerSizes(**sizes) for name, sizes in layers.items()}
        self.cross_layers = [name for name, sizes in self.sizes.items() if sizes.kind == CROSS]
        if not self.cross_layers:
            raise ValueError("layers: none is a cross-attention layer, so no subject could enter the U-Net")
        self.loss_layers = named_layers(list(self.sizes), loss_layers or list(self.sizes))
        self.mixtures = nn.ModuleDict(
            {
                module_key(name): MoALayer(
                    sizes.query_dim,
                    sizes.condition_dim,
                    sizes.inner_dim,
                    sizes.out_dim,
                    sizes.bias,
                    sizes.out_bias,
                    experts,
                    router,
                    router_width,
                )
                for name, sizes in self.sizes.items()
            }
        )
        text_dim = self.sizes[self.cross_layers[0]].condition_dim
        self.prompt = MultimodalPrompt(image_feature_dim, text_dim, len(self.cross_layers), frequencies, spacetime)
        self.image_encoder_layers = nn.ParameterDict(
            {module_key(name): torch.empty(shape) for name, shape in (image_encoder_shapes or {}).items()}
        )

    # ── Made from a U-Net ─────────────────────────────────────────────────────────────────────────

    @classmethod
    def from_unet(
        cls,
        unet: nn.Module,
        image_feature_dim: int | None = None,
        image_encoder: nn.Module | None = None,
        image_layers: int = 0,
        loss_layers: list[str] | None = None,
        **decisions: Any,
    ) -> Self:
        """An adapter sized for `unet`, its experts copies of the U-Net's attention, on the U-Net's device and dtype.

        image_encoder: needed when `image_layers` > 0, or instead of `image_feature_dim` (its projection is read).
        image_layers: how many of the encoder's last layers to train as well (FastComposer: 2); copies are made.
        loss_layers: names or beginnings of names of the layers L; None takes `default_loss_layers(unet)`.
        decisions: further arguments of the constructor.
        Raises ValueError or TypeError for U-Nets that MoA does not fit.
        """
        attentions = attention_layers(unet)
        if image_feature_dim is None:
            if image_encoder is None:
                raise ValueError("give image_feature_dim, or the image_encoder to read it from")
            image_feature_dim = int(image_encoder.config.projection_dim)  # type: ignore[union-attr, arg-type]
        trained = last_layers(image_encoder, image_layers)
        with torch.device(next(unet.parameters()).device):
            adapter = cls(
                layers={name: asdict(LayerSizes.of(name, attn)) for name, attn in attentions.items()},
                image_feature_dim=image_feature_dim,
                image_encoder_shapes={name: list(parameter.shape) for name, parameter in trained.items()},
                loss_layers=default_loss_layers(unet) if loss_layers is None else loss_layers,
                **decisions,
            )
        for name, attn in attentions.items():
            for expert in adapter.mixtures[module_key(name)].experts:
                expert.copy_from(attn)
        with torch.no_grad():
            for name, parameter in trained.items():
                adapter.image_encoder_layers[module_key(name)].copy_(parameter)
        dtype = next(unet.parameters()).dtype
        return adapter if adapter.dtype == dtype else adapter.to(dtype)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters of the adapter: nothing frozen is in it."""
        return list(self.parameters())

    def image_encoder_overrides(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The trained encoder layers as {name of the image encoder's parameter: tensor}, for `functional_call`."""
        names = self.config["image_encoder_shapes"] or {}
        return {name: self.image_encoder_layers[module_key(name)].to(device, dtype) for name in names}

    # ── In and out of a U-Net ─────────────────────────────────────────────────────────────────────

    def install(self, unet: nn.Module, attention: AttentionKind = "sdpa") -> None:
        """Put the MoA layers into `unet` and freeze its own parameters. Called again, it repairs an installation.

        attention: "sdpa", or "explicit" softmax(QKᵀ)V (equal to rounding; faster to train on a CPU).
        Raises ValueError if the U-Net has other layers or sizes than the adapter, or foreign attention processors.
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
        install = Installation(
            self,
            processors={name: attn.processor for name, attn in attentions.items()},
            trained=[name for name, parameter in unet.named_parameters() if parameter.requires_grad],
        )
        unet.requires_grad_(False)
        for name, attn in attentions.items():
            index = self.cross_layers.index(name) if name in self.cross_layers else 0
            attn.set_processor(MoAAttnProcessor(name, self.mixtures[module_key(name)], index, attention))
        unet.moa_prompt = self.prompt
        install.handle = unet.register_forward_pre_hook(install.before_forward, with_kwargs=True)
        unet.moa_installation = install
        unet.save_pretrained = CleanSave(unet)

    def uninstall(self, unet: nn.Module) -> None:
        """Take the MoA layers out again: the U-Net is as it was before `install`. ValueError if they are not in it."""
        install = installation(unet)
        if install is None or install.adapter is not self:
            raise ValueError("this adapter is not installed in this U-Net")
        install.handle.remove()
        for name, processor in install.processors.items():
            attn = unet.get_submodule(name)
            if isinstance(attn.processor, MoAAttnProcessor):
                attn.set_processor(processor)
        del unet.moa_prompt, unet.moa_installation, unet.save_pretrained
        parameters = dict(unet.named_parameters())
        for name in install.trained:
            parameters[name].requires_grad_(True)

    @contextmanager
    def removed(self, unet: nn.Module) -> Iterator[None]:
        """Within the `with` block `unet` is the base U-Net, without the adapter's modules."""
        processor = next(attn.processor for attn in attention_layers(unet).values())
        attention = processor.attention if isinstance(processor, MoAAttnProcessor) else "sdpa"
        self.uninstall(unet)
        try:
            yield
        finally:
            self.install(unet, attention)

    def assert_installed(self, unet: nn.Module) -> None:
        """RuntimeError unless `unet` runs this adapter in all its attention layers; the message says what to do."""
        install = installation(unet)
        if install is None or install.adapter is not self:
            raise RuntimeError("the MoA adapter is not installed in this U-Net: call adapter.install(unet) first")
        install.check(unet)

    def _check_fits(self, attentions: Mapping[str, Attention]) -> None:
        missing = sorted(set(self.sizes) ^ set(attentions))
        if missing:
            raise ValueError(
                f"this adapter was made for a U-Net with other attention layers: {missing[0]} and {len(missing) - 1} "
                "more are only in one of the two. Load the U-Net that it was trained on"
            )
        for name, attn in attentions.items():
            if type(attn.processor) not in (AttnProcessor, AttnProcessor2_0):
                raise ValueError(
                    f"{name} has a {type(attn.processor).__name__}; MoA replaces plain attention only. Unload "
                    "IP-Adapters, switch off xformers, slicing and fused projections, or call "
                    "unet.set_attn_processor(AttnProcessor2_0()), then install"
                )
            sizes = self.sizes[name]
            if (sizes.query_dim, sizes.condition_dim) != (attn.query_dim, attn.cross_attention_dim):
                raise ValueError(
                    f"{name} of this U-Net takes {attn.query_dim} and {attn.cross_attention_dim} channels, the "
                    f"adapter's {sizes.query_dim} and {sizes.condition_dim}: load the U-Net that it was trained on"
                )

    # ── What a forward gets ───────────────────────────────────────────────────────────────────────

    def layer_input(self, context: MoAContext, sample: Tensor, timestep: Tensor | float | int) -> LayerInput:
        """Eq. 8 for this forward: which rows are personalized, and m_{t,l} of their subjects.

        sample: [B, C, H, W] of the U-Net; timestep: a number or [B]. ValueError if the batch has another layout.
        """
        batch = check_layout(context, sample)
        device = sample.device
        times = torch.as_tensor(timestep, device=device).expand(batch)
        prior_only = context.prior_only.to(device) | (times >= context.personalize_below)
        dtype = self.prompt.norm.weight.dtype
        text, token, present = context.text.to(device), context.token.to(device), context.present.to(device)
        fixed = int(prior_only.sum())
        if fixed == batch:
            empty = text.new_empty(0)
            return LayerInput(text, empty, token, present, None, False, context.recorder)
        rows = torch.nonzero(~prior_only)[:, 0] if fixed else None
        text, token, present = take(text, rows), take(token, rows), take(present, rows)
        token = token.masked_fill(~present, 0)
        own = text.gather(1, token[..., None].expand(-1, -1, text.shape[-1])).to(dtype)
        features = take(context.features.to(device, dtype), rows)
        prompts = text.new_empty(0)
        if token.shape[1] > 0:
            prompts = self.prompt(features, own, take(times, rows))
            prompts = torch.where(present[..., None], prompts, own.to(prompts.dtype))
        return LayerInput(text, prompts, token, present, rows, True, context.recorder)

    # ── Saving ────────────────────────────────────────────────────────────────────────────────────

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """config.json and safetensors with the trained tensors, and a model card unless the folder has one."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if not card.exists():
            card.write_text(self.model_card(), encoding="utf-8")

    def model_card(self) -> str:
        """A short model card: what the folder holds and how to use it."""
        count = sum(parameter.numel() for parameter in self.parameters())
        return (
            "---\nlibrary_name: diffusers\ntags: [mixture-of-attention, text-to-image, personalization]\n---\n\n"
            "# MoA adapter\n\n"
            f"Mixture-of-Attention for a diffusion U-Net: {self.config['experts']} experts (the prior is the U-Net "
            f"itself) in {len(self.sizes)} attention layers, {count:,} trained parameters, image features of "
            f"{self.config['image_feature_dim']} channels. The U-Net and the image encoder are not in this folder.\n\n"
            "```python\nfrom moa import MoAPipeline\n\n"
            'pipe = MoAPipeline.from_pretrained("<prior>", adapter="<this folder>", image_encoder="<encoder>")\n'
            'pipe("a man riding a horse", subjects=[photo], subject_words=["man"]).images[0]\n```\n'
        )


# ── The U-Net's side ──────────────────────────────────────────────────────────────────────────────


class Installation:
    """What `install` remembers on the U-Net: the adapter, the processors it replaced, what was trainable."""

    def __init__(self, adapter: MoAAdapter, processors: dict[str, Any], trained: Sequence[str]):
        self.adapter = adapter
        self.processors = processors
        self.trained = trained
        self.handle: Any = None

    def check(self, unet: nn.Module) -> None:
        for name in self.processors:
            processor = unet.get_submodule(name).processor
            if not isinstance(processor, MoAAttnProcessor):
                raise RuntimeError(
                    f"{name} lost its MoA layer to a {type(processor).__name__}: attention slicing, xformers, fused "
                    "projections and IP-Adapters replace attention processors. Switch them off or leave them out, "
                    "then call adapter.install(unet) again"
                )

    def before_forward(self, unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Replace the MoAContext in cross_attention_kwargs by this forward's LayerInput."""
        self.check(unet)
        given = kwargs.get("cross_attention_kwargs") or {}
        context = given.get("moa")
        if context is None:
            return args, kwargs
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        prepared = self.adapter.layer_input(context, sample, timestep)
        return args, {**kwargs, "cross_attention_kwargs": {**given, "moa": prepared}}


class CleanSave:
    """Stands in for the U-Net's `save_pretrained` while MoA is installed: saves the base U-Net alone."""

    def __init__(self, unet: nn.Module):
        self.unet = unet

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        install = installation(self.unet)
        assert install is not None
        with install.adapter.removed(self.unet):
            self.unet.save_pretrained(*args, **kwargs)


def installation(unet: nn.Module) -> Installation | None:
    return getattr(unet, "moa_installation", None)


def check_layout(context: MoAContext, sample: Tensor) -> int:
    """The batch size, if every tensor of the context has it; ValueError says which one has not."""
    batch = sample.shape[0]
    for what in ("text", "features", "token", "present", "prior_only"):
        rows = getattr(context, what).shape[0]
        if rows != batch:
            raise ValueError(
                f"the U-Net runs a batch of {batch}, but the MoA context's `{what}` has {rows} rows. Make the context "
                "with the same guidance (on or off) and num_images_per_prompt as the pipeline call; a Conditioning's "
                "prompt_embeds are already repeated, so leave the pipeline's num_images_per_prompt at 1"
            )
    return batch


# ── Layers of a U-Net by name ─────────────────────────────────────────────────────────────────────


def module_key(name: str) -> str:
    """A qualified name as a key of a ModuleDict, which may hold no dot."""
    return name.replace(".", "-")


def attention_layers(unet: nn.Module) -> dict[str, Attention]:
    """{qualified name: module} of the U-Net's attention layers, in the order in which they run: down, mid, up."""
    if not hasattr(unet, "attn_processors"):
        raise TypeError(f"{type(unet).__name__} has no attn_processors: MoA fits diffusers' U-Nets")
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    parts = ("down_blocks", "mid_block", "up_blocks")
    unknown = [name for name in names if name.split(".")[0] not in parts]
    if unknown or not names:
        raise ValueError(f"{type(unet).__name__} has attention outside {parts}: {unknown[:1]}; MoA fits U-Nets only")
    names.sort(key=lambda name: parts.index(name.split(".")[0]))
    layers = {name: unet.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if not isinstance(layer, Attention):
            raise TypeError(f"{name} is a {type(layer).__name__}, not diffusers' Attention")
    return layers


def default_loss_layers(unet: nn.Module) -> list[str]:
    """The layers L: all but those of the highest-resolution level that has attention (11 of SD1.5's 16 blocks).

    The paper leaves out "the first two and last three attention layers"; on SD1.5 that is this level. A U-Net with
    attention at one resolution only has all its layers in L.
    """
    levels = {name: resolution_level(unet, name) for name in attention_layers(unet)}
    top = min(levels.values())
    return [name for name, level in levels.items() if level > top] or list(levels)


def resolution_level(unet: nn.Module, name: str) -> int:
    """0 for the U-Net's full resolution, one more for each halving; up blocks mirror the down blocks."""
    part, number = name.split(".")[:2]
    if part == "mid_block":
        return len(unet.down_blocks)  # type: ignore[arg-type]
    return int(number) if part == "down_blocks" else len(unet.up_blocks) - 1 - int(number)  # type: ignore[arg-type]


def named_layers(names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The names that are, or begin with, one of `chosen` ("mid_block"); ValueError if one of `chosen` fits none."""
    for prefix in chosen:
        if not any(name == prefix or name.startswith(prefix + ".") for name in names):
            raise ValueError(f"loss_layers: {prefix!r} names no attention layer; there are {list(names)}")
    return [name for name in names if any(name == c or name.startswith(c + ".") for c in chosen)]


def last_layers(image_encoder: nn.Module | None, count: int) -> dict[str, nn.Parameter]:
    """{name: parameter} of the last `count` transformer layers of an image encoder; {} for 0."""
    if count == 0:
        return {}
    if image_encoder is None:
        raise ValueError("image_layers > 0 needs the image_encoder whose last layers are to be trained")
    named = dict(image_encoder.named_parameters())
    pattern = re.compile(r"(.*\blayers?)\.(\d+)\.")
    numbers = {int(match[2]) for name in named if (match := pattern.match(name))}
    if count > len(numbers):
        raise ValueError(f"image_layers: {count}, but the image encoder has {len(numbers)} layers")
    last = set(sorted(numbers)[-count:])
    return {name: p for name, p in named.items() if (match := pattern.match(name)) and int(match[2]) in last}
