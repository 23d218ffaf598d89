"""The miniature's own models: labels that fit their pictures, loadable folders, and what their cards tell."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForUniversalSegmentation,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    CLIPModel,
    CLIPTextModel,
    CLIPVisionModelWithProjection,
    ResNetModel,
)

from moa.hashing import ROOT
from moa.miniature import cards, corpus, gates, models, pretrain
from moa.miniature import fit as fit_module
from moa.miniature.captions import web_caption
from moa.miniature.fit import Budget, fit
from moa.miniature.recipes import clip as clip_recipe
from moa.miniature.recipes import prior as prior_recipe
from moa.miniature.recipes import text as text_recipe
from moa.miniature.recipes import vae as vae_recipe
from moa.miniature.recipes import vision
from moa.miniature.recipes.judges import box
from moa.miniature.recipes.prior import encode_texts
from moa.miniature.render import render
from moa.miniature.tokenizer import load_tokenizer
from moa.miniature.world import APPEARANCE_ATTRIBUTES, ATTRIBUTES, BACKGROUND_ATTRIBUTES, EXPRESSIONS
from tests.miniature.trainings import copied, equal, log, weights

LOADERS = {
    "vae": AutoencoderKL,
    "decoder": AutoencoderKL,
    "clip": CLIPModel,
    "unet": UNet2DConditionModel,
    "details": UNet2DConditionModel,
    "finish": UNet2DConditionModel,
    "text": CLIPTextModel,
    "polish": UNet2DConditionModel,
    "props": UNet2DConditionModel,
    "props_decoder": AutoencoderKL,
    "image_encoder": CLIPVisionModelWithProjection,
    "identity": ResNetModel,
    "attributes": AutoModelForImageClassification,
    "clip_judge": CLIPModel,
    "segmenter": AutoModelForUniversalSegmentation,
    "captioner": Blip2ForConditionalGeneration,
}
PIXELS = {  # what the processor beside a model makes of a picture
    "clip": 64,
    "image_encoder": 64,
    "identity": 96,
    "attributes": 96,
    "clip_judge": 64,
    "segmenter": 128,
    "captioner": 64,
}
PRIOR = ("vae", "decoder", "clip", "unet", "details", "finish", "text", "polish", "props", "props_decoder")
CONFIG = yaml.safe_load((ROOT / "config/miniature.yaml").read_text())["pretrain"]


def small(model: str, **changes: object) -> pretrain.PretrainConfig:
    """The shipped configuration of a model, but for three steps on 40 pictures."""
    few = {"steps": 3, "batch_size": 4, "warmup": 1, "checkpoint_seconds": 0.0, **changes}
    budget = {k: float(v) if k in ("lr", "weight_decay") else v for k, v in CONFIG[model]["budget"].items()}
    return pretrain.PretrainConfig(Budget(**{**budget, **few}), images=40, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 rendered scenes, in the folder `cache` below."""
    return corpus.load("pretrain", 40, 0, cache(tmp_path_factory))


