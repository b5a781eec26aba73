import pytest
import torch

from noprop_dist.config import Card, ModelCard
from noprop_dist.nets.backbones import BACKBONES
from noprop_dist.nets.block import TIME_FEATURES, Block, positional
from noprop_dist.nets.build import build_network
from noprop_dist.nets.labels import LabelSpace, nearest

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


def fresh(shape=DIGITS, classes=10, method="dt", seed=0, **model):
    torch.manual_seed(seed)
    return build_network(Card.model_validate({"method": {"name": method}, "model": model}), shape, classes)


@pytest.mark.parametrize(
    ("shape", "classes", "expected"), [(MNIST, 10, 919_946), (CIFAR, 10, 1_215_434), (CIFAR, 100, 1_250_084)]
)
def test_a_block_has_exactly_the_papers_parameters(shape, classes, expected):
    with torch.device("meta"):
        block = fresh(shape, classes, backbone="paper-cnn")
    assert sum(parameter.numel() for parameter in block.parameters()) == expected


@pytest.fixture
def block():
    return fresh(classes=5, backbone="small-cnn", embedding="learned", embedding_dim=3)


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
    block = fresh(classes=5)
    estimate = block.denoise(torch.randn(9, 5), block.encode(torch.randn(9, 1, 8, 8)), torch.eye(5))
    assert estimate.shape == (9, 5)
    assert (estimate >= 0).all()
    torch.testing.assert_close(estimate.sum(dim=1), torch.ones(9))


def test_an_estimate_lies_in_the_convex_hull_of_the_embeddings():
    """Four points in three dimensions: the weights that express û by them are unique, and must be probabilities."""
    block = fresh(classes=4, embedding="learned", embedding_dim=3)
    w = torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 3, 0], [1, 1, 4]])
    estimate = block.denoise(3 * torch.randn(50, 3), block.encode(torch.randn(50, 1, 8, 8)), w)
    corners = torch.cat([w, torch.ones(4, 1)], dim=1).T
    weights = torch.linalg.solve(corners, torch.cat([estimate, torch.ones(50, 1)], dim=1).T)
    assert weights.min() > -1e-5
    assert weights.max() < 1 + 1e-5


def test_estimates_stay_in_float32_under_autocast():
    block = fresh(classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        estimate = block.denoise(torch.randn(9, 5), block.encode(torch.randn(9, 1, 8, 8)), torch.eye(5))
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate.sum(dim=1), torch.ones(9), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "method"), [*((name, "dt") for name in BACKBONES), ("small-cnn", "ct")])
def test_new_blocks_are_a_pure_function_of_the_seed(name, method):
    def weights(seed):
        torch.rand(seed)
        block = fresh((1, 15, 15), method=method, seed=seed, backbone=name)
        return torch.cat([value.flatten() for value in block.state_dict().values()])

    first = weights(1)  # the first of its kind tries the backbone out, later ones do not
    assert weights(1).equal(first)
    assert not weights(2).equal(first)


@pytest.mark.parametrize(
    ("backbone", "width", "features"), [("mlp", None, 256), ("small-cnn", None, 128), ("small-cnn", 48, 48)]
)
def test_its_layers_are_as_wide_as_the_card_or_else_the_image_path_says(backbone, width, features):
    block = fresh(backbone=backbone, width=width)
    assert block.encode(torch.randn(3, 1, 8, 8)).shape == (3, features)
    assert {layer.in_features for layer in block.fuse if isinstance(layer, torch.nn.Linear)} == {
        2 * features,
        features,
        features // 2,
    }


@pytest.mark.parametrize("method", ["ct", "fm"])
def test_blocks_of_continuous_time_have_no_batch_norm_outside_the_image_path(method):
    def norms(module):
        return [each for each in module.modules() if isinstance(each, torch.nn.modules.batchnorm._BatchNorm)]

    assert not norms(fresh(method=method))
    block = fresh(method=method, backbone="resnet18")
    assert norms(block)
    assert len(norms(block)) == len(norms(block.image[0]))
    assert norms(fresh()), "DT has them"


