"""Which Keras backend, here? The same work on each, interleaved and repeated, and an answer.

    python compare.py                                 # the installed backends; synthetic pictures
    python compare.py --backends jax torch --repeats 5 -- --dataset cifar100 --num-epochs 3
    python compare.py --entries jax native-jax torch:--trainer=fit "torch:--trainer=fit --seed=7"
    python compare.py --launcher 'docker run --rm --gpus all -v $PWD:/app vit:ook-{image}'
    python compare.py results/*.jsonl --report out    # measures nothing: reports on these records
    python compare.py --find-memory                   # the least memory that each trains in

What stands after `--` goes to vit.py as it is. Each run is a process of its own; this one sleeps
meanwhile. The order is A B, B A, A B ..., so that a machine that warms up or slows down does so
for all. Repeat i runs every entry with `--seed i` (unless a seed is given): both sides of a pair
see the same pictures in the same order, and the spread of the accuracy is one over seeds. A run is
in the results file before the next starts; the same command with --resume does what is missing,
and again what failed.

The numbers. An entry has its median over repeats and (min–max). The runs of one repeat are a pair:
against the reference stands the median of the paired ratios (of accuracy: of the paired
differences, in points), which may differ a little from the ratio of the medians. Its interval:

    below 3 pairs   none
    3 to 7 pairs    min–max of the pairs, which holds the true median with probability 1 - 2^(1-n)
                    whatever the distribution: 75 % for 3, 88 % for 4, 94 % for 5, 97 % for 6
                    (David and Nagaraja, Order Statistics, 3rd edition, section 7.1)
    from 8 pairs    percentile bootstrap, 95 %, 10,000 resamples, seeded (Efron and Tibshirani, An
                    Introduction to the Bootstrap, chapter 13). For the median of a few it is too
                    narrow: of 1,500 simulated normal samples it held the truth in 87 % for n = 7,
                    in 92 to 94 % for n = 8 to 12

"No difference shown" says that the interval holds 1 (accuracy: 0), not that there is none.
Exit status: 0 every run ok, 1 some run failed or a file could not be written, 2 bad input, 130
interrupted.
"""

import base64
import collections
import csv
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import operator
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Column, Table

from harness import tracking
from harness.cli import list_flags, split_words
from harness.ending import KILLED, OUT_OF_MEMORY
from harness.record import (
    KEYS,
    RecordError,
    append_loss,
    append_record,
    create_record,
    dig,
    read_records,
    reason_for,
)

ROOT = Path(__file__).resolve().parent
SUBJECTS = {  # name: (module and pip extra, {image} of the launcher, program; None is --script)
    "jax": ("jax", "jax", None),
    "torch": ("torch", "pytorch", None),
    "tensorflow": ("tensorflow", "tensorflow", None),
    "native-jax": ("jax", "jax", "peers/native_jax.py"),
    "native-torch": ("torch", "pytorch", "peers/native_torch.py"),
    "keras-io-jax": ("jax", "jax", "peers/keras_io.py"),
    "keras-io-torch": ("torch", "pytorch", "peers/keras_io.py"),
}
MEMORY_WORK = shlex.split(  # two steps of the default model
    "--dataset synthetic --train-images 512 --test-images 100 --validation-split 0 --num-epochs 1"
)
MEMORY_PRECISION = 1.05  # that a limit is known to
DEFAULT_WORK = shlex.split(  # 20 to 30 s a run on 2 CPU cores
    "--dataset synthetic --num-classes 10 --train-images 1000 --test-images 500 --num-epochs 4"
    " --batch-size 64 --image-size 32 --patch-size 4 --transformer-layers 4 --mlp-head-units 256"
)
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()  # Okabe and Ito
MARKERS = "osD^vPX"


class BadInput(Exception):
    """One line for the user: what was expected, what came, what to do. Exit status 2."""


@dataclass
class CompareConfig:
    """The same work on each backend, interleaved and repeated. Flags for vit.py come after --"""

    records: tyro.conf.Positional[tuple[Path, ...]] = ()  # report on these files, measure nothing
    backends: tuple[str, ...] = ()  # jax, torch, tensorflow (default: the installed ones)
    entries: tuple[str, ...] = ()  # backends, native-jax, keras-io-jax ...; flags after a colon
    repeats: int = 3  # runs of each entry; an interval needs 3
    reference: str = ""  # entry that the others are compared with (default: the first)
    cool_down: float = 0.0  # seconds to wait between runs
    start_together: bool = False  # a repeat's runs compile at once, and are measured in turn
    results_path: Path | None = None  # file of the runs (default: results/compare-ID.jsonl)
    resume: bool = False  # go on with the newest comparison that this command began
    dry_run: bool = False  # print the commands in their order
    launcher: str = ""  # stands before each command; {image} is jax, pytorch or tensorflow
    script: str = "vit.py"  # what backends run, e.g. another checkout's vit.py
    find_memory: bool = False  # instead: the smallest --memory-limit that each entry trains in
    parity: bool = True  # first see by parity.py whether the backends compute the same
    target_accuracy: float | None = None  # report the time to this validation accuracy, 0 to 1
    report: Path | None = None  # folder for report.html, .md, .csv, .svg and .png
    wandb: bool = False  # upload the report to Weights & Biases
    verbose: bool = False  # show the output of the runs


# ---- What to run ---------------------------------------------------------------------------------


def parse_entry(text, config):
    """`torch:--trainer=fit` -> {label, name, flags}; raises BadInput"""
    name, _, rest = text.partition(":")
    if name not in SUBJECTS:
        raise BadInput(f"unknown entry {text!r}: expected one of {', '.join(SUBJECTS)}")
    try:
        flags = shlex.split(rest)
    except ValueError as error:
        raise BadInput(f"entry {text!r}: {error}; quote the flags as in a shell") from error
    if "~" in rest:  # which in a record's id begins a batch size
        raise BadInput(f"entry {text!r}: expected flags without ~; write a path in full")
    if rest and not rest.startswith("--"):
        raise BadInput(f"entry {text!r}: expected flags after the colon, as in {name}:--flag=value")
    if fixed := list_flags(flags) & {"dataset", "results-path", "keras-backend"}:
        raise BadInput(f"entry {text!r}: --{min(fixed)} is the same for all entries; leave it out")
    module, _, program = SUBJECTS[name]
    if not config.launcher and not importlib.util.find_spec(module):
        raise BadInput(f"entry {text!r}: {module} is not installed; pip install '.[{module}]'")
    if not config.launcher and not find_program(program or config.script).exists():
        raise BadInput(f"entry {text!r}: there is no {program or config.script}; see --script")
    return {"label": f"{name}:{shlex.join(flags)}" if flags else name, "name": name, "flags": flags}


def find_program(name):
    return Path(name) if Path(name).exists() else ROOT / name


def choose_entries(config):
    """The entries of --backends and --entries, else the installed backends; raises BadInput"""
    backends = [name for name, (_, _, program) in SUBJECTS.items() if program is None]
    if unknown := [name for name in config.backends if name not in backends]:
        raise BadInput(f"unknown backend {unknown[0]!r}: expected one of {', '.join(backends)}")
    texts = [*config.backends, *config.entries]
    if not texts:  # what a launcher's images hold cannot be seen from here
        installed = [name for name in backends if importlib.util.find_spec(name)]
        texts = ["jax", "torch"] if config.launcher else installed
    if not texts:
        raise BadInput("expected an installed backend, found none; pip install '.[jax]'")
    entries = [parse_entry(text, config) for text in texts]
    labels = [entry["label"] for entry in entries]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise BadInput(f"entry {twice[0]!r} is there twice; --repeats gives more runs of each")
    # Rows of latency.py --export become entries of their own.
    check_reference(re.sub("[: ]--export=.*", "", config.reference), labels)
    return entries


def check_reference(reference, labels):
    if reference and reference not in labels:
        raise BadInput(f"unknown reference {reference!r}: expected one of {', '.join(labels)}")