def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "corpus"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A function that trains a model once, after those that it needs, and gives its folder."""
    folder = tmp_path_factory.mktemp("trained")

    def train(model):
        output = folder / model
        if not output.exists():
            parts = {part: train(part) for part in pretrain.NEEDS.get(model, ())}
            pretrain.run(small(model), model, output, cache(tmp_path_factory), folder / "runs", **parts)
        return output

    return train


# --- The corpus -------------------------------------------------------------------------------------------


def test_a_corpus_is_the_same_with_and_without_cache(data, tmp_path, tmp_path_factory, monkeypatch):
    again = corpus.load("pretrain", 40, 0, tmp_path)
    monkeypatch.setattr(corpus, "_make", None)  # nothing may be drawn anew
    cached = corpus.load("pretrain", 40, 0, cache(tmp_path_factory))
    for other in (again, cached):
        assert other.sha256 == data.sha256
        assert other.scenes == data.scenes
        assert np.array_equal(other.images, data.images)
        assert np.array_equal(other.masks, data.masks)


def test_other_arguments_and_other_code_are_other_corpora(data, tmp_path, monkeypatch):
    calls = {
        "first": ("pretrain", 3, 0),
        "split": ("validation", 3, 0),
        "count": ("pretrain", 4, 0),
        "seed": ("pretrain", 3, 1),
        "pairs": ("pretrain", 3, 0, tmp_path, 1.0),
        "props": ("pretrain", 3, 0, tmp_path, 0.3, 1.0),
    }

    def make(split, count, *rest):
        made.append((split, count, *rest))
        return data.images[:count], data.masks[:count], list(data.scenes[:count])

    made: list = []
    monkeypatch.setattr(corpus, "_make", make)
    for n, call in enumerate(calls.values(), start=1):
        corpus.load(*(call if len(call) > 3 else (*call, tmp_path)))
        assert len(made) == n
    corpus.load("pretrain", 3, 0, tmp_path)
    assert len(made) == len(calls)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "code_hash", lambda module: "another renderer")
        corpus.load("pretrain", 3, 0, tmp_path)
    assert len(made) == len(calls) + 1
    scene = corpus.scene
    monkeypatch.setattr(corpus, "scene", lambda *arguments: scene(*arguments))  # another choice of scenes
    corpus.load("pretrain", 3, 0, tmp_path)
    assert len(made) == len(calls) + 2
    assert len(list(tmp_path.iterdir())) == len(made)  # and no half-written file


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_draw_gives_the_share_of_pairs_that_is_asked_for(data, share):
    drawn = data.draw(np.random.default_rng(0), 4000, share)
    pairs = np.mean([len(data.scenes[i].identities) == 2 for i in drawn])
    assert abs(pairs - share) < 0.03
    assert set(drawn) <= set(range(40))
    possible = {i for i, s in enumerate(data.scenes) if share not in (2 - len(s.identities),)}
    assert set(drawn) == possible


# --- Heads and crops --------------------------------------------------------------------------------------


def test_a_head_without_targets_counts_nothing():
    torch.manual_seed(0)
    heads = vision.Heads(4, {"a": 3, "b": 5})
    x, named = torch.randn(6, 4), torch.tensor([0, 4, -1, 2, -1, 1])
    nothing = torch.full((6,), -1)
    assert heads.loss(x, {"a": nothing, "b": nothing}).item() == 0
    loss = heads.loss(x, {"a": nothing, "b": named})
    rows = named >= 0
    expected = torch.nn.functional.cross_entropy(heads.heads["b"](x[rows]), named[rows]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    gradients = heads.heads["a"].weight.grad
    assert gradients is not None and not gradients.any()


def test_scene_labels_are_what_the_scenes_show(data):
    labels = vision.scene_labels(data)
    assert set(labels) == set(vision.scene_heads(8).heads)

    def shown(name, row):
        index = int(labels[name][row])
        return None if index < 0 else ATTRIBUTES[name.removesuffix("_0").removesuffix("_1")][index]

    for row, scene in enumerate(data.scenes):
        assert int(labels["second"][row]) == len(scene.identities) - 1
        for name in BACKGROUND_ATTRIBUTES:
            assert shown(name, row) == getattr(scene.context, name)
        for i in range(2):
            there = i < len(scene.identities)
            assert shown(f"class_{i}", row) == (scene.identities[i].class_word if there else None)
            held = scene.prop.kind if scene.prop and scene.prop.figure == i else "none"
            assert shown(f"prop_{i}", row) == (held if there else None)
            for name in APPEARANCE_ATTRIBUTES:
                value = getattr(scene.context.appearances[i], name) if there else None
                assert shown(f"{name}_{i}", row) == value


def test_figure_crops_contain_their_figure(data):
    """All of it, but for the part of a tight crop that the shift cuts off."""
    sizes = []
    for row, scene in enumerate(data.scenes):
        for figure in range(len(scene.identities)):
            mask = data.masks[row] == figure + 1
            bounds = box(data.masks[row], figure)
            assert bounds is not None
            picture = np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=2)
            square = vision.square(picture, bounds, np.random.default_rng([row, figure]))
            margin = np.random.default_rng([row, figure]).uniform(*vision.MARGIN)
            side = margin * max(bounds[2] - bounds[0], bounds[3] - bounds[1])
            seen = (square[..., 0] > 127).sum() * (side / 64) ** 2 / mask.sum()
            assert (0.96 if (margin - 1) / 2 > vision.SHIFT * margin else 0.8) < seen < 1.04
            assert square.shape == (64, 64, 3)
            sizes.append(margin)
    assert min(sizes) < 1.1 and max(sizes) > 1.3


def test_heads_weigh_more_than_what_is_around_them(data):
    weights = vae_recipe.head_weights(data)[:, 0].numpy()
    assert weights.shape == data.masks.shape
    assert set(np.unique(weights)) == {1.0, 1 + vae_recipe.HEAD_WEIGHT}
    assert (weights[data.masks == 0] == 1).all()
    for mask, weight, scene in zip(data.masks, weights, data.scenes, strict=True):
        for figure in range(1, 1 + len(scene.identities)):
            rows = np.nonzero((mask == figure).any(axis=1))[0]
            high = [(weight[y][mask[y] == figure] > 1).mean() for y in rows]
            assert set(high) == {0.0, 1.0}
            assert high == sorted(high, reverse=True)
            assert 0.6 < np.mean(high) < 0.8


def held_corpus():
    """Six scenes in which somebody holds something."""
    scenes = [corpus.scene("pretrain", i, 5, prop_share=1.0) for i in range(6)]
    pictures = [render(scene) for scene in scenes]
    images, masks = np.stack([p.image for p in pictures]), np.stack([p.mask for p in pictures])
    return corpus.Corpus(images, masks, tuple(scenes), "")


def test_what_somebody_holds_weighs_as_much_as_a_head():
    data = held_corpus()
    bare = np.stack([render(replace(scene, prop=None)).image for scene in data.scenes])
    heads, both = (weigh(data)[:, 0].numpy() for weigh in (vae_recipe.head_weights, vae_recipe.prop_weights))
    added, changed = both > heads, (data.images != bare).any(axis=3)
    assert (both[added] == 1 + vae_recipe.PROP_WEIGHT).all() and (both == heads)[~added].all()
    both_ways = (added & changed).sum()
    assert both_ways > 0.95 * added.sum()  # only where the prop changed the picture ...
    assert both_ways > 0.75 * changed.sum()  # ... and nearly wherever it did, but for soft edges


@pytest.mark.parametrize("web", [False, True])
def test_a_contrasting_caption_has_one_thing_wrong(data, web):
    rng, kinds = np.random.default_rng(0), set()
    for scene in data.scenes * 5:
        other = clip_recipe.with_error(scene, data, rng, web)
        assert (other.prop, other.seed) == (scene.prop, scene.seed)
        people = [(a, b) for a, b in zip(scene.identities, other.identities, strict=True) if a != b]
        context = context_facts(scene).items() - context_facts(other).items()
        assert len(people) + len(context) == 1
        for a, b in people:
            apart = sum(b.attributes[name] != value for name, value in a.attributes.items())
            assert a.class_word != b.class_word or (web and apart == 1)
            kinds.add("class" if a.class_word != b.class_word else "looks")
        kinds |= {name for (name, *_), _ in context}
    expected = {"class", *APPEARANCE_ATTRIBUTES, *BACKGROUND_ATTRIBUTES}
    assert kinds == (expected | {"looks"} if web else expected)


def context_facts(scene):
    """Every value that a task caption can name, but for class and prop."""
    facts = {(name,): getattr(scene.context, name) for name in BACKGROUND_ATTRIBUTES}
    for i, appearance in enumerate(scene.context.appearances):
        facts |= {(name, i): getattr(appearance, name) for name in APPEARANCE_ATTRIBUTES}
    return facts


# --- One model after another ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", get_args(pretrain.Model))
def test_a_model_is_saved_so_that_it_loads(trained, data, model):
    folder = trained(model)
    saved = weights(folder)
    assert {v.dtype for v in saved.values() if v.is_floating_point()} == {torch.float16}
    assert all(v.isfinite().all() for v in saved.values())

    loaded, info = LOADERS[model].from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["model"] == model
    assert recipe["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert recipe["settings"]["budget"]["steps"] == 3
    assert recipe["settings"]["budget"]["seed"] == CONFIG[model]["budget"].get("seed", 0)
    assert recipe["data_sha256"] == data.sha256

    rows = log(folder)
    assert [row["step"] for row in rows] == ["3"]
    assert all(np.isfinite(float(v)) for v in rows[0].values())

    if model in PIXELS:
        pictures = [Image.fromarray(data.images[0])]
        pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
        assert pixels["pixel_values"].shape == (1, 3, PIXELS[model], PIXELS[model])
    if model in ("clip", "clip_judge", "captioner"):
        assert len(AutoTokenizer.from_pretrained(folder)("a man in a blue hoodie")["input_ids"]) > 4
    assert not list((folder.parent / "runs").glob(f"{model}-*"))
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("model", ["vae", "clip_judge"])
def test_a_killed_recipe_goes_on(trained, tmp_path, tmp_path_factory, monkeypatch, model):
    expected, update = weights(trained(model)), fit_module.Run.update

    def kill(run, losses):
        if run.step == 2:
            raise KeyboardInterrupt
        return update(run, losses)

    arguments = (small(model), model, tmp_path / "out", cache(tmp_path_factory), tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(fit_module.Run, "update", kill)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(*arguments)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "runs").glob(f"{model}-*/checkpoint.pt"))) == 1
    steps = []
    monkeypatch.setattr(
        fit_module.Run, "update", lambda run, losses: steps.append(run.step) or update(run, losses)
    )
    pretrain.run(*arguments)
    assert steps == [2]
    assert equal(weights(tmp_path / "out"), expected)


def test_whatever_a_training_depends_on_has_its_own_checkpoints(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def recipe(budget, data, folder, parts):
        folders.append(folder)
        raise Stop

    def call(settings=None, model="vae", sha="a", code="b", **parts):
        monkeypatch.setitem(pretrain.RECIPES, model, recipe)
        monkeypatch.setattr(pretrain.corpus, "load", lambda *_, **__: SimpleNamespace(sha256=sha))
        monkeypatch.setattr(pretrain, "code_hash", lambda module: code)
        with pytest.raises(Stop):
            pretrain.run(settings or small("vae"), model, tmp_path / "out", tmp_path, runs, **parts)
        return folders[-1]

    folders: list[Path] = []
    runs = tmp_path / "runs"
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    first = call()
    assert call() == first
    others = [
        call(small("vae", steps=4)),
        call(small("vae", lr=1.0)),
        call(small("vae", seed=9)),
        call(replace(small("vae"), images=41)),
        call(replace(small("vae"), corpus_seed=1)),
        call(replace(small("vae"), prop_share=0.5)),
        call(sha="another renderer"),
        call(code="another recipe"),
        call(model="clip"),
        call(vae=tmp_path / "one"),
        call(vae=tmp_path / "other"),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert {f.parent for f in folders} == {runs}


def test_settings_say_which_pictures_are_drawn(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def load(*arguments, **options):
        asked.append((*arguments, options))
        raise Stop

    asked: list = []
    monkeypatch.setattr(pretrain.corpus, "load", load)
    settings = replace(small("vae"), corpus_seed=3, prop_share=0.5)
    with pytest.raises(Stop):
        pretrain.run(settings, "vae", tmp_path / "out", tmp_path, tmp_path / "runs")
    assert asked == [("pretrain", 40, 3, tmp_path, {"prop_share": 0.5})]
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"prop_share {share} is outside"):
            replace(settings, prop_share=share)
    assert cards._held({"prop_share": 0.25}) == ", with a prop in 25%"
    assert cards._held({}) == cards._held({"prop_share": corpus.PROP_SHARE}) == ""


@pytest.mark.parametrize(
    ("model", "weigh"),
    [("unet", "head"), ("polish", "head"), ("decoder", "head"), ("props", "prop"), ("props_decoder", "prop")],
)
def test_the_last_trainings_alone_weigh_props(trained, tmp_path, monkeypatch, model, weigh):
    parts, held, seen = {part: trained(part) for part in pretrain.NEEDS[model]}, held_corpus(), []

    def spy(network, loss, budget, folder):
        seen.append(inspect.getclosurevars(loss).nonlocals["weights"])
        return 0.0

    for module in (prior_recipe, vae_recipe):
        monkeypatch.setattr(module, "fit", spy)
    pretrain.RECIPES[model](Budget(steps=1, batch_size=2, lr=1e-3), held, tmp_path, parts)
    wanted = getattr(vae_recipe, f"{weigh}_weights")(held)
    if "decoder" not in model:
        wanted = torch.nn.functional.avg_pool2d(wanted, 4)
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize(
    ("model", "parts", "options"),
    [
        ("unet", ["clip"], "unet needs --vae:"),
        ("unet", ["vae"], "unet needs --clip:"),
        ("details", ["clip"], "details needs --vae, --unet:"),
        ("finish", ["vae", "clip"], "finish needs --details:"),
        ("text", ["vae"], "text needs --clip:"),
        ("polish", ["vae", "clip", "details"], "polish needs --text, --finish:"),
        ("decoder", ["clip"], "decoder needs --vae:"),
        ("props", ["vae", "text"], "props needs --polish:"),
        ("props_decoder", ["vae"], "props_decoder needs --decoder:"),
        ("image_encoder", ["vae"], "image_encoder needs --clip:"),
    ],
)
def test_missing_parts_are_named_before_anything_is_rendered(tmp_path, model, parts, options):
    given = dict.fromkeys(parts, tmp_path)
    with pytest.raises(ValueError, match=options):
        pretrain.run(small(model), model, tmp_path / "out", tmp_path / "corpus", tmp_path / "runs", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_not_there_is_named_before_anything_is_rendered(tmp_path):
    arguments = (small("decoder"), "decoder", tmp_path / "out", tmp_path / "corpus", tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match=r"--vae: there is no folder .*nowhere"):
        pretrain.run(*arguments, vae=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


# --- What models share, and what they do not --------------------------------------------------------------


def test_the_subject_encoder_starts_from_clip_and_leaves_it_alone(trained, data, tmp_path, monkeypatch):
    clip = CLIPModel.from_pretrained(trained("clip"), dtype=torch.float32)
    before, start = copied(clip), {}

    def spy(model, *rest):
        start.update(copied(model.tower))
        return fit(model, *rest)

    monkeypatch.setattr(clip_recipe, "fit", spy)
    tower, _ = clip_recipe.train_vision(small("image_encoder").budget, data, tmp_path, clip)
    assert equal(copied(clip), before)
    assert equal(start, {k: before[k] for k in start})
    assert any(k.startswith("visual_projection") for k in start)
    after = copied(tower)
    assert not any(torch.equal(v, start[k]) for k, v in after.items() if v.ndim > 1 and v.is_floating_point())


def test_captions_name_what_they_say_and_no_more():
    scenes = [corpus.scene("pretrain", i, 0, pair_share=0.5, prop_share=0.5) for i in range(60)]
    captions = [web_caption(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    targets = text_recipe.told(captions)
    assert set(targets) == set(text_recipe.CLASSES)
    assert targets.pop("people").tolist() == [len(s.identities) - 1 for s in scenes]
    said = 0
    for row, caption in enumerate(captions):
        named = {n: int(t[row]) for n, t in targets.items() if t[row] >= 0}
        facts = [*caption.facts["figures"], caption.facts["scene"]]
        assert len(named) == sum(len(f) for f in facts)
        for i, figure in enumerate(caption.facts["figures"]):
            assert all(ATTRIBUTES[n][named[f"{n}_{i}"]] == value for n, value in figure.items())
        said += len(named)
    assert said > 300
    assert any(len(s.identities) == 2 for s in scenes) and any(s.prop for s in scenes)


def test_loose_captions_are_in_words_of_their_own_and_state_their_facts(data):
    rng = np.random.default_rng(0)
    indices = rng.integers(len(data), size=200)
    trained = data.captions(indices, rng, 0.5)
    loose = data.captions(indices, rng, 0.5, loose_share=1.0)
    some = data.captions(indices, rng, 0.5, loose_share=0.3)
    assert all(c.spans for c in trained) and not any(c.spans for c in loose)
    assert 0.2 < np.mean([not c.spans for c in some]) < 0.4
    whole, less = (" ".join(c.text for c in captions) for captions in (trained, loose))
    assert less.count(",") < 0.5 * whole.count(",")
    assert len(less.split()) < 0.8 * len(whole.split())
    for caption, index in zip(loose, indices, strict=True):
        facts = caption.facts["figures"]
        assert len(facts) == len(data.scenes[index].identities)
        assert len(re.findall(r"\b(?:man|woman|person)\b", caption.text)) == len(facts)
        for figure in facts:
            assert figure.get("class", "person") in caption.text
            moods = EXPRESSIONS[figure["expression"]] if "expression" in figure else [""]
            assert any(mood in caption.text for mood in moods)


def test_the_text_tower_and_the_last_u_nets_alone_learn_from_loose_captions(
    trained, data, tmp_path, monkeypatch
):
    asked, captions = [], corpus.Corpus.captions

    def spy(self, indices, rng, web_share, loose_share=0.0):
        asked.append(loose_share)
        return captions(self, indices, rng, web_share, loose_share)

    monkeypatch.setattr(corpus.Corpus, "captions", spy)
    asking = ("details", "finish", "text", "polish", "props")
    parts = {part: trained(part) for model in asking for part in pretrain.NEEDS[model]}
    shares = {}
    for model in asking:
        asked.clear()
        pretrain.RECIPES[model](Budget(steps=1, batch_size=2, lr=1e-3), data, tmp_path / model, parts)
        [shares[model]] = asked
    assert shares == {"details": 0, "finish": 0, "text": 0.5, "polish": 0.2, "props": 0.2}


def test_the_text_tower_tells_apart_what_lay_together_and_hardly_moves(data, tmp_path):
    """Two words with one embedding, as sweater and shirt had nearly: only their captions' states may part."""
    torch.manual_seed(0)
    tower = models.text_encoder(models.clip())
    vocabulary, tokens = load_tokenizer().get_vocab(), tower.get_input_embeddings().weight
    with torch.no_grad():
        tokens[vocabulary["sweater</w>"]] = tokens[vocabulary["shirt</w>"]]

    def apart(a: str, b: str) -> float:
        states = encode_texts(tower, [f"a man in a blue {word}, sad" for word in (a, b)])
        return float((states[0] - states[1]).norm())

    assert apart("sweater", "shirt") == 0
    budget = Budget(steps=100, batch_size=16, lr=1e-3, warmup=1)
    text_recipe.train(budget, data, tmp_path, tower)
    assert apart("sweater", "shirt") > 5  # without the heads, rounding alone brings them 1 apart
    assert float(log(tmp_path)[-1]["moved"]) < 1  # states that have nothing in common differ by 2


