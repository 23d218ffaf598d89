"""Data sets, saved in a folder or fetched from the hub, as sources of photos."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moa.data.errors import DataError
from moa.data.records import sha256
from moa.data.sources import hub, lock
from moa.data.sources.config import PhotosConfig
from tests.data import hub_cache
from tests.data.files import (
    BAD,
    FRAMES,
    GOOD,
    config,
    encoded,
    ingest,
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rows = {"image": [{"bytes": GOOD[n], "path": n} for n in ("plain.png", "turned.jpg")], "key": ["x", "y"]}
    rows["image"] += [{"bytes": BAD["page.jpg"][0], "path": None}, None]
    rows["key"] += ["z", "none"]
    features = datasets.Features({"image": datasets.Image(decode=False), "key": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features=features)
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def test_a_saved_data_set_gives_the_bytes_that_were_put_in(saved, tmp_path):
    kept, aside = ingest(config(saved, "dataset", id_column="key"), tmp_path)
    assert {name: row["image"]["bytes"] for name, row in kept.items()} == {
        "x": GOOD["plain.png"], "y": GOOD["turned.jpg"],
    }  # fmt: skip
    assert {name: row["reason"] for name, row in aside.items()} == {"z": "no_image", "none": "no_image"}


def test_the_split_of_a_saved_data_set_is_the_one_asked_for(saved, tmp_path):
    """A single one may say which it is; of several, `all` are joined."""
    data = datasets.load_from_disk(str(saved))

    def ids(folder: str, split: str) -> list[str]:
        return hub.load(config(tmp_path / folder, "dataset", dataset_split=split, id_column="key"), "")["key"]

    rows = data.cast_column("image", datasets.Image(decode=False))
    parts = {
        split: datasets.Dataset.from_dict(rows[start:end], features=data.features, split=split)
        for split, start, end in (("train", 0, 2), ("test", 2, 3))
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    assert list(ids("both", "all")) == ["x", "y", "z"] and list(ids("both", "test")) == ["z"]
    with pytest.raises(DataError, match=r"^data\.photos: .*split 'valid', cannot be loaded.*dataset_split"):
        ids("both", "valid")
    assert list(ids("saved", "test")) == list(data["key"])  # it does not say
    for split in ("test", "all"):
        assert list(ids("both/test", split)) == ["z"]
    with pytest.raises(DataError, match=r"^data\.photos: .*it is the split 'test'.*dataset_split"):
        ids("both/test", "train")


def test_without_an_id_column_photos_are_called_after_their_bytes(saved, tmp_path):
    kept, _ = ingest(config(saved, "dataset"), tmp_path)
    assert set(kept) == {sha256(GOOD[name])[:16] for name in ("plain.png", "turned.jpg")}


def test_a_folder_of_parquet_is_a_data_set_too(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    datasets.load_from_disk(str(saved)).to_parquet(str(tmp_path / "files/train.parquet"))
    kept, _ = ingest(config(tmp_path / "files", "dataset", id_column="key"), tmp_path)
    assert sorted(kept) == ["x", "y"]


def test_a_data_set_cannot_name_files_of_this_machine(tmp_path, monkeypatch):
    """Its own files and what was fetched to the cache are read, through whatever path; nothing else is."""
    folder, cache = tmp_path / "files", tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    places = [tmp_path / "secret.png", folder / "own.png", cache / "fetched.png", tmp_path / "none.png"]
    for place in places[:3]:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(encoded(FRAMES[places.index(place)]))
    (folder / "link.png").symlink_to(places[0])
    paths = [str(place) for place in [*places, folder / "link.png", f"{folder}/../secret.png"]]
    features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "key": list("abcdef")}
    pq.write_table(pa.Table.from_pydict(rows, features.arrow_schema), folder / "train.parquet")
    settings = config(folder, "dataset", id_column="key")
    kept, aside = ingest(settings, tmp_path)
    assert sorted(kept) == ["b", "c"]
    assert sorted(row["reason"] for row in aside.values()) == ["link"] * 3 + ["no_image"]
    assert "secret" not in settings.lock.read_text()


def test_other_columns_are_not_looked_at(saved, tmp_path):
    data = datasets.load_from_disk(str(saved))
    previews = [{"bytes": b"no picture", "path": None}] * len(data)
    data.add_column("preview", previews, feature=datasets.Image()).save_to_disk(str(tmp_path / "more"))
    kept, _ = ingest(config(tmp_path / "more", "dataset", id_column="key"), tmp_path)
    assert set(kept) == {"x", "y"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_column": "picture"},
            r"data\.photos\.image_column: there is no 'picture' among \['image', 'key'\]",
        ),
        ({"image_column": "key"}, r"data\.photos\.image_column: 'key' holds no images"),
        ({"id_column": "name"}, r"data\.photos\.id_column: there is no 'name'"),
    ],
)
def test_wrong_columns_name_the_key(change, message, saved, tmp_path):
    with pytest.raises(DataError, match=message):
        lock.run(config(saved, "dataset", **change), tmp_path / "index.parquet")


def test_a_hub_that_cannot_be_asked_gives_no_revision(tmp_path, monkeypatch):
    """No network: the error says what to do, and nothing is written that looks like a revision."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = replace(config(tmp_path / "x", "dataset"), path="someone/faces")
    with pytest.raises(
        DataError, match=r"'someone/faces' is no folder, and the hub does not say.*go online once"
    ):
        lock.run(settings, tmp_path / "index.parquet")
    settings.lock.write_text("# revision: " + "0" * 40 + "\n")
    with pytest.raises(
        DataError, match=r"data\.photos\.revision is 1+, but .*photos\.sha256 was made from 0+"
    ):
        lock.run(replace(settings, revision="1" * 40), tmp_path / "index.parquet")


