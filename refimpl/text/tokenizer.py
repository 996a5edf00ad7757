"""Text to token ids and back, as the official tokenizers do it, quirks included."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from refimpl.config import Config, read_config
from refimpl.errors import InputError, at_most
from refimpl.files import read_json, read_small
from refimpl.gguf_files import read_gguf
from refimpl.text.chat import LAYOUTS, ChatSettings, Message
from refimpl.text.gguf_vocabulary import tokenizer_file


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, and a conversation to a prompt. Made by `load_tokenizer`.

    `encode_plain`, `decode_plain` and `bytes_plain` are a library's functions for the text between special tokens. The
    code of this class handles special tokens, in the same way for all families.
    """

    encode_plain: Callable[[str], list[int]]
    decode_plain: Callable[[list[int]], str]
    bytes_plain: Callable[[int], bytes]
    vocab_size: int  # the model's; ids that the tokenizer has no text for (Qwen2's padding) decode to nothing
    special_tokens: dict[str, int]  # text -> id
    markers: tuple[str, ...]  # the special tokens and those that open a turn; `plain` spells them out
    eos_token_id: int
    chat_settings: ChatSettings
    family: str
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    before: tuple[int, ...] = ()  # ids before every encoded text; the official checkpoints add none before or after
    after: tuple[int, ...] = ()
    blank: str = ""  # what decode puts before a text that a special token follows
    added_tokens: Mapping[str, int] = field(default_factory=dict)  # words that were added to a Baichuan: text -> id

    def encode(self, text: str, plain: bool = False) -> list[int]:
        """The token ids of a text. <s> and </s> are added only if tokenizer_config.json asks for them.

        A special token written out in the text becomes its id, as in the original. So does a token that opens a turn:
        a user who types "<reserved_106>" (Baichuan) or "<|im_start|>" (Qwen2) speaks as somebody else. This is how
        prompts are injected. For text that you did not write, `plain=True` encodes such tokens as ordinary characters.

        Blanks and line breaks next to a token of `added_tokens.json` are dropped, as in the original.

        Raises InputError for anything but a str, and for half a surrogate pair, which UTF-8 cannot represent.

        **Source** tokenization_baichuan.py, and `PreTrainedTokenizer.tokenize` of transformers 4.33.
        """
        if not isinstance(text, str):
            raise InputError(f"the text is {text!r:.40}, expected a str")
        if half := re.search("[\ud800-\udfff]", text):
            raise InputError(f"character {half.start()} of the text is {half[0]!a}, half of one; read text as UTF-8")
        parts = (self._inside_markers if plain else self._special_token).split(text)
        for place, part in enumerate(parts):
            if part in self.added_tokens and not plain:
                parts[place - 1], parts[place + 1] = parts[place - 1].rstrip(), parts[place + 1].lstrip()
        known = {} if plain else {**self.special_tokens, **self.added_tokens}
        ids = [id for part in parts if part for id in ([known[part]] if part in known else self.encode_plain(part))]
        return [*self.before, *ids, *self.after]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids. A byte that belongs to no character becomes U+FFFD (Qwen2: all that belong together).

        Baichuan's code should put a blank before a special token, but puts it before the text in front of that token:
        "a", </s>, "b" becomes " a</s>b". U+2581 becomes a blank, and an added token gets blanks around it. Every other
        text comes back exactly as it was encoded.

        Raises InputError for an id outside the vocabulary.

        **Source** `convert_tokens_to_string` in tokenization_baichuan.py, `_decode` of transformers 4.33.
        """
        texts, piece = [], []  # type: list[str], list[int]
        for id in self._checked(ids):
            if id in self._added_text:
                texts += [*([self._decode_piece(piece)] if piece else []), self._added_text[id]]
                piece = []
            elif not (skip_special_tokens and id in self._special_text):
                piece.append(id)
        return " ".join([*texts, *([self._decode_piece(piece)] if piece else [])])

    def _decode_piece(self, ids: list[int]) -> str:
        """The text of ids without added tokens."""
        text, run = "", []  # type: str, list[int]
        for id in ids:
            if id in self._special_text:
                text += (self.blank + self.decode_plain(run) if run else "") + self._special_text[id]
                run = []
            else:
                run.append(id)
        return text + self.decode_plain(run)

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 of one token alone, which may be a part of a character; nothing for an id without a text.

        Raises InputError for an id outside the vocabulary.
        """
        (id,) = self._checked([id])
        text = self._special_text.get(id, self._added_text.get(id))
        return self.bytes_plain(id) if text is None else text.encode()

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields pieces of text while ids come in. Joined, they are `decode(ids, skip_special_tokens=True)`.

        No piece ends within a character: its first bytes wait for the others, or for the end. Special tokens are left
        out, because they change the text before them (see `decode`). The official streamer repeats the whole text each
        time.

        **Source** `TextIterStreamer` in generation_utils.py.
        """
        text, given = "", 0
        between = ""  # the blank between an added token and the text after it
        recent: list[int] = []  # an id whose text is out (a text's first id may lose its blank), then the new ones
        for id in self._checked(ids):
            if id in self._special_text:
                continue
            if id in self._added_text:
                yield text[given:] + (" " if recent else between) + self._added_text[id]
                text, given, recent, between = "", 0, [], " "
                continue
            if between and not recent:
                yield between
            recent.append(id)
            text = self.decode_plain(recent)
            # A character has at most 4 bytes, so at most the last 3 unfinished bytes can still become one.
            complete = max(len(text.rstrip("\ufffd")), len(text) - 3)
            if complete > given:
                yield text[given:complete]
                given = complete
            if complete == len(text):
                recent = [id]
                text = self.decode_plain(recent)
                given = len(text)
        if given < len(text):
            yield text[given:]

    def chat(self, messages: Sequence[Message], max_new_tokens: int | None = None, plain: bool = False) -> list[int]:
        """The prompt of a conversation, [{"role": "user", "content": "..."}, ...]: see `refimpl.text.chat`.

        `max_new_tokens` tokens of the context are kept free; by default, as many as generation_config.json says.
        `plain`: see `encode`; the original has no such option. Raises InputError for messages that the family does not
        accept.
        """
        if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 0):
            raise InputError(f"max_new_tokens is {max_new_tokens!r:.40}, expected a whole number")
        settings = replace(self.chat_settings, max_new_tokens=max_new_tokens or self.chat_settings.max_new_tokens)
        return LAYOUTS[self.family](messages, partial(self.encode, plain=plain), settings)

    def _checked(self, ids: Iterable[int]) -> Iterator[int]:
        for id in ids:
            try:
                number = operator.index(id)
            except TypeError:
                raise InputError(f"a token id is {id!r:.40}, expected a flat list of integers") from None
            if not 0 <= number < self.vocab_size:
                raise InputError(f"token id {number} is outside the vocabulary of {self.vocab_size}")
            yield number

    @cached_property
    def _special_text(self) -> dict[int, str]:
        return {id: text for text, id in self.special_tokens.items()}

    @cached_property
    def _added_text(self) -> dict[int, str]:
        return {id: text for text, id in self.added_tokens.items()}

    @cached_property
    def _special_token(self) -> re.Pattern[str]:
        longest_first = sorted([*self.special_tokens, *self.added_tokens], reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _inside_markers(self) -> re.Pattern[str]:
        """The place after the first character of a marker: cut there, a text contains no marker."""
        return re.compile("|".join(f"(?<={re.escape(text[:1])})(?={re.escape(text[1:])})" for text in self.markers))


MULTIPLES = tuple(1 << n for n in range(3, 12))  # vocabularies are padded to multiples of these, for the sake of GPUs
_FILES = ("tokenizer.model", "tokenizer.json")  # of Baichuan, and of Qwen2
# Bytes of them. In memory, their pieces take 20 times as much. Baichuan2's has 2 MB, Qwen2's 7 MB.
LARGEST_PIECES, LARGEST_JSON = 8 << 20, 32 << 20


def byte_letters() -> dict[str, int]:
    """The letters in which byte-level BPE writes bytes: printable Latin-1 as it is, the others from U+0100 on.

    >>> byte_letters()["Ġ"]
    32
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = byte_letters()


