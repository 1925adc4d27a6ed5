"""studies/tuning.py: what --tune says, and that every entry gets as many trials."""

import numpy as np
import pytest
from studies import tuning
from studies.runs import StudyError
from studies.tuning import parse, trials, trials_by_entry
from training.config import ConfigError

ENTRIES = ("adamw", "ours")


def test_a_logarithmic_range_is_evenly_spaced_with_both_ends():
    points = [t["optim.lr"] for t in trials([parse("optim.lr=log(0.01,1,8)", ENTRIES)], None)]
    assert len(points) == 8 and (points[0], points[-1]) == (0.01, 1.0)
    assert np.diff(np.log(points)) == pytest.approx(np.full(7, np.log(100) / 7), rel=1e-3), "four digits are kept"
    assert all(float(f"{p:.4g}") == p for p in points)


def test_linear_ranges_whole_numbers_and_choices_have_the_types_of_their_keys():
    assert [t["optim.beta"] for t in trials([parse("optim.beta=lin(0.9,0.98,3)", ENTRIES)], None)] == [0.9, 0.94, 0.98]
    found = [t["optim.refresh_every"] for t in trials([parse("optim.refresh-every=lin(0,25,3)", ENTRIES)], None)]
    assert found == [0, 12, 25] and all(isinstance(w, int) for w in found)
    made = parse("optim.max-grad-norm={None,1,2.5}", ENTRIES)
    assert (made.key, made.values) == ("optim.max_grad_norm", (None, 1.0, 2.5))
    assert parse("ours:optim.direction={momentum, soap}", ENTRIES).values == ("momentum", "soap")


def test_an_entrys_own_range_replaces_the_one_for_all():
    ranges = [
        parse(t, ENTRIES) for t in ("adamw:optim.lr=log(1e-4,1e-1,4)", "optim.lr=log(1,8,4)", "optim.beta={0.9,0.95}")
    ]
    assert [(r.key, r.values[0]) for r in tuning.ranges_of("adamw", ranges)] == [
        ("optim.lr", 1e-4),
        ("optim.beta", 0.9),
    ]
    assert [(r.key, r.values[0]) for r in tuning.ranges_of("ours", ranges)] == [("optim.lr", 1.0), ("optim.beta", 0.9)]


def test_several_keys_are_tried_at_places_of_a_sobol_sequence():
    """16 of it: each quarter of each key's range has 4, which is what such points are for; the same places for every
    entry, and in every call.
    """
    texts = ("adamw:optim.lr=log(1,16,9)", "ours:optim.lr=log(10,160,9)", "optim.beta2=lin(0,0.8,9)")
    made = trials_by_entry([parse(t, ENTRIES) for t in texts], ENTRIES, 16)
    assert made == trials_by_entry([parse(t, ENTRIES) for t in texts], ENTRIES, 16)
    ours, theirs = made["ours"], made["adamw"]
    assert len(ours) == len(theirs) == 16
    assert [t["optim.lr"] for t in ours] == pytest.approx([10 * t["optim.lr"] for t in theirs], rel=1e-3)
    for places in (np.log2([t["optim.lr"] / 10 for t in ours]) / 4, np.array([t["optim.beta2"] for t in ours]) / 0.8):
        assert np.histogram(places, bins=4, range=(0, 1))[0].tolist() == [4, 4, 4, 4]
    assert len(trials_by_entry([parse(t, ENTRIES) for t in texts], ENTRIES, 10)["ours"]) == 10, (
        "not a power of two either"
    )


def test_trials_of_choices_differ_or_are_refused():
    """Points of the sequence fall on the same of 2 · 3 choices: it is drawn on until 6 differ, and 7 there are not."""
    ranges = [parse(t, ENTRIES) for t in ("optim.direction={momentum,soap}", "optim.beta={0.8,0.9,0.95}")]
    for count in range(1, 7):
        made = trials(ranges, count)
        assert len({tuple(t.items()) for t in made}) == len(made) == count
    with pytest.raises(StudyError) as error:
        trials(ranges, 7)
    assert (
        "--trials\n  got: 7 of optim.direction, optim.beta\n  allowed: 6, as many as differ\n  fix: --trials 6"
        in str(error.value)
    )


