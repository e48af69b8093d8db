"""How fast does a Keras 3 backend serve a model here? Latency and throughput over batch sizes.

    python latency.py                                        the default model on JAX
    python latency.py --keras-backend torch --batch-sizes 1 8 -- --recipe tiny
    python latency.py --model resnet50 --precision bfloat16  of ImageNet's shape, random weights
    python latency.py --model best.keras --iterations 500
    python latency.py --model best.keras --export onnx openvino    in other runtimes, too
    python latency.py --load poisson --rate 20 --slo-ms 100  requests one by one, as users send them
    python latency.py --list-models

What stands after `--` are vit.py's flags of a model: --recipe, --variant, --image-size ... Each
batch size is a process of its own, whose memory is that batch's alone, and a record of kind
`latency` in --results-path: where one does not fit, the others still run.

An iteration puts a batch of uint8 pixels on the device (its copy), computes the logits (its
latency), and waits for each. Compiling is apart, and so are --warmup iterations. Percentiles are
interpolated between the ordered iterations; images/s is a batch over the mean latency. Under
--load a request's latency begins when it was due, copy, waiting for those before it and the way of
its logits to the host included.

With --export there are more rows, each a process, too: Keras' own `model.predict`, and the model as
the file of each runtime named, made for the batch size. A file's copy is what the host does before,
which is to make float32 of the pixels; `predict` has none. Beside the times stand the file's size,
the accuracy on the test images of --dataset, classified by the very function that was timed, and by
how much logits are off Keras' own: the largest difference over the largest value.

Exit codes: those of vit.py, and 7 where a runtime is not installed or does not take the model; with
several rows that of the first that failed.
"""

import dataclasses
import importlib
import os
import platform
import signal
import sys
import tempfile
import textwrap
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from harness import ending, environment, record
from harness.cli import BUILT_IN, ConfigError, check_writable, parse_split, refuse
from harness.export import EXPORTS, ExportError, count_bytes, export_model

