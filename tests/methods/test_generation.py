"""Generation goes on after a kill, never takes an old image for a new one, and serves a person's try."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from moa import generation, machine
from moa.conditioner import find_words
from moa.data.errors import DataError
from moa.data.records import SUBJECT, read_rows, write_rows
from moa.evaluation import samples
from moa.generation import GenerateConfig, TryConfig, first_words, generate_one, run
from moa.methods import Sampling
from moa.training import moa
from tests.training import tiny


@pytest.fixture(scope="module")
def config(models) -> GenerateConfig:
    return GenerateConfig(*models, Sampling(steps=2, batch_size=2))


@pytest.fixture(scope="module")
def trained(models, shards, subjects, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "moa"
    moa.run(tiny.config(models, steps=2), shards, subjects, folder)
    return folder


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "single.parquet"
    rows = []
    for number in range(4):
        word = ("man", "woman")[number % 2]
        prompt, name = f"a {word} in a red hat", f"test-{number:04d}"
        rows.append(
            {
                "split": "test", "kind": "single", "subject": name, "subjects": [name], "words": [word],
                "prompt_id": "hat-00", "prompt_group": "hat", "prompt": prompt,
                "spans": [list(s) for s in find_words(prompt, [word])], "index": 0, "seed": number,
                "path": f"test/single/{name}.hat-00.00.png",
            }
        )  # fmt: skip
    samples.write(path, rows, samples.REQUEST)
    return path


def rows(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in samples.read(path, samples.MADE)]


def test_images_and_rows(config, requests, subjects, trained, tmp_path):
    out = tmp_path / "made.parquet"
    run(config, "moa", [requests], subjects, out, tmp_path, trained)
    made = samples.read(out, samples.MADE)
    assert [row["path"] for row in made] == [
        f"images/moa/test/single/test-{n:04d}.hat-00.00.png" for n in range(4)
    ]
    assert all(row["seconds"] > 0 and row["train_seed"] == 0 and row["method"] == "moa" for row in made)
    assert Image.open(tmp_path / made[0]["path"]).size == (32, 32)
    run(config, "prior", [requests], subjects, tmp_path / "prior.parquet", tmp_path)
    assert all(row["train_seed"] is None for row in samples.read(tmp_path / "prior.parquet", samples.MADE))


def test_images_of_another_training_lie_apart(config, requests, subjects, trained, tmp_path):
    out = tmp_path / "made.parquet"
    run(config, "moa", [requests], subjects, out, tmp_path, trained, folder="moa-seed-1")
    made = samples.read(out, samples.MADE)
    assert {row["method"] for row in made} == {"moa"}
    assert made[0]["path"] == "images/moa-seed-1/test/single/test-0000.hat-00.00.png"
    assert (tmp_path / made[0]["path"]).is_file()


def test_whole_images_are_kept_and_broken_ones_made_again(config, requests, subjects, trained, tmp_path):
    out = tmp_path / "made.parquet"
    run(config, "moa", [requests], subjects, out, tmp_path, trained)
    paths = [tmp_path / row["path"] for row in samples.read(out, samples.MADE)]
    before, times = [Image.open(p).tobytes() for p in paths], [p.stat().st_mtime_ns for p in paths]
    first = rows(out)
    out.unlink()
    paths[0].write_bytes(paths[0].read_bytes()[:-30])
    run(config, "moa", [requests], subjects, out, tmp_path, trained)
    assert [Image.open(p).tobytes() for p in paths] == before
    assert [p.stat().st_mtime_ns == t for p, t in zip(paths, times, strict=True)] == [
        False,
        False,
        True,
        True,
    ]
    assert rows(out) == first


def test_a_wrong_subject_with_another_photo_makes_the_image_anew(
    config, requests, subjects, trained, tmp_path
):
    """Another file of the same identity, under the same id: test-0000 is shown as test-0002."""
    out = tmp_path / "made.parquet"
    run(config, "moa_wrong_subject", [requests], subjects, out, tmp_path, trained)
    path = tmp_path / rows(out)[0]["path"]
    before = Image.open(path).info[generation.KEY]
    people = read_rows(subjects, SUBJECT)
    people[2] |= {name: people[1][name] for name in ("image", "sha256")}
    assert people[2]["id"] == "test-0002"
    write_rows(tmp_path / "others.parquet", people, SUBJECT)
    run(config, "moa_wrong_subject", [requests], tmp_path / "others.parquet", out, tmp_path, trained)
    assert Image.open(path).info[generation.KEY] != before


def test_images_of_other_settings_or_weights_are_not_taken(config, requests, subjects, trained, tmp_path):
    out = tmp_path / "made.parquet"
    other = tmp_path / "other" / "moa"
    shutil.copytree(trained, other)
    log, weights = other / "log.csv", other / "diffusion_pytorch_model.safetensors"
    run(config, "moa", [requests], subjects, out, tmp_path, other)
    path = tmp_path / rows(out)[0]["path"]

    def remade(settings: GenerateConfig) -> bool:
        before = path.stat().st_mtime_ns
        run(settings, "moa", [requests], subjects, out, tmp_path, other)
        return path.stat().st_mtime_ns != before

    log.write_text("other times")
    assert not remade(config)
    assert remade(replace(config, sampling=Sampling(steps=3, batch_size=2)))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert remade(config)


def test_images_of_other_libraries_or_another_device_are_not_taken(config, monkeypatch):
    settings = config.method(None, [])
    keys = {generation.base_key("prior", settings)}
    keys.add(generation.base_key("prior", replace(settings, device="cuda")))
    monkeypatch.setattr(generation, "libraries", lambda: {"torch": "1.0"})
    keys.add(generation.base_key("prior", settings))
    assert len(keys) == 3


def test_memory_is_that_of_all_attempts(config, requests, subjects, tmp_path, monkeypatch):
    written, memory = generation.write_atomically, tmp_path / "memory.json"

    def stop(path, data):
        written(path, data)
        if len(list(tmp_path.rglob("*.png"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(generation, "peak_memory", lambda: 9_000)
        first.setattr(generation, "peak_gpu_memory", lambda: 900)
        first.setattr(generation, "write_atomically", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, "prior", [requests], subjects, tmp_path / "made.parquet", tmp_path, None, memory)
    assert not memory.exists()
    monkeypatch.setattr(generation, "peak_memory", lambda: 5_000)
    monkeypatch.setattr(generation, "peak_gpu_memory", lambda: 500)
    run(config, "prior", [requests], subjects, tmp_path / "made.parquet", tmp_path, None, memory)
    assert json.loads(memory.read_text()) == {"peak_memory_bytes": 9_000, "peak_gpu_bytes": 900}


def test_on_a_cpu_no_memory_of_a_gpu_is_counted(config, requests, subjects, tmp_path, monkeypatch):
    memory = tmp_path / "memory.json"
    run(config, "prior", [requests], subjects, tmp_path / "made.parquet", tmp_path, None, memory)
    assert json.loads(memory.read_text())["peak_gpu_bytes"] == 0
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert machine.peak_gpu_memory() == 7


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from moa.generation import GenerateConfig, run
from moa.methods import ModelSource, Sampling
torch.set_num_threads(1)
a = sys.argv
if a[7] == "slow":
    from moa.baselines.moa import MoA
    batch = MoA._batch
    MoA._batch = lambda self, part: (time.sleep(1), batch(self, part))[1]
run(GenerateConfig(ModelSource(a[1]), ModelSource(a[2]), Sampling(steps=2, batch_size=2)), "moa",
    [Path(a[3])], Path(a[4]), Path(a[5]) / "made.parquet", Path(a[5]), Path(a[6]))
"""


