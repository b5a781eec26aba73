"""The medoid of each class: which image it is, and that finding it stays small."""

import itertools

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from noprop_dist.config import DataCard, UserError
from noprop_dist.data import Pixels, check_classes, medoids, open_data, prototypes
from noprop_dist.data.memory import in_memory


def made(sizes, shape=(3, 4, 5), seed=0):
    """A data set with so many random images of each class, mixed up."""
    rng = np.random.default_rng(seed)
    labels = torch.as_tensor(rng.permutation(np.repeat(np.arange(len(sizes)), sizes)))
    images = torch.as_tensor(rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8))
    images[:, 0] //= 8  # channels of different spread: distances are those of normalised pixels
    return in_memory("made", [f"name {label}" for label in range(len(sizes))], (images, labels), (images, labels))


def found(data, card=None):
    return medoids(data.train, data.info, Pixels(card or DataCard(), data.info))


def literal(data):
    """Every distance by itself, in float64."""
    images, labels = data.train.load()
    pixels = Pixels(DataCard(), data.info).normalise(images).double().flatten(1)
    rows = []
    for label in range(len(data.info.classes)):
        own = [row for row in range(len(labels)) if labels[row] == label]
        medians = []
        for row in own:
            distances = sorted(float((pixels[row] - pixels[other]).norm()) for other in own if other != row)
            medians.append(distances[(len(distances) - 1) // 2] if distances else 0.0)
        rows.append(pixels[own[int(np.argmin(medians))]].float())
    return torch.stack(rows)


@pytest.mark.parametrize("tile", [1, 1000, 2**24])
@pytest.mark.parametrize("sizes", [(1, 2, 3, 4), (40, 41, 30)])
def test_it_is_what_a_literal_loop_finds(sizes, tile, monkeypatch):
    monkeypatch.setattr(prototypes, "TILE", tile)
    data = made(sizes)
    rows = found(data)
    assert (rows.shape, rows.dtype) == ((len(sizes), 60), torch.float32)
    torch.testing.assert_close(rows, literal(data), rtol=0, atol=0)


def test_an_outlier_is_never_chosen_and_the_middle_is():
    images = torch.tensor([0, 60, 100, 101, 103, 255, 7, 9], dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    data = in_memory("made", ["a", "b"], (images, labels), (images, labels))
    chosen = Pixels(DataCard(), data.info).normalise(images[[2, 6]]).flatten(1)
    assert torch.equal(found(data), chosen), "100 is 1, 3 and 40 from its nearest; of two images it is the first"


def test_augmentation_and_the_global_generator_play_no_part():
    data = made((20, 20))
    torch.manual_seed(0)
    expected = found(data)
    state = torch.get_rng_state()
    assert torch.equal(found(data, DataCard(augment="crop-flip")), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_prototypes_look_like_their_class():
    data = open_data(DataCard())
    images, labels = data.test.load()
    flat = Pixels(DataCard(), data.info).normalise(images).flatten(1)
    assert (torch.cdist(flat, found(data)).argmin(dim=1) == labels).float().mean() > 0.8


def test_a_class_without_images_is_named():
    data = made((3, 0, 3))
    with pytest.raises(UserError, match=r"^model.embedding: .*name 1.*; use "):
        check_classes(data.train, data.info)
    whole = made((3, 2, 3))
    check_classes(whole.train, whole.info)


def test_memory_is_a_few_tiles_however_large_the_class(monkeypatch):
    """Counts every byte that torch allocates; the larger class's matrix of distances alone has 122 tiles."""
    monkeypatch.setattr(prototypes, "TILE", 2**15)
    for size in (500, 2000):
        data = made((size,), shape=(3, 8, 8))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            found(data)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peak = max(itertools.accumulate(steps))
        tiles = (peak - size * 3 * 8 * 8) / (4 * prototypes.TILE)
        assert 1 < tiles < 8, tiles
