"""What the hand-written peers share: flags, weights, epochs, with no framework in it.

Flags, figures and exit codes are those of vit.py, where they are explained. A peer is a class:

    backend, library                    "native-jax" and "jax"
    Peer(config)                        chooses device and precision; ValueError: not to be had here
    .precision, .gpu_name               what matrix products run in; the GPU's name or None
    .build(mean, variance)              makes the model; the numbers are per channel of the pixels
    .load_keras_weights(weights)        takes what get_weights() of vit.py's model gives
    .count_parameters(), .count_flops() of the model, the latter of one picture's forward pass
    .place(images, labels)              puts the training pictures on the device
    .begin_epoch(order, maps)           takes the epoch's batches: int32 (steps, parts, images) and
                                        float32 (steps, parts, images, 2, 2), or None
    .run(rows)                          trains a slice of them, a step a row; does not wait
    .read_epoch()                       its [loss, accuracy, top-5 accuracy], floats
    .evaluate(images, labels)           the same three of other pictures, without dropout
    .keep_weights(), .restore_weights() remembers the weights; goes back to them
    .steps_per_call(steps)              how many of an epoch's steps one .run should get, a divisor
    .create_matmul(size)                a function that starts a product of square matrices
    .synchronize()                      waits for the device
    .device_peak_bytes()                (bytes, source) or (None, reason)
"""

import dataclasses
import math
import os
import platform
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

PROCESS_STARTED = time.perf_counter()

import numpy as np  # noqa: E402

from harness import augment, data, ending, environment, record, telemetry  # noqa: E402
from harness.cli import check_config, check_writable, choose_micro_batch, fail, parse  # noqa: E402
from harness.stopwatch import Stopwatch, measure_matmul  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - PROCESS_STARTED  # a peer adds its framework's

# ---------------------------------------------------------------------------------------------
# Flags


@dataclass
class Config:
    """Those fields of vit.py's ViTConfig that a peer knows, with the same meanings and defaults."""

    dataset: Literal["cifar100", "synthetic"] = "cifar100"  # synthetic: drawn pictures, no download
    num_classes: int = 100
    input_shape: tuple[int, int, int] = (32, 32, 3)  # height, width, channels of the pictures
    train_images: int | None = None  # a class-balanced subset, before the validation split
    test_images: int | None = None  # likewise
    validation_split: float = 0.1  # share of the training images, class-balanced; 0 for none
    augment: bool = True  # flip, rotate by 0.02 turns, zoom by 0.2
    image_size: int = 72  # pixels a side after resizing
    patch_size: int = 6  # pixels a side of a patch
    projection_dim: int = 64  # width
    num_heads: int = 4
    head_dim: int | None = None  # width of one head; default: projection_dim
    transformer_layers: int = 8  # depth
    transformer_units: tuple[int, ...] | None = None  # default: 2 * projection_dim, projection_dim
    mlp_head_units: tuple[int, ...] = (2048, 1024)
    dropout: float = 0.1  # after the dense layers of a block
    attention_dropout: float = 0.1
    head_dropout: float = 0.5
    learning_rate: float = 0.001
    weight_decay: float = 0.0001
    batch_size: int = 256
    micro_batch_size: int | None = None  # computed at once; default: on a CPU a part of the batch
    num_epochs: int = 10
    seed: int = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # of matrix products
    jit_compile: bool = True  # off: each operation by itself
    results_path: Path = Path("results.jsonl")  # the record is appended here
    node_name: str = field(default_factory=platform.node)
    verbose: bool = True  # a line an epoch, and a summary
    use_wandb: bool = False  # taken for vit.py's sake and ignored: a peer logs nowhere

    def __post_init__(self):
        self.head_dim = self.head_dim or self.projection_dim
        self.transformer_units = self.transformer_units or (
            2 * self.projection_dim,
            self.projection_dim,
        )
        check_config(self)

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


def start(argv, description, library):
    """The configuration that a command line asks for, and all that `library`, JAX or PyTorch, reads
    when it is imported. Ends the process on --help and on bad flags; starts it again once.
    """
    config = parse(Config, argv, description)
    environment.keep_memory()
    environment.set_variables()
    os.environ["KERAS_BACKEND"] = library  # CIFAR-100 comes through Keras
    return config


# ---------------------------------------------------------------------------------------------
# Numbers that go into the model and come out of it


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
# A run

