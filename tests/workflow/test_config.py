"""A wrong configuration is an error that names the key, before anything runs."""

from __future__ import annotations

import copy
import json
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa import stages
from moa.config import check, complete, load, read
from moa.hashing import ROOT
from moa.schema import configuration, settings_class
from moa.stages import STAGES, methods, settings

SCHEMA = ROOT / "workflow/schemas/config.schema.json"
PRESETS = ("miniature", "paper")


def preset(name: str) -> dict[str, Any]:
    return read(ROOT / f"config/{name}.yaml")


def changed(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(preset("miniature"))
    *parents, last = key.split(".")
    section = config
    for name in parents:
        section = section[name]
    section[last] = value
    return config


def test_schema_is_up_to_date() -> None:
    assert json.loads(SCHEMA.read_text()) == configuration(), (
        f"run `python -m moa schema --output {SCHEMA.relative_to(ROOT)}`"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    check(yaml.safe_load((ROOT / f"config/{name}.yaml").read_text()), SCHEMA)


@pytest.mark.parametrize("name", PRESETS)
def test_every_stage_loads_its_settings(name: str) -> None:
    config, seen = preset(name), 0
    for stage, entry in STAGES.items():
        kind = settings_class(entry) if entry.section else None
        only_miniature = entry.section in ("render", "gates") or entry.section.startswith("pretrain")
        only_paper = entry.section.startswith(("data.photos", "data.quarantine", "data.subjects"))
        if kind is None or (only_miniature if name == "paper" else only_paper):
            continue
        models = config["pretrain"] if "{model}" in entry.section else [""]
        for model in models:
            assert is_dataclass(load(kind, settings(stage, config, model=model), entry.section))
            seen += 1
    assert seen > 8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("colour", 1, "unknown key colour"),
        ("output", "results/{a}", "output: .*does not match"),
        ("output", "results/Anna's", "output: .*does not match"),
        ("train.moa.learning_rate", 1.0, "unknown key train.moa.learning_rate"),
        ("train.moa.lr", "1e-4", r"train\.moa\.lr: .*write 1\.0e-4"),
        ("train.moa.steps", 1.5, r"train\.moa\.steps"),
        ("generate.sampling.scheduler", "euler", r"generate\.sampling\.scheduler"),
        ("models.prior.id", 3, r"models\.prior\.id"),
        ("pretrain.vae.budget.stepz", 3, r"unknown key pretrain\.vae\.budget\.stepz"),
        ("shards.single", 1001, r"shards\.single: 1001 is greater than the maximum of 1000"),
        ("benchmark.size", 256, "unknown key benchmark.size"),
        ("benchmark.sizes", 256, r"benchmark\.sizes"),
        ("generate.sampling.sparse_threshold", "0.1", r"generate\.sampling\.sparse_threshold"),
        ("device", "tpu", "device"),
        ("rivals", ["moa", "photoshop"], r"rivals\.1: 'photoshop' is not one of"),
        (
            "methods.photoshop",
            ["single"],
            r"unknown key methods\.photoshop; there are ceiling, fastc",
        ),
    ],
)
def test_wrong_keys_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(changed(key, value), SCHEMA)


def test_missing_key_is_named() -> None:
    config = preset("miniature")
    del config["models"]["prior"]
    with pytest.raises(ValueError, match="models: 'prior' is a required property"):
        check(config, SCHEMA)


def test_loading_names_the_key_too() -> None:
    from moa.training.config import TrainConfig

    given = settings("train-moa", preset("miniature"))
    with pytest.raises(ValueError, match=r"unknown key train\.moa\.lrr"):
        load(TrainConfig, given | {"lrr": 1}, "train.moa")
    with pytest.raises(ValueError, match=r"train\.moa\.steps must be a whole number"):
        load(TrainConfig, given | {"steps": "many"}, "train.moa")


def test_every_stage_that_runs_a_model_follows_the_device() -> None:
    none = {"tokenizer", "clip", "source"}
    devices = {name for name, entry in STAGES.items() if name != "lock-models" and set(entry.shared) - none}
    assert devices >= {"train-moa", "train-fastcomposer", "generate", "generate-shard", "score", "router"}
    config = changed("device", "cuda")
    assert {settings(name, config)["device"] for name in devices} == {"cuda"}


GRID = {
    "default": {},
    "sampled": {"sampling": {"guidance": 2.0}},
    "trained": {"train": {"lr": 1.0e-5}},
    "other": {"models": {"prior": {"id": "elsewhere"}}, "train": {"lr": 1.0e-5}},
    "again": {"models": {"prior": {"id": "elsewhere"}}},
}


def test_a_trial_changes_what_it_says_and_nothing_else() -> None:
    config = changed("ablations", {"moa": GRID})
    config["models"]["prior"]["revision"] = "pinned"
    assert stages.trial(config, "ablations", "moa", "default") == config
    sampled = stages.trial(config, "ablations", "moa", "sampled")
    assert sampled["generate"]["sampling"] == {**config["generate"]["sampling"], "guidance": 2.0}
    assert sampled["train"] == config["train"]
    other = stages.trial(config, "ablations", "moa", "other")
    assert other["models"] == {**config["models"], "prior": {"id": "elsewhere"}}  # not the old one's revision
    assert other["train"]["moa"] == {**config["train"]["moa"], "lr": 1.0e-5}
    assert len(list(stages.every_trial(config))) == len(GRID) + sum(map(len, config["tuning"].values()))


