"""The scripts of `diptych parity repro`: about twenty lines for each side and kind of case, to be pasted into an issue.

Each reads case.npz beside it, computes the quantity again from the recorded inputs, and prints the recorded numbers of
both sides and its own. `{name}`-like fields are filled in by `script`.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["outputs", "gradients", "loss", "sampling", "formula", "update", "moment", "numbers"]
ENGINE_KINDS = ("outputs", "gradients", "loss", "sampling")  # what only a model can compute again

_HEAD = '''"""{title}

Side {side}: {producer}. Run it where {needs} installed:  python {file}
"""

import json
from pathlib import Path

import numpy as np

'''

_READ = """case = np.load(Path(__file__).with_name("case.npz"))
about = json.loads(str(case["about_{low}"]))
"""

_TAIL = """recorded = {{side: case["recorded_" + side].astype(np.float64) for side in "ab"}}
seen = case["seen"]
print("recorded: A and B differ by", np.abs(recorded["a"] - recorded["b"])[seen].max())
for side, values in recorded.items():
    print(f"here against recorded {{side.upper()}}:", np.abs(here - values)[seen].max())
at = tuple(about["worst"])
print(f"at {{list(at)}}: A {{recorded['a'][at]:.9g}}, B {{recorded['b'][at]:.9g}}, here {{here[at]:.9g}}")
"""

_MODEL = """group = "{group}/"
weights = {{name[len(group) :]: case[name] for name in case.files if name.startswith(group)}}
settings = EngineSettings(precision="{precision}", device="{device}")
model = load_engine("{engine}", settings).model(
    ModelSpec(
        config=about["config"], weights=weights, head=about["head"], optimizer={optimizer}, role=about["role"],
        micro_batch_size=about["micro_batch_size"],
    )
)
"""

_TOKENS = """tokens = TokenBatch(
    tokens=case["tokens"], attention=case["attention"], positions=case["positions"], first=about["first"]
)
"""

_LOSS = """recipe = recipe_from_text(about["recipe"], name="case.npz")
loss = loss_of(recipe, {stage!r}, {role!r}, read_model(about["config"]))
arrays = {{name[len("arrays/") :]: case[name] for name in case.files if name.startswith("arrays/")}}
"""

_LOSS_IMPORTS = """from diptych.families.family import read_model
from diptych.parity.truth.truth import loss_of
from diptych.recipe.load import recipe_from_text

"""

_OUTPUTS = (
    "from diptych.engine import EngineSettings, ModelSpec, TokenBatch, load_engine\n\n"
    + _READ
    + _MODEL
    + _TOKENS
    + """if about["head"] == "lm":
    here = model.logprobs(tokens, temperature=about["temperature"])
else:
    here = model.scores(tokens)
here = here[:, about["columns"][0] : about["columns"][1]].astype(np.float64)
"""
    + _TAIL
)

_GRADIENTS = (
    "from diptych.engine import EngineSettings, ModelSpec, OptimizerSpec, TokenBatch, TrainBatch, load_engine\n"
    + _LOSS_IMPORTS
    + _READ
    + _MODEL
    + _TOKENS
    + _LOSS
    + """batch = TrainBatch(tokens=tokens, arrays=arrays, denominators=about["denominators"])
here = model.gradients(loss, batch)[about["tensor"]].astype(np.float64)
"""
    + _TAIL
)

_LOSSES = (
    "from diptych.engine import EngineSettings, ModelSpec, TokenBatch, TrainBatch, load_engine\n"
    + _LOSS_IMPORTS
    + _READ
    + _MODEL
    + _TOKENS
    + _LOSS
    + """batch = TrainBatch(tokens=tokens, arrays=arrays, denominators=about["denominators"])
here = np.asarray([model.evaluate(loss, batch)[about["metric"]]])
"""
    + _TAIL
)

_SAMPLING = (
    "from diptych.engine import EngineSettings, ModelSpec, PromptBatch, Sampling, load_engine\n\n"
    + _READ
    + _MODEL
    + """prompts = PromptBatch(tokens=case["tokens"], attention=case["attention"], positions=case["positions"])
sampling = Sampling(**about["sampling"], stop_token_ids=tuple(about["stop_token_ids"]))
drawn = model.generate(prompts, sampling, case["uniforms"], pad_token_id=about["pad_token_id"])
print("tokens here:", drawn.tokens.tolist(), "margins:", drawn.margins.tolist())
here = getattr(drawn, about["of"]).astype(np.float64)
"""
    + _TAIL
)

_FORMULA = (
    "from diptych.algorithms.dialects import experience\n\n"
    + _READ
    + """inputs = {{name: case[name].astype(np.float64) for name in ("logprobs", "ref_logprobs", "values", "scores")}}
inputs["scores"] = inputs["scores"] - about["missing_eos_penalty"] * ~case["ended"]
made = experience(about["dialect"], **inputs, mask=case["mask"], ended=case["ended"], **about["settings"])
here = np.asarray(getattr(made, about["attribute"]), np.float64)  # the float64 truth, from the recorded inputs
"""
    + _TAIL
)

_UPDATE = (
    _READ
    + """# AdamW as both engines define it, in float64, on this side's own new moments: what its weights should be.
