"""Unpacks gzip data from others, of whom none decides how much memory that takes."""

import zlib

__all__ = ["GzipError", "GzipTooLargeError", "gunzip"]

_PIECE = 1 << 16
_MEMBERS = 10_000
"""Files put together have a few, and a body of empty ones would have a million."""


class GzipError(ValueError):
    """The data cannot be unpacked; the message completes "it …"."""


class GzipTooLargeError(Exception):
    """The data are larger than the limit, once unpacked."""


def gunzip(data: bytes, limit: int) -> bytes:
    """Unpack gzip data of one or more members to at most `limit` bytes; without Python's lock for most of the time.

    Raises `GzipError` and `GzipTooLargeError`.
    """
    unpacked = bytearray()
    position = members = 0
    inflater = None
    while position < len(data):
        if inflater is None:
            members += 1
            if members > _MEMBERS:
                raise GzipError(f"has more than {_MEMBERS} gzip members")
            inflater = zlib.decompressobj(wbits=31)
        # A piece at a time: what stands behind the end of a member is copied for each member.
        piece = data[position : position + _PIECE]
        try:
            unpacked += inflater.decompress(piece, limit + 1 - len(unpacked))
        except zlib.error as error:
            raise GzipError(f"is not valid gzip data: {error}") from None
        if len(unpacked) > limit:
            raise GzipTooLargeError
        position += len(piece) - len(inflater.unused_data)
        if inflater.eof:
            inflater = None
    if inflater is not None:
        raise GzipError("is not valid gzip data: it ends too early")
    return bytes(unpacked)
