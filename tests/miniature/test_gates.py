"""The gates tell good models from bad ones: measured on judges whose answers are known."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from moa.evaluation.persons import Persons
from moa.miniature import corpus, gates, models
from moa.miniature.annotation import read_facts
from moa.miniature.captions import caption, task_caption
from moa.miniature.gates import PROMPT, GatesConfig
from moa.miniature.recipes.clip import changed
from moa.miniature.recipes.judges import FIGURE_ATTRIBUTES
from moa.miniature.render import render
from moa.miniature.world import (
    ATTRIBUTES,
    CONTEXT_ATTRIBUTES,
    HAIR_COLORS,
    IDENTITY_ATTRIBUTES,
    PROPS,
    SKINS,
    Scene,
    identities,
    labels,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus.load("validation", 40, 1, tmp_path_factory.mktemp("corpus"), prop_share=0.2)


def rows_of(rows):
    """Value by measure."""
    return {measure: value for _, measure, value, _, _ in rows}


def known(images, scenes):
    """A look-up of scenes by their pixels."""
    table = {image.tobytes(): scene for image, scene in zip(images, scenes, strict=True)}
    return lambda picture: table[np.asarray(picture).tobytes()]


# --- Identity ---------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Ten people instead of 120."""
    people = identities("validation")[55:65]
    monkeypatch.setattr(gates, "identities", lambda split: people)
    return people


class Embedder:
    """Gives the vectors of `answers`: for the gallery, the probes and those who differ in one attribute."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def embed(self, crops):
        self.asked.append(len(crops))
        return self.answers[len(self.asked) - 1]


def test_identity_of_a_perfect_a_blind_and_a_fooled_judge(few):
    one = np.eye(10)
    perfect = Embedder(one, one, np.roll(one, 1, axis=0))
    rows = gates.measure_identity("identity", perfect, 0, True)
    assert rows == [
        ("identity", "R@1", 1.0, 0.85, 10),
        ("identity", "AUC, one attribute apart", 1.0, 0.95, 10),
    ]
    assert perfect.asked == [10, 10, 10]
    blind = rows_of(gates.measure_identity("x", Embedder(*[np.ones((10, 2))] * 3), 0, False))
    assert blind == {"R@1": 0.1, "AUC, one attribute apart": 0.5}
    fooled = Embedder(one, np.roll(one, 1, axis=0), one)
    assert rows_of(gates.measure_identity("x", fooled, 0, False)) == {
        "R@1": 0.0,
        "AUC, one attribute apart": 0.0,
    }


def test_identity_compares_photos_of_the_people_and_of_near_doubles(few, monkeypatch):
    shown = []
    monkeypatch.setattr(gates, "_photo", lambda person, rng: shown.append(person))
    gates.measure_identity("x", Embedder(*[np.eye(10)] * 3), 0, True)
    assert shown[:20] == [*few, *few]
    for double, person in zip(shown[20:], few, strict=True):
        apart = [n for n, value in double.attributes.items() if value != person.attributes[n]]
        assert len(apart) == 1


def test_auc_is_mann_whitneys():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 6, 31) + 1, rng.integers(0, 6, 17)  # with ties
    expected = mannwhitneyu(positive, negative).statistic / (31 * 17)
    assert gates.auc(positive, negative) == pytest.approx(expected)
    assert gates.auc(negative, positive) == pytest.approx(1 - expected)


def test_a_probe_finds_what_a_linear_classifier_can():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    linear = features @ torch.randn(6, 3, generator=generator)
    classes = linear.argmax(1)
    assert (gates.probe(features[:300], classes[:300], features[300:]) == classes[300:]).float().mean() > 0.9
    chance = torch.randint(3, (400,), generator=generator)
    assert (gates.probe(features[:300], chance[:300], features[300:]) == chance[300:]).float().mean() < 0.5


def test_the_subject_encoder_is_probed_for_who_somebody_is(data, tmp_path, monkeypatch):
    """An encoder whose embedding is the skin's colour, in a world of its own, and nothing else."""
    skins = torch.eye(len(SKINS))[torch.from_numpy(data.labels(0)["skin"])]
    everyone = {image.tobytes(): skin for image, skin in zip(data.images, skins, strict=True)}

    def processor(images, return_tensors):
        return {"pixel_values": torch.stack([everyone[np.asarray(i).tobytes()] for i in images])}

    def encoder(pixels):
        return SimpleNamespace(image_embeds=pixels)

    monkeypatch.setattr(gates, "load_image_encoder", lambda source: (encoder, processor))
    rows = gates.measure_image_encoder(None, data, data)
    found = rows_of(rows)
    assert {gate for gate, *_ in rows} == {"image_encoder"}
    assert found["linear probe: skin"] == 1.0
    assert found["linear probe: top"] < 0.5
    assert {count for *_, count in rows} == {len(gates._singles(data))}


