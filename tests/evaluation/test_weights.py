"""Weights that no hub pins: fetched where they are missing, noted once, and refused when they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from torchvision.models import alexnet

from moa import lockfile
from moa.__main__ import run
from moa.data.errors import DataError
from moa.evaluation import weights
from moa.evaluation.identity import EmbedderConfig, FaceNetEmbedder, load_embedder
from moa.evaluation.perceptual import PerceptualConfig
from moa.evaluation.weights import WeightsConfig
from moa.hashing import ROOT, file_hash
from tests.evaluation.test_perceptual import HEADS


@pytest.fixture(scope="module")
def facenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file in the layout of the published one, untrained."""
    path = tmp_path_factory.mktemp("facenet") / "vggface2.pt"
    torch.save(InceptionResnetV1(pretrained=None).state_dict(), path)
    return path


@pytest.fixture
def config(facenet: Path, tmp_path: Path) -> EmbedderConfig:
    (tmp_path / "weights.pt").hardlink_to(facenet)
    return EmbedderConfig("facenet", str(tmp_path / "weights.pt"), lock=tmp_path / "models.sha256")


def lock(config: EmbedderConfig) -> None:
    weights.lock(WeightsConfig(config, PerceptualConfig()))


def replace_file(path: str | None, content: bytes) -> None:
    Path(str(path)).unlink()
    Path(str(path)).write_bytes(content)


def test_the_first_run_notes_the_hash_and_scoring_reads_it(config: EmbedderConfig) -> None:
    with pytest.raises(DataError, match=r"models\.sha256 has no line for .*weights\.pt"):
        load_embedder(config)
    lock(config)
    assert lockfile.read(config.lock)[1] == {config.id: file_hash(Path(str(config.id)))}
    written = config.lock.stat().st_mtime_ns
    lock(config)
    assert config.lock.stat().st_mtime_ns == written
    assert isinstance(load_embedder(config), FaceNetEmbedder)


def name_of(line: str) -> str:
    return line.partition("  ")[2]


@pytest.mark.parametrize("note", ["# trusted: by hand", "#no space", "#", "##  two"])
def test_what_stands_beside_the_hashes_stays(note: str, config: EmbedderConfig) -> None:
    lock(config)
    first, *rest = config.lock.read_text().splitlines()
    other = f"{'0' * 64}  another.pt"
    config.lock.write_text("\n".join([first, other, note, ""]))
    lock(config)
    assert config.lock.read_text().splitlines() == [first, note, *sorted([other, *rest], key=name_of)]


def test_a_changed_file_is_refused_and_the_lock_stays(config: EmbedderConfig) -> None:
    lock(config)
    noted = config.lock.read_bytes()
    torch.save(InceptionResnetV1(pretrained=None).state_dict(), Path(str(config.id)).with_name("other"))
    replace_file(config.id, Path(str(config.id)).with_name("other").read_bytes())
    for use in (lock, load_embedder):
        with pytest.raises(DataError, match=r"weights\.pt has SHA-256 .* put the old file back"):
            use(config)
    assert config.lock.read_bytes() == noted
    config.lock.unlink()
    lock(config)


class Runs:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("what", ["page", "code", "cut", "layers", "list"])
def test_what_is_no_weights_is_not_noted(what: str, config: EmbedderConfig, tmp_path: Path) -> None:
    file, good = Path(str(config.id)), Path(str(config.id)).read_bytes()
    made = tmp_path / "made"
    torch.save({"code": Runs(tmp_path / "ran"), "layers": {"a": torch.zeros(1)}}.get(what, [1]), made)
    replace_file(config.id, {"page": b"<html>", "cut": good[:-1000]}.get(what, made.read_bytes()))
    with pytest.raises(DataError, match=f"^{file} (is no file of weights|holds)"):
        lock(config)
    assert not config.lock.exists() and not (tmp_path / "ran").exists()


def test_a_missing_file_is_named(config: EmbedderConfig) -> None:
    lock(config)
    Path(str(config.id)).unlink()
    for use in (lock, load_embedder):
        with pytest.raises(FileNotFoundError, match=r"weights\.pt is missing; .* models\.identity\.id"):
            use(config)


def test_models_of_the_hub_have_no_lock(tmp_path: Path) -> None:
    lock(EmbedderConfig("auto", "someone/faces", lock=tmp_path / "models.sha256"))
    assert not any(tmp_path.iterdir())


# --- Fetching ---------------------------------------------------------------------------------------------


def test_the_address_is_facenet_pytorch_s_and_the_preset_s_file() -> None:
    from tests.workflow.test_ingest import PAPER

    assert weights.address().startswith("https://github.com/timesler/facenet-pytorch/releases/")
    assert weights.address().endswith("/" + Path(PAPER["models"]["identity"]["id"]).name)


def test_what_is_not_there_is_fetched_once(
    facenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EmbedderConfig("facenet", str(tmp_path / "new/weights.pt"), lock=tmp_path / "models.sha256")
    monkeypatch.setattr(weights, "address", facenet.as_uri)
    weights.fetch_identity(config)
    assert file_hash(Path(str(config.id))) == file_hash(facenet)
    lock(config)
    monkeypatch.setattr(weights, "address", lambda: "file:///nowhere")
    weights.fetch_identity(config)


def test_an_address_that_the_package_does_not_show_is_asked_for_where_the_file_is_missing(
    config: EmbedderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_weights(model: torch.nn.Module, name: str) -> str:
        return f"https://example.org/{name}-vggface2.pt"

    for other in (load_weights, None):
        monkeypatch.setattr("facenet_pytorch.models.inception_resnet_v1.load_weights", other)
        weights.fetch_identity(config)
        with pytest.raises(DataError, match=r"facenet-pytorch .* where models\.identity\.id says"):
            weights.fetch_identity(replace(config, id=f"{config.id}.new"))


def test_without_a_network_the_place_for_the_file_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    config = EmbedderConfig("facenet", str(tmp_path / "weights.pt"))
    with pytest.raises(DataError, match=r"weights\.pt is not there, and https://github.* by hand and put it"):
        weights.fetch_identity(config)
    assert not any(tmp_path.iterdir())


# --- LPIPS ------------------------------------------------------------------------------------------------


def test_both_files_of_lpips_are_noted_beside_the_others(
    config: EmbedderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tmp_path / "alexnet.pth"
    torch.save(alexnet(weights=None).state_dict(), network)
    lpips = PerceptualConfig(str(network), str(HEADS), config.lock)
    both = WeightsConfig(config, lpips)
    with pytest.raises(DataError, match=r"the published one begins with 7be5be79; .* models\.lpips\.id"):
        weights.lock(both)
    monkeypatch.setattr(weights, "ALEXNET", file_hash(network)[:8])
    weights.lock(both)
    assert lockfile.read(config.lock)[1] == {
        name: file_hash(Path(name)) for name in (str(config.id), str(network), str(HEADS))
    }
    replace_file(str(network), b"x")
    with pytest.raises(DataError, match=r"alexnet\.pth has SHA-256 .* put the old file back"):
        weights.lock(both)


def test_published_hashes_are_those_of_the_packages() -> None:
    from torchvision.models import AlexNet_Weights

    assert file_hash(HEADS) == weights.LPIPS_HEADS
    assert AlexNet_Weights.IMAGENET1K_V1.url.endswith(f"-{weights.ALEXNET}.pth")


def test_the_command_line_takes_the_paper_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^data/models/\S+-vggface2\.pt is missing"):
        run(["lock-models", "--config", str(ROOT / "config/paper.yaml")])
