"""Images of requests: what becomes of their pixels, and what is refused before anything is decoded."""

import asyncio
import base64
import contextlib
import io
import struct
import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from embedserve.server import images
from embedserve.server.images import ImagePool, InvalidImageError, decode_image, preprocess

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth in both directions, with some noise."""
    rows, columns = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(3).integers(0, 40, (height, width))
    channels = [200 * rows / height + noise, 200 * columns / width + noise, 100 + 50 * np.sin(rows / 7) + noise]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


# --- what becomes of pixels -------------------------------------------------------------------------------------------


def weights(source: int, target: int) -> npt.NDArray[np.float64]:
    """Of a bicubic resize with antialiasing (Keys 1981, a = -0.5), [target, source], rows summing to 1."""
    scale = max(source / target, 1.0)
    centres = (np.arange(target) + 0.5) * source / target
    x = np.abs((np.arange(source)[None, :] + 0.5 - centres[:, None]) / scale)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    kernel /= kernel.sum(axis=1, keepdims=True)
    return kernel


def by_hand(image: Image.Image, size: int) -> npt.NDArray[np.float64]:
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    height, width = pixels.shape[:2]
    if width <= height:
        new_width, new_height = size, int(size * height / width)
    else:
        new_width, new_height = int(size * width / height), size
    pixels = np.einsum("tw,hwc->htc", weights(width, new_width), pixels).round().clip(0, 255)
    pixels = np.einsum("th,hwc->twc", weights(height, new_height), pixels).round().clip(0, 255)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (300, 200), (200, 301), (65, 1000), (1000, 65), (20, 33), (1, 1), (3, 64), (64, 67)]
)
def test_the_shortest_edge_is_scaled_and_the_middle_cut_out(width: int, height: int) -> None:
    image = picture(width, height)
    found = preprocess(file_of(image), 64)
    assert found.shape == (64, 64, 3)
    assert found.dtype == np.uint8
    # Pillow computes with 8-bit fractions of its own.
    assert np.abs(found - by_hand(image, 64)).max() <= 1


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    image = picture(224, 224)
    assert np.array_equal(preprocess(file_of(image), 224), np.asarray(image))


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    image = picture(90, 64)
    found = preprocess(file_of(image, kind), 64)
    # JPEG and WebP lose something, GIF has 256 colours.
    assert np.abs(found - by_hand(image, 64)).mean() < {"PNG": 0.1, "BMP": 0.1, "GIF": 12}.get(kind, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb_as_pillow_has_it(mode: str) -> None:
    image = picture(64, 64, mode)
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    data = file_of(image, kind)
    found = preprocess(data, 64)
    assert np.array_equal(found, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_transparency_is_dropped_and_shows_the_colour_below() -> None:
    image = Image.new("RGBA", (8, 8), (10, 200, 30, 0))
    assert (preprocess(file_of(image), 8) == (10, 200, 30)).all()


def test_the_orientation_tag_is_not_followed() -> None:
    image = picture(64, 64)
    tags = Image.Exif()
    tags[0x0112] = 6  # a quarter turn
    turned = preprocess(file_of(image, exif=tags), 64)
    assert np.array_equal(turned, preprocess(file_of(image), 64))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert (preprocess(data, 8) == (255, 0, 0)).all()


def test_greys_of_16_bits_are_refused_instead_of_becoming_white() -> None:
    greys = Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16))
    with pytest.raises(InvalidImageError, match="8 bits a channel"):
        preprocess(file_of(greys), 8)


# --- what is refused --------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid PNG, black, one bit a pixel: a thousandth of its pixels in bytes."""
    rows = zlib.compress(bytes((1 + (width + 7) // 8) * height))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(InvalidImageError, match=r"8001 by 8000 pixels; at most 64,000,000"):
        preprocess(png_of_zeros(8001, 8000), 224)
    # More than Pillow itself would take.
    with pytest.raises(InvalidImageError, match=r"30000 by 30000"):
        preprocess(png_of_zeros(30_000, 30_000), 224)


def test_a_thin_strip_that_would_be_scaled_to_a_bomb_is_refused() -> None:
    with pytest.raises(InvalidImageError, match=r"shortest edge scaled to 224"):
        preprocess(png_of_zeros(200_000, 1), 224)
    assert not preprocess(png_of_zeros(1200, 1), 224).any()


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_that_is_cut_off_is_refused(kind: str) -> None:
    data = file_of(picture(64, 64), kind)
    for end in (len(data) // 2, len(data) * 9 // 10, 20):
        with pytest.raises(InvalidImageError, match=r"broken|cut off"):
            preprocess(data[:end], 64)


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_refused_or_decoded_but_nothing_else_happens(kind: str) -> None:
    data = file_of(picture(40, 30), kind)
    chance = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for place in chance.integers(0, len(data), 3):
            damaged[place] = chance.integers(0, 256)
        with contextlib.suppress(InvalidImageError):
            assert preprocess(bytes(damaged), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_not_tried(kind: str) -> None:
    with pytest.raises(InvalidImageError, match="Known are PNG, JPEG, WEBP, GIF, BMP"):
        preprocess(file_of(picture(32, 32), kind), 32)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.mark.parametrize("data", [b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n", SVG, b"\0" * 1000, b"BM" + b"\xff" * 60])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImageError, match=r"no image that is known here|cannot be decoded"):
        preprocess(data, 32)


# --- base64 and data URIs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "DATA:Image/X-Icon;name=a.b;BASE64,"])
def test_base64_and_data_uris(head: str) -> None:
    assert decode_image(head + text_of(b"\x00\xffabc")) == b"\x00\xffabc"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("data:image/png;base64,", "empty"),
        ("http://169.254.169.254/latest", "http: URLs are not fetched"),
        ("HTTPS://example.org/a.png", "https: URLs are not fetched"),
        (" file:///etc/passwd", "file: URLs are not fetched"),
        ("ftp://example.org/a.png", "ftp: URLs are not fetched"),
        ("data:text/plain;base64,aGk=", "data:image/"),
        ("data:image/png,abcd", "data:image/"),
        ("data:image/png;base64 ,aGk=", "data:image/"),
        ("data:" + "a" * 500 + ";base64,aGk=", "data:image/"),
        ("/etc/passwd.png", "not base64"),
        ("aGk", "not base64"),
        ("aG\nk=", "not base64"),
        ("aGk=====", "not base64"),
        ("-_-_", "not base64"),
        ("aGkü", r"not base64: it holds '\\xfc'"),
        ("\ud800", r"not base64: it holds '\\ud800'"),
    ],
)
def test_everything_else_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(InvalidImageError, match=said):
        decode_image(text)


def test_a_file_over_the_limit_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 3 << 20)
    assert len(decode_image("A" * (4 << 20))) == 3 << 20
    with pytest.raises(InvalidImageError, match="more than 3 MiB"):
        decode_image("A" * ((4 << 20) + 4))


# --- the pool ---------------------------------------------------------------------------------------------------------


def prepare(items: list[str], size: int = 32, threads: int = 2) -> npt.NDArray[np.uint8]:
    pool = ImagePool(threads)
    try:
        return asyncio.run(pool.prepare(items, size))
    finally:
        pool.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_images_come_back_in_order(threads: int) -> None:
    files = [file_of(picture(30 + 7 * index, 40)) for index in range(9)]
    found = prepare([text_of(data) for data in files], threads=threads)
    assert found.shape == (9, 32, 32, 3)
    for row, data in zip(found, files, strict=True):
        assert np.array_equal(row, preprocess(data, 32))


def test_an_error_names_the_image() -> None:
    good = text_of(file_of(picture(32, 32)))
    with pytest.raises(InvalidImageError, match="image 2: it is not base64") as raised:
        prepare([good, good, "?", good])
    assert raised.value.index == 2


def test_the_pixels_of_a_request_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_REQUEST_PIXELS", 3 * 32 * 32)
    good = text_of(file_of(picture(32, 32)))
    assert len(prepare([good] * 3)) == 3
    with pytest.raises(InvalidImageError, match="more than 3,072 pixels together"):
        prepare([good] * 4)


def in_a_pool(run: Callable[[ImagePool], Any]) -> Any:
    pool = ImagePool(2)
    try:
        return asyncio.run(run(pool))
    finally:
        pool.close()


def test_a_cancelled_request_leaves_its_other_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, release = threading.Semaphore(0), threading.Event()
    count = 0

    def slow(*_: object) -> None:
        nonlocal count
        count += 1
        begun.release()
        release.wait(10)

    monkeypatch.setattr(images, "_prepare", slow)

    async def run(pool: ImagePool) -> None:
        task = asyncio.ensure_future(pool.prepare(["x"] * 50, 8))
        await asyncio.to_thread(lambda: (begun.acquire(timeout=10), begun.acquire(timeout=10)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        # Whatever else stood in the queue would run before this.
        await asyncio.get_running_loop().run_in_executor(pool._executor, lambda: None)

    in_a_pool(run)
    assert count == 2


def test_a_small_request_does_not_wait_for_all_of_a_large_one() -> None:
    large = [text_of(png_of_zeros(2000, 2000))] * 40
    small = [text_of(file_of(picture(32, 32)))]
    finished: list[str] = []

    async def run(pool: ImagePool) -> None:
        async def one(name: str, items: list[str]) -> None:
            await pool.prepare(items, 32)
            finished.append(name)

        await asyncio.gather(one("large", large), one("small", small))

    in_a_pool(run)
    assert finished == ["small", "large"]
