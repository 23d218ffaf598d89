"""Model cards of the miniature's models: recipe, data, training log and what the gates measured."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from moa.miniature.corpus import PROP_SHARE

ABOUT = {
    "prior": "A small Stable Diffusion (CLIPTextModel, AutoencoderKL, UNet2DConditionModel) of this world.",
    "image_encoder": "The subject encoder: the vision tower of the CLIP whose text tower the prior uses.",
    "captioner": "A small BLIP-2 that captions the miniature's pictures with class words and context.",
    "segmenter": "A small Mask2Former that finds the people in the miniature's pictures.",
    "clip_judge": "The judge of prompt consistency: a CLIP trained apart from the prior's text encoder.",
    "identity": "The judge of identity: a ResNet trained with ArcFace, apart from the subject encoder.",
    "attributes": "A classifier of every attribute of a picture; it measures the other models.",
}
GATES = {  # which rows of the gates speak of a model
    "prior": ("autoencoder", "prior"),
    "image_encoder": ("image_encoder",),
    "captioner": ("captioner",),
    "segmenter": ("segmenter", "detector"),
    "clip_judge": ("clip_judge",),
    "identity": ("identity", "mean colours"),
    "attributes": ("attributes",),
}
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon and AdamW"}
LICENCE = """---
license: apache-2.0
library_name: {library}
tags: [moa, miniature]
---
"""


def _held(settings: dict[str, Any]) -> str:
    """What is said of a corpus with another share of props than most have."""
    share = settings.get("prop_share", PROP_SHARE)
    return "" if share == PROP_SHARE else f", with a prop in {share:.0%}"


def _recipe(file: Path) -> str:
    """One trained part: what a reader needs to train it again."""
    recipe = json.loads(file.read_text())
    budget: dict[str, Any] = recipe["settings"]["budget"]
    optimizer = OPTIMIZERS[budget.get("optimizer", "adamw")]
    return (
        f"- **{recipe['model']}**: {recipe['parameters']:,} parameters; {budget['steps']} steps of "
        f"{budget['batch_size']} pictures, {optimizer} at {budget['lr']:g} (cosine), weight decay "
        f"{budget['weight_decay']:g}, EMA {budget['ema']:g}, seed {budget['seed']}; "
        f"{recipe['seconds'] / 60:.0f} minutes with {recipe['settings']['threads']} thread(s) of a "
        f"{recipe['processor']} processor, torch {recipe['torch']}. Data: {recipe['settings']['images']} "
        f"rendered scenes of the pretraining identities{_held(recipe['settings'])}, SHA-256 "
        f"`{recipe['data_sha256'][:16]}…`. "
        f"Log: `{file.name.replace('recipe.json', 'log.csv')}`."
    )


def card(name: str, folder: Path, gates: list[dict[str, str]]) -> str:
    """The README.md of one model's folder."""
    lines = [
        LICENCE.format(library="diffusers" if name == "prior" else "transformers") + f"# Miniature: {name}"
    ]
    lines += [
        "",
        ABOUT[name],
        "",
        "Weights are fp16 safetensors. Trained from nothing by `snakemake pretrain`.",
        "",
    ]
    lines += ["## Recipe", "", *(_recipe(f) for f in sorted(folder.glob("*recipe.json"))), ""]
    rows = [r for r in gates if r["gate"] in GATES[name]]
    if rows:
        lines += [
            "## Measured on held-out identities",
            "",
            "| gate | measure | value | goal | reached | count |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        lines += ["| " + " | ".join(r.values()) + " |" for r in rows]
        lines += [
            "",
            "Goals that are missed are marked `no`: results that stand on this model inherit its limits.",
            "",
        ]
    return "\n".join(lines)


def run(weights: Path, gates: Path) -> None:
    """Write README.md into every model's folder below `weights`. FileNotFoundError if one is missing.

    Args:
        weights: the folder that holds a folder for each model.
        gates: CSV of the `gates` stage, whose measures the cards show.
    """
    rows = list(csv.DictReader(gates.open()))
    for name in ABOUT:
        folder = weights / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: train it with `snakemake pretrain`")
        (folder / "README.md").write_text(card(name, folder, rows))
