"""The hand-written peers do the same work as vit.py: model, pictures, training, figures, record."""

import signal
import subprocess
import sys

import pytest
from conftest import (
    BACKENDS,
    LEARNING,
    ROOT,
    SMALL,
    child_environment,
    read_last_record,
    refusal,
    run_code,
    run_vit,
)

from harness.record import read_records
from peers import common

NO_DROPOUT = ("--dropout=0", "--attention-dropout=0", "--head-dropout=0")
BOUND = 0.12
# Beside SMALL: models, and all that the project's own recipes do with one but policy and erasing.
LINEAR = ("--mlp-ratio=1", "--mlp-head-units")
MODELS = {
    "heads": ("--head-dim=24",),
    "convolutions": (*LINEAR, "--image-size=32", "--stem=conv", "--pool=attention"),
    "token": (*LINEAR, "--pool=token"),
    "mean": ("--pool=mean",),
}
RECIPE = (
    *(*MODELS["convolutions"], "--rotation=0", "--zoom=0", "--crop-padding=4"),
    *("--label-smoothing=0.1", "--schedule=cosine", "--warmup-epochs=1", "--beta-2=0.99"),
    *("--weight-decay=0.06", "--decay-kernels-only", "--clip-norm=1", "--ema=0.9"),
    "--optimizer=muon",
    "--no-best-weights",
)
COMPARE = """
import dataclasses, json
import keras
import numpy as np
import vit
from harness import augment, data, engine
from peers import common
from peers import native_{backend} as native

engine.set_precision("float32")
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (5, 32, 32, 3)).astype("uint8")


def compare(flags):
    config = vit.parse_config([*flags, "--no-use-wandb"])
    statistics, draw, apply = vit.create_data_augmentation(config, images)
    model = vit.create_vit_classifier(config, **statistics)
    peer = native.Peer(common.parse(common.Config, flags, ""))
    peer.build(*data.measure_pixels(images))
    initial = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
    pairs = zip(initial, common.draw_weights(peer.config), strict=True)
    facts = {{"same_start": all(np.array_equal(a, b) for a, b in pairs)}}
    weights = [w + rng.normal(0, 0.05, w.shape).astype("float32") for w in initial]
    for variable, weight in zip(model.trainable_variables, weights):
        variable.assign(weight)
    peer.load_keras_weights(weights)
    logits = keras.ops.convert_to_numpy(model(images.astype("float32"), training=False))
    facts["logits"] = float(abs(peer.predict(images) - logits).max() / abs(logits).max())
    facts["parameters"] = [peer.count_parameters(), sum(w.size for w in weights)]
    facts["flops"] = [peer.count_flops(), engine.count_flops(model)]
    return facts


facts = {{name: compare(flags) for name, flags in {models!r}.items()}}
ours, theirs = dataclasses.asdict(common.Config()), dataclasses.asdict(vit.ViTConfig())
facts["other_defaults"] = [name for name in ours if ours[name] != theirs[name]]
maps = augment.draw_affine(5, 0, 0)
shifts = augment.draw_crop(augment.draw_affine(5, 0, 0, 0, 0), 0, 0, 4)
fill = np.float32([10, 20, 30])
expected = [augment.apply_affine(*map(keras.ops.convert_to_tensor, (images, maps)))]
expected += [augment.apply_shift(*map(keras.ops.convert_to_tensor, (images, shifts)), fill)]
if "{backend}" == "torch":
    from torch import from_numpy as tensor

    pixels = tensor(images).permute(0, 3, 1, 2).float()
    pictures = [native.resample(pixels, tensor(maps)).permute(0, 2, 3, 1)]
else:
    from numpy import asarray as tensor

    pictures = [native.resample(images, maps)]
pictures += [native.shift(*map(tensor, (images, shifts, fill)))]
facts["augmentation"] = [
    float(abs(np.asarray(ours) - keras.ops.convert_to_numpy(theirs)).max())
    for ours, theirs in zip(pictures, expected)
]
print(json.dumps(facts))
"""


