"""Augmentation on the device against Pillow, SciPy and plain NumPy, on both backends."""

import numpy as np
import pytest
from conftest import BACKENDS, run_code
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import map_coordinates

from harness import augment

AUGMENT = """
import json, numpy as np, keras
from harness import augment, engine
images = np.random.default_rng(0).integers(0, 256, (6, 20, 32, 3)).astype("uint8")
maps = augment.draw_affine(6, 5, 2, rotation=0.1)
result = engine.compile_function(augment.apply_affine)(images, maps)
np.save("images.npy", images), np.save("maps.npy", maps)
np.save("result.npy", keras.ops.convert_to_numpy(result))
print(json.dumps([str(keras.backend.standardize_dtype(result.dtype))]))
"""


def test_affine_against_scipy(tmp_path, backend):
    assert run_code(tmp_path, backend, AUGMENT) == ["float32"]
    images, maps, result = (np.load(tmp_path / f"{n}.npy") for n in ("images", "maps", "result"))
    y, x = np.mgrid[:20, :32].reshape(2, -1) - np.array([[9.5], [15.5]])
    for image, (to_x, to_y), got in zip(images.astype("float64"), maps.astype("float64"), result):
        places = [to_y[0] * x + to_y[1] * y + 9.5, to_x[0] * x + to_x[1] * y + 15.5]
        for channel in range(3):
            expected = map_coordinates(image[..., channel], places, order=1, mode="reflect")
            assert np.abs(got[..., channel].ravel() - expected).max() < 0.05  # of 255


def test_draws():
    from harness.augment import draw_affine

    maps = draw_affine(2000, seed=1, epoch=0)
    assert maps.shape == (2000, 2, 2) and maps.dtype == np.float32
    assert (maps == draw_affine(2000, 1, 0)).all() and (maps != draw_affine(2000, 1, 1)).any()
    mirrored = np.linalg.det(maps) < 0
    assert 900 < mirrored.sum() < 1100
    zoom_x = np.hypot(maps[:, 0, 0], maps[:, 1, 0])
    angle = np.arctan2(maps[:, 1, 0], np.abs(maps[:, 0, 0])) / (2 * np.pi)
    assert 0.8 <= zoom_x.min() < 0.81 and 1.19 < zoom_x.max() <= 1.2 + 1e-6
    assert np.abs(angle).max() <= 0.02 + 1e-6 and np.abs(angle).max() > 0.019


# ---- against Pillow ----------------------------------------------------------------------------

FILL = (10, 200, 90)
STRENGTHS = {  # in augment's terms, and what Pillow would do
    "identity": ([0], lambda image, s: image),
    "autocontrast": ([0], lambda image, s: ImageOps.autocontrast(image)),
    "equalize": ([0], lambda image, s: ImageOps.equalize(image)),
    "invert": ([0], lambda image, s: ImageOps.invert(image)),
    "posterize": (
        [1, 2, 16, 128],
        lambda image, s: ImageOps.posterize(image, 8 - round(np.log2(s))),
    ),
    "solarize": ([0, 100.5, 255, 256], lambda image, s: ImageOps.solarize(image, s)),
    "solarize_add": (
        [0, 60, 110],
        lambda image, s: image.point([min(255, v + s) if v < 128 else v for v in range(256)] * 3),
    ),
    "brightness": ([0.1, 0.7, 1.9], lambda image, s: ImageEnhance.Brightness(image).enhance(s)),
    "contrast": ([0.1, 0.7, 1.9], lambda image, s: ImageEnhance.Contrast(image).enhance(s)),
    "color": ([0.1, 0.7, 1.9], lambda image, s: ImageEnhance.Color(image).enhance(s)),
    "sharpness": ([0.1, 0.7, 1.9], lambda image, s: ImageEnhance.Sharpness(image).enhance(s)),
}
CASES = [(name, s) for name, (strengths, _) in STRENGTHS.items() for s in strengths]
MOVES = {
    "rotate": ([-0.4, 0.3, 2.0], lambda s: {"rotate": np.degrees(s)}),
    "shear_x": ([-0.3, 0.9], lambda s: {"affine": (1, s, 0, 0, 1, 0)}),
    "shear_y": ([-0.3, 0.9], lambda s: {"affine": (1, 0, 0, s, 1, 0)}),
    "translate_x": ([-7, 3.3, 31], lambda s: {"affine": (1, 0, s, 0, 1, 0)}),
    "translate_y": ([-7, 3.3, 31], lambda s: {"affine": (1, 0, 0, 0, 1, s)}),
}
MOVED = [(name, s) for name, (strengths, _) in MOVES.items() for s in strengths]
OPERATIONS = """
import json, numpy as np, keras
from harness import augment, engine
given = np.load("given.npz")
colours = engine.compile_function(augment.apply_colours)
moves = engine.compile_function(lambda x, maps: augment.apply_affine(x, maps, given["fill"]))
results = {
    "colours": colours(given["images"], given["colours"], given["strengths"]),
    "moves": moves(given["images"][:len(given["maps"])], given["maps"]),
}
np.savez("results.npz", **{k: keras.ops.convert_to_numpy(v) for k, v in results.items()})
print(0)
"""


