"""The seven properties of the method on the true Stable Diffusion 1.5 U-Net, its weights random.

One U-Net of 860 M parameters is built once and each forward pass runs once, at 32 × 32 latents in float32
on the CPU; the tests compare the answers. Property 6, the operations of a pass at 64 × 64, needs no weights
and is in `test_adapter.py`; property 5 is of pure functions and is tried here on maps of this U-Net's sizes.
"""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from safetensors import safe_open
from torch import nn

from moa import MoAAdapter, MoAContext, Recorder
from moa.losses import object_loss, router_loss

pytestmark = pytest.mark.slow

TOLERANCE = {"atol": 1e-5, "rtol": 0}
SUBJECTS = (0, 1, 2, 4)
TIMES = torch.tensor([20, 300, 600, 950])
TOKEN = torch.tensor([[2, 5, 9, 30]] * 4)
FEATURE = 768


@torch.no_grad()
def fill(module, seed):
    """Random weights in place, of the size that PyTorch's own initialisation gives, and cheap."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = 0.1 if parameter.ndim < 2 else 1 / math.sqrt(parameter[0].numel())
        parameter.uniform_(-size, size, generator=generator)
    for part in module.modules():
        if isinstance(part, (nn.GroupNorm, nn.LayerNorm)):
            part.weight.add_(1)


def checksums(unet):
    """{parameter of the base U-Net: sum of its bits}: a change of one bit changes it."""
    return {
        name: int(value.view(torch.int32).sum(dtype=torch.int64))
        for name, value in unet.state_dict().items()
        if ".processor." not in name and not name.startswith("moa_") and "lora_" not in name
    }


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # diffusers' defaults are SD1.5's
    unet = unet.to_empty(device="cpu").eval()
    fill(unet, seed=0)
    return unet


@pytest.fixture(scope="module")
def adapter(unet):
    return MoAAdapter.from_unet(unet, image_feature_dim=FEATURE)


def batch():
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 4, 32, 32, generator=generator)
    text = torch.randn(4, 77, 768, generator=generator)
    features = torch.randn(4, 4, FEATURE, generator=generator)
    return latents, text, features


def context(rows, subjects, fixed=False, recorder=None):
    """The context of those rows of the batch, with as many subjects each."""
    _, text, features = batch()
    most = max(subjects)
    return MoAContext(
        text=text[rows],
        features=features[rows, :most],
        token=TOKEN[rows, :most],
        present=torch.arange(most)[None] < torch.tensor(subjects)[:, None],
        prior_only=torch.full((len(subjects),), fixed),
        recorder=recorder,
    )


@torch.no_grad()
def forward(unet, rows, given=None):
    latents, text, _ = batch()
    kwargs = {} if given is None else {"cross_attention_kwargs": {"moa": given}}
    return unet(latents[rows], TIMES[rows], text[rows], **kwargs).sample


def to_the_expert(adapter):
    """Routers that give every pixel to the personalization expert, to the last bit: R_1 = 1."""
    for name, parameter in adapter.named_parameters():
        if name.endswith("router.weight"):
            parameter.data.zero_()
        elif name.endswith("router.bias"):
            parameter.data.copy_(torch.tensor([-1e4, 1e4]))


def styled(unet, targets, *call):
    """The answer under a LoRA of random weights on those modules."""
    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    answer = forward(unet, *call)
    unet.unload_lora()
    return answer


LAST = slice(3, 4)


@pytest.fixture(scope="module")
def answers(unet, adapter):
    """Every forward pass that the tests look at, by name, and the base U-Net's bits."""
    found = {"base": forward(unet, LAST), "bits": checksums(unet)}
    adapter.install(unet)
    found["new"] = forward(unet, LAST, context(LAST, [0]))
    fill(adapter, seed=2)  # as far from the prior as training could go
    found["prior"] = forward(unet, LAST, context(LAST, [4], fixed=True))
    recorder = Recorder(adapter.loss_layers)
    found["mixed"] = forward(unet, slice(0, 4), context(slice(0, 4), SUBJECTS, recorder=recorder))
    found["maps"] = recorder
    for row, subjects in enumerate(SUBJECTS):
        one = slice(row, row + 1)
        found[f"alone {row}"] = forward(unet, one, context(one, [subjects]))
    return found


