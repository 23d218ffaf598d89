"""Methods: one image does not depend on the next; what is trained is what is loaded; floors are floors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moa.baselines.fastcomposer import FastComposer, FastComposerMethod
from moa.methods import (
    METHODS,
    MethodConfig,
    Request,
    Sampling,
    Subject,
    build,
    method_names,
    register,
    wrong_subjects,
)
from moa.prompts import FuseMLP
from moa.sampling import initial_latents, load_image_encoder, load_prior
from moa.training import fastcomposer, moa
from tests.training import tiny

SAMPLING = Sampling(steps=4, guidance=2.0, batch_size=4)
POOL = tuple(tiny.subject(n, ("man", "woman")[n % 2]) for n in range(6))


@pytest.fixture(scope="module")
def config(models, shards, subjects, tmp_path_factory) -> MethodConfig:
    """Both trainees after a few strong steps, so that subjects matter."""
    folder = tmp_path_factory.mktemp("train")
    settings = tiny.config(models, steps=6, lr=3e-2, p_drop=0.0)
    moa.run(settings, shards, subjects, folder / "moa")
    fastcomposer.run(replace(settings, lr=3e-3), shards, subjects, folder / "fastcomposer")
    return MethodConfig(*models, trained=folder, sampling=SAMPLING, pool=POOL)


def make(config: MethodConfig, name: str, **sampling: object):
    assert config.trained is not None
    kind = "fastcomposer" if name == "fastcomposer" else "moa"
    trained = None if name == "prior" else config.trained / kind
    return build(name, replace(config, trained=trained, sampling=replace(config.sampling, **sampling)))


def request(prompt: str, people: Sequence[Subject], seed: int = 0) -> Request:
    spans, at = [], 0
    for person in people:
        at = prompt.index(person.word, at)
        spans.append((at, at + len(person.word)))
        at += 1
    return Request(prompt, tuple(spans), tuple(people), seed)


REQUESTS = [
    request("a man in a red hat", [POOL[0]], 1),
    request("a blue hat", [], 2),
    request("a man and a woman in red", [POOL[2], POOL[1]], 3),
    request("a woman in blue", [POOL[3]], 4),
    request("a man in a red hat", [POOL[4]], 1),
]


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(i).astype(int) for i in images])


@pytest.mark.parametrize("name", ["prior", "moa", "moa_wrong_subject", "fastcomposer"])
def test_an_image_does_not_depend_on_its_neighbours(name, config):
    together = pixels(make(config, name).generate(REQUESTS))
    alone = pixels(make(config, name, batch_size=1).generate(REQUESTS[::-1]))[::-1]
    assert together.shape == (5, 32, 32, 3)
    assert np.abs(together - alone).max() <= 1
    same = np.abs(together[0] - together[4]).max() == 0
    assert same == (name == "prior")  # only the prior does not see that the subject is another


@pytest.mark.parametrize("name", ["prior", "moa", "fastcomposer"])
def test_seeds_decide(name, config):
    method = make(config, name)
    one, again, other = (method.generate([replace(REQUESTS[0], seed=s)])[0] for s in (7, 7, 8))
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_noise_comes_from_the_seed_alone():
    shape = (4, 8, 8)
    both = initial_latents([5, 2**62], shape)
    assert torch.equal(both[1:], initial_latents([2**62], shape))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("scheduler", ["unipc", "ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_every_scheduler_runs_with_and_without_guidance(scheduler, guidance, config):
    for name in ("moa", "fastcomposer"):
        assert len(make(config, name, scheduler=scheduler, guidance=guidance).generate(REQUESTS[:2])) == 2


def test_wrong_subjects_are_others_of_the_same_word():
    people = {s.id: s for s in POOL}
    swapped = {s.id: wrong_subjects([s], POOL)[0] for s in POOL}
    assert all(swapped[i].id != i and swapped[i].word == people[i].word for i in people)
    assert len({s.id for s in swapped.values()}) == len(POOL)  # each stands in for exactly one other
    for one in POOL:
        for other in POOL:
            if one.id == other.id:
                continue
            pair = wrong_subjects([one, other], POOL) if one.word != other.word else None
            assert pair is None or not {s.id for s in pair} & {one.id, other.id}
    assert wrong_subjects([POOL[0]], POOL[::-1]) == wrong_subjects([POOL[0]], POOL)
    with pytest.raises(ValueError, match="no other 'woman'"):
        wrong_subjects([POOL[1]], POOL[:3])


def test_wrong_subject_is_moa_with_that_subject(config):
    wrong = make(config, "moa_wrong_subject").generate(REQUESTS[:1])[0]
    exchanged = replace(REQUESTS[0], subjects=wrong_subjects(REQUESTS[0].subjects, POOL))
    assert wrong.tobytes() == make(config, "moa").generate([exchanged])[0].tobytes()


def test_moa_options_reach_the_sampler(config):
    plain = pixels(make(config, "moa").generate(REQUESTS[:1]))
    fixed = pixels(make(config, "moa", personalize_below=0).generate(REQUESTS[:1]))
    prior = pixels(make(config, "prior").generate(REQUESTS[:1]))
    null = pixels(make(config, "moa", null_branch="prior").generate(REQUESTS[:1]))
    sparse = pixels(make(config, "moa", sparse_threshold=0.999).generate(REQUESTS[:1]))
    assert np.abs(sparse - prior).max() <= 1
    assert np.abs(fixed - prior).max() <= 1
    assert np.abs(plain - prior).max() > 1
    assert np.abs(null - plain).max() > 0


def test_delayed_conditioning_leaves_the_first_steps_to_the_text(config):
    never, always = (pixels(make(config, "fastcomposer", alpha=a).generate(REQUESTS)) for a in (0.0, 1.0))
    half = pixels(make(config, "fastcomposer", alpha=0.5).generate(REQUESTS))
    alone = [make(config, "fastcomposer", alpha=0.0).generate([REQUESTS[i]])[0] for i in (0, 4)]
    assert alone[0].tobytes() == alone[1].tobytes()  # the subject was never seen
    assert np.abs(always[0] - always[4]).max() > 0
    assert np.abs(half - never)[0].max() > 0
    assert np.abs(half - always)[0].max() > 0
    assert np.abs(always[1] - never[1]).max() == 0  # a prompt without subjects


def test_untrained_fastcomposer_without_subject_is_the_prior(models):
    pipe = load_prior(models[0])
    encoder, processor = load_image_encoder(models[1])
    prior = build("prior", MethodConfig(*models, sampling=SAMPLING)).generate(REQUESTS[1:2])
    model = FastComposer(pipe.unet, encoder)
    made = FastComposerMethod(pipe, model, processor, SAMPLING).generate(REQUESTS[1:2])
    assert prior[0].tobytes() == made[0].tobytes()


def test_fusion_changes_the_subjects_tokens_alone(models):
    pipe = load_prior(models[0])
    model = FastComposer(pipe.unet, load_image_encoder(models[1])[0])
    text, tokens = torch.randn(3, 16, 16), torch.tensor([[2, 5], [3, 0], [4, 7]])
    slots = torch.tensor([[0, 0], [0, 1], [2, 1]])
    fused = model.fuse(text, tokens, slots, torch.randn(3, 12))
    changed = (fused != text).any(-1).nonzero().tolist()
    assert changed == [[0, 2], [0, 5], [2, 7]]
    assert sum(p.numel() for p in FuseMLP(1536, 768).parameters()) == 2_958_336  # as FastComposer's


def test_parameters_are_counted(config):
    assert make(config, "prior").trained_parameters() == 0
    assert 0 < make(config, "moa").trained_parameters() < 100_000
    fast = make(config, "fastcomposer")
    assert fast.trained_parameters() > sum(p.numel() for p in fast.pipe.unet.parameters())


@pytest.mark.parametrize("name", ["moa", "fastcomposer"])
def test_missing_and_broken_weights_are_named(name, config, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"config\.json is missing.*train-{name}"):
        build(name, replace(config, trained=tmp_path))
    folder = tmp_path / name
    folder.mkdir()
    for file in (config.trained / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{name}.*broken.*again"):
        build(name, replace(config, trained=folder))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*again"):
        build(name, replace(config, trained=folder))


def test_missing_and_broken_models_are_named(models, tmp_path):
    for role, source in zip(("prior", "image_encoder"), models, strict=True):
        folder = tmp_path / role
        for file in Path(source.id).rglob("*"):
            if file.is_file():
                (folder / file.relative_to(source.id)).parent.mkdir(parents=True, exist_ok=True)
                (folder / file.relative_to(source.id)).write_bytes(file.read_bytes())
        weights = folder / {"prior": "unet/diffusion_pytorch_model", "image_encoder": "model"}[role]
        weights = weights.with_suffix(".safetensors")
        load = {"prior": load_prior, "image_encoder": load_image_encoder}[role]
        weights.write_bytes(weights.read_bytes()[:-10])
        with pytest.raises(ValueError, match=rf"{role}: .*broken.*models\.{role}"):
            load(tiny.ModelSource(str(folder)))
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{role}: cannot load.*models\.{role}"):
            load(tiny.ModelSource(str(folder)))


def test_the_register_refuses_what_it_does_not_know(config):
    assert {"prior", "moa", "moa_wrong_subject", "fastcomposer", "ceiling"} <= set(method_names())
    with pytest.raises(ValueError, match="unknown method 'elite'; choose one of ceiling, fastcomposer, moa"):
        build("elite", config)
    with pytest.raises(ValueError, match="registered already"):
        register("prior")(METHODS["prior"])
    with pytest.raises(ValueError, match="pool"):
        build("moa_wrong_subject", replace(config, pool=()))


def test_requests_are_checked():
    with pytest.raises(ValueError, match="1 subjects need as many spans"):
        Request("a man", (), (POOL[0],), 0)
    with pytest.raises(ValueError, match="outside the prompt"):
        Request("a man", ((2, 9),), (POOL[0],), 0)
    with pytest.raises(ValueError, match="seed"):
        Request("a man", (), (), -1)