BACKENDS = ("jax", "torch", "tensorflow")
NATIVE = ("vit-b16", "resnet50")  # models that peers/ holds by hand
CALIBRATED = 256  # training images by which the range of what becomes 8 bits is found

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class LatencyConfig:
    """Every choice but those of the model vit. Impossible values raise ConfigError."""

    model: str = "vit"  # see --list-models; or a file, PATH.keras
    batch_sizes: tuple[int, ...] | None = None  # default: 1 8 32 128, under --load 1
    iterations: int = 100  # timed, of each batch size
    warmup: int = 10  # before them, not timed
    keras_backend: Literal[BACKENDS] | None = None  # default: KERAS_BACKEND, else jax
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"  # of matrix products
    weights: Path | None = None  # torchvision's, timm's or DeiT's, .pth or .safetensors
    native: bool = False  # instead of Keras' the model by hand, in the backend's own framework
    data_format: Literal["channels_last", "channels_first"] | None = None  # default: what is faster
    normalization: Literal["imagenet", "half"] = "imagenet"  # half: as timm's augreg ViTs had it
    export: tuple[Literal[("keras-int8", *EXPORTS)], ...] = ()  # rows beside the model's own
    export_path: Path | None = None  # folder in which their files stay; default: they do not
    dataset: str = "cifar100"  # that of vit.py whose test images --export classifies
    test_images: int | None = None  # of these; default: all
    load: Literal["none", "uniform", "poisson"] = "none"  # requests at equal or random distances
    rate: float = 10.0  # requests a second
    seconds: float = 10.0  # of load
    slo_ms: float | None = None  # find the highest rate whose p99 is not above this
    seed: int = 0  # of pixels and arrivals
    list_models: bool = False  # print what they are, and end
    allow_cpu: bool = False  # go on without a GPU in an image that is made for one
    results_path: Path = Path("results.jsonl")  # a record for each batch size is appended here
    node_name: str = field(default_factory=platform.node)
    verbose: bool = True  # a table

    def __post_init__(self):
        self.keras_backend = self.keras_backend or os.environ.get("KERAS_BACKEND") or "jax"
        if self.data_format is None:  # PyTorch's convolutions take channels first
            is_first = self.keras_backend == "torch" and self.model == "resnet50"
            self.data_format = "channels_first" if is_first and not self.native else "channels_last"
        if self.batch_sizes is None:
            self.batch_sizes = (1,) if self.load != "none" else (1, 8, 32, 128)
        sizes, is_loaded = self.batch_sizes, self.load != "none"
        is_fixed = self.native or self.model.endswith(".keras")
        unsuited = [
            name
            for name, (_, needed, _) in EXPORTS.items()
            if name in self.export and self.keras_backend not in needed
        ]
        refuse(
            (
                self.keras_backend not in BACKENDS,
                f"--keras-backend: expected {', '.join(BACKENDS)}, got {self.keras_backend}",
            ),
            (
                not sizes or min(sizes) < 1,
                f"--batch-sizes: expected sizes above 0, got {' '.join(map(str, sizes))}",
            ),
            (
                self.weights and is_fixed,
                "--weights: expected a model of --list-models, got a file or --native",
            ),
            (
                self.data_format == "channels_first" and is_fixed,
                "--data-format: expected none for a file or --native, which have their own",
            ),
            (
                self.native and self.precision == "float16",
                "--native: expected --precision float32, tf32 or bfloat16, got float16",
            ),
            (
                self.native and self.model not in NATIVE,
                f"--native: expected --model {' or '.join(NATIVE)}, got {self.model}",
            ),
            (
                self.native and self.keras_backend == "tensorflow",
                "--native: expected --keras-backend jax or torch, got tensorflow",
            ),
            (
                self.export and (self.native or self.precision != "float32"),
                "--export: expected --precision float32, and no --native",
            ),
            (
                unsuited,
                f"--export {' '.join(unsuited)}: expected another --keras-backend than "
                f"{self.keras_backend}",
            ),
            (
                self.dataset not in BUILT_IN and not Path(self.dataset).is_dir(),
                f"--dataset: expected {BUILT_IN[0]}, {BUILT_IN[1]} or a folder, got {self.dataset}",
            ),
            (
                self.test_images is not None and self.test_images < 1,
                f"--test-images: expected 1 or more, got {self.test_images}",
            ),
            (len(set(sizes)) < len(sizes), "--batch-sizes: expected each size once"),
            (self.iterations < 2, f"--iterations: expected 2 or more, got {self.iterations}"),
            (self.warmup < 0, f"--warmup: expected at least 0, got {self.warmup}"),
            (not 0 < self.rate < 1e6, f"--rate: expected above 0, got {self.rate}"),
            (not 0 < self.seconds < 1e6, f"--seconds: expected above 0, got {self.seconds}"),
            (
                self.slo_ms is not None and not (is_loaded and self.slo_ms > 0),
                "--slo-ms: expected milliseconds above 0, and --load uniform or poisson",
            ),
            (
                is_loaded and self.rate * self.seconds < 2,
                "--rate, --seconds: expected at least two requests",
            ),
            (
                not 0 <= self.seed < 2**31,
                f"--seed: expected 0 to 2147483647, got {self.seed}",
            ),
        )

    def list_rows(self):
        """[(batch size, runtime)]: what is measured, each in a process of its own."""
        runtimes = ("compiled", "predict", *self.export) if self.export else ("compiled",)
        return [(size, runtime) for size in self.batch_sizes for runtime in runtimes]


def parse_words(argv):
    """(LatencyConfig, vit.py's flags) from a command line; ends the process on --help
    and on errors."""
    config, _, model_flags = parse_split(LatencyConfig, argv, __doc__.split("\n\n")[0])
    return config, model_flags


# ---------------------------------------------------------------------------------------------
# The table

