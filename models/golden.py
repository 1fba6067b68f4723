"""Published values of known models: what the real weights must give. Data, compared by `embedserve selftest`.

Sources, none of which says the checkpoint's revision:

README       the model's own page on the hub; issues: one of its repository
ST           sentence-transformers, tests/sentence_transformer/test_pretrained.py: bfloat16, relative tolerance 1 %
fastembed    its tests' canonical vectors: ONNX Runtime, absolute tolerance 1e-3; some from quantised graphs
TEI          Text Embeddings Inference, its tests and backends/candle/tests/snapshots: float32
llama.cpp    its pull requests of the tokenizers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tokens:
    """What a text is tokenised to, special tokens included: the ids, or only their number."""

    source: str
    text: str
    count: int
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Components:
    """The first components of the unit vector of `prompt + text`, cut to `dimensions` before the normalisation."""

    source: str
    text: str
    values: tuple[float, ...]
    tolerance: float = 1e-3
    prompt: str = ""
    dimensions: int | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of each query (`prompt` before it) with each document, [queries][documents].

    weights: of the dense (cosine), the sparse (Σ w_q·w_d over shared tokens) and the multi-vector score (mean over the
    query's tokens of the largest cosine with the document's); the score is their weighted mean. A score may differ by
    `tolerance + relative * |score|`.
    """

    source: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    tolerance: float = 0.0
    relative: float = 0.0
    prompt: str = ""
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class TokenWeights:
    """The sparse output of a text, by the decoded token. Tokens that are missing here must be missing there."""

    source: str
    text: str
    values: Mapping[str, float] = field(default_factory=dict)
    tolerance: float = 5e-3


Golden = Tokens | Components | Scores | TokenWeights


def published(model: str) -> tuple[Golden, ...]:
    """Return what is published of a model, by its catalogue id; nothing for a model of which nothing is."""
    return _PUBLISHED.get(model, ())


# --------------------------------------------------------------------------------------- sentence-transformers' scores

RED_PLANET = "Which planet is known as the Red Planet?"
PLANETS = (
    "Venus is often called Earth's twin because of its similar size and proximity.",
    "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
    "Jupiter, the largest planet in our solar system, has a prominent red spot.",
    "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
)


def _planets(*scores: float, prompt: str = "") -> Scores:
    return Scores("ST", (RED_PLANET,), PLANETS, (scores,), relative=0.01, prompt=prompt)


# -------------------------------------------------------------------------------------------------- fastembed's vectors


def _hello(*values: float, tolerance: float = 1e-3, prompt: str = "") -> Components:
    return Components("fastembed", "hello world", values, tolerance, prompt)


# Made with a quantised or optimised graph.
_QUANTISED = 1e-2

# --------------------------------------------------------------------------------------------------- TEI's raw vectors


def _deep_learning(norm: float, *raw: float, tolerance: float = 2e-3) -> Components:
    """Its snapshots hold pooled states before the normalisation, and the norm of the whole vector.

    Its GELU is the tanh form, which is why the tolerance is wider than float32 would need.
    """
    return Components("TEI", "What is Deep Learning?", tuple(value / norm for value in raw), tolerance)


# ------------------------------------------------------------------------------------------------------ READMEs' scores

_M3_QUERIES = ("What is BGE M3?", "Defination of BM25")
_M3_DOCUMENTS = (
    "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction.",
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document",
)


def _m3(
    a: float, b: float, c: float, d: float, *, weights: tuple[float, float, float], tolerance: float = 5e-3
) -> Scores:
    """The pairs in the README's order; float16."""
    return Scores("README", _M3_QUERIES, _M3_DOCUMENTS, ((a, b), (c, d)), tolerance, weights=weights)


_QWEN3_QUERIES = ("What is the capital of China?", "Explain gravity")
_QWEN3_DOCUMENTS = (
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other. It gives weight to physical objects and is "
    "responsible for the movement of planets around the sun.",
)
_QWEN3_PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
_QWEN3_TOKENS = (
    Tokens("issues", "test", 2, (1944, 151643)),
    Tokens("issues", "test again", 3, (1944, 1549, 151643)),
)

# ---------------------------------------------------------------------------------------------------------- the models