def create_plan(entries, config, work, path, comparison):
    """The runs in the order A B, B A, A B ...: [{label, name, repeat, id, command}, ...]"""
    plan = []
    for repeat in range(1, config.repeats + 1):
        for entry in entries if repeat % 2 else entries[::-1]:
            record_id = f"{comparison}-r{repeat}-{urllib.parse.quote(entry['label'], ':=,+')}"
            backend, image, program = SUBJECTS[entry["name"]]
            is_native, is_served = entry["name"].startswith("native-"), serves(config)
            program = None if is_served else program
            start = [sys.executable, str(find_program(program or config.script))]
            if config.launcher:  # a container has its own environment: `env` hands the id over
                start = [os.path.expandvars(word) for word in split_launcher(config.launcher)]
                start = [word.replace("{image}", image) for word in start]
                start += ["env", f"VIT_RECORD_ID={record_id}", "python", program or config.script]
            given = list_flags([*work, *entry["flags"]])
            flags = [] if is_native and not is_served else ["--keras-backend", backend]
            flags += ["--native"] if is_native and is_served else []
            flags += [] if "use-wandb" in given or is_served else ["--no-use-wandb"]
            flags += [] if "seed" in given else ["--seed", str(repeat)]
            # After a -- among them are flags of a model that is served.
            before, after = split_words(work)
            flags += [*before, *entry["flags"], *(["--", *after] if after else [])]
            command = [*start, "--results-path", str(path), *flags]
            kind = "latency" if is_served else "train"
            plan.append(
                {**entry, "repeat": repeat, "id": record_id, "kind": kind, "command": command}
            )
    return plan


def split_launcher(text):
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"--launcher {text!r}: {error}; quote it as in a shell") from error


def make_folder(path, flag):
    """Before anything is measured; raises BadInput"""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"{flag}: cannot make the folder {path}: {error.strerror}; name another"
        raise BadInput(text) from error


def serves(config):
    return Path(config.script).name == "latency.py"


def parse_id(record_id):
    """`1a2b3c4d-20260131T120000-r2-jax` -> (comparison, 2, "jax"); any other id -> None. At the end
    of latency.py's stand a batch size and perhaps a runtime, `~8` or `~8~onnx`"""
    match = re.fullmatch(r"([0-9a-f]{8}-\d{8}T\d{6})-r(\d+)-(.+?)(~\d+(~.+)?)?", record_id)
    return match and (match[1], int(match[2]), urllib.parse.unquote(match[3]))


def choose_comparison(entries, config, work):
    """(id, file) of the comparison. The id: a hash of machine and command, and when it began"""
    parts = [entry["label"] for entry in entries], work, config.launcher, config.script
    parts = [platform.node(), *parts]  # --resume takes up no other machine's comparison
    prefix = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    comparison = f"{prefix}-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}"
    path = config.results_path or Path("results", f"compare-{comparison}.jsonl")
    if config.resume:
        if not config.results_path:
            path = max(Path("results").glob(f"compare-{prefix}-*.jsonl"), default=path)
        begun = {parsed[0] for item in load(path, new=True)[0] if (parsed := parse_id(item["id"]))}
        comparison = max((name for name in begun if name.startswith(prefix)), default=comparison)
    return comparison, path


# ---- Running -------------------------------------------------------------------------------------


def load(path, new=False):
    """(records, warnings) of a file; raises BadInput. `new`: it need not be there yet"""
    if new and not (path.exists() and path.stat().st_size):
        return [], []
    try:
        found, problems = read_records(path)
    except RecordError as error:
        raise BadInput(str(error)) from error
    if newer := [problem for problem in problems if "is newer than" in problem]:
        raise BadInput(newer[0].removesuffix(": skipped"))
    return found, problems


GRACE = 10  # seconds


def stop_child(child):
    """Ctrl-C for the child and what it started; time to write its record, then the end"""
    STOPPED.add(child)
    for number, seconds in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
            return child.wait(seconds)
        except ProcessLookupError:  # it has ended by itself
            return child.wait()
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue


CHILDREN, STOPPED = set(), set()  # that run now; that were told to end


def run_child(command, record_id, verbose, turn=None):
    """Asleep until the command ends: (exit status, last error on stderr, whether interrupted).
    `turn`: see measure_together"""
    try:
        child = subprocess.Popen(
            command,
            env={**os.environ, "VIT_RECORD_ID": record_id, "VIT_TURN": str(turn or "")},
            stdin=subprocess.DEVNULL,
            stdout=None if verbose else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # so that the terminal's Ctrl-C comes once, from stop_child
        )
    except OSError as error:
        raise BadInput(f"cannot start {command[0]!r}: {error.strerror}; see --launcher") from error
    lines = collections.deque(maxlen=20)

    def drain():
        with child.stderr:
            for line in child.stderr:
                lines.append(line.strip("╭╮╰╯─│ \n"))  # the frame around tyro's messages
                if verbose:
                    sys.stderr.write(line)

    CHILDREN.add(child)
    reader = threading.Thread(target=drain, daemon=True)
    try:
        reader.start()
        child.wait()
    except KeyboardInterrupt:
        stop_child(child)
    CHILDREN.discard(child)
    reader.join(2)  # not for ever: a grandchild may keep the pipe open
    spoken = [line for line in lines if line]
    errors = [line for line in spoken if re.search("error|unrecognized", line, re.I)]
    return child.returncode, (errors or spoken or [""])[-1], child in STOPPED


def measure_run(run, path, verbose, turn=None):
    """(record, whether interrupted) of one run; writes the record where the child did not"""
    before = {json.dumps(item) for item in load(path, new=True)[0]}
    started = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    returncode, last_line, interrupted = run_child(run["command"], run["id"], verbose, turn)
    found = [item for item in load(path, new=True)[0] if json.dumps(item) not in before]
    for item in reversed(found):
        if item["id"].partition("~")[0] == run["id"]:
            return item, interrupted
    status, error = "error", last_line or "it left neither record nor message; see --verbose"
    if interrupted:
        status, error = "interrupted", "stopped before it wrote a record"
    elif returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        status, error = "oom", KILLED
    elif any(sign in error for sign in OUT_OF_MEMORY):
        status = "oom"
    elif found:
        error = f"its record has the id {found[-1]['id']} instead of VIT_RECORD_ID's"
    told = {"status": status, "error": error, "started": started}
    told |= {"argv": run["command"], "backend": run["name"]}
    return append_loss(path, run["kind"], id=run["id"], **told), interrupted


def find_done(found):
    """Ids of the runs that are complete: of latency.py's, those whose every row is ok"""
    rows, ok = {}, collections.defaultdict(set)
    for item in found:
        run = item["id"].partition("~")[0]
        rows[run] = item["config"].get("rows") or 1
        ok[run] |= {item["id"]} if item["status"] == "ok" else set()
    return {run for run in rows if len(ok[run]) >= rows[run]}


def measure_together(runs, path, config):
    """Begins runs at once and, when all have compiled, lets one after the other be measured: where
    there are cores for that, it takes less time. Yields what `measure_run` gives, of each"""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(runs)) as pool:
        turns = [Path(folder, str(index)) for index in range(len(runs))]
        begun = [
            pool.submit(measure_run, run, path, config.verbose, turn)
            for run, turn in zip(runs, turns)
        ]
        try:
            while not all(one.done() or turn.exists() for one, turn in zip(begun, turns)):
                time.sleep(0.05)
            for one, turn in zip(begun, turns):
                if not turn.exists() and one.result()[0]["status"] == "ok":
                    raise BadInput(
                        "--start-together: expected --num-epochs 2 or more, got a run that did not "
                        f"wait for its turn; its speed in {path} is wrong"
                    )
                turn.unlink(missing_ok=True)
                yield one.result()
        except BaseException:  # whatever it is, nobody would tell the others to go on
            for child in list(CHILDREN):
                stop_child(child)
            raise


