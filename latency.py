"""How fast does a Keras 3 backend serve a model here? Latency and throughput over batch sizes.

    python latency.py                                        the default model on JAX
    python latency.py --keras-backend torch --batch-sizes 1 8 -- --recipe tiny
    python latency.py --model resnet50 --precision bfloat16  of ImageNet's shape, random weights
    python latency.py --model best.keras --iterations 500
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

Exit codes: those of vit.py; with several batch sizes that of the first that failed.
"""

import dataclasses
import importlib
import os
import platform
import subprocess
import sys
import textwrap
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from harness import ending, environment, record
from harness.cli import ConfigError, check_writable, fail, list_flags, parse, refuse

NATIVE = ("vit-b16", "resnet50")  # models that peers/ holds by hand

# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class LatencyConfig:
    """Every choice but those of the model vit. Impossible values raise ConfigError."""

    model: str = "vit"  # see --list-models; or a file, PATH.keras
    batch_sizes: tuple[int, ...] | None = None  # default: 1 8 32 128, under --load 1
    iterations: int = 100  # timed, of each batch size
    warmup: int = 10  # before them, not timed
    keras_backend: Literal["jax", "torch"] | None = None  # default: KERAS_BACKEND, else jax
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"  # of matrix products
    weights: Path | None = None  # torchvision's, timm's or DeiT's, .pth or .safetensors
    native: bool = False  # instead of Keras' the model by hand, in the backend's own framework
    data_format: Literal["channels_last", "channels_first"] | None = None  # default: what is faster
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
        refuse(
            (
                self.keras_backend not in ("jax", "torch"),
                f"--keras-backend: expected jax or torch, got {self.keras_backend}",
            ),
            (
                not sizes or min(sizes) < 1,
                f"--batch-sizes: expected sizes above 0, got {' '.join(map(str, sizes))}",
            ),
            (
                self.weights and (self.native or self.model.endswith(".keras")),
                "--weights: expected a model of --list-models, got a file or --native",
            ),
            (
                self.native and self.model not in NATIVE,
                f"--native: expected --model {' or '.join(NATIVE)}, got {self.model}",
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
                is_loaded and self.rate * self.seconds < 1,
                "--rate, --seconds: expected at least one request",
            ),
            (
                not 0 <= self.seed < 2**31,
                f"--seed: expected 0 to 2147483647, got {self.seed}",
            ),
        )


def parse_words(argv):
    """(LatencyConfig, its flags, vit.py's flags) from a command line; ends the process on --help
    and on errors."""
    split = argv.index("--") if "--" in argv else len(argv)
    flags, model_flags = argv[:split], argv[split + 1 :]
    config = parse(LatencyConfig, flags, __doc__.split("\n\n")[0])
    names = {field.name.replace("_", "-") for field in dataclasses.fields(LatencyConfig)}
    if misplaced := sorted(list_flags(model_flags) & names):
        fail(f"--{misplaced[0]}: expected before --")
    if model_flags and config.model != "vit":
        fail(f"expected flags after -- for --model vit alone, got --model {config.model}")
    return config, flags, model_flags


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
)


def format_row(report, columns):
    """A record as a line of a table; what failed has its reason instead of numbers."""
    cells = []
    for title, dotted, unit in columns:
        value = record.dig(report, dotted)
        text = "–" if value is None else show(value * unit)
        cells.append(f"{text:>{max(len(title), 6)}}")
    if report["status"] != "ok":
        cells = [shorten(f"{report['status']}: {report['error']}", 68)]
    return " ".join([f"{report['config']['batch_size']:>5}", *cells])


def shorten(text, width):
    """The record has it all."""
    return textwrap.shorten(text, width, placeholder=" ...")


def show(value):
    """Three digits or so: 1234  123  12.3  1.23  0.012"""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


class Table:
    """Rows on stdout as they come. Columns are those that the first good record has a number for;
    why others have none is said after the last row."""

    def __init__(self):
        self.columns, self.reasons = None, []

    def add(self, report):
        if self.columns is None and report["status"] == "ok":
            known = [record.dig(report, dotted) is not None for _, dotted, _ in COLUMNS]
            self.columns = [column for column, is_known in zip(COLUMNS, known) if is_known]
            missing = [dotted for (_, dotted, _), is_known in zip(COLUMNS, known) if not is_known]
            self.reasons = [f"{name}: {record.reason_for(report, name)}" for name in missing]
            device, library = report["device"], report["backend"].removeprefix("native-")
            print(
                f"{report['config']['model']} ({report['model']['parameters']:,} parameters) on "
                f"{report['backend']} {report['versions'].get(library, '')}, "
                f"{report['precision']}, {device['name']} ({device['kind']})"
            )
            titles = (f"{title:>6}" for title, _, _ in self.columns)
            print(" ".join(["batch", *titles]))
        print(format_row(report, self.columns or ()), flush=True)
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
# Each batch size in a process of its own


