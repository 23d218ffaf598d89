import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from moa import MoAAdapter, MoAPipeline, Recorder
from tests.core.conftest import plain_parts, seeded

PROMPT = "a man and a woman"
QUICK = {"num_inference_steps": 3, "output_type": "np"}


@pytest.fixture
def one(photo):
    return dict(prompt=PROMPT, subjects=[photo(1)], subject_words=["man"], generator=seeded(0), **QUICK)


@pytest.mark.parametrize("negative", [None, "red hat"])
def test_the_prior_alone_gives_the_images_of_the_base_pipeline(pipe, unet, one, negative):
    fixed = pipe(**one, prior_only=True, negative_prompt=negative).images
    pipe.adapter.uninstall(unet)
    base = StableDiffusionPipeline(**plain_parts(pipe))
    base.set_progress_bar_config(disable=True)
    plain = base(PROMPT, negative_prompt=negative, generator=seeded(0), guidance_scale=5.0, **QUICK).images
    np.testing.assert_allclose(fixed, plain, atol=1e-5)


def test_the_subject_changes_the_image_and_the_prior_does_not(pipe, one, photo):
    first = pipe(**one).images
    one["generator"] = seeded(0)
    again = pipe(**one).images
    other = pipe(**one | {"subjects": [photo(2)], "generator": seeded(0)}).images
    nobody = pipe(PROMPT, generator=seeded(0), **QUICK).images
    prior = pipe(**one | {"generator": seeded(0)}, prior_only=True).images
    assert np.array_equal(first, again)
    for image in (other, nobody, prior):
        assert np.abs(first - image).max() > 1e-3


@pytest.mark.parametrize("null_branch", ["expert", "prior"])
def test_a_mixed_batch_gives_the_images_of_its_samples(pipe, photo, null_branch):
    """0, 1 and 2 subjects, two images a prompt, a generator each."""
    prompts = ["a horse", "a man", PROMPT]
    subjects = [[], [photo(1)], [photo(2), photo(3)]]
    words = [[], ["man"], ["woman", "man"]]
    together = pipe(
        prompts,
        subjects=subjects,
        subject_words=words,
        num_images_per_prompt=2,
        generator=seeded(*range(6)),
        null_branch=null_branch,
        **QUICK,
    ).images
    for row in range(3):
        for copy in range(2):
            alone = pipe(
                prompts[row],
                subjects=subjects[row],
                subject_words=words[row],
                generator=seeded(2 * row + copy),
                null_branch=null_branch,
                **QUICK,
            ).images
            np.testing.assert_allclose(together[2 * row + copy], alone[0], atol=1e-4)


def test_below_and_above_the_cut(pipe, one):
    """With the cut at 0 all steps are the prior's, with the cut in the middle some are."""
    runs = {
        cut: pipe(**one | {"generator": seeded(0)}, personalize_below=cut).images for cut in (1000, 500, 0)
    }
    prior = pipe(**one | {"generator": seeded(0)}, prior_only=True).images
    np.testing.assert_allclose(runs[0], prior, atol=1e-5)
    assert np.abs(runs[500] - runs[0]).max() > 1e-3
    assert np.abs(runs[500] - runs[1000]).max() > 1e-3


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds", "clip_skip", "ip_adapter_image"])
def test_arguments_without_a_meaning_here_are_refused(pipe, one, name):
    pipe(**one | {"generator": seeded(0)}, **{name: None})
    with pytest.raises(TypeError, match=f"does not take {name}: "):
        pipe(**one, **{name: 1})


def test_sparse_experts_are_an_argument(pipe, one):
    dense = pipe(**one | {"generator": seeded(0)}).images
    sparse = [
        pipe(**one | {"generator": seeded(0)}, sparse_threshold=threshold).images
        for threshold in (0.0, 1e-9, 0.45)
    ]
    assert np.array_equal(sparse[0], dense)
    assert np.abs(sparse[2] - dense).max() > 0
    assert np.abs(sparse[1] - dense).max() < 1e-4


def test_the_null_branches_differ_and_neither_needs_guidance(pipe, one):
    kinds = [pipe(**one | {"generator": seeded(0)}, null_branch=kind).images for kind in ("expert", "prior")]
    assert np.abs(kinds[0] - kinds[1]).max() > 1e-4
    free = [
        pipe(**one | {"generator": seeded(0)}, null_branch=kind, guidance_scale=1.0).images
        for kind in ("expert", "prior")
    ]
    assert np.array_equal(free[0], free[1])


