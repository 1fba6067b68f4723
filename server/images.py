"""Images in requests → pixels, as jina-clip's own preprocessing makes them, without torch.

    base64 or data URI → bytes → decoded → RGB → shortest edge to `size`, bicubic → middle cut out → uint8

What decides about a pixel is Pillow, as in the original: its conversion to RGB (transparency is dropped, not laid over
a colour; CMYK is converted without a profile) and its antialiased resize. As in the original, no orientation tag is
followed: an image that a camera stored sideways is embedded sideways. Of an animation the first frame counts.

An image is somebody else's file for a decoder in C, and a decoder that runs cannot be stopped. So only five formats are
tried, metadata is taken out (`image_files.py`), pixels and scans are counted before any is decoded, and nothing is ever
fetched. What was found to cost most: 2 s of a core (a progressive CMYK JPEG of 32 scans), 415 MB (a WebP of 38 bytes).
"""

import asyncio
import binascii
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pybase64
from PIL import Image, UnidentifiedImageError

from embedserve.server.errors import OverloadedError
from embedserve.server.image_files import InvalidImageError, bare

__all__ = ["MAX_REQUEST_IMAGES", "ImagePool", "InvalidImageError", "decode_image", "preprocess"]

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""By Pillow's names. Not TIFF, whose decoder is the largest and whose files are rarely met in a request; nothing that
runs a program (EPS) or is no picture (PDF)."""

MAX_IMAGE_BYTES = 20 << 20
"""Of one image's file."""

MAX_PHOTO_PIXELS = 51_000_000
"""Of a JPEG in one scan, as stored and as scaled: the largest telephones and cameras write 50 million. Decoding takes 4
bytes a pixel, 8 where it is CMYK: 200 and 400 MB."""

MAX_IMAGE_PIXELS = 27_000_000
"""Of every other image, as stored and as scaled. Decoding takes 15 bytes a pixel of a WebP (415 MB), up to 13 of a JPEG
in several scans (350), 8 of a PNG with transparency (210), 5 of greys and palettes (135)."""

MAX_REQUEST_PIXELS = 256_000_000
"""Of all images of a request, where each further scan of a JPEG counts as a tenth of its pixels: up to 8 s of a core.
An honest body of 32 MiB holds about 100 million."""

MAX_REQUEST_IMAGES = 256
"""Of one request: 39 MB of pixels at 224 by 224."""

MAX_HELD_IMAGES = 512
"""Of all requests of a front end, being prepared or run: 77 MB of pixels at 224 by 224."""

# One limit, ours: Pillow's own would warn on standard error from 89 million pixels on and refuse from 179 million.
Image.MAX_IMAGE_PIXELS = None

_SCHEME = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):")
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+(;[a-z0-9=_.+-]+)*;base64,", re.IGNORECASE)
# Longer than any data URI's head.
_HEAD = 200


def decode_image(text: str) -> bytes:
    """The file that a request's string holds: base64, or a data URI with base64. Strict: no line breaks, padded.

    Raises `InvalidImageError`, also for every other kind of URL: a server inside a network fetches for nobody.
    """
    start = 0
    if scheme := _SCHEME.match(text, 0, _HEAD):
        head = _DATA_URI.match(text, 0, _HEAD)
        if head is None and scheme[1].lower() == "data":
            raise InvalidImageError("a data URI of an image begins with data:image/…;base64,")
        if head is None:
            raise InvalidImageError(
                f"{scheme[1].lower()}: URLs are not fetched. Send the image itself, as base64 or as a data URI."
            )
        start = head.end()
    if (len(text) - start) // 4 * 3 > MAX_IMAGE_BYTES:
        raise InvalidImageError(f"the image has more than {MAX_IMAGE_BYTES >> 20} MiB. Send a smaller one.")
    try:
        data = pybase64.b64decode(memoryview(text.encode("ascii"))[start:], validate=True)
    except UnicodeEncodeError as error:
        found = text[error.start].encode("unicode_escape").decode()
        raise InvalidImageError(f"it is not base64: it holds '{found}'. Send base64 or a data URI.") from None
    except binascii.Error:
        raise InvalidImageError(
            "it is not base64. Send the file in base64, padded with '=' and without line breaks, or as a data URI."
        ) from None
    if not data:
        raise InvalidImageError("it is empty.")
    return data


def preprocess(data: bytes, size: int) -> Pixels:
    """The pixels of an image file, uint8 [size, size, 3]: red, green and blue. Raises `InvalidImageError`."""
    image, _ = _open(data, size)
    return _scale(image, size)


