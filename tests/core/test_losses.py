import pytest
import torch

from moa.losses import map_size, masked_loss, object_loss, router_loss, snr_weights


def square(size=16, low=4, high=12):
    """A mask [1, 1, size, size] with a square of ones."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., low:high, low:high] = 1
    return mask


def test_masked_loss_is_the_mean_over_all_pixels_and_channels():
    prediction, target = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    mask = square().expand(2, -1, -1, -1)
    inside = (prediction - target)[..., 4:12, 4:12].square().sum()
    torch.testing.assert_close(masked_loss(prediction, target, mask), inside / (2 * 4 * 16 * 16))
    prediction[..., :4, :] += 100
    torch.testing.assert_close(masked_loss(prediction, target, mask), inside / (2 * 4 * 16 * 16))


def test_masked_loss_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"8, 8.*16, 16"):
        masked_loss(torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 16, 16), torch.ones(1, 1, 8, 8))


def test_router_loss_is_zero_when_the_background_is_the_priors():
    mask = square()
    prior = (1 - mask).flatten(1)
    assert router_loss({"a": prior}, mask) == 0
    assert router_loss({"a": torch.ones(1, 256), "b": torch.ones(1, 64)}, mask) == 0


def test_router_loss_closed_form():
    """Background 3/4 of the pixels; R the mean of .2 and .6."""
    maps = {"a": torch.full((1, 256), 0.2), "b": torch.full((1, 64), 0.6)}
    assert router_loss(maps, square()).item() == pytest.approx(0.75 * (1 - 0.4) ** 2)
    assert router_loss({"a": torch.zeros(1, 256)}, torch.zeros(1, 1, 16, 16)).item() == pytest.approx(1)


def test_router_loss_resizes_to_the_largest_map_of_the_layers():
    mask = square(16)
    fine = torch.zeros(1, 1, 16, 16)
    fine[..., ::2] = 1
    alone = router_loss({"fine": fine.flatten(1)}, mask)
    with_coarse = router_loss({"fine": fine.flatten(1), "coarse": torch.full((1, 16), 0.5)}, mask)
    background = 1 - mask
    expected = (background * (1 - (fine + 0.5) / 2)).square().mean()
    torch.testing.assert_close(with_coarse, expected)
    assert alone != with_coarse


def test_object_loss_of_an_ideal_and_a_uniform_map():
    mask = square()
    present = torch.ones(1, 1, dtype=torch.bool)
    ideal, uniform = mask.flatten(2), torch.full((1, 1, 256), 0.3)
    assert object_loss({"a": ideal}, mask, present).item() == pytest.approx(-1, abs=1e-5)
    assert object_loss({"a": 1 - ideal}, mask, present).item() == pytest.approx(1, abs=1e-5)
    assert object_loss({"a": uniform}, mask, present).item() == pytest.approx(0, abs=1e-5)
    assert object_loss({"a": ideal, "b": uniform}, mask, present).item() == pytest.approx(-0.5, abs=1e-5)


def test_object_loss_skips_padding_and_samples_without_subject():
    """Sample 0: an ideal and a uniform subject; 1: an inverse subject and padding; 2: none."""
    mask = square().expand(3, 2, -1, -1)
    ideal = square().flatten()
    maps = torch.stack([ideal, torch.full((256,), 0.5), 1 - ideal, ideal, ideal, ideal]).view(3, 2, 256)
    present = torch.tensor([[True, True], [True, False], [False, False]])
    expected = ((-1 + 0) / 2 + 1) / 2
    assert object_loss({"a": maps}, mask, present).item() == pytest.approx(expected, abs=1e-5)
    assert object_loss({"a": maps}, mask, torch.zeros(3, 2, dtype=torch.bool)) == 0


def test_padding_gets_no_gradient():
    maps = torch.rand(1, 2, 256, requires_grad=True)
    masks = torch.cat([square(), torch.zeros(1, 1, 16, 16)], 1)
    object_loss({"a": maps}, masks, torch.tensor([[True, False]])).backward()
    assert maps.grad.isfinite().all()
    assert maps.grad[0, 1].abs().max() == 0
    assert maps.grad[0, 0].abs().max() > 0


@pytest.mark.parametrize(
    ("pixels", "height", "width", "expected"),
    [
        (64, 16, 16, (8, 8)),
        (96, 16, 24, (8, 12)),
        (25, 9, 9, (5, 5)),
        (15, 9, 5, (5, 3)),
        (64, 64, 64, (8, 8)),
    ],
)
def test_map_sizes_follow_the_halvings_of_the_latents(pixels, height, width, expected):
    assert map_size(pixels, height, width) == expected


def test_a_map_that_fits_no_halving_is_an_error():
    with pytest.raises(ValueError, match=r"60 pixels.*16 × 16"):
        map_size(60, 16, 16)


@pytest.mark.parametrize(
    "loss", [lambda: router_loss({}, square()), lambda: object_loss({}, square(), torch.ones(1, 1).bool())]
)
def test_nothing_recorded_is_an_error(loss):
    with pytest.raises(ValueError, match="Recorder"):
        loss()


def test_snr_weights_turn_either_loss_into_the_clipped_loss_on_clean_latents():
    """ε and v losses of the same error in x₀ weigh the same: min(SNR, γ) ‖x₀ − x̂₀‖², in closed form."""
    alphas = torch.linspace(0.999, 0.01, 1000)
    timesteps = torch.tensor([0, 400, 999])
    a, s = alphas[timesteps].sqrt(), (1 - alphas[timesteps]).sqrt()
    error = torch.tensor([0.3, 0.2, 0.1])  # in x₀
    expected = (a / s).square().clamp(max=5) * error.square()
    epsilon, velocity = a / s * error, error / s  # what that error is in ε and in v
    for kind, own in (("epsilon", epsilon), ("v_prediction", velocity)):
        torch.testing.assert_close(snr_weights(alphas, timesteps, kind, 5.0) * own.square(), expected)
    assert snr_weights(alphas, timesteps, "epsilon", 0.0).tolist() == [1, 1, 1]


def test_masked_loss_weighs_samples():
    prediction, target, mask = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    weighted = masked_loss(prediction, target, mask, torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(weighted, torch.tensor(2.0))
