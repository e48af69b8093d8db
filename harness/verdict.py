"""What records say about which entry is the better one, and how sure that is.

An entry has its median over repeats and (min–max). The runs of one repeat are a pair:
against the reference stands the median of the paired ratios (of accuracy: of the paired
differences, in points, a pair for each seed), which may differ a little from the ratio of the
medians. Its interval, from 3 pairs on, is between two of the pairs: the k-th from below and the
k-th from above hold the true median between them with probability 1 - 2 P(B < k), where B counts
heads in n throws of a coin, whatever the distribution (David and Nagaraja, Order Statistics, 3rd
edition, section 7.1). k is the largest with which that is at least 95 %, or else 1:

    pairs       3    4    5    6    7    8    9   10   11   12
    k           1    1    1    1    1    1    2    2    2    3
    coverage   75   88   94   97   98   99   96   98   99   96 %

So of 3 repeats of two equal programs one in four shows a difference. "No difference shown" says
that the interval holds 1 (accuracy: 0), not that there is none.
"""

import calendar
import collections
import contextlib
import functools
import itertools
import json
import math
import re
import shlex
import time
import urllib.parse

import numpy as np

from harness.cli import BadInput, list_flags
from harness.record import KEYS, dig, reason_for

# ---- Statistics ----------------------------------------------------------------------------------


