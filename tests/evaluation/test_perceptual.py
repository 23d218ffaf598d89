"""LPIPS against the package lpips, on the same random backbone and the published heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from test_shared import results
from torchvision.models import alexnet

from moa import lockfile
from moa.data.errors import DataError
from moa.data.records import read_rows
from moa.evaluation import context, preserved, samples, shared, swaps
from moa.evaluation.lpips import LPIPS
from moa.evaluation.measures import MEASURE
from moa.evaluation.perceptual import PerceptualConfig, load_perceptual
from moa.evaluation.table import to_markdown
from moa.evaluation.tables import kept_context
from moa.hashing import file_hash

__all__ = ["results"]  # a fixture
HEADS = Path(lpips.__file__).parent / "weights/v0.1/alex.pth"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PerceptualConfig:
    """An untrained AlexNet in torchvision's layout; the heads are the published ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(alexnet(weights=None).state_dict(), path)
    return PerceptualConfig(str(path), str(HEADS), path.with_name("lock"))


def images(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return one, np.clip(one + rng.normal(0, 40, one.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (96, 130)])
def test_equal_to_the_package(config, size):
    other = lpips.LPIPS(net="alex", pnet_rand=True, spatial=True, verbose=False).eval()
    features = torch.load(config.id, weights_only=True)
    layers = {name: value for name, value in features.items() if name.startswith("features.")}
    for name in other.net.state_dict():
        layer = name.split(".", 1)[1]  # "slice2.3.weight" is "features.3.weight"
        dict(other.net.named_parameters())[name].data.copy_(layers[f"features.{layer}"])
    one, two = images(*size)
    tensors = [torch.from_numpy(i).permute(2, 0, 1)[None] / 127.5 - 1 for i in (one, two)]
    with torch.inference_mode():
        expected = other(*tensors)[0, 0].numpy()
    found = LPIPS(config.id, config.heads)(one, two)
    assert expected.max() > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert LPIPS(config.id, config.heads)(one, one).max() == 0


def test_only_what_is_outside_counts(config):
    one, two = images(128, 64)
    two[64:] = one[64:]
    perceptual = LPIPS(config.id, config.heads)
    upper = np.zeros((128, 64), dtype=bool)
    upper[:64] = True
    everywhere = context.kept(one, two, np.zeros_like(upper), perceptual)
    below = context.kept(one, two, upper, perceptual)
    assert everywhere.lpips == pytest.approx(perceptual(one, two).mean())
    assert below.lpips == pytest.approx(perceptual(one, two)[64:].mean())
    assert below.lpips < everywhere.lpips / 2
    assert context.kept(one, two, upper).lpips is None


def test_weights_are_checked(config):
    assert load_perceptual(PerceptualConfig()) is None
    with pytest.raises(ValueError, match=r"models\.lpips needs both files"):
        replace(config, heads=None)
    with pytest.raises(DataError, match=r"lock has no line for .*alexnet\.pth, which models\.lpips\.id"):
        load_perceptual(config)
    lockfile.write(config.lock, [], {config.id: file_hash(Path(config.id)), config.heads: "0" * 64})
    with pytest.raises(DataError, match=r"alex\.pth has SHA-256 .* put the old file back"):
        load_perceptual(config)
    with pytest.raises(DataError, match="not AlexNet's"):
        LPIPS(config.id, str(HEADS.with_name("squeeze.pth")))
    with pytest.raises(DataError, match="holds no weights of AlexNet"):
        LPIPS(str(HEADS), config.heads)


class Distance:
    """The mean difference of colours, in the place of LPIPS."""

    def __call__(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.abs(one.astype(float) - other).mean(axis=2)


@pytest.mark.parametrize("weights", [True, False])
def test_it_reaches_every_comparison(weights, results, monkeypatch):
    for module in (swaps, preserved, shared):
        monkeypatch.setattr(module, "load_perceptual", lambda config: Distance() if weights else None)

    def files(*methods: str) -> tuple[list[Path], list[Path]]:
        return [results / f"{m}.parquet" for m in methods], [
            results / f"{m}-features.parquet" for m in methods
        ]

    (own, base), (seen, base_seen) = files("moa", "prior")
    swaps.compare_swaps([own], [seen], results, results / "kept.parquet")
    preserved.compare(own, seen, base, base_seen, results, results / "preserved.parquet")
    shared.compare(*files("moa", "fastcomposer"), results, results / "shared.parquet", [base], [base_seen])
    kept = read_rows(results / "kept.parquet", samples.KEPT)
    same = read_rows(results / "preserved.parquet", preserved.PRESERVED)
    both = read_rows(results / "shared.parquet", MEASURE)
    table = kept_context(kept)
    if not weights:
        assert kept and all(r["lpips"] is None for r in kept)
        assert same and all(r["lpips"] is r["noise_lpips"] is None for r in same)
        assert both and not [r for r in both if "lpips" in r["metric"]]
        assert {row["lpips"] for row in table.rows} == {"not measured"}
        assert "| not measured |" in to_markdown(table)
        return
    assert all(r["lpips"] > 0 for r in kept)
    noise = [r for r in same if r["kind"] == "single"]
    assert 0 < np.mean([r["lpips"] for r in noise]) < np.mean([r["noise_lpips"] for r in noise])
    assert {"swap_lpips_shared", "prior_lpips_shared"} <= {r["metric"] for r in both}
    assert table.rows[0]["lpips"] == pytest.approx(np.mean([r["lpips"] for r in kept]))
