"""The `score` stage: image rows to scored rows. Models look at each image once; the rest is arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moa.data.subjects import read_subjects
from moa.evaluation import features, samples
from moa.evaluation.features import Features
from moa.evaluation.identity import score as score_identity
from moa.evaluation.judges import Judges, ScoreConfig, look_at_files
from moa.evaluation.references import faces_of
from moa.evaluation.samples import MADE, Row
from moa.methods import WRONG_SUBJECT, Subject, wrong_subjects


def score(
    config: ScoreConfig,
    made: Sequence[str | Path],
    subjects: str | Path,
    references: str | Path,
    results: str | Path,
    samples_out: str | Path,
    features_out: str | Path,
) -> None:
    """Score images.

    Args:
        config: the judges.
        made: parquet files of `MADE` rows, of any methods and kinds of one split.
        subjects: the split's subjects file: whom a method that is shown others sees.
        references: features of the subjects' photos, by id (`look-at-references`).
        results: the folder that the rows' paths start from.
        samples_out: `SAMPLE` rows are written here.
        features_out: and here what the judges saw, for metrics to come.

    Raises:
        DataError: a broken image, a subject without photo, or a reference without a face.
    """
    rows = sorted(samples.read(made, MADE), key=samples.sort_key)
    people = read_subjects(subjects)
    wanted = faces_of(features.read(references), {name for row in rows for name in row["subjects"]})
    judges = Judges(config)
    seen = look_at_files(judges, Path(results), list(dict.fromkeys(row["path"] for row in rows)))
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    texts = dict(zip(prompts, judges.clip.text_features(prompts), strict=True)) if prompts else {}
    features.write(features_out, seen)
    scored = [score_row(row, seen[row["path"]], wanted, texts[row["prompt"]]) for row in rows]
    samples.write(samples_out, [row | {"members": members(row, people)} for row in scored])


def members(row: Row, people: Mapping[str, Subject]) -> list[str]:
    """On whose looks a row's scores depend: its subjects, and those whom the method showed in their place."""
    if row["method"] != WRONG_SUBJECT:
        return list(row["subjects"])
    shown = wrong_subjects([people[name] for name in row["subjects"]], list(people.values()))
    return [*row["subjects"], *(subject.id for subject in shown)]


def score_row(row: Row, seen: Features, references: Mapping[str, Features], text: Any) -> Row:
    """A `MADE` row with its scores; each reference counts with its largest face."""
    wanted = [references[name] for name in row["subjects"]]
    scored = score_identity(np.stack([r.identity[0] for r in wanted]), seen.identity, seen.face_sizes)
    colored = score_identity(np.stack([r.color[0] for r in wanted]), seen.color, seen.face_sizes)
    return {
        **row,
        "ip": scored.ip,
        "ip_color": colored.ip,
        "pc": float(seen.clip @ text),
        "found": scored.found,
        "faces": scored.faces,
        "face_size": scored.face_size,
    }
