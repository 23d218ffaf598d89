"""Textual Inversion: what is learned is what is loaded; subjects, shards and kills do not change it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from moa.baselines import textual_inversion as inversion
from moa.baselines.textual_inversion import Example, InversionConfig, TextualInversion
from moa.evaluation import samples
from moa.methods import MethodConfig, Request, Sampling, build
from moa.sampling import load_prior
from tests.training import tiny

SAMPLING = Sampling(steps=3, guidance=2.0, batch_size=4)
PEOPLE = {f"test-{n:04d}": tiny.subject(n, ("man", "woman")[n % 2]) for n in range(4)}
ONE, OTHER = PEOPLE["test-0000"], PEOPLE["test-0001"]


@pytest.fixture
def config(models) -> InversionConfig:
    return InversionConfig(
        models[0],
        steps=4,
        batch_size=2,
        lr=1e-2,
        log_every=3,
        templates=("a {subject}", "a {subject} in red"),
    )


def learn(config: InversionConfig, *subjects):
    """What the last one teaches after those before it, on one pipeline."""
    pipe = load_prior(config.prior)
    return [inversion.learn(pipe, subject, config) for subject in subjects][-1]


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_word_that_is_learned_is_the_word_that_is_loaded(config, tokens):
    """The exchange while learning gives what diffusers' own loader gives in a fresh prior."""
    pipe, fresh = load_prior(config.prior), load_prior(config.prior)
    vectors = torch.randn(tokens, tiny.WIDTH)
    inversion.add_words(pipe, {ONE.id: torch.zeros(tokens, tiny.WIDTH)})
    inversion.add_words(fresh, {OTHER.id: torch.ones(2, tiny.WIDTH), ONE.id: vectors})
    prompt = f"a {inversion.placeholder(ONE.id)} man in red"
    names = pipe.maybe_convert_prompt(inversion.placeholder(ONE.id), pipe.tokenizer).split()
    assert len(names) == tokens
    with inversion.in_place_of(pipe, pipe.tokenizer.convert_tokens_to_ids(names), vectors):
        found, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    expected, _ = fresh.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(found, expected)
    empty, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    assert not torch.allclose(empty, expected)


def test_learning_lowers_the_loss_and_leaves_the_prior_alone(config):
    settings = replace(config, steps=80, lr=5e-2, batch_size=8, templates=("a {subject}",))
    pipe = load_prior(config.prior)
    before = {
        f"{name}.{key}": value.clone()
        for name in ("unet", "vae", "text_encoder")
        for key, value in getattr(pipe, name).state_dict().items()
        if "token_embedding" not in key
    }
    vectors, losses = inversion.learn(pipe, ONE, settings)
    assert vectors.shape == (1, tiny.WIDTH) and len(losses) == 27
    after = {
        f"{name}.{key}": v for name in ("unet", "vae", "text_encoder")
        for key, v in getattr(pipe, name).state_dict().items()
    }  # fmt: skip
    assert all(torch.equal(value, after[key]) for key, value in before.items())

    def loss(of: torch.Tensor) -> float:
        """On noise that was not learned from."""
        fresh = load_prior(config.prior)
        inversion.add_words(fresh, {ONE.id: of})
        example = Example(fresh, ONE, replace(settings, seed=1))
        with torch.no_grad():
            return float(np.mean([example.loss().item() for _ in range(40)]))

    start = inversion.first_vectors(load_prior(config.prior), "man", 1)
    assert loss(vectors) < loss(start) - 1e-3