COLUMNS = (  # title, field of a record, from its unit to the title's
    ("p50 ms", "timing.p50_seconds", 1e3),
    ("p90", "timing.p90_seconds", 1e3),
    ("p95", "timing.p95_seconds", 1e3),
    ("p99", "timing.p99_seconds", 1e3),
    ("mean", "timing.mean_seconds", 1e3),
    ("std", "timing.std_seconds", 1e3),
    ("copy", "timing.copy_seconds", 1e3),
    ("images/s", "timing.images_per_second", 1),
    ("compile s", "timing.compile_seconds", 1),
    ("GB", "memory.host_peak_bytes", 1e-9),
    ("GB GPU", "memory.device_peak_bytes", 1e-9),
    ("mJ/image", "energy.joules_per_image", 1e3),
    ("MB", "model.bytes_on_disk", 1e-6),
    ("top-1 %", "quality.test_accuracy", 100),
    ("off", "quality.logits_difference", 1),
)
SPREAD = ("p90", "p95", "mean", "std")  # left out where another column has the runtimes


def format_row(report, columns, kind):
    """A record as a line of a table; what failed has its reason instead of numbers.

    kind: of device, which needs no mention.
    """
    config, cells = report["config"], []
    for title, dotted, unit in columns:
        value = record.dig(report, dotted)
        text = "–" if value is None else show(value * unit)
        cells.append(f"{text:>{max(len(title), 6)}}")
    if report["status"] != "ok":
        cells = [shorten(f"{report['status']}: {report['error']}", 68)]
    runtime = [f"{config['runtime']:<10}"] if config["export"] else []
    cells += ["on the CPU"] if report["device"].get("kind") == "cpu" != kind else []
    return " ".join([f"{config['batch_size']:>5}", *runtime, *cells])


def shorten(text, width):
    """The record has it all."""
    return textwrap.shorten(text, width, placeholder=" ...")


def show(value):
    """Three digits or so: 1234  123  12.3  1.23  0.012"""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.0e}" if 0 < value < 1e-3 else f"{value:.{digits}f}"


class Table:
    """Rows on stdout as they come. Columns are those that the first good record has a number for;
    why others have none is said after the last row."""

    def __init__(self):
        self.columns, self.reasons, self.kind = None, [], "cpu"

    def add(self, report):
        if self.columns is None and report["status"] == "ok":
            exports, values = report["config"]["export"], {}
            for column in COLUMNS:
                if not (exports and column[0] in SPREAD):
                    values[column] = record.dig(report, column[1])
            self.columns = [column for column, value in values.items() if value is not None]
            missing = [dotted for (_, dotted, _), value in values.items() if value is None]
            reasons = {dotted: record.reason_for(report, dotted) for dotted in missing}
            self.reasons = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
            device, library = report["device"], report["backend"].rpartition("-")[2]
            self.kind = device["kind"]
            print(
                f"{report['config']['model']} ({report['model']['parameters']:,} parameters) on "
                f"{report['backend']} {report['versions'].get(library, '')}, "
                f"{report['precision']}, {device['name']} ({device['kind']})"
            )
            titles = [f"{title:>6}" for title, _, _ in self.columns]
            print(" ".join(["batch", *([f"{'runtime':<10}"] if exports else []), *titles]))
        print(format_row(report, self.columns or (), self.kind), flush=True)
        for line in describe_load(report):
            print(f"      {line}", flush=True)

    def end(self, path):
        for reason in self.reasons:
            print(shorten(f"  not measured: {reason}", 80))
        print(f"  records: {path}")


def describe_load(report):
    """What a record says of requests under load, in lines."""
    timing, config = report["timing"], report["config"]
    if timing.get("served_per_second") is None:
        return
    parts = (f"{n} {1e3 * timing[f'load_{n}_seconds']:.3g} ms" for n in ("p50", "p95", "p99"))
    yield f"{config['load']} load, {config['rate']:g} requests/s: {', '.join(parts)}"
    yield from (note for note in report["notes"] if note.startswith("--rate: "))
    if timing.get("slo_per_second"):
        yield f"p99 within {config['slo_ms']:g} ms up to {timing['slo_per_second']:.3g} requests/s"
    elif config["slo_ms"]:
        yield record.reason_for(report, "timing.slo_per_second")


