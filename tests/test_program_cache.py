"""Compiled programs are kept between runs: bounded, in the user's folder, repaired where damaged."""

import warnings

import jax
import pytest

import decodax
from decodax import program_cache
from decodax.cli import session
from tests.golden_files import load_golden


@pytest.fixture
def settings():
    """Puts back what `program_cache.use` changes for the whole process."""
    names = ("persistent_cache_min_compile_time_secs", "compilation_cache_dir", "compilation_cache_max_size")
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_bounded_and_the_user_s_own_has_priority(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(program_cache.folder())
    assert program_cache.folder().is_relative_to(tmp_path / "decodax")
    assert jax.config.jax_compilation_cache_max_size == program_cache.MAX_BYTES
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0  # JAX's own 1 s leaves most programs out
    jax.config.update("jax_compilation_cache_dir", "chosen")
    program_cache.use()
    assert jax.config.jax_compilation_cache_dir == "chosen"


def test_loading_a_model_keeps_compiled_programs_unless_told_not_to(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = load_golden("llama").folder
    decodax.load(folder, compilation_cache=False)
    assert jax.config.jax_compilation_cache_dir is None
    decodax.load(folder)
    assert jax.config.jax_compilation_cache_dir == str(program_cache.folder())


def test_a_cache_that_cannot_be_written_is_reported_and_not_used(settings, monkeypatch, tmp_path):
    (tmp_path / "decodax").write_text("a file")
    monkeypatch.setattr(program_cache.os, "getpid", lambda: "x/y")  # a probe that fails, as on a full disk
    for chosen in ("/dev/null/cache", tmp_path, tmp_path / "new"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(chosen))
        with pytest.warns(UserWarning, match=f"not kept for the next run: {chosen}/.* cannot be written"):
            program_cache.use()
        assert jax.config.jax_compilation_cache_dir is None


def test_a_user_without_a_home_has_no_cache(settings, monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.warns(UserWarning, match="this user has no home directory"):
        program_cache.use()
    assert jax.config.jax_compilation_cache_dir is None


def cached(folder, name, *, note=None):
    (folder / f"{name}-cache").write_bytes(b"program")
    if note is not None:
        (folder / f"{name}-atime").write_bytes(note.to_bytes(8, "little"))


def files(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def own_cache(settings, tmp_path, monkeypatch):
    """The default folder of compiled programs, in use."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program_cache.use()
    return program_cache.folder()


READING = "Error reading persistent compilation cache entry for 'jit_f': zlib.error: Error -5"
WRITING = "Error writing persistent compilation cache entry for 'jit_f': OSError: [Errno 28] No space left: 'x'"


def test_a_damaged_program_is_removed_from_the_cache(own_cache):
    """JAX's warning does not name the program, but the file that JAX has just written does."""
    cached(own_cache, "good", note=7)
    cached(own_cache, "damaged", note=300)
    assert "damaged" in (program_cache.explain(READING) or "")
    assert files(own_cache) == ["damaged-atime", "good-atime", "good-cache"]


def test_a_program_without_a_note_does_not_prevent_writing_others(own_cache):
    cached(own_cache, "good", note=7)
    cached(own_cache, "left")
    assert "damaged" in (program_cache.explain(WRITING) or "")
    assert files(own_cache) == ["good-atime", "good-cache"]
    assert program_cache.explain(WRITING) == (
        "compiled programs are not kept for the next run: OSError: [Errno 28] No space left: 'x'"
    )
    assert program_cache.explain("top_k changes nothing") is None


def test_nothing_is_removed_from_a_foreign_cache(settings, tmp_path):
    """JAX writes no notes there, where the user set no bound."""
    cached(tmp_path, "theirs")
    cached(tmp_path, "noted", note=7)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    for warning in (READING, WRITING):
        assert program_cache.explain(warning) is not None
    assert files(tmp_path) == ["noted-atime", "noted-cache", "theirs-cache"]


@pytest.mark.filterwarnings("default")
def test_the_cache_warns_once(own_cache, capsys):
    with session.reported_errors(False):
        for program in "fgh":
            warnings.warn(f"Error writing persistent compilation cache entry for '{program}': full", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert capsys.readouterr().err == (
        "warning: compiled programs are not kept for the next run: full\nwarning: another\n"
    )