@pytest.mark.parametrize("method", ["ct", "fm"])
def test_blocks_of_continuous_time_depend_on_it_and_on_all_else(method):
    block = fresh(method=method, embedding="learned", embedding_dim=3).eval()
    x, z, w, time = torch.randn(4, *DIGITS), torch.randn(4, 3), torch.randn(10, 3), torch.rand(4)
    inputs = [z, block.encode(x), w, time]
    expected = block.denoise(*inputs)
    assert expected.shape == z.shape
    for number, other in enumerate([-z, block.encode(-x), -w, 1 - time]):
        changed = [*inputs[:number], other, *inputs[number + 1 :]]
        assert not block.denoise(*changed).isclose(expected).all()
    assert block.denoise(*inputs).equal(expected)
    first = block.denoise(z, inputs[1], w, torch.cat([1 - time[:1], time[1:]]))
    assert first[1:].allclose(expected[1:]), "every row has its own time"
    assert not first[0].allclose(expected[0])


def test_times_are_told_apart_and_embedded_within_bounds():
    times = positional(torch.linspace(0, 1, 1001))
    assert times.shape == (1001, TIME_FEATURES)
    assert times.abs().max() <= 1
    assert torch.pdist(times).min() > 0.1


@pytest.mark.parametrize(("method", "mixes"), [("dt", True), ("ct", True), ("fm", False)])
def test_only_the_output_of_flow_matching_is_no_mixture_of_embeddings(method, mixes):
    block = fresh(method=method).eval()
    block.fuse[-1].bias.data += 3.0
    seen = []
    block.fuse.register_forward_hook(lambda module, inputs, logits: seen.append(logits))
    w = torch.randn(10, 10)
    output = block.denoise(torch.randn(6, 10), block.encode(torch.randn(6, *DIGITS)), w, torch.rand(6))
    weights = seen[0].softmax(dim=1) if mixes else seen[0]
    torch.testing.assert_close(output, weights @ w)


@pytest.mark.parametrize(("schedule", "trainable"), [("cosine", False), ("learned", True)])
def test_a_block_has_a_schedule_of_its_own_where_it_is_learned(schedule, trainable):
    block = Block(Card.model_validate({"method": {"name": "ct", "schedule": schedule}}), DIGITS, 10, (0.2, 0.6))
    assert (block.gamma is not None) is trainable


@pytest.mark.parametrize("method", ["dt", "ct", "fm"])
def test_a_z_of_the_images_size_is_seen_as_an_image(method):
    block = fresh(method=method, embedding="prototype")
    assert [type(module) for module in block.label[:2]] == [torch.nn.Unflatten, type(block.image[0])]
    output = block.denoise(torch.randn(4, 64), block.encode(torch.randn(4, *DIGITS)), torch.randn(10, 64), torch.rand(4))
    assert output.shape == (4, 64)
    assert type(fresh(method=method, embedding="learned", embedding_dim=20).label[0]) is torch.nn.Linear


@pytest.mark.parametrize(("classes", "dim"), [(10, 10), (7, 3), (3, 20)])
def test_nearest_is_the_class_at_the_least_euclidean_distance(classes, dim):
    torch.manual_seed(classes)
    w = torch.randn(classes, dim, dtype=torch.float64) * torch.rand(classes, 1) * 5
    estimate = torch.randn(200, dim, dtype=torch.float64)
    expected = [min(range(classes), key=lambda c: float((row - w[c]).square().sum())) for row in estimate]
    assert nearest(estimate, w).tolist() == expected


def test_the_head_starts_as_the_nearest_embedding_classifier():
    torch.manual_seed(0)
    labels = LabelSpace(ModelCard(), DIGITS, 10)
    z = torch.randn(300, 10)
    assert labels(z).argmax(dim=1).equal(nearest(z, labels.embedding))
    assert labels(labels.embedding).argmax(dim=1).equal(torch.arange(10))


def test_one_hot_embeddings_are_fixed_and_the_head_is_trained():
    labels = LabelSpace(ModelCard(), DIGITS, 4)
    assert labels.embedding.equal(torch.eye(4))
    assert {name for name, _ in labels.named_parameters()} == {"head.weight", "head.bias"}
    assert "embedding" in labels.state_dict(), "saved with the head"


def test_the_head_reads_any_number_of_paths():
    assert LabelSpace(ModelCard(), DIGITS, 4)(torch.randn(3, 5, 4)).shape == (3, 5, 4)
