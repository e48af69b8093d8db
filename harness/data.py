"""Pictures to train on: CIFAR-100, a folder of your own, or synthetic shapes.

Every random choice here is drawn by NumPy from a seed, so each backend sees the same images in the
same order; `Dataset.fingerprint` is the proof that a record carries.
"""

import contextlib
import hashlib
import math
import os
import shlex
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from harness.download import alone, fetch
from harness.environment import count_cores

LABELS = {"cifar100": "CIFAR-100", "synthetic": "synthetic shapes (not CIFAR-100)"}

# The address and the hash are the ones in keras/src/datasets/cifar100.py.
CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
CIFAR100_SHA256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
STALL_SECONDS = 10.0  # a download that sends nothing for so long has failed; a slow one has not

# A generator is seeded with (seed, stream, ...): no two uses share their random numbers.
TRAIN_SUBSET, TEST_SUBSET, TRAIN_PICTURES, TEST_PICTURES, EPOCH, VALIDATION_SUBSET = range(6)


class DataError(Exception):
    """The data cannot be had as asked; the message is one line: expected, got, remedy."""

    ending = ("error", 5)  # status and exit code


class Dataset(NamedTuple):
    """Images uint8 (n, height, width, 3) and labels int32 (n,) of the three splits; the images are
    arrays or, where they are too many for that, `Pictures`."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    label: str  # how a report calls it: "CIFAR-100" or "synthetic shapes (not CIFAR-100)"
    fingerprint: str  # 16 hex digits of the sha256 over the six arrays, in the order above; of a
    # folder over paths within it, labels and how often each value occurs
    unreadable: int  # files that were left out

    def describe(self):
        """What a record's `quality` says of it."""
        return {
            "dataset": self.label,
            "data_fingerprint": self.fingerprint,
            "train_images": len(self.x_train),
            "validation_images": len(self.x_validation),
            "test_images": len(self.x_test),
        }

    def summarize(self):
        """The same for a person, in a line."""
        return (
            f"{self.label}, {len(self.x_train):,} images to train on, "
            f"{len(self.x_validation):,} to validate, {len(self.x_test):,} to test"
        )


def load_dataset(
    name,
    *,
    num_classes=100,
    train_images=None,
    test_images=None,
    validation_split=0.1,
    seed=0,
    size=32,
    in_memory=True,
    max_unreadable=0,
):
    """Load or draw a data set and split it; returns a `Dataset`.

    `train_images` counts the images before `validation_split` of them is taken off; None means all
    (for synthetic shapes: as many a class as CIFAR-100 has). Subsets, and each split of them, are
    drawn with the seed and class-balanced: the counts of two classes differ by at most one, or are
    in proportion to the classes' sizes where these differ. `num_classes` below the data set's own
    keeps the classes 0 to num_classes - 1. Raises DataError.

    Args:
        name: "cifar100", "synthetic" or a folder, see `list_folder`.
        size: pixels a side, of a folder's pictures.
        in_memory: whether a folder's pictures are kept decoded, or as `Pictures`.
        max_unreadable: so many of a folder's files may be unreadable; they are named and left out.
    """
    if not 0 <= validation_split < 1:
        raise DataError(f"validation_split: expected 0 or more, below 1, got {validation_split}")
    if seed < 0:
        raise DataError(f"seed: expected 0 or more, got {seed}")
    classes = 100 if name in LABELS else len(list_classes(name))
    if not 1 <= num_classes <= classes:
        raise DataError(f"num_classes: expected 1 to {classes}, got {num_classes}")
    held_out = None
    if name == "synthetic":
        train, test = create_synthetic(train_images, test_images, seed, num_classes)
    elif name == "cifar100":
        train, test = load_cifar100()
    else:
        train, held_out, test = list_folder(name, size)

    def order(split, stream):
        return order_balanced(split[1], num_classes, np.random.default_rng((seed, stream)))

    chosen, test_order = order(train, TRAIN_SUBSET), order(test, TEST_SUBSET)
    chosen = chosen[: check_count("train_images", train_images, len(chosen))]
    test_order = test_order[: check_count("test_images", test_images, len(test_order))]
    kept = len(chosen)
    if held_out is None:
        kept -= round(len(chosen) * validation_split)
        validation = take(train, chosen[kept:])
    else:
        validation = take(held_out, order(held_out, VALIDATION_SUBSET))
    if kept == 0:
        raise DataError(f"validation_split: {validation_split} of {len(chosen)} leaves no training")
    if not len(test_order):
        raise DataError(f"num_classes: of the first {num_classes} there are no pictures to test on")
    splits, unreadable = [take(train, chosen[:kept]), validation, take(test, test_order)], 0
    digest = hashlib.sha256()
    if name in LABELS:
        label = LABELS[name]
        for array in sum(splits, ()):
            digest.update(array)
    else:
        label = f"the folder {os.path.basename(os.path.abspath(name))}"
        splits, arrays, unreadable = read_pictures(splits, in_memory, max_unreadable)
        for images, labels in splits:
            paths = (os.path.relpath(path, os.fsencode(name)) for path in images.paths)
            digest.update(b"\0".join(paths))
            digest.update(labels)
            digest.update(images.counts)
        if in_memory:
            splits = [(array, labels) for array, (_, labels) in zip(arrays, splits)]
    return Dataset(*sum(splits, ()), label, digest.hexdigest()[:16], unreadable)