def _open(data: bytes, size: int) -> tuple[Image.Image, int]:
    """Read an image's head and check what it promises; no pixel is decoded. With it, what decoding it will cost: its
    pixels, and a tenth of them for every scan after the first."""
    data, scans = bare(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidImageError(
            f"it is no image that is known here, or a broken one. Known are {', '.join(FORMATS)}."
        ) from None
    except Exception as error:
        raise _broken(error) from error
    width, height = image.size
    shortest, longest = sorted(image.size)
    if shortest < 1:
        raise InvalidImageError(f"it has no pixels ({width} by {height}).")
    # Several scans are put together from coefficients, which take up to twice the room of the pixels.
    photo = image.format == "JPEG" and scans == 1
    limit = MAX_PHOTO_PIXELS if photo else MAX_IMAGE_PIXELS
    if max(width * height, size * _scaled(longest, shortest, size)) > limit:
        kind = "JPEG of one scan" if photo else "JPEG of several scans" if image.format == "JPEG" else image.format
        raise InvalidImageError(
            f"it has {width} by {height} pixels; at most {limit:,} are taken of a {kind}, as it is and with its "
            f"shortest edge scaled to {size}. Send a smaller one."
        )
    if image.mode.startswith(("I", "F")):
        raise InvalidImageError(
            f"its greys have more than 8 bits (Pillow's mode {image.mode}), and the model's preprocessing would make "
            "nearly all of them white. Send it with 8 bits a channel."
        )
    if image.format == "BMP" and image.info["compression"] not in _PLAIN_BMP:
        # Pillow would unpack it in Python.
        raise InvalidImageError("it is a BMP with run lengths. Send it uncompressed, or as a PNG.")
    return image, width * height * (9 + scans) // 10


# BI_RGB and BI_BITFIELDS.
_PLAIN_BMP = (0, 3)


def _scaled(longest: int, shortest: int, size: int) -> int:
    """The longest edge when the shortest is `size`; rounded down, as the original does."""
    return size * longest // shortest


def _scale(image: Image.Image, size: int) -> Pixels:
    width, height = image.size
    try:
        image.load()
        # Before it is scaled: palettes cannot be mixed. What is RGB already would only be copied.
        if image.mode != "RGB":
            image = image.convert("RGB")
    except Exception as error:
        raise _broken(error) from error
    if width <= height:
        width, height = size, _scaled(height, width, size)
    else:
        width, height = _scaled(width, height, size), size
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Python's round, halves to the even number, as the original does.
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _broken(error: Exception) -> Exception:
    """What a decoder's exception means. They are of a dozen kinds, from OSError over SyntaxError to struct.error."""
    if isinstance(error, MemoryError):
        return error
    return InvalidImageError(f"it cannot be decoded ({error or type(error).__name__}): the file is broken or cut off.")


class ImagePool:
    """Prepares images off the event loop, in a few threads that all requests share.

    They do run side by side: Pillow decodes and scales without Python's lock.
    """

    def __init__(self, threads: int) -> None:
        """The threads start with the first images."""
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="images")
        self._held = 0

    @contextlib.contextmanager
    def room(self, images: int) -> Iterator[None]:
        """Room for a request's images, to be held until they have run. Who comes first is always let in.

        Raises `OverloadedError` where requests together would pass `MAX_HELD_IMAGES`: the broker's own limit is behind
        the work of preparing them, and behind the memory.
        """
        if self._held and self._held + images > MAX_HELD_IMAGES:
            raise OverloadedError("overloaded")
        self._held += images
        try:
            yield
        finally:
            self._held -= images

    async def prepare(self, items: Sequence[str], size: int) -> Pixels:
        """Pixels of images as they stand in a request, uint8 [items, size, size, 3].

        Raises `InvalidImageError` with the place among `items`. A request has no more images under way than there are
        threads, so that those of others come in between; when the caller is cancelled, the rest is left alone.
        """
        loop = asyncio.get_running_loop()
        pixels = np.empty((len(items), size, size, 3), dtype=np.uint8)
        left = iter(range(len(items)))
        budget = _Budget()

        async def work() -> None:
            for index in left:
                await loop.run_in_executor(self._executor, _prepare, items[index], index, pixels[index], budget)

        workers = [asyncio.ensure_future(work()) for _ in range(min(self._threads, len(items)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return pixels

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Budget:
    """What a request may still have decoded, in pixels."""

    def __init__(self) -> None:
        self.pixels = MAX_REQUEST_PIXELS

    def take(self, cost: int) -> None:
        """Raises `InvalidImageError` where there are too few left."""
        # Threads may get here together; the limit is then passed by one image a thread.
        self.pixels -= cost
        if self.pixels < 0:
            raise InvalidImageError(
                f"the images up to this one have more than {MAX_REQUEST_PIXELS:,} pixels together (a tenth more for "
                "every further scan of a JPEG). Send them in several requests, or smaller."
            )


def _prepare(item: str, index: int, pixels: Pixels, budget: _Budget) -> None:
    """Write the pixels of image `index`, [size, size, 3]."""
    try:
        image, cost = _open(decode_image(item), len(pixels))
        budget.take(cost)
        pixels[...] = _scale(image, len(pixels))
    except InvalidImageError as error:
        raise InvalidImageError(error.reason, index) from error
