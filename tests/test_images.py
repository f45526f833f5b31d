"""Images survive as PNG, bit for bit where they are small; what is no image is refused."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from reflux.models.images import SIDE, from_text, picture_of, png, thumbnail, to_text

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12)) | st.tuples(
    st.integers(1, 12), st.integers(1, 12), st.just(3)
)


@given(arrays(np.uint8, SHAPES))
def test_a_small_picture_comes_back_bit_for_bit(image: np.ndarray) -> None:
    for again in (picture_of(png(image)), from_text(to_text(image))):
        assert again.dtype == np.uint8
        np.testing.assert_array_equal(again, image)


def test_any_png_reader_sees_the_same_pixels() -> None:
    """Against the format's definition: chunks, zlib, filters undone by hand for a row of one pixel."""
    data = png(np.asarray([[200]], np.uint8))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    # width, height, bits, grey
    assert struct.unpack(">IIBB", data[16:26]) == (1, 1, 8, 0)
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    assert zlib.decompress(data[at + 4 : at + 4 + length])[1] == 200


@pytest.mark.parametrize("shape", [(SIDE, SIDE), (1, SIDE), (SIDE, 7, 3), (70, 60)])
def test_what_fits_is_its_own_thumbnail(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.testing.assert_array_equal(from_text(to_text(image)), image)


@pytest.mark.parametrize(
    ("shape", "small"),
    [
        ((SIDE + 1, SIDE + 1), (96, 96)),
        ((192, 96), (96, 48)),
        ((100, 400, 3), (24, 96, 3)),
        ((1000, 1, 3), (96, 1, 3)),
    ],
)
def test_a_large_picture_is_kept_small_and_in_proportion(
    shape: tuple[int, ...], small: tuple[int, ...]
) -> None:
    """A plane of one colour stays that colour; halves stay where they were."""
    image = np.full(shape, 77, np.uint8)
    again = from_text(to_text(image))
    assert again.shape == small
    assert (again == 77).all()
    image[: shape[0] // 2] = 255
    again = thumbnail(image)
    assert (again[: small[0] // 4] == 255).all()
    assert (again[-(small[0] // 4) :] == 77).all()


def test_strided_pictures_are_pictures() -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 6, 3), np.uint8)
    for view in (image[::-1], image[:, :, 1], image.transpose(1, 0, 2)):
        np.testing.assert_array_equal(picture_of(png(view)), view)


@pytest.mark.parametrize(
    "value",
    [np.zeros((4, 4)), np.zeros((4, 4), np.int64), np.zeros(4, np.uint8), np.zeros((4, 4, 1), np.uint8),
     np.zeros((4, 4, 4), np.uint8),
     np.zeros((0, 4), np.uint8), np.zeros((1, 4, 4, 3), np.uint8)],
)  # fmt: skip
def test_what_is_no_picture_is_refused_with_its_shape(value: np.ndarray) -> None:
    for act in (png, thumbnail, to_text):
        with pytest.raises(ValueError, match=r"an image must be uint8.*got " + str(value.dtype)):
            act(value)


def test_a_thumbnail_of_no_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="side of at least 1"):
        thumbnail(np.zeros((4, 4), np.uint8), 0)


def as_file(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


def test_other_kinds_of_png_become_grey_or_colour() -> None:
    assert (
        picture_of(as_file(Image.new("RGBA", (3, 2), (10, 20, 30, 0)))).tolist() == [[[10, 20, 30]] * 3] * 2
    )
    assert picture_of(as_file(Image.new("1", (2, 1), 1))).tolist() == [[255, 255]]
    assert picture_of(as_file(Image.new("RGB", (2, 1), (1, 2, 3)).convert("P"))).shape == (1, 2, 3)


WHOLE = png(np.zeros((40, 40), np.uint8))
DAMAGED = [
    b"",
    b"GIF89a",
    WHOLE[:-20],
    WHOLE[:30],
    WHOLE[:8] + b"x" * 40,
    WHOLE.replace(WHOLE[41:45], b"\xff" * 4),
    as_file(Image.new("L", (4, 4)), "GIF"),
    as_file(Image.new("L", (4, 4)), "BMP"),
    as_file(Image.new("1", (5000, 1))),
]


@pytest.mark.parametrize("data", DAMAGED)
def test_what_is_no_whole_png_of_a_fair_size_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"PNG|pixels"):
        picture_of(data)
    with pytest.raises(ValueError, match=r"PNG|pixels"):
        from_text(base64.b64encode(data).decode())


@pytest.mark.parametrize(
    "text", ['"><script>', "AAAA\nAAAA", "A", "é", to_text(np.zeros((1, 1), np.uint8)) + '"']
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        from_text(text)


@given(st.binary(max_size=60))
def test_no_bytes_do_worse_than_a_refusal(noise: bytes) -> None:
    for data in (noise, WHOLE[: len(noise)] + noise, noise[:8] + WHOLE):
        try:
            picture_of(data)
        except ValueError:
            continue
