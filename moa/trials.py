"""What trials of a method are compared with. Imports nothing heavy, for the workflow reads it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reference(method: str, ablations: Mapping[str, Mapping[str, Any]]) -> str:
    """The ablation that changes nothing. Raises ValueError if there is none."""
    for name, changed in ablations.items():
        if not any(changed.values()):
            return name
    raise ValueError(
        f"ablations.{method}: none changes nothing; add `default: {{}}` to compare the others with"
    )
