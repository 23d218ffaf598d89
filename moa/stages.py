"""The stages of the workflow: what each runs, and which part of the configuration it gets.

The command line and the Snakemake rules both read this table, so a stage is wired in one place. A stage is a
plain function; its first parameter is its settings (a frozen dataclass), the others become options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moa import hashing
from moa.config import merge
from moa.data.sources.config import KINDS
from moa.trained import PER_SUBJECT, TRAINED
from moa.trials import reference

Config = Mapping[str, Any]

# method: trial: what it changes of train.<method>, of generate.sampling and of models; `trial` says how.
GRID: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "train": {"type": "object"},
                "sampling": {"type": "object"},
                "models": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"prior": {"type": "object"}, "image_encoder": {"type": "object"}},
                },
            },
        },
    },
}

# JSON schemas of the keys that belong to no single stage; those in OPTIONAL may be left out.
TOP_LEVEL: dict[str, Any] = {
    "preset": {"type": "string"},
    "output": {"type": "string", "pattern": r"""^[^{}'"]+$"""},  # names of files in shell commands
    "device": {"enum": ["cpu", "cuda"]},
    "weights": {"type": "string"},
    "source": {"enum": ["miniature", "shards", *KINDS]},
    "protocol": {"type": "string"},
    "methods": {"type": "object", "additionalProperties": False, "properties": {}},  # those registered
    "rivals": {"type": "array", "items": {"enum": []}, "uniqueItems": True},  # of methods registered
    "shards": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1, "maximum": 1000}},
    "ten_shards_a_job": {"type": "boolean"},
    "processes": {"type": "integer", "minimum": 1},
    "models": {"type": "object", "additionalProperties": False, "properties": {}},
    "train_seeds": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "uniqueItems": True},
    "tuning": GRID,
    "ablations": GRID,
}
TRIAL_NAME = r"[\w.+-]+"  # it becomes a folder's name
OPTIONAL = {"weights", "rivals", "ten_shards_a_job", "processes", "train_seeds", "tuning", "ablations"}


@dataclass(frozen=True)
class Stage:
    """One stage."""

    target: str  # "module:function"
    help: str
    section: str = ""  # dotted key of its section; "{…}" is replaced by an option's value
    shared: Mapping[str, str] = field(
        default_factory=dict
    )  # setting: dotted key elsewhere in the configuration
    registers: tuple[str, ...] = ()  # modules that it uses without importing them by name
    alias: str = ""  # another name on the command line
    reads: tuple[str, ...] = ()  # keys of its section; "{…}" as in `section`; none = all

    @property
    def module(self) -> str:
        return self.target.split(":")[0]


JUDGES = {key: f"models.{key}" for key in ("clip_judge", "segmenter", "identity", "detector")}
PRIOR = {key: f"models.{key}" for key in ("prior", "image_encoder")}
DEVICE = {"device": "device"}
PHOTOS = "data.photos", {"source": "source"}

