"""The protocol as data: which images are asked for, of whom, with which words and which noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from moa.choose import spread

if TYPE_CHECKING:  # the workflow reads protocols too, without PyTorch
    from moa.evaluation.samples import Row

PLACEHOLDER = "{S}"


class Named(Protocol):
    """All that a request needs to know of a subject."""

    @property
    def id(self) -> str: ...

    @property
    def word(self) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """A template with one `{S}` a subject, in the place of the subject's class word."""

    id: str
    group: str
    template: str

    @property
    def subjects(self) -> int:
        """How many subjects it shows."""
        return self.template.count(PLACEHOLDER)

    def fill(self, words: Sequence[str]) -> tuple[str, list[list[int]]]:
        """The prompt and the characters [start, end) of each word; ValueError for a wrong number of words."""
        parts = self.template.split(PLACEHOLDER)
        if len(words) != len(parts) - 1:
            raise ValueError(f"prompt {self.template!r} takes {len(parts) - 1} words, not {len(words)}")
        text, spans = parts[0], []
        for word, rest in zip(words, parts[1:], strict=True):
            spans.append([len(text), len(text) + len(word)])
            text += word + rest
        return text, spans


@dataclass(frozen=True)
class Kind:
    """One part of a protocol: prompts, all with the same number of subjects."""

    prompts: tuple[Prompt, ...]
    images: int  # for each subject (or pair) and prompt
    pairs: int | Literal["all"] = "all"  # k: each subject with the next k of the list, taken as a ring
    seed: Literal["subject", "prompt"] = "subject"  # prompt: all subjects share the noise

    @property
    def subjects(self) -> int:
        """Subjects in each image: 1 or 2."""
        return self.prompts[0].subjects


@dataclass(frozen=True)
class Split:
    """The subjects of a split and what is asked of them; a number, for so many, men and women in turn."""

    subjects: tuple[str, ...] | int
    kinds: Mapping[str, Kind]
    words: Mapping[str, str] = field(default_factory=dict)  # subject: "man", "woman"; where the file says so

    def choose(self, available: Sequence[Named]) -> list[Named]:
        """The split's subjects among those that there are; ValueError naming the ones that are missing."""
        ordered = {subject.id: subject for subject in sorted(available, key=lambda s: s.id)}
        if isinstance(self.subjects, int):
            if len(ordered) < self.subjects:
                raise ValueError(
                    f"the protocol asks for {self.subjects} subjects, but there are {len(ordered)}"
                )
            return spread_by_word(list(ordered.values()), self.subjects)
        missing = [name for name in self.subjects if name not in ordered]
        if missing:
            raise ValueError(
                f"no photo of the protocol's subjects {', '.join(missing)}: have them drawn (the miniature's "
                "`render.subjects_test` and `subjects_validation` say how many are), bring them, or change "
                "the protocol's `subjects`"
            )
        return [ordered[name] for name in self.subjects]


def spread_by_word(subjects: Sequence[Named], count: int) -> list[Named]:
    """`count` subjects from all over a list, the class words in turn as long as there are both."""
    groups = [[s for s in subjects if s.word == word] for word in sorted({s.word for s in subjects})]
    turns = [s for turn in zip_longest(*groups) for s in turn if s is not None]
    quotas = [sum(s.word == group[0].word for s in turns[:count]) for group in groups]
    chosen = [spread(group, quota) for group, quota in zip(groups, quotas, strict=True)]
    return [s for turn in zip_longest(*chosen) for s in turn if s is not None]


@dataclass(frozen=True)
class EvaluationProtocol:
    """A protocol file."""

    name: str
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise ValueError(
                f"protocol {self.name}: no split {name!r}; choose one of {', '.join(self.splits)}"
            )
        return self.splits[name]

    def kind(self, split: str, name: str) -> Kind:
        kinds = self.split(split).kinds
        if name not in kinds:
            raise ValueError(f"protocol {self.name}: {split} has no kind {name!r}; it has {', '.join(kinds)}")
        return kinds[name]


# --- Reading ----------------------------------------------------------------------------------------------


