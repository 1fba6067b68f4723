"""Images of requests: what becomes of their pixels, and what is refused before anything is decoded."""

import asyncio
import base64
import contextlib
import io
import re
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from embedserve.models.config import ImageSettings
from embedserve.server import images
from embedserve.server.arrays import Rows
from embedserve.server.client import Images, Result
from embedserve.server.embedding import Embedder
from embedserve.server.errors import InvalidRequestError, OverloadedError
from embedserve.server.exchange import Exchange
from embedserve.server.image_files import MAX_SCANS, bare
from embedserve.server.images import (
    MAX_HELD_IMAGES,
    MAX_REQUEST_IMAGES,
    ImagePool,
    InvalidImageError,
    decode_image,
    preprocess,
)
from embedserve.server.schemas import EmbeddingRequest, Inputs
from embedserve.server.served import LocalModel
from embedserve.server.tokenizer import Truncate

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
    with pytest.raises(InvalidImageError, match=r"5400 by 5001 pixels; at most 27,000,000 are taken of a PNG"):
        preprocess(png_of_zeros(5400, 5001), 224)
    # More than Pillow itself would take.
    with pytest.raises(InvalidImageError, match=r"30000 by 30000"):
        preprocess(png_of_zeros(30_000, 30_000), 224)


def test_a_thin_strip_that_would_be_scaled_to_a_bomb_is_refused() -> None:
    with pytest.raises(InvalidImageError, match=r"shortest edge scaled to 224"):
        preprocess(png_of_zeros(200_000, 1), 224)
    assert not preprocess(png_of_zeros(500, 1), 224).any()


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


# --- files that would take long --------------------------------------------------------------------------------------


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The same file, its head promising another size."""
    place = re.search(rb"\xff[\xc0-\xc2]", jpeg)
    assert place is not None
    return jpeg[: place.start() + 5] + struct.pack(">HH", height, width) + jpeg[place.start() + 9 :]


def test_a_photo_in_one_scan_may_be_larger_than_one_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_scale", lambda image, _size: image.size)
    plain, progressive = (file_of(picture(32, 32), "JPEG", progressive=several) for several in (False, True))
    assert preprocess(with_size(plain, 8160, 6144), 224) == (8160, 6144)
    with pytest.raises(InvalidImageError, match="at most 51,000,000 are taken of a JPEG of one scan"):
        preprocess(with_size(plain, 8500, 6144), 224)
    with pytest.raises(InvalidImageError, match="at most 27,000,000 are taken of a JPEG of several scans"):
        preprocess(with_size(progressive, 8160, 6144), 224)


def last_scan_again(times: int) -> bytes:
    """A progressive JPEG, its last scan repeated: decoders go over all pixels for each."""
    data = file_of(picture(64, 64), "JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scan * times + b"\xff\xd9"


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    assert bare(last_scan_again(0))[1] == 10
    assert preprocess(last_scan_again(MAX_SCANS - 10), 64).shape == (64, 64, 3)
    with pytest.raises(InvalidImageError, match="JPEG of more than 32 scans"):
        preprocess(last_scan_again(MAX_SCANS - 9), 64)


@pytest.mark.parametrize(
    "between", [b"\xff\xfe\x00\x06\xff\xd9\xff\xd9", b"junk", b"\xff\xff\xff", b"\xff\xd0", b"\xff\x00"]
)
def test_scans_are_counted_behind_what_looks_like_the_end(between: bytes) -> None:
    data = file_of(picture(64, 64), "JPEG", progressive=True)
    place = data.rfind(b"\xff\xda")
    found, scans = bare(data[:place] + between + data[place:])
    assert scans == 10
    assert np.array_equal(preprocess(found, 64), preprocess(data, 64))


def test_what_looks_like_a_scan_in_a_thumbnail_or_behind_the_end_is_none() -> None:
    scan = b"\xff\xda\x00\x02"
    data = file_of(picture(64, 64), "JPEG")
    assert bare(data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + 400) + scan * 100 + data[2:] + scan * 100) == bare(data)


def test_further_scans_count_against_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_REQUEST_PIXELS", 4 * 64 * 64)
    one, ten = text_of(file_of(picture(64, 64), "JPEG")), text_of(last_scan_again(0))
    assert len(prepare([one] * 4)) == 4
    assert len(prepare([ten] * 2)) == 2
    with pytest.raises(InvalidImageError, match=r"image 2: .* pixels together"):
        prepare([ten] * 3, threads=1)


@pytest.mark.parametrize("frame", [0xC3, 0xC9, 0xCA, 0xC5])
def test_jpegs_with_rare_codes_are_refused(frame: int) -> None:
    data = file_of(picture(64, 64), "JPEG").replace(b"\xff\xc0", bytes([0xFF, frame]))
    with pytest.raises(InvalidImageError, match="JPEG of a rare kind"):
        preprocess(data, 64)


def png_with(pieces: bytes) -> bytes:
    data = file_of(picture(32, 32))
    return data[:33] + pieces + data[33:]


def jpeg_with(pieces: bytes) -> bytes:
    data = file_of(picture(32, 32), "JPEG")
    return data[:2] + pieces + data[2:]


def gif_with(pieces: bytes) -> bytes:
    data = file_of(picture(32, 32), "GIF")
    place = data.index(b",", 13 + 3 * 256)
    return data[:place] + pieces + data[place:]


MANY = {
    "segments": jpeg_with(b"\xff\xe1\x00\x09Exif\0\0a" * 5000),
    "bytes of tables": jpeg_with((b"\xff\xdb" + struct.pack(">H", 2 + 65 * 1000) + bytes([0, *[1] * 64]) * 1000) * 5),
    "chunks": png_with(chunk(b"teSt", b"") * 40_000),
    "blocks": gif_with(b"!\xfe" + b"\1a" * 20_000 + b"\0"),
}


@pytest.mark.parametrize("what", MANY)
def test_a_file_of_very_many_pieces_is_refused_before_pillow_sees_it(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.open", lambda *_args, **_options: pytest.fail("opened"))
    with pytest.raises(InvalidImageError, match=f"more than [0-9,]+ {what}"):
        preprocess(MANY[what], 32)


PROFILE = b"a\0\0" + zlib.compress(bytes(1_000_000))
METADATA = {
    "png": (
        png_with,
        chunk(b"iCCP", PROFILE) + chunk(b"zTXt", PROFILE) + chunk(b"eXIf", b"II*\0") + chunk(b"gAMA", bytes(4)),
    ),
    "jpeg": (jpeg_with, b"".join(bytes([0xFF, marker, 0, 8]) + b"Exif\0\0" for marker in (0xE1, 0xE2, 0xED, 0xFE))),
    "gif": (gif_with, b"!\xfe\3abc\0" + b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_is_taken_out_and_changes_no_pixel(kind: str) -> None:
    put, metadata = METADATA[kind]
    assert bare(put(metadata)) == bare(put(b""))
    original = np.asarray(Image.open(io.BytesIO(put(metadata))).convert("RGB"))
    assert np.array_equal(preprocess(put(metadata), 32), original)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_colour_survives_the_taking_out(kind: str) -> None:
    image = picture(32, 32).quantize(8)
    data = file_of(image, kind, transparency=3)
    found, _ = bare(data)
    assert Image.open(io.BytesIO(found)).info["transparency"] == 3
    assert np.array_equal(preprocess(data, 32), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_gif_cannot_have_a_frame_allocated_before_its_size_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gif_with(b"!\xf9\4\x08\0\0\0\0")
    place = data.index(b",", 13 + 3 * 256 + 8)
    data = data[: place + 5] + struct.pack("<HH", 60_000, 60_000) + data[place + 9 :]
    monkeypatch.setattr("PIL.Image.core.fill", lambda *_: pytest.fail("allocated"))
    with pytest.raises(InvalidImageError, match="60000 by 60000 pixels"):
        preprocess(data, 32)


@pytest.mark.parametrize("compression", [1, 2])
def test_a_bmp_with_run_lengths_is_refused(compression: int) -> None:
    palette = bytes(range(1, 5)) * 256
    head = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, compression, 4, 0, 0, 256, 0)
    data = b"BM" + struct.pack("<IHHI", 54 + 1024 + 4, 0, 0, 54 + 1024) + head + palette + b"\4\7\0\1"
    with pytest.raises(InvalidImageError, match="BMP with run lengths"):
        preprocess(data, 4)


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


# --- how many at a time -----------------------------------------------------------------------------------------------


def test_images_of_all_requests_are_held_to_a_number() -> None:
    pool = ImagePool(1)
    with contextlib.ExitStack() as held:
        for _ in range(MAX_HELD_IMAGES // 100):
            held.enter_context(pool.room(100))
        with pytest.raises(OverloadedError) as raised, pool.room(100):
            pass
        assert (raised.value.status, raised.value.code) == (503, "overloaded")
        assert int(raised.value.headers["retry-after"]) >= 1
        with pool.room(MAX_HELD_IMAGES % 100):
            pass
    # All is given back, also what an error ended.
    with contextlib.suppress(ZeroDivisionError), pool.room(MAX_HELD_IMAGES):
        raise ZeroDivisionError
    with pool.room(MAX_HELD_IMAGES + 1):
        pass
    pool.close()


class WaitingEngine:
    """Says when a run has come in, and answers when it is let."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def run(self, model: str, items: Images, *, dimensions: int, outputs: Sequence[str]) -> Result:
        self.begun.set()
        await self.go_on.wait()
        count = len(items.pixels)
        dense = Rows.of_matrix(np.ones((count, 2), np.float32), np.full(count, 2, np.int32))
        return Result({"dense": dense}, queue=0, run=0)


