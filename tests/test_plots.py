"""training/plots.py: what a reader sees in loss.png and geometry.png, by the artists of the figures."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from model import GPT
from optim import Dualized, ModularNorm, metrize
from optim.polar import Polar
from torch import optim as torch_optim
from training.geometry import Geometry
from training.plots import colouring, grid, kind, plot_geometry, plot_losses, running_means

from tests.pictures import check_nothing_is_cut_off, words
from tests.test_geometry import backward, gpt

BAND = Polar().band


def run(model: GPT, make: Callable[[ModularNorm], torch_optim.Optimizer], steps: int = 3) -> list[dict[str, Any]]:
    """The records of a run that measures every second step, the first included."""
    norm, records = metrize(model), []
    optimizer = make(norm)
    geometry = Geometry(model, optimizer, norm)
    for step in range(1, 2 * steps):
        idx = backward(model, step)
        geometry.before()
        optimizer.step()
        optimizer.zero_grad()
        records.append({"step": step, "loss": 1.0} | ({"geometry": geometry.after(idx)} if step % 2 else {}))
    return records


def test_the_rows_of_the_picture_are_kinds_and_then_layers():
    model = gpt(n_layer=12, zero_init=True)
    records = [
        *run(model, lambda norm: Dualized(model, 0.1, norm=norm, direction="nesterov")),
        {"step": 6, "val_loss": 1.0},
    ]
    names, steps, values = grid(records, "step")
    assert steps == [1, 3, 5]
    assert len(names) == len(values) == 2 + 12 * 6
    assert names[0] == "embedding.weight"
    assert names[1:13] == [f"blocks.{i}.attention.q.weight" for i in range(12)]
    assert names[-1] == "head.weight"
    assert values[names.index("head.weight")] == pytest.approx([1, 1, 1], abs=1e-3)
    assert len(grid(records, "orthogonality")[0]) == 12 * 6
    assert grid(records, "max_attention_logit")[0] == [f"blocks.{i}.attention" for i in range(12)]
    assert [kind(n) for n in (names[1], "net.0.weight", "net.0.norm.bias", "head.weight", "blocks.3.attention")] == [
        "attention.q",
        "net.*",
        "norm.bias",
        "head",
        "attention",
    ]


@pytest.mark.parametrize(
    ("name", "rows"),
    [("nesterov", [14, 14, 14, 14, 12, 2]), ("factored", [14, 14, 14, 14, 2]), ("AdamW", [14, 14, 14, 2])],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_picture_has_a_panel_for_each_quantity(
    name: str, rows: list[int], steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from matplotlib.axes import Axes

    shown, imshow = [], Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda axes, values, **kw: shown.append(len(values)) or imshow(axes, values, **kw)
    )
    model = gpt()

    def make(norm: ModularNorm) -> torch_optim.Optimizer:
        if name == "AdamW":
            return torch_optim.AdamW(model.named_parameters())
        return Dualized(model, 0.1, norm=norm, direction=name)

    plot_geometry(run(model, make, steps), tmp_path / "geometry.png", band=BAND)
    assert (tmp_path / "geometry.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "geometry.png").stat().st_size > 10_000
    assert shown == rows


def test_without_measurements_there_is_no_picture(tmp_path: Path):
    plot_geometry([{"step": 1, "loss": 2.0}], tmp_path / "geometry.png", band=BAND)
    assert not list(tmp_path.iterdir())


# ---- what a reader sees


def test_steps_inside_the_band_have_the_colour_of_normal_and_others_have_not():
    low, high = BAND
    norm, palette = colouring("band", [[low, 1.0, high, 0.5, 2.0, math.nan]], BAND)
    below, one, above, small, large = (palette(float(norm(x)))[:3] for x in (low + 1e-3, 1.0, high - 1e-3, 0.5, 2.0))
    assert below == one == above
    assert small[2] > max(small[:2]) and large[0] > max(large[1:]), "blue below, red above"
    exact, palette = colouring("band", [[1.0, 1.2]], (1.0, 1.0))
    assert palette(float(exact(1.2))) != palette(float(exact(1.0)))


def test_the_picture_of_a_geometry_says_what_is_normal_and_explains_its_colours(tmp_path: Path, figures: list[Figure]):
    model = gpt()
    plain = run(model, lambda norm: Dualized(model, 0.1, norm=norm, direction="nesterov"))
    plot_geometry(plain, tmp_path / "geometry.png", band=BAND)
    said = words(figures[0])
    assert "green is normal: 1, or 0.846 to 1.142 for matrices (polar schedule)" in said
    assert "up to 0.3 is normal" in said and "Grey: no step was taken" in said
    assert said.count("training step") == 6 and tmp_path.name in said


def test_the_picture_of_steps_in_other_coordinates_calls_no_size_normal(tmp_path: Path, figures: list[Figure]):
    model = gpt()
    carried = run(model, lambda norm: Dualized(model, 0.1, norm=norm, direction="factored"))
    plot_geometry(carried, tmp_path / "geometry.png", band=BAND)
    said = words(figures[0])
    assert "1 is as requested; matrices differ that step in other coordinates" in said and "is normal" not in said


def test_nothing_of_a_picture_is_cut_off(tmp_path: Path, figures: list[Figure]):
    model = gpt(n_layer=6)
    for direction in ("nesterov", "factored"):
        records = run(model, lambda norm, d=direction: Dualized(model, 0.1, norm=norm, direction=d))
        plot_geometry(records, tmp_path / "geometry.png", band=BAND)
    plot_losses(folder(tmp_path), {"gzip -9": 2.0, "xz -9e": 1.5}, bytes_per_token=1.0)  # type: ignore[arg-type]
    assert len(figures) == 3
    for figure in figures:
        check_nothing_is_cut_off(figure)


def folder(path: Path, logged: int = 30) -> SimpleNamespace:
    """As much of a run folder as a picture of losses asks for."""
    records = [{"step": i, "tokens": 100 * i, "loss": 4.0 - i / 10} for i in range(1, logged + 1)]
    records.append({"step": logged, "tokens": 100 * logged, "val_loss": 1.25})
    return SimpleNamespace(path=path, metrics=lambda: records)


def test_the_picture_of_losses_names_every_line_with_its_unit(tmp_path: Path, figures: list[Figure]):
    plot_losses(folder(tmp_path), {"gzip -9": 2.0}, bytes_per_token=3.0)  # type: ignore[arg-type]
    said = words(figures[0])
    assert "training, mean of 3 logged batches" in said and "validation, 1.250 at the end" in said
    assert f"gzip -9 on the validation text, {2 * 3 * math.log(2):.3f}" in said
    assert "nats per token" in said and "tokens trained on" in said and f"Loss of {tmp_path.name}" in said


def test_a_run_that_logged_once_or_never_validated_has_its_picture(tmp_path: Path):
    short = folder(tmp_path, logged=1)
    short.metrics = lambda: [{"tokens": 1, "loss": 2.0}]
    plot_losses(short, {}, bytes_per_token=1.0)  # type: ignore[arg-type]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_running_mean_begins_where_there_are_enough_points():
    assert running_means([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(2, 2.0), (3, 4.0)]
    assert running_means([(1, 1.0)], 2) == []
