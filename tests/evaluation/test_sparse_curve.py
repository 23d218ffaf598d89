"""The curve of sparse experts: its images, times and shares are those of the thresholds that it names."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from evaluation_fakes import ColorJudges, make_rows
from PIL import Image
from test_router import make_moa, requests  # noqa: F401

from moa.data.records import write_rows
from moa.evaluation import samples, sparse
from moa.evaluation.router import Recording
from moa.evaluation.samples import REQUEST
from moa.methods import ModelSource


def config(**changes):
    return sparse.SparseConfig(*[ModelSource(name) for name in ("p", "i", "c", "s")], **changes)


def pixels(images):
    return [np.asarray(image) for image in images]


def test_every_threshold_gets_its_own_images_and_the_conditioner_stays(requests):  # noqa: F811
    moa = make_moa("expert")  # its expert has 1 − softmax(1, 0) = .27 everywhere
    made = sparse.generate(moa, requests, (0.0, 0.1, 0.3))
    moa.conditioner.sparse_threshold = 0.3
    alone = moa.generate(requests)
    moa.conditioner.sparse_threshold = 0.0
    assert np.array_equal(pixels(made[0.0].images), pixels(moa.generate(requests)))
    assert np.array_equal(pixels(made[0.3].images), pixels(alone))
    assert not np.array_equal(pixels(made[0.3].images), pixels(made[0.0].images))
    assert np.abs(np.subtract(pixels(made[0.1].images), pixels(made[0.0].images), dtype=int)).max() <= 1
    assert all(turns.seconds > 0 and turns.cpu_seconds > 0 for turns in made.values())


def test_active_pixels_are_counted_over_layers_of_any_size():
    maps = {
        "coarse": np.array([[[[0.5, 1.0]]]], dtype=np.float32),
        "fine": np.array([[[[0.8, 0.97], [0.99, 1.0]]]], dtype=np.float32),
    }
    assert sparse.active_pixels(Recording([], [1], maps, 1), (0.02, 0.4)) == [3, 1, 6]


def test_likeness_is_the_psnr_of_whole_images():
    grey = [Image.new("RGB", (4, 4), (c, c, c)) for c in (100, 110, 100)]
    found = sparse.likeness(grey[:2], grey[1:])
    np.testing.assert_allclose(found, 20 * np.log10(255 / 10), atol=1e-9)


def test_a_row_a_threshold_with_the_dense_run_first(tmp_path, subjects_file, monkeypatch):
    moa = make_moa("expert")
    for name, parameter in moa.adapter.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(sparse, "make", lambda method: moa)
    monkeypatch.setattr(sparse.SparseConfig, "judges", lambda self: ColorJudges(None))
    rows = [{k: row[k] for k in REQUEST.names} for row in make_rows("single", ("moa",))[:3]]
    samples.write(tmp_path / "test.parquet", rows, REQUEST)
    arguments = (subjects_file, tmp_path, tmp_path / "sparse.csv")
    with pytest.raises(ValueError, match="not all of the split validation"):
        sparse.run(config(), [tmp_path / "test.parquet"], *arguments)
    write_rows(tmp_path / "requests.parquet", [row | {"split": "validation"} for row in rows], REQUEST)
    sparse.run(config(thresholds=(0.1, 0.3)), [tmp_path / "requests.parquet"], *arguments)
    dense, whole, none = csv.DictReader((tmp_path / "sparse.csv").open())
    assert [float(row["threshold"]) for row in (dense, whole, none)] == [0, 0.1, 0.3]
    assert (dense["psnr"], dense["time_ratio"], dense["cpu_ratio"]) == ("", "1.000000", "1.000000")
    assert [float(row["active"]) for row in (dense, whole, none)] == [1, 1, 0]
    assert float(whole["psnr"]) > float(none["psnr"]) > 0
    assert {row["images"] for row in (dense, whole, none)} == {"3"}


def test_thresholds_are_weights():
    with pytest.raises(ValueError, match="between 0 and 1"):
        config(thresholds=(0.0,))


def test_shares_are_those_of_the_dense_router(requests):  # noqa: F811
    moa = make_moa("expert")
    moa.conditioner.sparse_threshold = 0.3
    assert sparse.active_shares(moa, requests, (0.26, 0.28)) == {0.0: 1, 0.26: 1, 0.28: 0}
    assert moa.conditioner.sparse_threshold == 0.3
