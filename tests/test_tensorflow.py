"""TensorFlow, the optional third backend: trains the same, computes the same, serves.

It has an environment of its own, since it wants other versions: `make test-tensorflow`.
"""

from importlib.util import find_spec

import pytest
from conftest import ROOT, SMALL, read_last_record, run_python, run_vit

pytestmark = pytest.mark.skipif(
    find_spec("tensorflow") is None, reason="TensorFlow is not installed: make test-tensorflow"
)
RECIPE = (  # what an optimiser and an augmentation can be asked for, and a batch in two parts
    *("--crop-padding=4", "--policy=trivial", "--mixup=0.8", "--label-smoothing=0.1"),
    *("--schedule=cosine", "--warmup-epochs=1", "--clip-norm=1", "--ema=0.9", "--drop-path=0.1"),
    *("--decay-kernels-only", "--batch-size=48", "--micro-batch-size=24"),
    "--optimizer=muon",
)
MODEL = [flag for flag in SMALL if not flag.startswith(("--dataset", "--num", "--train", "--test"))]


def train(folder, backend, *flags):
    done = run_vit(folder, *SMALL, "--num-epochs=3", *flags, backend=backend)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_last_record(folder)  # which passes check_record


@pytest.mark.parametrize("flags", [(), RECIPE], ids=["default", "recipe"])
def test_training_takes_the_same_course_as_on_jax(tmp_path, flags):
    """Dropout included, whose masks are the same: what differs is rounding."""
    theirs, ours = (train(tmp_path, name, *flags) for name in ("jax", "tensorflow"))
    assert ours["backend"] == "tensorflow" and ours["versions"]["tensorflow"]
    assert ours["timing"]["train_images_per_second"] > 0
    for name in ("loss", "val_loss"):
        assert ours["quality"][name] == pytest.approx(theirs["quality"][name], rel=1e-3), name


def test_compiled_steps_do_what_fit_does(tmp_path):
    flags = ("--dropout=0", "--attention-dropout=0", "--head-dropout=0")
    ours = train(tmp_path, "tensorflow", *flags)
    theirs = train(tmp_path, "tensorflow", *flags, "--trainer=fit")
    assert ours["quality"]["loss"] == pytest.approx(theirs["quality"]["loss"], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_computes_the_same_as_jax(tmp_path, precision):
    words = ("--backends", "jax", "tensorflow", f"--precision={precision}", "--", *MODEL)
    done = run_python(tmp_path, ROOT / "parity.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.endswith(f"compute the same within {precision}'s rounding\n")


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_a_saved_model_is_as_good_as_the_model(tmp_path, backend):
    train(tmp_path, backend, "--model-path=m.keras")
    words = ["--model=m.keras", "--batch-sizes=8", "--iterations=5", "--warmup=1"]
    words += ["--dataset=synthetic", "--test-images=100", "--export", "savedmodel"]
    done = run_python(tmp_path, ROOT / "latency.py", f"--keras-backend={backend}", *words)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    saved = read_last_record(tmp_path)
    assert saved["config"]["runtime"] == "savedmodel" and saved["versions"]["tensorflow"]
    assert saved["quality"]["logits_difference"] < 1e-5