# ---------------------------------------------------------------------------------------------
# Each row in a process of its own


def measure_each(config, model_flags):
    """A child for each row: this command with VIT_LATENCY_ROW. Returns the exit code of the first
    that failed, else 0."""
    table, codes, supervisor = Table(), [], ending.Supervisor(signal.SIGINT)
    run = os.environ.get("VIT_RECORD_ID") or uuid.uuid4().hex  # a comparison names its runs
    for row, (size, runtime) in enumerate(config.list_rows()):
        name = f"{run}~{size}" + (f"~{runtime}" if config.export else "")
        command = [sys.executable, *sys.orig_argv[1:]]
        codes.append(supervisor.run(command, VIT_RECORD_ID=name, VIT_LATENCY_ROW=str(row)))
        if codes[-1] == 2:  # refused, as the others would be
            return 2
        report = find_record(config.results_path, name)
        if report is None and supervisor.stopped:  # before it had begun
            break
        if report is None and codes[-1] != ending.NOT_WRITTEN:  # which shows its own figures
            choices = describe_row(config, row, model_flags)
            report = note_loss(choices, config.results_path, name, codes[-1])
        if report and config.verbose:
            table.add(report)
        if supervisor.stopped or codes[-1] in (130, 143):
            break
    if config.verbose:
        table.end(config.results_path)
    return 130 if supervisor.stopped else next(filter(None, codes), 0)


def find_record(path, name):
    try:
        found, _ = record.read_records(path)
    except record.RecordError:
        return None
    return next((item for item in reversed(found) if item["id"] == name), None)


def describe_row(config, row, model_flags):
    """A record's `config`: all choices, and which of `rows` it is."""
    size, runtime = config.list_rows()[row]
    own = {"batch_size": size, "runtime": runtime, "rows": len(config.list_rows())}
    return dataclasses.asdict(config) | own | {"flags": model_flags}


def note_loss(choices, path, name, code):
    """The record of a child that could not write one; also in the file."""
    killed = code == -9
    return record.note_loss(
        path,
        "latency",
        id=name,
        status="oom" if killed else "error",
        error=ending.KILLED if killed else f"ended with exit code {code} before it wrote a record",
        config=choices,
    )


if __name__ == "__main__":
    environment.read_dotenv()
    CONFIG, MODEL_FLAGS = parse_words(sys.argv[1:])
    ROW = os.environ.get("VIT_LATENCY_ROW")
    check_writable(results_path=CONFIG.results_path)
    if CONFIG.export_path:
        check_writable(export_path=CONFIG.export_path / "file")
    if len(CONFIG.list_rows()) > 1 and ROW is None and not CONFIG.list_models:
        ending.end_with(partial(measure_each, CONFIG, MODEL_FLAGS))
    ending.end_at_once()
    environment.keep_memory()
    environment.set_variables()  # before CUDA is asked
    if CONFIG.keras_backend == "torch" and not environment.has_cuda():
        environment.precompile_header()

import vit  # noqa: E402
from harness import data, engine, telemetry  # noqa: E402
from harness.resnet import create_resnet50  # noqa: E402
from harness.run import run_recorded  # noqa: E402
from harness.weights import load_state_dict  # noqa: E402
from vit import keras, layers, np  # noqa: E402

# ---------------------------------------------------------------------------------------------
# Models

