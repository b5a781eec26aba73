"""What a step teaches, against the paper's algorithms written out as plain loops over the whole network."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from noprop_dist import train
from noprop_dist.data import Pixels, open_data, train_indices
from noprop_dist.learning import Local
from noprop_dist.model import fresh_block, fresh_labels
from noprop_dist.nets.labels import LabelSpace
from noprop_dist.seeding import derive

CPU, STEPS = torch.device("cpu"), 3


def batches(card, info):
    images, labels = open_data(card.data).train.load()
    pixels = Pixels(card.data, info)
    for step in range(STEPS):
        rows = train_indices(card.run.seed, step, size=len(labels), batch_size=card.data.batch_size)
        yield step, pixels.normalise(images[rows]), labels[rows]


def literal(card, loss_of):
    """Algorithm 2 or 3 with one block: draw, loss, optimizer step; the block's and the label space's weights at the end."""
    info = open_data(card.data).info
    block, labels = fresh_block(card, info, 0, CPU).train(), fresh_labels(card, info, CPU)
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3, weight_decay=1e-3) for part in (block, labels)]
    for step, x, y in batches(card, info):
        torch.manual_seed(derive(card.run.seed, "block", 0, step))
        optimizers[0].zero_grad()
        loss_of(block, labels, x, y).backward()
        optimizers[0].step()
        torch.manual_seed(derive(card.run.seed, "labels", step))
        optimizers[1].zero_grad()
        u = labels.embedding[y]
        last = 0.99 if card.method.name == "ct" else 1.0
        cross_entropy(labels(math.sqrt(last) * u + math.sqrt(1 - last) * torch.randn_like(u)), y).backward()
        optimizers[1].step()
    return block, labels


def ct_loss(block, labels, x, y):
    """½·η·E_t[SNR′(t)·‖û(z_t,x,t)−u_y‖²], row by row."""
    t, noise = torch.rand(len(y)), torch.randn(len(y), 10)
    first, last = math.asin(math.sqrt(1e-3)), math.asin(math.sqrt(0.99))
    angle = first + (last - first) * t.double()
    alpha_bar = angle.sin().square()
    slope = 2 * angle.tan() / angle.cos().square() * (last - first)  # of SNR = tan²
    z = (alpha_bar.sqrt()[:, None] * torch.eye(10)[y] + (1 - alpha_bar).sqrt()[:, None] * noise).float()
    estimate = block.denoise(z, block.encode(x), torch.eye(10), t)
    return sum(slope[row] * (estimate[row] - torch.eye(10)[y[row]]).square().sum() for row in range(len(y))) / len(y) / 2


def fm_loss(block, labels, x, y):
    """‖v(z_t,x,t) − (z_1−z_0)‖², row by row."""
    t, z_0 = torch.rand(len(y)), torch.randn(len(y), 10)
    z_1 = torch.eye(10)[y]
    z = torch.stack([t[row] * z_1[row] + (1 - t[row]) * z_0[row] for row in range(len(y))])
    velocity = block.denoise(z, block.encode(x), torch.eye(10), t)
    return sum((velocity[row] - (z_1[row] - z_0[row])).square().sum() for row in range(len(y))) / len(y)


@pytest.mark.parametrize(("name", "loss_of"), [("ct", ct_loss), ("fm", fm_loss)])
def test_one_block_is_trained_by_the_papers_algorithm(name, loss_of, small_card):
    card = small_card(
        method={"name": name, "label_noise": 0.0} | ({"eta": 1.0} if name == "ct" else {}),
        model={"blocks": 1, "dropout": 0.0},
        optim={"name": "adam"},
        data={"augment": "none"},
        train={"steps": STEPS, "channels_last": False},
        inference={"steps": 4},
    )
    model = train(card).model
    block, labels = literal(card, loss_of)
    for trained, expected in ((model.blocks[0], block), (model.labels, labels)):
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(trained.state_dict()[key], value, atol=2e-5, rtol=1e-3, msg=key)


def test_wrong_labels_are_wrong_and_as_frequent_as_asked(small_card):
    card = small_card(method={"label_noise": 0.3})
    lesson = Local(card, {}, None, LabelSpace(card.model, (1, 8, 8), 10))
    y = torch.arange(20_000) % 10
    torch.manual_seed(0)
    seen = lesson._mislabel(y)
    changed = seen != y
    assert changed.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20_000))
    offsets = ((seen - y) % 10)[changed].bincount(minlength=10)
    assert offsets[0] == 0
    assert (offsets[1:] / changed.sum()).tolist() == pytest.approx([1 / 9] * 9, abs=0.02)
    quiet = Local(small_card(method={"label_noise": 0.0}), {}, None, LabelSpace(card.model, (1, 8, 8), 10))
    assert quiet._mislabel(y) is y


def test_learned_embeddings_keep_apart_and_their_spread_is_logged(small_card):
    """At a learning rate that lets rows collapse within these steps, were they drawn to each other."""
    learned = {"embedding": "learned", "embedding_dim": 12, "embedding_lag": 1}
    card = small_card(model=learned, train={"steps": 200, "eval_every": 0, "checkpoint_every": 0}, optim={"lr": 0.02})
    model = train(card).model
    assert model.labels.spread() > 1
    expected = min(
        math.dist(a, b) for i, a in enumerate(model.labels.embedding.tolist()) for b in model.labels.embedding.tolist()[:i]
    )
    assert model.labels.spread() == pytest.approx(expected, rel=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(card.run.dir / "run" / "tensorboard")).Reload()
    logged = events.Scalars("smallest distance between embeddings")
    assert logged[-1].step == 200
    assert logged[-1].value == pytest.approx(expected, rel=1e-4)
