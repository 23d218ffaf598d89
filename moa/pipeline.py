"""MoAPipeline: Stable Diffusion with subjects. Thin: the conditioner and the adapter do the work."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from moa.adapter import MoAAdapter
from moa.attention import Recorder
from moa.conditioner import NullBranch, SubjectConditioner

REFUSED = {
    "prompt_embeds": "subjects are bound to words: give the prompt",
    "negative_prompt_embeds": "give the negative_prompt",
    "clip_skip": "the adapter was trained on the text encoder's last layer",
    "ip_adapter_image": "MoA does not run beside an IP-Adapter: give the photo as a subject",
    "ip_adapter_image_embeds": "MoA does not run beside an IP-Adapter: give the photo as a subject",
}

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
"""Arguments of `from_pretrained` that hold for whatever is loaded, not for one repository."""


class MoAPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline whose call takes subjects; it installs the adapter in its U-Net.

    >>> pipe = MoAPipeline.from_pretrained("prior", adapter="adapter", image_encoder="image_encoder")
    >>> pipe("a man and a dog", subjects=[photo_a, photo_b], subject_words=["man", "dog"]).images[0]
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        adapter: MoAAdapter,
        image_encoder: CLIPVisionModelWithProjection,
        feature_extractor: CLIPImageProcessor,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        requires_safety_checker: bool = False,
    ):
        """feature_extractor: the image processor of image_encoder. The rest: StableDiffusionPipeline's."""
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(adapter=adapter)
        adapter.install(unet)
        self._conditioner = SubjectConditioner(
            tokenizer, text_encoder, image_encoder, feature_extractor, adapter
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter: str | Path | MoAAdapter | None = None,
        image_encoder: str | Path | CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a Stable Diffusion model, an adapter, and the image encoder that the adapter was trained with.

        pretrained_model_name_or_path: the prior's folder or hub id.
        adapter, image_encoder: folders, hub ids or loaded models (load one that has a revision or subfolder
            of its own); left out if the prior's folder is a whole MoAPipeline that `save_pretrained` wrote.
        feature_extractor: None reads it from the image encoder's folder.
        kwargs: those of StableDiffusionPipeline.from_pretrained; `dtype` holds for all parts, a loaded
            adapter and image encoder too, and is float32 if not given, whatever the files hold
            (transformers would take each file's own). What says where to load from (HUB) goes to all loads.

        Raises:
            ValueError: the folder lacks a part that is not given.
        """
        older = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or older or torch.float32
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        if isinstance(image_encoder, (str, Path)):
            feature_extractor = feature_extractor or CLIPImageProcessor.from_pretrained(image_encoder, **hub)
            image_encoder = CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=dtype, **hub)
        if isinstance(adapter, (str, Path)):
            adapter = MoAAdapter.from_pretrained(adapter, dtype=dtype, **hub)
        models: list[Any] = [model for model in (adapter, image_encoder) if model is not None]
        for model in models:
            if model.dtype != dtype:
                model.to(dtype)
        parts = {"adapter": adapter, "image_encoder": image_encoder, "feature_extractor": feature_extractor}
        given = {name: part for name, part in parts.items() if part is not None}
        index = cls.load_config(pretrained_model_name_or_path, revision=kwargs.get("revision"), **hub)
        for name in (name for name in parts if name not in given):
            if not index.get(name, [None])[0]:
                raise ValueError(f"{pretrained_model_name_or_path} holds no {name}: give {name}=")
        return super().from_pretrained(pretrained_model_name_or_path, dtype=dtype, **kwargs, **given)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: weights would be absent when Eq. 8 and the photos need them."""
        raise NotImplementedError("MoA's weights move with its models: call enable_model_cpu_offload()")

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Not supported for all parts at once: adapter and U-Net share weights, which would go twice."""
        raise NotImplementedError(
            "MoA's weights move with the U-Net: call pipe.unet.enable_group_offload(...), or "
            "enable_model_cpu_offload()"
        )

    def unload_ip_adapter(self) -> None:
        """As diffusers does it, which also takes the image encoder for the IP-Adapter's; here it stays."""
        kept = {"image_encoder": self.image_encoder, "feature_extractor": self.feature_extractor}
        try:
            super().unload_ip_adapter()
        finally:  # also where MoA, still installed, refuses
            self.register_modules(**kept)

    @property
    def conditioner(self) -> SubjectConditioner:
        """The conditioner of this pipeline's models, for use with other pipelines that share its U-Net.

        Its settings (null_branch, personalize_below, sparse_threshold) are what the call takes for None.
        """
        own = self._conditioner
        own.tokenizer, own.text_encoder, own.adapter = self.tokenizer, self.text_encoder, self.adapter
        own.image_encoder, own.image_processor = self.image_encoder, self.feature_extractor
        return own

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        subjects: Sequence | None = None,
        subject_words: Sequence | None = None,
        subject_spans: Sequence | None = None,
        subject_tokens: Sequence | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        cross_attention_kwargs: dict[str, Any] | None = None,
        prior_only: bool | Sequence[bool] = False,
        null_branch: NullBranch | None = None,
        personalize_below: int | None = None,
        sparse_threshold: float | None = None,
        recorder: Recorder | None = None,
        **kwargs: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Generate images of the subjects.

        prompt, subjects, subject_words, subject_spans, subject_tokens: as SubjectConditioner takes them.
        prior_only: the base model's images for the same seed.
        null_branch, personalize_below, sparse_threshold: see SubjectConditioner; None takes the setting of
            `pipe.conditioner`.
        recorder: see Recorder.
        kwargs: StableDiffusionPipeline's (height, width, generator, latents, output_type, return_dict,
            callback_on_step_end, …). A list of generators has one an image, those of a prompt side by side.

        Raises:
            TypeError: an argument of StableDiffusionPipeline that has no meaning here; the message says why.
        """
        kwargs = accepted(kwargs)
        self.adapter.assert_installed(self.unet)
        conditioning = self.conditioner(
            prompt,
            subjects=subjects,
            words=subject_words,
            spans=subject_spans,
            tokens=subject_tokens,
            negative_prompts=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            guidance=guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None,
            prior_only=prior_only,
            null_branch=null_branch,
            personalize_below=personalize_below,
            sparse_threshold=sparse_threshold,
            recorder=recorder,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        return super().__call__(
            prompt_embeds=conditioning.prompt_embeds,
            negative_prompt_embeds=conditioning.negative_prompt_embeds,
            cross_attention_kwargs=conditioning.cross_attention_kwargs,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            **kwargs,
        )


def accepted(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those in REFUSED; TypeError if one of these is not None, their default."""
    for name, reason in REFUSED.items():
        if given.get(name) is not None:
            raise TypeError(f"MoAPipeline does not take {name}: {reason}")
    return {name: value for name, value in given.items() if name not in REFUSED}
