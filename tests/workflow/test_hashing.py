"""A changed module must rerun the stages that use it, and no others."""

from pathlib import Path

import pytest

from moa.hashing import code_hash, model_files, model_hash, settings_hash, used_modules


@pytest.fixture
def package(tmp_path: Path) -> Path:
    files = {
        "moa/__init__.py": "from moa.core import f",
        "moa/core.py": "",
        "moa/part/__init__.py": "X = 1",
        "moa/part/a.py": "import torch\n\ndef g():\n    from ..core import f\n    from . import b",
        "moa/part/b.py": "from moa.part import X",
        "moa/part/c.py": "import moa.part.a as a",
        "moa/other.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_follows_lazy_relative_and_aliased_imports(package: Path) -> None:
    names = set(used_modules("moa.part.c", root=package))
    assert names == {"moa.part.c", "moa.part.a", "moa.part.b", "moa.core", "moa.part"}


def test_parent_packages_do_not_count(package: Path) -> None:
    assert set(used_modules("moa.other", root=package)) == {"moa.other"}


def test_a_star_names_a_whole_package(package: Path) -> None:
    assert {"moa.part.a", "moa.part.b", "moa.part.c"} <= set(used_modules("moa.part.*", root=package))


def test_changes_with_what_is_used_only(package: Path) -> None:
    code_hash.cache_clear()
    before = code_hash("moa.part.c", root=package), code_hash("moa.other", root=package)
    (package / "moa/core.py").write_text("f = 2")
    code_hash.cache_clear()
    after = code_hash("moa.part.c", root=package), code_hash("moa.other", root=package)
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_unknown_module_is_named(package: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"moa\.nothing"):
        used_modules("moa.nothing", root=package)


def test_settings_hash_ignores_key_order() -> None:
    assert settings_hash({"a": 1, "b": 2}) == settings_hash({"b": 2, "a": 1})
    assert settings_hash({"a": 1, "b": 2}) != settings_hash({"a": 1, "b": 3})


def test_models_change_with_their_files_and_not_with_their_cards(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    for name in ("config.json", "vocab.txt", "unet/model.safetensors"):
        (model / name).write_text(name)
    before = model_hash(model)
    for name in ("README.md", "log.csv", "recipe.json", "unet/vae-recipe.json", ".lock"):
        (model / name).write_text("about the model")
    assert model_hash(model) == before
    assert [f.name for f in model_files(model)] == ["config.json", "model.safetensors", "vocab.txt"]
    for name in ("config.json", "vocab.txt", "unet/model.safetensors"):
        (model / name).write_text("changed")
        assert model_hash(model) != before
        (model / name).write_text(name)
    (model / "vocab.txt").rename(model / "words.txt")
    assert model_hash(model) != before


def test_a_model_may_be_one_file_or_missing(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("one")
    before = model_hash(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_text("two")
    assert model_hash(tmp_path / "weights.pt") != before
    assert model_files(tmp_path / "none") == []