def test_another_revision_than_the_lock_s_is_named(tmp_path):
    """A tag that is changed in the settings must not be answered with the old tag's photos."""
    settings = replace(config(tmp_path / "x", "dataset"), path="someone/faces", revision="v1")
    lock.write_lock(settings, "0" * 40, {})
    commit, asked, _ = lock.read_lock(settings.lock)
    for same in ("v1", "0" * 40):
        assert hub.commit(replace(settings, revision=same), commit, asked) == "0" * 40
    for other in ("v2", None):
        with pytest.raises(
            DataError, match=rf"revision is {other or 'main'}, but .*made from 0+ \(v1\).*--accept"
        ):
            lock.run(replace(settings, revision=other), tmp_path / "index.parquet")


# --- Data sets of the hub -----------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40
FACES = "someone/faces"


def parquet(name: str) -> bytes:
    """A file of one photo, as `push_to_hub` writes it."""
    file = io.BytesIO()
    features = datasets.Features({"image": datasets.Image(), "key": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [{"bytes": GOOD[name]}], "key": [name]}, features).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch) -> PhotosConfig:
    """Two commits of a data set in the hub's cache, with different photos; the newer one was fetched last."""
    hub_cache.offline(tmp_path / ".cache", monkeypatch)
    for commit, name in ((OLD, "plain.png"), (NEW, "photo.jpg")):
        files = {"data/train-00000-of-00001.parquet": parquet(name), "README.md": b"# Faces"}
        hub_cache.add_commit(tmp_path / ".cache", FACES, commit, files)
    return replace(config(tmp_path / "x", "dataset", id_column="key"), path=FACES)


@pytest.mark.parametrize("order", [(OLD, NEW, OLD), (NEW, OLD, NEW)])
def test_each_commit_gives_its_own_photos_offline(order, cached, tmp_path):
    """Whatever was read before, and whatever the caches of `datasets` hold of it."""
    for number, commit in enumerate(order):
        settings = replace(cached, revision=commit, lock=tmp_path / f"{number}.sha256")
        (tmp_path / f"{number}").mkdir()
        kept, aside = ingest(settings, tmp_path / f"{number}")
        name = {OLD: "plain.png", NEW: "photo.jpg"}[commit]
        assert {key: row["image"]["bytes"] for key, row in kept.items()} == {name: GOOD[name]} and not aside
        assert kept[name]["source"] == f"test@{commit}"
        assert f"# revision: {commit}\n" in settings.lock.read_text()


