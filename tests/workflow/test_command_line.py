"""`python -m moa`: options follow the stages' signatures, errors are one line that says what to do."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest

from moa import __main__ as command_line
from moa import gpus, options, stages
from moa.config import complete
from moa.evaluation.judges import ScoreConfig
from moa.hashing import ROOT, used_modules
from moa.stages import STAGES


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moa", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.run([name, "--help"])
    assert stop.value.code == 0
    assert f"python -m moa {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", STAGES)
def test_every_option_has_help_from_one_place(name: str) -> None:
    """Otherwise one must read the code to know what to give; said twice, it would differ one day."""
    function, kinds = command_line._function(name)
    own = [option for option in inspect.signature(function).parameters if not is_dataclass(kinds[option])]
    assert [option for option in own if not options.help_of(name, function, option)] == []
    assert set(options.OWN.get(name, {})) <= set(own) - set(options.documented(function))


def test_help_is_read_from_docstrings() -> None:
    def stage() -> None:
        """Make something.

        Args:
            first: of two lines, 5 % of
                them long.
            rows, columns: at most how many.

        Raises:
            ValueError: never.
        """

    assert options.documented(stage) == {
        "first": "of two lines, 5 % of them long.",
        "rows": "at most how many.",
        "columns": "at most how many.",
    }
    assert options.summary(stage) == "Make something.\n\nRaises:\n    ValueError: never."
    assert options.help_of("merge", stage, "parts") == options.OWN["merge"]["parts"]
    assert options.help_of("merge", stage, "unknown") == ""


def test_help_shows_defaults_that_the_text_does_not_say() -> None:
    assert command_line._help("5 % of it.", 0.05) == "5 %% of it. Default: 0.05."
    assert command_line._help("columns.", ("moa", "prior")) == "columns. Default: moa prior."
    assert command_line._help("a file.", None) == "a file."


@pytest.mark.parametrize("name", STAGES)
def test_code_of_every_stage_is_known(name: str) -> None:
    entry = STAGES[name]
    assert entry.module in used_modules(entry.module, *entry.registers)


def test_settings_as_json_and_as_file_are_the_same(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("json.parquet", "file.parquet")]
    (tmp_path / "config.yaml").write_text("render: {train: 2, validation: 1, shard_size: 2, size: 32}")
    configs = [
        json.dumps({"train": 2, "validation": 1, "shard_size": 2, "size": 32}),
        str(tmp_path / "config.yaml"),
    ]
    for config, file in zip(configs, files, strict=True):
        shard = ["--split", "train", "--shard", "0", "--raw", str(file), "--truth", f"{file}.truth"]
        command_line.run(["render", "--config", config, *shard])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_file_with_changes_is_merged_with_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moa.training.config import TrainConfig

    monkeypatch.chdir(ROOT)
    (tmp_path / "changes.yaml").write_text("train: {moa: {steps: 7}}")
    loaded = command_line._load(str(tmp_path / "changes.yaml"), "train-moa", TrainConfig, {})
    whole = command_line._load("config/miniature.yaml", "train-moa", TrainConfig, {})
    assert loaded == replace(whole, steps=7)


def test_single_settings_take_the_place_of_those_of_the_configuration(tmp_path: Path) -> None:
    shard = ["--split", "train", "--shard", "0", "--truth", str(tmp_path / "truth")]
    for name, given in (
        ("whole", ['{"train": 2, "size": 32}']),
        ("changed", ['{"train": 9, "size": 32}', "--change", '{"train": 2}']),
    ):
        command_line.run(["render", "--config", *given, "--raw", str(tmp_path / name), *shard])
    assert (tmp_path / "changed").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match=r"unknown key render\.sise"):
        command_line.run(["render", "--change", '{"sise": 2}', "--raw", str(tmp_path / "no"), *shard])


def test_errors_are_one_line_with_the_key(tmp_path: Path) -> None:
    shard = ("--split", "train", "--shard", "0", "--raw", str(tmp_path / "a"), "--truth", str(tmp_path / "b"))
    done = run("render", "--config", '{"sise": 64}', *shard)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown key render.sise")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("stage", ["photos", "align", "archive-records"])
def test_a_mistyped_split_is_refused(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No photo is in it: the shard would be empty, or its records in a split that nothing reads."""
    with pytest.raises(SystemExit):
        command_line.run([stage, "--split", "trian"])
    assert re.search(r"--split: invalid choice: 'trian' .*train.*validation", capsys.readouterr().err)


