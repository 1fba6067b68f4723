"""Who may call."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers

from embedserve.server.config import APIKey
from embedserve.server.errors import AuthenticationError

__all__ = ["Authenticator"]


class Authenticator:
    """Knows the keys. Without any, the server is open."""

    def __init__(self, keys: Sequence[APIKey]) -> None:
        self._keys = [(_digest(key.secret), key) for key in keys]

    @property
    def is_open(self) -> bool:
        """Whether anyone may call."""
        return not self._keys

    def authenticate(self, headers: Headers) -> APIKey | None:
        """The key of a request; None where the server is open. Raises `AuthenticationError`."""
        if self.is_open:
            return None
        presented = _presented(headers)
        if presented is None:
            raise AuthenticationError(None)
        digest = _digest(presented)
        found = None
        # Digests are of one length and every one is compared, so the time tells nothing about the keys.
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        if found is None:
            raise AuthenticationError(presented)
        return found


def _presented(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip() or None


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("latin-1", "replace")).digest()