STAGES: dict[str, Stage] = {
    "render": Stage(
        "moa.miniature.dataset:run",
        "draw a shard of the miniature's photos",
        "render",
        reads=("seed", "size", "{split}", "shard_size", "pairs", "props"),
    ),
    "render-subjects": Stage(
        "moa.miniature.dataset:run_subjects",
        "draw evaluation subjects",
        "render",
        reads=("seed", "size", "subjects_{split}"),
    ),
    "lock-photos": Stage("moa.data.sources.lock:run", "lock and list a source of photos", *PHOTOS),
    "photos": Stage("moa.data.sources.photos:run", "take in a shard of photos", *PHOTOS),
    "quarantine": Stage(
        "moa.data.sources.quarantine:run", "list the photos that were put aside", "data.quarantine"
    ),
    "celeba-subjects": Stage(
        "moa.data.celeba:run", "take in the protocol's test subjects", "data.subjects.test"
    ),
    "held-out-subjects": Stage(
        "moa.data.held_out:run", "make validation subjects of held-out records", "data.subjects.validation"
    ),
    "archive-records": Stage(
        "moa.data.archive:run",
        "make records of the annotations in FastComposer's archive",
        "data.align",
        {"tokenizer": "models.prior", "clip": "models.clip_judge"},
    ),
    "export-archive": Stage("moa.data.archive:export", "write records as FastComposer's archive"),
    "restore-archive": Stage(
        "moa.data.archive:restore", "write FastComposer's archive again, as it was taken in"
    ),
    "caption": Stage(
        "moa.data.caption:run", "caption photos", "data.caption", {"model": "models.captioner"} | DEVICE
    ),
    "segment": Stage(
        "moa.data.segment:run",
        "find people in photos",
        "data.segment",
        {"model": "models.segmenter"} | DEVICE,
    ),
    "align": Stage(
        "moa.data.align:run",
        "match captions' words with segments",
        "data.align",
        {"tokenizer": "models.prior", "clip": "models.clip_judge"} | DEVICE,
    ),
    "card": Stage("moa.data.card:run", "describe the training records", "data.card"),
    "annotation": Stage(
        "moa.miniature.annotation:run",
        "measure the annotators against the truth",
        "data.align",
        {"tokenizer": "models.prior", "clip": "models.clip_judge"},
    ),
    "train-moa": Stage("moa.training.moa:run", "train MoA", "train.moa", PRIOR | DEVICE, alias="train"),
    "train-fastcomposer": Stage(
        "moa.training.fastcomposer:run", "train FastComposer", "train.fastcomposer", PRIOR | DEVICE
    ),
    "import-fastcomposer": Stage(
        "moa.convert:run_import", "read FastComposer's own checkpoint", "train.fastcomposer", PRIOR | DEVICE
    ),
    "export-fastcomposer": Stage(
        "moa.convert:run_export", "write FastComposer's own checkpoint", "train.fastcomposer", PRIOR | DEVICE
    ),
    "train-textual_inversion": Stage(
        "moa.baselines.textual_inversion:run",
        "learn a word for each subject of a shard",
        "train.textual_inversion",
        {"prior": "models.prior"} | DEVICE,
    ),
    "join-textual_inversion": Stage("moa.baselines.textual_inversion:join", "join shards of learned words"),
    "plan": Stage("moa.evaluation.plan:run", "write down what the protocol asks for"),
    "generate": Stage(
        "moa.generation:generate_one",
        "make one image of your own subjects",
        "generate",
        PRIOR | DEVICE | {"output": "output"},
        hashing.REGISTERED,
    ),
    "generate-shard": Stage(
        "moa.generation:run",
        "make the images of a shard of requests",
        "generate",
        PRIOR | DEVICE,
        hashing.REGISTERED,
    ),
    "router": Stage(
        "moa.evaluation.router:record",
        "record what MoA's router does",
        "evaluate.router",
        PRIOR | DEVICE | {"segmenter": "models.segmenter", "sampling": "generate.sampling"},
    ),
    "sparse-curve": Stage(
        "moa.evaluation.sparse:run",
        "measure what sparse experts save and change",
        "evaluate.sparse",
        PRIOR | DEVICE | JUDGES | {"sampling": "generate.sampling"},
    ),
    "router-table": Stage("moa.evaluation.maps:tabulate", "tabulate what the router did"),
    "merge": Stage("moa.evaluation.samples:merge", "join scored samples"),
    "compare-swaps": Stage(
        "moa.evaluation.swaps:compare_swaps", "measure the context kept under a swap", "models.lpips", DEVICE
    ),
    "compare-prior": Stage(
        "moa.evaluation.preserved:compare",
        "measure what is left of the prior's images",
        "models.lpips",
        DEVICE,
    ),
    "compare-methods": Stage(
        "moa.evaluation.shared:compare",
        "measure the context that two methods keep over the same pixels",
        "models.lpips",
        DEVICE,
    ),
    "fetch-identity": Stage(
        "moa.evaluation.weights:fetch_identity", "download the weights of IP's network", "models.identity"
    ),
    "lock-models": Stage(
        "moa.evaluation.weights:lock",
        "hold weights that no hub pins against their lock",
        shared={"identity": "models.identity", "lpips": "models.lpips"},
    ),
    "look-at-references": Stage(
        "moa.evaluation.references:look", "look at the subjects' photos", "evaluate.score", JUDGES | DEVICE
    ),
    "measure": Stage("moa.evaluation.measures:measure", "measure what the paper claims"),
    "claims": Stage("moa.evaluation.claims:tabulate", "set the paper's claims beside what was measured"),
    "tables": Stage("moa.evaluation.tables:tables", "tabulate quality"),
    "tuning-table": Stage("moa.evaluation.tuning:tabulate", "tabulate the tuning grid"),
    "ablation-table": Stage("moa.evaluation.ablations:tabulate", "tabulate the ablations"),
    "cost": Stage("moa.evaluation.costs:costs", "tabulate cost"),
    "figure-benchmark": Stage("moa.figures.grids:benchmark", "draw subjects against methods"),
    "figure-pairs": Stage("moa.figures.grids:pairs", "draw pairs of subjects"),
    "figure-swap": Stage("moa.figures.grids:swap", "draw a subject swap"),
    "figure-training": Stage("moa.figures.curves:training", "draw the losses"),
    "figure-scores": Stage("moa.figures.curves:scores", "draw the main table"),
    "figure-sparse": Stage("moa.figures.curves:sparse", "draw what sparse experts save and change"),
    "figure-router": Stage("moa.figures.router_maps:router_maps", "draw router maps"),
    "report": Stage("moa.report:run", "show a whole run in one HTML file"),
    "provenance": Stage("moa.shipping:provenance", "write down what made a run"),
    "ship": Stage("moa.shipping:ship", "copy a run's tables, figures and samples, to be kept in git"),
    "gates": Stage("moa.miniature.gates:run", "measure the miniature's models", "gates"),
    "cards": Stage("moa.miniature.cards:run", "write the model cards"),
    "score": Stage("moa.evaluation.score:score", "score images", "evaluate.score", JUDGES | DEVICE),
    "pretrain": Stage(
        "moa.miniature.pretrain:run", "train one of the miniature's models", "pretrain.{model}"
    ),
    "assemble": Stage("moa.miniature.pretrain:assemble", "join the parts of the miniature's prior"),
    "benchmark-unet": Stage(
        "moa.benchmark:run", "measure time and memory of U-Net passes and training steps", "benchmark"
    ),
    "benchmark-data": Stage(
        "moa.data.benchmark:run", "measure time and memory of captions and masks", "data.benchmark", DEVICE
    ),
    "benchmark-scoring": Stage(
        "moa.evaluation.speed:run",
        "measure what scoring in batches saves",
        "evaluate.speed",
        JUDGES | DEVICE,
    ),
    "schema": Stage("moa.schema:write", "write the JSON schema of the configuration"),
}


