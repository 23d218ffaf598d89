"""What people add to a Stable Diffusion pipeline, together with subjects.

Every extra has random weights that do something, and is held to three things (`holds`): with the router
fixed to the prior the images are the base pipeline's with the same extra; with subjects they are not; and
without the extra they are others again.
"""

import copy

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch._dynamo.testing import CompileCounter

from moa import MoAPipeline
from moa.conditioner import without_guidance
from tests.core.conftest import IMAGE_DIM, TEXT_DIM, UNET, plain_parts, seeded

PROMPT = "a man and a woman"
QUICK = {"num_inference_steps": 3, "output_type": "np"}
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipe, other, photo, call, **settings):
    """Images of the pipeline `other` on the conditioner's output."""
    conditioning = pipe.conditioner(PROMPT, subjects=[photo(1)], words=["man"], **settings)
    return other(**conditioning, **QUICK | {"guidance_scale": 5.0} | call, generator=seeded(0)).images


def differ(one, other):
    return np.abs(one.astype(np.float64) - other).max() > 1e-3


def holds(pipe, other, photo, call, lacking):
    """The three claims for `other(**call)`; `lacking`: the call without the extra, or its images."""
    fixed, personal = images(pipe, other, photo, call, prior_only=True), images(pipe, other, photo, call)
    if isinstance(lacking, dict):
        lacking = images(pipe, other, photo, lacking)
    with pipe.adapter.removed(pipe.unet):
        base = other(PROMPT, **QUICK | {"guidance_scale": 5.0} | call, generator=seeded(0)).images
    np.testing.assert_allclose(fixed, base, atol=1e-5)
    assert differ(personal, base)
    assert differ(personal, lacking)


# ── Other pipelines ───────────────────────────────────────────────────────────────────────────


def test_img2img(pipe, photo):
    other = quiet(StableDiffusionImg2ImgPipeline(**plain_parts(pipe)))
    call = {"image": photo(9, size=(32, 32)), "strength": 0.9, "num_inference_steps": 4}
    holds(pipe, other, photo, call, call | {"image": photo(10, size=(32, 32))})


def test_pipelines_become_each_other(pipe, base, photo):
    """diffusers' `from_pipe`, there and back, on the same models in the precision asked for."""
    dtype = torch.bfloat16
    models = {name: copy.deepcopy(getattr(pipe, name)) for name in ("vae", "text_encoder")}
    pipe.register_modules(**models, image_encoder=copy.deepcopy(pipe.image_encoder))
    base.register_modules(**models)
    pipe.to(dtype)
    call = {"subjects": [photo(1)], "subject_words": ["man"], "prompt": PROMPT, **QUICK}
    expected = pipe(**call, generator=seeded(0)).images
    start = {"image": photo(9, size=(32, 32)), "strength": 0.9, "num_inference_steps": 4}
    painted = images(pipe, quiet(StableDiffusionImg2ImgPipeline(**plain_parts(pipe))), photo, start)
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=dtype))
    assert other.unet is pipe.unet
    assert np.array_equal(images(pipe, other, photo, start), painted)
    pipe.adapter.uninstall(pipe.unet)
    parts = {name: getattr(pipe, name) for name in ("adapter", "image_encoder", "feature_extractor")}
    again = quiet(MoAPipeline.from_pipe(base, **parts, dtype=dtype))
    assert again.adapter.dtype == again.unet.dtype == dtype
    assert np.array_equal(again(**call, generator=seeded(0)).images, expected)


def half_mask():
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 32, 16))
    return mask


def test_inpainting(pipe, photo):
    other = quiet(StableDiffusionInpaintPipeline(**plain_parts(pipe)))
    call = {"image": photo(9, size=(32, 32)), "mask_image": half_mask(), "strength": 1.0}
    holds(pipe, other, photo, call, call | {"mask_image": Image.new("L", (32, 32), 255)})


