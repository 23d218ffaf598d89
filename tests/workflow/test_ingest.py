"""Photos through Snakemake: only what a change touches is made again, and docs/data.md says what there is."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from skimage.data import astronaut

from moa import __main__ as command_line
from moa import stages
from moa.data.errors import REASONS
from moa.data.held_out import HeldOutConfig
from moa.data.records import CAPTION, RAW, RECORD, REJECTED, SEGMENT, Row, decode_mask, read_rows, write_rows
from moa.data.sources.celeba import SubjectsConfig
from moa.data.sources.config import KINDS, PhotosConfig, QuarantineConfig
from moa.data.sources.listing import SUFFIXES, UNDECODED, shard_of
from moa.data.sources.reasons import QUARANTINED
from moa.hashing import ROOT, model_hash
from moa.miniature.dataset import RenderConfig, draw_scene
from moa.miniature.render import render
from tests.data import tiny
from tests.workflow.conftest import Run, start

PAPER = yaml.safe_load((ROOT / "config/paper.yaml").read_text())
PAGE = (ROOT / "docs/data.md").read_text("utf-8")
TARGET = "results/paper/data/quarantine.csv"


def settings(**photos) -> dict:
    """The paper preset for a few small photos in `photos/`."""
    given = {"path": "photos", "name": "few", "lock": "few.sha256", "held_out": 0.0, **photos}
    data = PAPER["data"] | {"photos": given, "quarantine": {"max_quarantined": 1}}
    return PAPER | {"data": data, "shards": PAPER["shards"] | {"train": 2, "validation": 1}}


def jobs(said: str) -> dict[str, str]:
    return {n: c for n, c in re.findall(r"^(\w+) +(\d+)$", said, re.MULTILINE) if n != "total"}


def accept(project: Path, index: Path) -> None:
    """Say that the photos were meant to change."""
    arguments = ["lock-photos", "--accept", "--config", "changes.yaml", "--output", str(index)]
    subprocess.run([sys.executable, "-m", "moa", *arguments], cwd=project, check=True, capture_output=True)


@pytest.mark.slow
def test_the_report_lists_what_was_put_aside(snakemake: Run) -> None:
    done = snakemake("all", "--dry-run", "--printshellcmds", "--configfile", "config/paper.yaml")
    (command,) = re.findall(r"python -m moa report .*", done.stdout)
    assert f" {TARGET} " in command.split("--shown")[1]


@pytest.mark.slow
def test_one_changed_file_redoes_one_shard(snakemake: Run, project: Path) -> None:
    (project / "photos").mkdir()
    names = [f"{number:02d}" for number in range(8)]
    assert {shard_of(name, 2) for name in names} == {0, 1}
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(project / f"photos/{name}.png")
    (project / "photos/page.jpg").write_text("<html>")
    config = settings()

    done = snakemake("quarantine", "--cores", "2", config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / TARGET).read_text().startswith("id,reason,detail\npage,no_image,")
    index = project / "results/paper/data/photos.parquet"
    again = snakemake("quarantine", "--dry-run", config=config)
    assert "Nothing to be done" in again.stdout + again.stderr

    (project / "photos").rename(project / "away")  # a disk that is not mounted
    again = snakemake("quarantine", "--dry-run", "--rerun-triggers", "mtime", config=config)
    assert "Nothing to be done" in again.stdout + again.stderr
    (project / "away").rename(project / "photos")

    Image.new("RGB", (30, 30), "red").save(project / "photos/03.png")
    done = snakemake("quarantine", "--cores", "2", config=config)
    assert done.returncode == 1
    log = (project / "results/paper/logs/lock_photos.log").read_text()
    assert "1 changed (03.png). Put the old files back" in log
    assert (project / TARGET).is_file() and index.is_file()  # else everything would be made again

    accept(project, index)
    done = snakemake("quarantine", "--dry-run", config=config)
    said = done.stdout + done.stderr
    assert jobs(said) == {"lock_photos": "1", "photos": "1", "quarantine": "1"}, said
    assert f"train-{shard_of('03', 2):03d}" in said


def kill_in_the_last_shard(project: Path, raw: dict[str, Path]) -> str:
    """SIGKILL the run while the last of the shards is made; its name."""
    run, deadline = start(project, TARGET), time.monotonic() + 300
    logs = {name: project / f"results/paper/logs/photos/{name}.log" for name in raw}
    while True:
        assert run.poll() is None and time.monotonic() < deadline, (project / "snakemake.log").read_text()
        left = [name for name, path in raw.items() if not path.exists()]
        if len(left) == 1 and logs[left[0]].is_file():
            done = re.findall(r"(\d+)/(\d+)", logs[left[0]].read_text())
            if done and 0 < int(done[-1][0]) < int(done[-1][1]):
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                return left[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_shard_that_was_killed_is_made_again_and_no_other(project: Path) -> None:
    (project / "photos").mkdir()
    Image.linear_gradient("L").resize((2400, 2400)).save(project / "photos/00.png")  # takes a while to decode
    photo = (project / "photos/00.png").read_bytes()
    for number in range(1, 60):  # each with bytes of its own, for copies in both splits are put aside
        about = b"tEXtnumber\0%d" % number
        chunk = struct.pack(">I", len(about) - 4) + about + struct.pack(">I", zlib.crc32(about))
        (project / f"photos/{number:02d}.png").write_bytes(photo[:-12] + chunk + photo[-12:])
    (project / "changes.yaml").write_text(yaml.safe_dump(settings(held_out=0.3)))
    raw = {
        name: project / f"results/paper/data/raw/{name}.parquet"
        for name in ("train-000", "train-001", "validation-000")
    }

    killed = kill_in_the_last_shard(project, raw)
    assert not raw[killed].exists()
    assert list((project / ".snakemake/locks").iterdir()), "the killed run left no lock: nothing was tested"
    before = {name: path.stat().st_mtime_ns for name, path in raw.items() if name != killed}
    (project / "snakemake.log").unlink()
    assert start(project, TARGET).wait(timeout=300) == 0, (project / "snakemake.log").read_text()

    said = (project / "snakemake.log").read_text()
    assert re.findall(r"Taking in photos (\S+)", said) == [killed]
    assert before == {name: raw[name].stat().st_mtime_ns for name in before}
    taken = [row["id"] for path in raw.values() for row in read_rows(path, RAW)]
    assert sorted(taken) == [f"{number:02d}" for number in range(60)]
    assert not [path for path in raw[killed].parent.iterdir() if path not in raw.values()], "a leftover"


@pytest.mark.slow
def test_another_commit_of_a_data_set_redoes_all_its_shards(snakemake: Run, project: Path) -> None:
    """On the hub there are no files whose times could tell; `lock-photos --accept` writes another index."""
    config = settings(path="someone/faces") | {"source": "dataset"}
    data = project / "results/paper/data"
    shards = "train-000", "train-001", "validation-000"
    made = [f"files/{shard}.txt" for shard in shards]
    made += [f"{folder}/{shard}.parquet" for folder in ("raw", "quarantined") for shard in shards]
    ends = "quarantine.csv", "quarantine.passed", "../benchmarks/quarantine.tsv"
    for name in ("photos.parquet", "photos.checked", *made, *ends):  # as if it had been made
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text("first")
    done = snakemake("quarantine", "--dry-run", config=config)
    assert "Nothing to be done" in done.stdout + done.stderr

    (data / "photos.parquet").write_text("second")
    done = snakemake("quarantine", "--dry-run", config=config)
    assert jobs(done.stdout + done.stderr) == {"photos": "3", "quarantine": "1"}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tables", "ablations"])
def test_a_target_asks_for_a_check_that_failed(snakemake: Run, project: Path, target: str) -> None:
    """Its list stays, and what needs that alone would not look for the check."""
    data = project / "results/paper/data"
    shards = "train-000", "train-001", "validation-000"
    made = [f"files/{shard}.txt" for shard in shards]
    made += [f"{folder}/{shard}.parquet" for folder in ("raw", "quarantined") for shard in shards]
    for name in ("photos.parquet", "photos.checked", *made, "quarantine.csv"):  # all but quarantine.passed
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    done = snakemake(target, "--dry-run", config=settings())
    assert jobs(done.stdout + done.stderr).get("quarantine") == "1", done.stdout + done.stderr


@pytest.mark.slow
def test_another_photo_of_a_test_subject_is_looked_at(snakemake: Run, project: Path) -> None:
    """Offline, of a folder; whether it is the locked one is said by the stage."""
    listed = yaml.safe_load((ROOT / PAPER["protocol"]).read_text())["test"]["subjects"]
    for number, subject in enumerate([*listed["man"], *listed["woman"]]):
        (project / "data/celeba" / subject).parent.mkdir(parents=True)
        Image.new("RGB", (178, 218), (number, 0, 0)).save(project / f"data/celeba/{subject}.jpg")
    target = "results/paper/subjects/test.parquet"
    done = snakemake(target, "--cores", "1", config=PAPER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((project / "data/celeba.sha256").read_text().splitlines()) == 16
    again = snakemake(target, "--dry-run", config=PAPER)
    assert "Nothing to be done" in again.stdout + again.stderr

    Image.new("RGB", (178, 218), "red").save(project / f"data/celeba/{listed['man'][0]}.jpg")
    again = snakemake(target, "--dry-run", config=PAPER)
    assert jobs(again.stdout + again.stderr) == {"celeba_subjects": "1"}


@pytest.mark.slow
def test_the_archive_s_records_come_without_annotators(snakemake: Run) -> None:
    config = settings() | {"source": "fastcomposer"}
    done = snakemake("results/paper/data/card.md", "--dry-run", config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    each = dict.fromkeys(("files_of_shard", "photos", "archive_records"), "3")
    assert jobs(done.stdout) == each | dict.fromkeys(("lock_photos", "quarantine", "data_card"), "1")


@pytest.mark.slow
def test_captions_and_masks_are_one_job_a_shard(snakemake: Run) -> None:
    done = snakemake("results/paper/data/card.md", "--dry-run", config=settings())
    counted = jobs(done.stdout)
    assert {rule: counted[rule] for rule in ("photos", "caption", "segment", "align")} == {
        "photos": "3", "caption": "3", "segment": "3", "align": "3",
    }  # fmt: skip


@pytest.mark.slow
def test_ten_shards_share_a_loaded_model(snakemake: Run) -> None:
    """Where there are ten and it is asked for; the others are jobs of their own."""
    shards = PAPER["shards"] | {"train": 23, "validation": 10}
    config = settings() | {"shards": shards}
    done = snakemake("results/paper/data/card.md", "--dry-run", config=config)
    counted = jobs(done.stdout)
    assert (counted["caption"], counted["segment"]) == ("33", "33")
    config["ten_shards_a_job"] = True
    done = snakemake("results/paper/data/card.md", "--dry-run", config=config)
    counted = jobs(done.stdout)
    assert (counted["photos"], counted["align"]) == ("33", "33")
    for rule in ("caption", "segment"):
        assert (counted[f"{rule}_ten"], counted[rule]) == ("3", "3"), done.stdout + done.stderr
    looked = re.findall(r"(?:Captioning|people in)(?: the ten shards)? (\S+)$", done.stdout, re.MULTILINE)
    assert Counter(looked) == dict.fromkeys(
        ["train-00*", "train-01*", "train-020", "train-021", "train-022", "validation-00*"], 2
    )


LONGEST = 128 * 1024  # bytes of one argument on Linux; Snakemake hands a whole command to a shell as one
GATHERING = {  # rule: its target, and what its command must hold of which splits
    "data_card": ("data/card.md", ["records", "rejected", "quarantined", "phrases"], ["train", "validation"]),
    "quarantine": ("data/quarantine.csv", ["quarantined"], ["train", "validation"]),
    "held_out_subjects": ("subjects/validation.parquet", ["records"], ["validation"]),
    "train": ("train/moa", ["records"], ["train"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", GATHERING)
def test_a_thousand_shards_fit_into_a_command(snakemake: Run, project: Path, rule: str) -> None:
    target, folders, splits = GATHERING[rule]
    data = project / "results/paper/data"
    for folder in ("records", "rejected", "quarantined", "phrases"):  # as if they had been made
        (data / folder).mkdir(parents=True)
        for split in ("train", "validation"):
            for n in range(1000):
                (data / folder / f"{split}-{n:03d}.parquet").touch()
    checked = ("photos.checked", "quarantine.passed", "../models.checked")
    for name in ("photos.parquet", *checked, "../subjects/validation.parquet"):
        (data / name).parent.mkdir(exist_ok=True)
        if name != f"../{target}":
            (data / name).touch()
    config = settings() | {"shards": PAPER["shards"] | {"train": 1000, "validation": 1000}}
    only = ["--allowed-rules", rule, "--force", "--printshellcmds", "--dry-run", "--cores", "1"]
    done = snakemake(f"results/paper/{target}", *only, config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    [command] = re.findall(r"^Shell command: (python -m moa .*)$", done.stdout, re.MULTILINE)
    assert len(command) < LONGEST / 10
    given = [path for word in shlex.split(command) for path in command_line.numbered(word)]
    wanted = [
        f"results/paper/data/{f}/{s}-{n:03d}.parquet" for f in folders for s in splits for n in range(1000)
    ]
    assert [word for word in given if re.search(r"-\d{3}\.parquet$", word)] == wanted


@pytest.mark.parametrize("rule", ["caption", "segment"])
def test_captions_and_masks_ask_for_a_gpu(rule: str) -> None:
    """A cluster's scheduler must know."""
    text = (ROOT / "workflow/rules/data.smk").read_text("utf-8")
    [block] = re.findall(rf"^rule {rule}:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert re.search(r"resources:\n(?: +\w+=.*\n)* +gpu=GPU,", block)


def test_alignment_asks_for_the_gpu_that_clip_runs_on() -> None:
    text = (ROOT / "workflow/rules/data.smk").read_text("utf-8")
    [block] = re.findall(r"^rule align:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert 'gpu=GPU if CONFIG["data"]["align"].get("matcher") == "clip" else 0,' in block
    assert stages.settings("align", PAPER | {"device": "cuda"})["device"] == "cuda"


# --- BLIP-2 and Mask2Former of random weights --------------------------------------------------------------

RANDOM = {
    "output": "results/random",
    "source": "folder",
    "shards": {"train": 1, "validation": 1},
    "models": {role: {"id": f"models/{role}"} for role in ("captioner", "segmenter")},
    "data": {
        "photos": {"path": "photos", "name": "few", "lock": "few.sha256", "held_out": 0.3},
        "quarantine": {"max_quarantined": 1},
        "caption": {"max_new_tokens": 16},
        "segment": tiny.LENIENT,
        "align": {"min_area": 0.15, "max_rejected": 1.0},
    },
}
DATA = "results/random/data"


@pytest.fixture
def photos(project: Path) -> dict[str, Path]:
    """A photograph of 512 × 512 pixels, drawn photos of 64 × 64 and 96 × 64, and what is no photo, by id."""
    folder = project / "photos"
    folder.mkdir()
    Image.fromarray(astronaut()).save(folder / "astronaut.png")
    for number in range(12):
        scene, _ = draw_scene(RenderConfig(pairs=0.5), "train", number)
        drawn = render(scene, 64 + 32 * (number % 2)).image
        Image.fromarray(drawn[:64]).save(folder / f"{number:02d}.png")
    (folder / "page.jpg").write_text("<html>")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture
def revisions(project: Path) -> dict[str, str]:
    """What rows must say of the random models in `models/`, by role."""
    for role in RANDOM["models"]:
        (project / "models" / role).mkdir(parents=True)
    tiny.captioner(project / "models/captioner", tiny.few_words())
    tiny.segmenter(project / "models/segmenter")
    return {role: f"sha256:{model_hash(project / 'models' / role)[:16]}" for role in RANDOM["models"]}


def read(project: Path, table: str, schema) -> list[Row]:
    return read_rows(sorted((project / DATA / table).glob("*-000.parquet")), schema)


def check_account(project: Path, photos: dict[str, Path]) -> None:
    """Every photo is a record, or put aside with a reason that the card counts; kept bytes are the file's."""
    records, refused = read(project, "records", RECORD), read(project, "rejected", REJECTED)
    aside = read(project, "quarantined", REJECTED)
    assert [(row["id"], row["reason"]) for row in aside] == [("page", "no_image")]
    assert sorted(row["id"] for row in [*records, *refused, *aside]) == sorted(photos)
    assert records and refused and {row["reason"] for row in refused} <= set(REASONS)
    assert all(row["image"]["bytes"] == photos[row["id"]].read_bytes() for row in records)
    card = json.loads((project / DATA / "card.json").read_text("utf-8"))
    assert (card["photos"], card["records"]) == (len(photos), len(records))
    assert card["reasons"] == Counter(row["reason"] for row in [*refused, *aside])
    sheet = Image.open(project / DATA / "card.png")
    assert sheet.width == min(4, len(records)) * (2 * 160 + 8) and sheet.convert("L").getextrema()[0] < 64


def check_revisions(project: Path, revisions: dict[str, str]) -> None:
    """Rows and records tell the weights that made them."""
    for role, table, schema in (("captioner", "captions", CAPTION), ("segmenter", "segments", SEGMENT)):
        made = {(row["model"], row["revision"]) for row in read(project, table, schema)}
        assert made == {(f"models/{role}", revisions[role])}
    records = read(project, "records", RECORD)
    assert {(row["caption_revision"], row["segment_revision"]) for row in records} == {
        tuple(revisions.values())
    }


def check_masks(project: Path, photos: dict[str, Path]) -> None:
    """As large as the photo, and still of the pixels that were counted before a mask was written."""
    found = {row["id"]: row for row in read(project, "segments", SEGMENT)}
    assert found.keys() == photos.keys() - {"page"} and found["astronaut"]["segments"]
    for name, row in found.items():
        mask = decode_mask(row["mask"])
        assert mask.shape[::-1] == Image.open(photos[name]).size
        counted = {
            number: int(count) for number, count in zip(*np.unique(mask, return_counts=True), strict=True)
        }
        counted.pop(0, None)
        assert counted == {segment["segment_id"]: segment["area"] for segment in row["segments"]}


@pytest.mark.slow
def test_random_annotators_go_through_the_rules(
    snakemake: Run, project: Path, photos: dict[str, Path], revisions: dict[str, str]
) -> None:
    """Whatever they say and find, no photo is lost, and one that is replaced redoes its shard to the end."""
    target = f"{DATA}/card.md"
    done = snakemake(target, "--cores", "2", config=RANDOM)
    assert done.returncode == 0, done.stdout + done.stderr
    check_account(project, photos)
    check_revisions(project, revisions)
    check_masks(project, photos)
    again = snakemake(target, "--cores", "2", config=RANDOM)
    assert "Nothing to be done" in again.stdout + again.stderr

    Image.new("RGB", (70, 50), "red").save(photos["03"])
    accept(project, project / DATA / "photos.parquet")
    again = snakemake(target, "--dry-run", config=RANDOM)
    said = again.stdout + again.stderr
    once = "lock_photos", "files_of_shard", "photos", "quarantine", "caption", "segment", "align", "data_card"
    assert jobs(said) == dict.fromkeys(once, "1"), said
    [shard] = set(re.findall(r"(?:Captioning|Finding people in) (\S+)", said))
    assert "03" in [row["id"] for row in read_rows(project / DATA / f"raw/{shard}.parquet", RAW)]


@pytest.mark.slow
def test_photos_that_did_not_pass_go_no_further(
    snakemake: Run, project: Path, photos: dict[str, Path], revisions: dict[str, str]
) -> None:
    """However often the same command is given: Snakemake by itself forgets that a check has failed."""
    data = RANDOM["data"] | {"quarantine": {"max_quarantined": 0}}
    strict, target = RANDOM | {"data": data}, f"{DATA}/captions/train-000.parquet"
    assert snakemake("quarantine", "--cores", "2", config=RANDOM).returncode == 0
    for rule, log, message in (
        ("quarantine", "quarantine", "1 of 14 photos were put aside"),
        ("caption", "caption/train-000", "did not pass"),
    ):
        done = snakemake(target, "--cores", "1", config=strict)
        assert done.returncode == 1 and f"Error in rule {rule}:" in done.stdout + done.stderr
        assert message in (project / f"results/random/logs/{log}.log").read_text()
        assert not (project / target).exists()
    for mended in ("quarantine", target):  # in this order, as the message says
        assert snakemake(mended, "--cores", "1", config=RANDOM).returncode == 0
    assert (project / target).is_file()


@pytest.mark.slow
def test_a_shard_that_fails_leaves_its_ten_to_be_made_again(
    snakemake: Run, project: Path, photos: dict[str, Path], revisions: dict[str, str]
) -> None:
    """Ten shards are captioned by one job, which makes all of them or none; the eleventh is none of its."""
    raw, captions = project / DATA / "raw", project / DATA / "captions"
    for n in range(11):
        row = {"id": str(n), "image": {"bytes": photos["03"].read_bytes(), "path": None}, "sha256": "0"}
        write_rows(raw / f"train-{n:03d}.parquet", [row | {"width": 9, "height": 9, "source": "s"}], RAW)
    whole = (raw / "train-007.parquet").read_bytes()
    (raw / "train-007.parquet").write_bytes(whole[:-9])
    data = {key: RANDOM["data"][key] for key in ("caption", "segment", "align")}
    config = RANDOM | {"source": "shards", "shards": RANDOM["shards"] | {"train": 11}, "data": data}
    config["ten_shards_a_job"] = True
    targets = [f"{DATA}/captions/train-{n:03d}.parquet" for n in (2, 10)]
    arguments = [*targets, "--cores", "1", "--keep-going"]
    done = snakemake(*arguments, config=config)
    assert done.returncode != 0 and "train-007.parquet is cut short or damaged" in done.stdout + done.stderr
    assert [path.name for path in captions.glob("*")] == ["train-010.parquet"]
    before = (captions / "train-010.parquet").stat().st_mtime_ns

    (raw / "train-007.parquet").write_bytes(whole)
    done = snakemake(*arguments, config=config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in captions.glob("*")) == [f"train-{n:03d}.parquet" for n in range(11)]
    assert (captions / "train-010.parquet").stat().st_mtime_ns == before
    rows = read_rows(sorted(captions.glob("*")), CAPTION)
    assert [row["id"] for row in rows] == [str(n) for n in range(11)]


def test_the_page_names_every_key_source_and_reason() -> None:
    for setting in (
        *fields(PhotosConfig),
        *fields(QuarantineConfig),
        *fields(SubjectsConfig),
        *fields(HeldOutConfig),
    ):
        assert re.search(rf"`(?:\w+\.)*{setting.name}`", PAGE), setting.name
    assert [kind for kind in (*KINDS, "shards") if f"| `{kind}` |" not in PAGE] == []
    assert [reason for reason in QUARANTINED if f"`{reason}`" not in PAGE] == []
    assert set(re.findall(r"\.\w+", PAGE)) >= SUFFIXES | UNDECODED


def test_the_page_shows_the_preset_and_links_to_what_exists() -> None:
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])
    assert shown["source"] == PAPER["source"]
    assert shown["shards"].items() <= PAPER["shards"].items()
    assert shown["data"].items() <= PAPER["data"].items()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_alignment_follows_its_own_models(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("pipeline", "sentences")]
    for folder in folders:
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"x")
    own = {"spacy": str(folders[0]), "label_model": {"id": str(folders[1])}}
    found = stages.align_files({"data": {"align": own}})
    assert found == [str(folder / "weights.bin") for folder in folders]
    assert stages.align_files({"data": {"align": {"spacy": "en_core_web_sm", "label_model": None}}}) == []
    text = (ROOT / "workflow/rules/data.smk").read_text("utf-8")
    [block] = re.findall(r"^rule align:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert "own=stages.align_files(CONFIG)," in block


@pytest.mark.parametrize("rule", ["compare_swaps", "compare_prior", "compare_methods"])
def test_comparisons_ask_for_the_gpu_that_lpips_runs_on(rule: str) -> None:
    text = (ROOT / "workflow/rules/evaluate.smk").read_text("utf-8")
    [block] = re.findall(rf"^rule {rule}:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert re.search(r"resources:\n(?: +\w+=.*\n)* +gpu=LPIPS_GPU,", block)
