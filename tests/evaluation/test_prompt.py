"""PC against open_clip, an independent implementation, on the same weights: a small CLIP and ViT-L/14."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform
from PIL import Image
from skimage.data import astronaut, coffee
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from moa.data.annotators import ModelSource
from moa.evaluation.prompt import ClipJudge
from moa.evaluation.protocol import load
from moa.miniature import models

PROMPTS = ["a man in a red hoodie", "a woman in space with a blue planet, smiling"]
L14_PROMPTS = [
    "a Greek marble sculpture of a woman",
    "a painting of a man and a woman together in the style of Vincent Van Gogh",
    "a portrait photo of a man dressed as a cowboy in the wild west, in from of a saloon, 8k",
    "  A MAN'S hat -- (red/blue), isn't it?! 2,400 naïve cafés  ",
    " ".join(["red"] * 75),  # with its two ends, all of the 77 tokens
]


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


def miniature(model: CLIPModel) -> open_clip.CLIP:
    """open_clip's network in the miniature's shape."""
    config = model.config
    text, vision = config.text_config, config.vision_config
    return open_clip.CLIP(
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


def fill(other: open_clip.CLIP, model: CLIPModel) -> open_clip.CLIP:
    """`other` with the weights of a transformers CLIP."""
    state, config = model.state_dict(), model.config
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
    text, vision = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    renamed |= tower(state, "text_model", text)
    renamed |= {f"visual.{key}": value for key, value in tower(state, "vision_model", vision).items()}
    other.load_state_dict(renamed, assign=True)  # what ViT-L/14 needs in memory is needed once
    return other.eval()


def test_equal_to_open_clip(judge):
    other = fill(miniature(judge.model), judge.model)
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


# --- ViT-L/14, the paper preset's judge -------------------------------------------------------------------


def l14(layers: int, act: str = "quick_gelu") -> CLIPModel:
    """openai/clip-vit-large-patch14 with random weights, of `layers` vision and at most 12 text layers."""
    common = {"hidden_act": act, "projection_dim": 768}
    text = {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
        "num_hidden_layers": min(layers, 12), "max_position_embeddings": 77,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,  # as published: the largest id ends a text
    }  # fmt: skip
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 224,
        "num_hidden_layers": layers, "patch_size": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=768))


def tokenizer() -> CLIPTokenizer:
    """CLIP's own, from the byte pairs that open_clip ships."""
    pairs = SimpleTokenizer()
    words = [*list(pairs.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        {word: n for n, word in enumerate(words)}, list(pairs.bpe_ranks), model_max_length=77
    )


def l14_judge(folder: str, layers: int) -> ClipJudge:
    """A folder as the hub has it, loaded as the paper preset loads it."""
    l14(layers).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)  # transformers' defaults are OpenAI's preprocessing
    tokenizer().save_pretrained(folder)
    return ClipJudge(ModelSource(folder))


def l14_in_open_clip(layers: int) -> open_clip.CLIP:
    """open_clip's ViT-L/14 for OpenAI's weights, less deep if asked, without weights."""
    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    config["vision_cfg"]["layers"] = layers
    config["text_cfg"]["layers"] = min(layers, 12)
    with torch.device("meta"):
        empty = open_clip.CLIP(**config)
    empty.attn_mask = torch.nn.Transformer.generate_square_subsequent_mask(77)  # not among the weights
    return empty


def photos() -> list[Image.Image]:
    """A square photo of 512 pixels, as Stable Diffusion makes them, and one of another shape."""
    return [Image.fromarray(astronaut()), Image.fromarray(coffee())]


def test_vit_l_14_equals_open_clip_from_photo_and_prompt_on(tmp_path):
    """Either side prepares and tokenises by itself. Two layers of each tower: the others are like them."""
    layers = 2
    judge = l14_judge(str(tmp_path), layers)
    found = judge.image_features(photos()) @ judge.text_features(L14_PROMPTS).T
    other = fill(l14_in_open_clip(layers), judge.model)
    prepare = image_transform(224, is_train=False, resize_mode="shortest", interpolation="bicubic")
    pixels = torch.stack([prepare(photo) for photo in photos()])
    np.testing.assert_allclose(judge.processor(photos())["pixel_values"], pixels, atol=1e-5)
    with torch.inference_mode():
        images = other.encode_image(pixels, normalize=True)
        texts = other.encode_text(open_clip.tokenize(L14_PROMPTS), normalize=True)
    expected = (images @ texts.T).numpy()
    assert np.ptp(expected) > 0.01  # the weights are random, but tell these apart
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_protocol_prompts_have_the_tokens_of_open_clip():
    kinds = load("config/protocol/paper.yaml").split("test").kinds.values()
    texts = [p.fill(["man"] * p.subjects)[0] for kind in kinds for p in kind.prompts] + L14_PROMPTS
    ours = tokenizer()
    for text, expected in zip(texts, open_clip.tokenize(texts), strict=True):
        ids = ours(text).input_ids
        assert ids == expected[: len(ids)].tolist(), text
        assert not expected[len(ids) :].any(), text


def test_vit_l_14_refuses_what_open_clip_would_cut(tmp_path):
    judge = l14_judge(str(tmp_path), 1)
    with pytest.raises(ValueError, match="78 tokens, but the judge reads 77"):
        judge.text_features([" ".join(["red"] * 76)])
