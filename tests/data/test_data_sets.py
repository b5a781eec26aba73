"""digits, .npz files and the facts about a data set."""

import json
from itertools import count, islice

import numpy as np
import pytest
import torch

from noprop_dist.config import DataCard, UserError
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


def one_line(card):
    with pytest.raises(UserError) as caught:
        open_data(card)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


MISTAKES = {
    "two arrays missing": ({"x_test": None, "y_test": None}, ["x_test, y_test missing"]),
    "floats": ({"x_train": np.zeros((6, 5, 6, 3), np.float32)}, ["x_train", "float32", "x * 255"]),
    "wide integers": ({"x_test": np.zeros((4, 5, 6, 3), np.int64)}, ["x_test", "int64", "astype('uint8')"]),
    "rank 2": ({"x_train": np.zeros((6, 30), np.uint8)}, ["x_train", "(6, 30)", "NHWC"]),
    "4 channels": ({"x_train": np.zeros((6, 5, 6, 4), np.uint8)}, ["x_train", "(6, 5, 6, 4)", "1 or 3"]),
    "unlike halves": ({"x_test": np.zeros((4, 5, 7, 3), np.uint8)}, ["(5, 6, 3)", "(5, 7, 3)"]),
    "too few labels": ({"y_train": np.arange(5) % 3}, ["y_train", "5 labels for 6 images"]),
    "labels as a column": ({"y_train": np.zeros((6, 1), int)}, ["y_train", "(6, 1)", "ravel"]),
    "negative label": ({"y_test": np.array([0, -1, 1, 2])}, ["y_test", "-1"]),
    "labels as floats": ({"y_test": np.zeros(4)}, ["y_test", "float64", "astype('int64')"]),
    "labels as words": ({"y_train": np.array(list("abcabc"))}, ["y_train", "<U1"]),
    "no test images": ({"x_test": np.zeros((0, 5, 6, 3), np.uint8), "y_test": np.zeros(0, int)}, ["x_test", "empty"]),
    "one class": ({"y_train": np.full(6, 2), "y_test": np.full(4, 2)}, ["y_train", "only the class 2"]),
    "ids for labels": ({"y_train": np.array([0, 10**12] * 3)}, ["y_train", "1000000000000", "number the classes"]),
    "unseen test label": ({"y_test": np.array([0, 1, 2, 3])}, ["y_test", "label 3", "2"]),
    "pickled objects": ({"y_train": np.array([{}] * 6, dtype=object)}, ["y_train", "Python objects"]),
}


@pytest.mark.parametrize(("changed", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_npz_mistake_is_one_line_with_its_place(tmp_path, changed, words):
    message = one_line(npz(tmp_path / "mine.npz", **arrays(**changed)))
    assert message.startswith(f"{tmp_path / 'mine.npz'}: ")
    assert all(word in message for word in words), message


def test_npz_that_is_missing_or_a_folder_names_the_setting(tmp_path):
    for path, word in ((tmp_path / "no.npz", "does not exist"), (tmp_path, "is a folder")):
        message = one_line(DataCard(name="npz", root=path))
        assert word in message
        assert str(path) in message
        assert "--data.root" in message


def test_npz_that_is_something_else_is_named(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    whole = path.read_bytes()
    with (tmp_path / "one.npy").open("wb") as file:
        np.save(file, np.zeros(3))
    contents = [b"", b"hello", whole[:-100], whole.replace(b"NUMPY", b"MUMPY", 1), (tmp_path / "one.npy").read_bytes()]
    for content in contents:
        path.write_bytes(content)
        assert str(path) in one_line(DataCard(name="npz", root=path))


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