def create_pictures():
    """Noise, a dark gradient, a picture of few values and one of a single value."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (32, 32, 3))
    gradient = np.stack(
        [np.add.outer(np.arange(32), np.arange(32)) * n // 2 + 20 for n in (1, 2, 3)], 2
    )
    few = rng.choice([3, 77, 200], (32, 32, 3))
    return np.stack([noise, gradient, few, np.full((32, 32, 3), 90)]).astype("uint8")


@pytest.fixture(scope="module", params=BACKENDS)
def results(request, tmp_path_factory):
    """Every colour operation and every move of each picture, by a backend."""
    folder, pictures = tmp_path_factory.mktemp("operations"), create_pictures()
    maps = [
        augment._create_moves(np.array([name]), np.array([float(s)]), 32)[0, :2]
        for name, s in MOVED
    ]
    np.savez(
        folder / "given.npz",
        images=np.repeat(pictures, len(CASES), axis=0),
        colours=np.tile([augment.RECOLOURS.index(n) for n, _ in CASES], 4)[:, None].astype("int32"),
        strengths=np.tile([s for _, s in CASES], 4)[:, None].astype("float32"),
        maps=np.tile(np.array(maps, "float32"), (1, 1, 1)),
        fill=np.array(FILL, "float32"),
    )
    run_code(folder, request.param, OPERATIONS)
    return np.load(folder / "results.npz")


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{n}-{s}" for n, s in CASES])
def test_colours_against_pillow(results, case):
    """Equal, but where a product falls on a whole number and Pillow's float64 is just below."""
    name, strength = CASES[case]
    for number, picture in enumerate(create_pictures()):
        expected = STRENGTHS[name][1](Image.fromarray(picture), strength)
        got = results["colours"][number * len(CASES) + case]
        difference = np.abs(got - np.asarray(expected, "float32"))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, (name, strength, number)


@pytest.mark.parametrize("case", range(len(MOVED)), ids=[f"{n}-{s}" for n, s in MOVED])
def test_moves_against_pillow(results, case):
    """Up to Pillow's cut to whole numbers."""
    name, strength = MOVED[case]
    image = Image.fromarray(np.repeat(create_pictures(), len(CASES), axis=0)[case])
    how = MOVES[name][1](strength)
    if "rotate" in how:
        expected = image.rotate(how["rotate"], Image.Resampling.BILINEAR, fillcolor=FILL)
    else:
        expected = image.transform(
            (32, 32),
            Image.Transform.AFFINE,
            how["affine"],
            Image.Resampling.BILINEAR,
            fillcolor=FILL,
        )
    difference = np.abs(results["moves"][case] - np.asarray(expected, "float32"))
    assert difference.max() < 1.01


# ---- crops, boxes, mixing ----------------------------------------------------------------------