def test_a_gradient_that_is_no_number_stops_at_its_step(config, monkeypatch):
    loss, steps = Example.loss, []

    def spoiled(example):
        steps.append(example)
        return loss(example) * (float("nan") if len(steps) == 2 else 1.0)

    monkeypatch.setattr(Example, "loss", spoiled)
    with pytest.raises(
        FloatingPointError, match=r"gradient of test-0000 at step 1 is not finite: lower `lr`"
    ):
        learn(config, ONE)
    assert len(steps) == 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_noise_or_velocity(tmp_path, config, prediction):
    prior, _ = tiny.save_models(tmp_path, prediction)
    pipe = load_prior(prior)
    inversion.add_words(pipe, {ONE.id: torch.zeros(1, tiny.WIDTH)})
    example = Example(pipe, ONE, replace(config, batch_size=1, flip=0.0))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def unet(noisy, timesteps, text):
        seen.append((noisy, timesteps))
        return type("Output", (), {"sample": torch.zeros_like(noisy)})

    unet.dtype = torch.float32
    pipe.register_modules(unet=None)
    pipe.unet = unet
    example.posterior[:, 1] = 0
    loss = float(example.loss())
    alpha = example.scheduler.alphas_cumprod[seen[0][1]].item()
    latents = example.posterior[:1, 0] * pipe.vae.config.scaling_factor
    noise = (seen[0][0] - alpha**0.5 * latents) / (1 - alpha) ** 0.5
    target = noise if prediction == "epsilon" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents
    assert loss == pytest.approx(float((target**2).mean()), rel=1e-3)


def test_seeds_decide_and_neighbours_do_not(config):
    alone, _ = learn(config, OTHER)
    torch.testing.assert_close(learn(config, ONE, OTHER)[0], alone, rtol=0, atol=0)
    assert not torch.equal(learn(replace(config, seed=1), OTHER)[0], alone)
    assert not torch.equal(learn(config, replace(OTHER, image=ONE.image))[0], alone)


@pytest.fixture
def inputs(tmp_path, models) -> tuple[list[Path], Path]:
    """Requests of one and of two subjects, who are three of the four."""
    rows = []
    for members in (["test-0000"], ["test-0002", "test-0001"]):
        words = [PEOPLE[name].word for name in members]
        prompt = " and ".join(f"a {word}" for word in words)
        at = [prompt.index(f"a {word}") + 2 for word in words]
        rows.append(
            {
                "split": "test", "kind": "single" if len(members) == 1 else "multi",
                "subject": "+".join(members), "subjects": members, "words": words, "prompt_id": "x-00",
                "prompt_group": "x", "prompt": prompt,
                "spans": [[a, a + len(w)] for a, w in zip(at, words, strict=True)],
                "index": 0, "seed": 1, "path": f"test/{'+'.join(members)}.png",
            }
        )  # fmt: skip
    samples.write(tmp_path / "requests.parquet", rows, samples.REQUEST)
    return [tmp_path / "requests.parquet"], tiny.save_subjects(tmp_path / "subjects.parquet")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return inversion.load_words(folder, [])


def test_a_killed_run_and_shards_give_what_one_run_gives(config, inputs, tmp_path, monkeypatch):
    inversion.run(config, *inputs, tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    assert list(whole) and set(whole) == {"test-0000", "test-0001", "test-0002"}
    learned, real = [], inversion.learn

    def killed(pipe, subject, settings):
        if len(learned) == 1:
            raise KeyboardInterrupt
        learned.append(subject.id)
        return real(pipe, subject, settings)

    monkeypatch.setattr(inversion, "learn", killed)
    with pytest.raises(KeyboardInterrupt):
        inversion.run(config, *inputs, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(inversion, "learn", lambda p, s, c: learned.append(s.id) or real(p, s, c))
    inversion.run(config, *inputs, tmp_path / "again")
    assert learned == ["test-0000", "test-0001", "test-0002"]  # the first was not learned twice
    parts = [tmp_path / f"part-{n}" for n in range(2)]
    for n, part in enumerate(parts):
        inversion.run(config, *inputs, part, n, 2)
    inversion.join(parts, tmp_path / "joined")
    for name in ("again", "joined"):
        found = weights(tmp_path / name)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], value) for key, value in whole.items())
        files = [(tmp_path / folder / "config.json").read_bytes() for folder in ("whole", name)]
        assert files[0] == files[1]
        costs = [json.loads((tmp_path / folder / "train.json").read_text()) for folder in ("whole", name)]
        assert costs[0]["trained_parameters"] == costs[1]["trained_parameters"]
    assert not list((tmp_path / ".checkpoints").iterdir())


