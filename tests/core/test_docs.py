"""The code in docs/pipeline.md and docs/methods.md runs, block after block, on the shipped weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPVisionModelWithProjection

from moa import MoAAdapter, MoAPipeline
from moa.hashing import ROOT
from moa.methods import METHODS
from tests.core.conftest import scramble

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
WEIGHTS = "moa/miniature/weights"
PIPELINES = (
    MoAPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionControlNetPipeline,
)


def blocks(text: str) -> list[tuple[str, str]]:
    """(what it needs, code) of each Python block; "gpu", "hub" and "sd" are said after the language."""
    return re.findall(r"^```python ?(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page names: weights, pictures, a trained adapter, a style."""
    for name in (WEIGHTS, "docs/images"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(f"{WEIGHTS}/prior/unet")
    encoder = CLIPVisionModelWithProjection.from_pretrained(f"{WEIGHTS}/image_encoder", dtype=torch.float32)
    adapter = MoAAdapter.from_unet(unet, image_encoder=encoder, image_layers=2)
    scramble(adapter, scale=0.01).save_pretrained("results/miniature/train/moa")
    styled = copy.deepcopy(unet)
    styled.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights("style", unet_lora_layers=get_peft_model_state_dict(styled))
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a picture, no progress bars, and no waiting for a compiler: `test_extras` compiles."""
    for kind in PIPELINES:

        def call(self, *args, own=kind.__call__, **kwargs):
            self.set_progress_bar_config(disable=True)
            return own(self, *args, **kwargs | {"num_inference_steps": 2})

        monkeypatch.setattr(kind, "__call__", call)
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def on_stable_diffusion(names: dict, pipe: MoAPipeline) -> dict:
    """The page's names with `pipe`, whose latents have four channels, in the place of its pipeline."""
    conditioning = pipe.conditioner("a woman in a red hat", subjects=[names["photo"]], words=["woman"])
    return names | {"pipe": pipe, "conditioning": conditioning}


def test_the_page_on_the_pipeline_runs(workplace, quick, pipe):
    names: dict = {}
    ran = 0
    for needs, code in blocks((DOCS / "pipeline.md").read_text(encoding="utf-8")):
        compiled = compile(code, "docs/pipeline.md", "exec")
        if needs == "hub" or (needs == "gpu" and not torch.cuda.is_available()):
            continue
        exec(compiled, on_stable_diffusion(names, pipe) if needs == "sd" else names)
        ran += 1
    assert ran == 17 + torch.cuda.is_available()
    assert names["image"].size == (64, 64)
    assert names["personal"].tobytes() != names["prior"].tobytes() != names["later"].tobytes()
    assert (workplace / "my-adapter" / "README.md").is_file()
    assert names["again"].adapter.config["experts"] == 2


def test_the_page_on_methods_runs(workplace):
    names: dict = {}
    pages = blocks((DOCS / "methods.md").read_text(encoding="utf-8"))
    try:
        for _, code in pages:
            exec(compile(code, "docs/methods.md", "exec"), names)
    finally:
        METHODS.pop("portrait", None)
    assert len(pages) == 5
    assert names["image"].size == names["personal"].size == (64, 64)
    assert names["files"] == names["again"]
    assert names["said"].startswith("a <") and names["said"].endswith("> woman in a red hoodie")
    assert names["same"].tobytes() == names["personal"].tobytes()


@pytest.mark.parametrize("page", ["pipeline.md", "architecture.md", "methods.md"])
def test_what_the_pages_link_to_exists(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (DOCS / link).exists()] == []
    assert f"docs/{page}" in (ROOT / "README.md").read_text(encoding="utf-8")