# --- Attributes -------------------------------------------------------------------------------------------


class Brightness:
    """A classifier that says value 1 of every attribute of a bright picture, and value 0 of a dark one."""

    def __init__(self):
        self.sizes: list[tuple[int, ...]] = []

    def eval(self):
        return self

    def __call__(self, pixel_values):
        self.sizes.append(tuple(pixel_values.shape))
        bright = (pixel_values.mean(dim=(1, 2, 3)) > 0).long()
        parts = [torch.nn.functional.one_hot(bright, len(values)) for values in ATTRIBUTES.values()]
        return SimpleNamespace(logits=torch.cat(parts, dim=1).float())


def test_figures_are_judged_by_their_boxes_and_backgrounds_by_the_picture(monkeypatch, tmp_path):
    model = Brightness()
    monkeypatch.setattr(gates.AutoModelForImageClassification, "from_pretrained", lambda *a, **k: model)
    judge = gates.AttributeJudge(tmp_path)
    images = np.zeros((70, 64, 64, 3), np.uint8)
    images[::2, :, :24] = 255  # a bright figure in a dark picture, and the other way round
    images[1::2, :, 24:] = 255
    found = judge(list(images), [(0, 10, 24, 64)] * 70)
    even = np.arange(70) % 2
    for name in ATTRIBUTES:
        figure = name in FIGURE_ATTRIBUTES
        assert np.array_equal(found[name], 1 - even if figure else even), name
    assert {n for n in ATTRIBUTES if n not in FIGURE_ATTRIBUTES} == {"background", "background_color"}
    assert {size[1:] for size in model.sizes} == {(3, 96, 96)}


class Knowing:
    """Reads the labels of pictures that it knows, and is wrong about all others."""

    def __init__(self, scene: Callable[[object], Scene], wrong: str | None = None):
        self.scene, self.wrong = scene, wrong

    def __call__(self, images: Sequence[np.ndarray], boxes: Sequence[object]):
        assert len(images) == len(boxes)
        rows = []
        for image in images:
            try:
                rows.append(labels(self.scene(image)))
            except KeyError:
                rows.append(dict.fromkeys(ATTRIBUTES, -1))
        found = {name: np.array([row[name] for row in rows]) for name in ATTRIBUTES}
        if self.wrong:
            found[self.wrong] = found[self.wrong] * 0 - 1
        return found


class Autoencoder:
    """Gives pictures back as they are, or grey."""

    def __init__(self, kept: float):
        self.kept = kept

    def encode(self, x):
        assert x.shape[1:] == (3, 64, 64) and x.min() >= -1 and x.max() <= 1
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

    def decode(self, latents):
        return SimpleNamespace(sample=latents * self.kept)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_autoencoder_keeps_everything_or_nothing(data):
    singles = gates._singles(data)
    assert 5 < len(singles) < 40
    assert all(len(data.scenes[i].identities) == 1 and data.scenes[i].prop is None for i in singles)
    judge = Knowing(known(data.images, data.scenes), wrong="glasses")
    for kept in (1.0, 0.0):
        rows = gates.measure_autoencoder(judge, SimpleNamespace(vae=Autoencoder(kept)), data)
        values = {(gate, measure): value for gate, measure, value, _, _ in rows}
        assert {count for *_, count in rows} == {len(singles)}
        for name in ATTRIBUTES:
            if name == "prop":
                assert ("attributes", "accuracy: prop") not in values
            elif name == "glasses":  # nothing can be kept of what is never seen
                assert values["attributes", "accuracy: glasses"] == 0.0
                assert np.isnan(values["autoencoder", "kept: glasses"])
            else:
                assert values["attributes", f"accuracy: {name}"] == 1.0
                assert values["autoencoder", f"kept: {name}"] == kept
        grey = np.full((64, 64, 3), 128.0)
        errors = [np.mean(((data.images[i] - grey) / 255) ** 2) for i in singles]
        expected = np.inf if kept else -10 * np.mean(np.log10(errors))
        assert values["autoencoder", "PSNR, dB"] == pytest.approx(expected)


