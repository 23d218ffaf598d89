"""The rendered data set: the same everywhere, splits apart, as mixed as asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from moa import stages
from moa.data.records import RAW, SUBJECT, TRUTH, decode_image, decode_mask, read_rows, sha256
from moa.miniature import dataset
from moa.miniature.dataset import RenderConfig, choose_subjects, draw_scene
from moa.miniature.render import render
from moa.miniature.world import Scene, identities

SMALL = RenderConfig(train=7, validation=3, shard_size=4, subjects_validation=4, subjects_test=5)


def rendered(config, split, shard, folder):
    paths = folder / "raw.parquet", folder / "truth.parquet"
    dataset.run(config, split, shard, *paths)
    return read_rows(paths[0], RAW), read_rows(paths[1], TRUTH)


def test_a_shard_is_the_same_file_every_time(tmp_path):
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rendered(SMALL, "train", 1, tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / "raw.parquet").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_photos_do_not_depend_on_the_shard_size(tmp_path):
    """Otherwise a cluster's larger shards would be another data set."""
    whole = rendered(replace(SMALL, shard_size=7), "train", 0, tmp_path)
    parts = [rendered(SMALL, "train", shard, tmp_path) for shard in (0, 1)]
    assert whole[0] == parts[0][0] + parts[1][0]
    assert whole[1] == parts[0][1] + parts[1][1]
    assert len({row["sha256"] for row in whole[0]}) == 7


def test_truth_belongs_to_its_photo(tmp_path):
    raw, truth = rendered(SMALL, "validation", 0, tmp_path)
    for photo, known in zip(raw, truth, strict=True):
        drawn = render(Scene.from_dict(json.loads(known["scene"])))
        assert photo["id"] == known["id"]
        assert np.array_equal(np.asarray(decode_image(photo["image"])), drawn.image)
        assert np.array_equal(decode_mask(known["mask"]), drawn.mask)
        assert photo["sha256"] == sha256(photo["image"]["bytes"])


def test_splits_show_their_own_identities():
    """A training face among the validation subjects would flatter every result."""
    for split in ("train", "validation"):
        shown = {i.id for n in range(40) for i in draw_scene(SMALL, split, n)[0].identities}
        assert shown <= {i.id for i in identities(split)}


def test_pairs_and_props_are_as_frequent_as_asked():
    scenes = [draw_scene(replace(SMALL, pairs=0.3, props=0.15), "train", n)[0] for n in range(600)]
    assert 0.24 < np.mean([len(s.identities) == 2 for s in scenes]) < 0.36
    assert 0.10 < np.mean([s.prop is not None for s in scenes]) < 0.20
    assert {len(draw_scene(replace(SMALL, pairs=0.0), "train", n)[0].identities) for n in range(20)} == {1}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_subjects_are_one_photo_of_one_person_each(split, tmp_path):
    dataset.run_subjects(SMALL, split, tmp_path / "s.parquet")
    rows = read_rows(tmp_path / "s.parquet", SUBJECT)
    known = {i.id: i for i in identities(split)}
    assert len({row["id"] for row in rows}) == (4 if split == "validation" else 5)
    assert all(row["word"] == known[row["identity"]].class_word for row in rows)
    assert [row["word"] for row in rows] == ["man", "woman", "man", "woman", "man"][: len(rows)]
    assert all(decode_image(row["image"]).size == (64, 64) for row in rows)


def test_hidden_photos_are_the_same_but_for_what_is_held(tmp_path):
    """Something is held before every subject, hides some of it, and leaves the rest as it is."""
    for occluded in (False, True):
        dataset.run_subjects(SMALL, "test", tmp_path / f"{occluded}.parquet", occluded)
    free, hidden = (read_rows(tmp_path / f"{occluded}.parquet", SUBJECT) for occluded in (False, True))
    assert [row["id"] for row in free] == [row["id"] for row in hidden]
    for identity in choose_subjects("test", 5):
        one, other = (dataset.subject_photo(SMALL, identity, occluded) for occluded in (False, True))
        gone = (one.mask > 0) & (other.mask == 0)
        assert 0.02 < gone.sum() / (one.mask > 0).sum() < 0.6
        changed = (one.image != other.image).any(axis=2)
        assert gone[changed].sum() > 0.5 * changed.sum() and changed.mean() < 0.35
        assert np.array_equal(one.image[~changed], other.image[~changed])


def test_test_subjects_include_held_out_attribute_pairs():
    """The first half of a class is novel in the test split; taking only the first would test nothing else."""
    men = [i.id for i in choose_subjects("test", 30) if i.class_word == "man"]
    pool = [i.id for i in identities("test") if i.class_word == "man"]
    places = [pool.index(name) / len(pool) for name in men]
    assert min(places) < 0.1
    assert max(places) > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dataset.run(SMALL, "train", 2, "r", "t"), r"shards 0\.\.1, not 2"),
        (lambda: dataset.run(SMALL, "test", 0, "r", "t"), "train and validation, not 'test'"),
        (lambda: dataset.run_subjects(SMALL, "train", "s"), "not of 'train'"),
        (lambda: choose_subjects("validation", 1000), "too few for 1000"),
        (lambda: RenderConfig(pairs=1.5), "pairs must be a share"),
        (lambda: RenderConfig(shard_size=0), "shard_size must be at least 1"),
    ],
)
def test_impossible_requests_say_what_is_possible(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_shard_is_drawn_with_the_settings_that_its_job_follows(tmp_path, split):
    """The workflow draws again when one of these changes, and has no others to give."""
    whole = {"seed": 3, "size": 32, "train": 5, "validation": 4, "shard_size": 3, "pairs": 0.9, "props": 0.8}
    whole |= {"subjects_validation": 2, "subjects_test": 4}
    config = {"render": whole}
    other = {"train": "validation", "validation": "train"}[split]
    read = stages.read_settings("render", config, split=split, shard="001")
    assert read == {k: v for k, v in whole.items() if k != other and not k.startswith("subjects")}
    for name, given in (("whole", whole), ("read", read)):
        paths = tmp_path / name, tmp_path / f"{name}-truth"
        dataset.run(dataset.RenderConfig(**given), split, 1, *paths)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "read").read_bytes()
    assert (tmp_path / "whole-truth").read_bytes() == (tmp_path / "read-truth").read_bytes()


def test_subjects_are_drawn_with_the_settings_that_their_job_follows(tmp_path):
    whole = {"seed": 3, "size": 32, "train": 5, "pairs": 0.9, "subjects_validation": 3, "subjects_test": 2}
    read = stages.read_settings("render-subjects", {"render": whole}, split="validation")
    assert read == {"seed": 3, "size": 32, "subjects_validation": 3}
    for name, given in (("whole", whole), ("read", read)):
        dataset.run_subjects(dataset.RenderConfig(**given), "validation", tmp_path / name)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "read").read_bytes()
