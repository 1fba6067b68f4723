"""Tokenizers of the kinds that the catalogue's models have, trained small: exactly the ids of transformers.

The reference runs the same tokenizer.json through PreTrainedTokenizerFast, and also through the class that
tokenizer_config.json names, where that keeps to the file. Two of transformers 5 do not: XLMRobertaTokenizer and
RobertaTokenizer put rules of their own in place of the file's, which gives jina's Chinese model byte-level tokens.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embedserve.server.text_prefix import LOCAL_PATTERNS
from embedserve.server.tokenizer import (
    InvalidTextError,
    TextTooLongError,
    Tokenizer,
    TokenizerFileError,
    Truncate,
)
from tests.server.test_text_prefix import corpus, texts

NO_LIMIT = 10**9
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def template(tokenizer: tokenizers.Tokenizer, single: str) -> processors.TemplateProcessing:
    named = [(token, tokenizer.token_to_id(token)) for token in single.split() if token != "$A"]
    return processors.TemplateProcessing(single=single, special_tokens=named)


def word_piece() -> tokenizers.Tokenizer:
    """As BERT's: bge, MiniLM, jina's English models."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = template(tokenizer, "[CLS] $A [SEP]")
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """As XLM-RoBERTa's: bge-m3, bce."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=ROBERTA[:4], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True, lstrip=True, normalized=False)])
    tokenizer.post_processor = template(tokenizer, "<s> $A </s>")
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """As RoBERTa's: jina's German, Spanish and code models."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=ROBERTA, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def characters() -> tokenizers.Tokenizer:
    """As that of jina's Chinese model: pairs of characters, not of bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=ROBERTA, show_progress=False)
    )
    tokenizer.post_processor = template(tokenizer, "<s> $A </s>")
    return tokenizer


def qwen() -> tokenizers.Tokenizer:
    """As Qwen3-Embedding's, whose last token is not the one that its configuration calls the end."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template(tokenizer, "$A <|endoftext|>")]
    )
    return tokenizer


KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "WordPiece": (word_piece, "BertTokenizer"),
    "Unigram": (unigram, "PreTrainedTokenizerFast"),
    "byte-level BPE": (byte_level, "RobertaTokenizer"),
    "BPE over characters": (characters, "PreTrainedTokenizerFast"),
    "Qwen3": (qwen, "Qwen2Tokenizer"),
}
"""Each with the class that tokenizer_config.json names."""

WRITTEN = [
    "[CLS]", "[SEP]", "[MASK]", "[PAD]", "<s>", "</s>", "<pad>", "<unk>", "<mask>", " <mask> ", "<|endoftext|>",
    "<|im_end|>", "<|im_start|>user\n", "<think>", "</think>", "<|endof", "\x00", "\x1b[0m", "\u202e",
    "\U0001f469\u200d\U0001f680",
]  # fmt: skip


def any_text(fragments: int) -> st.SearchStrategy[str]:
    """Texts of all scripts, floods of white space, and special tokens that somebody wrote."""
    return st.lists(st.one_of(texts(8), st.sampled_from(WRITTEN)), max_size=fragments).map("".join)


def save(folder: Path, tokenizer: tokenizers.Tokenizer, kind: str) -> Path:
    """A model's folder, as far as it is about the tokenizer; returns tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if kind == "Qwen3":
        special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    elif kind != "WordPiece":
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": KINDS[kind][1], **special}))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), KINDS[request.param][0](), request.param)


@pytest.fixture(scope="module")
def references(path: Path) -> list[Any]:
    return [PreTrainedTokenizerFast(tokenizer_file=str(path)), AutoTokenizer.from_pretrained(path.parent)]


@pytest.fixture(scope="module")
def ours(path: Path) -> Tokenizer:
    return Tokenizer.load(path, max_tokens=100_000)


def bounded(tokenizer: Tokenizer, max_tokens: int, *, eager: bool) -> Tokenizer:
    """The same tokenizer with another bound; eager treats every text as a long one, of which the beginning is read."""
    other = copy.copy(tokenizer)
    other.max_tokens = max_tokens
    other._long = 0 if eager else NO_LIMIT
    return other


@settings(deadline=None, max_examples=60)
@given(text=any_text(6))
def test_ids_are_those_of_transformers(ours: Tokenizer, references: list[Any], text: str) -> None:
    ids = ours.encode([text], Truncate.NONE, NO_LIMIT).ids.tolist()
    assert [reference(text)["input_ids"] for reference in references] == [ids] * len(references)


@settings(deadline=None, max_examples=60)
@given(text=any_text(12), max_tokens=st.integers(3, 60), side=st.sampled_from(["left", "right"]), eager=st.booleans())
def test_cut_ids_are_those_of_transformers(
    ours: Tokenizer, references: list[Any], text: str, max_tokens: int, side: str, eager: bool
) -> None:
    reference = references[0]
    reference.truncation_side = side
    expected = reference(text, truncation=True, max_length=max_tokens)["input_ids"]
    truncate = Truncate.START if side == "left" else Truncate.END
    assert bounded(ours, max_tokens, eager=eager).encode([text], truncate, NO_LIMIT).ids.tolist() == expected


@settings(deadline=None, max_examples=60)
@given(text=any_text(12), max_tokens=st.integers(3, 60), eager=st.booleans())
def test_a_cut_keeps_what_stands_at_both_ends(ours: Tokenizer, text: str, max_tokens: int, eager: bool) -> None:
    """As tokenise everything, then cut between the special tokens."""
    whole = ours.encode([text], Truncate.NONE, NO_LIMIT).ids.tolist()
    empty = ours.encode([""], Truncate.NONE, NO_LIMIT).ids.tolist()
    leading, trailing = (empty[:1], empty[1:]) if len(empty) == 2 else ([], empty)
    content = whole[len(leading) : len(whole) - len(trailing)]
    room = max_tokens - len(empty)
    small = bounded(ours, max_tokens, eager=eager)
    kept = {Truncate.END: content[:room], Truncate.START: content[max(0, len(content) - room) :]}
    for truncate, expected in kept.items():
        encoded = small.encode([text], truncate, NO_LIMIT)
        assert encoded.ids.tolist() == leading + expected + trailing
        assert encoded.truncated == (len(whole) > max_tokens)


def test_a_book_is_refused_after_its_beginning(path: Path) -> None:
    """Every kind has the shortcut of `text_prefix`: the tokens that are told are those of a beginning."""
    tokenizer = Tokenizer.load(path, max_tokens=16)
    with pytest.raises(TextTooLongError) as caught:
        tokenizer.encode(["ordinary words, 中文 and some more of them. " * 40_000], Truncate.NONE, NO_LIMIT)
    assert 16 < caught.value.tokens < 1000


def test_the_pattern_of_qwen_is_one_whose_reach_is_known() -> None:
    assert QWEN_PATTERN in LOCAL_PATTERNS


# What ends every text


@pytest.fixture(scope="module")
def old_and_new(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    """Qwen3's tokenizer.json before June 2025, without its last token, and after; and that token."""
    new, old = qwen(), qwen()
    old.post_processor = processors.ByteLevel(trim_offsets=False)
    folder = tmp_path_factory.mktemp("qwen")
    return save(folder / "old", old, "Qwen3"), save(folder / "new", new, "Qwen3"), new.token_to_id("<|endoftext|>")


