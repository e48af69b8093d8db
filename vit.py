# /// script
# requires-python = ">=3.11"
# dependencies = ["keras==3.15.1", "numpy", "tyro", "wandb", "python-dotenv", "nvidia-ml-py"]
# ///
"""Train and measure a Vision Transformer on CIFAR-100 on a Keras 3 backend of your choice.

    python vit.py --no-use-wandb                          JAX, CIFAR-100, ten epochs
    python vit.py --keras-backend torch --no-use-wandb    the same on PyTorch
    python vit.py --dataset synthetic --no-use-wandb      no download: drawn pictures
    uv run --with jax vit.py --no-use-wandb               from nothing

The model is that of the keras.io example "Image classification with Vision Transformer"
(https://keras.io/examples/vision/image_classification_with_vision_transformer/). The file reads
in the order of a run: backend, configuration, model, augmentation, training, Weights & Biases,
main. Each run appends one record of what it measured to --results-path.

Exit codes: 0 done; 1 an unexpected error; 2 a bad configuration or a missing backend;
3 out of memory; 4 diverged; 5 no data; 6 trained, but something could not be written;
130 interrupted (Ctrl-C); 143 terminated (SIGTERM).
"""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from harness import ending, environment, tracking
from harness.cli import ConfigError, check_config, check_writable, choose_micro_batch, fail, parse

PROCESS_STARTED = time.perf_counter()
BACKENDS = ("jax", "torch", "tensorflow")  # each is a pip extra, too

# ---------------------------------------------------------------------------------------------
# Configuration: one field a line, the trailing comment is its help


@dataclass
class ViTConfig:
    """Every choice of a run. Impossible values raise ConfigError."""

    keras_backend: Literal[BACKENDS] | None = None  # default: KERAS_BACKEND, else jax
    # data
    dataset: Literal["cifar100", "synthetic"] = "cifar100"  # synthetic: drawn pictures, no download
    num_classes: int = 100
    input_shape: tuple[int, int, int] = (32, 32, 3)  # height, width, channels of the pictures
    train_images: int | None = None  # a class-balanced subset, before the validation split
    test_images: int | None = None  # likewise
    validation_split: float = 0.1  # share of the training images, class-balanced; 0 for none
    augment: bool = True  # flip, rotate by 0.02 turns, zoom by 0.2
    # model
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
    # training
    learning_rate: float = 0.001
    weight_decay: float = 0.0001
    batch_size: int = 256
    micro_batch_size: int | None = None  # computed at once; default: the batch, on a CPU up to 32
    num_epochs: int = 10
    seed: int = 0
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"  # of matrix products
    jit_compile: bool = True  # off: plain Keras fit, not compiled
    trainer: Literal["compiled", "fit"] = "compiled"  # fit: Keras' own loop with its defaults
    allow_cpu: bool = False  # go on without a GPU in an image that is made for one
    # files and logs
    checkpoint_path: Path = Path("/tmp/checkpoint.weights.h5")  # the best weights
    results_path: Path = Path("results.jsonl")  # the record is appended here
    node_name: str = field(default_factory=platform.node)
    verbose: bool = True  # a line an epoch, and a summary
    use_wandb: bool = True
    wandb_project: str = field(
        default_factory=lambda: os.environ.get("WANDB_PROJECT") or tracking.PROJECT
    )
    wandb_entity: str | None = field(default_factory=lambda: os.environ.get("WANDB_ENTITY") or None)
    wandb_run_name: str | None = None
    wandb_tags: tuple[str, ...] = ()

    def __post_init__(self):
        self.keras_backend = self.keras_backend or os.environ.get("KERAS_BACKEND") or "jax"
        self.head_dim = self.head_dim or self.projection_dim
        self.transformer_units = self.transformer_units or (
            2 * self.projection_dim,
            self.projection_dim,
        )
        check_config(self)
        if not str(self.checkpoint_path).endswith(".weights.h5"):
            raise ConfigError(
                "--checkpoint-path: expected a name ending in .weights.h5, "
                f"got {self.checkpoint_path}"
            )

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


# ---------------------------------------------------------------------------------------------
# The backend, chosen before Keras is imported


