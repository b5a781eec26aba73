"""digits, .npz files and the facts about a data set."""

import json
from itertools import count, islice

import numpy as np
import pytest
import torch

from noprop_dist.config import DataCard
from noprop_dist.data import DataInfo, describe, open_data
from noprop_dist.data.info import moments


def arrays(shape=(5, 6, 3), train=6, test=4, **changed):
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % 3,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % 3,
    } | changed
    return {key: value for key, value in made.items() if value is not None}


def npz(path, **content):
    np.savez(path, **content)
    return DataCard(name="npz", root=path)


def test_digits_split_is_fixed_stratified_and_disjoint():
    data = open_data(DataCard())
    assert (len(data.train), len(data.test)) == (data.info.train_size, data.info.test_size) == (1437, 360)
    assert data.info.shape == (1, 8, 8)
    assert data.info.classes == tuple("0123456789")
    images, labels = data.train.load()
    test_images, test_labels = data.test.load()
    assert (images.dtype, labels.dtype, images.max()) == (torch.uint8, torch.int64, 255)
    assert test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    every = torch.cat([images, test_images]).double().sum((0, 1))
    from sklearn.datasets import load_digits

    torch.testing.assert_close(every, torch.as_tensor(load_digits().images).sum(0) * 255 / 16, rtol=0, atol=1797 / 2)
    assert open_data(DataCard()).train.load()[1].equal(labels)


def test_in_memory_batches_are_lazy_and_as_asked():
    data = open_data(DataCard())
    images, labels = data.train.load()
    endless = (torch.tensor([i, 2 * i, 0]) for i in count())
    for i, (some_images, some_labels) in enumerate(islice(data.train.batches(endless), 5)):
        assert some_images.equal(images[[i, 2 * i, 0]])
        assert some_labels.equal(labels[[i, 2 * i, 0]])


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_layouts_give_the_same_images(tmp_path, channels):
    last = arrays((5, 6, channels))
    layouts = {"NHWC": last, "NCHW": last | {key: last[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}}
    if channels == 1:
        layouts["NHW"] = last | {key: last[key][..., 0] for key in ("x_train", "x_test")}
    for name, content in layouts.items():
        data = open_data(npz(tmp_path / f"{name}.npz", **content))
        for half, split in (("train", data.train), ("test", data.test)):
            images, labels = split.load()
            assert images.is_contiguous()
            assert images.numpy().tolist() == last[f"x_{half}"].transpose(0, 3, 1, 2).tolist()
            assert labels.tolist() == last[f"y_{half}"].tolist()
        assert data.info.shape == (channels, 5, 6)
        assert data.info.classes == ("0", "1", "2")


def test_npz_that_reads_both_ways_is_channels_last(tmp_path):
    assert open_data(npz(tmp_path / "a.npz", **arrays((3, 6, 3)))).info.shape == (3, 3, 6)


def test_npz_labels_of_any_integer_type_become_int64(tmp_path):
    content = arrays(y_train=np.arange(6, dtype=">u2") % 3, y_test=np.array([0, 1, 2, 2], dtype=np.uint8))
    labels = open_data(npz(tmp_path / "a.npz", **content)).train.load()[1]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_moments_are_those_of_the_training_pixels_and_guard_a_constant_channel(tmp_path):
    content = arrays((5, 6, 3), train=3000)
    content["x_train"][..., 1] = 77
    info = open_data(npz(tmp_path / "a.npz", **content)).info
    pixels = content["x_train"].reshape(-1, 3) / 255
    assert info.mean == pytest.approx(pixels.mean(0).tolist())
    assert info.std == pytest.approx([pixels[:, 0].std(), 1.0, pixels[:, 2].std()])


def test_moments_of_chunks_are_those_of_the_whole():
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    assert moments(images.split(7)) == moments([images])


def test_info_survives_json():
    info = open_data(DataCard()).info
    assert DataInfo.from_json(json.loads(json.dumps(info.to_json()))) == info
    assert describe(DataCard()) == info
