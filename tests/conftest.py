"""What the tests share: child processes, since each backend needs one of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A shell that starts this in the background has SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("jax", "torch")
LONGEST = "vit readme latency engine peers survival models sweep".split()
# Compiled code as good as any, but slow: without XLA's and LLVM's costly passes, and without vector
# instructions, whose header takes g++ longer to read than a kernel to compile.
HASTY = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "ATEN_CPU_CAPABILITY": "default"}
# A model that trains in seconds; the flags of every run that is not about the default model.
MODEL = (
    *("--image-size=32", "--patch-size=8", "--projection-dim=32", "--num-heads=2"),
    *("--transformer-layers=1", "--mlp-head-units=64"),
)
SMALL = (
    *("--dataset=synthetic", "--train-images=400", "--test-images=100", "--num-epochs=1"),
    *("--batch-size=50", *MODEL),
)

# Ten classes, a small model and its full dropout: 2 s of training, to about 60 % of the test set.
LEARNING = (
    *("--dataset=synthetic", "--num-classes=10", "--train-images=2000", "--test-images=1000"),
    *("--num-epochs=10", "--batch-size=50", "--image-size=32", "--patch-size=8"),
    *("--projection-dim=32", "--num-heads=2", "--transformer-layers=2", "--mlp-head-units=64"),
    *("--head-dropout=0.2", "--learning-rate=0.003"),
)


def child_environment(folder, **changes):
    """This environment without what would change a run; `folder` holds all that it writes."""
    names = ["KERAS_BACKEND", "WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"]
    # Importing vit sets these in the tests' own process.
    names += ["JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"]
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"NETRC": str(folder / "no-netrc"), "WANDB_SILENT": "true"}
    # Small models gain nothing from threads, and two at once would wait for each other.
    environment |= {"OMP_NUM_THREADS": "1"}
    # Most of a test's time would be compilers at work on code that runs for a second.
    environment |= HASTY
    # Warnings from this project's own code are errors in its children, too.
    parts = [f"harness.{path.stem}" for path in (ROOT / "harness").glob("*.py")]
    environment["PYTHONWARNINGS"] = ",".join(f"error:::{name}" for name in ("vit", *parts))
    return environment | {"PYTHONPATH": str(ROOT)} | changes


def run_python(folder, *words, **environment):
    """Run Python in `folder`; the finished process, output as text."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=child_environment(folder, **environment),
        capture_output=True,
        text=True,
    )


def run_vit(folder, *flags, backend="jax", wandb=False, script="vit.py", **environment):
    """Run vit.py, or a script with its flags, as `run_python` does."""
    words = [ROOT / script, f"--keras-backend={backend}", *flags]
    words += [] if wandb else ["--no-use-wandb"]
    is_given = any(flag.startswith("--checkpoint-path") for flag in flags)
    if script == "vit.py" and not is_given:
        words.append(f"--checkpoint-path={folder / 'best.weights.h5'}")
    return run_python(folder, *words, **environment)


def only_line(done, prefix="vit.py: error: "):
    """The one line that a refused command prints, without its prefix."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix(prefix)


def refusal(parse, flags, capsys):
    """The one line that `parse`, a function of flags, ends this process with."""
    with pytest.raises(SystemExit) as ended:
        parse(flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


def run_code(folder, backend, code):
    """Run Python on a backend, in a process of its own, with vit.py at hand; its printed JSON."""
    done = run_python(folder, "-c", code, KERAS_BACKEND=backend)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def read_last_record(folder):
    from harness import record

    records, problems = record.read_records(folder / "results.jsonl")
    assert problems == []
    assert record.check_record(records[-1]) == []
    return records[-1]


def read_log(log):
    """The entries of an offline W&B run, by W&B's own reader."""
    tool = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(log)]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def read_wandb(log):
    """History rows, summary and configuration of an offline run."""
    records = read_log(log)
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    summary, config = {}, {}
    for record in records:
        summary |= record.get("summary", {}).get("update", {})
        config |= record.get("run", {}).get("config", {}).get("update", {})
    return rows, summary, config


def pytest_collection_modifyitems(items):
    """With a process a file, those that take minutes begin first: else one is left at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    return request.param
