"""Rollouts by DeepSpeed's hybrid engine (`rollout.engine: deepspeed`), for comparison with our own decoding.

DeepSpeed puts kernels of its own into the layers of the architectures that it has a policy for, and leaves OPT to
transformers' `generate`. Everything else, and every layer whose kernels cannot be set up on this machine, is refused
here with DeepSpeed's reason; it would go on with transformers' `generate` and say so in a log line. What it generates
is checked by the gate like everything that generates (`diptych.stages.gate`).

Tokens are drawn where transformers asks a logits processor: from our uniforms, by our `sampling.draw`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from diptych.engine import Completions, Finish, PromptBatch, Sampling
from diptych.errors import UserError
from diptych.families.family import ModelConfig
from diptych_torch import attention, zero
from diptych_torch.float64 import KeepFloat64
from diptych_torch.model import Network
from diptych_torch.sampling import draw

# What transformers' generate hands to our attention: the mask itself, never "causal, nothing to see".
AttentionMaskInterface.register(
    attention.NAME, lambda *inputs, **options: sdpa_mask(*inputs, **{**options, "allow_is_causal_skip": False})
)
ADVICE = "use rollout.engine=native, which generates for every architecture"


def check(network: Network, device: torch.device) -> None:
    """UserError with the reason where DeepSpeed's hybrid engine does not serve this network on this device."""
    layers = {type(module) for module in network.modules()}
    name = type(network.transformer).__name__
    if OPTDecoderLayer in layers:
        return
    if not layers & _with_policies():
        raise UserError(f"rollout.engine=deepspeed: DeepSpeed has no inference policy for {name}: {ADVICE}")
    if network.adapter is not None:
        raise UserError(
            f"rollout.engine=deepspeed: DeepSpeed's kernels for {name} do not know peft's adapters and would generate "
            f"without them: {ADVICE}"
        )
    if device.type == "cpu":
        raise UserError(f"rollout.engine=deepspeed: DeepSpeed's kernels for {name} do not exist for the CPU: {ADVICE}")


def config(model: ModelConfig) -> dict[str, Any]:
    """The part of DeepSpeed's configuration; its kernels' cache takes as many tokens as the model has positions."""
    limit = model.max_position_embeddings
    return {"hybrid_engine": {"enabled": True} | ({} if limit is None else {"max_out_tokens": limit})}


@contextlib.contextmanager
def as_transformers(network: Network) -> Iterator[None]:
    """Inside, DeepSpeed finds on the network what it looks for on a transformers model. UserError for whatever goes
    wrong while it sets its kernels up."""
    ours = network.config
    network.config = network.transformer.config
    network.generate = network.transformer.generate  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        name = type(network.transformer).__name__
        raise UserError(
            f"rollout.engine=deepspeed: DeepSpeed could not set its kernels up for {name} "
            f"({type(error).__name__}: {error}): {ADVICE}"
        ) from error
    finally:
        network.config = ours


class Draws(LogitsProcessor):
    """Draws each token by our rules and leaves transformers no other choice."""

    def __init__(self, sampling: Sampling, uniforms: Tensor, new: int):
        self._sampling, self._uniforms = sampling, uniforms
        shape = (len(uniforms), new)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=uniforms.device)
        self.logprobs = torch.zeros(shape, dtype=torch.promote_types(uniforms.dtype, torch.float32)).to(
            self.tokens.device
        )
        self.margins = torch.zeros_like(self.logprobs)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = draw(scores, self._uniforms[:, self.step], self._sampling)
        self.tokens[:, self.step], self.logprobs[:, self.step] = drawn.token, drawn.logprob
        self.margins[:, self.step] = drawn.margin
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn.token[:, None], 0.0)


@torch.no_grad()
def generate(
    engine: Any,
    network: Network,
    prompts: PromptBatch,
    sampling: Sampling,
    uniforms: np.ndarray,
    *,
    pad_token_id: int,
    device: torch.device,
) -> Completions:
    """Sample completions (`diptych.engine.Model.generate`) through the hybrid engine's module. Every process has at
    least one row (ZeRO-3 gathers together). Parameters of stage 3 are whole for the whole rollout."""
    if sampling.decode_rows is not None:
        raise UserError(
            "rollout.decode_rows needs rollout.engine=native: transformers' generate takes all rows at once"
        )
    tokens = torch.tensor(prompts.tokens, dtype=torch.int64, device=device)
    draws = Draws(sampling, torch.tensor(uniforms, device=device), sampling.max_new_tokens)
    precise = KeepFloat64() if network.dtype == torch.float64 else contextlib.nullcontext()
    has_kernels = bool(engine._inference_containers)
    gathered = contextlib.nullcontext() if has_kernels else zero.whole(network.parameters())
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints latencies
        engine.eval()
    try:
        with precise, gathered:
            network.transformer.generate(
                input_ids=tokens,
                attention_mask=torch.tensor(prompts.attention.astype(np.int64), device=device),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([draws]),
                eos_token_id=list(sampling.stop_token_ids) or None,
                pad_token_id=pad_token_id,
                use_cache=True,
                synced_gpus=zero.world_size() > 1,
            )
    finally:
        engine.train()
    return completed(draws, sampling, pad_token_id)


def completed(draws: Draws, sampling: Sampling, pad_token_id: int) -> Completions:
    """What was drawn, up to each row's stop token."""
    tokens = draws.tokens.cpu().numpy()
    stops = np.isin(tokens, sampling.stop_token_ids)
    before = np.cumsum(stops, axis=1) - stops
    mask = (before == 0) & (np.arange(tokens.shape[1]) < draws.step)
    ended = (stops & mask).any(axis=1)
    return Completions(
        tokens=np.where(mask, tokens, pad_token_id).astype(np.int32),
        mask=mask,
        logprobs=np.where(mask, draws.logprobs.cpu().numpy(), 0),
        margins=np.where(mask, draws.margins.cpu().numpy(), 0),
        finish=np.where(ended, int(Finish.STOP), int(Finish.LENGTH)).astype(np.int32),
    )


def _with_policies() -> set[type]:
    """Layers that DeepSpeed has kernels for (its own list; OPT's as transformers writes it now is not among them)."""
    from deepspeed.module_inject.replace_policy import replace_policies

    found: set[type] = set()
    for policy in replace_policies:
        policy(None)  # fills in the class
        layers = policy._orig_layer_class
        found |= set(layers) if isinstance(layers, list) else {layers} if layers is not None else set()
    return found - {OPTDecoderLayer}
