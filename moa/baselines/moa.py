"""Mixture-of-Attention as a method of the comparison."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from moa.adapter import MoAAdapter
from moa.attention import Recorder
from moa.conditioner import SubjectConditioner
from moa.methods import MethodConfig, Request, Sampling, register
from moa.sampling import Pipeline, in_batches, load_adapter, load_image_encoder, load_prior, run


class MoA:
    """A trained adapter on the frozen prior."""

    name = "moa"

    def __init__(
        self,
        pipe: Pipeline,
        conditioner: SubjectConditioner,
        adapter: MoAAdapter,
        sampling: Sampling,
        recorder: Recorder | None = None,
    ) -> None:
        """`conditioner` and `adapter` belong to `pipe`, in whose U-Net the adapter is installed.

        `recorder` holds router and attention maps of the last U-Net pass, for those who look at them.
        """
        adapter.assert_installed(pipe.unet)
        self.pipe, self.conditioner, self.adapter = pipe, conditioner, adapter
        self.sampling, self.recorder = sampling, recorder

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        return [i for part in in_batches(requests, self.sampling.batch_size) for i in self._batch(part)]

    def _batch(self, requests: Sequence[Request]) -> list[Image.Image]:
        conditioning = self.conditioner(
            [r.prompt for r in requests],
            subjects=[[s.image for s in r.subjects] for r in requests],
            spans=[list(r.spans) for r in requests],
            negative_prompts=self.sampling.negative_prompt,
            guidance=self.sampling.guidance > 1,
            recorder=self.recorder,
        )
        return run(self.pipe, self.sampling, requests, **conditioning)

    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.adapter.parameters())


@register("moa")
def make(config: MethodConfig) -> MoA:
    """The trained adapter that the config names, installed in the prior."""
    pipe = load_prior(config.prior, config.device, config.dtype)
    encoder, processor = load_image_encoder(config.image_encoder, config.device, config.dtype)
    adapter = load_adapter(config.trained_folder("moa"), config.device, config.dtype)
    adapter.install(pipe.unet)
    conditioner = SubjectConditioner(
        pipe.tokenizer,
        pipe.text_encoder,
        encoder,
        processor,
        adapter,
        null_branch=config.sampling.null_branch,
        personalize_below=config.sampling.personalize_below,
        sparse_threshold=config.sampling.sparse_threshold,
    )
    return MoA(pipe, conditioner, adapter, config.sampling)
