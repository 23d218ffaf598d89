"""What is recorded is what the router did, and recording changes no image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from moa.adapter import MoAAdapter
from moa.baselines.moa import MoA
from moa.conditioner import SubjectConditioner
from moa.data.errors import DataError
from moa.data.records import write_rows
from moa.evaluation import maps, router
from moa.evaluation.maps import ROUTER
from moa.methods import Request, Sampling, Subject
from moa.miniature import models


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(2)]
    people = [Subject(f"s{n}", "man", photo) for n, photo in enumerate(photos)]
    return [Request("a man in space", ((2, 5),), (person,), 7) for person in people]


def make_moa(null_branch: str) -> MoA:
    """MoA on untrained models, whose router is moved off its balanced start towards the prior."""
    torch.manual_seed(0)
    clip = models.clip(1)
    pipe = models.assemble_prior(models.vae(), models.unet(), models.text_encoder(clip))
    pipe.set_progress_bar_config(disable=True)
    encoder = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    adapter = MoAAdapter.from_unet(pipe.unet, image_feature_dim=encoder.config.projection_dim)
    adapter.install(pipe.unet)
    for name, module in adapter.named_modules():
        if name.endswith(".router"):
            torch.nn.init.constant_(module.bias[:1], 1.0)
    conditioner = SubjectConditioner(
        pipe.tokenizer, pipe.text_encoder, encoder, models.image_processor(), adapter, null_branch=null_branch
    )
    return MoA(pipe, conditioner, adapter, Sampling(steps=2, guidance=2.0, batch_size=2))


@pytest.mark.parametrize("null_branch", ["expert", "prior"])
def test_conditional_half_is_recorded_at_every_step(requests, null_branch):
    moa = make_moa(null_branch)
    made = router.MoARecorder(moa).record(requests)
    assert list(made.maps) == list(moa.adapter.sizes)
    assert len(made.timesteps) == 2
    assert made.timesteps[0] > made.timesteps[1]
    prior = 1 / (1 + np.exp(-1))  # softmax of (1, 0); the null branch fixed to the prior would show 1
    for weights in made.maps.values():
        assert weights.shape[:2] == (2, 2)
        assert weights.shape[2] == weights.shape[3]
        np.testing.assert_allclose(weights, prior, atol=1e-5)
    plain = moa.generate(requests)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(made.images, plain, strict=True))


def test_only_steps_at_which_the_router_decides_are_recorded(requests):
    moa = make_moa("expert")
    early, late = router.MoARecorder(moa).record(requests).timesteps
    moa.conditioner.personalize_below = early
    made = router.MoARecorder(moa).record(requests)
    assert made.timesteps == [late]
    assert made.steps == 2
    for weights in made.maps.values():
        assert weights.shape[1] == 1
        assert weights.max() < 0.9  # the step that is fixed to the prior would show 1
    moa.conditioner.personalize_below = late
    with pytest.raises(ValueError, match=f"personalize_below .{late}.*raise it"):
        router.MoARecorder(moa).record(requests)


def test_pixels_become_maps_with_the_latents_proportions():
    weights = np.arange(2 * 8, dtype=np.float32).reshape(2, 8)
    assert router.square(weights, [16, 32]).shape == (2, 2, 4)
    np.testing.assert_array_equal(router.square(weights, [16, 32])[0, 1], [4, 5, 6, 7])
    with pytest.raises(ValueError, match="8 pixels do not form a map"):
        router.square(weights, 16)


def test_inside_and_outside_weigh_by_coverage():
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, :3] = True  # at 2 × 2 the left cells are covered by 3/4
    weights = np.array([[[0.0, 1.0], [0.0, 1.0]]], dtype=np.float32)
    inside, outside = router.inside_outside(weights, mask)
    assert inside == pytest.approx([0.0])
    assert outside == pytest.approx([2 / 2.5])
    assert router.inside_outside(weights, ~mask | mask)[1] is None
    assert router.inside_outside(weights, mask & ~mask)[0] is None


def test_kept_images_show_two_subjects_of_each_of_two_noises():
    rows = [{"kind": k, "prompt": p, "seed": p if k == "swap" else n} for n, (k, p) in enumerate(
        [("single", 0), ("swap", 1), ("swap", 1), ("swap", 1), ("swap", 2), ("swap", 2)]
    )]  # fmt: skip
    assert router.showcase(rows, 4) == [1, 2, 4, 5]
    assert router.showcase(rows[:2], 4) == [0, 1]


def saved_maps() -> maps.SavedMaps:
    rng = np.random.default_rng(0)
    layers = [f"{block}.attentions.0.transformer_blocks.0.attn1" for block in ("down_blocks.1", "mid_block")]
    return maps.SavedMaps(
        images=rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8),
        masks=rng.random((2, 16, 16)) > 0.5,
        timesteps=[900, 500, 100],
        maps={layer: rng.random((2, 3, 4, 4)).astype(np.float32) for layer in layers},
        rows=[
            {"subject": f"s{n}", "prompt": "a man", "prompt_id": "p", "index": 0, "seed": 1} for n in range(2)
        ],
    )


def test_saved_maps_survive_the_file(tmp_path):
    saved = saved_maps()
    maps.save_maps(tmp_path / "maps.safetensors", saved)
    loaded = maps.load_maps(tmp_path / "maps.safetensors")
    assert (loaded.rows, loaded.timesteps, list(loaded.maps)) == (
        saved.rows,
        saved.timesteps,
        list(saved.maps),
    )
    np.testing.assert_array_equal(loaded.masks, saved.masks)
    for layer, values in saved.maps.items():
        np.testing.assert_allclose(loaded.maps[layer], values, atol=1e-3)


def test_broken_maps_are_named(tmp_path):
    path = tmp_path / "maps.safetensors"
    maps.save_maps(path, saved_maps())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"maps\.safetensors is cut short"):
        maps.load_maps(path)
    with pytest.raises(DataError, match="does not exist"):
        maps.load_maps(tmp_path / "none")


def router_rows(found: bool = True) -> list[dict]:
    return [
        {
            "subject": f"s{s}", "subjects": [f"s{s}"], "kind": "single", "prompt_id": "p", "index": 0,
            "layer": layer, "in_losses": layer == "b", "timestep": t, "steps": 4, "outside": 0.9 - 0.01 * s,
            "inside": (0.5 - 0.02 * s + (0.1 if t else -0.1)) if found or s else None,
        }
        for s in range(4) for layer in ("a", "b") for t in (0, 900)
    ]  # fmt: skip


def test_summary_is_over_loss_layers_and_all_timesteps(tmp_path):
    write_rows(tmp_path / "rows.parquet", router_rows(), ROUTER)
    maps.tabulate(tmp_path / "rows.parquet", tmp_path / "router.csv", tmp_path / "timesteps.csv")
    lines = (tmp_path / "router.csv").read_text().splitlines()
    assert (
        lines[0] == "layers,timesteps,region,images,left_out,prior_weight,prior_weight_low,prior_weight_high"
    )
    assert [line.split(",")[:6] for line in lines[1:7]] == [
        ["L", "free", "outside", "4", "0", "0.885000"],
        ["L", "free", "inside", "4", "0", "0.470000"],
        ["L", "free", "outside - inside", "4", "0", "0.415000"],
        ["L", "all", "outside", "4", "0", "0.942500"],  # two of four steps: (.885 + 1) / 2
        ["L", "all", "inside", "4", "0", "0.735000"],
        ["L", "all", "outside - inside", "4", "0", "0.207500"],
    ]
    assert len(lines) == 1 + 3 * 4
    by_timestep = (tmp_path / "timesteps.csv").read_text().splitlines()
    assert by_timestep[0] == lines[0].replace("timesteps", "timestep")
    assert [line.split(",")[:6] for line in by_timestep[1:7]] == [
        ["L", "900", "outside", "4", "0", "0.885000"],
        ["L", "900", "inside", "4", "0", "0.570000"],
        ["L", "900", "outside - inside", "4", "0", "0.315000"],
        ["L", "0", "outside", "4", "0", "0.885000"],
        ["L", "0", "inside", "4", "0", "0.370000"],
        ["L", "0", "outside - inside", "4", "0", "0.515000"],
    ]
    assert len(by_timestep) == 1 + 3 * 3 * 2


def test_images_without_anybody_are_counted():
    table = maps.summary(router_rows(found=False))
    assert {(row["images"], row["left_out"]) for row in table.rows} == {(3, 1)}
