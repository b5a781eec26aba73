import pytest
import torch

from noprop_dist.config import ModelCard
from noprop_dist.nets.block import Block, build_block
from noprop_dist.nets.labels import LabelSpace, nearest

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "classes", "expected"), [(MNIST, 10, 919_946), (CIFAR, 10, 1_215_434), (CIFAR, 100, 1_250_084)]
)
def test_a_block_has_exactly_the_papers_parameters(shape, classes, expected):
    with torch.device("meta"):
        block = build_block(ModelCard(backbone="paper-cnn"), shape, dim=classes, classes=classes)
    assert sum(parameter.numel() for parameter in block.parameters()) == expected


@pytest.fixture
def block():
    torch.manual_seed(0)
    return build_block(ModelCard(backbone="small-cnn"), (1, 8, 8), dim=3, classes=5)


def test_features_are_encoded_without_z_and_serve_every_z(block):
    block.eval()
    x, w = torch.randn(4, 1, 8, 8), torch.randn(5, 3)
    z = torch.randn(4, 3, requires_grad=True)
    features = block.encode(x)
    assert torch.autograd.grad(features.sum(), z, allow_unused=True) == (None,)
    at_z, at_other_z = block.denoise(z, features, w), block.denoise(-z, features, w)
    assert not at_z.isclose(at_other_z).all(), "û depends on z"
    assert torch.autograd.grad(at_z.square().sum(), z)[0].any()
    assert block.denoise(z, block.encode(x), w).equal(at_z), "and on nothing else that changed"


def test_the_label_path_has_a_residual_connection(block):
    """With a silent residual branch z still gets through."""
    block.eval()
    torch.nn.init.zeros_(block.residual[-1].weight)
    features, w = block.encode(torch.randn(4, 1, 8, 8)), torch.randn(5, 3)
    assert not block.denoise(torch.randn(4, 3), features, w).isclose(block.denoise(torch.randn(4, 3), features, w)).all()


def test_the_estimate_depends_on_the_image(block):
    block.eval()
    z, w = torch.randn(4, 3), torch.randn(5, 3)
    first, second = (block.denoise(z, block.encode(torch.randn(4, 1, 8, 8)), w) for _ in range(2))
    assert not first.isclose(second).all()


def test_an_estimate_with_one_hot_embeddings_is_a_probability_vector():
    block = build_block(ModelCard(), (1, 8, 8), dim=5, classes=5)
    estimate = block.denoise(torch.randn(9, 5), block.encode(torch.randn(9, 1, 8, 8)), torch.eye(5))
    assert estimate.shape == (9, 5)
    assert (estimate >= 0).all()
    torch.testing.assert_close(estimate.sum(dim=1), torch.ones(9))


def test_an_estimate_lies_in_the_convex_hull_of_the_embeddings():
    """Four points in three dimensions: the weights that express û by them are unique, and must be probabilities."""
    block = build_block(ModelCard(), (1, 8, 8), dim=3, classes=4)
    w = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 3, 0], [1, 1, 4]])
    estimate = block.denoise(3 * torch.randn(50, 3), block.encode(torch.randn(50, 1, 8, 8)), w)
    corners = torch.cat([w, torch.ones(4, 1)], dim=1).T
    weights = torch.linalg.solve(corners, torch.cat([estimate, torch.ones(50, 1)], dim=1).T)
    assert weights.min() > -1e-5
    assert weights.max() < 1 + 1e-5


def test_estimates_stay_in_float32_under_autocast():
    block = build_block(ModelCard(), (1, 8, 8), dim=5, classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        estimate = block.denoise(torch.randn(9, 5), block.encode(torch.randn(9, 1, 8, 8)), torch.eye(5))
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate.sum(dim=1), torch.ones(9), rtol=0, atol=1e-6)


def test_new_blocks_repeat_with_the_seed():
    def fresh(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_block(ModelCard(), (1, 8, 8), dim=10, classes=10).parameters()])

    assert fresh(1).equal(fresh(1))
    assert not fresh(1).equal(fresh(2))


def test_a_users_own_backbone_fits_into_a_block():
    own = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
    block = Block(own, 6, dim=2, classes=3)
    assert block.denoise(torch.randn(4, 2), block.encode(torch.randn(4, 3, 2, 2)), torch.randn(3, 2)).shape == (4, 2)


@pytest.mark.parametrize(("classes", "dim"), [(10, 10), (7, 3), (3, 20)])
def test_nearest_is_the_class_at_the_least_euclidean_distance(classes, dim):
    torch.manual_seed(classes)
    w = torch.randn(classes, dim, dtype=torch.float64) * torch.rand(classes, 1) * 5
    estimate = torch.randn(200, dim, dtype=torch.float64)
    expected = [min(range(classes), key=lambda c: float((row - w[c]).square().sum())) for row in estimate]
    assert nearest(estimate, w).tolist() == expected


def test_the_head_starts_as_the_nearest_embedding_classifier():
    torch.manual_seed(0)
    labels = LabelSpace(ModelCard(), 10)
    z = torch.randn(300, 10)
    assert labels(z).argmax(dim=1).equal(nearest(z, labels.embedding))
    assert labels(labels.embedding).argmax(dim=1).equal(torch.arange(10))


def test_one_hot_embeddings_are_fixed_and_the_head_is_trained():
    labels = LabelSpace(ModelCard(), 4)
    assert labels.dim == 4
    assert labels.embedding.equal(torch.eye(4))
    assert {name for name, _ in labels.named_parameters()} == {"head.weight", "head.bias"}
    assert "embedding" in labels.state_dict(), "saved with the head"


def test_the_head_reads_any_number_of_paths():
    assert LabelSpace(ModelCard(), 4)(torch.randn(3, 5, 4)).shape == (3, 5, 4)
