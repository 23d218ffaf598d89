import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from moa.prompts import FuseMLP, MultimodalPrompt, fourier_features

F, D, LAYERS = 5, 8, 3


def prompt(**settings):
    module = MultimodalPrompt(F, D, LAYERS, frequencies=4, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def mlp(block, x):
    y = layer_norm(x, x.shape[-1:], block.norm.weight, block.norm.bias)
    return block.fc2(gelu(block.fc1(y)))


def equation_8(module, f, c, t, layer):
    """Eq. 8 for one subject, written out."""
    position = []
    for x in (t / 1000, layer / (LAYERS - 1)):
        position += [math.sin(2**k * math.pi * x) for k in range(4)]
        position += [math.cos(2**k * math.pi * x) for k in range(4)]
    encoding = module.position.linear(torch.tensor(position))
    joined = module.norm(torch.cat([f, c])) + module.position_norm(encoding)
    first = mlp(module.fuse.m1, joined) + c
    second = first + mlp(module.fuse.m2, first)
    return module.fuse.norm(second)


def test_the_module_is_equation_8_for_every_sample_layer_and_subject():
    module = prompt()
    f, c, t = torch.randn(2, 3, F), torch.randn(2, 3, D), torch.tensor([7, 912])
    found = module(f, c, t)
    assert found.shape == (LAYERS, 2, 3, D)
    for layer in range(LAYERS):
        for b in range(2):
            for s in range(3):
                expected = equation_8(module, f[b, s], c[b, s], int(t[b]), layer)
                torch.testing.assert_close(found[layer, b, s], expected, atol=1e-5, rtol=1e-4)


def test_prompts_differ_by_timestep_and_layer_unless_spacetime_is_off():
    f, c = torch.randn(1, 1, F), torch.randn(1, 1, D)
    module = prompt()
    early, late = module(f, c, torch.tensor([10])), module(f, c, torch.tensor([700]))
    assert (early - late).abs().max() > 1e-3
    assert (early[0] - early[1]).abs().max() > 1e-3
    fixed = prompt(spacetime=False)
    early, late = fixed(f, c, torch.tensor([10])), fixed(f, c, torch.tensor([700]))
    assert torch.equal(early, late)
    assert torch.equal(early[0], early[2])


def test_neighbouring_timesteps_are_told_apart():
    features = fourier_features(torch.arange(1000) / 1000, 8)
    assert torch.cdist(features[:-1, None], features[1:, None]).min() > 1e-2


def test_the_fuse_module_has_fastcomposers_size():
    with torch.device("meta"):
        module = FuseMLP(1536, 768)
    assert sum(parameter.numel() for parameter in module.parameters()) == 2_958_336


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works(dtype):
    module = prompt().to(dtype)
    out = module(torch.randn(1, 1, F).to(dtype), torch.randn(1, 1, D).to(dtype), torch.tensor([999]))
    assert out.dtype == dtype
    assert out.isfinite().all()