def _set_backend_from_env_or_cli(argv):
    """Set KERAS_BACKEND: an explicit --keras-backend wins, then the environment, then jax.

    Ends the process with exit code 2 where the backend is unknown or not installed.
    """
    backend = os.environ.get("KERAS_BACKEND") or "jax"
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--keras-backend", "--keras_backend"):
            backend = value if equals else (argv[position + 1 : position + 2] or [""])[0]
    if backend not in BACKENDS:
        fail(f"--keras-backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if importlib.util.find_spec(backend) is None:
        fail(
            f"the {backend} backend is not installed: pip install '.[{backend}]', "
            "or choose another with --keras-backend"
        )
    os.environ["KERAS_BACKEND"] = backend
    environment.set_variables()


def _accept_cpu(config):
    """There is no GPU: end the process with exit code 2 in an image that is made for one, unless
    the user said to go on."""
    if os.environ.get("VIT_EXPECT_GPU") == "1":
        if not config.allow_cpu and os.environ.get("JAX_PLATFORMS") != "cpu":
            remedy = "docker run --gpus all (on a Jetson --runtime nvidia), or --allow-cpu"
            fail(f"expected a GPU, for which this image is made, got none: {remedy}")
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX looks for it and prints a traceback


if __name__ == "__main__":  # --help and bad values end here, before the slow imports
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))
    if os.environ.get("VIT_EPOCHS"):  # a sweep's trial
        ending.end_with_parent()
    _set_backend_from_env_or_cli(sys.argv[1:])
    CONFIG = parse(ViTConfig, sys.argv[1:], __doc__.split("\n\n")[0])
    if not environment.has_cuda():
        _accept_cpu(CONFIG)
    environment.keep_memory()
    if CONFIG.keras_backend == "torch" and not environment.has_cuda():
        environment.precompile_header()
else:  # imported, by another command with its own flags or by a test
    _set_backend_from_env_or_cli(sys.argv[1:])

_import_started = time.perf_counter()
with environment.hide("matplotlib"):  # for Keras' own plots: half a second of each start
    import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402

from harness import augment, data, engine, record, telemetry  # noqa: E402
from harness.dropout import Dropout, MultiHeadAttention  # noqa: E402
from harness.stopwatch import Progress, Stopwatch, measure_matmul  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _import_started
IMPORT_BYTES = telemetry.host_rss_bytes()

# ---------------------------------------------------------------------------------------------
# The model


@keras.saving.register_keras_serializable("vit")
class GlorotUniform(keras.initializers.GlorotUniform):
    """Keras' default for kernels (Glorot and Bengio 2010), drawn by NumPy's global generator.

    Keras' own draws differ between backends; these depend on the seed alone, and JAX need not
    compile a generator for each shape. `keras.utils.set_random_seed` seeds NumPy's generator.
    """

    def __call__(self, shape, dtype=None):
        if self.input_axes:  # Keras sets both for the kernels of einsums
            fans = [math.prod(shape[a] for a in x) for x in (self.input_axes, self.output_axes)]
        else:
            fans = [math.prod(shape[:-2]) * size for size in shape[-2:]]
        limit = math.sqrt(6 / sum(fans))
        return ops.convert_to_tensor(np.random.uniform(-limit, limit, shape), dtype=dtype)


@keras.saving.register_keras_serializable("vit")
class RandomUniform(keras.initializers.Initializer):
    """Keras' default for embeddings, within 0.05 to either side, drawn like GlorotUniform."""

    def __call__(self, shape, dtype=None):
        return ops.convert_to_tensor(np.random.uniform(-0.05, 0.05, shape), dtype=dtype)


@keras.saving.register_keras_serializable("vit")
class Prepare(layers.Layer):
    """Normalise raw pixels (batch, height, width, channels) and resize to squares, bilinearly.

    Not Keras' own layers. Resizing, as all of Keras' preprocessing, calls itself in training mode
    by default, and layers after it inherit that: `model(pixels)` would drop units. Normalization
    puts its numbers into the compiled code, which then is another for each choice of images;
    here they are weights, and a second start finds its code in the cache.
    """

    def __init__(self, size, mean, variance, **kwargs):
        super().__init__(**kwargs)
        self.size, self.statistics = size, {"mean": mean, "variance": variance}

    def build(self, input_shape):
        for name, values in self.statistics.items():
            values = np.broadcast_to(values, input_shape[-1:])
            weight = self.add_weight(shape=values.shape, trainable=False, name=name)
            weight.assign(values)
            setattr(self, name, weight)

    def call(self, images):
        x = (images - ops.cast(self.mean, images.dtype)) / ops.sqrt(
            ops.cast(self.variance, images.dtype)
        )
        return ops.image.resize(x, (self.size, self.size), data_format="channels_last")

    def get_config(self):
        return {**super().get_config(), "size": self.size, **self.statistics}


