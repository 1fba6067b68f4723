"""Vectors over HTTP against sentence-transformers, in float32, for texts of many kinds.

The golden numbers are the ones that fastembed publishes for this model in its tests.
"""

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence

import httpx
import numpy as np
import pytest
import torch

from tests.contract.helpers import MODEL, Floats, checkpoint, vectors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the reference's own imports
    from sentence_transformers import SentenceTransformer

HELLO_WORLD = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]

ENGLISH = [
    *("the", "a", "model", "text", "vector", "café", "naïve", "of", "Paris", "runs", "quickly", "don't", "re-use"),
    *("3.14", "$5", "e-mail", "1,000", "U.S.A.", "ÅNGSTRÖM"),
]
SPECIAL = ["[SEP]", "[CLS]", "[PAD]", "[UNK]", "[MASK]", "##ing", "</s>", "<|endoftext|>", "[sep]", "[ SEP ]"]
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "☕️", "🫠", "1️⃣", "❤️‍🔥"]


def words(random: random.Random, count: int) -> str:
    return " ".join(random.choice(ENGLISH) for _ in range(count))


def letters(first: int, last: int, count: int) -> Callable[[random.Random], str]:
    return lambda random: "".join(chr(random.randint(first, last)) for _ in range(random.randint(1, count)))


def japanese(random: random.Random) -> str:
    blocks = [(0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xFF66, 0xFF9D)]
    return "".join(chr(random.randint(*random.choice(blocks))) for _ in range(random.randint(1, 50)))


def combining(random: random.Random) -> str:
    return "".join(
        random.choice("aeiouxAEIOU각한") + chr(random.randint(0x300, 0x36F)) * random.randint(0, 5) for _ in range(12)
    )


def json_text(random: random.Random) -> str:
    return json.dumps({words(random, 1): [random.random(), None, {"a": words(random, 3)}] for _ in range(2)}, indent=2)


def code(random: random.Random) -> str:
    lines = [
        "def f(x: int) -> str:",
        "\treturn f'{x!r:>10}'",
        "#include <stdio.h>",
        "a[i++] ^= ~b >> 3;",
        '<p class="x">',
    ]
    return "\n".join(random.choice(lines) for _ in range(random.randint(1, 4)))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "one word": lambda random: random.choice(ENGLISH),
    "a sentence": lambda random: words(random, random.randint(2, 30)) + ".",
    "a page": lambda random: words(random, random.randint(100, 300)),
    "a book": lambda random: words(random, 5000),
    "Chinese": letters(0x4E00, 0x9FA5, 120),
    "Japanese": japanese,
    "Thai": letters(0x0E01, 0x0E3A, 80),
    "emoji": lambda random: "".join(random.choice([*EMOJI, " "]) for _ in range(random.randint(1, 30))),
    "right to left": lambda random: (
        letters(0x05D0, 0x05EA, 20)(random) + " \u200f" + letters(0x0621, 0x064A, 20)(random)
    ),
    "combining marks": combining,
    "control characters": lambda random: "".join(
        random.choice(["\x01", "\x7f", "\x85", "\u200b", "\ufeff", "x"]) for _ in range(50)
    ),
    "NUL": lambda random: "\0".join([words(random, 2), words(random, 1), ""]),
    "code": code,
    "JSON": json_text,
    "white space": lambda random: "".join(
        random.choice([" ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028"]) for _ in range(3000)
    ),
    "white space and words": lambda random: (" \n" * random.randint(1, 2000)).join(ENGLISH),
    "special tokens": lambda random: random.choice(["", " "]).join(
        random.choice([*SPECIAL, "word"]) for _ in range(20)
    ),
    "a very long word": lambda random: random.choice("abcxyz") * random.choice([99, 100, 101, 200, 20_000]) + " end",
    "a long word of many letters": letters(ord("a"), ord("z"), 20_000),
    "any Unicode": lambda random: "".join(
        chr(random.choice([random.randint(1, 0xD7FF), random.randint(0xE000, 0x10FFFF)])) for _ in range(40)
    ),
}
PER_KIND = 10


@pytest.fixture(scope="module")
def reference() -> Iterator[SentenceTransformer]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other processes want the cores
    yield SentenceTransformer(str(checkpoint()), device="cpu")
    torch.set_num_threads(threads)


def served(http: httpx.Client, texts: Sequence[str]) -> Floats:
    fields = {"model": MODEL, "input": texts, "truncate": "END", "encoding_format": "base64"}
    return vectors(http.post("/v1/embeddings", json=fields))


def test_two_hundred_texts_have_the_reference_s_vectors(http: httpx.Client, reference: SentenceTransformer) -> None:
    source = random.Random(20240607)
    texts = [(kind, make(source)) for kind, make in KINDS.items() for _ in range(PER_KIND)]
    assert len(texts) == 200
    found = served(http, [text for _, text in texts])
    expected = reference.encode([text for _, text in texts], batch_size=16)
    difference = np.abs(found - expected).max(axis=1)
    wrong = {
        (kind, ascii(text[:60])): float(d) for (kind, text), d in zip(texts, difference, strict=True) if not d <= 1e-5
    }
    assert wrong == {}


def test_hello_world_has_the_published_vector(http: httpx.Client) -> None:
    assert served(http, ["hello world"])[0, :5] == pytest.approx(HELLO_WORLD, abs=1e-3)
