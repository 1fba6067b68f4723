"""Text to token ids, exactly as the model was trained.

`Tokenizer` wraps one tokenizer.json; `TokenizerPool` is its front for an asyncio event loop.

    TokenizerError             what this module raises
    ├── TokenizerFileError     a tokenizer.json that cannot be used
    ├── TextTooLongError       a text has more tokens than the model takes
    ├── RequestTooLongError    all texts together have more tokens than a request may
    └── InvalidTextError       a text cannot be tokenised at all
"""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from embedserve.models.errors import CheckpointError
from embedserve.models.files import present, read_file
from embedserve.server.text_prefix import PrefixTokenizer

__all__ = [
    "Encoded",
    "InvalidTextError",
    "RequestTooLongError",
    "TextTooLongError",
    "Tokenizer",
    "TokenizerError",
    "TokenizerFileError",
    "TokenizerPool",
    "Truncate",
]

# A longer text is tokenised whole only if its beginning does not do. No ordinary text needs so many characters a token
# (English 4.5), and below the second figure it takes a millisecond in any case.
LONG_CHARACTERS_PER_TOKEN = 8
LONG_CHARACTERS = 4096

# Texts are tokenised together up to this many characters, 7 to 10 ms; then other requests have their turn.
SLICE_CHARACTERS = 32_768

# Up to this many characters in all, a request is tokenised in the event loop: 0.4 ms, where 12 words take 25 us. A
# thread costs another 30 to 75 us, whatever the length (2 cores). Requests are not gathered into one call of the
# library: 64 texts of 12 words take 21 us each that way, one by one 23 us.
INLINE_CHARACTERS = 2048

# A text takes as long as so many characters, beside its own: 1024 of two characters take 7 ms.
CHARACTERS_A_TEXT = 20


# The library needs up to 500 bytes and 1.3 us for a character, and cannot be interrupted. Texts of up to this many
# characters are tokenised whole where their beginning does not do; longer ones are not.
MAX_WHOLE_CHARACTERS = 1_000_000


MAX_FILE_BYTES = 256 << 20
"""Of a tokenizer.json: the largest that are known have 35 million."""


class TokenizerError(Exception):
    """What this module raises."""


class TokenizerFileError(TokenizerError):
    """A tokenizer.json that cannot be used."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


class TextTooLongError(TokenizerError):
    """Text `index` has at least `tokens` tokens, special ones included, where `limit` are allowed."""

    def __init__(self, index: int, tokens: int, limit: int) -> None:
        super().__init__(f"text {index} has at least {tokens} tokens, at most {limit} are allowed")
        self.index = index
        self.tokens = tokens
        self.limit = limit


class RequestTooLongError(TokenizerError):
    """The texts have at least `tokens` tokens together, counted after truncation, where `limit` are allowed."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"the texts have at least {tokens} tokens together, at most {limit} are allowed")
        self.tokens = tokens
        self.limit = limit