@keras.saving.register_keras_serializable("vit")
class Patches(layers.Layer):
    """Cut images (batch, height, width, channels) into flat patches (batch, patches, pixels)."""

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, images):
        _, height, width, channels = images.shape
        size, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        x = ops.reshape(images, (-1, rows, size, columns, size, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (batch, rows, columns, size, size, channels)
        return ops.reshape(x, (-1, rows * columns, size * size * channels))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


@keras.saving.register_keras_serializable("vit")
class PatchEncoder(layers.Layer):
    """Project patches to the model's width and add a learned embedding of their position."""

    def __init__(self, num_patches, projection_dim, **kwargs):
        super().__init__(**kwargs)
        self.num_patches, self.projection_dim = num_patches, projection_dim
        self.projection = layers.Dense(
            projection_dim, kernel_initializer=GlorotUniform(), dtype=self.dtype_policy
        )

    def build(self, input_shape):
        self.projection.build(input_shape)
        self.position_embedding = self.add_weight(
            shape=(self.num_patches, self.projection_dim),
            initializer=RandomUniform(),
            name="position_embedding",
        )

    def call(self, patches):  # (batch, patches, pixels) -> (batch, patches, dim)
        projected = self.projection(patches)
        return projected + ops.cast(self.position_embedding, projected.dtype)

    def get_config(self):
        sizes = {"num_patches": self.num_patches, "projection_dim": self.projection_dim}
        return {**super().get_config(), **sizes}


def mlp(x, units, dropout):
    """Dense layers with GELU and dropout."""
    for width in units:
        x = layers.Dense(width, activation="gelu", kernel_initializer=GlorotUniform())(x)
        x = Dropout(dropout)(x)
    return x


def encode(patches, config):
    """Pre-norm transformer blocks: (batch, patches, pixels) -> (batch, patches, dim)."""
    x = PatchEncoder(config.num_patches, config.projection_dim)(patches)
    for _ in range(config.transformer_layers):
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        h = MultiHeadAttention(
            num_heads=config.num_heads,
            key_dim=config.head_dim,
            dropout=config.attention_dropout,
            kernel_initializer=GlorotUniform(),
        )(h, h)
        x = layers.Add()([x, h])
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        h = mlp(h, config.transformer_units, config.dropout)
        x = layers.Add()([x, h])
    return layers.LayerNormalization(epsilon=1e-6)(x)


def create_vit_classifier(config, mean=127.5, variance=127.5**2):
    """The classifier, from raw pixels to logits, with weights that depend on the seed alone.

    Args:
        mean, variance: of the training pixels, one number or one per channel; part of the model,
            so that a saved model takes uint8 or float pixels 0 to 255 as they are.

    Returns:
        keras.Model from (batch, 32, 32, 3) pixels to (batch, num_classes) float32 logits.
    """
    keras.utils.set_random_seed(config.seed)
    pixels = layers.Input(config.input_shape, name="pixels")
    x = Prepare(config.image_size, mean, variance)(pixels)
    x = Patches(config.patch_size)(x)
    x = encode(x, config)  # (batch, patches, dim)
    x = layers.Flatten()(x)
    x = Dropout(config.head_dropout)(x)
    x = mlp(x, config.mlp_head_units, config.head_dropout)
    logits = layers.Dense(
        config.num_classes, kernel_initializer=GlorotUniform(), dtype="float32", name="logits"
    )(x)
    return keras.Model(pixels, logits, name="vit")


# ---------------------------------------------------------------------------------------------
# Augmentation


def create_data_augmentation(config, x_train):
    """What is done to pictures, split by where it belongs.

    Returns:
        (statistics, draw, apply). statistics: mean and variance per channel of x_train, for the
        model, which normalises and resizes so that it can't be fed wrongly. draw(epoch): the
        random draws of an epoch, one row per picture, NumPy; apply(images, draws): the same
        pictures flipped, rotated by up to 0.02 turns and zoomed by up to 0.2, on the device and
        outside the differentiated model. draw and apply are None with --no-augment.
    """
    mean, variance = data.measure_pixels(x_train)
    statistics = {"mean": mean.tolist(), "variance": variance.tolist()}
    if not config.augment:
        return statistics, None, None

    def draw(epoch):
        return augment.draw_affine(len(x_train), config.seed, epoch)

    return statistics, draw, augment.apply_affine


# ---------------------------------------------------------------------------------------------
# Training


class Batches(keras.utils.PyDataset):
    """An epoch's batches for Keras' own `fit`: the same pictures, order and draws."""

    def __init__(self, dataset, config, draw, apply):
        super().__init__()
        self.dataset, self.config, self.draw = dataset, config, draw
        self.apply = apply and engine.compile_function(apply)
        self.start(0)

    def start(self, epoch):
        """Draw this epoch. (Keras calls on_epoch_end before the first epoch, too: of no use.)"""
        self.order = data.epoch_order(len(self.dataset.x_train), self.config.seed, epoch)
        self.draws = self.draw(epoch) if self.draw else None

    def __len__(self):
        return len(self.dataset.x_train) // self.config.batch_size

    def __getitem__(self, step):
        rows = slice(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        index = self.order[rows]
        images, labels = self.dataset.x_train[index], self.dataset.y_train[index]
        return (self.apply(images, self.draws[rows]) if self.apply else images), labels


def is_compiled(config):
    """Whether this project's compiled steps train; else Keras' own `fit` does."""
    return config.trainer == "compiled" and config.jit_compile and engine.BACKEND != "tensorflow"


def train_plain(model, dataset, config, draw, apply, callbacks):
    """Train with Keras' own `fit`, whatever it costs: that is what it is here to show.

    Returns:
        a function of (images, labels) that evaluates: a dictionary of loss and metrics.
    """
    validation = (dataset.x_validation, dataset.y_validation)
    batches = Batches(dataset, config, draw, apply)
    start = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: batches.start(epoch))
    model.fit(
        batches,
        validation_data=validation if len(dataset.x_validation) else None,
        validation_batch_size=config.batch_size,
        epochs=config.num_epochs,
        callbacks=[start, *callbacks],
        shuffle=False,  # Batches brings its own order
        verbose=0,
    )
    return partial(model.evaluate, batch_size=config.batch_size, verbose=0, return_dict=True)


def train_compiled(model, dataset, config, draw, apply, callbacks, stopwatch):
    """Train with this project's compiled steps; what happens in an epoch is what `fit` does.

    Returns:
        a function of (images, labels) that evaluates: a dictionary of loss and metrics.
    """
    steps = len(dataset.x_train) // config.batch_size  # a smaller last batch would compile anew
    per_call = engine.steps_per_call(steps)
    engine.build_state(model, config.batch_size)
    training = engine.compile_train_steps(model, dataset.x_train, dataset.y_train, apply)
    forward = engine.compile_forward(model)
    progress = Progress(config.num_epochs, steps, is_shown=config.verbose)
    callbacks = keras.callbacks.CallbackList(callbacks, model=model, epochs=config.num_epochs)
    callbacks.on_train_begin()
    for epoch in range(config.num_epochs):
        model.reset_metrics()
        order = data.epoch_order(len(dataset.x_train), config.seed, epoch)
        order = order[: steps * config.batch_size].reshape(steps, -1, config.micro_batch_size)
        draws = draw(epoch)[: order.size].reshape(*order.shape, 2, 2) if draw else None
        callbacks.on_epoch_begin(epoch)
        running = None
        progress.show(epoch, 0, running)
        for first in range(0, steps, per_call):
            rows = slice(first, first + per_call)
            losses = training.run(order[rows], None if draws is None else draws[rows])
            if epoch == first == 0:
                stopwatch.end_first_call(order[rows].size)
            # The previous call's losses: reading this call's would leave the device idle.
            progress.show(epoch, first, running)
            running = losses
        training.sync()
        progress.show(epoch, steps, running)
        logs = {name: float(value) for name, value in model.get_metrics_result().items()}
        callbacks.on_test_begin()
        if len(dataset.x_validation):
            results = engine.evaluate(
                model, forward, dataset.x_validation, dataset.y_validation, config.batch_size
            )
            logs |= {f"val_{name}": value for name, value in results.items()}
        callbacks.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    callbacks.on_train_end()
    return lambda images, labels: engine.evaluate(model, forward, images, labels, config.batch_size)


def run_experiment(config, dataset, report, run=None):
    """Build, train and test; `report`, a record, is filled in on the way, so that a run that
    fails leaves what it had.

    Args:
        run: an open W&B run, or None.

    Returns:
        the trained model, with the weights that were tested.

    Raises:
        stopwatch.Diverged; whatever the backend raises, its out-of-memory errors included.
    """
    timing, quality, notes = report["timing"], report["quality"], report["notes"]
    started = time.perf_counter()
    statistics, draw, apply = create_data_augmentation(config, dataset.x_train)
    model = create_vit_classifier(config, **statistics)
    model.compile(
        optimizer=keras.optimizers.AdamW(config.learning_rate, weight_decay=config.weight_decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(5, name="top-5-accuracy"),
        ],
        jit_compile="auto" if config.jit_compile else False,
    )
    timing["build_seconds"] = time.perf_counter() - started
    report["model"]["parameters"] = sum(math.prod(v.shape) for v in model.trainable_variables)
    report["model"]["flops_per_image"] = engine.count_flops(model)

    stopwatch = Stopwatch(
        epochs=config.num_epochs,
        images_per_epoch=len(dataset.x_train) // config.batch_size * config.batch_size,
        synchronize=engine.synchronize,
        meter=telemetry.create_energy_meter(device=report["device"]["kind"]),
        report=partial(print, flush=True) if config.verbose else lambda line: None,
    )
    history = keras.callbacks.History()
    # Batch hooks are left alone: overriding them would make Keras wait for every step.
    clock = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: stopwatch.begin_epoch(),
        on_test_begin=lambda logs: stopwatch.end_training(),
        on_epoch_end=stopwatch.end_epoch,
    )
    callbacks = [history, clock]  # in this order: an epoch that was shown is in the record
    has_validation = len(dataset.x_validation) > 0
    if has_validation:
        config.checkpoint_path.unlink(missing_ok=True)  # another run's best is not this one's
        callbacks.append(
            keras.callbacks.ModelCheckpoint(
                str(config.checkpoint_path),
                monitor="val_accuracy",
                mode="max",
                save_best_only=True,
                save_weights_only=True,
            )
        )
    if run is not None:
        callbacks.append(CustomWandbCallback(run))
    if os.environ.get("VIT_EPOCHS"):
        tell = partial(tell_epoch, config.num_epochs)
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=tell))
    try:
        if is_compiled(config):
            evaluate = train_compiled(model, dataset, config, draw, apply, callbacks, stopwatch)
        else:
            evaluate = train_plain(model, dataset, config, draw, apply, callbacks)
    finally:
        figures, energy, reasons = stopwatch.measure(PROCESS_STARTED)
        timing |= figures
        report["energy"] |= energy
        notes += reasons
        for name, values in history.history.items():
            quality[record_name(name)] = values

    if has_validation:
        quality["best_epoch"] = 1 + int(np.argmax(quality["val_accuracy"]))
        model.load_weights(config.checkpoint_path)
    else:
        quality["best_epoch"] = len(quality["loss"])
        missing = ("val_loss", "val_accuracy", "val_top5_accuracy")
        notes += [f"quality.{name}: there are no validation images" for name in missing]
        notes.append("without validation images the last epoch's weights were tested")
    started = time.perf_counter()
    results = evaluate(dataset.x_test, dataset.y_test)
    timing["evaluation_seconds"] = time.perf_counter() - started
    quality |= {f"test_{record_name(name)}": value for name, value in results.items()}
    return model


