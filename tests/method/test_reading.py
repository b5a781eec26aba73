"""What z and û tell of the class."""

import math

import pytest
import torch
from torch.distributions import Normal

from noprop_dist import Card
from noprop_dist.method import make_method
from noprop_dist.method.base import Level
from noprop_dist.method.reading import class_posterior, mixture


def test_the_posterior_is_bayes_rule_on_the_densities_themselves():
    torch.manual_seed(0)
    embedding, z = torch.randn(5, 7), torch.randn(3, 4, 7)
    level = Level(0.6, 0.3)
    densities = Normal(level.signal * embedding, math.sqrt(level.variance)).log_prob(z[:, :, None]).sum(dim=-1)
    torch.testing.assert_close(class_posterior(z, embedding, level), densities.softmax(dim=-1), atol=1e-5, rtol=1e-5)


def test_z_of_zero_tells_nothing_of_one_hot_classes_and_z_without_noise_everything():
    embedding = torch.eye(4)
    assert class_posterior(torch.zeros(4), embedding, Level(0.1, 0.9)).allclose(torch.full((4,), 0.25))
    assert class_posterior(embedding, embedding, Level(1.0, 0.0)).equal(embedding)


@pytest.mark.parametrize(
    "method", [{"name": "dt", "schedule": "linear"}, {"name": "ct"}, {"name": "fm", "sigma": 0.5, "label_noise": 0.0}]
)
def test_the_posterior_is_right_as_often_as_it_says_on_z_that_training_makes(method):
    """Its mean confidence is its accuracy: so the level is that of the forward process, of every method."""
    torch.manual_seed(0)
    card = Card.model_validate({"method": method, "model": {"blocks": 4}})
    labels, embedding = torch.arange(40_000) % 10, torch.eye(10)
    u = embedding[labels]
    rule = make_method(card)
    for index in (1, 2, 3):
        draw = rule.draw(index, u, u)
        if draw.time is None:
            told = class_posterior(draw.z, embedding, rule.level(index / 4))
        else:
            rows = zip(draw.z[:4000], draw.time[:4000].tolist(), strict=True)
            told = torch.stack([class_posterior(z, embedding, rule.level(time)) for z, time in rows])
        right = (told.argmax(dim=1) == labels[: len(told)]).float().mean()
        assert right > 0.15 and float(right) == pytest.approx(float(told.max(dim=1).values.mean()), abs=0.02), index


@pytest.mark.parametrize("shape", [(10, 10), (10, 20), (6, 300)])
def test_a_mixtures_weights_are_found_again(shape):
    torch.manual_seed(0)
    embedding = torch.eye(10) if shape == (10, 10) else torch.randn(shape)
    weights = torch.randn(2, 8, shape[0]).mul(3).softmax(dim=-1)
    torch.testing.assert_close(mixture(weights @ embedding, embedding), weights, atol=2e-3, rtol=0)


def test_with_more_classes_than_dimensions_a_mixture_still_makes_the_estimate():
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(50, 8))
    estimate = torch.randn(5, 50).mul(4).softmax(dim=-1) @ embedding
    weights = mixture(estimate, embedding)
    assert (weights >= 0).all() and weights.sum(dim=-1).allclose(torch.ones(5))
    torch.testing.assert_close(weights @ embedding, estimate, atol=2e-2, rtol=0)
    assert mixture(embedding, embedding).argmax(dim=1).equal(torch.arange(50))


def test_what_is_no_mixture_gives_the_nearest_one():
    assert mixture(torch.tensor([3.0, -1.0]), torch.eye(2)).allclose(torch.tensor([1.0, 0.0]))
    assert mixture(torch.empty(2, 0, 4), torch.eye(4)).shape == (2, 0, 4)