def test_the_states_are_read_at_or_behind_the_end_of_a_caption(data, tmp_path, monkeypatch):
    seen = []

    def spy(self, ids, positions, targets):
        end = load_tokenizer().eos_token_id
        seen.extend(int(row[p]) == end for row, p in zip(ids, positions, strict=True))
        return real(self, ids, positions, targets)

    real = text_recipe.WithHeads.losses
    monkeypatch.setattr(text_recipe.WithHeads, "losses", spy)
    text_recipe.train(small("text").budget, data, tmp_path, models.text_encoder(models.clip()))
    assert len(seen) == 12 and all(seen)


def test_the_decoder_learns_and_latents_stay_as_they_are(trained):
    before, after = weights(trained("vae")), weights(trained("decoder"))
    assert before.keys() == after.keys()
    learns = {name for name in before if name.startswith(("decoder.", "post_quant_conv."))}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed <= learns
    assert len(changed) > 0.9 * len(learns)


def test_the_judge_of_prompts_shares_nothing_with_the_prior(trained):
    """Not even its first random numbers: matrices of the same shape are unlike one another."""
    ours, judges = ({k: v.float() for k, v in weights(trained(m)).items()} for m in ("clip", "clip_judge"))
    compared = 0
    for name, a in ours.items():
        for b in judges.values():
            if a.ndim > 1 and a.shape == b.shape:
                assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.3, name
                compared += 1
    assert compared > 50


