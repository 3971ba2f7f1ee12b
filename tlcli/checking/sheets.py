"""The pictures that a check leaves: labels that may be wrong, and duplicates side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from tlcli.checking.check import Findings
from tlcli.data.decode import Pixels

SUSPECTS, COLUMNS = 40, 5
GROUPS, MEMBERS = 16, 5
THUMBNAIL, GAP, LINE = 190, 10, 17  # pixels
BLACK, RED, GRAY = "#111111", "#b3261e", "#666666"

T = TypeVar("T")
Line = tuple[str, str]
"""A text and its colour."""
Cell = tuple[Pixels, Sequence[Line]]


def draw_suspects(found: Findings, file: Path) -> bool:
    """The labels that are likeliest wrong, with what is given and what is suggested; whether there are any."""
    check, images, classes = found.labels, found.images, found.data.classes
    if check is None or not len(check.suspects):
        return False
    cells: list[Cell] = []
    for rank, i in enumerate(check.suspects[:SUSPECTS].tolist(), start=1):
        label, suggested = int(images.labels[i]), int(check.suggested[i])
        lines = [
            (f"{rank}. given: {classes[label]} {check.probabilities[i, label]:.0%}", BLACK),
            (f"looks like {classes[suggested]} {check.probabilities[i, suggested]:.0%}", RED),
            (f"{images.where[i]}  {_last(images.key(i))}", GRAY),
        ]
        cells.append((images.read(i), lines))
    more = len(check.suspects) - len(cells)
    title = f"{found.name}: labels that may be wrong, the likeliest first"
    _sheet(title + (f" ({more:,} more in labels.csv)" if more else ""), [cells], COLUMNS, file)
    return True


def draw_duplicates(found: Findings, file: Path) -> bool:
    """Groups of duplicates, a row each: those across splits first, then those with several labels; whether there are
    any."""
    images, classes = found.images, found.data.classes
    groups = [("same bytes", list(group)) for group in found.exact]
    groups += [(f"alike {one.similarity:.2f}", list(one.members)) for one in found.near]
    if not groups:
        return False

    def importance(group: tuple[str, list[int]]) -> tuple[bool, bool]:
        splits, labels = {images.where[i] for i in group[1]}, {int(images.labels[i]) for i in group[1]}
        return len(splits) == 1, len(labels) == 1

    groups.sort(key=importance)
    rows: list[list[Cell]] = []
    for kind, group in _spread(groups, [importance(group) for group in groups]):
        shown = _one_of_each(found, group)
        several = len({int(images.labels[i]) for i in group}) > 1
        across = len({images.where[i] for i in group}) > 1
        more = f", {len(group) - len(shown)} more" if len(group) > len(shown) else ""
        rows.append(
            [
                (
                    images.read(i),
                    [
                        (f"{images.where[i]}: {classes[images.labels[i]]}", RED if several or across else BLACK),
                        (_last(images.key(i)), GRAY),
                        (kind + more if place == 0 else "", GRAY),
                    ],
                )
                for place, i in enumerate(shown)
            ]
        )
    more_groups = len(groups) - len(rows)
    title = f"{found.name}: duplicates, those across splits first"
    _sheet(title + (f" ({more_groups:,} more groups in duplicates.csv)" if more_groups else ""), rows, MEMBERS, file)
    return True


def _spread(groups: Sequence[T], importance: Sequence[object]) -> list[T]:
    """At most GROUPS of groups in the order of importance: of those alike in it some from all over, for neighbours are
    mostly of one class."""
    alike = [i for i, one in enumerate(importance) if one == importance[min(GROUPS, len(groups)) - 1]]
    before = list(range(alike[0]))
    wanted = min(len(alike), GROUPS - len(before))
    chosen = [alike[k * len(alike) // wanted] for k in range(wanted)]
    return [groups[i] for i in [*before, *chosen]]


def _one_of_each(found: Findings, group: Sequence[int]) -> list[int]:
    """At most MEMBERS of a group: one of each split and label first."""
    kinds: dict[tuple[str, int], int] = {}
    for i in group:
        kinds.setdefault((found.images.where[i], int(found.images.labels[i])), i)
    first = list(kinds.values())
    return [*first, *(i for i in group if i not in first)][:MEMBERS]


def _sheet(title: str, rows: Sequence[Sequence[Cell]], columns: int, file: Path) -> None:
    """Rows of images with lines below each; a row that is too long goes on below."""
    lines = [row[start : start + columns] for row in rows for start in range(0, len(row), columns)]
    side, below = THUMBNAIL + GAP, 3 * LINE + GAP
    sheet = Image.new("RGB", (columns * side + GAP, 2 * LINE + GAP + len(lines) * (side + below)), "white")
    draw = ImageDraw.Draw(sheet)
    font, bold = (_font(name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    draw.text((GAP, GAP), _fitted(draw, title, bold, sheet.width - 2 * GAP), fill=BLACK, font=bold)
    for row, cells in enumerate(lines):
        for column, (pixels, texts) in enumerate(cells):
            left, top = GAP + column * side, 2 * LINE + GAP + row * (side + below)
            small = _small(pixels)
            sheet.paste(small, (left + (THUMBNAIL - small.width) // 2, top + (THUMBNAIL - small.height) // 2))
            for n, (text, colour) in enumerate(texts):
                place = left, top + THUMBNAIL + 3 + n * LINE
                draw.text(place, _fitted(draw, text, font, THUMBNAIL), fill=colour, font=font)
    sheet.save(file)


def _small(pixels: Pixels) -> Image.Image:
    """The image in a square of the thumbnail's side; small images are shown pixel by pixel."""
    image = Image.fromarray(pixels)
    scale = THUMBNAIL / max(image.size)
    kernel = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST
    return image.resize([max(1, round(side * scale)) for side in image.size], kernel, reducing_gap=3)


def _font(name: str) -> ImageFont.FreeTypeFont:
    """matplotlib brings a font with more alphabets than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, 12)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text as one line of at most this width."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def _last(key: str) -> str:
    """The last part of a name."""
    return key.rpartition("/")[2]
