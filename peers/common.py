"""What the hand-written peers share: flags, epochs, clock and record, with no framework in it.

Flags, figures and exit codes are those of vit.py, where they are explained. A peer is a class:

    backend, library                    "native-jax" and "jax"
    Peer(config)                        chooses device and precision; ValueError: not to be had here
    .precision, .gpu_name               what matrix products run in; the GPU's name or None
    .build(mean, variance)              makes the model; the numbers are per channel of the pixels
    .load_keras_weights(weights)        takes what get_weights() of vit.py's model gives
    .count_parameters(), .count_flops() of the model, the latter of one picture's forward pass
    .place(images, labels)              puts the training pictures on the device
    .begin_epoch(order, maps)           takes the epoch's batches: int32 (steps, batch) and float32
                                        (steps, batch, 2, 2), or None
    .run(rows)                          trains a slice of them, a step a row; does not wait
    .read_epoch()                       its [loss, accuracy, top-5 accuracy], floats
    .evaluate(images, labels)           the same three of other pictures, without dropout
    .keep_weights(), .restore_weights() remembers the weights; goes back to them
    .steps_per_call(steps)              how many of an epoch's steps one .run should get, a divisor
    .synchronize()                      waits for the device
    .device_peak_bytes()                (bytes, source) or (None, reason)
"""

import argparse
import math
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path

PROCESS_STARTED = time.perf_counter()

import numpy as np  # noqa: E402

from harness import augment, data, malloc, record, telemetry  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - PROCESS_STARTED  # a peer adds its framework's

# ---------------------------------------------------------------------------------------------
# Flags


class Config(argparse.Namespace):
    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_config(argv, description):
    """The configuration that a command line asks for, by vit.py's field names; ends the process on
    --help and, with one line and exit code 2, on whatever is wrong."""
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag, default, text=" ", **more):
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        else:
            more.setdefault("type", type(default))
        parser.add_argument(flag, default=default, help=text, **more)

    add("--dataset", "cifar100", choices=("cifar100", "synthetic"))
    add("--num-classes", 100)
    add("--train-images", None, "a class-balanced subset", type=int)
    add("--test-images", None, "likewise", type=int)
    add("--validation-split", 0.1, "share of the training images, class-balanced; 0 for none")
    add("--augment", True, "flip, rotate by 0.02 turns, zoom by 0.2")
    add("--image-size", 72, "pixels a side after resizing")
    add("--patch-size", 6, "pixels a side of a patch")
    add("--projection-dim", 64, "width")
    add("--num-heads", 4)
    add("--head-dim", None, "width of one head; default: projection-dim", type=int)
    add("--transformer-layers", 8, "depth")
    add(
        "--transformer-units",
        None,
        "default: 2 * projection-dim, projection-dim",
        type=int,
        nargs="+",
    )
    add("--mlp-head-units", (2048, 1024), type=int, nargs="*")
    add("--dropout", 0.1, "after the dense layers of a block")
    add("--attention-dropout", 0.1)
    add("--head-dropout", 0.5)
    add("--learning-rate", 0.001)
    add("--weight-decay", 0.0001)
    add("--batch-size", 256)
    add("--num-epochs", 10)
    add("--seed", 0)
    add("--precision", "float32", choices=("float32", "tf32", "bfloat16"))
    add("--jit-compile", True, "off: each operation by itself")
    add("--results-path", Path("results.jsonl"), "the record is appended here")
    add("--node-name", platform.node())
    add("--verbose", True, "a line an epoch, and a summary")
    add("--use-wandb", False, "accepted for vit.py's sake and ignored: a peer logs nowhere")
    words = [word for argument in argv for word in _normalize(argument)]
    config = parser.parse_args(words, namespace=Config())

    config.input_shape = (32, 32, 3)
    config.head_dim = config.head_dim or config.projection_dim
    units = config.transformer_units or (2 * config.projection_dim, config.projection_dim)
    config.transformer_units = tuple(units)
    config.mlp_head_units = tuple(config.mlp_head_units)
    for name in ("train_images", "test_images", "image_size", "patch_size", "projection_dim"):
        _check(parser, config, name, lambda v: v > 0, "above 0")
    for name in ("num_heads", "head_dim", "transformer_layers", "batch_size", "num_epochs"):
        _check(parser, config, name, lambda v: v > 0, "above 0")
    for name in ("validation_split", "dropout", "attention_dropout", "head_dropout"):
        _check(parser, config, name, lambda v: 0 <= v < 1, "at least 0 and below 1")
    for name in ("mlp_head_units", "transformer_units"):
        _check(parser, config, name, lambda v: all(n > 0 for n in v), "widths above 0")
    _check(parser, config, "learning_rate", lambda v: 0 < v < math.inf, "above 0")
    _check(parser, config, "weight_decay", lambda v: 0 <= v < math.inf, "at least 0")
    _check(parser, config, "seed", lambda v: 0 <= v < 2**31, "0 to 2147483647")
    _check(parser, config, "num_classes", lambda v: 2 <= v <= 100, "2 to 100")
    size, dim = config.patch_size, config.projection_dim
    _check(parser, config, "image_size", lambda v: v % size == 0, f"a multiple of {size}")
    _check(parser, config, "transformer_units", lambda v: v[-1] == dim, f"the last to be {dim}")
    images = config.train_images or 500 * config.num_classes
    images -= round(images * config.validation_split)
    _check(parser, config, "batch_size", lambda v: v <= images, f"at most the {images} images")
    return config


