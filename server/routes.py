"""The endpoints, one coroutine each: parse → embed → encode."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from embedserve.server.auth import Authenticator
from embedserve.server.client import BrokerClient, EngineClient, NotFiniteError, Result, RunError, Texts
from embedserve.server.config import ServerConfig
from embedserve.server.encode import embedding_response
from embedserve.server.errors import (
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RateLimitError,
    request_too_long,
    text_too_long,
)
from embedserve.server.exchange import Exchange, read_body, unless_gone
from embedserve.server.limits import client_address
from embedserve.server.openapi import openapi_document
from embedserve.server.schemas import EmbeddingRequest, parse_embedding_request
from embedserve.server.served import LocalModel, RelayedModel, ServedModel, ServedModels
from embedserve.server.token_arrays import TokenArrayError, Vocabulary
from embedserve.server.tokenizer import (
    Encoded,
    InvalidTextError,
    RequestTooLongError,
    TextTooLongError,
    TokenizerPool,
    Truncate,
)
from embedserve.server.wire import ModelState

if TYPE_CHECKING:
    from embedserve.server.relay import Relay

__all__ = ["Endpoints"]

Floats = npt.NDArray[np.float32]


class Endpoints:
    """The endpoints and what they need."""

    def __init__(
        self,
        config: ServerConfig,
        models: ServedModels,
        client: BrokerClient,
        tokenizers: TokenizerPool,
        vocabulary: Vocabulary,
        relay: "Relay | None" = None,
    ) -> None:
        """`relay`: needed where some of the models are relayed."""
        self._config = config
        self._models = models
        self._client = client
        self._engine: EngineClient = client
        self._tokenizers = tokenizers
        self._vocabulary = vocabulary
        self._relay = relay
        self._authenticator = Authenticator(config.keys)

    # -------------------------------------------------------------------------------------------------- embeddings

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        exchange = Exchange.of(request)
        exchange.route = "embeddings"
        await self._admit(request, exchange)
        body = await read_body(request, self._config.max_body_bytes)
        config = self._config
        wanted = parse_embedding_request(body, self._models, config.max_inputs, config.max_request_tokens)
        exchange.model, exchange.name = wanted.model.id, wanted.model.name
        exchange.user = (wanted.user or "")[:64]
        answer = await unless_gone(request, self._embed(wanted, exchange))
        return Response(answer, media_type="application/json")

    async def _embed(self, wanted: EmbeddingRequest, exchange: Exchange) -> bytes:
        if isinstance(wanted.model, RelayedModel):
            vectors = await self._relayed(wanted, wanted.model, exchange)
        else:
            vectors = await self._computed(wanted, wanted.model, exchange)
        start = time.perf_counter()
        body = await embedding_response(
            vectors,
            model=wanted.model.name,
            tokens=exchange.tokens,
            encoding_format=wanted.encoding_format,
        )
        exchange.encode = time.perf_counter() - start
        return body

    async def _computed(self, wanted: EmbeddingRequest, model: LocalModel, exchange: Exchange) -> Floats:
        """Vectors from our own engines: float32 [rows, dimensions]."""
        start = time.perf_counter()
        encoded = await self._tokenize(wanted, model)
        exchange.texts, exchange.tokens, exchange.truncated = wanted.rows, len(encoded.ids), encoded.truncated
        exchange.tokenize = time.perf_counter() - start
        result = await self._run(wanted, Texts(encoded.ids, encoded.lengths), exchange)
        exchange.queue, exchange.run = result.queue, result.run
        return result.arrays["dense"]

    async def _relayed(self, wanted: EmbeddingRequest, model: RelayedModel, exchange: Exchange) -> Floats:
        """Vectors from the model's upstream: float32 [rows, dimensions]."""
        assert self._relay is not None
        if wanted.truncate is not Truncate.NONE:
            raise InvalidRequestError(
                "Invalid value for 'truncate': the inputs of a relayed model cannot be cut here. Send shorter ones.",
                param="truncate",
            )
        start = time.perf_counter()
        inputs: Sequence[str] | Sequence[Sequence[int]]
        if wanted.token_arrays is not None and model.settings.token_ids == "native":
            inputs = _whole_token_arrays(wanted, model.upstream.max_tokens)
        else:
            inputs = await self._texts(wanted)
        exchange.tokenize = time.perf_counter() - start
        start = time.perf_counter()
        relayed = await self._relay.embed(model, inputs, wanted.dimensions)
        exchange.texts, exchange.tokens, exchange.run = wanted.rows, relayed.tokens, time.perf_counter() - start
        return relayed.vectors

    async def _admit(self, request: Request, exchange: Exchange) -> None:
        """Check the key and count the request. Raises `AuthenticationError`, `RateLimitError`."""
        refused = None
        try:
            key = self._authenticator.authenticate(request.headers)
        except AuthenticationError as error:
            key, refused = None, error
        if key is not None:
            exchange.key = key.name
        if self._config.rate_limit and not (key is not None and key.internal):
            peer = request.client.host if request.client else None
            forwarded = request.headers.getlist("x-forwarded-for")
            address = client_address(peer, forwarded, self._config.trusted_proxy)
            charged = await self._client.charge(address)
            exchange.limit, exchange.charged = self._config.rate_limit, charged
            if not charged.allowed:
                raise RateLimitError(address, self._config.rate_limit, charged.retry_after)
        # Guessing keys is counted too, so the wrong key is told only now.
        if refused is not None:
            raise refused

    async def _texts(self, wanted: EmbeddingRequest) -> Sequence[str]:
        """The texts of a request, its prompt before each."""
        texts = wanted.texts
        if texts is None:
            assert wanted.token_arrays is not None
            try:
                texts = await self._vocabulary.decode(wanted.token_arrays)
            except TokenArrayError as error:
                raise InvalidRequestError(str(error), param="input") from None
        return [wanted.prompt + text for text in texts] if wanted.prompt else texts

    async def _tokenize(self, wanted: EmbeddingRequest, model: LocalModel) -> Encoded:
        if wanted.token_arrays is not None and model.settings.token_ids == "native":
            return _native_tokens(wanted, model)
        texts = await self._texts(wanted)
        limit = self._config.max_request_tokens
        try:
            return await self._tokenizers.encode(model.tokenizer, texts, wanted.truncate, limit)
        except InvalidTextError as error:
            raise InvalidRequestError(str(error), param="input") from None
        except TextTooLongError as error:
            raise text_too_long(error.index, error.tokens, error.limit) from None
        except RequestTooLongError as error:
            raise request_too_long(error.tokens, error.limit) from None

    async def _run(self, wanted: EmbeddingRequest, texts: Texts, exchange: Exchange) -> Result:
        try:
            return await self._engine.run(wanted.model.id, texts, dimensions=wanted.dimensions)
        except NotFiniteError as error:
            message = f"The model gave no finite vector for input[{error.index}]."
            raise InternalError(exchange.id, message) from None
        except RunError:
            raise InternalError(exchange.id) from None

    # --------------------------------------------------------------------------------------------------- discovery

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._check_discovery(request)
        return JSONResponse({"object": "list", "data": [_model_object(model) for model in self._models]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}; ids hold slashes, raw or as %2F."""
        self._check_discovery(request)
        name = request.path_params["id"]
        return JSONResponse(_model_object(self._models.get(name)))

    async def embedding_models(self, request: Request) -> Response:
        """GET /v1/embedding-models: the hosted service's shape, and what an operator wants to know besides."""
        self._check_discovery(request)
        try:
            states = {state.name: state for state in await self._client.status()}
        except OverloadedError:
            states = {}
        data = [
            _relayed_model_object(model)
            if isinstance(model, RelayedModel)
            else _embedding_model_object(model, states.get(model.id))
            for model in self._models
        ]
        return JSONResponse({"object": "list", "data": data})

    def _check_discovery(self, request: Request) -> None:
        if self._config.closed_discovery:
            Exchange.of(request).key = getattr(self._authenticator.authenticate(request.headers), "name", "")

    # --------------------------------------------------------------------------------------------------- operation

    async def health(self, _request: Request) -> Response:
        """GET /health: this process is alive."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """GET /ready: every model is loaded and has answered."""
        for state in await self._client.status():
            if state.state != "ready":
                raise OverloadedError("model_loading" if state.state == "loading" else "engine_restarting")
        return JSONResponse({"status": "ready"})

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics: the totals of all front ends."""
        return Response(await self._client.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(openapi_document(self._config, self._models))


def _native_tokens(wanted: EmbeddingRequest, model: LocalModel) -> Encoded:
    """Token arrays that are the model's own ids, special tokens and all, taken as they stand."""
    arrays = _whole_token_arrays(wanted, model.config.max_tokens)
    for index, tokens in enumerate(arrays):
        if max(tokens) >= model.config.vocab_size:
            raise InvalidRequestError(
                f"Invalid 'input[{index}]': {max(tokens)} is no token id of this model, which has "
                f"{model.config.vocab_size}.",
                param="input",
            )
    lengths = np.array([len(tokens) for tokens in arrays], dtype=np.int32)
    return Encoded(np.concatenate([np.array(t, dtype=np.int32) for t in arrays]), lengths, 0)


def _whole_token_arrays(wanted: EmbeddingRequest, limit: int) -> Sequence[Sequence[int]]:
    """The token arrays of a request, where none has more than `limit` and no prompt should go before them."""
    assert wanted.token_arrays is not None
    if wanted.prompt:
        raise InvalidRequestError("A prompt cannot be put before token arrays. Send texts instead.", param="input")
    for index, tokens in enumerate(wanted.token_arrays):
        if len(tokens) > limit:
            raise text_too_long(index, len(tokens), limit)
    return wanted.token_arrays


def _model_object(model: ServedModel) -> dict[str, Any]:
    if isinstance(model, RelayedModel):
        owner = model.upstream.owned_by
    else:
        owner = model.entry.owned_by if model.entry else "local"
    # OpenAI's four fields, and one more where the name is not the model's.
    alias = {} if model.alias_of is None else {"alias_of": model.alias_of}
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": owner, **alias}


def _embedding_model_object(model: LocalModel, state: ModelState | None) -> dict[str, Any]:
    entry, config = model.entry, model.config
    ready = state is not None and state.state == "ready"
    return {
        **_model_object(model),
        "name": entry.name if entry and model.alias_of is None else model.name,
        "description": entry.description if entry else "",
        "dimensions": model.dimensions,
        "max_dimensions": model.size,
        "supports_dimensions": model.matryoshka is not None,
        "max_tokens": config.max_tokens,
        "pricing": _pricing(model),
        "modalities": list(entry.modalities if entry else ("text",)),
        "languages": list(entry.languages) if entry else [],
        "prompts": dict(model.prompts),
        "dtype": state.dtype if ready and state else None,
        "backend": state.backend if ready and state else None,
        "device": state.device if ready and state else None,
        "loaded": ready,
        "alias_of": model.alias_of,
    }


def _relayed_model_object(model: RelayedModel) -> dict[str, Any]:
    upstream = model.upstream
    return {
        **_model_object(model),
        "name": model.name,
        "description": upstream.description,
        "dimensions": model.dimensions,
        "max_dimensions": model.size,
        "supports_dimensions": model.matryoshka is not None,
        "max_tokens": upstream.max_tokens,
        "pricing": _pricing(model),
        "modalities": ["text"],
        "languages": list(upstream.languages),
        "prompts": {},
        "dtype": None,
        "backend": "relay",
        "device": None,
        "loaded": True,
        "alias_of": model.alias_of,
    }


def _pricing(model: ServedModel) -> dict[str, Any]:
    return {"per_million_tokens": model.settings.price, "currency": model.settings.currency}