def measure_each(config, flags, model_flags):
    """A child for each batch size. Returns the exit code of the first that failed, else 0."""
    table, codes = Table(), []
    run = os.environ.get("VIT_RECORD_ID") or uuid.uuid4().hex  # a comparison names its runs
    for size in config.batch_sizes:
        name = f"{run}~{size}"
        words = [*flags, f"--results-path={config.results_path}", "--no-verbose"]
        words += ["--batch-sizes", str(size), "--", *model_flags]
        codes.append(
            subprocess.run(
                [sys.executable, __file__, *words],
                env={**os.environ, "VIT_RECORD_ID": name},
                stdin=subprocess.DEVNULL,
                preexec_fn=ending.end_with_parent,
            ).returncode
        )
        if codes[-1] == 2:  # refused, as the others would be
            return 2
        report = find_record(config.results_path, name)
        if report is None:
            report = note_loss(config, size, name, codes[-1])
        if config.verbose:
            table.add(report)
        if codes[-1] in (130, 143):
            break
    if config.verbose:
        table.end(config.results_path)
    return next(filter(None, codes), 0)


def find_record(path, name):
    try:
        found, _ = record.read_records(path)
    except record.RecordError:
        return None
    return next((item for item in reversed(found) if item["id"] == name), None)


def note_loss(config, size, name, code):
    """The record of a child that could not write one; also in the file."""
    killed = code == -9
    report = record.create_record(
        "latency",
        id=name,
        status="oom" if killed else "error",
        error="killed (SIGKILL), most likely because memory ran out"
        if killed
        else f"ended with exit code {code} before it wrote a record",
        config={**dataclasses.asdict(config), "batch_size": size},
        notes=[f"{key}: the run left no record" for key in ("backend", "precision")],
    )
    record.append_record(config.results_path, report)
    return report


if __name__ == "__main__":
    environment.read_dotenv()
    CONFIG, FLAGS, MODEL_FLAGS = parse_words(sys.argv[1:])
    check_writable(results_path=CONFIG.results_path)
    if len(CONFIG.batch_sizes) > 1 and not CONFIG.list_models:
        try:
            sys.exit(measure_each(CONFIG, FLAGS, MODEL_FLAGS))
        except KeyboardInterrupt:
            sys.exit(130)
    environment.keep_memory()
    if CONFIG.keras_backend == "torch" and not environment.has_cuda():
        environment.precompile_header()

import vit  # noqa: E402
from harness import engine, telemetry  # noqa: E402
from harness.resnet import create_resnet50  # noqa: E402
from harness.weights import load_state_dict  # noqa: E402
from vit import keras, layers, np  # noqa: E402

# ---------------------------------------------------------------------------------------------
# Models

# Mean and standard deviation of ImageNet's training pixels, by which those models are trained that
# torchvision and timm hold: https://docs.pytorch.org/vision/stable/models.html
IMAGENET_MEAN = [255 * share for share in (0.485, 0.456, 0.406)]
IMAGENET_VARIANCE = [(255 * share) ** 2 for share in (0.229, 0.224, 0.225)]


def create_imagenet_vit(variant, data_format):  # which makes no difference within it
    config = vit.parse_config(["--variant", variant, "--image-size", "224"])
    config.num_classes, config.input_shape = 1000, (224, 224, 3)
    return vit.create_vit_classifier(config, IMAGENET_MEAN, IMAGENET_VARIANCE)


def create_imagenet_resnet50(data_format):
    pixels = layers.Input((224, 224, 3), name="pixels")
    x = vit.Prepare(224, IMAGENET_MEAN, IMAGENET_VARIANCE)(pixels)  # colours last
    if data_format == "channels_first":
        x = layers.Permute((3, 1, 2))(x)
    return keras.Model(pixels, create_resnet50(data_format)(x))


MODELS = {  # name: function of a data format that gives a model from pixels (batch, 224, 224, 3)
    # to 1,000 logits
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
        model = MODELS[config.model](config.data_format)
    else:
        return load_model(Path(config.model))
    if config.weights:
        load_state_dict(model, config.weights)
    if config.data_format == "channels_last":
        return model
    height, width, channels = model.input_shape[1:]
    pixels = layers.Input((channels, height, width), name="pixels_channels_first")
    return keras.Model(pixels, model(layers.Permute((2, 3, 1))(pixels)))


def load_model(path):
    """A model from a .keras file, without running what strangers put into it."""
    if path.suffix != ".keras":
        known = ", ".join(["vit", *MODELS])
        raise ConfigError(f"--model: expected a file PATH.keras or one of {known}; got {path}")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        line = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"--model: expected a Keras model, got {path}: {line}") from error
    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or None in shape[1:]:
        raise ConfigError(
            f"--model {path}: expected one input of pixels (batch, height, width, channels) of "
            f"known size, got {shape}"
        )
    return model


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


