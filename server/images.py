"""Images in requests → pixels, as jina-clip's own preprocessing makes them, without torch.

    base64 or data URI → bytes → decoded → RGB → shortest edge to `size`, bicubic → middle cut out → uint8

What decides about a pixel is Pillow, as in the original: its conversion to RGB (transparency is dropped, not laid over
a colour; CMYK is converted without a profile) and its antialiased resize. As in the original, no orientation tag is
followed: an image that a camera stored sideways is embedded sideways. Of an animation the first frame counts.

An image is somebody else's file for a decoder in C: only five formats are tried, pixels are counted before they are
decoded, and nothing is ever fetched.
"""

import asyncio
import binascii
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pybase64
from PIL import Image, UnidentifiedImageError

__all__ = ["ImagePool", "InvalidImageError", "decode_image", "preprocess"]

Pixels = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""By Pillow's names. Not TIFF, whose decoder is the largest and whose files are rarely met in a request; nothing that
runs a program (EPS) or is no picture (PDF)."""

MAX_IMAGE_BYTES = 20 << 20
"""Of one image's file."""

MAX_IMAGE_PIXELS = 64_000_000
"""Of one image, as stored and as scaled: 190 MB as RGB. A telephone's camera makes 12 to 50 million."""

MAX_REQUEST_PIXELS = 256_000_000
"""Of all images of a request: some 6 s of a core (64 million took 1.5 s). An honest body of 32 MiB holds about 100
million; of one colour, compressed to 8 kB for every 64 million, far more would go in than anyone can wait for."""

# One limit, ours: Pillow's own would warn on standard error from 89 million pixels on and refuse from 179 million.
Image.MAX_IMAGE_PIXELS = None

_SCHEME = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):")
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+(;[a-z0-9=_.+-]+)*;base64,", re.IGNORECASE)
# Longer than any data URI's head.
_HEAD = 200


class InvalidImageError(Exception):
    """Image `index` of a request cannot be used; `reason` is a sentence that says why and what to send."""

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(f"image {index}: {reason}")
        self.index = index
        self.reason = reason


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
    return _scale(_open(data, size), size)


def _open(data: bytes, size: int) -> Image.Image:
    """Read an image's head and check what it promises; no pixel is decoded."""
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
    if max(width * height, size * _scaled(longest, shortest, size)) > MAX_IMAGE_PIXELS:
        raise InvalidImageError(
            f"it has {width} by {height} pixels; at most {MAX_IMAGE_PIXELS:,} are taken, as it is and with its "
            f"shortest edge scaled to {size}. Send a smaller one."
        )
    if image.mode.startswith(("I", "F")):
        raise InvalidImageError(
            f"its greys have more than 8 bits (Pillow's mode {image.mode}), and the model's preprocessing would make "
            "nearly all of them white. Send it with 8 bits a channel."
        )
    return image


def _scaled(longest: int, shortest: int, size: int) -> int:
    """The longest edge when the shortest is `size`; rounded down, as the original does."""
    return size * longest // shortest


def _scale(image: Image.Image, size: int) -> Pixels:
    width, height = image.size
    try:
        # First to RGB: palettes cannot be mixed.
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
    """The pixels that a request may still have decoded."""

    def __init__(self) -> None:
        self.pixels = MAX_REQUEST_PIXELS

    def take(self, image: Image.Image) -> None:
        """Raises `InvalidImageError` where there are too few left."""
        # Threads may get here together; the limit is then passed by one image a thread.
        self.pixels -= image.width * image.height
        if self.pixels < 0:
            raise InvalidImageError(
                f"the images up to this one have more than {MAX_REQUEST_PIXELS:,} pixels together. Send them in "
                "several requests, or smaller."
            )


def _prepare(item: str, index: int, pixels: Pixels, budget: _Budget) -> None:
    """Write the pixels of image `index`, [size, size, 3]."""
    try:
        image = _open(decode_image(item), len(pixels))
        budget.take(image)
        pixels[...] = _scale(image, len(pixels))
    except InvalidImageError as error:
        raise InvalidImageError(error.reason, index) from error
