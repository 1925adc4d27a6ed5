"""training/clock.py: the training clock and the stopwatch."""

import time

from training.clock import Clock, Stopwatch
from training.runtime import RunConfig, Runtime

CPU = RunConfig(device="cpu", precision="fp32")


def test_the_clock_stands_still_while_paused():
    clock = Clock(Runtime(CPU), 10.0)
    clock.start()
    time.sleep(0.02)
    with clock.paused():
        stood = clock.seconds()
        time.sleep(0.05)
        assert clock.seconds() == stood
    time.sleep(0.02)
    clock.stop()
    assert 10.04 <= clock.seconds() < 10.09
    assert clock.seconds() == clock.seconds()


def test_a_clock_that_stands_goes_on_standing_after_a_pause():
    clock = Clock(Runtime(CPU), 10.0)
    with clock.paused():
        time.sleep(0.01)
    time.sleep(0.01)
    assert clock.seconds() == 10.0


def test_the_stopwatch_adds_its_blocks():
    watch = Stopwatch(Runtime(CPU), 1.0)
    for pause in (0.03, 0.01):
        with watch:
            time.sleep(pause)
    assert 1.04 <= watch.seconds() < 1.08
    assert 0.01 <= watch.latest() < 0.03
