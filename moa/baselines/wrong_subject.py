"""MoA given another subject than the one that is scored: what identity is worth by chance and by context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from moa.baselines.moa import make as make_moa
from moa.methods import WRONG_SUBJECT, Method, MethodConfig, Request, Subject, register, wrong_subjects


class WrongSubject:
    """MoA after `moa.methods.wrong_subjects` has exchanged every subject."""

    name = WRONG_SUBJECT

    def __init__(self, method: Method, pool: Sequence[Subject]) -> None:
        self.method, self.pool = method, pool

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        wrong = [replace(r, subjects=wrong_subjects(r.subjects, self.pool)) for r in requests]
        return self.method.generate(wrong)

    def trained_parameters(self) -> int:
        return self.method.trained_parameters()


@register("moa_wrong_subject")
def make(config: MethodConfig) -> WrongSubject:
    """MoA, with the config's pool to choose wrong subjects from."""
    if len(config.pool) < 2:
        raise ValueError("moa_wrong_subject needs the protocol's subjects: pass them as `pool`")
    return WrongSubject(make_moa(config), config.pool)