# --- Annotators -------------------------------------------------------------------------------------------


class Finder:
    """Finds the first `most` figures of pictures that it knows."""

    def __init__(self, images, masks, most):
        self.masks, self.most = known(images, masks), most

    def __call__(self, images):
        found = []
        for image in images:
            mask = self.masks(image)
            figures = [mask == v for v in range(1, int(mask.max()) + 1)][: self.most]
            found.append(Persons(np.array(figures, bool).reshape(-1, 64, 64), np.ones(len(figures))))
        return found


@pytest.mark.parametrize("most", [2, 1, 0])
def test_segmenter_that_finds_all_one_or_nobody(data, most):
    counts = np.array([len(s.identities) for s in data.scenes])
    rows = gates.measure_segmenter(Finder(data.images, data.masks, most), data)
    found = np.minimum(counts, most)
    assert rows == [
        ("segmenter", "IoU", pytest.approx(found.sum() / counts.sum()), 0.9, counts.sum()),
        ("segmenter", "right number of people", pytest.approx(np.mean(found == counts)), None, 40),
    ]
    assert 0 < np.mean(counts == 1) < 1


@pytest.mark.parametrize("most", [2, 1, 0])
def test_detector_that_finds_all_one_or_nobody_and_sees_noise(data, most):
    """Figures are known by their pixels; somebody is seen wherever every pixel differs from its neighbour."""
    counts = np.array([len(s.identities) for s in data.scenes])
    known_pictures, finder = {image.tobytes() for image in data.images}, Finder(data.images, data.masks, most)

    def find(images):
        found = []
        for image in images:
            pixels = np.asarray(image)
            if pixels.tobytes() in known_pictures:
                found += finder([image])
            else:
                restless = (pixels[1:] != pixels[:-1]).any(axis=2).mean() > 0.99
                found.append(
                    Persons(np.ones((int(restless), *pixels.shape[:2]), bool), np.ones(int(restless)))
                )
        return found

    rows = gates.measure_detector(find, data, 0)
    assert {gate for gate, *_ in rows} == {"detector"}
    assert rows_of(rows) == {
        "recall, IoU above .5": pytest.approx(np.minimum(counts, most).sum() / counts.sum()),
        "somebody found in empty backgrounds": 0.0,
        "somebody found in shuffled patches": 0.0,
        "somebody found in noise": 1.0,
    }
    assert [count for *_, count in rows] == [counts.sum(), 40, 40, 40]


def test_garbage_shows_nobody(data):
    found = gates.garbage(data, 0)
    for scene, image, empty, cut in zip(
        data.scenes, data.images, found["empty backgrounds"], found["shuffled patches"], strict=True
    ):
        nobody = render(scene).mask == 0
        if scene.prop is None:
            assert (empty[nobody] == image[nobody]).all(axis=-1).mean() > 0.85  # but for the figures' edges
        assert (empty[~nobody] != image[~nobody]).any(axis=-1).mean() > 0.9
        assert not np.array_equal(cut, image)
        patches = [
            sorted(x[i : i + 8, j : j + 8].tobytes() for i in range(0, 64, 8) for j in range(0, 64, 8))
            for x in (cut, image)
        ]
        assert patches[0] == patches[1]


def test_segmenter_that_finds_half_of_everybody(data):
    finder = Finder(data.images, data.masks, 2)

    def half(images):
        people = finder(images)
        for person in people:
            person.masks[:, ::2] = False
        return people

    assert 0.4 < rows_of(gates.measure_segmenter(half, data))["IoU"] < 0.6


