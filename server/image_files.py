"""Image files without what does not decide about their pixels, so that Pillow never sees it.

    JPEG, PNG, GIF → the same picture, metadata left out, and in how many scans a JPEG comes

Pillow goes through metadata as it opens a file: in Python, piece by piece, unpacking profiles on the way. 20 MB of Exif
in pieces of one byte held a core for more than 40 s, 4 MB of packed colour profiles for 9. What is left here are the
segments and chunks that the decoders in C go by. WebP and BMP stay as they are: libwebp reads the one, the other has
nothing of it.

Sources: ITU-T T.81 annex B, PNG (third edition) section 5, GIF89a.
"""

import re

__all__ = ["MAX_SCANS", "InvalidImageError", "bare"]

MAX_SCANS = 32
"""Of a JPEG. Encoders write 1, or about 10 where the picture is progressive; each goes over all of its pixels."""

MAX_SEGMENTS = 4096
"""Of a JPEG: segments of 64 KB make 256 MB, a progressive file of 20 MiB has some hundred."""

MAX_TABLES = 256 << 10
"""Bytes of a JPEG before its first scan, metadata not counted: a few hundred, and 64 KB where JFIF has a thumbnail."""

MAX_CHUNKS = 32_768
"""Of a PNG: encoders write 8 KiB or more to a chunk, a file of 20 MiB with chunks of 1 KiB passes."""

MAX_BLOCKS = 16_384
"""Of a GIF before its first frame: comments of 4 MB."""


class InvalidImageError(Exception):
    """Image `index` of a request cannot be used; `reason` is a sentence that says why and what to send."""

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(f"image {index}: {reason}")
        self.index = index
        self.reason = reason


def bare(data: bytes) -> tuple[bytes, int]:
    """An image file with the same pixels and no metadata, and the number of its scans (1 where it is no JPEG).

    Bytes of no known kind come back as they are. Raises `InvalidImageError`; what is broken may also pass, for the
    decoder to find.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(data), 1
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _gif(data), 1
    except IndexError:
        raise InvalidImageError("it cannot be decoded: the file is cut off.") from None
    return data, 1


# Start of frame: baseline, extended and progressive, all with Huffman codes.
_FRAMES = b"\xc0\xc1\xc2"
# Lossless, hierarchical, arithmetic codes. No browser shows them, and with arithmetic codes a scan costs 20 times as
# much for hardly a byte.
_OTHER_FRAMES = b"\xc3\xc5\xc6\xc7\xc9\xca\xcb\xcd\xce\xcf"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Huffman and quantisation tables, restart interval, number of lines, and the two that say what the colours mean: JFIF
# (APP0) and Adobe (APP14).
_KEPT = _FRAMES + b"\xc4\xdb\xdd\xdc\xda\xe0\xee"
# The other APPn, and comments.
_DROPPED = b"\xe1\xe2\xe3\xe4\xe5\xe6\xe7\xe8\xe9\xea\xeb\xec\xed\xef\xfe"
# Not what may stand within a scan: restart markers and stuffed zeros. Codes below 0xC0 libjpeg passes over or gives up.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_STRIDE = 1 << 20


def _jpeg(data: bytes) -> tuple[bytes, int]:
    """Walks the markers as libjpeg does: by length over segments, through scans to the next marker, until the end."""
    view = memoryview(data)
    pieces: list[bytes | memoryview] = [data[:2]]
    scans, tables, place = 0, 0, 2
    for _ in range(MAX_SEGMENTS):
        start = _next_marker(data, place)
        if scans:
            pieces.append(view[place:start])
        if start == len(data):
            if not scans:
                raise IndexError
            return b"".join(pieces), scans
        marker = data[start + 1]
        if marker == _END_OF_IMAGE:
            pieces.append(view[start : start + 2])
            return b"".join(pieces), scans
        if marker in _OTHER_FRAMES:
            raise InvalidImageError(
                "it is a JPEG of a rare kind: lossless, hierarchical or with arithmetic codes. Send a baseline or "
                "progressive one."
            )
        length = data[start + 2] << 8 | data[start + 3]
        if length < 2 or marker not in _KEPT + _DROPPED:
            raise InvalidImageError(f"it cannot be decoded: the file is broken at byte {start}.")
        place = start + 2 + length
        if place > len(data):
            raise IndexError
        if marker in _KEPT:
            pieces.append(view[start:place])
            tables += 0 if scans else length
            if tables > MAX_TABLES:
                raise _too_many("bytes of tables", MAX_TABLES)
        if marker == _START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise InvalidImageError(
                    f"it is a JPEG of more than {MAX_SCANS} scans, and each goes over all pixels. Save it anew."
                )
    raise _too_many("segments", MAX_SEGMENTS)


def _next_marker(data: bytes, place: int) -> int:
    """Where the next marker begins, or the file's end."""
    # In steps, between which other threads get Python's lock: 20 MiB take 0.2 s.
    for start in range(place, len(data), _STRIDE):
        if found := _MARKER.search(data, start, start + _STRIDE + 1):
            return found.start()
    return len(data)


_CHUNKS = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"])


def _png(data: bytes) -> bytes:
    view = memoryview(data)
    pieces: list[bytes | memoryview] = [data[:8]]
    place = 8
    for _ in range(MAX_CHUNKS):
        kind = data[place + 4 : place + 8]
        end = place + 12 + int.from_bytes(view[place : place + 4])
        if kind in _CHUNKS:
            pieces.append(view[place:end])
        if kind == b"IEND" or end >= len(data):
            return b"".join(pieces)
        place = end
    raise _too_many("chunks", MAX_CHUNKS)


_GRAPHIC_CONTROL = 0xF9


def _gif(data: bytes) -> bytes:
    view = memoryview(data)
    flags = data[10]
    place = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    pieces: list[bytes | memoryview] = [view[:place]]
    blocks = 0
    while (kind := data[place]) != ord(","):
        if kind != ord("!"):
            raise InvalidImageError(f"it cannot be decoded: the file is broken at byte {place}.")
        end = place + 2
        blocks += 1
        while (size := data[end]) and blocks <= MAX_BLOCKS:
            end += 1 + size
            blocks += 1
        end += 1
        if blocks > MAX_BLOCKS:
            raise _too_many("blocks", MAX_BLOCKS)
        if data[place + 1] == _GRAPHIC_CONTROL and data[place + 2] >= 4:
            # Of its flags, whether a colour is transparent. How the frame is to be cleared away again would have Pillow
            # allocate the frame as it opens the file, before its size can be looked at: 1.5 GB for 40,000 squared.
            pieces += [view[place : place + 3], bytes([data[place + 3] & 1]), view[place + 4 : end]]
        place = end
    return b"".join([*pieces, view[place:]])


def _too_many(what: str, limit: int) -> InvalidImageError:
    return InvalidImageError(f"the file has more than {limit:,} {what}. Save it anew, without its metadata.")
