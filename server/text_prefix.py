"""The first tokens of a long text, exactly, without reading the rest of it.

A part of the text is tokenised, and of its tokens those are kept that no continuation can change. What a
continuation can change is known for the kinds of normalizer, pre-tokenizer and model listed here; a tokenizer.json
with any other kind has no shortcut, and its texts are tokenised whole.

The argument, stage by stage. Call a letter or digit *plain* when no normalisation joins it to its neighbours or
removes it, and an *anchor* a place between two plain characters.

1.  Added tokens ("[SEP]") are matched from the left, the longest first. A match that starts further from the end of
    the part than the longest of them, and one character for `single_word`, stays as it is. The white space that
    `lstrip` and `rstrip` take ends at an anchor.
2.  Normalisation joins characters to sequences (combining marks, jamo, grapheme clusters, runs of spaces). None
    reaches across an anchor.
3.  Added tokens that are matched after normalisation: as in 1, counted in plain characters, since others may vanish.
4.  The splits into words decide by what they have read: one character, three for "'re", or a run of white space and
    the character after it. `MARGIN` plain characters beyond a word are more than any of them looks at.
5.  A word that has ended is tokenised by itself. So the words that end before an anchor which has all that room after
    it are settled, with their tokens.
6.  A word may be the whole text (Chinese, Thai). Both Unigram and byte-pair models have this property: the tokens of
    a word up to any token boundary are the tokens of that beginning alone (Unigram: the best path to a place does not
    depend on what follows; byte-pair: no merge crossed the boundary, and the others happen in the same order). Whatever
    follows, one of a few places in a row must be a token boundary, because no token of the vocabulary spans them all.
    What the beginnings up to each of these places have in common, every continuation has.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Self

import tokenizers

__all__ = ["PrefixTokenizer"]

MARGIN = 8
"""Plain characters after a word within which its end is decided; the splits below look at most three ahead."""

FIRST_PART = 64
"""Characters of the first attempt beyond those that it is to settle."""

SEARCH_BACK = 2048
"""Characters from the end of a part within which a settled place is sought: floods of white space have none."""

LOCAL_NORMALIZERS = {
    "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend", "Strip",
    "StripAccents",
}  # fmt: skip
"""Normalizers that work within a character, a combining sequence or a grapheme cluster, or on the start of a text."""

LOCAL_PRE_TOKENIZERS = {
    "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation", "Whitespace",
    "WhitespaceSplit",
}  # fmt: skip
"""Pre-tokenizers whose splits are decided by at most three characters, or a run of white space, after them."""

_END_OF_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_START_OF_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LOCAL_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    _START_OF_WORDS + r"\p{N}" + _END_OF_WORDS,  # Qwen 2 and 3
    _START_OF_WORDS + r"\p{N}{1,3}" + _END_OF_WORDS,  # cl100k, Llama 3
    r" {2,}",  # XLM-RoBERTa's normalizer
    r"\s+",
}
"""Regular expressions of which the same holds, and whose match can only grow, or give up its last white space."""


CLUSTERING_LETTERS = (("\u1100", "\u11ff"), ("\ua960", "\ua97f"), ("\ud7b0", "\ud7ff"), ("\u0d4e", "\u0d4e"))
"""Letters that join their neighbours: Hangul jamo in three blocks, Malayalam dot reph."""


class PrefixTokenizer:
    """Tokenises as much of a text as its first tokens need."""

    @classmethod
    def of(cls, definition: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> Self | None:
        """The shortcut for the tokenizer that `definition` (a parsed tokenizer.json) describes, or None without one."""
        model = definition.get("model") or {}
        if not (
            _is_local(definition.get("normalizer"), LOCAL_NORMALIZERS)
            and _is_local(definition.get("pre_tokenizer"), LOCAL_PRE_TOKENIZERS)
            and model.get("type") in {"BPE", "Unigram", "WordLevel", "WordPiece"}
            and not model.get("dropout")
        ):
            return None
        return cls(definition, tokenizer)

    def __init__(self, definition: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
        """Use `of`, which knows whether there is a shortcut."""
        self._tokenizer = tokenizer
        self._is_plain = _plain_test(tokenizer.normalizer)
        self._words = _WordPrefixes.of(definition["model"], tokenizer)
        added = definition.get("added_tokens") or []
        normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
        self._raw_reach = 1 + max((len(token["content"]) for token in added), default=0)
        self._plain_reach = MARGIN + max(
            (
                max(len(token["content"]), len(normalize(token["content"])))
                for token in added
                if token.get("normalized", True)
            ),
            default=0,
        )

    def first_ids(self, text: str, count: int) -> list[int] | None:
        """The first `count` ids of a text, without special tokens; None where the whole text must be read to tell."""
        # Chinese has about one token a character. What the first attempt finds says how much the second one needs.
        size = count * 3 // 2 + FIRST_PART
        while size * 2 < len(text):
            settled = self._settled_ids(text[:size], count)
            if len(settled) >= count:
                return settled[:count]
            # No token yet, in a flood of white space perhaps: make for the whole text in few steps.
            missing = count / len(settled) if settled else 16
            size = math.ceil(size * min(max(1.25 * missing, 2), 16))
        return None

    def _settled_ids(self, part: str, count: int) -> list[int]:
        """The ids at the start of `part` that stay the same whatever follows it; perhaps no more than `count`."""
        place = self._settled_place(part)
        if not place:
            return []
        # Not encode(), which keeps the GIL, and not encode_batch_fast(), which keeps no offsets.
        encoding = self._tokenizer.encode_batch([part], add_special_tokens=False)[0]
        before, after = encoding.char_to_token(place - 1), encoding.char_to_token(place)
        if before is None or after is None:  # a model without an unknown token leaves out what it does not know
            return []
        word = encoding.token_to_word(before)
        span = None if word is None else encoding.word_to_tokens(word)
        if span is None:
            raise AssertionError("every token belongs to a word")
        start, end = span
        ids: list[int] = encoding.ids
        if encoding.token_to_word(after) != word:
            return ids[:end]
        if self._words is None:
            return ids[:start]
        # No more than is needed, where the word is the whole part: of these tokens, those of the last two longest
        # tokens' characters may go, each up to four bytes.
        end = min(before, start + count + 8 * self._words.longest)
        while end > start and encoding.token_to_chars(end) == encoding.token_to_chars(end - 1):
            end -= 1  # not between the bytes of one character
        return ids[:start] + self._words.settled_ids(_spelling(encoding.tokens[start:end]), ids[start:end])

    def _settled_place(self, part: str) -> int:
        """The last anchor with enough after it; 0 without one."""
        settled = None
        for anchor, plain in self._anchors(part):
            if settled is None:
                if anchor + self._raw_reach <= len(part):
                    settled = plain
            elif plain - settled >= self._plain_reach:
                return anchor
        return 0

    def _anchors(self, part: str) -> Iterator[tuple[int, int]]:
        """Anchors from the end of `part` on backwards, each with the number of plain characters after it."""
        plain = 0
        after = False
        for index in range(len(part) - 1, max(len(part) - SEARCH_BACK, 0), -1):
            here = self._is_plain(part[index])
            if here and after:
                yield index + 1, plain
            plain += here
            after = here


class _WordPrefixes:
    """Settled tokens within a word that has not ended: point 6 above."""

    @classmethod
    def of(cls, model: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> Self | None:
        """None for a model whose tokens depend on the end of the word."""
        if model["type"] == "Unigram":
            pieces: Any = (piece for piece, _ in model["vocab"])
            return cls(tokenizer, max(map(len, pieces)), model.get("unk_id"))
        if (
            model["type"] == "BPE"
            and not model.get("end_of_word_suffix")
            and not model.get("continuing_subword_prefix")
        ):
            unknown = model.get("unk_token")
            return cls(tokenizer, max(map(len, model["vocab"])), model["vocab"].get(unknown))
        return None

    def __init__(self, tokenizer: tokenizers.Tokenizer, longest: int, unknown: int | None) -> None:
        self._token_to_id = tokenizer.token_to_id
        self.longest = longest
        """Characters of the longest token."""
        self._unknown = unknown
        # The model alone, shared and not copied: words come to it normalised and split, as its tokens spell them.
        self._model = tokenizers.Tokenizer(tokenizer.model)

    def settled_ids(self, beginning: str, ids: list[int]) -> list[int]:
        """The first of a word's `ids` that stay, whatever follows its `beginning`, which they spell."""
        last = len(beginning) - self.longest
        first = self._first_boundary(beginning, last)
        if first <= self.longest:  # a word that is itself in the vocabulary may be taken whole (`ignore_merges`)
            return []
        parts = [beginning[:end] for end in range(first, last + 1)]
        *encodings, whole = self._model.encode_batch_fast([*parts, beginning], add_special_tokens=False)
        # Not every token spells what it was made of: an unknown one may have a name instead.
        if whole.ids != ids:
            return []
        settled = ids
        for encoding in encodings:
            settled = _common_start(settled, encoding.ids)
        while settled and settled[-1] == self._unknown:  # may grow: neighbouring unknowns are fused
            settled = settled[:-1]
        return settled

    def _first_boundary(self, word: str, last: int) -> int:
        """A place from which on to `last` a token boundary must come: the first start of a token that spans `last`."""
        for start in range(max(last - self.longest, 0), last):
            if any(self._token_to_id(word[start:end]) is not None for end in range(last + 1, start + self.longest + 1)):
                return start
        return last


