"""Images as uint8 arrays, [height, width] or [height, width, 3], and their conversion to PNG and back."""

from __future__ import annotations

import base64
import io

import numpy as np

# pixels per side; a larger image is stored as a thumbnail
SIDE = 96
# the most pixels per side that are read, because a small file may hold an image that would fill the memory
_LARGEST = 4096


def png(image: np.ndarray) -> bytes:
    """The image as a PNG file, without loss. ValueError for an array that is no image (see the module)."""
    from PIL import Image

    _check(image)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, format="PNG")
    return file.getvalue()


def picture_of(data: bytes) -> np.ndarray:
    """The image in a PNG file, grey where it has one channel, else in colour (transparency is dropped).
    ValueError for anything but a complete PNG file of at most 4096 pixels per side.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if max(image.size) > _LARGEST:
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels is too large: at most {_LARGEST} "
                    "pixels per side are read"
                )
            return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a PNG image: {error}") from error


def thumbnail(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The image with at most `side` pixels per side, in its proportions; unchanged if it fits. ValueError for
    an array that is not an image, or a side below 1.
    """
    from PIL import Image

    _check(image)
    if side < 1:
        raise ValueError(f"a thumbnail needs a side of at least 1 pixel, got {side}")
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.LANCZOS))


def to_text(image: np.ndarray, side: int = SIDE) -> str:
    """The image, or its thumbnail of `side` pixels, as the base64 text of a PNG file, which fits into a line
    of JSON.
    """
    return base64.b64encode(png(thumbnail(image, side))).decode()


def from_text(text: str) -> np.ndarray:
    """The image of `to_text`. ValueError for what is not base64 of a PNG file."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"not base64: {error}") from error
    return picture_of(data)


def as_letters(image: np.ndarray, side: int = 32) -> list[str]:
    """Text lines for a dark terminal, two rows of pixels each. A pixel lighter than middle grey is lit."""
    small = thumbnail(image, side)
    lit = (small if small.ndim == 2 else small.mean(-1)) > 127
    lit = np.pad(lit, ((0, len(lit) % 2), (0, 0)))
    pairs = zip(lit[::2], lit[1::2], strict=True)
    return ["".join(" ▄▀█"[2 * top + bottom] for top, bottom in zip(*pair, strict=True)) for pair in pairs]


def _check(image: np.ndarray) -> None:
    shaped = image.ndim in (2, 3) and image.shape[2:] in ((), (3,))
    if image.dtype != np.uint8 or not shaped or not image.size:
        raise ValueError(
            "an image must be uint8, [height, width] or [height, width, 3], and not empty; got "
            f"{image.dtype} {list(image.shape)}"
        )
