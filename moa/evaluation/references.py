"""The `look-at-references` stage: what the judges see in the subjects' photos.

Scores need only the own reference of an image; leaks and swaps need those of others too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moa.data.subjects import read_subjects
from moa.evaluation import features, samples
from moa.evaluation.judges import Judges, ScoreConfig
from moa.evaluation.score import reference_features


def look(config: ScoreConfig, made: Sequence[str | Path], subjects: str | Path, output: str | Path) -> None:
    """Write the features of the photos of everyone who was to be shown.

    Args:
        config: the judges, those that score.
        made: `SAMPLE` files, which name the subjects.
        subjects: the split's subjects file.
        output: features by the subject's id.

    Raises:
        DataError: a subject without photo, or a photo without a face.
    """
    photos = {name: subject.image for name, subject in read_subjects(subjects).items()}
    names = {name for row in samples.read(made) for name in row["subjects"]}
    features.write(output, reference_features(Judges(config), photos, names))