def measure(plan, path, config, console):
    """Runs what is not done yet, one line a run; returns whether it came to the end"""
    done = find_done(load(path, new=True)[0])
    todo = [run for run in plan if run["id"] not in done]
    console.print(f"{len(todo)} runs of {len(plan)} to do, into {path}")
    results = (measure_run(run, path, config.verbose) for run in todo)
    if config.start_together:
        repeats = itertools.groupby(todo, operator.itemgetter("repeat"))
        results = itertools.chain.from_iterable(
            measure_together(list(runs), path, config) for _, runs in repeats
        )
    durations = collections.defaultdict(list)
    for index, run in enumerate(todo):
        try:
            time.sleep(config.cool_down if index else 0)
            start = time.perf_counter()
            record, interrupted = next(results)
        except KeyboardInterrupt:
            interrupted = True
        if interrupted:
            console.print(f"interrupted after {index} runs; the same command with --resume goes on")
            return False
        durations[run["label"]].append(time.perf_counter() - start)
        mean = np.mean([seconds for several in durations.values() for seconds in several])
        left = sum(np.mean(durations.get(later["label"], mean)) for later in todo[index + 1 :])
        left += config.cool_down * (len(todo) - index - 1)
        name = "images_per_second" if record["kind"] == "latency" else "train_images_per_second"
        speed = show(dig(record, f"timing.{name}"))
        outcome = f"{speed} images/s" if record["status"] == "ok" else record["status"]
        outcome += f" ({record['error']})" if record["error"] else ""
        seconds = f"{durations[run['label']][-1]:.0f} s, {left:.0f} s left"
        console.print(f"{run['label']} {run['repeat']}/{config.repeats}: {outcome}, {seconds}")
    return True


def take_flag(words, name):
    """(value of the last --name, the other words); None where it is not among them"""
    value, rest, words = None, [], list(words)
    while words:
        flag, equals, given = words.pop(0).partition("=")
        if flag == name:
            value = given if equals else "".join(words[:1])
            words = words if equals else words[1:]
        else:
            rest.append(flag + equals + given)
    return value, rest


def check_parity(entries, config, work, path, comparison, console):
    """Has parity.py compare the backends among the entries; its record joins the runs'. Where it
    could not, a record says so. Raises KeyboardInterrupt"""
    names = {entry["name"] for entry in entries}
    backends = [name for name in ("jax", "torch", "tensorflow") if name in names]
    record_id = f"{comparison}-parity"
    known = [item for item in load(path, new=True)[0] if item["id"] == record_id]
    is_done = any(item["status"] == "ok" for item in known)
    is_known = config.script == "vit.py" or serves(config)
    if not config.parity or not is_known or len(backends) < 2 or is_done:
        return
    precision, flags = take_flag(work, "--precision")
    command = [sys.executable, str(ROOT / "parity.py"), "--backends", *backends]
    command += ["--precision", precision or "float32", "--results-path", str(path)]
    command += ["--launcher", config.launcher, "--no-verbose"]
    if serves(config):
        own, flags = split_words(flags)
        command += ["--model", take_flag(own, "--model")[0] or "vit", "--steps", "0"]
    command += ["--", *flags]
    console.print(f"first, whether {' and '.join(backends)} compute the same (see --no-parity)")
    returncode, last_line, interrupted = run_child(command, record_id, config.verbose)
    if interrupted:
        raise KeyboardInterrupt
    if returncode not in (0, 1) or not any(i["id"] == record_id for i in load(path, new=True)[0]):
        error = last_line or f"parity.py ended with exit code {returncode}"
        record = create_record("parity", id=record_id, error=error, argv=command)
        record["notes"] = ["backend: parity was not checked", "precision: likewise"]
        append_record(path, record)


def find_memory(entries, config, work, path, comparison, console):
    """Bisects the smallest --memory-limit with which each entry's run ends well; returns whether
    all was found. Any end but a good one counts as too little, since without a limit it is good."""
    tries = dataclasses.replace(config, repeats=100)
    found, table = [], Table("GB (1e9 bytes)", "trained in", "not in", "took without a limit")

    def train(run, limit):
        run["command"] += ["--memory-limit", str(limit)] if limit else []
        record, interrupted = measure_run(run, path, config.verbose)
        if interrupted:
            raise KeyboardInterrupt
        outcome = record["status"] + (f" ({record['error']})" if record["error"] else "")
        console.print(f"{run['label']}, {f'{limit} GB' if limit else 'no limit'}: {outcome}")
        return record

    def fits(runs, limit):
        return train(next(runs), limit)["status"] == "ok"

    for entry in entries:
        runs = iter(create_plan([entry], tries, work, path, comparison))
        free, least, most = train(next(runs), None), None, None
        taken = dig(free, "memory.device_peak_bytes") or dig(free, "memory.host_peak_bytes") or 0
        if free["status"] == "ok":
            least, most = bisect_memory(functools.partial(fits, runs), taken / 1e9)
        found.append(least)
        figures = (least, most, taken / 1e9 or None)
        table.add_row(entry["label"], *(show(value) for value in figures))
    console.print(table)
    return None not in found


def bisect_memory(fits, start):
    """(smallest that fits, largest that does not), apart by at most MEMORY_PRECISION times; from
    a guess up or down until both are known, then between them. (None, largest) beyond 16 times the
    guess"""
    least = most = None
    limit = start
    while None in (least, most) or least > most * MEMORY_PRECISION:
        limit = float(f"{limit:.3g}")
        if fits(limit):
            least = limit
        else:
            most = limit
        if least is None and most > 16 * start:
            break
        known = [bound for bound in (least, most) if bound is not None]
        limit = (least * most) ** 0.5 if len(known) == 2 else limit * (1.4 if most else 1 / 1.4)
    return least, most


# ---- Statistics ----------------------------------------------------------------------------------


def compare_pairs(values, reference, how):
    """Paired values against the reference's, arrays (pairs,): by "ratio" or "difference".

    Returns {estimate, pairs, low, high, coverage, different, reason}. Without an interval there are
    nulls and a reason; `different` says whether the interval leaves out 1 (0 for differences).
    """
    paired = np.divide(values, reference) if how == "ratio" else np.subtract(values, reference)
    pairs, low, high, coverage = len(paired), None, None, None
    if pairs >= 8:
        rng = np.random.default_rng(0)
        resampled = paired[rng.integers(0, pairs, (10_000, pairs))]  # (resamples, pairs)
        low, high = map(float, np.percentile(np.median(resampled, axis=1), [2.5, 97.5]))
        coverage = 0.95
    elif pairs >= 3:
        low, high, coverage = float(paired.min()), float(paired.max()), 1 - 2.0 ** (1 - pairs)
    different = None if low is None else not low <= (how == "ratio") <= high
    reason = "too few repeats for an interval" if low is None else None
    result = {"estimate": float(np.median(paired)), "pairs": pairs, "low": low, "high": high}
    return {**result, "coverage": coverage, "different": different, "reason": reason}


def find_break_even(start, epoch, other_start, other_epoch):
    """Epochs after which start + epochs × epoch is the same for both; None if one always leads"""
    if (start - other_start) * (epoch - other_epoch) >= 0:
        return None
    return (start - other_start) / (other_epoch - epoch)


# ---- What a record says: (value, None), or (None, why not) ---------------------------------------


def get_field(record, dotted, scale=1):
    value = dig(record, dotted)
    if value is None:
        return None, f"{dotted}: {reason_for(record, dotted) or 'the record gives no reason'}"
    return value * scale, None


def get_epoch(record):
    """Median seconds of the epochs after the first, which holds the compilation"""
    epochs = dig(record, "timing.epoch_seconds") or []
    if len(epochs) < 2:
        return None, "an epoch: the first one holds the compilation, and there is no second"
    return float(np.median(epochs[1:])), None


def get_compile(record, cache):
    if (dig(record, "timing.compile_cache") == "warm") != (cache == "warm"):
        return None, f"compiling: no run found a {cache} compilation cache"
    return get_field(record, "timing.compile_seconds")


def get_start(record, names=("import", "build", "compile")):
    """Seconds before the steady state"""
    parts = [get_field(record, f"timing.{name}_seconds") for name in names]
    missing = [reason for value, reason in parts if value is None]
    return (None, missing[0]) if missing else (sum(value for value, _ in parts), None)


def get_target(record, target):
    """Seconds of import, build and training until the validation accuracy reaches the target.

    The compilation is in the first epoch's seconds; evaluation is not in any.
    """
    start, reason = get_start(record, ("import", "build"))
    curve, epochs = (
        dig(record, key) or [] for key in ("quality.val_accuracy", "timing.epoch_seconds")
    )
    reached = [index for index, value in enumerate(curve) if value is not None and value >= target]
    if reached and start is not None:
        return start + sum(epochs[: reached[0] + 1]), None
    return None, reason or f"validation accuracy did not reach {target:.1%}"


