"""Maps of the same noise are compared with one another, and with those of other noise."""

from __future__ import annotations

import numpy as np
import pytest

from moa.evaluation import alike


def test_correlation_is_pearsons_by_layer_and_step():
    rng = np.random.default_rng(0)
    one, other = ({layer: rng.random((2, 3, 4)) for layer in ("a", "b")} for _ in range(2))
    expected = np.mean([
        np.corrcoef(one[layer][step].ravel(), other[layer][step].ravel())[0, 1]
        for layer in one for step in range(2)
    ])  # fmt: skip
    assert alike.correlation(one, other) == pytest.approx(expected)
    scaled = {layer: 0.3 * maps + 0.1 for layer, maps in one.items()}
    assert alike.correlation(one, scaled) == pytest.approx(1)
    one["b"][:] = 0.5  # flat: the router tells no pixel from another, so nothing can be alike
    assert alike.correlation(one, other) == pytest.approx(
        np.mean([np.corrcoef(one["a"][s].ravel(), other["a"][s].ravel())[0, 1] for s in range(2)])
    )
    flat = {"a": np.full((2, 3, 4), 0.5)}
    assert alike.correlation(flat, flat) is None


def row(subject: str, prompt: int, kind: str = "swap", seed: int | None = None) -> dict:
    return {
        "subject": subject, "subjects": [subject], "kind": kind, "split": "validation",
        "prompt": f"p{prompt}", "prompt_id": f"p{prompt}", "prompt_group": "g", "index": 0,
        "seed": prompt if seed is None else seed,
    }  # fmt: skip


def test_images_of_one_noise_are_compared_and_those_of_another_are_the_floor():
    rng = np.random.default_rng(1)
    layouts = rng.random((2, 1, 6, 6))  # by noise: the router follows it but for a little of each subject
    people = {name: 0.1 * rng.random((1, 6, 6)) for name in "abc"}
    rows = [row(name, prompt) for name in people for prompt in range(2)]
    maps = [{"layer": layouts[r["seed"]] + people[r["subject"]]} for r in rows]
    rows.append(row("a", 0, "single", seed=7))  # alone with its noise
    maps.append({"layer": rng.random((1, 6, 6))})
    found = list(alike.compare(rows, maps))
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert {(r["unit"], tuple(r["members"])) for r in found} == {
        (f"{one}/{other}/p{prompt}/0", (one, other)) for one, other in pairs for prompt in range(2)
    }
    assert {(r["kind"], r["method"], r["split"]) for r in found} == {("swap", "moa", "validation")}
    by = {(r["metric"], r["unit"]): r["value"] for r in found}
    one, other, apart = maps[0], maps[2], maps[3]  # a at the first noise; b at the first and the second
    same = alike.correlation(one, other)
    assert by["router_alike", "a/b/p0/0"] == same > 0.9
    assert by["router_alike_excess", "a/b/p0/0"] == pytest.approx(same - alike.correlation(one, apart))
    assert by["router_alike_excess", "a/b/p0/0"] > 0.3


def test_with_one_noise_there_is_no_floor():
    rng = np.random.default_rng(2)
    rows = [row("a", 0), row("b", 0)]
    found = list(alike.compare(rows, [{"layer": rng.random((1, 4, 4))} for _ in rows]))
    assert [r["metric"] for r in found] == ["router_alike"]