def load_tokenizer(folder: str | Path, config: Config | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has none.

    Baichuan reads `tokenizer.model` (SentencePiece), Qwen2 `tokenizer.json` (byte-level BPE). The family and the
    context come from `config`, by default the folder's. Role ids and `max_new_tokens` come from generation_config.json
    if they are there, and tokenizer_config.json may ask for <s> and </s>.

    Tokens that were added to a Baichuan stand in `added_tokens.json`.

    Raises InputError for a file that is damaged or belongs to another model, and for a library that is missing.
    """
    folder = Path(folder)
    if folder.suffix == ".gguf" and config:
        data = tokenizer_file(read_gguf(folder).facts)
        reader = _read_byte_level if config.family == "Qwen2-7B" else _read_sentencepiece
        return None if data is None else reader(folder, data, config, {}, {})
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected one with config.json and a tokenizer")
    config = config or read_config(folder)
    qwen = config.family == "Qwen2-7B"
    path, theirs = (folder / name for name in (_FILES[::-1] if qwen else _FILES))
    if not path.exists():
        if theirs.exists():
            raise InputError(f"{theirs} is no {config.family}'s, which has {path.name}; copy the file of this model")
        return None
    others = [folder / f"{kind}_config.json" for kind in ("tokenizer", "generation")]
    keys, generation = (read_json(other) if other.exists() else {} for other in others)
    read, limit = (_read_byte_level, LARGEST_JSON) if qwen else (_read_sentencepiece, LARGEST_PIECES)
    return read(path, read_small(path, limit), config, keys, generation)


def _read_sentencepiece(
    path: Path, data: bytes, config: Config, keys: dict[str, Any], generation: dict[str, Any]
) -> Tokenizer:
    library = _import("sentencepiece", "sentencepiece")
    try:
        model = library.SentencePieceProcessor(model_proto=data or b"\0")  # b"" would mean: no model yet
        special = {model.id_to_piece(id): id for id in (model.unk_id(), model.bos_id(), model.eos_id()) if id >= 0}
    except RuntimeError:
        raise InputError(f"{path} is damaged: {len(data)} bytes are no SentencePiece model; copy it again") from None
    pieces = model.get_piece_size()
    added = _added_tokens(path, pieces)
    _check_size(path, pieces + len(added), config)
    if special != {"<unk>": 0, "<s>": 1, "</s>": 2}:
        raise InputError(f"{path} has the special tokens {special}, expected <unk> 0, <s> 1, </s> 2; copy Baichuan's")
    if model.encode("a  b") == model.encode("a b"):  # what SentencePiece does if the settings at the end are missing
        raise InputError(f"{path} takes two blanks for one, which no Baichuan does: its end is missing; copy it again")

    def bytes_of(id: int) -> bytes:
        if id >= pieces:
            return b""
        piece = model.id_to_piece(id)
        return bytes([int(piece[1:-1], 16)]) if model.is_byte(id) else piece.replace("\u2581", " ").encode()

    settings = _settings(config, generation, max_new_tokens=min(2048, config.max_position_embeddings // 2))
    roles = [model.id_to_piece(id) for id in (settings.user_token_id, settings.assistant_token_id)]
    return Tokenizer(
        model.encode, lambda ids: model.decode([id for id in ids if id < pieces]), bytes_of, config.vocab_size,
        special, (*special, *roles, *added), 2, settings, config.family,
        bos_token_id=1, pad_token_id=0, blank=" ", added_tokens=added,
        before=(1,) if keys.get("add_bos_token") else (), after=(2,) if keys.get("add_eos_token") else (),
    )  # fmt: skip


def _read_byte_level(
    path: Path, data: bytes, config: Config, keys: dict[str, Any], generation: dict[str, Any]
) -> Tokenizer:
    library = _import("tokenizers", "'refimpl[qwen]'")
    try:
        model = library.Tokenizer.from_buffer(data)
    except Exception:  # the library raises nothing more precise
        raise InputError(f"{path} is damaged: it is no tokenizer of the library tokenizers; copy it again") from None
    _check_size(path, max(model.get_vocab().values(), default=-1) + 1, config)
    special = {token.content: id for id, token in model.get_added_tokens_decoder().items() if token.special}
    if not {"<|im_start|>", "<|im_end|>"} <= set(special):
        raise InputError(f"{path} has no special tokens <|im_start|> and <|im_end|>; copy Qwen2's")

    def id_of(key: str) -> int | None:
        token = keys.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        return special.get(text) if isinstance(text, str) else None

    start, end, eos = special["<|im_start|>"], special["<|im_end|>"], id_of("eos_token")
    settings = _settings(config, {**generation, "user_token_id": start, "assistant_token_id": start})
    return Tokenizer(
        lambda text: model.encode(text, add_special_tokens=False).ids, model.decode,
        lambda id: bytes(_BYTES[letter] for letter in model.id_to_token(id) or ""), config.vocab_size,
        special, tuple(special), end if eos is None else eos, replace(settings, eos_token_id=end), config.family,
        pad_token_id=id_of("pad_token"),
    )  # fmt: skip


def _added_tokens(path: Path, pieces: int) -> dict[str, int]:
    """The tokens of `added_tokens.json`, text -> id. Their ids follow those of the SentencePiece model's `pieces`."""
    file = path.parent / "added_tokens.json"
    if path.is_dir() or path.suffix == ".gguf" or not file.exists():
        return {}
    found = {text: id for text, id in read_json(file).items() if type(id) is not int or id >= pieces}
    numbers = all(type(id) is int for id in found.values())
    if not numbers or sorted(found.values()) != list(range(pieces, pieces + len(found))) or "" in found:
        ids = at_most(found.values(), 3)
        raise InputError(f"{file} has the ids {ids}, expected those from {pieces} on, each once; copy it again")
    return dict(sorted(found.items(), key=lambda one: one[1]))


def _check_size(path: Path, size: int, config: Config) -> None:
    # Qwen2 pads its vocabulary, and an enlarged Baichuan may be padded to a multiple. In all other cases, fewer tokens
    # mean a damaged file, or tokens that were added elsewhere.
    room = config.vocab_size
    padded = config.family == "Qwen2-7B" or any(room == -(-size // multiple) * multiple for multiple in MULTIPLES)
    if size > room or (size < room and not padded):
        raise InputError(
            f"{path} has {size} tokens, the model has {room}; copy the file of this model, and its added_tokens.json "
            "if words were added"
        )


def _settings(config: Config, keys: dict[str, Any], max_new_tokens: int = 1) -> ChatSettings:
    """The chat settings of generation_config.json, and `max_new_tokens` if it does not say any."""
    settings = ChatSettings(config.max_position_embeddings, max_new_tokens)
    limits = {"max_new_tokens": 1 << 31, "user_token_id": config.vocab_size, "assistant_token_id": config.vocab_size}
    values = {name: getattr(settings, name) if keys.get(name) is None else keys[name] for name in limits}
    for name, value in values.items():
        if type(value) is not int or not 0 <= value < limits[name]:
            raise InputError(f"{name} is {value!r:.40}, expected 0 to {limits[name] - 1}; mend generation_config.json")
    return replace(settings, **values)


def _import(name: str, package: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise InputError(f"this tokenizer needs the library {name}; pip install {package}") from None