_PUBLISHED: Mapping[str, tuple[Golden, ...]] = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        Tokens("TEI", "What is Deep Learning?", 7),
        Tokens("TEI", "Deep Learning is...", 8),
        _planets(0.46371, 0.81205, 0.72828, 0.75051),
        _hello(-0.034478, 0.03102, 0.00673, 0.02611, -0.039362),
        _deep_learning(
            7.58091, -0.59059864, -0.25252345, 0.14972475, 0.05487579, -0.11783009, -0.16678402, -0.23309596,
            -0.07095148,
        ),
        Components(
            "TEI", "test",
            (0.020964134, 0.04565805, -0.066505864, 0.10739273, -0.013054413, -0.07467599),
            2e-3, dimensions=128,
        ),
    ),
    "BAAI/bge-small-en-v1.5": (
        _planets(0.60191, 0.82845, 0.7786, 0.70781),
        _hello(0.01522374, -0.02271799, 0.00860278, -0.07424029, 0.00386434, tolerance=_QUANTISED),
    ),
    "BAAI/bge-base-en-v1.5": (
        _planets(0.56749, 0.85499, 0.73467, 0.69584),
        _hello(0.01129394, 0.05493144, 0.02615099, 0.00328772, 0.02996045, tolerance=_QUANTISED),
    ),
    "BAAI/bge-large-en-v1.5": (
        _planets(0.53033, 0.81206, 0.68978, 0.71022),
        _hello(0.03434538, 0.03316108, 0.02191251, -0.03713358, -0.01577825),
    ),
    "BAAI/bge-small-zh-v1.5": (
        _hello(-0.01023294, 0.07634465, 0.0691722, -0.04458365, -0.03160762, tolerance=_QUANTISED),
    ),
    "BAAI/bge-large-zh-v1.5": (_planets(0.4627, 0.7272, 0.68818, 0.67414),),
    "BAAI/bge-m3": (
        _planets(0.41025, 0.71249, 0.64761, 0.65188),
        _m3(0.6265, 0.3477, 0.3499, 0.678, weights=(1.0, 0.0, 0.0)),
        _m3(0.19556, 0.008797, 0.0, 0.18030, weights=(0.0, 1.0, 0.0), tolerance=2e-3),
        _m3(0.77965, 0.46215, 0.45238, 0.78986, weights=(0.0, 0.0, 1.0)),
        _m3(0.48250, 0.23454, 0.23324, 0.51225, weights=(0.4, 0.2, 0.0)),
        _m3(0.60136, 0.32558, 0.32090, 0.62329, weights=(0.4, 0.2, 0.4)),
        Scores(
            "README", _M3_QUERIES[:1], _M3_QUERIES[1:], ((0.0,),), tolerance=2e-3, weights=(0.0, 1.0, 0.0)
        ),
        TokenWeights("README", _M3_QUERIES[0], {
            "What": 0.08356, "is": 0.0814, "B": 0.1296, "GE": 0.252, "M": 0.1702, "3": 0.2695, "?": 0.04092,
        }),
        TokenWeights("README", _M3_QUERIES[1], {
            "De": 0.05005, "fin": 0.1368, "ation": 0.04498, "of": 0.0633, "BM": 0.2515, "25": 0.3335,
        }),
    ),
    "jinaai/jina-embeddings-v2-small-en": (
        _planets(0.76057, 0.91291, 0.88755, 0.85267),
        _hello(-0.0455, -0.0428, -0.0122, 0.0613, 0.0015),
        _deep_learning(
            10.26311, -0.7366036, -0.34022003, -0.0716392, 0.108484305, 0.14210966, -0.4099645, 0.23231864, 0.14997455,
        ),
    ),
    "jinaai/jina-embeddings-v2-base-en": (_hello(-0.0332, -0.0509, 0.0287, -0.0043, -0.0077),),
    "jinaai/jina-embeddings-v2-base-de": (
        _planets(0.3855, 0.76282, 0.68416, 0.6388),
        _hello(-0.0085, 0.0417, 0.0342, 0.0309, -0.0149),
    ),
    "jinaai/jina-embeddings-v2-base-zh": (
        Tokens("llama.cpp", "你好", 3, (0, 49226, 2)),
        _hello(0.0381, 0.0286, -0.0231, 0.0052, -0.0151),
    ),
    "jinaai/jina-embeddings-v2-base-es": (_hello(-0.0108, -0.0092, -0.0373, 0.0171, -0.0301),),
    "jinaai/jina-embeddings-v2-base-code": (
        _hello(0.0145, -0.0164, 0.0136, -0.0170, 0.0734),
        _deep_learning(
            13.01229, -0.15109017, -0.021903912, -0.08391459, -0.12880382, 0.35795733, 0.2964905, -0.7700258,
            -0.6232095,
        ),
    ),
    # Its image vector needs fastembed's test image, which is not here.
    "jinaai/jina-clip-v1": (_hello(-0.0862, -0.0101, -0.0056, 0.0375, -0.0472),),
    "Qwen/Qwen3-Embedding-0.6B": (
        *_QWEN3_TOKENS,
        Scores(
            "README", _QWEN3_QUERIES, _QWEN3_DOCUMENTS,
            ((0.7645568251609802, 0.14142508804798126), (0.13549736142158508, 0.5999549627304077)),
            tolerance=1e-3, prompt=_QWEN3_PROMPT,
        ),
        _planets(0.4838, 0.69335, 0.58793, 0.6647, prompt=_QWEN3_PROMPT),
        _hello(-0.01476084, 0.01723184, -0.01195498, -0.07275258, 0.00281229),
        _hello(-0.01908712, 0.01635596, -0.00356586, -0.03947155, -0.01387356, prompt=_QWEN3_PROMPT),
        _deep_learning(
            96.65715, -1.5195851, -3.0843177, -1.0581057, -6.4716716, -1.6939588, 6.247706, -6.0047812, 0.33277434,
            tolerance=1e-3,
        ),
    ),
    "Qwen/Qwen3-Embedding-4B": _QWEN3_TOKENS,
    "Qwen/Qwen3-Embedding-8B": _QWEN3_TOKENS,
}  # fmt: skip
