"""What a method of the comparison is: requests in, images out; and the register of those there are.

A baseline is one file in `moa/baselines/` (or `moa/miniature/`, for what only the miniature can have) that
implements `Method` and registers a factory. Nothing else needs to know about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from PIL import Image

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Subject:
    """Someone to be shown: `image` is the whole photo (RGB), `word` how prompts call them ("man")."""

    id: str
    word: str
    image: Image.Image


@dataclass(frozen=True)
class Request:
    """One image to make."""

    prompt: str
    spans: tuple[tuple[int, int], ...]  # characters of each subject's word in the prompt, end exclusive
    subjects: tuple[Subject, ...]  # one a span; none for a prompt without subjects
    seed: int  # 0 <= seed < 2**63; the starting noise comes from it alone

    def __post_init__(self) -> None:
        if len(self.spans) != len(self.subjects):
            raise ValueError(
                f"{len(self.subjects)} subjects need as many spans, not {len(self.spans)}: {self.prompt!r}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside 0..2**63-1")
        for start, end in self.spans:
            if not 0 <= start < end <= len(self.prompt):
                raise ValueError(f"span {start}:{end} lies outside the prompt {self.prompt!r}")


class Method(Protocol):
    """What a method offers. The result for a request must not depend on the others in the batch."""

    name: str

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        """One RGB image a request, in order."""
        ...

    def trained_parameters(self) -> int:
        """How many parameters were trained for it, beyond the prior; 0 for the prior itself."""
        ...


SchedulerName = Literal["unipc", "ddim", "dpm++"]


@dataclass(frozen=True)
class Sampling:
    """How images are sampled; the same for all methods but for the keys that only one of them reads."""

    scheduler: SchedulerName = "unipc"  # [paper]
    steps: int = 50  # [FastComposer]
    guidance: float = 5.0  # classifier-free guidance scale; 1 = off [FastComposer]
    negative_prompt: str = ""  # text of the unconditional half
    batch_size: int = 8  # images a pass; with guidance, twice as many go through the U-Net
    null_branch: Literal["expert", "prior"] = "expert"  # MoA: who paints the unconditional half
    # MoA: router fixed to the prior at timesteps from here on; 1000 = never, null = what the adapter asks for
    personalize_below: int | None = None
    sparse_threshold: float = (
        0.0  # MoA: weight up to which a pixel is left to the prior, and costs less; 0 = none
    )
    alpha: float = 0.5  # FastComposer: fraction of steps, at the end, that see the subject [FastComposer]
    precision: Literal["no", "fp16", "bf16"] = "no"  # "no" = 32-bit floats

    def __post_init__(self) -> None:
        if self.scheduler not in get_args(SchedulerName):
            raise ValueError(
                f"scheduler {self.scheduler!r}: choose one of {', '.join(get_args(SchedulerName))}"
            )
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps ({self.steps}) and batch_size ({self.batch_size}) must be at least 1")
        if not 0 <= self.sparse_threshold < 1:
            raise ValueError(
                f"sparse_threshold {self.sparse_threshold} is a router's weight: 0 <= weight < 1"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} is a fraction of the steps: 0..1")


@dataclass(frozen=True)
class ModelSource:
    """Where a pretrained model is: a local folder, or a name on the Hugging Face hub."""

    id: str
    revision: str | None = None  # commit of the hub's repository; null = main


@dataclass(frozen=True)
class MethodConfig:
    """What a factory needs to build a method."""

    prior: ModelSource
    image_encoder: ModelSource
    trained: Path | None = None  # folder that training wrote; None for methods without training
    sampling: Sampling = field(default_factory=Sampling)
    pool: tuple[Subject, ...] = ()  # all who have a photo; the wrong subject is one of them
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Weights' type while sampling."""
        import torch  # here, because what only reads results knows requests without PyTorch

        return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.sampling.precision]

    def trained_folder(self, method: str) -> Path:
        """The folder of trained weights; raises ValueError or FileNotFoundError that says what to do."""
        if self.trained is None:
            raise ValueError(
                f"{method} needs trained weights: give the folder that `python -m moa train-{method}` wrote"
                " with --trained"
            )
        if not (self.trained / "config.json").is_file():
            raise FileNotFoundError(
                f"{self.trained / 'config.json'} is missing: train first (`python -m moa train-{method}`; "
                f"`snakemake --cores all {self.trained}` does it with all that it needs), or give the folder "
                "that holds it with --trained"
            )
        return self.trained


Factory = Callable[[MethodConfig], Method]
METHODS: dict[str, Factory] = {}
_MODULES = ("moa.baselines", "moa.miniature.ceiling")


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator that makes a factory known under `name`; a name can be given once."""

    def decorate(factory: Factory) -> Factory:
        if name in METHODS:
            raise ValueError(f"a method called {name!r} is registered already")
        METHODS[name] = factory
        return factory

    return decorate


def method_names() -> list[str]:
    """All registered methods; importing them is put off to here, because baselines import this module."""
    for module in _MODULES:
        import_module(module)
    return list(METHODS)


def build(name: str, config: MethodConfig) -> Method:
    """The method called `name`. Raises ValueError listing the choices."""
    names = method_names()
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(sorted(names))}")
    return METHODS[name](config)


WRONG_SUBJECT = "moa_wrong_subject"  # the method that shows others, by `wrong_subjects`


def wrong_subjects(wanted: Sequence[Subject], pool: Sequence[Subject]) -> tuple[Subject, ...]:
    """For every wanted subject another one of the pool, of the same word, that the request does not want.

    The choice is the next fitting subject in the order of ids, going round; so over single requests for the
    whole pool it is a derangement. Keeping the word keeps the prompt true: only the identity is wrong.

    Raises:
        ValueError: the pool has no other subject with that word.
    """
    taken = {subject.id for subject in wanted}
    chosen: list[Subject] = []
    for subject in wanted:
        others = sorted((s for s in pool if s.word == subject.word and s.id not in taken), key=lambda s: s.id)
        if not others:
            raise ValueError(
                f"no wrong subject for {subject.id!r}: the pool of {len(pool)} has no other {subject.word!r}"
            )
        after = [s for s in others if s.id > subject.id]
        chosen.append((after or others)[0])
        taken.add(chosen[-1].id)
    return tuple(chosen)
