"""The page of a report: report.html, and with it report.png.

The page needs no network and no other file: style, script and data are inside it, and its content
security policy allows nothing else. What it shows is computed in Python. A script draws the
charts; where there is no script, matplotlib's pictures of them stand. Text goes through Jinja2,
which escapes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from optim.errors import Refusal

from . import words
from .charts import charts
from .palette import DARK, LIGHT, dash, marker
from .picture import picture, static_svg
from .words import Json

FOLDER = Path(__file__).parent
# The parts of the page's one script, in order.
SCRIPTS = ("elements.js", "chart.js")
# Formats that the template calls by name.
FORMATS = (
    words.as_bytes,
    words.as_count,
    words.as_interpolated,
    words.as_interval,
    words.as_loss,
    words.as_p,
    words.as_ratio,
    words.as_seconds,
    words.as_signed,
    words.as_target,
)


class ReportError(Refusal):
    """Results that have no report."""


def write(results: Json, folder: Path) -> list[Path]:
    """Write report.html and report.png in `folder`, from the content of a results.json.

    Returns both paths. A number that is not finite counts as null: a run that diverged.
    """
    results = json.loads(json.dumps(results), parse_constant=lambda _: None)
    schema = results.get("schema")
    runs = [run for entry in results["entries"] for run in entry["runs"]]
    if schema not in (1, 2) or (schema == 1 and any(run.get("training") for run in runs)):
        raise ReportError(
            "results of a study",
            got=f"schema {schema!r}",
            allowed="2; 1 in the record book, without lines of training",
            fix="the study's command again, which runs nothing that is there, "
            "or the version of the program that wrote them",
        )
    page, image = folder / "report.html", folder / "report.png"
    page.write_text(html(results), encoding="utf-8")
    picture(results, image)
    return [page, image]


def html(results: Json) -> str:
    """Return the whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    specs, entries = charts(results), results["entries"]
    script = "".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS)
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update({form.__name__: form for form in FORMATS})
    styles = [
        {"name": e["name"], "colour": i % len(LIGHT), "dash": dash(i), "marker": marker(i)}
        for i, e in enumerate(entries)
    ]
    varied, shared = words.differences(entries)
    return environment.get_template("report.html.jinja").render(
        r=results,
        answers=[words.answer(results, pair) for pair in results["pairs"]],
        budget=words.as_budget(results),
        level=words.as_level(results),
        charts=[(spec, Markup(static_svg(spec, entries))) for spec in specs],
        data={"entries": styles, "charts": specs},
        palettes=(LIGHT, DARK),
        styles=styles,
        varied=varied,
        shared=shared,
        css=Markup((FOLDER / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
