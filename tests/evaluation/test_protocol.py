"""The protocol files ask for exactly what the papers did, and mistakes in them are named."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from evaluation_fakes import people

from moa.evaluation import samples
from moa.evaluation.protocol import (
    EvaluationProtocol,
    Kind,
    Prompt,
    Split,
    image_seed,
    load,
    requests,
    spread_by_word,
    subject_sets,
)

PAPER, MINIATURE, FULL = (Path(f"config/protocol/{name}.yaml") for name in ("paper", "miniature", "full"))


SUBJECTS = {
    "000001/000000023": "man", "000181/000000021": "man", "000268/000000032": "man",
    "000612/000000010": "woman", "000667/000000017": "woman", "001603/000000034": "woman",
    "001854/000000015": "man", "002088/000000040": "woman", "002464/000000018": "woman",
    "002782/000000020": "man", "002880/000000001": "woman", "002929/000000019": "woman",
    "002937/000000002": "woman", "003785/000000013": "man", "004153/000000006": "woman",
}  # fmt: skip
PROMPTS = {  # FastComposer's, and the paper's Table 2, of a man or of a man and a woman
    "single": """
        a man wearing a red hat
        a man wearing a santa hat
        a man wearing a rainbow scarf
        a man wearing a black top hat and a monocle
        a man in a chef outfit
        a man in a firefighter outfit
        a man in a police outfit
        a man wearing pink glasses
        a man wearing a yellow shirt
        a man in a purple wizard outfit
        a painting of a man in the style of Banksy
        a painting of a man in the style of Vincent Van Gogh
        a colorful graffiti painting of a man
        a watercolor painting of a man
        a Greek marble sculpture of a man
        a street art mural of a man
        a black and white photograph of a man
        a pointillism painting of a man
        a Japanese woodblock print of a man
        a street art stencil of a man
        a man riding a horse
        a man holding a glass of wine
        a man holding a piece of cake
        a man giving a lecture
        a man reading a book
        a man gardening in the backyard
        a man cooking a meal
        a man working out at the gym
        a man walking the dog
        a man baking cookies
        a man in the jungle
        a man in the snow
        a man on the beach
        a man on a cobblestone street
        a man on top of pink fabric
        a man on top of a wooden floor
        a man with a city in the background
        a man with a mountain in the background
        a man with a blue house in the background
        a man on top of a purple rug in a forest
    """,
    "multi": """
        a painting of a man and a woman together in the style of Banksy
        a painting of a man and a woman together in the style of Vincent Van Gogh
        a watercolor painting of a man and a woman together
        a street art mural of a man and a woman together
        a black and white photograph of a man and a woman together
        a pointillism painting of a man and a woman together
        a Japanese woodblock print of a man and a woman together
        a photo of a man and a woman gardening in the backyard together
        a photo of a man and a woman cooking a meal together
        a photo of a man and a woman sitting in a park together
        a photo of a man and a woman working out at the gym together
        a photo of a man and a woman baking cookies together
        a photo of a man and a woman posing for a selfie together
        a photo of a man and a woman making funny faces for a photo booth together
        a photo of a man and a woman playing a musical duet together
        a photo of a man and a woman together in the jungle
        a photo of a man and a woman together in the snow
        a photo of a man and a woman together on the beach
        a photo of a man and a woman together with a city in the background
        a photo of a man and a woman together with a mountain in the background
        a photo of a man and a woman together with a blue house in the background
    """,
    "table2_single": """
        a man in a laboratory
        a man riding a bike
        a portrait photo of a man dressed as a cowboy in the wild west, in from of a saloon, \
very high quality, professional photo, beautiful lighting, 8k
        a close up portrait photo of a man dressed in a space suit without helmet, on Mars, \
in front of spacehip, beautiful starry sky, very high quality, professional photo, beautiful lighting, 8k
        a portrait photo of a man as a race car driver, very high quality, professional photo, \