start, first, second = (case[name].astype(np.float64) for name in ("start", "first_{low}", "second_{low}"))
beta1, beta2 = about["betas"]
updates, rate = about["updates"], about["learning_rate_{low}"]
step = first / (1 - beta1**updates) / (np.sqrt(second / (1 - beta2**updates)) + about["eps"])
decay = about["weight_decay"] if start.ndim >= 2 else 0.0
here = start - rate * (step + decay * start)
"""
    + _TAIL
)

_MOMENT = (
    _READ
    + """# Second moments in float64, from the gradient that this side's own first moments imply.
before, squares, first = (case[name].astype(np.float64) for name in ("start_first", "start_second", "first_{low}"))
beta1, beta2 = about["betas"]
gradient = (first - beta1 * before) / (1 - beta1)
here = beta2 * squares + (1 - beta2) * gradient**2
"""
    + _TAIL
)

_NUMBERS = (
    _READ
    + """# This quantity depends on what a trace does not hold (see README.txt): here are both sides' numbers.
here = case["recorded_{low}"].astype(np.float64)
"""
    + _TAIL
)

# A producer that is no engine of ours: a plain transformers model with the recorded weights.

_PLAIN_MODEL = """group = "{group}/"
weights = {{name[len(group) :]: torch.tensor(case[name]) for name in case.files if name.startswith(group)}}
config = AutoConfig.for_model(**about["config"])
kind = AutoModelForCausalLM if about["head"] == "lm" else AutoModelForTokenClassification
if about["head"] == "scalar":
    config.num_labels, config.classifier_dropout, config.hidden_dropout = 1, 0.0, 0.0
model = kind.from_config(config, attn_implementation="eager", dtype=torch.{precision}).eval()
lost = model.load_state_dict(weights, strict=False)
print("not loaded:", lost)
batch = {{name: torch.tensor(case[name]).long() for name in ("tokens", "attention", "positions")}}
tokens, mask, positions = batch["tokens"], batch["attention"], batch["positions"]
logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
if about["head"] == "lm":
    before = torch.log_softmax(logits[:, :-1] / about["temperature"], -1)
    chosen = before.gather(-1, tokens[:, 1:, None])[..., 0]
    outputs = torch.cat([torch.zeros_like(chosen[:, :1]), chosen], 1)
    outputs = torch.where(torch.arange(outputs.shape[1]) >= about["first"], outputs, 0.0)
else:
    outputs = logits[..., 0]
"""

_PLAIN_IMPORTS = (
    "import torch\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification\n\n"
)

_PLAIN_OUTPUTS = (
    _PLAIN_IMPORTS
    + _READ
    + _PLAIN_MODEL
    + """here = outputs[:, about["columns"][0] : about["columns"][1]].detach().double().numpy()
here = np.where(case["seen"], here, 0.0)
"""
    + _TAIL
)

_PLAIN_LOSS = """arrays = {{name: torch.tensor(value) for name, value in arrays.items()}}
denominators = {{name: torch.tensor(value, dtype=outputs.dtype) for name, value in about["denominators"].items()}}
extra = {{"entropy": torch.zeros_like(outputs)}} if loss.entropy else {{}}
value, metrics = loss(outputs, **arrays, **denominators, **extra)
"""

_PLAIN_GRADIENTS = (
    "import torch\n"
    + _LOSS_IMPORTS.rstrip("\n")
    + "\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification\n\n"
    + _READ
    + _PLAIN_MODEL
    + _LOSS
    + _PLAIN_LOSS
    + """value.backward()
here = dict(model.named_parameters())[about["tensor"]].grad.double().numpy()
"""
    + _TAIL
)

_PLAIN_LOSSES = (
    "import torch\n"
    + _LOSS_IMPORTS.rstrip("\n")
    + "\nfrom transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification\n\n"
    + _READ
    + _PLAIN_MODEL
    + _LOSS
    + _PLAIN_LOSS
    + """here = np.asarray([float(({{"loss": value}} | metrics)[about["metric"]])])
"""
    + _TAIL
)

OURS = {
    "outputs": _OUTPUTS, "gradients": _GRADIENTS, "loss": _LOSSES, "sampling": _SAMPLING, "formula": _FORMULA,
    "update": _UPDATE, "moment": _MOMENT, "numbers": _NUMBERS,
}  # fmt: skip
PLAIN = {**OURS, "outputs": _PLAIN_OUTPUTS, "gradients": _PLAIN_GRADIENTS, "loss": _PLAIN_LOSSES, "sampling": _NUMBERS}


def script(
    kind: Kind,
    *,
    side: str,
    producer: str,
    title: str,
    engine: str | None,
    precision: str,
    device: str,
    group: str,
    stage: str,
    role: str,
) -> str:
    """The text of one side's script. engine: "jax", "torch", or None for a plain transformers model. group: where in
    case.npz the side's weights lie. device: "cpu" or "auto"."""
    needs = "numpy and diptych are" if kind not in ENGINE_KINDS else f"diptych[{engine}] is" if engine else (
        "torch and transformers (and diptych, for the loss) are" if kind != "outputs" else "torch and transformers are"
    )  # fmt: skip
    body = (OURS if engine else PLAIN)[kind]
    optimizer = 'OptimizerSpec(name="sgd")' if kind == "gradients" else "None"
    return (_HEAD + body).format(
        title=title, side=side, low=side.lower(), producer=producer, needs=needs, file=f"side_{side.lower()}.py",
        engine=engine, precision=precision, device=device, group=group, stage=stage, role=role, optimizer=optimizer,
    )  # fmt: skip
