import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from huggingface_hub import RepoUrl
from peft import LoraConfig
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from moa import MoAAdapter, MoAContext, Recorder
from moa.adapter import installation
from moa.attention import LayerInput
from moa.benchmark import SD15
from moa.layers import attention_layers, last_layers, select_loss_layers
from moa.losses import object_loss, router_loss
from tests.core.conftest import IMAGE_DIM, UNET

TOLERANCE = {"atol": 1e-5, "rtol": 0}


def snapshot(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


# ── The properties of the method ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("decisions", [{}, {"router": "mlp"}, {"experts": 3}])
def test_a_new_adapter_without_subjects_is_the_base_model(unet, make_adapter, make_context, run, decisions):
    expected = run(unet)
    make_adapter(unet, trained=False, **decisions).install(unet)
    nobody = make_context(present=((False, False),) * 3)
    torch.testing.assert_close(run(unet, nobody), expected, **TOLERANCE)
    assert (run(unet, make_context()) - expected)[:2].abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sdpa", "explicit"])
def test_with_the_router_fixed_to_the_prior_it_is_the_base_model(unet, make_adapter, make_context, run, kind):
    expected = run(unet)
    make_adapter(unet).install(unet, kind)
    torch.testing.assert_close(run(unet, make_context(prior_only=(True,) * 3)), expected, **TOLERANCE)
    torch.testing.assert_close(run(unet, make_context(personalize_below=0)), expected, **TOLERANCE)
    torch.testing.assert_close(run(unet), expected, **TOLERANCE)
    assert (run(unet, make_context()) - expected).abs().amin(0).max() > 1e-3


def test_only_the_rows_that_are_fixed_to_the_prior_are(unet, make_adapter, make_context, run):
    expected = run(unet)
    make_adapter(unet).install(unet)
    mixed = run(unet, make_context())
    half = run(unet, make_context(prior_only=(True, False, False)))
    torch.testing.assert_close(half[0], expected[0], **TOLERANCE)
    torch.testing.assert_close(half[1:], mixed[1:], **TOLERANCE)
    late = run(unet, make_context(personalize_below=500))  # timesteps 3, 500, 990
    torch.testing.assert_close(late[1:], expected[1:], **TOLERANCE)
    torch.testing.assert_close(late[0], mixed[0], **TOLERANCE)


def test_samples_of_a_batch_do_not_touch_each_other(unet, make_adapter, make_context, inputs):
    make_adapter(unet).install(unet)
    context = make_context()
    together = unet(*inputs[:2], inputs[2], cross_attention_kwargs={"moa": context}).sample
    for row, subjects in enumerate((2, 1, 0)):
        one = slice(row, row + 1)
        alone = MoAContext(
            context.text[one],
            context.features[one, :subjects],
            context.token[one, :subjects],
            context.present[one, :subjects],
            context.prior_only[one],
        )
        latents, time, text = (x[one] for x in inputs)
        answer = unet(latents, time, text, cross_attention_kwargs={"moa": alone}).sample
        torch.testing.assert_close(answer, together[one], **TOLERANCE)


@pytest.mark.parametrize("token", [2, -1, 999])
def test_padding_may_hold_anything(unet, make_adapter, make_context, run, token):
    """Sample 1 has one subject, at token 2; what stands in its padding must not reach that token."""
    make_adapter(unet).install(unet)
    context = make_context()
    expected = run(unet, context)
    context.token[1, 1] = context.token[2, 0] = token
    context.features[1, 1] = context.features[2] = 1000
    assert torch.equal(run(unet, context), expected)


def test_both_kinds_of_attention_agree(unet, make_adapter, make_context, run):
    adapter = make_adapter(unet)
    adapter.install(unet)
    expected = run(unet, make_context())
    adapter.install(unet, "explicit")
    torch.testing.assert_close(run(unet, make_context()), expected, **TOLERANCE)


def test_a_lora_on_the_attention_acts_on_the_prior_alone(unet, make_adapter, make_context, run):
    adapter = make_adapter(unet)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    styled = copy.deepcopy(unet)
    styled.add_adapter(config)
    expected, plain = run(styled), run(unet)
    adapter.install(unet)
    experts = {name: value.clone() for name, value in adapter.state_dict().items()}
    modules = {name for name, _ in adapter.named_modules()}
    unet.add_adapter(config)
    loras = {name: value for name, value in styled.state_dict().items() if "lora_" in name}
    unet.load_state_dict(loras, strict=False)
    torch.testing.assert_close(run(unet, make_context(prior_only=(True,) * 3)), expected, **TOLERANCE)
    assert (expected - plain).abs().max() > 1e-2
    assert {name for name, _ in adapter.named_modules()} == modules
    assert all(torch.equal(value, experts[name]) for name, value in adapter.state_dict().items())
    assert not [name for name in unet.state_dict() if "lora" in name and "experts" in name]
    adapter.uninstall(unet)
    torch.testing.assert_close(run(unet), expected, **TOLERANCE)
    adapter.install(unet)
    torch.testing.assert_close(run(unet, make_context(prior_only=(True,) * 3)), expected, **TOLERANCE)


# ── Sizes ─────────────────────────────────────────────────────────────────────────────────────


def test_on_sd15_it_has_the_size_of_the_method_note():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    adapter = MoAAdapter.from_unet(unet, image_feature_dim=768)
    count = dict.fromkeys(("expert", "router", "prompt"), 0)
    for name, parameter in adapter.named_parameters():
        kinds = [kind for kind in count if kind in name]
        assert len(kinds) == 1, name
        count[kinds[0]] += parameter.numel()
    assert len(adapter.sizes) == 32
    assert count["expert"] == 93_536_640
    assert count["router"] == 49_984
    position = 32 * 1536 + 1536
    assert count["prompt"] == 2_958_336 + position + 4 * 1536
    assert len(adapter.loss_layers) == 2 * 11
    assert not [name for name in adapter.loss_layers if name.startswith(("down_blocks.0", "up_blocks.3"))]
    assert list(adapter.sizes)[-1] == "up_blocks.3.attentions.2.transformer_blocks.0.attn2"


def test_two_layers_of_the_papers_image_encoder_have_25_million_parameters():
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(config)  # openai/clip-vit-large-patch14
    assert sum(p.numel() for p in last_layers(encoder, 2).values()) == 25_192_448


def test_on_sd15_at_512_pixels_it_costs_one_more_attention_and_no_more():
    """0.803 T operations a pass; two full experts in all attention layers make it 1.256 × that."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15).eval()
        latents, time, text = torch.empty(1, 4, 64, 64), torch.tensor(5), torch.empty(1, 77, 768)
        bound = torch.zeros(1, 1, dtype=torch.int64)
        given = LayerInput(text, torch.empty(16, 1, 1, 768), bound, bound.bool(), None, True, None)

    def operations(**kwargs):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(latents, time, text, **kwargs)
        return counter.get_total_flops()

    plain = operations()
    MoAAdapter.from_unet(unet, image_feature_dim=768).install(unet)
    installation(unet).handle.remove()  # it would look at values, and meta tensors have none
    assert plain == pytest.approx(0.803e12, rel=1e-3)
    assert operations(cross_attention_kwargs={"moa": given}) / plain == pytest.approx(1.256, abs=1e-3)


def test_sizes_of_another_u_net_are_read_off_its_modules(make_adapter):
    """As in SDXL: no attention at the top, several blocks a transformer, linear projections, own heads."""
    unet = UNet2DConditionModel(
        **UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 8),
            "use_linear_projection": True,
            "cross_attention_dim": 40,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 40,
        }
    ).eval()
    adapter = make_adapter(unet)
    adapter.install(unet)
    assert not [name for name in adapter.loss_layers if name.startswith(("down_blocks.1", "up_blocks.1"))]
    assert [name for name in adapter.loss_layers if name.startswith("down_blocks.2")]
    text = torch.randn(1, 9, 40)
    more = {"text_embeds": torch.randn(1, 16), "time_ids": torch.zeros(1, 6)}
    context = MoAContext(
        text, torch.randn(1, 1, IMAGE_DIM), torch.tensor([[3]]), torch.tensor([[True]]), torch.tensor([False])
    )
    latents = torch.randn(1, 4, 16, 16)
    answers = [
        unet(latents, 5, text, added_cond_kwargs=more, cross_attention_kwargs=kwargs).sample
        for kwargs in (None, {"moa": context})
    ]
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_on_the_true_sdxl_configuration_the_sizes_are_those_of_its_modules():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    attentions = attention_layers(unet)
    expected = sum(p.numel() for attn in attentions.values() for p in attn.parameters())
    adapter = MoAAdapter.from_unet(unet, image_feature_dim=1280)
    assert len(adapter.sizes) == 2 * 70
    assert {(s.query_dim, s.condition_dim) for s in adapter.sizes.values() if s.cross} == {
        (640, 2048),
        (1280, 2048),
    }
    assert sum(p.numel() for name, p in adapter.named_parameters() if "expert" in name) == expected
    assert not [name for name in adapter.loss_layers if name.startswith(("down_blocks.1", "up_blocks.1"))]
    adapter.install(unet)
    adapter.assert_installed(unet)
    installation(unet).handle.remove()  # it would look at values, and meta tensors have none
    recorder = Recorder(maps=False)
    with torch.device("meta"), torch.no_grad():
        text, bound = torch.empty(1, 77, 2048), torch.zeros(1, 1, dtype=torch.int64)
        given = LayerInput(text, torch.empty(70, 1, 1, 2048), bound, bound.bool(), None, True, recorder)
        more = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        latents, time = torch.empty(1, 4, 128, 128), torch.tensor(5)
        counts, shapes = [], []
        for kwargs in ({}, {"moa": given}):
            with FlopCounterMode(display=False) as counter:
                drawn = unet(
                    latents, time, text, added_cond_kwargs=more, cross_attention_kwargs=kwargs
                ).sample
            counts, shapes = [*counts, counter.get_total_flops()], [*shapes, drawn.shape]
    assert shapes == [latents.shape] * 2
    assert counts[1] > 1.1 * counts[0]  # the expert computes as well
    assert {name: weights.shape for name, weights in recorder.router.items()} == {
        name: (1, 64**2 if name.startswith(("down_blocks.1", "up_blocks.1")) else 32**2)
        for name in adapter.sizes
    }


def test_loss_layers_are_named_or_all_but_the_highest_resolution(unet):
    layers = select_loss_layers(unet)
    parts = {name.split(".attentions")[0] for name in layers}
    assert parts == {"down_blocks.1", "mid_block", "up_blocks.1"}
    assert select_loss_layers(unet, ["mid_block"]) == [
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
    ]
    with pytest.raises(ValueError, match=r"up_blocks.7"):
        select_loss_layers(unet, ["mid_block", "up_blocks.7"])
    with pytest.raises(ValueError, match=r"down_blocks\.1.*no attention layer"):
        MoAAdapter.from_unet(unet, image_feature_dim=4, loss_layers=["down_blocks.11"])


def test_layers_are_listed_in_the_order_in_which_they_run(unet, run):
    order = []
    for name, attn in attention_layers(unet).items():
        attn.register_forward_hook(lambda *_, name=name: order.append(name))
    run(unet)
    assert order == list(attention_layers(unet))


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"experts": 1}, "experts: 1"),
        ({"router": "tree"}, "router: 'tree'"),
        ({"image_feature_dim": None}, "image_feature_dim"),
        ({"image_layers": 1}, "image_encoder"),
    ],
)
def test_decisions_that_make_no_sense_are_named(unet, decisions, message):
    with pytest.raises(ValueError, match=message):
        MoAAdapter.from_unet(unet, **({"image_feature_dim": 4} | decisions))


def test_models_that_it_does_not_fit_are_refused(vae, unet):
    with pytest.raises(TypeError, match="Linear has no attn_processors"):
        MoAAdapter.from_unet(torch.nn.Linear(1, 1), image_feature_dim=4)
    with pytest.raises(ValueError, match="AutoencoderKL"):
        MoAAdapter.from_unet(vae, image_feature_dim=4)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.norm_q = torch.nn.LayerNorm(4)
    with pytest.raises(ValueError, match=r"mid_block.*norm_q"):
        MoAAdapter.from_unet(unet, image_feature_dim=4)


def test_experts_are_not_copied_from_under_a_lora(unet, make_adapter):
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(TypeError, match="unload_lora_weights"):
        make_adapter(unet)


# ── In and out ────────────────────────────────────────────────────────────────────────────────


def test_install_and_uninstall_leave_no_trace(unet, make_adapter, make_context, run):
    unet.conv_in.requires_grad_(False)
    before, expected = snapshot(unet), run(unet)
    attributes, hooks = set(vars(unet)), len(unet._forward_pre_hooks)
    processors = unet.attn_processors
    trainable = {name for name, p in unet.named_parameters() if p.requires_grad}
    adapter = make_adapter(unet)
    adapter.install(unet)
    assert not [n for n, p in unet.named_parameters() if p.requires_grad and n in before]
    run(unet, make_context())
    adapter.uninstall(unet)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(run(unet), expected)
    assert set(vars(unet)) == attributes
    assert len(unet._forward_pre_hooks) == hooks
    assert unet.attn_processors == processors
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == trainable
    with pytest.raises(ValueError, match="not installed"):
        adapter.uninstall(unet)


def test_a_second_adapter_or_another_u_net_is_refused(unet, make_adapter):
    adapter = make_adapter(unet)
    adapter.install(unet)
    with pytest.raises(ValueError, match="another MoA adapter"):
        make_adapter_of_its_kind(adapter).install(unet)
    wider = UNet2DConditionModel(**UNET | {"block_out_channels": (16, 64, 64)})
    with pytest.raises(ValueError, match=r"down_blocks.1.*query_dim=64"):
        adapter.install(wider)
    other = UNet2DConditionModel(
        **UNET
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        }
    )
    with pytest.raises(ValueError, match=r"only the adapter has a layer down_blocks.1"):
        adapter.install(other)
    with pytest.raises(ValueError, match="attention: 'flash'"):
        adapter.install(unet, "flash")


def make_adapter_of_its_kind(adapter):
    return MoAAdapter.from_config(adapter.config)


def test_moves_and_dtypes_reach_the_adapter_through_the_u_net(unet, make_adapter):
    adapter = make_adapter(unet)
    adapter.install(unet)
    torch.nn.Module.to(unet, torch.bfloat16)
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    assert {id(p) for p in adapter.parameters()} <= {id(p) for p in unet.parameters()}


def test_the_u_net_saves_itself_without_the_adapter(unet, make_adapter, make_context, run, tmp_path):
    before = snapshot(unet)
    adapter = make_adapter(unet)
    adapter.install(unet, "explicit")
    expected = run(unet, make_context())
    unet.save_pretrained(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == before.keys()
    assert torch.equal(run(unet, make_context()), expected)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"adapter.install"):
        adapter.assert_installed(again)


def test_a_copy_of_a_moa_u_net_works_apart(unet, make_adapter, make_context, run):
    adapter = make_adapter(unet)
    adapter.install(unet)
    expected = run(unet, make_context())
    twin = copy.deepcopy(unet)
    assert torch.equal(run(twin, make_context()), expected)
    adapter.uninstall(unet)
    assert torch.equal(run(twin, make_context()), expected)
    twins_adapter = installation(twin).adapter
    assert twins_adapter is not adapter
    twins_adapter.uninstall(twin)
    assert torch.equal(run(twin), run(unet))


# ── Things that replace attention processors ──────────────────────────────────────────────────


def slicing(unet):
    unet.set_attention_slice(1)


def fused(unet):
    unet.fuse_qkv_projections()


def default(unet):
    unet.set_attn_processor(AttnProcessor2_0())


def xformers(unet):
    """What enable_xformers_memory_efficient_attention does where xformers is installed."""
    unet.set_attn_processor(XFormersAttnProcessor())


@pytest.mark.parametrize("replace", [slicing, fused, default, xformers])
def test_a_replaced_processor_is_an_error_with_a_cure(unet, make_adapter, make_context, run, replace):
    adapter = make_adapter(unet)
    adapter.install(unet)
    expected = run(unet, make_context())
    replace(unet)
    with pytest.raises(RuntimeError, match=r"lost its MoA layer.*adapter\.install"):
        run(unet, make_context())
    with pytest.raises(RuntimeError, match="lost its MoA layer"):
        adapter.assert_installed(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    adapter.install(unet)
    adapter.assert_installed(unet)
    torch.testing.assert_close(run(unet, make_context()), expected, **TOLERANCE)


def test_foreign_processors_are_refused_at_installation(unet, make_adapter):
    adapter = make_adapter(unet)
    slicing(unet)
    with pytest.raises(ValueError, match=r"SlicedAttnProcessor.*set_attn_processor"):
        adapter.install(unet)
    default(unet)
    adapter.install(unet)


def test_an_ip_adapter_is_refused_while_installed(unet, make_adapter, make_context, run):
    adapter = make_adapter(unet)
    adapter.install(unet)
    expected = run(unet, make_context())
    with pytest.raises(TypeError, match=r"IP-Adapter.*adapter\.uninstall"):
        unet._load_ip_adapter_weights([{"image_proj": {}, "ip_adapter": {}}])
    assert torch.equal(run(unet, make_context()), expected)


def test_a_controlnet_is_made_from_the_base_u_net(unet, make_adapter):
    adapter = make_adapter(unet)
    adapter.install(unet)
    with pytest.raises(RuntimeError):
        ControlNetModel.from_unet(unet)
    with adapter.removed(unet):
        ControlNetModel.from_unet(unet)
    adapter.assert_installed(unet)


def test_a_context_of_another_batch_is_an_error(unet, make_adapter, make_context, inputs):
    make_adapter(unet).install(unet)
    with pytest.raises(ValueError, match=r"batch of 2.*`text` has 3.*num_images_per_prompt"):
        unet(inputs[0][:2], 5, inputs[2][:2], cross_attention_kwargs={"moa": make_context()})
    context = make_context()
    context.features = context.features[:1]
    with pytest.raises(ValueError, match="`features` has 1"):
        unet(inputs[0], 5, inputs[2], cross_attention_kwargs={"moa": context})


def test_another_precision_than_the_u_net_s_is_an_error_with_the_cure(
    unet, make_adapter, inputs, make_context
):
    """But not under autocast, which joins them (`test_mixed_precision_trains`)."""
    adapter = make_adapter(unet)
    torch.nn.Module.to(unet, torch.bfloat16)
    adapter.install(unet)
    sample, time, text = inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16()
    context = make_context()
    with pytest.raises(ValueError, match=r"bfloat16.*float32.*adapter\.to\(unet\.device, unet\.dtype\)"):
        unet(sample, time, text, cross_attention_kwargs={"moa": context})
    adapter.to(unet.device, unet.dtype)
    context.text, context.features = text, context.features.bfloat16()
    with torch.no_grad():
        assert unet(sample, time, text, cross_attention_kwargs={"moa": context}).sample.isfinite().all()


# ── Saving ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "decisions",
    [{}, {"router": "mlp", "router_width": 8, "experts": 3, "frequencies": 3, "loss_layers": ["mid_block"]}],
)
def test_a_saved_adapter_gives_the_same_images(unet, make_adapter, make_context, run, tmp_path, decisions):
    adapter = make_adapter(unet, **decisions)
    adapter.install(unet)
    expected = run(unet, make_context())
    adapter.save_pretrained(tmp_path)
    adapter.uninstall(unet)
    again = MoAAdapter.from_pretrained(tmp_path)
    assert again.loss_layers == adapter.loss_layers
    again.install(unet)
    assert torch.equal(run(unet, make_context()), expected)


def test_the_folder_holds_what_is_trained_and_no_more(unet, make_adapter, image_encoder, tmp_path):
    adapter = make_adapter(unet, image_encoder=image_encoder, image_layers=1)
    adapter.install(unet)
    adapter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == {name for name, _ in adapter.named_parameters()}
    frozen = {*map(tensor_key, unet_own(unet)), *map(tensor_key, image_encoder.state_dict().values())}
    assert not frozen & {tensor_key(value) for name, value in saved.items() if value.ndim == 2}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["experts"] == 2
    assert config["loss_layers"] == adapter.loss_layers
    assert "trained parameters" in (tmp_path / "README.md").read_text()


def tensor_key(value):
    return value.shape, value.flatten()[:4].tolist().__str__()


def unet_own(unet):
    return [
        value for name, value in unet.state_dict().items() if ".processor." not in name and "moa" not in name
    ]


def test_the_card_names_the_models_that_the_adapter_was_made_for(unet, make_adapter, tmp_path):
    hub = {"prior": {"id": "someone/prior", "revision": "abc"}, "image_encoder": {"id": "some/clip"}}
    make_adapter(unet, sources=hub).save_pretrained(tmp_path / "hub")
    loaded = MoAAdapter.from_pretrained(tmp_path / "hub")
    assert {role: loaded.config[role] for role in hub} == hub
    card = loaded.model_card()
    assert "\nbase_model: someone/prior\n" in card and 'image_encoder="some/clip"' in card
    (tmp_path / "prior").mkdir()
    local = make_adapter(unet, sources={"prior": {"id": str(tmp_path / "prior")}}).model_card()
    assert "base_model" not in local and f'from_pretrained("{tmp_path}/prior"' in local


def test_an_adapter_that_names_no_models_is_loaded(unet, make_adapter, tmp_path):
    """As those were saved that were made before the names were kept."""
    make_adapter(unet).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in config.items() if key not in ("prior", "image_encoder")}
    assert len(old) == len(config) - 2
    (tmp_path / "config.json").write_text(json.dumps(old))
    adapter = MoAAdapter.from_pretrained(tmp_path)
    assert adapter.config["prior"] is None
    assert 'from_pretrained("<prior>"' in adapter.model_card() and "base_model" not in adapter.model_card()


def test_a_model_card_that_is_there_stays(unet, make_adapter, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    make_adapter(unet).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_hub_gets_the_adapter_s_card_unless_it_has_one(unet, make_adapter, tmp_path, monkeypatch):
    """diffusers' upload puts an empty card over the folder's. The hub itself is out of a test's reach."""
    adapter, pushed = make_adapter(unet), {}

    def upload_folder(folder_path, **kwargs):
        pushed.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda repo_id, **_: RepoUrl(repo_id))
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload_folder)
    for there in (False, True):
        monkeypatch.setattr("moa.adapter.file_exists", lambda *_, there=there, **__: there)
        adapter.push_to_hub("you/adapter")
        assert sorted(pushed) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]
        assert (adapter.model_card().encode() == pushed["README.md"]) is not there
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(
        pushed["diffusion_pytorch_model.safetensors"]
    )
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == adapter.state_dict().keys()


