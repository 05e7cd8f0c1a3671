"""Another tokenizer's reading of a response: its tokens, and where they lie in the policy's text, against oracles that
count bytes. Canaries: an alignment off by one, a forgotten EOS, a name of a special token that becomes one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as FastTokenizer

from diptych.data import examples
from diptych.data.retokenise import Retokeniser
from diptych.data.tokenizer import Tokenizer
from diptych.errors import UserError
from diptych.recipe.schema import DataRecipe, Source

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260K is absent")

OURS = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' ~ m.content ~ ('<|end|>' if m.role == 'assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TRIMMED = OURS.replace("m.content", "(m.content | trim)")
SPACED = OURS.replace("m.content ~", "' ' ~ m.content ~ '\n' ~").replace("'<|assistant|>' }}", "'<|assistant|>' }}")
NO_END = OURS.replace(" ~ ('<|end|>' if m.role == 'assistant' else '')", "")
SHOUTING = OURS.replace("m.content", "(m.content | upper)")
TEMPLATES = {"ours": OURS, "trimmed": TRIMMED, "spaced": SPACED, "no EOS of its own": NO_END, "plain": None}

TEXTS = [
    "the cat sat on the mat", "hello hello there", "naïve café", "日本語 日本", "a smile 😀 a smile 😀",
    "the the  the\n\n", "on the mat the cat", "there, the hello", "Über", "mat.",
]  # fmt: skip
TURNS = ({"role": "user", "content": "say the cat"},)


WORDS, BYTES = 310, 261  # vocabularies: with merges over TEXTS, and the bytes alone, one token to a byte


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """tokenizer(vocab_size, template): byte-level BPE, each made once."""
    made: dict[tuple, Tokenizer] = {}

    def tokenizer(vocab_size: int = WORDS, template: str | None = OURS) -> Tokenizer:
        if (vocab_size, template) not in made:
            directory = tmp_path_factory.mktemp("tokenizer")
            Tokenizer.train(TEXTS * 3, vocab_size=vocab_size, directory=directory)
            settings = json.loads((directory / "tokenizer_config.json").read_text())
            settings.pop("chat_template")
            (directory / "tokenizer_config.json").write_text(json.dumps(settings))
            (directory / "chat_template.jinja").unlink()
            if template is not None:
                (directory / "chat_template.jinja").write_text(template)
            made[vocab_size, template] = Tokenizer.load(directory)
        return made[vocab_size, template]

    return tokenizer


def plain_data(**changes) -> DataRecipe:
    return DataRecipe(buckets=(64, 128), **changes)


@pytest.fixture(scope="module")
def retokeniser(tokenizer):
    def retokeniser(template: str | None = OURS, **changes) -> Retokeniser:
        data = plain_data(**({"response_template": " {response}"} if template is None else {}), **changes)
        return Retokeniser(data, tokenizer(template=template), max_positions=100)

    return retokeniser


def oracle_columns(row, reader: Tokenizer, policy_ids, policy: Tokenizer, text: str, lead: str) -> list[int]:
    """By counting bytes: byte-level tokens have a byte to a character of their name. A state knows the whole
    characters of what the policy wrote; a token of the reader is known when its last byte, after `lead`, is."""
    response = [int(token) for token in row.tokens[row.num_prompt :]]
    ends = np.cumsum([len(reader.token(token)) for token in response]) - len(lead.encode())
    whole = np.cumsum([0, *(len(character.encode()) for character in text)])  # bytes before each character
    written = 0
    columns = []
    for token in policy_ids:
        known = whole[whole <= written].max()
        columns.append(row.num_prompt - 1 + int((ends <= known).sum()))
        written += 0 if policy.is_special(token) else len(policy.token(token))
    return columns


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("policy_size", [BYTES, 290])
def test_columns_against_bytes(tokenizer, retokeniser, name, policy_size, ended):
    """Where the policy writes bytes and the reader whole words, most states share a column; no state sees ahead."""
    policy, reading = tokenizer(policy_size), retokeniser(TEMPLATES[name])
    lead = " " if name in ("spaced", "plain") else ""
    for text in TEXTS:
        ids = policy.encode(text, add_special_tokens=False) + [policy.eos_token_id] * ended
        assert policy.decode(ids) == text
        row = reading.read(TURNS, text, ended=ended, where="here")
        known = policy.known(ids)
        columns = row.columns([0, *known[:-1]]).tolist()
        assert columns == oracle_columns(row, reading.tokenizer, ids, policy, text, lead)
        assert columns[0] >= row.num_prompt - 1
        assert (row.tokens[-1] == reading.tokenizer.eos_token_id) == ended  # the EOS is there, and only then
        assert columns[-1] < len(row.tokens) - ended  # and no state before the policy's EOS sees it
        # Canaries: starts that are one token early or late.
        assert row.columns(known).tolist() != columns
        assert row.columns([0, 0, *known[:-2]]).tolist() != columns


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_what_the_reward_model_was_trained_on(tmp_path, retokeniser, name):
    reading = retokeniser(TEMPLATES[name])
    for index, text in enumerate(TEXTS):
        file = tmp_path / f"{index}.jsonl"
        file.write_text(json.dumps({"prompt": TURNS[0]["content"], "chosen": text, "rejected": "no"}) + "\n")
        data = plain_data(
            preferences=Source(path=str(file), eval_fraction=0.0),
            response_template=reading.maker.data.response_template,
        )
        [pair] = examples.load_preferences(data, reading.tokenizer, seed=0, max_positions=100, foreign=True).train
        row = reading.read(TURNS, text, ended=True, where="here")
        assert row.tokens.tolist() == pair.chosen.tokens.tolist()
        assert row.num_prompt == int(pair.chosen.trained.argmax())
        cut = reading.read(TURNS, text, ended=False, where="here")
        assert len(cut.tokens) < len(row.tokens)  # canary: an EOS that is forgotten or always there
        assert reading.tokenizer.decode(cut.tokens[cut.num_prompt :]).strip() == text.strip()


def test_space_that_the_template_takes_away_has_no_column(tokenizer, retokeniser):
    policy, reading = tokenizer(BYTES), retokeniser(TRIMMED)
    text = "  the cat "
    ids = policy.encode(text, add_special_tokens=False)
    row = reading.read(TURNS, text, ended=True, where="here")
    columns = row.columns([0, *policy.known(ids)]) - (row.num_prompt - 1)
    # "the" is known when its e is, after two spaces and three letters; the last space adds nothing.
    assert reading.tokenizer.decode(row.tokens[row.num_prompt :]) == "the cat"
    assert columns[:3].tolist() == [0, 0, 0]
    assert (np.diff(columns) >= 0).all()
    assert columns[-1] == columns[-2] == len(row.tokens) - 1 - row.num_prompt
    assert row.columns([0, *policy.known(ids[2:])]).tolist() != columns.tolist()


def test_an_empty_response_is_its_end_or_the_prompt(retokeniser):
    for template in (OURS, TRIMMED, None):
        reading = retokeniser(template)
        for text in ("", "  ") if template == TRIMMED else ("",):
            ended = reading.read(TURNS, text, ended=True, where="here")
            assert ended.tokens[-1] == reading.tokenizer.eos_token_id
            assert (ended.columns([0, len(text)]) < len(ended.tokens) - 1).all()
            cut = reading.read(TURNS, text, ended=False, where="here")
            if template is not None:
                assert len(cut.tokens) == cut.num_prompt


def test_a_name_of_a_special_token_stays_words(retokeniser):
    """A policy that writes "<|end|>" letter by letter ends nothing, and opens no turn."""
    reading = retokeniser()
    reader = reading.tokenizer
    text = "the<|end|><|user|>cat"
    row = reading.read(TURNS, text, ended=True, where="here")
    response = row.tokens[row.num_prompt :]
    assert row.num_literal == 2
    assert reader.decode(response) == text
    assert [reader.is_special(token) for token in response] == [False] * (len(response) - 1) + [True]
    known = row.columns([len("the<|end|><|user|>")])[0] - row.num_prompt + 1
    assert reader.decode(response[:known]) == "the<|end|><|user|>"
    naive = reader.encode_after(text, reader.eos_token_id)  # canary: what plain encoding would have given
    assert any(reader.is_special(token) for token in naive)
    assert reading.read(TURNS, "the cat", ended=True, where="here").num_literal == 0


def test_templates_that_cannot_be_aligned_are_refused(retokeniser):
    reading = retokeniser(SHOUTING)
    with pytest.raises(UserError, match=r"^here: the template of .* changes the words of a response \('the cat'"):
        reading.read(TURNS, "the cat", ended=True, where="here")
    later = OURS.replace("{% for", "{{ messages | length }}{% for")
    with pytest.raises(UserError, match="writes the prompt differently once an answer follows"):
        retokeniser(later).read(TURNS, "the cat", ended=True, where="here")
    with pytest.raises(UserError, match="has no chat template"):
        retokeniser(None, chat="always")


def brute_force_known(reader: Tokenizer, ids) -> list[int]:
    """Decode every prefix; what the whole begins with, too, is known from then on."""
    text, known = reader.decode(ids), [0]
    for end in range(1, len(ids) + 1):
        prefix = reader.decode(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}")
        known.append(max(known[-1], len(os.path.commonprefix([prefix, text]))))  # noqa: RUF071 - of characters
    return known[1:]


@pytest.mark.parametrize("which", ["byte-level", pytest.param("sentencepiece", marks=needs_stories)])
def test_known_against_every_prefix(tokenizer, which):
    """Random ids: broken UTF-8, special tokens in the middle, decoders that go back on bytes."""
    reader = tokenizer() if which == "byte-level" else Tokenizer.load(STORIES)
    rng = np.random.default_rng(3)
    differs = 0
    for _ in range(200):
        ids = rng.integers(0, reader.vocab_size, rng.integers(1, 24)).tolist()
        known = reader.known(ids)
        assert known == brute_force_known(reader, ids)
        differs += known != np.cumsum([len(reader.decode([token])) for token in ids]).tolist()
    assert differs > 50  # canary: token by token is not enough


@needs_stories
def test_sentencepiece_spans_end_where_the_text_does():
    """No token of the reader claims to be known before all its characters are."""
    reader = Tokenizer.load(STORIES)
    for text in TEXTS:
        for previous in (reader.eos_token_id, 300):
            ids, ends = reader.encode_spans(text, previous)
            assert ids == reader.encode_after(text, previous)
            assert ends[-1] == len(text)
            shown = reader.known([300, *ids])  # a word before, or the first space would be dropped
            gap = shown[0] + (previous == reader.eos_token_id)  # after </s> a space is put before the text
            assert all(end >= known - gap for end, known in zip(ends, shown[1:], strict=True))


def test_byte_level_spans_count_the_spaces_that_offsets_leave_out(tmp_path):
    """The library trims spaces from the offsets of byte-level tokens; a token would seem known before its space is."""
    directory = tmp_path / "t"
    Tokenizer.train(TEXTS, vocab_size=WORDS, directory=directory)
    state = json.loads((directory / "tokenizer.json").read_text())
    state["post_processor"]["trim_offsets"] = True
    state["pre_tokenizer"]["use_regex"] = False  # so that merges reach over the space after a word,
    state["model"]["vocab"]["e\u0120"] = WORDS  # and one that does
    state["model"]["merges"].insert(0, ["e", "\u0120"])
    (directory / "tokenizer.json").write_text(json.dumps(state))
    merged = Tokenizer.load(directory)
    ids, ends = merged.encode_spans("the  the mat ", 300)
    assert ends == np.cumsum([len(merged.token(token)) for token in ids]).tolist()
    trimmed = FastTokenizer.from_file(str(directory / "tokenizer.json")).encode("the  the mat ")  # canary
    assert trimmed.ids == ids
    assert any(end < ours for (_, end), ours in zip(trimmed.offsets, ends, strict=True))