METRICS = {  # key: (title with unit, how entries are compared, field or function, scale)
    "images_per_second": ("training, images/s", "ratio", "timing.train_images_per_second", 1),
    "epoch_seconds": ("an epoch, s", "ratio", get_epoch, None),
    "start_seconds": ("import, build, compile, s", "ratio", get_start, None),
    "compile_cold_seconds": ("compiling, cold, s", "ratio", get_compile, "cold"),
    "compile_warm_seconds": ("compiling, warm, s", "ratio", get_compile, "warm"),
    "target_seconds": ("to {:.1%} validation, s", "ratio", get_target, "target"),
    "device_peak_mib": ("peak device memory, MiB", "ratio", "memory.device_peak_bytes", 2**-20),
    "host_peak_mib": ("peak host memory, MiB", "ratio", "memory.host_peak_bytes", 2**-20),
    "joules_per_image": ("energy, J/image", "ratio", "energy.joules_per_image", 1),
    "test_accuracy_percent": ("test accuracy, %", "difference", "quality.test_accuracy", 100),
    "test_top5_percent": ("test top-5, %", "difference", "quality.test_top5_accuracy", 100),
}
LATENCY = {  # the same of each batch size
    "p50_ms": ("p50, ms", "ratio", "timing.p50_seconds", 1e3),
    "p99_ms": ("p99, ms", "ratio", "timing.p99_seconds", 1e3),
    "images_per_second": ("images/s", "ratio", "timing.images_per_second", 1),
    "copy_ms": ("copy to the device, ms", "ratio", "timing.copy_seconds", 1e3),
    "compile_seconds": ("compiling, s", "ratio", "timing.compile_seconds", 1),
    "device_peak_mib": ("peak device memory, MiB", "ratio", "memory.device_peak_bytes", 2**-20),
    "host_peak_mib": ("peak host memory, MiB", "ratio", "memory.host_peak_bytes", 2**-20),
    "joules_per_image": ("energy, J/image", "ratio", "energy.joules_per_image", 1),
    "file_mb": ("file, MB", "ratio", "model.bytes_on_disk", 1e-6),
    "test_accuracy_percent": ("test accuracy, %", "difference", "quality.test_accuracy", 100),
}


def get_batch(record, size, dotted, scale):
    """A figure of one batch size of a run of latency.py, see merge_batch"""
    batch = record["batches"].get(size)
    if batch is None:
        return None, f"batch {size}: not run"
    if batch["status"] != "ok":
        return None, f"batch {size}: {batch['status']}"
    return get_field(batch, dotted, scale)


def find_metric(key):
    """METRICS' entry of a key; of `8 p50_ms` that of LATENCY's p50_ms for a batch of 8"""
    if key in METRICS:
        return METRICS[key]
    size, _, name = key.partition(" ")
    title, how, dotted, scale = LATENCY[name]
    get = functools.partial(get_batch, size=int(size), dotted=dotted, scale=scale)
    return f"batch {size}: {title}", how, get, None


def get_metric(record, key, target=None):
    """(value, None) or (None, why there is none)"""
    _, _, getter, extra = find_metric(key)
    if isinstance(getter, str):
        return get_field(record, getter, extra)
    extra = target if extra == "target" else extra
    return getter(record) if extra is None else getter(record, extra)


# ---- From records to entries ---------------------------------------------------------------------

OTHERS = "seed|wandb|path|dir|node|backend|run|project|entity|verbose"
NOT_WORK = re.compile(rf"(?!drop_path$)(.*_)?({OTHERS})(_|$)")
NOT_SERVED = {"batch_size", "batch_sizes", "data_format", "native", "list_models"}
NOT_SERVED |= {"runtime", "rows"}


def group_records(found):
    """Entries as they appear: [{label, flags, node, runs: {(comparison, repeat): record}}, ...]

    A run of compare.py says in its id what it is; any other goes by its backend. Where a label
    stands for several configurations or nodes, it gets what differs. Raises BadInput.
    """
    latest = {}  # a run that was tried again counts as it ended, where it began
    for item in found:
        latest[item["id"]] = item | {"started": latest.get(item["id"], item)["started"]}
    kind = find_kind(found)
    found = [item for item in latest.values() if item["kind"] == kind]
    if not found:
        raise BadInput("expected records of kind train or latency, got none; vit.py writes some")
    datasets = sorted({str(dig(r, "config.dataset")) for r in found if dig(r, "config.dataset")})
    if len(datasets) > 1:
        names = " and ".join(datasets)
        raise BadInput(f"expected one dataset, got {names}; report on one at a time")
    # A run that died early has its siblings' configuration. A comparison ran on one machine,
    # though a container may have a name of its own each time.
    rows, known = [], {}
    for item in sorted(found, key=lambda item: item["started"]):
        name = parse_id(item["id"]) or ("", 0, item["backend"] or "unknown")
        if name[0] and item["config"].get("runtime", "compiled") != "compiled":
            mark = " " if ":" in name[2] else ":"
            name = (*name[:2], f"{name[2]}{mark}--export={item['config']['runtime']}")
        config = {k: v for k, v in item["config"].items() if not NOT_WORK.match(k)}
        config = {k: v for k, v in config.items() if kind == "train" or k not in NOT_SERVED}
        work = tuple(sorted((key, json.dumps(value)) for key, value in config.items()))
        node = str(dig(item, "device.node_name") or dig(item, "config.node_name") or "")
        rows.append((item, name, work, node))
        for key, value in (((name[0], name[2]), work), (name[0], node)):
            known[key] = known.get(key) or value
    groups = {}
    for item, (comparison, repeat, label), work, node in rows:
        work = work or known[comparison, label]
        node = known[comparison] if comparison or not node else node
        runs = groups.setdefault((label, node, work), {})
        if kind == "latency":
            merge_batch(runs, comparison, repeat, item)
        else:
            runs[comparison, repeat or len(runs) + 1] = item
    entries = []
    for (label, node, work), runs in groups.items():
        others = [dict(other) for name, _, other in groups if name == label]
        added = [(k, v.strip('"')) for k, v in work if any(other.get(k) != v for other in others)]
        flags = shlex.split(label.partition(":")[2])
        flags += [f"--{k.replace('_', '-')}={v}" for k, v in added if k not in list_flags(flags)]
        full = ":".join([label.partition(":")[0], shlex.join(flags)][: 2 if flags else 1])
        full += f" @ {node}" if len({node for _, node, _ in groups}) > 1 else ""
        ok = {pair: item for pair, item in runs.items() if item["status"] == "ok"}
        entries.append({"label": full, "flags": flags, "node": node, "runs": runs, "ok": ok})
    return entries


def find_kind(found):
    """What a report is on: training where there is any, else serving"""
    kinds = {item["kind"] for item in found}
    return "latency" if "latency" in kinds and "train" not in kinds else "train"


def merge_batch(runs, comparison, repeat, item):
    """Adds a record of latency.py, one batch size, to its run: `batches`, {size: record}, of which
    one must be ok. The n-th record of a size belongs to the n-th run, if no comparison made it"""
    size = item["config"].get("batch_size")
    repeat = repeat or 1 + sum(size in run["batches"] for run in runs.values())
    run = runs.setdefault((comparison, repeat), item | {"batches": {}})
    run["batches"].pop(None, None)  # it died before its first batch, and was run again
    run["batches"][size] = item
    if item["status"] == "ok" and run["status"] != "ok":
        run |= {key: item[key] for key in ("status", "error", "model", "precision", "device")}


def list_parts(run):
    """{batch size: record} of a run of latency.py; of any other {None: itself}"""
    return run.get("batches", {None: run})


def match_pairs(entry, reference):
    """([(record, reference's record), ...], whether interleaved): by repeat, else by time"""
    shared = [pair for pair in entry["ok"] if pair in reference["ok"] and pair[0]]
    if shared:
        return [(entry["ok"][pair], reference["ok"][pair]) for pair in shared], True
    return list(zip(entry["ok"].values(), reference["ok"].values(), strict=False)), False


# ---- Fairness ------------------------------------------------------------------------------------