def test_it_is_the_true_size(unet, adapter):
    own = {id(parameter) for parameter in adapter.parameters()}
    assert sum(p.numel() for p in unet.parameters() if id(p) not in own) == 859_520_964


def test_1_a_new_adapter_without_subjects_is_the_base_model(answers):
    torch.testing.assert_close(answers["new"], answers["base"], **TOLERANCE)


def test_2_fixed_to_the_prior_it_is_the_base_model_however_far_training_went(answers):
    torch.testing.assert_close(answers["prior"], answers["base"], **TOLERANCE)
    assert (answers["mixed"][LAST] - answers["base"]).abs().max() > 1e-2


@pytest.mark.parametrize("row", range(4))
def test_4_a_batch_of_0_1_2_and_4_subjects_gives_each_its_own(answers, row):
    torch.testing.assert_close(answers["mixed"][row : row + 1], answers[f"alone {row}"], **TOLERANCE)


def test_5_the_losses_know_ideal_maps_of_these_sizes(answers):
    """−1 for an ideal map (the mask not resized), 0 for a uniform one and for a background at the prior."""
    maps, router = answers["maps"].attention, answers["maps"].router
    assert sorted({seen.shape[-1] for seen in maps.values()}) == [4 * 4, 8 * 8, 16 * 16]
    assert (len(maps), len(router)) == (11, 22)
    present = torch.arange(4)[None] < torch.tensor(SUBJECTS)[:, None]
    masks = torch.zeros(4, 4, 16, 16)
    for subject in range(4):
        masks[:, subject, :, 4 * subject : 4 * subject + 4] = 1
    ideal = {name: masks.flatten(2) for name, seen in maps.items() if seen.shape[-1] == 16 * 16}
    assert object_loss(ideal, masks, present).item() == pytest.approx(-1, abs=1e-5)
    uniform = {name: torch.full_like(seen, 0.3) for name, seen in maps.items()}
    assert object_loss(uniform, masks, present).item() == pytest.approx(0, abs=1e-5)
    assert object_loss(maps, masks, present).abs() < 0.5
    subject = masks[:, :1]
    assert router_loss({name: 1 - subject.flatten(1) for name in ideal}, subject) == 0
    assert router_loss(router, torch.nn.functional.interpolate(subject, 32)) > 0.01


def test_3_a_step_changes_nothing_frozen_and_nothing_frozen_is_saved(unet, adapter, answers, tmp_path):
    """One step at 16 × 16 latents; then every bit of the U-Net, and what is in the file."""
    trained = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    latents, text, _ = batch()
    small, given = latents[LAST, :, :16, :16], {"moa": context(LAST, [1])}
    answer = unet(small, TIMES[LAST], text[LAST], cross_attention_kwargs=given).sample
    answer.square().mean().backward()
    own = {id(parameter) for parameter in adapter.parameters()}
    assert {id(parameter) for parameter in unet.parameters() if parameter.grad is not None} == own
    torch.optim.SGD(adapter.trainable_parameters(), lr=1e3).step()
    adapter.zero_grad()
    assert checksums(unet) == answers["bits"]
    assert [name for name, p in adapter.named_parameters() if torch.equal(p, trained[name])] == []
    adapter.save_pretrained(tmp_path)
    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert sizes == {name: parameter.numel() for name, parameter in adapter.named_parameters()}
    assert sum(sizes.values()) == 93_536_640 + 49_984 + sum(p.numel() for p in adapter.prompt.parameters())


def test_7_a_lora_on_the_attention_styles_the_prior_alone_and_one_elsewhere_both(unet, adapter, answers):
    fill(adapter, seed=2)
    to_the_expert(adapter)
    given = context(LAST, [1])
    plain = forward(unet, LAST, given)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.testing.assert_close(styled(unet, attention, LAST, given), plain, **TOLERANCE)
    prior = styled(unet, attention, LAST, context(LAST, [1], fixed=True))
    assert (prior - answers["base"]).abs().max() > 1e-2
    assert (styled(unet, ["ff.net.2"], LAST, given) - plain).abs().max() > 1e-2


def test_what_comes_out_is_the_base_model_to_the_last_bit(unet, adapter, answers):
    adapter.uninstall(unet)
    assert checksums(unet) == answers["bits"]
    assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}
