"""optim/metrize.py: every parameter exactly once, or an error that names it."""

import pytest
import torch
from torch import nn

from optim import CoverageError, Frobenius, Module, RMSToRMS, VectorRMS, atom, metrize


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def structure(self) -> Module:
        return atom("b.weight", RMSToRMS(), role="out") @ atom("a.weight", RMSToRMS(), mass=3, role="in")


def test_every_parameter_gets_its_norm_and_the_receipt_shows_it():
    norm = metrize(Two())
    assert norm.receipt() == (
        "parameter  shape  role  norm                     mass  radius\n"
        "a.weight   4×3    in    RMSToRMS[polar_express]  3     0.75\n"
        "b.weight   2×4    out   RMSToRMS[polar_express]  1     0.25\n"
    )


def test_wrappers_do_not_change_names():
    assert metrize(torch.compile(Two())).radii == metrize(Two()).radii  # type: ignore[arg-type]
    wrapped = nn.Module()
    wrapped.module = Two()
    assert metrize(wrapped, Two().structure()).radii == metrize(Two()).radii


def test_frozen_parameters_need_no_place():
    model = Two()
    model.a.weight.requires_grad_(False)
    assert list(metrize(model).norms) == ["b.weight"]


def test_a_parameter_without_a_place_is_an_error_that_names_it():
    model = Two()
    model.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(CoverageError, match=r"^extra \(2,\) has no place in the modular structure"):
        metrize(model)


def test_a_place_without_a_parameter_is_an_error_with_the_nearest_name():
    with pytest.raises(CoverageError, match=r"names 'a.weigth', which the model does not have \(nearest: 'a.weight'\)"):
        metrize(Two(), atom("a.weigth", Frobenius()) @ Two().structure())


def test_tied_weights_are_refused_by_storage():
    model = nn.Module()
    model.a, model.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model.b.weight = model.a.weight
    with pytest.raises(CoverageError, match=r"^b.weight shares its storage with a.weight"):
        metrize(model, Two().structure())


def test_a_norm_of_other_dimensions_is_refused():
    model = nn.Module()
    model.a = nn.Linear(3, 4, bias=False)
    with pytest.raises(CoverageError, match=r"a.weight: got shape \(4, 3\); allowed by VectorRMS: 1 dimensions"):
        metrize(model, atom("a.weight", VectorRMS()))


def test_two_parameters_of_one_name_are_refused():
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, 2))
    model.module = nn.Module()
    model.module.weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(CoverageError, match="two parameters are named 'weight'"):
        metrize(model, atom("weight", Frobenius()))


def test_an_empty_parameter_is_refused():
    model = nn.Module()
    model.a = nn.Parameter(torch.ones(0, 3))
    with pytest.raises(CoverageError, match=r"a: got shape \(0, 3\); allowed by Frobenius: 2 dimensions, none of them 0"):
        metrize(model, atom("a", Frobenius()))


def test_a_model_without_structure_is_told_what_to_pass():
    with pytest.raises(CoverageError, match=r"Linear declares no modular structure(.|\n)*fix: metrize\(model, structure=tree\)"):
        metrize(nn.Linear(2, 2))
