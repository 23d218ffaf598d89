"""Measures on cases that are computed by hand, or by brute force."""

from __future__ import annotations

import re
from dataclasses import astuple
from itertools import combinations, permutations

import numpy as np
import pytest
from evaluation_fakes import make_rows

from moa.data.records import write_rows
from moa.evaluation import features, measures, preserved, samples
from moa.evaluation.boxes import Detection
from moa.evaluation.features import Features, encode_persons
from moa.evaluation.maps import ROUTER
from moa.evaluation.measures import Measures
from moa.evaluation.samples import KEPT
from moa.evaluation.statistics import interval
from moa.hashing import ROOT

EYE = np.eye(6)


def look(faces=(), persons=(0, 0), clip=(1.0, 0.0)) -> Features:
    """Features of an 8 × 8 image with these faces; columns persons[0] to persons[1] are people."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, slice(*persons)] = True
    boxes = np.array([[0, 0, 8 - n, 8] for n in range(len(faces))], dtype=float).reshape(-1, 4)
    vectors = np.array(faces, dtype=float).reshape(len(faces), len(faces[0]) if faces else 0)
    found = Detection(boxes, np.ones(len(faces)))
    return Features((8, 8), found, vectors, vectors, np.array(clip), encode_persons(mask))


REFERENCES = {f"s{n}": look([EYE[n]]) for n in range(6)}


def by(rows, metric):
    return {row["unit"]: row["value"] for row in rows if row["metric"] == metric}


def test_leak_by_hand():
    faces = np.array([[0.6, 0.8, 0.0], [0.8, 0.0, 0.6]])
    # The second face is the first subject's (.8), so the first one is left for the second subject (.8).
    own, other = measures.likeness_to_each(np.eye(3)[:2], faces)
    assert (own, other) == (pytest.approx(0.8), pytest.approx((0.0 + 0.6) / 2))
    assert measures.likeness_to_each(np.eye(3)[:2], faces[:1]) is None


@pytest.mark.parametrize("count", [2, 3])
def test_leak_equals_brute_force_where_greedy_is_best(count):
    """With faces near their references, in any order, every other reference counts once for each face."""
    rng = np.random.default_rng(count)
    for order in permutations(range(count)):
        references = EYE[:count]
        faces = references[list(order)] + 0.2 * rng.normal(size=(count, 6))
        faces /= np.linalg.norm(faces, axis=1, keepdims=True)
        own, other = measures.likeness_to_each(references, faces)
        assert own == pytest.approx(np.mean([faces[n] @ references[order[n]] for n in range(count)]))
        others = [faces[n] @ references[s] for n in range(count) for s in range(count) if s != order[n]]
        assert other == pytest.approx(np.mean(others))


def test_leak_stands_for_images_with_all_their_faces_only():
    rows = make_rows("multi", ("moa",))
    seen = {row["path"]: look([EYE[0]]) for row in rows}
    seen[rows[0]["path"]] = look([EYE[1], EYE[0]])  # s0 and s1, in the other order
    found = list(measures.of_pairs(rows, seen, REFERENCES))
    assert [(r["metric"], r["value"], r["unit"]) for r in found] == [
        (metric, value, "s0+s1/group-00/0")
        for metric, value in (("own", 1.0), ("leak", 0.0), ("leak_excess", 0.0), ("apart", 1.0))
    ]
    assert found[0]["members"] == ["s0", "s1"]
    assert list(measures.of_pairs(make_rows("single", ("moa",)), {}, REFERENCES)) == []


@pytest.mark.parametrize("count", [2, 3])
def test_faithful_faces_of_people_who_look_alike_have_a_leak_but_no_excess(count):
    """Whoever is blended with the other has one, and by how much is known."""
    references = EYE[:count] + EYE[5]
    references /= np.linalg.norm(references, axis=1, keepdims=True)  # cosines of 1/2
    row = {**make_rows("multi", ("moa",))[0], "subjects": [f"r{n}" for n in range(count)]}
    known = {f"r{n}": look([vector]) for n, vector in enumerate(references)}

    def excess(faces):
        found = {
            r["metric"]: r["value"] for r in measures.of_pairs([row], {row["path"]: look(list(faces))}, known)
        }
        assert found["leak_excess"] == pytest.approx(found["leak"] - 0.5)
        return found["leak_excess"]

    assert excess(references) == pytest.approx(0.0)
    blend = 0.8 * references + 0.2 * references[[*range(1, count), 0]]
    blend /= np.linalg.norm(blend, axis=1, keepdims=True)
    others = [blend[n] @ references[s] for n in range(count) for s in range(count) if s != n]
    assert excess(blend) == pytest.approx(np.mean(others) - 0.5)
    assert excess(blend) > 0.05


def test_occlusion_by_hand():
    """Half of the likeness is lost where the photo was partly hidden; the prompt may have another name."""
    plain = [row for row in make_rows("swap", ("moa",)) if row["prompt_id"] == "group-01"]
    hidden = [
        {**row, "kind": "occluded", "prompt_id": "group-00", "path": f"occluded/{row['path']}", "ip": 0.5}
        for row in plain
    ]
    other = {**plain[0], "kind": "single", "seed": 99, "path": "x", "ip": 0.0}  # of other noise: no twin
    faces = {row["path"]: look([EYE[int(row["subject"][1])]]) for row in plain}
    half = {row["path"]: look([0.5 * EYE[int(row["subject"][1])]]) for row in hidden}
    seen = faces | half | {"x": look([EYE[5]])}
    rows = [other, *hidden, *plain]
    found = [
        *measures.of_samples(rows),
        *measures.of_swaps(rows, seen, REFERENCES),
        *measures.of_occlusion(rows, seen, REFERENCES),
    ]
    assert {row["kind"] for row in found if row["metric"].startswith("plain")} == {"occluded"}
    known = Measures(found)
    twins = known.get("occluded", "plain_ip", "moa")
    assert twins.of == {f"{row['subject']}/group-00/0": row["ip"] for row in plain}
    margins = [known.get("occluded", metric, "moa") for metric in ("swap_margin", "plain_margin")]
    assert margins[0].of.keys() == margins[1].of.keys() and len(margins[0]) == 15
    assert set(margins[0].of.values()) == {0.5} and set(margins[1].of.values()) == {1.0}
    assert margins[0].over(margins[1]).mean == pytest.approx(0.5)
    assert list(measures.of_occlusion(plain, faces, REFERENCES)) == []
    assert list(measures.of_occlusion([other, *hidden], seen, REFERENCES)) == []


def test_swap_by_hand():
    faces = np.array([[0.6, 0.8, 0.0], [0.0, 0.0, 0.0]])  # nearer to the other; nobody
    assert measures.swapped(faces, np.eye(3)[:2]) == {
        "swap_right": pytest.approx(0.3), "swap_other": pytest.approx(0.4),
        "swap_margin": pytest.approx(-0.1), "swap_named": 0.0,
    }  # fmt: skip


def test_images_that_ignore_the_subject_have_no_margin_and_those_that_show_it_have():
    rows = make_rows("swap", ("prior", "moa"))
    own = {r["path"]: look([EYE[int(r["subject"][1])]]) for r in rows if r["method"] == "moa"}
    same = {r["path"]: look([[0.6, 0.8, 0, 0, 0, 0]]) for r in rows if r["method"] == "prior"}
    found = list(measures.of_swaps(rows, own | same, REFERENCES))
    prior, moa = ([r for r in found if r["method"] == name] for name in ("prior", "moa"))
    assert len(by(moa, "swap_margin")) == 2 * 15
    assert set(by(moa, "swap_margin").values()) == set(by(moa, "swap_named").values()) == {1.0}
    assert list(by(prior, "swap_margin").values()) == pytest.approx([0.0] * 30)
    assert by(prior, "swap_right") == pytest.approx(by(prior, "swap_other"))
    assert {tuple(r["members"]) for r in moa} == set(combinations([f"s{n}" for n in range(6)], 2))


def test_missing_counts_subjects_and_size_needs_them_all():
    row = make_rows("multi", ("moa",))[-1]
    rows = [{**row, "faces": faces, "index": faces, "found": faces >= 2} for faces in range(4)]
    found = list(measures.of_samples(rows))
    assert list(by(found, "missing").values()) == [1.0, 0.5, 0.0, 0.0]
    assert list(by(found, "size").values()) == [0.3, 0.3]


def test_variation_compares_different_noise_of_one_prompt():
    rows = make_rows("single", ("moa",))
    assert measures.seed_pairs(rows) == []  # an image a subject: others would differ in more than the noise
    more = [*rows, *({**row, "index": 1, "seed": row["seed"] + 1000} for row in rows)]
    pairs = measures.seed_pairs(more)
    assert len(pairs) == len(rows)  # two images a subject: the subject stays
    assert all(a["subject"] == b["subject"] and a["prompt"] == b["prompt"] for a, b in pairs)
    assert measures.seed_pairs(make_rows("swap", ("moa",))) == []  # noise is shared


def test_variation_by_hand():
    row = make_rows("single", ("moa",))[0]
    rows = [{**row, "index": n, "seed": n, "path": f"{n}.png"} for n in range(3)]
    seen = {
        rows[0]["path"]: look(persons=(0, 4)),
        rows[1]["path"]: look(persons=(2, 6), clip=(0.6, 0.8)),
        rows[2]["path"]: look(),  # nobody: no layout
    }
    found = list(measures.of_seeds(rows, seen))
    assert list(by(found, "vary_layout").values()) == pytest.approx([1 - 2 / 6])
    assert by(found, "vary_clip") == pytest.approx(
        {"s0/group-00/0-1": 0.4, "s0/group-00/0-2": 0.0, "s0/group-00/1-2": 0.4}
    )
    assert {tuple(r["members"]) for r in found} == {("s0",)}


def router_rows():
    """One image, three layers of which two are in L, two timesteps; and an image that shows nobody."""
    weights = {
        ("a", 600): (0.9, 0.6), ("a", 100): (0.8, 0.7), ("b", 600): (0.5, 0.5), ("b", 100): (0.3, 0.7),
        ("c", 600): (0.7, 0.6), ("c", 100): (0.6, 0.7),
    }  # fmt: skip
    return [
        {
            "subject": subject, "subjects": [subject], "kind": "single", "prompt_id": "p", "index": 0,
            "layer": layer, "in_losses": layer != "b", "timestep": timestep, "steps": 2,
            "inside": None if subject == "s1" else inside, "outside": outside,
        }
        for subject in ("s0", "s1")
        for (layer, timestep), (outside, inside) in weights.items()
    ]  # fmt: skip


def test_router_by_hand():
    found = {row["metric"]: row["value"] for row in measures.of_router(router_rows())}
    assert found == pytest.approx(
        {
            "router_outside": 0.75, "router_inside": 0.65, "router_contrast": 0.1,
            "router_layers": 0.2 - 0.0, "router_timesteps": 0.2 - 0.0,
        }
    )  # fmt: skip
    alone = [row for row in router_rows() if row["layer"] != "c"]
    assert "router_layers" not in {row["metric"] for row in measures.of_router(alone)}  # one layer of L


def test_measures_are_paired_by_unit_and_averaged_over_trainings():
    about = {"method": "moa", "split": "test", "kind": "single", "group": "g", "metric": "ip"}
    rows = [
        about | {"unit": f"s{n}/p/0", "members": [f"s{n}"], "value": value}
        for n, values in enumerate([(0.2, 0.4), (0.5,), (0.4,)])
        for value in values
    ]
    rows += [row | {"method": "prior", "value": 0.1 * n} for n, row in enumerate(rows[1:3])]
    found = Measures(rows)
    own, other = (found.get("single", "ip", name) for name in ("moa", "prior"))
    assert own.of == pytest.approx({"s0/p/0": 0.3, "s1/p/0": 0.5, "s2/p/0": 0.4})
    assert own.common(other) == ["s0/p/0", "s1/p/0"]
    expected = interval([0.3 - 0.0, 0.5 - 0.1], [["s0"], ["s1"]])
    assert astuple(own.minus(other)) == pytest.approx(astuple(expected))
    assert len(found.get("single", "ip", "moa", "another group")) == 0
    assert astuple(own.over(own))[:1] == pytest.approx((1.0,))
    twice = Measures([*rows, *({**row, "value": 2 * row["value"], "method": "x"} for row in rows[:4])])
    double = twice.get("single", "ip", "x")
    assert astuple(double.over(own)) == pytest.approx((2.0, 2.0, 2.0))


def test_groups_are_compared_by_their_means():
    """The same as a paired difference where each subject is in both, though not in the same prompts."""
    rng = np.random.default_rng(0)
    one, other = rng.normal(1, 1, 8), rng.normal(0, 1, 8)
    values = [
        measures.Values(
            {f"s{n}/{prompt}/0": v for n, v in enumerate(part)},
            {f"s{n}/{prompt}/0": [f"s{n}"] for n in range(8)},
        )
        for prompt, part in (("a", one), ("b", other))
    ]
    expected = interval(one - other, [[f"s{n}"] for n in range(8)])
    assert astuple(values[0].beyond(values[1])) == pytest.approx(astuple(expected))


def test_comparisons_belong_to_whom_either_method_was_shown():
    units = ["s0/p/0", "s1/p/0", "s2/p/0"]
    alone = {unit: [unit[:2]] for unit in units}
    own = measures.Values(dict(zip(units, [0.9, 0.8, 0.6], strict=True)), alone)
    ring = {unit: [unit[:2], f"s{(n + 1) % 3}"] for n, unit in enumerate(units)}
    wrong = measures.Values(dict(zip(units, [0.4, 0.1, 0.2], strict=True)), ring)
    assert (
        own.less(wrong).members
        == wrong.less(own).members
        == {unit: sorted(names) for unit, names in ring.items()}
    )
    assert np.isnan(own.over(wrong).low)  # of any two of these three, one person is in both
    assert not np.isnan(own.over(own).low)


def test_floors_belong_to_their_subjects_too():
    about = {"method": "moa", "split": "test", "kind": "single", "subject": "s0", "members": ["s0"]}
    likeness = {
        "psnr": 3.0,
        "ssim": 0.9,
        "lpips": 0.1,
        "layout": 1.0,
        "noise_psnr": 2.0,
        "noise_ssim": 0.5,
        "noise_lpips": 0.4,
        "noise_layout": 0.5,
    }
    row = about | {"prompt_id": "p", "prompt_group": "g", "index": 0, "noise_subjects": ["s1"]} | likeness
    members = {found["metric"]: found["members"] for found in measures.of_preserved([row])}
    assert members["prior_psnr"] == ["s0"]
    values = {found["metric"]: found["value"] for found in measures.of_preserved([row])}
    assert values["seed_lpips"] == pytest.approx(-0.3)
    assert members["seed_psnr"] == members["seed_layout"] == ["s0", "s1"]


def test_the_stage_joins_what_others_wrote(tmp_path):
    rows = [row for kind in ("single", "multi", "swap") for row in make_rows(kind, ("moa",))]
    rows += [
        {**row, "index": 1, "seed": row["seed"] + 1, "path": f"1-{row['path']}"} for row in rows[:12]
    ]  # a second image of each single subject
    rows += [{**row, "kind": "occluded", "path": f"2-{row['path']}"} for row in rows if row["kind"] == "swap"]
    seen = {row["path"]: look([EYE[int(name[1])] for name in row["subjects"]], (0, 4)) for row in rows}
    samples.write(tmp_path / "samples.parquet", rows)
    features.write(tmp_path / "seen.parquet", seen)
    features.write(tmp_path / "references.parquet", REFERENCES)
    swap = next(row for row in rows if row["kind"] == "swap")
    pair = {"other": "s1", "members": ["s0", "s1"], "psnr": 25.0, "ssim": 0.8, "lpips": 0.2, "outside": 0.5}
    kept = {name: swap[name] for name in KEPT.names if name in swap} | pair
    write_rows(tmp_path / "kept.parquet", [kept, {**kept, "other": "s2", "psnr": None, "ssim": None}], KEPT)
    write_rows(tmp_path / "router.parquet", router_rows(), ROUTER)
    preserved.write_rows(
        tmp_path / "preserved.parquet",
        [
            {name: row[name] for name in preserved.PRESERVED.names[:9]}
            | {"psnr": 30.0, "ssim": 0.9, "lpips": 0.1, "layout": 1.0}
            | {
                "noise_psnr": 20.0,
                "noise_ssim": noise,
                "noise_lpips": 0.3,
                "noise_layout": 0.25,
                "noise_subjects": ["s1"],
            }
            for row, noise in ((rows[0], None), (rows[1], 0.7))
        ],
        preserved.PRESERVED,
    )
    arguments = [tmp_path / name for name in ("samples.parquet", "seen.parquet", "references.parquet")]
    measures.measure(*arguments, tmp_path / "measures.parquet")
    shared = [
        next(measures.measure_row(swap, f"{of}_{name}_shared", 25.0))
        for of in ("swap", "prior")
        for name in ("psnr", "ssim", "lpips")
    ]
    write_rows(tmp_path / "shared.parquet", shared, measures.MEASURE)
    alike = [next(measures.measure_row(swap, f"router_alike{of}", 0.5)) for of in ("", "_excess")]
    write_rows(tmp_path / "alike.parquet", alike, measures.MEASURE)
    found = measures.everything(
        [tmp_path / "samples.parquet"], [tmp_path / "kept.parquet"],
        [tmp_path / "measures.parquet", tmp_path / "shared.parquet"],
        [tmp_path / "preserved.parquet"], [tmp_path / "router.parquet"], [tmp_path / "alike.parquet"],
    )  # fmt: skip
    assert {metric for kind, metric, _ in found if kind == "multi"} == {
        "ip", "pc", "missing", "found_ip", "size", "own", "leak", "leak_excess", "apart",
    }  # fmt: skip
    assert {metric for kind, metric, _ in found if kind == "swap"} >= {"swap_margin", "swap_named"}
    units = ["s0/group-00/0", "s0/group-01/0"]
    assert found.get("single", "prior_psnr", "moa").of == dict.fromkeys(units, 30.0)
    assert found.get("single", "seed_psnr", "moa").of == dict.fromkeys(units, 10.0)
    assert found.get("single", "seed_layout", "moa").of == dict.fromkeys(units, 0.75)
    assert found.get("single", "seed_ssim", "moa").of == pytest.approx({units[1]: 0.2})
    assert found.get("swap", "swap_psnr", "moa", "group").of == {"s0/s1/group-00/0": 25.0}
    assert found.asked("swap", "swap_psnr", "moa") == {"s0/s1/group-00/0", "s0/s2/group-00/0"}
    assert found.get("single", "router_contrast", "moa").of == pytest.approx({"s0/p/0": 0.1})
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    assert {metric for _, metric, _ in found} == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
