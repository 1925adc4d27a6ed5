"""optim/schedules.py."""

import math

import pytest
import torch
from optim import Dualized, Refusal, half_life, metrize, schedule
from optim.schedules import SCHEDULES, cosine, momentum_at, wsd


def test_wsd_warms_up_stays_and_cools_down_linearly():
    values = [wsd(s, 100, warmup=10, cooldown=0.4) for s in range(100)]
    assert values[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert values[10:60] == [1.0] * 50
    assert values[60:] == pytest.approx([(100 - s) / 40 for s in range(60, 100)])
    assert values[-1] > 0, "the last step still moves"


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_a_warm_up_below_one_is_a_fraction_of_all_steps(schedule):
    for step in range(60):
        assert schedule(step, 60, warmup=0.1, cooldown=0.5) == schedule(step, 60, warmup=6, cooldown=0.5)


def test_a_cooldown_of_another_power_is_that_power_of_the_linear_one():
    linear, bent = ([wsd(s, 100, warmup=10, cooldown=0.4, power=p) for s in range(100)] for p in (1.0, 1.2))
    assert bent[:60] == linear[:60], "warm-up and the stable part are as they were"
    assert bent[60:] == pytest.approx([x**1.2 for x in linear[60:]])


def test_momentum_goes_up_stays_and_comes_down_linearly():
    values = [momentum_at(s, 200, beta=0.95, low=0.85, warmup=0.1, cooldown=0.2) for s in range(200)]
    assert values[:20] == pytest.approx([0.85 + 0.1 * (s + 1) / 20 for s in range(20)])
    assert values[20:160] == pytest.approx([0.95] * 140)
    assert values[160:] == pytest.approx([0.85 + 0.1 * (200 - s) / 40 for s in range(160, 200)])
    assert {momentum_at(s, 7, beta=0.15, low=0.85, warmup=0.0, cooldown=0.0) for s in range(7)} == {0.15}, (
        "off is exact"
    )


def test_cosine_is_half_a_period_after_the_warm_up():
    values = [cosine(s, 110, warmup=10, cooldown=0.9) for s in range(110)]
    assert values[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert values[10] == 1.0
    assert values[60] == pytest.approx(1 - 0.45)
    assert values[85] == pytest.approx(1 - 0.9 * (1 - math.cos(0.75 * math.pi)) / 2)


def test_an_average_that_decays_by_a_half_life_halves_in_it_at_any_tokens_a_step():
    for per_step in (64, 128, 512):
        decay, average = half_life(1024, per_step=per_step), 1.0
        for _ in range(1024 // per_step):
            average *= decay
        assert average == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "per_step", "name"), [(0, 1, "tokens"), (math.inf, 1, "tokens"), (1, -2, "per_step")]
)
def test_a_half_life_that_gives_no_decay_is_refused(tokens: float, per_step: float, name: str):
    with pytest.raises(
        Refusal, match=rf"half_life: {name}\n  got: .*\n  allowed: a finite number > 0\n  fix: half_life\("
    ):
        half_life(tokens, per_step=per_step)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("cooldown", [0.0, 0.3, 1.0])
def test_multipliers_stay_in_the_unit_interval_and_the_first_step_moves(
    name: str, total: int, warmup: int, cooldown: float
):
    values = [SCHEDULES[name](s, total, warmup=warmup, cooldown=cooldown) for s in range(total)]
    assert all(0 <= v <= 1 for v in values)
    assert values[0] > 0


def test_a_torch_scheduler_takes_the_lr_through_the_schedule():
    model = torch.nn.Linear(3, 3)
    optimizer = Dualized(model, 0.5, norm=metrize(model))
    scheduler = schedule(optimizer, 10, warmup=4, cooldown=0.3)
    seen = []
    for _ in range(10):
        seen.append(optimizer.param_groups[0]["lr"])
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([0.5 * wsd(step, 10, warmup=4, cooldown=0.3) for step in range(10)])
    for settings, text in (
        ({"warm": 1}, "schedule: warm\n  got: no such setting"),
        ({"cooldown": 2.0}, "cooldown\n  got: 2.0"),
    ):
        with pytest.raises(Refusal, match=text):
            schedule(optimizer, 10, **settings)
