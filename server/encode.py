"""Vectors → response bytes, straight from the array: no list of Python floats between.

The JSON float of a float32 is the shortest that reads back as the same float32, so both encodings hold the same bits.
"""

import asyncio

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

__all__ = ["embedding_response"]

_FLOATS_AT_ONCE = 1 << 16
"""Floats encoded before the event loop gets a turn: about 2 ms as JSON."""

Floats = npt.NDArray[np.float32]


async def embedding_response(vectors: Floats, *, model: str, tokens: int, encoding_format: str) -> bytes:
    """The body of a successful answer. `vectors`: float32 [rows, dimensions]."""
    rows, dimensions = vectors.shape
    encode = _base64 if encoding_format == "base64" else _json
    step = max(1, _FLOATS_AT_ONCE // dimensions)
    pieces = [b'{"object":"list","data":[']
    for first in range(0, rows, step):
        if first:
            pieces.append(b",")
            await asyncio.sleep(0)
        pieces.append(
            b",".join(
                b'{"object":"embedding","index":%d,"embedding":%b}' % (first + i, encode(vector))
                for i, vector in enumerate(vectors[first : first + step])
            )
        )
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    pieces.append(b'],"model":%b,"usage":%b}' % (orjson.dumps(model), usage))
    return b"".join(pieces)


def _json(vector: Floats) -> bytes:
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: Floats) -> bytes:
    return b'"' + pybase64.b64encode(vector.astype("<f4", copy=False).data) + b'"'
