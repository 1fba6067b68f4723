"""`embedserve selftest`: does this folder, on this device, give what its model is known to give?

Two kinds of checks: published values of other implementations (`models/golden.py`), where there are any; and what must
hold of every model, whatever its weights: a text alone and among others, twice, in another order, cut, in float32.
The way of a text is the server's: tokenizer → runner. Imports torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import tokenizers
import torch

from embedserve.models import golden
from embedserve.models.golden import Components, Golden, Scores, Tokens, TokenWeights
from embedserve.server.arrays import output_bits
from embedserve.server.config import ServerConfig
from embedserve.server.runner import Embedded, Runner
from embedserve.server.served import LocalModel, find_models
from embedserve.server.tokenizer import Encoded, Truncate

__all__ = ["Check", "LoadedModel", "checks", "consistency", "main", "published", "report"]

Floats = npt.NDArray[np.float32]

SOURCES = {
    "README": "the model's README",
    "issues": "an issue of the model's repository",
    "ST": "sentence-transformers' tests",
    "fastembed": "fastembed's tests",
    "TEI": "Text Embeddings Inference's tests",
    "llama.cpp": "llama.cpp's pull requests",
}

# What half precision may add to a published value's tolerance: of a score, of a component.
SCORE_SLACK = {"float32": 0.0, "float16": 3e-3, "bfloat16": 1e-2, "int8": 3e-2}
COMPONENT_SLACK = {"float32": 0.0, "float16": 1e-3, "bfloat16": 4e-3, "int8": 2e-2}

# Between two runs of one text in batches of different shapes: a component in float32, 1 - cosine in half precision.
FLOAT32_DIFFERENCE = 1e-5
HALF_DISTANCE = {"float16": 1e-4, "bfloat16": 1e-3, "int8": 1e-3}
# Of 1 - cosine, between float32 and half precision. Qwen3's 36 layers on random weights: 1.1e-3 in bfloat16.
DTYPE_DISTANCE = {"float16": 1e-3, "bfloat16": 5e-3, "int8": 1e-2}
NORM_TOLERANCE = 1e-3

_NO_LIMIT = 1 << 40

TEXTS = (
    "Water.",
    "A man is eating food.",
    "The weather is lovely today, and tomorrow it will rain.",
    "水是生命之源。",
    "def add(a, b):\n    return a + b",
    "Ein Text mit Umlauten: Straße, Äpfel, Öl, Übung. " * 4,
    "Water runs downhill. " * 60,
)

# A sentence, the same in other words, and something else in its words.
MEANINGS = (
    ("A man is eating food.", "Someone is having a meal.", "A man is driving a car."),
    ("How can I lower my electricity bill?", "Tips for saving energy at home", "How can I lower my seat?"),
    ("The film was a waste of time.", "I was bored by that movie.", "The meeting was at dinner time."),
)


@dataclass(frozen=True)
class Check:
    """One comparison. `difference` and `tolerance` are None where the two are equal or not.

    passed is None where there was nothing to compare with; `got` says why.
    """

    what: str
    expected: Any
    got: Any
    passed: bool | None
    source: str
    difference: float | None = None
    tolerance: float | None = None


class LoadedModel:
    """A model's tokenizer and runner, as the server joins them."""

    def __init__(self, model: LocalModel, runner: Runner) -> None:
        self.model = model
        self.info = runner.info
        self._runner = runner

    def tokens(self, text: str, truncate: Truncate = Truncate.END) -> list[int]:
        """The ids of one text, special ones included."""
        ids: list[int] = self.model.tokenizer.encode([text], truncate, _NO_LIMIT).ids.tolist()
        return ids

    def dense(self, texts: Sequence[str], *, prompt: str = "", dimensions: int | None = None) -> Floats:
        """Vectors [texts, dimensions] of one batch; not a number where the model gave none that is finite."""
        sizes = np.full(len(texts), dimensions or self.info.dimension, dtype=np.int32)
        encoded = self._encode([prompt + text for text in texts])
        embedded = self._runner.run(encoded.ids, encoded.lengths, sizes)
        return np.where(embedded.finite[:, None], embedded.dense, np.float32("nan"))

    def sparse(self, texts: Sequence[str]) -> list[dict[int, float]]:
        """The weight of each token of each text, by id."""
        embedded = self._run(texts, "sparse")
        ids, weights = embedded.arrays["sparse_ids"], embedded.arrays["sparse_weights"]
        return [
            # Weights that are no numbers are left out of a row like those below zero.
            dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True)) if fine else {-1: math.nan}
            for row, fine in enumerate(embedded.finite)
        ]

    def colbert(self, texts: Sequence[str]) -> list[Floats]:
        """The vectors of each text, [tokens - 1, dimension]."""
        rows = self._run(texts, "colbert").arrays["colbert"]
        return [rows[row].reshape(-1, self.info.dimension) for row in range(len(texts))]

    def images(self, pixels: npt.NDArray[np.uint8]) -> Floats:
        """Vectors [images, dimension] of one batch of pixels, uint8 [images, size, size, 3]."""
        sizes = np.full(len(pixels), self.info.dimension, dtype=np.int32)
        embedded = self._runner.run_images(pixels, sizes)
        return np.where(embedded.finite[:, None], embedded.dense, np.float32("nan"))

    def _run(self, texts: Sequence[str], output: str) -> Embedded:
        encoded = self._encode(texts)
        sizes = np.full(len(texts), self.info.dimension, dtype=np.int32)
        wanted = np.full(len(texts), output_bits([output]), dtype=np.int32)
        return self._runner.run(encoded.ids, encoded.lengths, sizes, wanted)

    def _encode(self, texts: Sequence[str]) -> Encoded:
        return self.model.tokenizer.encode(texts, Truncate.END, _NO_LIMIT)


