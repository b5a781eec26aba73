"""Solvers by name, on an equation whose solution is known."""

import math

import pytest
import torch

from noprop_dist.config import InferenceCard, UserError
from noprop_dist.method.solve import integrate

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "auto": 2}


def error(solver, steps, **settings):
    """Of dz/dt = z·cos t from 0 to 1, whose solution is e^{sin t}."""
    card = InferenceCard(solver=solver, **settings)
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    end = integrate(lambda time, z: z * torch.cos(time), torch.ones(2, 1, dtype=torch.float64), grid, card)
    return (end - math.exp(math.sin(1))).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    coarse, fine = error(solver, 32), error(solver, 64)
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_solvers_of_the_same_order_are_not_the_same_solver():
    assert error("heun", 16) != pytest.approx(error("midpoint", 16), rel=0.01)


def test_dopri5_keeps_to_its_tolerance_and_to_the_interval():
    errors = [error("dopri5", 1, tolerance=tolerance) for tolerance in (1e-2, 1e-4, 1e-6)]
    assert errors[0] < 1e-1
    assert errors[1] < 1e-3
    assert errors[2] < 1e-5
    times = []

    def velocity(time, z):
        times.append(float(time))
        return z * torch.cos(time)

    grid = torch.tensor([0.25, 0.5], dtype=torch.float64)
    integrate(velocity, torch.ones(2, 1), grid, InferenceCard(solver="dopri5"))
    assert 0.25 <= min(times) < max(times) <= 0.5 + 1e-6


def test_a_fixed_step_solver_steps_on_the_grid_it_is_given():
    times = []

    def velocity(time, z):
        times.append(float(time))
        return z

    grid = torch.tensor([0.5, 0.6, 0.9, 1.0], dtype=torch.float64)
    integrate(velocity, torch.ones(2, 1), grid, InferenceCard(solver="euler"))
    assert times == pytest.approx([0.5, 0.6, 0.9])


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_a_block_that_says_nan_ends_in_nan_not_in_a_traceback(solver):
    grid = torch.linspace(0, 1, 5, dtype=torch.float64)
    end = integrate(lambda time, z: z * torch.nan, torch.ones(2, 1), grid, InferenceCard(solver=solver))
    assert end.shape == (2, 1) and end.isnan().all()


def test_a_velocity_too_wild_for_the_tolerance_is_told_in_one_line():
    def wild(time, z):
        return 0 * z + 1 / (0.5 - time).abs().clamp(min=1e-30) ** 2

    with pytest.raises(UserError, match=r"^inference\.tolerance: dopri5 cannot keep to 0\.001 .* another inference\.solver$"):
        integrate(wild, torch.ones(2, 1), torch.tensor([0.0, 1.0], dtype=torch.float64), InferenceCard(solver="dopri5"))
