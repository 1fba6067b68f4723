"""Arrays → response bytes, straight from the array: no list of Python floats between.

The JSON float of a float32 is the shortest that reads back as the same float32, so both encodings hold the same bits.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from embedserve.server.arrays import Rows

__all__ = ["embedding_response"]

_FLOATS_AT_ONCE = 1 << 16
"""Floats encoded before the event loop gets a turn: about 2 ms as JSON."""

Floats = npt.NDArray[np.float32]


async def embedding_response(
    arrays: Mapping[str, Rows],
    *,
    outputs: Sequence[str],
    dimension: int,
    model: str,
    tokens: int,
    encoding_format: str,
) -> bytes:
    """The body of a successful answer: of each row what `outputs` names. `dimension`: of a multi-vector's vectors."""
    rows = len(next(iter(arrays.values())))
    encode = _base64 if encoding_format == "base64" else _json
    pieces = [b'{"object":"list","data":[']
    floats = 0
    # The vectors of a request are of one size: a matrix, and no offsets to be counted.
    dense = arrays["dense"].elements.reshape(rows, -1) if "dense" in outputs else None
    for row in range(rows):
        if row:
            pieces.append(b",")
        pieces.append(b'{"object":"embedding","index":%d' % row)
        for output in outputs:
            if output == "dense":
                assert dense is not None
                floats += dense.shape[1]
                pieces += (b',"embedding":', encode(dense[row]))
            elif output == "sparse":
                ids, weights = arrays["sparse_ids"][row], arrays["sparse_weights"][row]
                floats += 2 * len(ids)
                pieces += (b',"sparse_embedding":{"indices":', _json(ids), b',"values":', _json(weights), b"}")
            else:
                vectors = arrays["colbert"][row].reshape(-1, dimension)
                floats += vectors.size
                pieces += [
                    b',"colbert_embedding":',
                    *[piece async for piece in _multi_vector(vectors, encoding_format)],
                ]
        pieces.append(b"}")
        if floats > _FLOATS_AT_ONCE:
            floats = 0
            await asyncio.sleep(0)
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    pieces.append(b'],"model":%b,"usage":%b}' % (orjson.dumps(model), usage))
    return b"".join(pieces)


async def _multi_vector(vectors: Floats, encoding_format: str) -> AsyncIterator[bytes]:
    """Vectors [tokens, dimension] as a list of lists, or as base64 of all of them with the shape beside it."""
    if encoding_format == "base64":
        yield b'{"shape":[%d,%d],"data":%b}' % (*vectors.shape, _base64(vectors.reshape(-1)))
        return
    step = max(1, _FLOATS_AT_ONCE // vectors.shape[1])
    yield b"["
    for first in range(0, len(vectors), step):
        if first:
            yield b","
            await asyncio.sleep(0)
        yield _json(vectors[first : first + step])[1:-1]
    yield b"]"


def _json(array: npt.NDArray[np.float32] | npt.NDArray[np.int32]) -> bytes:
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def _base64(vector: Floats) -> bytes:
    return b'"' + pybase64.b64encode(vector.astype("<f4", copy=False).data) + b'"'
