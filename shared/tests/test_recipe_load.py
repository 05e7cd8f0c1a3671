"""Every way in which a recipe's text can be wrong, and the place that the error must name; and the way back to YAML."""

import dataclasses
import string
import typing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diptych.errors import UserError
from diptych.recipe.document import read_scalar
from diptych.recipe.load import dump_recipe, flatten, hints, load_recipe, parse_recipe, recipe_to_dict, without_none
from diptych.recipe.new_model import new_model
from diptych.recipe.schema import Recipe, RolloutRecipe

# Line numbers matter: `name` is on line 1, `sft` on 2, `learning_rate` on 3, `model` on 10.
GOOD = """\
name: test
sft:
  learning_rate: 1e-3
  batch_size: 8
rl:
  reward: {function: "rewards.py:score"}
# a comment
data:
  prompts: {path: p.jsonl}
model:
  path: some/model
stages: [rl]
"""

NEW = "{hidden_size: 8, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 2}"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return "r.yaml"

    return write


FILE_ERRORS = {
    "typo": (
        "reward: {learnin_rate: 1}",
        "r.yaml:13: unknown key 'reward.learnin_rate'; did you mean 'reward.learning_rate'?",
    ),
    "typo in a group": ("layuot: {}", "r.yaml:13: unknown key 'layuot'; did you mean 'layout'?"),
    "typo below": (
        "checkpoint:\n  evry: 3",
        "r.yaml:14: unknown key 'checkpoint.evry'; did you mean 'checkpoint.every'?",
    ),
    "another group's key": ("kl_coef: 0.1", "r.yaml:13: unknown key 'kl_coef'; did you mean 'rl.kl_coef'?"),
    "nothing near": ("layout: {xyz: 1}", "r.yaml:13: unknown key 'layout.xyz'; 'layout' has"),
    "dotted key": ("rollout.top_k: 3", "r.yaml:13: key 'rollout.top_k' is written with a dot; nest it instead"),
    "text for a number": ("rollout: {top_p: fast}", "r.yaml:13: 'rollout.top_p': expected a number, got 'fast'"),
    "quoted number": ("rollout: {top_p: '1e-5'}", "expected a number, got '1e-5'; take away the quotes"),
    "bool for an int": ("seed: true", "r.yaml:13: 'seed': expected a whole number, got true"),
    "bool for a float": ("rollout: {top_p: true}", "r.yaml:13: 'rollout.top_p': expected a number, got true"),
    "float for an int": ("seed: 1.5", "r.yaml:13: 'seed': expected a whole number, got 1.5"),
    "exponent for an int": ("seed: 1e3", "r.yaml:13: 'seed': expected a whole number, got 1000.0"),
    "octal": ("seed: 010", "r.yaml:13: 'seed': expected a whole number, got '010'"),
    "sexagesimal": ("seed: 12:30", "r.yaml:13: 'seed': expected a whole number, got '12:30'"),
    "nan": ("rollout: {top_p: .nan}", "r.yaml:13: 'rollout.top_p': expected a finite number, got nan"),
    "infinity": ("rollout: {top_p: -.inf}", "r.yaml:13: 'rollout.top_p': expected a finite number, got -inf"),
    "overflow": ("rollout: {top_p: 1e999}", "r.yaml:13: 'rollout.top_p': expected a finite number, got inf"),
    "huge int": ("rollout: {top_p: 1" + "0" * 400 + "}", "r.yaml:13: 'rollout.top_p': expected a finite number"),
    "nan as a word": ("rollout: {top_p: nan}", "expected a number, got 'nan'"),
    "number for a text": (
        "rollout: {stop: [5]}",
        "r.yaml:13: 'rollout.stop[0]': expected a text, got 5; put it in quotes",
    ),
    "list for a number": ("seed: [1]", "r.yaml:13: 'seed': expected a whole number, got a list"),
    "null for a number": ("seed: null", "r.yaml:13: 'seed': expected a whole number, got null"),
    "number for a list": ("rollout: {stop: x}", "r.yaml:13: 'rollout.stop': expected a list of texts, got 'x'"),
    "short pair": (
        "reward: {optimizer: {betas: [0.9]}}",
        "r.yaml:13: 'reward.optimizer.betas': expected a list of 2 numbers",
    ),
    "text in a pair": (
        "reward: {optimizer: {betas: [0.9, b]}}",
        "'reward.optimizer.betas[1]': expected a number, got 'b'",
    ),
    "choice": (
        "precision: float23",
        "r.yaml:13: 'precision': expected one of float32, float64, bfloat16, got 'float23'; did you mean",
    ),
    "choice of ints": (
        "layout: {zero: {stage: 4}}",
        "r.yaml:13: 'layout.zero.stage': expected one of 0, 1, 2, 3, got 4",
    ),
    "bool for a choice": ("layout: {zero: {stage: true}}", "'layout.zero.stage': expected one of 0, 1, 2, 3, got true"),
    "scalar for a group": ("reward: 3", "r.yaml:13: 'reward': expected a mapping of settings, got 3"),
    "null for a group": ("reward:", "r.yaml:13: 'reward': expected a mapping of settings, got null; leave the key out"),
    "list for a group": ("reward: [a]", "r.yaml:13: 'reward': expected a mapping of settings, got a list"),
    "duplicate": ("seed: 1\nseed: 2", "r.yaml:14: key 'seed' is given twice (first at r.yaml:13)"),
    "duplicate below": (
        "rollout:\n  top_k: 1\n  top_k: 2",
        "r.yaml:15: key 'top_k' is given twice (first at r.yaml:14)",
    ),
    "duplicate of an earlier line": ("sft: {}", "r.yaml:13: key 'sft' is given twice (first at r.yaml:2)"),
    "bad YAML": ("seed: [1", "not valid YAML"),
    "tab": ("rollout:\n\ttop_k: 1", "r.yaml:14: not valid YAML"),
    "two documents": ("---\nseed: 1", "r.yaml:13: not valid YAML"),
    "python tag": ("seed: !!python/object/apply:os.getcwd []", "r.yaml:13: tags (tag:yaml.org,2002:python"),
    "explicit tag": ("seed: !!int '5'", "r.yaml:13: tags (tag:yaml.org,2002:int) are not supported"),
    "merge key": ("rollout:\n  <<: {top_k: 1}", "r.yaml:14: merge keys (<<) are not supported"),
    "recursive alias": ("rollout: &a {stop: *a}", "r.yaml:13: an alias refers to the value that contains it"),
    "unquoted template": (
        "reward: {model_path: {prompt}}",
        "'reward.model_path': expected a text, got a mapping; put it in",
    ),
    "key that is a mapping": ("rollout: {{top_k}: 1}", "r.yaml:13: a key must be a word"),
    "control character": ("seed: \x07", "r.yaml: not valid YAML: character #x0007 is not allowed"),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_error_in_a_file_names_line_key_and_remedy(case, write):
    text, message = FILE_ERRORS[case]
    with pytest.raises(UserError) as caught:
        load_recipe(write(GOOD + text + "\n"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml")
    assert "\n" not in str(caught.value)


WHOLE_FILE_ERRORS = {
    "empty": ("", "r.yaml: empty; a recipe is a mapping"),
    "only a comment": ("# nothing\n", "r.yaml: empty"),
    "a list": ("\n- a\n", "r.yaml:2: expected a mapping of settings (key: value), got a list"),
    "a word": ("quickstart", "r.yaml:1: expected a mapping of settings (key: value), got 'quickstart'"),
    "no name": ("seed: 1", "r.yaml: missing required key 'name'"),
    "half a model": (f"name: x\n\nmodel:\n  new: {NEW}", "r.yaml:4: missing required key 'model.new.vocab_size'"),
    "half a llama": (
        f"name: x\n\nmodel:\n  new:\n    {NEW[1:-1]}\n    vocab_size: 300".replace(", ", "\n    "),
        "r.yaml:4: 'model.new.num_key_value_heads': is not set, and a new llama model needs num_key_value_heads, "
        "max_position_embeddings",
    ),
    "half an rnn": (
        "name: x\n\nmodel:\n  new: {family: rnn, vocab_size: 300, hidden_size: 8}",
        "r.yaml:4: 'model.new.num_hidden_layers': is not set, and a new rnn model needs num_hidden_layers, max_pos",
    ),
    "a config.json that is none": (
        "name: x\n\nmodel:\n  new:\n    vocab_size: 300\n    config: {model_type: gpt2, n_embd: 8, n_head: 2}",
        "r.yaml:6: 'model.new.config': missing n_layer",
    ),
    "a value that JSON has not": (
        "name: x\n\nmodel:\n  new:\n    vocab_size: 300\n    config: {model_type: gpt2,\n      x: [.nan]}",
        "r.yaml:7: 'model.new.config.x[0]': expected a finite number, got nan",
    ),
    "a config that is a text": (
        "name: x\n\nmodel:\n  new: {vocab_size: 300, config: gpt2}",
        "r.yaml:4: 'model.new.config': expected a mapping, got 'gpt2'",
    ),
    "nested a thousand deep": ("name: " + "[" * 5000 + "]" * 5000, "r.yaml: not a recipe: nested too deeply"),
}


@pytest.mark.parametrize("case", WHOLE_FILE_ERRORS)
def test_error_of_a_whole_file(case, write):
    text, message = WHOLE_FILE_ERRORS[case]
    with pytest.raises(UserError) as caught:
        load_recipe(write(text))
    assert str(caught.value).startswith(message)


def test_missing_binary_and_unreadable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("no.yaml", "no.yaml: no such recipe file"),
        ("binary.yaml", "binary.yaml: not a text file in UTF-8"),
        (".", ".: cannot be read"),
    ):
        with pytest.raises(UserError) as caught:
            load_recipe(name)
        assert str(caught.value).startswith(message)


OVERRIDE_ERRORS = {
    "typo": ("sft.learnin_rate=1", "unknown key 'sft.learnin_rate'; did you mean 'sft.learning_rate'?"),
    "typo in the group": ("stf.learning_rate=1", "unknown key 'stf.learning_rate'; did you mean 'sft.learning_rate'?"),
    "type": (
        "sft.learning_rate=fast",
        "override 'sft.learning_rate=fast': 'sft.learning_rate': expected a number, got 'fast'",
    ),
    "below a number": ("seed.x=1", "override 'seed.x=1': 'seed' is a whole number and has no settings below it"),
    "below an optional text": (
        "model.path.x=1",
        "override 'model.path.x=1': 'model.path' is a text and has no settings",
    ),
    "no equals": ("seed", "override 'seed': expected key=value"),
    "no key": ("=3", "override '=3': expected key=value"),
    "empty part": ("sft..eps=3", "override 'sft..eps=3': expected key=value"),
    "no value": ("model.path=", "override 'model.path=': no value after '='; write model.path=null"),
    "comment": ("data.prompt_template={prompt} #1", "YAML reads '#' after a space as a comment"),
    "only a comment": ("data.prompt_template=# x", "YAML reads '#' after a space as a comment"),
    "bad YAML": ("rollout.stop=[a", "override 'rollout.stop=[a': not valid YAML"),
    "duplicate in a mapping": ("rollout={top_k: 1, top_k: 2}", "key 'top_k' is given twice"),
    "unknown in a mapping": ("rollout={topk: 1}", "unknown key 'rollout.topk'; did you mean 'rollout.top_k'?"),
    "half a model": (
        "model.new.hidden_size=64",
        "override 'model.new.hidden_size=64': missing required key 'model.new.vocab_size'",
    ),
    "braces as text": (
        "data.prompt_template={prompt}",
        "'data.prompt_template': expected a text, got a mapping; put it in quotes",
    ),
    "rule": ("rollout.temperature=0", "override 'rollout.temperature=0': 'rollout.temperature': 0 is greedy"),
    "range": ("rl.gamma=1.5", "'rl.gamma': 1.5 is out of range: it must be at least 0 and at most 1"),
}


@pytest.mark.parametrize("case", OVERRIDE_ERRORS)
def test_error_in_an_override_names_it(case, write):
    override, message = OVERRIDE_ERRORS[case]
    with pytest.raises(UserError) as caught:
        load_recipe(write(GOOD), [override])
    assert message in str(caught.value)
    assert str(caught.value).startswith("override ")


def test_a_group_that_the_file_gets_wrong_is_not_replaced_by_an_override(write):
    with pytest.raises(UserError, match=r"^r.yaml:13: expected a mapping of settings, got 5"):
        load_recipe(write(GOOD + "reward: 5\n"), ["reward.epochs=2"])


def test_values_and_overrides_arrive_with_their_types(write):
    recipe = load_recipe(
        write(GOOD),
        [
            "sft.learning_rate=3", "seed=4", "rollout.stop=[a, '5']", "reward.optimizer.betas=[0, 0.5]",
            "data.buckets=[512,1024]", "rl.whiten_rewards=true", "rl.max_kl=1e1", "seed=7", "reward={epochs: 2}",
            "data.prompt_template='Q: {prompt} #1'", "sft.max_steps=null",
        ],
    )  # fmt: skip
    assert recipe.sft.learning_rate == 3.0
    assert type(recipe.sft.learning_rate) is float
    assert recipe.sft.batch_size == 8
    assert recipe.seed == 7
    assert recipe.rollout.stop == ("a", "5")
    assert recipe.reward.optimizer.betas == (0.0, 0.5)
    assert recipe.data.buckets == (512, 1024)
    assert recipe.rl.whiten_rewards is True
    assert recipe.rl.max_kl == 10.0
    assert recipe.reward.epochs == 2
    assert recipe.data.prompt_template == "Q: {prompt} #1"
    assert load_recipe(write(GOOD)).sft.learning_rate == 1e-3


def test_overrides_create_and_remove_an_optional_group(write):
    shape = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "vocab_size": 300,
    }  # fmt: skip
    overrides = ["model.path=null", "data.demonstrations.path=d.jsonl"]
    created = load_recipe(write(GOOD), overrides + [f"model.new.{key}={value}" for key, value in shape.items()])
    assert created.model.new is not None
    assert created.model.new.hidden_size == 64
    assert created.model.path is None
    removed = load_recipe(write(dump_recipe(created)), ["model.new=null", "model.path=x"])
    assert removed.model.new is None


def test_a_config_is_free_form_and_overrides_reach_into_it(write):
    config = "{model_type: gpt2, n_embd: 8, n_head: 2, n_layer: 1, n_positions: 1024}"
    text = "name: x\nstages: [sft]\ndata: {demonstrations: {path: d}}\nmodel: {new: {vocab_size: 300, config: "
    text += config + "}}"
    recipe = load_recipe(write(text), ["model.new.config.n_layer=3", "model.new.config.n_inner=32"])
    assert recipe.model.new is not None
    assert recipe.model.new.config == {
        "model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 3, "n_positions": 1024, "n_inner": 32,
    }  # fmt: skip
    assert parse_recipe(write(dump_recipe(recipe))) == recipe
    with pytest.raises(
        UserError, match="^override 'model.new.config.n_head=1.5': 'model.new.config': n_head = 1.5 must"
    ):
        load_recipe(write(text), ["model.new.config.n_head=1.5"])


FAMILIES = sorted((Path(__file__).parents[2] / "recipes" / "families").glob("*.yaml"))


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_a_familys_recipe_trains_that_family_for_twenty_steps(path):
    recipe = load_recipe(path)
    assert recipe.model.new is not None
    assert new_model(recipe.model.new).family == recipe.name == path.stem
    assert (recipe.stages, recipe.sft.max_steps) == (("sft",), 20)
    held_out = 0.8 * recipe.data.demonstrations.limit  # at least so many are left to train on
    assert recipe.sft.epochs * held_out >= 20 * recipe.sft.batch_size


def test_aliases_work_and_a_rule_names_the_line_of_its_key(write):
    recipe = load_recipe(write(GOOD + "rollout: {max_new_tokens: &n 32, top_k: *n}\n"))
    assert recipe.rollout.top_k == 32
    with pytest.raises(UserError, match=r"^r.yaml:15: 'rollout.top_p': 0.0 is out of range: it must be above 0 and at"):
        load_recipe(write(GOOD + "rollout:\n  top_k: 1\n  top_p: 0\n"))
    with pytest.raises(UserError, match=r"^override 'sft.micro_batch_size=3': 'sft.batch_size': 8 is not a multiple"):
        load_recipe(write(GOOD), ["sft.micro_batch_size=3"])  # the override did it, not the key's own line


def test_aliases_of_aliases_stay_small(write):
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 40))
    with pytest.raises(UserError, match="unknown key 'l0'"):  # and not the end of the memory
        load_recipe(write(GOOD + "l0: &l0 [x]\n" + levels))


