"""torchvision's data sets: made-up files, no network; the real ones where NOPROP_DATA has them."""

import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from filelock import FileLock, Timeout
from torchvision import datasets

from noprop_dist.config import DataCard, UserError
from noprop_dist.data import describe, open_data, vision

RNG = np.random.default_rng(0)


def write_idx(folder, train=20, test=10):
    """The four files of an MNIST look-alike; returns the training images and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for half, size in (("t10k", test), ("train", train)):
        images, labels = RNG.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10
        (folder / f"{half}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, size, 28, 28) + images.tobytes())
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, size) + labels.tobytes())
        made = [images, labels]
    return made


@pytest.fixture
def no_network(monkeypatch):
    def fail(self):
        raise URLError("no\nnetwork")

    for kind in (datasets.MNIST, datasets.CIFAR10, datasets.SVHN):
        monkeypatch.setattr(kind, "download", fail)


def one_line(card):
    with pytest.raises(UserError) as caught:
        open_data(card)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_idx_files_are_read(tmp_path, no_network, name, folder):
    images, labels = write_idx(tmp_path / folder / "raw")
    data = open_data(DataCard(name=name, root=tmp_path))
    loaded = data.train.load()
    assert loaded[0].dtype == torch.uint8
    assert loaded[1].dtype == torch.int64
    assert loaded[0].tolist() == images[:, None].tolist()
    assert loaded[1].tolist() == labels.tolist()
    assert (data.info.train_size, data.info.test_size) == (20, 10)
    assert not (tmp_path / ".noprop.lock").exists()  # a whole data set may lie on a read-only disk


@pytest.mark.parametrize(("name", "kind", "key"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine_labels")])
def test_cifar_files_are_read(tmp_path, monkeypatch, name, kind, key):
    cls = getattr(datasets, kind)
    monkeypatch.setattr(cls, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cls, "_load_meta", lambda self: None)
    (tmp_path / cls.base_folder).mkdir()
    rows = RNG.integers(0, 256, (4, 3072), dtype=np.uint8)
    for file, _ in cls.train_list + cls.test_list:
        (tmp_path / cls.base_folder / file).write_bytes(pickle.dumps({"data": rows, key: [3, 1, 2, 9]}))
    data = open_data(DataCard(name=name, root=tmp_path))
    images, labels = data.test.load()
    assert images.tolist() == rows.reshape(4, 3, 32, 32).tolist()
    assert labels.tolist() == [3, 1, 2, 9]
    assert len(data.train) == 4 * len(cls.train_list)


def test_svhn_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    images = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    for half in ("train", "test"):
        content = {"X": images.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [2], [9]], dtype=np.uint8)}
        scipy.io.savemat(tmp_path / f"{half}_32x32.mat", content)
    data = open_data(DataCard(name="svhn", root=tmp_path))
    assert data.train.load()[0].tolist() == images.tolist()
    assert data.train.load()[1].tolist() == [0, 1, 2, 9]  # SVHN writes the digit 0 as 10


def test_missing_files_are_fetched_under_the_lock(tmp_path, monkeypatch):
    calls = []

    def download(self):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "new" / ".noprop.lock").acquire(timeout=0)
        calls.append(self.raw_folder)
        write_idx(Path(self.raw_folder))

    monkeypatch.setattr(datasets.MNIST, "download", download)
    data = open_data(DataCard(name="mnist", root=tmp_path / "new"))
    assert len(data.train) == 20
    assert set(calls) == {str(tmp_path / "new" / "MNIST" / "raw")}


def test_files_that_another_process_fetched_meanwhile_are_not_fetched_again(tmp_path, no_network, monkeypatch):
    class SlowLock(FileLock):
        def __enter__(self):
            write_idx(tmp_path / "MNIST" / "raw")  # by whoever held the lock before us
            return super().__enter__()

    monkeypatch.setattr(vision, "FileLock", SlowLock)
    assert len(open_data(DataCard(name="mnist", root=tmp_path)).train) == 20


def test_root_defaults_to_the_environment(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("NOPROP_DATA", str(tmp_path))
    assert f"not in {tmp_path}," in one_line(DataCard(name="mnist"))


def test_describe_reads_no_file_and_knows_what_the_files_say(tmp_path, no_network):
    for name, source in vision.SOURCES.items():
        info = describe(DataCard(name=name, root=tmp_path / "nothing"))
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.shape[0]
        assert len(set(info.classes)) == len(info.classes) == (100 if name == "cifar100" else 10)
        assert (info.train_size, info.test_size) == source.sizes
    assert not (tmp_path / "nothing").exists()


def real(*parts):
    """The folder NOPROP_DATA, if it holds the file or folder given; else the test is skipped."""
    root = os.environ.get("NOPROP_DATA")
    if not root:
        pytest.skip("NOPROP_DATA is not set")
    if not Path(root, *parts).exists():
        pytest.skip(f"no {'/'.join(parts)} in NOPROP_DATA")
    return Path(root)


def test_real_mnist():
    info = open_data(DataCard(name="mnist", root=real("MNIST", "raw"))).info
    assert (info.train_size, info.test_size) == (60000, 10000)
    assert info.mean == pytest.approx([0.1307], abs=5e-5)
    assert info.std == pytest.approx([0.3081], abs=5e-5)
    static = describe(DataCard(name="mnist"))
    assert (static.shape, static.classes, static.train_size) == (info.shape, info.classes, info.train_size)


def test_real_fashion_mnist():
    data = open_data(DataCard(name="fashion-mnist", root=real("FashionMNIST", "raw")))
    assert data.train.load()[1].bincount().tolist() == [6000] * 10
    assert data.info.mean == pytest.approx([0.2860], abs=5e-5)


def test_real_cifar10_npz():
    data = open_data(DataCard(name="npz", root=real("cifar10.npz") / "cifar10.npz"))
    assert (data.info.shape, data.info.train_size, data.info.test_size) == ((3, 32, 32), 45000, 5000)
    assert data.info.mean == pytest.approx([0.491, 0.482, 0.446], abs=2e-3)