def test_trials_with_the_same_prior_are_compared_with_the_same_images() -> None:
    config = changed("ablations", {"moa": GRID})
    priors = [stages.prior_trial(config, "ablations", "moa", name) for name in GRID]
    assert priors == ["moa-default"] * 3 + ["moa-other"] * 2
    prior = stages.trial(config, "ablations", "prior", "moa-other")
    assert (prior["models"]["prior"], prior["train"]) == ({"id": "elsewhere"}, config["train"])
    assert stages.first_alike(config, "ablations", "moa", "again", "train", "models") == "again"


def test_several_training_seeds() -> None:
    assert stages.train_seeds(preset("miniature")) == {"": {}}
    assert stages.train_seeds(changed("train_seeds", [3, 0])) == {"": {"seed": 3}, "-seed-0": {"seed": 0}}
    for wrong in ([], [1, 1], [0.5]):
        with pytest.raises(ValueError, match="train_seeds"):
            check(changed("train_seeds", wrong), SCHEMA)


def test_trials_train_with_the_seed_of_what_they_are_compared_with() -> None:
    config = changed("ablations", {"moa": GRID | {"own": {"train": {"seed": 9}}}}) | {"train_seeds": [5, 6]}
    main = settings("train-moa", config) | stages.train_seeds(config)[""]
    assert main["seed"] == 5 != config["train"]["moa"]["seed"]

    def trained(name: str) -> dict[str, Any]:
        return settings("train-moa", stages.trial(config, "ablations", "moa", name))

    assert trained("trained") == main | {"lr": 1.0e-5}
    assert trained("again") == main | {"prior": {"id": "elsewhere"}}
    assert trained("own")["seed"] == 9
    prior = stages.trial(config, "ablations", "prior", "moa-other")
    assert prior["train"] == config["train"]


@pytest.mark.parametrize(
    ("grid", "trials", "message"),
    [
        ("ablations", {"mao": {"default": {}}}, r"ablations\.mao: only a method with weights of its own"),
        ("tuning", {"moa_wrong_subject": {"x": {}}}, r"tuning\.moa_wrong_subject: only"),
        ("ablations", {"textual_inversion": {"default": {}}}, r"ablations\.textual_inversion: only"),
        ("ablations", {"prior": {"default": {}}}, r"ablations\.prior: only"),
        ("ablations", {"moa": {"x": {"train": {"lr": 1.0}}}}, r"ablations\.moa: none changes nothing; add"),
        (
            "tuning",
            {"moa": {"lr=5e-4": {}}},
            r"tuning\.moa: a trial cannot be called 'lr=5e-4'; .* of letters",
        ),
        ("tuning", {"moa": {1: {}}}, r"tuning\.moa: a trial cannot be called 1; "),
    ],
)
def test_trials_that_cannot_end_well_are_named_before_any_runs(grid: str, trials: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(stages.every_trial(changed(grid, trials)))
    config = changed("methods.portrait", ["single"])  # without weights
    config["ablations"] = {"portrait": {"default": {}, "x": {"sampling": {"guidance": 2.0}}}}
    assert len(list(stages.every_trial(config | {"tuning": {}}))) == 2


def test_methods_without_images_are_left_out() -> None:
    assert list(methods(changed("methods.moa", []))) == [
        "prior",
        "moa_wrong_subject",
        "fastcomposer",
        "ceiling",
    ]
    assert methods(changed("methods.moa", ["swap"]))["moa"] == ["swap"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("methods.moa", ["single", "swop"], r"methods\.moa: unknown kind 'swop'; .* has single, multi, swap"),
        ("methods", {"moa": []}, "methods: no method makes any images"),
        ("methods.textual_inversion", ["single", "occluded"], r"methods\.textual_inversion: .*leave that"),
        ("shards", {"single": 1, "multi": 1}, r"shards\.swap is missing"),
        ("protocol", "no/such.yaml", r"no/such\.yaml does not exist; check .* `protocol`"),
        ("protocol", "pyproject.toml", r"protocol pyproject\.toml has no kinds of images at test\.kinds"),
    ],
)
def test_kinds_that_cannot_be_made_are_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods(changed(key, value))


def test_rivals_are_those_that_make_images() -> None:
    config = {"rivals": ["moa", "textual_inversion"], "methods": {"moa": ["single"], "textual_inversion": []}}
    assert stages.rivals(config) == []
    config["methods"]["textual_inversion"] = ["single"]
    assert stages.rivals(config) == ["moa", "textual_inversion"]
    assert stages.rivals({"methods": config["methods"]}) == []


def test_changes_are_merged_as_snakemake_would() -> None:
    from snakemake.utils import update_config

    changes = {"output": "x", "train": {"moa": {"steps": 7, "validation_prompts": []}}, "shards": {"odd": 2}}
    expected = yaml.safe_load((ROOT / "config/miniature.yaml").read_text())
    update_config(expected, changes)
    assert complete(changes, ROOT / "config/miniature.yaml") == expected
    assert expected["train"]["moa"]["lr"] == 1e-3  # not lost with its section


def test_whole_configurations_stand_alone(tmp_path: Path) -> None:
    assert complete({"preset": "own", "output": "x"}, tmp_path / "none") == {"preset": "own", "output": "x"}
    with pytest.raises(FileNotFoundError, match=r"none is missing.*run from the project's folder"):
        complete({"output": "x"}, tmp_path / "none")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"list\.yaml"):
        read(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        read(tmp_path / "broken.yaml")