def test_the_conditioner_keeps_its_settings_and_follows_replaced_models(pipe, one):
    settings = {"null_branch": "prior", "personalize_below": 500, "sparse_threshold": 0.4}
    expected = pipe(**one | {"generator": seeded(0)}, **settings).images
    plain = pipe(**one | {"generator": seeded(0)}).images
    for name, value in settings.items():
        setattr(pipe.conditioner, name, value)
    assert np.array_equal(pipe(**one | {"generator": seeded(0)}).images, expected)
    usual = {"null_branch": "expert", "personalize_below": 1000, "sparse_threshold": 0.0}
    assert np.array_equal(pipe(**one | {"generator": seeded(0)}, **usual).images, plain)
    assert np.abs(plain - expected).max() > 1e-3
    before = pipe.conditioner.encode_text([PROMPT])
    pipe.text_encoder = deepcopy(pipe.text_encoder)
    pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    assert (pipe.conditioner.encode_text([PROMPT]) - before).abs().max() > 1e-3
    pipe.register_modules(image_encoder=deepcopy(pipe.image_encoder))
    assert pipe.conditioner.image_encoder is pipe.image_encoder


def test_it_keeps_the_habits_of_diffusers(pipe, one):
    """Output class, tuple, latents in and out, callbacks, sizes, recorder."""
    steps, recorder = [], Recorder(["mid_block.attentions.0.transformer_blocks.0.attn2"])

    def callback(_, step, time, values):
        steps.append((step, int(time)))
        return values

    latents = torch.randn(1, 4, 16, 24)
    call = one | {
        "output_type": "latent",
        "latents": latents,
        "width": 48,
        "height": 32,
        "callback_on_step_end": callback,
        "recorder": recorder,
        "negative_prompt": "hat",
    }
    out = pipe(**call)
    assert isinstance(out, StableDiffusionPipelineOutput)
    assert out.images.shape == (1, 4, 16, 24)
    assert torch.equal(pipe(**call, return_dict=False)[0], out.images)
    assert [step for step, _ in steps[:3]] == [0, 1, 2]
    (router,) = recorder.router.values()
    (maps,) = recorder.attention.values()
    assert router.shape == (2, 4 * 6)
    assert maps.shape == (2, 1, 4 * 6)
    assert pipe(**one | {"output_type": "pil"}).images[0].size == (32, 32)


def test_a_wrong_count_of_images_is_said_by_the_u_net(pipe, photo):
    conditioning = pipe.conditioner(PROMPT, subjects=[photo(1)], words=["man"])
    base = StableDiffusionPipeline(**plain_parts(pipe))
    base.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"batch of 4.*num_images_per_prompt"):
        base(**conditioning, num_images_per_prompt=2, **QUICK)
    with pytest.raises(ValueError, match=r"batch of 1.*guidance"):
        base(**conditioning, guidance_scale=1.0, **QUICK)


def test_a_lost_processor_is_said_at_the_call(pipe, one):
    pipe.enable_attention_slicing(1)
    with pytest.raises(RuntimeError, match="lost its MoA layer"):
        pipe(**one)
    pipe.adapter.uninstall(pipe.unet)
    with pytest.raises(RuntimeError, match=r"adapter.install"):
        pipe(**one)


@pytest.fixture
def folders(pipe, base, image_processor, tmp_path):
    """{"adapter" and "image_encoder": their folders}, beside the prior's; the adapter is out of the U-Net."""
    pipe.adapter.save_pretrained(tmp_path / "adapter")
    pipe.adapter.uninstall(pipe.unet)
    base.save_pretrained(tmp_path / "prior")
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    image_processor.save_pretrained(tmp_path / "encoder")
    return {"adapter": tmp_path / "adapter", "image_encoder": tmp_path / "encoder"}


@pytest.mark.parametrize("lacking", ["adapter", "image_encoder"])
def test_a_part_that_is_nowhere_is_an_error_that_names_it(folders, tmp_path, lacking):
    del folders[lacking]
    with pytest.raises(ValueError, match=f"prior holds no {lacking}: give {lacking}="):
        MoAPipeline.from_pretrained(pretrained_model_name_or_path=tmp_path / "prior", **folders)


