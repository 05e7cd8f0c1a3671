"""The recipe: a typed, frozen tree of settings. The docstring under a field is its help text and JSON schema entry.

Fields with a default may be left out of the YAML. Numbers that change what a model learns have no hidden home: they
are all here. `checks.py` holds the rules between fields; `load.py` reads YAML and overrides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Stage = Literal["sft", "reward", "rl"]
Schedule = Literal["constant", "linear", "cosine"]
Dialect = Literal["reference", "dschat", "dschat-pad", "openrlhf", "verl", "trl", "torchtune"]


@dataclass(frozen=True, kw_only=True)
class NewModel:
    """The shape of a model that is trained from scratch: `family` and the fields that it takes, or `config`."""

    vocab_size: int
    """Size of the byte-level BPE vocabulary that is trained on the demonstrations, special tokens included."""
    config: dict[str, Any] | None = None
    """The fields of the config.json of any supported family, `model_type` among them, in place of all the settings
    below; the vocabulary's size and the special tokens' ids are filled in from the trained tokenizer."""
    family: Literal["llama", "rnn"] = "llama"
    """Which family the settings below describe; for any other give `config`."""
    hidden_size: int | None = None
    """Width of the residual stream; rnn: of the state."""
    intermediate_size: int | None = None
    """Width of the gated MLP (llama)."""
    num_hidden_layers: int | None = None
    """Layers."""
    num_attention_heads: int | None = None
    """Query heads (llama)."""
    num_key_value_heads: int | None = None
    """Key and value heads (llama; grouped-query attention where fewer than the query heads)."""
    max_position_embeddings: int | None = None
    """Longest sequence, prompt and response together, in tokens."""
    nonlinearity: Literal["tanh", "relu"] = "tanh"
    """What the recurrence ends in (rnn)."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (llama)."""
    rms_norm_eps: float = 1e-5
    """Epsilon inside the root of the norms (llama)."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as the output projection."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Where the first model comes from: exactly one of `path` and `new`."""

    path: str | None = None
    """A Hugging Face model directory (config.json, safetensors, tokenizer)."""
    new: NewModel | None = None
    """The shape of a new model; its tokenizer is trained on the demonstrations."""
    balance_coef: float | None = None
    """Weight of the balance loss of a mixture of experts (Fedus et al. 2022), in every stage; null: what config.json
    asks for, 0 where it does not."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set."""

    path: str | None = None
    """A JSONL file, or `task:NAME` for examples that Diptych generates itself (then `limit` says how many)."""
    eval_path: str | None = None
    """A held-out JSONL file. Without one, `eval_fraction` of the prompts of `path` are held out."""
    eval_fraction: float = 0.1
    """Share of the prompts (not rows: a prompt is never on both sides) held out where `eval_path` is not given."""
    limit: int | None = None
    """Use only the first rows of the file; for a `task:` source, the number of examples to generate."""
    eval_limit: int | None = None
    """Use only the first held-out rows."""


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Prompts, demonstrations and preference pairs, and how text becomes tokens."""

    demonstrations: Source = field(default_factory=Source)
    """For the sft stage: rows with `messages`, `prompt`/`response` or `question`/`answer`."""
    preferences: Source = field(default_factory=Source)
    """For the reward stage: rows with `prompt`/`chosen`/`rejected`."""
    prompts: Source = field(default_factory=Source)
    """For the rl stage: any of the above formats; only the prompt is used."""
    max_prompt_tokens: int = 256
    """Longest prompt."""
    max_response_tokens: int = 256
    """Longest response in demonstrations and preferences, the end-of-sequence token included."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What to do with a longer prompt or response: stop, leave the row out, or cut it (prompts lose their start,
    responses their end and their end-of-sequence token). Whatever is done is counted and reported."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Use the tokenizer's chat template: where it has one (auto), always (an error without one), or never."""
    prompt_template: str = "{prompt}"
    """Without a chat template: the text of a prompt, `{prompt}` standing for the row's own."""
    response_template: str = "{response}"
    """Without a chat template: the text of a response, `{response}` standing for the row's own."""
    buckets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    """Lengths that batches are padded to, so that few shapes are ever compiled."""
    packing: bool = False
    """Put several demonstrations into one row (sft), in the bucket in which an optimizer step takes the fewest columns.
    None reads its neighbours. sft.micro_batch_size then counts such rows. Changes memory and speed, never numbers
    beyond rounding."""


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe:
    """AdamW (Loshchilov and Hutter 2019) or SGD; formulas in `diptych.engine.OptimizerSpec`."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Which one."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-5
    """AdamW's epsilon, outside the root, after bias correction (N+ implementation details: 1e-5)."""
    momentum: float = 0.0
    """SGD's momentum."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on tensors of two or more dimensions."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm; null: no clipping."""
    schedule: Schedule = "constant"
    """Course of the learning rate after warm-up: constant, or linear or cosine towards zero, which it would reach one
    step after the last."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from zero."""


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """A low-rank adapter (LoRA, Hu et al. 2022): W + alpha / rank B A on the named linear layers, without dropout.
    Saved in PEFT's format beside the model with the adapter merged in."""

    rank: int = 16
    """Rank of A and B."""
    alpha: float = 32.0
    """B A is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Ends of the names of linear layers (`q_proj`, `mlp.down_proj`), each of which must match, or `all-linear`."""
    path: str | None = None
    """Go on from this adapter (PEFT's format), which then decides rank, alpha and targets; null: a new one."""