def request(count: int) -> EmbeddingRequest:
    model = object.__new__(LocalModel)
    config = SimpleNamespace(images=ImageSettings(8, 4, (0.5,) * 3, (0.5,) * 3))
    for name, value in {"id": "a/b", "config": config}.items():
        object.__setattr__(model, name, value)
    item = text_of(file_of(picture(8, 8)))
    inputs = Inputs(images=[item] * count, image_positions=range(count))
    return EmbeddingRequest(model, inputs, "float", 2, ("dense",), "", Truncate.NONE, None)


def embedder(engine: Any, pool: ImagePool) -> Embedder:
    settings: Any = SimpleNamespace(max_request_tokens=300_000)
    unused: Any = None
    return Embedder(settings, engine, unused, pool, unused)


def test_a_request_has_at_most_256_images() -> None:
    async def run(pool: ImagePool) -> None:
        with pytest.raises(InvalidRequestError, match="holds 257 images; at most 256"):
            await embedder(None, pool).embed(request(MAX_REQUEST_IMAGES + 1), Exchange("x"))

    in_a_pool(run)


def test_images_are_held_until_they_have_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_HELD_IMAGES", 3)

    async def run(pool: ImagePool) -> None:
        engine = WaitingEngine()
        under_test = embedder(engine, pool)
        # More than the limit, but the first.
        first = asyncio.ensure_future(under_test.embed(request(4), Exchange("x")))
        await asyncio.wait_for(engine.begun.wait(), 10)
        with pytest.raises(OverloadedError):
            await under_test.embed(request(1), Exchange("x"))
        engine.go_on.set()
        assert len((await first)["dense"]) == 4
        assert len((await under_test.embed(request(3), Exchange("x")))["dense"]) == 3

    in_a_pool(run)