def test_inpainting_with_a_u_net_of_nine_channels(pipe, photo):
    """The adapter of a text-to-image U-Net fits the inpainting one: their attention layers are alike."""
    torch.manual_seed(9)
    painter = UNet2DConditionModel(**UNET | {"in_channels": 9}).eval()
    pipe.adapter.uninstall(pipe.unet)
    pipe.adapter.install(painter)
    pipe.register_modules(unet=painter)
    other = quiet(StableDiffusionInpaintPipeline(**plain_parts(pipe)))
    call = {"image": photo(9, size=(32, 32)), "mask_image": half_mask(), "strength": 1.0}
    holds(pipe, other, photo, call, call | {"image": photo(10, size=(32, 32))})


def make_controlnet(pipe, seed):
    with pipe.adapter.removed(pipe.unet):
        control = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8))
    generator = torch.Generator().manual_seed(seed)
    for parameter in control.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return control.eval()


def test_controlnet(pipe, photo):
    control = make_controlnet(pipe, 1)
    other = quiet(StableDiffusionControlNetPipeline(**plain_parts(pipe), controlnet=control))
    call = {"image": photo(9, size=(32, 32)), "controlnet_conditioning_scale": 1.0}
    holds(pipe, other, photo, call, call | {"controlnet_conditioning_scale": 0.0})


def test_multi_controlnet(pipe, photo):
    controls = [make_controlnet(pipe, seed) for seed in (1, 2)]
    other = quiet(StableDiffusionControlNetPipeline(**plain_parts(pipe), controlnet=controls))
    call = {
        "image": [photo(seed, size=(32, 32)) for seed in (9, 10)],
        "controlnet_conditioning_scale": [1.0, 0.7],
    }
    for scales in ([1.0, 0.0], [0.0, 0.7]):
        holds(pipe, other, photo, call, call | {"controlnet_conditioning_scale": scales})


# ── Style ─────────────────────────────────────────────────────────────────────────────────────


def lora_layers(model, targets):
    """Random weights of a LoRA for these layers of `model`."""
    styled = copy.deepcopy(model)
    torch.manual_seed(11)
    styled.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return get_peft_model_state_dict(styled)


def save_lora(unet, folder, targets, text_encoder=None):
    """A LoRA file as training scripts write it, of random weights, for the text encoder too if given."""
    words = None
    if text_encoder is not None:
        words = convert_state_dict_to_diffusers(lora_layers(text_encoder, ["q_proj", "v_proj", "fc1"]))
    StableDiffusionPipeline.save_lora_weights(folder, lora_layers(unet, targets), words)


def test_a_lora_file_is_a_style_on_the_prior(pipe, base, photo, tmp_path):
    """Loaded and unloaded through the pipeline, with MoA in the U-Net, which `base` and `pipe` share."""
    with pipe.adapter.removed(pipe.unet):
        save_lora(pipe.unet, tmp_path, PROJECTIONS)
    trained = {name: value.clone() for name, value in pipe.adapter.state_dict().items()}
    before = images(pipe, base, photo, {})
    base.load_lora_weights(tmp_path)
    holds(pipe, base, photo, {}, before)
    inside = pipe.adapter.state_dict()
    assert inside.keys() == trained.keys(), "no LoRA is in the experts"
    assert all(torch.equal(value, trained[name]) for name, value in inside.items())
    base.unload_lora_weights()
    assert np.array_equal(images(pipe, base, photo, {}), before)


def test_the_scale_of_a_lora_is_an_argument(pipe, photo, tmp_path):
    with pipe.adapter.removed(pipe.unet):
        save_lora(pipe.unet, tmp_path, [*PROJECTIONS, "ff.net.2"])
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}

    def scaled(scale):
        given = None if scale is None else {"scale": scale}
        return pipe(PROMPT, **call, generator=seeded(0), cross_attention_kwargs=given).images

    before = scaled(None)
    pipe.load_lora_weights(tmp_path)
    full = scaled(None)
    np.testing.assert_allclose(scaled(0.0), before, atol=1e-5)
    np.testing.assert_allclose(scaled(1.0), full, atol=1e-5)
    assert differ(scaled(0.5), full)
    assert differ(full, before)


