"""Which tokens a row becomes and which of them are trained, token by token; limits, splits and real data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diptych.data import examples, splits
from diptych.data.sources import Demonstration, Pair, Prompt
from diptych.data.tokenizer import Tokenizer
from diptych.errors import UserError
from diptych.recipe.schema import DataRecipe, Source

SHARED = Path(__file__).parents[2].parent / "shared"
GSM8K = SHARED / "data" / "gsm8k"
STORIES = SHARED / "models" / "stories260K"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="../shared/data/gsm8k is absent")
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260K is absent")

CHATML = """\
{% for message in messages %}
{{ '<|system|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|system|>assistant\n' }}{% endif %}"""
"""Every turn closed by the EOS and followed by a line break, as in ChatML: user turns hold the EOS too."""


def characters(directory: Path, *, template: str | None = None, bos: bool = False, pad: str = "<|pad|>") -> Tokenizer:
    """A tokenizer without merges: one token to a byte, so that tests can name every token."""
    Tokenizer.train(["abc"], vocab_size=261, directory=directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    if bos:
        settings["bos_token"] = "<|system|>"
        processor = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|system|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|system|>": {"id": "<|system|>", "ids": [4], "tokens": ["<|system|>"]}},
        }
        state = json.loads((directory / "tokenizer.json").read_text())
        (directory / "tokenizer.json").write_text(json.dumps({**state, "post_processor": processor}))
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": pad}))
    return Tokenizer.load(directory)


OURS = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ ('<|end|>' if m.role == 'assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def rows_file(path: Path, *rows: dict) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(path), eval_fraction=0.0)


def recipe(source: Source, **changes: object) -> DataRecipe:
    return DataRecipe(demonstrations=source, preferences=source, prompts=source, **changes)  # pyright: ignore


def marked(example: examples.TokenExample, tokenizer: Tokenizer) -> str:
    """The row as text, what is trained in [brackets]."""
    text, inside = "", False
    for token, trained in zip(example.tokens, example.trained, strict=True):
        text += {(False, True): "[", (True, False): "]"}.get((inside, bool(trained)), "")
        text += tokenizer.decode([int(token)], skip_special_tokens=False)
        inside = bool(trained)
    return text + ("]" if inside else "")


def load(data: DataRecipe, tokenizer: Tokenizer, max_positions: int = 512) -> splits.Split[examples.TokenExample]:
    return examples.load_demonstrations(data, tokenizer, seed=0, max_positions=max_positions)


MULTI = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b."},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d."},
]
PLAIN = {"prompt_template": "Q: {prompt}\n", "response_template": " {response}", "chat": "never"}
MASKS = [
    ("ours", OURS, False, {}, {"prompt": "hi", "response": "yo"}, "<|user|>hi<|assistant|>[yo<|end|>]"),
    (
        "multi-turn",
        OURS,
        False,
        {},
        {"messages": MULTI},
        "<|user|>a?<|assistant|>[b.<|end|>]<|user|>c?<|assistant|>[d.<|end|>]",
    ),
    (
        "chatml",
        CHATML,
        False,
        {},
        {"question": "hi", "answer": "yo"},
        "<|system|>user\nhi<|end|>\n<|system|>assistant\n[yo<|end|>]",
    ),
    (
        "chatml, multi-turn: the break after the EOS is not trained",
        CHATML,
        False,
        {},
        {"messages": MULTI},
        "<|system|>user\na?<|end|>\n<|system|>assistant\n[b.<|end|>]"
        "\n<|system|>user\nc?<|end|>\n<|system|>assistant\n[d.<|end|>]",
    ),
    ("chat, never a BOS of our own", OURS, True, {}, {"prompt": "hi", "response": "yo"}, None),
    ("plain", None, False, {}, {"prompt": "hi", "completion": "yo"}, "hi[yo<|end|>]"),
    ("plain, BOS", None, True, PLAIN, {"question": "hi", "answer": "yo"}, "<|system|>Q: hi\n[ yo<|end|>]"),
    (
        "plain, no second BOS",
        None,
        True,
        {"prompt_template": "<|system|>{prompt}"},
        {"prompt": "hi", "response": "yo"},
        "<|system|>hi[yo<|end|>]",
    ),
    ("plain, no second EOS", None, False, {}, {"prompt": "hi", "response": "yo<|end|>"}, "hi[yo<|end|>]"),
    ("chat, no second EOS", OURS, False, {}, {"prompt": "hi", "response": "yo<|end|>"}, None),
    ("braces are text", None, False, {}, {"prompt": "{x}", "response": "{prompt}"}, "{x}[{prompt}<|end|>]"),
]


@pytest.mark.parametrize(
    ("template", "bos", "changes", "row", "expected"), [m[1:] for m in MASKS], ids=[m[0] for m in MASKS]
)
def test_masks_token_by_token(
    tmp_path: Path, template: str | None, bos: bool, changes: dict, row: dict, expected: str | None
) -> None:
    tokenizer = characters(tmp_path / "tokenizer", template=template, bos=bos)
    [example] = load(recipe(rows_file(tmp_path / "rows.jsonl", row), **changes), tokenizer).train
    expected = expected or "<|user|>hi<|assistant|>[yo<|end|>]"
    assert marked(example, tokenizer) == expected, "\n" + examples.describe(example, tokenizer)
    assert example.tokens.dtype == np.int32
    assert example.trained.dtype == bool
    # Canaries: a mask that is one column early or late, or that forgets the EOS, must not read the same.
    for wrong in (np.roll(example.trained, 1), np.roll(example.trained, -1), example.trained & (example.tokens != 1)):
        assert marked(replace(example, trained=wrong), tokenizer) != expected


@pytest.mark.parametrize("template", [OURS, CHATML, None])
def test_pad_may_be_the_end_token(tmp_path: Path, template: str | None) -> None:
    """Masks come from segments, so a pad id that equals the EOS changes nothing but the pad id."""
    source = rows_file(tmp_path / "rows.jsonl", {"prompt": "hi", "response": "yo"})
    one = characters(tmp_path / "one", template=template)
    same = characters(tmp_path / "same", template=template, pad="<|end|>")
    assert same.pad_token_id == same.eos_token_id != one.pad_token_id
    [example], [other] = load(recipe(source), same).train, load(recipe(source), one).train
    assert example.tokens.tolist() == other.tokens.tolist()
    assert example.trained.tolist() == other.trained.tolist()
    assert example.tokens[-1] == same.eos_token_id
    assert example.trained[-1]
    assert not (example.trained & (example.tokens != same.pad_token_id))[-1]  # what guessing from ids would do


def test_masks_agree_with_transformers_assistant_mask(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = OURS.replace(
        "{{ '<|' ~ m.role ~ '|>' ~ m.content ~ ('<|end|>' if m.role == 'assistant' else '') }}",
        (
            "{{ '<|' ~ m.role ~ '|>' }}{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content ~ '<|end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        ),
    )
    tokenizer = characters(tmp_path / "tokenizer", template=template)
    [example] = load(recipe(rows_file(tmp_path / "rows.jsonl", {"messages": MULTI})), tokenizer).train
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer").apply_chat_template(
        MULTI, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.tokens.tolist() == theirs["input_ids"]
    assert example.trained.astype(int).tolist() == theirs["assistant_masks"]
    assert np.roll(example.trained, 1).astype(int).tolist() != theirs["assistant_masks"]


def test_demonstrations_pairs_and_prompts_share_their_prompt_tokens(tmp_path: Path) -> None:
    for name, template, changes in (("chat", OURS, {}), ("chatml", CHATML, {}), ("plain", None, PLAIN)):
        tokenizer = characters(tmp_path / name, template=template, bos=True)
        row = {"prompt": "hi", "chosen": "yo", "rejected": "no way"}
        data = recipe(rows_file(tmp_path / "pairs.jsonl", row), **changes)
        [pair] = examples.load_preferences(data, tokenizer, seed=0, max_positions=64).train
        [prompt] = examples.load_prompts(data, tokenizer, seed=0, max_positions=64).train
        data = recipe(rows_file(tmp_path / "demo.jsonl", {"prompt": "hi", "response": "yo"}), **changes)
        [demonstration] = load(data, tokenizer).train
        width = len(prompt.tokens)
        for example in (pair.chosen, pair.rejected, demonstration):
            assert example.tokens[:width].tolist() == prompt.tokens.tolist()
            assert not example.trained[:width].any()
            assert example.trained[width:].all()
            assert example.tokens[-1] == tokenizer.eos_token_id
        assert pair.chosen.tokens.tolist() == demonstration.tokens.tolist() != pair.rejected.tokens.tolist()
        assert (prompt.text, prompt.data) == ("hi", row)


def test_history_of_a_pair_is_prompt(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer", template=OURS)
    row = {"prompt": MULTI[:3], "chosen": "d.", "rejected": "e"}
    data = recipe(rows_file(tmp_path / "rows.jsonl", row))
    [pair] = examples.load_preferences(data, tokenizer, seed=0, max_positions=64).train
    head = "<|user|>a?<|assistant|>b.<|end|><|user|>c?<|assistant|>"
    assert marked(pair.chosen, tokenizer) == f"{head}[d.<|end|>]"
    assert marked(pair.rejected, tokenizer) == f"{head}[e<|end|>]"
    [prompt] = examples.load_prompts(data, tokenizer, seed=0, max_positions=64).train
    assert prompt.text == head  # more than one turn: the whole rendering


def test_a_template_without_an_end_gets_one(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer", template=OURS.replace("<|end|>", "\n"))
    split = load(recipe(rows_file(tmp_path / "rows.jsonl", {"messages": MULTI})), tokenizer)
    assert marked(split.train[0], tokenizer) == "<|user|>a?<|assistant|>[b.\n]<|user|>c?<|assistant|>[d.\n<|end|>]"
    assert split.report["eos_added"] == 1


ROW = {"prompt": "hello", "response": "world"}  # 5 tokens, and 5 with the EOS
LIMITS = [
    # max_prompt, max_response, error, drop, truncate
    (5, 6, None, "hello[world<|end|>]", "hello[world<|end|>]"),
    (4, 6, "the prompt has 5 tokens, data.max_prompt_tokens is 4", None, "ello[world<|end|>]"),
    (5, 5, "the response has 6 tokens, data.max_response_tokens is 5", None, "hello[world]"),
    (1, 2, "the prompt has 5 tokens, data.max_prompt_tokens is 1", None, "o[wo]"),
]


@pytest.mark.parametrize(("max_prompt", "max_response", "error", "dropped", "truncated"), LIMITS)
def test_too_long(
    tmp_path: Path, max_prompt: int, max_response: int, error: str | None, dropped: str | None, truncated: str
) -> None:
    tokenizer = characters(tmp_path / "tokenizer")
    source = rows_file(tmp_path / "rows.jsonl", {"prompt": "a", "response": "b"}, ROW)
    data = recipe(source, max_prompt_tokens=max_prompt, max_response_tokens=max_response)
    if error is not None:
        with pytest.raises(UserError, match=rf"rows\.jsonl:2: {re.escape(error)}: raise it, or set data\.too_long"):
            load(data, tokenizer)
    for policy, expected in (("drop", dropped), ("truncate", truncated)):
        split = load(replace(data, too_long=policy), tokenizer)
        found = {example.row: marked(example, tokenizer) for example in split.train}
        assert found.get(1) == expected
        assert found[0] == "a[b<|end|>]"
        touched = int(error is not None)
        assert split.report["dropped"] == (touched if policy == "drop" else 0)
        assert split.report["truncated"] == (touched if policy == "truncate" else 0)
        assert split.report["rows"] == 2 == split.report["train"] + split.report["dropped"]
        prompts = examples.load_prompts(replace(data, too_long=policy), tokenizer, seed=0, max_positions=64)
        assert [p.row for p in prompts.train] == ([0] if policy == "drop" and max_prompt < 5 else [0, 1])


def test_a_cut_prompt_keeps_its_bos(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer", bos=True)
    data = recipe(rows_file(tmp_path / "rows.jsonl", ROW), max_prompt_tokens=3, too_long="truncate")
    assert marked(load(data, tokenizer).train[0], tokenizer) == "<|system|>lo[world<|end|>]"


def test_a_pair_that_truncation_made_identical_is_counted_out(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer")
    rows = [{"prompt": "a", "chosen": f"same {word}", "rejected": "same end"} for word in ("start", "else")]
    rows.append({"prompt": "a", "chosen": "other", "rejected": "same end"})
    data = recipe(rows_file(tmp_path / "rows.jsonl", *rows), max_response_tokens=5, too_long="truncate")
    split = examples.load_preferences(data, tokenizer, seed=0, max_positions=64)
    assert [pair.row for pair in split.train] == [2]
    assert (split.report["identical_after_truncation"], split.report["truncated"]) == (2, 1)


FAULTS = [
    (
        "EOS inside",
        None,
        {},
        {"prompt": "a", "response": "b<|end|>c"},
        "end-of-sequence token '<|end|>' before its end",
    ),
    ("EOS inside, chat", OURS, {}, {"prompt": "a", "response": "b<|end|>c"}, "end-of-sequence token '<|end|>' before"),
    ("only an EOS", None, {}, {"prompt": "a", "response": "<|end|>"}, "nothing would be trained"),
    ("no answer", "{{ messages[0].content }}", {}, {"prompt": "a", "response": "b"}, "nothing would be trained"),
    ("history", None, {}, {"messages": MULTI}, "a conversation of several turns needs a chat template"),
    (
        "roles",
        "{{ raise_exception('no systems') }}",
        {},
        {"prompt": "a", "response": "b"},
        "refuses the messages: no systems",
    ),
    (
        "rewritten history",
        "{% for m in messages %}{{ m.role[0] }}{{ m.content if loop.last or m.role == 'user' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}",
        {},
        {"messages": MULTI},
        "the chat template writes the turns before turn 4 differently",
    ),
    (
        "positions",
        None,
        {},
        {"prompt": "a" * 40, "response": "b" * 30},
        "71 tokens do not fit the model's 64 positions",
    ),
    (
        "buckets",
        None,
        {"buckets": (8, 16)},
        {"prompt": "a" * 9, "response": "b" * 9},
        "more than the largest of data.buckets",
    ),
]


@pytest.mark.parametrize(("template", "changes", "row", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_name_file_and_line(
    tmp_path: Path, template: str | None, changes: dict, row: dict, message: str
) -> None:
    tokenizer = characters(tmp_path / "tokenizer", template=template)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(recipe(rows_file(tmp_path / "rows.jsonl", row), **changes), tokenizer, max_positions=64)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")


def test_no_space_is_put_inside_a_conversation(tmp_path: Path) -> None:
    """A tokenizer that puts a space before every text does so at the start of the row and nowhere else."""
    template = "{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ ';' }}{% endfor %}"
    directory = tmp_path / "tokenizer"
    characters(directory, template=template + "{% if add_generation_prompt %}a:{% endif %}")
    state = json.loads((directory / "tokenizer.json").read_text())
    state["pre_tokenizer"]["add_prefix_space"] = True
    (directory / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(directory)
    [example] = load(recipe(rows_file(tmp_path / "rows.jsonl", {"messages": MULTI})), tokenizer).train
    assert marked(example, tokenizer) == " u:a?;a:[b.;]u:c?;a:[d.;<|end|>]"


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    source = rows_file(tmp_path / "rows.jsonl", ROW)
    plain, chat = characters(tmp_path / "plain"), characters(tmp_path / "chat", template=OURS)
    for tokenizer, changes, message in (
        (plain, {"chat": "always"}, "data.chat is always, but the tokenizer of .* has no chat template"),
        (chat, {"prompt_template": "Q: {prompt}"}, "data.prompt_template is set, but the chat template"),
        (plain, {"response_template": "answer"}, r"data.response_template 'answer' must hold \{response\}"),
    ):
        with pytest.raises(UserError, match=message):
            load(recipe(source, **changes), tokenizer)
    load(recipe(source, prompt_template="Q: {prompt}", chat="never"), chat)


def test_every_row_too_long_is_an_error(tmp_path: Path) -> None:
    data = recipe(rows_file(tmp_path / "rows.jsonl", ROW), max_prompt_tokens=2, too_long="drop")
    with pytest.raises(UserError, match=r"data\.demonstrations: not one of 1 training rows fits"):
        load(data, characters(tmp_path / "tokenizer"))


# --- splits ----------------------------------------------------------------------------------------------------------


def numbered(path: Path, count: int, kind: str = "response") -> Source:
    keys = {"response": ("response",), "pair": ("chosen", "rejected"), "prompt": ()}[kind]
    rows = [{"prompt": f"prompt {i % 90}", **{key: f"{key} {i}" for key in keys}} for i in range(count)]
    return replace(rows_file(path, *rows), eval_fraction=0.2)


def test_splits_are_disjoint_stable_and_the_same_for_every_kind(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer")
    data = DataRecipe(
        demonstrations=numbered(tmp_path / "d.jsonl", 300),
        preferences=numbered(tmp_path / "p.jsonl", 200, "pair"),
        prompts=numbered(tmp_path / "q.jsonl", 90, "prompt"),
    )
    sides: list[tuple[set[int], set[int]]] = []
    for loader in (examples.load_demonstrations, examples.load_preferences, examples.load_prompts):
        split = loader(data, tokenizer, seed=3, max_positions=64)
        train, held_out = ({example.row % 90 for example in side} for side in (split.train, split.held_out))
        assert not train & held_out
        assert train | held_out == set(range(90))
        assert split.report["train_prompts"] == len(train)
        assert split.report["held_out_prompts"] == len(held_out)
        assert split.report["prompts_on_both_sides"] == 0
        assert 5 <= len(held_out) <= 35
        sides.append((train, held_out))
    assert sides[0] == sides[1] == sides[2]
    fewer = load(replace(data, demonstrations=numbered(tmp_path / "fewer.jsonl", 60)), tokenizer)
    more = load(data, tokenizer)
    assert {e.row for e in fewer.held_out} == {e.row for e in more.held_out if e.row < 60}  # adding rows moves none
    other = examples.load_prompts(data, tokenizer, seed=4, max_positions=64)
    assert {example.row for example in other.held_out} != sides[2][1]  # canary: the seed matters


def test_formats_of_one_prompt_fall_on_one_side() -> None:
    user = {"role": "user", "content": "Where?"}
    common: dict = {"row": 0, "where": "f:1", "data": {}}
    answer = {"role": "assistant", "content": "Here."}
    rows = [
        Demonstration(turns=(user, answer), **common),
        Demonstration(turns=(user, answer, user, answer), **common),
        Pair(turns=(user,), chosen=answer, rejected=user, **common),
        Prompt(turns=(user, answer, user), **common),
    ]
    greeted = [Prompt(turns=(answer, user), **common), Demonstration(turns=(answer, user, answer), **common)]
    assert len({splits.hash_fraction(row.turns, seed=0) for row in greeted}) == 1
    other = {**user, "content": "When?"}  # a conversation that the assistant opens is told apart by its first question
    assert splits.hash_fraction((answer, other), seed=0) != splits.hash_fraction((answer, user), seed=0)
    assert len({splits.hash_fraction(row.turns, seed=0) for row in rows}) == 1
    assert splits.hash_fraction(({**user, "content": "Where"},), seed=0) != splits.hash_fraction((user,), seed=0)


def test_eval_path_eval_limit_and_empty_sides(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer")
    source = numbered(tmp_path / "a.jsonl", 90)
    limited = load(recipe(replace(source, eval_limit=2)), tokenizer)
    everything = load(recipe(source), tokenizer)
    assert [e.row for e in limited.held_out] == [e.row for e in everything.held_out[:2]]
    assert limited.report["past_eval_limit"] == len(everything.held_out) - 2
    named = load(recipe(replace(source, eval_path=source.path, eval_limit=10)), tokenizer)
    assert (len(named.train), len(named.held_out), named.report["prompts_on_both_sides"]) == (90, 10, 10)
    assert load(recipe(replace(source, eval_fraction=0.0)), tokenizer).held_out == []
    for fraction, message in ((1e-9, "none of 90 rows was held out"), (1.5, "must be at least 0 and below 1")):
        with pytest.raises(UserError, match=message):
            load(recipe(replace(source, eval_fraction=fraction)), tokenizer)
    with pytest.raises(UserError, match="all 90 rows were held out"):
        load(recipe(replace(source, eval_fraction=1 - 1e-9)), tokenizer)


def test_tokenizer_texts_are_the_training_side(tmp_path: Path) -> None:
    source = numbered(tmp_path / "a.jsonl", 90)
    texts = examples.tokenizer_texts(recipe(source), seed=0)
    held_out = {example.row for example in load(recipe(source), characters(tmp_path / "tokenizer")).held_out}
    assert set(texts) == {f"{word} {i}" for i in range(90) if i not in held_out for word in ("prompt", "response")}


# --- real data -------------------------------------------------------------------------------------------------------


@needs_gsm8k
@needs_stories
def test_gsm8k_with_a_sentencepiece_like_tokenizer() -> None:
    tokenizer = Tokenizer.load(STORIES)
    data = DataRecipe(
        demonstrations=Source(
            path=str(GSM8K / "train.jsonl"), limit=60, eval_path=str(GSM8K / "test.jsonl"), eval_limit=9
        ),
        preferences=Source(path=str(GSM8K / "preferences.jsonl"), limit=120, eval_fraction=0.3),
        prompts=Source(path=str(GSM8K / "train.jsonl"), limit=60),
        prompt_template="Question: {prompt}\nAnswer:",
        response_template=" {response}",
        max_prompt_tokens=200,
        max_response_tokens=200,
        too_long="drop",
    )
    split = examples.load_demonstrations(data, tokenizer, seed=0, max_positions=512)
    assert split.report["train"] + split.report["held_out"] + split.report["dropped"] == split.report["rows"] == 69
    assert split.report["longest_prompt"] <= 200
    assert split.report["longest_response"] <= 200
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")]
    for example in split.train:
        row, first = rows[example.row], int(np.flatnonzero(example.trained)[0])
        text = f"Question: {row['question']}\nAnswer: {row['answer']}"
        assert tokenizer.decode(example.tokens) == text  # no space between the segments but the template's own
        assert tokenizer.decode(example.tokens[:first]) == f"Question: {row['question']}\nAnswer:"
        assert example.trained[first:].all()
        assert (example.tokens == 2).sum() == 1 == (example.tokens == 1).sum()
        assert example.tokens[0] == 1
        assert example.tokens[-1] == 2
    pairs = examples.load_preferences(data, tokenizer, seed=0, max_positions=512)
    assert pairs.report["train"] + pairs.report["held_out"] + pairs.report["dropped"] == 120
    assert pairs.report["prompts_on_both_sides"] == 0
    prompts = examples.load_prompts(data, tokenizer, seed=0, max_positions=512)
    assert prompts.train[0].text == rows[prompts.train[0].row]["question"]


@needs_gsm8k
@pytest.mark.slow
def test_all_of_gsm8k_loads(tmp_path: Path) -> None:
    tokenizer = characters(tmp_path / "tokenizer")
    data = DataRecipe(
        demonstrations=Source(path=str(GSM8K / "train.jsonl"), eval_path=str(GSM8K / "test.jsonl")),
        preferences=Source(path=str(GSM8K / "preferences.jsonl")),
        max_prompt_tokens=2048,
        max_response_tokens=2048,
    )
    split = examples.load_demonstrations(data, tokenizer, seed=0, max_positions=4096)
    assert (split.report["train"], split.report["held_out"], split.report["prompts_on_both_sides"]) == (5000, 800, 0)
    pairs = examples.load_preferences(data, tokenizer, seed=0, max_positions=4096)
    assert pairs.report["train"] + pairs.report["held_out"] == 1176
