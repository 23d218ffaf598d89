"""The `look-at-references` stage: what the judges see in the subjects' photos, once for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from moa.data.errors import DataError
from moa.data.subjects import read_subjects
from moa.evaluation import features
from moa.evaluation.features import Features
from moa.evaluation.judges import Judges, ScoreConfig


def look(config: ScoreConfig, subjects: str | Path, output: str | Path) -> None:
    """Write the features of every subject's photo; one without a face is an error only where it counts.

    Args:
        config: the judges, those that score.
        subjects: a split's subjects file.
        output: features by the subject's id.
    """
    photos = {name: subject.image for name, subject in read_subjects(subjects).items()}
    features.write(output, look_at_photos(Judges(config), photos))


def look_at_photos(judges: Judges, photos: Mapping[str, Image.Image]) -> dict[str, Features]:
    """Features of photos, by the ids of the subjects."""
    names = sorted(photos)
    return dict(zip(names, judges.look([photos[name] for name in names]), strict=True))


def faces_of(references: Mapping[str, Features], names: Iterable[str]) -> dict[str, Features]:
    """The references of `names`. Raises DataError for one that is missing or shows no face."""
    wanted = sorted(set(names))
    missing = [name for name in wanted if name not in references]
    if missing:
        raise DataError(f"no photo of subject {', '.join(missing)}; is the subjects file of another split?")
    faceless = [name for name in wanted if not len(references[name].detection.boxes)]
    if faceless:
        raise DataError(
            f"no face found in the photo of subject {', '.join(faceless)}: take another photo or subject, "
            "or lower detector.threshold"
        )
    return {name: references[name] for name in wanted}