@dataclass(frozen=True, kw_only=True)
class SFTRecipe:
    """Supervised fine-tuning: the mean negative log-likelihood of response tokens."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    epochs: int = 1
    """Passes over the demonstrations, each in its own order."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = 32
    """Rows of an optimizer step."""
    micro_batch_size: int = 8
    """Rows that go through the model at once; changes memory and speed, never numbers beyond rounding."""
    eval_every: int = 100
    """Optimizer steps between evaluations on held-out rows (also before the first and after the last)."""
    adapter: AdapterRecipe | None = None
    """Train a low-rank adapter instead of all weights; null: all weights."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """The optimizer."""


@dataclass(frozen=True, kw_only=True)
class RewardRecipe:
    """Reward model: pairwise logistic loss (Bradley and Terry) on the score at the last response token."""

    model_path: str | None = None
    """Model directory to start from, of any family and with its own tokenizer; null: what the sft stage left, or
    `model.path` where it did not run."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    epochs: int = 1
    """Passes over the pairs."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = 32
    """Pairs of an optimizer step."""
    micro_batch_size: int = 8
    """Pairs that go through the model at once."""
    center_coef: float = 0.01
    """Weight of mean((chosen + rejected)^2), which keeps scores near zero (Eisenstein et al. 2023); 0: off, as
    DeepSpeed-Chat has it."""
    dialect: Literal["reference", "dschat"] = "reference"
    """`reference`: the score at the last response token. `dschat`: DeepSpeed-Chat's mean over diverging positions."""
    eval_every: int = 100
    """Optimizer steps between evaluations on held-out pairs."""
    adapter: AdapterRecipe | None = None
    """Train a low-rank adapter instead of all weights; null: all weights."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """The optimizer."""


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """Where the reward of a finished response comes from: the reward model, or a Python function where one is named."""

    model_path: str | None = None
    """Reward model directory; null: what the reward stage left. Must be null where `function` is set."""
    function: str | None = None
    """`FILE.py:NAME` (relative to the current directory) or `MODULE:NAME`: f(prompts, responses, rows) -> one float per
    response. prompts and responses are lists of text, rows the prompts' JSON objects."""
    too_long: Literal["error", "truncate"] = "error"
    """Where the reward model has another tokenizer than the policy, and a sampled response grows beyond what it takes
    (its positions, the largest of data.buckets): stop, or leave the response's end unread. Counted and logged."""