NORMALIZATIONS = {  # (mean, standard deviation) of the pixels that a model was trained with, 0 to 1
    # ImageNet's: https://docs.pytorch.org/vision/stable/models.html; DeiT's and timm's ResNets, too
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/vision_transformer.py
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def list_moments(name):
    """(mean, variance) of a normalization's pixels, 0 to 255, each of three colours"""
    mean, deviation = NORMALIZATIONS[name]
    return [255 * share for share in mean], [(255 * share) ** 2 for share in deviation]


def create_imagenet_vit(variant, data_format, moments):  # the format makes no difference within it
    config = vit.parse_config(["--variant", variant, "--image-size", "224"])
    config.num_classes, config.input_shape = 1000, (224, 224, 3)
    return vit.create_vit_classifier(config, *moments)


def create_imagenet_resnet50(data_format, moments):
    pixels = layers.Input((224, 224, 3), name="pixels")
    x = vit.Prepare(224, *moments)(pixels)  # colours last
    if data_format == "channels_first":
        x = layers.Permute((3, 1, 2))(x)
    return keras.Model(pixels, create_resnet50(data_format)(x))


MODELS = {  # name: function of a data format and of the pixels' moments that gives a model from
    # pixels (batch, 224, 224, 3) to 1,000 logits
    **{
        f"vit-{variant.replace('/', '').lower()}": partial(create_imagenet_vit, variant)
        for variant in ("Ti/16", "S/16", "B/16", "B/32", "L/16")
    },
    "resnet50": create_imagenet_resnet50,
}


def create_model(config, model_flags):
    """The Keras model that a configuration names, from pixels to logits.

    Raises:
        ConfigError.
    """
    if config.model == "vit":
        model = vit.create_vit_classifier(vit.parse_config(model_flags))
    elif config.model in MODELS:
        model = MODELS[config.model](config.data_format, list_moments(config.normalization))
    else:
        return load_model(Path(config.model), config.precision)
    if config.weights:
        load_state_dict(model, config.weights)
    if config.data_format == "channels_last":
        return model
    height, width, channels = model.input_shape[1:]
    pixels = layers.Input((channels, height, width), name="pixels_channels_first")
    return keras.Model(pixels, model(layers.Permute((2, 3, 1))(pixels)))


def load_model(path, precision):
    """A model from a .keras file, without running what strangers put into it. Its layers say
    themselves what they compute in: another precision than theirs is a ConfigError."""
    if path.suffix != ".keras":
        known = ", ".join(["vit", *MODELS])
        raise ConfigError(f"--model: expected a file PATH.keras or one of {known}; got {path}")
    if path.exists() and not zipfile.is_zipfile(path):  # of which Keras says that it is not found
        raise ConfigError(f"--model: expected a Keras model, got {path}: it is no zip archive")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:
        line = " ".join(str(error).split())[:300]
        raise ConfigError(f"--model: expected a Keras model, got {path}: {line}") from error
    products = [part for part in model._flatten_layers() if hasattr(part, "kernel")]
    computed = {part.compute_dtype for part in products} - {"float32"}  # the last one's always is
    asked = {"tf32": "float32"}.get(precision, precision)
    if (saved := min(computed, default="float32")) != asked:
        raise ConfigError(f"--precision: expected {saved}, in which {path} was saved, got {asked}")
    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or None in shape[1:]:
        raise ConfigError(
            f"--model {path}: expected one input of pixels (batch, height, width, channels) of "
            f"known size, got {shape}"
        )
    return model


def require_logits(model, wanting):
    """ConfigError for a model that gives something else, such as two outputs or a picture."""
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) != 2 or not isinstance(shape[1], int):
        raise ConfigError(f"{wanting}: expected one output of logits (batch, classes), got {shape}")


def count_parameters(model):
    """Numbers in all weights, moving statistics of batch normalisation included, but not the mean
    and variance of the pixels."""
    prepared = [part for part in model._flatten_layers() if isinstance(part, vit.Prepare)]
    return model.count_params() - sum(part.count_params() for part in prepared)


def list_models():
    """A line for each model: what building it here tells."""
    print(f"{'model':<10} {'parameters':>12} {'GFLOPs':>8}  input")
    for name in ("vit", *MODELS):
        model = create_model(LatencyConfig(model=name), [])
        shape = " x ".join(map(str, model.input_shape[1:]))
        flops = engine.count_flops(model) / 2e9
        print(f"{name:<10} {count_parameters(model):>12,} {flops:>8.2f}  {shape}", flush=True)
    print("GFLOPs: 1e9 multiply-accumulates of one picture's forward pass, each counted as one")


