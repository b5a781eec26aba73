"""Data as they come from a hurried export, a broken disk or an unknown hand."""

import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from noprop_dist.command import answer
from noprop_dist.train import main


def arrays(shape=(5, 6, 3), train=6, test=4, **changed):
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % 3,
        "x_test": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test) % 3,
    } | changed
    return {key: value for key, value in made.items() if value is not None}


ARRAYS = {
    "two arrays missing": ({"x_test": None, "y_test": None}, ("x_test, y_test missing",)),
    "floats": ({"x_train": np.zeros((6, 5, 6, 3), np.float32)}, ("x_train", "float32", "x * 255")),
    "not a number": ({"x_test": np.full((4, 5, 6, 3), np.nan)}, ("x_test", "float64")),
    "wide integers": ({"x_test": np.zeros((4, 5, 6, 3), np.int64)}, ("x_test", "int64", "x.astype('uint8')")),
    "16 bits": ({"x_train": np.full((6, 5, 6, 3), 40_000, np.uint16)}, ("x_train", "uint16", "(x >> 8).astype('uint8')")),
    "rank 2": ({"x_train": np.zeros((6, 30), np.uint8)}, ("x_train", "(6, 30)", "NHWC")),
    "4 channels": ({"x_train": np.zeros((6, 5, 6, 4), np.uint8)}, ("x_train", "(6, 5, 6, 4)", "1 or 3")),
    "unlike halves": ({"x_test": np.zeros((4, 5, 7, 3), np.uint8)}, ("(5, 6, 3)", "(5, 7, 3)")),
    "one pixel": ({"shape": (1, 1)}, ("model.backbone", "at least 2 pixels", "these have 1", "use mlp")),
    "too few labels": ({"y_train": np.arange(5) % 3}, ("y_train", "5 labels for 6 images")),
    "labels as a column": ({"y_train": np.zeros((6, 1), int)}, ("y_train", "(6, 1)", "ravel")),
    "labels one-hot": ({"y_train": np.eye(3, dtype=int)[np.arange(6) % 3]}, ("y_train", "(6, 3)", "y.argmax(1)")),
    "negative label": ({"y_test": np.array([0, -1, 1, 2])}, ("y_test", "-1")),
    "labels as floats": ({"y_test": np.zeros(4)}, ("y_test", "float64", "astype('int64')")),
    "labels as words": ({"y_train": np.array(list("abcabc"))}, ("y_train", "<U1")),
    "no test images": ({"x_test": np.zeros((0, 5, 6, 3), np.uint8), "y_test": np.zeros(0, int)}, ("x_test", "empty")),
    "one class": ({"y_train": np.full(6, 2), "y_test": np.full(4, 2)}, ("y_train", "only the class 2")),
    "ids for labels": ({"y_train": np.array([0, 10**12] * 3)}, ("y_train", "1000000000000", "number the classes")),
    "unseen test label": ({"y_test": np.array([0, 1, 2, 3])}, ("y_test", "label 3", "2")),
    "objects": ({"y_train": np.array([{}] * 6, dtype=object)}, ("y_train", "Python objects")),
}


@pytest.mark.parametrize(("changed", "words"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_do_not_fit(told, changed, words):
    np.savez("mine.npz", **arrays(**changed))
    place = () if "model.backbone" in words else ("mine.npz: ",)
    told((*place, *words), main, "--data.name", "npz", "--data.root", "mine.npz")


def claim_a_petabyte(whole):
    with zipfile.ZipFile("mine.npz") as old, zipfile.ZipFile("new.npz", "w") as new:
        for name in old.namelist():
            huge = old.read(name).replace(b"(6, 5, 6, 3), }" + b" " * 12, b"(6, 5, 6, 3000000000000), }")
            new.writestr(name, huge)
    with open("new.npz", "rb") as file:
        return file.read()


def encrypt(whole):
    blob = bytearray(whole)
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        for number in range(blob.count(mark)):
            place = -1
            for _ in range(number + 1):
                place = blob.index(mark, place + 1)
            blob[place + flags] |= 1
    return bytes(blob)


ARCHIVES = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"hello",
    "cut short": lambda whole: whole[:-100],
    "another header": lambda whole: whole.replace(b"NUMPY", b"MUMPY", 1),
    "a flipped byte": lambda whole: whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
    "a petabyte": claim_a_petabyte,
    "a password": encrypt,
}


@pytest.mark.parametrize("spoil", ARCHIVES.values(), ids=ARCHIVES)
def test_a_damaged_archive(told, tmp_path, spoil):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    path.write_bytes(spoil(path.read_bytes()))
    told((f"{path}: ",), main, "--data.name", "npz", "--data.root", path)


def test_an_archive_that_is_none(told, tmp_path):
    np.save("one.npy", np.zeros(3))
    told(("one.npy: not a readable .npz file", "numpy.savez"), main, "--data.name", "npz", "--data.root", "one.npy")
    told(("data.root", "no.npz does not exist", "--data.root"), main, "--data.name", "npz", "--data.root", "no.npz")
    told(("data.root", f"{tmp_path} is a folder"), main, "--data.name", "npz", "--data.root", tmp_path)


@pytest.mark.parametrize(("variable", "place"), [("/no/such/folder", "/no/such/folder"), ("", "data")])
def test_the_environment_names_a_place_that_is_not_there(told, monkeypatch, variable, place):
    monkeypatch.setenv("NOPROP_DATA", variable)
    told((f"data.root: {place} does not exist",), main, "--data.name", "npz")
    told((f"data.root: {place} is no folder",), main, "--data.name", "imagefolder")


def write_idx(folder, train=20, test=10):
    """The four files of an MNIST look-alike."""
    folder.mkdir(parents=True)
    for half, size in (("t10k", test), ("train", train)):
        images, labels = bytes(range(98)) * 8 * size, bytes(number % 10 for number in range(size))
        (folder / f"{half}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, size, 28, 28) + images)
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, size) + labels)


