"""Pictures from a folder, and through PyTorch's DataLoader."""

import shutil

import numpy as np
import pytest
from conftest import SMALL, read_last_record, run_vit
from PIL import Image

from harness import data, loader

CLASSES = ("bee", "cat", "Dog")


def draw_picture(rng, label, width, height):
    """A picture of noise whose colour tells the class."""
    pixels = rng.integers(0, 120, (height, width, 3), np.uint8)
    pixels[..., label] += 130
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Three classes with 30, 30 and 12 pictures to train on and 4 each to test on, of many sizes
    and formats."""
    rng = np.random.default_rng(0)
    kinds = ("png", "jpg", "gif", "webp")
    for split, counts in (("train", (30, 30, 12)), ("test", (4, 4, 4))):
        for label, (name, count) in enumerate(zip(CLASSES, counts)):
            place = tmp_path / "pets" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                width, height = rng.integers(9, 60, 2)
                path = place / f"{number} ö.{kinds[number % len(kinds)]}"
                draw_picture(rng, label, width, height).save(path)
    (tmp_path / "pets" / "train" / "bee" / ".hidden").write_text("not a picture")
    return tmp_path / "pets"


def load(folder, **choices):
    return data.load_dataset(str(folder), **{"num_classes": 3, "size": 16, **choices})


def test_a_folder_is_split_in_proportion(folder):
    found = load(folder, validation_split=1 / 6)
    assert found.x_train.shape == (60, 16, 16, 3) and found.x_train.dtype == np.uint8
    # sorted as Python sorts: capitals first
    assert np.bincount(found.y_train).tolist() == [10, 25, 25]
    assert np.bincount(found.y_validation).tolist() == [2, 5, 5]
    assert np.bincount(found.y_test).tolist() == [4, 4, 4]
    colours = found.x_train.mean(axis=(1, 2)).argmax(axis=1)
    assert (np.array([2, 0, 1])[found.y_train] == colours).all()
    assert found.label == "the folder pets" and found.unreadable == 0


def test_pictures_are_the_same_from_files_and_from_memory(folder):
    arrays, files = load(folder), load(folder, in_memory=False)
    for split in ("x_train", "x_validation", "x_test"):
        np.testing.assert_array_equal(getattr(files, split)[:], getattr(arrays, split))
    assert isinstance(files.x_train, data.Pictures)
    for of_files, of_arrays in zip(*(data.measure_pixels(d.x_train) for d in (files, arrays))):
        np.testing.assert_array_equal(of_files, of_arrays)
    other = load(folder, seed=1, in_memory=False)
    elsewhere = shutil.copytree(folder, folder.parent / "elsewhere" / "pets")
    again = load(elsewhere)
    assert files.fingerprint == arrays.fingerprint == again.fingerprint != other.fingerprint


def test_with_val_and_test_both_are_used(folder):
    shutil.copytree(folder / "test", folder / "val")
    (folder / "val" / "cat" / "0 ö.png").unlink()
    found = load(folder)
    assert [len(x) for x in (found.x_train, found.x_validation, found.x_test)] == [72, 11, 12]
    shutil.rmtree(folder / "test")
    found = load(folder)
    assert [len(x) for x in (found.x_train, found.x_validation, found.x_test)] == [65, 7, 11]


def test_pictures_are_upright_whole_and_rgb(tmp_path):
    left = np.zeros((20, 40, 3), np.uint8)
    left[:, :20] = 255  # white on the left
    turned = Image.fromarray(left)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned clockwise before it is shown: white on top
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(left).convert("L").save(tmp_path / "grey.png")
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "as_is.png")
    turned = data.decode_picture(str(tmp_path / "turned.png"), 8)
    assert turned[:3].min() > 250 and turned[-3:].max() < 5
    grey = data.decode_picture(str(tmp_path / "grey.png"), 8)
    assert grey.shape == (8, 8, 3) and grey[:, :3].min() > 250 and grey[:, -3:].max() < 5
    as_is = data.decode_picture(str(tmp_path / "as_is.png"), 4)
    np.testing.assert_array_equal(as_is, np.arange(48).reshape(4, 4, 3))


def break_pictures(folder):
    whole = folder / "train" / "cat" / "1 ö.jpg"
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "train" / "bee" / "notes.txt").write_text("no picture")
    return [whole, folder / "train" / "bee" / "notes.txt"]


def test_sixteen_bits_of_gray_are_scaled(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype("uint16"), (64, 1))
    for name in ("gray.png", "gray.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        found = data.decode_picture(tmp_path / name, 64)
        np.testing.assert_allclose(found[0, :, 0], ramp[0] / 257, atol=1)
    Image.fromarray(ramp / 65535.0).convert("F").save(tmp_path / "floats.tif")
    with pytest.raises(data.DataError, match="mode F has no known range"):
        data.decode_picture(tmp_path / "floats.tif", 64)


def test_unreadable_files_are_named_counted_and_left_out(folder, capfd):
    broken = break_pictures(folder)
    found = load(folder, max_unreadable=2, validation_split=0)
    assert found.unreadable == 2 and len(found.x_train) == len(found.y_train) == 71
    *told, last = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and last == "2 of 85 pictures were left out"
    for path in broken:
        assert any(line.startswith(f"left out: cannot read {path}") for line in told)
    with pytest.raises(data.DataError, match="2 unreadable files, more than --max-unreadable 1"):
        load(folder, max_unreadable=1)


def test_a_link_to_nowhere_is_an_unreadable_file(folder, capfd):
    (folder / "test" / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    assert load(folder, max_unreadable=1).unreadable == 1
    assert "gone.png as a picture: No such file or directory\n" in capfd.readouterr().err


def test_a_picture_for_which_there_is_no_memory_is_not_left_out(folder, monkeypatch):
    def fail(*given):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        load(folder)


def test_classes_without_pictures_to_test_on_are_told_before_training(folder):
    for name in ("bee", "Dog"):
        shutil.rmtree(folder / "test" / name)
    with pytest.raises(data.DataError, match="of the first 1 there are no pictures to test on"):
        load(folder, num_classes=1)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    scan = data.os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(data.os, "scandir", refuse)
    with pytest.raises(data.DataError, match="cannot list .*cat: Permission denied"):
        load(folder)


def test_a_class_of_which_no_file_can_be_read_is_named(folder):
    place = folder / "train" / "cat"
    for path in place.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(data.DataError, match=f"none of the pictures in {place} can be read"):
        load(folder, max_unreadable=100, validation_split=0)


@pytest.mark.parametrize("how", ["jax resident", "jax torch", "torch resident"])
def test_a_run_on_a_folder_with_a_broken_file(folder, how):
    backend, loader = how.split()
    broken = break_pictures(folder)
    flags = [*SMALL[4:], f"--dataset={folder}", f"--loader={loader}", "--batch-size=8"]
    flags += ["--image-size=16", "--rotation=0", "--zoom=0", "--num-epochs=3"]
    flags += ["--no-jit-compile"] if backend == "torch" else []
    done = run_vit(folder.parent, *flags, backend=backend)
    assert done.returncode == 0, done.stderr
    assert [f"left out: cannot read {path}" in done.stderr for path in broken] == [True, True]
    assert "\n2 of 85 pictures were left out\n" in done.stderr
    found = read_last_record(folder.parent)
    assert found["config"]["num_classes"] == 3 and found["config"]["input_shape"] == [16, 16, 3]
    assert found["quality"]["train_images"] == 64 and found["quality"]["test_images"] == 12
    assert "2 unreadable files were left out" in found["notes"]
    assert found["quality"]["test_accuracy"] > 0.5  # by chance a third
    done = run_vit(folder.parent, *flags, "--max-unreadable=1")
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 5 and "--max-unreadable 1" in lines[-1], done.stderr
    assert "Traceback" not in done.stderr and len(lines) == 2  # the first one, and why it ended


def test_the_loader_gives_the_same_images_in_the_same_order(tmp_path):
    """Here on JAX; what PyTorch does with a batch that lies on the device is in test_engine.py."""
    losses = []
    for choice in ("resident", "torch"):
        flags = [*SMALL, "--num-epochs=2", f"--loader={choice}", "--loader-workers=2"]
        done = run_vit(tmp_path, *flags, "--micro-batch-size=10")
        assert done.returncode == 0, done.stderr
        quality = read_last_record(tmp_path)["quality"]
        losses.append([quality[name] for name in ("loss", "val_loss", "test_accuracy")])
    assert losses[0] == losses[1]


def test_compiled_code_that_reads_past_a_batch(tmp_path):
    """Inductor writes such code with AVX-512, and a batch fills the pages of a worker's memory."""
    shape = ("--stem=conv", "--rotation=0", "--zoom=0", "--crop-padding=4", "--batch-size=128")
    flags = [*SMALL, *shape, "--validation-split=0", "--loader=torch", "--loader-workers=1"]
    as_ever = {"ATEN_CPU_CAPABILITY": ""}  # with all vector instructions of this processor
    done = run_vit(tmp_path, *flags, backend="torch", **as_ever)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_later_is_one_line(folder, workers):
    found = load(folder, in_memory=False, validation_split=0)
    stream = loader.Loader([found.x_train, found.x_test], 8, workers, 2, pin=False).streams[1]
    order = np.array([7, 3, 3, 11, 0, 1, 2, 4, 5, 6])
    for _ in range(2):  # epochs
        batches = [batch.numpy() for batch in stream.batches(order)]
        assert [len(batch) for batch in batches] == [8, 2]
        np.testing.assert_array_equal(np.concatenate(batches), found.x_test[order])
    shutil.rmtree(folder / "test" / "cat")
    with pytest.raises(data.DataError, match="^cannot read .*/test/cat/.* No such file[^\n]*$"):
        list(stream.batches(order))


