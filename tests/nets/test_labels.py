"""Class embeddings and heads."""

import math

import pytest
import torch

from noprop_dist.config import ModelCard
from noprop_dist.nets.labels import LabelSpace, embedding_size, nearest, squared_distances

SHAPE, CLASSES = (1, 4, 4), 5


def space(classes=CLASSES, prototypes=None, **model):
    torch.manual_seed(0)
    return LabelSpace(ModelCard(**model), SHAPE, classes, prototypes)


@pytest.mark.parametrize(("kind", "size"), [("one-hot", 5), ("learned", 20), ("prototype", 16)])
def test_an_embedding_has_the_size_of_its_kind(kind, size):
    assert embedding_size(ModelCard(embedding=kind), SHAPE, CLASSES) == size
    assert space(embedding=kind).embedding.shape == (CLASSES, size)


def test_one_hot_embeddings_are_the_identity_and_fixed():
    fixed = space()
    assert fixed.embedding.equal(torch.eye(CLASSES))
    assert not fixed.learned
    assert {name for name, _ in fixed.named_parameters()} == {"head.weight", "head.bias"}


def test_learned_embeddings_start_orthogonal_where_they_can():
    rows = space(embedding="learned", embedding_dim=7).embedding.detach()
    torch.testing.assert_close(rows @ rows.T, torch.eye(CLASSES), atol=1e-5, rtol=0)
    many = space(classes=100, embedding="learned", embedding_dim=7).embedding.detach()
    assert many.norm(dim=1).mean().item() == pytest.approx(1, abs=0.2)
    assert space(embedding="learned").learned


def test_prototypes_are_the_rows_to_start_from_and_learn():
    rows = torch.randn(CLASSES, 16)
    prototypes = space(embedding="prototype", prototypes=rows)
    assert prototypes.embedding.equal(rows)
    assert prototypes.learned
    assert prototypes.embedding.data_ptr() != rows.data_ptr()


@pytest.mark.parametrize("kind", ["one-hot", "learned", "prototype"])
def test_a_linear_head_starts_as_the_nearest_embedding_classifier(kind):
    labels = space(embedding=kind, prototypes=torch.randn(CLASSES, 16))
    z = torch.randn(200, labels.embedding.shape[1])
    assert labels(z).argmax(dim=1).equal(nearest(z, labels.embedding))


def test_a_radial_head_is_eqs_15_and_16():
    """ỹ = softmax(linear(z))·W; logits_c = −‖ỹ−u_c‖²/(2σ²), written out."""
    labels = space(embedding="learned", embedding_dim=3, head="radial", head_sigma=0.7)
    z = torch.randn(4, 3)
    logits = labels(z).detach()
    labels.requires_grad_(False)
    for row in range(4):
        scores = [
            sum(float(labels.head.weight[c, i]) * float(z[row, i]) for i in range(3)) + float(labels.head.bias[c])
            for c in range(CLASSES)
        ]
        total = sum(math.exp(score) for score in scores)
        point = [sum(math.exp(scores[c]) / total * float(labels.embedding[c, i]) for c in range(CLASSES)) for i in range(3)]
        for c in range(CLASSES):
            distance = sum((point[i] - float(labels.embedding[c, i])) ** 2 for i in range(3))
            assert logits[row, c].item() == pytest.approx(-distance / (2 * 0.7**2), abs=1e-5)


def test_an_mlp_head_is_no_linear_map():
    labels = space(head="mlp")
    z = torch.randn(4, CLASSES)
    zero = labels(torch.zeros(4, CLASSES))
    assert not (labels(2 * z) - zero).isclose(2 * (labels(z) - zero)).all()


@pytest.mark.parametrize("head", ["linear", "radial", "mlp"])
def test_every_head_takes_paths_of_any_number_of_rows(head):
    labels = space(head=head)
    paths = torch.randn(3, 6, CLASSES)
    assert labels(paths).shape == (3, 6, CLASSES)
    torch.testing.assert_close(labels(paths)[1], labels(paths[1]))


def test_every_head_learns_to_tell_the_embeddings_apart():
    torch.manual_seed(0)
    for head in ("linear", "radial", "mlp"):
        labels = space(head=head, head_sigma=0.3)
        optimizer = torch.optim.Adam(labels.parameters(), lr=0.02)
        y = torch.arange(CLASSES).repeat(20)
        for _ in range(60):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(labels(labels.embedding[y] + 0.1 * torch.randn(100, CLASSES)), y)
            loss.backward()
            optimizer.step()
        assert loss < 0.2, head


def test_distances_and_the_nearest_row():
    points, rows = torch.randn(4, 3), torch.randn(CLASSES, 3)
    torch.testing.assert_close(squared_distances(points, rows), torch.cdist(points, rows).square())
    assert nearest(rows + 1e-3, rows).tolist() == list(range(CLASSES))


def test_the_spread_is_the_smallest_distance_of_two_rows():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 3.0]])
    labels = space(classes=3, embedding="learned", embedding_dim=2)
    with torch.no_grad():
        labels.embedding.copy_(rows)
    assert labels.spread() == pytest.approx(1)
