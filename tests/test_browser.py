"""A study's report.html in a browser without network: what it draws, what its buttons do, and that it fits a wide and a
narrow window.

Needs chromium (CHROMIUM says where, else it is looked for) and playwright, which drives it: `make browser` installs
the latter. BROWSER_SHOTS is a folder for screenshots.
"""

import importlib.util
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from studies.report.page import html
from studies.report.palette import DARK, LIGHT

from tests.test_report import HOSTILE, results, sparse

FLAGS = [
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (1280, 400)


def numbers(paths: list[str]) -> list[float]:
    return [float(x) for x in re.findall(r"-?[\d.]+", " ".join(paths))]


def chromium() -> str | None:
    return (
        os.environ.get("CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium with an empty profile of its own. NEEDS_BROWSER=1, as `make browser` sets, fails where there is none."""
    where, driver = chromium(), importlib.util.find_spec("playwright")
    if where is None or driver is None:
        if os.environ.get("NEEDS_BROWSER"):
            pytest.fail(
                f"needs a browser: chromium is {where or 'missing'}, playwright {'there' if driver else 'missing'}"
            )
        pytest.skip("needs a browser")
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        # Its sandbox does not run as root.
        started = playwright.chromium.launch(
            executable_path=where, args=FLAGS, chromium_sandbox=os.name != "posix" or os.geteuid() != 0
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """report.html by what it is of."""
    hostile = results()
    for e in hostile["entries"]:
        e |= {"receipt": HOSTILE, "note": HOSTILE}
    hostile["name"] = hostile["command"] = HOSTILE
    made = {}
    for name, found in {"race": results(), "hostile": hostile, **sparse()}.items():
        made[name] = tmp_path_factory.mktemp("a study") / "report.html"
        made[name].write_text(html(found), encoding="utf-8")
    return made


class Opened:
    """A page in a window, and what went wrong in it."""

    def __init__(self, browser: Any, path: Path, *, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(offline=True, viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text))
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", lambda d: (self.complaints.append(f"dialog {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):  # the charts are drawn once they have a size
            self.page.wait_for_function("drawn.length > 0 && drawn.every(chart => chart.svg.hasChildNodes())")

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def paths(self, chart: str = "curves", of: str = "line") -> list[str]:
        return self.page.eval_on_selector_all(f"#{chart} path.{of}", "found => found.map(p => p.getAttribute('d'))")

    def press(self, name: str, chart: str = "curves") -> None:
        self.page.locator(f"#{chart}").get_by_role("button", name=name, exact=True).click()

    def overflow(self) -> int:
        return self.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")


@pytest.mark.parametrize("name", ["race", "hostile", *sparse()])
def test_a_report_opens_from_disk_without_a_complaint_and_fits(browser: Any, pages: dict[str, Path], name: str):
    for width in WIDTHS:
        with Opened(browser, pages[name], width=width) as opened:
            assert opened.complaints == [] and opened.requests == [pages[name].as_uri()]
            assert opened.overflow() <= 0, width
            opened.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
            assert opened.overflow() <= 0, f"{width}, everything unfolded"
            assert opened.page.evaluate(
                "[...document.querySelectorAll('svg.chart')].every(s => s.clientWidth > 300 && s.clientHeight >= 250)"
            )


def test_the_curves_have_a_line_for_each_seed_of_each_entry(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"]) as opened:
        assert len(opened.paths()) == 3 * 4 and all(len(d) > 50 for d in opened.paths())
        assert len(opened.paths(of="band")) == len(opened.paths(of="mean")) == 3
        opened.press("every horizon")
        assert len(opened.paths()) == 3 * 4 * 3
        opened.press("to the target")
        assert len(opened.paths()) == 3 * 4
    with Opened(browser, pages["one seed"]) as opened:
        assert len(opened.paths()) == 3 and opened.paths(of="band") == []
    with Opened(browser, pages["one point"]) as opened:  # nothing to choose from
        assert opened.page.locator("#curves").get_by_role("button", name="at the budget").count() == 0


def test_diverged_runs_and_trials_are_crosses(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["diverged"]) as opened:
        assert len(opened.paths(of="diverged")) == 4  # the seeds of one entry at the budget
        assert len(opened.paths("trials-optim\\.lr", of="diverged")) == 3 * 2


def test_buttons_change_axes_and_lines(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"]) as opened:
        seen = [opened.paths()]
        for button in ("seconds", "log", "training batches", "zoom in"):
            opened.press(button)
            assert opened.paths() not in seen, button
            seen.append(opened.paths())
        opened.press("zoom out")
        np.testing.assert_allclose(
            numbers(opened.paths()), numbers(seen[-2]), atol=0.11
        )  # paths have a tenth of a pixel
        for button in ("reset the zoom", "validation", "linear", "steps"):
            opened.press(button)
        assert opened.paths() == seen[0]
        opened.press("tokens")
        assert opened.paths() == seen[0]  # as many a step for all
        assert "M" in opened.page.locator("#curves svg.chart").text_content() and opened.complaints == []


def test_the_legend_hides_an_entry_in_all_charts(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"]) as opened:
        opened.press("muon")
        assert len(opened.paths()) == 2 * 4 and len(opened.paths("horizons")) == 2
        opened.page.keyboard.press("Enter")  # the focus stays on the button
        assert len(opened.paths()) == 3 * 4


def test_a_drag_zooms_and_a_double_click_ends_it(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"]) as opened:
        opened.page.locator("#curves svg.chart").scroll_into_view_if_needed()
        before, box = opened.paths(), opened.page.locator("#curves svg.chart").bounding_box()
        mouse = opened.page.mouse
        mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.4 * box["height"])
        mouse.down()
        mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.8 * box["height"], steps=4)
        mouse.up()
        assert opened.paths() != before and "NaN" not in "".join(opened.paths())
        opened.page.locator("#curves svg.chart").dblclick()
        assert opened.paths() == before


def test_the_wheel_zooms_with_ctrl_alone(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"]) as opened:
        before = opened.paths()
        opened.page.locator("#curves svg.chart").hover()
        opened.page.mouse.wheel(0, -100)
        assert opened.paths() == before
        opened.page.keyboard.down("Control")
        opened.page.mouse.wheel(0, -100)
        opened.page.wait_for_function(
            "before => document.querySelector('#curves path.line').getAttribute('d') !== before", arg=before[0]
        )


def test_a_point_tells_entry_seed_step_and_loss_to_pointer_and_keyboard(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"]) as opened:
        tip = opened.page.locator("#curves .tip")
        opened.page.locator("#curves svg.chart").scroll_into_view_if_needed()
        box = opened.page.locator("#curves path.marker").last.bounding_box()
        opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        told, there = tip.text_content(), tip.bounding_box()
        off = [there[k] - box[k] - box[size] / 2 for k, size in (("x", "width"), ("y", "height"))]
        assert -there["width"] <= off[0] <= 15 and 13 <= off[1] <= 15, "14 pixels below, and within the page"
        assert told.startswith("dualized, seed") and "steps 400 · tokens 1,638,400 · seconds 75\nloss 1.47" in told
        opened.page.locator("#curves svg.chart").focus()
        opened.page.keyboard.press("Escape")
        assert tip.text_content() == ""
        for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
            opened.page.keyboard.press(key)
        assert tip.text_content().startswith("adamw, seed 1, 400 steps\nsteps ")


def test_a_chart_of_many_points_has_a_span(browser: Any, pages: dict[str, Path]):
    """More than a browser takes as the arguments of one call."""
    with Opened(browser, pages["one seed"]) as opened:
        assert opened.page.evaluate("span(Array.from({ length: 1_000_000 }, (_, i) => i - 3))") == [-3, 999_996]


def test_without_script_the_charts_are_pictures(browser: Any, pages: dict[str, Path]):
    with Opened(browser, pages["race"], java_script_enabled=False) as opened:
        boxes = [svg.bounding_box() for svg in opened.page.locator("figure svg").all()]
        assert len(boxes) == 3 and all(box["width"] > 300 and box["height"] > 200 for box in boxes)


def test_a_run_is_two_clicks_away(browser: Any, pages: dict[str, Path]):
    """The section, then the loss: it leads to the run's log, beside the page."""
    log = pages["race"].parent / "muon.s265.seed2/log.txt"
    log.parent.mkdir(exist_ok=True)
    log.write_text("step 265")
    with Opened(browser, pages["race"]) as opened:
        opened.page.get_by_role("link", name="Every run and its log").click()
        opened.page.locator('#runs a[title="log of muon, 265 steps, seed 2"]').click()
        opened.page.wait_for_url(log.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_shows_every_entry_in_its_colour(
    browser: Any, pages: dict[str, Path], tmp_path: Path, width: int, scheme: str
):
    """Their lines are in the picture: pixels of the palette's colours, which text and ground have not."""
    with Opened(browser, pages["race"], width=width, color_scheme=scheme) as opened:
        pixels = np.rint(
            imread(io.BytesIO(opened.page.locator("#curves svg.chart").screenshot()))[..., :3] * 255
        ).astype(int)
        for colour in (LIGHT if scheme == "light" else DARK)[:3]:
            wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (abs(pixels - wanted).max(-1) <= 8).sum() > 50, (
                colour
            )  # an 8th bit for the rounding of blended edges
        folder = Path(os.environ.get("BROWSER_SHOTS", tmp_path))
        folder.mkdir(parents=True, exist_ok=True)
        opened.page.screenshot(path=folder / f"{width}-{scheme}.png", full_page=True)
