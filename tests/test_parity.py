"""Parity: sound backends agree, a broken one is caught and its first wrong layer named."""

import json

import numpy as np
import pytest
from conftest import MODEL, ROOT, SMALL, run_code, run_python

from harness import record

# One dense kernel is square, so that it can be transposed.
SQUARE = [*MODEL, "--mlp-head-units", "64", "64"]

OBSERVE = """
import json
from pathlib import Path
import parity
import vit
from vit import keras, layers, ops

{patch}
config = parity.ParityConfig(
    backends=(vit.engine.BACKEND,), observed=Path("{name}.npz"), equal={equal}, steps=2
)
parity.write_observed(config, {model!r})
print(json.dumps(True))
"""
BROKEN = {
    "one weight perturbed": (
        """
original = layers.Dense.call
def call(self, inputs, *rest, **named):
    outputs = original(self, inputs, *rest, **named)
    if self.name == "logits":  # as if kernel[0, 0] were larger by 0.01
        outputs = outputs + ops.pad(0.01 * inputs[:, :1], ((0, 0), (0, outputs.shape[1] - 1)))
    return outputs
layers.Dense.call = call
""",
        "layers",
        "logits",
    ),
    "a transposed kernel": (
        """
original = layers.Dense.call
def call(self, inputs, *rest, **named):
    if self.kernel.shape[0] == self.kernel.shape[1]:
        return ops.gelu(ops.matmul(inputs, ops.transpose(self.kernel)) + self.bias, False)
    return original(self, inputs, *rest, **named)
layers.Dense.call = call
""",
        "layers",
        "dense_3",
    ),
    "another epsilon": (
        """
original = layers.LayerNormalization.build
def build(self, shape):
    self.epsilon = 1e-3
    original(self, shape)
layers.LayerNormalization.build = build
""",
        "layers",
        "layer_normalization",
    ),
    "another loss": (
        "vit.crossentropy = lambda labels, logits: 1.001 * ops.sparse_categorical_crossentropy("
        "ops.cast(labels, 'int32'), logits, True)",
        "loss",
        "",
    ),
    "no numbers": (
        """
original = layers.LayerNormalization.call
def call(self, inputs, *rest, **named):
    outputs = original(self, inputs, *rest, **named)
    return outputs * float("nan") if self.name == "layer_normalization_1" else outputs
layers.LayerNormalization.call = call
""",
        "layers",
        "layer_normalization_1",
    ),
}


def run_parity(folder, *flags):
    return run_python(folder, ROOT / "parity.py", *flags)


def observe(folder, backend, name, patch="", equal=None):
    equal = f'Path("{equal}")' if equal else None
    run_code(folder, backend, OBSERVE.format(patch=patch, name=name, equal=equal, model=SQUARE))


def read_only_record(folder):
    (item,), problems = record.read_records(folder / "results.jsonl")
    assert problems == [] and record.check_record(item) == []
    return item


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    observe(folder, "torch", "torch")  # which compiles longer
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_backend_is_caught(reference, name):
    patch, what, layer = BROKEN[name]
    observe(reference, "jax", "broken", patch, equal="torch.npz")
    (reference / "results.jsonl").unlink(missing_ok=True)
    done = run_parity(reference, "--files", "torch.npz", "broken.npz")
    assert done.returncode == 1, done.stdout + done.stderr
    *table, sentence = done.stdout.splitlines()
    assert len(table) == 7 and max(map(len, table)) <= 80
    assert sentence.startswith(f"jax against torch: not the same: {what} differ by ")
    assert not layer or sentence.split(", first in ")[1].split()[1] == layer
    assert not read_only_record(reference)["quality"]["is_same"]


def test_bfloat16_as_users_have_it(tmp_path):
    """With all of the compilers' passes, vector instructions and two threads"""
    users = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "ATEN_CPU_CAPABILITY": ""}
    users |= {"OMP_NUM_THREADS": "2"}
    flags = ("--precision=bfloat16", "--steps=3", "--", *MODEL)
    done = run_python(tmp_path, ROOT / "parity.py", *flags, **users)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_only_record(tmp_path)["quality"]["rows"]
    assert all(row["observed"] > 1e-6 for row in rows[:2])  # layers and logits: it is not float32


