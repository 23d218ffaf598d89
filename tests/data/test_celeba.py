"""The protocol's test subjects: the right people, the same photos for ever, and errors with their cure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from moa import stages
from moa.config import read
from moa.data import celeba, held_out
from moa.data.errors import DataError
from moa.data.held_out import HeldOutConfig
from moa.data.records import RECORD, SUBJECT, encode_image, encode_mask, read_rows, sha256, write_rows
from moa.data.sources import listing
from moa.data.sources.celeba import SubjectsConfig, stamp
from moa.data.subjects import read_subjects
from moa.evaluation.protocol import load, requests
from tests.data import hub_cache

PAPER = Path("config/protocol/paper.yaml")
WORDS = load(PAPER).split("test").words
MEN = [subject for subject, word in WORDS.items() if word == "man"]


def photo(number: int, side: int = 178) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (218, side, 3), np.uint8))


def settings(root: Path, **changes) -> SubjectsConfig:
    return SubjectsConfig(**{"path": str(root), "lock": root.parent / "celeba.sha256"} | changes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """CelebA's own layout: two photos of each identity, and one of somebody else; CelebA's attributes."""
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    numbers = [int(subject[:6]) for subject in WORDS]
    people = [person for pair in zip(numbers, numbers, strict=True) for person in pair] + [9999]
    names = [f"{n:06d}.jpg" for n in range(1, len(people) + 1)]
    for n, name in enumerate(names):
        photo(n).save(root / "img_align_celeba" / name)
    lines = [f"{name} {person}" for name, person in zip(names, people, strict=True)]
    (root / "identity_CelebA.txt").write_text("\n".join(reversed(lines)) + "\n")
    sexes = [1 if any(int(m[:6]) == person for m in MEN) else -1 for person in people]
    rows = [f"{name} -1 {sex:2d}  1" for name, sex in zip(names, sexes, strict=True)]
    (root / "list_attr_celeba.txt").write_text("\n".join([str(len(rows)), "Bald Male Young", *rows]) + "\n")
    return root


def fastcomposer_photo(root: Path) -> None:
    """The first subject's photo, as FastComposer's folder has it."""
    (root / MEN[0]).parent.mkdir()
    photo(9).save(root / f"{MEN[0]}.jpg")


def made(config: SubjectsConfig, output: Path, **options) -> dict[str, dict]:
    celeba.run(config, PAPER, output, **options)
    return {row["id"]: row for row in read_rows(output, SUBJECT)}


def test_every_subject_of_the_protocol_gets_its_identity_s_first_photo(root, tmp_path):
    rows = made(settings(root), tmp_path / "test.parquet")
    assert list(rows) == list(WORDS) and len(rows) == 15
    assert [row["word"] for row in rows.values()] == ["man"] * 6 + ["woman"] * 9
    for n, (subject, row) in enumerate(rows.items()):
        file = root / f"img_align_celeba/{2 * n + 1:06d}.jpg"
        assert row["image"] == {"bytes": file.read_bytes(), "path": file.name}
        assert row["sha256"] == sha256(file.read_bytes())
        assert row["identity"] == str(int(subject[:6]))


def test_the_protocol_s_requests_can_be_made_of_them(root, tmp_path):
    """What `plan` and `generate` read: the published numbers of images, each of a photo that decodes."""
    made(settings(root), tmp_path / "test.parquet")
    people = list(read_subjects(tmp_path / "test.parquet").values())
    assert {person.image.size for person in people} == {(178, 218)}
    assert len(requests(load(PAPER), people, "single")) == 2400
    assert len(requests(load(PAPER), people, "multi")) == 8820


def test_fastcomposer_s_folder_is_read_by_its_names(root, tmp_path):
    for n, subject in enumerate(WORDS):
        (root / subject).parent.mkdir()
        photo(100 + n).save(root / f"{subject}.jpg")
    rows = made(settings(root), tmp_path / "test.parquet")
    assert all(
        row["image"]["bytes"] == (root / f"{subject}.jpg").read_bytes() for subject, row in rows.items()
    )


def test_uncropped_photos_come_first(root, tmp_path):
    (root / "img_align_celeba").rename(root / "img_celeba")
    (root / "img_align_celeba").mkdir()
    assert len(made(settings(root), tmp_path / "test.parquet")) == 15


def test_another_photo_of_the_identity_can_be_named(root, tmp_path):
    rows = made(settings(root, files={MEN[1]: "000004.jpg"}), tmp_path / "test.parquet")
    assert rows[MEN[1]]["image"]["path"] == "000004.jpg"


def test_the_first_fetch_is_locked(root, tmp_path):
    config, output = settings(root), tmp_path / "test.parquet"
    before = made(config, output)
    locked = config.lock.read_text()
    assert made(config, output) == before and config.lock.read_text() == locked
    photo(7).save(root / "img_align_celeba/000003.jpg")
    with pytest.raises(
        DataError, match=r"1 changed \(img_align_celeba/000003.jpg\).*celeba-subjects --accept"
    ):
        made(config, output)
    after = made(config, output, accept=True)
    assert {subject for subject in after if after[subject] != before[subject]} == {MEN[1]}
    with pytest.raises(DataError, match=r"1 missing .*000003.*1 new .*000004"):
        made(settings(root, files={MEN[1]: "000004.jpg"}), output)


@pytest.mark.parametrize(
    ("damage", "changes", "message"),
    [
        (lambda root: (root / "identity_CelebA.txt").unlink(), {}, "neither 000001/000000023.jpg nor"),
        (lambda root: (root / "identity_CelebA.txt").write_text("a b c\n"), {}, "line 1 is no file and"),
        (lambda root: (root / "identity_CelebA.txt").write_text("1.jpg 1\n"), {}, "no photo of identity 181"),
        (lambda root: (root / "img_align_celeba/000003.jpg").unlink(), {}, "000003.jpg"),
        (lambda root: (root / "img_align_celeba/000003.jpg").write_bytes(b"x"), {}, "000181.*no_image"),
        (lambda root: photo(1, 100).save(root / "img_align_celeba/000003.jpg"), {}, "small_photo"),
        (lambda root: None, {"path": "/nowhere"}, "no folder /nowhere"),
        (lambda root: None, {"files": {MEN[0]: "000004.jpg"}}, "'000004.jpg' is no photo of identity 1"),
        (lambda root: fastcomposer_photo(root), {"files": {MEN[0]: "000002.jpg"}}, "has 000001/000000023"),
        (lambda root: None, {"files": {"000002/1": "000004.jpg"}}, "000002/1 is no test subject"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_named(root, tmp_path, damage, changes, message):
    damage(root)
    with pytest.raises(DataError, match=message):
        made(settings(root, **{"lock": tmp_path / "lock"} | changes), tmp_path / "test.parquet")
    assert not (tmp_path / "lock").exists()


def test_a_numbering_that_means_other_people_is_noticed(root, tmp_path):
    """CelebA's own attributes disagree with the protocol's words: identities are counted otherwise."""
    path = root / "list_attr_celeba.txt"
    path.write_text(path.read_text().replace("000001.jpg -1  1", "000001.jpg -1 -1"))
    with pytest.raises(DataError, match=r"000001/000000023 is a man in the protocol, but .* Male -1 of"):
        made(settings(root), tmp_path / "test.parquet")


def test_a_protocol_without_words_says_so(root, tmp_path):
    other = yaml.safe_load(PAPER.read_text())
    other["test"]["subjects"] = list(WORDS)
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"test\.subjects must list ids below the words"):
        celeba.run(settings(root), tmp_path / "protocol.yaml", tmp_path / "test.parquet")


def test_the_stamp_changes_with_the_chosen_files_alone(root):
    config = settings(root)
    before = stamp(WORDS, config)
    photo(50).save(root / "img_align_celeba/000002.jpg")
    assert stamp(WORDS, config) == before != "absent"
    photo(50).save(root / "img_align_celeba/000003.jpg")
    assert stamp(WORDS, config) != before
    assert stamp(WORDS, settings(root, path="/nowhere")) == "absent"


def test_snakemake_reads_the_same_subjects_as_the_stage():
    assert stages.subjects(read("config/paper.yaml")) == list(WORDS)
    assert stages.subjects(read("config/miniature.yaml")) == []


@pytest.fixture
def data_set(tmp_path: Path) -> SubjectsConfig:
    """A data set as the hub has it, whose first row names a file that is no part of it."""
    table = {
        "image": [encode_image(photo(n)) for n in range(30)],
        "celeb_id": [int(subject[:6]) for subject in WORDS for _ in range(2)],
    }
    photo(31).save(tmp_path / "elsewhere.png")
    table["image"][0] = {"bytes": None, "path": str(tmp_path / "elsewhere.png")}
    features = datasets.Features({"image": datasets.Image(decode=False), "celeb_id": datasets.Value("int64")})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / "hub/train.parquet")
    return settings(tmp_path / "hub", source="dataset")


def test_a_row_that_leads_out_of_the_data_set_is_an_error(data_set, tmp_path):
    with pytest.raises(
        DataError, match=r"data\.subjects\.test\.path: .*elsewhere\.png, outside of the data set"
    ):
        made(data_set, tmp_path / "test.parquet")
    assert made(replace(data_set, files={MEN[0]: "1"}), tmp_path / "test.parquet")


def test_files_of_nobody_are_an_error_in_a_data_set_too(data_set, tmp_path):
    with pytest.raises(DataError, match="000001/24 is no test subject of the protocol"):
        made(replace(data_set, files={MEN[0]: "1", "000001/24": "1"}), tmp_path / "test.parquet")


def test_the_stamp_of_a_data_set_changes_with_its_files(data_set):
    before = stamp(WORDS, data_set)
    listing._stamps.cache_clear()
    assert stamp(WORDS, data_set) == before != "absent"
    with Path(data_set.path, "train.parquet").open("ab") as file:
        file.write(b"x")
    listing._stamps.cache_clear()  # Snakemake looks once a run
    assert stamp(WORDS, data_set) != before
    assert stamp(WORDS, replace(data_set, path="someone/celeba")) == "absent"


def test_a_data_set_is_read_by_its_identities(tmp_path):
    people = [int(subject[:6]) for subject in WORDS for _ in range(2)]
    rows = {"image": [encode_image(photo(n)) for n in range(30)], "celeb_id": people}
    features = datasets.Features({"image": datasets.Image(), "celeb_id": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "celeba")
    config = settings(tmp_path / "celeba", source="dataset", files={MEN[0]: "1"})
    made_of = made(config, tmp_path / "test.parquet")
    assert [row["image"]["bytes"] for row in made_of.values()] == [
        rows["image"][1 if n == 0 else 2 * n]["bytes"] for n in range(15)
    ]
    with pytest.raises(DataError, match=r"data.subjects.test.files: '2' is no photo of identity 1"):
        made(settings(tmp_path / "celeba", source="dataset", files={MEN[0]: "2"}), tmp_path / "test.parquet")


def test_a_data_set_of_the_hub_is_read_at_its_commit_offline(tmp_path, monkeypatch):
    hub_cache.offline(tmp_path / ".cache", monkeypatch)
    commits = ["a" * 40, "b" * 40]
    features = datasets.Features({"image": datasets.Image(), "celeb_id": datasets.Value("int64")})
    people = [int(subject[:6]) for subject in WORDS]
    for number, commit in enumerate(commits):
        rows = {"image": [encode_image(photo(100 * number + n)) for n in range(15)], "celeb_id": people}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
        hub_cache.add_commit(
            tmp_path / ".cache",
            "someone/celeba",
            commit,
            {"train.parquet": (tmp_path / "train.parquet").read_bytes()},
        )
    for number, commit in enumerate(commits):
        lock = tmp_path / f"{commit}.sha256"
        config = settings(tmp_path, path="someone/celeba", source="dataset", revision=commit, lock=lock)
        rows = made(config, tmp_path / "test.parquet")
        shown = [row["image"]["bytes"] for row in rows.values()]
        assert shown == [encode_image(photo(100 * number + n))["bytes"] for n in range(15)]
    other = replace(config, revision="c" * 40, lock=tmp_path / "none.sha256")
    with pytest.raises(DataError, match=r"data\.subjects\.test: commit c+ of .*go online once"):
        made(other, tmp_path / "test.parquet")
    assert not other.lock.exists()


# --- Validation subjects ----------------------------------------------------------------------------------


def record(name: str, *words: str) -> dict:
    """A record of these people, all in one photo."""
    image = encode_image(Image.new("RGB", (8, 8)), f"{name}.png")
    segments = [
        {
            "segment_id": n,
            "word": word,
            "start": 0,
            "end": 1,
            "bbox": [0, 0, 1, 1],
            "label": "person",
            "score": 1.0,
        }
        for n, word in enumerate(words, start=1)
    ]
    known = {
        "id": name,
        "image": image,
        "width": 8,
        "height": 8,
        "segments": segments,
        "sha256": f"hash {name}",
    }
    return dict.fromkeys(RECORD.names, "") | known | {"mask": encode_mask(np.zeros((8, 8), np.int32))}


def test_people_who_are_alone_in_held_out_photos_are_validation_subjects(tmp_path):
    alone = [record(f"{n:02d}", "Man" if n % 4 else "woman") for n in range(12)]
    others = [record("20", "man", "woman"), record("21", "chef")]
    shards = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    write_rows(shards[0], [*alone[6:], *others], RECORD)
    write_rows(shards[1], alone[:6], RECORD)
    held_out.run(HeldOutConfig(subjects=4), shards, tmp_path / "out.parquet")
    rows = read_rows(tmp_path / "out.parquet", SUBJECT)
    assert sorted(row["word"] for row in rows) == ["man", "man", "woman", "woman"]
    for row in rows:
        assert row["id"] == row["identity"] and row["sha256"] == f"hash {row['id']}"
        assert row["image"]["path"] == f"{row['id']}.png"
        assert row["word"] == ("man" if int(row["id"]) % 4 else "woman")
    held_out.run(HeldOutConfig(subjects=99), shards, tmp_path / "all.parquet")
    assert len(read_rows(tmp_path / "all.parquet", SUBJECT)) == 12
    with pytest.raises(DataError, match="nobody who is called king"):
        held_out.run(HeldOutConfig(words=("king",)), shards, tmp_path / "none.parquet")
