import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from moa.attention import LayerInput, LayerSizes, MoAAttnProcessor, MoALayer, Recorder, attend, make_router

HEADS, WIDTH, TEXT = 2, 8, 6


def attention(cross, **settings):
    return Attention(
        query_dim=WIDTH, cross_attention_dim=TEXT if cross else None, heads=HEADS, dim_head=4, **settings
    ).eval()


def moa_layer(attn, experts=2, router="linear"):
    sizes = LayerSizes(WIDTH, attn.to_k.in_features, 8, WIDTH, False, True, attn.is_cross_attention)
    layer = MoALayer(sizes, experts, router)
    layer.copy_from(attn)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layer


def layer_input(batch=3, layers=4, subjects=2, rows=None, recorder=None):
    kept = batch if rows is None else len(rows)
    return LayerInput(
        text=torch.randn(kept, 7, TEXT),
        prompts=torch.randn(layers, kept, subjects, TEXT),
        token=torch.tensor([[1, 4]] * kept)[:, :subjects],
        present=torch.ones(kept, subjects, dtype=torch.bool),
        rows=rows,
        active=True,
        recorder=recorder,
    )


def softmax_attention(query, key, value):
    """Eq. 1 written out, head by head."""
    heads = []
    for q, k, v in zip(query.chunk(HEADS, -1), key.chunk(HEADS, -1), value.chunk(HEADS, -1), strict=True):
        heads.append(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)
    return torch.cat(heads, -1)


def equation_6(attn, layer, hidden, text, multimodal):
    """Eq. 4–7 written out, pixel weights and all: the reference of the processor."""
    weights = torch.softmax(layer.router(hidden), -1)
    experts = [(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])]
    experts += [(e.query, e.key, e.value, e.out) for e in layer.experts]
    mixed = 0
    for n, (query, key, value, out) in enumerate(experts):
        condition = hidden if text is None else (text if n == 0 else multimodal)
        mixed = mixed + weights[..., n, None] * out(
            softmax_attention(query(hidden), key(condition), value(condition))
        )
    return mixed


@pytest.mark.parametrize("masked", [False, True])
def test_both_ways_of_attention_are_the_formula(masked):
    query, key, value = torch.randn(3, 5, WIDTH), torch.randn(3, 7, WIDTH), torch.randn(3, 7, WIDTH)
    mask = torch.zeros(3, 1, 1, 7)
    if masked:
        mask[:, ..., 4:] = -10000.0
        expected = softmax_attention(query, key[:, :4], value[:, :4])
    else:
        expected = softmax_attention(query, key, value)
    fused, none = attend(query, key, value, HEADS, mask if masked else None, explicit=False)
    explicit, probabilities = attend(query, key, value, HEADS, mask if masked else None, explicit=True)
    assert none is None
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(explicit, expected)
    assert probabilities.shape == (3, HEADS, 5, 7)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, HEADS, 5))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("settings", [{}, {"residual_connection": True, "rescale_output_factor": 2.0}])
def test_without_context_the_processor_is_the_prior_bit_for_bit(cross, settings):
    attn = attention(cross, **settings)
    hidden, text = torch.randn(2, 9, WIDTH), torch.randn(2, 7, TEXT) if cross else None
    mask = torch.zeros(2, 1, 7)
    mask[:, :, 5:] = -10000.0
    mask = mask if cross else None
    expected = AttnProcessor2_0()(attn, hidden, text, attention_mask=mask)
    attn.set_processor(MoAAttnProcessor("x", moa_layer(attn), 0))
    assert torch.equal(attn(hidden, text, attention_mask=mask), expected)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("kind", ["sdpa", "explicit"])
