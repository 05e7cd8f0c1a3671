"""Other trainers on the same work: TRL's PPO and GRPO, Tunix's PPO, by scripts that are not ours (`peer_runner.py`).

The scripts and the environments with those trainers are the user's; here a workload is put in the scripts' words, or
refused where a script cannot do the same work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.bench.contest import Contestant, thread_environment
from diptych.bench.workloads import Workload
from diptych.errors import UserError

RUNNER = Path(__file__).with_name("peer_runner.py")
ITERATIONS = 500  # at most: the scripts make that many prompts before they begin
GROUP = 4  # answers to a prompt in GRPO

INSTALL: Mapping[str, str] = {
    "trl": "torch==2.13.0 transformers accelerate datasets requests trl==1.12.0",
    "tunix": "torch==2.13.0 google-tunix==0.1.7 jax==0.10.2",
}
"""What pip is told to install, by environment."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TQDM_DISABLE": "1",
}
OWN = {"PYTHONPATH": "", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""Nothing of ours reaches a peer; the scripts are for CPUs."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """script: its file. environment: folder of the virtual environment. packages: whose versions are told.
    differs: in what its work is not an engine's, on every workload. arguments: of the script for a workload and
    threads; UserError where it cannot."""

    script: str
    environment: str
    packages: Sequence[str]
    differs: Sequence[str]
    arguments: Callable[[Workload, int], list[str]]


def peer(
    name: str, workload: Workload, *, scripts: Path, environments: Path, threads: int, cores: Sequence[int], log: Path
) -> Contestant:
    """A peer at a workload, ready to start. UserError where it cannot do the work, or is not there."""
    one = PEERS.get(name)
    if one is None:
        raise UserError(f"no peer {name!r}: there are {', '.join(PEERS)}")
    arguments = one.arguments(workload, threads)
    script, python = scripts / one.script, environments / one.environment / "bin" / "python"
    if not script.is_file():
        raise UserError(f"{script}: no such file: say with --peers where the scripts of the other trainers are")
    if not python.is_file():
        raise UserError(f"{python}: no such file: make it with\n{install(environments)}")
    asked = {
        "script": str(script.resolve()),
        "arguments": arguments,
        "watch": one.environment,
        "packages": one.packages,
        "about": {
            "command": " ".join([one.script, *arguments]),
            "differs": [*one.differs, *differences(name, workload)],
        },
    }
    return Contestant(
        name,
        "peer",
        [str(python.absolute()), str(RUNNER), json.dumps(asked)],
        environment=thread_environment(threads) | OFFLINE | OWN,
        cores=cores,
        log=log,
    )


def install(environments: Path) -> str:
    """The commands that make the peers' environments."""
    return "\n".join(
        f"  python3.11 -m venv {environments / name} && {environments / name}/bin/pip install {packages}"
        for name, packages in INSTALL.items()
    )


def differences(name: str, workload: Workload) -> list[str]:
    """In what a peer's work is not an engine's, on this workload."""
    found = []
    if workload.precision == "bfloat16":
        found.append("weights and moments are bfloat16, without float32 masters")
    if name == "tunix-ppo":
        if workload.architecture == "opt":
            found.append("Qwen2 of OPT's size, its embedding not tied to the head")
        if workload.architecture == "llama":
            found.append("Qwen2: a Llama with biases on query, key and value")
    return found


def _trl(workload: Workload, threads: int, name: str) -> list[str]:
    """What TRL's two scripts share."""
    _refuse(name, workload)
    tied = workload.architecture == "opt"  # what the script builds
    if workload.tied is not tied:
        raise UserError(f"{name} has {workload.architecture} with tied={str(tied).lower()} only")
    if workload.remat == "dots":
        raise UserError(f"{name} has no remat=dots: full or none are the choices")
    options = {
        "arch": workload.architecture,
        "layers": workload.layers,
        "d_model": workload.width,
        "heads": workload.heads,
        "kv_heads": workload.kv_heads or workload.heads,
        "ffn": workload.mlp,
        "vocab": workload.vocabulary,
        "batch": workload.batch,
        "micro_batch": workload.rows_at_once,
        "prompt_len": workload.prompt,
        "gen_len": workload.answer,
        "dtype": {"float32": "fp32", "bfloat16": "bf16"}[workload.precision],
        **({"threads": threads} if threads else {}),
        "seed": workload.seed,
        "steps": ITERATIONS,
    }
    flags = {"ragged": workload.ragged, "stop_eos": not workload.forced, "grad_ckpt": workload.remat == "full"}
    return [*_options(options), *(f"--{flag}" for flag, wanted in flags.items() if wanted)]


def _trl_ppo(workload: Workload, threads: int) -> list[str]:
    if not workload.forced:
        raise UserError("trl-ppo counts padding as generated tokens where lengths are free: use forced=true")
    if workload.mini_batches > 1:
        # Its accelerator accumulates over all mini-batches: one step an epoch, whatever num_mini_batches says.
        raise UserError("trl-ppo takes one optimizer step an epoch, not one a mini-batch: use mini_batches=1")
    return [*_trl(workload, threads, "trl-ppo"), *_options({"ppo_epochs": workload.epochs, "minibatches": 1})]


def _trl_grpo(workload: Workload, threads: int) -> list[str]:
    if workload.batch % GROUP:
        raise UserError(f"trl-grpo has {GROUP} answers to a prompt: batch must be a multiple, got {workload.batch}")
    if workload.mini_batches > 1:
        raise UserError("trl-grpo takes one optimizer step a pass: use mini_batches=1")
    return [*_trl(workload, threads, "trl-grpo"), *_options({"group": GROUP, "iters": workload.epochs})]


def _tunix_ppo(workload: Workload, threads: int) -> list[str]:
    """threads: XLA takes the cores that the process may use."""
    del threads
    _refuse("tunix-ppo", workload)
    is_opt = workload.architecture == "opt"
    if workload.tied and not is_opt:
        raise UserError("tunix-ppo has no tied embeddings: use tied=false")
    if workload.ragged:
        raise UserError("tunix-ppo has prompts of one length: use ragged=false")
    if workload.remat != "none":
        raise UserError("tunix-ppo keeps all activations: use remat=none")
    options = {
        "family": "qwen2",
        "layers": workload.layers,
        "d-model": workload.width,
        "heads": workload.heads,
        "kv-heads": workload.heads if is_opt else workload.kv_heads or workload.heads,
        # OPT's two matrices have the numbers of three that are two thirds as wide.
        "d-ff": round(workload.mlp * 2 / 3) if is_opt else workload.mlp,
        "vocab": workload.vocabulary,
        "batch": workload.batch,
        "mini-batch": workload.batch // workload.mini_batches,
        "micro-batch": workload.rows_at_once,
        "ppo-epochs": workload.epochs,
        "prompt-len": workload.prompt,
        "gen-len": workload.answer,
        "dtype": workload.precision,
        "seed": workload.seed,
        "iters": ITERATIONS,
    }
    return [*_options(options), *([] if workload.forced else ["--with-eos"])]


def _refuse(name: str, workload: Workload) -> None:
    """UserError for what no peer has."""
    if workload.architecture == "rnn":
        raise UserError(f"{name} has no recurrent models: leave it out of workload {workload.name}")
    if workload.precision == "float64":
        raise UserError(f"{name} has no float64: float32 or bfloat16 are the choices")
    if workload.zero:
        raise UserError(f"{name} runs on a CPU without DeepSpeed: use zero=0")


def _options(options: Mapping[str, object]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


PEERS: Mapping[str, Peer] = {
    "trl-ppo": Peer(
        script="trl_ppo.py",
        environment="trl",
        packages=("trl", "transformers", "torch"),
        differs=("one optimizer for policy and critic",),
        arguments=_trl_ppo,
    ),
    "trl-grpo": Peer(
        script="trl_grpo.py",
        environment="trl",
        packages=("trl", "transformers", "torch"),
        differs=(f"GRPO: no critic, {GROUP} answers to a prompt",),
        arguments=_trl_grpo,
    ),
    "tunix-ppo": Peer(
        script="tunix_ppo.py",
        environment="tunix",
        packages=("google-tunix", "jax", "flax"),
        differs=("the reward is a rule: no reward model",),
        arguments=_tunix_ppo,
    ),
}
