"""Relays the inputs of a request to the upstream of its model, and believes nothing of the answer before it is checked.

A request with more inputs than the upstream takes at once becomes several calls, a few of them at the same time. What
may pass (no connection, no answer in time, 408, 429, 5xx) is tried again; what cannot is not. The caller gets vectors
that are complete, in order, of the size asked for and finite, or an `APIError`.

This is the only file that opens connections to anything but our own processes, and the only one that imports httpx: it
is imported where an upstream is configured. httpx takes proxies and certificates from the operator's environment
(`HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`), since that is the only way out of many networks.
"""

import asyncio
import email.utils
import logging
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from embedserve.server.errors import APIError, InvalidRequestError, OverloadedError, UpstreamError, UpstreamLimitError
from embedserve.server.served import RelayedModel

__all__ = ["Relay", "Relayed"]

log = logging.getLogger("embedserve.relay")

CALLS_AT_ONCE = 4
"""Of one request: as many again wait for the slowest of them, and upstreams count requests."""

LONGEST_WAIT = 20.0
"""Seconds before a call is made again. An upstream that asks for more is given up, and the client told when."""

_FIRST_WAIT, _LAST_WAIT = 0.5, 8.0
_MOST_RETRY_AFTER = 3600.0

_ERROR_BYTES = 1 << 16
_BYTES_A_FLOAT = 32
"""A float64 in JSON has 24 characters at most; the rest is for commas and for those who indent."""
_BYTES_AN_ITEM = 1 << 10

_FLOATS_AT_ONCE = 1 << 16
"""Floats read before the event loop gets a turn."""

Floats = npt.NDArray[np.float32]
Inputs = Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Relayed:
    """What came back. `vectors`: float32 [rows, dimensions]; `tokens`: as the upstream counts them."""

    vectors: Floats
    tokens: int