def test_the_processor_is_equation_6(cross, experts, kind):
    attn = attention(cross)
    layer = moa_layer(attn, experts, "mlp")
    attn.set_processor(MoAAttnProcessor("x", layer, 2, kind))
    hidden, text = torch.randn(3, 9, WIDTH), torch.randn(3, 7, TEXT) if cross else None
    given = layer_input()
    multimodal = given.text.clone()
    multimodal[:, 1], multimodal[:, 4] = given.prompts[2, :, 0], given.prompts[2, :, 1]
    expected = equation_6(attn, layer, hidden, text, multimodal)
    torch.testing.assert_close(attn(hidden, text, moa=given), expected)
    assert (expected - attn(hidden, text)).abs().max() > 1e-2


@pytest.mark.parametrize("cross", [False, True])
def test_rows_fixed_to_the_prior_are_the_prior_and_the_others_are_mixed(cross):
    attn = attention(cross)
    attn.set_processor(MoAAttnProcessor("x", moa_layer(attn), 0))
    hidden, text = torch.randn(3, 9, WIDTH), torch.randn(3, 7, TEXT) if cross else None
    everything = layer_input()
    rows = torch.tensor([0, 2])
    some = LayerInput(
        everything.text[rows], everything.prompts[:, rows], *[everything.token[rows]] * 2, rows, True, None
    )
    mixed, plain, all_mixed = (
        attn(hidden, text, moa=some),
        attn(hidden, text),
        attn(hidden, text, moa=everything),
    )
    assert torch.equal(mixed[1], plain[1])
    torch.testing.assert_close(mixed[rows], all_mixed[rows])


def test_a_recorder_gets_router_and_maps_of_its_layers_and_changes_nothing():
    attn = attention(cross=True)
    layer = moa_layer(attn)
    attn.set_processor(MoAAttnProcessor("x", layer, 0))
    hidden, text = torch.randn(3, 9, WIDTH), torch.randn(3, 7, TEXT)
    rows = torch.tensor([0, 2])
    given = layer_input(rows=rows)
    given.present[1, 1] = False
    expected = attn(hidden, text, moa=given)
    given.recorder = Recorder(layers=["x"])
    torch.testing.assert_close(attn(hidden, text, moa=given), expected)
    router, maps = given.recorder.router["x"], given.recorder.attention["x"]
    torch.testing.assert_close(router[rows], layer.router(hidden[rows]).softmax(-1)[..., 0])
    assert torch.equal(router[1], torch.ones(9))
    assert maps.shape == (3, 2, 9)
    assert maps[1].abs().max() == 0
    assert maps[2, 1].abs().max() == 0
    condition = given.text[0].clone()
    condition[1], condition[4] = given.prompts[0, 0]
    query, key = layer.experts[0].query(hidden[0]), layer.experts[0].key(condition)
    by_hand = [
        torch.softmax(q @ k.mT / 2, -1)[:, 4]
        for q, k in zip(query.chunk(2, -1), key.chunk(2, -1), strict=True)
    ]
    torch.testing.assert_close(maps[0, 1], torch.stack(by_hand).mean(0))
    given.recorder = Recorder(layers=["another"])
    attn(hidden, text, moa=given)
    assert not given.recorder.router
    assert not given.recorder.attention


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_new_router_weighs_all_experts_the_same(kind):
    weights = make_router(WIDTH, 2, kind, 16)(torch.randn(2, 5, WIDTH)).softmax(-1)
    assert torch.equal(weights, torch.full((2, 5, 2), 0.5))


def test_several_personalization_experts_do_not_stay_equal():
    attn = attention(cross=False)
    sizes = LayerSizes(WIDTH, WIDTH, 8, WIDTH, False, True, False)
    layer = MoALayer(sizes, experts=3)
    layer.copy_from(attn)
    attn.set_processor(MoAAttnProcessor("x", layer, 0))
    attn(torch.randn(2, 9, WIDTH), moa=layer_input(2)).square().sum().backward()
    first, second = layer.experts
    assert not torch.allclose(first.value.weight.grad, second.value.weight.grad)


def test_no_projection_has_a_name_that_peft_matches():
    suffixes = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj", "proj_in", "proj_out")
    names = [name for name, _ in moa_layer(attention(True)).named_modules()]
    assert not [name for name in names if name.endswith(suffixes)]
