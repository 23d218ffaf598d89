"""Photos are looked at with the judges that score, and only of those who are to be shown."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_fakes import ColorJudges, make_rows

from moa.data.errors import DataError
from moa.evaluation import features, references, samples
from moa.evaluation.features import ScoreConfig
from moa.methods import ModelSource


def test_references_are_the_photos_of_who_was_shown(tmp_path, subjects_file, monkeypatch):
    monkeypatch.setattr(references, "Judges", ColorJudges)
    config = ScoreConfig(ModelSource("clip"), ModelSource("segmenter"))
    wanted = [row for row in make_rows("multi", ("moa",)) if row["subject"] == "s0+s1"]
    samples.write(tmp_path / "samples.parquet", wanted)
    references.look(config, [tmp_path / "samples.parquet"], subjects_file, tmp_path / "references.parquet")
    seen = features.read(tmp_path / "references.parquet")
    assert set(seen) == {"s0", "s1"}
    np.testing.assert_allclose(seen["s0"].identity, [[1, 0, 0]])  # red
    samples.write(tmp_path / "samples.parquet", [{**row, "subjects": ["s0", "s9"]} for row in wanted])
    with pytest.raises(DataError, match="no photo of subject s9"):
        references.look(config, [tmp_path / "samples.parquet"], subjects_file, tmp_path / "out.parquet")