def get(config: Config, key: str) -> Any:
    """The value of a dotted key; KeyError naming the whole key if it is missing."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise KeyError(f"the configuration lacks the key {key!r}")
        value = value[part]
    return value


def settings(name: str, config: Config, **options: str) -> dict[str, Any]:
    """The settings that stage `name` gets from the whole configuration, as JSON-able values."""
    stage = STAGES[name]
    section = dict(get(config, stage.section.format(**options))) if stage.section else {}
    return section | {setting: get(config, key.format(**options)) for setting, key in stage.shared.items()}


def read_settings(name: str, config: Config, **options: str) -> dict[str, Any]:
    """As `settings`, of its section only what the stage reads with these options."""
    read = {key.format(**options) for key in STAGES[name].reads}
    given = settings(name, config, **options)
    return {
        key: value for key, value in given.items() if not read or key in read or key in STAGES[name].shared
    }


def changes(config: Config, grid: str, method: str, name: str) -> Mapping[str, Any]:
    """What a trial of a grid, "tuning" or "ablations", changes; of the prior's trials, see `prior_trial`."""
    if method == "prior":
        method, _, name = name.partition("-")
        changed = config[grid][method][name]
        return {"models": changed["models"]} if changed.get("models") else {}
    return config[grid][method][name]