# ── Training ──────────────────────────────────────────────────────────────────────────────────


def loss_of(unet, adapter, context, inputs):
    """All three losses on a square mask."""
    context.recorder = recorder = Recorder(adapter.loss_layers)
    answer = unet(*inputs[:2], inputs[2], cross_attention_kwargs={"moa": context}).sample
    mask = torch.zeros(3, 1, 16, 16)
    mask[..., 4:12, 4:12] = 1
    return (
        answer.square().mean()
        + router_loss(recorder.router, mask)
        + object_loss(recorder.attention, mask.expand(-1, 2, -1, -1), context.present)
    )


@pytest.mark.parametrize("kind", ["sdpa", "explicit"])
def test_everything_of_the_adapter_gets_a_gradient_and_nothing_else(
    unet, make_adapter, make_context, inputs, kind
):
    adapter = make_adapter(unet)
    adapter.install(unet, kind)
    before = {name: v.clone() for name, v in unet.state_dict().items() if ".processor." not in name}
    optimizer = torch.optim.AdamW(adapter.trainable_parameters(), lr=1e-2)
    loss_of(unet, adapter, make_context(), inputs).backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    trained = {id(p) for p in adapter.trainable_parameters()}
    assert {id(p) for p in unet.parameters() if p.grad is not None} == trained
    optimizer.step()
    after = unet.state_dict()
    changed = [n for n in before if not torch.equal(after[n], before[n])]
    assert all(name.startswith("moa_prompt.") for name in changed)