def labels(*values):
    return lambda whole: struct.pack(">2i", 2049, len(values)) + bytes(values)


IMAGES, LABELS, TEST_IMAGES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
IDX = {
    "cut short": (IMAGES, lambda whole: whole[:-5], (IMAGES,)),
    "too long": (IMAGES, lambda whole: whole + b"x", (IMAGES,)),
    "empty": (TEST_IMAGES, lambda whole: b"", (TEST_IMAGES,)),
    "text": (LABELS, lambda whole: b"hello, here are your labels", (LABELS, "not in its format")),
    "another magic number": (IMAGES, lambda whole: b"\0\0\7" + whole[3:], (IMAGES, "not in its format")),
    "no test images": (TEST_IMAGES, lambda whole: whole[:4] + bytes(4) + whole[8:16], (TEST_IMAGES,)),
    "16 bits": (TEST_IMAGES, lambda whole: b"\0\0\x0b" + whole[3:16] + bytes(2 * 7840), ("uint8", "int16")),
    "other sides": (
        TEST_IMAGES,
        lambda whole: whole[:8] + struct.pack(">2i", 14, 56) + whole[16:],
        ("test", "(10, 1, 14, 56)"),
    ),
    "fewer labels": (LABELS, labels(*range(9)), ("train: 9 labels", "(20, 1, 28, 28)")),
    "labels out of range": (LABELS, labels(*[99] * 20), ("train: labels 99 to 99 for 10 classes",)),
    "one class": (LABELS, labels(*[3] * 20), ("train: only the label 3",)),
}