def start(models, requests, subjects, root, trained, speed):
    arguments = [models[0].id, models[1].id, *map(str, (requests, subjects, root, trained)), speed]
    home = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, start_new_session=True, cwd=home, env=environment)


@pytest.mark.slow
def test_killed_generation_goes_on(models, requests, subjects, trained, tmp_path):
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    process = start(models, requests, subjects, tmp_path / "killed", trained, "slow")
    while process.poll() is None and not list((tmp_path / "killed").rglob("*.png")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "made.parquet").exists()
    for name in ("killed", "whole"):
        assert start(models, requests, subjects, tmp_path / name, trained, "fast").wait() == 0
    assert rows(tmp_path / "killed" / "made.parquet") == rows(tmp_path / "whole" / "made.parquet")
    for row in rows(tmp_path / "whole" / "made.parquet"):
        killed, whole = (Image.open(tmp_path / name / row["path"]) for name in ("killed", "whole"))
        assert killed.tobytes() == whole.tobytes()


def test_broken_inputs_are_named(config, requests, subjects, tmp_path):
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(requests.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"cut\.parquet is cut short"):
        run(config, "prior", [cut], subjects, tmp_path / "made.parquet", tmp_path)
    few = tiny.save_subjects(tmp_path / "few.parquet", 2)
    with pytest.raises(DataError, match="no photo of subject test-0002"):
        run(config, "prior", [requests], few, tmp_path / "made.parquet", tmp_path)


