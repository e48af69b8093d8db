"""Records: what a measured run leaves behind, one JSON object a line of a JSON-lines file.

Reports are made from such files alone, on any machine. A value that is not known is null, and a
note says why: it begins with the dotted name of the value, or of its group, and a colon.

    "memory.device_peak_bytes: JAX reports no memory statistics on the CPU"
    "energy: no readable power sensor"
"""

import errno
import json
import math
import os
import re
import stat
import sys
import textwrap
import time
import uuid
from contextlib import suppress
from pathlib import Path

SCHEMA = 1  # goes up when the meaning of a key changes
KINDS = ("train", "pretrain", "latency", "parity")
STATUSES = ("ok", "oom", "diverged", "interrupted", "error")
TYPES = {  # every top-level key, in the order in which it is written, and what it may hold
    "schema": (int,),
    "kind": (str,),
    "status": (str,),
    "error": (str, type(None)),
    "id": (str,),
    "started": (str,),
    "argv": (list,),
    "config": (dict,),
    "backend": (str, type(None)),
    "device": (dict,),
    "versions": (dict,),
    "git": (dict,),
    "precision": (str, type(None)),
    "model": (dict,),
    "timing": (dict,),
    "memory": (dict,),
    "energy": (dict,),
    "quality": (dict,),
    "notes": (list,),
}
KEYS = tuple(TYPES)
# A null in one of these needs a reason; in `error` and `config` it means "none".
EXPLAINED = KEYS[KEYS.index("backend") : KEYS.index("notes")]
MEASURED = {  # kind of record: its groups, and what a run may find out for each
    "train": {
        "model": ("parameters", "flops_per_image"),
        "timing": (
            *("import_seconds", "data_seconds", "build_seconds", "start_seconds"),
            *("compile_seconds", "compile_cache", "epoch_seconds", "validation_seconds"),
            *("train_images_per_second", "matmul_flops_per_second", "mfu"),
            *("evaluation_seconds", "total_seconds"),
        ),
        "memory": (
            *("device_peak_bytes", "device_peak_source", "host_peak_bytes", "host_import_bytes"),
        ),
        "energy": ("joules", "joules_per_image", "source", "window_seconds", "rails"),
        "quality": (
            *("dataset", "data_fingerprint", "train_images", "validation_images", "test_images"),
            *("loss", "accuracy", "top5_accuracy"),
            *("val_loss", "val_accuracy", "val_top5_accuracy"),
            *("test_accuracy", "test_top5_accuracy", "best_epoch"),
        ),
    },
}
MEASURED["latency"] = {
    "model": ("parameters", "flops_per_image", "input_shape"),
    "timing": (
        *("import_seconds", "build_seconds", "compile_seconds", "compile_cache"),
        *("iteration_seconds", "p50_seconds", "p90_seconds", "p95_seconds", "p99_seconds"),
        *("mean_seconds", "std_seconds", "copy_seconds", "images_per_second"),
        *("matmul_flops_per_second", "mfu", "total_seconds"),
    ),
    "memory": MEASURED["train"]["memory"],
    "energy": MEASURED["train"]["energy"],
}
MEASURED["parity"] = {"model": ("parameters",)}  # and what a comparison of backends finds
MEASURED["pretrain"] = {  # the same, but that nothing is classified
    **MEASURED["train"],
    "timing": tuple(name for name in MEASURED["train"]["timing"] if name != "evaluation_seconds"),
    "quality": MEASURED["train"]["quality"][: MEASURED["train"]["quality"].index("accuracy")],
}

# What a report computes with, by dotted names: lists of numbers, and numbers.
LISTS = re.compile(
    r"timing\.(load_)?(epoch|validation|iteration)_seconds"
    r"|quality\.(val_)?(loss|accuracy|top5_accuracy)"
)
NUMBERS = re.compile(
    r"timing\.(?!compile_cache$).+|memory\..+_bytes|energy\.(joules.*|window_seconds)"
    r"|model\.(parameters|bytes_on_disk|.+_per_image)|config\.(batch_size|rows|seed)"
    r"|quality\.(test_.+|best_epoch|.+_images|logits_difference)"
)
TOGETHER = "it began together with other runs, which compiled at the same time"
LARGEST = 1e100  # beyond it sums might be no numbers any more


class RecordError(ValueError):
    """A file of records that cannot be used at all; the message is one line with the remedy."""


