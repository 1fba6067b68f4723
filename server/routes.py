"""The endpoints, one coroutine each: parse → embed → encode."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from embedserve.models.catalog import BACKENDS
from embedserve.server.auth import Authenticator
from embedserve.server.client import BrokerClient
from embedserve.server.config import ServerConfig
from embedserve.server.embedding import Embedder
from embedserve.server.encode import embedding_response
from embedserve.server.errors import AuthenticationError, OverloadedError, RateLimitError
from embedserve.server.exchange import Exchange, read_body, unless_gone
from embedserve.server.limits import client_address
from embedserve.server.model_list import sizes_object
from embedserve.server.openapi import openapi_document
from embedserve.server.schemas import EmbeddingRequest, parse_embedding_request
from embedserve.server.served import LocalModel, RelayedModel, ServedModel, ServedModels
from embedserve.server.wire import ModelState

__all__ = ["Endpoints"]


class Endpoints:
    """The endpoints and what they need."""

    def __init__(self, config: ServerConfig, models: ServedModels, client: BrokerClient, embedder: Embedder) -> None:
        self._config = config
        self._models = models
        self._client = client
        self._embedder = embedder
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
        answer = await unless_gone(request, self._answer(wanted, exchange))
        return Response(answer, media_type="application/json")

    async def _answer(self, wanted: EmbeddingRequest, exchange: Exchange) -> bytes:
        arrays = await self._embedder.embed(wanted, exchange)
        start = time.perf_counter()
        body = await embedding_response(
            arrays,
            outputs=wanted.outputs,
            dimension=wanted.model.size,
            model=wanted.model.name,
            tokens=exchange.tokens,
            encoding_format=wanted.encoding_format,
        )
        exchange.encode = time.perf_counter() - start
        return body

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
        "matryoshka": sizes_object(model.matryoshka),
        "max_tokens": config.max_tokens,
        "pricing": _pricing(model),
        "modalities": list(config.modalities),
        "outputs": list(config.outputs),
        "languages": list(entry.languages) if entry else [],
        "prompts": dict(model.prompts),
        "instruction": config.instruction,
        "licence": entry.licence if entry else None,
        "unverified": entry.unverified if entry else None,
        "backends": list(BACKENDS[config.family]),
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
        "matryoshka": sizes_object(model.matryoshka),
        "max_tokens": upstream.max_tokens,
        "pricing": _pricing(model),
        "modalities": ["text"],
        "outputs": ["dense"],
        "languages": list(upstream.languages),
        "prompts": {},
        "instruction": None,
        "licence": None,
        "unverified": None,
        "backends": ["relay"],
        "dtype": None,
        "backend": "relay",
        "device": None,
        "loaded": True,
        "alias_of": model.alias_of,
    }


def _pricing(model: ServedModel) -> dict[str, Any]:
    return {"per_million_tokens": model.settings.price, "currency": model.settings.currency}
