"""The tree of errors, and how each becomes a status and a body.

    APIError                      anything that a client is told, in OpenAI's envelope
    ├── InvalidRequestError       400, and what is wrong with the request
    │   ├── UnknownModelError     404
    │   ├── UnknownURLError       404
    │   ├── MethodError           405
    │   ├── BodyTooLargeError     413
    │   └── ContentEncodingError  415
    ├── AuthenticationError       401
    ├── RateLimitError            429
    ├── UpstreamLimitError        429, of the upstream that a model is relayed to
    ├── OverloadedError           503, not now: `OverloadedError.MESSAGES` has the reasons
    ├── UpstreamError             502: an upstream that refuses this server, or whose answer cannot be used
    └── InternalError             500, without internals

The wording is part of the contract: pgai, Elasticsearch and Chroma match pieces of it.
"""

import math
from typing import Any, ClassVar

__all__ = [
    "APIError",
    "AuthenticationError",
    "BodyTooLargeError",
    "ContentEncodingError",
    "InternalError",
    "InvalidRequestError",
    "MethodError",
    "OverloadedError",
    "RateLimitError",
    "UnknownModelError",
    "UnknownURLError",
    "UpstreamError",
    "UpstreamLimitError",
    "invalid_input",
    "request_too_long",
    "text_too_long",
]

API_REFERENCE = "https://platform.openai.com/docs/api-reference"


class APIError(Exception):
    """What a client is told: `status`, the four members of the envelope, and headers of its own."""

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the envelope's own word
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.type = type or self.type
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body: all four members, always."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(APIError):
    """The request cannot be answered as it stands."""

    status = 400
    type = "invalid_request_error"


class UnknownModelError(InvalidRequestError):
    """No model of this name is served. `closed`: it is one of those that cannot be run here, and could be relayed."""

    status = 404

    def __init__(self, model: str, *, closed: bool = False) -> None:
        # A client's text, and an answer is no place for a megabyte of it.
        shown = model if len(model) <= 64 else model[:64] + "…"
        remedy = (
            " Its weights are not public, so it cannot run here. Whoever runs this server can relay it to an upstream "
            f'([upstreams."{shown}"] in the settings file), or serve another model under its name ([aliases]).'
        )
        super().__init__(
            f"The model `{shown}` does not exist or you do not have access to it.{remedy if closed else ''}",
            param="model",
            code="model_not_found",
        )


class UnknownURLError(InvalidRequestError):
    """No such path."""

    status = 404

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Invalid URL ({method} {path[:256]})", code="unknown_url")


class MethodError(InvalidRequestError):
    """The path exists, and takes other methods: `allow` names them."""

    status = 405

    def __init__(self, method: str, path: str, allow: str) -> None:
        super().__init__(
            f"Not allowed to {method} on {path[:256]}. Allowed: {allow}.",
            code="method_not_allowed",
            headers={"allow": allow},
        )


class BodyTooLargeError(InvalidRequestError):
    """The body, as sent or once unpacked, passes the limit of `limit` bytes."""

    status = 413

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The body of the request is too large: at most {limit} bytes are accepted, also once unpacked."
        )


class ContentEncodingError(InvalidRequestError):
    """The body is packed in a way that is not understood."""

    status = 415

    def __init__(self, encoding: str) -> None:
        super().__init__(
            f"Unsupported Content-Encoding: {encoding}. Send the body as it is, or packed with gzip.",
            headers={"accept-encoding": "gzip"},
        )