def test_too_little_shared_memory(folder, monkeypatch):
    found = load(folder)
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    splits = [found.x_train, found.x_test]
    with pytest.raises(loader.SharedMemoryError, match="docker run --ipc host"):
        loader.Loader(splits, 64, 2, 2, pin=False)
    loader.Loader(splits, 64, 0, 2, pin=False)  # needs none


def empty_class(folder):
    shutil.rmtree(folder / "train" / "bee")
    shutil.rmtree(folder / "train" / "cat")


def empty_folder(folder):
    for path in (folder / "train" / "bee").iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "flags", "code", "told"),
    [
        (lambda folder: shutil.rmtree(folder / "train"), (), 2, "with train/CLASS/ and test/"),
        (lambda folder: shutil.rmtree(folder / "test"), (), 5, "test/ or val/ beside train/"),
        (lambda folder: (folder / "test" / "emu").mkdir(), (), 5, "train/ has not: emu"),
        (empty_class, (), 2, "two or more"),
        (empty_folder, (), 5, "train/bee, found none"),
        (
            lambda folder: (folder / "train" / "bee" / "2021").mkdir(),
            *((), 5, "expected files, not folders, got"),
        ),
        (lambda folder: None, ("--num-classes=4",), 5, "expected 1 to 3, got 4"),
        (lambda folder: None, ("--batch-size=80",), 5, "at most the 65 images"),
        (lambda folder: None, ("--train-images=99",), 5, "1 to 72 images, got 99"),
        (lambda folder: None, ("--loader=torch", "--trainer=fit"), 2, "compiled training"),
        (lambda folder: None, ("--input-shape", "16", "20", "3"), 2, "squares"),
    ],
)
def test_bad_folders_are_one_line(folder, change, flags, code, told):
    change(folder)
    done = run_vit(folder.parent, f"--dataset={folder}", *SMALL[4:], "--num-epochs=1", *flags)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and len(lines) == 1 and told in lines[0], done.stderr