def main(settings: ServerConfig, name: str, *, as_json: bool) -> int:
    """Check the model that `serve --model NAME` would serve with these settings; the exit status.

    Raises ConfigError, ModelError or TokenizerError for what cannot be loaded.
    """
    # The tables of the operator's file are of other models too, and change no weights.
    only = replace(settings, model=(name,), model_settings={}, aliases={}, upstreams={})
    (model,) = find_models(only)
    assert isinstance(model, LocalModel)

    def load(dtype: str) -> Runner:
        return Runner.load(
            model.config.folder,
            config=model.config,
            device=settings.device,
            dtype=dtype,
            backend=settings.backend,
            threads=settings.threads or None,
            progress=lambda line: print(line, file=sys.stderr),
        )

    return 0 if report(checks(model, load, settings.dtype), model, sys.stdout, as_json=as_json) else 1


def checks(model: LocalModel, load: Callable[[str], Runner], dtype: str) -> Iterator[Check]:
    """All checks of a model. `load` reads its weights as the dtype that it is given: `dtype`, and then, where that was
    no float32, "float32". Raises ModelError for a checkpoint that cannot be run."""
    loaded = LoadedModel(model, load(dtype))
    if model.entry is not None:
        yield from published(model.entry.id, loaded)
    yield from consistency(loaded)
    if loaded.info.dtype != "float32":
        shown, vectors = loaded.info.dtype, loaded.dense(TEXTS)
        del loaded  # its memory is wanted
        yield _float32(shown, vectors, model, load)


def report(results: Iterator[Check], model: LocalModel, out: TextIO, *, as_json: bool) -> bool:
    """Write each result as it comes, as text or as a JSON line. Whether none failed."""
    passed = failed = compared = 0
    for check in results:
        passed += check.passed is True
        failed += check.passed is False
        # Token ids, which have no distance, say nothing of the weights.
        compared += check.source in SOURCES.values() and check.difference is not None
        print(json.dumps(asdict(check), ensure_ascii=False) if as_json else _lines(check), file=out, flush=True)
    if not as_json:
        print(_summary(model, passed, failed, compared), file=out)
    return failed == 0


# ---------------------------------------------------------------------------------------------------- published values


def published(model: str, loaded: LoadedModel) -> Iterator[Check]:
    """What other implementations of this catalogue id give, against ours."""
    for value in golden.published(model):
        missing = sorted(_outputs_of(value) - set(loaded.model.config.outputs))
        if missing:
            what = f"published values of the output {' and '.join(missing)}"
            yield Check(what, "", "the folder has no weights for it", None, SOURCES[value.source])
        else:
            yield _against(value, loaded)


