import pytest
import torch
from pydantic import ValidationError
from torchvision import models

from noprop_dist.config import BACKBONE_NAMES, Card, ModelCard, UserError
from noprop_dist.nets.backbones import BACKBONES, Dropout, image_path, resolve_backbone
from noprop_dist.nets.block import Block

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_dropout_drops_the_asked_share_and_keeps_the_mean(p, memory_format):
    torch.manual_seed(0)
    x = torch.ones(64, 32, 15, 15).to(memory_format=memory_format)
    out = Dropout(p)(x)
    kept = out != 0
    count = x.numel()
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=4 * (p * (1 - p) / count) ** 0.5)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_every_element_is_dropped_or_its_own_value_scaled(memory_format):
    torch.manual_seed(0)
    x = torch.arange(1.0, 1 + 6 * 5 * 7 * 3).view(6, 5, 7, 3).to(memory_format=memory_format)
    out = Dropout(0.5)(x)
    assert out.is_contiguous(memory_format=memory_format)
    assert ((out == 0) | (out == 2 * x)).all()
    assert 0 < (out == 0).sum() < x.numel()


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_neighbours_are_dropped_independently_of_each_other(memory_format):
    """Four elements share one random draw: no two of them may go together."""
    torch.manual_seed(0)
    kept = Dropout(0.5)(torch.ones(32, 16, 12, 12).to(memory_format=memory_format)) != 0
    if memory_format == torch.channels_last:
        kept = kept.permute(0, 2, 3, 1)
    lanes = kept.reshape(-1, 4).double()
    limit = 4 / len(lanes) ** 0.5
    assert (lanes.mean(dim=0) - 0.5).abs().max() < limit / 2
    assert (lanes.T.corrcoef() - torch.eye(4)).abs().max() < limit


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 5, 7)])
def test_dropout_takes_any_number_of_elements(shape):
    assert Dropout(0.5)(torch.ones(shape)).shape == shape


def test_the_gradient_passes_through_kept_elements_only():
    x = torch.ones(100, requires_grad=True)
    out = Dropout(0.5)(x)
    out.sum().backward()
    assert x.grad.equal(out.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_drops_the_same_elements_in_any_precision(dtype):
    torch.manual_seed(7)
    first = Dropout(0.3)(torch.ones(50, dtype=dtype))
    torch.manual_seed(7)
    assert Dropout(0.3)(torch.ones(50)).ne(0).equal(first.ne(0))
    assert first.dtype == dtype
    assert not Dropout(0.3)(torch.ones(50, dtype=dtype)).equal(first), "the next call drops others"


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)])
def test_dropout_does_nothing_in_eval_or_at_0(layer):
    x = torch.randn(40)
    assert layer(x).equal(x)


SHAPES = [(1, 28, 28), (3, 32, 32), (1, 8, 8), (3, 9, 15)]
FITTING = [
    (name, shape) for name, kind in BACKBONES.items() for shape in SHAPES if min(shape[1:]) >= getattr(kind, "smallest", 1)
]


def card(method="dt", **model):
    return Card.model_validate({"method": {"name": method}, "model": model})


def test_the_card_knows_every_backbone_and_no_other():
    assert tuple(BACKBONES) == BACKBONE_NAMES


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_a_backbone_gives_features_and_gradients(name, shape):
    torch.manual_seed(0)
    backbone, count, _ = image_path(ModelCard(backbone=name, dropout=0.2), shape)
    assert backbone.training
    features = backbone(torch.randn(4, *shape))
    assert features.shape == (4, count)
    assert features.isfinite().all()
    (features * torch.randn_like(features)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.parameters())
    assert all(parameter.grad.any() for name, parameter in backbone.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("name", BACKBONES)
def test_dropout_acts_in_training_only(name):
    torch.manual_seed(0)
    x = torch.randn(3, 1, 14, 14)
    backbone, *_ = image_path(ModelCard(backbone=name, dropout=0.5), x.shape[1:])
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0  # else it is their statistics that differ
    assert not backbone(x).equal(backbone(x))
    backbone.eval()
    assert backbone(x).equal(backbone(x))
    certain, *_ = image_path(ModelCard(backbone=name, dropout=0.0), x.shape[1:])
    assert certain(x).equal(certain(x))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_serves_a_z_of_the_images_size(name):
    shape = (1, 14, 14)
    block = Block(card(backbone=name, embedding="prototype"), shape, 3)
    z, w = torch.randn(4, 14 * 14, requires_grad=True), torch.randn(3, 14 * 14)
    estimate = block.denoise(z, block.encode(torch.randn(4, *shape)), w)
    estimate.square().sum().backward()
    assert estimate.shape == z.shape
    assert z.grad.any()
    kind = type(BACKBONES[name](shape, 0.2))
    assert len([module for module in block.modules() if type(module) is kind]) == 2, "one for the image, one for z"


def test_the_resnets_are_torchvisions_without_their_classifier():
    for name, features in [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048)]:
        with torch.device("meta"):
            ours, count, _ = image_path(ModelCard(backbone=name, dropout=0.2), (3, 224, 224))
            theirs = models.get_model(name, weights=None)
        assert count == features
        expected = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
        assert {name: value.shape for name, value in ours.net.state_dict().items()} == expected


