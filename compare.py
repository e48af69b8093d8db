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

How records become an answer with its uncertainty is told at the top of harness/verdict.py.
Exit status: 0 every run ok, 1 some run failed or a file could not be written, 2 bad input, 130
interrupted.
"""

import collections
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from harness import environment, tracking
from harness.cli import BadInput, list_flags, split_words
from harness.ending import KILLED, OUT_OF_MEMORY
from harness.record import (
    RecordError,
    append_loss,
    append_record,
    create_record,
    dig,
    read_records,
)
from harness.report import print_report, write_report
from harness.verdict import (
    check_reference,
    count_rows,
    create_report,
    find_done,
    parse_id,
    show,
)

ROOT = Path(__file__).resolve().parent
KERAS_IO = "peers/keras_io.py"
SUBJECTS = {  # name: (module and pip extra, {image} of the launcher, program; None is --script)
    "jax": ("jax", "jax", None),
    "torch": ("torch", "pytorch", None),
    "tensorflow": ("tensorflow", "tensorflow", None),
    "native-jax": ("jax", "jax", "peers/native_jax.py"),
    "native-torch": ("torch", "pytorch", "peers/native_torch.py"),
    "keras-io-jax": ("jax", "jax", KERAS_IO),
    "keras-io-torch": ("torch", "pytorch", KERAS_IO),
}
MEMORY_WORK = shlex.split(  # of three steps the last is PyTorch's CUDA graph on a GPU
    "--dataset synthetic --train-images 768 --test-images 100 --validation-split 0 --num-epochs 1"
)
MEMORY_PRECISION = 1.05  # that a limit is known to
DEFAULT_WORK = shlex.split(  # 20 to 30 s a run on 2 CPU cores
    "--dataset synthetic --num-classes 10 --train-images 1000 --test-images 500 --num-epochs 4"
    " --batch-size 64 --image-size 32 --patch-size 4 --transformer-layers 4 --mlp-head-units 256"
)


@dataclass
class CompareConfig:
    """The same work on each backend, interleaved and repeated. Flags for vit.py come after --"""

    records: tyro.conf.Positional[tuple[Path, ...]] = ()  # report on these files, measure nothing
    backends: tuple[str, ...] = ()  # jax, torch, tensorflow (default: the installed ones)
    entries: tuple[str, ...] = ()  # backends, native-jax, keras-io-jax ...; flags after a colon
    repeats: int = 3  # runs of each entry; an interval needs 3
    reference: str = ""  # entry that the others are compared with (default: the first)
    cool_down: float = 0.0  # seconds to wait between runs
    start_together: int = 1  # so many runs compile at once, untimed, and are measured in turn
    results_path: Path | None = None  # file of the runs (default: results/compare-ID.jsonl)
    resume: bool = False  # go on with the newest comparison that this command began
    dry_run: bool = False  # print the commands in their order
    launcher: str = ""  # stands before each command; {image} is jax, pytorch or tensorflow
    script: str = "vit.py"  # what backends run, e.g. another checkout's vit.py
    find_memory: bool = False  # instead: the smallest --memory-limit that each entry trains in
    parity: bool = True  # first see by parity.py whether the backends compute the same
    target_accuracy: float | None = None  # report the time to this validation accuracy, 0 to 1
    report: Path | None = None  # folder for report.html, .md, .csv, .svg, .png; accuracy.svg
    wandb: bool = False  # upload the report to Weights & Biases
    verbose: bool = False  # show the output of the runs


MEASURES = "entries backends resume dry_run find_memory launcher results_path".split()


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
    if serves(config) and program == KERAS_IO:
        raise BadInput(f"entry {text!r}: is there to be trained, not to be served; leave it out")
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
    before = len(load(path, new=True)[0])
    started = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    returncode, last_line, interrupted = run_child(run["command"], run["id"], verbose, turn)
    found = load(path, new=True)[0][before:]
    own = [item for item in found if item["id"].partition("~")[0] == run["id"]]
    if own and (interrupted or len({item["id"] for item in own}) >= count_rows(own)):
        return own[-1], interrupted
    status, error = "error", last_line or "it left neither record nor message; see --verbose"
    if own:  # a serving run's first rows: the loss is of now, after these
        error = f"{len(own)} of {count_rows(own)} rows were measured: {error}"
    if interrupted:
        status, error = "interrupted", "stopped before it wrote a record"
    elif returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        status, error = "oom", KILLED
    elif any(sign in error for sign in OUT_OF_MEMORY):
        status = "oom"
    elif foreign := [item["id"] for item in found if not parse_id(item["id"])]:
        error = f"its record has the id {foreign[-1]} instead of VIT_RECORD_ID's"
    told = {"status": status, "error": error, "argv": run["command"], "backend": run["name"]}
    told |= {} if own else {"started": started}
    return append_loss(path, run["kind"], id=run["id"], **told), interrupted


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
            ended = [one.result()[0] for one, turn in zip(begun, turns) if not turn.exists()]
            if impatient := [item for item in ended if item["status"] == "ok"]:
                error = "--start-together: expected --num-epochs 2 or more, got a run that did not "
                error += "wait for its turn, so that its speed is wrong"
                for item in impatient:
                    told = {key: item[key] for key in ("id", "argv", "backend")}
                    append_loss(path, "train", status="error", error=error, **told)
                raise BadInput(error)
            for one, turn in zip(begun, turns):
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
    if (size := config.start_together) > 1:
        groups = (todo[first : first + size] for first in range(0, len(todo), size))
        results = itertools.chain.from_iterable(
            measure_together(runs, path, config) for runs in groups
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
        taken = dig(free, "memory.device_peak_bytes") or dig(free, "memory.host_peak_bytes")
        if free["status"] == "ok":
            least, most = bisect_memory(functools.partial(fits, runs), (taken or 2e9) / 1e9)
        found.append(least)
        figures = (least, most, taken and taken / 1e9)
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


# ---- Main ----------------------------------------------------------------------------------------


def upload_report(report, folder, paths):
    """A W&B run that shows the page in `folder` and holds the files of `paths`; raises BadInput"""
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
    tracking.finish_run(run, "comparison", {path.name: path.read_bytes() for path in paths})


def report_on(paths, config, console, comparison=""):
    """Shows and writes the report on the files' records (of one comparison); returns it"""
    loaded = [load(path) for path in paths]
    found = [item for items, _ in loaded for item in items if item["id"].startswith(comparison)]
    report = create_report(found, config, [line for _, lines in loaded for line in lines])
    print_report(report, console)
    with tempfile.TemporaryDirectory() as folder:
        folder = config.report or Path(folder)
        if config.report or config.wandb:
            paths = [*write_report(report, folder), *paths]
        if config.wandb:
            upload_report(report, folder, paths)
    if config.report:
        accuracy = "" if report["is_served"] else "; accuracy.svg"
        console.print(f"report: {config.report / 'report.html'}, .md, .csv, .svg, .png{accuracy}")
    return report


def run_comparison(config, work, console):
    """Measures and reports; returns the exit status"""
    if config.repeats < 1:
        raise BadInput(f"expected --repeats of at least 1, got {config.repeats}")
    if fixed := list_flags(work) & {"results-path", "keras-backend"}:
        raise BadInput(f"--{min(fixed)} cannot stand after --; use --results-path or --backends")
    entries = choose_entries(config)
    if not 0 <= config.cool_down < float("inf"):
        raise BadInput(f"expected --cool-down of 0 seconds or more, got {config.cool_down}")
    if config.start_together < 1:
        raise BadInput(f"expected --start-together of at least 1, got {config.start_together}")
    if config.start_together > 1 and (config.launcher or serves(config) or config.find_memory):
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
    environment.read_dotenv()  # for all that it starts, too
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
        if work or any(getattr(config, name) for name in MEASURES):
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