def test_where_to_load_from_goes_to_every_part(folders, tmp_path, monkeypatch):
    """The hub itself is out of a test's reach: what the loads are asked for is looked at on their way."""
    asked = {}
    for kind in (MoAAdapter, CLIPVisionModelWithProjection, CLIPImageProcessor):

        def load(*args, kind=kind, own=kind.from_pretrained, **kwargs):
            asked[kind] = kwargs.get("cache_dir"), kwargs.get("local_files_only")
            return own(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", load)
    MoAPipeline.from_pretrained(
        tmp_path / "prior", **folders, cache_dir=tmp_path / "cache", local_files_only=True
    )
    assert list(asked.values()) == [(tmp_path / "cache", True)] * 3


def same_images(found, expected):
    """Equal up to rounding: weights read from a file lie elsewhere in memory, and sums are grouped by it."""
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_it_loads_from_a_prior_an_adapter_and_an_image_encoder(pipe, base, one, image_processor, tmp_path):
    expected = pipe(**one).images
    pipe.adapter.save_pretrained(tmp_path / "adapter")
    pipe.adapter.uninstall(pipe.unet)
    base.save_pretrained(tmp_path / "prior")
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    image_processor.save_pretrained(tmp_path / "encoder")
    loaded = MoAPipeline.from_pretrained(
        tmp_path / "prior", adapter=tmp_path / "adapter", image_encoder=tmp_path / "encoder"
    )
    loaded.set_progress_bar_config(disable=True)
    same_images(loaded(**one | {"generator": seeded(0)}).images, expected)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_it_loads_all_parts_in_the_precision_asked_for(pipe, one, image_processor, name, tmp_path):
    pipe.adapter.save_pretrained(tmp_path / "adapter")
    pipe.adapter.uninstall(pipe.unet)
    StableDiffusionPipeline(**plain_parts(pipe)).save_pretrained(tmp_path / "prior")
    pipe.image_encoder.save_pretrained(tmp_path / "encoder")
    image_processor.save_pretrained(tmp_path / "encoder")
    parts = {"adapter": tmp_path / "adapter", "image_encoder": tmp_path / "encoder"}
    loaded = MoAPipeline.from_pretrained(tmp_path / "prior", **parts, **{name: torch.bfloat16})
    loaded.set_progress_bar_config(disable=True)
    models = (loaded.unet, loaded.vae, loaded.text_encoder, loaded.image_encoder, loaded.adapter)
    assert {model.dtype for model in models} == {torch.bfloat16}
    assert np.isfinite(loaded(**one).images).all()


def test_parts_that_are_loaded_already_take_the_precision_too(pipe, one, base, tmp_path):
    pipe.adapter.uninstall(pipe.unet)
    base.save_pretrained(tmp_path)
    parts = {"adapter": pipe.adapter, "image_encoder": deepcopy(pipe.image_encoder)}
    loaded = MoAPipeline.from_pretrained(
        tmp_path, **parts, feature_extractor=pipe.feature_extractor, dtype=torch.bfloat16
    )
    loaded.set_progress_bar_config(disable=True)
    assert {model.dtype for model in (loaded.unet, *parts.values())} == {torch.bfloat16}
    assert np.isfinite(loaded(**one).images).all()


def test_weights_saved_in_half_precision_load_in_single(pipe, one, tmp_path):
    """As the shipped ones are; the parts of one pipeline must not differ."""
    pipe.text_encoder = deepcopy(pipe.text_encoder).half()
    pipe.save_pretrained(tmp_path)
    loaded = MoAPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.text_encoder.dtype == loaded.unet.dtype == torch.float32
    assert np.isfinite(loaded(**one).images).all()


def test_the_whole_pipeline_is_saved_in_one_folder(pipe, one, tmp_path):
    expected = pipe(**one).images
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "adapter" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = MoAPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    same_images(loaded(**one | {"generator": seeded(0)}).images, expected)


def test_the_pipeline_s_folder_has_the_variant_and_the_size_of_files_asked_for(pipe, one, tmp_path):
    """diffusers hands them to the parts whose `save_pretrained` names them."""
    expected = pipe(**one).images
    pipe.save_pretrained(tmp_path, variant="ours", max_shard_size="40KB")
    for part in ("unet", "adapter"):
        files = [file.name for file in (tmp_path / part).glob("*.safetensors")]
        assert len(files) > 1
        assert all(re.fullmatch(r"diffusion_pytorch_model\.ours-.*\.safetensors", name) for name in files)
    loaded = MoAPipeline.from_pretrained(tmp_path, variant="ours")
    loaded.set_progress_bar_config(disable=True)
    same_images(loaded(**one | {"generator": seeded(0)}).images, expected)
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for part in ("unet", "adapter"):
        assert [file.name for file in (tmp_path / "pickled" / part).glob("diffusion*")] == [
            "diffusion_pytorch_model.bin"
        ]
