"""PSNR and SSIM against scikit-image; which images form a swap."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_fakes import make_rows
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from moa.evaluation import context


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    other = np.clip(one + rng.normal(0, 20, one.shape), 0, 255).astype(np.uint8)
    return one, other


def test_psnr_equals_scikit_image(images):
    everywhere = np.ones(images[0].shape[:2], dtype=bool)
    expected = peak_signal_noise_ratio(*images, data_range=255)
    assert context.psnr(*images, everywhere) == pytest.approx(expected)


def test_ssim_equals_scikit_image(images):
    _, expected = structural_similarity(
        *images,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    np.testing.assert_allclose(context.ssim_map(*images), expected.mean(axis=2), atol=1e-9)


def test_only_what_is_outside_counts(images):
    one = images[0].copy()
    subject = np.zeros(one.shape[:2], dtype=bool)
    subject[5:20, 5:20] = True
    other = one.copy()
    other[subject] = 255 - other[subject]
    kept = context.kept(one, other, subject)
    assert kept is not None
    assert kept.psnr == pytest.approx(58.92, abs=0.01)  # equal up to rounding
    assert kept.outside == pytest.approx(1 - 225 / one[..., 0].size)
    other[0, 0] = 255 - other[0, 0]
    assert context.kept(one, other, subject).psnr < 50


def test_no_value_where_subjects_fill_the_image(images):
    assert context.kept(*images, np.ones(images[0].shape[:2], dtype=bool)) is None


def test_dilation_grows_by_its_radius_everywhere():
    mask = np.zeros((41, 41), dtype=bool)
    mask[20, 20] = True
    grown = context.dilate(mask, 5 / 41)
    y, x = np.mgrid[:41, :41]
    np.testing.assert_array_equal(grown, (x - 20) ** 2 + (y - 20) ** 2 <= 25)


def test_swaps_pair_rows_that_differ_in_subjects_only():
    rows = make_rows("swap", ("moa",))
    pairs = context.swaps(rows)
    assert len(pairs) == 2 * 15  # two prompts, six subjects
    assert all(a["prompt"] == b["prompt"] and a["seed"] == b["seed"] for a, b in pairs)
    assert all(a["subject"] < b["subject"] for a, b in pairs)
    assert context.swaps(make_rows("single", ("moa",))) == []  # every subject has noise of its own
    rows[0]["prompt"] = rows[0]["prompt"].replace("man", "woman")
    assert len(context.swaps(rows)) == 2 * 15 - 5
