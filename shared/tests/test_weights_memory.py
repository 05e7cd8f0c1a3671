"""Host memory: reading and writing hold a tensor at a time, not a model; and the script that measures it at scale."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diptych.engine import Model

ROOT = Path(__file__).parents[2]

# A model of 8 layers, 54 MiB in bfloat16 in shards of 4 MiB; its largest tensor has 3 MiB in float32.
STREAM = """
import sys
from dataclasses import replace
from pathlib import Path
from diptych.weights.huggingface import initial_checkpoint, read_checkpoint, write_checkpoint

def status(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))

folder, whole = Path(sys.argv[1]), sys.argv[2] == "whole"
config = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536,
          "num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
write_checkpoint(folder / "a", initial_checkpoint(config, seed=0), tokenizer_directory=folder, dtype="bfloat16",
                 max_shard_bytes=2**22)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
checkpoint = read_checkpoint(folder / "a", precision="float32")
if whole:
    checkpoint = replace(checkpoint, weights=dict(checkpoint.weights))
write_checkpoint(folder / "b", checkpoint, tokenizer_directory=folder / "a", dtype="bfloat16", max_shard_bytes=2**22)
print((status("VmHWM") - before) / 1024)
"""


def peak_mib(folder, how):
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(folder), how], capture_output=True, text=True, check=True
    )  # fmt: skip
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured through Linux's /proc")
def test_copying_a_model_holds_a_tensor_at_a_time(tmp_path):
    total = 8 * (4 * 512 * 512 + 3 * 512 * 1536) * 4 / 2**20  # MiB of the layers in float32: 104
    assert peak_mib(tmp_path / "stream", "stream") < 1.3 * 4 + 16  # a shard, and what the allocator keeps
    assert peak_mib(tmp_path / "whole", "whole") > 0.9 * total  # canary: a model that is read at once is seen


class Engine(Model):
    def __init__(self, bug):
        self.bug = bug

    def model(self, spec):
        self.held = {name: np.array(value) for name, value in spec.weights.items()}
        return self

    def logprobs(self, batch, *, temperature):
        return np.full(batch.tokens.shape, -1.0)

    def weights(self, names=None):
        return {name: self.held[name] + self.bug for name in names or self.held}


@pytest.mark.parametrize("bug", [0, 1])
def test_the_script_measures_and_compares(tmp_path, monkeypatch, capsys, bug):
    spec = importlib.util.spec_from_file_location("import_memory", ROOT / "scripts" / "import_memory.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "import_memory", script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "load_engine", lambda name, settings: Engine(np.float32(bug)))
    command = ["--engine", "jax", "--folder", str(tmp_path / "x"), "--small", "--max-shard-size", "50KB"]
    assert script.main([*command, "--json", str(tmp_path / "found.json")]) == bug
    found = json.loads((tmp_path / "found.json").read_text())
    assert [step["name"] for step in found["steps"]] == ["write", "start", "import", "evaluate", "export"]
    assert found["identical"] == (bug == 0)
    assert found["mean_logprob"] == -1
    assert "of the largest shard" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
