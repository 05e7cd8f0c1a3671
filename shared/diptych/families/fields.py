"""Reading a config.json so that nothing in it is overlooked: every field is taken, fixed or known to be idle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.errors import UserError

# Fields that say nothing about what the model computes from its tokens.
IDLE = frozenset(
    {
        "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id",
        "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "auto_map",
        "return_dict", "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores",
        "torchscript", "gradient_checkpointing", "attn_implementation", "_attn_implementation_autoset",
        "_commit_hash", "keys_to_ignore_at_inference", "tokenizer_class", "prefix", "unk_token_id",
        "classifier_dropout", "language", "license", "unsloth_version", "unsloth_fixed", "router_aux_loss_coef",
        # Settings of `generate` that old files keep here; the recipe and generation_config.json decide them.
        "temperature", "top_k", "top_p", "do_sample", "max_length", "min_length", "num_beams", "repetition_penalty",
        "length_penalty", "no_repeat_ngram_size", "early_stopping", "forced_bos_token_id", "forced_eos_token_id",
        "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "num_return_sequences", "cache_implementation",
        "diversity_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "num_beam_groups",
        "remove_invalid_values", "typical_p", "chunk_size_feed_forward", "tf_legacy_loss", "use_bfloat16",
        "is_encoder_decoder", "pruned_heads", "tie_encoder_decoder", "cross_attention_hidden_size",
    }
)  # fmt: skip
_REQUIRED = object()


class Fields:
    """The fields of one config.json. What is still untaken at `finish` is an error, unless it is idle or null."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config = config
        self.where = where
        self._taken: set[str] = set()

    def take(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the first of `names` that is there and not null. Raises UserError where none is and there is no
        default."""
        self._taken.update(names)
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        if default is _REQUIRED:
            raise UserError(f"{self.where}: missing {names[0]}")
        return default

    def whole(self, *names: str, default: Any = _REQUIRED) -> int:
        """A whole number of at least 1."""
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.where}: {names[0]} = {value!r} must be a whole number of at least 1")
        return value

    def number(self, *names: str, default: Any = _REQUIRED) -> float:
        """A float."""
        value = self.take(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {names[0]} = {value!r} must be a number")
        return float(value)

    def fixed(self, **values: Any) -> None:
        """Fields that may only have the value given here (or be absent): this family computes no other."""
        for name, value in values.items():
            found = self.take(name, default=value)
            if found != value:
                raise UserError(f"{self.where}: {name} = {found!r} is not supported (only {value!r})")

    def idle(self, *names: str) -> None:
        """Fields that change nothing in a language model without dropout."""
        self._taken.update(names)

    def finish(self) -> None:
        """Raise UserError for a field that nothing has taken: it might change the numbers."""
        left = [name for name, value in self.config.items() if name not in self._taken | IDLE and value is not None]
        if left:
            raise UserError(
                f"{self.where}: {', '.join(sorted(left))}: not understood; a field that might change the numbers is "
                f"never ignored (remove it if it is idle)"
            )
