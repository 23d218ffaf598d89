"""PC against open_clip, an independent implementation, on the same weights."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from moa.data.annotators import ModelSource
from moa.evaluation.prompt import ClipJudge
from moa.miniature import models

PROMPTS = ["a man in a red hoodie", "a woman in space with a blue planet, smiling"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    models.clip(2).save_pretrained(folder)
    models.clip_processor().save_pretrained(folder)
    return ClipJudge(ModelSource(str(folder)))


def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in PROMPTS]


def block(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A transformers CLIP layer under open_clip's names."""
    attention = {
        f"attn.in_proj_{kind}": torch.cat([state[f"{prefix}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
        for kind in ("weight", "bias")
    }
    names = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    return attention | {
        f"{ours}.{kind}": state[f"{prefix}.{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }


def tower(state: dict[str, torch.Tensor], name: str, layers: int) -> dict[str, torch.Tensor]:
    return {
        f"transformer.resblocks.{i}.{key}": value
        for i in range(layers)
        for key, value in block(state, f"{name}.encoder.layers.{i}").items()
    }


def convert(model: torch.nn.Module) -> open_clip.CLIP:
    """The same network in open_clip."""
    state, config = model.state_dict(), model.config
    text, vision = config.text_config, config.vision_config
    other = open_clip.CLIP(
        embed_dim=config.projection_dim,
        vision_cfg={
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_hidden_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        text_cfg={
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
        },
    )
    renamed = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "logit_scale": state["logit_scale"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        renamed[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        renamed[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    renamed |= tower(state, "text_model", text.num_hidden_layers)
    renamed |= {f"visual.{k}": v for k, v in tower(state, "vision_model", vision.num_hidden_layers).items()}
    other.load_state_dict(renamed)
    return other.eval()


def test_equal_to_open_clip(judge):
    other = convert(judge.model)
    length = judge.model.config.text_config.max_position_embeddings
    tokens = judge.tokenizer(PROMPTS, padding="max_length", max_length=length, return_tensors="pt").input_ids
    pixels = judge.processor(images=images(), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = (
            other.encode_image(pixels, normalize=True) * other.encode_text(tokens, normalize=True)
        ).sum(1)
    found = (judge.image_features(images()) * judge.text_features(PROMPTS)).sum(1)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_batches_do_not_matter(judge):
    alone = [judge.text_features([prompt])[0] for prompt in PROMPTS]
    np.testing.assert_allclose(judge.text_features(PROMPTS), alone, atol=1e-5)
    alone = [judge.image_features([image])[0] for image in images()]
    np.testing.assert_allclose(judge.image_features(images()), alone, atol=1e-5)


def test_prompt_too_long_is_named(judge):
    with pytest.raises(ValueError, match="shorten 'red red"):
        judge.text_features([" ".join(["red"] * 100)])