@settings(deadline=None, max_examples=60)
@given(text=any_text(8), max_tokens=st.integers(1, 30), truncate=st.sampled_from(["START", "END"]), eager=st.booleans())
def test_what_an_old_file_lacks_is_appended_and_survives_the_cut(
    old_and_new: tuple[Path, Path, int], text: str, max_tokens: int, truncate: str, eager: bool
) -> None:
    old, new, last = old_and_new
    found = [
        bounded(Tokenizer.load(path, max_tokens=9, append=(last,)), max_tokens, eager=eager)
        .encode([text, ""], Truncate(truncate), NO_LIMIT)
        .ids.tolist()
        for path in (old, new)
    ]
    assert found[0] == found[1]
    assert found[0][-2:] == [last, last]  # that of the text, and the empty text's only one


def test_nothing_is_appended_twice(old_and_new: tuple[Path, Path, int]) -> None:
    _, new, last = old_and_new
    plain, told = (Tokenizer.load(new, max_tokens=64, append=append) for append in ((), (last,)))
    for text in ["hello", "", "hello<|endoftext|>"]:
        ids = told.encode([text], Truncate.NONE, NO_LIMIT).ids.tolist()
        assert ids == plain.encode([text], Truncate.NONE, NO_LIMIT).ids.tolist()
        assert ids.count(last) == 1 + text.count("<|endoftext|>")


def test_the_end_of_a_text_is_no_substitute_for_the_end_of_every_text(old_and_new: tuple[Path, Path, int]) -> None:
    """As with the new file, for which transformers appends the token in any case."""
    old, new, last = old_and_new
    tokenizer = Tokenizer.load(old, max_tokens=64, append=(last,))
    text = "hello<|endoftext|>"
    expected = AutoTokenizer.from_pretrained(new.parent)(text)["input_ids"]
    assert tokenizer.encode([text], Truncate.NONE, NO_LIMIT).ids.tolist() == expected
    assert expected[-2:] == [last, last]


def test_an_end_that_the_vocabulary_lacks_is_refused(old_and_new: tuple[Path, Path, int]) -> None:
    with pytest.raises(TokenizerFileError, match=r"tokenizer\.json: has no token 151643, which must end every text"):
        Tokenizer.load(old_and_new[0], max_tokens=64, append=(151643,))


# Vocabulary and embeddings


def test_a_vocabulary_larger_than_the_embeddings_is_refused(path: Path) -> None:
    with pytest.raises(TokenizerFileError, match=r"has token \d{3}, but config\.json .* embeddings for 50 tokens"):
        Tokenizer.load(path, max_tokens=64, vocab_size=50)


def test_an_end_without_an_embedding_is_refused(old_and_new: tuple[Path, Path, int]) -> None:
    _, new, last = old_and_new
    with pytest.raises(TokenizerFileError, match=rf"has token {last}, but"):
        Tokenizer.load(new, max_tokens=64, vocab_size=last)


def test_an_added_token_without_an_embedding_is_refused_in_the_text_that_holds_it(
    old_and_new: tuple[Path, Path, int],
) -> None:
    """Qwen3-Embedding-4B has fewer embeddings than its tokenizer has tokens."""
    _, new, _ = old_and_new
    rust = tokenizers.Tokenizer.from_file(str(new))
    think = rust.token_to_id("<think>")
    tokenizer = Tokenizer.load(new, max_tokens=8, vocab_size=think)
    assert tokenizer.encode(["think"], Truncate.NONE, NO_LIMIT).ids.tolist() == rust.encode("think").ids
    for truncate in Truncate:
        with pytest.raises(
            InvalidTextError, match=rf"'<think>', token {think}, which this model has no embedding"
        ) as e:
            tokenizer.encode(["fine", "a <think>"], truncate, NO_LIMIT)
        assert e.value.index == 1
    # What is cut off does no harm.
    assert tokenizer.encode(["x 1 2 3 4 5 6 7 8 9 <think>"], Truncate.END, NO_LIMIT).truncated == 1