# --- The prior in one piece, and its card -----------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(trained, tmp_path_factory):
    """A folder as it is shipped, with gates of made-up values."""
    folder = tmp_path_factory.mktemp("weights")
    pretrain.assemble(**{part: trained(part) for part in PRIOR}, prior=folder / "prior")
    for name in cards.ABOUT:
        if name != "prior":
            shutil.copytree(trained(name), folder / name)
    rows = [(gate, "goodness", 0.5 + n / 100, 0.9, 40 + n) for n, gate in enumerate(GATES)]
    gates.write(rows, folder / "gates.csv")
    return folder


GATES = (
    "identity",
    "mean colours",
    "image_encoder",
    "segmenter",
    "captioner",
    "clip_judge",
    "attributes",
    "autoencoder",
    "prior",
)


def test_the_prior_is_made_of_its_parts(trained, shipped):
    prior = StableDiffusionPipeline.from_pretrained(shipped / "prior", dtype=torch.float32)
    assert equal(weights(shipped / "prior/vae"), weights(trained("props_decoder")))
    assert equal(weights(shipped / "prior/unet"), weights(trained("props")))
    autoencoders = ("vae", "decoder", "props_decoder")
    factors = {AutoencoderKL.load_config(trained(part))["scaling_factor"] for part in autoencoders}
    assert factors == {prior.vae.config.scaling_factor} != {models.vae().config.scaling_factor}
    text = weights(shipped / "prior/text_encoder")
    assert len(text) > 30
    assert equal(text, weights(trained("text")))
    for part in PRIOR:
        for file in ("recipe.json", "log.csv"):
            assert (shipped / "prior" / f"{part}-{file}").read_text() == (trained(part) / file).read_text()


