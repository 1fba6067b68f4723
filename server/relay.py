"""Relays the inputs of a request to the upstream of its model, and believes nothing of the answer before it is checked.

A request with more inputs than the upstream takes at once becomes several calls, a few of them at the same time. What
may pass (no connection, no answer in time, 408, 429, 5xx) is tried again; what cannot is not. The caller gets vectors
that are complete, in order, of the size asked for and finite, or an `APIError`.

Everything that an upstream decides has a bound: the time of a call and of a request, the bytes of an answer as sent and
unpacked, how long reading one keeps the event loop, how many requests wait for it. And no upstream takes anything from
another: each has connections of its own.

This is the only file that opens connections to anything but our own processes, and the only one that imports httpx: it
is imported where an upstream is configured. httpx takes proxies and certificates from the operator's environment
(`HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE`), since that is the only way out of many networks.
"""

import asyncio
import email.utils
import logging
import math
import os
import random
import re
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
import msgspec
import numpy as np
import numpy.typing as npt
import orjson
import pybase64

from embedserve.server.config import ConfigError
from embedserve.server.errors import APIError, InvalidRequestError, OverloadedError, UpstreamError, UpstreamLimitError
from embedserve.server.gunzip import GzipError, GzipTooLargeError, gunzip
from embedserve.server.served import RelayedModel

__all__ = ["Relay", "Relayed"]

log = logging.getLogger("embedserve.relay")

REQUESTS_AT_ONCE = 64
"""To one upstream, from one front end. Those of an upstream that hangs would pile up with all their texts."""

CALLS_AT_ONCE = 4
"""Calls of one request that run at the same time; its other calls wait. Upstreams limit how many they take a minute,
and one large request must not use that up for all others."""

LONGEST_WAIT = 20.0
"""Seconds before a call is made again. An upstream that asks for more is given up, and the client told when."""

_FIRST_WAIT, _LAST_WAIT = 0.5, 8.0
_MOST_RETRY_AFTER = 3600.0

_ANSWER_BYTES = 8 << 20
"""The most that a call's answer may have, unless a single vector has more: the event loop waits while it is read, 20 ms
for that many floats. A call has no more inputs than fit."""
_BYTES_A_FLOAT = 32
"""A float64 in JSON has 24 characters at most; the rest is for commas and for those who indent."""
_BYTES_AN_ITEM = 1 << 10
_ERROR_BYTES = 1 << 16

_FLOATS_AT_ONCE = 1 << 16
"""Floats converted before the event loop gets a turn."""

_TOKENS_AN_INPUT = 1 << 20
"""More than any model reads: a count above it is no count."""

_PARAMS = frozenset({"input", "model", "dimensions", "encoding_format"})
_CODES = frozenset(
    {
        "array_above_max_length",
        "content_filter",
        "context_length_exceeded",
        "invalid_type",
        "invalid_value",
        "max_tokens_per_request",
        "string_above_max_length",
        "unsupported_value",
    }
)
"""What is passed on of an upstream's errors: fields of ours, and codes of OpenAI's that programs act on. Any other word
could hold the key, and each code becomes a series of the metrics."""

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


@dataclass
class _Line:
    """The way to one upstream. `requests`: how many of ours use it now."""

    client: httpx.AsyncClient
    url: httpx.URL
    requests: int = 0