@pytest.mark.parametrize("order", [("ours.npz", "theirs.npz"), ("theirs.npz", "ours.npz")])
@pytest.mark.parametrize("change, code", [(1e-9, 1), (1e-3, 0)])
def test_a_model_that_magnifies_rounding_gets_more_room(reference, change, code, order):
    """By what the nearest other weights change: the record says so. One file knows it: any."""
    with np.load(reference / "torch.npz") as file:
        arrays = dict(file)
    facts = json.loads(str(arrays.pop("facts")))
    assert 0 < max(facts["rounding"].values()) < 1e-5  # this model does not
    facts["rounding"]["gradients"] = change
    name = next(name for name in arrays if name.startswith("gradients/"))
    others = arrays | {name: arrays[name] + 1e-3 * np.linalg.norm(arrays[name])}
    files = {"ours.npz": (arrays, facts), "theirs.npz": (others, facts | {"rounding": {}})}
    for path, (given, known) in files.items():
        np.savez(reference / path, facts=json.dumps(known), **given)
    (reference / "results.jsonl").unlink(missing_ok=True)
    done = run_parity(reference, "--files", *order)
    assert done.returncode == code, done.stdout + done.stderr
    told = "quality.rows.gradients: the nearest other weights change them by 1.0e-03"
    assert (told in done.stdout.replace("\n  ", " ")) == (code == 0)
    notes = read_only_record(reference)["notes"]
    assert any(note.startswith(told) for note in notes) == (code == 0)


def test_a_comparison_asks_first_whether_the_backends_compute_the_same(tmp_path):
    work = [*SMALL, "--trainer=fit", f"--checkpoint-path={tmp_path / 'best.weights.h5'}"]
    flags = ("--backends", "jax", "torch", "--repeats=1", "--results-path=runs.jsonl")
    done = run_python(tmp_path, ROOT / "compare.py", *flags, "--", *work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity: jax and torch compute the same within float32's rounding" in done.stdout
    records, problems = record.read_records(tmp_path / "runs.jsonl")
    assert [item["kind"] for item in records] == ["parity", "train", "train"] and not problems
    item = records[0]
    assert record.check_record(item) == [] and item["id"].endswith("-parity")
    assert item["quality"]["is_same"] and item["backend"] == "jax, torch"
    rows = item["quality"]["rows"]
    assert [row["what"] for row in rows] == ["layers", "logits", "loss", "gradients", "steps"]
    assert all(row["observed"] <= row["tolerance"] for row in rows)
    assert rows[0]["observed"] > 0 and rows[3]["observed"] > 0  # two backends round differently
    assert not list(tmp_path.glob("parity-*"))


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--backends", "jax"], "--backends: expected two, got jax"),
        (["--backends", "jax", "mxnet"], "--backends: expected jax, torch, tensorflow, got mxnet"),
        (["--files", "a.npz", "text.npz"], "a.npz: expected a file of --observed"),
        (["--files", "text.npz", "text.npz"], "text.npz: expected a file of --observed"),
        (["--", "--keras-backend=jax"], "--keras-backend: expected --backends instead, before --"),
        (["--model=vgg"], "--model: expected a file PATH.keras or one of vit"),
        (["--steps=-1"], "--steps: expected 0 or more, got -1"),
        (
            ["--model=vit-b16", "--", "--recipe=tiny"],
            "expected flags after -- for --model vit alone",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, told):
    (tmp_path / "text.npz").write_text("no arrays")
    done = run_parity(tmp_path, *flags)
    lines = [line for line in done.stderr.splitlines() if not line.endswith("computes ...")]
    assert done.returncode == 2 and len(lines) == 1 and told in lines[0], done.stderr


def test_files_of_different_weights_are_not_compared(reference):
    arrays = dict(np.load(reference / "torch.npz"))
    arrays["weights/000"] = arrays["weights/000"] + 1
    np.savez(reference / "other.npz", **arrays)
    done = run_parity(reference, "--files", "torch.npz", "other.npz")
    assert done.returncode == 2 and "expected equal weights/000" in done.stderr
