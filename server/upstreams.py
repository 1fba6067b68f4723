"""Models that run elsewhere: what the operator says of them in the file, and what is known of the five closed ones.

Nothing here opens a connection; relay.py does, where an upstream is configured.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embedserve.models.config import DimensionRange

__all__ = ["CLOSED", "Upstream", "closed_model"]


@dataclass(frozen=True)
class Upstream:
    """An OpenAI-shaped server to which the requests for one model go.

    base_url: `/embeddings` is added to it. model: what the upstream calls the model.
    dimensions: the full size of a vector. matryoshka: the sizes that a request may ask for instead, or None.
    max_tokens: of an input; only told and checked where tokens come in, since texts are not tokenised here.
    max_inputs: of a call; a request with more becomes several calls.
    encoding_format: what the upstream is asked for. Both are understood in its answers.
    timeout_seconds: of a call, from its begin to the last byte of its answer; connect_timeout: until it is connected;
        request_timeout: of a request with all its calls, their retries and the waits between.
    retries: how often a call is made again after failures that may pass.
    key_env: the environment variable that holds the key for it; None where it asks for none.
    settings: those of the fields of `ModelSettings` that differ from the defaults. With `token_ids` = ``native``, token
        arrays go to the upstream as they came.
    """

    base_url: str
    model: str
    dimensions: int
    matryoshka: DimensionRange | None = None
    max_tokens: int = 8192
    max_inputs: int = 32
    encoding_format: str = "float"
    timeout_seconds: float = 60.0
    connect_timeout: float = 5.0
    request_timeout: float = 300.0
    retries: int = 2
    key_env: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    owned_by: str = "upstream"
    description: str = ""
    languages: tuple[str, ...] = ()


def _openai(model: str, dimensions: int, *, reducible: bool, description: str) -> Upstream:
    return Upstream(
        base_url="https://api.openai.com/v1",
        model=model,
        dimensions=dimensions,
        matryoshka=DimensionRange(1, dimensions) if reducible else None,
        # Documented as 8191 and as 8192. The upstream knows better, and says so where it is 8191.
        max_tokens=8192,
        max_inputs=2048,
        encoding_format="base64",
        settings={"token_ids": "native"},
        owned_by="openai",
        description=description,
        languages=("multilingual",),
    )


CLOSED: Mapping[str, Upstream] = {
    "text-embedding-3-small": _openai(
        "text-embedding-3-small", 1536, reducible=True, description="OpenAI's smaller model; any size up to 1536"
    ),
    "text-embedding-3-large": _openai(
        "text-embedding-3-large", 3072, reducible=True, description="OpenAI's larger model; any size up to 3072"
    ),
    "text-embedding-ada-002": _openai(
        "text-embedding-ada-002", 1536, reducible=False, description="OpenAI's model before the third generation"
    ),
    "Baichuan-Text-Embedding": Upstream(
        base_url="https://api.baichuan-ai.com/v1",
        model="Baichuan-Text-Embedding",
        dimensions=1024,
        max_tokens=512,
        max_inputs=16,
        owned_by="baichuan",
        description="Baichuan's model for Chinese texts",
        languages=("zh",),
    ),
    "zhipu-embedding-2": Upstream(
        base_url="https://open.bigmodel.cn/api/paas/v4",
        model="embedding-2",
        dimensions=1024,
        max_tokens=512,
        max_inputs=16,  # of 512 tokens each: a call may have 8 K
        owned_by="zhipu",
        description="Zhipu's second model, which its own API calls embedding-2",
        languages=("zh", "en"),
    ),
}
"""The models without public weights that the catalogue of the hosted service has: what to fill in where the operator
says no more than that they shall be relayed."""

_BY_NAME = {name.lower(): upstream for name, upstream in CLOSED.items()}


def closed_model(name: str) -> Upstream | None:
    """What is known of a closed model, by its name in any case."""
    return _BY_NAME.get(name.lower())
