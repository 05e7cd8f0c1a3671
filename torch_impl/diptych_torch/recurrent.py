"""The Elman recurrent language model as a transformers model, registered with the Auto classes (`model_type` "rnn").

    h_t = f(W_xh x_t + W_hh h_{t-1} + b_h),   y_t = W_hy h_t + b_y          (Elman 1990; f tanh or relu; h_0 = 0)

Importing this module is all that `AutoModelForCausalLM.from_pretrained` needs to read such a directory.

Dimensions: B batch, T time, D width of the state, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel

from diptych_torch.linear import linear


class RNNConfig(PreTrainedConfig):
    """Fields as in `diptych.families.rnn`."""

    model_type = "rnn"

    def __init__(
        self,
        vocab_size: int = 0,
        hidden_size: int = 0,
        num_hidden_layers: int = 1,
        nonlinearity: str = "tanh",
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        **others: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.nonlinearity = nonlinearity
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**others)


class RNNState:
    """What the model has read so far: the state [B, D] of every layer. `start`: how many columns it has read."""

    def __init__(self, layers: list[Tensor]):
        self.layers = layers
        self.start = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start


class Recurrence(nn.Linear):
    """W_hh, which it multiplies with, and b_h, which goes in with the input. A linear layer to PEFT."""

    def forward(self, state: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return linear(state, self.weight)


class RNNLayer(nn.Module):
    """One layer, and its loop over time. Its modules are called, never read: an adapter may be around them."""

    def __init__(self, config: RNNConfig):
        super().__init__()
        self.input = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.recurrent = Recurrence(config.hidden_size, config.hidden_size)
        self.drive = nn.Identity()  # what the input adds to the state goes through here, where a probe looks
        self.nonlinearity = {"tanh": torch.tanh, "relu": torch.relu}[config.nonlinearity]

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        attention: Bool[Tensor, "B T"],
        goes_on: Bool[Tensor, "B T"],
        state: Float[Tensor, "B D"],
    ) -> Float[Tensor, "B T D"]:
        """The states after each column. Padding puts nothing in: on the left it leaves the state at zero, f(0) = 0.
        Where a text does not go on but begins, the state begins at zero."""
        drive = self.drive((self.input(x) + self.recurrent.bias) * attention[..., None])
        states = []
        for column, kept in zip(drive.unbind(dim=1), goes_on[..., None].unbind(dim=1), strict=True):
            state = self.nonlinearity(column + self.recurrent(state * kept))
            states.append(state)
        return torch.stack(states, dim=1)


class RNNPreTrainedModel(PreTrainedModel):
    config_class = RNNConfig
    base_model_prefix = "model"
    _no_split_modules = ["RNNLayer"]  # noqa: RUF012 (transformers' name)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class RNNModel(RNNPreTrainedModel):
    """Embedding and layers."""

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RNNLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RNNState | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """The states of the last layer. attention_mask: [B, T], or [B, S] of all columns so far; nothing is padding
        without it. past_key_values: the state to go on from; it is changed in place. position_ids: [B, T]; only 0 says
        something: a text begins here, and the state with it."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, width = x.shape
        if attention_mask is None:
            attention = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        elif attention_mask.ndim == 2:
            attention = attention_mask[:, -length:].bool()
        else:
            raise ValueError(f"attention_mask must be [batch, time], got {list(attention_mask.shape)}")
        goes_on = torch.ones_like(attention) if position_ids is None else position_ids != 0
        memory = past_key_values or RNNState([x.new_zeros(batch, width) for _ in self.layers])
        for index, layer in enumerate(self.layers):
            x = layer(x, attention, goes_on, memory.layers[index])
            memory.layers[index] = x[:, -1]
        memory.start += length
        kept = past_key_values is not None or use_cache
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=memory if kept else None)  # pyright: ignore


class RNNForCausalLM(RNNPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' name)

    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Any = None, **options: Any
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; with labels [B, T] (-100: not counted) the mean loss of the next token."""
        outputs = self.model(input_ids, attention_mask, **options)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


class RNNForSequenceClassification(RNNPreTrainedModel):
    def __init__(self, config: RNNConfig):
        super().__init__(config)
        self.model = RNNModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 1, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutputWithPast:
        """Scores [B, labels] after the last real token of each row."""
        outputs = self.model(input_ids, attention_mask, **options)
        scores = self.score(outputs.last_hidden_state)
        batch, length = scores.shape[:2]
        last = torch.full((batch,), length - 1, device=scores.device)
        if attention_mask is not None:
            last = (attention_mask[:, -length:].long() * torch.arange(length, device=scores.device)).argmax(dim=1)
        picked = scores[torch.arange(batch, device=scores.device), last]
        return SequenceClassifierOutputWithPast(logits=picked, past_key_values=outputs.past_key_values)


AutoConfig.register("rnn", RNNConfig)
AutoModel.register(RNNConfig, RNNModel)
AutoModelForCausalLM.register(RNNConfig, RNNForCausalLM)
AutoModelForSequenceClassification.register(RNNConfig, RNNForSequenceClassification)
