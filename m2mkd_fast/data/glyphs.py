"""Characters rendered from the fonts that come with matplotlib: a task of any size that needs no download."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from m2mkd_fast.atomic import write_atomically
from m2mkd_fast.data.glyph_fonts import CHARACTERS, draw_masters, fonts_for
from m2mkd_fast.data.image_dataset import ImageDataset, TensorSplit
from m2mkd_fast.data.seeds import derived_generator
from m2mkd_fast.data.subset import check_num_classes
from m2mkd_fast.errors import M2MKDError

VERSION = 1  # of the rendering: part of the cache's key
RENDITIONS = ("plain", "sketch", "inverted", "textured")
ROTATION, SCALE, SHIFT = 0.2, 0.15, 0.12  # radians, relative, half images; uniform in plus or minus
CHUNK_PIXELS = 2**22  # rendered at a time, so that memory stays small


def create_glyphs(
    *,
    image_size: int | None = None,
    in_chans: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    num_classes: int | None = None,
    images_per_class: int | None = None,
    test_images_per_class: int | None = None,
) -> ImageDataset:
    """`num_classes` characters (default 20), `images_per_class` training images of each (default 50).

    Every image has its own font, rotation, scale, shift, thickness of the strokes, brightness of ink and paper, and
    noise. The splits "train" and "test" share their fonts and draw light ink on dark paper; "ood" is drawn in other
    fonts, a quarter of it each as the training images are ("plain"), as outlines ("sketch"), dark on light ("inverted")
    and on a patterned background ("textured"). "test" and "ood" have `test_images_per_class` images of each class
    (default: a fifth of the training's, at least 8).

    `image_size` is 32 (default) or more, `in_chans` 1 (default) or 3 (coloured ink and paper). The images depend on the
    arguments, and through the fonts and their rasteriser on the versions of matplotlib and Pillow, and in single
    grey levels on the processor's vector instructions; `describe()` has their hash. With `cache_dir` they are kept
    there and read back.
    """
    size, channels = 32 if image_size is None else image_size, in_chans or 1
    if not 16 <= size <= 256 or channels not in (1, 3):
        raise M2MKDError(
            f"image_size={size}, in_chans={channels} for dataset 'glyphs': 16 to 256 pixels, 1 or 3 channels"
        )
    classes = check_num_classes("glyphs", 20 if num_classes is None else num_classes, len(CHARACTERS))
    train_count = 50 if images_per_class is None else images_per_class
    test_count = max(8, train_count // 5) if test_images_per_class is None else test_images_per_class
    if train_count < 1 or test_count < 1:
        raise M2MKDError(f"images_per_class={train_count}, test_images_per_class={test_count}: each must be at least 1")
    characters = list(CHARACTERS[:classes])
    train_fonts, ood_fonts = fonts_for(characters)

    settings = {
        "version": VERSION,
        "image_size": size,
        "in_chans": channels,
        "seed": seed,
        "num_classes": classes,
        "images_per_class": train_count,
        "test_images_per_class": test_count,
    }
    cached = None if cache_dir is None else _cache_file(Path(cache_dir).expanduser(), settings)
    if cached is not None and cached.is_file():
        pixels = _read_cache(cached)
    else:
        pixels = {
            "train": _render(characters, train_fonts, train_count, ("plain",), size, channels, seed, "train"),
            "test": _render(characters, train_fonts, test_count, ("plain",), size, channels, seed, "test"),
            "ood": _render(characters, ood_fonts, test_count, RENDITIONS, size, channels, seed, "ood"),
        }
        if cached is not None:
            _write_cache(cached, pixels)
    mean, std = _mean_and_std(pixels["train"])
    splits = {
        name: TensorSplit(
            name, images, torch.arange(classes).repeat_interleave(len(images) // classes), classes, mean, std
        )
        for name, images in pixels.items()
    }
    facts = {"train_fonts": list(train_fonts), "ood_fonts": list(ood_fonts), "ood_renditions": list(RENDITIONS)}
    return ImageDataset("glyphs", characters, splits, facts)


def _render(
    characters: list[str],
    fonts: tuple[str, ...],
    count: int,
    renditions: tuple[str, ...],
    size: int,
    channels: int,
    seed: int,
    split: str,
) -> Tensor:
    """`count` images of each character, uint8 [characters * count, channels, size, size], class after class."""
    # Twice the size, averaged down at the end: straight sampling would leave jagged strokes.
    side = 2 * size
    step = max(1, CHUNK_PIXELS // side**2)
    images = torch.empty(len(characters), count, channels, size, size, dtype=torch.uint8)
    kinds = [renditions[i % len(renditions)] for i in range(count)]
    for row, character in enumerate(characters):
        masters = draw_masters(fonts, character, side)
        for first in range(0, count, step):
            part = kinds[first : first + step]
            generator = derived_generator(seed, "glyphs", split, character, first)
            ink = masters[torch.randint(len(fonts), (len(part),), generator=generator)]
            ink = functional.avg_pool2d(_warp(_thicken(ink, generator), generator), 2)
            images[row, first : first + step] = _colour(ink, part, channels, generator)
    return images.flatten(0, 1)


def _mean_and_std(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Of each channel's values / 255, counted from a histogram: no copy of the images in floating point."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(pixels.shape[1]):
        share = torch.bincount(pixels[:, channel].flatten(), minlength=256).double() / pixels[:, channel].numel()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append((share * (values - mean) ** 2).sum().sqrt().item())
    return means, deviations


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _grow(ink: Tensor, radius: int) -> Tensor:
    return functional.max_pool2d(ink, 2 * radius + 1, stride=1, padding=radius)


def _thicken(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Strokes between a little thinner and a good deal thicker: a mixture of the ink with its erosion or dilation."""
    amount = _uniform(generator, -0.5, 1.0, len(ink), 1, 1, 1)
    thin, thick = -_grow(-ink, 1), _grow(ink, 1)
    return torch.where(amount < 0, ink.lerp(thin, -amount.clamp(max=0)), ink.lerp(thick, amount.clamp(min=0)))


def _warp(ink: Tensor, generator: torch.Generator) -> Tensor:
    angle = _uniform(generator, -ROTATION, ROTATION, len(ink))
    scale = 1 / _uniform(generator, 1 - SCALE, 1 + SCALE, len(ink))
    shift = _uniform(generator, -SHIFT, SHIFT, len(ink), 2)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, list(ink.shape), align_corners=False)
    return functional.grid_sample(ink, grid, align_corners=False)


