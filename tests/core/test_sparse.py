"""Sparse experts: Eq. 6 with small weights left to the prior, at the cost of the other pixels alone."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moa import Recorder
from moa.attention import MoAAttnProcessor
from tests.core.conftest import TOKENS
from tests.core.test_attention import TEXT, WIDTH, attention, layer_input, moa_layer, softmax_attention

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(autouse=True)
def _sampling():
    with torch.no_grad():
        yield


def sparse(threshold, **settings):
    given = layer_input(**settings)
    given.threshold = threshold
    return given


def kept(weights, threshold):
    """The router's weights [B, P, N] after those up to the threshold went to the prior."""
    weights = weights.clone()
    for n in range(1, weights.shape[-1]):
        small = weights[..., n] <= threshold
        weights[..., 0] += weights[..., n] * small
        weights[..., n] *= ~small
    return weights


def equation_6(attn, layer, hidden, text, multimodal, weights):
    """Eq. 6 written out for given weights."""
    experts = [(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])]
    experts += [expert.projections for expert in layer.experts]
    mixed = 0
    for n, (query, key, value, out) in enumerate(experts):
        condition = hidden if text is None else (text if n == 0 else multimodal)
        answer = out(softmax_attention(query(hidden), key(condition), value(condition)))
        mixed = mixed + weights[..., n, None] * answer
    return mixed


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize(("experts", "threshold"), [(2, 0.5), (3, 0.3)])
@pytest.mark.parametrize("kind", ["sdpa", "explicit"])
def test_it_is_equation_6_with_small_weights_left_to_the_prior(cross, experts, threshold, kind):
    attn = attention(cross)
    layer = moa_layer(attn, experts, "mlp")
    attn.set_processor(MoAAttnProcessor("x", layer, 2, kind))
    hidden, text = 4 * torch.randn(3, 40, WIDTH), torch.randn(3, 7, TEXT) if cross else None
    given = sparse(threshold)
    multimodal = given.text.clone()
    multimodal[:, 1], multimodal[:, 4] = given.prompts[2, :, 0], given.prompts[2, :, 1]
    router = layer.router(hidden).softmax(-1)
    weights = kept(router, threshold)
    active = weights[..., 1:] > 0
    assert (
        active.any((0, 1)).all() and not active.all(1).all(1).any()
    )  # every expert has some pixels, not all
    assert experts == 2 or (active[..., 0] != active[..., 1]).any()  # each its own
    expected = equation_6(attn, layer, hidden, text, multimodal, weights)
    answer = attn(hidden, text, moa=given)
    torch.testing.assert_close(answer, expected)
    nobody = ~active.any(-1)
    assert torch.equal(answer[nobody], attn(hidden, text)[nobody])
    given.threshold = 0.0
    assert (answer - attn(hidden, text, moa=given)).abs().max() > 1e-3


@pytest.mark.parametrize("cross", [False, True])
def test_without_a_threshold_nothing_changes_and_with_a_tiny_one_hardly_anything(cross):
    attn = attention(cross)
    attn.set_processor(MoAAttnProcessor("x", moa_layer(attn), 0))
    hidden, text = torch.randn(3, 9, WIDTH), torch.randn(3, 7, TEXT) if cross else None
    given = layer_input()
    dense = attn(hidden, text, moa=given)
    given.threshold = 1e-12
    torch.testing.assert_close(attn(hidden, text, moa=given), dense)


@pytest.mark.parametrize("cross", [False, True])
def test_queries_are_those_of_the_active_pixels_and_keys_are_whole(cross):
    attn = attention(cross)
    layer = moa_layer(attn)
    attn.set_processor(MoAAttnProcessor("x", layer, 0))
    hidden, text = 4 * torch.randn(3, 40, WIDTH), torch.randn(3, 7, TEXT) if cross else None
    seen = {name: [] for name in ("query", "key", "value", "out")}
    for name, rows in seen.items():
        module = getattr(layer.experts[0], name)
        module.register_forward_hook(lambda _, args, out, rows=rows: rows.append(args[0].shape[-2]))
    attn(hidden, text, moa=sparse(0.5))
    counts = (layer.router(hidden).softmax(-1)[..., 1] > 0.5).sum(1).tolist()
    assert len(set(counts)) > 1
    assert seen["query"] == seen["out"] == counts
    assert seen["key"] == seen["value"] == [7 if cross else 40] * 3


