"""Do the backends compute the same? Equal weights and equal bytes, a process for each backend.

    python parity.py                                   JAX and PyTorch, the default model
    python parity.py --precision bfloat16 -- --recipe tiny
    python parity.py --model resnet50
    python parity.py --backends jax --observed jax.npz     in one container, and then
    python parity.py --backends torch --equal jax.npz --observed torch.npz    in another, and then
    python parity.py --files jax.npz torch.npz

What stands after `--` are vit.py's flags of a model. The first backend draws weights, pixels and
labels; the others take them from its file. Compared are

    layers      each layer's output at inference, uncompiled: largest difference over largest value
    logits      those of the compiled model as latency.py serves it, likewise
    loss        of a training step, dropout included: relative difference
    gradients   of each weight: norm of the difference over the norm of all gradients together (a
                key's bias has a gradient of 0, which is noise on either side)
    steps       the running loss after each of --steps training steps, by vit.py's optimiser for
                these flags without its schedule: relative difference. AdamW divides by gradients,
                near 0 by noise: only the first three steps are judged

The tolerances are those of TOLERANCES, by precision. A model may magnify rounding: an untrained
ResNet-50 in training does, a hundred thousand times. So the first backend also trains from weights
that are each one float32 away; by what that changes, tenfold, a tolerance is raised where it is
less, and the record's notes say so. Where a tolerance is exceeded, the first layer that
does so is named, in the order of the model, and the weight whose gradients differ most.
Exit codes: 0 the same within tolerance; 1 not; 2 bad input; otherwise that of a backend's process.
"""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
import uuid
import zipfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from harness import ending, environment, record, telemetry
from harness.cli import check_writable, fail, list_flags, parse_split, refuse

# And {image} of the launcher.
BACKENDS = {"jax": "jax", "torch": "pytorch", "tensorflow": "tensorflow"}
# What rounding may do, with some room; by how much it did is in results/README.md.
TOLERANCES = {
    "float32": {"layers": 2e-5, "logits": 1e-5, "loss": 1e-5, "gradients": 1e-5, "steps": 1e-4},
    "tf32": {"layers": 1e-2, "logits": 1e-2, "loss": 1e-3, "gradients": 1e-2, "steps": 1e-2},
    "float16": {"layers": 1e-2, "logits": 1e-2, "loss": 1e-3, "gradients": 1e-2, "steps": 1e-2},
    "bfloat16": {"layers": 8e-2, "logits": 5e-2, "loss": 1e-2, "gradients": 5e-2, "steps": 5e-2},
}
JUDGED_STEPS = 3
ROOM = 10  # times what the nearest other weights change
# Such weights are tried, since one may change a single number, as a loss is, by next to nothing.
MOVES = 3


@dataclass
class ParityConfig:
    """Every choice but those of the model vit. Impossible values raise ConfigError."""

    backends: tuple[str, ...] = ("jax", "torch")  # the first is what the others are compared with
    files: tuple[Path, ...] = ()  # compare these, computed elsewhere by --observed
    observed: Path | None = None  # write what one backend computes, and compare nothing
    equal: Path | None = None  # take weights, pixels and labels from such a file
    model: str = "vit"  # see latency.py --list-models; or a file, PATH.keras
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"  # of matrix products
    batch_size: int = 4
    steps: int = 5  # of training; with 0 inference alone is compared
    seed: int = 0  # of weights (but --model PATH.keras brings its own), pixels and labels
    launcher: str = ""  # stands before each command; {image} is jax, pytorch or tensorflow
    allow_cpu: bool = False  # go on without a GPU in an image that is made for one
    results_path: Path = Path("results.jsonl")  # the record is appended here
    node_name: str = field(default_factory=platform.node)
    verbose: bool = True  # a table

    def __post_init__(self):
        unknown = [name for name in self.backends if name not in BACKENDS]
        refuse(
            (unknown, f"--backends: expected {', '.join(BACKENDS)}, got {' '.join(unknown)}"),
            (
                len(set(self.backends)) < (1 if self.observed else 2),
                f"--backends: expected two, got {' '.join(self.backends) or 'none'}",
            ),
            (
                self.observed and len(self.backends) > 1,
                "--observed: expected one of --backends, got more",
            ),
            (self.equal and not self.observed, "--equal: expected --observed, too"),
            (len(self.files) == 1, "--files: expected two or more, got one"),
            (self.batch_size < 2, f"--batch-size: expected 2 or more, got {self.batch_size}"),
            (self.steps < 0, f"--steps: expected 0 or more, got {self.steps}"),
        )


