"""Images in requests → pixels. INTERIM, so that the server starts: the helper who owns images replaces this file."""

import asyncio
import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["ImagePool", "InvalidImageError"]


class InvalidImageError(Exception):
    """Image `index` cannot be used; `reason` says why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"image {index}: {reason}")
        self.index = index
        self.reason = reason


class ImagePool:
    """Prepares images off the event loop, in a few threads."""

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="images")

    async def prepare(self, items: Sequence[str], size: int) -> npt.NDArray[np.uint8]:
        """Pixels uint8 [items, size, size, 3]. Raises `InvalidImageError`."""
        loop = asyncio.get_running_loop()
        return np.stack([await loop.run_in_executor(self._executor, _prepare, i, x, size) for i, x in enumerate(items)])

    def close(self) -> None:
        """Let the threads end."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def _prepare(index: int, item: str, size: int) -> npt.NDArray[np.uint8]:
    try:
        image = Image.open(io.BytesIO(base64.b64decode(item.rpartition(",")[2]))).convert("RGB")
    except Exception as error:
        raise InvalidImageError(index, "it is no image") from error
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