@dataclass(frozen=True, kw_only=True)
class RLRecipe:
    """PPO (Schulman et al. 2017) with a critic, a frozen reference and a KL penalty in the reward (Ziegler et al.
    2019)."""

    policy_path: str | None = None
    """Model directory of the policy and the reference; null: what the sft stage left, or `model.path`."""
    reward: RewardSource = field(default_factory=RewardSource)
    """The reward. The critic starts from the reward model, or from the policy with a zero head for a function. A reward
    model of another family or tokenizer reads the text of rollouts with its own chat template, and so does the
    critic."""
    evaluation_function: str | None = None
    """A function like `reward.function` that scores held-out answers by the truth; null: held-out answers are scored
    by the reward itself."""
    learning_rate: float = 1e-6
    """Peak learning rate of the policy."""
    critic_learning_rate: float | None = None
    """Peak learning rate of the critic; null: the policy's."""
    iterations: int = 100
    """Rounds of rollout and update."""
    batch_size: int = 64
    """Prompts of a rollout."""
    samples_per_prompt: int = 1
    """Responses to each prompt."""
    epochs: int = 4
    """Passes over each rollout, each in its own order."""
    mini_batches: int = 1
    """Optimizer steps of a pass."""
    micro_batch_size: int = 16
    """Rows that go through a model at once."""
    kl_coef: float = 0.05
    """Weight of the KL penalty per token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL in the reward (Schulman 2020): k1 = log-ratio, k2 = its square / 2, k3 = r - 1 - log r."""
    gamma: float = 1.0
    """Discount of GAE."""
    lam: float = 0.95
    """Lambda of GAE (Schulman et al. 2016)."""
    clip_range: float = 0.2
    """Clip of the policy ratio."""
    value_clip_range: float = 0.2
    """Clip of the value around its old one."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation over the batch (the mean stays)."""
    score_clip: float | None = None
    """Clip scores to +- this before they are used; null: the dialect's own limit (5 in DeepSpeed-Chat's, else none)."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that did not end by itself."""
    dialect: Dialect = "reference"
    """Whose reading of PPO: where the score lands, what is masked, how advantages are whitened (docs/algorithms.md)."""
    ema_decay: float | None = None
    """Keep a float32 average of the policy with this decay per optimizer step, saved beside it; null: none."""
    importance_cap: float | None = None
    """Weigh each token's policy loss by min(p_trainer / p_sampler, cap) (truncated importance sampling, Yao et al.
    2025), for a sampler that computes other numbers than the trainer; null: no weights."""
    old_logprobs: Literal["auto", "trainer", "sampler"] = "auto"
    """Whose log-probabilities are the old ones of the ratio: the trainer's, by a pass of their own, or those that the
    sampler had at hand. auto: the sampler's in float32 and float64, where the two differ by rounding (checked in the
    first iteration and in every first mini-batch), the trainer's in bfloat16 and of a rollout server's tokens."""
    max_kl: float | None = None
    """Stop the run when the mean KL to the reference (nats per response) of a rollout exceeds this; null: never."""
    eval_every: int = 10
    """Iterations between evaluations on held-out prompts."""
    eval_prompts: int = 64
    """Held-out prompts of an evaluation, at most."""
    adapter: AdapterRecipe | None = None
    """Train a low-rank adapter of the policy instead of all its weights; the reference is the policy without it."""
    critic_adapter: AdapterRecipe | None = None
    """The same for the critic; its scalar head is trained in full."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """The optimizer of policy and critic."""


@dataclass(frozen=True, kw_only=True)
class RolloutRecipe:
    """How responses are sampled."""

    temperature: float = 1.0
    """Softmax temperature of sampling and of every log-probability in rl; above 0 (greedy has no policy gradient)."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0: all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that holds this much probability; 1: all."""
    max_new_tokens: int = 128
    """Longest response, the stop token included."""
    response_buckets: tuple[int, ...] = ()
    """Shorter widths of responses: a rollout whose longest response fits one is cut to the smallest that holds it
    before it is scored and trained on, so that fewer columns of padding are paid for. It changes no number. The JAX
    engine compiles its programs once for each width that occurs."""
    stop: tuple[str, ...] = ()
    """Single tokens, besides the model's end-of-sequence tokens, that end a response."""
    decode_rows: int | None = None
    """Rows decoded at once; further prompts wait and take the places of finished rows; null: all at once. No number
    depends on it: it bounds the cache's memory, and rows that end early leave no device idle."""
    engine: str = "auto"
    """What generates. `native`: the engine's own decoding, from a decode copy of the training weights. `deepspeed`:
    DeepSpeed's hybrid engine (torch engine, the architectures that it supports). `FILE.py:NAME` or `MODULE:NAME`: a
    server of your own behind `diptych.rollout_server`. `auto` picks and says why."""
    gate: bool = True
    """Before the first rollout, and after every resume: generate for a few prompts greedily and compare every token and
    log-probability with the training forward's; stop where they differ. false: start without."""


@dataclass(frozen=True, kw_only=True)
class ZeroRecipe:
    """DeepSpeed ZeRO, read by the torch engine."""

    stage: Literal[0, 1, 2, 3] = 0
    """What is partitioned: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where optimizer state and float32 masters lie and are updated: on the accelerator, or in the host's memory
    (stage 1 and above)."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where parameters wait between uses: on the accelerator, or in the host's memory (stage 3)."""


@dataclass(frozen=True, kw_only=True)
class TrainMeshRecipe:
    """The devices as a grid of data x fsdp x tensor; one of them may be -1: whatever is left."""

    data: int = 1
    """Groups of devices that each hold the whole model and read their own rows."""
    fsdp: int = -1
    """Devices among which parameters, gradients and optimizer state are split; each reads its own rows, and gathers a
    layer's parameters while it runs (ZeRO-3)."""
    tensor: int = 1
    """Devices among which heads, inner widths, experts and the vocabulary are split; they read the same rows."""


