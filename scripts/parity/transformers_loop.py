"""Record a Diptych trace of a plain training loop: `AutoModelForCausalLM`, a loss of a few lines, AdamW. Offline.

    PYTHONPATH=shared python scripts/parity/transformers_loop.py --output loop-trace

Needs torch, transformers, NumPy and safetensors. The model is random, of any size, or a directory (--model). The loop
fine-tunes on rows of a prompt and a response, with the loss on response tokens. Everything that records is marked. It
computes in float32: in a float64 model transformers rounds softmax to float32 all the same (rows padded on the left
become NaN).

--bug plants a classic mistake, so that the ladder's answer to it can be seen:
  mean_over_all    divide by all tokens, padding and prompts too, instead of the trained ones
  unshifted        compare logits with the tokens that they read, not with the next ones
  pads_attended    no attention mask, rows padded on the left
  clip_before      gradients handed over after clipping (the recording itself refuses those)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from diptych.parity.foreign import Recording, Update, gradients_of, weights_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BUGS = ("mean_over_all", "unshifted", "pads_attended", "clip_before")
BETAS, EPS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.95), 1e-5, 0.0, 1.0


def batches(*, rows: int, time: int, vocab: int, steps: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Ragged rows, padded on the left: tokens, attention, and which tokens are trained (the second half of each)."""
    draws = np.random.default_rng(seed)
    for _ in range(steps):
        lengths = draws.integers(time // 2, time + 1, rows)
        lengths[0] = time
        columns = np.arange(time)
        attention = columns >= time - lengths[:, None]
        tokens = np.where(attention, draws.integers(4, vocab, (rows, time)), 0)
        trained = columns >= time - lengths[:, None] // 2
        arrays = {"tokens": tokens, "attention": attention, "trained": trained}
        yield {name: torch.from_numpy(array) for name, array in arrays.items()}


def token_logprobs(model: Any, batch: dict[str, torch.Tensor], *, bug: str | None = None) -> torch.Tensor:
    """[rows, time]: log p(tokens[:, t] | tokens before t) in column t; 0 in column 0."""
    attention = batch["attention"].long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": attention, "position_ids": positions} if bug != "pads_attended" else {}
    logprobs = model(input_ids=batch["tokens"], use_cache=False, **inputs).logits.log_softmax(-1)
    if bug == "unshifted":
        return logprobs.gather(2, batch["tokens"][:, :, None])[:, :, 0]
    next_tokens = logprobs[:, :-1].gather(2, batch["tokens"][:, 1:, None])[:, :, 0]
    return torch.nn.functional.pad(next_tokens, (1, 0))


def sft_loss(logprobs: torch.Tensor, trained: torch.Tensor, *, bug: str | None = None) -> torch.Tensor:
    """The mean negative log-likelihood of the trained tokens."""
    total = -(logprobs * trained).sum()
    return total / (trained.numel() if bug == "mean_over_all" else trained.sum())


def train(
    model: Any, data: Iterator[dict[str, torch.Tensor]], recording: Recording, *, lr: float, bug: str | None = None
) -> None:
    """The loop. Lines that a loop of yours would not have end in `# record`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    for step, batch in enumerate(data):
        logprobs = token_logprobs(model, batch, bug=bug)
        loss = sft_loss(logprobs, batch["trained"], bug=bug)
        loss.backward()
        before, gradients = weights_of(model), gradients_of(model)  # record
        moments = moments_of(model, optimizer)  # record
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if bug == "clip_before":
            gradients = gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # record
            after = token_logprobs(model, batch, bug=bug)  # record
        recording.sft_step(  # record
            tokens=batch["tokens"],
            attention=batch["attention"],
            trained=batch["trained"],
            model=Update(
                weights_before=before,
                gradients=gradients,
                weights_after=weights_of(model),
                first_before=moments[0],
                second_before=moments[1],
                first_after=moments_of(model, optimizer)[0],
                second_after=moments_of(model, optimizer)[1],
                loss=loss,
                metrics={"loss/nll": loss},
                grad_norm=norm,
                learning_rate=lr,
                updates=step,
                outputs=logprobs,
                next_outputs=after,
            ),
        )
        print(f"step {step}: loss {loss.item():.4f}, gradient norm {norm.item():.4f}")


def moments_of(model: Any, optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor] | None]:
    """Adam's moments by name; None before the first update."""
    found = [
        {name: optimizer.state[one][kind].clone() for name, one in model.named_parameters() if optimizer.state[one]}
        for kind in ("exp_avg", "exp_avg_sq")
    ]
    return [one or None for one in found]


def random_model(*, layers: int, width: int, heads: int, vocab: int, time: int, seed: int) -> Any:
    """A Llama with gains away from 1: initial-like weights hide most differences."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=time, initializer_range=0.1,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="a new directory for the trace")
    parser.add_argument("--model", help="a directory of a Hugging Face language model (default: a random Llama)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (default: 8)")
    parser.add_argument("--time", type=int, default=32, help="tokens of the longest row (default: 32)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bug", choices=BUGS, help="plant a mistake")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import transformers

    if options.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="eager")
    else:
        model = random_model(
            layers=options.layers, width=options.width, heads=options.heads, vocab=options.vocab, time=options.time,
            seed=options.seed,
        )  # fmt: skip
    model = model.float()
    model.eval()  # no dropout; gradients flow all the same
    vocab = model.config.vocab_size
    with open_recording(options.output, model, lr=options.lr, rows=options.rows, seed=options.seed) as recording:
        data = batches(rows=options.rows, time=options.time, vocab=vocab, steps=options.steps, seed=options.seed)
        train(model, data, recording, lr=options.lr, bug=options.bug)


def open_recording(output: Any, model: Any, *, lr: float, rows: int, seed: int) -> Recording:
    """What this loop is, for whoever compares it."""
    import transformers

    return Recording(
        output,
        producer="transformers loop",
        precision="float32",
        models={"sft": model.config},
        settings={
            "learning_rate": lr, "schedule": "constant", "optimizer": "adamw", "betas": list(BETAS), "eps": EPS,
            "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_NORM, "batch_size": rows, "micro_batch_size": rows,
        },
        seed=seed,
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
    )  # fmt: skip


if __name__ == "__main__":
    main()
