"""Identity scores against brute force, facenet-pytorch itself and hand-made cases."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from facenet_pytorch import MTCNN, InceptionResnetV1, fixed_image_standardization
from facenet_pytorch.models.utils.detect_face import extract_face
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageEnhance
from skimage.data import astronaut

from moa.choose import greedy_pairs
from moa.data.annotators import ModelSource
from moa.evaluation import identity
from moa.evaluation.boxes import areas, crop, tidy
from moa.evaluation.identity import (
    AutoEmbedder,
    ColorEmbedder,
    DetectorConfig,
    EmbedderConfig,
    FaceNetEmbedder,
    MTCNNDetector,
    score,
)


def unit(*angles: float) -> np.ndarray:
    """Unit vectors in the plane at angles in degrees."""
    return np.array([[np.cos(a), np.sin(a)] for a in np.radians(angles)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_greedy_matching_equals_brute_force(seed, rows, columns):
    """Greedy is the matching whose similarities, sorted from the best down, come first in the alphabet."""
    similarity = np.random.default_rng(seed).normal(size=(rows, columns))
    size = min(rows, columns)
    matchings = (
        list(zip(chosen, order, strict=True))
        for chosen in combinations(range(rows), size)
        for order in permutations(range(columns), size)
    )
    best = max(matchings, key=lambda pairs: sorted((similarity[pair] for pair in pairs), reverse=True))
    assert sorted(greedy_pairs(similarity)) == sorted(best)


@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 4)), elements=st.integers(-1, 1)))
def test_ties_go_to_the_first_in_reading_order(similarity):
    pairs: list[tuple[int, int]] = []
    for row, column in sorted(np.ndindex(similarity.shape), key=lambda at: (-similarity[at], at)):
        if all(row != r and column != c for r, c in pairs):
            pairs.append((row, column))
    assert greedy_pairs(similarity) == pairs


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 5))
def test_score_is_the_worst_of_the_matched_largest_faces(seed, subjects, faces):
    """With more faces than subjects, and with fewer, against all matchings."""
    rng = np.random.default_rng(seed)
    references, seen = (identity.unit(rng.normal(size=(n, 3))) for n in (subjects, faces))
    sizes = np.sort(rng.uniform(size=faces))[::-1]
    found = score(references, seen, sizes)
    assert (found.found, found.faces) == (faces >= subjects, faces)
    if faces < subjects:
        assert (found.ip, found.face_size) == (0, 0)
        return
    matchings = [
        [float(r @ seen[i]) for r, i in zip(references, p, strict=True)]
        for p in permutations(range(subjects))
    ]
    expected = min(max(matchings, key=lambda matching: sorted(matching, reverse=True)))
    assert found.ip == pytest.approx(max(expected, 0), abs=1e-12)
    assert found.face_size == sizes[subjects - 1]


def test_single_takes_the_largest_face():
    found = score(unit(0), unit(60, 0), np.array([0.3, 0.1]))
    assert found.ip == pytest.approx(0.5)
    assert (found.found, found.faces, found.face_size) == (True, 2, 0.3)


def test_pair_scores_its_worse_match():
    found = score(unit(0, 90), unit(80, 30, 0), np.array([0.3, 0.2, 0.1]))  # the third face is not looked at
    assert found.ip == pytest.approx(np.cos(np.radians(30)))
    assert (found.faces, found.face_size) == (3, 0.2)


@pytest.mark.parametrize("faces", [unit()[:0].reshape(0, 2), unit(0)])
def test_missing_face_scores_zero(faces):
    found = score(unit(0, 90), faces, np.ones(len(faces)))
    assert (found.ip, found.found, found.faces, found.face_size) == (0, False, len(faces), 0)


def test_negative_similarity_scores_zero():
    assert score(unit(0), unit(120), np.ones(1)).ip == 0


def test_boxes_are_cut_to_the_image_and_sorted_by_area():
    boxes = np.array([[-5, 0, 3, 4], [2, 2, 12, 9], [9.2, 1, 9.8, 5], [20, 1, 30, 5]])
    found = tidy(boxes, np.array([0.9, 0.8, 0.7, 0.6]), (10, 8))
    np.testing.assert_array_equal(found.boxes, [[2, 2, 10, 8], [0, 0, 3, 4]])
    np.testing.assert_array_equal(found.scores, [0.8, 0.9])


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(astronaut())


def test_mtcnn_finds_the_face_that_facenet_finds(photo):
    blank = Image.new("RGB", (96, 96), "gray")
    faces, nobody = MTCNNDetector().detect([photo, blank])
    boxes, scores = MTCNN(keep_all=True).detect(photo)
    assert len(faces.boxes) == len(boxes) >= 1
    np.testing.assert_allclose(faces.boxes, np.asarray(boxes, dtype=float).clip(0, 512), atol=1e-3)
    np.testing.assert_allclose(faces.scores, np.asarray(scores, dtype=float), atol=1e-6)
    assert len(nobody.boxes) == 0


def test_an_image_too_small_for_the_detector_shows_nobody(photo):
    face = photo.crop((170, 60, 280, 200))
    sizes = [(1, 1), (16, 16), (19, 100), (100, 19), (20, 20)]
    found = MTCNNDetector().detect([face.resize(size) for size in sizes])
    assert [len(faces.boxes) for faces in found] == [0, 0, 0, 0, 1]
    assert [faces.boxes.shape[1] for faces in found] == [4] * 5
    alone = MTCNNDetector().detect([face.resize((16, 16))])
    assert alone[0].boxes.shape == (0, 4) and alone[0].scores.shape == (0,)


@pytest.fixture(scope="module")
def facenet(tmp_path_factory):
    """A weights file in the layout of the published one, untrained, and its network."""
    torch.manual_seed(0)
    network = InceptionResnetV1(pretrained=None).eval()
    path = tmp_path_factory.mktemp("facenet") / "weights.pt"
    logits = {"logits.weight": torch.zeros(8631, 512), "logits.bias": torch.zeros(8631)}
    torch.save(network.state_dict() | logits, path)
    return path, network


def test_facenet_embedding_equals_facenet_pytorch(facenet, photo):
    path, network = facenet
    embedder = FaceNetEmbedder(path)
    boxes = [[150.7, 60.2, 260.9, 190.4], [10, 20, 90, 80]]
    faces = torch.stack([fixed_image_standardization(extract_face(photo, np.array(b), 160)) for b in boxes])
    with torch.inference_mode():
        expected = network(faces).numpy()
    np.testing.assert_allclose(embedder.embed([crop(photo, box) for box in boxes]), expected, atol=1e-5)
    assert embedder.embed([]).shape == (0, 512)


def test_ip_of_a_photograph_equals_facenet_pytorch(facenet, photo):
    """From photo to score, with MTCNN's shipped weights and a fixed random embedder, against the package.

    The embedder is a random projection, which feels every pixel; untrained networks give nearly one vector.
    """
    path, _ = facenet
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 160 * 160, 64, bias=False))
    drawn = ImageEnhance.Brightness(photo.rotate(8, Image.Resampling.BICUBIC)).enhance(0.8)
    settings = {"image_size": 160, "margin": 0, "min_face_size": 20, "thresholds": [0.6, 0.7, 0.7]}
    package = MTCNN(**settings, factor=0.709, keep_all=False, select_largest=True)
    with torch.inference_mode():
        vectors = [torch.nn.functional.normalize(network(package(i)[None]))[0] for i in (photo, drawn)]
    expected = float(vectors[0] @ vectors[1])
    detector = MTCNNDetector()
    embedder = FaceNetEmbedder(path)
    embedder.model = network
    found = detector.detect([photo, drawn])
    faces = [
        embedder.embed([crop(image, box) for box in detection.boxes])
        for image, detection in zip((photo, drawn), found, strict=True)
    ]
    scored = score(faces[0][:1], faces[1], areas(found[1].boxes) / (512 * 512))
    assert scored.found
    assert 0 < scored.face_size < 0.2
    assert 0.1 < expected < 0.99
    assert scored.ip == pytest.approx(expected, abs=1e-5)


def test_batches_change_neither_faces_nor_vectors(facenet, photo):
    """Photos of two sizes, one without a face, together and one by one, with the package's own networks."""
    turned = photo.rotate(8, Image.Resampling.BICUBIC)
    photos = [photo, Image.new("RGB", (512, 512), "gray"), photo.crop((90, 0, 400, 300)), turned]
    detector = MTCNNDetector()
    embedder = FaceNetEmbedder(facenet[0])
    together = detector.detect(photos)
    alone = [detector.detect([each])[0] for each in photos]
    assert [len(found.boxes) > 0 for found in together] == [True, False, True, True]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    crops = [crop(each, box) for each, found in zip(photos, together, strict=True) for box in found.boxes]
    vectors = [embedder.embed([each])[0] for each in crops]
    np.testing.assert_allclose(embedder.embed(crops), vectors, atol=1e-5)