PLAIN = """
import json, numpy as np, keras
from types import SimpleNamespace
from harness import augment, engine
config = SimpleNamespace(**{choices!r})
images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype("uint8")
labels = np.arange(20, dtype="int32") % 5
draw, apply = augment.create_augmentation(config, 20, 32, [9.6, 20, 30])
draws = draw(3)
results = engine.compile_function(apply)(images, labels, draws)
results = [keras.ops.convert_to_numpy(x) for x in results]
draws |= dict(images=images, labels=labels, result=results[0], targets=results[1])
np.savez("results.npz", **draws)
print(json.dumps([str(x.dtype) for x in results]))
"""
CHOICES = {
    **{
        "augment": True,
        "flip": True,
        "rotation": 0.0,
        "zoom": 0.0,
        "crop_padding": 4,
        "policy": "none",
    },
    **{"rand_magnitude": 9.0, "rand_std": 0.5, "rand_layers": 2, "erasing": 0.0, "seed": 1},
    **{"mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0, "mix_switch": 0.5},
    **{"label_smoothing": 0.0, "num_classes": 5},
}


def augment_on(folder, backend, **choices):
    kinds = run_code(folder, backend, PLAIN.format(choices={**CHOICES, **choices}))
    return kinds, np.load(folder / "results.npz")


def test_crops_are_exact(tmp_path, backend):
    kinds, given = augment_on(tmp_path, backend)
    assert kinds == ["float32", "int32"] and (given["targets"] == given["labels"]).all()
    fill = np.broadcast_to(np.float32([10, 20, 30]), (32, 32, 3))
    for image, ((mirror, _, right), (_, _, down)), got in zip(
        given["images"], given["maps"], given["result"]
    ):
        padded = np.pad(image.astype("float32"), ((4, 4), (4, 4), (0, 0)), constant_values=-1)
        x, y = int(right) + 4, int(down) + 4
        crop = padded[y : y + 32, x : x + 32]
        crop = crop[:, ::-1] if mirror < 0 else crop
        assert (got == np.where(crop < 0, fill, crop)).all()
    assert len({tuple(shift) for shift in given["maps"][:, :, 2]}) > 10


def test_nothing_is_mirrored_where_none_shall_be(tmp_path):
    for flip in (True, False):
        _, given = augment_on(tmp_path, "jax", flip=flip)
        assert (given["maps"][:, 0, 0] < 0).any() == flip


def test_erased_boxes(tmp_path, backend):
    _, given = augment_on(tmp_path, backend, erasing=0.5, crop_padding=0)
    areas = []
    mirror = given["maps"][:, 0, 0] < 0
    images = np.where(mirror[:, None, None, None], given["images"][:, :, ::-1], given["images"])
    for (top, left, bottom, right), got, plain in zip(given["erased"], given["result"], images):
        areas.append((bottom - top) * (right - left))
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 32
        expected = plain.astype("float32")
        expected[top:bottom, left:right] = np.round(np.float32([9.6, 20, 30]))
        assert np.abs(got - expected).max() < 1e-3
    assert 3 <= sum(area > 0 for area in areas) <= 17 and max(areas) <= 0.36 * 32 * 32


@pytest.mark.parametrize(
    "choices", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_pairs_are_mixed(tmp_path, backend, choices):
    """Pictures and labels by the same shares, whatever part of a batch is computed at once."""
    _, given = augment_on(tmp_path, backend, label_smoothing=0.1, crop_padding=0, **choices)
    mirror = given["maps"][:, 0, 0] < 0
    images = np.where(mirror[:, None, None, None], given["images"][:, :, ::-1], given["images"])
    images, one_hot = images.astype("float32"), np.eye(5)[given["labels"]] * 0.9 + 0.02
    for number, (share, (top, left, bottom, right)) in enumerate(zip(given["share"], given["box"])):
        other = images[number ^ 1]
        expected = images[number].copy()
        if bottom > top:
            expected[top:bottom, left:right] = other[top:bottom, left:right]
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 1024)
        else:
            expected = share * expected + (1 - share) * other
        assert np.abs(given["result"][number] - expected).max() < 1e-3
        target = share * one_hot[number] + (1 - share) * one_hot[number ^ 1]
        assert given["targets"][number] == pytest.approx(target, abs=1e-6)
    is_cut = given["box"][:, 2] > given["box"][:, 0]
    assert is_cut.any() == ("cutmix" in choices) and (~is_cut).any() == ("mixup" in choices)


def test_the_whole_pipeline_is_the_same_on_every_backend(tmp_path):
    strong = {
        "policy": "rand",
        "erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
    }
    results = []
    for backend in BACKENDS:
        (tmp_path / backend).mkdir()
        results.append(augment_on(tmp_path / backend, backend, **strong)[1])
    ours, theirs = results
    assert all((ours[name] == theirs[name]).all() for name in ("maps", "colours", "share", "box"))
    assert np.abs(ours["targets"] - theirs["targets"]).max() < 1e-6
    difference = np.abs(ours["result"] - theirs["result"])  # a level may fall to the other side
    assert (difference > 0.01).mean() < 0.002 and np.abs(ours["result"] - ours["images"]).mean() > 9


# ---- draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, names", [("rand", augment.RAND), ("trivial", augment.TRIVIAL)])
def test_a_policy_draws_each_operation_as_often(policy, names):
    draws = augment.draw_policy(30_000, 1, 0, policy, 32)
    again = augment.draw_policy(30_000, 1, 0, policy, 32)
    assert all((draws[name] == again[name]).all() for name in draws)
    chance = {"rand": 0.5 / 15, "trivial": 1 / 14}[policy]
    for name in augment.RECOLOURS[1:]:
        share = (draws["colours"] == augment.RECOLOURS.index(name)).mean()
        assert share == pytest.approx(chance if name in names else 0, abs=0.005), name
    still = (draws["moves"] == np.eye(3, dtype="float32")).all(axis=(1, 2)).mean()
    layers = draws["colours"].shape[1]
    # TrivialAugment's strength is nothing in one of 31 draws.
    moved = 5 * chance * (30 / 31 if policy == "trivial" else 1)
    assert still == pytest.approx((1 - moved) ** layers, abs=0.01)


def test_two_moves_are_done_in_order():
    """The picture is turned first and shifted then: its centre is found where the shift put it."""
    names = [np.array(["rotate"]), np.array(["translate_x"])]
    turned, shifted = (
        augment._create_moves(name, np.array([s]), 32)[0] for name, s in zip(names, (0.5, 10.0))
    )
    assert (turned @ shifted @ [-10, 0, 1])[:2] == pytest.approx([0, 0])
