"""The benchmark on a tiny U-Net: that each variant is what its name says, and what is measured is counted."""

import csv
import os
import tempfile

import pytest
import torch
from diffusers import UNet2DConditionModel

from moa import MoAAdapter, benchmark, gpus
from moa.adapter import installation
from moa.benchmark import (
    GUIDED,
    PASSES,
    SD15,
    THRESHOLD,
    TRAINING,
    Bench,
    BenchmarkConfig,
    compare,
    operations,
)
from moa.layers import attention_layers
from tests.core.conftest import UNET

SIZE = 128


@pytest.fixture(scope="module")
def bench():
    return Bench(UNET, "cpu", SIZE, torch.float32)


def variants(kind):
    return {variant.name: variant for variant in kind}


def answer(bench, variant):
    return variant.build(bench)().sample


def test_its_u_net_is_sd15s():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    filled = [m for m in unet.modules() if hasattr(m, "reset_parameters")]
    assert {id(p) for m in filled for p in m.parameters(recurse=False)} == {id(p) for p in unet.parameters()}


def test_u_nets_share_their_weights_and_nothing_else(bench):
    first, second = bench.unet(), bench.unet()
    assert first.conv_in.weight.data_ptr() == second.conv_in.weight.data_ptr()
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in first.parameters())
    MoAAdapter.from_unet(first, 20).install(first)
    assert installation(second) is None


def test_each_pass_is_what_its_name_says(bench):
    passes = variants(PASSES)
    plain = answer(bench, passes["plain"])
    assert torch.equal(plain, bench.unet()(bench.latents, bench.timestep, bench.text).sample)
    others = {name: answer(bench, passes[name]) for name in passes if name not in ("plain", "floor")}
    for name, other in others.items():
        assert (other - plain).abs().max() > 1e-5, name
    assert (others["moa_sparse"] - others["moa_dense"]).abs().max() > 1e-5


def test_guided_steps_have_the_plain_answer_where_the_prior_runs_alone(bench):
    steps = {name: answer(bench, variant) for name, variant in variants(GUIDED).items()}
    assert all(step.shape[0] == 2 for step in steps.values())
    plain = steps.pop("plain")
    torch.testing.assert_close(plain[1:], answer(bench, variants(PASSES)["plain"]), atol=1e-5, rtol=0)
    for name, step in steps.items():
        assert (step[1] - plain[1]).abs().max() > 1e-5, name
        torch.testing.assert_close(step[0], plain[0], atol=1e-5, rtol=0)  # new experts are the prior's copies


def test_operations_are_in_the_order_that_the_method_gives(bench):
    count = {name: operations(variant.build(bench)) for name, variant in variants(PASSES).items()}
    assert count["plain"] == count["fastcomposer"] < count["ip_adapter"]
    assert count["plain"] < count["moa_sparse"] < count["moa_dense"]
    attention = count["floor"] - count["plain"]
    assert attention == pytest.approx(count["moa_dense"] - count["plain"], rel=0.1)  # routers, and Eq. 8
    guided = {name: operations(variant.build(bench)) for name, variant in variants(GUIDED).items()}
    assert guided["plain"] == 2 * count["plain"]
    assert guided["moa_null_prior"] == count["plain"] + count["moa_dense"]
    assert guided["moa_sparse_null_prior"] == count["plain"] + count["moa_sparse"]


@pytest.mark.parametrize("side", [2, 4, 8, 64])
def test_exactly_a_quarter_of_the_pixels_is_active(side):
    logits = torch.randn(2, side * side, 2)
    weights = benchmark.a_quarter(None, (), logits).softmax(-1)[..., 1]
    assert weights.shape == (2, side * side)
    assert (weights > THRESHOLD).sum(1).tolist() == [side * side / 4] * 2


def test_the_ip_adapter_has_the_layout_of_the_released_file(bench):
    weights = benchmark.ip_adapter_weights(bench)
    layers = {name: a for name, a in attention_layers(bench.unet()).items() if a.is_cross_attention}
    numbers = [2 * n + 1 for n in range(len(layers))]
    assert weights["ip_adapter"].keys() == {f"{n}.to_{what}_ip.weight" for n in numbers for what in "kv"}
    last = f"{numbers[-1]}.to_k_ip.weight"  # the middle, which the file counts last
    assert (
        weights["ip_adapter"][last].shape
        == layers["mid_block.attentions.0.transformer_blocks.0.attn2"].to_k.weight.shape
    )


@pytest.mark.parametrize("name", ["moa", "fastcomposer"])
def test_training_steps_change_what_is_trained_alone(name, monkeypatch):
    variant = variants(TRAINING)[name]
    bench = Bench(UNET, "cpu", SIZE, benchmark.dtype_of(variant, "cpu"))
    trained = []
    optimizer = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda parameters, **rest: trained.extend(parameters) or optimizer(parameters, **rest),
    )
    before = {name: weight.clone() for name, weight in bench.weights.items()}
    step = variant.build(bench)
    own = [parameter.detach().clone() for parameter in trained]
    step()
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert not any(torch.equal(p, q) for p, q in zip(own, trained, strict=True) if p.numel() > 100)
    frozen = all(torch.equal(bench.weights[name], weight) for name, weight in before.items())
    assert frozen == (name == "moa")
    assert bench.weights["conv_in.weight"].dtype == (torch.bfloat16 if frozen else torch.float32)


def test_a_comparison_gives_a_row_for_each_variant(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "alone", lambda function, *arguments: function(*arguments))
    rows = [row for kind in (PASSES, TRAINING) for row in compare(UNET, kind, "cpu", SIZE, 2)]
    benchmark.write_table(tmp_path / "unet.csv", rows)
    with (tmp_path / "unet.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["variant"] for row in table] == [v.name for v in (*PASSES, *TRAINING)]
    for row in table:
        assert tuple(row) == benchmark.COLUMNS
        assert float(row["seconds"]) > 0 and float(row["cpu_seconds"]) > 0
        assert int(row["peak_mb"]) > 100
        reference = next(r for r in table if (r["kind"], r["variant"]) == (row["kind"], row["reference"]))
        assert float(row["ratio"]) == pytest.approx(
            float(row["seconds"]) / float(reference["seconds"]), abs=2e-3
        )
        assert float(reference["ratio"]) == float(reference["flops_ratio"]) == 1


def test_one_of_several_gpus_is_taken_before_cuda_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "HELD", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] == "4")
    measured = []
    monkeypatch.setattr(benchmark, "compare", lambda *given: measured.append(given[2]) or [])
    benchmark.run(BenchmarkConfig(sizes=(128,), guided=False, training_repeats=0), tmp_path / "unet.csv")
    assert measured == ["cpu", "cuda"]


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own():
    assert benchmark.alone(os.getpid) != os.getpid()


@pytest.mark.parametrize("wrong", [{"sizes": (200,)}, {"sizes": (64,)}, {"training_size": 0}, {"repeats": 0}])
def test_settings_that_cannot_be_measured_are_refused(wrong):
    with pytest.raises(ValueError, match=r"multiples of 128|at least 1"):
        BenchmarkConfig(**wrong)


def test_all_comparisons_are_made_and_training_can_be_left_out():
    def made(config):
        return [(kinds[0].kind, size, turns) for kinds, size, turns in benchmark.comparisons(config)]

    assert made(BenchmarkConfig()) == [
        ("pass", 256, 5),
        ("guided step", 256, 5),
        ("pass", 512, 5),
        ("guided step", 512, 5),
        ("training step", 256, 3),
    ]
    assert made(BenchmarkConfig(sizes=(256,), guided=False, training_repeats=0)) == [("pass", 256, 5)]
