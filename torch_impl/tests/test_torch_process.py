"""A fresh process: what starting the engine prints, sets and imports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TRAIN = """
import warnings
warnings.simplefilter("default")
import os
import numpy as np
from diptych.layout import Layout, Zero
from diptych.engine import EngineSettings, Loss, ModelSpec, OptimizerSpec, TokenBatch, TrainBatch, load_engine
from diptych.weights.huggingface import initial_checkpoint

config = dict(
    model_type="llama", vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    rms_norm_eps=1e-5, max_position_embeddings=8,
)
engine = load_engine("torch", EngineSettings(precision="PRECISION", layout=Layout(zero=Zero(stage=STAGE))))
model = engine.model(
    ModelSpec(
        config=config, weights=initial_checkpoint(config, seed=0).weights, head="lm",
        optimizer=OptimizerSpec(name="adamw"), micro_batch_size=2,
    )
)
tokens = np.ones((4, 4), np.int32)
batch = TokenBatch(tokens=tokens, attention=tokens > 0, positions=np.tile(np.arange(4, dtype=np.int32), (4, 1)))
loss = Loss(function=lambda logprobs, **_: (logprobs.sum(), {}), reads="logprobs")
model.update(loss, TrainBatch(tokens=batch, arrays={}, denominators={}), learning_rate=1e-3)
assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE", os.environ["OMP_WAIT_POLICY"]
assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()  # a child may be an engine too
"""


def python(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    unset = (*RANKS, "OMP_WAIT_POLICY", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", code], env={**environment, **changes}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "float32"),
        pytest.param(3, "float32", marks=pytest.mark.slow),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_one_process_starts_alone_and_says_nothing(stage, precision, tmp_path):
    """Without a launcher; and with no compiler in sight, for nothing may be compiled."""
    code = TRAIN.replace("STAGE", str(stage)).replace("PRECISION", precision)
    done = python(code, CXX="/bin/false", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not any(tmp_path.iterdir())
    assert "deepspeed" not in done.stderr.lower().replace("site-packages/deepspeed", ""), done.stderr
    assert "torch.distributed" not in done.stderr, done.stderr


def test_importing_the_package_loads_no_framework_and_respects_the_user():
    code = "import sys, os, diptych_torch; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    assert python(code).stdout.split() == ["False", "PASSIVE"]
    assert python(code, OMP_WAIT_POLICY="ACTIVE").stdout.split() == ["False", "ACTIVE"]


START = """
from diptych.engine import EngineSettings, load_engine
try:
    load_engine("torch", EngineSettings(precision="float32", distributed=DISTRIBUTED))
except ValueError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("distributed", "environment", "message"),
    [
        (
            False,
            {"WORLD_SIZE": "2", "RANK": "0"},
            "UserError WORLD_SIZE is 2: a launcher started several processes: add",
        ),
        (True, {}, "UserError --distributed: nothing says which processes belong together"),
        (True, {"RANK": "0"}, "UserError --distributed: torchrun or deepspeed set RANK, but WORLD_SIZE, LOCAL_RANK"),
    ],
    ids=["several without --distributed", "--distributed alone", "half a launcher"],
)
def test_launcher_and_settings_must_say_the_same(distributed, environment, message):
    done = python(START.replace("DISTRIBUTED", str(distributed)), **environment)
    assert done.stdout.startswith(message), done.stderr


CPU_ONLY = """
import torch
torch.cuda.is_available = lambda: True
from diptych.layout import Layout, Zero
from diptych.engine import EngineSettings, load_engine
engine = load_engine("torch", EngineSettings(precision="float32", device="cpu"))
from deepspeed.accelerator import get_accelerator
print(engine.device, get_accelerator().device_name(), engine.environment()["device"])
get_accelerator().device_name = lambda: "cuda"  # as if another engine had started an accelerator before
try:
    load_engine("torch", EngineSettings(precision="float32", device="cpu"))
except ValueError as error:
    print(type(error).__name__, error)
"""


def test_the_device_cpu_keeps_off_an_accelerator_that_is_there():
    done = python(CPU_ONLY, DS_ACCELERATOR="cuda")
    assert done.stdout.splitlines()[0] == "cpu cpu cpu", done.stderr
    assert done.stdout.splitlines()[1].startswith("UserError this process already runs on cuda"), done.stderr
