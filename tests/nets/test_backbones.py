import pytest
import torch

from noprop_dist.config import ModelCard, UserError
from noprop_dist.nets.backbones import BACKBONES, Dropout
from noprop_dist.nets.block import build_block, resolve_backbone

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


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("paper-cnn", (1, 28, 28)),
        ("paper-cnn", (3, 32, 32)),
        ("paper-cnn", (3, 14, 21)),
        ("small-cnn", (1, 8, 8)),
        ("small-cnn", (3, 9, 5)),
        ("small-cnn", (3, 2, 2)),
    ],
)
def test_a_backbone_gives_its_width_of_features(name, shape):
    backbone = BACKBONES[name](shape, 0.2)
    features = backbone(torch.randn(4, *shape))
    assert features.shape == (4, backbone.width)
    assert features.isfinite().all()


def test_small_cnn_trains_on_8x8_images():
    block = build_block(ModelCard(backbone="small-cnn"), (1, 8, 8), dim=10, classes=10)
    estimate = block.denoise(torch.randn(4, 10), block.encode(torch.randn(4, 1, 8, 8)), torch.eye(10))
    estimate.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


@pytest.mark.parametrize(
    ("side", "expected"), [((8, 8), "small-cnn"), ((13, 28), "small-cnn"), ((14, 14), "paper-cnn"), ((64, 14), "paper-cnn")]
)
def test_auto_takes_the_papers_network_where_the_image_is_large_enough(side, expected):
    assert resolve_backbone(ModelCard(), (1, *side)) == expected


def test_a_backbone_asked_for_by_name_is_taken():
    assert resolve_backbone(ModelCard(backbone="small-cnn"), (3, 32, 32)) == "small-cnn"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 13), (3, 32, 12)])
def test_images_too_small_for_the_papers_network_are_refused_with_a_way_out(shape):
    with pytest.raises(UserError, match=r"^model\.backbone: paper-cnn .*14 pixels.*small-cnn$"):
        resolve_backbone(ModelCard(backbone="paper-cnn"), shape)