# ---------------------------------------------------------------------------------------------
# Measuring


def draw_pixels(shape, batch_size, seed):
    """Four batches of random pixels, uint8, so that no iteration finds the last one's in a cache
    alone."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (4, batch_size, *shape), dtype="uint8")


class Server(NamedTuple):
    """A model that is ready to answer."""

    put: Callable  # from uint8 pixels (batch, height, width, channels), NumPy, to what `run` takes
    run: Callable  # from that to logits, computed when it returns


def start_compiled(forward):
    """A Server of a function from pixels on the device to logits that are not waited for."""
    return Server(engine.place, lambda x: engine.wait(forward(x)))


def start_keras(model):
    """This project's compiled inference."""
    return start_compiled(engine.compile_forward(model, is_frozen=True))


def start_native(config, report):
    """The model by hand."""
    peer = importlib.import_module(f"peers.imagenet_{config.keras_backend}")
    forward, parameters = peer.create_forward(
        config.model, *list_moments(config.normalization), report["precision"]
    )
    report["model"] |= {"parameters": parameters, "input_shape": (224, 224, 3)}
    report["notes"].append("model.flops_per_image: not counted in a model by hand")
    return start_compiled(forward)


def start(model, runtime, size, folder, calibration, report):
    """A runtime with a model, for batches of one size; its file is in `folder`.

    Raises:
        ExportError.
    """
    if runtime in EXPORTS:
        serve, files, package, on_gpu = export_model(runtime, model, size, folder, calibration)
        if on_gpu and not engine.on_gpu():
            told = f"{package} computes on the GPU, {engine.BACKEND} does not"
            raise ExportError(f"{told}: expected both to")
        report["versions"][package] = telemetry.read_version(package)
        if not on_gpu:
            report["device"] |= {"kind": "cpu", "name": report["device"]["cpu_name"]}
        server = Server(lambda pixels: pixels.astype("float32"), serve)
    else:
        if runtime == "keras-int8":
            with warnings.catch_warnings(action="ignore"):  # of layers that have no products
                model.quantize("int8")
        model.save(folder / "model.keras")
        files = [folder / "model.keras"]
        if runtime == "predict":
            server = Server(lambda pixels: pixels, partial(model.predict, verbose=0))
        else:
            server = start_keras(model)
    report["model"]["bytes_on_disk"] = count_bytes(files)
    return server


def load_pictures(config, model, report):
    """(pictures to calibrate with or None, pictures to classify, their labels or None): of the data
    set if the model is for such, else random ones."""
    shape, classes = model.input_shape[1:], model.output_shape[-1]
    side, is_first, available = shape[1], shape[0] == 3 != shape[-1], CALIBRATED
    is_square = shape == ((3, side, side) if is_first else (side, side, 3))
    try:
        if not is_square or (config.dataset in BUILT_IN and (side != 32 or classes > 100)):
            raise data.DataError("the model is for other pictures than --dataset has")
        if config.dataset not in BUILT_IN:
            available = len(data.list_folder(config.dataset, side)[0][1])
        dataset = data.load_dataset(
            config.dataset,
            num_classes=classes,
            train_images=min(CALIBRATED, available),
            test_images=config.test_images,
            validation_split=0,
            size=side,
            max_unreadable=100,
        )
    except data.DataError as error:
        report["notes"].append(f"quality: {error}")
        return None, draw_pixels(shape, max(config.batch_sizes), config.seed)[0], None
    report["quality"] |= {"dataset": dataset.label, "test_images": len(dataset.x_test)}
    turn = (0, 3, 1, 2) if is_first else (0, 1, 2, 3)
    return dataset.x_train.transpose(turn), dataset.x_test.transpose(turn), dataset.y_test