SAME = "precision config.batch_size config.num_epochs model.parameters model.flops_per_image "
SAME += "config.seed quality.data_fingerprint versions.keras git.commit timing.compile_cache "
SAME += "device.kind device.name device.power_mode"
SERVED = {"precision", "versions", "git", "device"}  # groups that serving has, too
OPTIONAL = {"versions.keras", "git.commit", "timing.compile_cache", "device.power_mode"}
DERIVED = {"model.parameters", "model.flops_per_image", "quality.data_fingerprint"}
HARMLESS = {"precision", "trainer", "jit-compile"}  # flags that leave the derived fields alone


def check_fairness(entries, reference, is_served):
    """(warnings, what differs by an entry's own flags, names of the fields that are unequal)"""
    warnings, deliberate, unequal = [], [], []
    fields = SAME.split()
    if is_served:
        fields = [dotted for dotted in fields if dotted.partition(".")[0] in SERVED]
    if len({entry["node"] for entry in entries}) > 1:
        warnings.append("different machines: the ratios compare machines as well")
        fields = [dotted for dotted in fields if not dotted.startswith("device.")]
    entries = [entry for entry in entries if entry["ok"]]
    config = {key for entry in entries for item in entry["ok"].values() for key in item["config"]}
    config -= {"precision", *NOT_SERVED} if is_served else {"precision"}
    config = {f"config.{key}" for key in config if not NOT_WORK.match(key)}
    optional = OPTIONAL | config - set(fields)
    common = set.intersection(*(set(entry["ok"]) for entry in entries)) if entries else ()
    for dotted in [*fields, *sorted(config - set(fields))]:
        holders = collections.defaultdict(list)  # value -> entries
        for entry in entries:
            if dotted in ("config.seed", "quality.data_fingerprint") and common:
                values = [dig(entry["ok"][pair], dotted) for pair in sorted(common)]
                values = {None if None in values else ", ".join(map(str, values))}
            else:
                values = [dig(item, dotted) for item in entry["ok"].values()]
                values = {json.dumps(v) if isinstance(v, list | dict) else v for v in values}
            for value in sorted(values, key=str):
                holders[value].append(entry)
        unknown = holders.pop(None, [])
        if unknown and dotted not in optional:
            names = ", ".join(entry["label"] for entry in unknown)
            warnings.append(f"{dotted} is not checked: unknown for {names}")
        if len(holders) < 2:
            continue
        values = {value: ", ".join(e["label"] for e in held) for value, held in holders.items()}
        text = "; ".join(f"{value} ({names})" for value, names in values.items())
        field = dotted.split(".")[-1]
        plain = []  # the values of entries without a flag that could have set the field
        for value, held in holders.items():
            flags = [list_flags(entry["flags"]) for entry in held]
            derived = dotted in DERIVED
            set_by = [f - HARMLESS if derived else f & {field.replace("_", "-")} for f in flags]
            plain += [] if all(set_by) else [value]
        if len(plain) > 1:
            warnings.append(f"{dotted} differs: {text}")
            unequal += [] if field == "compile_cache" else [field]  # it touches the start alone
        else:
            deliberate.append(f"{dotted} differs by an entry's own flags: {text}")
    for entry in entries:
        pairs, interleaved = match_pairs(entry, reference)
        if pairs and not interleaved and entry is not reference:
            warnings.append(f"{entry['label']} did not run interleaved with {reference['label']}")
    return warnings, deliberate, unequal


def collect_notes(entries):
    """The warnings in the records' notes (not the reasons of nulls), once each with a count, also
    where other numbers stand in them"""
    items = [
        part
        for entry in entries
        for run in entry["runs"].values()
        for part in list_parts(run).values()
    ]
    texts = collections.defaultdict(list)
    for item in items:
        for note in dict.fromkeys(item["notes"]):
            field, colon, _ = note.partition(":")
            is_field = colon and field.partition(".")[0] in KEYS
            if not (is_field and has_null(dig(item, field))):
                texts[re.sub(r"[\d.]+", "", note)].append(note)
    return [f"{notes[0]} ({len(notes)} of {len(items)} runs)" for notes in texts.values()]


def has_null(value):
    return value is None or (isinstance(value, dict) and any(map(has_null, value.values())))


# ---- The report ----------------------------------------------------------------------------------


def compare_entries(entry, reference, key, target=None):
    """compare_pairs over the pairs of runs that both have the value, None if there are none"""
    pairs = match_pairs(entry, reference)[0]
    if key.endswith("joules_per_image"):
        # A board's counter and a SoC's rails measure different things.
        pairs = [p for p in pairs if len({dig(item, "energy.source") for item in p}) == 1]
    values = [[get_metric(item, key, target)[0] for item in pair] for pair in pairs]
    if key == "target_seconds" and any(None in pair for pair in values):
        return None  # those that came to the target are its faster runs
    values = np.array([pair for pair in values if None not in pair], float).reshape(-1, 2)
    how = find_metric(key)[1]
    if not len(values) or (how == "ratio" and (values[:, 1] <= 0).any()):
        return None
    result = compare_pairs(values[:, 0], values[:, 1], how)
    if how == "difference" and len({dig(item, "config.seed") for item, _ in pairs}) < 3:
        unknown = dict.fromkeys(("low", "high", "coverage", "different"))
        result |= {**unknown, "reason": "too few seeds for an interval"}
    return result


def create_cell(entry, reference, key, target, footnotes):
    """One number of the report: {values, median, low, high, versus, reason, lines}"""
    got = [get_metric(item, key, target) for item in entry["ok"].values()]
    values = [value for value, _ in got if value is not None]
    cell = {"values": values, "versus": None, "reason": None}
    if not values:
        cell["reason"] = got[0][1] if got else "no run succeeded"
        footnotes.setdefault(cell["reason"], len(footnotes) + 1)
        lines = [f"not measured ({footnotes[cell['reason']]})"]
        return {**cell, "median": None, "low": None, "high": None, "lines": lines}
    cell |= {"median": float(np.median(values)), "low": min(values), "high": max(values)}
    spread = f" ({show(min(values))}–{show(max(values))})" if len(values) > 1 else ""
    cell["lines"] = [show(cell["median"]) + spread]
    if len(values) < len(got) and not key.startswith("compile"):  # whose titles say it
        cell["lines"].append(f"in {len(values)} of {len(got)} runs")
    if entry is not reference and (versus := compare_entries(entry, reference, key, target)):
        cell["versus"] = versus
        cell["lines"].append(show_versus(versus, find_metric(key)[1]))
    return cell


def create_report(found, config, warnings=()):
    """All that the table, the files and the plots show, from records alone; raises BadInput"""
    entries = group_records(found)
    labels = [entry["label"] for entry in entries]
    check_reference(config.reference, labels)
    reference = entries[labels.index(config.reference) if config.reference else 0]
    lines = [[f"{len(entry['ok'])} of {len(entry['runs'])}"] for entry in entries]
    rows = [{"key": "", "title": "runs ok", "cells": [{"lines": line} for line in lines]}]
    footnotes, cells = {}, {}
    is_served = find_kind(found) == "latency"
    for key in list_batch_metrics(entries) if is_served else METRICS:
        title, how = find_metric(key)[:2]
        if key == "target_seconds" and config.target_accuracy is None:
            continue
        noted = dict(footnotes)
        made = [create_cell(e, reference, key, config.target_accuracy, noted) for e in entries]
        is_optional = key.startswith("compile") or (is_served and not key.endswith(" p50_ms"))
        if is_optional and not any(cell["values"] for cell in made):
            continue
        footnotes, cells[key] = noted, made
        title = title.format(config.target_accuracy or 0)
        rows.append({"key": key, "title": title, "how": how, "cells": made})
    report = {"entries": entries, "labels": labels, "reference": reference, "cells": cells}
    report["is_served"] = is_served
    if not is_served:
        report["break_even"] = describe_break_even(report)
        lines = [{"lines": [text]} for _, text in report["break_even"]]
        rows.insert(4, {"key": "", "title": "break-even with the reference", "cells": lines})
    fairness, deliberate, _ = check_fairness(entries, reference, is_served)
    report["parity"], is_broken = describe_parity(found, entries)
    fairness += [report["parity"]] if is_broken else []
    report |= {"rows": rows, "deliberate": deliberate, "is_broken": is_broken}
    report["footnotes"] = list(footnotes)
    left = sum(item["kind"] == "latency" for item in found) * (not is_served)
    other = [f"{left} records of serving are left out: put them into a file of their own"]
    report["warnings"] = [*warnings, *other[: bool(left)], *fairness, *collect_notes(entries)]
    report["failed"] = [
        f"{entry['label']} {repeat}{f', batch {size}' if size else ''}: {r['status']}: {r['error']}"
        for entry in entries
        for (_, repeat), run in entry["runs"].items()
        for size, r in list_parts(run).items()
        if r["status"] != "ok"
    ]
    report["conditions"] = []
    items = [item for entry in entries for item in entry["ok"].values()]
    versions = sorted({f"versions.{key}" for item in items for key in item["versions"]})
    for dotted in dict.fromkeys(["config.dataset", *SAME.split(), *versions]):
        values = {str(dig(item, dotted)) for item in items} - {"None"}
        report["conditions"] += [f"{dotted}: {', '.join(sorted(values))}"] if values else []
    versus = [cell["versus"] for row in cells.values() for cell in row if cell["versus"]]
    shares = {f"{item['coverage']:.0%}" for item in versus if item["coverage"]}
    legend = "Median and (min–max) over repeats; below it, against {}, the median over pairs{}.{}"
    report["legend"] = legend.format(
        reference["label"],
        f" and an interval that covers the truth in {' or '.join(sorted(shares))}"
        if shares
        else "",
        " No interval: fewer than 3 pairs (accuracy: or seeds)."
        if any(v["reason"] for v in versus)
        else "",
    )
    report["sentence"] = (write_serving_sentence if is_served else write_sentence)(report)
    return report