def test_every_entry_gets_as_many_trials():
    of = lambda *texts, count=None: trials_by_entry([parse(t, ENTRIES) for t in texts], ENTRIES, count)  # noqa: E731
    assert [len(t) for t in of("optim.lr=log(1,2,3)").values()] == [3, 3]
    assert [len(t) for t in of("ours:optim.lr=log(1,2,3)").values()] == [0, 3], (
        "one that is not tuned is told of elsewhere"
    )
    for texts, count, got in (
        (("ours:optim.lr=log(1,2,3)", "adamw:optim.lr=log(1,2,4)"), None, "4 trials of adamw, 3 trials of ours\n"),
        (
            ("ours:optim.lr=log(1,2,3)", "adamw:optim.lr=log(1,2,3)"),
            5,
            "3 trials of adamw, 3 trials of ours, --trials 5\n",
        ),
        (("optim.lr=log(1,2,3)", "ours:optim.beta={0.8,0.9}"), 8, "3 trials of adamw, 8 trials of ours, --trials 8\n"),
    ):
        with pytest.raises(StudyError) as error:
            of(*texts, count=count)
        assert f"--tune, --trials\n  got: {got}  allowed: as many for every entry" in str(error.value)
    with pytest.raises(
        StudyError,
        match="--trials\n  got: none, with 2 keys to tune\n  allowed: how many trials every entry gets\n  fix: ",
    ):
        of("optim.lr=log(1,2,3)", "optim.beta={0.8,0.9}")


@pytest.mark.parametrize(
    "text",
    [
        "optim.lr",
        "optim.lr=log(1,2)",
        "optim.lr=log(0,1,3)",
        "optim.lr=lin(2,1,3)",
        "optim.lr=log(1,2,1)",
        "optim.lr=log(1,inf,3)",
        "optim.lr=lin(1,inf,3)",
        "optim.lr=lin(-inf,1,3)",
        "optim.lr=log(1,2,x)",
        "optim.lr={1}",
        "optim.lr={1,1}",
        "optim.lr=pow(1,2,3)",
        "optim.lr=log(1,2,3) ",
    ],
)
def test_what_is_no_range_is_refused(text: str):
    with pytest.raises(StudyError) as error:
        parse(text, ENTRIES)
    assert f"--tune\n  got: {text!r}\n  allowed: [ENTRY:]section.key=log(a,b,n)" in str(error.value)


def test_ranges_of_what_is_not_there_or_may_not_differ_are_refused():
    for text, kind, message in (
        ("optim.lrr=log(1,2,3)", ConfigError, "unknown option --optim.lrr"),
        ("optim.beta={a,b}", ConfigError, "--optim.beta\n  got: 'a'"),
        ("sgd:optim.lr=log(1,2,3)", StudyError, "got: sgd\n  allowed: adamw, ours, the entries"),
        (
            "train.batch_size={8,16}",
            StudyError,
            "got: train.batch_size\n  allowed: optim.…, schedule.…, baseline.… and model.… but block_size",
        ),
        ("model.block_size={8,16}", StudyError, "got: model.block_size"),
        ("optim.refresh_every=lin(0,2,5)", StudyError, "got: [0, 0, 1, 2, 2]\n  allowed: 5 values that differ"),
    ):
        with pytest.raises(kind) as error:
            parse(text, ENTRIES)
        assert message in str(error.value), text


@pytest.mark.parametrize("text", ["optim.lr=log(1,8,4)", "optim.lr={4,1,8,2}"])
def test_the_edge_of_a_range_is_its_lowest_and_highest_trial(text: str):
    tried = [1.0, 2.0, 4.0, 8.0]
    assert [parse(text, ENTRIES).at_edge(v, tried) for v in tried] == [True, False, False, True]


@pytest.mark.parametrize(
    "text", ["optim.direction={momentum,soap}", "optim.cautious={True,False}", "optim.max-grad-norm={None,1}"]
)
def test_choices_that_are_not_numbers_have_no_edge(text: str):
    made = parse(text, ENTRIES)
    assert not any(made.at_edge(v, made.values) for v in made.values)