beautiful lighting, 8k
    """,
    "table2_multi": """
        a man and a woman in the style of Van Gogh painting
        a man and a woman sitting on a sofa
        a man and a woman reading a book
        a man and a woman in Paris, shaking hands, with the Eiffel Tower in the background
        a man and a woman standing on a mountain
        a man and a woman running in a park
        a man and a woman in a lavendar farm
    """,
}
GROUPS = {
    "single": {"accessory": 10, "style": 10, "action": 10, "context": 10},
    "multi": {"style": 7, "action": 8, "context": 6},
    "table2_single": {"table2": 5},
    "table2_multi": {"table2": 7},
}


class Person:
    def __init__(self, id: str, word: str):
        self.id, self.word = id, word


@pytest.fixture(scope="module")
def paper():
    return load(PAPER)


def celebrities() -> list[Person]:
    return [Person(name, word) for name, word in SUBJECTS.items()]


@pytest.mark.parametrize("kind", PROMPTS)
def test_paper_has_the_published_prompts(paper, kind):
    part = paper.kind("test", kind)
    filled = [prompt.fill(["man", "woman"][: prompt.subjects])[0] for prompt in part.prompts]
    assert filled == [line.strip() for line in PROMPTS[kind].strip().splitlines()]
    assert Counter(prompt.group for prompt in part.prompts) == GROUPS[kind]
    assert part.images == 4


def test_paper_has_the_published_subjects_and_images(paper):
    assert dict(paper.split("test").words) == SUBJECTS
    single = requests(paper, celebrities(), "single")
    multi = requests(paper, celebrities(), "multi")
    assert (len(single), len(multi)) == (15 * 40 * 4, 105 * 21 * 4) == (2400, 8820)


def test_pairs_name_their_subjects_in_the_order_of_ids_as_fastcomposer_does(paper):
    rows = requests(paper, celebrities(), "multi")
    assert all(row["subjects"] == sorted(row["subjects"]) for row in rows)
    assert all(row["words"] == [SUBJECTS[name] for name in row["subjects"]] for row in rows)
    both = next(r for r in rows if r["subjects"] == ["000612/000000010", "001854/000000015"])
    assert both["prompt"] == "a painting of a woman and a man together in the style of Banksy"


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
    single = paper.kind("test", "single")
    fewer = Kind(
        single.prompts[:0:-3], 2
    )  # other prompts before it, images and subjects around it: the same seed
    part = Split(tuple(SUBJECTS)[::-2], {"single": fewer})
    seeds = {(row["subject"], row["prompt"], row["index"]): row["seed"] for row in rows}
    again = requests(EvaluationProtocol("part", {"test": part}), celebrities(), "single")
    assert len(again) == 8 * 13 * 2
    assert all(seeds[row["subject"], row["prompt"], row["index"]] == row["seed"] for row in again)


def test_swap_shares_noise_between_subjects_only(paper):
    rows = requests(paper, celebrities(), "swap")
    seeds = {(row["prompt_id"], row["index"]): set() for row in rows}
    for row in rows:
        seeds[row["prompt_id"], row["index"]].add(row["seed"])
    assert all(len(values) == 1 for values in seeds.values())
    assert len({min(values) for values in seeds.values()}) == len(seeds)


@pytest.mark.parametrize("path", [MINIATURE, FULL])
def test_miniature_prompts_are_in_its_own_language(path):
    from moa.miniature import world
    from moa.miniature.tokenizer import load_tokenizer

    vocabularies = (
        world.CLOTHES, world.CLOTHES_COLORS, world.EXPRESSIONS, world.BACKGROUNDS, world.BACKGROUND_COLORS,
        world.PROPS,
    )  # fmt: skip
    known = {w for v in vocabularies for texts in v.values() for text in texts for w in text.split()}
    known |= {"a", "an", "and", "in", "holding", "woman"}
    tokenizer, protocol = load_tokenizer(), load(path)
    for split in protocol.splits.values():
        for kind in split.kinds.values():
            for prompt in kind.prompts:
                text, _ = prompt.fill(["woman"] * prompt.subjects)
                assert not {word.strip(",") for word in text.split()} - known, text
                assert len(tokenizer(text).input_ids) <= tokenizer.model_max_length, text


@pytest.mark.parametrize(("test", "validation"), itertools.product([MINIATURE, FULL], repeat=2))
def test_validation_prompts_are_not_test_prompts(test, validation):
    used = [
        {p.template for kind in load(path).split(split).kinds.values() for p in kind.prompts}
        for path, split in ((test, "test"), (validation, "validation"))
    ]
    assert not used[0] & used[1]


def test_the_full_run_shares_nothing_with_what_was_looked_at_before():
    """No subject and no prompt, hence no noise, of the default run's or of tuning's."""
    from moa.miniature.dataset import choose_subjects
    from moa.miniature.world import identities, is_held_out

    settings = [
        yaml.safe_load(Path(f"config/{name}.yaml").read_text())["render"] for name in ("miniature", "full")
    ]
    default, full = settings[0], settings[0] | settings[1]
    for split in ("test", "validation"):
        before, now = load(MINIATURE).split(split), load(FULL).split(split)
        photos = [
            [
                SimpleNamespace(id=i.id, word=i.class_word)
                for i in choose_subjects(split, s[f"subjects_{split}"])
            ]
            for s in (default, full)
        ]
        used = photos[0] if split == "test" else before.choose(photos[0])
        chosen = now.choose(photos[1])
        assert not {p.id for p in chosen} & {p.id for p in used}
        templates = [{p.template for kind in s.kinds.values() for p in kind.prompts} for s in (before, now)]
        assert not templates[0] & templates[1]
    by_id = {i.id: i for i in identities("test")}
    looks = [by_id[name] for name in load(FULL).split("test").subjects]
    novel = Counter((i.class_word, is_held_out(i.attributes)) for i in looks)
    assert novel == {(word, kind): 5 if kind else 4 for word in ("man", "woman") for kind in (True, False)}


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