def test_captioner_that_says_all_one_thing_wrong_or_nothing(data):
    rng, scene_of = np.random.default_rng(0), known(data.images, data.scenes)

    def perfect(images):
        return [task_caption(scene_of(i), rng, PROMPT).text for i in images]

    def moody(images):
        scenes = [scene_of(i) for i in images]
        for figure in range(2):
            scenes = [
                changed(s, "expression", rng, figure) if figure < len(s.identities) else s for s in scenes
            ]
        return [task_caption(s, rng, PROMPT).text for s in scenes]

    rows = gates.measure_captioner(perfect, data)
    assert set(rows_of(rows).values()) == {1.0}
    measured = {f"{n}.{k}" for n in ("class", "prop", *CONTEXT_ATTRIBUTES) for k in ("named", "right")}
    assert set(rows_of(rows)) == measured | {"people.right"}
    assert all((goal == 0.9) == measure.endswith("right") for _, measure, _, goal, _ in rows)
    figures = sum(len(s.identities) for s in data.scenes)
    counts = {measure: count for _, measure, _, _, count in rows}
    assert counts["expression.right"] == figures and counts["background.right"] == 40

    wrong = rows_of(gates.measure_captioner(moody, data))
    assert wrong.pop("expression.right") == 0.0
    assert set(wrong.values()) == {1.0}
    silent = gates.measure_captioner(lambda images: ["a tree"] * len(images), data)
    assert rows_of(silent)["people.right"] == 0.0


def test_what_the_captioner_never_says_misses_its_goal(data, tmp_path):
    """A gate must not vanish from the table with the last caption that names its attribute."""
    silent = gates.measure_captioner(lambda images: ["a person"] * len(images), data)
    gates.write(silent, tmp_path / "gates.csv")
    with (tmp_path / "gates.csv").open() as file:
        rows = {row["measure"]: row for row in csv.DictReader(file)}
    for name in ("class", "prop", *CONTEXT_ATTRIBUTES):
        row = rows[f"{name}.right"]
        assert (row["value"], row["goal"], row["reached"], row["count"]) == ("nan", "0.9", "no", "0")


class Clip:
    """Vectors of what is seen and read of context attributes, times `sign`, but for those it is blind to."""

    def __init__(self, scene_of, blind=(), sign=1):
        self.scene_of, self.blind, self.sign = scene_of, blind, sign

    def vector(self, values):
        return np.concatenate(
            [[v == values[n] and n not in self.blind for v in ATTRIBUTES[n]] for n in CONTEXT_ATTRIBUTES]
        ).astype(float)

    def image_features(self, images):
        found = (labels(self.scene_of(i)) for i in images)
        return np.stack([self.vector({n: ATTRIBUTES[n][i] for n, i in row.items()}) for row in found])

    def text_features(self, prompts):
        facts = (read_facts(p) for p in prompts)
        return self.sign * np.stack([self.vector(figures[0] | scene) for figures, scene in facts])


def test_clip_judge_that_sees_all_but_one_or_prefers_the_wrong(data):
    scene_of = known(data.images, data.scenes)
    rows = gates.measure_clip_judge(Clip(scene_of), data, 0)
    assert rows == [
        ("clip_judge", f"prefers the right {n}", 1.0, 0.9, len(gates._singles(data)))
        for n in CONTEXT_ATTRIBUTES
    ]
    blind = rows_of(gates.measure_clip_judge(Clip(scene_of, blind=("expression",)), data, 0))
    assert blind.pop("prefers the right expression") == 0.0  # a tie is no preference
    assert set(blind.values()) == {1.0}
    wrong = gates.measure_clip_judge(Clip(scene_of, sign=-1), data, 0)
    assert set(rows_of(wrong).values()) == {0.0}


# --- Prior ------------------------------------------------------------------------------------------------

SETTINGS = GatesConfig(generated=10, steps=2, guidance=1.5, seed=3)


class Pipeline:
    """Draws the pictures it is given, one after another, whatever the prompts are."""

    def __init__(self, pictures):
        self.pictures, self.prompts, self.seeds = list(pictures), [], []

    def __call__(self, prompts, num_inference_steps, guidance_scale, generator, output_type):
        assert (num_inference_steps, guidance_scale, output_type) == (2, 1.5, "np")
        drawn, self.pictures = self.pictures[: len(prompts)], self.pictures[len(prompts) :]
        self.prompts += prompts
        self.seeds += [g.initial_seed() for g in generator]
        return SimpleNamespace(images=np.stack(drawn) / 255)