@pytest.mark.parametrize("scale", [None, 0.0, 0.5])
def test_the_scale_of_a_lora_holds_for_the_text_encoder(pipe, base, photo, tmp_path, scale):
    """`base` is diffusers' pipeline on the same models."""
    for owner in (pipe, base):
        owner.register_modules(text_encoder=copy.deepcopy(pipe.text_encoder))
    before = images(pipe, base, photo, {})
    with pipe.adapter.removed(pipe.unet):
        save_lora(pipe.unet, tmp_path, PROJECTIONS, pipe.text_encoder)
    pipe.load_lora_weights(tmp_path)
    base.register_modules(text_encoder=pipe.text_encoder)
    given = None if scale is None else {"scale": scale}
    call = {**QUICK, "guidance_scale": 5.0, "negative_prompt": "hat"}
    fixed = pipe(PROMPT, **call, generator=seeded(0), prior_only=True, cross_attention_kwargs=given).images
    personal = images(pipe, base, photo, {}, cross_attention_kwargs=given)
    with pipe.adapter.removed(pipe.unet):
        plain = base(PROMPT, **call, generator=seeded(0), cross_attention_kwargs=given).images
    np.testing.assert_allclose(fixed, plain, atol=1e-5)
    assert differ(personal, before) == (scale != 0.0)


# ── Schedulers ────────────────────────────────────────────────────────────────────────────────

SCHEDULERS = [UniPCMultistepScheduler, DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(pipe, base, photo, scheduler):
    own = base.scheduler.config
    base.scheduler = EulerDiscreteScheduler.from_config(own)
    euler = images(pipe, base, photo, {})
    base.scheduler = scheduler.from_config(own)
    holds(pipe, base, photo, {}, euler)
    again = [images(pipe, base, photo, {}) for _ in range(2)]
    assert np.array_equal(*again)
    assert np.isfinite(again[0]).all()


def test_a_u_net_that_embeds_the_guidance(pipe, photo):
    """As in latent consistency models: guidance is an input of the U-Net, and no second half runs."""
    torch.manual_seed(12)
    consistent = UNet2DConditionModel(**UNET, time_cond_proj_dim=8).eval()
    pipe.adapter.uninstall(pipe.unet)
    pipe.adapter.install(consistent)
    pipe.register_modules(unet=consistent)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    call = {"subjects": [photo(1)], "subject_words": ["man"], "guidance_scale": 8.0, **QUICK}
    personal = pipe(PROMPT, **call, generator=seeded(0)).images
    fixed = pipe(PROMPT, **call, generator=seeded(0), prior_only=True).images
    pipe.adapter.uninstall(consistent)
    other = quiet(StableDiffusionPipeline(**plain_parts(pipe)))
    base = other(PROMPT, guidance_scale=8.0, **QUICK, generator=seeded(0)).images
    np.testing.assert_allclose(fixed, base, atol=1e-5)
    assert differ(personal, base)


def end_guidance(pipe, step, time, values):
    """docs/pipeline.md's."""
    if step == 0:
        pipe._guidance_scale = 0.0
        values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        context = without_guidance(pipe.cross_attention_kwargs["moa"])
        pipe._cross_attention_kwargs = {**pipe.cross_attention_kwargs, "moa": context}
    return values


def test_guidance_may_end_halfway(pipe, base, photo):
    """diffusers' callback for it leaves the context as it is, which is an error that names the cure."""
    call = {"subjects": [photo(1)], "subject_words": ["man"], "prompt": PROMPT, **QUICK}
    theirs = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with pytest.raises(ValueError, match=r"batch of 1.*ends guidance.*without_guidance"):
        pipe(**call, callback_on_step_end=theirs)
    ours = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    personal = pipe(**call, **ours, generator=seeded(0)).images
    fixed = pipe(**call, **ours, generator=seeded(0), prior_only=True).images
    guided = pipe(**call, generator=seeded(0)).images
    with pipe.adapter.removed(pipe.unet):
        cut = {"guidance_scale": 5.0, "callback_on_step_end": theirs}
        plain = base(PROMPT, **QUICK, **cut, generator=seeded(0)).images
    np.testing.assert_allclose(fixed, plain, atol=1e-5)
    assert differ(personal, fixed)
    assert differ(personal, guided)


# ── Precision, compilation, offloading ────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, photo, dtype):
    """The whole pipeline in half precision: its error is far below the subject's effect."""
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}
    precise = pipe(PROMPT, **call, generator=seeded(0)).images
    prior = pipe(PROMPT, **call, generator=seeded(0), prior_only=True).images
    parts = {name: copy.deepcopy(part) for name, part in plain_parts(pipe).items()}
    pipe.adapter.uninstall(pipe.unet)
    half = quiet(MoAPipeline(**parts | {"unet": pipe.unet, "adapter": pipe.adapter})).to(dtype)
    assert {p.dtype for p in half.adapter.parameters()} == {dtype}
    personal = half(PROMPT, **call, generator=seeded(0)).images
    fixed = half(PROMPT, **call, generator=seeded(0), prior_only=True).images
    half.adapter.uninstall(half.unet)
    other = quiet(StableDiffusionPipeline(**plain_parts(half)))
    base = other(PROMPT, guidance_scale=5.0, **QUICK, generator=seeded(0)).images
    np.testing.assert_array_equal(fixed, base)
    assert np.abs(personal - precise).mean() < 0.2 * np.abs(precise - prior).mean()