def test_a_dropped_condition_still_trains_the_experts(unet, make_adapter, make_context, inputs):
    """The null branch: no subject, so Eq. 8 has no part in it, but experts and routers have."""
    adapter = make_adapter(unet)
    adapter.install(unet)
    context = make_context(present=((False, False),) * 3)
    loss_of(unet, adapter, context, inputs).backward()
    without = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(name.startswith("prompt.") for name in without)


def test_gradient_checkpointing_changes_nothing(unet, make_adapter, make_context, inputs):
    adapter = make_adapter(unet)
    adapter.install(unet)
    unet.train()
    grads, runs = [], []
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        adapter.zero_grad()
        loss = loss_of(unet, adapter, make_context(), inputs)
        loss.backward()
        grads.append((loss.detach(), [p.grad.clone() for p in adapter.parameters()]))
    assert len(runs) == 1 + 2, "the second pass computes its layers again for the gradients"
    torch.testing.assert_close(grads[0][0], grads[1][0])
    for plain, checkpointed in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_recorded_maps_are_those_of_the_layers_asked_for(unet, make_adapter, make_context, run):
    adapter = make_adapter(unet)
    adapter.install(unet)
    expected = run(unet, make_context())
    recorder = Recorder(adapter.loss_layers)
    torch.testing.assert_close(run(unet, make_context(recorder=recorder)), expected, **TOLERANCE)
    assert list(recorder.router) == adapter.loss_layers
    cross = [name for name in adapter.loss_layers if name.endswith("attn2")]
    assert list(recorder.attention) == cross
    for name in cross:
        pixels = 16 if name.startswith("mid") else 64
        assert recorder.router[name].shape == (3, pixels)
        assert recorder.attention[name].shape == (3, 2, pixels)
    recorder.clear()
    fixed = make_context(prior_only=(True,) * 3, recorder=recorder)
    run(unet, fixed)
    assert all(torch.equal(r, torch.ones_like(r)) for r in recorder.router.values())
    assert not recorder.attention


