"""Small image files for trees of published datasets."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image


def encoded(value: int, size: tuple[int, int] = (6, 6), kind: str = "png") -> bytes:
    """A picture of one colour, whose red is `value`."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 10, 20)).save(stream, kind)
    return stream.getvalue()


def write_picture(path: Path, value: int, size: tuple[int, int] = (6, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value, size, "png" if path.suffix == ".png" else "jpeg"))


def reds(images) -> list[int]:
    """The red of each image's centre, of images [B, 3, H, W] that were not normalised."""
    middle = images.shape[-1] // 2
    return (255 * images[:, 0, middle, middle]).round().int().tolist()
