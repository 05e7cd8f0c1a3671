"""Compilations: counted, an error after warm-up, and kept on disk where that is possible."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from diptych.errors import InvariantError
from diptych_jax import compilations


def test_a_program_is_counted_once():
    double = jax.jit(lambda x: x * 2)
    x, y = jnp.zeros(3), jnp.zeros(4)
    before = compilations.count()
    double(x)
    assert compilations.count() == before + 1
    double(x)
    assert compilations.count() == before + 1
    double(y)
    assert compilations.count() == before + 2


def test_a_compilation_after_warm_up_is_an_error():
    warm, double = compilations.Warm(), jax.jit(lambda x: x * 2)
    short, long = jnp.zeros(5), jnp.zeros(6)
    for x in (short, short, long, short):
        with warm.call("scores", x.shape):
            double(x)
    other = jnp.zeros(5, jnp.int32)
    message = r"scores recompiled after warm-up: 1 program for \(\(5,\),\)"
    with pytest.raises(InvariantError, match=message), warm.call("scores", other.shape):
        double(other)  # the key does not say the type
    with warm.call("logprobs", short.shape):
        jax.jit(lambda x: x * 3)(short)  # another call's key


def test_a_call_that_fails_is_not_warm():
    warm, x = compilations.Warm(), jnp.zeros(7)
    with pytest.raises(ZeroDivisionError), warm.call("update", 7):
        raise ZeroDivisionError
    with warm.call("update", 7):
        jax.jit(lambda x: x * 5)(x)


def _folder():
    return getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  (no attribute that a type checker knows)


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """No folder configured, none chosen; JAX's settings as before afterwards."""
    names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("DIPTYCH_COMPILATION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("no_cache")
def test_the_cache_has_a_folder(tmp_path, monkeypatch):
    assert compilations.enable_cache(jax.devices()[:1]) == tmp_path / "diptych" / "jax"
    assert _folder() == str(tmp_path / "diptych" / "jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert (
        compilations.enable_cache(jax.devices()[:1]) == tmp_path / "diptych" / "jax"
    )  # the one that is configured stays


@pytest.mark.usefixtures("no_cache")
def test_the_cache_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("DIPTYCH_COMPILATION_CACHE", "off")
    assert compilations.enable_cache(jax.devices()[:1]) is None
    assert _folder() is None


@pytest.mark.usefixtures("no_cache")
def test_programs_for_several_cpu_devices_are_not_kept(tmp_path, capsys):
    """Read back, they deadlock: the second run of any mesh test hung and was aborted while they were."""
    jax.config.update("jax_enable_compilation_cache", True)
    assert compilations.enable_cache(jax.devices()) is None
    assert not getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  (as above)
    assert capsys.readouterr().err == ""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilations.enable_cache(jax.devices()) is None
    assert f"{tmp_path} is not used" in capsys.readouterr().err


@pytest.mark.usefixtures("no_cache")
def test_a_folder_that_cannot_be_written_is_a_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilations.enable_cache(jax.devices()[:1]) is None
    assert _folder() is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert str(Path("file", "diptych", "jax")) in lines[0]
    assert "cannot be written" in lines[0]