def _check(parser, config, name, accepts, expected):
    value = getattr(config, name)
    if value is not None and not accepts(value):
        parser.error(f"--{name.replace('_', '-')}: expected {expected}, got {value}")


def _normalize(argument):
    """`--num_epochs=3` -> `--num-epochs 3`; `--use_wandb=True` -> `--use-wandb`."""
    if not argument.startswith("--"):
        return [argument]
    flag, equals, value = argument.partition("=")
    flag = flag.replace("_", "-")
    if value.lower() in ("true", "false"):
        return [flag if value.lower() == "true" else f"--no-{flag[2:]}"]
    return [flag, value] if equals else [flag]


def set_environment(library):
    """What a framework reads when it is imported, as vit.py sets it; starts the process again once,
    for the C library's allocator (harness/malloc.py).
    """
    malloc.keep_memory()
    os.environ["KERAS_BACKEND"] = library  # CIFAR-100 comes through Keras
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keras-vit"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "xla"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


# ---------------------------------------------------------------------------------------------
# Numbers that go into the model and come out of it


def measure_pixels(images):
    """(mean, variance) of uint8 pictures, float64 (channels,) each, from exact sums of bytes."""
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(3)]
    values, count = np.arange(256), images[..., 0].size
    mean = np.array([(c * values).sum() / count for c in counts])
    return mean, np.array([(c * values**2).sum() / count for c in counts]) - mean**2


def draw_weights(config):
    """Initial weights, float32, in the order and shapes of get_weights() of vit.py's model: kernels
    Glorot uniform over their true fans, positions within 0.05, scales 1, biases 0; equal to those
    of vit.py for an equal seed."""
    rng = np.random.RandomState(config.seed)
    dim, heads, size = config.projection_dim, config.num_heads, config.head_dim
    zeros, ones = (lambda *shape: np.zeros(shape, "f")), (lambda *shape: np.ones(shape, "f"))

    def kernel(*shape, fans=None):
        limit = math.sqrt(6 / sum(fans or shape))
        return rng.uniform(-limit, limit, shape).astype("f")

    def mlp(width, units):
        for inputs, outputs in zip((width, *units), units):
            yield from (kernel(inputs, outputs), zeros(outputs))

    projection = kernel(3 * config.patch_size**2, dim)
    positions = rng.uniform(-0.05, 0.05, (config.num_patches, dim)).astype("f")
    weights = [positions, projection, zeros(dim)]
    for _ in range(config.transformer_layers):
        weights += [ones(dim), zeros(dim)]
        for _ in ("query", "key", "value"):
            weights += [kernel(dim, heads, size, fans=(dim, heads * size)), zeros(heads, size)]
        weights += [kernel(heads, size, dim, fans=(heads * size, dim)), zeros(dim)]
        weights += [ones(dim), zeros(dim), *mlp(dim, config.transformer_units)]
    units = (*config.mlp_head_units, config.num_classes)
    return [*weights, ones(dim), zeros(dim), *mlp(config.num_patches * dim, units)]


def fill_batches(images, labels, batch_size):
    """(images, labels) batch by batch, all of one size: fillers in the last have the label -1."""
    missing = -len(images) % batch_size
    for first in range(0, len(images) + missing, batch_size):
        x, y = images[first : first + batch_size], labels[first : first + batch_size]
        if missing and len(x) < batch_size:
            x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
            y = np.concatenate([y, np.full(missing, -1, y.dtype)])
        yield x, y


