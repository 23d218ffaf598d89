"""FastComposer's own checkpoint; `FastComposerModel` here has the structure of theirs, written out anew."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from moa import __main__ as command_line
from moa.baselines.fastcomposer import FastComposer, FastComposerMethod, load_fastcomposer
from moa.convert import export_checkpoint, import_checkpoint, read_checkpoint
from moa.methods import Request, Sampling
from moa.sampling import initial_latents, latent_shape, load_image_encoder, load_prior, sampler
from tests.training import tiny

SAMPLING = Sampling(steps=3, guidance=2.0, alpha=1.0)
MAN, WOMAN = tiny.subject(0, "man"), tiny.subject(1, "woman")
PROMPT = "a man and a woman"
REQUEST = Request(PROMPT, ((2, 5), (12, 17)), (MAN, WOMAN), 3)


class MLP(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, residual: bool):
        super().__init__()
        self.layernorm = nn.LayerNorm(in_dim)
        self.fc1, self.fc2 = nn.Linear(in_dim, out_dim), nn.Linear(out_dim, out_dim)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(nn.GELU()(self.fc1(self.layernorm(x))))
        return y + x if self.residual else y


class PostfuseModule(nn.Module):
    def __init__(self, text_dim: int, image_dim: int):
        super().__init__()
        self.mlp1 = MLP(text_dim + image_dim, text_dim, residual=False)
        self.mlp2 = MLP(text_dim, text_dim, residual=True)
        self.layer_norm = nn.LayerNorm(text_dim)

    def forward(self, text: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """text [B, T, D], features [N, F] in the order of the True places of mask [B, T]."""
        words = text[mask]
        fused = self.mlp1(torch.cat([words, features], dim=-1)) + words
        return text.masked_scatter(mask[..., None], self.layer_norm(self.mlp2(fused)))


class Holder(nn.Module):
    """A module of the given children, as their encoders hold transformers' parts under other names."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class FastComposerModel(nn.Module):
    def __init__(self, pipe, encoder):
        super().__init__()
        text = pipe.text_encoder
        self.text_encoder = Holder(
            final_layer_norm=text.final_layer_norm, embeddings=text.embeddings, encoder=text.encoder
        )
        self.image_encoder = Holder(
            vision_model=encoder.vision_model, visual_projection=encoder.visual_projection
        )
        self.vae, self.unet = pipe.vae, pipe.unet
        self.postfuse_module = PostfuseModule(text.config.hidden_size, encoder.config.projection_dim)

    def checkpoint(self) -> dict[str, Tensor]:
        """The state dict with the names and buffers of diffusers 0.16.1 and transformers 4.25.1."""
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = {}
        for name, value in self.state_dict().items():
            for new_name, old_name in old.items():
                if name.startswith("vae.") and f".attentions.0.{new_name}." in name:
                    name = name.replace(new_name, old_name)
            tensors[name] = value.clone()
        tensors["text_encoder.embeddings.position_ids"] = torch.arange(16)[None]
        tensors["image_encoder.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        return tensors


@dataclass
class Theirs:
    """A FastComposer of random weights, as one of their trainings would leave it, and its models."""

    model: FastComposerModel
    pipe: object
    encoder: object
    processor: object


@pytest.fixture(scope="module")
def theirs(models) -> Theirs:
    pipe = load_prior(models[0])
    encoder, processor = load_image_encoder(models[1])
    torch.manual_seed(1)
    model = FastComposerModel(pipe, encoder)
    trained = [pipe.unet, model.postfuse_module, *encoder.vision_model.encoder.layers[-2:]]
    with torch.no_grad():
        for part in trained:
            for parameter in part.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return Theirs(model.eval(), pipe, encoder, processor)


@pytest.fixture
def ours(models):
    """(pipeline, FastComposer, image processor) on the prior, untrained."""
    pipe = load_prior(models[0])
    encoder, processor = load_image_encoder(models[1])
    return pipe, FastComposer(pipe.unet, encoder), processor


@pytest.fixture
def checkpoint(theirs, tmp_path) -> Path:
    torch.save(theirs.model.checkpoint(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


@torch.no_grad()
def their_image(theirs: Theirs) -> np.ndarray:
    """REQUEST's image by their forward: fused text from the first step on, their U-Net."""
    pipe = theirs.pipe
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=16, return_tensors="pt").input_ids
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [2, 5]] = True  # start a man and a woman
    images = [subject.image for subject in REQUEST.subjects]  # squares
    pixels = theirs.processor(images=images, return_tensors="pt").pixel_values
    encoder = theirs.model.image_encoder
    features = encoder.visual_projection(encoder.vision_model(pixels).pooler_output)
    fused = theirs.model.postfuse_module(pipe.text_encoder(ids)[0], features, mask)
    with sampler(pipe, SAMPLING):
        made = pipe(
            prompt_embeds=fused,
            negative_prompt_embeds=pipe.encode_prompt("", "cpu", 1, False)[0],
            latents=initial_latents([REQUEST.seed], latent_shape(pipe)),
            num_inference_steps=SAMPLING.steps,
            guidance_scale=SAMPLING.guidance,
        )
    return np.asarray(made.images[0])


def test_an_imported_checkpoint_gives_the_images_of_its_model(theirs, ours, checkpoint):
    pipe, model, processor = ours
    before = FastComposerMethod(pipe, model, processor, SAMPLING).generate([REQUEST])[0]
    import_checkpoint(checkpoint, pipe, model)
    found = np.asarray(FastComposerMethod(pipe, model, processor, SAMPLING).generate([REQUEST])[0])
    expected = their_image(theirs)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(np.asarray(before).astype(int) - expected).max() > 10


@pytest.mark.parametrize("name", ["again.bin", "again.safetensors"])
def test_export_is_the_same_file_again(theirs, ours, checkpoint, tmp_path, name):
    pipe, model, _ = ours
    import_checkpoint(checkpoint, pipe, model)
    export_checkpoint(tmp_path / name, pipe, model)
    first, again = read_checkpoint(checkpoint), read_checkpoint(tmp_path / name)
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert "vae.encoder.mid_block.attentions.0.proj_attn.bias" in again
    assert {key.split(".")[0] for key in again} == {
        "unet",
        "vae",
        "text_encoder",
        "image_encoder",
        "postfuse_module",
    }


def test_diffusers_reads_the_exported_vae(theirs, ours, tmp_path):
    """It knows the names of its version 0.16 and puts them right."""
    pipe, model, _ = ours
    export_checkpoint(tmp_path / "a.bin", pipe, model)
    tensors = read_checkpoint(tmp_path / "a.bin")
    vae = {key.removeprefix("vae."): value for key, value in tensors.items() if key.startswith("vae.")}
    folder = tmp_path / "vae"
    pipe.vae.save_pretrained(folder)
    save_file(vae, folder / "diffusion_pytorch_model.safetensors")
    loaded = AutoencoderKL.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in pipe.vae.state_dict().items())


