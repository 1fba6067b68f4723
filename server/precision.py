"""What less precision costs and gains with this model on this CPU: the same texts in float32 and in the other dtype.

Whoever asks for bfloat16 or int8 on a CPU is told when the model is loaded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedserve.models.batch import Ints
from embedserve.server import bounds

__all__ = ["Embeds", "Probe", "compare", "probe"]

# Of random tokens: eight texts of 8 to 256.
_TOKENS = 1024
_RUNS = 3


class Embeds(Protocol):
    """A loaded model."""

    def __call__(self, ids: Ints, lengths: Ints) -> npt.NDArray[np.float32]:
        """Return the vectors, float32 [rows, hidden], of a batch: ids int32 [tokens], lengths int32 [rows]."""


@dataclass(frozen=True)
class Probe:
    """vectors: float32 [rows, hidden]. seconds: of the fastest run."""

    vectors: npt.NDArray[np.float32]
    seconds: float


def probe(embed: Embeds, texts: bounds.Texts) -> Probe:
    """Embed the same texts a few times."""
    ids, lengths = texts.within(_TOKENS)
    fastest = float("inf")
    for _ in range(_RUNS):
        started = time.perf_counter()
        vectors = embed(ids, lengths)
        fastest = min(fastest, time.perf_counter() - started)
    return Probe(vectors, fastest)


def compare(dtype: str, found: Probe, exact: Probe) -> str:
    """A line for the operator: the cosines of the vectors to the exact ones, and the gain."""
    lengths = np.linalg.norm(found.vectors, axis=1) * np.linalg.norm(exact.vectors, axis=1)
    cosines = (found.vectors * exact.vectors).sum(axis=1) / lengths
    return (
        f"{dtype}: cosine to float32 {cosines.min():.4f} at the lowest, {np.median(cosines):.4f} in the middle of "
        f"{len(cosines)} texts of random tokens; {exact.seconds / found.seconds:.1f} times its rate"
    )