@pytest.mark.parametrize(("side", "left"), [(8, 1), (28, 4), (64, 8), (65, 3), (224, 7)])
def test_a_resnet_has_the_cifar_stem_for_small_images(side, left):
    with torch.device("meta"):
        net = image_path(ModelCard(backbone="resnet18", dropout=0.2), (1, side, side))[0].net
        x = net.maxpool(net.conv1(torch.zeros(2, 1, side, side)))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
    assert x.shape[2:] == (left, left)


@pytest.mark.parametrize(("sides", "patches"), [((28, 28), 49), ((32, 32), 64), ((64, 64), 64), ((8, 8), 16), ((9, 15), 40)])
def test_the_transformer_sees_every_pixel_in_patches(sides, patches):
    torch.manual_seed(0)
    vit = BACKBONES["vit-tiny"]((1, *sides), 0.0).eval()
    assert len(vit.positions) == patches
    x = torch.randn(1, 1, *sides, requires_grad=True)
    vit(x).square().sum().backward()
    assert x.grad.ne(0).all()


def test_the_transformers_layers_start_apart_and_know_positions():
    torch.manual_seed(0)
    vit = BACKBONES["vit-tiny"]((1, 8, 8), 0.0)
    assert not vit.layers[0].linear1.weight.equal(vit.layers[1].linear1.weight)
    x = torch.randn(2, 1, 8, 8)
    assert not vit(x).allclose(vit(x.roll(2, 3)), atol=1e-4), "the same patches, elsewhere"


def test_looking_for_the_number_of_features_leaves_statistics_and_random_numbers_alone():
    shape = (1, 12, 12)  # of no other test: the number is looked for once
    torch.manual_seed(5)
    backbone, *_ = image_path(ModelCard(backbone="resnet18", dropout=0.2), shape)
    after = torch.rand(3)
    torch.manual_seed(5)
    plain = BACKBONES["resnet18"](shape, 0.2)
    assert torch.rand(3).equal(after)
    assert all(a.equal(b) for a, b in zip(backbone.state_dict().values(), plain.state_dict().values(), strict=True))
    assert not any(value for name, value in backbone.state_dict().items() if "num_batches" in name)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_can_be_made_without_contents(name):
    with torch.device("meta"):
        backbone, count, _ = image_path(ModelCard(backbone=name, dropout=0.2), (3, 16, 18))
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert count == image_path(ModelCard(backbone=name, dropout=0.2), (3, 16, 18))[1]


@pytest.mark.parametrize(
    ("side", "expected"), [((8, 8), "small-cnn"), ((13, 28), "small-cnn"), ((14, 14), "paper-cnn"), ((64, 14), "paper-cnn")]
)
def test_auto_takes_the_papers_network_where_the_image_is_large_enough(side, expected):
    assert resolve_backbone("auto", (1, *side)) == expected


@pytest.mark.parametrize("name", ["small-cnn", "mlp", "resnet50"])
def test_a_backbone_asked_for_by_name_is_taken(name):
    assert resolve_backbone(name, (3, 32, 32)) == name


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 13), (3, 32, 12)])
def test_images_too_small_for_the_papers_network_are_refused_with_a_way_out(shape):
    with pytest.raises(UserError, match=r"^model\.backbone: paper-cnn .*14 pixels.*small-cnn$"):
        resolve_backbone("paper-cnn", shape)


@pytest.mark.parametrize(
    ("name", "meant"), [("resnet81", "resnet18"), ("paper_cnn", "paper-cnn"), ("vittiny", "vit-tiny"), ("mlpp", "mlp")]
)
def test_a_misspelt_name_is_refused_with_the_nearest_right_one(name, meant):
    with pytest.raises(ValidationError, match=rf"vit-tiny or your own package\.module:Class \(did you mean {meant}\?\)"):
        ModelCard(backbone=name)
    with pytest.raises(ValidationError, match="Class "):
        ModelCard(backbone="qqqq")