class Relay:
    """The connections to the upstreams of some models; of one event loop."""

    def __init__(self, models: Iterable[RelayedModel]) -> None:
        """Connects to nothing yet. Raises `ConfigError` where a base URL, or a proxy or the certificates that the
        environment names, cannot be used."""
        # Their debug lines hold headers, and the operator's key is one.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel("WARNING")
        certificates = _certificates()
        self._lines = {model.id: _Line(_client(certificates), _url(model)) for model in models}

    async def close(self) -> None:
        """Close the connections."""
        for line in self._lines.values():
            await line.client.aclose()

    async def embed(self, model: RelayedModel, inputs: Inputs, dimensions: int) -> Relayed:
        """Vectors of `inputs`, texts or token arrays, of `dimensions` columns. Cancelled, its calls are given up.

        Raises `InvalidRequestError` where the upstream finds fault with the inputs, `UpstreamLimitError`,
        `OverloadedError` and `UpstreamError`.
        """
        line = self._lines[model.id]
        if line.requests >= REQUESTS_AT_ONCE:
            raise OverloadedError("overloaded")
        line.requests += 1
        try:
            return await self._embed(model, inputs, dimensions)
        finally:
            line.requests -= 1

    async def _embed(self, model: RelayedModel, inputs: Inputs, dimensions: int) -> Relayed:
        step = max(1, min(model.upstream.max_inputs, _ANSWER_BYTES // _answer_bytes(1, dimensions)))
        turns = asyncio.Semaphore(CALLS_AT_ONCE)
        deadline = asyncio.get_running_loop().time() + model.upstream.request_timeout

        async def call(first: int) -> Relayed:
            async with turns:
                try:
                    return await self._call(model, inputs[first : first + step], dimensions, deadline)
                except InvalidRequestError as error:
                    if len(inputs) > step:  # the upstream counts from the first input of its call
                        last = min(first + step, len(inputs)) - 1
                        error.message += f" (This is about a part of the request: input[{first}] to input[{last}].)"
                    raise

        calls = [asyncio.ensure_future(call(first)) for first in range(0, len(inputs), step)]
        try:
            async with asyncio.timeout_at(deadline):
                parts = await asyncio.gather(*calls)
        except TimeoutError:
            reason = f"no answer to the whole request within {model.upstream.request_timeout:g} s"
            log.error("an upstream failed", extra={"model": model.id, "reason": reason})
            raise OverloadedError("upstream_unavailable") from None
        finally:
            for one in calls:
                one.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        vectors = parts[0].vectors if len(parts) == 1 else np.concatenate([part.vectors for part in parts])
        return Relayed(vectors, sum(part.tokens for part in parts))

    async def _call(self, model: RelayedModel, inputs: Inputs, dimensions: int, deadline: float) -> Relayed:
        """A part of a request. `deadline`: of the request, in the event loop's time."""
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
                answer = await self._post(model, content, _answer_bytes(len(inputs), dimensions))
                return await _read_vectors(answer, len(inputs), dimensions)
            except _PassingError as failure:
                wait = max(_back_off(attempt), failure.retry_after or 0.0)
                facts = {"model": model.id, "reason": failure.reason, "attempt": attempt + 1}
                left = deadline - asyncio.get_running_loop().time()
                if attempt == upstream.retries or wait > min(LONGEST_WAIT, left):
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
        line, upstream = self._lines[model.id], model.upstream
        headers = {"content-type": "application/json"}
        if model.key is not None:
            headers["authorization"] = f"Bearer {model.key}"
        seconds = upstream.timeout_seconds
        unavailable = OverloadedError("upstream_unavailable")
        try:
            # httpx limits each read, and a drip feed has many. This limits all of it.
            async with (
                asyncio.timeout(seconds),
                line.client.stream(
                    "POST",
                    line.url,
                    content=content,
                    headers=headers,
                    timeout=httpx.Timeout(seconds, connect=upstream.connect_timeout),
                ) as response,
            ):
                if response.status_code == 200:
                    return await _read_body(response, limit)
                try:
                    body = await _read_body(response, _ERROR_BYTES)
                except UpstreamError:
                    body = b""  # the status says enough
                raise _refusal(model, response, body)
        except TimeoutError:
            raise _PassingError(unavailable, f"no answer within {seconds:g} s") from None
        except httpx.TransportError as error:
            # The type alone: the message of an error in a header would repeat the key.
            raise _PassingError(unavailable, type(error).__name__) from None


async def _read_body(response: httpx.Response, limit: int) -> bytes:
    """The body, unpacked, of at most `limit` bytes. Raises `UpstreamError`.

    httpx would unpack a body that was packed several times, each time by a factor of up to 1000, before it can be seen
    how large it is.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise UpstreamError("it is packed in another way than once with gzip")
    pieces = bytearray()
    async for piece in response.aiter_raw():
        pieces += piece
        if len(pieces) > limit:
            raise UpstreamError("it is larger than that many vectors can be")
    if encoding not in ("gzip", "x-gzip"):
        return bytes(pieces)
    try:
        return await asyncio.to_thread(gunzip, bytes(pieces), limit)
    except GzipTooLargeError:
        raise UpstreamError("it is larger than that many vectors can be") from None
    except GzipError:
        raise UpstreamError("it is not packed as it says") from None


def _answer_bytes(rows: int, dimensions: int) -> int:
    """The most bytes that an answer with that many vectors can have."""
    return rows * (dimensions * _BYTES_A_FLOAT + _BYTES_AN_ITEM)


# ------------------------------------------------------------------------------------------------------- the way there


def _certificates() -> ssl.SSLContext:
    """The certificates that upstreams are checked against, read once for all of them. Raises `ConfigError`."""
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"upstreams: the certificates cannot be read: SSL_CERT_FILE={os.environ.get('SSL_CERT_FILE', '')}: "
            f"{error.strerror or error}. Set it to a file of PEM certificates, or unset it"
        ) from None


def _client(certificates: ssl.SSLContext) -> httpx.AsyncClient:
    """Connections of one upstream's own, as many as its requests can use. Raises `ConfigError`."""
    try:
        return httpx.AsyncClient(
            headers={"user-agent": "embedserve", "accept": "application/json", "accept-encoding": "gzip"},
            # An upstream that sets cookies must not tie one client's request to another's.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,  # the key and the texts go where the operator said, and nowhere else
            verify=certificates,
            limits=httpx.Limits(
                max_connections=REQUESTS_AT_ONCE * CALLS_AT_ONCE, max_keepalive_connections=REQUESTS_AT_ONCE
            ),
        )
    except ImportError:
        expected = 'http://proxy:3128; a SOCKS proxy needs pip install "httpx[socks]"'
    except (httpx.InvalidURL, ValueError):
        expected = "a URL such as http://proxy:3128"
    # The values are not repeated: a proxy's URL may hold a password, and an error about it a piece of that.
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    given = [name for name in (*names, *map(str.lower, names)) if os.environ.get(name)]
    raise ConfigError(f"upstreams: a proxy of the environment cannot be used ({', '.join(given)}): expected {expected}")


def _url(model: RelayedModel) -> httpx.URL:
    """Where the embeddings are. Raises `ConfigError`."""
    base_url = model.upstream.base_url
    try:
        # The request too: it is there that the name of the host is decoded.
        return httpx.Request("POST", f"{base_url}/embeddings").url
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ConfigError(
            f"upstreams.{model.id}: base_url: expected a URL such as https://api.example.com/v1, not {base_url!r}: "
            f"{error}"
        ) from None


# -------------------------------------------------------------------------------------------------------- what fails


def _refusal(model: RelayedModel, response: httpx.Response, body: bytes) -> Exception:
    """What an answer other than 200 means for us."""
    status = response.status_code
    message, param, code = _envelope(body)
    known_param, known_code = param if param in _PARAMS else None, code if code in _CODES else None
    wait = _retry_after(response.headers)
    if status == 429 and code != "insufficient_quota":  # which is OpenAI's word for an unpaid bill
        return _PassingError(UpstreamLimitError(model.name, wait or 1.0), "status 429", wait)
    if status == 408 or status >= 500:
        return _PassingError(OverloadedError("upstream_unavailable", wait or 1.0), f"status {status}", wait)
    if status in (400, 413, 422):
        if message is None:
            message = f"The upstream of this model refuses the request with status {status}, and does not say why."
        return InvalidRequestError(_clean(message, model), param=known_param, code=known_code)
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
    param, code = (word if isinstance(word, str) else None for word in map(error.get, ("param", "code")))
    return message, param, code


def _clean(message: str, model: RelayedModel) -> str:
    """A stranger's words as our clients may read them: one line, not endless, without the key."""
    if model.key is not None:
        message = message.replace(model.key, "…")
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
            except (ValueError, OverflowError):
                continue
        if not math.isnan(seconds):
            return min(max(seconds, 0.0), _MOST_RETRY_AFTER)
    return None


def _back_off(attempt: int) -> float:
    """Seconds to wait: 0.5, 1, 2 … up to 8, less up to half of it, so that not all come back at once."""
    return min(_LAST_WAIT, _FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)


# ------------------------------------------------------------------------------------------------------ what succeeds


class _Item(msgspec.Struct):
    index: int
    embedding: str | list[float]


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    total_tokens: int | None = None


class _Answer(msgspec.Struct):
    """As much as counts of OpenAI's answer."""

    data: list[_Item]
    usage: _Usage | None = None


# With types, since an answer of another shape ends at its first wrong value: 8 MiB of `[],[],[]` would otherwise become
# three million lists, for which the event loop would wait 0.6 s.
_decode = msgspec.json.Decoder(_Answer).decode


async def _read_vectors(body: bytes, rows: int, dimensions: int) -> Relayed:
    """A successful answer's vectors, in the order of the inputs. Raises `UpstreamError`."""
    try:
        answer = _decode(body)
    except msgspec.ValidationError as error:  # names types and places, and no words of the answer
        raise UpstreamError(f"it is not of the shape of OpenAI's: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise UpstreamError("it is not JSON") from None
    if len(answer.data) != rows:
        raise UpstreamError(f"it has {len(answer.data)} vectors for {rows} inputs")
    by_index = {item.index: item.embedding for item in answer.data}
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
    return Relayed(vectors, _tokens(answer.usage, rows))


def _vector(value: str | list[float], dimensions: int) -> Floats:
    """One vector, as floats or as base64. Raises `UpstreamError`."""
    if isinstance(value, str):
        try:
            data = pybase64.b64decode(value, validate=True)
        except ValueError:
            raise UpstreamError("a vector is not base64") from None
        if len(data) % 4:
            raise UpstreamError("a vector is not base64 of float32")
        vector: npt.NDArray[Any] = np.frombuffer(data, dtype="<f4")
    else:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused with the others
            vector = np.array(value, dtype=np.float64).astype(np.float32)
    if vector.shape != (dimensions,):
        raise UpstreamError(f"a vector has {vector.size} numbers, not {dimensions}")
    return vector


def _tokens(usage: _Usage | None, rows: int) -> int:
    """What the upstream counted. Raises `UpstreamError`: a made-up count would be billed."""
    counts = (usage.prompt_tokens, usage.total_tokens) if usage is not None else ()
    for count in counts:
        if count is not None and 0 <= count <= rows * _TOKENS_AN_INPUT:
            return count
    raise UpstreamError("it does not say how many tokens it took")