def test_mixed_precision_trains(unet, make_adapter, make_context, inputs):
    """Frozen weights in bf16, trained ones in fp32, under autocast."""
    adapter = make_adapter(unet)
    torch.nn.Module.to(unet, torch.bfloat16)
    adapter.install(unet)
    half = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    context = make_context()
    context.text = half[2]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(unet, adapter, context, half)
    loss.backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())


def test_repeated_blocks_compile_whole_and_not_one_by_one(unet, make_adapter, make_context, run):
    """fullgraph=True: no graph break. Blocks share compilations, so nothing of one layer may be in it."""
    make_adapter(unet).install(unet)
    expected = run(unet, make_context())
    counter = CompileCounter()
    blocks = [module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]
    torch._dynamo.reset()
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(unet, make_context()), expected.detach(), **TOLERANCE)
    assert 0 < counter.frame_count < len(blocks) / 2
    torch._dynamo.reset()


# ── Ablations ─────────────────────────────────────────────────────────────────────────────────


def fine_tuned(unet, adapter):
    """A plain copy of the U-Net whose attention has the experts' weights."""
    plain = copy.deepcopy(unet)
    for name, attn in attention_layers(plain).items():
        (expert,) = adapter.mixture(name).experts
        for own, trained in zip(
            (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]), expert.projections, strict=True
        ):
            own.load_state_dict(trained.state_dict())
    return plain


