"""FastComposer's released checkpoint, `pytorch_model.bin`, in and out.

It is the state dict of the whole `FastComposerModel` of github.com/mit-han-lab/fastcomposer, made with
diffusers 0.16 and transformers 4.25, so a part that is frozen here is in it too:

    unet.*, postfuse_module.*, image_encoder.{vision_model,visual_projection}.*    trained, wholly or partly
    text_encoder.*, vae.*                                                          Stable Diffusion's own

Import takes what is trained, and holds the frozen rest to the models that are loaded. The same names as a
.safetensors file are read and written too.

Entry points, called by `python -m moa import-fastcomposer` and `export-fastcomposer`: `run_import`,
`run_export`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moa.baselines.fastcomposer import FastComposer, load_fastcomposer
from moa.files import write_atomically
from moa.sampling import Pipeline, load_image_encoder, load_prior
from moa.training.config import TrainConfig

# Part of the checkpoint: (pattern of our name, their name), the first that matches.
RENAMED: dict[str, list[tuple[str, str]]] = {
    "postfuse_module": [
        (r"^m([12])\.norm\.", r"mlp\1.layernorm."),
        (r"^m([12])\.", r"mlp\1."),
        (r"^norm\.", "layer_norm."),
    ],
    "vae": [
        (r"(mid_block\.attentions\.0)\.to_q\.", r"\1.query."),
        (r"(mid_block\.attentions\.0)\.to_k\.", r"\1.key."),
        (r"(mid_block\.attentions\.0)\.to_v\.", r"\1.value."),
        (r"(mid_block\.attentions\.0)\.to_out\.0\.", r"\1.proj_attn."),
    ],
}
POSITIONS = ("text_encoder.embeddings", "image_encoder.vision_model.embeddings")
"""Embeddings that have `position_ids`, 0 … n − 1, in the file: a buffer of that time's transformers."""


# ── Files ─────────────────────────────────────────────────────────────────────────────────────


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .safetensors file, on the CPU; nothing but tensors is ever unpickled.

    Raises:
        FileNotFoundError, ValueError: no such file; it is broken, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give FastComposer's pytorch_model.bin")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is broken or holds more than tensors; it was not loaded: {error}"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} is no state dict: a mapping of names to tensors is wanted")
    return dict(found)


def write_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As .safetensors if the name ends so, else as `torch.save` writes it."""
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save = save_file if path.suffix == ".safetensors" else torch.save
    write_atomically(path, lambda temporary: save(whole, temporary))


# ── Names ─────────────────────────────────────────────────────────────────────────────────────


def their_name(part: str, name: str) -> str:
    """FastComposer's name of our parameter `name` in one part of the checkpoint."""
    for pattern, replacement in RENAMED.get(part, []):
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return f"{part}.{renamed}"
    return f"{part}.{name}"


def checkpoint_tensors(pipe: Pipeline, model: FastComposer) -> dict[str, Tensor]:
    """{name in the checkpoint: our tensor}, of all five parts, without the position ids."""
    parts = {
        "unet": model.unet,
        "postfuse_module": model.fusion,
        "image_encoder": model.image_encoder,
        "text_encoder": pipe.text_encoder,
        "vae": pipe.vae,
    }
    return {
        their_name(part, name): value
        for part, module in parts.items()
        for name, value in module.state_dict(keep_vars=True).items()
    }


# ── In and out ────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def import_checkpoint(path: Path, pipe: Pipeline, model: FastComposer) -> None:
    """Read the trained parts of a checkpoint into `model`, which is on `pipe`'s U-Net.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`; names or shapes differ, or a frozen parameter
        is another than the loaded models' (to the precision of the coarser of the two). Nothing is changed.
    """
    found = read_checkpoint(path)
    own = checkpoint_tensors(pipe, model)
    for prefix in POSITIONS:
        found.pop(f"{prefix}.position_ids", None)
    _refuse(path, "lacks", own.keys() - found.keys())
    _refuse(path, "has the unknown", found.keys() - own.keys())
    _refuse(path, "has another shape of", (n for n in own if found[n].shape != own[n].shape))
    trained = {id(parameter) for parameter in model.trained().values()}
    frozen = [name for name, value in own.items() if id(value) not in trained]
    others = (name for name in frozen if not _same(own[name], found[name]))
    _refuse(path, "was not made on these models: it has another", others)
    for name, parameter in own.items():
        if id(parameter) in trained:
            parameter.copy_(found[name])


def export_checkpoint(path: Path, pipe: Pipeline, model: FastComposer) -> None:
    """Write `model`, with the frozen parts of `pipe`, as FastComposer's code loads it (strictly)."""
    tensors = checkpoint_tensors(pipe, model)
    for prefix in POSITIONS:
        count = tensors[f"{prefix}.position_embedding.weight"].shape[0]
        tensors[f"{prefix}.position_ids"] = torch.arange(count)[None]
    write_checkpoint(tensors, path)


def _same(own: Tensor, found: Tensor) -> bool:
    """Whether two tensors are equal once both are of the coarser type."""
    coarse = min(own.dtype, found.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(own.detach().cpu().to(coarse), found.to(coarse))


def _refuse(path: Path, what: str, names: Iterable[str]) -> None:
    """ValueError with the first three of the names, if there are any."""
    wrong = sorted(names)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path} {what} {', '.join(wrong[:3])}{more}: give a checkpoint of FastComposer and the prior, "
            "image encoder and number of trained layers (`image_encoder_layers`) that it was trained with"
        )


# ── Stages ────────────────────────────────────────────────────────────────────────────────────


def run_import(config: TrainConfig, checkpoint: Path, output: Path) -> None:
    """Turn FastComposer's `pytorch_model.bin` into a folder that `--method fastcomposer` takes.

    Args:
        config: models and layers, those that it was trained with.
        checkpoint: the file `pytorch_model.bin`.
        output: folder to make.
    """
    pipe = load_prior(config.prior)
    encoder, _ = load_image_encoder(config.image_encoder)
    model = FastComposer(pipe.unet, encoder, config.image_encoder_layers)
    import_checkpoint(checkpoint, pipe, model)
    model.save_pretrained(output)


def run_export(config: TrainConfig, trained: Path, output: Path) -> None:
    """Write a folder that `train-fastcomposer` made as a checkpoint that FastComposer's code loads.

    Args:
        config: models and layers, those that it was trained with.
        trained: the folder of trained weights.
        output: the file `pytorch_model.bin` to write.
    """
    pipe = load_prior(config.prior)
    encoder, _ = load_image_encoder(config.image_encoder)
    export_checkpoint(output, pipe, load_fastcomposer(trained, pipe, encoder))
