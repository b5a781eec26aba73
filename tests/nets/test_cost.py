import pytest
import torch

from noprop_dist.config import Card
from noprop_dist.nets.backbones import BACKBONES
from noprop_dist.nets.build import build_network
from noprop_dist.nets.cost import block_cost

MNIST = (1, 28, 28)


def card(**sections):
    return Card.model_validate(sections)


@pytest.mark.parametrize(
    ("shape", "classes", "backbone"),
    [(MNIST, 10, "paper-cnn"), ((3, 32, 32), 100, "paper-cnn"), ((3, 20, 20), 7, "auto")]
    + [((1, 14, 14), 10, name) for name in BACKBONES],
)
def test_parameters_are_those_of_the_real_block(shape, classes, backbone):
    chosen = card(model={"backbone": backbone})
    block = build_network(chosen, shape, classes)
    expected = sum(parameter.numel() for parameter in block.parameters())
    assert block_cost(chosen, shape, classes).parameters == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_of_a_paper_block_agree_with_a_count_by_hand(precision):
    batch = 128
    first_conv = 26 * 26 * 32 * 9
    convolutions = 11 * 11 * 64 * 32 * 9 + 9 * 9 * 128 * 64 * 9
    first_label = 10 * 256
    linear = 2048 * 256 + 2 * 256 * 256 + 512 * 256 + 256 * 128 + 128 * 10
    # forward once; backward twice, but nothing flows back into the image and into z
    expected = 2 * batch * (3 * (convolutions + linear) + 2 * (first_conv + first_label))
    cost = block_cost(card(data={"batch_size": batch}, train={"precision": precision}), MNIST, 10)
    assert cost.flops == pytest.approx(expected, rel=0.02)


def test_flops_and_activations_grow_with_the_batch_and_weights_do_not():
    small, large = (block_cost(card(data={"batch_size": size}), MNIST, 10) for size in (32, 128))
    assert large.flops == 4 * small.flops
    assert large.activations == pytest.approx(4 * small.activations, rel=0.01)
    assert (large.parameters, large.state) == (small.parameters, small.state)


@pytest.mark.parametrize(
    ("optim", "copies"),
    [
        ({"name": "adamw"}, 3),
        ({"name": "adam"}, 3),
        ({"name": "adamw", "ema": 0.9}, 4),
        ({"name": "sgd"}, 2),
        ({"name": "sgd", "momentum": 0}, 1),
    ],
)
def test_state_counts_weights_optimizer_and_moving_average(optim, copies):
    cost = block_cost(card(optim=optim), MNIST, 10)
    assert cost.state == copies * cost.gradients == 4 * copies * cost.parameters


def test_activations_hold_at_least_what_the_convolutions_need():
    at_least = 128 * 4 * (32 * 26 * 26 + 64 * 11 * 11 + 128 * 9 * 9)  # float32 outputs of the three convolutions
    assert at_least < block_cost(card(), MNIST, 10).activations < 6 * at_least


def test_counting_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    block_cost(card(), (1, 8, 8), 10)
    assert torch.rand(4).equal(expected)


@pytest.mark.parametrize("method", ["ct", "fm"])
def test_a_block_with_time_is_counted_too(method):
    cost = block_cost(card(method={"name": method}), (1, 8, 8), 10)
    assert cost.parameters == sum(p.numel() for p in build_network(card(method={"name": method}), (1, 8, 8), 10).parameters())
    assert cost.flops > 0


def test_flops_of_a_resnet_block_are_the_published_ones():
    """ResNet-18 takes 1.8 billion multiply-adds for a 224×224 image; a step three times that, but for the first layer's."""
    cost = block_cost(card(data={"batch_size": 2}, model={"backbone": "resnet18"}), (3, 224, 224), 10)
    assert cost.flops == pytest.approx(2 * 2 * 3 * 1.814e9, rel=0.04)
