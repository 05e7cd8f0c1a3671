"""The tokenizer of a model directory: text to ids, ids to text, messages to text.

It reads the same files as transformers' AutoTokenizer and gives the same ids and the same chat rendering, but over the
`tokenizers` library and Jinja alone, for the hinge imports no framework (law 1).

A response is tokenised by itself, after its prompt, so that training sees exactly the tokens that generation makes.
Tokenizers of the SentencePiece family put a space before a text; `encode_after` leaves it out where the text goes on.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import numpy as np
from jaxtyping import Int
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from diptych.errors import UserError

Message = Mapping[str, Any]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""What `save` copies where it exists: all that transformers may read besides the model's own config.json."""

PAD, END, USER, ASSISTANT, SYSTEM = TRAINED_SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
"""The first ids of a tokenizer that `Tokenizer.train` makes, in this order."""

TRAINED_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('roles are system, user and assistant, not ' ~ message['role']) }}
{%- endif -%}
{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ ('<|end|>' if message['role'] == 'assistant' else '') }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""
"""`<|user|>...<|assistant|>...<|end|>`: every turn opens with its role, and only the assistant's is closed."""


class Tokenizer:
    """A tokenizer and what its directory says about special tokens and chats.

    vocab_size: one more than the largest id, added tokens included. eos_token_ids: every id that ends a response, the
    tokenizer's own first; eos_token_id: the one that training appends. chat_template: Jinja source, or None.
    affixes: the ids that the post-processor puts before and after a text (a BOS, say).
    """

    def __init__(self, files: Mapping[str, bytes], *, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._files = dict(files)
        self._fast = _fast_tokenizer(files["tokenizer.json"].decode(), where)
        self._continuation = _without_prefix_space(self._fast)
        added = self._fast.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._control = frozenset(token_id for token_id, token in added.items() if token.special)
        settings = _json(files, "tokenizer_config.json", where)
        named = {**_json(files, "special_tokens_map.json", where), **settings}
        generation = _json(files, "generation_config.json", where)
        self._special = {
            name: _text(value) for name, value in named.items() if name.endswith("_token") and _text(value)
        }

        self.vocab_size: int = 1 + max(self._fast.get_vocab(with_added_tokens=True).values())
        self.bos_token_id: int | None = self._named("bos_token")
        self.eos_token_ids: tuple[int, ...] = self._end_ids(generation, config)
        self.eos_token_id: int = self.eos_token_ids[0]
        self.pad_token_id: int = self._pad_id(generation, config)
        self.chat_template: str | None = _chat_template(files, settings, where)
        self._template = None if self.chat_template is None else _compile(self.chat_template, where)
        self.affixes: tuple[tuple[int, ...], tuple[int, ...]] = self._affixes(settings)

    @staticmethod
    def load(directory: str | Path) -> Tokenizer:
        """Read the tokenizer of a model directory. UserError where it is missing, broken or names no EOS or pad."""
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise UserError(
                f"{directory} has no tokenizer.json: give a model directory with a fast tokenizer "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
            )
        files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}
        config_path = directory / "config.json"
        config = (
            _json({"config.json": config_path.read_bytes()}, "config.json", str(directory))
            if config_path.is_file()
            else {}
        )
        return Tokenizer(files, config=config, where=str(directory))

    @staticmethod
    def train(texts: Iterable[str], *, vocab_size: int, directory: str | Path) -> Tokenizer:
        """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and write it into `directory`.

        The same texts in the same order give the same file, byte for byte. The vocabulary has exactly `vocab_size`
        entries: five special tokens, 256 bytes, then merges. UserError where the texts do not have that many merges:
        rows of a matrix that nothing could ever train would otherwise sit in the model.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        smallest = len(TRAINED_SPECIAL_TOKENS) + len(alphabet)
        if vocab_size < smallest:
            raise UserError(
                f"model.new.vocab_size is {vocab_size}: a byte-level vocabulary has at least {smallest} entries"
            )
        fast = FastTokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        fast.decoder = decoders.ByteLevel()
        fast.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            show_progress=False,
            initial_alphabet=alphabet,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in TRAINED_SPECIAL_TOKENS],
        )
        fast.train_from_iterator(texts, trainer)
        if fast.get_vocab_size() != vocab_size:
            raise UserError(
                f"the training texts give a vocabulary of {fast.get_vocab_size()}, not {vocab_size}: "
                "lower model.new.vocab_size or give more text"
            )
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": [USER, ASSISTANT, SYSTEM],
            "clean_up_tokenization_spaces": False,
            "chat_template": TRAINED_CHAT_TEMPLATE,
        }
        files = {
            "tokenizer.json": fast.to_str(pretty=True).encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
            "chat_template.jinja": TRAINED_CHAT_TEMPLATE.encode(),
        }
        tokenizer = Tokenizer(files, config={}, where=str(directory))
        tokenizer.save(directory)
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files as they were read, byte for byte."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a whole text. add_special_tokens: let tokenizer.json's post-processor add its BOS or EOS."""
        return self._fast.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_after(self, text: str, previous: int) -> list[int]:
        """Ids of a text that follows the token `previous`, as they would be inside one long text."""
        return self._encode_after(text, previous)[0]

    def encode_response(self, text: str, previous: int) -> tuple[list[int], int | None]:
        """The same up to and including the first EOS, and where in `text` that EOS ends. Without one: all ids, None."""
        ids, ends = self._encode_after(text, previous)
        for index, token in enumerate(ids):
            if token in self.eos_token_ids:
                return ids[: index + 1], ends[index]
        return ids, None

    def encode_spans(self, text: str, previous: int) -> tuple[list[int], list[int]]:
        """Ids of a text that follows the token `previous`, and for each the number of characters of `text` that must be
        known to know it. Pieces of one character (UTF-8 bytes) all count the whole character."""
        whole, continuation, _ = self._exact
        return self._encode_after(text, previous, whole=whole, continuation=continuation)

    def encode_words(self, text: str) -> tuple[list[int], list[int]]:
        """The same inside a text, names of special tokens read as words: what somebody writes opens or ends no turn."""
        encoding = self._exact[2].encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def known(self, ids: Sequence[int] | Int[np.ndarray, " time"]) -> list[int]:
        """How many characters of decode(ids) are known after each token: those that the tokens so far decode to, too.

        A UTF-8 character whose last bytes are still to come does not count; special tokens have no characters. A
        decoder may go back on what it wrote (SentencePiece's, when bytes turn out to be no UTF-8).
        """
        text = self.decode(ids)
        context, start, length, done = 0, 0, 0, []  # text[:length] is known before token `start`
        for index in range(1, len(ids) + 1):
            # Decoded along with the tokens before, for decoders drop the space before the first word of all.
            before = self.decode(ids[context:start])
            window = self.decode(ids[context:index])
            new = _same_start(window.rstrip("\N{REPLACEMENT CHARACTER}"), before + text[length : length + len(window)])
            end = length + max(0, new - len(before))
            done.append(max(end, done[-1] if done else 0))
            if len(before) < new == len(window):
                context, start, length = start, index, end
        return done

    def source(self) -> str:
        """The tokenizer itself as text: equal texts read alike."""
        return self._fast.to_str()

    def reads_like(self, other: Tokenizer) -> bool:
        """Every text becomes the same ids, and this one has no chat template of its own that differs."""
        return self._fast.to_str() == other._fast.to_str() and self.chat_template in (None, other.chat_template)

    @functools.cached_property
    def _exact(self) -> tuple[FastTokenizer, FastTokenizer, FastTokenizer]:
        """For whole texts, for texts that go on, and for these without special tokens. They have no post-processor:
        that of byte-level tokenizers takes spaces out of the offsets, and so a token would seem to end too early."""
        state = json.dumps(json.loads(self._fast.to_str()) | {"post_processor": None})
        whole = FastTokenizer.from_str(state)
        words = FastTokenizer.from_str(_without_prefix_space(whole).to_str())
        words.encode_special_tokens = True
        return whole, _without_prefix_space(whole), words

    def _encode_after(
        self,
        text: str,
        previous: int,
        *,
        whole: FastTokenizer | None = None,
        continuation: FastTokenizer | None = None,
    ) -> tuple[list[int], list[int]]:
        """Ids and the characters after which they end."""
        lead = self._added.get(previous)
        if lead is not None:  # some tokenizers put a space after a special token, too: encode it along
            encoding = (whole or self._fast).encode(lead + text, add_special_tokens=False)
            if encoding.ids[:1] == [previous]:
                return encoding.ids[1:], [end - len(lead) for _, end in encoding.offsets[1:]]
        encoding = (continuation or self._continuation).encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " time"], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`."""
        return self._fast.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact name, or None."""
        return self._fast.token_to_id(token)

    def is_special(self, token_id: int | np.integer) -> bool:
        """Whether decoding skips the token."""
        return int(token_id) in self._control

    def token(self, token_id: int | np.integer) -> str:
        """The name of an id as the vocabulary spells it."""
        return self._fast.id_to_token(int(token_id)) or f"<{token_id}>"

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The chat template over `messages`, with the variables that transformers gives it.

        Raises UserError where there is no template or the template refuses the messages.
        """
        if self._template is None:
            raise UserError(
                f"the tokenizer of {self.where} has no chat template: add chat_template.jinja or set data.chat: never"
            )
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f"the chat template of {self.where} refuses the messages: {error}") from error

    def _named(self, name: str) -> int | None:
        text = self._special.get(name)
        if text is None:
            return None
        token_id = self._fast.token_to_id(text)
        if token_id is None:
            raise UserError(f"{self.where}: {name} {text!r} is not in the vocabulary: mend tokenizer_config.json")
        return token_id

    def _end_ids(self, generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
        own = self._named("eos_token")
        ids = [] if own is None else [own]
        # As in transformers: generation_config.json speaks first, config.json only where it is silent.
        for file, settings in (("generation_config.json", generation), ("config.json", config)):
            more = settings.get("eos_token_id")
            if more is None:
                continue
            for token_id in more if isinstance(more, list) else [more]:
                if not isinstance(token_id, int) or not 0 <= token_id < self.vocab_size:
                    raise UserError(
                        f"{self.where}/{file}: eos_token_id {token_id!r} is not an id of the tokenizer "
                        f"(0 to {self.vocab_size - 1})"
                    )
                ids.append(token_id)
            break
        if not ids:
            raise UserError(f"{self.where} names no end-of-sequence token: add eos_token to tokenizer_config.json")
        return tuple(dict.fromkeys(ids))

    def _pad_id(self, generation: Mapping[str, Any], config: Mapping[str, Any]) -> int:
        own = self._named("pad_token")
        if own is not None:
            return own
        for settings in (generation, config):
            token_id = settings.get("pad_token_id")
            if isinstance(token_id, int) and 0 <= token_id < self.vocab_size:
                return token_id
        raise UserError(
            f'{self.where} names no padding token: add "pad_token" to tokenizer_config.json '
            "(any token will do, the end-of-sequence token too: padding is never recognised by its id)"
        )

    def _affixes(self, settings: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bare, full = (self.encode("a", add_special_tokens=added) for added in (False, True))
        extra = len(full) - len(bare)
        start = next((index for index in range(extra + 1) if full[index : index + len(bare)] == bare), None)
        if start is None:
            raise UserError(f"{self.where}/tokenizer.json: the post-processor changes the text's own tokens")
        before, after = tuple(full[:start]), tuple(full[start + len(bare) :])
        for knob, token_id, present in (
            ("add_bos_token", self.bos_token_id, self.bos_token_id in before),
            ("add_eos_token", self.eos_token_id, bool(set(after) & set(self.eos_token_ids))),
        ):
            wanted = settings.get(knob)
            if isinstance(wanted, bool) and token_id is not None and wanted != present:
                raise UserError(
                    f"{self.where}: tokenizer_config.json says {knob}: {str(wanted).lower()} but the post-processor of "
                    f"tokenizer.json {'adds' if present else 'does not add'} it: make them agree"
                )
        return before, after


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, where: str) -> None:
    """UserError where the tokenizer has an id that the model's embedding (`model_vocab_size` rows) lacks."""
    if tokenizer.vocab_size > model_vocab_size:
        last = tokenizer.vocab_size - 1
        raise UserError(
            f"{where}: the tokenizer has id {last} ({tokenizer.token(last)!r}) but the model's vocab_size is "
            f"{model_vocab_size}: use the tokenizer that the model was trained with"
        )


def _same_start(a: str, b: str) -> int:
    """How many characters both begin with."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise UserError(f"{where}/{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}/{name} must hold a JSON object")
    return value


def _text(value: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value if isinstance(value, str) else None


def _fast_tokenizer(text: str, where: str) -> FastTokenizer:
    try:
        fast = FastTokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for every fault
        raise UserError(f"{where}/tokenizer.json cannot be read: {error}") from error
    fast.no_truncation()  # lengths are the data layer's business, and counted there
    fast.no_padding()
    return fast


def _without_prefix_space(fast: FastTokenizer) -> FastTokenizer:
    """The same tokenizer for text that follows other tokens: it puts no space before a text."""

    def strip(node: Any) -> Any:
        if isinstance(node, list):
            return [strip(item) for item in node if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if not isinstance(node, dict):
            return node
        node = {name: strip(value) for name, value in node.items()}
        if node.get("type") == "Prepend":
            return None
        if node.get("type") == "Metaspace":
            node["prepend_scheme"] = "never"
        elif node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        return node

    state = json.loads(fast.to_str())
    stripped = {**state, "normalizer": strip(state["normalizer"]), "pre_tokenizer": strip(state["pre_tokenizer"])}
    return fast if stripped == state else FastTokenizer.from_str(json.dumps(stripped))


def _chat_template(files: Mapping[str, bytes], settings: Mapping[str, Any], where: str) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's (a string, or the `default` of a list of named ones)."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(f"{where}/tokenizer_config.json: chat_template has no entry named 'default'")
        template = template["default"]
    return template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for other tools; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str, where: str) -> jinja2.Template:
    """The environment of transformers' `apply_chat_template`: sandboxed, trimmed blocks, the same extra functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of {where} is not valid Jinja: {error}") from error


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