def _is_local(stage: dict[str, Any] | None, local: set[str]) -> bool:
    """Whether a normalizer or pre-tokenizer is of the kinds whose reach is known."""
    match stage:
        case None:
            return True
        case {"type": "Sequence"}:
            return all(_is_local(part, local) for part in stage.get("normalizers") or stage.get("pretokenizers") or [])
        case {"type": "Replace", "pattern": pattern}:
            return _is_local_pattern(pattern) and local is LOCAL_NORMALIZERS
        case {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}:
            return (
                _is_local_pattern(pattern)
                and (behavior, invert) in {("Isolated", False), ("Removed", True)}
                and local is LOCAL_PRE_TOKENIZERS
            )
        case {"type": kind}:
            return kind in local
    return False


def _is_local_pattern(pattern: dict[str, str]) -> bool:
    match pattern:
        case {"Regex": expression}:
            return expression in LOCAL_PATTERNS
        case {"String": string}:
            # Without letters and digits in it, a match has none of them in its way and ends at an anchor.
            return not any(map(str.isalnum, string))
    return False


def _plain_test(normalizer: Any) -> Callable[[str], bool]:
    """The test for plain characters under a normalizer."""

    @lru_cache(maxsize=4096)
    def is_plain(character: str) -> bool:
        if not _is_stable(character):
            return False
        # Normalizers may put a space around Chinese characters, or before the text.
        normalized = normalizer.normalize_str(character).strip(" ▁") if normalizer else character
        return bool(normalized) and all(map(_is_stable, normalized))

    return is_plain


def _is_stable(character: str) -> bool:
    """Whether a character is a letter or digit that Unicode's normalisation and clusters leave alone."""
    if character.isascii():
        return character.isalnum()
    return (
        character < "\U00010000"  # letters that every version of Unicode in use knows
        and unicodedata.category(character) in {"Lu", "Ll", "Lo", "Nd"}
        and unicodedata.normalize("NFKC", character) == character
        and not any(first <= character <= last for first, last in CLUSTERING_LETTERS)
    )


def _spelling(tokens: list[str]) -> str:
    """What tokens were made of; `<0xE2>` and its like are bytes of a character that is in no vocabulary."""
    return re.sub(
        "(?:<0x[0-9A-F]{2}>)+",
        lambda match: bytes.fromhex(match[0].replace("<0x", "").replace(">", "")).decode(errors="replace"),
        "".join(tokens),
    )


def _common_start(one: list[int], other: list[int]) -> list[int]:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return one[:index]
    return one[: len(other)]