@pytest.mark.parametrize(("name", "spoil", "words"), IDX.values(), ids=IDX)
def test_damaged_idx_files(told, tmp_path, name, spoil, words):
    write_idx(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / name
    path.write_bytes(spoil(path.read_bytes()))
    told(
        ("mnist: damaged files", f"{tmp_path}/MNIST", "delete it", *words),
        main,
        "--data.name",
        "mnist",
        "--data.root",
        tmp_path,
    )


def test_idx_files_still_compressed_or_one_of_them_missing(told, tmp_path):
    write_idx(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / IMAGES
    path.rename(path.with_suffix(".gz"))
    told(("mnist: damaged in", "not fetched", "put the files there"), main, "--data.name", "mnist", "--data.root", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn"])
def test_files_that_are_not_there_nor_to_be_had_leave_no_folder_behind(told, name):
    words = (f"{name}: not in a/b, and not fetched", "no network", "put the files there", "--data.root", "NOPROP_DATA")
    told(words, main, "--data.name", name, "--data.root", "a/b")


def test_a_root_that_is_or_lies_in_a_file(told, tmp_path):
    (tmp_path / "file").write_text("")
    for root in ("file", "file/below"):
        told((root, "cifar10"), main, "--data.name", "cifar10", "--data.root", root)


def picture(path, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng([*path.stem.encode()]).integers(0, 256, (12, 10, 3), np.uint8)).convert(mode).save(
        path
    )


@pytest.fixture
def pictures(tmp_path):
    """2 classes of 3 pictures in each half."""
    root = tmp_path / "pictures"
    for half in ("train", "test"):
        for label in ("cat", "dog"):
            for number in range(3):
                picture(root / half / label / f"{number}.png")
    return root


def gone(path):
    for inner in [*sorted(path.rglob("*"), reverse=True), path]:
        inner.rmdir() if inner.is_dir() else inner.unlink()


def link_into_the_void(path):
    path.unlink()
    path.symlink_to("nowhere")


def claim_ten_gigapixels(path):
    blob = path.read_bytes()
    path.write_bytes(blob[:16] + struct.pack(">2I", 100_000, 100_000) + blob[24:])


def deep_colours(path):
    """A PNG with 16 bits a channel, which Pillow cannot write."""
    chunks = {
        b"IHDR": struct.pack(">2I5B", 9, 9, 16, 2, 0, 0, 0),
        b"IDAT": zlib.compress(9 * (b"\0" + 27 * b"\x0f\xff")),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks.items()
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


ONE = "test/dog/1.png"
PICTURES = {
    "no root": (gone, ("data.root", "{root}")),
    "no train": (lambda root: (root / "train").rename(root / "training"), ("{root}", "train", "test (or val)")),
    "no test": (lambda root: gone(root / "test"), ("{root}", "test or val")),
    "class only in train": (lambda root: gone(root / "test" / "dog"), ("dog only in {root}/train",)),
    "class only in test": (lambda root: picture(root / "test" / "eel" / "0.png"), ("eel only in {root}/test",)),
    "one class": (lambda root: [gone(root / half / "dog") for half in ("train", "test")], ("{root}/train", "cat")),
    "class without a picture": (lambda root: (root / "train" / "eel").mkdir(), ("{root}/train", "eel")),
    "no classes": (lambda root: [gone(root / "train" / name) for name in ("cat", "dog")], ("{root}/train", "class")),
    "a file for a half": (lambda root: [gone(root / "test"), (root / "test").write_text("")], ("{root}", "test or val")),
    "text": (lambda root: (root / ONE).write_text("hello\nworld"), (f"{{root}}/{ONE}", "not a readable picture")),
    "empty": (lambda root: (root / ONE).write_bytes(b""), (f"{{root}}/{ONE}", "replace or remove it")),
    "array": (lambda root: np.save(root / "a.npy", 1) or (root / "a.npy").rename(root / ONE), (f"{{root}}/{ONE}",)),
    "no file behind it": (lambda root: link_into_the_void(root / ONE), (f"{{root}}/{ONE}", "No such file")),
    "ten gigapixels": (lambda root: claim_ten_gigapixels(root / ONE), (f"{{root}}/{ONE}", "replace")),
    "16 bits": (
        lambda root: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(root / ONE),
        (f"{{root}}/{ONE}", "more than 8 bits a channel", "convert it"),
    ),
    "16-bit colours": (lambda root: deep_colours(root / ONE), (f"{{root}}/{ONE}", "more than 8 bits a channel", "convert it")),
    "not a number": (
        lambda root: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(root / "train/cat/3.tiff"),
        ("{root}/train/cat/3.tiff", "more than 8 bits a channel", "convert it"),
    ),
    "CMYK, three of them": (
        lambda root: [picture(root / f"train/cat/{number}.jpg", "CMYK") for number in range(3)],
        ("{root}/train/cat/0.jpg", "colours in CMYK", "convert it", "3 pictures"),
    ),
    "cut short": (
        lambda root: (root / "train/dog/1.png").write_bytes((root / "train/dog/1.png").read_bytes()[:200]),
        ("{root}/train/dog/1.png", "truncated", "replace or remove it"),
    ),
}


@pytest.mark.parametrize(("spoil", "words"), PICTURES.values(), ids=PICTURES)
def test_folders_and_pictures(told, pictures, spoil, words):
    spoil(pictures)
    words = [word.format(root="pictures") for word in words]
    told(words, main, "--data.name", "imagefolder", "--data.root", "pictures")


def test_a_picture_that_is_found_broken_while_training_ends_the_run_in_a_line(pictures, capsys, monkeypatch, tmp_path):
    """A header tells nothing of a picture that is cut short; few of a large folder's are decoded before training."""
    path = pictures / "test/dog/2.png"
    path.write_bytes(path.read_bytes()[:200])
    monkeypatch.chdir(tmp_path)
    argv = "--data.name imagefolder --data.root pictures --data.workers 2 --data.batch_size 4 --model.blocks 1 --train.steps 1"
    assert answer(main, argv.split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: rank 0: pictures/test/dog/2.png: not a readable picture (image file is truncated")
