"""What a run ran on: enough to say later why its numbers are what they are. Imports no framework."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import diptych

# Distributions whose version can reach a number, a file format or a speed.
PACKAGES = (
    "array-api-compat", "deepspeed", "flax", "jax", "jaxlib", "jinja2", "ml-dtypes", "numpy", "optax",
    "orbax-checkpoint", "pyyaml", "safetensors", "tensorboard", "tokenizers", "torch", "transformers", "triton",
    "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
)  # fmt: skip


def describe_environment(engine: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Python, platform, processors, memory (GiB), package versions, Diptych's version and commit; `engine` as given."""
    return {
        "diptych": diptych.__version__,
        "git_commit": git_commit(Path(diptych.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processors": _processors(),
        "memory_gib": _memory_gib(),
        "packages": {name: version for name in sorted(PACKAGES) if (version := _version(name)) is not None},
        "engine_environment": dict(engine or {}),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that `folder`'s source is at, "+changes" appended where tracked files differ; None outside a checkout.

    A package installed into an environment that lies inside someone's repository is not of that repository.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit if _git(folder, "diff", "--quiet", "HEAD") is not None else f"{commit}+changes"


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's answer, None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processors() -> int | None:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
