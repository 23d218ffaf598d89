"""The ceiling: the true subject drawn in the context that the prompt names, through the autoencoder.

No method can be expected to do better, for nothing here is guessed but what the prompt leaves open, and the
autoencoder takes its toll as from every other method. Only the miniature can know this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image

from moa.methods import MethodConfig, Request, register
from moa.miniature import world
from moa.miniature.render import render
from moa.miniature.world import Appearance, Context, Identity, Prop, Scene, identities, sample_context
from moa.sampling import Pipeline, in_batches, latent_shape, load_prior

COLOR = "{color}"


def phrases(
    vocabulary: Mapping[str, Sequence[str]], colors: Sequence[str] = ("",)
) -> dict[str, tuple[str, str]]:
    """Every wording of every value, in each colour and in none: {text: (value, colour)}, longest first."""
    found = {
        " ".join(re.sub(r"^(a|an) ", "", wording.format(color=color)).split()): (value, color)
        for value, wordings in vocabulary.items()
        for wording in wordings
        for color in (colors if COLOR in wording else ("",))
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _color_words(colors: Mapping[str, Sequence[str]]) -> list[str]:
    return ["", *(word for words in colors.values() for word in words)]


@cache
def _vocabularies() -> dict[str, dict[str, tuple[str, str]]]:
    return {
        "clothes": phrases(world.CLOTHES, _color_words(world.CLOTHES_COLORS)),
        "expression": phrases(world.EXPRESSIONS),
        "background": phrases(world.BACKGROUNDS, _color_words(world.BACKGROUND_COLORS)),
        "prop": phrases(world.PROPS),
    }


def named(text: str, kind: str) -> tuple[str, str] | None:
    """The value of `kind` that a text names, and its colour, "" when unnamed; None when it names none.

    Articles do not count, so that "in space with a blue planet" and "in space with blue planet" are one.
    """
    plain = f" {_plain(text)} "
    for phrase, (value, color) in _vocabularies()[kind].items():
        if f" {_plain(phrase)} " in plain:
            return value, color
    return None


def _plain(text: str) -> str:
    return " ".join(word for word in re.findall(r"[\w-]+", text.lower()) if word not in ("a", "an"))


def scene_of(prompt: str, spans: Sequence[tuple[int, int]], subjects: Sequence[Identity], seed: int) -> Scene:
    """The scene that a prompt asks for; what it leaves open is drawn from `seed`.

    The words between one subject and the next describe the first; the background may stand anywhere.
    Subjects stand from left to right in the order of the prompt. Raises ValueError for any other number of
    subjects than one or two.
    """
    rng = np.random.default_rng(seed)
    drawn = sample_context(rng, len(subjects))
    ends = [*(start for start, _ in spans[1:]), len(prompt)]
    parts = [prompt[end:following] for (_, end), following in zip(spans, ends, strict=True)]
    appearances = tuple(
        _appearance(part, appearance) for part, appearance in zip(parts, drawn.appearances, strict=True)
    )
    kind, color = named(prompt, "background") or (drawn.background, "")
    context = Context(kind, color or drawn.background_color, drawn.background_seed, appearances)
    props = [(figure, found[0]) for figure, part in enumerate(parts) if (found := named(part, "prop"))]
    prop = Prop(props[0][1], figure=props[0][0], x=0.2, y=0.35) if props else None
    return Scene(tuple(subjects), context, prop, seed % 2**31)


def _appearance(text: str, drawn: Appearance) -> Appearance:
    """What a text says of one figure, the rest as drawn."""
    alone = re.match(rf" in ({'|'.join(world.CLOTHES_COLORS)})(,|$)", text)  # "a man in red, smiling"
    clothes, color = named(text, "clothes") or (drawn.clothes, alone[1] if alone else "")
    expression, _ = named(text, "expression") or (drawn.expression, "")
    return Appearance(clothes, color or drawn.clothes_color, expression, drawn.pose)


class Ceiling:
    """Draws the truth, encodes and decodes it."""

    name = "ceiling"

    def __init__(self, pipe: Pipeline, batch_size: int) -> None:
        self.pipe, self.batch_size = pipe, batch_size
        self.people = {i.id: i for split in world.SPLIT_SIZES for i in identities(split)}  # type: ignore[arg-type]

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        return [i for part in in_batches(requests, self.batch_size) for i in self._batch(part)]

    @torch.no_grad()
    def _batch(self, requests: Sequence[Request]) -> list[Image.Image]:
        size = latent_shape(self.pipe)[1] * self.pipe.vae_scale_factor
        drawn = [render(self._scene(r), size).image for r in requests]
        processor = self.pipe.image_processor
        pixels = processor.preprocess([Image.fromarray(image) for image in drawn])
        vae = self.pipe.vae
        latents = vae.encode(pixels.to(self.pipe.device, vae.dtype)).latent_dist.mean
        return list(processor.postprocess(vae.decode(latents).sample, output_type="pil"))

    def _scene(self, request: Request) -> Scene:
        missing = [s.id for s in request.subjects if s.id not in self.people]
        if missing:
            raise ValueError(f"ceiling knows the miniature's identities only, not {', '.join(missing)}")
        people = [self.people[s.id] for s in request.subjects]
        return scene_of(request.prompt, request.spans, people, request.seed)

    def trained_parameters(self) -> int:
        return 0


@register("ceiling")
def make(config: MethodConfig) -> Ceiling:
    """The ceiling through the prior's autoencoder."""
    return Ceiling(load_prior(config.prior, config.device, config.dtype), config.sampling.batch_size)
