from itertools import count, islice

import numpy as np
import pytest
import torch
from PIL import Image

from noprop_dist.config import DataCard, UserError
from noprop_dist.data import open_data


def picture(path, size=(12, 10), mode="RGB", colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([*path.stem.encode()]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels) if colour is None else Image.new("RGB", size, colour)
    image.convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """2 classes, 6 + 2 training and 2 + 2 test pictures of 12 x 10 pixels."""
    for half, cats in (("train", 6), ("test", 2)):
        for i in range(cats):
            picture(tmp_path / half / "cat" / f"x{i}.png")
        for i in range(2):
            picture(tmp_path / half / "dog" / f"y{i}.png")
    return tmp_path


def card(root, workers=0, **settings):
    return DataCard(name="imagefolder", root=root, workers=workers, image_size=8, **settings)


def one_line(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_facts(root):
    info = open_data(card(root)).info
    assert (info.shape, info.classes, info.train_size, info.test_size) == ((3, 8, 8), ("cat", "dog"), 8, 4)
    pixels = open_data(card(root)).train.load()[0].transpose(0, 1).reshape(3, -1) / 255.0
    assert info.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert info.std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-6)


def test_a_large_jpeg_is_read_as_well_as_a_whole_one(root):
    """Pictures of cameras are decoded at a fraction of their size."""
    x, y = np.meshgrid(np.linspace(0, 255, 640), np.linspace(0, 255, 480))
    large = Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))
    large.save(root / "train" / "cat" / "a-large.jpg", quality=95)
    images, _ = open_data(card(root)).train.load()
    whole = np.asarray(large.resize((10, 8)).crop((1, 0, 9, 8)), dtype=float)
    assert np.abs(images[0].permute(1, 2, 0).numpy() - whole).max() < 8


def test_streaming_with_two_workers_gives_what_load_gives(root):
    train = open_data(card(root, workers=2)).train
    images, labels = open_data(card(root)).train.load()
    assert (images.dtype, labels.dtype, labels.tolist()) == (torch.uint8, torch.int64, [0] * 6 + [1] * 2)
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    order = [torch.tensor(rows) for rows in ([7, 0, 3], [1, 1, 6], [5], [2, 4, 0])]
    batches = list(train.batches(order))
    assert [rows.tolist() for rows in order] == [
        [next(i for i in range(8) if images[i].equal(image)) for image in batch] for batch, _ in batches
    ]
    assert all(some.equal(labels[rows]) for rows, (_, some) in zip(order, batches, strict=True))


def test_pictures_are_resized_and_centre_cropped(tmp_path):
    for half in ("train", "val"):
        for name in ("a", "b"):
            wide = Image.new("RGB", (40, 16), "black")  # shrinks to 20 x 8, of which the middle 8 x 8 stay
            wide.paste((255, 0, 0), (12, 0, 28, 16))
            (tmp_path / half / name).mkdir(parents=True)
            wide.save(tmp_path / half / name / "0.png")
    image = open_data(card(tmp_path)).test.load()[0][0]
    assert image[:, :, 1:-1].float().mean((1, 2)).tolist() == [255, 0, 0]


def test_grey_and_palette_pictures_become_rgb(root):
    picture(root / "train" / "cat" / "0grey.png", mode="L")
    picture(root / "train" / "cat" / "1palette.png", mode="P")
    assert open_data(card(root)).train.load()[0].shape == (10, 3, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_endless_index_streams_are_read_lazily(root, workers):
    endless = (torch.tensor([i % 8]) for i in count())
    assert len(list(islice(open_data(card(root, workers)).train.batches(endless), 20))) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_draws_nothing_from_the_global_generator(root, workers):
    train = open_data(card(root, workers)).train
    before = torch.get_rng_state()
    list(train.batches([torch.tensor([0])]))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["no picture at all", "cut short", "gone"])
def test_unreadable_picture_is_named_in_one_line(root, workers, damage):
    data, path = open_data(card(root, workers)), root / "test" / "dog" / "y1.png"
    match damage:
        case "no picture at all":
            path.write_text("hello\nworld")
        case "cut short":
            path.write_bytes(path.read_bytes()[:100])
        case "gone":
            path.unlink()
    message = one_line(data.test.load)
    assert message.startswith(f"{path}: not a readable picture")
    assert "Traceback" not in message
    assert "replace or remove" in message