@pytest.mark.parametrize("commit", ["c" * 40, "main"])
def test_a_commit_that_is_not_in_the_cache_is_an_error_offline(commit, cached, tmp_path):
    """Another one would do for `datasets`, and lie in the lock under this one's name."""
    datasets.load_dataset(str(hub_cache_of(cached, tmp_path, NEW)))
    own = (tmp_path / ".cache/datasets" / NEW).rename(tmp_path / ".cache/datasets/someone___faces")
    [arrow] = own.rglob("*.arrow")
    arrow.rename(arrow.with_name("faces-train.arrow"))  # as if it had been loaded by its name
    settings = replace(cached, revision=commit)
    with pytest.raises(DataError, match=rf"data\.photos: .*{commit}.*go online once"):
        lock.run(settings, tmp_path / "index.parquet")
    assert not settings.lock.exists() and not (tmp_path / "index.parquet").exists()


def hub_cache_of(settings: PhotosConfig, tmp_path: Path, commit: str) -> Path:
    """The folder of a commit."""
    return tmp_path / f".cache/hub/datasets--{settings.path.replace('/', '--')}/snapshots/{commit}"


@pytest.mark.parametrize("lost", ["a file", "the list"])
def test_half_a_commit_in_the_cache_is_an_error_offline(lost, cached, tmp_path):
    """A fetch that was broken off: fewer photos would be locked as if they were all."""
    folder = hub_cache_of(cached, tmp_path, OLD)
    (folder / "README.md" if lost == "a file" else folder.parents[1] / f"trees/{OLD}.json").unlink()
    settings = replace(cached, revision=OLD)
    with pytest.raises(DataError, match=rf"commit {OLD} of the data set .* as a whole .*go online once"):
        lock.run(settings, tmp_path / "index.parquet")
    assert not settings.lock.exists()


def test_image_files_of_a_commit_are_read_through_its_links(cached, tmp_path):
    """They lie among the blobs, without endings; a link to anywhere else is still put aside."""
    name, commit = "someone/files", "d" * 40
    files = {f"train/{photo}": GOOD[photo] for photo in ("plain.png", "photo.jpg")}
    folder = hub_cache.add_commit(tmp_path / ".cache", name, commit, files)
    (tmp_path / "secret.png").write_bytes(encoded(FRAMES[1]))
    (folder / "train/secret.png").symlink_to(tmp_path / "secret.png")
    kept, aside = ingest(replace(cached, path=name, revision=commit, id_column=None), tmp_path)
    assert sorted(row["image"]["bytes"] for row in kept.values()) == sorted(files.values())
    assert [row["reason"] for row in aside.values()] == ["link"]


def test_a_loading_script_is_named(cached, tmp_path):
    files = {"faces.py": b"import datasets", "data/train.parquet": parquet("plain.png")}
    hub_cache.add_commit(tmp_path / ".cache", FACES, "e" * 40, files)
    with pytest.raises(DataError, match=r"data\.photos: 'someone/faces' has a loading script, faces\.py"):
        lock.run(replace(cached, revision="e" * 40), tmp_path / "index.parquet")


def test_a_lock_without_a_commit_is_named(cached, tmp_path):
    """A branch's name would be read at whatever it is now."""
    cached.lock.write_text("# revision: main\n# asked: main\n")
    with pytest.raises(DataError, match=r"'main' is no commit of .*photos\.sha256 from your backup"):
        lock.run(cached, tmp_path / "index.parquet")


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(cached):
    with pytest.raises(DataError, match=r"data\.photos\.path: there is no folder someone/faces"):
        hub.load(cached, "")