def trial(config: Config, grid: str, method: str, name: str) -> dict[str, Any]:
    """The configuration of a trial: `train` and `sampling` change single keys, `models` whole models.

    It trains with the first of `train_seeds`, as the main training does that it is compared with.
    """
    changed = changes(config, grid, method, name)
    train = (train_seeds(config)[""] if method in TRAINED else {}) | dict(changed.get("train", {}))
    part: dict[str, Any] = {"train": {method: train}} if train else {}
    part |= {"generate": {"sampling": changed.get("sampling", {})}}
    return merge(config, part) | {"models": {**config["models"], **changed.get("models", {})}}


def can_be_tried(config: Config, method: str) -> bool:
    """Whether there can be trials of a method: it borrows no weights, and none are of the test subjects."""
    training = TRAINED.get(method)
    known = method in TRAINED or method in config["methods"]
    return known and method != "prior" and training in (None, method) and training not in PER_SUBJECT


def every_trial(config: Config) -> Iterator[dict[str, Any]]:
    """The configurations of all trials, to be checked before any of them runs.

    Raises ValueError naming the key of a method that cannot be tried, of ablations without a reference, or of
    a trial whose name cannot be a folder's.
    """
    for grid in ("tuning", "ablations"):
        for method, trials in config.get(grid, {}).items():
            if not can_be_tried(config, method):
                raise ValueError(
                    f"{grid}.{method}: only a method with weights of its own, learned from records, or with "
                    "none, can be tried on validation subjects, such as moa"
                )
            if grid == "ablations":
                reference(method, trials)
            for name in trials:
                if not isinstance(name, str) or not re.fullmatch(TRIAL_NAME, name):
                    raise ValueError(
                        f"{grid}.{method}: a trial cannot be called {name!r}; its name is a folder's, of "
                        "letters, digits and _ . + -"
                    )
                yield trial(config, grid, method, name)


def first_alike(config: Config, grid: str, method: str, name: str, *sections: str) -> str:
    """The first trial of a method that changes the same in some sections; itself, if there is none before."""

    def part(other: str) -> list[Any]:
        return [changes(config, grid, method, other).get(section, {}) for section in sections]

    return next(other for other in config[grid][method] if part(other) == part(name))


def prior_trial(config: Config, grid: str, method: str, name: str) -> str:
    """The trial of the prior whose images a trial is compared with: one for each prior that there is."""
    return f"{method}-{first_alike(config, grid, method, name, 'models')}"


def train_seeds(config: Config) -> dict[str, dict[str, int]]:
    """What is added to the names of a method's trainings, and what each changes of `train.<method>`.

    The first has no addition. Without `train_seeds` it is the only one, and changes nothing.
    """
    first, *others = config.get("train_seeds") or [None]
    given = {} if first is None else {"seed": first}
    return {"": given} | {f"-seed-{seed}": {"seed": seed} for seed in others}


def code(name: str, method: str = "") -> str:
    """Hash of the modules that stage `name` uses; for one method, of no other method's."""
    stage = STAGES[name]
    return hashing.code_hash(stage.module, *(hashing.registering(method) if method else stage.registers))


def shards(config: Config, split: str) -> int:
    """How many shards of photos the configuration asks for."""
    if config["source"] != "miniature":
        return int(get(config, f"shards.{split}"))
    return -(-get(config, f"render.{split}") // get(config, "render.shard_size"))


def _protocol(config: Config, what: str, *keys: str) -> Any:
    """`what` stands in the protocol's file below these keys. Raises ValueError naming the file."""
    path = config["protocol"]
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        for key in keys:
            value = value[key]
        return value
    except FileNotFoundError:
        raise ValueError(f"protocol {path} does not exist; check the config's key `protocol`") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"protocol {path} has no {what} at {'.'.join(keys)} ({error})") from error


