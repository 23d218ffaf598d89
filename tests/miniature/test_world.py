"""The miniature world must be exactly known: same scene, same bytes; disjoint splits; true masks, words."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from moa.miniature import captions, render, world
from moa.miniature.captions import Wording, task_caption, web_caption
from moa.miniature.world import Appearance, Context, Identity, Pose, Prop, Scene, identities, sample_scene

SPLITS = tuple(world.SPLIT_SIZES)
IDENTITY_WORDS = re.compile(
    r"hair|skin|glasses|beard|moustache|bob|bun|afro|hijab|hat|turban|quiff|mullet|undercut"
)
BACKGROUND_WORDS = ("hills", "space", "waves", "quilt", "stripes", "plaid", "wall")


def scenes(count: int, figures: int = 1, prop: bool = False, seed: int = 0) -> list[Scene]:
    rng, pool = np.random.default_rng(seed), identities("train")
    return [sample_scene(rng, pool, figures, prop) for _ in range(count)]


def digest(drawn: list[Scene]) -> str:
    """One hash of all pixels and masks."""
    pictures = [render.render(scene) for scene in drawn]
    return hashlib.sha256(b"".join(p.image.tobytes() + p.mask.tobytes() for p in pictures)).hexdigest()


MIXED = [*scenes(3), *scenes(2, figures=2), *scenes(2, figures=2, prop=True)]


# --- Determinism ----------------------------------------------------------------------------------------


def test_a_scene_has_the_same_bytes_in_every_process():
    """Tables compare runs; a scene drawn tomorrow must be the scene of today."""
    code = (
        "import json, sys, hashlib; from moa.miniature import render, world\n"
        "ps = [render.render(world.Scene.from_dict(d)) for d in json.load(sys.stdin)]\n"
        "print(hashlib.sha256(b''.join(p.image.tobytes() + p.mask.tobytes() for p in ps)).hexdigest())"
    )
    sent = json.dumps([scene.to_dict() for scene in MIXED])
    other = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, text=True, check=True
    )
    assert digest(MIXED) == digest(MIXED) == other.stdout.strip()


def test_the_same_generator_state_draws_the_same_scene_and_caption():
    assert scenes(4, figures=2, prop=True) == scenes(4, figures=2, prop=True)
    first, second = (web_caption(MIXED[4], np.random.default_rng(7)) for _ in range(2))
    assert first == second


def test_the_scene_seed_changes_no_pixel():
    assert digest([MIXED[0]]) == digest([replace(MIXED[0], seed=MIXED[0].seed + 1)])


def test_a_larger_picture_shows_the_same_scene():
    """Drawn afresh at its size, not enlarged; averaged down it must agree with the small one."""
    large, small = render.render(MIXED[0], 256).image, render.render(MIXED[0], 64).image
    averaged = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 6


# --- Identity sets --------------------------------------------------------------------------------------


def test_splits_are_disjoint_and_complete():
    everyone = [tuple(i.attributes.values()) for split in SPLITS for i in identities(split)]
    assert len(everyone) == len(set(everyone)) == sum(map(sum, world.SPLIT_SIZES.values()))
    for split, (men, women) in world.SPLIT_SIZES.items():
        words = [i.class_word for i in identities(split)]
        assert (words.count("man"), words.count("woman")) == (men, women)
        assert [i.id for i in identities(split)] == [f"{split}-{n:04d}" for n in range(men + women)]


def test_identity_sets_never_change():
    """Trained models are shipped; if this fails, their training identities are no longer held apart."""
    listing = "\n".join(str(i.to_dict()) for split in SPLITS for i in identities(split))
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == "2a5e3920a0c2c7ec"


def test_held_out_pairs_appear_in_test_only():
    held_out = {split: sum(world.is_held_out(i.attributes) for i in identities(split)) for split in SPLITS}
    assert held_out["test"] == 74
    assert all(held_out[split] == 0 for split in SPLITS if split != "test")


def test_every_value_is_learned_before_it_is_tested():
    """Pairs are held out, single values are not."""
    for split in SPLITS:
        for name in world.IDENTITY_ATTRIBUTES:
            assert {getattr(i, name) for i in identities(split)} == set(world.ATTRIBUTES[name]), (split, name)


def test_held_out_pairs_are_a_tenth_of_each_kind():
    possible = {
        frozenset({"top", "glasses"}): len(world.TOPS) * len(world.GLASSES),
        frozenset({"top", "facial_hair"}): len(world.MAN_TOPS) * len(world.FACIAL_HAIR),
        frozenset({"top", "hair_color"}): len(world.TOPS) * len(world.HAIR_COLORS),
    }
    for kind, total in possible.items():
        held_out = sum({a, b} == kind for (a, _), (b, _) in world.HELD_OUT_PAIRS)
        assert 0.08 <= held_out / total <= 0.12
    for pair in world.HELD_OUT_PAIRS:
        for attribute, value in pair:
            world.check_value(attribute, value)


def test_scenes_are_balanced_between_men_and_women():
    words = [scene.identities[0].class_word for scene in scenes(400)]
    assert 0.42 < words.count("woman") / 400 < 0.58


# --- Pictures and masks ---------------------------------------------------------------------------------


def test_every_attribute_changes_the_picture():
    """A value that draws nothing would be a label that nobody can see."""
    identity = Identity("x", "short", "red", "tan", "beard", "round")
    appearance = Appearance("hoodie", "blue", "smiling")

    def picture(**changed: str) -> bytes:
        who = {name: changed.get(name, value) for name, value in identity.attributes.items()}
        if who["top"] in world.WOMAN_TOPS:
            who["facial_hair"] = "none"
        dress = {name: changed.get(name, getattr(appearance, name)) for name in world.APPEARANCE_ATTRIBUTES}
        place = {"background": "hills", "background_color": "pink"}
        place |= {name: changed[name] for name in place if name in changed}
        context = Context(**place, background_seed=1, appearances=(Appearance(**dress),))
        prop = Prop(changed["prop"]) if changed.get("prop", "none") != "none" else None
        return render.render(Scene((Identity("x", **who),), context, prop)).image.tobytes()

    for name, values in world.ATTRIBUTES.items():
        if name != "class":
            assert len({picture(**{name: value}) for value in values}) == len(values), name


@pytest.mark.parametrize("figures", [1, 2])
def test_masks_name_every_figure_and_reach_the_bottom_edge(figures):
    for scene in scenes(20, figures):
        drawn = render.render(scene)
        assert drawn.image.shape == (64, 64, 3) and drawn.image.dtype == np.uint8
        assert drawn.mask.shape == (64, 64) and drawn.mask.dtype == np.uint8
        assert set(np.unique(drawn.mask)) == set(range(figures + 1))
        assert set(np.unique(drawn.mask[-1])) >= set(range(1, figures + 1))
        shares = [(drawn.mask == i + 1).mean() for i in range(figures)]
        assert min(shares) > (0.3 if figures == 1 else 0.1)
        if figures == 2:
            columns = [np.nonzero(drawn.mask == i)[1].mean() for i in (1, 2)]
            assert columns[0] < columns[1], "the first identity must stand on the left"


def test_the_mask_is_the_region_that_changes_with_the_subject():
    """Ground truth of "context stays when the subject is swapped": outside both masks nothing may change."""
    one, other = identities("train")[0], identities("train")[-1]
    scene = scenes(1)[0]
    pictures = [render.render(replace(scene, identities=(who,))) for who in (one, other)]
    outside = (pictures[0].mask == 0) & (pictures[1].mask == 0)
    changed = np.abs(pictures[0].image.astype(int) - pictures[1].image).sum(-1) > 0
    assert (changed & outside).sum() < 0.06 * outside.size  # antialiased rims, alpha below one half
    assert changed[(pictures[0].mask == 1) | (pictures[1].mask == 1)].mean() > 0.3


def test_figures_never_cover_each_others_faces():
    head = '<circle cx="140" cy="120" r="56" fill="#000"/>'
    for scene in scenes(60, figures=2):
        mask = render.render(scene).mask
        for index, appearance in enumerate(scene.context.appearances):
            face = render._rasterise(head, 64, transform=render._transform(appearance.pose))[..., 3] >= 128
            assert not (mask[face] == 2 - index).any()


def test_a_prop_is_cut_out_of_its_holders_mask_only():
    for scene in scenes(20, figures=2, prop=True):
        without = render.render(replace(scene, prop=None)).mask
        with_prop = render.render(scene).mask
        lost = (without > 0) & (with_prop == 0)
        assert (without[lost] == scene.prop.figure + 1).mean() > 0.9
        assert np.array_equal(with_prop[~lost], without[~lost])
        assert lost.sum() > 20


def test_a_subject_photo_shows_one_figure_before_a_background_of_its_seed():
    identity, appearance = identities("test")[3], Appearance("vneck", "red", "calm", Pose(scale=1.05))
    photos = [render.render_subject(identity, appearance, 64, seed) for seed in (1, 1, 2)]
    assert np.array_equal(photos[0].image, photos[1].image)
    assert not np.array_equal(photos[0].image, photos[2].image)
    assert np.array_equal(photos[0].mask, photos[2].mask)


# --- Captions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [task_caption, web_caption])
def test_spans_point_at_the_class_word_of_each_figure(write):
    rng = np.random.default_rng(0)
    for scene in [*scenes(40), *scenes(40, 2), *scenes(20, 2, True)]:
        caption = write(scene, rng)
        assert len(caption.spans) == len(scene.identities)
        for (start, end), identity in zip(caption.spans, scene.identities, strict=True):
            assert caption.text[start:end] in (identity.class_word, "person")
            assert caption.text[start - 2 : start] == "a "


def test_task_captions_never_tell_the_identity():
    rng = np.random.default_rng(0)
    for scene in [*scenes(150), *scenes(150, 2, True)]:
        assert not IDENTITY_WORDS.search(task_caption(scene, rng).text)
    with pytest.raises(ValueError, match="web_caption"):
        task_caption(MIXED[0], rng, captions.WEB)


def words_for(attribute: str, value: str) -> tuple[str, ...]:
    """The words of which one must stand in a caption that names `value`, colour left out."""
    vocabularies = {
        "top": world.TOPS, "hair_color": world.HAIR_COLORS, "skin": world.SKINS, "glasses": world.GLASSES,
        "facial_hair": world.FACIAL_HAIR, "clothes": world.CLOTHES, "clothes_color": world.CLOTHES_COLORS,
        "expression": world.EXPRESSIONS, "background": world.BACKGROUNDS, "prop": world.PROPS,
        "background_color": world.BACKGROUND_COLORS, "class": {"man": ("man",), "woman": ("woman",)},
    }  # fmt: skip
    return vocabularies[attribute][value]


def says(text: str, attribute: str, value: str) -> bool:
    """Whether `text` has all parts of one wording, in order, whatever the colour and its article."""
    for words in words_for(attribute, value):
        parts = [re.escape(re.sub(r"^a |\ba $", "", part).strip()) for part in words.split("{color}")]
        if re.search(r"\b" + r"\b(?: \w+){0,2} ?\b".join(filter(None, parts)) + r"\b", text):
            return True
    return False


def test_facts_are_true_and_are_in_the_text():
    rng = np.random.default_rng(0)
    for scene in [*scenes(100), *scenes(50, prop=True)]:
        caption = web_caption(scene, rng)
        truth = {name: world.ATTRIBUTES[name][i] for name, i in world.labels(scene).items()}
        for name, value in (caption.facts["figures"][0] | caption.facts["scene"]).items():
            assert truth[name] == value
            assert says(caption.text, name, value), (name, value, caption.text)


def test_what_is_not_in_the_facts_is_not_in_the_text():
    """The facts measure captioners; something said but not counted would make a good captioner look bad."""
    rng = np.random.default_rng(1)
    for scene in scenes(150):
        caption = web_caption(scene, rng)
        named = caption.facts["figures"][0]
        assert ("skin" in named) == (" skin" in caption.text)
        assert ("glasses" in named) == ("glasses" in caption.text)
        assert ("facial_hair" in named) == bool(re.search("beard|moustache", caption.text))
        if not named.keys() & {"top", "hair_color"}:
            assert "hair" not in caption.text
        assert bool(caption.facts["scene"]) == any(w in caption.text for w in BACKGROUND_WORDS)


def test_the_colour_of_headwear_is_never_called_hair():
    """A red hat over unseen hair is not "red hair": that would teach the text encoder a falsehood."""
    rng = np.random.default_rng(0)
    wearers = [i for i in identities("train") if i.top in world.HEADWEAR]
    for _ in range(150):
        caption = web_caption(sample_scene(rng, wearers), rng)
        assert " hair" not in caption.text
        assert {"hair_color", "top"} & caption.facts["figures"][0].keys() != {"hair_color"}


def test_the_full_wording_names_every_context_attribute():
    """Evaluation prompts must leave nothing to chance."""
    scene = scenes(1, figures=2)[0]
    facts = task_caption(scene, np.random.default_rng(0), Wording(1.0, 0.0, 0.0)).facts
    assert all(set(f) == {"class", *world.APPEARANCE_ATTRIBUTES} for f in facts["figures"])
    assert set(facts["scene"]) == set(world.BACKGROUND_ATTRIBUTES)


def test_captions_are_plain_and_short():
    rng = np.random.default_rng(0)
    texts = [web_caption(scene, rng).text for scene in scenes(300, 2)]
    assert all(re.fullmatch(r"[a-z ,-]+", text) and "  " not in text for text in texts)
    assert np.percentile([len(text.split()) for text in texts], 99) <= 45


# --- Records and errors ---------------------------------------------------------------------------------


def test_scenes_survive_json():
    for scene in MIXED:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_labels_are_indices_into_the_vocabularies():
    scene = scenes(1, figures=2, prop=True)[0]
    for figure in (0, 1):
        found = world.labels(scene, figure)
        assert set(found) == set(world.ATTRIBUTES)
        assert world.ATTRIBUTES["top"][found["top"]] == scene.identities[figure].top
        holds = scene.prop.figure == figure
        assert world.ATTRIBUTES["prop"][found["prop"]] == (scene.prop.kind if holds else "none")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Identity("x", "wig", "red", "tan", "none", "none"),
            "unknown top 'wig'; choose one of short",
        ),
        (lambda: Identity("x", "bob", "red", "tan", "beard", "none"), "facial_hair must be 'none'"),
        (lambda: Appearance("cape", "red", "calm"), "unknown clothes 'cape'"),
        (lambda: Appearance("hoodie", "beige", "calm"), "unknown clothes_color 'beige'"),
        (lambda: Context("sea", "blue", 0, ()), "unknown background 'sea'"),
        (lambda: Context("hills", "blue", 99, ()), "background_seed 99"),
        (lambda: Prop("sword"), "unknown prop 'sword'"),
        (lambda: Pose(scale=9), "scale"),
        (lambda: Pose.from_dict({"spin": 1}), "unknown keys \\['spin'\\]"),
        (lambda: Scene((), Context("hills", "blue", 0, ())), "1 or 2 identities, not 0"),
        (
            lambda: Scene(tuple(identities("test")[:2]), Context("hills", "blue", 0, ())),
            "as many appearances",
        ),
        (lambda: identities("holdout"), "unknown split 'holdout'; choose one of pretrain"),
        (lambda: sample_scene(np.random.default_rng(0), identities("test"), 3), "not 3"),
        (lambda: sample_scene(np.random.default_rng(0), identities("test")[:1], 2), "pool has 1"),
        (lambda: world.check_value("shoe", "red"), "unknown attribute 'shoe'"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