def _colour(ink: Tensor, renditions: list[str], channels: int, generator: torch.Generator) -> Tensor:
    """uint8 images [N, channels, size, size] from ink [N, 1, size, size] in [0, 1]."""
    number, size = len(ink), ink.shape[-1]
    kind = {name: torch.tensor([r == name for r in renditions]).view(-1, 1, 1, 1) for name in RENDITIONS}
    outline = (_grow(ink, 1) + _grow(-ink, 1)).clamp(0, 1)
    ink = torch.where(kind["sketch"], outline, ink)
    paper_tone = _uniform(generator, 0.0, 0.3, number, channels, 1, 1)
    ink_tone = _uniform(generator, 0.6, 1.0, number, channels, 1, 1)
    paper = torch.where(kind["textured"], _texture(number, channels, size, generator), paper_tone)
    images = paper + (ink_tone - paper) * ink
    images = torch.where(kind["inverted"], 1 - images, images)
    noise = torch.randn(images.shape, generator=generator) * _uniform(generator, 0.0, 0.06, number, 1, 1, 1)
    return ((images + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _texture(number: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Smooth blotches crossed by stripes of a random direction and width, in [0, 0.6]."""
    blotches = torch.rand(number, channels, 5, 5, generator=generator)
    blotches = functional.interpolate(blotches, size=(size, size), mode="bilinear", align_corners=True)
    angle = _uniform(generator, 0, torch.pi, number, 1, 1)
    cycles = _uniform(generator, 2, 6, number, 1, 1)
    axis = torch.linspace(0, 1, size)
    distance = axis[None, :, None] * angle.sin() + axis[None, None, :] * angle.cos()
    stripes = 0.5 + 0.5 * (2 * torch.pi * cycles * distance).sin()
    return 0.3 * blotches + 0.3 * stripes[:, None]


def _cache_file(folder: Path, settings: dict[str, int]) -> Path:
    import matplotlib
    import PIL

    key = json.dumps({**settings, "pillow": PIL.__version__, "matplotlib": matplotlib.__version__}, sort_keys=True)
    return folder / f"glyphs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _read_cache(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        pixels = load_file(path)
    except (OSError, SafetensorError) as error:
        raise M2MKDError(f"the cached glyphs in {path} cannot be read ({error}); delete that file") from error
    return {name: pixels[name] for name in ("train", "test", "ood")}


def _write_cache(path: Path, pixels: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    write_atomically(path, lambda temporary: save_file(pixels, temporary))
