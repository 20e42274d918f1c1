"""Draws the pictures of concepts.md as SVG: `python docs/pictures.py` writes them to docs/images.

Every picture has a light ground of its own, so that it reads on a dark page too. Colours are those of the reports'
palette: teacher grey, meta model blue, student orange, stitches green.
"""

from __future__ import annotations

import math
from pathlib import Path
from xml.sax.saxutils import escape

TEACHER, META, STUDENT, STITCH, INK = "#5F6368", "#0072B2", "#D55E00", "#009E73", "#202124"


class Picture:
    """Boxes, arrows and words on a light card."""

    def __init__(self, width: int, height: int, description: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="13">',
            f"<title>{escape(description)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#FAFAFC"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, label: str = "", strong: bool = True
    ) -> None:
        """Filled where strong, else an outline; the label in its middle, one line for each \\n."""
        fill, ink = (colour, "#FFFFFF") if strong else ("#FFFFFF", colour)
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )
        lines = label.split("\n")
        for n, line in enumerate(lines):
            self.text(x + width / 2, y + height / 2 + 4.5 + 16 * (n - (len(lines) - 1) / 2), line, ink, "middle")

    def stitch(self, x: float, y: float, left: float, right: float, width: float = 14) -> None:
        """A trapezium from one width of features to another, its middle at height y."""
        corners = [(x, y - left / 2), (x + width, y - right / 2), (x + width, y + right / 2), (x, y + left / 2)]
        points = " ".join(f"{a:g},{b:g}" for a, b in corners)
        self.parts.append(f'<polygon points="{points}" fill="{STITCH}"/>')

    def line(
        self,
        *points: tuple[float, float],
        tip: bool = True,
        dashed: bool = False,
        colour: str = INK,
        width: float = 1.4,
    ) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        more = ' marker-end="url(#tip)"' if tip else ""
        more += ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{more}/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 6) -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>')

    def text(self, x: float, y: float, words: str, colour: str = INK, anchor: str = "start", size: int = 13) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{colour}" text-anchor="{anchor}" font-size="{size}">'
            f"{escape(words)}</text>"
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def modules() -> str:
    """Teacher, meta model, hybrid and student over the same three cuts."""
    picture = Picture(760, 330, "A teacher in four modules, its meta model, a hybrid, and the assembled student")
    left, slot, gap = 130, 130, 26
    places = [left + i * (slot + gap) for i in range(4)]
    rows = [("teacher", TEACHER, 50), ("meta model", META, 125), ("hybrid", META, 200), ("student", STUDENT, 275)]
    for i in range(3):
        x = places[i] + slot + gap / 2
        picture.line((x, 22), (x, 312), tip=False, dashed=True, colour="#9AA0A6")
        picture.text(x, 16, f"cut {i}", TEACHER, "middle", 11)
    for name, colour, y in rows:
        picture.text(14, y + 5, name)
        for i, x in enumerate(places):
            if i:
                picture.line((places[i - 1] + slot + 2, y), (x - 2, y))
            if name == "teacher":
                for n in range(3):
                    picture.box(x + n * 45, y - 22, 40, 44, colour, "block")
            elif name == "student" or (name == "hybrid" and i == 2):
                first, last = i == 0, i == 3
                if not first:
                    picture.stitch(x, y, 44, 26)
                if not last:
                    picture.stitch(x + slot - 14, y, 26, 44)
                start, stop = x + (0 if first else 16), x + slot - (0 if last else 16)
                picture.box(start, y - 15, stop - start, 30, STUDENT, f"module {i}")
            else:
                picture.box(x + 40, y - 22, 50, 44, colour, "block")
                picture.line((x, y), (x + 38, y), tip=False)
                picture.line((x + 92, y), (x + slot, y), tip=False)
    return picture.svg()


def pair() -> str:
    """What one teaching pair computes."""
    picture = Picture(760, 250, "A teaching pair: the same prefix, two modules, the same suffix, three losses")
    picture.text(14, 104, "images")
    picture.box(80, 72, 120, 56, TEACHER, "teacher's\nmodules 0 … i-1")
    picture.line((62, 100), (78, 100))
    picture.line((202, 100), (222, 100), (222, 50), (268, 50))
    picture.line((202, 100), (222, 100), (222, 150), (256, 150))
    picture.box(270, 28, 110, 44, TEACHER, "teacher's\nmodule i")
    picture.line((382, 50), (462, 50))
    picture.stitch(258, 150, 44, 26)
    picture.box(274, 132, 102, 36, STUDENT, "student's\nmodule i")
    picture.stitch(378, 150, 26, 44)
    picture.line((394, 150), (462, 150))
    for y in (50, 150):
        picture.box(464, y - 26, 120, 52, META, "meta model's\ni+1 … L-1")
        picture.line((586, y), (632, y))
        picture.text(638, y + 4, "logits")
    picture.line((430, 54), (430, 146), tip=False, dashed=True, colour=STITCH)
    picture.text(428, 196, "feature loss", STITCH, "middle")
    picture.line((430, 150), (430, 182), tip=False, dashed=True, colour=STITCH)
    picture.line((655, 60), (655, 136), tip=False, dashed=True, colour=STITCH)
    picture.text(664, 102, "divergence", STITCH)
    picture.line((655, 158), (655, 182), tip=False, dashed=True, colour=STITCH)
    picture.text(655, 196, "cross-entropy with labels", STITCH, "middle")
    picture.text(
        14, 236, "Trained: the student's module and its stitches. Everything else is frozen.", TEACHER, size=12
    )
    return picture.svg()


