"""Token arrays to text: LangChain sends the cl100k ids of a text to every model whose name it does not know.

The vocabulary is a file of OpenAI's that is never downloaded. It is looked for in the configured place, in tiktoken's
cache folder, and in two packages that carry it.

    TokenArrayError               what this module raises
    ├── VocabularyError           the vocabulary is missing, or not the one it should be
    └── UnknownTokenError         an id that the vocabulary does not have
"""

import asyncio
import base64
import hashlib
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["TokenArrayError", "UnknownTokenError", "Vocabulary", "VocabularyError", "find_vocabulary"]

SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
"""Of cl100k_base.tiktoken, as tiktoken itself expects it."""

CACHED_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""How tiktoken's cache calls that file: the SHA-1 of the address it comes from."""

SPECIAL_TOKENS = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}
"""The ids of cl100k that are not in the file."""

PACKAGED = (
    ("litellm", Path("litellm_core_utils", "tokenizers")),
    ("llama_index", Path("core", "_static", "tiktoken_cache")),
)
"""Packages that carry the file, and where."""

INLINE_TOKENS = 10_000
"""So many are decoded in the event loop, in at most a millisecond; more of them, and the first, in a thread."""


class TokenArrayError(Exception):
    """What this module raises."""


class VocabularyError(TokenArrayError):
    """The vocabulary is missing, or not the one it should be; the message says what to do."""


class UnknownTokenError(TokenArrayError):
    """Item `index` of the input holds `token`, which is no id of the vocabulary."""

    def __init__(self, index: int, token: int) -> None:
        super().__init__(f"Invalid 'input[{index}]': {token} is not a token id of cl100k_base.")
        self.index = index
        self.token = token


def find_vocabulary(configured: Path | None = None, *, sha256: str = SHA256) -> Path | None:
    """The file with the cl100k vocabulary, or None where there is none.

    A configured file is taken or refused, with VocabularyError; one that merely lies about, wrong or cut short, is
    passed over.
    """
    if configured is not None:
        _read(configured, sha256)
        return configured
    for path in _usual_places():
        try:
            _read(path, sha256)
        except VocabularyError:
            continue
        return path
    return None


class Vocabulary:
    """Turns cl100k token ids into text. The file is read once, when it is first needed; safe to use from threads."""

    def __init__(self, configured: Path | None = None, *, sha256: str = SHA256) -> None:
        self._configured = configured
        self._sha256 = sha256
        self._lock = threading.Lock()
        self._tokens: dict[int, bytes] | None = None

    async def decode(self, token_arrays: Sequence[Sequence[int]]) -> list[str]:
        """As `decode_blocking`, without holding up the event loop."""
        if self._tokens is not None and sum(map(len, token_arrays)) <= INLINE_TOKENS:
            return self.decode_blocking(token_arrays)
        return await asyncio.to_thread(self.decode_blocking, token_arrays)

    def decode_blocking(self, token_arrays: Sequence[Sequence[int]]) -> list[str]:
        """The text of each token array. Bytes that are no UTF-8, such as half a character, become U+FFFD.

        Raises VocabularyError, UnknownTokenError.
        """
        tokens = self._load()
        texts = []
        for index, ids in enumerate(token_arrays):
            try:
                content = b"".join([tokens[id_] for id_ in ids])
            except KeyError as error:
                raise UnknownTokenError(index, error.args[0]) from None
            texts.append(content.decode(errors="replace"))
        return texts

    def _load(self) -> dict[int, bytes]:
        """The bytes of each token id, read from the file unless that is done."""
        with self._lock:
            if self._tokens is None:
                path = find_vocabulary(self._configured, sha256=self._sha256)
                if path is None:
                    raise VocabularyError(
                        "Token arrays need the cl100k_base vocabulary, which this server does not have. Send text "
                        "(LangChain: check_embedding_ctx_length=False), or give the server the file: name it in the "
                        f"configuration, put it into the folder TIKTOKEN_CACHE_DIR as {CACHED_NAME}, or install "
                        "litellm or llama-index-core (pip install --no-deps), which carry it."
                    )
                self._tokens = _parse(path, _read(path, self._sha256)) | SPECIAL_TOKENS
            return self._tokens


def _usual_places() -> Iterator[Path]:
    if folder := os.environ.get("TIKTOKEN_CACHE_DIR"):
        yield Path(folder, CACHED_NAME)
    for package, inside in PACKAGED:
        # Finds the folder and imports nothing: importing litellm takes seconds.
        spec = importlib.util.find_spec(package)
        for location in (spec and spec.submodule_search_locations) or []:
            yield Path(location, inside, CACHED_NAME)


def _read(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VocabularyError(f"{path}: {error.strerror}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise VocabularyError(f"{path}: not cl100k_base.tiktoken: its SHA-256 is {found}, expected {sha256}")
    return content


def _parse(path: Path, content: bytes) -> dict[int, bytes]:
    """Lines of a token in base64, a space, and its id."""
    try:
        pairs = [line.split() for line in content.splitlines()]
        return {int(id_): base64.b64decode(token, validate=True) for token, id_ in pairs}
    except ValueError as error:
        raise VocabularyError(f"{path}: not a tiktoken vocabulary: {error}") from error