class AuthenticationError(InvalidRequestError):
    """No key, or a wrong one."""

    status = 401

    def __init__(self, key: str | None) -> None:
        """`key` is what was presented; no more than its last four characters are repeated."""
        if key is None:
            super().__init__(
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY), or in an x-api-key header.",
                headers={"www-authenticate": "Bearer"},
            )
        else:
            start = "sk-" if key.startswith("sk-") else ""
            end = key[-4:] if len(key) >= 12 else ""
            super().__init__(
                f"Incorrect API key provided: {start}…{end}. Ask whoever runs this server for a key.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _retry_headers(seconds: float) -> dict[str, str]:
    """Retry-After in whole seconds, never early, and the exact figure that OpenAI's clients prefer."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(seconds * 1000)))}


class RateLimitError(APIError):
    """The client's address has used up its requests; the next one is allowed in `retry_after` seconds."""

    status = 429
    type = "requests"

    def __init__(self, address: str, limit: int, retry_after: float) -> None:
        super().__init__(
            f"Rate limit reached for requests from {address}: limit {limit} a second. "
            f"Please try again in {max(1, math.ceil(retry_after * 1000))}ms.",
            code="rate_limit_exceeded",
            headers=_retry_headers(retry_after),
        )


class UpstreamLimitError(APIError):
    """The upstream of a relayed model takes no more for now; it may be asked again in `retry_after` seconds."""

    status = 429
    type = "requests"

    def __init__(self, model: str, retry_after: float) -> None:
        super().__init__(
            f"Rate limit reached for {model}, which is relayed: its upstream takes no more requests for now. "
            f"Please try again in {max(1, math.ceil(retry_after * 1000))}ms.",
            code="rate_limit_exceeded",
            headers=_retry_headers(retry_after),
        )


class OverloadedError(APIError):
    """Not now. `code` is one of the keys of `MESSAGES`."""

    status = 503

    MESSAGES: ClassVar = {
        "overloaded": "The server is overloaded: its queue is full. Please try again later.",
        "model_loading": "The model is still being loaded. Please try again later.",
        "shutting_down": "The server is shutting down. Please try again later.",
        "engine_restarting": "The engine that runs this model is being restarted. Please try again later.",
        "out_of_memory": "The device has not memory enough for one of the inputs now. Please try again later, or send "
        "a shorter one.",
        "upstream_unavailable": "The upstream that this model is relayed to cannot be reached, is too slow or fails. "
        "Please try again later.",
    }

    def __init__(self, code: str, retry_after: float = 1.0) -> None:
        super().__init__(self.MESSAGES[code], code=code, headers=_retry_headers(retry_after))


class UpstreamError(APIError):
    """The upstream of a relayed model did what asking again would not mend. `reason`: what, without its words.

    A 502 even where the upstream answered 401 or 403: it means the key of this server, and clients would look for a
    mistake in theirs.
    """

    status = 502

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"The upstream that this model is relayed to gave no answer that can be used: {reason}. "
            "If it stays, tell whoever runs this server.",
            code="upstream_error",
        )
        self.reason = reason


class InternalError(APIError):
    """Our own fault. The log has the rest, under the request's id."""

    def __init__(
        self, request_id: str, message: str = "The server had an error while processing your request."
    ) -> None:
        super().__init__(f"{message} If it stays, tell whoever runs this server the request id {request_id}.")


def invalid_input(reason: str = "") -> InvalidRequestError:
    """`input` is empty, or of a type that is none of those accepted; `reason` says more where that helps."""
    message = f"'$.input' is invalid. Please check the API reference: {API_REFERENCE}."
    return InvalidRequestError(f"{message} {reason}".rstrip())


def text_too_long(index: int, tokens: int, limit: int) -> InvalidRequestError:
    """`input[index]` has at least `tokens` tokens, more than the model's `limit`.

    Clients look for one or the other of the two sentences to split their texts, so both are there.
    """
    return InvalidRequestError(
        f"This model's maximum context length is {limit} tokens, however you requested {tokens} tokens "
        f"({tokens} in your prompt; 0 for the completion). Please reduce your prompt; or completion length. "
        f"Invalid 'input[{index}]': maximum input length is {limit} tokens.",
        param="input",
    )


def request_too_long(tokens: int, limit: int) -> InvalidRequestError:
    """All inputs together have at least `tokens` tokens, more than the `limit` of a request."""
    return InvalidRequestError(
        f"Requested {tokens} tokens, max {limit} tokens per request",
        type="max_tokens_per_request",
        code="max_tokens_per_request",
    )