def test_prior_that_draws_what_is_named_or_nothing():
    scenes = [corpus.scene("validation", i, 77, 0.0, 0.0) for i in range(10)]
    scenes += [corpus.scene("validation", i, 78, 1.0, 0.0) for i in range(5)]
    rendered = [render(s) for s in scenes]
    images = [r.image for r in rendered]
    judge = Knowing(known(images, scenes))
    finder = Finder(images, [r.mask for r in rendered], 2)

    pipeline = Pipeline([*images, *images[10:]])
    rows, pictures = gates.measure_prior(pipeline, judge, finder, SETTINGS)
    assert set(rows_of(rows).values()) == {1.0}
    drawn = {f"drawn as named: {n}" for n in ("class", *CONTEXT_ATTRIBUTES)}
    people = {"one person where one is named", "two people where two are named"}
    assert set(rows_of(rows)) == drawn | people | {"two people where two are named loosely"}
    assert np.array_equal(pictures, np.stack([*images, *images[10:]]))
    prompts, loose = pipeline.prompts[:15], pipeline.prompts[15:]
    for prompt, scene in zip(prompts, scenes, strict=True):
        said, background = read_facts(prompt)
        assert [f["class"] for f in said] == [i.class_word for i in scene.identities]
        assert background["background"] == scene.context.background
    assert all(len(re.findall(r"\b(?:wo)?man\b|\bperson\b", prompt)) == 2 for prompt in loose)
    assert pipeline.seeds == [*range(300_000, 300_010), *range(300_000, 300_005), *range(300_000, 300_005)]

    empty = np.zeros((64, 64, 3), np.uint8)
    nobody = Finder([empty], [np.zeros((64, 64), int)], 2)
    rows, _ = gates.measure_prior(Pipeline([empty] * 20), judge, nobody, SETTINGS)
    assert set(rows_of(rows).values()) == {0.0}


def test_one_person_for_loose_words_misses_that_gate_alone():
    """What the gates did not see once: two for "a man, smiling, and a man, sad", one without the commas."""
    singles = [corpus.scene("validation", i, 77, 0.0, 0.0) for i in range(10)]
    pairs = [corpus.scene("validation", i, 78, 1.0, 0.0) for i in range(5)]
    rendered = [render(s) for s in (*singles, *pairs)]
    images = [r.image for r in rendered]
    finder = Finder(images, [r.mask for r in rendered], 2)
    judge = Knowing(known(images, [*singles, *pairs]))
    rows, _ = gates.measure_prior(Pipeline([*images, *images[:5]]), judge, finder, SETTINGS)
    missed = [(measure, value) for _, measure, value, goal, _ in rows if goal and value < goal]
    assert missed == [("two people where two are named loosely", 0.0)]


def test_what_naming_looks_saves_is_the_difference_of_masked_losses(data):
    """A U-Net whose error is 1 everywhere without looks and none with them saves the mask's mean square."""
    vae, text_encoder = models.vae(), models.text_encoder(models.clip())
    chosen = gates._singles(data)

    def texts(wording):
        return [caption(data.scenes[i], np.random.default_rng(i), wording).text for i in chosen]

    told = gates.encode_texts(text_encoder, texts(gates.LOOKS)).detach()
    alphas = models.scheduler().alphas_cumprod
    latents = gates.encode_latents(vae, data.images[chosen])

    def knowing(x, t, text):
        """v of the true latents: x = a z + s e, so v = a e − s z = (a x − z) / s."""
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        return SimpleNamespace(sample=(a * x - latents) / s + (0 if torch.equal(text, told) else 1))

    pipeline = SimpleNamespace(vae=vae, text_encoder=text_encoder, unet=knowing)
    rows = rows_of(gates.measure_decided(pipeline, data, 0))
    figures = (data.masks[chosen] > 0).reshape(len(chosen), 16, 4, 16, 4).mean((2, 4))
    assert rows == {
        f"loss saved by naming looks, t = {t}": pytest.approx(np.square(figures).mean(), rel=1e-4)
        for t in gates.TIMESTEPS
    }
    pipeline.unet = lambda x, t, text: knowing(x, t, told)  # deaf to words
    assert set(rows_of(gates.measure_decided(pipeline, data, 0)).values()) == {0.0}