def _outputs_of(value: Golden) -> set[str]:
    """The outputs that a published value is about, besides the dense one."""
    if isinstance(value, TokenWeights):
        return {"sparse"}
    if isinstance(value, Scores):
        return {name for name, weight in zip(("sparse", "colbert"), value.weights[1:], strict=True) if weight}
    return set()


def _against(value: Golden, loaded: LoadedModel) -> Check:
    source, dtype = SOURCES[value.source], loaded.info.dtype
    if isinstance(value, Tokens):
        ids = loaded.tokens(value.text)
        if value.ids is None:
            return _same(f"tokens of {value.text!r}", value.count, len(ids), source)
        return _same(f"token ids of {value.text!r}", list(value.ids), ids, source)
    if isinstance(value, Components):
        vector = loaded.dense([value.text], prompt=value.prompt, dimensions=value.dimensions)[0]
        of = f"{value.text!r}" + (" with the query prompt" if value.prompt else "")
        cut = f", cut to {value.dimensions}" if value.dimensions else ""
        return _near(
            f"first {len(value.values)} components of {of}{cut}",
            np.array(value.values),
            vector[: len(value.values)],
            value.tolerance + COMPONENT_SLACK[dtype],
            source,
        )
    if isinstance(value, TokenWeights):
        return _token_weights(value, loaded)
    expected = np.array(value.scores)
    return _near(
        f"{_kind(value)} of {_count(value.queries, 'query', 'queries')} and "
        f"{_count(value.documents, 'document', 'documents')}, the first {value.queries[0]!r}",
        expected,
        _scores(value, loaded),
        value.tolerance + value.relative * np.abs(expected) + SCORE_SLACK[dtype],
        source,
    )


def _kind(value: Scores) -> str:
    names = ("dense", "sparse", "multi-vector")
    kinds = [name for name, weight in zip(names, value.weights, strict=True) if weight]
    return f"{' and '.join(kinds)} scores" if value.weights != (1.0, 0.0, 0.0) else "cosines"


