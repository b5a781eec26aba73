import pytest
import torch

from noprop_dist.config import DataCard
from noprop_dist.data import DataInfo, Pixels, resolve_augment

SIDE, PADDING = 16, 2


def pixels(augment, side=SIDE, mean=(0.2, 0.5, 0.7), std=(0.1, 0.2, 0.3)):
    info = DataInfo("npz", (3, side, side), ("a", "b"), 9, 9, mean, std)
    return Pixels(DataCard(name="npz", augment=augment), info)


def augmented(augment, images, seed=0):
    torch.manual_seed(seed)
    return pixels(augment, images.shape[-1]).augment(images)


def impulses(count):
    """Black images with one bright pixel at (8, 8), of another value in each channel."""
    images = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8)
    images[:, :, 8, 8] = torch.tensor([50, 100, 150], dtype=torch.uint8)
    return images


def test_each_image_gets_its_own_shift():
    moved = augmented("crop", impulses(400))
    assert moved.dtype == torch.uint8
    assert moved.shape == (400, 3, SIDE, SIDE)
    places = moved[:, 0].nonzero()
    assert places[:, 0].tolist() == list(range(400))  # the pixel is still there, once in each image
    assert moved[(places[:, 0], slice(None), *places[:, 1:].T)].unique(dim=0).tolist() == [[50, 100, 150]]
    shifts = {tuple(shift) for shift in (places[:, 1:] - 8).tolist()}
    assert shifts == {(y, x) for y in range(-PADDING, PADDING + 1) for x in range(-PADDING, PADDING + 1)}


def test_a_crop_is_a_shift_that_brings_in_black():
    image = torch.randint(1, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, (PADDING,) * 4)
    windows = [padded[0, :, y : y + SIDE, x : x + SIDE] for y in range(5) for x in range(5)]
    for moved in augmented("crop", image.expand(50, -1, -1, -1)):
        assert sum(moved.equal(window) for window in windows) == 1


def test_small_images_move_by_one_pixel():
    images = torch.ones(100, 3, 5, 5, dtype=torch.uint8)
    assert augmented("crop", images).sum((1, 2, 3)).unique().tolist() == [48, 60, 75]  # 4x4, 4x5 and 5x5 ones are left


def test_crop_flip_mirrors_about_half_of_the_images():
    ramp = torch.arange(SIDE, dtype=torch.uint8).mul(10).expand(400, 3, SIDE, SIDE)
    rising = augmented("crop-flip", ramp)[:, 0, 8, 4:12].diff().eq(10).all(1)
    falling = augmented("crop-flip", ramp)[:, 0, 8, 4:12].flip(-1).diff().eq(10).all(1)
    assert (rising ^ falling).all()
    assert 150 < falling.sum() < 250
    unflipped = augmented("crop", ramp)[:, 0, 8, 4:12].diff().eq(10).all(1)
    assert unflipped.all()


@pytest.mark.parametrize("augment", ["crop", "crop-flip"])
def test_the_seed_alone_decides(augment):
    images = torch.randint(256, (20, 3, SIDE, SIDE), dtype=torch.uint8)
    assert augmented(augment, images, seed=1).equal(augmented(augment, images, seed=1))
    assert not augmented(augment, images, seed=1).equal(augmented(augment, images, seed=2))


def test_none_changes_nothing_and_draws_nothing():
    images = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    before = torch.get_rng_state()
    assert pixels("none").augment(images).equal(images)
    assert torch.get_rng_state().equal(before)


def test_augment_leaves_its_input_alone():
    images = impulses(8)
    augmented("crop-flip", images)
    assert images.equal(impulses(8))


def test_normalise_is_the_formula():
    images = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.2, 0.5, 0.7), (0.1, 0.2, 0.3)))
    result = pixels("none").normalise(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, (images / 255 - mean) / std)


@pytest.mark.parametrize(
    ("name", "resolved"),
    [
        *((name, "crop-flip") for name in ("cifar10", "cifar100", "imagefolder")),
        ("svhn", "crop"),
        *((name, "none") for name in ("digits", "mnist", "fashion-mnist", "kmnist", "npz")),
    ],
)
def test_auto_augmentation_of(name, resolved):
    assert resolve_augment(DataCard(name=name)) == resolved
    assert resolve_augment(DataCard(name=name, augment="crop")) == "crop"