@pytest.mark.parametrize("per_pixel", [False, True])
def test_an_attention_mask_is_that_of_the_active_pixels(per_pixel):
    attn = attention(cross=True)
    layer = moa_layer(attn)
    attn.set_processor(MoAAttnProcessor("x", layer, 0))
    hidden, text = 4 * torch.randn(2, 40, WIDTH), torch.randn(2, 7, TEXT)
    mask = torch.where(torch.rand(2, 40 if per_pixel else 1, 7) > 0.4, 0.0, -10000.0)
    given = sparse(1e-12, batch=2)
    dense = layer_input(batch=2)
    dense.text, dense.prompts = given.text, given.prompts
    expected = attn(hidden, text, attention_mask=mask, moa=dense)
    torch.testing.assert_close(attn(hidden, text, attention_mask=mask, moa=given), expected)
    given.threshold = 0.5
    active = layer.router(hidden).softmax(-1)[..., 1] > 0.5
    answer = attn(hidden, text, attention_mask=mask, moa=given)
    torch.testing.assert_close(answer[active], expected[active])
    assert 0 < active.sum() < active.numel()


# ── In a U-Net ────────────────────────────────────────────────────────────────────────────────


@contextmanager
def routed(adapter, favour):
    """Within the block the routers favour the personalization expert by these logits, one a sample."""
    shift = torch.stack([torch.zeros(len(favour)), torch.tensor(favour)], -1)[:, None]
    hooks = [
        adapter.mixture(name).router.register_forward_hook(lambda _, args, out: out + shift)
        for name in adapter.sizes
    ]
    yield
    for hook in hooks:
        hook.remove()


NONE_ALL_SOME = (-1e4, 1e4, 0.0)


def test_samples_do_not_touch_each_other_whatever_the_number_of_active_pixels(
    unet, make_adapter, make_context, inputs, run
):
    """One sample without active pixels, one with nothing else, one with some in every layer."""
    adapter = make_adapter(unet)
    prior = run(unet)
    adapter.install(unet)
    recorder = Recorder(maps=False)
    context = make_context(present=((True, True),) * 3, sparse_threshold=0.4, recorder=recorder)
    with routed(adapter, NONE_ALL_SOME):
        together = run(unet, context)
    active = {name: (weight < 1).float().mean(-1).tolist() for name, weight in recorder.router.items()}
    assert all(share[:2] == [0, 1] for share in active.values())
    assert all(0 < share[2] < 1 for share in active.values())
    assert torch.equal(together[0], prior[0])
    for row, favour in enumerate(NONE_ALL_SOME):
        one = slice(row, row + 1)
        alone = make_context(present=((True, True),) * 3, sparse_threshold=0.4)
        for what in ("text", "features", "token", "present", "prior_only"):
            setattr(alone, what, getattr(alone, what)[one])
        latents, time, text = (x[one] for x in inputs)
        with routed(adapter, (favour,)):
            answer = unet(latents, time, text, cross_attention_kwargs={"moa": alone}).sample
        torch.testing.assert_close(answer, together[one], **TOLERANCE)
        if row:
            assert (answer - prior[one]).abs().max() > 1e-3


def test_rows_fixed_to_the_prior_stay_so_and_leave_the_others(unet, make_adapter, make_context, run):
    expected = run(unet)
    make_adapter(unet).install(unet)
    mixed = run(unet, make_context(sparse_threshold=0.4))
    half = run(unet, make_context(prior_only=(True, False, False), sparse_threshold=0.4))
    torch.testing.assert_close(half[0], expected[0], **TOLERANCE)
    torch.testing.assert_close(half[1:], mixed[1:], **TOLERANCE)
    assert (half[1:] - run(unet, make_context())[1:]).abs().max() > 1e-4


@pytest.mark.parametrize("experts", [2, 3])
def test_the_recorder_tells_the_weights_that_were_used_and_maps_of_what_was_computed(
    unet, make_adapter, make_context, run, experts
):
    """In the first layer, before the answers differ, everything can be read off the dense record."""
    adapter = make_adapter(unet, experts=experts)
    adapter.install(unet)
    first = adapter.cross_layers[0]
    dense, some = Recorder([first]), Recorder([first])
    weights = []
    with routed(adapter, (-1e4, 0.0, 0.0)) if experts == 2 else nullcontext():
        hook = adapter.mixture(first).router.register_forward_hook(
            lambda _, args, out: weights.append(out.softmax(-1))
        )
        everybody = ((True, True),) * 3
        # the self-attention before it is dense in both, so that the queries are the same
        before = adapter.sizes.keys() - {first}
        run(unet, make_context(present=everybody, recorder=dense))
        only_here(unet, before)
        run(unet, make_context(present=everybody, recorder=some, sparse_threshold=0.45))
        hook.remove()
    used = kept(weights[1], 0.45)
    torch.testing.assert_close(some.router[first], used[..., 0])
    assert not torch.allclose(some.router[first], dense.router[first])
    if experts == 2:
        computed = used[..., 1] > 0
        assert 0 < computed[1:].float().mean() < 1
        expected = dense.attention[first] * computed[:, None]
        torch.testing.assert_close(some.attention[first], expected)
        assert some.attention[first][0].abs().max() == 0
    assert some.attention[first].shape == (3, 2, 256)