# ---------------------------------------------------------------------------------------------
# The clock


class Clock:
    """Seconds and joules of epochs, each from its begin to the start of validation; a window opens
    and closes only after the device is synchronised."""

    def __init__(self, peer, images_per_epoch, batch_size, meter):
        self.peer, self.meter = peer, meter
        self.images, self.batch_size = images_per_epoch, batch_size
        self.epoch_seconds, self.validation_seconds, self.energy = [], [], []
        self.first_step_seconds = None

    def begin_epoch(self):
        self.peer.synchronize()
        self.meter.start()
        self.started = time.perf_counter()

    def end_first_step(self):
        """Of the first epoch: compilation is over, energy is counted anew."""
        self.peer.synchronize()
        self.first_step_ended = time.perf_counter()
        self.first_step_seconds = self.first_step_ended - self.started
        self.meter.stop()
        self.meter.start()

    def end_epoch(self):
        self.peer.synchronize()
        self.ended = time.perf_counter()
        self.epoch_seconds.append(self.ended - self.started)
        self.energy.append(self.meter.stop())

    def end_validation(self):
        self.validation_seconds.append(time.perf_counter() - self.ended)

    def steady_seconds(self):
        """Median epoch after the first; of one alone, what follows its first step, scaled up."""
        if len(self.epoch_seconds) > 1:
            return statistics.median(self.epoch_seconds[1:])
        after_first = self.images - self.batch_size
        if not self.epoch_seconds or not after_first:
            return None
        return (self.epoch_seconds[0] - self.first_step_seconds) * self.images / after_first

    def fill(self, report):
        """Write what was measured into a record, and the reasons for the rest."""
        timing, notes, steady = report["timing"], report["notes"], self.steady_seconds()
        timing["epoch_seconds"] = self.epoch_seconds
        timing["validation_seconds"] = self.validation_seconds
        if steady is None:
            advice = "the only epoch compiled; train 2 epochs or more"
            names = ("train_images_per_second", "compile_seconds", "start_seconds")
            notes += [*(f"timing.{name}: {advice}" for name in names), f"energy: {advice}"]
            return
        timing["train_images_per_second"] = self.images / steady
        one_step = steady * self.batch_size / self.images
        timing["compile_seconds"] = max(0.0, self.first_step_seconds - one_step)
        timing["start_seconds"] = self.first_step_ended - PROCESS_STARTED
        windows, images = self.energy[1:], self.images * len(self.energy[1:])
        if not windows:
            windows, images = self.energy, self.images - self.batch_size
            notes.append("one epoch only: its first step was left out of the steady throughput")
        notes += dict.fromkeys(note for window in windows for note in window["notes"])
        if all(window["joules"] is not None for window in windows):
            joules = sum(window["joules"] for window in windows)
            report["energy"] |= {
                "joules": joules,
                "joules_per_image": joules / images,
                "source": windows[0]["source"],
                "window_seconds": sum(window["window_seconds"] for window in windows),
            }


# ---------------------------------------------------------------------------------------------
# A run


class Diverged(Exception):
    """The loss is no longer a number."""


class Terminated(BaseException):
    """SIGTERM."""


MEASURED = {  # as in vit.py
    "model": ("parameters", "flops_per_image"),
    "timing": (
        *("import_seconds", "data_seconds", "build_seconds", "start_seconds", "compile_seconds"),
        *("compile_cache", "epoch_seconds", "validation_seconds", "train_images_per_second"),
        *("evaluation_seconds", "total_seconds"),
    ),
    "memory": (
        *("device_peak_bytes", "device_peak_source", "host_peak_bytes", "host_import_bytes"),
    ),
    "energy": ("joules", "joules_per_image", "source", "window_seconds"),
    "quality": (
        *("dataset", "data_fingerprint", "train_images", "validation_images", "test_images"),
        *("loss", "accuracy", "top5_accuracy", "val_loss", "val_accuracy", "val_top5_accuracy"),
        *("test_accuracy", "test_top5_accuracy", "best_epoch"),
    ),
}
METRICS = ("loss", "accuracy", "top5_accuracy")