METRICS = ("loss", "accuracy", "top5_accuracy")


def train(peer, config, dataset, report):
    """Build, train and test a peer; `report` is filled in on the way."""
    timing, quality, notes = report["timing"], report["quality"], report["notes"]
    started = time.perf_counter()
    peer.build(*data.measure_pixels(dataset.x_train))
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
    stopwatch = Stopwatch(
        epochs=config.num_epochs,
        images_per_epoch=used,
        synchronize=peer.synchronize,
        meter=telemetry.create_energy_meter(device=report["device"]["kind"]),
        report=partial(print, flush=True) if config.verbose else lambda line: None,
    )
    try:
        for epoch in range(config.num_epochs):
            order = data.epoch_order(len(dataset.x_train), config.seed, epoch)[:used]
            order, maps = order.reshape(steps, -1, config.micro_batch_size), None
            if config.augment:
                maps = augment.draw_affine(len(dataset.x_train), config.seed, epoch)[:used]
                maps = maps.reshape(*order.shape, 2, 2)
            stopwatch.begin_epoch()
            peer.begin_epoch(order, maps)
            for first in range(0, steps, per_call):
                peer.run(slice(first, first + per_call))
                if epoch == first == 0:
                    stopwatch.end_first_call(order[:per_call].size)
            results = peer.read_epoch()
            stopwatch.end_training()
            if has_validation:
                results += peer.evaluate(dataset.x_validation, dataset.y_validation)
            logs = dict(zip(history, results))
            for name, value in logs.items():
                history[name].append(value)
            stopwatch.end_epoch(epoch, logs)
            if has_validation and logs["val_accuracy"] > max(history["val_accuracy"][:-1] or [-1]):
                peer.keep_weights()
                quality["best_epoch"] = epoch + 1
    finally:
        figures, energy, reasons = stopwatch.measure(PROCESS_STARTED)
        timing |= figures
        report["energy"] |= energy
        notes += reasons
        quality |= history
    if has_validation:
        peer.restore_weights()
    else:
        quality["best_epoch"] = config.num_epochs
        notes += [f"quality.val_{name}: there are no validation images" for name in METRICS]
        notes.append("the last epoch's weights were tested")
    started = time.perf_counter()
    results = peer.evaluate(dataset.x_test, dataset.y_test)
    timing["evaluation_seconds"] = time.perf_counter() - started
    quality |= {f"test_{name}": value for name, value in zip(METRICS, results)}


def main(create_peer, config, import_seconds):
    """One run from configuration to record; returns the exit code."""
    import_bytes = telemetry.host_rss_bytes()
    check_writable(results_path=config.results_path)
    machine = telemetry.describe_machine()  # before the framework touches the GPU
    try:
        peer = create_peer(config)
    except ValueError as error:
        fail(error)
    choose_micro_batch(config, is_on_gpu=peer.gpu_name is not None)
    report = record.begin_record(
        "train",
        config=dataclasses.asdict(config),
        backend=peer.backend,
        precision=peer.precision,
        machine=machine,
        gpu_name=peer.gpu_name,
        versions=telemetry.read_versions(peer.backend),
        git=telemetry.read_git(Path(__file__).parent),
    )
    report["timing"]["import_seconds"] = import_seconds
    report["memory"]["host_import_bytes"] = import_bytes
    runner = f"{peer.backend} on {peer.gpu_name or 'the CPU'}"
    cached = environment.count_compiled(peer.library, config.jit_compile)
    status, error, exit_code = ending.run_to_end(
        lambda: train(peer, config, data.load_for_run(config, report, runner), report),
        f"lower --micro-batch-size {config.micro_batch_size}",
    )
    device_peak, matmul = peer.device_peak_bytes(), (None, None)
    if status == "ok":
        matmul = measure_matmul(peer.create_matmul, peer.synchronize, report["device"]["kind"])
    record.finish_record(
        report,
        status,
        error,
        matmul=matmul,
        compiled_files=(cached, environment.count_compiled(peer.library, config.jit_compile)),
        device_peak=device_peak,
        host_peak_bytes=telemetry.host_peak_bytes(),
        total_seconds=time.perf_counter() - PROCESS_STARTED,
        warnings=telemetry.compare_conditions(machine, telemetry.read_conditions()),
    )
    is_written = record.deliver_record(config.results_path, report, config.verbose)
    return exit_code or (0 if is_written else ending.NOT_WRITTEN)