def kinds(config: Config, split: str) -> list[str]:
    """Kinds of images that the protocol knows for a split. Raises ValueError naming the file."""
    return list(_protocol(config, "kinds of images", split, "kinds"))


def subjects(config: Config) -> list[str]:
    """The test subjects that the protocol lists below their words; none if it lists none."""
    listed = _protocol(config, "subjects", "test", "subjects")
    return [name for names in listed.values() for name in names] if isinstance(listed, dict) else []


def methods(config: Config) -> dict[str, list[str]]:
    """Kinds of images that each method makes; methods without any are left out.

    Raises ValueError naming the key of a kind that is unknown or that the method cannot make, or if nothing
    at all is to be made.
    """
    known = kinds(config, "test")
    for method, wanted in config["methods"].items():
        for kind in wanted:
            if kind not in known:
                raise ValueError(
                    f"methods.{method}: unknown kind {kind!r}; {config['protocol']} has {', '.join(known)}"
                )
            if kind not in config["shards"]:
                raise ValueError(f"shards.{kind} is missing: into how many jobs to split these images")
            if kind == "occluded" and TRAINED.get(method) in PER_SUBJECT:
                raise ValueError(
                    f"methods.{method}: it cannot make the kind {kind!r}, for it learns each subject from "
                    "the photo that hides nothing; leave that kind out"
                )
    made = {method: list(wanted) for method, wanted in config["methods"].items() if wanted}
    if not made:
        raise ValueError(f"methods: no method makes any images; give one a kind of {', '.join(known)}")
    return made


def weights(config: Config, role: str) -> list[str]:
    """Files of weights that no hub pins, there or not, of the role `identity` or `lpips`; none of another.

    Raises ValueError naming a key that is missing.
    """
    model = config["models"][role]
    if role == "lpips":
        return [model[key] for key in ("id", "heads") if model.get(key)]
    if role != "identity" or model.get("kind", "facenet") != "facenet":
        return []
    if not model.get("id"):
        raise ValueError("models.identity: kind facenet needs the key id, the weights file")
    return [model["id"]]


def rivals(config: Config) -> list[str]:
    """Methods that are compared over the same pixels: `rivals` that make images; none if just one does."""
    made = [method for method in config.get("rivals", ()) if config["methods"].get(method)]
    return made if len(made) > 1 else []


def model_files(config: Config, role: str) -> list[str]:
    """Files of the model that plays `role`, sorted; none for one of the hub, whose revision is a setting.

    Raises FileNotFoundError naming the key if it should lie below `weights` and does not.
    """
    if locked := weights(config, role):
        return locked
    source = config["models"][role].get("id")
    if source is None:
        return []
    files = [str(file) for file in hashing.model_files(Path(source))]
    if not files and "weights" in config and source.startswith(str(config["weights"])):
        raise FileNotFoundError(
            f"models.{role}.id: there is no model in {source}; correct the key `weights`, or train models "
            "with `snakemake pretrain` and set `weights` to results/pretrain/weights"
        )
    return files


def align_files(config: Config) -> list[str]:
    """Files of the models that `data.align` names by itself, where they lie in local folders."""
    known = get(config, "data.align")
    names = [known.get("spacy"), (known.get("label_model") or {}).get("id")]
    return [str(file) for name in names if name for file in hashing.model_files(Path(name))]


def benchmark_files(config: Config) -> list[str]:
    """Files of the models that `data.benchmark` runs, where they lie in local folders."""
    known = config["data"].get("benchmark", {})
    shipped = {role: {"id": f"moa/miniature/weights/{role}"} for role in ("captioner", "segmenter")}
    sources = [known.get(role, model)["id"] for role, model in shipped.items()]
    return [str(file) for source in sources for file in hashing.model_files(Path(source))]