def train(peer, config, dataset, report):
    """Build, train and test a peer; `report` is filled in on the way."""
    timing, quality, notes = report["timing"], report["quality"], report["notes"]
    if peer.precision != config.precision:
        notes.append(f"precision: {config.precision} asked, but a CPU has only float32 for it")
    started = time.perf_counter()
    peer.build(*measure_pixels(dataset.x_train))
    peer.load_keras_weights(draw_weights(config))
    peer.place(dataset.x_train, dataset.y_train)
    peer.synchronize()
    timing["build_seconds"] = time.perf_counter() - started
    report["model"] |= {"parameters": peer.count_parameters()}
    report["model"] |= {"flops_per_image": peer.count_flops()}

    has_validation = len(dataset.x_validation) > 0
    splits = ("", "val_") if has_validation else ("",)
    history = {prefix + name: [] for prefix in splits for name in METRICS}
    steps = len(dataset.x_train) // config.batch_size  # a smaller last batch would compile anew
    used, per_call = steps * config.batch_size, peer.steps_per_call(steps)
    meter = telemetry.create_energy_meter(device=report["device"]["kind"])
    clock = Clock(peer, used, config.batch_size, meter)
    try:
        for epoch in range(config.num_epochs):
            order = data.epoch_order(len(dataset.x_train), config.seed, epoch)[:used]
            order, maps = order.reshape(steps, -1), None
            if config.augment:
                maps = augment.draw_affine(len(dataset.x_train), config.seed, epoch)[:used]
                maps = maps.reshape(*order.shape, 2, 2)
            clock.begin_epoch()
            peer.begin_epoch(order, maps)
            for first in range(0, steps, per_call):
                peer.run(slice(first, first + per_call))
                if epoch == first == 0:
                    clock.end_first_step()
            results = peer.read_epoch()
            clock.end_epoch()
            if has_validation:
                results += peer.evaluate(dataset.x_validation, dataset.y_validation)
            logs = dict(zip(history, results))
            for name, value in logs.items():
                history[name].append(value)
            if not math.isfinite(logs["loss"]):
                raise Diverged(f"loss {logs['loss']} in epoch {epoch + 1}")
            if has_validation and logs["val_accuracy"] > max(history["val_accuracy"][:-1] or [-1]):
                peer.keep_weights()
                quality["best_epoch"] = epoch + 1
            clock.end_validation()
            if config.verbose:
                print(describe_epoch(config, clock, epoch, logs), flush=True)
    finally:
        clock.fill(report)
        quality |= history
    if has_validation:
        peer.restore_weights()
    else:
        quality["best_epoch"] = config.num_epochs
        notes.append("no validation images: the last epoch's weights were tested")
        notes += [f"quality.val_{name}: no validation images" for name in METRICS]
    started = time.perf_counter()
    results = peer.evaluate(dataset.x_test, dataset.y_test)
    timing["evaluation_seconds"] = time.perf_counter() - started
    quality |= {f"test_{name}": value for name, value in zip(METRICS, results)}


def describe_epoch(config, clock, epoch, logs):
    """An epoch in a line, as vit.py prints it."""
    shown = [f"epoch {epoch + 1}/{config.num_epochs}", f"loss {logs['loss']:.3f}"]
    validation = f" (val {logs['val_accuracy']:.1%})" if "val_accuracy" in logs else ""
    shown.append(f"accuracy {logs['accuracy']:.1%}{validation}")
    seconds = clock.steady_seconds() or clock.epoch_seconds[-1]
    left = (config.num_epochs - epoch - 1) * (seconds + clock.validation_seconds[-1])
    shown.append(f"{clock.images / seconds:,.0f} images/s")
    return "  ".join([*shown, f"{int(left // 60)}:{int(left % 60):02} left"])


def create_report(peer, config, machine, import_seconds, import_bytes):
    """A record with all that is known before the run; every figure is still null."""
    device = {key: machine[key] for key in machine if key != "notes"}
    device |= {"kind": "gpu" if peer.gpu_name else "cpu", "node_name": config.node_name}
    device["name"] = peer.gpu_name or device["cpu_name"]
    versions = telemetry.read_versions(peer.backend)
    versions[peer.backend] = versions[peer.library]  # the name that summaries look for
    git = telemetry.read_git(Path(__file__).parent)
    report = record.create_record(
        "train",
        argv=sys.argv,
        config=vars(config),
        backend=peer.backend,
        precision=peer.precision,
        device=device,
        versions=versions,
        git=git,
        notes=[*machine["notes"], *versions.pop("notes"), *git.pop("notes")],
        **{group: dict.fromkeys(names) for group, names in MEASURED.items()},
    )
    if os.environ.get("VIT_RECORD_ID"):  # a comparison names its runs
        report["id"] = os.environ["VIT_RECORD_ID"]
    report["timing"]["import_seconds"] = import_seconds
    report["memory"]["host_import_bytes"] = import_bytes
    return report


