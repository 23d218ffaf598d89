"""A changed module must rerun the stages that use it, and no others."""

from pathlib import Path

import pytest

from moa.hashing import (
    REGISTERED,
    code_hash,
    model_files,
    model_hash,
    registering,
    settings_hash,
    used_modules,
)


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


def test_another_method_is_none_of_a_methods_code(package: Path) -> None:
    """Images of a method are made again for its own module, and what that imports, alone."""
    (package / "moa/baselines").mkdir()
    (package / "moa/miniature").mkdir()
    sources = {
        "baselines/prior": "@register('prior')\ndef make(): ...",
        "baselines/words": "from moa.baselines.prior import make\n@register('words')\ndef f(): ...",
        "baselines/computed": "NAME = 'odd'\n@register(NAME)\ndef f(): ...",
        "miniature/ceiling": "@register('ceiling')\ndef make(): ...",
    }
    for name, text in sources.items():
        (package / f"moa/{name}.py").write_text(text)

    def codes() -> dict[str, str]:
        code_hash.cache_clear()
        names = ("prior", "words", "ceiling", "odd")
        return {name: code_hash("moa.other", *registering(name, package), root=package) for name in names}

    def changed(module: str, text: str) -> set[str]:
        before = codes()
        (package / f"moa/{module}.py").write_text(text)
        return {name for name, code in codes().items() if code != before[name]}

    assert registering("words", package) == ("moa.baselines.words",)
    assert registering("odd", package) == REGISTERED
    assert changed("baselines/portrait", "@register('portrait')\ndef make(): ...") == {"odd"}
    assert changed("baselines/words", sources["baselines/words"] + " # new") == {"words", "odd"}
    assert changed("baselines/prior", sources["baselines/prior"] + " # new") == {"prior", "words", "odd"}
    assert changed("other", "X = 1") == {"prior", "words", "ceiling", "odd"}


def test_every_method_is_registered_where_its_code_is_looked_for() -> None:
    """Its images' key and the workflow's jobs follow the module that its factory is of."""
    from moa import methods, stages

    for name in methods.method_names():
        (module,) = registering(name)
        assert module == methods.METHODS[name].__module__
        used = used_modules("moa.generation", *registering(name))
        other = {m for m in used_modules("moa.generation", *REGISTERED) if m not in used}
        assert other and stages.code("generate-shard", name) == code_hash("moa.generation", module)


def test_the_attention_under_test_is_none_of_the_judges_code() -> None:
    """Or an edit of MoA would score the images of all other methods again."""
    from moa import stages

    used = used_modules(stages.STAGES["score"].module)
    assert stages.code("score") == code_hash(stages.STAGES["score"].module)
    assert "moa.evaluation.features" in used
    assert [name for name in used if name == "moa.attention" or name.startswith("moa.baselines")] == []


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
    (model / ".cache/download").mkdir(parents=True)
    (model / ".cache/download/config.json.metadata").write_text("when it was fetched")
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
