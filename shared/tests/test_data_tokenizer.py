"""The tokenizer against transformers' own, its special tokens, and what it says of broken directories."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from diptych.data import tasks
from diptych.data.tokenizer import TRAINED_SPECIAL_TOKENS, Tokenizer, check_vocabulary
from diptych.errors import UserError

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260K is absent")

TEXTS = [
    "Once upon a time",
    " two  spaces and a tail ",
    "Zwölf Boxkämpfer; 寿司 🍣\n\ttabs",
    "",
    "don't 12345 <|user|> hi <s> there</s>",
    "<|end|>",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where are you?"},
    {"role": "assistant", "content": " In Rome; no, in Zürich. "},
    {"role": "user", "content": "And now?\n"},
]


def words() -> list[str]:
    rows = tasks.generate("postcards", "demonstrations", count=300, seed=0)
    return [text for row in rows for text in (row["prompt"], row["response"])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    Tokenizer.train(words(), vocab_size=400, directory=directory)
    return directory


def edited(source: Path, target: Path, name: str = "tokenizer_config.json", /, **changes: object) -> Path:
    """A copy of a tokenizer directory with some keys of one of its files changed (None: removed)."""
    Tokenizer.load(source).save(target)
    file = target / name
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in {**settings, **changes}.items() if v is not None}))
    return target


def with_bos(source: Path, target: Path) -> Path:
    """The trained tokenizer with a post-processor that puts <|system|> before every text, as a BOS."""
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|system|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|system|>": {"id": "<|system|>", "ids": [4], "tokens": ["<|system|>"]}},
    }
    edited(source, target, bos_token="<|system|>")
    file = target / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": processor}))
    return target


def directories(trained: Path, tmp_path: Path) -> dict[str, Path]:
    found = {"trained": trained, "bos": with_bos(trained, tmp_path / "bos")}
    if STORIES.is_dir():
        found["stories"] = STORIES
    return found


def test_same_ids_and_text_as_transformers(trained: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name, directory in directories(trained, tmp_path).items():
        ours, theirs = Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
        for text in TEXTS:
            for special in (False, True):
                ids = ours.encode(text, add_special_tokens=special)
                assert ids == theirs.encode(text, add_special_tokens=special), (name, text, special)
                for skip in (False, True):
                    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), (
                        name,
                        text,
                    )
        assert (ours.eos_token_id, ours.pad_token_id, ours.bos_token_id) == (
            theirs.eos_token_id,
            theirs.pad_token_id,
            theirs.bos_token_id,
        )
        assert ours.vocab_size == len(theirs)


# What templates in the wild use: loop controls, the assistant's block, tojson, the special tokens, lstrip and trim.
WILD_TEMPLATE = """\
{{ bos_token }}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% generation %}
[{{ message.role | upper }}] {{ message.content | trim }} {{ message | tojson }}
    {% endgeneration %}
{% endfor %}
{%- if add_generation_prompt %}{{ eos_token }}>{{ tools is none }}{% endif %}
"""


@pytest.mark.parametrize("template", [None, WILD_TEMPLATE])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_same_chat_rendering_as_transformers(
    trained: Path, tmp_path: Path, template: str | None, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    directory = with_bos(trained, tmp_path / "chat")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    text = ours.render(CHAT, add_generation_prompt=add_generation_prompt)
    assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids = theirs.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours.encode(text, add_special_tokens=False) == ids
    assert "Rome" in text
    assert text != ours.render(CHAT, add_generation_prompt=not add_generation_prompt)


def test_our_template_writes_what_it_says(trained: Path) -> None:
    text = Tokenizer.load(trained).render(CHAT[1:], add_generation_prompt=True)
    assert text == "<|user|>Where are you?<|assistant|> In Rome; no, in Zürich. <|end|><|user|>And now?\n<|assistant|>"


def test_chat_template_is_read_from_either_place(trained: Path, tmp_path: Path) -> None:
    directory = edited(trained, tmp_path, chat_template=[{"name": "default", "template": "A{{ messages[0].content }}"}])
    (directory / "chat_template.jinja").unlink()
    assert Tokenizer.load(directory).render(CHAT, add_generation_prompt=False) == "ABe brief."
    (directory / "chat_template.jinja").write_text("B{{ messages[0].content }}")
    assert Tokenizer.load(directory).render(CHAT, add_generation_prompt=False) == "BBe brief."


def test_templates_are_sandboxed(trained: Path, tmp_path: Path) -> None:
    directory = edited(trained, tmp_path)
    (directory / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UserError, match="refuses the messages"):
        Tokenizer.load(directory).render(CHAT, add_generation_prompt=False)


@needs_stories
def test_a_continuation_gets_no_space_before_it() -> None:
    tokenizer = Tokenizer.load(STORIES)
    whole = tokenizer.encode("Once upon a time, there was", add_special_tokens=True)
    parts = tokenizer.encode("Once upon a time", add_special_tokens=True)
    assert [*parts, *tokenizer.encode_after(", there was", parts[-1])] == whole
    assert [*parts, *tokenizer.encode(", there was", add_special_tokens=False)] != whole  # canary: the extra space
    assert whole[0] == tokenizer.bos_token_id == 1
    assert whole.count(1) == 1
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (512, (2,), 0)
    assert tokenizer.affixes == ((1,), ())


def spaced(directory: Path, style: str) -> Tokenizer:
    """A tokenizer that puts a space before a text, in one of the ways in which that is done."""
    fast = tokenizers.Tokenizer(models.BPE())
    if style == "prepend":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif style == "byte-level":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        fast.decoder = decoders.ByteLevel()
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=True)  # pyright: ignore
        fast.decoder = decoders.Metaspace(prepend_scheme=style, split=True)  # pyright: ignore
    fast.train_from_iterator(
        ["one two three <end> one, two, three one"] * 3,
        trainers.BpeTrainer(vocab_size=60, show_progress=False, special_tokens=["<end>", "<user>"]),
    )
    directory.mkdir(exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>", "pad_token": "<end>"}')
    return Tokenizer.load(directory)


@pytest.mark.parametrize("style", ["prepend", "first", "always", "byte-level"])
def test_segments_join_to_the_ids_of_the_whole_text(tmp_path: Path, style: str) -> None:
    tokenizer = spaced(tmp_path, style)
    different = 0
    for parts in (["one two", " three"], ["three", "two"], ["<user>one<end>", "two"], ["one<end>", "<user>one two"]):
        whole = tokenizer.encode("".join(parts), add_special_tokens=False)
        first = tokenizer.encode(parts[0], add_special_tokens=False)
        assert [*first, *tokenizer.encode_after(parts[1], first[-1])] == whole, parts
        assert [*first, *tokenizer.encode_response(parts[1], first[-1])[0]] == whole, parts
        different += [*first, *tokenizer.encode(parts[1], add_special_tokens=False)] != whole
    assert different  # canary: each part by itself is not the same
    ids, end = tokenizer.encode_response("two<end> one", tokenizer.eos_token_id)
    assert ids[-1] == tokenizer.eos_token_id
    assert end == len("two<end>")


def test_encode_response_stops_at_the_first_end(trained: Path) -> None:
    tokenizer = Tokenizer.load(trained)
    ids, end = tokenizer.encode_response("Rome ö<|end|>\n<|end|>", 3)
    assert ids == [*tokenizer.encode("Rome ö", add_special_tokens=False), tokenizer.eos_token_id]
    assert end == len("Rome ö<|end|>")
    assert tokenizer.encode_response("Rome", 20) == (tokenizer.encode("Rome", add_special_tokens=False), None)


def test_training_is_deterministic_exact_and_loadable(trained: Path, tmp_path: Path) -> None:
    again = Tokenizer.train(iter(words()), vocab_size=400, directory=tmp_path)
    assert again.vocab_size == 400
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    assert [again.token_id(token) for token in TRAINED_SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert (again.pad_token_id, again.eos_token_ids, again.bos_token_id) == (0, (1,), None)
    for text in ("Grüße aus 東京\n", " a  b "):
        assert again.decode(again.encode(text, add_special_tokens=False)) == text
    code = (
        "import sys; from test_rows import rows; from diptych.data.tokenizer import Tokenizer; "
        "Tokenizer.train(rows, vocab_size=400, directory=sys.argv[1])"
    )
    (tmp_path / "test_rows.py").write_text(f"rows = {words()!r}\n")
    other = tmp_path / "other"
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, cwd=tmp_path)
    assert (other / "tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(100, "at least 261 entries"), (5000, r"give a vocabulary of \d+, not 5000: lower")]
)
def test_a_vocabulary_that_cannot_be_had_is_refused(tmp_path: Path, vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer.train(words()[:40], vocab_size=vocab_size, directory=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_end_tokens_come_from_every_file(trained: Path, tmp_path: Path) -> None:
    own = Tokenizer.load(trained).eos_token_id
    directory = edited(trained, tmp_path, "generation_config.json", eos_token_id=[3, own, 2])
    assert Tokenizer.load(directory).eos_token_ids == (own, 3, 2)
    (directory / "config.json").write_text('{"eos_token_id": 4}')  # silent where generation_config.json speaks
    assert Tokenizer.load(directory).eos_token_ids == (own, 3, 2)
    (directory / "generation_config.json").unlink()
    assert Tokenizer.load(directory).eos_token_ids == (own, 4)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"pad_token": None}, 'names no padding token: add "pad_token"'),
        ("tokenizer_config.json", {"eos_token": None}, "names no end-of-sequence token: add eos_token"),
        ("tokenizer_config.json", {"eos_token": "<|missing|>"}, "eos_token '<|missing|>' is not in the vocabulary"),
        (
            "tokenizer_config.json",
            {"bos_token": "<|system|>", "add_bos_token": True},
            "does not add it: make them agree",
        ),
        ("tokenizer_config.json", {"chat_template": "{{ x"}, None),  # chat_template.jinja is read before it
        (
            "generation_config.json",
            {"eos_token_id": 400},
            r"eos_token_id 400 is not an id of the tokenizer \(0 to 399\)",
        ),
        ("tokenizer.json", {"model": None}, "tokenizer.json cannot be read"),
    ],
)
def test_faults_of_a_directory(
    trained: Path, tmp_path: Path, file: str, changes: dict[str, object], message: str | None
) -> None:
    directory = edited(trained, tmp_path, file, **changes)
    if message is None:
        assert Tokenizer.load(directory).chat_template is not None
        return
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        Tokenizer.load(directory)


def test_missing_and_malformed_files(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    directory = edited(trained, tmp_path)
    (directory / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="not valid Jinja"):
        Tokenizer.load(directory)
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(directory)


def test_pad_may_be_the_end_token_and_may_come_from_the_generation_config(trained: Path, tmp_path: Path) -> None:
    assert Tokenizer.load(edited(trained, tmp_path / "same", pad_token="<|end|>")).pad_token_id == 1
    directory = edited(trained, tmp_path / "generation", pad_token=None)
    assert Tokenizer.load(edited(directory_with(directory, 3), tmp_path / "copy")).pad_token_id == 3


def directory_with(directory: Path, pad_token_id: int) -> Path:
    (directory / "generation_config.json").write_text(json.dumps({"pad_token_id": pad_token_id}))
    return directory


def test_check_vocabulary(trained: Path) -> None:
    tokenizer = Tokenizer.load(trained)
    check_vocabulary(tokenizer, 400, "model")
    check_vocabulary(tokenizer, 512, "model")  # a padded embedding
    with pytest.raises(UserError, match="model: the tokenizer has id 399 .* vocab_size is 399"):
        check_vocabulary(tokenizer, 399, "model")


def test_save_copies_every_file(trained: Path, tmp_path: Path) -> None:
    first = edited(trained, tmp_path / "a", "generation_config.json", eos_token_id=[1, 2])
    Tokenizer.load(first).save(tmp_path / "b")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(path.name for path in first.iterdir())
    assert Tokenizer.load(tmp_path / "b").eos_token_ids == (1, 2)


def test_the_data_layer_imports_no_framework() -> None:
    modules = ("tokenizer", "sources", "splits", "examples", "batches", "tasks.postcards")
    code = (
        "import sys\n"
        + "".join(f"import diptych.data.{name}\n" for name in modules)
        + "import diptych.rewards.function\n"
        "found = {'jax', 'torch', 'transformers', 'tensorflow'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