def finish_report(report, peer, machine, status, error):
    """The last figures, and a reason for each that is missing."""
    report["status"], report["error"] = status, error
    notes, memory = report["notes"], report["memory"]
    memory["host_peak_bytes"] = telemetry.host_peak_bytes()
    memory["device_peak_bytes"], told = peer.device_peak_bytes()
    if memory["device_peak_bytes"] is None:
        notes += [f"memory.device_peak_bytes: {told}", f"memory.device_peak_source: {told}"]
    else:
        memory["device_peak_source"] = told
    report["timing"]["total_seconds"] = time.perf_counter() - PROCESS_STARTED
    notes += telemetry.compare_conditions(machine, telemetry.read_conditions())
    if status != "ok":
        groups = dict.fromkeys(name.split(".")[0] for name in record.find_unexplained(report))
        notes += [f"{group}: the run ended ({status}) before it was measured" for group in groups]


def is_out_of_memory(error):
    """Whether an exception is an allocator's; each framework words it in its own way."""
    signs = ("RESOURCE_EXHAUSTED", "ut of memory", "can't allocate memory", "not enough memory")
    signs += ("NVML_SUCCESS == r INTERNAL ASSERT",)  # PyTorch's on a Jetson
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


def count_compiled(library):
    """How many files the persistent compilation cache holds: a cold start adds some."""
    names = {"jax": "JAX_COMPILATION_CACHE_DIR", "torch": "TORCHINDUCTOR_CACHE_DIR"}
    folder = os.environ.get(names[library])
    return sum(len(files) for _, _, files in os.walk(folder)) if folder else 0


def main(create_peer, config, import_seconds):
    """One run from configuration to record; returns the exit code."""

    def terminate(signum, frame):
        raise Terminated

    program, import_bytes = Path(sys.argv[0]).name, telemetry.host_rss_bytes()
    signal.signal(signal.SIGTERM, terminate)
    machine = telemetry.describe_machine()  # before the framework touches the GPU
    try:
        peer = create_peer(config)
    except ValueError as problem:
        print(f"{program}: error: {problem}", file=sys.stderr)
        return 2
    report = create_report(peer, config, machine, import_seconds, import_bytes)
    cached = count_compiled(peer.library)
    status, error, code = "ok", None, 0
    try:
        started = time.perf_counter()
        names = ("num_classes", "train_images", "test_images", "validation_split", "seed")
        dataset = data.load_dataset(config.dataset, **{n: getattr(config, n) for n in names})
        report["timing"]["data_seconds"] = time.perf_counter() - started
        report["quality"] |= {"dataset": dataset.label, "data_fingerprint": dataset.fingerprint}
        counts = [len(dataset.x_train), len(dataset.x_validation), len(dataset.x_test)]
        names = ("train_images", "validation_images", "test_images")
        report["quality"] |= dict(zip(names, counts))
        if config.verbose:
            told = "{:,} images to train on, {:,} to validate, {:,} to test".format(*counts)
            where = peer.gpu_name or "the CPU"
            print(f"{peer.backend} on {where}: {dataset.label}, {told}", flush=True)
        train(peer, config, dataset, report)
    except data.DataError as problem:
        status, error, code = "error", str(problem), 5
    except Diverged as problem:
        status, error, code = "diverged", f"{problem}: lower --learning-rate", 4
    except KeyboardInterrupt:
        status, error, code = "interrupted", "Ctrl-C", 130
    except Terminated:
        status, error, code = "interrupted", "SIGTERM", 143
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
        if is_out_of_memory(problem):
            error = f"out of memory: lower --batch-size {config.batch_size} ({error})"
            status, code = "oom", 3
        else:
            traceback.print_exc()
            status, code = "error", 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # from here on the record comes first
    if report["timing"]["compile_seconds"] is not None:
        is_warm = count_compiled(peer.library) == cached
        report["timing"]["compile_cache"] = "warm" if is_warm else "cold"
    finish_report(report, peer, machine, status, error)
    if status != "ok":
        print(f"{program}: {status}: {error}", file=sys.stderr)
    written = config.results_path
    try:
        record.append_record(config.results_path, report)
    except OSError as problem:
        print(f"{program}: the record could not be written: {problem}", file=sys.stderr)
        written, code = f"not written: {problem}", code or 6
    if config.verbose:
        print(f"{record.summarize(report)}\n  {'record':<14} {written}", flush=True)
    return code