# ---------------------------------------------------------------------------------------------
# What two backends computed


class Unreadable(Exception):
    """A file that is none of --observed; the message is one line."""

    ending = ("error", 2)  # status and exit code


def read_observed(path):
    """(facts, {name: array}) of a file of --observed. Raises Unreadable."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        facts = json.loads(str(arrays.pop("facts")))
        if "rounding" not in facts:
            raise ValueError("it is of another version of parity.py")
        return facts, arrays
    except (OSError, EOFError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        raise Unreadable(f"{path}: expected a file of --observed: {error}") from error


def compare_training(ours, theirs):
    """Rows of a table, {what, observed, where}: of the loss, of each weight's gradient, `where`
    being the weight, of the steps that are judged, `where` being all of them."""
    names = [name for name in ours if name.startswith("gradients/")]
    total = np.sqrt(sum(np.square(ours[name]).sum(dtype="f8") for name in names))
    loss = np.abs(theirs["loss"] - ours["loss"]).max() / np.abs(ours["loss"]).max()
    gradients = [float(np.linalg.norm(ours[n] - theirs[n]) / total) for n in names]
    worst = int(np.argmax(gradients))  # which finds what is no number, as max may not
    steps = np.abs(theirs["steps"] - ours["steps"]) / np.abs(ours["steps"])
    observed = {
        "loss": (float(loss), ""),
        "gradients": (gradients[worst], names[worst].partition("/")[2]),
        "steps": (float(steps[:JUDGED_STEPS].max()), ", ".join(f"{step:.0e}" for step in steps)),
    }
    return [{"what": w, "observed": o, "where": where} for w, (o, where) in observed.items()]


def compare(ours, theirs, tolerances):
    """Rows of a table: {what, observed, tolerance, where}, `observed` being the largest.

    Args:
        ours, theirs: {name: array} of two files.

    Raises:
        Unreadable: they do not hold the same names and shapes.
    """
    shapes = [{name: array.shape for name, array in arrays.items()} for arrays in (ours, theirs)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        pair = [found.get(name) for found in shapes]
        if pair[0] != pair[1]:
            raise Unreadable(f"expected one model in all files, got {name} of shapes {pair}")
    for name in ("pixels", "labels", *(n for n in ours if n.startswith("weights/"))):
        if not np.array_equal(ours[name], theirs[name]):
            raise Unreadable(f"expected equal {name} in all files, see --equal")

    def over_largest(name):
        largest = np.abs(ours[name]).max(initial=0)
        difference = np.abs(ours[name] - theirs[name]).max(initial=0)
        return float(difference / largest) if largest else float(difference)

    layers = [name for name in ours if name.startswith("layers/")]
    changes = [over_largest(name) for name in layers]
    largest = int(np.argmax(changes))
    beyond = [n for n, change in zip(layers, changes) if not change <= tolerances["layers"]]
    where = [*beyond, layers[largest]][0].partition("/")[2]
    rows = [
        {"what": "layers", "observed": changes[largest], "where": where},
        {"what": "logits", "observed": over_largest("logits"), "where": ""},
    ]
    if "steps" in ours:
        rows += compare_training(ours, theirs)
    return [{**row, "tolerance": tolerances[row["what"]]} for row in rows]


def judge(files, config):
    """Compare files of --observed, show a table, append a record. Returns the exit code."""
    facts, arrays = zip(*(read_observed(path) for path in files))
    first, precision = facts[0], facts[0]["precision"]
    tolerances, rows, raised = dict(TOLERANCES[precision]), [], []
    rounding = {what: change for fact in facts for what, change in fact["rounding"].items()}
    for what, change in rounding.items():  # of the one that drew the weights, see --equal
        if ROOM * change > tolerances[what]:
            tolerances[what] = ROOM * change
            raised.append(
                f"quality.rows.{what}: the nearest other weights change them by {change:.1e}: "
                f"{ROOM} times that is tolerated"
            )
    names = [fact["backend"] for fact in facts]
    for fact, others in zip(facts[1:], arrays[1:]):
        if fact["precision"] != precision:
            raise Unreadable(f"expected one precision, got {precision} and {fact['precision']}")
        pair = f"{fact['backend']} against {first['backend']}"
        rows += [{"pair": pair, **row} for row in compare(arrays[0], others, tolerances)]
    # `not <=` also catches what is no number.
    broken = [row for row in rows if not row["observed"] <= row["tolerance"]]
    sentence = f"{' and '.join(names)} compute the same within {precision}'s rounding"
    if broken:
        row = broken[0]
        where = f", first in {row['where']}" if row["what"] == "layers" else ""
        sentence = (
            f"{row['pair']}: not the same: {row['what']} differ by {row['observed']:.1e}, "
            f"tolerated are {row['tolerance']:.0e}{where}"
        )
    versions = {key: value for fact in reversed(facts) for key, value in fact["versions"].items()}
    git = telemetry.read_git(Path(__file__).parent)
    notes = git.pop("notes")
    report = record.create_record(
        "parity",
        status="ok",
        config=dataclasses.asdict(config) | {"model": first["model"], "flags": first["flags"]},
        backend=", ".join(names),
        precision=precision,
        device=first["device"],
        versions=versions,
        git=git,
        model={"parameters": first["parameters"]},
        quality={"rows": rows, "is_same": not broken, "sentence": sentence},
        notes=list(
            dict.fromkeys([*notes, *raised, *(note for fact in facts for note in fact["notes"])])
        ),
    )
    record.append_record(config.results_path, report)
    if config.verbose:
        show(rows, first)
        for note in raised:
            print(textwrap.fill(note, 80, subsequent_indent="  "))
    print(sentence)
    return 1 if broken else 0


def show(rows, facts):
    print(
        f"{facts['model']} ({facts['parameters']:,} parameters), {facts['precision']}, "
        f"on {facts['device']['name']} ({facts['device']['kind']})"
    )
    print(f"{'':<10} {'observed':>8} {'tolerated':>9}")
    for row in rows:
        sign = " " if row["observed"] <= row["tolerance"] else "!"
        line = f"{row['what']:<10} {row['observed']:>8.1e} {row['tolerance']:>9.0e} {sign}"
        print(f"{line} {row['where']}"[:80].rstrip())


# ---------------------------------------------------------------------------------------------
# A process for each backend


def observe_all(config, flags, model_flags):
    """Let each backend compute, then judge. Returns the exit code."""
    folder = config.results_path.parent / f"parity-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)  # where a container sees it, too
    try:
        files = [folder / f"{backend}.npz" for backend in config.backends]
        for backend, path in zip(config.backends, files):
            start = [sys.executable, __file__]
            if config.launcher:
                words = shlex.split(os.path.expandvars(config.launcher))
                start = [word.replace("{image}", BACKENDS[backend]) for word in words]
                start += ["python", Path(__file__).name]
            words = [*flags, "--backends", backend, "--observed", str(path), "--launcher="]
            words += ["--equal", str(files[0])] if path != files[0] else []
            if config.verbose:
                print(f"{backend} computes ...", file=sys.stderr, flush=True)
            done = subprocess.run(
                [*start, *words, "--", *model_flags],
                stdin=subprocess.DEVNULL,
                preexec_fn=ending.end_with_parent,
            )
            if done.returncode:
                return done.returncode if done.returncode > 0 else 128 - done.returncode
        return judge(files, config)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(config, flags, model_flags):
    try:
        if config.files:
            return judge(config.files, config)
        return observe_all(config, flags, model_flags)
    except Unreadable as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename or 'cannot start a backend'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    environment.read_dotenv()
    CONFIG, FLAGS, MODEL_FLAGS = parse_split(
        ParityConfig, sys.argv[1:], __doc__.split("\n\n")[0], own=("precision", "results_path")
    )
    if "keras-backend" in list_flags(MODEL_FLAGS):
        fail("--keras-backend: expected --backends instead, before --")
    check_writable(results_path=CONFIG.results_path)
    if not CONFIG.observed:
        sys.exit(main(CONFIG, FLAGS, MODEL_FLAGS))
    check_writable(observed=CONFIG.observed)
    os.environ["KERAS_BACKEND"] = CONFIG.backends[0]
    ending.end_at_once()
    environment.keep_memory()

import latency  # noqa: E402
import vit  # noqa: E402
from harness import engine  # noqa: E402
from vit import keras  # noqa: E402

# ---------------------------------------------------------------------------------------------
# What one backend computes


class KeepGradients(keras.optimizers.AdamW):
    """An optimiser whose step puts each weight's gradient in its place; an AdamW, since on PyTorch
    the steps that follow then find its compiled part in the cache."""

    def update_step(self, gradient, variable, learning_rate):
        self.assign(variable, gradient)


def observe_layers(model, pixels):
    """{name: output} of each layer at inference, in the model's order, for one batch. Layers of a
    model within come where it stands; it gets what the layer before it gives."""
    layers = [layer for layer in model.layers if not isinstance(layer, keras.Model)]
    probe = keras.Model(model.inputs, [layer.output for layer in layers])
    outputs = engine.compile_function(lambda x: probe(x, training=False))(pixels)
    outputs, last, found = iter(outputs), pixels, {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            inner = observe_layers(layer, last)
            inner = {name.partition(" ")[2]: output for name, output in inner.items()}
        else:
            inner = {layer.name: to_float(next(outputs))}
        for name, last in inner.items():
            found[f"{len(found):03d} {name}"] = last
    return found


def to_float(tensor):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32")))


def train(model, optimizer, pixels, labels):
    """Losses, running means, (steps,), of training on pixels (steps, batch, ...), by the steps that
    vit.py compiles."""
    model.compile(optimizer=optimizer, loss=vit.crossentropy)
    engine.build_state(model, len(labels[0]))
    training = engine.compile_train_steps(model)
    training.load(pixels.reshape(-1, *pixels.shape[2:]), labels.reshape(-1))
    order = np.arange(labels.size, dtype="int32").reshape(len(labels), 1, -1)
    losses = [training.run(order[step : step + 1], {})()[0] for step in range(len(labels))]
    training.sync()
    return np.array(losses)


def observe(model, config, create_optimizer, given=None):
    """{name: array}: weights, pixels and labels, and what is computed from them.

    Args:
        create_optimizer: of the training steps.
        given: such a dictionary, whose weights, pixels and labels are taken.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dropout) and not isinstance(layer, vit.Dropout):
            layer.rate = 0.0  # whose masks are other ones on each backend
    rng = np.random.default_rng(config.seed)
    shape, classes = (max(config.steps, 1), config.batch_size), model.output_shape[-1]
    found = {
        "pixels": rng.integers(0, 256, (*shape, *model.input_shape[1:]), dtype="uint8"),
        "labels": rng.integers(0, classes, shape, dtype="int32"),
        **{f"weights/{n:03d}": to_float(w) for n, w in enumerate(model.weights)},
    }
    if given is not None:
        for name, array in found.items():
            if name not in given or given[name].shape != array.shape:
                raise Unreadable(f"--equal: expected the same model, but {name} is another")
        found = {name: given[name] for name in found}
    pixels = found["pixels"]
    assign_weights(model, found)
    found |= {f"layers/{n}": a for n, a in observe_layers(model, pixels[0, :1]).items()}
    found["logits"] = to_float(engine.compile_forward(model, is_frozen=True)(pixels[0]))
    return found | (observe_training(model, found, create_optimizer) if config.steps else {})


