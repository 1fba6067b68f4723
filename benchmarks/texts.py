"""The texts of the benchmarks: random real words, lengths spread evenly, the same ones from the same seed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

__all__ = ["SEED", "WORDS", "common_words", "texts_of", "vocabulary"]

SEED = 20261121
# Words of a text, from and to.
WORDS = {"short": (4, 16), "mixed": (4, 230), "long": (180, 240), "one": (14, 14)}


def common_words() -> list[str]:
    """2048 of the most common English words, which come with the package: each is one token of BERT's vocabulary."""
    return Path(__file__).with_name("words.txt").read_text(encoding="ascii").split()


def vocabulary(folder: Path) -> list[str]:
    """The whole words among a WordPiece model's own tokens: real words, rare and common.

    folder: holds `tokenizer.json`.
    """
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return sorted(token for token in tokens if re.fullmatch("[a-z]{2,}", token))


def texts_of(kind: str | tuple[int, int], count: int, words: list[str], seed: int | str = SEED) -> list[str]:
    """`count` texts of random words, their lengths spread evenly between the kind's bounds, or the bounds given."""
    lowest, highest = WORDS[kind] if isinstance(kind, str) else kind
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=chance.randint(lowest, highest))) for _ in range(count)]
