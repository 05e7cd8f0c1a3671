"""Law 1, seen at run time: the hinge loads no framework, and one engine does not load the other's."""

import subprocess
import sys

import pytest

HINGE = """
import pkgutil, importlib, diptych
for module in pkgutil.walk_packages(diptych.__path__, "diptych."):
    importlib.import_module(module.name)
"""


def frameworks_after(code: str, *forbidden: str) -> list[str]:
    report = f"\nimport sys\nprint([m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return eval(done.stdout.strip().splitlines()[-1])


def test_every_module_of_the_hinge_loads_without_a_framework():
    assert frameworks_after(HINGE, "jax", "flax", "torch", "deepspeed", "transformers", "tensorflow") == []


@pytest.mark.parametrize(("engine", "others"), [("diptych_jax", ("torch", "deepspeed")), ("diptych_torch", ("jax",))])
def test_an_engine_loads_only_its_own_framework(engine, others):
    for package in {"diptych_jax": ["jax"], "diptych_torch": ["torch"]}[engine]:
        pytest.importorskip(package)
    assert frameworks_after(f"import {engine}.engine", *others) == []


def test_canary_a_framework_import_is_seen():
    pytest.importorskip("jax")
    assert frameworks_after(HINGE + "\nimport jax", "jax", "torch") == ["jax"]
