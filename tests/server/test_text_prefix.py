"""No continuation changes what was called settled."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from embedserve.server.text_prefix import LOCAL_PATTERNS, PrefixTokenizer

ADDED_TOKENS = [
    AddedToken("[SEP]", special=True, normalized=False),
    AddedToken("<mask>", special=True, normalized=False, lstrip=True),
    AddedToken("<end>", special=True, normalized=False, rstrip=True),
    AddedToken("Straße", special=False, normalized=True),
    AddedToken("the", special=False, normalized=True, single_word=True),
    AddedToken("<a>b", special=False, normalized=False),
    AddedToken("<a>", special=False, normalized=False),
]

FRAGMENTS = [
    "the", "quick", "unremarkably ordinary", "brown", "Fox", "jumps", "Straße", "strasse", "naïve",
    "it's", "we'll", "THEY'RE", "'", "'l", "x", "a", "1", "2345", "½", "10²", ".", ",", "!?", "--",
    "[", "]", "[SEP]", "[SEP", "SEP]", "[S", "<mask>", "<ma", "sk>", "<end>", "<a>", "<a>b", "<",
    "<0x41>", " ", " ", " ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u200b",
    "\u2028", "中文", "漢", "字", "这是一个没有空格的长句子", "。", "ไทย", "ภาษา", "ก", "ำ", "ที่", "العربية",
    "مَرْحَبًا", "\u0600", "हिन्दी", "क्ष", "한국어", "\u1112", "\u1161", "\u11ab", "カ", "\u3099", "ｶ",
    "ﾞ", "👩‍👩‍👧", "🇩🇪", "🏽", "\u200d", "\ufe0f", "e\u0301", "\u0301", "\u0323", "\u0307", "İ", "ß",
    "Å", "\u0000", "\u0007", "\u00ad", "\ufffd", "\ufeff", "▁", "Ġ", "𝒳", "ഭൎ", "\u0d4e",
]  # fmt: skip


def texts(max_fragments: int = 60) -> st.SearchStrategy[str]:
    """Fragments, some of them repeated into a flood, and now and then any characters at all."""
    fragment = st.sampled_from(FRAGMENTS)
    flood = st.builds(str.__mul__, fragment, st.integers(2, 40))
    anything = st.text(st.characters(codec="utf-8"), max_size=5)
    return st.lists(st.one_of(fragment, fragment, fragment, flood, anything), min_size=1, max_size=max_fragments).map(
        "".join
    )


def corpus() -> list[str]:
    generator = random.Random(20261121)
    return ["".join(generator.choices([*FRAGMENTS, " ", " "], k=30)) for _ in range(400)]


def definitions() -> dict[str, Callable[[], tokenizers.Tokenizer]]:
    """Small tokenizers of the kinds that models come with."""
    byte_alphabet = pre_tokenizers.ByteLevel.alphabet()

    def word_piece() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=20))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return train(
            tokenizer, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
        )

    def gpt2() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return train(
            tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=byte_alphabet, show_progress=False)
        )

    def split(pattern: str) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return train(
            tokenizer, trainers.BpeTrainer(vocab_size=600, initial_alphabet=byte_alphabet, show_progress=False)
        )

    def unigram(pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizer
        # Few characters of their own: the rest is unknown, and neighbouring unknowns become one token.
        return train(
            tokenizer,
            trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
        )

    def character_pairs() -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=200, limit_alphabet=60, special_tokens=["<unk>"], show_progress=False)
        return train(tokenizer, trainer)

    def one_word() -> tokenizers.Tokenizer:
        """As SentencePiece's byte-pair models come: the whole text is one word, unknown characters become bytes."""
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            limit_alphabet=60,
            special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
            max_token_length=12,
            show_progress=False,
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        return train(tokenizer, trainer)

    def train(tokenizer: tokenizers.Tokenizer, trainer: trainers.Trainer) -> tokenizers.Tokenizer:
        tokenizer.train_from_iterator(corpus(), trainer)
        tokenizer.add_tokens(ADDED_TOKENS)
        return tokenizer

    named = {
        "WordPiece": word_piece,
        "GPT-2": gpt2,
        "Unigram": lambda: unigram(pre_tokenizers.Metaspace()),
        "XLM-RoBERTa": lambda: unigram(
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        ),
        "character pairs": character_pairs,
        "one word": one_word,
    }
    splits = {
        f"split {pattern}": (lambda p=pattern: split(p)) for pattern in sorted(LOCAL_PATTERNS) if len(pattern) > 9
    }
    return named | splits


@pytest.fixture(scope="module", params=definitions())
def tokenizer(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return definitions()[request.param]()


@settings(deadline=None, max_examples=100)
@given(part=texts(), continuation=texts(), count=st.integers(1, 300))
def test_no_continuation_changes_settled_ids(
    tokenizer: tokenizers.Tokenizer, part: str, continuation: str, count: int
) -> None:
    prefix = PrefixTokenizer.of(json.loads(tokenizer.to_str()), tokenizer)
    assert prefix is not None
    settled = prefix._settled_ids(part, count)
    assert ids(tokenizer, part + continuation)[: len(settled)] == settled


@settings(deadline=None, max_examples=100)
@given(text=texts(), repeat=st.integers(1, 10), count=st.integers(1, 50))
def test_first_ids_are_those_of_the_whole_text(
    tokenizer: tokenizers.Tokenizer, text: str, repeat: int, count: int
) -> None:
    prefix = PrefixTokenizer.of(json.loads(tokenizer.to_str()), tokenizer)
    assert prefix is not None
    first = prefix.first_ids(text * repeat, count)
    assert first is None or first == ids(tokenizer, text * repeat)[:count]


def test_ordinary_text_has_the_shortcut(tokenizer: tokenizers.Tokenizer) -> None:
    prefix = PrefixTokenizer.of(json.loads(tokenizer.to_str()), tokenizer)
    assert prefix is not None
    assert prefix.first_ids("ordinary words in a row and then some more of them. " * 1000, 100) is not None


@pytest.mark.parametrize("name", ["WordPiece", "GPT-2", "one word"])
def test_text_that_is_one_long_word_has_the_shortcut(name: str) -> None:
    tokenizer = definitions()[name]()
    prefix = PrefixTokenizer.of(json.loads(tokenizer.to_str()), tokenizer)
    assert prefix is not None
    assert prefix.first_ids("这是一个没有空格的长句子" * 1000, 100) is not None


@pytest.mark.parametrize(
    "stage",
    [
        {"normalizer": {"type": "ByteLevel"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "foo"}, "content": ""}},
        {"pre_tokenizer": {"type": "UnicodeScripts"}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "FixedLength", "length": 5}]}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"\w+(?=.*end)"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        {"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1}},
        {"model": {"vocab": {}}},
    ],
)
def test_what_is_not_known_has_no_shortcut(stage: dict[str, Any]) -> None:
    definition = {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []} | stage
    assert PrefixTokenizer.of(definition, tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))) is None


def ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    result: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return result
