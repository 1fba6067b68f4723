"""Token arrays to text, with a vocabulary of five tokens, with the real one, and with none."""

import asyncio
import base64
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.server import token_arrays
from embedserve.server.token_arrays import (
    CACHED_NAME,
    UnknownTokenError,
    Vocabulary,
    VocabularyError,
    find_vocabulary,
)

TOKENS = [b"hello", b" world", b"\xe4\xbd", b"\xa0", b"!"]
CONTENT = b"".join(base64.b64encode(token) + b" %d\n" % id_ for id_, token in enumerate(TOKENS))
CHECKSUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.fixturenames:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        monkeypatch.setattr(token_arrays, "PACKAGED", ())


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "small.tiktoken"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def decoder(vocabulary: Path) -> Vocabulary:
    return Vocabulary(vocabulary, sha256=CHECKSUM)


@pytest.fixture(scope="module")
def real() -> Vocabulary:
    if find_vocabulary() is None:
        pytest.skip("no cl100k vocabulary: set TIKTOKEN_CACHE_DIR, or install llama-index-core without dependencies")
    return Vocabulary()


def test_each_array_becomes_its_text(decoder: Vocabulary) -> None:
    assert decoder.decode_blocking([[0, 1, 4], [0], []]) == ["hello world!", "hello", ""]


@pytest.mark.parametrize("copies", [1, token_arrays.INLINE_TOKENS + 1])
def test_decodes_from_an_event_loop(decoder: Vocabulary, copies: int) -> None:
    async def twice() -> list[str]:
        await decoder.decode([[0]])
        return await decoder.decode([[0]] * copies)

    assert asyncio.run(twice()) == ["hello"] * copies


def test_a_character_may_be_spread_over_tokens(decoder: Vocabulary) -> None:
    assert decoder.decode_blocking([[2, 3]]) == ["你"]


def test_half_a_character_is_replaced(decoder: Vocabulary) -> None:
    assert decoder.decode_blocking([[0, 2, 4], [3]]) == ["hello\ufffd!", "\ufffd"]


def test_special_tokens_are_spelled(decoder: Vocabulary) -> None:
    assert decoder.decode_blocking([[0, 100257, 100276]]) == ["hello<|endoftext|><|endofprompt|>"]


@pytest.mark.parametrize("token", [5, -1, 100256, 100261, 2**70])
def test_an_unknown_id_is_named_with_its_item(decoder: Vocabulary, token: int) -> None:
    with pytest.raises(
        UnknownTokenError, match=rf"^Invalid 'input\[1\]': {token} is not a token id of cl100k_base"
    ) as caught:
        decoder.decode_blocking([[0], [1, token]])
    assert (caught.value.index, caught.value.token) == (1, token)


def test_a_missing_vocabulary_says_how_to_provide_it() -> None:
    assert find_vocabulary() is None
    with pytest.raises(VocabularyError, match=rf"TIKTOKEN_CACHE_DIR as {CACHED_NAME}.*llama-index-core"):
        Vocabulary().decode_blocking([[0]])


def test_a_vocabulary_that_comes_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Vocabulary(sha256=CHECKSUM)
    with pytest.raises(VocabularyError):
        decoder.decode_blocking([[0]])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    (tmp_path / CACHED_NAME).write_bytes(CONTENT)
    assert decoder.decode_blocking([[0]]) == ["hello"]


def test_a_configured_file_comes_first(tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CACHED_NAME).write_bytes(CONTENT)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert find_vocabulary(vocabulary, sha256=CHECKSUM) == vocabulary
    assert find_vocabulary(sha256=CHECKSUM) == tmp_path / CACHED_NAME


def test_a_configured_file_that_is_wrong_is_refused(vocabulary: Path) -> None:
    with pytest.raises(VocabularyError, match=r"small\.tiktoken: not cl100k_base\.tiktoken: its SHA-256 is"):
        find_vocabulary(vocabulary)
    with pytest.raises(VocabularyError, match="No such file"):
        find_vocabulary(vocabulary.with_name("missing"))


def test_a_cached_file_that_is_wrong_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / CACHED_NAME).write_bytes(CONTENT[:-5])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert find_vocabulary(sha256=CHECKSUM) is None


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"no vocabulary at all\n")
    with pytest.raises(VocabularyError, match="not a tiktoken vocabulary"):
        Vocabulary(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())._load()


@pytest.mark.parametrize(
    ("package", "file"),
    [
        ("litellm", "litellm/litellm_core_utils/tokenizers"),
        ("llama_index", "llama_index/core/_static/tiktoken_cache"),
    ],
)
def test_packages_are_searched_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, file: str
) -> None:
    folder = tmp_path / file
    folder.mkdir(parents=True)
    (tmp_path / file.split("/")[0] / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / CACHED_NAME).write_bytes(CONTENT)
    monkeypatch.undo()
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert find_vocabulary(sha256=CHECKSUM) == folder / CACHED_NAME
    assert package not in sys.modules


def test_threads_that_come_at_once_load_it_once(decoder: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    parse = token_arrays._parse

    def counted(path: Path, content: bytes) -> dict[int, bytes]:
        loaded.append(path)
        return parse(path, content)

    monkeypatch.setattr(token_arrays, "_parse", counted)
    with ThreadPoolExecutor(8) as executor:
        texts = list(executor.map(decoder.decode_blocking, [[[0]]] * 64))
    assert texts == [["hello"]] * 64
    assert len(loaded) == 1


# The real vocabulary


def test_the_real_vocabulary_is_complete(real: Vocabulary) -> None:
    assert sorted(real._load()) == [*range(100256), *range(100257, 100261), 100276]


@pytest.mark.parametrize(
    ("text", "ids"),
    [("hello world", [15339, 1917]), ("tiktoken is great!", [83, 1609, 5963, 374, 2294, 0])],
)
def test_known_ids_give_the_known_text(real: Vocabulary, text: str, ids: list[int]) -> None:
    assert real.decode_blocking([ids]) == [text]


@given(st.lists(st.integers(0, 100255), max_size=20))
def test_any_ids_give_what_tiktoken_gives(real: Vocabulary, ids: list[int]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {token: id_ for id_, token in real._load().items() if id_ < 100256}
    if not hasattr(real, "oracle"):
        real.oracle = tiktoken.Encoding("cl100k", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={})  # type: ignore[attr-defined]
    assert real.decode_blocking([ids]) == [real.oracle.decode(ids)]  # type: ignore[attr-defined]
