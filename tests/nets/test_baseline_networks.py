"""The baselines' networks: what each computes, and where its gradients go."""

import sys

import pytest
import torch
import torchdiffeq

from noprop_dist.config import Card, UserError
from noprop_dist.nets import baselines
from noprop_dist.nets.block import Block
from noprop_dist.nets.build import build_network
from noprop_dist.nets.cost import block_cost

SHAPE, CLASSES = (3, 8, 6), 4
NAMES = sorted(baselines.BASELINES)


def network(name, **sections):
    torch.manual_seed(0)
    model = {"backbone": "small-cnn", "embedding": "learned", **sections.pop("model", {})}
    model |= {"embedding_dim": 5} if model["embedding"] == "learned" else {}
    card = Card.model_validate({"method": {"name": name, **sections.pop("method", {})}, "model": model, **sections})
    return build_network(card, SHAPE, CLASSES)


@pytest.fixture
def batch():
    """Images, z_0 and W."""
    torch.manual_seed(1)
    return torch.randn(9, *SHAPE), torch.randn(9, 5), torch.randn(CLASSES, 5, requires_grad=True)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_blocks_interface_and_gradients_everywhere(name, batch):
    x, z, w = batch
    net = network(name).train()
    features = net.encode(x)
    assert (features.ndim, len(features), net.gamma) == (2, 9, None)
    output = net.denoise(z, features, w)
    assert (output.shape, output.dtype) == (z.shape, torch.float32)
    output.square().sum().backward()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert (w.grad is not None) is (name in ("backprop", "adjoint"))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_deterministic_and_row_by_row(name, batch):
    x, z, w = batch
    net = network(name).eval()
    with torch.no_grad():
        whole = net.denoise(z, net.encode(x), w)
        torch.testing.assert_close(net.denoise(z[2:4], net.encode(x[2:4]), w), whole[2:4])
        reads_z = not torch.equal(net.denoise(-z, net.encode(x), w), whole)
    assert reads_z is (name in ("backprop", "adjoint"))


def test_backprop_chains_the_papers_blocks_as_eqs_17_to_19_say(batch):
    x, z, w = batch
    net = network("backprop", model={"blocks": 3}).eval()
    with torch.no_grad():
        net.w.copy_(torch.tensor([0.3, -0.2, 1.5]))
        expected = z
        for t in (1, 2, 3):
            alpha = torch.tanh(net.w[t - 1])
            block = net.blocks[t - 1]
            expected = (1 - alpha) * expected + alpha * block.denoise(expected, block.encode(x), w)
        torch.testing.assert_close(net.denoise(z, net.encode(x), w), expected)
    torch.manual_seed(0)
    alike = Block(
        Card.model_validate({"model": {"backbone": "small-cnn", "embedding": "learned", "embedding_dim": 5}}), SHAPE, 4
    )
    assert {key: p.shape for key, p in net.blocks[0].named_parameters()} == {k: p.shape for k, p in alike.named_parameters()}


def test_backprop_starts_as_the_mean_of_z_0_and_all_estimates(batch, monkeypatch):
    _, z, w = batch
    net = network("backprop", model={"blocks": 4})
    estimates = torch.randn(4, 9, 5)
    for block, estimate in zip(net.blocks, estimates, strict=True):
        monkeypatch.setattr(block, "denoise", lambda z, features, embedding, estimate=estimate: estimate)
    mean = (z + estimates.sum(dim=0)) / 5
    torch.testing.assert_close(net.denoise(z, torch.zeros(9, 4 * 128), w).detach(), mean)


