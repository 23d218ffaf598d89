"""Weights that no hub pins, through Snakemake: checked before a GPU is used, and nobody's file is removed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from facenet_pytorch import InceptionResnetV1

from moa import lockfile, stages
from moa.hashing import file_hash
from tests.workflow.conftest import Run
from tests.workflow.test_environments import rules
from tests.workflow.test_ingest import PAPER

pytestmark = pytest.mark.slow

FILE = PAPER["models"]["identity"]["id"]
LPIPS = {"id": "data/models/alexnet.pth", "heads": "data/models/alex.pth"}
ELSEWHERE = """
import urllib.request
opened = urllib.request.urlopen
urllib.request.urlopen = lambda request, *rest, **more: opened("{uri}")
"""


def edges(graph: str) -> dict[str, set[str]]:
    """The rules that each rule comes straight after, of the graph that Snakemake prints."""
    names = dict(re.findall(r'(\d+)\[label = "(\w+)', graph))
    after: dict[str, set[str]] = {name: set() for name in names.values()}
    for one, other in re.findall(r"(\d+) -> (\d+)", graph):
        after[names[other]].add(names[one])
    return after


def before(name: str, after: dict[str, set[str]]) -> set[str]:
    """All rules that run before one."""
    return after[name].union(*(before(other, after) for other in after[name]))


@pytest.mark.parametrize(
    ("source", "methods", "dear"),
    [
        ("folder", {}, {"caption", "caption_ten", "segment", "segment_ten"}),
        ("fastcomposer", {}, {"train", "trial_train"}),  # brings captions and masks
        ("fastcomposer", {"moa": [], "moa_wrong_subject": [], "fastcomposer": []}, {"generate", "score"}),
        ("fastcomposer", {"textual_inversion": ["single"]}, {"learn_subjects"}),
    ],
)
def test_weights_are_checked_before_a_gpu_is_used(
    source: str, methods: dict, dear: set[str], snakemake: Run
) -> None:
    """Also where no other rule that is dear comes before."""
    config = PAPER | {"source": source, "models": PAPER["models"] | {"lpips": LPIPS}}
    config["ten_shards_a_job"] = True  # besides the rules of a shard there are those of ten
    config |= {"ablations": {"moa": {"default": {}, "frozen": {"train": {"image_encoder_layers": 0}}}}}
    if methods:
        config |= {"methods": {name: [] for name in PAPER["methods"]} | {"prior": ["single"]} | methods}
        config["ablations"] = {}
    done = snakemake("--rulegraph", config=config)
    assert done.returncode == 0, done.stderr
    after = edges(done.stdout)
    users = {name for name, text in rules() if "gpu=" in text and name in after}
    assert users >= dear
    checks = {"lock_models", "fetch_identity", "lpips_by_hand"}
    assert [name for name in sorted(users) if not checks <= before(name, after)] == []


def test_a_folder_s_file_is_noted_and_a_changed_one_stops_the_run(snakemake: Run, project: Path) -> None:
    file, lock = project / FILE, project / PAPER["models"]["identity"]["lock"]
    file.parent.mkdir(parents=True)
    torch.save(InceptionResnetV1(pretrained=None).state_dict(), file)
    good = file.read_bytes()
    done = snakemake("lock_models", "--cores", "1", config=PAPER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lockfile.read(lock)[1] == {FILE: file_hash(file)}
    assert "fetch_identity" not in done.stdout + done.stderr
    again = snakemake("lock_models", "--dry-run", config=PAPER)
    assert "Nothing to be done" in again.stdout + again.stderr

    file.write_bytes(b"<html>")
    done = snakemake("lock_models", "--cores", "1", config=PAPER)
    log = project / "results/paper/logs/lock_models.log"
    assert done.returncode == 1 and f"{FILE} has SHA-256" in log.read_text()
    assert file.read_bytes() == b"<html>" and lockfile.read(lock)[1]

    file.write_bytes(good)
    assert snakemake("lock_models", "--cores", "1", "--forceall", config=PAPER).returncode == 0
    assert file.read_bytes() == good


def test_a_check_that_fails_later_keeps_its_mark_and_fails_again(snakemake: Run, project: Path) -> None:
    """Weights that are named late: the file that trainings wait for stays, and the error comes each time."""
    file = project / FILE
    file.parent.mkdir(parents=True)
    torch.save(InceptionResnetV1(pretrained=None).state_dict(), file)
    assert snakemake("lock_models", "--cores", "1", config=PAPER).returncode == 0
    config = PAPER | {"models": PAPER["models"] | {"lpips": LPIPS}}
    for name in LPIPS.values():
        (project / name).write_bytes(b"<html>")
    for _ in range(2):
        done = snakemake("tables", "--cores", "1", "--until", "lock_models", config=config)
        assert done.returncode == 1, done.stdout + done.stderr
        assert (project / "results/paper/models.checked").is_file()
        assert not (project / "results/paper/models.passed").exists()
    for name in LPIPS.values():
        (project / name).unlink()
    done = snakemake("lock_models", "--cores", "1", config=PAPER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_missing_file_is_fetched_or_asked_for(
    snakemake: Run, project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    done = snakemake("lock_models", "--cores", "1", config=PAPER)
    said = (project / "results/paper/logs/fetch_identity.log").read_text()
    assert done.returncode == 1
    assert f"error: {FILE} is not there" in said and "download it by hand and put it there" in said

    there = tmp_path_factory.mktemp("there")
    torch.save(InceptionResnetV1(pretrained=None).state_dict(), there / "weights.pt")
    (there / "sitecustomize.py").write_text(ELSEWHERE.format(uri=(there / "weights.pt").as_uri()))
    monkeypatch.setenv("PYTHONPATH", str(there), prepend=":")
    done = snakemake("lock_models", "--cores", "1", config=PAPER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert file_hash(project / FILE) == file_hash(there / "weights.pt")
    again = snakemake("lock_models", "--dry-run", config=PAPER)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_lpips_is_asked_for(snakemake: Run, project: Path) -> None:
    (project / FILE).parent.mkdir(parents=True)
    (project / FILE).touch()
    config = PAPER | {"models": PAPER["models"] | {"lpips": LPIPS}}
    done = snakemake("lock_models", "--cores", "1", config=config)
    assert done.returncode == 1
    said = (project / "results/paper/logs/lpips_by_hand.log").read_text()
    assert "data/models/alexnet.pth data/models/alex.pth" in said


def test_only_weights_that_no_hub_pins_are_listed() -> None:
    models = {"identity": {"kind": "auto", "id": "someone/faces"}, "lpips": {}, "prior": {"id": "x"}}
    assert [stages.weights({"models": models}, role) for role in models] == [[], [], []]
    models = {"identity": {"id": "a.pt"}, "lpips": LPIPS}
    assert stages.model_files({"models": models}, "identity") == ["a.pt"]
    assert stages.model_files({"models": models}, "lpips") == list(LPIPS.values())
    with pytest.raises(ValueError, match=r"models\.identity: kind facenet needs the key id"):
        stages.weights({"models": {"identity": {}}}, "identity")
