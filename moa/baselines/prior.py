"""The prior without subject: a floor for identity, and what good context looks like."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from moa.methods import MethodConfig, Request, Sampling, register
from moa.sampling import Pipeline, in_batches, load_prior, run


class Prior:
    """Text alone; the subjects' images are not looked at."""

    name = "prior"

    def __init__(self, pipe: Pipeline, sampling: Sampling) -> None:
        self.pipe, self.sampling = pipe, sampling

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        images: list[Image.Image] = []
        for part in in_batches(requests, self.sampling.batch_size):
            negative = [self.sampling.negative_prompt] * len(part)
            prompts = [r.prompt for r in part]
            images += run(self.pipe, self.sampling, part, prompt=prompts, negative_prompt=negative)
        return images

    def trained_parameters(self) -> int:
        return 0


@register("prior")
def make(config: MethodConfig) -> Prior:
    """The prior that the config names."""
    return Prior(load_prior(config.prior, config.device, config.dtype), config.sampling)
