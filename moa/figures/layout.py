"""Laying images out in cells with titles, and saving PNGs that are the same for the same input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from moa.files import write_atomically

GAP, MARGIN = 2, 10  # pixels between cells, and around all
INK, PAPER, EMPTY = "#1a1a1a", "white", "#e8e8e8"


@dataclass(frozen=True)
class Column:
    """A column of images."""

    title: str
    group: str = ""  # a title over neighbouring columns of the same group
    images: Sequence[Image.Image | None] = ()  # None leaves a grey cell


FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"  # as in the plots


def _font(size: int) -> Any:
    return ImageFont.truetype(str(FONT), size)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _groups(columns: Sequence[Column]) -> list[tuple[str, int, int]]:
    """(title, first column, number of columns) of each run of columns with the same group."""
    runs: list[tuple[str, int, int]] = []
    for index, column in enumerate(columns):
        if runs and runs[-1][0] == column.group:
            title, first, count = runs[-1]
            runs[-1] = (title, first, count + 1)
        else:
            runs.append((column.group, index, 1))
    return runs


def grid(columns: Sequence[Column], cell: int = 128, rows: Sequence[str] = ()) -> Image.Image:
    """Columns of images in square cells, with titles above and, if given, a title left of each row.

    Small images are enlarged without smoothing when the factor is whole, so that pixels stay what they are.
    Raises ValueError if there is nothing to show.
    """
    height = max((len(column.images) for column in columns), default=0)
    if not height:
        raise ValueError("there are no images to lay out")
    font, small = _font(max(10, cell // 10)), _font(max(9, cell // 12))
    line = font.getbbox("Ag")[3] + 3
    runs = _groups(columns)
    space = 3 * GAP  # between groups
    lefts, x = [], MARGIN + (cell if rows else 0)
    for _, _, count in runs:
        lefts += [x + i * (cell + GAP) for i in range(count)]
        x += count * (cell + GAP) + space
    titles = [wrap(title, font, count * (cell + GAP) - 2 * GAP) for title, _, count in runs]
    top = MARGIN + line * (max(map(len, titles)) + 1) + GAP
    canvas = Image.new("RGB", (x - space + MARGIN, top + height * (cell + GAP) + MARGIN), PAPER)
    pen = ImageDraw.Draw(canvas)
    for (_, first, _), lines in zip(runs, titles, strict=True):
        for number, text in enumerate(lines):
            pen.text((lefts[first], MARGIN + number * line), text, fill=INK, font=font)
    for left, column in zip(lefts, columns, strict=True):
        pen.text((left, top - line - GAP), column.title, fill=INK, font=small)
        for number, image in enumerate(column.images):
            _place(canvas, image, left, top + number * (cell + GAP), cell)
    for number, title in enumerate(rows):
        for row, text in enumerate(wrap(title, small, cell - 3 * GAP)):
            pen.text((MARGIN, top + number * (cell + GAP) + row * (line - 1)), text, fill=INK, font=small)
    return canvas


def label(text: str, cell: int) -> Image.Image:
    """A blank cell with a text at its foot, above a column that starts a row lower."""
    font, image = _font(max(10, cell // 10)), Image.new("RGB", (cell, cell), PAPER)
    ImageDraw.Draw(image).text((0, cell - GAP), text, fill=INK, font=font, anchor="ld")
    return image


def _place(canvas: Image.Image, image: Image.Image | None, left: int, top: int, cell: int) -> None:
    """Put an image into its cell, whole and centred."""
    if image is None:
        canvas.paste(EMPTY, (left, top, left + cell, top + cell))
        return
    factor = min(cell / image.width, cell / image.height)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    method = Image.Resampling.NEAREST if factor.is_integer() else Image.Resampling.LANCZOS
    offset = (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2)
    canvas.paste(image.convert("RGB").resize(size, method), offset)


def save(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all, without anything in it that changes from run to run."""
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", optimize=True))


def save_plot(figure: Figure, path: str | Path) -> None:
    """Write a matplotlib figure as PNG without software name or date."""
    options: dict[str, Any] = {"dpi": 120, "metadata": {"Software": None}, "bbox_inches": "tight"}
    with style():
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", **options))


@contextmanager
def style() -> Iterator[None]:
    """Within the `with` block matplotlib draws in the style of all figures, whatever the user's settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "grid.alpha": 0.25,
                "axes.axisbelow": True,
                "legend.frameon": False,
            }
        )
        yield