def fail(monkeypatch: pytest.MonkeyPatch, stage: Callable[[], object]) -> int:
    """Exit status of a stage that does this."""
    monkeypatch.setattr(command_line, "_function", lambda name: (stage, {}))
    monkeypatch.setattr("sys.argv", ["moa", "merge"])
    return command_line.main()


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        (lambda: complete({}, Path("no.yaml")), "no.yaml is missing, which a configuration without"),
        (lambda: stages.get({}, "a.b"), "the configuration lacks the key 'a.b'"),
        (lambda: Path("no.csv").read_text(), "no.csv: No such file or directory"),
        (lambda: command_line._json("--change", "{steps: 7}"), "--change: {steps: 7} is no JSON (Expecting"),
        (lambda: command_line._json("--change", "7"), "--change must be a JSON object such as"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    stage: Callable[[], object],
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MOA_TRACEBACK", raising=False)
    assert fail(monkeypatch, stage) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and len(said.splitlines()) == 1
    monkeypatch.setenv("MOA_TRACEBACK", "1")
    assert fail(monkeypatch, stage) == 1
    assert capsys.readouterr().err.startswith("Traceback")


@pytest.mark.parametrize("error", [lambda: {}["key"], lambda: json.loads("{"), lambda: int(None)])  # type: ignore
def test_a_mistake_of_ours_keeps_its_traceback(
    error: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A KeyError of a dictionary says nothing without the place."""
    assert fail(monkeypatch, error) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.splitlines()[-1].startswith("error: ")


def test_a_mistyped_section_of_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage itself looks at its own section only, and would go on with the default's."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "changes.yaml").write_text("rendr: {train: 2}")
    shard = ["--split", "train", "--shard", "0", "--raw", str(tmp_path / "a"), "--truth", str(tmp_path / "b")]
    with pytest.raises(ValueError, match=r"unknown key rendr; there are .*render"):
        command_line.run(["render", "--config", str(tmp_path / "changes.yaml"), *shard])
    assert not (tmp_path / "a").exists()


def test_a_loss_that_is_no_number_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge() -> None:
        raise FloatingPointError("the loss is nan at step 3: lower lr")

    assert fail(monkeypatch, diverge) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: the loss is nan at step 3: lower lr"


@pytest.mark.parametrize("stage", ["train-moa", "generate"])
def test_missing_gpu_is_said_before_anything_runs(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"prior": {"id": "a/b"}, "image_encoder": {"id": "a/b"}}
    options = {
        "train-moa": ["--records", "a", "--subjects", "b", "--output", "c"],
        "generate": ["--subject", "a.png", "--prompt", "a man", "--out", "b.png"],
    }
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda, but PyTorch finds no GPU"):
        command_line.run(
            [stage, "--config", json.dumps({**models, "device": "cuda"}), *options[stage]],
        )


def test_a_stage_on_the_gpu_takes_one_of_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before it looks whether there is any; on the CPU it takes none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "HELD", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("torch.cuda.is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] == "4")
    monkeypatch.setattr(
        command_line, "_function", lambda name: (lambda config: None, {"config": ScoreConfig})
    )
    command_line.run(["score"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
    command_line.run(["score", "--change", '{"device": "cuda"}'])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"


def test_train_is_short_for_train_moa(capsys: pytest.CaptureFixture[str]) -> None:
    helps = []
    for stage in ("train", "train-moa"):
        with pytest.raises(SystemExit):
            command_line.run([stage, "--help"])
        helps.append(capsys.readouterr().out)
    assert "Train MoA from shards of records" in helps[0] and "--resume RESUME" in helps[0]
    assert helps[0] == helps[1]


def test_several_values_and_repeated_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def stage(files: list[Path], count: int = 1, flag: bool = False, names: tuple[str, ...] = ("a",)) -> None:
        seen.update(files=files, count=count, flag=flag, names=names)

    monkeypatch.setattr(command_line, "_function", lambda name: (stage, _hints(stage)))
    command_line.run(["merge", "--files", "a", "b", "--files", "c", "--flag", "--names", "x", "y"])
    assert seen == {"files": [Path("a"), Path("b"), Path("c")], "count": 1, "flag": True, "names": ["x", "y"]}


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("data/train-{000..002}.parquet", [f"data/train-00{n}.parquet" for n in range(3)]),
        ("moa=made-{098..101}.json", [f"moa=made-{n}.json" for n in ("098", "099", "100", "101")]),
        ("{7..7}", ["7"]),
        ('{"steps": 7}', ['{"steps": 7}']),
        ("plain.parquet", ["plain.parquet"]),
    ],
)
def test_numbered_files_are_one_word(argument: str, meant: list[str]) -> None:
    """A shell takes no line of 2,000 paths."""
    assert command_line.numbered(argument) == meant


def test_numbered_files_reach_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where a list of files is asked for: a prompt, a name or an output may have braces of its own."""
    seen: dict[str, object] = {}
    hints = {"files": list[Path], "more": Sequence[str | Path]}
    hints |= {"names": list[str], "prompt": str, "output": Path}

    def stage(files, more, names, prompt, output):
        seen.update(files=files, more=more, names=names, prompt=prompt, output=output)

    monkeypatch.setattr(command_line, "_function", lambda name: (stage, hints))
    texts = ["--names", "n{0..1}", "--prompt", "a man {000..003}", "--output", "o-{1..2}.csv"]
    command_line.run(["merge", "--files", "a-{08..10}", "b", "--more", "c{0..1}", *texts])
    assert seen == {
        "files": [Path("a-08"), Path("a-09"), Path("a-10"), Path("b")],
        "more": [Path("c0"), Path("c1")],
        "names": ["n{0..1}"],
        "prompt": "a man {000..003}",
        "output": Path("o-{1..2}.csv"),
    }


def _hints(function: object) -> dict:
    return {
        "files": list[Path],
        "count": int,
        "flag": bool,
        "names": tuple[str, ...],
        "return": type(None),
    }
