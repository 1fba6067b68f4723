"""The Starlette app of a front end, put together in one place."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from embedserve.server.client import BrokerClient
from embedserve.server.errors import APIError, InvalidRequestError, MethodError, UnknownURLError
from embedserve.server.exchange import Exchange, ExchangeMiddleware, error_response
from embedserve.server.openapi import EMBEDDINGS_PATHS, PREFIXES
from embedserve.server.routes import Endpoints

__all__ = ["create_app"]


def create_app(endpoints: Endpoints, client: BrokerClient) -> Starlette:
    """The app: routes, the exchange around each request, errors as envelopes."""
    routes = [Route(path, endpoints.embeddings, methods=["POST"]) for path in EMBEDDINGS_PATHS]
    for prefix in PREFIXES:
        routes += [
            Route(f"{prefix}/models", endpoints.models),
            Route(f"{prefix}/models/{{id:path}}", endpoints.model),
            Route(f"{prefix}/embedding-models", endpoints.embedding_models),
        ]
    routes += [
        Route("/health", endpoints.health),
        Route("/ready", endpoints.ready),
        Route("/metrics", endpoints.metrics),
        Route("/openapi.json", endpoints.openapi),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(ExchangeMiddleware, report=client.report)],
        exception_handlers={APIError: _api_error, HTTPException: _http_error},
    )
    # A redirect would turn a POST with a slash too many into a GET.
    app.router.redirect_slashes = False
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(Exchange.of(request), error)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router raises."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        return await _api_error(request, UnknownURLError(method, path))
    if error.status_code == 405:
        return await _api_error(request, MethodError(method, path, (error.headers or {}).get("Allow", "")))
    return await _api_error(request, InvalidRequestError(error.detail))