@dataclass(frozen=True, kw_only=True)
class DecodeMeshRecipe:
    """The same devices as a grid of data x tensor; one of them may be -1: whatever is left. There is no fsdp: a decode
    step that gathered its parameters would take many times as long."""

    data: int = -1
    """Groups of devices that each hold the whole model and generate their own rows."""
    tensor: int = 1
    """Devices among which heads (with their keys and values), inner widths, experts and the vocabulary are split. Where
    there are fewer key-value heads than devices, each device holds them all."""


@dataclass(frozen=True, kw_only=True)
class SwitchRecipe:
    """How the policy's weights get from the train mesh (from ZeRO's partitions) to the decode copy before a rollout."""

    chunk_mb: int | None = None
    """Cast and move at most about so many megabytes (of the decode copy, on all devices together) at a time; null: all
    at once, which is fastest and needs the most memory."""
    check: Literal["fingerprint", "logprobs"] = "fingerprint"
    """What is compared after every switch: a checksum of every parameter on both sides; or also the log-probabilities
    of the prompts under both copies, which costs two forward passes."""


@dataclass(frozen=True, kw_only=True)
class LayoutRecipe:
    """How models lie on the machine."""

    zero: ZeroRecipe = field(default_factory=ZeroRecipe)
    """The torch engine's ZeRO, of whatever is trained; frozen models are split at stage 3."""
    zero_critic: ZeroRecipe | None = None
    """The critic's ZeRO in rl; null: as `zero`."""
    zero_reference: ZeroRecipe | None = None
    """The reference's ZeRO in rl (stage 0 or 3: it has no optimizer); null: stage 3 where `zero` has it, else 0."""
    zero_reward: ZeroRecipe | None = None
    """The reward model's ZeRO in rl; null: as the reference's."""
    train: TrainMeshRecipe = field(default_factory=TrainMeshRecipe)
    """The mesh on which the JAX engine trains and scores."""
    decode: DecodeMeshRecipe = field(default_factory=DecodeMeshRecipe)
    """The mesh on which the JAX engine generates."""
    critic: TrainMeshRecipe | None = None
    """The critic's mesh in rl (JAX engine); null: the train mesh."""
    reference: TrainMeshRecipe | None = None
    """The reference's mesh in rl (JAX engine); null: the train mesh."""
    reward: TrainMeshRecipe | None = None
    """The reward model's mesh in rl (JAX engine); null: the train mesh."""
    offload: tuple[Literal["reference", "reward"], ...] = ()
    """Frozen models of rl that wait in the host's memory between their uses."""
    switch: SwitchRecipe = field(default_factory=SwitchRecipe)
    """From the weights that are trained to those that generate."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """The JAX engine's attention: auto takes cuDNN's flash attention on GPUs in bfloat16, Pallas splash attention in
    training on TPUs, and XLA elsewhere; what was taken is in environment.json. A named one that cannot run is an
    error."""
    remat: Literal["full", "dots", "none"] = "full"
    """Which activations the backward pass makes again instead of keeping them: all of a layer, all but the results of
    matrix products, or none. Changes memory and speed, never numbers beyond rounding."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe:
    """Checkpoints that `--resume` goes on from. Models of finished stages are always saved."""

    every: int = 0
    """Steps (sft, reward) or iterations (rl) between checkpoints, of which one is after the last; 0: only the models of
    finished stages."""
    keep: int = 2
    """Newest checkpoints of a stage to keep."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str
    """A short name for logs and reports."""
    seed: int = 0
    """Seeds data order, initial weights and sampling; equal seeds give equal runs."""
    stages: tuple[Stage, ...] = ("sft", "reward", "rl")
    """Stages to run, in this order."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """Precision of weights, activations and optimizer. float64 is for comparing engines on a CPU. bfloat16: activations
    and matrix products in bfloat16 over float32 master weights, gradients' sums and moments."""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """The model to start from."""
    data: DataRecipe = field(default_factory=DataRecipe)
    """The data."""
    sft: SFTRecipe = field(default_factory=SFTRecipe)
    """Stage 1."""
    reward: RewardRecipe = field(default_factory=RewardRecipe)
    """Stage 2."""
    rl: RLRecipe = field(default_factory=RLRecipe)
    """Stage 3."""
    rollout: RolloutRecipe = field(default_factory=RolloutRecipe)
    """Sampling in stage 3."""
    layout: LayoutRecipe = field(default_factory=LayoutRecipe)
    """Where models lie."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further settings of DeepSpeed's own configuration (torch engine), as its documentation writes them; what the
    recipe already says is an error here."""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    """When training state is saved."""
    logprob_chunk: int = 1024
    """Tokens whose vocabulary-wide logits exist at once."""
