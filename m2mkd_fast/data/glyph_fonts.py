"""The fonts and characters of the glyphs dataset: which there are, and what they look like when drawn large."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m2mkd_fast.errors import M2MKDError

if TYPE_CHECKING:
    from PIL import ImageFont

# Characters whose shapes differ in every font, also when slanted, scaled and shifted: no small letter that is its
# capital at another size (c, o, s …), no 1 l I |, O 0 together, no Greek, Cyrillic or phonetic letter that looks Latin.
# The order makes any first n of them a sensible task; those with accents are the hardest and come last.
CHARACTERS = (
    "0123456789"
    "ABDEFGHJKLMNPQRTUWXYZCSV"
    "abdefghmnrty"
    "&@#%?!+=*"
    "ΓΔΛΞΠΣΦΨΩ"
    "БДЖЛЦЧШЭЮЯИЫ"
    "αγδεζλξπσω"
    "ЂЊЉъ"
    "┌┐└┘├┤┬┴"
    "ÆÞßæŒœŁłÐ"
    "¥£€¢§¶©®™‰†‡÷±"
    "{}()[]<>/\\$~^"
    "╔╗╚╝╠╣╦╩╬"
    "«»¿¡¤№∂ƒ"
    "ɐɒɔəɤɥɮʁʃʘʞ"
    "ÄÀÂÃÅÇÉÊËÑÔÕŠŽŸÜÛŘÚŐĞ"
    "ЇЙЩäåéêñğűř"
    "đħŧŤĶĎ"
)
TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)
OOD_FONTS = (
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
# TeX's fonts name all of ASCII in their tables, but draw other things in several places: letters and digits are safe.
OOD_FONTS_LATIN = ("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")


def font_path(name: str) -> Path:
    """The file of a font that comes with matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise M2MKDError(
            f"the glyphs dataset draws with matplotlib's fonts: pip install matplotlib ({error})"
        ) from error
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    if not path.is_file():
        raise M2MKDError(f"the font {path} is missing; reinstall matplotlib, which brings it")
    return path


@functools.lru_cache(maxsize=32)
def characters_of(name: str) -> frozenset[int]:
    """The code points that a font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_path(name))).get_charmap())


def fonts_for(characters: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Fonts to train on and fonts held out, every one of which has all of `characters`.

    Raises M2MKDError for a character that a training font, or every held-out font, lacks.
    """
    for font in TRAIN_FONTS + OOD_FONTS:
        for character in characters:
            if ord(character) not in characters_of(font):
                raise M2MKDError(f"the font {font} has no character {character!r}; choose other characters")
    plain = all(character.isascii() and character.isalnum() for character in characters)
    return TRAIN_FONTS, OOD_FONTS + (OOD_FONTS_LATIN if plain else ())


@functools.lru_cache(maxsize=64)
def _face(name: str, points: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(str(font_path(name)), points)


def draw_masters(fonts: Sequence[str], character: str, side: int) -> Tensor:
    """A character drawn large and upright in each font: float32 [fonts, 1, side, side], 0 for paper, 1 for ink.

    All characters of a font have one size, in which a capital fills about two thirds of the side, but for those that
    would not leave a margin of an eighth; each is centred by its ink.
    """
    from PIL import Image, ImageDraw

    masters = torch.empty(len(fonts), 1, side, side)
    room = side - 2 * (side // 8)
    for row, font in enumerate(fonts):
        points = round(0.85 * side)
        while True:
            # A font's own bounding box includes the space to the next letter, so the ink is measured on a wide sheet.
            sheet = Image.new("L", (3 * side, 3 * side), 0)
            ImageDraw.Draw(sheet).text((side, side // 2), character, fill=255, font=_face(font, points))
            ink = sheet.crop(sheet.getbbox())
            extent = max(ink.size)
            if extent <= room:
                break
            points = min(points - 1, int(points * room / extent))
        image = Image.new("L", (side, side), 0)
        image.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
        values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        masters[row, 0] = values.view(side, side).to(torch.float32) / 255
    return masters
