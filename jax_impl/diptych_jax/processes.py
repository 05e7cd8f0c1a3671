"""Several processes as one JAX program: who starts them says how they find each other; then a `World` for the hinge.

Slurm, Open MPI, TPU VM slices and GKE TPU jobs are recognised by JAX. Everywhere else three variables say it:
JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. (JAX reads the first by itself,
the other two are read here.) JAX_LOCAL_DEVICE_IDS=0,1 chooses this process's GPUs; without it a Slurm task takes the
one of its number on the node, and any other process all of them.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diptych.engine import EngineSettings
from diptych.errors import UserError
from diptych.world import SINGLE, World

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
START_SECONDS = 300  # for all processes to find each other
REMIND_SECONDS = 30
# A process that dies is missed after the first; one that stops with an error tells the others, which end at once, or
# waits for this long until they end too.
HEARTBEAT_SECONDS = 60
SHUTDOWN_SECONDS = 30


def start(settings: EngineSettings) -> None:
    """Join the other processes where the settings say that there are some; before any device is touched.

    Raises UserError where nothing says who they are or what says so is incomplete; JAX ends the process where they do
    not come.
    """
    if not settings.distributed or jax.distributed.is_initialized():
        return
    given = given_by(os.environ)
    where = given.get("coordinator_address", "the coordinator")
    # JAX ends the process where the others do not come, so what it waits for is said before.
    waiting = threading.Timer(
        REMIND_SECONDS,
        lambda: print(
            f"diptych: waiting for the other processes at {where} (until {START_SECONDS} s have passed): is every one "
            "of them running, and can they reach that address and port?",
            file=sys.stderr,
            flush=True,
        ),
    )
    waiting.daemon = True
    waiting.start()
    # JAX's preemption service would swallow SIGTERM, with which a cluster ends a job.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: nothing says which processes belong together ({error}): start them through srun, on a TPU "
            f"slice or through a JobSet (docs/clusters.md), or set {', '.join(VARIABLES)}; for one process leave "
            "--distributed away"
        ) from error
    except RuntimeError as error:
        raise UserError(f"--distributed: JAX could not join the processes at {where}: {error}") from error
    finally:
        waiting.cancel()


def given_by(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize` from the three variables; none where none is set (JAX then asks the
    cluster). UserError where only some are set, or make no sense."""
    found = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not found:
        return {}
    if missing := [name for name in VARIABLES if name not in found]:
        raise UserError(
            f"--distributed: {', '.join(found)} is set, {', '.join(missing)} is not: set all three, or none"
        )
    address, count, index = (found[name] for name in VARIABLES)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT of process 0, such as node1:8476")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(
            f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: expected numbers, and 0 <= JAX_PROCESS_ID < "
            "JAX_NUM_PROCESSES"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def world() -> World:
    """This process among the others; touches the devices."""
    if jax.process_count() == 1:
        return SINGLE
    _gather(np.zeros(1, np.uint8))  # on CPUs the first one must find everybody within 30 seconds, later ones wait
    return World(index=jax.process_index(), count=jax.process_count(), gather=_gather)


def _gather(message: np.ndarray) -> np.ndarray:
    """[bytes] of every process as [processes, bytes]."""
    return np.asarray(multihost_utils.process_allgather(message))