SCALARS = {
    "1": 1, "-3": -3, "1_000": 1000, "1e-5": 1e-5, "1E5": 1e5, "1.": 1.0, ".5": 0.5, "-2.5e+3": -2500.0, "true": True,
    "~": None, "": None, "null": None, "no": "no", "on": "on", "010": "010", "0x1F": "0x1F", "1:30": "1:30", "-": "-",
    ".": ".", "e5": "e5", "1__0": "1__0", "2024-01-01": "2024-01-01", "nan": "nan", "infinity": "infinity", "0": 0,
    "0.10": 0.1, "00": "00", "١": "١",
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_are_read_as_yaml_1_2_and_never_as_1_1(text):
    value = read_scalar(text)
    assert value == SCALARS[text]
    assert type(value) is type(SCALARS[text])


TRICKY = "0123456789eE.+-_~#:'\"{}[]! \n\t"
WORDS = ["null", "true", "no", "on", "1e-5", "010", "<<", "=", "~", ".nan", "2024-01-01", "{prompt}"]


def strategy(annotation):
    """Any value of a schema annotation."""
    inner, optional = without_none(annotation)
    if optional:
        return st.none() | strategy(inner)
    if dataclasses.is_dataclass(inner):
        return st.builds(inner, **{name: strategy(kind) for name, kind in hints(inner).items()})
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        leaves = st.none() | strategy(bool) | strategy(int) | strategy(float) | strategy(str)
        values = st.recursive(
            leaves, lambda inside: st.lists(inside, max_size=3) | st.dictionaries(strategy(str), inside, max_size=3)
        )
        return st.dictionaries(strategy(str), values, max_size=3)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(strategy(arguments[0]), max_size=4).map(tuple)
        return st.tuples(*map(strategy, arguments))
    return {
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"])) | st.text(TRICKY, max_size=8) | st.sampled_from(WORDS),
    }[inner]


QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@settings(QUICK, max_examples=300)
@given(text=strategy(str))
def test_any_text_survives_dump_and_load(text, tmp_path_factory):
    recipe = Recipe(name=text, rollout=RolloutRecipe(stop=(text, "x")))
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    assert parse_recipe(path) == recipe


@settings(QUICK, max_examples=40, phases=[Phase.generate])  # a recipe is too large to shrink in reasonable time
@given(recipe=strategy(Recipe))
def test_a_dumped_recipe_loads_back_equal(recipe, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="\n")
    again = parse_recipe(path)
    assert again == recipe
    assert flatten(again) == flatten(recipe)


def test_the_round_trip_would_see_a_lost_quote(tmp_path):
    """The canary of the test above: plain PyYAML writes the text 1e-5 without quotes, and it comes back as a number."""
    import yaml

    recipe = Recipe(name="1e-5")
    assert yaml.safe_load(dump_recipe(recipe))["name"] == "1e-5"
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    with pytest.raises(UserError, match="'name': expected a text"):
        parse_recipe(tmp_path / "r.yaml")


def test_dict_and_flat_forms_have_every_field():
    plain = recipe_to_dict(Recipe(name="x"))
    assert plain["rl"]["reward"] == {"model_path": None, "function": None, "too_long": "error"}
    flat = flatten(Recipe(name="x"))
    assert flat["sft.optimizer.betas"] == [0.9, 0.95]
    assert flat["model.new"] is None
    assert set(string.ascii_lowercase).issuperset({name[0] for name in flat})