def load_for_run(config, record, runner):
    """load_dataset as a configuration asks; what it is goes into the record and, where the
    configuration is verbose, to a person, after `runner`, such as "jax on the CPU"."""
    started = time.perf_counter()
    names = ("num_classes", "train_images", "test_images", "validation_split", "seed")
    choices = {name: getattr(config, name) for name in names}
    if config.dataset not in LABELS:
        choices |= {"size": config.input_shape[0], "in_memory": config.loader == "resident"}
        choices["max_unreadable"] = config.max_unreadable
    dataset = load_dataset(config.dataset, **choices)
    record["timing"]["data_seconds"] = time.perf_counter() - started
    record["quality"] |= dataset.describe()
    if dataset.unreadable:
        record["notes"].append(f"{dataset.unreadable} unreadable files were left out")
    if config.verbose:
        print(f"{runner}: {dataset.summarize()}", flush=True)
    return dataset


def epoch_order(n, seed, epoch):
    """The order of n images in one epoch: a permutation, int32 (n,), fixed by seed and epoch."""
    return np.random.default_rng((seed, EPOCH, epoch)).permutation(np.arange(n, dtype=np.int32))


def measure_pixels(images):
    """(mean, variance) of uint8 images (n, height, width, channels): float64 (channels,) each; of
    a channel that is the same everywhere the variance is 1, by which it can be divided."""
    counts = getattr(images, "counts", None)  # which pictures in files have brought along
    if counts is None:
        counts = count_values(images)
    values, n = np.arange(256), counts[0].sum()
    mean = counts @ values / n
    variance = counts @ values**2 / n - mean**2
    return mean, np.where(np.count_nonzero(counts, axis=1) > 1, variance, 1.0)