def start_peer(folder, backend, *flags, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"peers/native_{backend}.py"), *flags],
        cwd=folder,
        env=child_environment(folder, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_peer(folder, backend, *flags, **environment):
    """(exit code, stdout, stderr) of a run in `folder`."""
    child = start_peer(folder, backend, *flags, **environment)
    stdout, stderr = child.communicate()
    return child.returncode, stdout, stderr


# ---- the same model and pictures ---------------------------------------------------------------


@pytest.fixture(scope="module")
def facts(backend, tmp_path_factory):
    small = [flag for flag in SMALL if not flag.startswith("--dataset")]
    models = {name: [*small, *flags] for name, flags in MODELS.items()} | {"default": []}
    code = COMPARE.format(backend=backend, models=models)
    return run_code(tmp_path_factory.mktemp("facts"), backend, code)


@pytest.mark.parametrize("model", ["default", *MODELS])
def test_equal_weights_give_equal_logits(facts, model):
    assert facts[model]["logits"] < 1e-4


@pytest.mark.parametrize("model", ["default", *MODELS])
def test_the_model_is_as_large_and_costs_as_much(facts, model):
    ours, theirs = facts[model]["parameters"]
    assert ours == theirs
    assert facts[model]["flops"][0] == facts[model]["flops"][1]
    assert model != "default" or ours == 21_759_012


@pytest.mark.parametrize("model", ["default", *MODELS])
def test_training_starts_from_the_same_numbers(facts, model):
    assert facts[model]["same_start"]


def test_the_defaults_are_the_same(facts):
    assert facts["other_defaults"] == ["use_wandb"]


def test_augmentation_gives_the_same_pictures(facts):
    resampled, shifted = facts["augmentation"]
    assert resampled < 1e-3 * 255 and shifted == 0


# What is not about compiled code: PyTorch compiles for a minute, JAX takes as long without.
EAGER = {"jax": (), "torch": ("--no-jit-compile",)}

# ---- the same run ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(), RECIPE], ids=["keras-io", "own"])
def records(request, backend, tmp_path_factory):
    """Records of vit.py and of the peer for the same flags, nothing dropped."""
    flags = (*SMALL, "--num_epochs=3", *NO_DROPOUT, "--node-name=here", "--precision=tf32")
    flags += request.param
    folders = [tmp_path_factory.mktemp(name) for name in ("vit", "peer")]
    done = run_vit(folders[0], *flags, backend=backend)
    assert done.returncode == 0, done.stderr
    code, output, errors = run_peer(folders[1], backend, *flags, VIT_RECORD_ID="mine")
    assert code == 0, errors
    assert output.count("images/s") == 4 and "test accuracy" in output  # 3 epochs and the summary
    return [read_last_record(folder) for folder in folders]  # which passes check_record


def test_a_record_has_the_same_fields(backend, records):
    theirs, ours = records
    assert (ours["id"], ours["backend"], ours["status"]) == ("mine", f"native-{backend}", "ok")
    for group in ("device", "model", "timing", "memory", "energy", "quality"):
        assert set(ours[group]) == set(theirs[group]), group
    assert ours["config"] == {name: theirs["config"][name] for name in ours["config"]}
    assert ours["precision"] == theirs["precision"]
    assert ours["model"] == theirs["model"]
    assert len(ours["timing"]["epoch_seconds"]) == len(ours["timing"]["validation_seconds"]) == 3


def test_the_pictures_are_the_same(records):
    theirs, ours = (record["quality"] for record in records)
    names = ("dataset", "data_fingerprint", "train_images", "validation_images", "test_images")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_training_takes_the_same_course(records):
    """Without dropout nothing is random: start, order, maps and arithmetic must all agree."""
    theirs, ours = (record["quality"] for record in records)
    for name in ("loss", "val_loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    assert ours["test_top5_accuracy"] == pytest.approx(theirs["test_top5_accuracy"], abs=0.03)


def test_both_ways_to_learn_end_alike(backend, tmp_path):
    """With dropout and augmentation on: their masks differ, what they lead to must not."""
    run_vit(tmp_path, *LEARNING, backend=backend)
    run_peer(tmp_path, backend, *LEARNING, *EAGER[backend])
    theirs, ours = (
        record["quality"]["test_accuracy"] for record in read_records(tmp_path / "results.jsonl")[0]
    )
    assert min(ours, theirs) > 0.3 and abs(ours - theirs) < BOUND


def test_the_keras_io_example_is_the_same_model(backend, tmp_path):
    flags = ("--keras-backend", backend, "--no-use-wandb", "--checkpoint-path=best.weights.h5")
    few = (*SMALL, "--train-images=80", "--test-images=50")
    done = subprocess.run(
        [sys.executable, str(ROOT / "peers/keras_io.py"), *few, *flags],
        cwd=tmp_path,
        env=child_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = read_last_record(tmp_path)
    assert (theirs["backend"], theirs["config"]["trainer"]) == (f"keras-io-{backend}", "fit")
    run_peer(tmp_path, backend, *few, *EAGER[backend])
    assert read_last_record(tmp_path)["model"] == theirs["model"]


@pytest.mark.parametrize(
    "flag, expected",
    [("--stem=conv", "--stem: expected patch"), ("--no-flip", "--flip: expected ")],
)
def test_the_keras_io_example_refuses_what_it_does_not_have(tmp_path, flag, expected):
    flags = (flag, "--no-use-wandb")
    done = subprocess.run(
        [sys.executable, str(ROOT / "peers/keras_io.py"), *SMALL, *flags],
        cwd=tmp_path,
        env=child_environment(tmp_path, KERAS_BACKEND="jax"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not (tmp_path / "results.jsonl").exists()
    assert done.stderr.startswith(f"keras_io.py: error: {expected}")
    assert "as the example" in done.stderr and done.stderr.count("\n") == 1


# ---- the same ways to end ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--num-epochs=many"], "--num-epochs"),
        (["--batch-size=0"], "--batch-size: expected above 0, got 0"),
        (["--train-images=100"], "--batch-size: expected at most the 90 images"),
        (["--precision=float16"], "--precision"),
        (["--stem=conv"], "--stem conv: expected --patch-size 2, 4, 8 or 16, got 6"),
        (["--warmup-epochs=1"], "--warmup-epochs: expected --schedule cosine, got constant"),
        (["--head-dim=0"], "--head-dim: expected above 0, got 0"),
        (["--mlp-ratio=inf"], "--mlp-ratio: expected above 0, got inf"),
        (["--mlp-ratio=2", "--transformer-units", "8", "64"], "--mlp-ratio: expected none beside"),
    ],
)
def test_a_bad_value_is_one_line(capsys, flags, told):
    assert told in refusal(lambda flags: common.parse(common.Config, flags, ""), flags, capsys)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "flags, told",
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--image-size=70"], "--image-size: expected a multiple of --patch-size 6, got 70"),
    ],
)
def test_a_bad_flag_is_one_line(tmp_path, backend, flags, told):
    library = tmp_path / f"{backend}.py"  # found before the real one, which is not needed for this
    library.write_text(f"raise SystemExit('{backend} was imported')")
    code, _, errors = run_peer(tmp_path, backend, *flags, PYTHONPATH=str(tmp_path))
    assert code == 2 and len(errors.splitlines()) == 1 and told in errors
    assert errors.startswith(f"native_{backend}.py: error: ")
    assert not (tmp_path / "results.jsonl").exists()


def test_help_names_the_flags(backend, tmp_path):
    code, output, _ = run_peer(tmp_path, backend, "--help")
    assert code == 0 and "--transformer-layers" in output and "--no-augment" in output


def test_the_last_step_broke_the_weights(backend, tmp_path):
    """Its epoch's loss is of before it: without a validation the test is the first to see it"""
    flags = (*SMALL, "--num-epochs=1", "--train-images=50", "--batch-size=50", *EAGER[backend])
    flags = (*flags, "--validation-split=0", "--warmup-epochs=0", "--learning-rate=1e30")
    code, _, errors = run_peer(tmp_path, backend, *flags, "--no-verbose")
    record = read_last_record(tmp_path)
    assert (code, record["status"]) == (4, "diverged"), errors
    assert "in the test: lower --learning-rate" in record["error"]
    assert "test_accuracy" not in record["quality"] or record["quality"]["test_accuracy"] is None


def test_an_image_for_a_gpu_has_none(backend, tmp_path):
    code, _, errors = run_peer(tmp_path, backend, *SMALL, VIT_EXPECT_GPU="1")
    assert code == 2 and "expected a GPU, for which this image is made" in errors


def test_a_diverged_run_leaves_a_record(backend, tmp_path):
    flags = (*SMALL, "--learning_rate=1e30", "--use_wandb=True", "--no-verbose", *EAGER[backend])
    code, output, errors = run_peer(tmp_path, backend, *flags)
    assert code == 4 and output == "" and "lower --learning-rate" in errors
    assert read_last_record(tmp_path)["status"] == "diverged"


@pytest.mark.parametrize(
    "backend, number, code",
    [("jax", signal.SIGINT, 130), ("torch", signal.SIGTERM, 143)],
    scope="session",
)
def test_a_stopped_run_leaves_a_record(backend, tmp_path, number, code):
    child = start_peer(tmp_path, backend, *SMALL, "--num-epochs=10000", "--validation-split=0")
    line = next(line for line in child.stdout if line.startswith("epoch 2/"))
    assert "images/s" in line
    child.send_signal(number)
    child.communicate()
    assert child.returncode == code
    record = read_last_record(tmp_path)
    assert record["status"] == "interrupted" and len(record["timing"]["epoch_seconds"]) >= 2
