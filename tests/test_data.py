"""harness/data.py: balance, splits and seeds; every way in which CIFAR-100 may be missing."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness import data

ROOT = Path(__file__).resolve().parent.parent
REAL_ARCHIVE = Path(os.path.expanduser("~/.keras/datasets/cifar-100-python-target_archive"))
needs_archive = pytest.mark.skipif(
    not REAL_ARCHIVE.is_file(), reason=f"needs the CIFAR-100 archive at {REAL_ARCHIVE}"
)


def run_child(code, **environment):
    """Run Python code in a child that reaches no network; returns the finished process."""
    proxies = {"http_proxy", "https_proxy", "no_proxy", "all_proxy"}
    kept = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    nowhere = {"https_proxy": "http://127.0.0.1:9", "KERAS_BACKEND": "jax"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=False,
        env={**kept, **nowhere, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def load_in_child(home, before="", **environment):
    """Load CIFAR-100 with KERAS_HOME=home; returns (the DataError's message or None, process)."""
    code = (
        "import socket, sys, zlib\n"
        "from harness import data\n"
        f"{before}\n"
        "try:\n"
        "    (x, y), (x_test, y_test) = data.load_cifar100()\n"
        "    print('LOADED', x.shape, x.dtype, y.shape, y.dtype, x_test.shape, y_test.shape,\n"
        "        *(zlib.crc32(a.tobytes()) for a in (x, y, x_test, y_test)),\n"
        "        'by Keras' if 'keras' in sys.modules else 'as kept')\n"
        "except data.DataError as error:\n"
        "    print('DATAERROR', error)\n"
        "print('TIMEOUT', socket.getdefaulttimeout())\n"
    )
    process = run_child(code, KERAS_HOME=str(home), **environment)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[-1] == "TIMEOUT None"  # restored; and right before it, in one line, the outcome
    kind, _, message = lines[-2].partition(" ")
    assert kind in ("LOADED", "DATAERROR"), process.stdout
    return (message if kind == "DATAERROR" else None), process


def create_home(tmp_path):
    """A Keras home (with a space in its name) and the paths of its CIFAR-100 archive and folder."""
    home = tmp_path / "keras home"
    folder = home / "datasets" / "cifar-100-python-target"
    folder.parent.mkdir(parents=True)
    return home, folder.with_name(folder.name + "_archive"), folder


def flip_byte(path):
    with path.open("r+b") as file:
        file.seek(100_000_000)
        byte = file.read(1)[0]
        file.seek(100_000_000)
        file.write(bytes([byte ^ 1]))


def run_remedy(message):
    """Do what the message says in backquotes: it must be an `rm -r` and succeed."""
    command = message.split("`")[1]
    assert command.startswith("rm -r ")
    subprocess.run(command, shell=True, check=True)


def is_balanced(labels, num_classes):
    counts = np.bincount(labels, minlength=num_classes)
    return len(counts) == num_classes and counts.max() - counts.min() <= 1


def split_keys(dataset):
    """The splits as three lists of the images' bytes."""
    splits = (dataset.x_train, dataset.x_validation, dataset.x_test)
    return [[image.tobytes() for image in images] for images in splits]


# Synthetic shapes, subsets and splits


@pytest.mark.parametrize("num_classes", [100, 37, 1])
@pytest.mark.parametrize("train_images", [64, 1000, 1234])
@pytest.mark.parametrize("validation_split", [0, 0.1, 0.37])
def test_splits_are_balanced(num_classes, train_images, validation_split):
    d = data.load_dataset(
        "synthetic",
        num_classes=num_classes,
        train_images=train_images,
        test_images=150,
        validation_split=validation_split,
    )
    assert len(d.y_validation) == round(train_images * validation_split)
    assert len(d.y_train) + len(d.y_validation) == train_images
    assert len(d.y_test) == 150
    for labels in (d.y_train, d.y_validation, d.y_test):
        assert is_balanced(labels, num_classes)


@pytest.mark.parametrize("take", [slice(0, 450), slice(450, 1234), slice(777, 801)])
def test_any_piece_of_the_balanced_order_is_balanced(take):
    labels = np.random.default_rng(1).permutation(np.arange(1234) % 100)
    order = data.order_balanced(labels, 100, np.random.default_rng(2))
    assert sorted(order) == list(range(1234))
    assert is_balanced(labels[order[take]], 100)


def test_splits_share_no_image():
    d = data.load_dataset("synthetic", train_images=1000, test_images=500)
    keys = [key for split in split_keys(d) for key in split]
    assert len(set(keys)) == len(keys) == 1500


def test_synthetic_form():
    d = data.load_dataset("synthetic", train_images=400, test_images=200)
    assert d.label == "synthetic shapes (not CIFAR-100)"
    assert (len(d.x_train), len(d.x_validation), len(d.x_test)) == (360, 40, 200)
    for x, y in ((d.x_train, d.y_train), (d.x_validation, d.y_validation), (d.x_test, d.y_test)):
        assert x.dtype == np.uint8 and x.shape == (len(y), 32, 32, 3) and x.flags.c_contiguous
        assert y.dtype == np.int32 and y.shape == (len(x),)
    assert set(d.y_train) == set(d.y_test) == set(range(100))
    assert len(d.fingerprint) == 16 and int(d.fingerprint, 16) >= 0


def test_synthetic_default_sizes():
    (x, y), (x_test, y_test) = data.create_synthetic(num_classes=10)
    assert (len(x), len(y), len(x_test), len(y_test)) == (5000, 5000, 1000, 1000)


def test_synthetic_shapes_stand_out_whole():
    (x, y), _ = data.create_synthetic(1000, 1)
    colour = data.COLOURS[y % 10][:, None, None]
    shape_pixels = np.square(x - colour).sum(axis=3) < 55**2
    assert shape_pixels.sum(axis=(1, 2)).min() > 25
    border = np.ones((32, 32), bool)
    border[1:-1, 1:-1] = False
    assert shape_pixels[:, border].mean() < 0.01


def test_a_picture_does_not_depend_on_how_many_there_are():
    (few, few_labels), (test, _) = data.create_synthetic(30, 10, seed=3)
    (many, many_labels), (more_test, _) = data.create_synthetic(1100, 700, seed=3)
    np.testing.assert_array_equal(few, many[:30])
    np.testing.assert_array_equal(few_labels, many_labels[:30])
    np.testing.assert_array_equal(test, more_test[:10])


def test_seeds_and_fingerprints():
    def load(seed, train_images=300):
        return data.load_dataset(
            "synthetic", train_images=train_images, test_images=100, seed=seed
        ).fingerprint

    assert load(0) == load(0)
    assert len({load(0), load(1), load(2), load(0, 301)}) == 4


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_same_images_in_every_process_and_on_every_backend(backend):
    code = (
        "import keras\n"
        "from harness import data\n"
        "d = data.load_dataset('synthetic', train_images=300, test_images=100, seed=5)\n"
        "print(keras.backend.backend(), d.fingerprint, *data.epoch_order(7, 5, 2))\n"
    )
    process = run_child(code, KERAS_BACKEND=backend)
    d = data.load_dataset("synthetic", train_images=300, test_images=100, seed=5)
    expected = [backend, d.fingerprint, *map(str, data.epoch_order(7, 5, 2))]
    assert process.stdout.split() == expected, process.stderr


def test_epoch_order():
    orders = [data.epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    for order in orders:
        assert order.dtype == np.int32 and sorted(order) == list(range(1000))
    assert len({order.tobytes() for order in orders}) == 9
    np.testing.assert_array_equal(orders[4], data.epoch_order(1000, 1, 1))


def test_measure_pixels():
    images = np.random.default_rng(0).integers(0, 256, (2001, 8, 8, 3)).astype(np.uint8)
    images[..., 1] //= 7
    mean, variance = data.measure_pixels(images)
    pixels = images.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(variance, pixels.var(axis=0), rtol=1e-12)
    images[..., 2] = 77  # which nothing is to be divided by zero for
    assert data.measure_pixels(images)[1][2] == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"name": "cifar10"}, ["cifar100, synthetic", "'cifar10'"]),
        ({"num_classes": 101}, ["1 to 100", "101"]),
        ({"num_classes": 0}, ["1 to 100", "got 0"]),
        ({"validation_split": 1.0}, ["below 1", "1.0"]),
        ({"validation_split": -0.1}, ["-0.1"]),
        ({"validation_split": 0.9, "train_images": 1}, ["no training", "0.9"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"train_images": 0}, ["1 or more", "got 0"]),
        ({"test_images": -3}, ["1 or more", "-3"]),
    ],
)
def test_wrong_arguments(arguments, expected):
    with pytest.raises(data.DataError) as caught:
        data.load_dataset(**{"name": "synthetic", **arguments})
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message