def test_repeated_blocks_compile_whole(pipe, photo):
    """fullgraph=True: a graph break is an error. Half of the rows are personalized."""
    call = {"subjects": [photo(1)], "subject_words": ["man"], "null_branch": "prior", **QUICK}
    expected = pipe(PROMPT, **call, generator=seeded(0)).images
    counter = CompileCounter()
    torch._dynamo.reset()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=counter)
    np.testing.assert_allclose(pipe(PROMPT, **call, generator=seeded(0)).images, expected, atol=1e-5)
    assert counter.frame_count > 0
    torch._dynamo.reset()


def test_the_subjects_wait_for_the_weights_of_an_offloaded_u_net(unet, make_adapter, make_context, run):
    """Offloading brings the weights inside the U-Net's `forward`; its hooks run before, and Eq. 8 is in one.

    accelerate's own hook, the weights on the meta device in between; `test_cpu_offload` is the whole of it.
    """
    adapter = make_adapter(unet)
    adapter.install(unet)
    with torch.no_grad():
        expected = run(unet, make_context())
        add_hook_to_module(unet, AlignDevicesHook(torch.device("cpu"), offload=True, place_submodules=True))
        assert next(adapter.prompt.parameters()).is_meta
        assert torch.equal(run(unet, make_context()), expected)
        assert next(adapter.prompt.parameters()).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="model offload needs an accelerator")
def test_cpu_offload(pipe, make_adapter, photo):
    """With trained layers of the image encoder, which stand in its own ones' places while it runs."""
    pipe.adapter.uninstall(pipe.unet)
    adapter = make_adapter(pipe.unet, image_encoder=pipe.image_encoder, image_layers=2)
    pipe = quiet(MoAPipeline(**pipe.components | {"adapter": adapter}))
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}
    latents = torch.randn(1, 4, 16, 16)
    expected = pipe.to("cuda")(PROMPT, **call, latents=latents).images
    pipe.to("cpu").enable_model_cpu_offload()
    for _ in range(2):
        np.testing.assert_allclose(pipe(PROMPT, **call, latents=latents).images, expected, atol=1e-4)
        assert {p.device.type for p in pipe.adapter.parameters()} == {"cpu"}
    other = quiet(StableDiffusionPipeline(**plain_parts(pipe)))
    other.enable_model_cpu_offload()
    conditioning = pipe.conditioner(PROMPT, subjects=[photo(1)], words=["man"])
    found = other(**conditioning, **QUICK, guidance_scale=5.0, latents=latents).images
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_sequential_offload_is_refused_with_the_cure(pipe):
    with pytest.raises(NotImplementedError, match="enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()


def test_group_offload_is_refused_with_the_cure(pipe):
    with pytest.raises(NotImplementedError, match=r"unet\.enable_group_offload"):
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
def test_the_u_net_s_weights_may_wait_on_the_disk(pipe, photo, tmp_path, kind):
    """Offloaded, they are memory of no meaning: what is computed before they are back is wrong."""
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}
    expected = pipe(PROMPT, **call, generator=seeded(0)).images
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **kind)
    with torch.no_grad():
        for parameter in pipe.adapter.prompt.parameters():
            parameter.fill_(torch.nan)
    assert np.array_equal(pipe(PROMPT, **call, generator=seeded(0)).images, expected)