def test_frozen_parts_in_half_precision_are_the_same_parts(theirs, ours, tmp_path):
    """As mixed-precision training writes them: what is frozen in 16 bits, what is trained in 32."""
    tensors = theirs.model.checkpoint()
    for key, value in tensors.items():
        if key.startswith(("vae.", "text_encoder.")) and value.is_floating_point():
            tensors[key] = value.half()
    torch.save(tensors, tmp_path / "half.bin")
    pipe, model, _ = ours
    import_checkpoint(tmp_path / "half.bin", pipe, model)
    assert torch.equal(model.unet.conv_in.weight, theirs.pipe.unet.conv_in.weight)
    assert pipe.vae.dtype == torch.float32


def drop(tensors):
    del tensors["postfuse_module.mlp1.fc1.weight"], tensors["unet.conv_in.bias"]


def add(tensors):
    tensors["unet.conv_in.scale"] = torch.zeros(1)


def reshape(tensors):
    tensors["postfuse_module.layer_norm.bias"] = torch.zeros(7)


def retext(tensors):
    tensors["text_encoder.final_layer_norm.weight"] += 0.01


def relayer(tensors):
    tensors["image_encoder.vision_model.encoder.layers.0.mlp.fc1.bias"] += 0.01


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop, r"lacks postfuse_module\.mlp1\.fc1\.weight, unet\.conv_in\.bias: give"),
        (add, r"unknown unet\.conv_in\.scale"),
        (reshape, r"another shape of postfuse_module\.layer_norm\.bias"),
        (retext, r"not made on these models: it has another text_encoder\.final_layer_norm\.weight"),
        (relayer, r"another image_encoder\.vision_model\.encoder\.layers\.0.*image_encoder_layers"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(theirs, ours, tmp_path, spoil, message):
    tensors = theirs.model.checkpoint()
    spoil(tensors)
    torch.save(tensors, tmp_path / "spoilt.bin")
    pipe, model, _ = ours
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "spoilt.bin", pipe, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Code:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_are_no_state_dict_are_refused_and_never_run(ours, checkpoint, tmp_path, capsys):
    pipe, model, _ = ours
    torch.save({"unet": Code()}, tmp_path / "code.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    (tmp_path / "cut.bin").write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 100)
    wrong = {"code.bin": "more than tensors", "list.bin": "no state dict", "cut.bin": "broken"}
    for name, message in (wrong | {"cut.safetensors": "broken"}).items():
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            import_checkpoint(tmp_path / name, pipe, model)
    assert "must not run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"none\.bin does not exist"):
        import_checkpoint(tmp_path / "none.bin", pipe, model)


def test_the_stages_go_there_and_back(theirs, models, ours, checkpoint, tmp_path):
    config = json.dumps({"prior": {"id": models[0].id}, "image_encoder": {"id": models[1].id}})
    folder, again = tmp_path / "fastcomposer", tmp_path / "again.bin"
    given = ["--checkpoint", str(checkpoint), "--output", str(folder)]
    command_line.run(["import-fastcomposer", "--config", config, *given])
    pipe, model, _ = ours
    loaded = load_fastcomposer(folder, pipe, model.image_encoder)
    fusion = copy.deepcopy(loaded.fusion).state_dict()
    assert torch.equal(fusion["m1.fc1.weight"], theirs.model.postfuse_module.mlp1.fc1.weight)
    command_line.run(
        ["export-fastcomposer", "--config", config, "--trained", str(folder), "--output", str(again)]
    )
    first, second = read_checkpoint(checkpoint), read_checkpoint(again)
    assert all(torch.equal(second[key], value) for key, value in first.items())