def list_batch_metrics(entries):
    """Keys of find_metric for each batch size that some entry ran"""
    runs = [run for entry in entries for run in entry["runs"].values()]
    sizes = sorted({size for run in runs for size in run["batches"] if size})
    return [f"{size} {name}" for size in sizes for name in LATENCY]


def choose_fastest(report, key):
    """(the fastest entry, the reference or if that is the fastest the next, compare_entries of
    them): by the medians, but what the pairs say goes before. None without two that have a speed;
    instead of the comparison None without a pair"""
    entries, cells = report["entries"], report["cells"][key]
    ranked = [index for index, cell in enumerate(cells) if cell["values"]]
    if len(ranked) < 2:
        return None
    ranked.sort(key=lambda index: -cells[index]["median"])
    other = entries.index(report["reference"])
    fast, slow = (entries[i] for i in (ranked[0], other if other in ranked[1:] else ranked[1]))
    speed = compare_entries(fast, slow, key)
    if speed and speed["estimate"] < 1:
        fast, slow, speed = slow, fast, compare_entries(slow, fast, key)
    return fast, slow, speed


def describe_inequality(report, pairs):
    """What makes comparisons of pairs of entries unfair, as the end of a sentence"""
    unequal = []
    for fast, slow in pairs:
        unequal += check_fairness([fast, slow], slow, report["is_served"])[2]
    unequal += ["what they compute"] if report["is_broken"] else []
    return f"; but unequal: {', '.join(dict.fromkeys(unequal))}" if unequal else ""


def write_serving_sentence(report):
    """For each batch size the entry with the highest throughput, see choose_fastest"""
    sentences, pairs = [], []
    for key in report["cells"]:
        size, _, name = key.partition(" ")
        found = choose_fastest(report, key) if name == "images_per_second" else None
        if not found or not found[2]:
            continue
        fast, slow, speed = found
        text = f"{fast['label']} serves {show_ratio(speed['estimate'])} times as many images/s as "
        text += f"{slow['label']}"
        text += f" ({show_interval(speed, 'ratio')})" if speed["low"] is not None else ""
        text += "" if speed["different"] else f", {speed['reason'] or 'no difference shown'}"
        sentences.append(f"batch {size}: {text}")
        pairs.append((fast, slow))
    if not sentences:
        return "nothing to compare: expected two entries with a common batch size"
    return "; ".join(sentences) + describe_inequality(report, pairs)


def describe_parity(found, entries):
    """(what parity.py has found, whether that is a difference): the check of each comparison that
    is reported on, else the newest that belongs to no comparison"""
    items = sorted((r for r in found if r["kind"] == "parity"), key=lambda item: item["started"])
    wanted = {f"{comparison}-parity" for entry in entries for comparison, _ in entry["runs"]}
    own = {item["id"]: item for item in items if item["id"] in wanted}
    items = list(own.values()) or [r for r in items if not r["id"].endswith("-parity")][-1:]
    if not items:
        return "parity: not checked", False
    for item in items:
        if item["quality"].get("is_same") is False:
            return f"parity: {item['quality'].get('sentence')}", True
    for item in items:
        if item["status"] != "ok":
            return f"parity: not checked: {item['error']}", False
    return f"parity: {items[-1]['quality'].get('sentence')}", False


def describe_break_even(report):
    """[(epochs or None, text), ...]: when an entry and the reference have cost the same"""
    cells, answers = report["cells"], []
    other = report["entries"].index(report["reference"])
    for index in range(len(report["entries"])):
        places = [(key, i) for i in (index, other) for key in ("start_seconds", "epoch_seconds")]
        medians = [cells[key][i]["median"] for key, i in places]
        if index == other or None in medians:
            answers.append((None, "the reference" if index == other else "not known"))
            continue
        versus = cells["epoch_seconds"][index]["versus"]
        if versus and versus["different"] is False:
            answers.append((None, "not known: no difference in an epoch shown"))
            continue
        epochs = find_break_even(*medians)
        lead = medians[2] + medians[3] - medians[0] - medians[1]
        if epochs is None:
            word = "ahead" if lead > 0 else "behind" if lead < 0 else "level"
            answers.append((None, f"{word} throughout"))
        else:
            word = "after" if medians[1] < medians[3] else "until"
            answers.append((epochs, f"ahead {word} {show(epochs)} epochs"))
    return answers


def write_sentence(report):
    """The fastest entry against the reference; if it is the reference, against the next"""
    found = choose_fastest(report, "images_per_second")
    if not found:
        cells = report["cells"]["images_per_second"]
        count = sum(bool(cell["values"]) for cell in cells)
        return f"nothing to compare: {count} of {len(cells)} entries have a measured speed"
    fast, slow, speed = found
    names = f"{fast['label']} and {slow['label']}"
    if not speed:
        return f"nothing to compare: no repeat of {names} has succeeded for both"
    repeats = "interleaved " if match_pairs(fast, slow)[1] else ""
    repeats = f"{speed['pairs']} {repeats}repeat{'s' if speed['pairs'] > 1 else ''}"
    interval = show_interval(speed, "ratio") or speed["reason"]
    if speed["different"] is False:
        text = f"no difference in training speed shown between {names} ({interval}, {repeats})"
    else:
        text = f"{fast['label']} trained {show_ratio(speed['estimate'])} times as fast as "
        text += f"{slow['label']} ({interval}, {repeats})"
    for key, name in (("device_peak_mib", "device"), ("host_peak_mib", "host")):
        if memory := compare_entries(fast, slow, key):
            text += f", with {show_ratio(memory['estimate'])} times the {name} memory"
            text += " (no difference shown)" if memory["different"] is False else ""
            break
    if accuracy := compare_entries(fast, slow, "test_accuracy_percent"):
        points = f"{accuracy['estimate']:+.1f} points ({show_interval(accuracy, 'difference')})"
        verdict = points if accuracy["different"] else accuracy["reason"] or "no difference shown"
        text += f"; accuracy: {fast['label']} " if accuracy["different"] else "; accuracy: "
        text += verdict
    return text + describe_inequality(report, [(fast, slow)])


# ---- Showing it ----------------------------------------------------------------------------------


