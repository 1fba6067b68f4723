"""The app of a front end, put together in one place: routes, the exchange around each request, errors as envelopes."""

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from embedserve.server.client import BrokerClient
from embedserve.server.errors import InvalidRequestError, MethodError, UnknownURLError
from embedserve.server.exchange import ExchangeMiddleware
from embedserve.server.openapi import EMBEDDINGS_PATHS, PREFIXES
from embedserve.server.routes import Endpoints

__all__ = ["create_app"]


def create_app(endpoints: Endpoints, client: BrokerClient) -> Starlette:
    """The app of a front end."""
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
    app = _App(
        endpoints,
        client,
        routes=routes,
        middleware=[Middleware(ExchangeMiddleware, report=client.report)],
        exception_handlers={HTTPException: _http_error},
    )
    # A redirect would turn a POST with a slash too many into a GET.
    app.router.redirect_slashes = False
    return app


class _App(Starlette):
    """Starlette's app, with a way past its router and its layers for the request that there are thousands of.

    It is the same endpoint in the same exchange, and takes 9 us less of a front end's 200.
    """

    def __init__(self, endpoints: Endpoints, client: BrokerClient, **options: Any) -> None:
        super().__init__(**options)

        async def embeddings(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoints.embeddings(Request(scope, receive, send))
            await response(scope, receive, send)

        self._embeddings = ExchangeMiddleware(embeddings, client.report)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in EMBEDDINGS_PATHS:
            await self._embeddings(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette's router raises."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        raise UnknownURLError(method, path)
    if error.status_code == 405:
        raise MethodError(method, path, (error.headers or {}).get("Allow", ""))
    raise InvalidRequestError(error.detail)
