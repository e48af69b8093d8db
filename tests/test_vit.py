"""vit.py as a person uses it: whole runs in processes of their own, and every way to fail."""

import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    BACKENDS,
    LEARNING,
    MODEL,
    ROOT,
    SMALL,
    child_environment,
    only_line,
    read_last_record,
    read_log,
    read_wandb,
    refusal,
    run_code,
    run_python,
    run_vit,
)
from PIL import Image

from harness import data
from harness.stopwatch import Diverged, Progress

ARCHIVE = Path.home() / ".keras/datasets/cifar-100-python-target_archive"


# ---- before Keras is imported ------------------------------------------------------------------


@pytest.fixture
def no_keras(tmp_path):
    """An environment in which importing Keras fails."""
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop/keras.py").write_text("raise SystemExit('keras was imported')")
    return {"PYTHONPATH": str(tmp_path / "stop")}


def test_help_needs_no_keras(tmp_path, no_keras):
    done = run_vit(tmp_path, "--help", **no_keras)
    assert done.returncode == 0 and "--num-epochs" in done.stdout


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--batch-size=0"], "--batch-size: expected above 0, got 0"),
        (["--validation-split=1.0"], "expected at least 0 and below 1, got 1.0"),
        (["--learning-rate=nan"], "--learning-rate: expected above 0, got nan"),
        (["--mlp-ratio=inf"], "--mlp-ratio: expected above 0, got inf"),
        (["--head-dim=0"], "--head-dim: expected above 0, got 0"),
        (["--num-classes=0"], "--num-classes: expected 2 or more, got 0"),
        (["--num-classes=1"], "--num-classes: expected 2 or more, got 1"),
        (["--transformer-units", "64", "32"], "expected the last to be --projection-dim 64"),
        (["--checkpoint-path=x.h5"], "expected a name ending in .weights.h5, got x.h5"),
        (["--train-images=100"], "--batch-size: expected at most the 90 images"),
        (["--micro-batch-size=100"], "expected a divisor of --batch-size 256, got 100"),
        (["--train-images=50001"], "--train-images: expected at most 50000"),
        (["--wandb-tags=[broken"], "--wandb-tags: expected a list"),
    ],
)
def test_an_impossible_value_is_one_line(capsys, flags, told):
    import vit

    assert told in refusal(vit.parse_config, flags, capsys)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--image-size=70"], "--image-size: expected a multiple of --patch-size 6, got 70"),
        (["--keras-backend=mxnet"], "expected one of jax, torch, tensorflow, got 'mxnet'"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_that_takes_time(
    tmp_path, no_keras, flags, told
):
    done = run_vit(tmp_path, *flags, **no_keras)
    assert done.returncode == 2 and told in only_line(done)
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--num-epochs=many"], ["--precision=int8"]])
def test_an_unknown_flag_or_value_is_refused(tmp_path, no_keras, flags):
    for encoding in ("utf-8", "ascii"):  # tyro draws another frame in each
        done = run_vit(tmp_path, *flags, **no_keras, PYTHONIOENCODING=encoding)
        assert done.returncode == 2 and flags[0].split("=")[0] in only_line(done)


@pytest.mark.parametrize(
    "module, told", [("torch", "pip install '.[torch]'"), ("wandb", "--no-use")]
)
def test_what_is_not_installed_is_named(tmp_path, module, told):
    hide = f"import sys, runpy; sys.modules[{module!r}] = None; sys.argv[1:] = sys.argv[1:]"
    code = f"{hide}; runpy.run_path({str(ROOT / 'vit.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, f"--keras-backend={'torch' if module == 'torch' else 'jax'}"],
        cwd=tmp_path,
        env=child_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and told in only_line(done)


def choose(argv, monkeypatch, environment):
    import vit

    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    vit._set_backend_from_env_or_cli(argv)
    return os.environ["KERAS_BACKEND"]


@pytest.mark.parametrize("flag", [["--keras-backend", "torch"], ["--keras_backend=torch"]])
def test_the_flag_wins_over_the_environment(monkeypatch, flag):
    assert choose(flag, monkeypatch, {"KERAS_BACKEND": "jax"}) == "torch"


def test_the_environment_wins_over_the_default(monkeypatch):
    assert choose([], monkeypatch, {"KERAS_BACKEND": "torch"}) == "torch"
    assert choose([], monkeypatch, {"KERAS_BACKEND": ""}) == "jax"


def test_spellings_of_flags():
    import vit

    words = "--num_epochs 3 --batch-size=8 --use_wandb=False --augment True --mlp-head-units=[8,4]"

    def parse(*words):
        return vit.parse_config(words)

    config = parse(*words.split(), "--wandb-tags", '["a", "b"]', "--jit_compile=true")
    assert (config.num_epochs, config.batch_size, config.mlp_head_units) == (3, 8, (8, 4))
    assert (config.use_wandb, config.augment, config.jit_compile) == (False, True, True)
    assert config.wandb_tags == ("a", "b")
    assert parse("--wandb-tags", "a", "b").wandb_tags == ("a", "b")


def test_defaults(monkeypatch):
    import vit

    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "KERAS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    config = vit.ViTConfig()
    assert config.transformer_units == (128, 64) and config.head_dim == 64
    assert config.num_patches == 144 and config.keras_backend == "jax"
    assert config.wandb_project == "keras3_edge_baseline" and config.wandb_entity is None
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert vit.ViTConfig(projection_dim=32).transformer_units == (64, 32)
    assert vit.ViTConfig().wandb_project == "mine"


def test_a_process_began_before_it_started_itself_again(tmp_path):
    code = """
import os, sys, time
from harness import environment
if "AGAIN" not in os.environ:
    time.sleep(0.5)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"AGAIN": "1"})
print(time.perf_counter() - environment.find_start())
"""
    assert float(run_python(tmp_path, "-c", code).stdout) > 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_with_an_average_of_the_weights(tmp_path, optimizer):
    """In float16 Keras wraps the optimiser, which has the average"""
    flags = ("--precision=float16", "--ema=0.9", "--no-jit-compile", "--model-path=m.keras")
    flags += ("--optimizer", optimizer)
    done = run_vit(tmp_path, *SMALL, *flags, backend="torch")
    assert done.returncode == 0, done.stderr
    code = """
import json, keras, vit
model = keras.saving.load_model("m.keras")
print(json.dumps([model.loss.__name__, type(model.optimizer).__name__.lower()]))
"""
    assert run_code(tmp_path, "torch", code) == ["crossentropy", optimizer]


EXTENDED = """
import contextlib, io, json, keras, time, vit
import harness.run
from harness import telemetry
from harness.record import read_records
compiled, seen = [], []
if vit.engine.BACKEND == "jax":
    import jax
    def hear(event, seconds, **about):
        if "backend_compile" in event:
            compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(hear)

def count():
    if vit.engine.BACKEND == "jax":
        return len(compiled)
    import torch
    return torch._dynamo.utils.counters["aot_autograd"]["total"]

def tell(owner, name):
    function = getattr(owner, name)
    def call(*given):
        order.append(name)
        return function(*given)
    setattr(owner, name, call)

order = []
tell(vit.Stopwatch, "begin_epoch")
tell(harness.run, "measure_matmul")
tell(telemetry, "host_peak_bytes")
tell(telemetry, "read_conditions")

class Watch(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        order.append("watch")

    def on_test_begin(self, logs=None):
        time.sleep(0 if seen else 0.3)

    def on_epoch_end(self, epoch, logs=None):
        seen.append([count(), telemetry.host_rss_bytes(), sorted(logs)])
        self.model.stop_training = epoch == 49

def compile(self, *given, metrics, **named):
    metrics = [keras.metrics.SparseCategoricalCrossentropy("nats", from_logits=True)]
    compile_model(self, *given, metrics=metrics, **named)

compile_model, vit.Classifier.compile = vit.Classifier.compile, compile
rate = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 1e-3 if epoch < 5 else 0.0)
vit.list_callbacks = lambda config, run: [Watch(), rate]
with contextlib.redirect_stdout(io.StringIO()) as told:
    code = vit.main(vit.parse_config({flags}))
assert "not measured: no such metric was given to model.compile" in told.getvalue()
item = read_records("results.jsonl")[0][0]
quality = item["quality"]
# What others do before an epoch, and while they validate, is no part of it; nor is the matmul of
# the run's memory, or of what held its clocks back.
assert item["timing"]["validation_seconds"][0] >= 0.3
ends = ["host_peak_bytes", "read_conditions", "measure_matmul"]
assert order == ["read_conditions", *["watch", "begin_epoch"] * 50, *ends]
counts, sizes, names = zip(*seen)
print(json.dumps([code, len(seen), counts[1], counts[-1], max(sizes[-10:]) - max(sizes[5:15]),
                  names[0], quality["val_loss"], quality["val_nats"], quality["best_epoch"]]))
"""


def test_metrics_and_callbacks_are_exchangeable_and_nothing_grows(tmp_path, backend):
    """Another metric instead of the accuracies, so that the best epoch is that of the least loss; a
    schedule and an end by callbacks; over fifty epochs nothing is compiled anew."""
    flags = [*SMALL, "--num-epochs=60", f"--keras-backend={backend}", "--no-use-wandb"]
    code = EXTENDED.replace("{flags}", repr(flags))
    code, epochs, early, last, growth, names, losses, nats, best = run_code(tmp_path, backend, code)
    assert (code, epochs) == (0, 50) and early == last > 0
    assert growth < 30e6  # bytes
    assert names == ["loss", "nats", "val_loss", "val_nats"]
    assert nats == pytest.approx(losses, rel=1e-5)
    assert len(set(losses[:5])) == 5 and len(set(losses[5:])) == 1  # a rate of 0
    assert losses[best - 1] == min(losses)


PER_CALL = """
import json, vit
from harness.record import read_records

losses = []
for per_call in (1, {per_call}):
    vit.engine.steps_per_call = lambda steps: per_call
    path = f"--results-path={{per_call}}.jsonl"
    assert vit.main(vit.parse_config([*{flags!r}, path])) == 0
    quality = read_records(f"{{per_call}}.jsonl")[0][0]["quality"]
    losses.append([*quality["loss"], quality["test_loss"]])
print(json.dumps(losses))
"""


def test_several_steps_in_a_call_train_as_one_after_the_other(tmp_path, backend):
    """As on a GPU, where JAX's calls are of one length, and PyTorch's last one may be shorter"""
    flags = [*SMALL, "--num-epochs=2", f"--keras-backend={backend}", "--no-use-wandb"]
    flags += ["--no-verbose"]  # seven steps an epoch
    code = PER_CALL.format(flags=flags, per_call={"jax": 7, "torch": 4}[backend])
    one, several = run_code(tmp_path, backend, code)
    assert several == pytest.approx(one, rel=1e-5)


def test_a_loss_that_is_no_number_is_named_by_its_step():
    progress = Progress(epochs=2, steps=7, is_shown=False)
    with pytest.raises(Diverged, match="loss nan in epoch 1, step 5: lower --learning-rate"):
        progress.show(0, 6, lambda: np.array([1.0, np.nan, np.nan]))


# ---- a run that learns -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(backend, tmp_path_factory):
    """One compiled training run on each backend, logged by W&B without an account."""
    folder = tmp_path_factory.mktemp(backend)
    done = run_vit(folder, *LEARNING, backend=backend, wandb=True, WANDB_DIR=str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_it_learns(learned):
    quality = read_last_record(learned[0])["quality"]
    assert quality["test_accuracy"] > 0.3 and quality["test_top5_accuracy"] > 0.8
    assert quality["loss"][-1] < quality["loss"][0]
    assert quality["val_accuracy"][quality["best_epoch"] - 1] == max(quality["val_accuracy"])


def test_the_record_tells_the_run(learned, backend):
    record = read_last_record(learned[0])
    assert (record["status"], record["kind"], record["backend"]) == ("ok", "train", backend)
    assert record["config"]["num_epochs"] == 10 and record["config"]["transformer_units"] == [
        64,
        32,
    ]
    assert record["versions"]["keras"] == "3.15.1" and record["versions"][backend]
    timing, quality = record["timing"], record["quality"]
    assert len(timing["epoch_seconds"]) == len(timing["validation_seconds"]) == 10
    for name in ("import_seconds", "build_seconds", "compile_seconds", "start_seconds"):
        assert timing[name] > 0
    speed = timing["train_images_per_second"]
    assert speed * statistics.median(timing["epoch_seconds"][1:]) == pytest.approx(1800)
    used = 3 * record["model"]["flops_per_image"] * speed
    assert timing["mfu"] == pytest.approx(used / timing["matmul_flops_per_second"])
    assert f"{timing['mfu']:.0%} of matmul peak" in learned[1].stdout
    assert quality["train_images"] == 1800 and quality["validation_images"] == 200
    assert "synthetic" in quality["dataset"]
    assert record["memory"]["host_peak_bytes"] > record["memory"]["host_import_bytes"] > 1e8


def test_the_terminal_tells_the_run(learned, backend):
    lines = learned[1].stdout.splitlines()
    assert lines[0].startswith(f"{backend} on ") and "synthetic" in lines[0]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 10 and "images/s" in epochs[0] and "left" in epochs[0]
    assert all(len(line) <= 80 for line in epochs)
    assert 5 < len(lines) - lines.index(epochs[-1]) - 1 <= 10
    assert "\r" not in learned[1].stderr  # no progress bar in a pipe


def test_wandb_holds_the_run(learned, backend):
    assert "WANDB_API_KEY" in learned[1].stderr  # the line of advice
    (log,) = learned[0].glob("wandb/offline-run-*/run-*.wandb")
    rows, summary, config = read_wandb(log)
    epochs = [row for row in rows if "val_accuracy" in row]
    record = read_last_record(learned[0])
    assert [row["epoch"] for row in epochs] == list(range(10))
    names = ("loss", "accuracy", "top-5-accuracy")
    assert {*names, *(f"val_{name}" for name in names)} <= set(epochs[0])
    assert epochs[-1]["loss"] == pytest.approx(record["quality"]["loss"][-1])
    assert summary["final_test_accuracy"] == pytest.approx(record["quality"]["test_accuracy"])
    assert summary["final_test_top5_accuracy"] == summary["test_top5_accuracy"]
    assert summary["total_parameters"] == record["model"]["parameters"]
    assert summary["train_images_per_second"] > 0 and summary["host_peak_bytes"] > 0
    assert config["backend"] == backend and config["num_epochs"] == 10 and config["node_name"]
    (run,) = [item["run"] for item in read_log(log) if item["type"] == "run"]
    assert run["run_group"].endswith(f"-{backend}") and config["node_name"] in run["run_group"]
    assert {backend, config["node_name"], "synthetic"} <= set(run["tags"])
    (artifact,) = [item["artifact"] for item in read_log(log) if item["type"] == "artifact"]
    assert artifact["type"] == "record"


def test_backends_agree(tmp_path):
    """Weights, order, augmentation and dropout masks are the same, and so are the losses, until
    rounding has grown: 16 steps of AdamW keep 3 digits. On real images, where they are."""
    losses, dataset = {}, "cifar100" if ARCHIVE.exists() else "synthetic"
    for name in BACKENDS:
        flags = ["--num-epochs=2", "--trainer=fit", f"--dataset={dataset}"]
        done = run_vit(tmp_path, *SMALL, *flags, backend=name)
        assert done.returncode == 0, done.stderr
        record = read_last_record(tmp_path)
        losses[name] = record["quality"]["loss"]
        assert record["quality"]["data_fingerprint"]
        assert (
            record["quality"]["dataset"] == data.LABELS[dataset]
            and data.LABELS[dataset] in done.stdout
        )
    assert losses["jax"] == pytest.approx(losses["torch"], rel=1e-3)


def test_the_same_seed_gives_the_same_losses_and_a_second_start_is_warm(tmp_path, backend):
    """It is so with another seed, too, that is with other images and another normalisation."""
    losses, caches = [], []
    for seed in (3, 3, 4):
        cache = str(tmp_path / "cache")
        run_vit(tmp_path, *SMALL, f"--seed={seed}", backend=backend, XDG_CACHE_HOME=cache)
        record = read_last_record(tmp_path)
        losses.append(record["quality"]["loss"])
        caches.append(record["timing"]["compile_cache"])
    assert losses[0] == losses[1] != losses[2]
    assert caches == ["cold", "warm", "warm"]


def test_fit_gives_the_same_losses_and_is_quiet_if_told(tmp_path):
    found = []
    for _ in range(2):
        done = run_vit(tmp_path, *SMALL, "--trainer=fit", "--no-verbose")
        assert (done.returncode, done.stdout) == (0, "")
        found.append(read_last_record(tmp_path)["quality"]["loss"])
    assert found[0] == found[1]


def test_fit_trains_on_whole_batches(tmp_path):
    done = run_vit(tmp_path, *SMALL, "--trainer=fit", "--micro-batch-size=10")
    assert done.returncode == 2 and "--micro-batch-size: expected none" in only_line(done)


@pytest.mark.parametrize("flag", ["--validation-split=0", "--no-best-weights"])
def test_the_last_weights_are_tested_and_kept(tmp_path, flag):
    # A rate that grows to far too much: the last epoch is not the best.
    flags = [*SMALL, flag, "--trainer=fit", "--num-epochs=2", "--schedule=cosine"]
    flags += ["--learning-rate=0.001", "--final-learning-rate=1"]
    done = run_vit(tmp_path, *flags)
    record = read_last_record(tmp_path)
    assert done.returncode == 0 and record["quality"]["best_epoch"] == 2
    assert "the last epoch's weights were tested" in record["notes"]
    assert bool(record["quality"]["val_loss"]) == (flag == "--no-best-weights")
    assert (tmp_path / "best.weights.h5").stat().st_size > 0


def test_dotenv_is_read(tmp_path):
    (tmp_path / ".env").write_text("WANDB_PROJECT=from-dotenv\n")
    assert "(default: from-dotenv)" in run_vit(tmp_path, "--help").stdout
    (tmp_path / ".env").write_text("KERAS_BACKEND=mine\n")
    done = run_python(tmp_path, ROOT / "vit.py")
    assert done.returncode == 2 and only_line(done).endswith("got 'mine'")


# ---- runs that fail ----------------------------------------------------------------------------


def test_diverged(tmp_path, backend):
    # Weights of 1e20 overflow float32 in the first product of two layers.
    trainer = "compiled" if backend == "jax" else "fit"
    flags = [*SMALL, "--learning-rate=1e20", "--num-epochs=3", f"--trainer={trainer}"]
    done = run_vit(tmp_path, *flags, backend=backend)
    record = read_last_record(tmp_path)
    assert (done.returncode, record["status"]) == (4, "diverged")
    assert "in epoch 1" in record["error"] and record["quality"]["test_accuracy"] is None
    assert "Traceback" not in done.stderr and "--learning-rate" in done.stderr


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path, number, code):
    command = [sys.executable, "-u", str(ROOT / "vit.py"), *SMALL, "--no-use-wandb"]
    child = subprocess.Popen(
        [*command, "--num-epochs=10000", "--checkpoint-path=b.weights.h5"],
        cwd=tmp_path,
        env=child_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not child.stdout.readline().startswith("epoch 2/"):
        assert child.poll() is None
    child.send_signal(number)
    out, err = child.communicate()
    record = read_last_record(tmp_path)
    assert (child.returncode, record["status"]) == (code, "interrupted")
    assert len(record["quality"]["loss"]) >= 2 and "Traceback" not in err


def test_nobody_reads_the_output(tmp_path):
    words = " ".join([sys.executable, str(ROOT / "vit.py"), *SMALL, "--no-use-wandb"])
    command = (
        f"{words} --num-epochs=9 --checkpoint-path=b.weights.h5 | head -1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=child_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    record = read_last_record(tmp_path)
    assert (done.returncode, record["status"]) == (141, "interrupted"), done.stderr
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_out_of_memory(tmp_path):
    done = run_vit(tmp_path, *SMALL, "--trainer=fit", "--memory-limit=0.1")
    item = read_last_record(tmp_path)
    assert (done.returncode, item["status"]) == (3, "oom"), done.stderr[-2000:]
    assert only_line(done).startswith(
        "vit.py: oom: out of memory: lower --batch-size 50 or raise --memory-limit 0.1 ("
    )


def test_no_data(tmp_path):
    nowhere = {"KERAS_HOME": str(tmp_path / "keras"), "https_proxy": "http://127.0.0.1:9"}
    done = run_vit(tmp_path, "--train-images=1000", **nowhere)
    record = read_last_record(tmp_path)
    assert (done.returncode, record["status"]) == (5, "error")
    assert "--dataset synthetic" in done.stderr and "cs.toronto.edu" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for flag in ("--results-path=file/r.jsonl", "--checkpoint-path=file/b.weights.h5"):
        done = run_vit(tmp_path, *SMALL, flag)
        assert done.returncode == 2 and "expected a file that can be written" in only_line(done)


def test_no_compiler_is_told_before_training(tmp_path):
    done = run_vit(tmp_path, *SMALL, backend="torch", PATH=str(tmp_path), CXX="")
    assert done.returncode == 2 and "--trainer fit" in only_line(done)


def test_a_full_disk_at_the_end_is_told(tmp_path):
    done = run_vit(tmp_path, *SMALL, "--trainer=fit", "--no-keep-state", "--results-path=/dev/full")
    assert done.returncode == 6 and "could not be written" in done.stderr
    assert "Traceback" not in done.stderr and "test accuracy" in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nothing_that_is_printed_onto_a_full_disk_ends_a_run(monkeypatch, stream, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = """
from harness import ending

def fail():
    print("an epoch", flush=True)
    raise RuntimeError("of its own")

ending.end_with(lambda: {"of its own": 9}[ending.run_to_end(fail, "")[1].partition(": ")[2]])
"""
    with open("/dev/full", "w") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, **streams, text=True, cwd=ROOT)
    assert done.returncode == 9
    assert done.stdout == "an epoch\n" or "RuntimeError: of its own" in done.stderr


def test_a_run_whose_log_is_on_a_full_disk_is_not_lost(tmp_path):
    command = [sys.executable, ROOT / "vit.py", *SMALL, "--no-use-wandb", "--no-keep-state"]
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": full}
        done = subprocess.run(command, cwd=tmp_path, env=child_environment(tmp_path), **streams)
    item = read_last_record(tmp_path)
    assert (done.returncode, item["status"]) == (0, "ok"), item["error"]


def test_wandb_failing_in_mid_run_is_a_warning(capsys):
    from harness import tracking

    class Broken:
        def log(self, values):
            raise OSError("no space left")

    tracking.log(Broken(), {"loss": 1.0})
    assert "training goes on" in capsys.readouterr().err


def test_a_wandb_key_is_found(monkeypatch, tmp_path):
    """In the environment, and wherever `wandb login` of this version writes it"""
    import wandb

    from harness import tracking

    def has_key():
        wandb.teardown()  # it would remember the environment
        return tracking.has_key()

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    # Else it asks the server who that is: W&B 0.31's service that is told to end while it waits
    # for an answer may never end.
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_key()
    (tmp_path / "netrc").unlink()
    assert wandb.login(key="0" * 40, verify=False) and has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080")
    assert not has_key()
    assert wandb.login(key="0" * 40, verify=False) and has_key()
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_key()
    wandb.teardown()


def test_a_wandb_server_that_is_no_url(tmp_path):
    done = run_vit(tmp_path, *SMALL, wandb=True, WANDB_BASE_URL="wandb.example.com")
    assert done.returncode == 2 and only_line(done).startswith("W&B: ")


def test_a_data_set_with_a_long_path_is_logged(tmp_path):
    """W&B takes tags of up to 64 characters"""
    place = tmp_path / ("a long name " * 4) / ("and another " * 4) / "pets"
    for label in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (place / label).mkdir(parents=True)
        for number in range(8):
            colours = np.full((8, 8, 3), 100 * ("cat" in label) + number, "uint8")
            Image.fromarray(colours).save(place / label / f"{number}.png")
    flags = [*MODEL, f"--dataset={place}", "--num-epochs=1", "--trainer=fit", "--batch-size=4"]
    done = run_vit(
        tmp_path, *flags, "--wandb-run-name", "[base] lr", wandb=True, WANDB_MODE="offline"
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    (run,) = [item["run"] for item in read_log(log) if item["type"] == "run"]
    assert "pets" in run["tags"] and run["display_name"] == "[base] lr"


# ---- the model ---------------------------------------------------------------------------------

SAVE = """
import json, os, numpy as np, keras, vit
model = vit.create_vit_classifier(vit.ViTConfig(transformer_layers=1, mlp_head_units=(64,)))
pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3))
np.save("pixels.npy", pixels)
np.save("logits.npy", keras.ops.convert_to_numpy(model(pixels.astype("uint8"))))
model.save("model.keras"); model.save_weights("model.weights.h5")
print(json.dumps(0))
"""
LOAD = """
import json, numpy as np, keras, vit
pixels, logits = np.load("pixels.npy"), np.load("logits.npy")
config = vit.ViTConfig(transformer_layers=1, mlp_head_units=(64,), seed=9)
fresh = vit.create_vit_classifier(config)
fresh.load_weights("model.weights.h5")
both = [fresh, keras.models.load_model("model.keras")]
found = [keras.ops.convert_to_numpy(model(pixels.astype("float32"))) for model in both]
error = max(abs(other - logits).max() for other in found) / abs(logits).max()
ours = [layer for layer in both[1].layers if type(layer).__module__ in ("vit", "harness.dropout")]
again = [type(layer).from_config(layer.get_config()) for layer in ours]
same = [a.get_config() == b.get_config() for a, b in zip(ours, again)]
print(json.dumps([float(error), len(same) > 3 and all(same)]))
"""


@pytest.mark.parametrize("here, there", [("jax", "torch"), ("torch", "jax")])
def test_what_one_backend_saves_the_other_loads(tmp_path, here, there):
    run_code(tmp_path, here, SAVE)
    error, same_config = run_code(tmp_path, there, LOAD)
    assert error < 1e-5 and same_config


def test_the_default_model(tmp_path, backend):
    code = """
import json, zlib, keras, vit
from harness import engine
model = vit.create_vit_classifier(vit.ViTConfig())
weights = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
checksum = zlib.crc32(b"".join(weight.tobytes() for weight in weights))
print(json.dumps([sum(weight.size for weight in weights), engine.count_flops(model), checksum]))
"""
    parameters, flops, checksum = run_code(tmp_path, backend, code)
    assert parameters == 21_759_012
    # By hand: patches, 8 x (q, k, v, out; scores and values; MLP), head; 2 per multiply-accumulate.
    blocks = 8 * (144 * (4 * 64 * 256 + 2 * 64 * 128) + 2 * 144 * 144 * 256)
    assert flops == 2 * (144 * 108 * 64 + blocks + 9216 * 2048 + 2048 * 1024 + 1024 * 100)
    assert checksum == CHECKSUMS.setdefault("default", checksum)  # the same weights on each


CHECKSUMS = {}