def measure_quality(server, size, pictures, labels, expected):
    """What a server answers to pictures, in batches of its size: figures of a record.

    Args:
        labels: None where there are none; then one batch is enough.
        expected: the logits of the first pictures, as Keras computes them.
    """
    logits = []
    for first in range(0, len(pictures) if labels is not None else 1, size):
        batch = np.take(pictures, range(first, first + size), axis=0, mode="clip")
        logits.append(keras.ops.convert_to_numpy(server.run(server.put(batch))))
    logits = np.concatenate(logits)[: len(pictures)]
    difference = np.abs(logits[: len(expected)] - expected).max() / np.abs(expected).max()
    found = {"logits_difference": float(difference)}
    if labels is not None:
        found["test_accuracy"] = float((logits.argmax(axis=-1) == labels).mean())
    return found


def measure(config, model_flags, row, report):
    """Build, compile and time a model; `report`, a record, is filled in on the way.

    Raises:
        ConfigError, ExportError; whatever the backend raises, its out-of-memory errors
        included.
    """
    (size, runtime), started = config.list_rows()[row], time.perf_counter()
    if config.native:
        server, shape = start_native(config, report), (224, 224, 3)
    else:
        model = create_model(config, model_flags)
        if config.export:
            require_logits(model, "--export")
        shape = model.input_shape[1:]
        report["model"] |= {
            "parameters": count_parameters(model),
            "flops_per_image": engine.count_flops(model),
            "input_shape": shape,
        }
    if not config.export:  # no file: writing one would count in the memory
        server = server if config.native else start_keras(model)
        report["timing"]["build_seconds"] = time.perf_counter() - started
        return time_server(server, shape, config, size, report)
    report["quality"] = dict.fromkeys(("test_accuracy", "logits_difference"))
    calibration, pictures, labels = load_pictures(config, model, report)
    expected = engine.infer(model, pictures[:size])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if config.export_path:
            folder = config.export_path / f"{size}-{runtime}"
            folder.mkdir(parents=True, exist_ok=True)
        server = start(model, runtime, size, folder, calibration, report)
        report["timing"]["build_seconds"] = time.perf_counter() - started
        time_server(server, shape, config, size, report)
        report["quality"] |= measure_quality(server, size, pictures, labels, expected)


def time_server(server, shape, config, batch_size, report):
    """The figures of a record that are about time and energy.

    shape: of a picture.
    """
    timing, (put, run) = report["timing"], server
    batches = draw_pixels(shape, batch_size, config.seed)

    def iterate(index):
        """Seconds of the copy, seconds of the model."""
        begun = time.perf_counter()
        pixels = put(batches[index % len(batches)])
        copied = time.perf_counter()
        run(pixels)
        return copied - begun, time.perf_counter() - copied

    _, first = iterate(0)
    for index in range(max(config.warmup, engine.CALLS_TO_CAPTURE if engine.on_gpu() else 0)):
        iterate(index)
    meter = telemetry.create_energy_meter(device=report["device"]["kind"])
    meter.start()
    copies, latencies = np.transpose([iterate(index) for index in range(config.iterations)])
    energy = meter.stop()
    timing |= describe_latencies(latencies) | {
        "copy_seconds": float(np.median(copies)),
        "images_per_second": batch_size / latencies.mean(),
        "compile_seconds": max(0.0, first - float(np.median(latencies))),
    }
    note_energy(report, energy, batch_size * config.iterations)
    if config.load != "none":
        handle = lambda: keras.ops.convert_to_numpy(run(put(batches[0])))  # noqa: E731
        timing |= measure_load(config, handle, report["notes"])


def describe_latencies(seconds):
    """Figures of a record: each iteration (n,) and what is said of them all."""
    shares = (50, 90, 95, 99)
    return {
        "iteration_seconds": seconds,
        **{f"p{n}_seconds": float(np.percentile(seconds, n)) for n in shares},
        "mean_seconds": float(seconds.mean()),
        "std_seconds": float(seconds.std(ddof=1)),
    }


