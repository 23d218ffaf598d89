"""The protocol files ask for exactly what the papers did, and mistakes in them are named."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from evaluation_fakes import people

from moa.evaluation import samples
from moa.evaluation.protocol import Kind, Prompt, image_seed, load, requests, spread_by_word, subject_sets

PAPER, MINIATURE = Path("config/protocol/paper.yaml"), Path("config/protocol/miniature.yaml")


class Person:
    def __init__(self, id: str, word: str):
        self.id, self.word = id, word


@pytest.fixture(scope="module")
def paper():
    return load(PAPER)


def celebrities() -> list[Person]:
    listed = yaml.safe_load(PAPER.read_text())["test"]["subjects"]
    names = [*listed["man"], *listed["woman"]]
    return [Person(name, "man" if n < 6 else "woman") for n, name in enumerate(names)]


def test_paper_asks_for_the_published_numbers_of_images(paper):
    single = requests(paper, celebrities(), "single")
    multi = requests(paper, celebrities(), "multi")
    assert (len(single), len(multi)) == (15 * 40 * 4, 105 * 21 * 4) == (2400, 8820)
    assert Counter(row["prompt_group"] for row in single) == dict.fromkeys(
        ("accessory", "style", "action", "context"), 600
    )
    per_pair = Counter(row["prompt_group"] for row in multi if row["subject"] == multi[0]["subject"])
    assert per_pair == {"style": 7 * 4, "action": 8 * 4, "context": 6 * 4}


def test_table_2_has_twelve_prompts(paper):
    kinds = paper.split("test").kinds
    assert len(kinds["table2_single"].prompts) + len(kinds["table2_multi"].prompts) == 12
    assert kinds["table2_multi"].prompts[0].fill(["man", "woman"])[0] == (
        "a man and a woman in the style of Van Gogh painting"
    )


def test_rows_fit_the_schema_and_spans_hit_the_words(paper, tmp_path):
    rows = requests(paper, celebrities(), "multi")
    samples.write(tmp_path / "r.parquet", rows[:50], samples.REQUEST)
    assert len(samples.read(tmp_path / "r.parquet", samples.REQUEST)) == 50
    for row in rows[::97]:
        assert [row["prompt"][a:b] for a, b in row["spans"]] == row["words"]
    assert len({row["path"] for row in rows}) == len(rows)


def test_seed_is_a_function_of_subject_prompt_and_index(paper):
    rows = requests(paper, celebrities(), "single")
    assert len({row["seed"] for row in rows}) == len(rows)
    digest = hashlib.sha256(b"a/1\na {S} on the beach\n3").digest()
    assert image_seed("a/1", "a {S} on the beach", 3) == int.from_bytes(digest[:4], "big")
    fewer = requests(paper, celebrities(), "single")
    assert {r["path"]: r["seed"] for r in rows} == {r["path"]: r["seed"] for r in reversed(fewer)}


def test_swap_shares_noise_between_subjects_only(paper):
    rows = requests(paper, celebrities(), "swap")
    seeds = {(row["prompt_id"], row["index"]): set() for row in rows}
    for row in rows:
        seeds[row["prompt_id"], row["index"]].add(row["seed"])
    assert all(len(values) == 1 for values in seeds.values())
    assert len({min(values) for values in seeds.values()}) == len(seeds)


def test_miniature_prompts_are_in_its_own_language():
    from moa.miniature import world
    from moa.miniature.tokenizer import load_tokenizer

    vocabularies = (
        world.CLOTHES, world.CLOTHES_COLORS, world.EXPRESSIONS, world.BACKGROUNDS, world.BACKGROUND_COLORS,
        world.PROPS,
    )  # fmt: skip
    known = {w for v in vocabularies for texts in v.values() for text in texts for w in text.split()}
    known |= {"a", "an", "and", "in", "holding", "woman"}
    tokenizer, protocol = load_tokenizer(), load(MINIATURE)
    for split in protocol.splits.values():
        for kind in split.kinds.values():
            for prompt in kind.prompts:
                text, _ = prompt.fill(["woman"] * prompt.subjects)
                assert not {word.strip(",") for word in text.split()} - known, text
                assert len(tokenizer(text).input_ids) <= tokenizer.model_max_length, text


def test_validation_prompts_are_not_test_prompts():
    protocol = load(MINIATURE)
    used = [
        {p.template for kind in protocol.split(split).kinds.values() for p in kind.prompts}
        for split in ("test", "validation")
    ]
    assert not used[0] & used[1]


def test_a_number_of_subjects_takes_both_words_in_turn_from_all_over():
    chosen = spread_by_word(people(30), 6)
    assert [p.word for p in chosen] == ["man", "woman"] * 3
    assert [p.id for p in chosen] == ["s1", "s0", "s11", "s10", "s21", "s20"]
    assert len(spread_by_word(people(30), 15)) == 15
    assert [p.id for p in spread_by_word([p for p in people(8) if p.word == "man"], 2)] == ["s1", "s5"]


def test_ring_shows_everyone_equally_often():
    kind = Kind((Prompt("p", "g", "{S} {S}"),), 1, pairs=2)
    counts = Counter(p.id for pair in subject_sets(people(6), kind) for p in pair)
    assert set(counts.values()) == {4}
    with pytest.raises(ValueError, match="at least 7"):
        subject_sets(people(6), Kind(kind.prompts, 1, pairs=3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "unknown key extra"),
        (lambda d: d["test"].pop("kinds"), r"missing key test\.kinds"),
        (lambda d: d["test"].update(subjects=0), r"test\.subjects"),
        (lambda d: d["test"].update(subjects=["a", "a"]), r"test\.subjects"),
        (lambda d: d["test"].update(subjects={"man": ["a"], "woman": ["a"]}), r"test\.subjects\.woman: 'a'"),
        (lambda d: d["test"].update(subjects={"man": "a"}), r"test\.subjects\.man: None"),
        (lambda d: d["test"].update(subjects={}), r"test\.subjects"),
        (lambda d: d["test"]["kinds"]["single"].update(images="4"), r"kinds\.single\.images"),
        (lambda d: d["test"]["kinds"]["single"].update(seed="random"), r"kinds\.single\.seed"),
        (lambda d: d["test"]["kinds"]["single"].update(prompts={"a": ["no place"]}), "every prompt of"),
        (lambda d: d["test"]["kinds"]["single"].update(prompts={"a": ["{S}", "{S}"]}), "twice"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    data = yaml.safe_load(MINIATURE.read_text())
    change(data)
    path = tmp_path / "protocol.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_missing_subject_and_unknown_kind_are_named(paper):
    with pytest.raises(ValueError, match="004153/000000006"):
        requests(paper, celebrities()[:-1], "single")
    with pytest.raises(ValueError, match="no kind 'triple'"):
        requests(paper, celebrities(), "triple")