def test_likeness_with_and_without_words_counts_the_unseen_as_unlike():
    scenes = [corpus.scene("validation", i, 79, 0.0, 0.0) for i in range(10)]
    rendered = [render(s) for s in scenes]
    images, masks = [r.image for r in rendered], [r.mask for r in rendered]
    masks[9] = np.zeros_like(masks[9])  # nobody is found in this picture
    pipeline = Pipeline(images * 2)
    same, half = np.eye(10), 0.5 * np.eye(10) + np.sqrt(0.75) * np.roll(np.eye(10), 1, axis=1)
    judge, finder = Knowing(known(images, scenes), wrong="glasses"), Finder(images, masks, 1)
    rows = gates.measure_likeness(pipeline, judge, Embedder(same, same, half), finder, SETTINGS)
    drawn = {f"drawn as named: {n}": float(n != "glasses") for n in IDENTITY_ATTRIBUTES}
    assert rows_of(rows) == pytest.approx({"IP, looks named": 0.9, "IP, looks not named": 0.45} | drawn)
    counts = {measure: count for _, measure, *_, count in rows}
    for attribute in ("glasses", "facial_hair"):  # nobody's prompt says that glasses or a beard are lacking
        worn = sum(getattr(s.identities[0], attribute) != "none" for s in scenes)
        assert 0 < counts[f"drawn as named: {attribute}"] == worn < 10
    assert counts["drawn as named: top"] == 10
    named, unnamed = pipeline.prompts[:10], pipeline.prompts[10:]
    for scene, with_looks, without in zip(scenes, named, unnamed, strict=True):
        looks = HAIR_COLORS[scene.identities[0].hair_color] + SKINS[scene.identities[0].skin]
        assert any(word in with_looks for word in looks)
        assert scene.identities[0].class_word in without
        assert not any(word in without for word in SKINS[scene.identities[0].skin])


def test_props_are_seen_kept_and_drawn_or_not():
    scenes = [corpus.scene("validation", i, 80, 0.0, 1.0) for i in range(10)]
    rendered = [render(s) for s in scenes]
    images = [r.image for r in rendered]
    judge, finder = Knowing(known(images, scenes)), Finder(images, [r.mask for r in rendered], 1)
    for kept in (1.0, 0.0):
        pipeline = Pipeline(images)
        pipeline.vae = Autoencoder(kept)
        rows = gates.measure_props(pipeline, judge, finder, SETTINGS)
        assert rows == [
            ("attributes", "accuracy: prop", 1.0, None, 10),
            ("autoencoder", "kept: prop", kept, 0.95, 10),
            ("prior", "drawn as named: prop", 1.0, 0.8, 10),
        ]
        assert all(
            any(word in p for word in PROPS[s.prop.kind])
            for p, s in zip(pipeline.prompts, scenes, strict=True)
        )
    blind = Knowing(known(images, scenes), wrong="prop")
    pipeline = Pipeline(images)
    pipeline.vae = Autoencoder(1.0)
    values = [value for _, _, value, *_ in gates.measure_props(pipeline, blind, finder, SETTINGS)]
    assert values == [0.0, pytest.approx(np.nan, nan_ok=True), 0.0]


def test_many_pictures_are_drawn_in_batches_with_a_seed_each():
    pictures = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), np.uint8)
    pipeline = Pipeline(pictures)
    assert np.array_equal(gates.draw(pipeline, [str(i) for i in range(70)], SETTINGS), pictures)
    assert pipeline.seeds == list(range(300_000, 300_070))


@pytest.mark.parametrize("count", [64, 30, 3])
def test_a_sheet_holds_every_picture(count):
    pictures = np.random.default_rng(0).integers(0, 255, (count, 64, 64, 3), np.uint8)
    sheet = gates.sheet(pictures)
    assert sheet.size == (128 * 8, 128 * -(-count // 8))
    for i, picture in enumerate(pictures):
        x, y = i % 8 * 128, i // 8 * 128
        shown = np.asarray(sheet.crop((x, y, x + 128, y + 128)).resize((64, 64), Image.Resampling.NEAREST))
        assert np.array_equal(shown, picture)


# --- The table --------------------------------------------------------------------------------------------


def test_goals_are_marked(tmp_path):
    rows = [
        ("a", "reached", 0.9, 0.9, 5),
        ("a", "missed", 0.8999, 0.9, 5),
        ("b", "no goal", 0.1, None, 6),
        ("b", "undefined", float("nan"), 0.9, 6),
    ]
    gates.write(rows, tmp_path / "gates.csv")
    with (tmp_path / "gates.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["reached"] for row in written] == ["yes", "no", "", "no"]
    assert written[0] == {
        "gate": "a", "measure": "reached", "value": "0.9000", "goal": "0.9", "reached": "yes", "count": "5"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["gates.csv"]