def show(value, scale=1):
    """Three digits or so: 1,234  123  12.3  1.23  0.0123; a dash for None"""
    if value is None or isinstance(value, int):
        return "–" if value is None else str(value * scale)
    value *= scale
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}" if abs(value) >= 1 else f"{value:#.3g}"


def show_ratio(value):
    if value < 0.1:
        return f"{value:#.2g}"
    return f"{value:.3f}" if 0.95 < value < 1.05 else f"{value:.2f}"


def show_interval(versus, how):
    if versus["low"] is None:
        return ""
    if how == "ratio":
        return f"{show_ratio(versus['low'])}–{show_ratio(versus['high'])}"
    return f"{versus['low']:+.1f} to {versus['high']:+.1f}"


def show_versus(versus, how):
    estimate = versus["estimate"]
    text = f"{show_ratio(estimate)} times" if how == "ratio" else f"{estimate:+.1f} points"
    text += f" ({show_interval(versus, how)})" if versus["low"] is not None else ""
    verdict = "no difference shown" if versus["different"] is False else "no interval"
    return text if versus["different"] else f"{text}, {verdict}"


def print_report(report, console):
    """Warnings, metrics as rows with up to three entries as columns, last the sentence"""
    for line in report["warnings"]:
        console.print(f"warning: {line}")
    for line in report["deliberate"]:
        console.print(f"on purpose: {line}")
    for indices in np.array_split(range(len(report["labels"])), -(-len(report["labels"]) // 3)):
        columns = [Column(report["labels"][index], overflow="fold") for index in indices]
        table = Table("", *columns, show_lines=True)
        for row in report["rows"]:
            cells = ["\n".join(row["cells"][index]["lines"]) for index in indices]
            table.add_row(row["title"], *cells)
        console.print(table)
    console.print(report["legend"])
    console.print(report["parity"])
    for number, reason in enumerate(report["footnotes"], 1):
        console.print(f"({number}) {reason}")
    for line in report["failed"]:
        console.print(f"failed: {line}")
    console.print(report["sentence"])


def write_csv(report, path):
    """A line for each entry and metric: numbers in full, empty where there is none"""
    names = "estimate low high coverage pairs".split()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        header = "entry metric unit runs median min max how against".split()
        writer.writerow([*header, *(f"against_{name}" for name in names), "reason"])
        for row in report["rows"]:
            for label, cell in zip(report["labels"], row["cells"], strict=True):
                if row["key"]:
                    versus = cell["versus"] or {}
                    unit = re.split(", |: ", row["title"])[-1]
                    values = [len(cell["values"]), cell["median"], cell["low"], cell["high"]]
                    against = [row["how"], report["reference"]["label"]] if versus else ["", ""]
                    reason = cell["reason"] or versus.get("reason")
                    compared = [*against, *(versus.get(name) for name in names), reason]
                    writer.writerow([label, row["key"], unit, *values, *compared])


# ---- Plots ---------------------------------------------------------------------------------------


def look(index):
    return {"color": COLOURS[index % 7], "marker": MARKERS[(index + index // 7) % 7]}


def name_rows(axes, report):
    labels = [label.replace(":--", ": --").replace(" --", "\n--") for label in report["labels"]]
    labels = ["\n".join(textwrap.fill(x, 22) for x in label.split("\n")) for label in labels]
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def plot_repeats(axes, report, key="images_per_second"):
    """Each repeat a dot, a row an entry"""
    for index, cell in enumerate(report["cells"][key]):
        if cell["values"]:
            colour = look(index)["color"]
            axes.plot([cell["low"], cell["high"]], [index, index], color=colour, linewidth=2)
            axes.plot([cell["median"]] * 2, [index - 0.3, index + 0.3], color=colour, linewidth=3)
            heights = index + np.linspace(-0.2, 0.2, len(cell["values"]) + 2)[1:-1]
            axes.scatter(cell["values"], heights, 60, zorder=3, edgecolor="white", **look(index))
    name_rows(axes, report)
    values = [value for cell in report["cells"][key] for value in cell["values"]]
    is_wide = min(values, default=1) * 10 < max(values, default=1)
    axes.set(xlabel=find_metric(key)[0], xscale="log" if is_wide else "linear")


def plot_memory(axes, report):
    for key, shift in (("device_peak_mib", -0.2), ("host_peak_mib", 0.2)):
        for index, cell in enumerate(report["cells"][key]):
            if cell["values"]:
                colour, place = look(index)["color"], index + shift
                bar = {"facecolor": "white", "hatch": "//"} if shift > 0 else {"facecolor": colour}
                axes.barh(place, cell["median"], height=0.36, edgecolor=colour, **bar)
                text = f" {show(cell['median'])} {key.partition('_')[0]}"
                axes.annotate(text, (cell["median"], place), va="center")
    name_rows(axes, report)
    axes.margins(x=0.5)
    axes.set(xlabel="peak memory, MiB (host: hatched)")


def plot_curves(axes, report, over):
    runs = [list(entry["ok"].values()) for entry in report["entries"]]
    validated = any(dig(item, "quality.val_accuracy") for items in runs for item in items)
    name = "validation" if validated else "training"
    for index, (label, items) in enumerate(zip(report["labels"], runs)):
        for item in items:
            curve = dig(item, "quality.val_accuracy" if validated else "quality.accuracy") or []
            curve = np.array(curve, float) * 100  # null becomes nan
            seconds = np.cumsum(dig(item, "timing.epoch_seconds") or [])
            seconds += get_start(item, ("import", "build"))[0] or 0
            x = seconds if over == "s" else np.arange(1, len(curve) + 1)
            shown = min(len(x), len(curve))
            axes.plot(x[:shown], curve[:shown], label=label, alpha=0.7, **look(index))
            label = None  # one name for all repeats
    label = "epochs" if over == "epochs" else "import, build and training, s"
    axes.set(xlabel=label, ylabel=f"{name} accuracy, %")


def plot_latency(axes, report, name):
    """Medians over batch sizes, a line an entry, with what the repeats spread"""
    for index, label in enumerate(report["labels"]):
        found = [
            (int(key.split()[0]), cells[index])
            for key, cells in report["cells"].items()
            if key.endswith(f" {name}") and cells[index]["values"]
        ]
        sizes = [size for size, _ in found]
        cells = [cell for _, cell in found]
        axes.plot(sizes, [cell["median"] for cell in cells], label=label, **look(index))
        spread = ([cell[end] for cell in cells] for end in ("low", "high"))
        axes.fill_between(sizes, *spread, alpha=0.2, color=look(index)["color"])
    sizes = sorted({int(key.split()[0]) for key in report["cells"]})
    axes.set(xlabel="batch size", ylabel=LATENCY[name][0], xscale="log", yscale="log")
    axes.set_xticks(sizes, sizes)


def plot_throughput(axes, report):
    """Throughput against latency, a point a batch size"""
    for index, label in enumerate(report["labels"]):
        cells = report["cells"]
        sizes = [key.split()[0] for key in cells if key.endswith(" p50_ms")]
        points = [
            [cells[f"{size} {name}"][index]["median"] for name in ("p50_ms", "images_per_second")]
            for size in sizes
        ]
        known = [(size, point) for size, point in zip(sizes, points) if None not in point]
        if known:
            axes.plot(*zip(*(point for _, point in known)), label=label, **look(index))
        for size, point in known:
            axes.annotate(size, point, xytext=(4, 4), textcoords="offset points", fontsize=10)
    axes.set(xlabel="p50, ms", ylabel="images/s", xscale="log")


def plot_cost(axes, report):
    cells, met = report["cells"], [epochs for epochs, _ in report["break_even"] if epochs]
    items = [item for entry in report["entries"] for item in entry["ok"].values()]
    ran = max([len(dig(item, "timing.epoch_seconds") or []) for item in items], default=1)
    end = max([ran, *(1.4 * epochs for epochs in met if epochs < 20 * ran)])
    for index, label in enumerate(report["labels"]):
        start, epoch = (cells[key][index]["median"] for key in ("start_seconds", "epoch_seconds"))
        if None in (start, epoch):
            continue
        epochs = report["break_even"][index][0]
        name = f"{label}: {show(start)} s + {show(epoch)} s an epoch"
        name += f"; break-even at {show(epochs)} epochs" if epochs else ""
        axes.plot([0, end], [start, start + end * epoch], label=name, **look(index))
        if epochs and epochs <= end:
            line = [[epochs] * 2, [0, start + epochs * epoch]]
            axes.plot(*line, ":*", color="black", markersize=14, markevery=[1])
    axes.set(xlabel="epochs", ylabel="import, build, compile\nand training, s", ylim=(0, None))


def number_log_axis(axis):
    """Ticks with plain numbers on a logarithmic axis, also where it spans no power of ten"""
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, StrMethodFormatter

    if not isinstance(axis.get_major_locator(), FixedLocator):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.minorticks_off()


def draw(plot, report, *arguments, form="svg"):
    """Bytes of one plot, 5 inches wide in 12 points: legible on a phone"""
    import matplotlib  # only where a report is written: its import takes most of a second
    from matplotlib.figure import Figure

    count = len(report["labels"])
    height = 1.2 + 0.7 * count if plot in (plot_repeats, plot_memory) else 3.4 + 0.35 * count
    with matplotlib.rc_context({"font.size": 12, "svg.hashsalt": "compare"}):
        figure = Figure(figsize=(5, height), layout="constrained", dpi=200)
        axes = figure.add_subplot()
        plot(axes, report, *arguments)
        if axes.get_xscale() == "linear":
            axes.set_xlim(0, axes.get_xlim()[1] * 1.03)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                number_log_axis(axis)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            labels = [textwrap.fill(label, 42) for label in labels]
            figure.legend(handles, labels, loc="outside upper center", fontsize=11)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else None)
    return buffer.getvalue()


def list_plots(report):
    """{title: (function, arguments beside axes and report)}, the most telling first"""
    if not report["is_served"]:
        return {
            "Training speed: each repeat a dot, the bar the median": (plot_repeats,),
            "Peak memory, medians": (plot_memory,),
            "Accuracy over epochs, each repeat a line": (plot_curves, "epochs"),
            "Accuracy over seconds, each repeat a line": (plot_curves, "s"),
            "Cost of starting, cost per epoch": (plot_cost,),
        }
    names = ("p50_ms", "p99_ms", "images_per_second")
    sizes = {key.split()[0] for key in report["cells"]}
    if len(sizes) == 1:
        keys = {LATENCY[name][0]: f"{min(sizes)} {name}" for name in names}
        return {
            f"{title}: each repeat a dot, the bar the median": (plot_repeats, key)
            for title, key in keys.items()
            if key in report["cells"]
        }
    plots = {
        f"{LATENCY[name][0]} over batch sizes, median and range": (plot_latency, name)
        for name in names
    }
    return plots | {"Throughput against latency, a point a batch size": (plot_throughput,)}


def write_report(report, folder):
    """report.html (one page, nothing from elsewhere), report.md, .csv, .svg and .png"""
    import jinja2

    folder.mkdir(parents=True, exist_ok=True)
    shown = list_plots(report)
    plots = {title: draw(plot, report, *given) for title, (plot, *given) in shown.items()}
    (folder / "report.svg").write_bytes(next(iter(plots.values())))
    plot, *given = next(iter(shown.values()))
    (folder / "report.png").write_bytes(draw(plot, report, *given, form="png"))
    write_csv(report, folder / "report.csv")
    pictures = {title: base64.b64encode(plot).decode() for title, plot in plots.items()}
    loader = jinja2.FileSystemLoader(ROOT / "harness")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    used = {"show": show, "dig": dig, "list_parts": list_parts}
    for form in ("html", "md"):
        template = environment.get_template(f"compare_report.{form}.j2")
        text = template.render(report=report, pictures=pictures, **used)
        if form == "md":  # it has no tags with attributes, where alone quotes could do harm
            text = text.replace("&#39;", "'").replace("&#34;", '"')
        (folder / f"report.{form}").write_text(text, encoding="utf-8")


def upload_report(report, folder, paths):
    """A W&B run that shows the page and holds its files and the records; raises BadInput"""
    nodes = {entry["node"] for entry in report["entries"]} - {""}
    names = {label.partition(":")[0] for label in report["labels"]}
    try:
        run = tracking.start_run(
            "leave out --wandb",
            project=os.environ.get("WANDB_PROJECT") or tracking.PROJECT,
            job_type="comparison",
            group="comparisons",
            tags=tracking.cut_tags(sorted(names | nodes)),
        )
    except ValueError as error:
        raise BadInput(str(error)) from error
    with tracking.forgiving("the report was not uploaded"):
        figures = {
            f"{row['key']}/{label}": cell["median"]
            for row in report["rows"]
            for label, cell in zip(report["labels"], row["cells"])
            if row["key"] and cell["median"] is not None
        }
        run.summary.update({**figures, "sentence": report["sentence"]})
        tracking.log_page(run, "report", (folder / "report.html").read_text(encoding="utf-8"))
    files = {path.name: path.read_bytes() for path in [*folder.glob("report.*"), *paths]}
    tracking.finish_run(run, "comparison", files)


# ---- Main ----------------------------------------------------------------------------------------


def report_on(paths, config, console, comparison=""):
    """Shows and writes the report on the files' records (of one comparison); returns it"""
    loaded = [load(path) for path in paths]
    found = [item for items, _ in loaded for item in items if item["id"].startswith(comparison)]
    report = create_report(found, config, [line for _, lines in loaded for line in lines])
    print_report(report, console)
    with tempfile.TemporaryDirectory() as folder:
        folder = config.report or Path(folder)
        if config.report or config.wandb:
            write_report(report, folder)
        if config.wandb:
            upload_report(report, folder, paths)
    if config.report:
        console.print(f"report: {config.report / 'report.html'}, .md, .csv, .svg, .png")
    return report


def run_comparison(config, work, console):
    """Measures and reports; returns the exit status"""
    if config.repeats < 1:
        raise BadInput(f"expected --repeats of at least 1, got {config.repeats}")
    if fixed := list_flags(work) & {"results-path", "keras-backend"}:
        raise BadInput(f"--{min(fixed)} cannot stand after --; use --results-path or --backends")
    entries = choose_entries(config)
    if config.start_together and (config.launcher or serves(config) or config.find_memory):
        raise BadInput("--start-together: expected runs of vit.py without --launcher")
    if config.find_memory:
        found = {
            "--memory-limit": "memory-limit" in list_flags(work),
            "--resume": config.resume,
            "--report": config.report,
            "--wandb": config.wandb,
            "--script": serves(config),
            **{entry["label"]: SUBJECTS[entry["name"]][2] for entry in entries},
        }
        fixed = [name for name, is_given in found.items() if is_given]
        if fixed:
            raise BadInput(f"--find-memory trains with vit.py and prints: leave out {fixed[0]}")
    default = MEMORY_WORK if config.find_memory else DEFAULT_WORK
    work = work or ([] if serves(config) else default)
    if config.find_memory:  # the first runs are those without a limit
        config = dataclasses.replace(config, repeats=1)
        work = work if "seed" in list_flags(work) else [*work, "--seed", "0"]
    comparison, path = choose_comparison(entries, config, work)
    plan = create_plan(entries, config, work, path, comparison)
    if config.dry_run:
        print("\n".join(shlex.join(run["command"]) for run in plan))
        return 0
    make_folder(path.parent, "--results-path")
    if config.find_memory:
        return 0 if find_memory(entries, config, work, path, comparison, console) else 1
    check_parity(entries, config, work, path, comparison, console)
    if not measure(plan, path, config, console):
        return 130
    return 1 if report_on([path], config, console, comparison)["failed"] else 0


def main(argv=None):
    """Returns the exit status: see above"""
    argv = sys.argv[1:] if argv is None else argv
    own, work = split_words(argv)
    config = tyro.cli(CompareConfig, args=own)
    console = Console(highlight=False, markup=False, emoji=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is a Ctrl-C
    try:
        if config.report:
            make_folder(config.report, "--report")
        if config.target_accuracy is not None and not 0 < config.target_accuracy <= 1:
            raise BadInput(f"expected --target-accuracy of 0 to 1, got {config.target_accuracy}")
        if not config.records:
            return run_comparison(config, work, console)
        if work or config.entries or config.backends or config.resume or config.dry_run:
            raise BadInput("files are reported on, not measured; leave out --entries and the like")
        report_on(config.records, config, console)
        return 0
    except BadInput as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk
        text = (
            f"{error.filename or 'a file'} was not written: {error.strerror}; the records before "
        )
        print(f"compare.py: {text}it are kept, report on them once there is room", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