# CIFAR-100: a small stand-in for the subset rules, child processes for the real loader


@pytest.fixture
def small_cifar100(monkeypatch):
    pictures = data.create_synthetic(600, 200, seed=9)
    monkeypatch.setattr(data, "load_cifar100", lambda: pictures)


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({"train_images": 601}, ("600", "601")),
        ({"test_images": 201}, ("200", "201")),
        ({"num_classes": 50, "train_images": 301}, ("300", "301")),
        ({"train_images": 0}, ("600", "0")),
    ],
)
def test_more_images_than_there_are(small_cifar100, arguments, numbers):
    with pytest.raises(data.DataError, match=f"1 to {numbers[0]} images, got {numbers[1]};"):
        data.load_dataset("cifar100", **arguments)


def test_subsets_are_balanced_and_seeded(small_cifar100):
    first = data.load_dataset("cifar100", train_images=250, test_images=70, seed=1)
    again = data.load_dataset("cifar100", train_images=250, test_images=70, seed=1)
    other = data.load_dataset("cifar100", train_images=250, test_images=70, seed=2)
    assert first.label == "CIFAR-100"
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for labels in (first.y_train, first.y_validation, first.y_test):
        assert is_balanced(labels, 100)
    assert set(split_keys(first)[1]) != set(split_keys(other)[1])