def layouts() -> str:
    """The three layouts of a cut, and what lies between two of them."""
    picture = Picture(760, 210, "Features at a cut: channels first, channels last, or tokens with prefix tokens")
    for x, name, shape in ((20, "channels first", "[B, D, H, W]"), (150, "channels last", "[B, H, W, D]")):
        for row in range(4):
            for column in range(4):
                picture.box(x + 24 * column, 40 + 24 * row, 22, 22, TEACHER, strong=False)
        picture.text(x, 28, name)
        picture.text(x, 158, shape, TEACHER, size=12)
    picture.text(290, 28, "tokens, one of them a prefix")
    for n in range(17):
        colour, strong = (STUDENT, True) if n == 0 else (TEACHER, False)
        picture.box(290 + 24 * (n % 9), 40 + 24 * (n // 9), 22, 22, colour, strong=strong)
    picture.text(290, 158, "[B, 1 + H W, D]", TEACHER, size=12)
    picture.line((532, 76), (572, 76))
    picture.box(576, 48, 80, 56, STITCH, "rearrange")
    picture.box(668, 48, 76, 56, STITCH, "norm and\nlinear")
    picture.text(576, 126, "parameter-free:", TEACHER, size=12)
    picture.text(576, 142, "layout, grid,", TEACHER, size=12)
    picture.text(576, 158, "prefix tokens", TEACHER, size=12)
    picture.text(676, 126, "the width", TEACHER, size=12)
    picture.text(14, 196, "A stitch takes features from one cut's layout and width to another's.", TEACHER, size=12)
    return picture.svg()


def routing() -> str:
    """Six tokens, three experts of two slots, one choice each: one token is dropped."""
    picture = Picture(760, 260, "Tokens routed to experts with a capacity of two")
    choices = [0, 2, 0, 1, 0, 2]
    taken: dict[int, int] = {}
    picture.text(20, 24, "tokens")
    picture.box(110, 96, 90, 60, META, "router")
    picture.text(300, 24, "experts, capacity 2")
    for expert in range(3):
        picture.box(300, 40 + 68 * expert, 150, 52, STUDENT, strong=False)
        picture.text(386, 71 + 68 * expert, f"MLP {expert}", STUDENT)
    for token, expert in enumerate(choices):
        y = 48 + 32 * token
        place = taken.get(expert, 0)
        taken[expert] = place + 1
        picture.box(20, y - 11, 50, 22, TEACHER, str(token), strong=False)
        picture.line((72, y), (108, 126), tip=False, colour="#9AA0A6", width=1)
        out = 540
        if place < 2:
            target = 54 + 68 * expert + 24 * place
            picture.box(308, target - 10, 50, 20, STUDENT, str(token))
            picture.line((202, 126), (306, target), colour="#9AA0A6", width=1)
            picture.line((452, 66 + 68 * expert), (out - 2, y), colour="#9AA0A6", width=1)
            picture.box(out, y - 11, 200, 22, TEACHER, f"weight · MLP {expert}(token {token})", strong=False)
        else:
            picture.box(out, y - 11, 200, 22, "#9AA0A6", f"0: token {token} was dropped", strong=False)
    picture.text(540, 24, "what is added to each token")
    picture.text(
        14,
        250,
        "Expert 0 is full when token 4 comes; with batch priority the surest tokens come first.",
        TEACHER,
        size=12,
    )
    return picture.svg()


def circuit() -> str:
    """A ring of mediators between input and output latents."""
    picture = Picture(760, 260, "A circuit: input latents, mediators linked by their signatures, output latents")
    picture.text(20, 24, "image tokens")
    for row in range(4):
        for column in range(4):
            picture.box(20 + 22 * column, 84 + 22 * row, 20, 20, TEACHER, strong=False)
    picture.line((114, 128), (176, 128))
    picture.text(116, 118, "read-in", TEACHER, size=11)
    picture.text(180, 24, "input latents")
    inputs = [(210, 60 + 34 * n) for n in range(5)]
    picture.text(300, 24, "mediators, round after round")
    centre, radius, count = (400, 130), 78, 10
    angles = [2 * math.pi * n / count for n in range(count)]
    mediators = [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]
    for n, start in enumerate(mediators):
        for step in (1, 2):
            picture.line(start, mediators[(n + step) % count], tip=False, colour="#9AA0A6", width=2.2 / step)
    for n, place in enumerate(inputs):
        picture.line(place, mediators[7 - n], tip=False, dashed=True, colour="#9AA0A6", width=1)
    outputs = [(590, 80 + 34 * n) for n in range(4)]
    for n, place in enumerate(outputs):
        picture.line(mediators[(n + 8) % count], place, tip=False, dashed=True, colour="#9AA0A6", width=1)
    for place in inputs:
        picture.dot(*place, TEACHER, 8)
    for place in mediators:
        picture.dot(*place, STUDENT, 8)
    for place in outputs:
        picture.dot(*place, META, 8)
    picture.text(550, 24, "output latents")
    picture.line((604, 130), (666, 130))
    picture.text(672, 134, "logits")
    picture.text(606, 118, "read-out", TEACHER, size=11)
    picture.text(
        14,
        250,
        "The nearer two signatures, the likelier the link: who hears whom is learned, weights are shared.",
        TEACHER,
        size=12,
    )
    return picture.svg()


def all_pictures() -> dict[str, str]:
    return {f"{draw.__name__}.svg": draw() for draw in (modules, pair, layouts, routing, circuit)}


if __name__ == "__main__":
    for name, picture in all_pictures().items():
        (Path(__file__).parent / "images" / name).write_text(picture)