def _count(items: Sequence[str], one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"


def _scores(value: Scores, loaded: LoadedModel) -> npt.NDArray[np.float64]:
    total = np.zeros((len(value.queries), len(value.documents)))
    dense, sparse, colbert = value.weights
    if dense:
        queries = loaded.dense(value.queries, prompt=value.prompt).astype(np.float64)
        total += dense * (queries @ loaded.dense(value.documents).astype(np.float64).T)
    if sparse:
        queries_weights, documents_weights = loaded.sparse(value.queries), loaded.sparse(value.documents)
        total += sparse * np.array(
            [[sum(w * d.get(t, 0.0) for t, w in q.items()) for d in documents_weights] for q in queries_weights]
        )
    if colbert:
        queries_vectors, documents_vectors = loaded.colbert(value.queries), loaded.colbert(value.documents)
        total += colbert * np.array(
            [[(q @ d.T).max(axis=1).mean() for d in documents_vectors] for q in queries_vectors]
        )
    return total / sum(value.weights)


def _token_weights(value: TokenWeights, loaded: LoadedModel) -> Check:
    path = loaded.model.config.weights_folder / "tokenizer.json"
    decode = tokenizers.Tokenizer.from_file(str(path)).decode
    weights = loaded.sparse([value.text])[0]
    # A row that is not finite has one weight, under an id that no token has.
    got = {decode([token]).strip() if token >= 0 else "": weight for token, weight in weights.items()}
    tolerance = value.tolerance + COMPONENT_SLACK[loaded.info.dtype]
    differences = [abs(value.values.get(token, 0.0) - got.get(token, 0.0)) for token in {*value.values, *got}]
    # numpy's largest, in which a NaN wins.
    difference = float(np.max(differences))
    return Check(
        f"sparse weights of {value.text!r}",
        dict(value.values),
        {token: round(weight, 5) for token, weight in got.items()},
        difference <= tolerance,
        SOURCES[value.source],
        difference,
        tolerance,
    )


# --------------------------------------------------------------------------------------- what must hold of every model


def consistency(loaded: LoadedModel) -> Iterator[Check]:
    """What needs no other implementation to compare with."""
    together = loaded.dense(TEXTS)
    yield _same("texts with a vector of finite numbers", len(TEXTS), int(np.isfinite(together).all(axis=1).sum()), "")
    yield _alike(
        "each text alone, and in a batch", loaded, together, np.concatenate([loaded.dense([t]) for t in TEXTS])
    )
    backwards = loaded.dense(TEXTS[::-1])[::-1]
    yield _alike("a batch in another order", loaded, together, backwards)
    yield _same("the same batch twice: bytes that differ", 0, _differing_bytes(together, loaded.dense(TEXTS)), "")
    if loaded.model.config.normalize:
        yield _norms("full vectors", together)
    yield from _cut(loaded, together)
    yield from _other_outputs(loaded)
    yield from _truncation(loaded)
    yield from _meaning(loaded)
    yield from _images(loaded)


def _alike(what: str, loaded: LoadedModel, expected: Floats, got: Floats) -> Check:
    if loaded.info.dtype == "float32":
        difference, tolerance = float(np.abs(_unit(expected) - _unit(got)).max()), FLOAT32_DIFFERENCE
        return Check(f"{what}: largest difference", 0.0, difference, difference <= tolerance, "", difference, tolerance)
    return _distance(what, expected, got, HALF_DISTANCE[loaded.info.dtype])


def _distance(what: str, expected: Floats, got: Floats, tolerance: float) -> Check:
    difference = float((1 - (_unit(expected) * _unit(got)).sum(axis=1)).max())
    return Check(f"{what}: smallest cosine", 1.0, 1 - difference, difference <= tolerance, "", difference, tolerance)


def _unit(vectors: Floats) -> npt.NDArray[np.float64]:
    # Models outside the catalogue need not normalise.
    wide = vectors.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return wide


def _differing_bytes(one: Floats, other: Floats) -> int:
    return sum(a != b for a, b in zip(one.tobytes(), other.tobytes(), strict=True))


def _norms(what: str, vectors: Floats) -> Check:
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    worst = float(norms[np.abs(norms - 1).argmax()])
    return Check(
        f"norm of {what}: the worst", 1.0, worst, abs(worst - 1) <= NORM_TOLERANCE, "", abs(worst - 1), NORM_TOLERANCE
    )


def _cut(loaded: LoadedModel, full: Floats) -> Iterator[Check]:
    sizes = loaded.model.config.matryoshka
    if sizes is None:
        return
    for size in sizes.listed or (sizes.minimum, sizes.maximum // 2):
        cut = loaded.dense(TEXTS, dimensions=size)
        yield _norms(f"vectors cut to {size}", cut)
        yield _alike(f"vectors cut to {size}, and full ones cut", loaded, full[:, :size], cut)


def _other_outputs(loaded: LoadedModel) -> Iterator[Check]:
    """The outputs besides the dense one are the same for a text alone and in a batch."""
    if "sparse" in loaded.model.config.outputs:
        rows = zip(loaded.sparse(TEXTS), (loaded.sparse([text])[0] for text in TEXTS), strict=True)
        # numpy's largest, in which a NaN wins.
        largest = float(np.max([abs(a.get(t, 0.0) - b.get(t, 0.0)) for a, b in rows for t in {*a, *b}]))
        tolerance = FLOAT32_DIFFERENCE + COMPONENT_SLACK[loaded.info.dtype]
        what = "sparse weights of each text alone, and in a batch: largest difference"
        yield Check(what, 0.0, largest, largest <= tolerance, "", largest, tolerance)
    if "colbert" in loaded.model.config.outputs:
        together = np.concatenate(loaded.colbert(TEXTS))
        alone = np.concatenate([loaded.colbert([text])[0] for text in TEXTS])
        yield _alike("multi-vectors of each text alone, and in a batch", loaded, together, alone)


def _truncation(loaded: LoadedModel) -> Iterator[Check]:
    """A text that is too long keeps the special tokens around it, and fills the model's length."""
    limit = loaded.model.config.max_tokens
    leading, trailing = loaded.model.tokenizer.surroundings
    for truncate in (Truncate.END, Truncate.START):
        ids = loaded.tokens("water " * (limit + 8), truncate)
        what = f"{limit + 8} words cut to {limit} tokens by {truncate}: number, special tokens around"
        around = [*ids[: len(leading)], *ids[len(ids) - len(trailing) :]]
        yield _same(what, [limit, *leading, *trailing], [len(ids), *around], "")


def _meaning(loaded: LoadedModel) -> Iterator[Check]:
    """Whether weights were trained at all: those that were not see the words that two sentences share."""
    entry = loaded.model.entry
    if entry is None or not {"en", "multilingual"} & set(entry.languages):
        return
    sentences, paraphrases, others = (_unit(loaded.dense(texts)) for texts in zip(*MEANINGS, strict=True))
    margin = float((sentences * (paraphrases - others)).sum(axis=1).mean())
    what = "cosine with a paraphrase in other words, less that with another meaning in the same words"
    yield Check(what, "above 0", margin, margin > 0, "")


def _images(loaded: LoadedModel) -> Iterator[Check]:
    images = loaded.model.config.images
    if images is None:
        return
    across = np.linspace(0, 255, images.size, dtype=np.uint8)[None, :, None]
    slope = np.broadcast_to(across, (images.size, images.size, 3))
    pixels = np.stack([slope, slope.transpose(1, 0, 2), 255 - slope])
    together = loaded.images(pixels)
    alone = np.concatenate([loaded.images(pixels[i : i + 1]) for i in range(len(pixels))])
    yield _same("images with a vector of finite numbers", len(pixels), int(np.isfinite(together).all(axis=1).sum()), "")
    yield _alike("each image alone, and in a batch", loaded, together, alone)
    yield _norms("vectors of images", together)
    # The same shades, turned by a quarter: only positions tell them apart.
    turned = float((_unit(together[:1]) * _unit(together[1:2])).sum())
    yield Check("an image and the same turned: cosine", "below 0.9999", turned, turned < 0.9999, "")


def _float32(shown: str, vectors: Floats, model: LocalModel, load: Callable[[str], Runner]) -> Check:
    what = f"{shown} and float32"
    try:
        return _distance(what, LoadedModel(model, load("float32")).dense(TEXTS), vectors, DTYPE_DISTANCE[shown])
    except torch.OutOfMemoryError:
        return Check(f"{what}: smallest cosine", 1.0, "not compared: float32 does not fit into the memory", None, "")


# ------------------------------------------------------------------------------------------------------------- results


def _same(what: str, expected: Any, got: Any, source: str) -> Check:
    return Check(what, expected, got, expected == got, source)


def _near(
    what: str, expected: npt.NDArray[Any], got: npt.NDArray[Any], tolerance: float | npt.NDArray[Any], source: str
) -> Check:
    """Compare element by element; the reported difference is the one that comes nearest to its tolerance."""
    differences = np.abs(expected - got)
    allowed = np.broadcast_to(tolerance, differences.shape)
    worst = np.unravel_index(np.nan_to_num(differences / allowed, nan=np.inf).argmax(), differences.shape)
    return Check(
        what,
        expected.tolist(),
        np.round(got.astype(np.float64), 6).tolist(),
        bool((differences <= allowed).all()),
        source,
        float(differences[worst]),
        float(allowed[worst]),
    )


def _lines(check: Check) -> str:
    word = {True: "pass", False: "FAIL", None: "skip"}[check.passed]
    allowed = f"differs by {check.difference:.2g}, allowed {check.tolerance:.2g}" if check.tolerance is not None else ""
    remark = "; ".join(filter(None, [allowed, check.source]))
    lines = [
        f"{word}  {check.what}",
        f"      expected  {_shown(check.expected)}",
        f"      got       {_shown(check.got)}",
    ]
    return "\n".join([*lines, f"      {remark}"] if remark else lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_shown(one)}" for key, one in value.items()) + "}"
    return str(value)


def _summary(model: LocalModel, passed: int, failed: int, compared: int) -> str:
    lines = [f"{model.id}: {passed} checks passed, {failed} failed."]
    if not compared:
        lines.append("Nothing published of its vectors is known here: that they are the right ones was not compared.")
    elif model.config.images is not None:
        lines.append("Nothing published of its images is known here: that their vectors are right was not compared.")
    elif model.entry is not None and model.entry.unverified and not failed:
        lines.append(f"The catalogue says of it: {model.entry.unverified}. With these weights that holds.")
    return "\n".join(lines)