def test_adjoint_integrates_a_block_from_0_to_1(batch):
    """Heun's steps, written out."""
    x, z, w = batch
    net = network("adjoint", method={"ode_steps": 3}).eval()
    with torch.no_grad():
        features, expected = net.encode(x), z
        for step in range(3):
            now, then = (torch.full((9,), (step + shift) / 3) for shift in (0, 1))
            first = Block.denoise(net, expected, features, w, now)
            second = Block.denoise(net, expected + first / 3, features, w, then)
            expected = expected + (first + second) / 6
        torch.testing.assert_close(net.denoise(z, features, w), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adjoint_gradients_are_those_of_plain_back_propagation(batch, monkeypatch, precision):
    """For the layers of v, for the encoder, which is no part of the ODE, for W and for z_0."""
    x, z, w = batch
    z.requires_grad_()
    net = network("adjoint", model={"dropout": 0.0}, method={"ode_steps": 40}).train()

    def gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = net.denoise(z, net.encode(x), w)
        inputs = dict(net.named_parameters()) | {"W": w, "z": z}
        return dict(zip(inputs, torch.autograd.grad(output.square().sum(), list(inputs.values())), strict=True))

    found = gradients()
    monkeypatch.setattr(
        torchdiffeq, "odeint_adjoint", lambda *args, adjoint_params, **options: torchdiffeq.odeint(*args, **options)
    )
    for name, expected in gradients().items():
        assert (found[name] - expected).norm() < 0.01 * expected.norm(), name


def test_adjoints_velocity_is_one_function_where_z_is_an_image():
    net = network("adjoint", model={"embedding": "prototype", "dropout": 0.9}).train()
    z, features, w, time = torch.randn(5, 144), torch.randn(5, 128), torch.randn(CLASSES, 144), torch.rand(5)
    assert torch.equal(net.velocity(z, features, w, time), net.velocity(z, features, w, time))
    assert not torch.equal(net.encode(torch.ones(5, *SHAPE))[:1], net.encode(torch.ones(5, *SHAPE))[:1]), "the encoder drops"


def test_liquid_reads_rows_from_the_top_and_forgets_none(batch, monkeypatch):
    x = batch[0]
    net = network("liquid").eval()
    seen, forward = [], net.path.rnn_cell.forward
    monkeypatch.setattr(net.path.rnn_cell, "forward", lambda row, *rest: seen.append(row) or forward(row, *rest))
    state = net.encode(x)
    assert len(seen) == 8
    for row, given in enumerate(list(seen)):
        assert torch.equal(given, torch.cat([x[:, channel, row] for channel in range(3)], dim=1))
    assert torch.equal(net.encode(x.to(memory_format=torch.channels_last)), state)
    for row in (0, 7):
        other = x.clone()
        other[:, :, row] += 1
        assert not torch.isclose(net.encode(other), state).all(), row


def test_liquid_without_ncps_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ncps.torch", None)
    with pytest.raises(UserError, match=r"method.name: liquid needs ncps; pip install 'noprop_dist\[baselines\]'"):
        network("liquid")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_is_costed_without_running(name, precision):
    card = Card.model_validate(
        {"method": {"name": name}, "model": {"backbone": "small-cnn"}, "train": {"precision": precision}}
    )
    state = torch.get_rng_state()
    cost = block_cost(card, SHAPE, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    assert cost.parameters == sum(p.numel() for p in build_network(card, SHAPE, CLASSES).parameters())
    assert min(cost.flops, cost.activations) > 1e6


def test_adjoints_cost_counts_every_call():
    from torch.utils.flop_counter import FlopCounterMode

    def counted(steps):
        card = Card.model_validate({"method": {"name": "adjoint", "ode_steps": steps}, "model": {"backbone": "small-cnn"}})
        return block_cost(card, SHAPE, CLASSES).flops

    card = Card.model_validate({"method": {"name": "adjoint"}, "model": {"backbone": "small-cnn"}})
    net = build_network(card, SHAPE, CLASSES)
    with FlopCounterMode(display=False) as counter:  # one call forward; with its gradients a call costs three times that
        net.velocity(torch.randn(128, 4), torch.randn(128, 128), torch.eye(4), torch.rand(128))
    assert counted(7) - counted(2) == 5 * 2 * 4 * counter.get_total_flops()