def test_trained_weights_are_looked_for_in_the_results(models, trained, tmp_path):
    config = TryConfig(*models, Sampling(steps=2, batch_size=2), output=tmp_path / "results")
    tiny.photo(3).save(tmp_path / "me.png")
    ask = {"subject": [tmp_path / "me.png"], "prompt": "a man in a red hat"}
    shutil.copytree(trained, tmp_path / "results/train/moa")
    generate_one(config, **ask, out=tmp_path / "found.png")
    generate_one(config, **ask, out=tmp_path / "given.png", trained=trained)
    assert (tmp_path / "found.png").read_bytes() == (tmp_path / "given.png").read_bytes()
    missing = (
        r"results/train/fastcomposer/config\.json is missing: train first .*train-fastcomposer.*--trained"
    )
    with pytest.raises(FileNotFoundError, match=missing):
        generate_one(config, **ask, out=tmp_path / "none.png", method="fastcomposer")
    generate_one(config, **ask, out=tmp_path / "prior.png", method="prior")


def test_one_image_for_a_person(models, trained, tmp_path):
    config = TryConfig(*models, Sampling(steps=2, batch_size=2))
    tiny.photo(3).save(tmp_path / "me.png")
    out = tmp_path / "new" / "image.png"
    generate_one(config, [tmp_path / "me.png"], "a man in a red hat", out, seed=3, trained=trained)
    assert Image.open(out).size == (32, 32)
    first = out.read_bytes()
    generate_one(
        config, [tmp_path / "me.png"], "a man in a red hat", out, word=["man"], seed=3, trained=trained
    )
    assert out.read_bytes() == first
    with pytest.raises(ValueError, match="names 0 of 1 subjects"):
        generate_one(config, [tmp_path / "me.png"], "a red hat", out, trained=trained)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.png: no image bytes"):
        generate_one(config, [tmp_path / "empty.png"], "a man", out, trained=trained)
    with pytest.raises(FileNotFoundError, match="train first"):
        generate_one(config, [tmp_path / "me.png"], "a man", out, trained=tmp_path)


def test_words_for_people_are_found_in_order():
    assert first_words("a Woman and a man", 2) == [(2, 7), (14, 17)]
    assert first_words("a woman and a man", 1) == [(2, 7)]
    assert first_words("a child in a hat", 1) == [(2, 7)]
    assert first_words("a woman with a man bun beside an old man", 2) == [(2, 7), (37, 40)]
    with pytest.raises(ValueError, match=r"names 1 of 2 subjects.*--word"):
        first_words("a woman with a man bun", 2)
