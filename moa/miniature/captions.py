"""Captions of scenes, in a small plain English, with the place of every subject word and what was said.

*Task captions* name only the class word and the context, so that identity must come from the subject image.
*Web captions* also name appearance: they teach the text encoder and the prior what hair and hats are.
*Loose captions* say less, in a wording of their own: they teach both to read prompts that are no captions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moa.miniature import world
from moa.miniature.world import Appearance, Context, Identity, Scene

PREFIXES = ("a photo of ", "a portrait of ")


@dataclass(frozen=True)
class Caption:
    """A caption, where its figures are named, and what it says about them."""

    text: str
    spans: tuple[tuple[int, int], ...]  # characters of each figure's class word, end exclusive, left to right
    facts: dict[str, Any]  # what is named: {"figures": [{attribute: value}, ...], "scene": {...}}

    def __post_init__(self) -> None:
        for start, end in self.spans:
            if self.text[start:end] not in ("man", "woman", "person"):
                raise ValueError(f"span {start}:{end} of {self.text!r} is no class word")


@dataclass(frozen=True)
class Wording:
    """How often things are said: probabilities, 0..1. `Wording(1.0, 0.0, 0.0)` gives full, plain prompts."""

    context: float = 0.9  # each context attribute is named
    generic: float = 0.15  # "person" instead of "man" or "woman"
    prefix: float = 0.3  # "a photo of", "a portrait of"
    identity: float = 0.0  # each identity attribute is named


TASK = Wording()
WEB = Wording(identity=0.75)
LOOSE = Wording(context=0.5, identity=0.3)


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _named(rng: np.random.Generator, values: dict[str, str], probability: float) -> dict[str, str]:
    """Keep each attribute with `probability`; one number is drawn for each, whatever the probability."""
    return {name: value for name, value in values.items() if rng.random() < probability}


def _article(phrase: str) -> str:
    """Mend spaces and "a" before a vowel, after a colour was left out of a phrase or put in."""
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r" +", " ", phrase).strip())


def _hair(rng: np.random.Generator, named: dict[str, str]) -> list[str]:
    """Top and colour: "long red hair", "long hair", "red hair" or nothing."""
    color = _pick(rng, world.HAIR_COLORS[named["hair_color"]]) if "hair_color" in named else ""
    if "top" in named:
        return [_article(_pick(rng, world.TOPS[named["top"]]).format(color=color))]
    return [f"{color} hair"] if color else []


def _looks(rng: np.random.Generator, identity: Identity, probability: float) -> tuple[str, dict[str, str]]:
    """Such as " with long red hair, round glasses and dark skin", and the facts that it states."""
    values = {name: value for name, value in identity.attributes.items() if value != "none"}
    named = _named(rng, values, probability)
    if identity.top in world.HEADWEAR and "hair_color" in named:
        named["top"] = identity.top  # the colour is the cloth's: "red hair" would be false
    parts = _hair(rng, named)
    for name, vocabulary in (
        ("facial_hair", world.FACIAL_HAIR),
        ("glasses", world.GLASSES),
        ("skin", world.SKINS),
    ):
        if name in named:
            parts.append(_pick(rng, vocabulary[named[name]]))
    if not parts:
        return "", {}
    return " with " + " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))), named


def _dress(
    rng: np.random.Generator, appearance: Appearance, probability: float
) -> tuple[str, dict[str, str]]:
    """Such as " in a blue hoodie, smiling", and the facts that it states."""
    values = {name: getattr(appearance, name) for name in world.APPEARANCE_ATTRIBUTES}
    named = _named(rng, values, probability)
    text, color = "", ""
    if "clothes_color" in named:
        color = _pick(rng, world.CLOTHES_COLORS[named["clothes_color"]])
    if "clothes" in named:
        text = " in " + _article(_pick(rng, world.CLOTHES[named["clothes"]]).format(color=color))
    elif color:
        text = f" in {color}"
    if "expression" in named:
        text += ", " + _pick(rng, world.EXPRESSIONS[named["expression"]])
    return text, named


def _background(rng: np.random.Generator, context: Context, probability: float) -> tuple[str, dict[str, str]]:
    """Such as ", in front of green hills", and its facts; the colour is named only with the kind."""
    named = _named(rng, {name: getattr(context, name) for name in world.BACKGROUND_ATTRIBUTES}, probability)
    if "background" not in named:
        return "", {}
    color = ""
    if "background_color" in named:
        color = _pick(rng, world.BACKGROUND_COLORS[named["background_color"]])
    return ", " + _article(_pick(rng, world.BACKGROUNDS[named["background"]]).format(color=color)), named


def caption(scene: Scene, rng: np.random.Generator, wording: Wording) -> Caption:
    """Describe a scene; the same scene, generator state and wording give the same caption."""
    text = _pick(rng, PREFIXES) if rng.random() < wording.prefix else ""
    spans: list[tuple[int, int]] = []
    facts: dict[str, Any] = {"figures": [], "scene": {}}
    for index, (identity, appearance) in enumerate(
        zip(scene.identities, scene.context.appearances, strict=True)
    ):
        word = "person" if rng.random() < wording.generic else identity.class_word
        text += (", and a " if index else "a ") + word
        spans.append((len(text) - len(word), len(text)))
        looks, named = _looks(rng, identity, wording.identity)
        dress, named_dress = _dress(rng, appearance, wording.context)
        text += looks + dress
        held: dict[str, str] = {}
        if scene.prop is not None and scene.prop.figure == index:
            held = _named(rng, {"prop": scene.prop.kind}, wording.context)
            text += "".join(", holding " + _pick(rng, world.PROPS[kind]) for kind in held.values())
        facts["figures"].append(({} if word == "person" else {"class": word}) | named | named_dress | held)
    background, facts["scene"] = _background(rng, scene.context, wording.context)
    return Caption(text + background, tuple(spans), facts)


def task_caption(scene: Scene, rng: np.random.Generator, wording: Wording = TASK) -> Caption:
    """Class words and context only, such as "a man in a blue hoodie, smiling, in front of green hills"."""
    if wording.identity:
        raise ValueError("a task caption must not name identity attributes; use web_caption for that")
    return caption(scene, rng, wording)


def web_caption(scene: Scene, rng: np.random.Generator, wording: Wording = WEB) -> Caption:
    """Context and appearance, such as "a woman with a red bun in a green hoodie, sad, in space"."""
    return caption(scene, rng, wording)


def loose_caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption as people type prompts: less is said, half the commas and a quarter of the articles are gone.

    It marks no class words.
    """
    said = caption(scene, rng, LOOSE)
    text = re.sub(",", lambda comma: comma[0] if rng.random() < 0.5 else "", said.text)
    text = re.sub(r"\ban? ", lambda article: article[0] if rng.random() < 0.75 else "", text)
    return Caption(text, (), said.facts)