def compare_pairs(values, reference, how):
    """Paired values against the reference's, arrays (pairs,): by "ratio" or "difference".

    Returns {estimate, pairs, low, high, coverage, different, reason}. Without an interval there are
    nulls and a reason; `different` says whether the interval leaves out 1 (0 for differences).
    """
    paired = np.divide(values, reference) if how == "ratio" else np.subtract(values, reference)
    pairs, low, high, coverage = len(paired), None, None, None
    if pairs >= 3:
        below = itertools.accumulate(math.comb(pairs, heads) for heads in range(pairs // 2))
        covers = [1 - 2 * count / 2**pairs for count in below]
        cut = max(1, sum(share >= 0.95 for share in covers))
        low, high, coverage = *map(float, np.sort(paired)[[cut - 1, -cut]]), covers[cut - 1]
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
    """Seconds of an epoch at the steady speed: of those measured, a resumed run has two that hold
    the compilation"""
    speed, reason = get_field(record, "timing.train_images_per_second")
    images, batch = dig(record, "quality.train_images"), dig(record, "config.batch_size")
    if not (speed and images and batch):
        return None, reason or "an epoch: how many pictures it has is not known"
    return images // batch * batch / speed, None


def get_compile(record, cache):
    found = dig(record, "timing.compile_cache")
    if found != cache:
        missing = None if found else reason_for(record, "timing.compile_cache")
        return None, f"compiling: {missing or f'no run found a {cache} compilation cache'}"
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
    reason = reason or get_field(record, "quality.val_accuracy")[1]
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
    "load_p50_ms": ("under load: p50, ms", "ratio", "timing.load_p50_seconds", 1e3),
    "load_p99_ms": ("under load: p99, ms", "ratio", "timing.load_p99_seconds", 1e3),
    "served_per_second": ("under load: requests/s", "ratio", "timing.served_per_second", 1),
    "slo_per_second": ("most requests/s in --slo-ms", "ratio", "timing.slo_per_second", 1),
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
PRESETS = {"recipe", "variant"}  # stand for flags
NOT_WORK = re.compile(rf"(?!drop_path$)(.*_)?({OTHERS})(_|$)")
NOT_SERVED = {"batch_size", "batch_sizes", "data_format", "native", "list_models"}
NOT_SERVED |= {"runtime", "rows"}


def parse_id(record_id):
    """`1a2b3c4d-20260131T120000-r2-jax` -> (comparison, 2, "jax"); any other id -> None. At the end
    of latency.py's stand a batch size and perhaps a runtime, `~8` or `~8~onnx`"""
    match = re.fullmatch(r"([0-9a-f]{8}-\d{8}T\d{6})-r(\d+)-(.+?)(~\d+(~.+)?)?", record_id)
    return match and (match[1], int(match[2]), urllib.parse.unquote(match[3]))


def tell_apart(groups):
    """Of each group, (label, node, configuration), what it has that others of its label have not.

    Where recipes differ, only they and what was typed: the rest is what they stand for. But all
    where that would leave two groups with one name.
    """
    added, short = {}, {}
    for (label, node, work), runs in groups.items():
        others = [dict(other) for name, _, other in groups if name == label]
        differs = [(k, v.strip('"')) for k, v in work if any(other.get(k) != v for other in others)]
        typed = set().union(*(list_flags(run["argv"]) for run in runs.values())) | PRESETS
        typed = [(k, v) for k, v in differs if k.replace("_", "-") in typed and v != "null"]
        added[label, node, work] = differs
        short[label, node, work] = typed if PRESETS & dict(differs).keys() else differs
    names = {(label, node, *words) for (label, node, _), words in short.items()}
    return short if len(names) == len(short) else added


def group_records(found):
    """Entries as they appear: [{label, flags, node, runs: {(comparison, repeat): record}}, ...]

    A run of compare.py says in its id what it is; any other goes by its backend. Where a label
    stands for several configurations or nodes, it gets what differs. Raises BadInput.
    """
    latest = {}  # a run that was tried again counts as it ended, where it began
    for item in found:
        first = latest.get(item["id"], item)["started"]
        latest[item["id"]] = item | {"started": first, "ran": item["started"]}
    kind, done = find_kind(found), find_done(latest.values())
    # The loss of a serving run that was completed later is none.
    lost = {name for name, item in latest.items() if item["status"] != "ok" and name in done}
    found = [i for i in latest.values() if i["kind"] == kind and i["id"] not in lost]
    if not found:
        raise BadInput("expected records of kind train or latency, got none; vit.py writes some")
    datasets = sorted({str(dig(r, "config.dataset")) for r in found if dig(r, "config.dataset")})
    if len(datasets) > 1:
        names = " and ".join(datasets)
        raise BadInput(f"expected one dataset, got {names}; report on one at a time")
    rows = []
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
    # A run that died may know less of its configuration than its siblings. A comparison ran on one
    # machine, though a container may have a name of its own each time.
    known = {}
    lost_last = sorted(rows, key=lambda row: row[0]["status"] != "ok")
    for _, (comparison, _, label), work, node in lost_last:
        for key, value in (((comparison, label), work), (comparison, node)):
            known[key] = known.get(key) or value
    groups = {}
    for item, (comparison, repeat, label), work, node in rows:
        sibling = known[comparison, label]
        told = [(key, value) for key, value in work if value != "null"]
        if item["status"] != "ok" and {*told} <= {*sibling}:
            work = sibling
        node = known[comparison] if comparison or not node else node
        runs = groups.setdefault((label, node, work), {})
        if kind == "latency":
            merge_batch(runs, comparison, repeat, item)
        else:
            runs[comparison, repeat or len(runs) + 1] = item
    entries, added = [], tell_apart(groups)
    for (label, node, work), runs in groups.items():
        flags = shlex.split(label.partition(":")[2])
        words = [(k.replace("_", "-"), v) for k, v in added[label, node, work]]
        flags += [f"--{k}={v}" for k, v in words if k not in list_flags(flags)]
        full = ":".join([label.partition(":")[0], shlex.join(flags)][: 2 if flags else 1])
        full += f" @ {node}" if len({node for _, node, _ in groups}) > 1 else ""
        ok = {pair: item for pair, item in runs.items() if item["status"] == "ok"}
        entries.append({"label": full, "flags": flags, "node": node, "runs": runs, "ok": ok})
    return entries


def count_rows(records):
    """How many records a run is to leave: latency.py one for each row of its table"""
    return max(item["config"].get("rows") or 1 for item in records)  # a loss knows of none


def find_done(found):
    """Ids of the runs that are complete, as they ended last: of latency.py's every row is ok"""
    runs = collections.defaultdict(list)
    for item in {item["id"]: item for item in found}.values():
        runs[item["id"].partition("~")[0]].append(item)
    ok = {run: sum(item["status"] == "ok" for item in items) for run, items in runs.items()}
    return {run for run, items in runs.items() if ok[run] >= count_rows(items)}


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
OPTIONAL = "git.commit timing.compile_cache device.usable_cores device.power_mode "
OPTIONAL += "versions.keras versions.jax versions.jaxlib versions.torch versions.tensorflow "
OPTIONAL += "versions.driver device.power_cap_watts"
SAME += "config.seed quality.data_fingerprint device.kind device.name " + OPTIONAL
SERVED = {"precision", "versions", "git", "device"}  # groups that serving has, too
DERIVED = {"model.parameters", "model.flops_per_image", "quality.data_fingerprint"}
HARMLESS = set("precision trainer jit-compile micro-batch-size fit-memory memory-limit".split())
HARMLESS |= {"loader", "loader-workers", "loader-prefetch"}  # flags that leave those alone
APART = 900  # seconds between the runs of a pair that a cool-down or a container may take


def check_fairness(entries, reference, is_served):
    """(warnings, what differs by an entry's own flags, names of the fields that are unequal)"""
    warnings, deliberate, implied, unequal, apart = [], [], [], [], find_apart(entries)
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
    optional = {*OPTIONAL.split()} | config - set(fields)
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
        flag = field.replace("_", "-")
        own = {flag, *(PRESETS if dotted.startswith("config.") else ())}
        is_own = (lambda name: name not in HARMLESS) if dotted in DERIVED else own.__contains__
        alike = [  # the flags with which each value came about; none is an entry as it is
            {frozenset(w for w in pair_flags(e["flags"]) if is_own(w[0])) for e in held}
            for held in holders.values()
        ]
        given = {name for flags in set.union(*alike) for name, _ in flags}
        if len(set.union(*alike)) < sum(map(len, alike)):
            warnings.append(f"{dotted} differs: {text}")
            field = f"versions of {field}" if dotted.startswith("versions.") else field
            unequal += [] if field == "compile_cache" else [field]  # it touches the start alone
        elif dotted not in DERIVED and flag not in given | PRESETS:
            implied.append(field)
        else:
            deliberate.append(f"{dotted} differs by an entry's own flags: {text}")
    if implied:
        deliberate.append(f"with recipe or variant differ {', '.join(implied)}")
    for entry in entries:
        pairs, interleaved = match_pairs(entry, reference)
        if pairs and not interleaved and entry is not reference:
            warnings.append(f"{entry['label']} did not run interleaved with {reference['label']}")
    return [*warnings, *apart], deliberate, unequal


def pair_flags(words):
    """{(name, value), ...} of flags such as --seed=3, --seed 3 and --no-flip"""
    pairs, name = {}, None
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            (name,) = list_flags([flag])
            pairs[name] = "False" if flag.startswith("--no-") else value
        elif name:  # one of its values
            pairs[name] = f"{pairs[name]} {word}".strip()
    return set(pairs.items())


def find_apart(entries):
    """Warnings of repeats of a comparison whose runs did not follow one another, as after a
    --resume: between two of them something else took longer than APART and what is usual there"""
    comparisons = collections.defaultdict(lambda: collections.defaultdict(list))
    for entry in entries:
        for (comparison, repeat), run in entry["runs"].items():
            for part in list_parts(run).values():
                with contextlib.suppress(ValueError):  # a time by another program
                    begun = calendar.timegm(time.strptime(part["ran"], "%Y-%m-%dT%H:%M:%SZ"))
                    took = dig(part, "timing.total_seconds")
                    took = math.inf if took is None else took
                    name = f"{entry['label']} {repeat}"
                    comparisons[comparison][repeat].append((begun, name, took))
    comparisons.pop("", None)
    warnings = []
    for repeats in comparisons.values():
        gaps = []
        for parts in repeats.values():
            end, ended = math.inf, None  # of those so far; inf where that is not known
            for begun, name, took in sorted(parts):
                if end < math.inf:
                    gaps.append((max(begun - end, 0), name, ended))
                if end == math.inf or begun + took > end:
                    end, ended = begun + took, name
        usual = np.median([gap for gap, _, _ in gaps]) if gaps else 0
        for gap, name, ended in gaps:
            if gap > APART + usual:
                told = f"{name} began {gap / 60:,.0f} minutes after {ended} had ended"
                warnings.append(f"{told}: their ratio is not that of runs in turn")
    return warnings


def collect_notes(entries):
    """The warnings in the records' notes (not the reasons of nulls), once each with a count, also
    where other numbers stand in them"""
    items = [
        part
        for entry in entries
        for run in entry["runs"].values()
        for part in list_parts(run).values()
    ]
    texts = collections.defaultdict(dict)  # a note without its numbers -> {item's number: note}
    for number, item in enumerate(items):
        for note in item["notes"]:
            field, colon, _ = note.partition(":")
            is_field = colon and field.partition(".")[0] in KEYS
            if not (is_field and has_null(dig(item, field))):
                texts[re.sub(r"[\d.]+", "", note)].setdefault(number, note)
    return [
        f"{next(iter(notes.values()))} ({len(notes)} of {len(items)} runs)"
        for notes in texts.values()
    ]


def has_null(value):
    return value is None or (isinstance(value, dict) and any(map(has_null, value.values())))


# ---- As text -------------------------------------------------------------------------------------


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
    digits = 4 if 0 < abs(value - 1) < 0.001 else 3 if 0.95 < value < 1.05 else 2
    return f"{value:.{digits}f}"


def show_interval(versus, how):
    if versus["low"] is None:
        return ""
    if how == "ratio":
        return f"{show_ratio(versus['low'])}–{show_ratio(versus['high'])}"
    return f"{show_points(versus['low'])} to {show_points(versus['high'])}"


def show_points(value):
    return f"{value:+.2f}" if 0 < abs(value) < 0.1 else f"{value:+.1f}"


def show_coverage(versus, how):
    """An interval, and how often such a one holds the truth"""
    return f"{versus['coverage']:.0%} interval {show_interval(versus, how)}"


def show_versus(versus, how):
    estimate = versus["estimate"]
    text = f"{show_ratio(estimate)} times" if how == "ratio" else f"{show_points(estimate)} points"
    text += f" ({show_interval(versus, how)})" if versus["low"] is not None else ""
    verdict = "no difference shown" if versus["different"] is False else "no interval"
    return text if versus["different"] else f"{text}, {verdict}"


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
    known = [(n, pair) for n, pair in enumerate(values) if None not in pair]
    values = np.array([pair for _, pair in known], float).reshape(-1, 2)
    how = find_metric(key)[1]
    if not len(values) or (how == "ratio" and (values[:, 1] <= 0).any()):
        return None
    if how == "ratio":
        return compare_pairs(values[:, 0], values[:, 1], how)
    # Runs of one seed repeat one draw of weights and order: together they are a pair.
    seeds = collections.defaultdict(list)
    for (number, _), (value, other) in zip(known, values):
        seeds[dig(pairs[number][0], "config.seed")].append(value - other)
    result = compare_pairs([np.median(of_seed) for of_seed in seeds.values()], 0.0, how)
    return result | ({"reason": "too few seeds for an interval"} if result["reason"] else {})


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


def check_reference(reference, labels):
    if reference and reference not in labels:
        raise BadInput(f"unknown reference {reference!r}: expected one of {', '.join(labels)}")


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


def describe_limits(report, pairs):
    """What speaks against comparisons of pairs of entries, as the end of a sentence: runs that
    failed, and what makes them unfair"""
    text, unequal = "", []
    for entry in {entry["label"]: entry for pair in pairs for entry in pair}.values():
        statuses = [run["status"] for run in entry["runs"].values()]
        if failed := sum(status not in ("ok", "interrupted") for status in statuses):
            text += f"; but {entry['label']} failed in {failed} of {len(statuses)} runs"
    for fast, slow in pairs:
        unequal += check_fairness([fast, slow], slow, report["is_served"])[2]
    unequal += ["what they compute"] if report["is_broken"] else []
    return text + (f"; but unequal: {', '.join(dict.fromkeys(unequal))}" if unequal else "")


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
        text += f" ({show_coverage(speed, 'ratio')})" if speed["low"] is not None else ""
        text += "" if speed["different"] else f", {speed['reason'] or 'no difference shown'}"
        sentences.append(f"batch {size}: {text}")
        pairs.append((fast, slow))
    if not sentences:
        return "nothing to compare: expected two entries with a common batch size"
    return "; ".join(sentences) + describe_limits(report, pairs)


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
        versus = [cells[key][index]["versus"] for key in ("epoch_seconds", "start_seconds")]
        unlike = [bool(v and v["different"]) for v in versus]
        if not all(unlike):
            where = "the start" if unlike[0] else "an epoch"
            answers.append((None, f"not known: no difference in {where} shown"))
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
    interval = speed["reason"] or show_coverage(speed, "ratio")
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
        if accuracy["different"]:
            text += f"; accuracy: {fast['label']} {show_versus(accuracy, 'difference')}"
        else:
            text += f"; accuracy: {accuracy['reason'] or 'no difference shown'}"
    return text + describe_limits(report, [(fast, slow)])
