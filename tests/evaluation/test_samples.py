"""Rows survive writing, and broken files say what to do."""

from __future__ import annotations

import pytest
from evaluation_fakes import make_rows

from moa.data.errors import DataError
from moa.data.subjects import read_subjects
from moa.evaluation import samples


def test_round_trip_is_sorted_and_complete(tmp_path):
    rows = make_rows()
    samples.write(tmp_path / "a.parquet", reversed(rows))
    samples.write(tmp_path / "b.parquet", rows)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert samples.read(tmp_path / "a.parquet") == sorted(rows, key=samples.sort_key)
    assert list(samples.SAMPLE.names)[:2] == ["method", "split"]


def test_truncated_file_is_named_with_its_cure(tmp_path):
    path = tmp_path / "samples.parquet"
    samples.write(path, make_rows())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"samples\.parquet is cut short.*delete it"):
        samples.read(path)


def test_row_given_twice_is_refused(tmp_path):
    rows = make_rows()
    with pytest.raises(DataError, match="two rows"):
        samples.write(tmp_path / "a.parquet", [*rows, rows[0]])


def test_request_of_a_row(subjects_file):
    subjects = read_subjects(subjects_file)
    row = make_rows("multi")[0]
    request = samples.to_request(row, subjects)
    assert [s.id for s in request.subjects] == row["subjects"]
    assert [request.prompt[a:b] for a, b in request.spans] == ["man", "man"]
    with pytest.raises(DataError, match="no photo of subject s1"):
        samples.to_request(row, {"s0": subjects["s0"]})


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_broken_image_is_named(tmp_path, content):
    path = tmp_path / "image.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"image\.png"):
        samples.open_image(path)