@needs_archive
def test_real_archive_and_damaged_files_beside_it(tmp_path):
    home, archive, folder = create_home(tmp_path)
    archive.symlink_to(REAL_ARCHIVE)
    (folder / "cifar-100-python").mkdir(parents=True)
    (folder / "cifar-100-python" / "train").write_bytes(b"cut off")
    (home / "keras.json").write_text('{"image_data_format": "channels_first"}')
    _, first = load_in_child(home)
    expected = "(50000, 32, 32, 3) uint8 (50000,) int32 (10000, 32, 32, 3) (10000,)"
    assert expected in first.stdout and "by Keras" in first.stdout

    archive.unlink()  # what it gave is kept
    _, second = load_in_child(home)
    assert second.stdout == first.stdout.replace("by Keras", "as kept")

    flip_byte(folder.with_name(folder.name + ".npz"))
    message, _ = load_in_child(home)
    assert f"expected {archive}," in message
    archive.symlink_to(REAL_ARCHIVE)
    _, again = load_in_child(home)
    assert again.stdout == first.stdout
    assert not any(home.glob("datasets/*.npz.*"))
    shutil.rmtree(home)  # 370 MB


@needs_archive
def test_damaged_folder_that_cannot_be_unpacked_over(tmp_path):
    home, archive, folder = create_home(tmp_path)
    archive.symlink_to(REAL_ARCHIVE)
    (folder / "cifar-100-python" / "train").mkdir(parents=True)
    message, _ = load_in_child(home)
    assert f"{folder} is corrupt or incomplete" in message
    run_remedy(message)
    assert not folder.exists() and archive.exists()


def test_missing_and_no_network(tmp_path):
    home, archive, _ = create_home(tmp_path)
    message, _ = load_in_child(home)
    assert f"expected {archive}," in message
    assert data.CIFAR100_URL in message
    assert "--dataset synthetic" in message


def test_missing_and_the_network_stalls(tmp_path):
    home, archive, _ = create_home(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call, never answers
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        message, _ = load_in_child(home, "data.STALL_SECONDS = 0.5", https_proxy=proxy)
    assert f"expected {archive}," in message and "timed out" in message


def damage_by_truncation(archive):
    with REAL_ARCHIVE.open("rb") as file:
        archive.write_bytes(file.read(1_000_000))


def damage_one_byte(archive):
    shutil.copyfile(REAL_ARCHIVE, archive)
    flip_byte(archive)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage_by_truncation, marks=needs_archive),
        pytest.param(damage_one_byte, marks=needs_archive),
        lambda archive: archive.write_text("<html>please log in</html>"),
        lambda archive: archive.mkdir(),
    ],
    ids=["truncated", "one byte", "not an archive", "a folder"],
)
def test_corrupt_archive(tmp_path, damage):
    home, archive, folder = create_home(tmp_path)
    damage(archive)
    folder.mkdir()
    message, _ = load_in_child(home)
    assert f"{archive} is corrupt or incomplete" in message
    assert archive.exists()  # left to its owner until the remedy is run
    run_remedy(message)
    assert not archive.exists() and folder.exists()
