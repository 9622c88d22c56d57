from pathlib import Path

import pytest

from tests.unit.tools.fake_commands import FakeCommands, fake_commands
from tools.demo.cache import Recipe, cache_folder, cached_paths, ready_store
from tools.demo.errors import CacheError, StepFailed


@pytest.fixture
def fakes(tmp_path: Path) -> FakeCommands:
    state = tmp_path / "state"
    state.mkdir()
    return fake_commands(state)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A repository with one file in each folder that decides the bytes."""
    for name in (
        "protocol/version.py",
        "quant/packing.py",
        "expertd/convert/write.py",
        "tools/demo_checkpoint/plan.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    (tmp_path / "expertd" / "server.py").write_text("1")
    (tmp_path / "demo.toml").write_text("1")
    return Recipe(root=tmp_path, config=tmp_path / "demo.toml", gguf=None)


def store_of(recipe: Recipe) -> Path:
    return cached_paths(Path("cache"), recipe).store


@pytest.mark.parametrize(
    "changed",
    [
        "demo.toml",
        "protocol/version.py",
        "quant/packing.py",
        "expertd/convert/write.py",
        "tools/demo_checkpoint/plan.py",
    ],
)
def test_what_changes_the_bytes_changes_the_stores_name(recipe: Recipe, changed: str) -> None:
    before = store_of(recipe)

    (recipe.root / changed).write_text("2")

    assert store_of(recipe) != before


def test_a_new_module_changes_the_stores_name(recipe: Recipe) -> None:
    before = store_of(recipe)

    (recipe.root / "quant" / "solver.py").write_text("1")

    assert store_of(recipe) != before


def test_what_only_serves_the_bytes_leaves_the_stores_name(recipe: Recipe) -> None:
    before = store_of(recipe)

    (recipe.root / "expertd" / "server.py").write_text("2")

    assert store_of(recipe) == before


def test_another_source_model_changes_the_checkpoints_name(recipe: Recipe, tmp_path: Path) -> None:
    gguf = tmp_path / "other.gguf"
    gguf.write_text("another model")
    other = Recipe(root=recipe.root, config=recipe.config, gguf=gguf)

    paths, others = cached_paths(Path("cache"), recipe), cached_paths(Path("cache"), other)

    assert paths.checkpoint != others.checkpoint
    assert paths.store != others.store


def test_another_configuration_keeps_the_checkpoint(recipe: Recipe) -> None:
    before = cached_paths(Path("cache"), recipe).checkpoint

    recipe.config.write_text("2")

    assert cached_paths(Path("cache"), recipe).checkpoint == before


def test_a_missing_configuration_is_named(recipe: Recipe) -> None:
    recipe.config.unlink()

    with pytest.raises(CacheError, match=r"demo\.toml: cannot be read"):
        store_of(recipe)


def test_a_store_is_built_once(recipe: Recipe, fakes: FakeCommands, tmp_path: Path) -> None:
    first = ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)
    second = ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)

    calls = [call.split()[0] for call in fakes.calls()]

    assert first == second
    assert calls == ["demo_checkpoint", "expertd"]


def test_a_stale_store_is_built_anew_and_removed(recipe: Recipe, fakes: FakeCommands, tmp_path: Path) -> None:
    stale = ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)
    recipe.config.write_text("2")

    fresh = ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)

    assert fakes.calls().count("expertd quantize") == 2
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["lock", fresh.name]
    assert stale != fresh


@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_the_checkpoint_stays_only_if_asked_for(recipe: Recipe, fakes: FakeCommands, tmp_path: Path, keep: str) -> None:
    ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=keep == "keep")

    assert cached_paths(tmp_path / "cache", recipe).checkpoint.exists() == (keep == "keep")


def test_what_is_not_the_demos_own_stays_in_the_cache(recipe: Recipe, fakes: FakeCommands, tmp_path: Path) -> None:
    mine = tmp_path / "cache" / "mine"
    mine.mkdir(parents=True)

    ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)

    assert mine.exists()


def test_a_failed_quantization_is_not_taken_for_a_store(recipe: Recipe, fakes: FakeCommands, tmp_path: Path) -> None:
    fakes.replace("expertd", "exit 5")

    with pytest.raises(StepFailed) as caught:
        ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)

    assert caught.value.exit_code == 5
    assert not cached_paths(tmp_path / "cache", recipe).store.exists()


def test_the_disk_that_is_needed_is_said_up_front(
    recipe: Recipe, fakes: FakeCommands, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)

    said = capfd.readouterr().out
    assert said.index("GB of disk") < said.index("$ ")


def test_no_room_is_an_error_before_anything_is_built(
    recipe: Recipe, fakes: FakeCommands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.demo.cache.CHECKPOINT_NBYTES", 1 << 60)

    with pytest.raises(CacheError, match="set XDG_CACHE_HOME"):
        ready_store(tmp_path / "cache", recipe, fakes.commands, keep_checkpoint=False)

    assert fakes.calls() == []


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CACHE_HOME": "/big/cache"}, "/big/cache/expertd/demo"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/expertd/demo"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/expertd/demo"),
        ({}, "/home/me/.cache/expertd/demo"),
    ],
)
def test_the_cache_follows_the_xdg_rules(environ: dict[str, str], expected: str) -> None:
    folder = cache_folder(environ, Path("/home/me"))

    assert folder == Path(expected)
