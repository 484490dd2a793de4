"""Writes the report of a sweep: one HTML page that needs no network, and its figures as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search.report import words
from search.report.canvas import DARK, LIGHT, Drawing
from search.report.data import PictureRow, ReportData, Scores, StudentFacts, kept
from search.report.figures import drawings, spread
from search.report.loading import loading
from search.report.plan_picture import READING

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE = "report.html"
TEMPLATE = "report.html.j2"
PAGE_PICTURES, FIRST_PICTURES = 36, 12
"""Captions on the page at most, and those seen without opening the rest."""
LARGEST_PICTURE = 384
"""Pixels a side that a picture has on the page at most: a page stays some megabytes."""
PIXEL_ART = 160
"""Pictures smaller than this are enlarged without smoothing, so that every pixel is seen."""


@dataclass(frozen=True)
class Drawn:
    """A drawing in both themes, as PNG."""

    drawing: Drawing
    light: bytes
    dark: bytes

    @property
    def light_url(self) -> str:
        """For the `src` of an image."""
        return data_url(self.light)

    @property
    def dark_url(self) -> str:
        """For readers who prefer dark pages."""
        return data_url(self.dark)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels, half of those in the PNG's header."""
        width, height = (int.from_bytes(self.light[at : at + 4], "big") // 2 for at in (16, 20))
        return width, height


@dataclass(frozen=True)
class Headline:
    """The figures of one student that are read first."""

    asked: str
    student: StudentFacts
    share: float
    """Of the teacher's parameters."""
    kept: float | None
    """Of the teacher's judge score."""


def render(data: ReportData) -> str:
    """The page as HTML, with every picture in it."""
    return _page(data, _draw(data))


def write_report(data: ReportData, folder: Path) -> list[Path]:
    """Writes report.html and one PNG a figure into `folder`; returns the files, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(data)
    page = folder / PAGE
    page.write_text(_page(data, drawn), encoding="utf-8")
    files = [page]
    for each in drawn:
        file = folder / f"{each.drawing.name}.png"
        file.write_bytes(each.light)
        files.append(file)
    return files


def data_url(png: bytes) -> str:
    """PNG bytes as a URL that holds them."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def picture_url(picture: Image) -> str:
    """A picture as a URL that holds it, made smaller when it is larger than the page shows."""
    if max(picture.size) > LARGEST_PICTURE:
        picture = picture.copy()
        picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    body = io.BytesIO()
    picture.save(body, format="PNG")
    return data_url(body.getvalue())


def headlines(data: ReportData) -> list[Headline]:
    """One a student, in the order of the sweep's budgets."""
    return [
        Headline(
            asked=data.asked(student.budget),
            student=student,
            share=student.parameters / data.teacher.parameters,
            kept=kept(student.scores, data.teacher_scores),
        )
        for student in data.students
    ]


def judge_table(data: ReportData) -> list[tuple[str, list[float | None]]]:
    """Rows of the judge table: a family, then the teacher's score and each student's.

    The last row is the overall score. Empty without the teacher's scores.
    """
    if data.teacher_scores is None:
        return []
    models: Sequence[Scores | None] = [data.teacher_scores, *(s.scores for s in data.students)]
    rows: list[tuple[str, list[float | None]]] = [
        (family, [None if scores is None else scores.families.get(family) for scores in models])
        for family in data.teacher_scores.families
    ]
    rows.append(("overall", [None if scores is None else scores.overall for scores in models]))
    return rows


def _first_spread(pictures: Sequence[PictureRow]) -> list[PictureRow]:
    """The page's captions: first some of every kind, then the rest in their order."""
    rows = spread(pictures, PAGE_PICTURES)
    first = spread(rows, FIRST_PICTURES)
    chosen = {id(row) for row in first}
    return first + [row for row in rows if id(row) not in chosen]


def _draw(data: ReportData) -> list[Drawn]:
    return [Drawn(each, each.png(LIGHT), each.png(DARK)) for each in drawings(data)]


def _page(data: ReportData, drawn: Sequence[Drawn]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("search.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "count": words.count,
        "percent": words.percent,
        "ffn": words.ffn,
        # A number and its unit stay on one line.
        "duration": lambda seconds: words.duration(seconds).replace(" ", "\u00a0"),
        "loss": words.loss,
        "picture": picture_url,
    }
    environment.filters.update(filters)
    caption = data.pictures[0].caption if data.pictures else "a lighthouse at dusk"
    figures: Mapping[str, Drawn] = {each.drawing.name: each for each in drawn}
    front = [trial for trial in data.trials if trial.number in set(data.pareto)]
    return environment.get_template(TEMPLATE).render(
        data=data,
        drawn=figures,
        headlines=headlines(data),
        judged=judge_table(data),
        rows=_first_spread(data.pictures),
        first_rows=FIRST_PICTURES,
        reading=READING,
        front=sorted(front, key=lambda trial: trial.parameters),
        sought=words.listed([objective.replace("_", " ") for objective in data.objectives]),
        costed=list(front[0].costs) if front else [],
        amount=words.amount,
        asked=data.asked,
        span=words.span,
        loading=lambda student: loading(student.plan, student.url, data.sampling, caption),
        pixel_art=bool(data.pictures) and max(data.pictures[0].teacher.size) < PIXEL_ART,
        light=LIGHT,
        dark=DARK,
    )
