"""The ceiling draws what the prompt says, and leaves to the seed what it does not say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moa.methods import MethodConfig, Request, Sampling, Subject, build
from moa.miniature.captions import Wording, task_caption
from moa.miniature.ceiling import scene_of
from moa.miniature.render import render
from moa.miniature.world import identities, sample_scene
from tests.training import tiny

FULL = Wording(context=1.0, generic=0.0, prefix=0.3)


@pytest.mark.parametrize("figures", [1, 2])
def test_full_captions_are_understood(figures):
    rng = np.random.default_rng(figures)
    for number in range(300):
        scene = sample_scene(rng, identities("test"), figures, prop=number % 2 == 0)
        caption = task_caption(scene, rng, FULL)
        read = scene_of(caption.text, caption.spans, scene.identities, number)
        assert read.identities == scene.identities
        for wanted, found in zip(scene.context.appearances, read.context.appearances, strict=True):
            assert replace(found, pose=wanted.pose) == wanted, caption.text
        same = (read.context.background, read.context.background_color)
        assert same == (scene.context.background, scene.context.background_color), caption.text
        held = (scene.prop.kind, scene.prop.figure) if scene.prop else None
        assert ((read.prop.kind, read.prop.figure) if read.prop else None) == held, caption.text


def test_what_is_left_open_follows_the_seed():
    person = identities("test")[0]
    scenes = [scene_of("a man in a red hoodie", ((2, 5),), [person], seed) for seed in (1, 1, 2)]
    assert scenes[0] == scenes[1] != scenes[2]
    assert all(s.context.appearances[0].clothes_color == "red" for s in scenes)
    assert scene_of("a man in red, sad", ((2, 5),), [person], 3).context.appearances[0].clothes_color == "red"


def test_ceiling_is_the_render_through_the_autoencoder(models):
    person = identities("test")[0]
    subject = Subject(person.id, person.class_word, tiny.photo(0))
    asked = Request("a man in front of pink waves", ((2, 5),), (subject,), 5)
    method = build("ceiling", MethodConfig(*models, sampling=Sampling(batch_size=2)))
    image = np.asarray(method.generate([asked, replace(asked, seed=6), asked])[0])
    assert image.shape == (32, 32, 3)
    drawn = render(scene_of(asked.prompt, asked.spans, [person], 5), 32).image
    assert not np.array_equal(image, drawn)  # the autoencoder takes its toll
    with pytest.raises(ValueError, match="knows the miniature's identities only, not me"):
        method.generate([replace(asked, subjects=(replace(subject, id="me"),))])