def assign_weights(model, found, move=None):
    """Give a model the weights of a file, or of each the next float32 on one side or the other,
    which `move`, a seed, chooses."""
    given = [found[name] for name in found if name.startswith("weights/")]
    trained, rng = {id(v) for v in model.trainable_variables}, np.random.default_rng(move)
    for variable, value in zip(model.weights, given):
        if move is not None and id(variable) in trained:
            sides = rng.choice(np.array([-np.inf, np.inf], "f4"), value.shape)
            value = np.nextafter(value, sides)
        variable.assign(value)


def observe_training(model, found, create_optimizer, move=None):
    """{name: array}: the loss and the gradients of a step, and the losses of some steps. What is
    random begins where it stood before."""
    pixels, labels = found["pixels"], found["labels"]
    known = {id(variable) for variable in model.weights}
    seeds = [(v, v.numpy()) for v in model.non_trainable_variables if id(v) not in known]
    assign_weights(model, found, move)
    seen = {"loss": train(model, KeepGradients(), pixels[:1], labels[:1])}
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # in float16
    if not int(optimizer.iterations.numpy()):
        raise Unreadable("--precision float16: a gradient is beyond it, so that no step was made")
    for number, variable in enumerate(model.trainable_variables):
        seen[f"gradients/{number:03d} {variable.path}"] = to_float(variable)
    assign_weights(model, found, move)
    seen["steps"] = train(model, create_optimizer(), pixels, labels)
    for variable, value in seeds:
        variable.assign(value)
    return seen


