"""Photos are looked at once, with the judges that score."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_fakes import ColorJudges
from PIL import Image
from skimage.data import astronaut

from moa.data.errors import DataError
from moa.data.records import SUBJECT, encode_image, write_rows
from moa.data.subjects import read_subjects
from moa.evaluation import features, references
from moa.evaluation.identity import EmbedderConfig
from moa.evaluation.judges import ScoreConfig
from moa.hashing import ROOT
from moa.methods import ModelSource


def test_references_are_the_photos_of_all_subjects(tmp_path, subjects_file, monkeypatch):
    monkeypatch.setattr(references, "Judges", ColorJudges)
    config = ScoreConfig(ModelSource("clip"), ModelSource("segmenter"))
    references.look(config, subjects_file, tmp_path / "references.parquet")
    seen = features.read(tmp_path / "references.parquet")
    assert set(seen) == set(read_subjects(subjects_file))
    np.testing.assert_allclose(seen["s0"].identity, [[1, 0, 0]])  # red
    assert references.faces_of(seen, ["s1", "s0", "s1"]) == {name: seen[name] for name in ("s0", "s1")}
    with pytest.raises(DataError, match="no photo of subject s9"):
        references.faces_of(seen, ["s0", "s9"])


def test_mtcnn_and_its_own_weights_find_the_face_of_a_photograph(tmp_path):
    """The paper preset's detector, in the stage that uses it; the other judges are the miniature's."""
    clip, segmenter, embedder = (
        str(ROOT / "moa/miniature/weights" / name) for name in ("clip_judge", "segmenter", "identity")
    )
    config = ScoreConfig(ModelSource(clip), ModelSource(segmenter), EmbedderConfig("auto", embedder))
    image = encode_image(Image.fromarray(astronaut()))
    row = {"id": "s0", "identity": "s0", "word": "woman", "image": image, "sha256": ""}
    write_rows(tmp_path / "subjects.parquet", [row], SUBJECT)
    references.look(config, tmp_path / "subjects.parquet", tmp_path / "references.parquet")
    seen = features.read(tmp_path / "references.parquet")["s0"]
    left, top, right, bottom = seen.detection.boxes[0]
    assert left < 224 < right and top < 115 < bottom and 0 < seen.face_sizes[0] < 0.1
    assert len(seen.identity) == len(seen.detection.boxes)
    np.testing.assert_allclose(np.linalg.norm(seen.identity, axis=1), 1)