def note_energy(report, energy, images):
    report["notes"] += energy["notes"]
    if energy["joules"] is None:
        return
    known = {name: energy[name] for name in ("joules", "source", "window_seconds", "rails")}
    report["energy"] |= known | {"joules_per_image": energy["joules"] / images}


# ---------------------------------------------------------------------------------------------
# Under load


def draw_arrivals(config, rate):
    """When requests come, seconds from the start: (rate * seconds,)"""
    count = max(2, round(rate * config.seconds))
    if config.load == "uniform":
        return np.arange(count) / rate
    return np.cumsum(np.random.default_rng(config.seed).exponential(1 / rate, count))


def serve(handle, arrivals):
    """Handle requests one after the other, none before it is due.

    Returns:
        seconds from when each was due to its answer, (requests,); requests a second; whether that
        is as many as came: after the last one there was work for 5 % of the time at most.
    """
    latencies, handling, started = np.empty(len(arrivals)), [], time.perf_counter()
    for index, due in enumerate(arrivals):
        early = started + due - time.perf_counter()
        if early > 0:
            time.sleep(early)
        begun = time.perf_counter()
        handle()
        latencies[index] = time.perf_counter() - started - due
        handling.append(time.perf_counter() - begun)
    took = time.perf_counter() - started
    behind = took - arrivals[-1] - np.median(handling)
    return latencies, len(arrivals) / took, behind <= 0.05 * took


def measure_load(config, handle, notes):
    """Figures of a record: the latency at --rate, and under --slo-ms the highest rate that keeps
    it and is sustained, to 5 %, by bisection between a rate that does and one that does not."""
    latencies, served, is_sustained = serve(handle, draw_arrivals(config, config.rate))
    if not is_sustained:
        notes.append(
            f"--rate: {config.rate:g} requests/s could not be sustained, {served:.3g} were served"
        )
    figures = describe_latencies(latencies)
    figures = {f"load_{name}": value for name, value in figures.items()}
    figures |= {"offered_per_second": config.rate, "served_per_second": served}
    if config.slo_ms is None:
        return figures

    def keeps(rate):
        latencies, _, is_sustained = serve(handle, draw_arrivals(config, rate))
        return is_sustained and np.percentile(latencies, 99) <= config.slo_ms / 1e3

    low, high = 0.0, config.rate
    while high < 1e6 and keeps(high):
        low, high = high, 2 * high
    if low == 0:
        low = next((high / 2**n for n in range(1, 11) if keeps(high / 2**n)), None)
        if low is None:
            notes.append(f"timing.slo_per_second: not even {high / 2**10:.3g} requests/s keep it")
            return figures | {"slo_per_second": None}
        high = 2 * low
    while high / low > 1.05:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return figures | {"slo_per_second": low}


# ---------------------------------------------------------------------------------------------
# Main


def main(config, model_flags, row):
    """One row from configuration to record. Returns the exit code."""
    machine = telemetry.describe_machine()  # before the backend touches the GPU
    precision = vit.settle_device(config)
    size, runtime = config.list_rows()[row]
    subject = "native" if config.native else runtime
    report = vit.begin_record(
        "latency",
        describe_row(config, row, model_flags),
        machine,
        precision,
        subject=None if subject == "compiled" else f"{subject}-{engine.BACKEND}",
    )
    exit_code = run_recorded(
        lambda: measure(config, model_flags, row, report),
        report,
        config.results_path,
        device=engine,
        library=engine.BACKEND,
        machine=machine,
        started=vit.PROCESS_STARTED,
        remedy=f"lower --batch-sizes {size}",
        runtime=runtime if runtime in EXPORTS else None,
    )
    # Of several rows all are one table, but for this one if nobody can read its record.
    if config.verbose and (ROW is None or exit_code == ending.NOT_WRITTEN):
        table = Table()
        table.add(report)
        table.end(config.results_path)
    return exit_code


if __name__ == "__main__":
    if CONFIG.list_models:
        ending.end_with(list_models)
    ending.end_with(partial(main, CONFIG, MODEL_FLAGS, int(ROW or 0)))