def test_cards_tell_recipe_and_gates(shipped, data):
    cards.run(shipped, shipped / "gates.csv")
    texts = {name: (shipped / name / "README.md").read_text() for name in cards.ABOUT}
    for name, text in texts.items():
        assert f"# Miniature: {name}\n" in text
        parts = PRIOR if name == "prior" else (name,)
        for part in parts:
            budget = small(part).budget
            assert re.search(rf"\*\*{part}\*\*: [\d,]+ parameters; 3 steps of 4 pictures", text)
            optimizer = {"adamw": ", AdamW", "muon": ", Muon and AdamW"}[budget.optimizer]
            assert f"{optimizer} at {budget.lr:g} (cosine), weight decay {budget.weight_decay:g}" in text
            assert f"EMA {budget.ema:g}, seed {budget.seed}" in text
            log = f"{part}-log.csv" if name == "prior" else "log.csv"
            assert f"`{log}`" in text and (shipped / name / log).exists()
        assert text.count(data.sha256[:16]) == len(parts)
    for n, gate in enumerate(GATES):
        row = f"| {gate} | goodness | {0.5 + n / 100:.4f} | 0.9 | no | {40 + n} |"
        owners = [name for name, text in texts.items() if row in text]
        assert len(owners) == 1, gate


def test_shipped_weights_are_halves_and_fit_into_the_repository():
    """40 MB of safetensors altogether: every version of them stays in the history."""
    files = sorted((ROOT / "moa/miniature/weights").rglob("*.safetensors"))
    assert len(files) >= len(cards.ABOUT)
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = tensors.keys()
            kinds = {tensors.get_slice(name).get_dtype() for name in names}
        assert kinds <= {"F16", "I64"}, file
    assert sum(file.stat().st_size for file in files) <= 40_000_000


def test_a_missing_model_is_named(shipped, tmp_path):
    for name in ("prior", "image_encoder", "captioner"):
        shutil.copytree(shipped / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"segmenter is missing: .*snakemake pretrain"):
        cards.run(tmp_path, shipped / "gates.csv")
