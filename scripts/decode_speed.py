"""How fast the torch engine's rollouts are: against transformers' own `generate` with its cache, and with refilled
slots against groups one after another. The same random Llama-shaped weights on both sides, alternating runs, medians.

    python scripts/decode_speed.py                     # CPU, float32, one thread and two
    python scripts/decode_speed.py --gpu               # one CUDA device, bfloat16, captured and plain steps
    python scripts/decode_speed.py --rows 8 --prompt 256 --new 256 --rounds 3

Both sides draw as many tokens as are asked for (no stop token) and read the prompts anew. Greedy tokens are compared;
sampled ones cannot be, since transformers draws from its own generator.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from diptych.engine import Completions, ModelSpec, PromptBatch, Sampling
from diptych_torch.capture import CannotCapture
from diptych_torch.decode import Decoder
from diptych_torch.model import build

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def models(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """transformers' model and our network of the same weights."""
    torch.manual_seed(0)
    settings = {name: value for name, value in CONFIG.items() if name != "model_type"}
    theirs: Any = LlamaForCausalLM(LlamaConfig(**settings, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim == 2:
                weight *= 4  # far from uniform distributions: few near-ties
    weights = {name: weight.numpy() for name, weight in theirs.state_dict().items()}
    spec = ModelSpec(config=CONFIG, weights=weights, head="lm", optimizer=None, micro_batch_size=1)
    return theirs.to(device, dtype), build(spec, dtype, device)


def prompts(rows: int, width: int) -> PromptBatch:
    tokens = np.random.default_rng(0).integers(1, CONFIG["vocab_size"], (rows, width), dtype=np.int32)
    positions = np.tile(np.arange(width, dtype=np.int32), (rows, 1))
    return PromptBatch(tokens=tokens, attention=np.ones((rows, width), bool), positions=positions)


def alternated(runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, after one run that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for count in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if count:
                seconds[name].append(clock() - start)
    return {name: median(values) for name, values in seconds.items()}


class Sides:
    """Both sides of one comparison."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device):
        self.device = device
        self.new = arguments.new
        self.given = prompts(arguments.rows, arguments.prompt)
        self.uniforms = np.random.default_rng(1).random((arguments.rows, arguments.new), dtype=np.float32)
        self.ids = torch.tensor(self.given.tokens, dtype=torch.int64, device=device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model, self.network = models(device, self.dtype)
        self.decoder = Decoder(self.network, device)

    def ours(self, temperature: float, decoder: Decoder | None = None) -> Completions:
        how = Sampling(temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=self.new, stop_token_ids=())
        return (decoder or self.decoder).generate(self.given, how, self.uniforms, pad_token_id=0)

    @torch.inference_mode()
    def theirs(self, temperature: float) -> torch.Tensor:
        sampled = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        tokens = self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), do_sample=bool(temperature), **sampled,
            max_new_tokens=self.new, pad_token_id=0,
        )  # fmt: skip
        return tokens[:, self.ids.shape[1] :].cpu()  # waits for the device


def refuse(step: Callable[[], None]) -> Callable[[], None]:
    raise CannotCapture("as asked, for comparison")


def against_transformers(arguments: argparse.Namespace, device: torch.device) -> None:
    sides = Sides(arguments, device)
    total = sides.given.tokens.shape[0] * sides.new
    for temperature, kind in ((0.0, "greedy"), (1.0, "sampled")):
        runs = {"diptych": partial(sides.ours, temperature), "transformers": partial(sides.theirs, temperature)}
        if device.type == "cuda":
            runs["diptych, plain steps"] = partial(
                sides.ours, temperature, Decoder(sides.network, device, capture=refuse)
            )
        seconds = alternated(runs, arguments.rounds, time.perf_counter)
        for name, value in seconds.items():
            print(f"  {kind:8} {name:21} {total / value:9,.0f} tokens/s  {1e3 * value / sides.new:6.2f} ms/step")
        print(f"  {kind:8} ratio {seconds['transformers'] / seconds['diptych']:.2f}")
    print(f"  {sides.decoder.describe()}")
    found, expected = sides.ours(0.0), sides.theirs(0.0).numpy()
    different = np.flatnonzero((found.tokens != expected).any(axis=1))
    for row in different:
        column = int((found.tokens[row] != expected[row]).argmax())
        print(f"  greedy row {row} parts at column {column}, where our margin is {found.margins[row, column]:.1e}")
    print(f"  greedy tokens equal in {len(expected) - len(different)} of {len(expected)} rows")


def refilled_slots(arguments: argparse.Namespace, device: torch.device) -> None:
    """Answers of geometric length: a stop token has one chance in 24 at each step of a uniform model."""
    sides = Sides(arguments, device)
    rows, slots = 4 * arguments.rows, arguments.rows
    with torch.no_grad():
        for weight in sides.network.transformer.lm_head.parameters():
            weight.zero_()  # uniform: lengths are geometric
    given = prompts(rows, arguments.prompt)
    uniforms = np.random.default_rng(2).random((rows, arguments.new), dtype=np.float32)
    how: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": arguments.new}
    how["stop_token_ids"] = tuple(range(CONFIG["vocab_size"] // 24))

    def rollout(part: slice, decode_rows: int | None) -> Completions:
        batch = PromptBatch(tokens=given.tokens[part], attention=given.attention[part], positions=given.positions[part])
        return sides.decoder.generate(batch, Sampling(**how, decode_rows=decode_rows), uniforms[part], pad_token_id=0)

    groups = [slice(start, start + slots) for start in range(0, rows, slots)]
    runs = {
        f"{slots} slots, refilled": lambda: rollout(slice(None), slots),
        f"groups of {slots}": lambda: [rollout(group, None) for group in groups],
        "all rows at once": lambda: rollout(slice(None), None),
    }
    seconds = alternated(runs, arguments.rounds, time.process_time if device.type == "cpu" else time.perf_counter)
    lengths = runs[f"{slots} slots, refilled"]().mask.sum(axis=1)
    print(f"  {rows} answers of {lengths.mean():.1f} tokens on average, the longest {lengths.max()}")
    for name, value in seconds.items():
        print(f"  {name:21} {value:6.3f} s{' of CPU' if device.type == 'cpu' else ''}")


def peak_memory(arguments: argparse.Namespace, device: torch.device) -> None:
    """Of each side alone, beyond what was there before its first rollout."""
    for side in ("ours", "theirs"):
        if device.type == "cuda":
            sides = Sides(arguments, device)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            getattr(sides, side)(1.0)
            peak = torch.cuda.max_memory_allocated() - before
        else:
            command = [sys.executable, __file__, "--memory-of", side]
            for name in ("rows", "prompt", "new"):
                command += [f"--{name}", str(getattr(arguments, name))]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(f"  {'diptych' if side == 'ours' else 'transformers':21} {peak / 2**20:6.0f} MiB")


def resident(field: str) -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on the first CUDA device, in bfloat16")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch, on the CPU")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch sees no CUDA device here")
    device = torch.device("cuda" if arguments.gpu else "cpu")
    if arguments.memory_of:
        sides = Sides(arguments, device)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
        before = resident("VmRSS")
        getattr(sides, arguments.memory_of)(1.0)
        print(resident("VmHWM") - before)
        return
    where = torch.cuda.get_device_name() if arguments.gpu else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")
    print(f"{arguments.rows} rows, {arguments.prompt} + {arguments.new} tokens, median of {arguments.rounds} runs each")
    for threads in [torch.get_num_threads()] if arguments.gpu else arguments.threads:
        torch.set_num_threads(threads)
        print("on the GPU" if arguments.gpu else f"{threads} thread{'s' if threads > 1 else ''}")
        against_transformers(arguments, device)
    torch.set_num_threads(arguments.threads[0])
    print("ragged answers")
    refilled_slots(arguments, device)
    print("peak memory of a rollout, beyond the models")
    peak_memory(arguments, device)


if __name__ == "__main__":
    main()