class InvalidTextError(TokenizerError):
    """Text `index` cannot be tokenised: it is no Unicode, or the tokenizer's own rules give up on it."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"text {index} cannot be tokenised: {reason}")
        self.index = index
        self.reason = reason


class Truncate(StrEnum):
    """What to do with a text that is too long: refuse it, drop its start, or drop its end."""

    NONE = "NONE"
    START = "START"
    END = "END"


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of some texts one after the other, special tokens included.

    `ids` is int32 `[tokens]`, `lengths` int32 `[texts]`; `truncated` says how many of the texts were cut.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    truncated: int


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads, and in processes forked after it was loaded."""

    def __init__(
        self,
        rust: tokenizers.Tokenizer,
        ascii_rust: tokenizers.Tokenizer,
        prefix: PrefixTokenizer | None,
        *,
        leading: list[int],
        trailing: list[int],
        append: list[int],
        foreign: Mapping[int, str],
        max_tokens: int,
    ) -> None:
        """Use `load`. `ascii_rust`: does the same as `rust` to ASCII texts."""
        self.max_tokens = max_tokens
        self._rust = rust
        self._ascii_rust = ascii_rust
        self._prefix = prefix
        self._leading = leading
        self._trailing = trailing
        self._append = append
        self._foreign = foreign
        self._long = max(LONG_CHARACTERS, LONG_CHARACTERS_PER_TOKEN * max_tokens)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        max_tokens: int,
        lower_case: bool = False,
        bert_normalizer: Mapping[str, bool | None] = MappingProxyType({}),
        append: Sequence[int] = (),
        vocab_size: int | None = None,
    ) -> "Tokenizer":
        """Read a tokenizer.json; truncation and padding stored in it are ignored.

        `max_tokens` bounds a text with its special tokens. `lower_case` lowers a text before the tokenizer's own
        normalizer, as sentence-transformers does where its settings say `do_lower_case`. `bert_normalizer` holds flags
        that replace those of a BertNormalizer, see `ModelConfig.bert_normalizer`. `append` are ids that must end every
        text: they are added, before the end is counted as special, unless the file's own post-processor does so. What
        a text itself ends with makes no difference to either. `vocab_size` is the number of tokens that the model has
        embeddings for, if that is to be checked.

        Raises TokenizerFileError where the file is missing, malformed or of no use.
        """
        # Work is spread over our own threads, whose number is bounded. Rayon would add a thread a core in each front
        # end; its pool does not survive a fork, and the library says so on stderr.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            definition = json.loads(read_file(path, MAX_FILE_BYTES))
            definition["normalizer"] = _normalizer(definition.get("normalizer"), lower_case, bert_normalizer)
            rust = tokenizers.Tokenizer.from_str(json.dumps(definition))
            ascii_rust = _for_ascii(definition, rust)
        except CheckpointError as error:
            if present(path):
                raise TokenizerFileError(path, str(error).removeprefix(f"{path}: ")) from error
            remedy = (
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers makes it from others"
            )
            raise TokenizerFileError(path, f"No such file; {remedy}") from error
        except Exception as error:  # the library raises plain Exception for whatever it dislikes
            raise TokenizerFileError(path, f"not a tokenizer.json: {error}") from error
        for each in (rust, ascii_rust):
            each.no_truncation()
            each.no_padding()
        leading, trailing = _special_ids(path, rust)
        if list(append) == trailing[len(trailing) - len(append) :]:
            append = ()
        for id_ in append:
            if rust.id_to_token(id_) is None:
                raise TokenizerFileError(path, f"has no token {id_}, which must end every text of this model")
        trailing += append
        foreign = {} if vocab_size is None else _foreign_tokens(path, definition, [*leading, *trailing], vocab_size)
        if len(leading) + len(trailing) >= max_tokens:
            raise TokenizerFileError(
                path,
                f"adds {len(leading) + len(trailing)} special tokens to a text, and max_tokens is {max_tokens}: that "
                "leaves no room for the text",
            )
        return cls(
            rust,
            ascii_rust,
            PrefixTokenizer.of(definition, rust),
            leading=leading,
            trailing=trailing,
            append=list(append),
            foreign=foreign,
            max_tokens=max_tokens,
        )

    @property
    def surroundings(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after every text."""
        return list(self._leading), list(self._trailing)

    def encode(self, texts: Sequence[str], truncate: Truncate, max_total: int) -> Encoded:
        """Tokenise texts; `max_total` bounds their tokens together, counted after truncation.

        The ids are those of tokenising a whole text and then cutting between its leading and trailing special tokens:
        END keeps the first tokens, START the last.

        Raises TextTooLongError (for Truncate.NONE), RequestTooLongError, InvalidTextError.
        """
        job = _Job(self, texts, truncate, max_total)
        while not job.done:
            job.run_slice()
        return job.result()

    def _is_long(self, text: str) -> bool:
        return len(text) > self._long

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """All ids of each text, special ones included."""
        # Never encode(): it holds the GIL (308 ms for a million characters), the batch calls release it.
        rust = self._ascii_rust if all(map(str.isascii, texts)) else self._rust
        return [encoding.ids + self._append for encoding in rust.encode_batch_fast(texts)]

    def _ids_of_long(self, text: str, truncate: Truncate) -> list[int]:
        """Ids of one text, special ones included: all, or at least one more than allowed, which are its first."""
        # START reads everything: what stands before a token decides about it, the whole word and at times the whole
        # text, so that the last tokens cannot be told from the end of the text alone.
        if self._prefix and truncate is not Truncate.START:
            room = self.max_tokens - len(self._leading) - len(self._trailing)
            first = self._prefix.first_ids(text, room + 1)
            if first is not None:
                return self._leading + first + self._trailing
        if len(text) > MAX_WHOLE_CHARACTERS:
            raise ValueError(
                f"it has {len(text)} characters and would have to be read whole, because it has no word breaks to cut "
                f"at or because its start is to be dropped; that is done up to {MAX_WHOLE_CHARACTERS} characters"
            )
        return self._ids([text])[0]

    def _check(self, index: int, ids: list[int]) -> None:
        """Refuse a text with a token that the model has no embedding for."""
        for id_ in ids:
            if id_ in self._foreign:
                raise InvalidTextError(
                    index, f"it holds {self._foreign[id_]!r}, token {id_}, which this model has no embedding for"
                )

    def _cut(self, ids: list[int], truncate: Truncate) -> list[int]:
        """Ids of a text that has too many of them, brought down to `max_tokens`."""
        if truncate is Truncate.START:
            return self._leading + ids[len(ids) - self.max_tokens + len(self._leading) :]
        return ids[: self.max_tokens - len(self._trailing)] + self._trailing


def _normalizer(
    normalizer: dict[str, Any] | None, lower_case: bool, bert_normalizer: Mapping[str, bool | None]
) -> dict[str, Any] | None:
    """A normalizer's definition with other flags, and after one that lowers the text.

    Special tokens in a text are found before any normalizer sees it, so they are not lowered.
    """
    if normalizer is not None and normalizer["type"] == "BertNormalizer":
        normalizer = {**normalizer, **bert_normalizer}
    if not lower_case:
        return normalizer
    following: list[dict[str, Any]] = []
    if normalizer is not None:
        following = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, *following]}


def _for_ascii(definition: dict[str, Any], rust: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer that does to ASCII texts what `rust` does, and leaves out what it would look for in vain.

    BERT's normalizer looks for Chinese characters and for accents, character by character: 6 of the 32 us of a text of
    12 words. Other normalizers have no such parts, and `rust` itself comes back.
    """
    normalizer = definition["normalizer"]
    if normalizer is None or normalizer["type"] != "BertNormalizer":
        return rust
    # An added token goes through the normalizer too: "café" is found in ASCII texts, as "cafe".
    if not all(token["content"].isascii() for token in definition.get("added_tokens") or []):
        return rust
    # Without `strip_accents` the flag for lower case decides about it.
    without = {**normalizer, "handle_chinese_chars": False, "strip_accents": False}
    return tokenizers.Tokenizer.from_str(json.dumps({**definition, "normalizer": without}))


class TokenizerPool:
    """Tokenises for an event loop without blocking it: short requests at once, others in a few threads, in slices.

    A request of many texts takes its turns among the others, slice by slice, and stops when its caller is cancelled; a
    slice, which may be one long text, runs to its end. Make the pool in the process that uses it: threads do not
    survive a fork.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")

    async def encode(self, tokenizer: Tokenizer, texts: Sequence[str], truncate: Truncate, max_total: int) -> Encoded:
        """As `Tokenizer.encode`, and with its errors."""
        job = _Job(tokenizer, texts, truncate, max_total)
        if sum(map(len, texts)) + CHARACTERS_A_TEXT * len(texts) <= INLINE_CHARACTERS:
            while not job.done:
                job.run_slice()
        else:
            loop = asyncio.get_running_loop()
            while not job.done:
                await loop.run_in_executor(self._executor, job.run_slice)
        return job.result()

    def close(self) -> None:
        """Let the threads end; slices that wait are dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Job:
    """The texts of one request, tokenised slice by slice."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], truncate: Truncate, max_total: int) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._truncate = truncate
        self._max_total = max_total
        self._next = 0
        self._ids: list[NDArray[np.int32]] = []
        self._lengths: list[int] = []
        self._total = 0
        self._truncated = 0

    @property
    def done(self) -> bool:
        return self._next == len(self._texts)

    def run_slice(self) -> None:
        """Tokenise the next texts: one long one, or several of `SLICE_CHARACTERS` together."""
        tokenizer, first = self._tokenizer, self._next
        texts: list[str] = []
        size = 0
        while not self.done and size < SLICE_CHARACTERS:
            text = self._texts[self._next]
            if tokenizer._is_long(text) and texts:
                break
            texts.append(text)
            size += len(text)
            self._next += 1
            if tokenizer._is_long(text):
                break
        self._add(first, self._tokenize(first, texts))

    def _tokenize(self, first: int, texts: list[str]) -> list[list[int]]:
        try:
            if self._tokenizer._is_long(texts[0]):
                return [self._tokenizer._ids_of_long(texts[0], self._truncate)]
            return self._tokenizer._ids(texts)
        except BaseException as error:
            # Regular expressions give up on ten million spaces, and the library panics, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if len(texts) > 1:
                return [row for index, text in enumerate(texts, first) for row in self._tokenize(index, [text])]
            reason = "it holds a lone surrogate" if isinstance(error, TypeError) else str(error)
            raise InvalidTextError(first, reason) from error

    def _add(self, first: int, rows: list[list[int]]) -> None:
        limit = self._tokenizer.max_tokens
        flat: list[int] = []
        for index, row in enumerate(rows, first):
            ids = row
            if len(ids) > limit:
                if self._truncate is Truncate.NONE:
                    raise TextTooLongError(index, len(ids), limit)
                ids = self._tokenizer._cut(ids, self._truncate)
                self._truncated += 1
            if not ids:
                # White space, where the tokenizer adds no special tokens: there is nothing to embed.
                raise InvalidTextError(index, "no token comes out of it")
            if self._tokenizer._foreign:
                self._tokenizer._check(index, ids)
            flat += ids
            self._lengths.append(len(ids))
        self._ids.append(np.array(flat, dtype=np.int32))
        self._total += len(flat)
        if self._total > self._max_total:
            raise RequestTooLongError(self._total, self._max_total)

    def result(self) -> Encoded:
        ids = np.concatenate(self._ids) if self._ids else np.empty(0, np.int32)
        return Encoded(ids, np.array(self._lengths, dtype=np.int32), self._truncated)


def _special_ids(path: Path, rust: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after every text."""
    # Post-processors come in several kinds and can be nested: ask, do not read. Any text with a token will do.
    for probe in ["a", *filter(None, map(rust.id_to_token, range(64)))]:
        try:
            bare = rust.encode(probe, add_special_tokens=False).ids
        except Exception:  # a vocabulary that knows neither this text nor an unknown token
            continue
        if not bare:
            continue
        full = rust.encode(probe)
        leading = full.special_tokens_mask.index(0)
        end = leading + len(bare)
        if full.ids[leading:end] != bare:
            raise TokenizerFileError(path, "its post-processor does more than put tokens before and after a text")
        return full.ids[:leading], full.ids[end:]
    raise TokenizerFileError(path, "finds no token in any text")


def _foreign_tokens(path: Path, definition: dict[str, Any], always: list[int], vocab_size: int) -> dict[int, str]:
    """The added tokens from `vocab_size` on, which a text may or may not hold; any other token there is an error."""
    vocabulary = definition["model"]["vocab"]
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    added = {token["id"]: token["content"] for token in definition.get("added_tokens") or []}
    largest = max([*always, *(id_ for id_ in ids if id_ not in added)], default=0)
    if largest >= vocab_size:
        raise TokenizerFileError(
            path,
            f"has token {largest}, but config.json gives the model embeddings for {vocab_size} tokens; "
            "the two files do not belong together",
        )
    # Qwen3-Embedding-4B has 151,665 embeddings, and the tokens of its family go on to "</think>", 151,668.
    return {id_: content for id_, content in added.items() if id_ >= vocab_size}