def count_values(images):
    """How often each value occurs in each channel of uint8 images: int64 (channels, 256).

    Of a chunk of images at a time: NumPy counts in 64 bits, eight times what the pixels hold.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for first in range(0, len(images), 1000):
        pixels = images[first : first + 1000].reshape(-1, channels)
        counts += [np.bincount(pixels[:, c], minlength=256) for c in range(channels)]
    return counts


def order_balanced(labels, num_classes, rng):
    """Indices (n,) of all images of the classes below num_classes, in rounds of one of each class.

    Each round runs through the classes in the same order and only the last may be incomplete, so
    the class counts of *any* contiguous piece differ by at most one (if those of all images do).
    Where classes differ in size by more, each is spread evenly over the whole order.
    """
    members = [rng.permutation(np.flatnonzero(labels == c)) for c in rng.permutation(num_classes)]
    members.sort(key=len, reverse=True)  # larger classes first: only they are in the last round
    rounds = [np.arange(len(m)) for m in members]
    if len(members[0]) > len(members[-1]) + 1:
        rounds = [(places + 0.5) / len(places) for places in rounds]
    return np.concatenate(members)[np.argsort(np.concatenate(rounds), kind="stable")]


def check_count(what, asked, available):
    """How many images to take: those asked for, or all; DataError where there are fewer."""
    if asked is not None and not 1 <= asked <= available:
        raise DataError(f"{what}: expected 1 to {available} images, got {asked}; ask for fewer")
    return available if asked is None else asked


def take(pictures, indices):
    images, labels = pictures
    if isinstance(images, Pictures):
        return Pictures(images.paths[indices], images.size), labels[indices]
    taken = allocate((len(indices), *images.shape[1:]))
    np.take(images, indices, axis=0, out=taken, mode="clip")  # the others would copy once more
    return taken, labels[indices]


def allocate(shape):
    """An empty array of uint8, which JAX uses in host memory as it is, since it begins at a
    multiple of 64 bytes."""
    memory = np.empty(math.prod(shape) + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + math.prod(shape)].reshape(shape)


# ---------------------------------------------------------------------------------------------
# A folder of pictures


class Pictures:
    """Picture files of any sizes, decoded to squares of `size` pixels a side when they are indexed,
    and else like an array of uint8 (n, size, size, 3): for data sets that memory does not hold.

    Args:
        paths: bytes, an array (n,).
        counts: of `count_values`, once the pictures were read.
    """

    def __init__(self, paths, size, counts=None):
        self.paths, self.size, self.counts = paths, size, counts
        self.shape = (len(paths), size, size, 3)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return np.stack([decode_picture(path, self.size) for path in self.paths[index]])


def decode_picture(path, size):
    """A picture file, upright, as RGB, uint8 (size, size, 3): the largest square in its middle,
    resized (bicubic, antialiased). Raises DataError."""
    from PIL import Image, ImageOps  # here: not all runs read files

    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (size, size))  # a large JPEG is decoded at a fraction of its size
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # Pillow would clip at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype("uint8"))
            elif picture.mode in ("I", "F"):
                raise ValueError(f"mode {picture.mode} has no known range, expected 8 or 16 bits")
            picture = picture.convert("RGB")
            return np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC))
    except MemoryError:  # which says nothing of the picture
        raise
    except Exception as error:  # Pillow's decoders raise what they meet: OSError, SyntaxError, ...
        said = getattr(error, "strerror", None) or str(error)  # the kernel's, without the path
        reason = " ".join(said.split()) or type(error).__name__
        raise DataError(f"cannot read {os.fsdecode(path)} as a picture: {reason}") from error


def list_classes(folder):
    """Names of the classes of a data set in a folder, sorted: those of the folders in train/."""
    train = os.path.join(folder, "train")
    try:
        folders = [entry.name for entry in os.scandir(train) if entry.is_dir()]
    except OSError as error:
        raise DataError(
            f"dataset: expected {', '.join(LABELS)} or a folder with train/CLASS/ and test/CLASS/, "
            f"got {folder!r} ({train}: {error.strerror})"
        ) from error
    classes = sorted(name for name in folders if not name.startswith("."))
    if len(classes) < 2:
        raise DataError(f"dataset: expected two or more folders of classes in {train}")
    return classes


def list_entries(path):
    try:
        return list(os.scandir(path))
    except OSError as error:
        raise DataError(f"dataset: cannot list {path}: {error.strerror}") from error


def list_folder(folder, size):
    """The pictures in FOLDER/train/CLASS/, FOLDER/val/CLASS/ and FOLDER/test/CLASS/, each with its
    class's number. Where one of val and test is missing, the other is what is tested on.

    Returns:
        train, validation (None where it is missing), test: (Pictures, labels int32 (n,)) each.

    Raises:
        DataError: neither val nor test is there, one has a class that train has not, or one is
            empty, or a class of train's, or cannot be listed.
    """
    classes, splits = list_classes(folder), {}
    for split in ("train", "val", "test"):
        root = os.path.join(folder, split)
        if not os.path.isdir(root):
            continue
        paths, labels = [], []
        for entry in sorted(list_entries(root), key=lambda entry: entry.name):
            if not entry.is_dir() or entry.name.startswith("."):
                continue
            if entry.name not in classes:
                raise DataError(f"dataset: {root} has a class that train/ has not: {entry.name}")
            found = [file for file in list_entries(entry.path) if not file.name.startswith(".")]
            kept = (file for file in found if file.is_file() or file.is_symlink())
            files = sorted(os.fsencode(file.path) for file in kept)
            if split == "train" and not files:
                raise DataError(f"dataset: expected pictures in {entry.path}, found none")
            for file in found:
                if file.is_dir():
                    raise DataError(f"dataset: expected files, not folders, got {file.path}")
            paths += files
            labels += [classes.index(entry.name)] * len(files)
        if not paths:
            raise DataError(f"dataset: expected pictures in {root}/CLASS/, found none")
        splits[split] = Pictures(np.array(paths), size), np.array(labels, np.int32)
    if len(splits) == 1:
        raise DataError(f"dataset: expected test/ or val/ beside train/ in {folder}, found neither")
    test = splits.get("test") or splits["val"]
    return splits["train"], splits.get("val") if "test" in splits else None, test


def read_pictures(splits, in_memory, max_unreadable):
    """Decode every file of [(Pictures, labels), ...] once, before a long run meets a broken one.

    Returns:
        the splits without the files that cannot be read, each of which is named on stderr, and with
        counts; the decoded pictures of each split, if they shall be in memory; how many files were
        left out.

    Raises:
        DataError: more than max_unreadable, all of a split or of a class to train on; the arrays
            are too large.
    """
    total, size = sum(len(images) for images, _ in splits), splits[0][0].size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if in_memory and total * size * size * 3 > memory / 2:
        raise DataError(
            f"dataset: {total:,} pictures of {size} x {size} pixels need "
            f"{total * size * size * 3 / 1e9:.1f} GB, more than half of this machine's memory: "
            "--loader torch"
        )

    def read(path):
        try:
            image = decode_picture(path, size)
            return image if in_memory else None, count_values(image[None]), None
        except DataError as error:
            return None, None, str(error)

    found, decoded, done, problems = [], [], 0, 0
    threads = math.ceil(count_cores())  # Pillow decodes without the interpreter lock
    with ThreadPoolExecutor(threads) as pool:
        for images, labels in splits:
            array = allocate(images.shape if in_memory else (0,))
            counts, readable = np.zeros((3, 256), np.int64), []
            for row in range(len(images)):
                if row % 1000 == 0:  # not all at once: a million of them would take a gigabyte
                    results = pool.map(read, images.paths[row : row + 1000])
                image, values, problem = next(results)
                done += 1
                if sys.stderr.isatty() and done % 100 == 0:
                    line = f"reading pictures: {done:,} of {total:,}"
                    print(line, end="\033[K\r", file=sys.stderr, flush=True)
                if problem is None:
                    if in_memory:
                        array[len(readable)] = image
                    counts += values
                    readable.append(row)
                    continue
                problems += 1
                if problems > max_unreadable:
                    limit = f"more than --max-unreadable {max_unreadable}"
                    raise DataError(f"{problem}; {problems} unreadable files, {limit}")
                print(f"left out: {problem}", file=sys.stderr)
            if len(images) and not readable:
                raise DataError(f"dataset: none of {len(images)} pictures of a split can be read")
            if not found and len(lost := np.setdiff1d(labels, labels[readable])):  # in training
                place = os.path.dirname(os.fsdecode(images.paths[labels == lost[0]][0]))
                raise DataError(f"dataset: none of the pictures in {place} can be read")
            found.append((Pictures(images.paths[readable], size, counts), labels[readable]))
            decoded.append(array[: len(readable)])
    if problems:
        print(f"{problems} of {total} pictures were left out", file=sys.stderr)
    return found, decoded, problems


# ---------------------------------------------------------------------------------------------
# CIFAR-100


def load_cifar100():
    """CIFAR-100: from Keras' cache (~/.keras or KERAS_HOME), or downloaded to there.

    Keras unpacks and decodes the archive at every call, which takes seconds; what it gave is kept
    beside the archive, as an .npz whose checksums are verified when it is read.

    Returns:
        (x_train, y_train), (x_test, y_test): images uint8 (50000 or 10000, 32, 32, 3), labels
        int32 (n,).

    Raises:
        DataError: the archive is damaged, or neither there nor to be had.
    """
    archive, folder = find_cifar100()
    if kept := read_kept(folder + ".npz"):
        return kept
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(archive), exist_ok=True)
    with alone(archive + ".lock"):  # of several runs that start at once, one does it for all
        if kept := read_kept(folder + ".npz"):
            return kept
        if not os.path.exists(archive):
            download_cifar100(archive)
        train, test = unpack_cifar100(archive, folder)
        keep(folder + ".npz", *train, *test)
    return train, test


def read_kept(path):
    """What `keep` has written; None where it is not there yet, or damaged."""
    try:
        with np.load(path) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in arrays.files)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        return None
    return (x_train, y_train), (x_test, y_test)


def download_cifar100(archive):
    try:
        fetch(CIFAR100_URL, archive, CIFAR100_SHA256, STALL_SECONDS)
    except (OSError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"CIFAR-100: expected {archive}, found nothing there and could not download it "
            f"({reason}); run again, which goes on where this broke off, or put {CIFAR100_URL} "
            "there under that name, or use --dataset synthetic"
        ) from error


def unpack_cifar100(archive, folder):
    """What `load_cifar100` returns, by Keras from the archive."""
    import keras  # here, not at the top: the caller has chosen the backend by now

    # Keras checks the hash too, but where it differs it downloads anew, and where that fails it
    # deletes the file. Asking first (a tenth of a second) leaves the file to its owner.
    if not is_official(archive):
        raise DataError(describe_damage(archive, "unreadable, or not the official sha256"))
    try:
        train, test = keras.datasets.cifar100.load_data()
    except Exception as error:  # a plain one, where what was unpacked before is damaged
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(describe_damage(folder, reason)) from error
    if train[0].shape[1] == 3:  # a keras.json may ask for channels first
        train, test = ((x.transpose(0, 2, 3, 1), y) for x, y in (train, test))
    return tuple((x, y.reshape(-1).astype(np.int32)) for x, y in (train, test))


def keep(path, *arrays):
    """Write an .npz, whole or not at all; a disk that is full or not ours is no reason to fail."""
    partial = f"{path}.{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            np.savez(file, *arrays)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(partial)


def find_cifar100():
    """Where Keras keeps the archive and the folder it unpacks it to (the rules of its get_file)."""
    home = os.path.expanduser(os.environ.get("KERAS_HOME", os.path.join("~", ".keras")))
    if not os.access(home, os.W_OK):
        home = os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), ".keras")
    folder = os.path.join(home, "datasets", "cifar-100-python-target")
    return folder + "_archive", folder


def is_official(archive):
    try:
        with open(archive, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == CIFAR100_SHA256
    except OSError:  # not ours to read, or a folder of that name
        return False


def describe_damage(path, reason):
    return (
        f"CIFAR-100: expected what {CIFAR100_URL} holds, but {path} is corrupt or incomplete "
        f"({reason}); remove it with `rm -r {shlex.quote(path)}` and run again, "
        "or use --dataset synthetic"
    )


# ---------------------------------------------------------------------------------------------
# Synthetic shapes: class = shape * 10 + colour

CHUNK = 500  # pictures drawn at once: their arrays stay in the processor's cache

# Red, orange, yellow, green, cyan, blue, purple, pink, white, black.
COLOURS = "d71e1e f58714 fae632 1e9632 3cd7e1 2341dc 7823a0 fa82c8 f0f0f0 141414"
COLOURS = np.array([list(bytes.fromhex(c)) for c in COLOURS.split()], np.float32)  # (10, 3)

# A shape is a function of the coordinates (u, v), v pointing down, in a frame that is centred on
# it, turned with it and scaled to its radius: about the distance to its edge, negative inside.
# There is no arctan2 and the like in them: they may differ in the last bit between processors.


def disc(u, v, radius=1.0):
    return np.sqrt(u * u + v * v) - radius


def box(u, v, half_width, half_height):
    return np.maximum(abs(u) - half_width, abs(v) - half_height)


def sides(u, v, corners, distance):
    """Signed distances to the lines of a regular polygon, one of them level below the centre."""
    for angle in (math.pi / 2 + 2 * math.pi * k / corners for k in range(corners)):
        yield u * math.cos(angle) + v * math.sin(angle) - distance


def star(u, v):
    # Five lines make a pentagram; a point in it is on the outer side of one of them at most.
    largest = second = np.full_like(u, -9.0)
    for side in sides(u, -v, 5, 0.36):
        second = np.maximum(second, np.minimum(largest, side))
        largest = np.maximum(largest, side)
    return second


SHAPES = (
    lambda u, v: disc(u, v, 0.9),
    lambda u, v: abs(disc(u, v, 0.75)) - 0.22,  # ring
    lambda u, v: box(u, v, 0.78, 0.78),  # square
    lambda u, v: np.maximum.reduce(list(sides(u, v, 3, 0.55))),  # triangle
    lambda u, v: np.minimum(box(u, v, 1.0, 0.28), box(u, v, 0.28, 1.0)),  # plus
    star,
    lambda u, v: np.maximum(disc(u, v - 0.4), v - 0.4),  # half disc, flat side down
    lambda u, v: np.maximum(disc(u, v), -disc(u - 0.5, v, 0.85)),  # crescent
    lambda u, v: box(u, v, 1.0, 0.25),  # bar
    lambda u, v: np.maximum(0.75 * (abs(u) - abs(v)), abs(v) - 0.85),  # hourglass
)


def create_synthetic(train_images=None, test_images=None, seed=0, num_classes=100):
    """Draw pictures of ten shapes in ten colours: a stand-in with the form of CIFAR-100, no more.

    Place, size, angle, shade, background and noise are random. Returns (x_train, y_train),
    (x_test, y_test) as `load_cifar100`; by default 500 and 100 images a class. Image i depends on
    the seed, i and num_classes only, and the splits are drawn apart. Raises DataError.
    """
    train_images = 500 * num_classes if train_images is None else train_images
    test_images = 100 * num_classes if test_images is None else test_images
    if min(train_images, test_images) < 1:
        raise DataError(f"images: expected 1 or more, got {train_images} train, {test_images} test")
    pictures = []
    for n, stream in ((train_images, TRAIN_PICTURES), (test_images, TEST_PICTURES)):
        labels = np.arange(n, dtype=np.int32) % num_classes
        images = np.empty((n, 32, 32, 3), np.uint8)
        for start in range(0, n, CHUNK):
            part = slice(start, start + CHUNK)
            images[part] = draw_chunk(labels[part], np.random.default_rng((seed, stream, start)))
        pictures.append((images, labels))
    return tuple(pictures)


def draw_chunk(labels, rng):
    """Up to CHUNK pictures, uint8 (k, 32, 32, 3), of the classes in labels (k,)."""
    # Drawn for a whole chunk even where fewer are wanted: a picture must not depend on how many.
    draws = rng.random((10, CHUNK), dtype=np.float32)[:, : len(labels)]
    radius = 9 + 4 * draws[0]  # in pixels
    x, y = 16 + (2 * draws[1:3] - 1) * (15.5 - radius)  # anywhere, but whole
    angle = np.radians(50 * draws[3].astype(np.float64) - 25)
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    colour = COLOURS[labels % 10] + 24 * draws[4:7].T - 12
    background = 255 * draws[7:10].T
    # Too near to the shape's colour: half the range away in each channel is never near.
    near = np.square(background - colour).sum(axis=1) < 110**2
    background[near] = (background[near] + 127.5) % 255

    pixel = np.arange(32, dtype=np.float32) + 0.5
    x = (pixel - x[:, None, None]) / radius[:, None, None]  # (k, 1, 32)
    y = (pixel[:, None] - y[:, None, None]) / radius[:, None, None]  # (k, 32, 1)
    u, v = cos * x + sin * y, cos * y - sin * x  # (k, 32, 32)
    distance = np.empty_like(u)
    for shape in np.unique(labels // 10):
        rows = labels // 10 == shape
        distance[rows] = SHAPES[shape](u[rows], v[rows])
    coverage = np.clip(0.5 - distance * radius[:, None, None], 0, 1)[..., None]  # smooth edges

    image = rng.random((len(labels), 32, 32, 3), dtype=np.float32)
    image = 50 * image - 25 + background[:, None, None]
    image += coverage * (colour - background)[:, None, None]
    return np.clip(image, 0, 255).astype(np.uint8)