def create_forward(config, model_flags, report):
    """A compiled function from pixels on the device to logits; what it is goes into `report`."""
    if config.native:
        peer = importlib.import_module(f"peers.imagenet_{config.keras_backend}")
        forward, parameters = peer.create_forward(
            config.model, IMAGENET_MEAN, IMAGENET_VARIANCE, report["precision"]
        )
        report["model"] |= {"parameters": parameters, "input_shape": (224, 224, 3)}
        report["notes"].append("model.flops_per_image: not counted in a model by hand")
        return forward
    model = create_model(config, model_flags)
    report["model"] |= {
        "parameters": count_parameters(model),
        "flops_per_image": engine.count_flops(model),
        "input_shape": model.input_shape[1:],
    }
    return engine.compile_forward(model, is_frozen=True)


def measure(config, model_flags, report):
    """Build, compile and time a model; `report`, a record, is filled in on the way.

    Raises:
        ConfigError; whatever the backend raises, its out-of-memory errors included.
    """
    timing, started = report["timing"], time.perf_counter()
    forward = create_forward(config, model_flags, report)
    timing["build_seconds"] = time.perf_counter() - started
    batch_size = config.batch_sizes[0]
    batches = draw_pixels(report["model"]["input_shape"], batch_size, config.seed)

    def iterate(index):
        """Seconds of the copy, seconds of the model."""
        begun = time.perf_counter()
        pixels = engine.place(batches[index % len(batches)])
        copied = time.perf_counter()
        engine.wait(forward(pixels))
        return copied - begun, time.perf_counter() - copied

    _, first = iterate(0)
    for index in range(config.warmup):
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
        timing |= measure_load(config, lambda: answer(forward, batches), report["notes"])


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
    known = {name: energy[name] for name in ("joules", "source", "window_seconds")}
    report["energy"] |= known | {"joules_per_image": energy["joules"] / images}


# ---------------------------------------------------------------------------------------------
# Under load


def draw_arrivals(config, rate):
    """When requests come, seconds from the start: (rate * seconds,)"""
    count = max(1, round(rate * config.seconds))
    if config.load == "uniform":
        return np.arange(count) / rate
    return np.cumsum(np.random.default_rng(config.seed).exponential(1 / rate, count))


def answer(forward, batches):
    return keras.ops.convert_to_numpy(forward(engine.place(batches[0])))


def serve(handle, arrivals):
    """Handle requests one after the other, none before it is due.

    Returns:
        seconds from when each was due to its answer, (requests,); requests a second.
    """
    latencies, started = np.empty(len(arrivals)), time.perf_counter()
    for index, due in enumerate(arrivals):
        early = started + due - time.perf_counter()
        if early > 0:
            time.sleep(early)
        handle()
        latencies[index] = time.perf_counter() - started - due
    return latencies, len(arrivals) / (time.perf_counter() - started)


def measure_load(config, handle, notes):
    """Figures of a record: the latency at --rate, and under --slo-ms the highest rate that keeps
    it, to 5 %, by bisection between a rate that does and one that does not."""
    latencies, served = serve(handle, draw_arrivals(config, config.rate))
    if served < 0.95 * config.rate:
        notes.append(
            f"--rate: {config.rate:g} requests/s could not be sustained, {served:.3g} were served"
        )
    figures = describe_latencies(latencies)
    figures = {f"load_{name}": value for name, value in figures.items()}
    figures |= {"offered_per_second": config.rate, "served_per_second": served}
    if config.slo_ms is None:
        return figures

    def keeps(rate):
        latencies, _ = serve(handle, draw_arrivals(config, rate))
        return np.percentile(latencies, 99) <= config.slo_ms / 1e3

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


def main(config, model_flags):
    """One batch size from configuration to record. Returns the exit code."""
    machine = telemetry.describe_machine()  # before the backend touches the GPU
    precision = vit.settle_device(config)
    choices = {**dataclasses.asdict(config), "batch_size": config.batch_sizes[0]}
    report = vit.begin_record(
        "latency",
        {**choices, "flags": model_flags},
        machine,
        precision,
        subject=f"native-{engine.BACKEND}" if config.native else None,
    )
    exit_code = vit.run_recorded(
        lambda: measure(config, model_flags, report),
        report,
        config.results_path,
        machine,
        remedy=f"lower --batch-sizes {config.batch_sizes[0]}",
    )
    if config.verbose:
        table = Table()
        table.add(report)
        table.end(config.results_path)
    return exit_code


if __name__ == "__main__":
    if CONFIG.list_models:
        sys.exit(list_models())
    sys.exit(main(CONFIG, MODEL_FLAGS))
