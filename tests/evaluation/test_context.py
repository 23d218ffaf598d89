"""PSNR and SSIM against scikit-image; which images form a swap."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_fakes import make_rows
from scipy import ndimage
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
    everywhere = np.ones(images[0].shape[:2], dtype=bool)
    _, expected = structural_similarity(
        *images,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    assert context.ssim(*images, everywhere) == pytest.approx(expected.mean(), abs=1e-9)


def test_ssim_of_a_part_is_the_weighted_mean_of_windows_that_end_there(images):
    """By the definition, a window at a time: what lies beside the part has no weight."""
    part = np.zeros(images[0].shape[:2], dtype=bool)
    part[6:20, 10:30] = True
    part[9:12, 14:18] = False
    one, other = (image.astype(float) for image in images)
    offsets = np.arange(-5, 6)
    gauss = np.exp(-(offsets**2) / (2 * 1.5**2))
    found = []
    for y, x in np.argwhere(part):
        rows, columns = slice(y - 5, y + 6), slice(x - 5, x + 6)
        weights = np.outer(gauss, gauss) * part[rows, columns]
        weights /= weights.sum()
        for color in range(3):
            a, b = one[rows, columns, color], other[rows, columns, color]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb, ab = ((weights * v).sum() for v in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb)))
            c1, c2 = 2.55**2, 7.65**2
            found.append((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert context.ssim(*images, part) == pytest.approx(np.mean(found), abs=1e-9)


def test_only_what_is_outside_counts(images):
    one = images[0].copy()
    subject = np.zeros(one.shape[:2], dtype=bool)
    subject[5:20, 5:20] = True
    other = one.copy()
    other[subject] = 255 - other[subject]
    kept = context.kept(one, other, subject)
    assert kept is not None
    assert kept.psnr == pytest.approx(58.92, abs=0.01)  # equal up to rounding
    assert kept.ssim == pytest.approx(1, abs=1e-9)  # although windows reach over the subject's edge
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


def test_dilation_equals_scipy_s_by_a_disc():
    y, x = np.ogrid[-4:5, -4:5]
    disc = x**2 + y**2 <= 16
    for seed, share in enumerate((0.0, 0.002, 0.1, 1.0)):
        mask = np.random.default_rng(seed).random((80, 60)) < share
        np.testing.assert_array_equal(context.dilate(mask, 0.05), ndimage.binary_dilation(mask, disc))


def test_swaps_pair_rows_that_differ_in_subjects_only():
    rows = make_rows("swap", ("moa",))
    pairs = context.swaps(rows)
    assert len(pairs) == 2 * 15  # two prompts, six subjects
    assert all(a["prompt"] == b["prompt"] and a["seed"] == b["seed"] for a, b in pairs)
    assert all(a["subject"] < b["subject"] for a, b in pairs)
    assert context.swaps(make_rows("single", ("moa",))) == []  # every subject has noise of its own
    rows[0]["prompt"] = rows[0]["prompt"].replace("man", "woman")
    assert len(context.swaps(rows)) == 2 * 15 - 5