def create_record(kind, **fields):
    """A record with every top-level key: groups empty, status "error" until someone sets it.

    `started` is now, in UTC (ISO 8601, whole seconds), `id` VIT_RECORD_ID's, else a new one.
    ValueError: an unknown kind or field.
    """
    unknown = sorted(set(fields) - set(KEYS))
    if kind not in KINDS or unknown:
        what = f"fields {', '.join(unknown)}" if unknown else f"kind {kind!r}"
        raise ValueError(f"expected a kind of {', '.join(KINDS)} and fields of KEYS, got {what}")
    record = {key: None if type(None) in types else types[0]() for key, types in TYPES.items()}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    name = os.environ.get("VIT_RECORD_ID") or uuid.uuid4().hex  # a comparison names its runs
    record |= {"schema": SCHEMA, "kind": kind, "status": "error", "id": name}
    return record | {"started": started, "argv": list(sys.argv)} | fields


def append_loss(path, kind, **fields):
    """Append the record of a run that could write none itself, and return it. Raises OSError."""
    report = create_record(kind, **fields)
    missing = [key for key in ("backend", "precision") if report[key] is None]
    report["notes"] = [f"{key}: the run left no record" for key in missing]
    append_record(path, report)
    return report


def note_loss(path, kind, **fields):
    """`append_loss`, from which the record comes back even where it could not be written."""
    try:
        return append_loss(path, kind, **fields)
    except OSError as problem:
        program = Path(sys.argv[0]).name
        print(f"{program}: the record could not be written: {problem}", file=sys.stderr)
        return create_record(kind, **fields)


def begin_record(kind, *, config, backend, precision, machine, gpu_name, versions, git):
    """A record with all that is known before a run; every figure of MEASURED is still null.

    Args:
        config: every choice, by name; `node_name` and `precision` are among them.
        precision: what matrix products really run in.
        machine, versions, git: as harness/telemetry.py tells them, each with its "notes".
        gpu_name: None where the backend computes on the CPU.
    """
    facts = (machine, versions, git)
    notes = [note for group in facts for note in group["notes"]]
    device, versions, git = ({k: v for k, v in group.items() if k != "notes"} for group in facts)
    device |= {"kind": "gpu" if gpu_name else "cpu", "node_name": config["node_name"]}
    device["name"] = gpu_name or device["cpu_name"]
    if precision != config["precision"]:
        asked = config["precision"]
        notes.append(f"precision: {asked} asked, but a CPU has only {precision} for it")
    return create_record(
        kind,
        config=config,
        backend=backend,
        precision=precision,
        device=device,
        versions=versions,
        git=git,
        notes=notes,
        **{group: dict.fromkeys(names) for group, names in MEASURED[kind].items()},
    )


def finish_record(
    record,
    status,
    error,
    *,
    matmul,
    compiled_files,
    device_peak,
    host_peak_bytes,
    total_seconds,
    warnings,
):
    """The last figures, and a reason for each that is missing.

    Args:
        matmul: (operations a second that the device attains in a large matrix product, None), or
            (None, why not). Where a model was trained, a step counts as three forward passes
            (Chowdhery et al. 2022, PaLM, appendix B: model FLOPs utilisation).
        compiled_files: how many the compilation cache held before and after the run.
        device_peak: (bytes, source), or (None, why not).
        warnings: what disturbed the run.
    """
    record["status"], record["error"] = status, error
    notes, timing, memory = record["notes"], record["timing"], record["memory"]
    before, after = compiled_files
    if os.environ.get("VIT_TURN"):
        for name in ("import", "data", "build", "start", "compile"):
            timing[f"{name}_seconds"] = None
            notes.append(f"timing.{name}_seconds: {TOGETHER}")
        notes.append(f"timing.compile_cache: {TOGETHER}")
    elif after == 0:
        notes.append("timing.compile_cache: nothing was compiled for later runs")
    else:
        timing["compile_cache"] = "warm" if after == before else "cold"
    memory["host_peak_bytes"] = host_peak_bytes
    memory["device_peak_bytes"], told = device_peak
    if memory["device_peak_bytes"] is None:
        notes += [f"memory.device_peak_bytes: {told}", f"memory.device_peak_source: {told}"]
    else:
        memory["device_peak_source"] = told
    timing["total_seconds"] = total_seconds
    is_served = record["kind"] == "latency"
    passes, name = (1, "images_per_second") if is_served else (3, "train_images_per_second")
    rate, flops = timing[name], record["model"]["flops_per_image"]
    timing["matmul_flops_per_second"], reason = matmul
    if rate and flops and timing["matmul_flops_per_second"]:
        timing["mfu"] = passes * flops * rate / timing["matmul_flops_per_second"]
    elif status == "ok":
        notes.append(f"timing.mfu: {reason or 'speed or operations are not known'}")
    if reason:
        notes.append(f"timing.matmul_flops_per_second: {reason}")
    notes += warnings
    if status != "ok":
        groups = dict.fromkeys(name.split(".")[0] for name in find_unexplained(record))
        notes += [f"{group}: the run ended ({status}) before it was measured" for group in groups]