def test_weights_stored_in_eight_bits_are_cast_layer_by_layer(pipe, photo):
    """The weights are rounded, so the subject stays what it was to within that."""
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}
    precise = pipe(PROMPT, **call, generator=seeded(0)).images
    prior = pipe(PROMPT, **call, generator=seeded(0), prior_only=True).images
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert pipe.adapter.prompt.fuse.m1.fc1.weight.dtype == torch.float8_e4m3fn
    rounded = pipe(PROMPT, **call, generator=seeded(0)).images
    assert np.abs(rounded - precise).mean() < 0.5 * np.abs(precise - prior).mean()


# ── What is refused ───────────────────────────────────────────────────────────────────────────


def save_ip_adapter(unet, folder):
    """An IP-Adapter file of random weights for this U-Net."""
    weights = {}
    cross = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(cross):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for which in ("k", "v"):
            weights[f"{2 * number + 1}.to_{which}_ip.weight"] = torch.randn(width, TEXT_DIM)
    projection = {
        "proj.weight": torch.randn(4 * TEXT_DIM, IMAGE_DIM),
        "proj.bias": torch.zeros(4 * TEXT_DIM),
        "norm.weight": torch.ones(TEXT_DIM),
        "norm.bias": torch.zeros(TEXT_DIM),
    }
    torch.save({"image_proj": projection, "ip_adapter": weights}, folder / "ip.bin")


def test_an_ip_adapter_is_refused_until_moa_is_out(pipe, photo, tmp_path):
    save_ip_adapter(pipe.unet, tmp_path)
    where = {"subfolder": ".", "weight_name": "ip.bin", "image_encoder_folder": None}
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}
    expected = pipe(PROMPT, **call, generator=seeded(0)).images
    with pytest.raises(TypeError, match=r"IP-Adapter.*adapter\.uninstall"):
        pipe.load_ip_adapter(str(tmp_path), **where)
    with pytest.raises(TypeError, match=r"IP-Adapter.*adapter\.uninstall"):
        pipe.unload_ip_adapter()
    assert np.array_equal(pipe(PROMPT, **call, generator=seeded(0)).images, expected)
    pipe.adapter.uninstall(pipe.unet)
    pipe.load_ip_adapter(str(tmp_path), **where)
    with pytest.raises(ValueError, match=r"IPAdapterAttnProcessor2_0.*Unload IP-Adapters"):
        pipe.adapter.install(pipe.unet)
    pipe.unload_ip_adapter()
    pipe.adapter.install(pipe.unet)
    assert np.array_equal(pipe(PROMPT, **call, generator=seeded(0)).images, expected)


@pytest.mark.parametrize("switch", ["enable_attention_slicing", "fuse_qkv_projections"])
def test_switches_that_replace_processors_are_refused_with_the_cure(pipe, photo, switch):
    call = {"subjects": [photo(1)], "subject_words": ["man"], **QUICK}
    expected = pipe(PROMPT, **call, generator=seeded(0)).images
    getattr(pipe, switch)()
    with pytest.raises(RuntimeError, match=r"lost its MoA layer.*adapter\.install\(unet\) again"):
        pipe(PROMPT, **call, generator=seeded(0))
    undo = {
        "enable_attention_slicing": "disable_attention_slicing",
        "fuse_qkv_projections": "unfuse_qkv_projections",
    }
    getattr(pipe, undo[switch])()
    pipe.adapter.install(pipe.unet)
    np.testing.assert_allclose(pipe(PROMPT, **call, generator=seeded(0)).images, expected, atol=1e-5)
