"""MoA: Mixture-of-Attention for personalised image generation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moa.adapter import MoAAdapter
    from moa.attention import MoAContext, Recorder
    from moa.conditioner import Conditioning, SubjectConditioner
    from moa.pipeline import MoAPipeline

_HOMES = {
    "MoAAdapter": "moa.adapter",
    "MoAContext": "moa.attention",
    "Recorder": "moa.attention",
    "Conditioning": "moa.conditioner",
    "SubjectConditioner": "moa.conditioner",
    "MoAPipeline": "moa.pipeline",
}

__all__ = ["Conditioning", "MoAAdapter", "MoAContext", "MoAPipeline", "Recorder", "SubjectConditioner"]


def __getattr__(name: str) -> object:
    """Import on first use: stages that need no model start without torch and diffusers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moa' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