def deliver_record(path, record, is_shown):
    """Append a finished record, and tell a person how the run ended: where it failed on stderr,
    and where `is_shown` in a summary; nobody may be there to read it. Returns whether the record
    was written."""
    program, written, told = Path(sys.argv[0]).name, path, []
    if record["status"] != "ok":
        told.append(f"{program}: {record['status']}: {record['error']}")
    try:
        append_record(path, record)
    except OSError as problem:
        told.append(f"{program}: the record could not be written: {problem}")
        written = f"not written: {problem}"
    with suppress(BrokenPipeError):
        for line in told:
            print(line, file=sys.stderr)
    if is_shown:
        left = [f"  {note}" for note in record["notes"] if note.startswith("not written: ")]
        try:
            print(summarize(record), f"  {'record':<14} {written}", *left, sep="\n", flush=True)
        except BrokenPipeError:  # and nothing is left to be flushed at the end
            sys.stdout = open(os.devnull, "w")
    return written == path


def check_record(record):
    """What is wrong with a record: a list of one-line strings, empty for a good one.

    Keys, types, kind, status and schema; then every null that no note explains.
    """
    problems = check_structure(record)
    if problems:
        return problems
    return [
        f'{name} is null without a reason: add a note "{name}: why"'
        for name in find_unexplained(record)
    ]


def find_unexplained(record):
    """Dotted names of the nulls that no note explains."""
    names = dict.fromkeys(name for key in EXPLAINED for name in _find_nulls(record[key], key))
    return [name for name in names if reason_for(record, name) is None]


def check_structure(record):
    """The part of `check_record` that a reader depends on: everything but the nulls' reasons."""
    if not isinstance(record, dict):
        return [f"expected a JSON object, got {type(record).__name__}"]
    schema = record.get("schema")
    if type(schema) is int and schema > SCHEMA:  # its keys may differ: nothing else is worth saying
        return [f"schema {schema} is newer than this program's {SCHEMA}: update the program"]
    problems = [f"key {key!r} is missing" for key in KEYS if key not in record]
    problems += [f"key {str(key)[:40]!r} is unknown" for key in record if key not in TYPES]
    for key, types in TYPES.items():
        if key in record and (not isinstance(record[key], types) or record[key] is True):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            problems.append(f"{key}: expected {expected}, got {type(record[key]).__name__}")
    if problems:
        return problems
    for key, known in (("schema", (SCHEMA,)), ("kind", KINDS), ("status", STATUSES)):
        if record[key] not in known:
            expected = ", ".join(map(str, known))
            problems.append(f"{key}: expected {expected}, got {str(record[key])[:40]!r}")
    for key in ("argv", "notes"):
        if not all(isinstance(value, str) for value in record[key]):
            problems.append(f"{key}: expected a list of strings")
    for group in ("config", "model", "timing", "memory", "energy", "quality"):
        for field, value in record[group].items():
            name = f"{group}.{field}"
            if LISTS.fullmatch(name):
                if not (value is None or isinstance(value, list) and all(map(_is_number, value))):
                    problems.append(f"{name}: expected a list of numbers")
            elif NUMBERS.fullmatch(name) and not _is_number(value):
                problems.append(f"{name}: expected a number, got {str(value)[:40]!r}")
    return problems


def _is_number(value):
    return value is None or isinstance(value, int | float) and abs(value) < LARGEST


def reason_for(record, name):
    """Why `name` (dotted: "memory.device_peak_bytes") is null, or None when no note says so.

    The most specific note wins: the field's own, then its parents'.
    """
    while name:
        for note in record["notes"]:
            if isinstance(note, str) and note.startswith(name + ":"):
                return note[len(name) + 1 :].strip()
        name = name.rpartition(".")[0]
    return None