def test_without_a_router_it_is_a_plain_fine_tuned_model(unet, make_adapter, make_context, inputs, run):
    """No mixture is left: diffusers' own U-Net with the experts' weights and the fused text says the same."""
    base = run(unet)
    adapter = make_adapter(unet, router="none", spacetime=False)
    plain = fine_tuned(unet, adapter)
    adapter.install(unet)
    context, recorder = make_context(), Recorder(maps=False)
    context.recorder = recorder
    found = run(unet, context)
    latents, time, text = inputs
    own = text.gather(1, context.token[..., None].expand(-1, -1, text.shape[-1]))
    with torch.no_grad():
        fused = adapter.prompt(context.features, own, time)[0]
        fused = torch.where(context.present[..., None], fused, own)
        text = text.scatter(1, context.token[..., None].expand_as(fused), fused)
        expected = plain(latents, time, text).sample
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - base).abs().amin(0).max() > 1e-3
    assert all(not weights.any() for weights in recorder.router.values())
    assert not [name for name, _ in adapter.named_parameters() if "router" in name]
    assert torch.equal(run(unet, make_context(prior_only=(True,) * 3)), base)


def test_without_a_router_there_is_one_path(unet):
    with pytest.raises(ValueError, match="without a router there is one path"):
        MoAAdapter.from_unet(unet, IMAGE_DIM, router="none", experts=3)
    with pytest.raises(ValueError, match="'linear', 'mlp', 'none'"):
        MoAAdapter.from_unet(unet, IMAGE_DIM, router="off")