class _PassingError(Exception):
    """A call failed in a way that may pass: `error` is what the client is told when it does not."""

    def __init__(self, error: APIError, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.retry_after = retry_after


class Relay:
    """The connections to all upstreams; of one event loop."""

    def __init__(self) -> None:
        # Their debug lines hold headers, and the operator's key is one.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel("WARNING")
        self._client = httpx.AsyncClient(
            headers={"user-agent": "embedserve", "accept": "application/json", "accept-encoding": "gzip"},
            # An upstream that sets cookies must not tie one client's request to another's.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,  # the key and the texts go where the operator said, and nowhere else
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def embed(self, model: RelayedModel, inputs: Inputs, dimensions: int) -> Relayed:
        """Vectors of `inputs`, texts or token arrays, of `dimensions` columns. Cancelled, its calls are given up.

        Raises `InvalidRequestError` where the upstream finds fault with the inputs, `UpstreamLimitError`,
        `OverloadedError` and `UpstreamError`.
        """
        step = model.upstream.max_inputs
        turns = asyncio.Semaphore(CALLS_AT_ONCE)

        async def call(first: int) -> Relayed:
            async with turns:
                try:
                    return await self._call(model, inputs[first : first + step], dimensions)
                except InvalidRequestError as error:
                    if len(inputs) > step:  # the upstream counts from the first input of its call
                        last = min(first + step, len(inputs)) - 1
                        error.message += f" (This is about a part of the request: input[{first}] to input[{last}].)"
                    raise

        calls = [asyncio.ensure_future(call(first)) for first in range(0, len(inputs), step)]
        try:
            parts = await asyncio.gather(*calls)
        finally:
            for one in calls:
                one.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        vectors = parts[0].vectors if len(parts) == 1 else np.concatenate([part.vectors for part in parts])
        return Relayed(vectors, sum(part.tokens for part in parts))

    async def _call(self, model: RelayedModel, inputs: Inputs, dimensions: int) -> Relayed:
        upstream = model.upstream
        body: dict[str, Any] = {"model": upstream.model, "input": inputs}
        # What is the default is not said: of both fields there are upstreams that do not know them.
        if upstream.encoding_format != "float":
            body["encoding_format"] = upstream.encoding_format
        if dimensions != upstream.dimensions:
            body["dimensions"] = dimensions
        content = orjson.dumps(body)
        for attempt in range(upstream.retries + 1):
            try:
                answer = await self._post(model, content, len(inputs) * (dimensions * _BYTES_A_FLOAT + _BYTES_AN_ITEM))
                return await _read_vectors(answer, len(inputs), dimensions)
            except _PassingError as failure:
                wait = max(_back_off(attempt), failure.retry_after or 0.0)
                facts = {"model": model.id, "reason": failure.reason, "attempt": attempt + 1}
                if attempt == upstream.retries or wait > LONGEST_WAIT:
                    log.error("an upstream failed", extra=facts)
                    raise failure.error from None
                log.warning("an upstream failed; it is asked again", extra=facts)
            except UpstreamError as error:
                log.error("an upstream cannot be used", extra={"model": model.id, "reason": error.reason})
                raise
            await asyncio.sleep(wait)
        raise AssertionError  # the last attempt returns or raises

    async def _post(self, model: RelayedModel, content: bytes, limit: int) -> bytes:
        """The body of a successful answer. Raises `_PassingError`, `InvalidRequestError`, `UpstreamError`."""
        upstream = model.upstream
        headers = {"content-type": "application/json"}
        if upstream.key is not None:
            headers["authorization"] = f"Bearer {upstream.key}"
        seconds = upstream.timeout_seconds
        unavailable = OverloadedError("upstream_unavailable")
        try:
            # httpx limits each read, and a drip feed has many. This limits all of it.
            async with (
                asyncio.timeout(seconds),
                self._client.stream(
                    "POST",
                    f"{upstream.base_url}/embeddings",
                    content=content,
                    headers=headers,
                    timeout=httpx.Timeout(seconds, connect=upstream.connect_timeout),
                ) as response,
            ):
                if response.status_code == 200:
                    answer = await _read_body(response, limit)
                    if answer is None:
                        raise UpstreamError("it is larger than that many vectors can be")
                    return answer
                raise _refusal(model, response, await _read_body(response, _ERROR_BYTES) or b"")
        except TimeoutError:
            raise _PassingError(unavailable, f"no answer within {seconds:g} s") from None
        except httpx.TransportError as error:
            # The type alone: the message of an error in a header would repeat the key.
            raise _PassingError(unavailable, type(error).__name__) from None
        except httpx.DecodingError:
            raise UpstreamError("it is not packed as it says") from None


async def _read_body(response: httpx.Response, limit: int) -> bytes | None:
    """The body, unpacked; None where it has more than `limit` bytes."""
    pieces = bytearray()
    async for piece in response.aiter_bytes():
        pieces += piece
        if len(pieces) > limit:
            return None
    return bytes(pieces)


# -------------------------------------------------------------------------------------------------------- what fails


def _refusal(model: RelayedModel, response: httpx.Response, body: bytes) -> Exception:
    """What an answer other than 200 means for us."""
    status = response.status_code
    message, param, code = _envelope(body)
    wait = _retry_after(response.headers)
    if status == 429 and code != "insufficient_quota":  # which is OpenAI's word for an unpaid bill
        return _PassingError(UpstreamLimitError(model.name, wait or 1.0), "status 429", wait)
    if status == 408 or status >= 500:
        return _PassingError(OverloadedError("upstream_unavailable", wait or 1.0), f"status {status}", wait)
    if status in (400, 413, 422):
        if message is None:
            message = f"The upstream of this model refuses the request with status {status}, and does not say why."
        return InvalidRequestError(_clean(message, model), param=param, code=code)
    reasons = {401: "it does not accept the key of this server", 403: "it does not let this server in"}
    reasons |= {404: "it does not know the model, or the path", 429: "the account of this server is used up"}
    if status in range(300, 400):
        return UpstreamError(f"it redirects (status {status}), which is not followed")
    return UpstreamError(reasons.get(status, f"it answers with status {status}"))


def _envelope(body: bytes) -> tuple[str | None, str | None, str | None]:
    """Message, param and code of an error: in OpenAI's envelope, or in one of those that others make of it."""
    try:
        error = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None, None, None
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, str):
        return error or None, None, None
    if not isinstance(error, dict):
        return None, None, None
    message = next((m for m in map(error.get, ("message", "detail")) if isinstance(m, str) and m), None)
    param, code = (v if isinstance(v, str) and len(v) <= 64 else None for v in map(error.get, ("param", "code")))
    return message, param, code


def _clean(message: str, model: RelayedModel) -> str:
    """A stranger's words as our clients may read them: one line, not endless, without the key."""
    if model.upstream.key is not None:
        message = message.replace(model.upstream.key, "…")
    message = " ".join(re.sub(r"[^\S ]|[\x00-\x1f\x7f-\x9f]", " ", message).split())
    return message if len(message) <= 1000 else message[:1000] + "…"


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds until the upstream wants to be asked again, where it says so in a way that can be read."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), _MOST_RETRY_AFTER)
    return None


def _back_off(attempt: int) -> float:
    """Seconds to wait: 0.5, 1, 2 … up to 8, less up to half of it, so that not all come back at once."""
    return min(_LAST_WAIT, _FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)


# ------------------------------------------------------------------------------------------------------ what succeeds


async def _read_vectors(body: bytes, rows: int, dimensions: int) -> Relayed:
    """A successful answer's vectors, in the order of the inputs. Raises `UpstreamError`."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamError("it is not JSON") from None
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise UpstreamError("it has no list of vectors")
    if len(data) != rows:
        raise UpstreamError(f"it has {len(data)} vectors for {rows} inputs")
    by_index = {item.get("index"): item.get("embedding") for item in data if type(item.get("index")) is int}
    if sorted(by_index) != list(range(rows)):
        raise UpstreamError("it does not say which vector is which input's")
    vectors = np.empty((rows, dimensions), dtype=np.float32)
    step = max(1, _FLOATS_AT_ONCE // dimensions)
    for index in range(rows):
        if index and index % step == 0:
            await asyncio.sleep(0)
        vectors[index] = _vector(by_index[index], dimensions)
    if not np.isfinite(vectors).all():
        raise UpstreamError("a vector is not finite")
    return Relayed(vectors, _tokens(answer.get("usage")))


def _vector(value: Any, dimensions: int) -> Floats:
    """One vector, as floats or as base64. Raises `UpstreamError`."""
    if isinstance(value, str):
        try:
            data = pybase64.b64decode(value, validate=True)
        except ValueError:
            raise UpstreamError("a vector is not base64") from None
        if len(data) % 4:
            raise UpstreamError("a vector is not base64 of float32")
        vector: npt.NDArray[Any] = np.frombuffer(data, dtype="<f4")
    elif isinstance(value, list) and all(type(number) in (float, int) for number in value):
        with np.errstate(over="ignore"):  # becomes infinite, which is refused with the others
            vector = np.array(value, dtype=np.float64).astype(np.float32)
    else:
        raise UpstreamError("a vector is none")
    if vector.shape != (dimensions,):
        raise UpstreamError(f"a vector has {vector.size} numbers, not {dimensions}")
    return vector


def _tokens(usage: Any) -> int:
    """What the upstream counted. Raises `UpstreamError`: a made-up count would be billed."""
    for name in ("prompt_tokens", "total_tokens"):
        count = usage.get(name) if isinstance(usage, dict) else None
        if type(count) is int and count >= 0:
            return count
    raise UpstreamError("it does not say how many tokens it took")
