"""What the hand-written peers share: flags, weights, epochs, with no framework in it.

Flags, figures and exit codes are those of vit.py, where they are explained. A peer is a class:

    backend, library                    "native-jax" and "jax"
    Peer(config)                        chooses device and precision
    .precision, .gpu_name               what matrix products run in; the GPU's name or None
    .build(mean, variance)              makes the model; the numbers are per channel of the pixels
    .load_keras_weights(weights)        takes what get_weights() of vit.py's model gives
    .count_parameters(), .count_flops() of the model, the latter of one picture's forward pass
    .place(images, labels)              puts the training pictures on the device
    .begin_epoch(order, maps, rates)    takes the epoch's batches: int32 (steps, parts, images),
                                        float32 (steps, parts, images, 2, 2), with a shift
                                        (..., 2, 3), or None; learning rates, float32 (steps,)
    .run(rows)                          trains a slice of them, a step a row; does not wait
    .read_epoch()                       its [loss, accuracy, top-5 accuracy], floats
    .evaluate(images, labels)           the same three of other pictures, without dropout, by the
                                        average of the weights where there is one
    .keep_weights(), .restore_weights() remembers those weights; goes back to them
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

_import_started = time.perf_counter()

import numpy as np  # noqa: E402

from harness import augment, data, ending, environment, record, telemetry  # noqa: E402
from harness.cli import (  # noqa: E402
    accept_cpu,
    check_config,
    check_writable,
    choose_micro_batch,
    parse,
    refuse,
    settle_widths,
)
from harness.run import run_recorded  # noqa: E402
from harness.stopwatch import Diverged, Stopwatch  # noqa: E402

PROCESS_STARTED = environment.find_start()
IMPORT_SECONDS = time.perf_counter() - _import_started  # a peer adds its framework's

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
    augment: bool = True  # flip, and what follows here
    rotation: float = 0.02  # largest angle, as a share of a full turn
    zoom: float = 0.2  # largest change of height and of width
    crop_padding: int = 0  # shift by up to so many pixels; what is outside gets the mean colour
    label_smoothing: float = 0.0  # this share of a label is spread over all classes
    image_size: int = 72  # pixels a side after resizing
    patch_size: int = 6  # pixels a side of a patch
    stem: Literal["patch", "conv"] = "patch"  # conv: 3x3 convolutions, each halves the picture
    pool: Literal["flatten", "mean", "token", "attention"] = "flatten"  # from tokens to one vector
    projection_dim: int = 64  # width
    num_heads: int = 4
    head_dim: int | None = None  # width of one head; default: projection_dim
    transformer_layers: int = 8  # depth
    transformer_units: tuple[int, ...] | None = None  # default: 2 * projection_dim, projection_dim
    mlp_ratio: float | None = None  # instead: hidden width over width; no activation at the end
    mlp_head_units: tuple[int, ...] = (2048, 1024)
    dropout: float = 0.1  # after the dense layers of a block
    attention_dropout: float = 0.1
    head_dropout: float = 0.5
    drop_path: float = 0.0  # chance to skip a branch in the last block; less in those before
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: AdamW but for hidden layers' kernels
    learning_rate: float = 0.001
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.0  # the cosine schedule begins with a line from 0 to learning_rate
    weight_decay: float = 0.0001
    decay_kernels_only: bool = False  # not biases, norms, positions, tokens
    beta_2: float = 0.999
    clip_norm: float | None = None  # largest global norm of a step's gradients
    ema: float | None = None  # momentum of an average of the weights, which is tested
    best_weights: bool = True  # of the epoch that validated best; off: the last epoch's
    batch_size: int = 256
    micro_batch_size: int | None = None  # computed at once; default: on a CPU a part of the batch
    num_epochs: int = 10
    seed: int = 0
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"  # of matrix products
    jit_compile: bool = True  # off: each operation by itself
    allow_cpu: bool = False  # go on without a GPU in an image that is made for one
    results_path: Path = Path("results.jsonl")  # the record is appended here
    node_name: str = field(default_factory=platform.node)
    verbose: bool = True  # a line an epoch, and a summary
    use_wandb: bool = False  # taken for vit.py's sake and ignored: a peer logs nowhere

    def __post_init__(self):
        settle_widths(self)
        check_config(self)
        refuse(
            (
                self.crop_padding and (self.rotation or self.zoom),
                "--crop-padding: expected --rotation 0 --zoom 0 beside it, "
                f"got {self.rotation} and {self.zoom}",
            ),
            (
                self.warmup_epochs and self.schedule == "constant",
                "--warmup-epochs: expected --schedule cosine, got constant",
            ),
        )

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self):
        return self.num_patches + (self.pool == "token")

    @property
    def stem_filters(self):
        """Of each convolution; all but the last halve the picture."""
        halvings = range(int(math.log2(self.patch_size)), 0, -1)
        narrow = [max(self.projection_dim >> n, min(self.projection_dim, 8)) for n in halvings]
        return (*narrow, self.projection_dim)

    @property
    def pooled_width(self):
        return self.projection_dim * (self.num_patches if self.pool == "flatten" else 1)

    @property
    def num_dropouts(self):
        block = 1 + len(self.transformer_units) + 2 * bool(self.drop_path)
        return self.transformer_layers * block + 1 + len(self.mlp_head_units)

    def drop_path_of(self, block):
        return self.drop_path * block / max(self.transformer_layers - 1, 1)


def start(argv, description, library):
    """The configuration that a command line asks for, and all that `library`, JAX or PyTorch, reads
    when it is imported. Ends the process on --help and on bad flags; starts it again once.
    """
    environment.keep_memory()
    config = parse(Config, argv, description)
    environment.set_variables()
    if not environment.has_cuda():
        accept_cpu(config.allow_cpu)
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

    weights, projection, channels = [], [], 3
    if config.stem == "patch":
        projection = [kernel(3 * config.patch_size**2, dim), zeros(dim)]
    else:
        for filters in config.stem_filters:
            fans = (9 * channels, 9 * filters)
            weights += [kernel(3, 3, channels, filters, fans=fans), zeros(filters)]
            channels = filters
    for tokens in (config.num_tokens, *([1] if config.pool == "token" else [])):
        weights.append(rng.uniform(-0.05, 0.05, (tokens, dim)).astype("f"))
    weights += projection
    for _ in range(config.transformer_layers):
        weights += [ones(dim), zeros(dim)]
        for _ in ("query", "key", "value"):
            weights += [kernel(dim, heads, size, fans=(dim, heads * size)), zeros(heads, size)]
        weights += [kernel(heads, size, dim, fans=(heads * size, dim)), zeros(dim)]
        weights += [ones(dim), zeros(dim), *mlp(dim, config.transformer_units)]
    weights += [ones(dim), zeros(dim), *(mlp(dim, [1]) if config.pool == "attention" else [])]
    return [*weights, *mlp(config.pooled_width, (*config.mlp_head_units, config.num_classes))]


def count_flops(config, kernels):
    """Matrix products of one picture's forward pass, 2 a multiply-accumulate.

    kernels: (part of the model, number within it, size) of each; a part is stem, patches, blocks,
    pool, head or logits.
    """
    uses = {"patches": config.num_patches, "blocks": config.num_tokens, "pool": config.num_tokens}
    macs = 0
    for part, number, size in kernels:
        if part == "stem":
            macs += size * (config.image_size >> number) ** 2
        else:
            macs += size * uses.get(part, 1)
    scores = config.num_tokens**2 * config.num_heads * config.head_dim
    return 2 * (macs + 2 * scores * config.transformer_layers)


def list_rates(config, steps):
    """The learning rate of each step, float32 (epochs, steps): constant, or a line up to it from 0
    and then half a cosine down (https://arxiv.org/abs/1608.03983)."""
    step = np.arange(config.num_epochs * steps)
    rates = np.full(len(step), config.learning_rate)
    if config.schedule == "cosine":
        warmup = round(config.warmup_epochs * steps)
        done = (step - warmup) / max(1, len(step) - warmup)
        rates *= np.where(done < 0, step / max(1, warmup), (1 + np.cos(np.pi * done)) / 2)
    return rates.astype("float32").reshape(config.num_epochs, steps)


def fill_batches(images, labels, batch_size):
    """(images, labels) batch by batch, all of one size: fillers in the last have the label -1."""
    missing = -len(images) % batch_size
    for first in range(0, len(images) + missing, batch_size):
        x, y = images[first : first + batch_size], labels[first : first + batch_size]
        if missing and len(x) < batch_size:
            x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
            y = np.concatenate([y, np.full(missing, -1, y.dtype)])
        yield x, y


# Muon (https://kellerjordan.github.io/posts/muon/), scaled to the length of AdamW's steps
# (https://arxiv.org/abs/2502.16982).
MOMENTUM, STEP_LENGTH = 0.95, 0.2
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5  # a X + b X X' X + c (X X')^2 X, so many times

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
    keeps_best = has_validation and config.best_weights
    splits = ("", "val_") if has_validation else ("",)
    history = {prefix + name: [] for prefix in splits for name in METRICS}
    steps = len(dataset.x_train) // config.batch_size  # a smaller last batch would compile anew
    used, per_call = steps * config.batch_size, peer.steps_per_call(steps)
    rates = list_rates(config, steps)
    stopwatch = Stopwatch(
        epochs=config.num_epochs,
        images_per_epoch=used,
        synchronize=peer.synchronize,
        meter=telemetry.create_energy_meter(device=report["device"]["kind"]),
        report=partial(print, flush=True) if config.verbose else lambda line: None,
    )

    def plan(epoch):
        count, seeds = len(dataset.x_train), (config.seed, epoch)
        order = data.epoch_order(count, *seeds)[:used]
        order, maps = order.reshape(steps, -1, config.micro_batch_size), None
        if config.augment:
            maps = augment.draw_affine(count, *seeds, config.rotation, config.zoom)
            if config.crop_padding:
                maps = augment.draw_crop(maps, *seeds, config.crop_padding)
            maps = maps[:used].reshape(*order.shape, *maps.shape[1:])
        return order, maps

    plans, planned = map(plan, range(config.num_epochs)), None
    try:
        for epoch in range(config.num_epochs):
            stopwatch.begin_epoch()
            order, maps = planned or next(plans)
            peer.begin_epoch(order, maps, rates[epoch])
            for first in range(0, steps, per_call):
                peer.run(slice(first, first + per_call))
                if epoch == first == 0:
                    stopwatch.end_first_call(order[:per_call].size)
            planned = next(plans, None)  # meanwhile
            results = peer.read_epoch()
            stopwatch.end_training()
            if has_validation:
                results += peer.evaluate(dataset.x_validation, dataset.y_validation)
            logs = dict(zip(history, results))
            for name, value in logs.items():
                history[name].append(value)
            stopwatch.end_epoch(epoch, logs)
            if keeps_best and logs["val_accuracy"] > max(history["val_accuracy"][:-1] or [-1]):
                peer.keep_weights()
                quality["best_epoch"] = epoch + 1
    finally:
        figures, energy, reasons = stopwatch.measure(PROCESS_STARTED)
        timing |= figures
        report["energy"] |= energy
        notes += reasons
        quality |= history
    if not has_validation:
        notes += [f"quality.val_{name}: there are no validation images" for name in METRICS]
    if keeps_best:
        peer.restore_weights()
    else:
        quality["best_epoch"] = config.num_epochs
        notes.append("the last epoch's weights were tested")
    started = time.perf_counter()
    results = peer.evaluate(dataset.x_test, dataset.y_test)
    timing["evaluation_seconds"] = time.perf_counter() - started
    if not math.isfinite(results[0]):  # of what is no number every picture counts as right
        raise Diverged(results[0], "the test")
    quality |= {f"test_{name}": value for name, value in zip(METRICS, results)}


def main(create_peer, config, import_seconds):
    """One run from configuration to record; returns the exit code."""
    ending.outlive_full_disk()
    import_bytes = telemetry.host_rss_bytes()
    check_writable(results_path=config.results_path)
    machine = telemetry.describe_machine()  # before the framework touches the GPU
    peer = create_peer(config)
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
    return run_recorded(
        lambda: train(peer, config, data.load_for_run(config, report, runner), report),
        report,
        config.results_path,
        device=peer,
        library=peer.library,
        machine=machine,
        started=PROCESS_STARTED,
        remedy=f"lower --micro-batch-size {config.micro_batch_size}",
        is_compiled=config.jit_compile,
        is_shown=config.verbose,
    )