def dig(record, dotted):
    """The value at "timing.compile_seconds", None where any part of the way is missing"""
    for key in dotted.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def summarize(record):
    """A training record in at most ten lines that a person can read."""
    timing, quality = record["timing"], record["quality"]
    versions, device = record["versions"], record["device"]
    lines = [
        f"{record['backend']} {versions.get(record['backend'].rpartition('-')[2], '')}, "
        f"keras {versions['keras']}, "
        f"{record['precision']}, on {device['name']} ({device['kind']})"
    ]

    def show(label, group, name, form):
        value = record[group][name]
        missing = f"not measured: {reason_for(record, f'{group}.{name}')}"
        missing = textwrap.shorten(missing, 62, placeholder=" ...")  # the record has it all
        lines.append(f"  {label:<14} {missing if value is None else form(value)}")

    def seconds(name):
        return "?" if timing[name] is None else f"{timing[name]:.1f} s"

    def test(accuracy):
        top5, epoch = quality["test_top5_accuracy"], quality["best_epoch"]
        both = f"{accuracy:.2%}" if top5 is None else f"{accuracy:.2%}, top-5 {top5:.2%}"
        return f"{both} (epoch {epoch}: {quality['dataset']})"

    def speed(rate):
        share = timing.get("mfu")  # records made before it was measured have none
        used = f", {share:.0%} of matmul peak" if share else ""
        size = record["config"].get("batch_size") or 1  # a smaller last batch is left out
        seconds = quality["train_images"] // size * size / rate
        return f"{rate:,.1f} images/s, {seconds:.1f} s an epoch{used}"

    def compilation(value):
        names = ("import", "data", "build")
        before = ", ".join(f"{name} {seconds(f'{name}_seconds')}" for name in names)
        cache = f" ({timing['compile_cache']} cache)" if timing["compile_cache"] else ""
        return f"compile {value:.1f} s{cache}, {before}"

    def energy(joules):
        return f"{1e3 * joules:.1f} mJ an image ({record['energy']['source']})"

    def size(value):
        return f"{value / 1e9:.2f} GB at its peak"

    if "test_accuracy" in quality:
        show("test accuracy", "quality", "test_accuracy", test)
    show("training", "timing", "train_images_per_second", speed)
    show("start-up", "timing", "compile_seconds", compilation)
    show("host memory", "memory", "host_peak_bytes", size)
    show("device memory", "memory", "device_peak_bytes", size)
    show("energy", "energy", "joules_per_image", energy)
    return "\n".join(lines)


def dump_record(record):
    """A record from `create_record` as a line of JSON.

    Tuples become lists; paths, NumPy scalars and arrays plain values; non-finite floats null (JSON
    has none), with a note where none explains them. TypeError: it holds something that JSON cannot.
    """
    lost = {}
    plain = _make_plain(record, "", lost)
    for name, value in lost.items():
        if reason_for(plain, name) is None:
            plain["notes"].append(f"{name}: not a finite number ({value})")
    return json.dumps(plain, allow_nan=False) + "\n"


def append_record(path, record):
    """Add a record to a JSON-lines file, as `dump_record` writes it, whole or not at all.

    Many processes may do so at once. Earlier lines are never touched: after a torn last line a new
    one is begun.
    OSError: the line could not be written whole (the disk is full, say); the file is as it was.
    """
    import fcntl  # here, because reading records must also work where there is no fcntl (Windows)

    line = dump_record(record).encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        about = os.fstat(file)
        size = about.st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        try:
            if os.write(file, line) != len(line):
                raise OSError(errno.ENOSPC, "the record did not fit", str(path))
            if stat.S_ISREG(about.st_mode):  # no disk keeps /dev/null
                os.fsync(file)
        except OSError:
            # The first error is the one to tell; a torn line is healed above.
            with suppress(OSError):
                os.ftruncate(file, size)
            raise
    finally:
        os.close(file)  # also gives the lock back


def read_records(path):
    """A file's (records, problems): a problem is one line of text that names a skipped line.

    RecordError: the file is missing, unreadable or empty. No content, however broken, raises more.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        got = error.strerror or error
        raise RecordError(
            f"{path}: expected a file of records, got {got}: check the path"
        ) from error
    if not content.strip():
        raise RecordError(f"{path}: expected records, got an empty file: measure something first")
    records, problems = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode(), parse_constant=_refuse_constant)
            found = check_structure(record)
        except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueErrors
            found = [f"not JSON ({getattr(error, 'msg', error)})"]
        if found:
            problems.append(f"{path.name} line {number}: {'; '.join(found)[:300]}: skipped")
        else:
            records.append(record)
    return records, problems


def _refuse_constant(name):
    raise ValueError(f"{name} is no JSON value")  # Python's parser would take NaN and Infinity


def _find_nulls(value, name):
    """Dotted names of the nulls in `value`; a null in a list goes by the list's name."""
    if value is None:
        yield name
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _find_nulls(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _find_nulls(inner, name)


def _make_plain(value, name, lost):
    """`value` in JSON's own types; `lost` collects the non-finite floats by dotted name."""
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return {str(k): _make_plain(v, f"{prefix}{k}", lost) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_make_plain(inner, name, lost) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        lost[name] = float(value)
        return None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy, JAX and torch scalars and arrays, without importing them
        return _make_plain(value.tolist(), name, lost)
    return value