def test_the_folder_is_like_that_of_other_trainings(config, inputs, tmp_path):
    inversion.run(config, *inputs, tmp_path / "made")
    about = json.loads((tmp_path / "made/train.json").read_text())
    assert about["trained_parameters"] == 3 * tiny.WIDTH and about["config"]["seed"] == 0
    assert about["seconds"] > 0 and about["peak_memory_bytes"] > 2**20
    assert about["peak_gpu_bytes"] == 0
    rows = list(csv.DictReader((tmp_path / "made/log.csv").open()))
    assert [row["step"] for row in rows] == ["3", "4"]
    with pytest.raises(ValueError, match=r"shard 3 of 4 of 3 subjects; see the key shards\.subjects"):
        inversion.run(config, *inputs, tmp_path / "more", 3, 4)


@pytest.fixture
def settings(config, models, inputs, tmp_path) -> MethodConfig:
    inversion.run(replace(config, tokens=2, steps=2, lr=0.5), *inputs, tmp_path / "made")
    return MethodConfig(*models, trained=tmp_path / "made", sampling=SAMPLING)


def test_prompts_say_the_subjects_words(settings):
    method = build("textual_inversion", settings)
    assert isinstance(method, TextualInversion)
    pair = Request("a man and a woman in red", ((2, 5), (12, 17)), (PEOPLE["test-0002"], OTHER), 3)
    first, second = (inversion.placeholder(s.id) for s in pair.subjects)
    assert method.reworded(pair).prompt == f"a {first} man and a {second} woman in red"
    method.keep_word = False
    assert method.reworded(pair).prompt == f"a {first} and a {second} in red"
    assert method.trained_parameters() == 3 * 2 * tiny.WIDTH


def test_images_follow_their_subject_and_nothing_else(settings):
    method = build("textual_inversion", settings)
    nobody = Request("a blue hat", (), (), 2)
    same = Request("a man in red", ((2, 5),), (ONE,), 1)
    wanted = [same, nobody, replace(same, subjects=(PEOPLE["test-0002"],)), same]
    images = [np.asarray(image).astype(int) for image in method.generate(wanted)]
    alone = np.asarray(method.generate([same])[0]).astype(int)
    prior = build("prior", settings).generate([nobody])[0]
    assert np.abs(images[0] - alone).max() <= 1 and np.array_equal(images[0], images[3])
    assert np.abs(images[0] - images[2]).max() > 0
    assert np.abs(images[1] - np.asarray(prior).astype(int)).max() <= 1


def test_what_is_not_learned_missing_or_too_long_is_named(settings, config, tmp_path):
    method = build("textual_inversion", settings)
    for stranger in (PEOPLE["test-0003"], replace(ONE, image=OTHER.image)):
        with pytest.raises(ValueError, match=f"has not learned '{stranger.id}' from this photo"):
            method.generate([Request("a man", ((2, 5),), (stranger,), 0)])
    with pytest.raises(ValueError, match="but the prior reads 16: lower `tokens`"):
        method.generate([Request("a man" + " in red" * 6, ((2, 5),), (ONE,), 0)])
    with pytest.raises(ValueError, match="lower `tokens`"):
        learn(replace(config, tokens=12), ONE)
    with pytest.raises(ValueError, match=r"init_word: ' ' is no word"):
        learn(replace(config, init_word=" "), ONE)
    file = next(settings.trained.glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"textual_inversion: .*broken.*learn again"):
        build("textual_inversion", settings)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"textual_inversion: .* lacks test-000\d; learn again"):
        build("textual_inversion", settings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0"), ({"tokens": 0}, "tokens is 0"), ({"lr": 0.0}, r"lr \(0.0\) must be"),
        ({"flip": 1.5}, "probability"), ({"templates": ()}, "at least one"),
        ({"templates": ("a man",)}, r"'a man' lacks the placeholder \{subject\}"),
    ],
)  # fmt: skip
def test_settings_are_checked(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **wrong)
