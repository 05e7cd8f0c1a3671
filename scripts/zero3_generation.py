"""Generation under ZeRO-3 against stage 0, and against transformers' own generate under ZeRO-3: seconds of a rollout.

    python scripts/zero3_generation.py --processes 2

Processes of this script hold a Llama-shaped model (6 layers, width 512) at stage 0 and at stage 3 and generate in
turn, A B C A B C, with the same prompts and forced answers: natively from stage 0; natively from stage 3, where the
parameters are gathered once (that time is shown apart); and by transformers' generate on the ZeRO-3 module, which
gathers every layer for every token. Medians. All tokens are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8, help="prompts, of all processes together")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return measure(options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.processes), __file__, *sys.argv[1:]]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)}, check=False).returncode


def measure(options: argparse.Namespace) -> int:
    import torch

    from diptych.engine import EngineSettings, ModelSpec, OptimizerSpec, PromptBatch, Sampling, load_engine
    from diptych.layout import Layout, Zero
    from diptych.weights.huggingface import initial_checkpoint

    config = {
        "model_type": "llama", "vocab_size": options.vocab, "hidden_size": options.width,
        "intermediate_size": 4 * options.width, "num_hidden_layers": options.layers,
        "num_attention_heads": options.width // 64, "num_key_value_heads": max(1, options.width // 128),
        "rms_norm_eps": 1e-5, "max_position_embeddings": options.prompt + options.new,
    }  # fmt: skip
    weights = initial_checkpoint(config, seed=0).weights
    models: dict[int, Any] = {}
    for stage in (0, 3):
        settings = EngineSettings(precision="float32", distributed=True, layout=Layout(zero=Zero(stage=stage)))
        engine = load_engine("torch", settings)
        models[stage] = engine.model(
            ModelSpec(
                config=config, weights=weights, head="lm", optimizer=OptimizerSpec(name="adamw"), micro_batch_size=8
            )
        )
    rng = np.random.default_rng(0)
    shape = (options.rows, options.prompt)
    prompts = PromptBatch(
        tokens=rng.integers(0, options.vocab, shape).astype(np.int32), attention=np.ones(shape, bool),
        positions=np.tile(np.arange(options.prompt, dtype=np.int32), (options.rows, 1)),
    )  # fmt: skip
    greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=options.new, stop_token_ids=())
    uniforms = np.zeros((options.rows, options.new))
    switched: list[float] = []

    def native(stage: int) -> np.ndarray:
        tokens = models[stage].generate(prompts, greedy, uniforms, pad_token_id=0).tokens
        if stage == 3:
            switched.append(models[stage].rollout_metrics()["timing_s/switch"])
        return tokens

    mine = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())

    @torch.no_grad()
    def transformers_generate() -> np.ndarray:
        ids = torch.tensor(prompts.tokens[mine], dtype=torch.int64)
        made = models[3]._network.transformer.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, do_sample=False,
            pad_token_id=0, eos_token_id=None, synced_gpus=True,
        )  # fmt: skip
        return made[:, options.prompt :].numpy()

    ways: dict[str, Callable[[], np.ndarray]] = {
        "native, stage 0": lambda: native(0),
        "native, stage 3": lambda: native(3),
        "transformers generate, stage 3": transformers_generate,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        expected = None
        for name, way in ways.items():
            torch.distributed.barrier()
            start = time.perf_counter()
            tokens = way()
            torch.distributed.barrier()
            if repeat:  # the first is for warming up
                times[name].append(time.perf_counter() - start)
            local = tokens if len(tokens) != options.rows else tokens[mine]
            expected = local if expected is None else expected
            if not np.array_equal(local, expected):
                raise SystemExit(f"{name}: other tokens than the first way's")
    if engine.world.is_main:
        report(options, times, median(switched[1:]))
    return 0


def report(options: argparse.Namespace, times: dict[str, list[float]], gather: float) -> None:
    import deepspeed
    import torch
    import transformers

    print(
        f"{options.processes} processes x {options.threads} thread, {platform.processor() or platform.machine()}; "
        f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}\n"
        f"{options.layers} layers, width {options.width}, vocabulary {options.vocab}; {options.rows} rows, "
        f"{options.prompt} + {options.new} tokens, greedy, float32; medians of {options.repeats}"
    )
    middle = {name: median(values) for name, values in times.items()}
    middle["native, stage 3"] -= gather
    base = middle["native, stage 0"]
    for name, seconds in middle.items():
        note = f"  (and {gather:.3f} s to gather, once)" if name == "native, stage 3" else ""
        print(f"  {name:<32}{seconds:8.3f} s  {seconds / base:6.2f} x{note}")


if __name__ == "__main__":
    sys.exit(main())
