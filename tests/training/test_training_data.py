"""What a training sample is follows from its index alone, and broken records are named."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from moa.data.errors import DataError
from moa.data.records import RECORD, encode_image, encode_mask, write_rows
from moa.sampling import load_prior
from moa.training.config import TrainConfig
from moa.training.dataset import Records, Sizes, batches, collate, keyed_seed
from moa.training.fastcomposer import FastComposerTrainee
from moa.training.moa import MoATrainee
from moa.training.trainee import FrozenPrior, union
from tests.training import tiny

SIZES = Sizes(image=32, latent=8, channels=4, crop=16)


def find_tokens(prompt, spans):
    return [prompt[:start].count(" ") + 1 for start, _ in spans]


def data(models, shards, **settings) -> Records:
    return Records(shards, tiny.config(models, **settings), SIZES, find_tokens)


def test_samples_follow_from_their_index(models, shards):
    one, other = data(models, shards), data(models, shards, cache=False)
    assert len(one) == 12
    for index in (0, 5, 30):
        first, second = one[index], other[index]
        for key in ("noise", "posterior_noise", "masks"):
            assert torch.equal(first[key], second[key])
        assert all(torch.equal(a, b) for a, b in zip(first["crops"], second["crops"], strict=True))
        assert [first[k] for k in ("index", "caption", "timestep")] == [
            second[k] for k in ("index", "caption", "timestep")
        ]
    assert not torch.equal(one[0]["noise"], one[12]["noise"])  # the same record may come again, its noise not
    assert sorted(one.number(i) for i in range(12)) == list(range(12))  # an epoch shows every record once
    assert [one.number(i) for i in range(12)] != [one.number(i) for i in range(12, 24)]


def test_timesteps_and_drops_have_their_rates(models, shards):
    records = data(models, shards, p_drop=0.25, keep_object=0.5, max_timestep=800)
    draws = [records.drops(i, 2) for i in range(4000)]
    assert np.mean([dropped for dropped, _ in draws]) == pytest.approx(0.25, abs=0.02)
    assert np.mean([kept for dropped, kept in draws if not dropped]) == pytest.approx(0.5, abs=0.02)
    assert not any(kept.any() for dropped, kept in draws if dropped)
    steps = [records[i]["timestep"] for i in range(600)]
    assert min(steps) < 40
    assert 760 < max(steps) < 800
    assert np.mean(steps) == pytest.approx(400, abs=40)


def test_cubic_timesteps_are_mostly_high_ones(models, shards):
    """t = (1 − u³) T: the mean is 3/4 T, and P(t < T/2) = 1 − (1/2)^(1/3)."""
    records = data(models, shards, max_timestep=800, timesteps="cubic")
    steps = np.array([records[i]["timestep"] for i in range(600)])
    assert steps.mean() == pytest.approx(600, abs=30)
    assert (steps < 400).mean() == pytest.approx(1 - 0.5 ** (1 / 3), abs=0.05)
    assert steps.min() >= 0
    assert 795 < steps.max() < 800
    zero = SimpleNamespace(random=lambda: 0.0)
    assert records._timestep(zero) == 799


def test_every_process_has_its_part_of_the_batch(models, shards):
    records = data(models, shards, batch_size=8, accumulation=2, steps=3)
    whole = list(data(models, shards, batch_size=8, steps=3).parts(0, 1, 0))
    for processes in (1, 2, 4):
        parts = [list(records.parts(0, processes, p)) for p in range(processes)]
        for step in range(3):
            indices = [i for own in parts for part in own[2 * step : 2 * step + 2] for i in part]
            assert indices == whole[step]
    assert list(records.parts(2, 2, 1)) == list(records.parts(0, 2, 1))[4:]
    with pytest.raises(ValueError, match="3 processes"):
        list(records.parts(0, 3, 0))


def test_shares_of_the_object_loss_sum_to_the_parts(models, shards):
    records = data(models, shards, batch_size=8, accumulation=4, steps=4, p_drop=0.4)
    found = list(batches(records, 0, 1, 0))
    for step in range(4):
        parts = found[4 * step : 4 * step + 4]
        with_subjects = [int(b.present.any(1).sum()) for b in parts]
        assert sum(b.object_share for b in parts) == pytest.approx(4)
        for batch, count in zip(parts, with_subjects, strict=True):
            assert batch.object_share == pytest.approx(4 * count / sum(with_subjects))


def test_masks_cover_what_the_id_map_says(models, shards):
    records = data(models, shards, p_drop=0.0)
    numbers = [records.number(i) for i in range(12)]
    batch = collate([records[i] for i in range(12)])
    two = batch.exists.all(1)
    assert two.any()
    assert not two.all()
    area = batch.masks.sum((2, 3)) / 64
    ids = [records.example(n).ids for n in numbers]
    for b, one in enumerate(ids):
        for s, segment in enumerate(records.example(numbers[b]).segments):
            assert float(area[b, s]) == pytest.approx((one == segment).mean(), abs=1e-6)
    assert float(union(batch.masks, batch.exists).max()) <= 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_targets_are_noise_or_velocity(prediction, models, shards, tmp_path):
    source, _ = tiny.save_models(tmp_path, prediction)
    prior = FrozenPrior(load_prior(source))
    records = data(models, shards)
    prior.fill(records)
    batch = collate([records[i] for i in range(4)])
    noisy, target = prior.diffuse(batch)
    latents = prior.latents(batch)
    alpha = prior.scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    assert torch.allclose(noisy, alpha.sqrt() * latents + (1 - alpha).sqrt() * batch.noise, atol=1e-5)
    velocity = alpha.sqrt() * batch.noise - (1 - alpha).sqrt() * latents
    assert torch.allclose(target, batch.noise if prediction == "epsilon" else velocity, atol=1e-5)


def test_dropped_samples_still_teach_moa_its_null_branch(models, shards):
    losses = {}
    for kind in (MoATrainee, FastComposerTrainee):
        config = tiny.config(models, p_drop=1.0)
        trainee = kind(config, "cpu")
        records = Records(shards, config, trainee.prior.sizes(16), trainee.prior.find_tokens)
        trainee.prior.fill(records)
        batch = next(batches(records, 0, 1, 0))
        assert batch.captions == [""] * 4
        assert not batch.present.any()
        losses[kind] = {name: loss.item() for name, loss in trainee(batch).items()}
    moa, fastcomposer = losses[MoATrainee], losses[FastComposerTrainee]
    assert moa["loss_masked"] > 0.01
    assert moa["loss_object"] == fastcomposer["loss_masked"] == 0  # FastComposer's masks go with its subjects


def test_seeds_differ_between_purposes():
    seeds = {keyed_seed(0, i, purpose) for i in range(100) for purpose in ("noise", "drop")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": []}, "00000.*has no subject"),
        ({"mask": encode_mask(np.zeros((32, 32), np.uint8))}, "00000: subject 'man' has no pixel"),
        ({"mask": encode_mask(np.ones((16, 16), np.uint8))}, "00000: mask"),
        (
            {
                "mask": encode_mask(np.eye(1, 64, dtype=np.uint8).repeat(32, 0)),
                "image": encode_image(np.zeros((32, 64, 3), np.uint8)),
            },
            "no pixel in the mask's middle square; make the records again with the stage align",
        ),
    ],
)
def test_broken_records_are_named(change, message, models, tmp_path):
    write_rows(tmp_path / "bad.parquet", [tiny.record(0) | change], RECORD)
    with pytest.raises(DataError, match=message):
        data(models, [tmp_path / "bad.parquet"])


def test_words_that_are_not_in_the_caption_are_named(models, tmp_path):
    segment = tiny.record(0)["segments"][0] | {"start": 90, "end": 93}
    write_rows(tmp_path / "bad.parquet", [tiny.record(0) | {"segments": [segment]}], RECORD)
    prior = FrozenPrior(load_prior(models[0]))
    with pytest.raises(DataError, match=r"record 00000.*outside the prompt 'a man in a red hat'"):
        Records([tmp_path / "bad.parquet"], tiny.config(models), SIZES, prior.find_tokens)


def test_words_are_checked_at_once_where_pictures_are_not(models, tmp_path):
    """A wrong word is no error of hours later; what the masks leave out is none at all."""
    rows = [tiny.record(n) for n in range(3)]
    rows[2]["segments"][0] |= {"start": 90, "end": 93}
    write_rows(tmp_path / "bad.parquet", rows, RECORD)
    prior = FrozenPrior(load_prior(models[0]))
    with pytest.raises(DataError, match=r"record 00002.*outside the prompt 'a woman in a blue hat'"):
        Records([tmp_path / "bad.parquet"], tiny.config(models, cache=False), SIZES, prior.find_tokens)
    crowd = tiny.record(1)
    crowd["segments"][1] |= {"start": 90, "end": 93, "segment_id": 3}
    write_rows(tmp_path / "crowd.parquet", [crowd], RECORD)
    few = tiny.config(models, cache=False, max_subjects=1)
    assert len(Records([tmp_path / "crowd.parquet"], few, SIZES, prior.find_tokens).example(0).tokens) == 1


def large(number: int) -> dict:
    """A record of a photo that cannot be compressed: 0.2 MB."""
    pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return tiny.record(number) | {
        "image": encode_image(pixels), "width": 256, "height": 256,
        "mask": encode_mask(np.indices((256, 256))[1] // 128 + 1),
    }  # fmt: skip


def test_photos_stay_on_disk_until_they_are_drawn(models, tmp_path):
    paths = [tmp_path / "one.parquet", tmp_path / "other.parquet"]
    for shard, path in enumerate(paths):
        write_rows(path, [large(4 * shard + n) for n in range(4)], RECORD)
    size = sum(path.stat().st_size for path in paths)
    config = tiny.config(models, cache=False)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    mapped = Records(paths, config, SIZES, find_tokens, tmp_path / "scratch")
    held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert held < 0.1 * size
    kept = Records(paths, config, SIZES, find_tokens)
    for number in range(8):
        one, other = mapped.example(number), kept.example(number)
        assert np.array_equal(one.image, other.image) and np.array_equal(one.ids, other.ids)
        assert replace(one, image=0, ids=0) == replace(other, image=0, ids=0)

    copies = {path: path.stat().st_mtime_ns for path in (tmp_path / "scratch").iterdir()}
    write_rows(paths[1], [large(9)], RECORD)
    again = Records(paths, config, SIZES, find_tokens, tmp_path / "scratch")
    assert [again.example(n).id for n in range(len(again))] == ["00000", "00001", "00002", "00003", "00009"]
    assert copies == {path: path.stat().st_mtime_ns for path in copies}  # made once
    with pytest.raises(DataError, match=r"gone\.parquet does not exist"):
        Records([tmp_path / "gone.parquet"], config, SIZES, find_tokens, tmp_path / "scratch")


def test_cut_and_missing_shards_are_named(models, shards, tmp_path):
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(shards[0].read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.parquet"):
        data(models, [cut])
    with pytest.raises(DataError, match=r"gone\.parquet does not exist"):
        data(models, [tmp_path / "gone.parquet"])


def test_settings_out_of_range_are_named(models):
    for setting, message in (({"p_drop": 1.5}, "p_drop"), ({"steps": 0}, "steps"), ({"ema": 1.0}, "ema")):
        with pytest.raises(ValueError, match=message):
            tiny.config(models, **setting)
    with pytest.raises(ValueError, match=r"\{word\}"):
        tiny.config(models, validation_prompts=("a man",))


def test_learning_rate_rises_and_falls(models):
    config: TrainConfig = tiny.config(models, steps=10, lr=1.0, lr_warmup=2, lr_decay="cosine")
    rates = [config.learning_rate(s) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert replace(config, lr_decay="none").learning_rate(9) == 1.0