def measure_rounding(model, found, create_optimizer):
    """{what: largest relative change} of training by weights that are one float32 away."""
    changes = {}
    for move in range(MOVES):
        moved = observe_training(model, found, create_optimizer, move)
        for row in compare_training(found, moved):
            changes[row["what"]] = max(row["observed"], changes.get(row["what"], 0.0))
    return changes


def write_observed(config, model_flags):
    """Compute on this backend, and write the file. Raises WeightsError, ConfigError, Unreadable."""
    machine = telemetry.describe_machine()
    precision = vit.settle_device(config)
    report = vit.begin_record("parity", dataclasses.asdict(config), machine, precision)
    given = read_observed(config.equal)[1] if config.equal else None
    choices = latency.LatencyConfig(
        model=config.model,
        precision=config.precision,
        keras_backend=engine.BACKEND,
        data_format="channels_last",
    )
    keras.utils.set_random_seed(config.seed)
    model = latency.create_model(choices, [f"--seed={config.seed}", *model_flags])
    latency.require_logits(model, f"--model {config.model}")
    facts = {
        **{key: report[key] for key in ("backend", "precision", "device", "versions", "notes")},
        "model": config.model,
        "flags": model_flags,
        "parameters": latency.count_parameters(model),
    }
    training = vit.parse_config(model_flags if config.model == "vit" else [])
    training.schedule = "constant"  # the first steps of a warm-up would hardly move
    create_optimizer = partial(vit.create_optimizer, training, model, config.steps)
    arrays, facts["rounding"] = observe(model, config, create_optimizer, given), {}
    if given is None and config.steps:
        facts["rounding"] = measure_rounding(model, arrays, create_optimizer)
    with open(config.observed, "wb") as file:  # np.savez would add a suffix
        np.savez(file, facts=json.dumps(facts), **arrays)


if __name__ == "__main__":
    status, message, code = ending.run_to_end(
        lambda: write_observed(CONFIG, MODEL_FLAGS), f"lower --batch-size {CONFIG.batch_size}"
    )
    if status != "ok":
        print(f"parity.py: {status}: {message}", file=sys.stderr)
    ending.leave(code)