def only_here(unet, dense_layers):
    """Make the named layers dense, whatever the context says."""
    for name in dense_layers:
        processor = unet.get_submodule(name).processor
        mix = processor.mix

        def dense(*arguments, mix=mix):
            *rest, moa = arguments
            return mix(*rest, replace(moa, threshold=0.0))

        processor.mix = dense


def test_operations_are_those_of_the_active_pixels(unet, make_adapter, make_context, run):
    """A query and an output row for each active pixel and its attention, nothing for the others; router, keys
    and values for all.
    """
    adapter = make_adapter(unet)
    adapter.install(unet, "explicit")  # whose operations the counter knows on a CPU

    def operations(favour, threshold):
        context = make_context(present=((True, True),) * 3, sparse_threshold=threshold)
        with routed(adapter, favour), FlopCounterMode(display=False) as counter:
            run(unet, context)
        return counter.get_total_flops()

    fixed = make_context(prior_only=(True,) * 3)
    with FlopCounterMode(display=False) as counter:
        run(unet, fixed)
    plain, dense = counter.get_total_flops(), operations((0.0,) * 3, 0.0)
    assert operations((1e4,) * 3, 0.5) == dense
    routers = sum(2 * 3 * pixels(name) * size.query_dim * 2 for name, size in adapter.sizes.items())
    prompts = dense - plain - routers - sum(expert_cost(name, size) for name, size in adapter.sizes.items())
    assert operations((-1e4,) * 3, 0.5) == plain + routers + prompts
    third = operations((1e4, -1e4, -1e4), 0.5)
    expected = sum(expert_cost(name, size) // 3 for name, size in adapter.sizes.items())
    assert third == plain + routers + prompts + expected


def pixels(name):
    """Of a layer of the tiny U-Net, for 16 × 16 latents."""
    return {"down_blocks.0": 256, "up_blocks.2": 256, "mid_block": 16}.get(
        ".".join(name.split(".")[: 1 if name.startswith("mid") else 2]), 64
    )


def expert_cost(name, size):
    """Operations of one expert for the whole batch of 3: four projections and two products."""
    p, tokens = pixels(name), TOKENS if size.cross else pixels(name)
    queries = 2 * p * (size.query_dim * size.inner_dim + size.inner_dim * size.out_dim)
    keys = 2 * 2 * tokens * size.condition_dim * size.inner_dim
    return 3 * (queries + keys + 2 * 2 * p * tokens * size.inner_dim)


# ── How it is asked for ───────────────────────────────────────────────────────────────────────


def test_training_sparse_experts_is_refused(unet, make_adapter, make_context, run):
    adapter = make_adapter(unet)
    adapter.install(unet)
    context = make_context(sparse_threshold=0.1)
    expected = run(unet, context)
    with torch.enable_grad():
        with pytest.raises(ValueError, match=r"sparse_threshold: 0\.1 is for sampling.*torch\.no_grad"):
            run(unet, context)
        adapter.requires_grad_(False)
        assert torch.equal(run(unet, context), expected)


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_thresholds_that_are_no_weights_are_refused(
    unet, make_adapter, make_conditioner, make_context, run, threshold
):
    adapter = make_adapter(unet)
    with pytest.raises(ValueError, match="sparse_threshold"):
        make_conditioner(adapter, sparse_threshold=threshold)
    adapter.install(unet)
    with pytest.raises(ValueError, match="sparse_threshold"):
        run(unet, make_context(sparse_threshold=threshold))


def test_a_compiled_block_breaks_its_graph_or_says_why_it_cannot(unet, make_adapter, make_context, run):
    make_adapter(unet).install(unet)
    expected = run(unet, make_context(sparse_threshold=0.4))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    torch._dynamo.reset()
    block.compile(backend="eager")
    answer = run(unet, make_context(sparse_threshold=0.4))
    torch._dynamo.reset()
    block.compile(backend="eager", fullgraph=True)
    run(unet, make_context())
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"sparse experts.*without fullgraph"):
        run(unet, make_context(sparse_threshold=0.4))
    torch._dynamo.reset()
    torch.testing.assert_close(answer, expected, **TOLERANCE)


def test_the_conditioner_hands_it_on_with_and_without_guidance(unet, make_adapter, make_conditioner):
    conditioner = make_conditioner(make_adapter(unet), sparse_threshold=0.2)
    for guidance in (False, True):
        assert conditioner("a man", guidance=guidance).context.sparse_threshold == 0.2