def test_auto_embedder_is_the_pooled_output(tmp_path):
    from moa.miniature.models import embedder, judge_processor

    torch.manual_seed(0)
    network = embedder().eval()
    network.save_pretrained(tmp_path)
    judge_processor().save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    crops = [Image.fromarray(rng.integers(0, 256, (size, 20, 3), dtype=np.uint8)) for size in (30, 11)]
    found = AutoEmbedder(ModelSource(str(tmp_path))).embed(crops)
    squeezed = np.stack([np.asarray(c.resize((96, 96), Image.Resampling.BILINEAR)) for c in crops])
    with torch.inference_mode():
        pixels = torch.from_numpy(squeezed).permute(0, 3, 1, 2) / 127.5 - 1
        expected = network(pixels).pooler_output.flatten(1)
    expected = torch.nn.functional.normalize(expected).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_color_embedder_sees_colors_only():
    red, dark, blue = (Image.new("RGB", (9, 5), c) for c in ("#ff8080", "#ff8080", "#8080ff"))
    same, _, other = ColorEmbedder().embed([red, dark, blue])
    assert same @ same == pytest.approx(1)
    assert abs(same @ other) < 0.05


def test_keys_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"models\.identity: kind auto needs the key id"):
        identity.load_embedder(EmbedderConfig("auto"))
    with pytest.raises(ValueError, match=r"models\.detector: kind segmenter needs the key id"):
        identity.load_detector(DetectorConfig("segmenter"))