def tell_epoch(epochs, epoch, logs):
    """Append an epoch (from 1) and its metrics, a JSON object a line, to the file that VIT_EPOCHS
    names: a sweep that started this run may end it by SIGTERM when it does not promise enough.

    The file may be a pipe. Where its reader is gone, so is the reason for this run: it ends.
    """
    with open(os.environ["VIT_EPOCHS"], "a") as file:
        file.write(json.dumps({"epoch": epoch + 1, "epochs": epochs, **logs}) + "\n")


def record_name(metric):
    """A metric's name in a record: W&B and Keras' log say top-5-accuracy, a key says top5."""
    return metric.replace("top-5-accuracy", "top5_accuracy")


# ---------------------------------------------------------------------------------------------
# Weights & Biases, imported only when it is used


class CustomWandbCallback(keras.callbacks.Callback):
    """Log every metric of every epoch. A failure is told once, and training goes on."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_epoch_end(self, epoch, logs=None):
        log_wandb(self.run, {**logs, "epoch": epoch})


def log_wandb(run, values, summary=None):
    """Log to W&B, which may fail in ways of its own: the run and its record must not."""
    try:
        run.log(values)
        run.summary.update(summary or {})
    except Exception as error:
        print(f"warning: W&B did not take a log: {error}: training goes on", file=sys.stderr)


def start_wandb(config):
    """Open a W&B run, in the group of its sweep (if any), node and backend."""
    backend = keras.backend.backend()
    group = [os.environ.get("WANDB_SWEEP_ID"), config.node_name, backend]
    group = os.environ.get("WANDB_RUN_GROUP") or "-".join(filter(None, group))
    choices = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    try:
        return tracking.start_run(
            "--no-use-wandb",
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_run_name,
            group=group,
            tags=[*config.wandb_tags, backend, config.node_name, config.dataset],
            config=choices | {"backend": backend},
        )
    except ValueError as error:
        fail(error)


def finish_wandb(run, report, exit_code):
    """Log the test results and figures under their names on the dashboard, add the record as an
    artifact, and close the run."""
    timing, memory, quality = report["timing"], report["memory"], report["quality"]
    results = {
        "total_parameters": report["model"]["parameters"],
        "test_accuracy": quality["test_accuracy"],
        "test_top5_accuracy": quality["test_top5_accuracy"],
        "train_images_per_second": timing["train_images_per_second"],
        "compile_seconds": timing["compile_seconds"],
        "host_peak_bytes": memory["host_peak_bytes"],
        "device_peak_bytes": memory["device_peak_bytes"],
        "joules_per_image": report["energy"]["joules_per_image"],
    }
    results = {name: value for name, value in results.items() if value is not None}
    final = {f"final_{n}": results[n] for n in results if n.startswith("test_")}
    log_wandb(run, results, {**final, "status": report["status"]})
    with tracking.forgiving("the record was not added"):
        tracking.log_files(run, "record", {"record.json": record.dump_record(report)})
    with tracking.forgiving("it did not close"):
        run.finish(exit_code=exit_code)


# ---------------------------------------------------------------------------------------------
# Main


def main(config, subject=None):
    """One run from configuration to record. Returns the exit code.

    subject: what the record shall call its backend, where another command runs another model.
    """
    check_writable(results_path=config.results_path, checkpoint_path=config.checkpoint_path)
    if engine.BACKEND == "torch" and is_compiled(config):
        compiler = os.environ.get("CXX") or "g++"
        if shutil.which(compiler) is None:
            fail(
                f"PyTorch compiles with {compiler}, which is not here: install it, or --trainer fit"
            )
    machine = telemetry.describe_machine()  # before the backend touches the GPU
    if not engine.on_gpu():
        _accept_cpu(config)
    try:
        precision = engine.set_precision(config.precision)
    except ValueError as error:
        fail(error)
    if is_compiled(config):
        choose_micro_batch(config, is_on_gpu=engine.on_gpu())
    elif config.micro_batch_size not in (None, config.batch_size):
        fail("--micro-batch-size: expected none, since Keras' fit trains on whole batches")
    run = start_wandb(config) if config.use_wandb else None
    report = record.begin_record(
        "train",
        config=dataclasses.asdict(config),
        backend=subject or keras.backend.backend(),
        precision=precision,
        machine=machine,
        gpu_name=engine.gpu_name(),
        versions=telemetry.read_versions(keras.backend.backend()),
        git=telemetry.read_git(Path(__file__).parent),
    )
    report["timing"]["import_seconds"] = IMPORT_SECONDS
    report["memory"]["host_import_bytes"] = IMPORT_BYTES
    runner = f"{engine.BACKEND} on {engine.gpu_name() or 'the CPU'}"
    cached = environment.count_compiled(engine.BACKEND, is_compiled(config))
    status, error, exit_code = ending.run_to_end(
        lambda: run_experiment(config, data.load_for_run(config, report, runner), report, run),
        f"lower --micro-batch-size {config.micro_batch_size}"
        if is_compiled(config)
        else f"lower --batch-size {config.batch_size}",
    )
    device_peak, matmul = engine.device_peak_bytes(), (None, None)
    if status == "ok":
        matmul = measure_matmul(engine.create_matmul, engine.synchronize, report["device"]["kind"])
    record.finish_record(
        report,
        status,
        error,
        matmul=matmul,
        compiled_files=(cached, environment.count_compiled(engine.BACKEND, is_compiled(config))),
        device_peak=device_peak,
        host_peak_bytes=telemetry.host_peak_bytes(),
        total_seconds=time.perf_counter() - PROCESS_STARTED,
        warnings=telemetry.compare_conditions(machine, telemetry.read_conditions()),
    )
    is_written = record.deliver_record(config.results_path, report, config.verbose)
    if run is not None:
        finish_wandb(run, report, exit_code)
    return exit_code or (0 if is_written else ending.NOT_WRITTEN)


if __name__ == "__main__":
    sys.exit(main(CONFIG))