def load(path: str | Path) -> EvaluationProtocol:
    """Read a protocol file. Raises ValueError naming file, key and cure for anything unknown or mistyped."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"protocol {path} does not exist; check the config's key `protocol`") from None
    except yaml.YAMLError as error:
        raise ValueError(f"protocol {path} is no YAML: {error}") from error
    _keys(path, "", data, required=("name", "test", "validation"))
    splits = {name: _split(path, name, data[name]) for name in ("validation", "test")}
    return EvaluationProtocol(str(data["name"]), splits)


def _keys(
    path: str | Path, key: str, data: Any, required: Sequence[str], optional: Sequence[str] = ()
) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: {key or 'the file'} must be a mapping, not {data!r}")
    unknown = sorted(set(data) - {*required, *optional}, key=str)
    missing = sorted(set(required) - set(data))
    if unknown or missing:
        prefix = f"{key}." if key else ""
        names = [f"unknown key {prefix}{name}" for name in unknown] + [
            f"missing key {prefix}{n}" for n in missing
        ]
        raise ValueError(f"{path}: {'; '.join(names)}")


def _split(path: str | Path, name: str, data: Any) -> Split:
    _keys(path, name, data, required=("subjects", "kinds"))
    subjects = data["subjects"]
    words = _words(path, name, subjects)
    subjects = sorted(words) if words else subjects  # in FastComposer's pairs, too, the lower id comes first
    if isinstance(subjects, list) and all(isinstance(s, str) for s in subjects):
        if len(set(subjects)) != len(subjects) or not subjects:
            raise ValueError(f"{path}: {name}.subjects must name at least one subject, and each only once")
        subjects = tuple(subjects)
    elif isinstance(subjects, bool) or not isinstance(subjects, int) or subjects < 1:
        raise ValueError(
            f"{path}: {name}.subjects must be ids, ids below their words, or a number of at least 1"
        )
    if not isinstance(data["kinds"], dict):
        raise ValueError(f"{path}: {name}.kinds must be a mapping")
    kinds = {kind: _kind(path, f"{name}.kinds.{kind}", value) for kind, value in data["kinds"].items()}
    return Split(subjects, kinds, words)


def _words(path: str | Path, name: str, subjects: Any) -> dict[str, str]:
    """What each subject is called, of `subjects` that are listed below their words; otherwise nothing."""
    if not isinstance(subjects, dict):
        return {}
    words: dict[str, str] = {}
    for word, listed in subjects.items():
        for subject in listed if isinstance(listed, list) else [None]:
            if not isinstance(word, str) or not isinstance(subject, str) or subject in words:
                raise ValueError(f"{path}: {name}.subjects.{word}: {subject!r} is no id, or comes twice")
            words[subject] = word
    return words


def _kind(path: str | Path, key: str, data: Any) -> Kind:
    _keys(path, key, data, required=("images", "prompts"), optional=("pairs", "seed"))
    pairs, seed = data.get("pairs", "all"), data.get("seed", "subject")
    for name, value in (("images", data["images"]), ("pairs", pairs)):
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not number and not (name == "pairs" and value == "all"):
            raise ValueError(f"{path}: {key}.{name} must be a whole number of at least 1, not {value!r}")
    if seed not in ("subject", "prompt"):
        raise ValueError(f"{path}: {key}.seed must be subject or prompt, not {seed!r}")
    prompts = _prompts(path, f"{key}.prompts", data["prompts"])
    if len({prompt.subjects for prompt in prompts}) != 1 or prompts[0].subjects not in (1, 2):
        raise ValueError(f"{path}: every prompt of {key} must hold {PLACEHOLDER} once, or every one twice")
    return Kind(prompts, data["images"], pairs, seed)


def _prompts(path: str | Path, key: str, data: Any) -> tuple[Prompt, ...]:
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path}: {key} must map each group to its prompts")
    prompts = []
    for group, templates in data.items():
        if not isinstance(templates, list) or not all(isinstance(t, str) for t in templates):
            raise ValueError(f"{path}: {key}.{group} must be a list of prompts")
        prompts += [Prompt(f"{group}-{n:02d}", group, template) for n, template in enumerate(templates)]
    if len({prompt.template for prompt in prompts}) != len(prompts):
        raise ValueError(f"{path}: {key} holds a prompt twice")
    return tuple(prompts)


# --- Requests ---------------------------------------------------------------------------------------------


def image_seed(subject: str, template: str, index: int) -> int:
    """Seed of an image, 0..2³²−1, from SHA-256; an empty `subject` gives noise that subjects share."""
    digest = hashlib.sha256(f"{subject}\n{template}\n{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def subject_sets(subjects: Sequence[Named], kind: Kind) -> list[tuple[Named, ...]]:
    """Who stands together in an image: each subject alone, all pairs, or a ring of pairs.

    A ring with k neighbours shows every subject 2k times, as balanced as all pairs are. Raises ValueError if
    there are too few subjects for it.
    """
    if kind.subjects == 1:
        return [(subject,) for subject in subjects]
    if len(subjects) < 2:
        raise ValueError(f"pairs need at least 2 subjects, not {len(subjects)}")
    if kind.pairs == "all":
        return list(combinations(subjects, 2))
    n = len(subjects)
    if 2 * kind.pairs >= n:
        raise ValueError(
            f"pairs: {kind.pairs} neighbours need at least {2 * kind.pairs + 1} subjects, not {n}"
        )
    return [(subjects[i], subjects[(i + k) % n]) for i in range(n) for k in range(1, kind.pairs + 1)]


def requests(
    protocol: EvaluationProtocol, subjects: Sequence[Named], kind: str, split: str = "test"
) -> list[Row]:
    """Rows of the `REQUEST` schema: everything that a split of the protocol asks for under `kind`.

    Args:
        protocol: from `load`.
        subjects: all that there are of the split; the protocol chooses among them.
        kind: "single", "multi", "swap" or another kind of the file.
        split: "test" or "validation".

    Raises:
        ValueError: an unknown kind or split, or a subject without photo.
    """
    part = protocol.kind(split, kind)
    rows = []
    for members in subject_sets(protocol.split(split).choose(subjects), part):
        name = "+".join(member.id for member in members)
        for prompt in part.prompts:
            text, spans = prompt.fill([member.word for member in members])
            for index in range(part.images):
                file = f"{name.replace('/', '-')}.{prompt.id}.{index:02d}.png"
                rows.append(
                    {
                        "split": split,
                        "kind": kind,
                        "subject": name,
                        "subjects": [member.id for member in members],
                        "words": [member.word for member in members],
                        "prompt_id": prompt.id,
                        "prompt_group": prompt.group,
                        "prompt": text,
                        "spans": spans,
                        "index": index,
                        "seed": image_seed(name if part.seed == "subject" else "", prompt.template, index),
                        "path": f"{split}/{kind}/{file}",
                    }
                )
    return rows
