"""compare.py: its statistics, what it runs and in which order, and what it makes of records"""

import csv
import html.parser
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import read_log, read_wandb

import compare
from harness import record as records
from harness import report as reports
from harness import verdict

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.timeout(120)]
ROOT = Path(compare.__file__).parent

CHILD = """
# Stands in for vit.py: appends the record made ready for its backend and seed, or dies as told
import json, os, signal, sys, time
sys.path.insert(0, ROOT)
from harness.record import append_record
from harness.stopwatch import wait_for_turn

def tell(what, name):
    with open("turns.txt", "a") as file:
        file.write(f"{name} {what}\\n")

words = [word for word in sys.argv[1:] if word != "--no-use-wandb"]
flags = dict(zip(words[::2], words[1::2]))
name = flags["--keras-backend"] + flags["--seed"]
with open("ran.txt", "a") as file:
    file.write(json.dumps([name, sys.argv[1:]]) + "\\n")
fate = json.loads(os.environ.get("FATES", "{}")).get(name)
if fate == "raise":
    print("Traceback", "ValueError: no luck", sep="\\n", file=sys.stderr)
    sys.exit(1)
if fate == "refuse":
    print("╭─ x ─╮\\n│ Unrecognized options: --epoch │\\n╰─────╯", file=sys.stderr)
    sys.exit(2)
if isinstance(fate, float) and float(flags.get("--memory-limit", 99)) < fate:
    print("terminate called ...", "  what():  std::bad_alloc", sep="\\n", file=sys.stderr)
    os.abort()
if fate == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "silent":
    sys.exit(0)
try:
    time.sleep(60 if fate == "hang" else 0)
except KeyboardInterrupt:
    pass
if os.environ.get("VIT_TURN") and fate != "impatient":
    tell("begins", name)
    wait_for_turn()
    tell("is measured", name)
    time.sleep(60 if fate == "wait" else 0.1)
    tell("was measured", name)
with open("ready.json") as file:
    ready = json.load(file)[name]
for record in ready if isinstance(ready, list) else [ready]:
    record["id"] = "mine" if fate == "anonymous" else os.environ["VIT_RECORD_ID"]
    record["id"] += f"~{record['config']['batch_size']}" if isinstance(ready, list) else ""
    record["status"] = {"hang": "interrupted", "oom": "oom"}.get(fate, "ok")
    append_record(flags["--results-path"], record)
    if fate == "half":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def create_train_record(backend, seed, speed=None, **changes):
    """A record of vit.py's kind; `changes` are top-level keys, or dotted ones as group__field"""
    speed = speed or {"jax": 400.0, "torch": 300.0}.get(backend, 200.0) + seed
    record = records.create_record(
        "train",
        status="ok",
        id=f"{backend}-{seed}-{speed}",
        started=f"2026-01-01T00:00:{seed:02d}Z",
        backend=backend,
        precision="float32",
        config={
            "dataset": "synthetic",
            "seed": seed,
            "batch_size": 64,
            "num_epochs": 3,
            "units": [4, 4],
        },
        device={"kind": "cpu", "name": "a processor", "node_name": "box", "power_mode": None},
        versions={"python": "3.11.2", "keras": "3.15.1"},
        git={"commit": "abc", "dirty": False},
        model={"parameters": 1000, "flops_per_image": 5e6},
        timing={
            "import_seconds": 2.0,
            "build_seconds": 1.0,
            "compile_seconds": 9.0 if backend == "jax" else 3.0,
            "compile_cache": "cold",
            "epoch_seconds": [10.0, 1024 / speed, 1024 / speed],
            "train_images_per_second": speed,
        },
        memory={"device_peak_bytes": None, "host_peak_bytes": int(speed) * 2**20},
        energy={"joules": None, "joules_per_image": None, "source": None},
        quality={
            "accuracy": [0.1, 0.2, 0.3],
            "val_accuracy": [0.1, 0.2, 0.25],
            "test_accuracy": 0.2 + seed / 100,
            "test_top5_accuracy": 0.5 + seed / 100,
            "data_fingerprint": f"f{seed}",
            "train_images": 1030,
        },
        notes=[
            "memory.device_peak_bytes: no statistics on the CPU",
            "energy: no power sensor",
            "device.power_mode: none here",
        ],
    )
    for key, value in changes.items():
        group, _, field = key.partition("__")
        if field:
            record[group][field] = value
        else:
            record[group] = value
    return record


def write_file(path, items):
    for item in items:
        records.append_record(path, item)
    return path


def pair_up(count=3, **torch_changes):
    """Records as compare.py's children would leave them: jax and torch, `count` repeats"""
    items = []
    for repeat in range(1, count + 1):
        for backend, changes in (("jax", {}), ("torch", torch_changes)):
            record_id = f"0a1b2c3d-20260101T000000-r{repeat}-{backend}"
            items.append(create_train_record(backend, repeat, id=record_id, **changes))
    return items


def report_on(items, **fields):
    return verdict.create_report(items, compare.CompareConfig(**fields))


def test_what_was_not_compiled_was_neither_cold_nor_warm():
    for cache, expected in (("cold", (True, False)), ("warm", (False, True)), (None, (False,) * 2)):
        item = create_train_record("jax", 1, timing__compile_cache=cache)
        found = [verdict.get_compile(item, kind)[0] for kind in ("cold", "warm")]
        assert tuple(value is not None for value in found) == expected


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder with the stand-in child, where every backend counts as installed"""
    (tmp_path / "child.py").write_text(CHILD.replace("ROOT", repr(str(ROOT))))
    names = [(backend, seed) for backend in ("jax", "torch") for seed in (1, 2, 3)]
    ready = {f"{backend}{seed}": create_train_record(backend, seed) for backend, seed in names}
    (tmp_path / "ready.json").write_text(json.dumps(ready))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    find_spec = compare.importlib.util.find_spec
    backends = ("jax", "torch")
    monkeypatch.setattr(
        compare.importlib.util,
        "find_spec",
        lambda name: (
            (name in backends or None) if name in (*backends, "tensorflow") else find_spec(name)
        ),
    )
    return tmp_path


def run_main(*arguments):
    before = signal.getsignal(signal.SIGTERM)
    try:
        return compare.main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def read_ran(folder):
    lines = (folder / "ran.txt").read_text().splitlines()
    return [json.loads(line) for line in lines]


def result_file(folder):
    (path,) = folder.glob("results/compare-*.jsonl")
    return path


# ---- Statistics


@pytest.mark.parametrize(
    "values, low, high, coverage, different",
    [
        ([2.0, 3.0], None, None, None, None),
        ([2.0, 3.0, 2.5], 2.0, 3.0, 0.75, True),
        ([0.9, 1.2, 1.1, 1.3], 0.9, 1.3, 0.875, False),
        ([1.0, 1.2, 1.1, 1.3, 1.4], 1.0, 1.4, 0.9375, False),
        ([1.1, 1.2, 1.1, 1.3, 1.4, 1.2, 1.6], 1.1, 1.6, 1 - 2**-6, True),
        ([0.9, 1.2, 1.1, 1.3, 1.4, 1.5, 1.6, 1.7, 9.0], 1.1, 1.7, 1 - 2 * 10 / 2**9, True),
    ],
)
def test_interval_is_between_two_of_the_pairs(values, low, high, coverage, different):
    reference = np.full(len(values), 2.0)
    result = verdict.compare_pairs(np.array(values) * 2, reference, "ratio")
    assert result["estimate"] == pytest.approx(np.median(values))
    assert (result["low"], result["high"]) == pytest.approx((low, high))
    assert (result["coverage"], result["different"]) == (coverage, different)
    assert bool(result["reason"]) == (low is None)
    shifted = verdict.compare_pairs(
        np.array(values) - 1 + 7, np.full(len(values), 7.0), "difference"
    )
    assert shifted["estimate"] == pytest.approx(np.median(values) - 1)


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for pairs in (3, 5, 9, 12):
        samples = rng.lognormal(size=(4000, pairs))  # its median is 1
        ones = np.ones(pairs)
        results = [verdict.compare_pairs(sample, ones, "ratio") for sample in samples]
        covered = np.mean([not result["different"] for result in results])
        assert covered == pytest.approx(results[0]["coverage"], abs=0.02)
        assert results[0]["coverage"] >= 0.95 or pairs < 6


def test_break_even():
    assert verdict.find_break_even(10, 2, 4, 3) == 6  # 10 + 6 * 2 == 4 + 6 * 3
    assert verdict.find_break_even(4, 3, 10, 2) == 6
    assert verdict.find_break_even(4, 2, 10, 3) is None
    assert verdict.find_break_even(4, 2, 4, 3) is None


def test_hand_computed_report():
    report = report_on(pair_up(), target_accuracy=0.2)
    jax, torch = report["cells"]["images_per_second"]
    assert (jax["median"], jax["low"], jax["high"], jax["versus"]) == (402, 401, 403, None)
    assert torch["versus"]["estimate"] == pytest.approx(302 / 402)
    assert torch["versus"]["low"] == pytest.approx(301 / 401)
    assert report["cells"]["epoch_seconds"][0]["median"] == pytest.approx(1024 / 402)
    assert report["cells"]["start_seconds"][0]["median"] == 12
    assert report["cells"]["target_seconds"][0]["median"] == pytest.approx(3 + 10 + 1024 / 402)
    epochs = (12 - 6) / (1024 / 302 - 1024 / 402)
    assert report["break_even"][1] == (
        pytest.approx(epochs),
        f"ahead until {verdict.show(epochs)} epochs",
    )
    assert report["cells"]["device_peak_mib"][0]["reason"].endswith("no statistics on the CPU")
    assert report["cells"]["joules_per_image"][0]["reason"].endswith("no power sensor")
    assert report["warnings"] == [] and report["deliberate"] == []
    assert report["sentence"] == (
        "jax trained 1.33 times as fast as torch (75% interval 1.33–1.33, 3 interleaved repeats),"
        " with 1.33 times the host memory; accuracy: no difference shown"
    )


def test_other_sentences():
    same = [item | {"timing": pair_up()[0]["timing"]} for item in pair_up(5)]
    assert report_on(same)["sentence"].startswith(
        "no difference in training speed shown between jax and torch (94% interval 1.000–1.000, "
    )
    assert "(too few repeats for an interval, 2 interleaved" in report_on(pair_up(2))["sentence"]
    assert report_on(pair_up()[::2])["sentence"].startswith("nothing to compare: 1 of 1")
    better = [item for item in pair_up(3)]
    for item in better[::2]:
        item["quality"]["test_accuracy"] += 0.05
    assert "accuracy: jax +5.0 points (+5.0 to +5.0)" in report_on(better)["sentence"]
    one_seed = pair_up()
    for item in one_seed:
        item["config"]["seed"] = 7
    assert "too few seeds" in report_on(one_seed)["sentence"]


def test_the_sentence_is_about_its_pairs():
    """What the pairs say goes before the medians of all runs, and what a third entry does
    otherwise makes these two not unequal"""
    items = pair_up(5, timing__train_images_per_second=500.0)  # jax: 401, 402 ... 405
    for item in items[1::2]:
        item["timing"] = item["timing"] | {"train_images_per_second": 300.0}
    for item in items[1:6:2]:
        item["timing"]["train_images_per_second"] = 700.0
    for item in items[0:6:2]:
        item |= {"status": "oom", "error": "x"}
    report = report_on(items)
    assert report["cells"]["images_per_second"][1]["median"] == 700
    assert report["sentence"].startswith("jax trained 1.35 times as fast as torch")
    slow = [create_train_record("native-torch", n, 100, config__trainer="fit") for n in (1, 2, 3)]
    for repeat, item in enumerate(slow, 1):
        item["id"] = f"0a1b2c3d-20260101T000000-r{repeat}-native-torch"
    items = pair_up(config__trainer="compiled")
    for item in items:
        item["config"]["trainer"] = "compiled"
    report = report_on([*items, *slow])
    assert any("config.trainer differs" in line for line in report["warnings"])
    assert "unequal" not in report["sentence"]


def test_reference_and_target_that_is_never_reached():
    report = report_on(pair_up(), reference="torch", target_accuracy=0.9)
    assert report["cells"]["images_per_second"][0]["versus"]["estimate"] == pytest.approx(402 / 302)
    assert "did not reach 90.0%" in report["cells"]["target_seconds"][0]["reason"]


def test_a_target_that_some_runs_reach_makes_no_ratio():
    items = pair_up()
    for item in items:
        item["quality"]["val_accuracy"] = [0.2, 0.6]
    items[0]["quality"]["val_accuracy"] = items[2]["quality"]["val_accuracy"] = [0.2, 0.3]
    jax, torch = report_on(items, target_accuracy=0.5)["cells"]["target_seconds"]
    assert jax["lines"][1] == "in 1 of 3 runs" and len(torch["lines"]) == 1
    assert torch["versus"] is None


def test_energy_of_different_sources_is_not_compared():
    items = pair_up(energy__joules_per_image=2.0, energy__source="INA3221 rails")
    for item in items[::2]:
        item["energy"] |= {"joules_per_image": 1.0, "source": "NVML"}
    torch = report_on(items)["cells"]["joules_per_image"][1]
    assert torch["median"] == 2 and torch["versus"] is None


# ---- Fairness


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"precision": "tf32"}, "precision differs: float32 (jax); tf32 (torch)"),
        ({"model__parameters": 999}, "model.parameters differs: 1000 (jax); 999 (torch)"),
        ({"config__batch_size": 32}, "config.batch_size differs: 64 (jax); 32 (torch)"),
        ({"config__units": [8, 4]}, "config.units differs: [4, 4] (jax); [8, 4] (torch)"),
        ({"config__seed": 9}, "config.seed differs: 1, 2, 3 (jax); 9, 9, 9 (torch)"),
        ({"quality__data_fingerprint": "x"}, "quality.data_fingerprint differs: f1, f2, f3"),
        ({"versions__keras": "3.0.0"}, "versions.keras differs: 3.15.1 (jax); 3.0.0 (torch)"),
        ({"device__name": "a GPU"}, "device.name differs: a processor (jax); a GPU (torch)"),
        (
            {"timing__compile_cache": "warm"},
            "timing.compile_cache differs: cold (jax); warm (torch)",
        ),
        ({"model__flops_per_image": None}, "flops_per_image is not checked: unknown for torch"),
    ],
)
def test_unequal_work_is_a_warning(changes, expected):
    report = report_on(pair_up(**changes))
    assert any(expected in line for line in report["warnings"]), report["warnings"]
    told = "differs" in expected and "compile_cache" not in expected
    assert ("; but unequal: " in report["sentence"]) == told


def test_what_an_entry_changes_itself_is_said_not_warned_of():
    items = pair_up(precision="bfloat16", config__precision="bfloat16")
    for item in items[1::2]:
        item["id"] = item["id"].replace("-torch", "-torch:--precision=bfloat16")
    report = report_on(items)
    assert report["labels"] == ["jax", "torch:--precision=bfloat16"]
    assert report["warnings"] == []
    assert len(report["deliberate"]) == 1 and "bfloat16" in report["deliberate"][0]


@pytest.mark.parametrize(
    "flags, changes, field",
    [
        ({"jax": "--precision=bfloat16", "torch": "--precision=bfloat16"}, "float32", "precision"),
        ({"torch": "--micro-batch-size=32"}, 999, "model.parameters"),
        ({"jax": "--patch-size 6", "torch": "--patch-size=6"}, 999, "model.parameters"),
        ({"torch": "--patch-size=3"}, 999, None),
        ({"jax": "--mlp-head-units 8 4", "torch": "--mlp-head-units 4 4"}, 999, None),
        ({"torch": "--precision=bfloat16", "jax": "--precision=tf32"}, "bfloat16", None),
    ],
)
def test_a_flag_explains_only_what_it_could_have_made(flags, changes, field):
    group = "precision" if isinstance(changes, str) else "model__parameters"
    items = pair_up(**{group: changes})
    for item in items[::2]:
        item["precision"] = flags.get("jax", "=float32").partition("=")[2]
    for item in items:
        name = item["backend"]
        item["precision"] = "float32" if group != "precision" else item["precision"]
        item["id"] += f":{flags[name]}" if name in flags else ""
    report = report_on(items)
    warned = [line for line in report["warnings"] if f"{field} differs" in line]
    assert len(warned) == bool(field) and len(report["deliberate"]) == (not field)
    assert ("unequal" in report["sentence"]) == bool(field)


@pytest.mark.parametrize(
    "group, field, later", [("versions", "jax", "0.9"), ("device", "power_cap_watts", 200.0)]
)
def test_runs_of_two_versions_are_not_pooled_silently(group, field, later):
    items = pair_up()
    for item in items:
        item[group] = item[group] | {field: later if "-r3-" in item["id"] else "0.10"}
    warnings = report_on(items)["warnings"]
    assert len(warnings) == 1 and warnings[0].startswith(f"{group}.{field} differs: 0.10 (jax")


def test_a_repeat_that_was_torn_apart_is_told():
    items = pair_up()
    for minute, item in enumerate(items):
        item["started"] = f"2026-01-01T00:{minute:02d}:00Z"
        item["timing"]["total_seconds"] = 50.0
    assert report_on(items)["warnings"] == []
    cooled = [
        item | {"started": f"2026-01-01T{hour:02d}:00:00Z"} for hour, item in enumerate(items)
    ]
    assert report_on(cooled)["warnings"] == []  # an hour before each
    lost = items[2] | {"status": "error", "error": "x"}
    again = items[2] | {"started": "2026-01-01T02:00:00Z"}
    (warning,) = report_on([*items[:2], lost, *items[3:], again])["warnings"]
    assert warning.startswith("jax 2 began 116 minutes after torch 2 had ended")


def test_accuracy_has_one_pair_a_seed():
    """However often the same seeds are run, there are no more draws of weights and order"""
    items = []
    for comparison in ("0a1b2c3d", "1a1b2c3d", "2a1b2c3d"):
        for item in pair_up(3):
            item["quality"]["test_accuracy"] += 0.01 * (item["backend"] == "jax")
            items.append(item | {"id": item["id"].replace("0a1b2c3d", comparison)})
    torch = report_on(items)["cells"]["test_accuracy_percent"][1]["versus"]
    assert (torch["pairs"], torch["coverage"]) == (3, 0.75)
    assert torch["estimate"] == pytest.approx(-1)


def test_failures_are_in_the_sentence():
    items = pair_up(5)
    for item in (items[1], items[3]):
        item |= {"status": "diverged", "error": "loss nan"}
    assert report_on(items)["sentence"].endswith("; but torch failed in 2 of 5 runs")


def test_a_killed_run_belongs_to_its_siblings():
    """Its record is of the process that started it, which knew less of the configuration"""
    items = pair_up()
    for item in items:
        item["config"] = item["config"] | {"micro_batch_size": 16}
    items[3] |= {"status": "oom", "error": "killed", "timing": {}}
    items[3]["config"] |= {"micro_batch_size": None}
    report = report_on(items, reference="torch")
    assert report["labels"] == ["jax", "torch"]
    assert report["rows"][0]["cells"][1]["lines"] == ["2 of 3"]
    items[3]["config"] |= {"micro_batch_size": 8}  # which it knew: other work
    other = "torch:--micro-batch-size=8"
    assert report_on(items)["labels"] == ["jax", "torch:--micro-batch-size=16", other]


def test_break_even_needs_two_differences():
    items = pair_up()
    for item in items[1::2]:
        item["timing"]["compile_seconds"] = 9.0
    texts = [text for _, text in report_on(items)["break_even"]]
    assert texts == ["the reference", "not known: no difference in the start shown"]
    assert "not known" in report_on(pair_up(2))["break_even"][1][1]


def test_notes_are_repeated_once_with_a_count():
    items = pair_up()
    for item in items[:4]:
        item["notes"].append("throttled: the clock fell")
    assert report_on(items)["warnings"] == ["throttled: the clock fell (4 of 6 runs)"]


def test_a_note_on_a_field_is_repeated_unless_the_field_is_null():
    items = pair_up(energy__joules=None, energy__window_seconds=1.5)
    items[0]["notes"] += ["energy.joules: no sensor", "precision: tf32 asked, but it has none"]
    items[1]["notes"] += ["energy.window_seconds: 1.5 s is short", "energy: no sensor"]
    items[1]["notes"] += ["energy.window_seconds: 1.4 s is short"]  # of its next epoch
    items[3]["notes"] += ["energy.window_seconds: 1.25 s is short"]
    assert report_on(items)["warnings"] == [
        "precision: tf32 asked, but it has none (1 of 6 runs)",
        "energy.window_seconds: 1.5 s is short (2 of 6 runs)",
    ]


def test_a_comparison_in_containers_is_one_machine():
    """Each of which has a name of its own"""
    items = pair_up()
    for index, item in enumerate(items):
        item["device"]["node_name"] = f"box{index}"
    report = report_on(items)
    assert report["labels"] == ["jax", "torch"] and not report["warnings"]
    assert "3 interleaved repeats" in report["sentence"]


# ---- Records made earlier


def test_records_by_hand_are_told_apart_by_what_differs():
    items = [create_train_record("jax", seed) for seed in (1, 2, 3)]
    items += [create_train_record("jax", seed, 100, config__batch_size=128) for seed in (1, 2, 3)]
    report = report_on(items)
    assert report["labels"] == ["jax:--batch-size=64", "jax:--batch-size=128"]
    assert [len(entry["ok"]) for entry in report["entries"]] == [3, 3]
    assert any("did not run interleaved" in line for line in report["warnings"])
    assert "interleaved" not in report["sentence"]
    assert "batch_size" in report["deliberate"][0]


RECIPES = {  # what they stand for, a few of many
    "keras-io": {"units": [2048, 1024], "dropout": 0.1, "variant": None, "batch_size": 256},
    "tiny": {"units": [], "dropout": 0.0, "variant": None, "batch_size": 128},
}


def train_recipe(name, *flags, **config):
    """Records of three runs of a recipe, begun by hand with these flags too"""
    items = [create_train_record("torch", seed) for seed in (1, 2, 3)]
    for item in items:
        item["argv"] = ["vit.py", "--recipe", name, *flags]
        item["config"] |= {"recipe": name, **RECIPES[name], **config}
        item["id"] += f"{name}{len(config)}"
    return items


def test_recipes_by_hand_are_told_apart_by_what_was_typed():
    tiny, other = train_recipe("tiny", "--no-flip", flip=False), train_recipe("keras-io", flip=True)
    report = report_on([*tiny, *other])
    assert report["labels"] == ["torch:--flip=false --recipe=tiny", "torch:--recipe=keras-io"]
    assert "unequal" not in report["sentence"]
    told = "with recipe or variant differ batch_size, dropout, units"
    assert report["deliberate"][-1] == told and "config.flip" in report["deliberate"][0]
    # What a recipe stands for is no excuse where both have it.
    items = pair_up(config__batch_size=128)
    for item in items:
        item["id"] += ":--recipe=tiny"
    assert report_on(items)["sentence"].endswith("; but unequal: batch_size")


def test_recipes_that_changed_are_told_apart_by_all_that_differs(bench):
    """And a plot with such long names still has room for curves, which matplotlib would warn of."""
    config = {f"choice_{number}": number for number in range(25)}
    items = [*train_recipe("tiny"), *train_recipe("tiny", **config), *train_recipe("keras-io")]
    for item in items:
        item["config"] = dict.fromkeys(config, 0) | item["config"]
    report = report_on(items)
    assert len(set(report["labels"])) == 3 and "--choice-24=24" in report["labels"][1]
    reports.write_report(report, bench / "out")
    shown = (bench / "out/accuracy.svg").read_text()
    assert "..." in shown and "=24" not in shown


def test_drop_path_is_no_path():
    items = pair_up(config__drop_path=0.5)
    for item in items[::2]:
        item["config"]["drop_path"] = 0.0
    assert report_on(items)["sentence"].endswith("; but unequal: drop_path")
    path = pair_up(config__model_path="b.keras")
    assert not report_on(path)["warnings"]


def add_parity(items, **changes):
    record = records.create_record("parity", status="ok", backend="jax, torch", precision="float32")
    return [*items, record | changes]


def test_the_report_carries_the_line_of_parity(bench):
    assert report_on(pair_up())["parity"] == "parity: not checked"
    quality = {"is_same": True, "sentence": "jax and torch compute the same"}
    report = report_on(add_parity(pair_up(), quality=quality))
    assert report["parity"] == "parity: jax and torch compute the same"
    assert not report["warnings"] and "unequal" not in report["sentence"]
    reports.write_report(report, bench / "out")
    for form in ("md", "html"):
        assert report["parity"] in (bench / f"out/report.{form}").read_text()


def test_a_difference_between_those_that_compute_differently_is_no_result():
    quality = {"is_same": False, "sentence": "torch against jax: not the same: logits differ"}
    report = report_on(add_parity(pair_up(), quality=quality))
    assert "parity: torch against jax: not the same: logits differ" in report["warnings"]
    assert report["sentence"].endswith("; but unequal: what they compute")
    failed = {"status": "error", "error": "no g++"}
    report = report_on(add_parity(pair_up(), **failed))
    assert report["parity"] == "parity: not checked: no g++" and not report["warnings"]
    served = [*serve_both(), *add_parity([], quality=quality)]
    assert report_on(served)["sentence"].endswith("; but unequal: what they compute")


def test_parity_is_that_of_the_comparison():
    """Neither another's nor, where its own has failed, a later one"""
    good = {"quality": {"is_same": True, "sentence": "the same"}}
    other = add_parity(pair_up(), id="ffffffff-20260101T000000-parity", **good)
    assert report_on(other)["parity"] == "parity: not checked"
    own = {"id": "0a1b2c3d-20260101T000000-parity", "started": "2026-01-01T00:00:00Z"}
    bad = add_parity(other, **own, quality={"is_same": False, "sentence": "not the same"})
    report = report_on(add_parity(bad, **good))
    assert report["parity"] == "parity: not the same"
    assert report["sentence"].endswith("; but unequal: what they compute")


def test_records_of_serving_beside_training_are_told_of():
    report = report_on([*pair_up(), *serve_both()])
    assert report["warnings"] == [
        "12 records of serving are left out: put them into a file of their own"
    ]


def test_a_flag_is_taken_out_of_words():
    words = ["--a=1", "--precision", "bfloat16", "--b", "2"]
    assert compare.take_flag(words, "--precision") == ("bfloat16", ["--a=1", "--b", "2"])
    assert compare.take_flag(["--precision=tf32"], "--precision") == ("tf32", [])
    assert compare.take_flag(["--b", "2"], "--precision") == (None, ["--b", "2"])


# ---- Serving


def serve(backend, repeat, size, p50, **changes):
    """A record as latency.py leaves it, one batch size of a run"""
    timing = {"p50_seconds": p50, "p99_seconds": 2 * p50, "images_per_second": size / p50}
    timing |= {"copy_seconds": 1e-4, "compile_seconds": 3.0}
    record = records.create_record(
        "latency",
        id=f"0a1b2c3d-20260101T000000-r{repeat}-{backend}~{size}",
        status="ok",
        backend=backend,
        precision="float32",
        config={"model": "vit", "batch_size": size, "batch_sizes": [size], "precision": "float32"},
        device={"kind": "cpu", "name": "x", "node_name": "node"},
        timing=timing,
        memory={"host_peak_bytes": size * 2**20, "device_peak_bytes": None},
        energy={"joules_per_image": None},
        notes=["energy: no sensor", "memory.device_peak_bytes: on the CPU"],
    )
    return record | changes


def serve_both(**torch_changes):
    """Three repeats: at batch 1 torch is as fast, at batch 8 twice as fast"""
    items = []
    for repeat, noise in ((1, 1.0), (2, 1.1), (3, 0.9)):
        items += [serve("jax", repeat, 1, 0.010), serve("jax", repeat, 8, 0.040 * noise)]
        items += [serve("torch", repeat, 1, 0.010 * noise)]
        items += [serve("torch", repeat, 8, 0.020 * noise, **torch_changes)]
    return items


def test_serving_is_reported_by_batch_size(bench):
    report = report_on(serve_both())
    assert report["labels"] == ["jax", "torch"] and not report["warnings"]
    assert report["cells"]["8 p50_ms"][1]["lines"] == ["20.0 (18.0–22.0)", "0.50 times (0.50–0.50)"]
    assert "no difference shown" in report["cells"]["1 images_per_second"][1]["lines"][1]
    titles = [row["title"] for row in report["rows"]]
    assert titles[1:3] == ["batch 1: p50, ms", "batch 1: p99, ms"]
    assert not any("energy" in title or "device memory" in title for title in titles)
    assert report["sentence"].endswith(
        "; batch 8: torch serves 2.00 times as many images/s as jax (75% interval 2.00–2.00)"
    )
    reports.write_report(report, bench / "out")
    page = (bench / "out/report.html").read_text()
    assert page.count("<img") == 4 and "batch 8: images/s" in page
    assert "torch, batch 8</th><td>ok</td><td>–</td><td>400</td>" in page
    with (bench / "out/report.csv").open(newline="") as file:
        units = {row["metric"]: row["unit"] for row in csv.DictReader(file)}
    assert units["8 images_per_second"] == "images/s" and units["8 p50_ms"] == "ms"
    assert "over batch sizes" in page and report["parity"] in page
    shown = (bench / "out/report.svg").read_text()  # matplotlib writes texts as comments, too
    assert all(f"<!-- {text} -->" in shown for text in ("1", "8", "10", "20"))


@pytest.mark.parametrize("low, high, ticks", [(37, 42, (39, 42)), (3, 900, (5, 10, 500))])
def test_a_logarithmic_axis_has_plain_numbers(low, high, ticks):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.add_subplot(xscale="log", xlim=(low, high))
    reports.number_log_axis(axes.xaxis)
    figure.draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert {str(tick) for tick in ticks} <= set(shown)
    assert not axes.get_xticklabels(minor=True)


def test_serving_under_load_is_compared(bench):
    items = serve_both()
    for item in items:
        p50 = item["timing"]["p50_seconds"]
        item["timing"] |= {"load_p50_seconds": 2 * p50, "load_p99_seconds": 9 * p50}
        item["timing"] |= {"served_per_second": 5.0, "slo_per_second": 1 / p50}
    report = report_on(items)
    assert report["cells"]["8 slo_per_second"][1]["lines"] == [
        "50.0 (45.5–55.6)",
        "2.00 times (2.00–2.00)",
    ]
    titles = [row["title"] for row in report["rows"]]
    assert "batch 1: under load: p99, ms" in titles
    assert "batch 1: most requests/s in --slo-ms" in titles


def test_a_batch_that_failed_is_not_measured(bench):
    error = {"status": "oom", "error": "out of memory: lower --batch-sizes 8"}
    report = report_on(serve_both(**error))
    assert report["rows"][0]["cells"][1]["lines"] == ["3 of 3"]  # batch 1 did run
    cell = report["cells"]["8 p50_ms"][1]
    assert cell["median"] is None and cell["reason"] == "batch 8: oom"
    assert report["sentence"].count("batch") == 1
    said = "batch 8: oom: out of memory: lower --batch-sizes 8"
    assert report["failed"] == [f"torch {repeat}, {said}" for repeat in (1, 2, 3)]
    alone = [serve("jax", 1, 1, 0.01), serve("jax", 1, 8, 1, **error, timing={})]
    report = report_on(alone)
    assert "8 p50_ms" in report["cells"]  # a row, though no entry ran it
    reports.write_report(report, bench / "out")
    assert "batch 8: oom" in (bench / "out/report.html").read_text()


def test_serving_by_hand_without_a_comparison_is_paired_in_its_order():
    items = [item | {"id": f"{n:032x}~8"} for n, item in enumerate(serve_both())]
    report = report_on(items)
    assert report["cells"]["8 p50_ms"][1]["versus"]["pairs"] == 3
    assert any("did not run interleaved" in line for line in report["warnings"])


def test_serving_commands(bench, capsys):
    (bench / "latency.py").touch()
    arguments = ("--script", "latency.py", "--entries", "jax", "native-torch:--iterations=9")
    work = ("--", "--batch-sizes", "1", "--", "--recipe", "tiny")
    assert run_main(*arguments, "--repeats", 1, "--dry-run", *work) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("--keras-backend jax --seed 1 --batch-sizes 1 -- --recipe tiny")
    expected = (
        "--keras-backend torch --native --seed 1 --batch-sizes 1 --iterations=9 -- --recipe tiny"
    )
    assert second.endswith(expected) and "latency.py" in second and "peers" not in second


def test_resume_takes_up_a_run_that_lacks_a_batch_size(bench, monkeypatch, capsys):
    (bench / "latency.py").write_text((bench / "child.py").read_text())
    ready = {}
    for name in ("jax", "torch"):
        ready[f"{name}1"] = [serve(name, 1, size, 0.01) for size in (1, 8)]
        for item in ready[f"{name}1"]:
            item["config"]["rows"] = 2
    (bench / "ready.json").write_text(json.dumps(ready))
    monkeypatch.setenv("FATES", '{"torch1": "half", "jax1": "raise"}')
    arguments = ("--script", "latency.py", "--backends", "jax", "torch", "--repeats", 1)
    arguments = (*arguments, "--no-parity")
    assert run_main(*arguments) == 1
    shown = capsys.readouterr().out
    assert "batch 1: " in shown and "images/s, s" not in shown  # a report on serving all the same
    assert "torch 1/1: oom (killed" in shown
    assert "failed: torch 1: oom: killed" in " ".join(shown.split())
    monkeypatch.setenv("FATES", "{}")
    assert run_main(*arguments, "--resume") == 0
    assert [name for name, _ in read_ran(bench)[2:]] == ["jax1", "torch1"]
    assert run_main(*arguments, "--resume") == 0 and len(read_ran(bench)) == 4


def test_a_loss_does_not_make_a_serving_run_complete():
    """It knows of no batch sizes, and may be noted after one of them was measured"""
    row = serve("jax", 1, 1, 0.01) | {"id": "mine~1"}
    row["config"]["rows"] = 2
    loss = records.create_record("latency", id="mine", status="interrupted")
    assert compare.find_done([row, loss]) == compare.find_done([loss, row]) == set()
    other = row | {"id": "mine~8"}
    assert compare.find_done([row, loss, other]) == {"mine"}
    assert compare.find_done([row, other, other | {"status": "oom"}]) == set()  # in a later try


def test_all_that_is_started_reads_the_same_dotenv(bench, monkeypatch):
    monkeypatch.setenv("FATES", "{}")  # to be unset again afterwards
    monkeypatch.delenv("FATES")
    (bench / ".env").write_text("""FATES={"jax1": "raise"}""")
    assert run_main("--script=child.py", "--backends", "jax", "torch", "--repeats", 1) == 1


def test_exported_rows_are_entries_of_their_own():
    items = []
    for item in serve_both():
        for runtime, share in (("compiled", 1.0), ("onnx", 0.5)):
            timing = {k: v * share for k, v in item["timing"].items()}
            config = item["config"] | {"runtime": runtime, "rows": 4}
            made = {"id": f"{item['id']}~{runtime}", "timing": timing, "config": config}
            items.append(item | made | {"quality": {"test_accuracy": 0.5}})
    loss = {"status": "error", "error": "3 of 4 rows were measured", "timing": {}}
    loss |= {"id": "0a1b2c3d-20260101T000000-r1-jax", "config": {}}
    report = report_on([*items, items[0] | loss], reference="torch:--export=onnx")
    assert report["failed"] == []  # the row that it lacked came with a --resume
    report = report_on(items, reference="torch:--export=onnx")
    assert report["labels"] == ["jax", "jax:--export=onnx", "torch", "torch:--export=onnx"]
    assert report["cells"]["8 p50_ms"][2]["lines"][1] == "2.00 times (2.00–2.00)"
    assert report["cells"]["8 test_accuracy_percent"][2]["versus"]["estimate"] == 0
    assert not report["warnings"]


def test_two_machines_side_by_side(bench, capsys):
    ours = write_file(bench / "a.jsonl", pair_up())
    theirs = pair_up(2, device__node_name="orin")[1::2]
    for item in theirs:
        item["id"] = item["id"].replace("0a1b", "ffff")
    theirs = write_file(bench / "b.jsonl", theirs)
    assert run_main(ours, theirs) == 0
    assert verdict.group_records(records.read_records(theirs)[0])[0]["label"] == "torch"
    shown = capsys.readouterr().out
    assert "torch @ orin" in shown and "jax @ box" in shown and "different machines" in shown


def test_failed_and_partial_rows():
    items = pair_up()
    items[0] |= {"status": "oom", "error": "needs 9 GiB"}
    items[0]["timing"] = {}
    items[3]["timing"]["train_images_per_second"] = None
    report = report_on(items)
    assert report["failed"] == ["jax 1: oom: needs 9 GiB"]
    jax, torch = report["cells"]["images_per_second"]
    assert (len(jax["values"]), len(torch["values"]), torch["versus"]["pairs"]) == (2, 2, 1)
    nothing = report_on([item | {"status": "error", "error": "x"} for item in pair_up()])
    assert nothing["sentence"].startswith("nothing to compare")
    assert nothing["footnotes"] == ["no run succeeded"]


def test_a_retried_run_counts_once():
    items = pair_up()
    failed = items[0] | {"status": "error", "error": "x", "timing": {}}
    later = items[0] | {"started": "2026-01-02T00:00:00Z"}
    report = report_on([failed, *items[1:], later])
    assert report["failed"] == [] and len(report["entries"][0]["runs"]) == 3
    assert report["labels"] == ["jax", "torch"]


# ---- The files


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.values, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "data":
            self.values.append(float(dict(attributes)["value"]))

    def handle_data(self, data):
        self.text += data


def test_the_files_agree_and_load_nothing(bench):
    items = pair_up()
    items[1]["notes"] += ["<script>alert(1)</script>", "the card's fan stood still"]
    path = write_file(bench / "a.jsonl", items)
    assert run_main(path, "--report", "out") == 0
    page = Page()
    page.feed((bench / "out/report.html").read_text())
    with (bench / "out/report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert page.values == [float(row["median"]) for row in rows if row["median"]]
    assert len(page.values) == 2 * 7
    assert all(row["reason"] for row in rows if not row["median"])
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    assert page.tags.count("img") == 5 and ("name", "viewport") in page.attributes
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert all(link.startswith("data:") for link in links)
    for row in rows:
        if row["against"]:
            assert row["against"] == "jax"
            assert float(row["against_low"]) <= float(row["against_estimate"])
            assert float(row["against_estimate"]) <= float(row["against_high"])
    table = (bench / "out/report.md").read_text()
    assert (
        "| training, images/s | 402 (401–403) | 302 (301–303)<br>0.75 times (0.75–0.75) |" in table
    )
    assert "<script>" not in table and "the card's fan" in table
    assert b"<svg" in (bench / "out/report.svg").read_bytes()
    assert (bench / "out/report.png").read_bytes().startswith(b"\x89PNG")
    assert b"minutes" in (bench / "out/accuracy.svg").read_bytes()


@pytest.mark.parametrize("folder", [[], ["--report=report"]])
def test_a_report_is_uploaded(bench, monkeypatch, folder):
    """As far as an offline run shows it: the page, the medians, and all files as an artifact"""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(bench / "no-netrc"))
    path = write_file(bench / "results.jsonl", pair_up())
    command = [sys.executable, str(ROOT / "compare.py"), str(path), "--wandb", *folder]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True)
    assert done.returncode == 0 and "WANDB_API_KEY" in done.stderr, done.stderr
    assert "warning" not in done.stderr
    (log,) = bench.glob("wandb/offline-run-*/run-*.wandb")
    rows, summary, _ = read_wandb(log)
    assert summary["images_per_second/jax"] == 402 and "torch" in summary["sentence"]
    assert not [name for name, value in summary.items() if value is None]
    assert rows[0]["report._type"] == "html-file"
    (page,) = log.parent.glob("files/media/html/*.html")
    assert "which backend?" in page.read_text()
    (artifact,) = [item["artifact"] for item in read_log(log) if item["type"] == "artifact"]
    names = {entry["path"] for entry in artifact["manifest"]["contents"]}
    forms = ("html", "md", "csv", "svg", "png")
    assert names == {"results.jsonl", "accuracy.svg", *(f"report.{form}" for form in forms)}
    assert (bench / "report").exists() == bool(folder)


def test_a_report_on_failures_alone_can_be_written(bench):
    items = [item | {"status": "error", "error": "x", "timing": {}} for item in pair_up()]
    assert run_main(write_file(bench / "a.jsonl", items), "--report", "out") == 0
    assert "jax 1: error: x" in (bench / "out/report.html").read_text()


@pytest.mark.parametrize("count", [2, 5])
def test_terminal_output_fits_80_columns(bench, capsys, count):
    items = []
    for index in range(count):
        for item in pair_up()[::2]:
            label = f"jax:--learning-rate=0.000{index}%20--augmentation=randaugment"
            items.append(item | {"id": f"{item['id']}:{label}".replace("jax:jax", "jax")})
    assert run_main(write_file(bench / "a.jsonl", items)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


# ---- Running


def test_runs_are_interleaved_and_flags_pass(bench, capsys):
    arguments = ("--backends", "jax", "torch", "--script", "child.py", "--repeats", 3)
    assert run_main(*arguments, "--", "--dataset", "synthetic", "--odd flag", "a 'b'") == 0
    ran = read_ran(bench)
    assert [name for name, _ in ran] == ["jax1", "torch1", "torch2", "jax2", "jax3", "torch3"]
    path = result_file(bench)
    expected = ["--results-path", str(path.relative_to(bench)), "--keras-backend", "jax"]
    expected += ["--no-use-wandb", "--seed", "1", "--dataset", "synthetic", "--odd flag", "a 'b'"]
    assert ran[0][1] == expected
    found, problems = records.read_records(path)
    assert not problems and len(found) == 6
    shown = capsys.readouterr().out
    assert len(re.findall(r"^(jax|torch) \d/3: \d+ images/s", shown, re.M)) == 6
    assert shown.rstrip().endswith("accuracy: no difference shown")


def test_runs_that_start_together_are_measured_in_turn(bench, capsys, monkeypatch):
    monkeypatch.setenv("FATES", '{"torch2": "raise"}')
    arguments = ("--backends", "jax", "torch", "--script", "child.py", "--repeats", 3)
    assert run_main(*arguments, "--no-parity", "--start-together", 4) == 1
    told = (bench / "turns.txt").read_text().splitlines()
    told[:3], told[9:11] = sorted(told[:3]), sorted(told[9:11])  # begun at once: any is first
    assert told == [
        *("jax1 begins", "jax2 begins", "torch1 begins"),
        *("jax1 is measured", "jax1 was measured", "torch1 is measured", "torch1 was measured"),
        *("jax2 is measured", "jax2 was measured"),
        *("jax3 begins", "torch3 begins"),
        *("jax3 is measured", "jax3 was measured", "torch3 is measured", "torch3 was measured"),
    ]
    assert "torch 2/3: error (ValueError: no luck)" in capsys.readouterr().out
    statuses = [item["status"] for item in records.read_records(result_file(bench))[0]]
    assert sorted(statuses) == ["error", *["ok"] * 5]


def test_a_run_that_does_not_wait_ends_them_all(bench, capsys, monkeypatch):
    arguments = ("--backends", "jax", "torch", "--script", "child.py", "--no-parity")
    arguments = (*arguments, "--start-together", 2, "--results-path", "results.jsonl")
    monkeypatch.setenv("FATES", '{"jax1": "impatient"}')
    assert run_main(*arguments) == 2
    assert "expected --num-epochs 2 or more" in capsys.readouterr().err
    assert not compare.find_done(records.read_records(bench / "results.jsonl")[0])
    monkeypatch.setenv("FATES", json.dumps(dict.fromkeys(("jax1", "torch1"), "impatient")))
    assert run_main(*arguments, "--repeats", 1) == 2
    assert not compare.find_done(records.read_records(bench / "results.jsonl")[0])
    assert (bench / "turns.txt").read_text() == "torch1 begins\n"


def test_the_least_memory_is_found(bench, capsys, monkeypatch):
    ready = {f"{name}0": create_train_record(name, 0) for name in ("jax", "torch")}
    (bench / "ready.json").write_text(json.dumps(ready))
    monkeypatch.setenv("FATES", json.dumps({"jax0": 1.2, "torch0": 0.1}))
    arguments = ("--find-memory", "--backends", "jax", "torch", "--script", "child.py")
    assert run_main(*arguments) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[1]: line.split()[3:8:2] for line in shown.splitlines() if "│" in line}
    for name, needed in (("jax", 1.2), ("torch", 0.1)):
        least, most, _ = map(float, rows[name])
        assert most < needed <= least <= 1.06 * most  # 1.05, but for what is shown
    assert "jax, no limit: ok" in shown and "oom (what():  std::bad_alloc)" in shown
    found, problems = records.read_records(result_file(bench))
    assert not problems and {item["status"] for item in found} == {"ok", "oom"}
    monkeypatch.setenv("FATES", json.dumps({"jax0": "raise", "torch0": 99.0}))
    assert run_main(*arguments) == 1  # one fails without a limit, the other with any
    rows = [line.split()[1:8:2] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert ["jax", "–", "–", "–"] in rows and rows[-1][:2] == ["torch", "–"]


def test_dry_run_runs_nothing(bench, capsys, monkeypatch):
    monkeypatch.setenv("HERE", "/a folder")
    (bench / "peers").mkdir()
    entries = ("--entries", "jax", "native-torch", "keras-io-torch:--trainer=fit --seed=4")
    launcher = ("--launcher", "docker run -v $HERE:/app vit:ook-{image}")
    arguments = (*entries, *launcher, "--dry-run", "--repeats", 2, "--", "--use_wandb=True")
    assert run_main(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and not list(bench.glob("results/*"))
    start = r"docker run -v '/a folder:/app' vit:ook-"
    assert re.match(
        start + r"jax env VIT_RECORD_ID=\S+-r1-jax python vit.py --results-path", lines[0]
    )
    assert re.match(start + r"pytorch env \S+ python peers/native_torch.py --results", lines[1])
    assert "--keras-backend" not in lines[1] and "--seed 1 --use_wandb=True" in lines[1]
    assert "python peers/keras_io.py --results" in lines[2]
    assert lines[2].endswith("--keras-backend torch --use_wandb=True --trainer=fit --seed=4")
    assert lines[3].split("--seed")[0] == lines[2].replace("-r1-", "-r2-").split("--seed")[0]
    assert "--no-use-wandb" not in "".join(lines)


def test_default_is_every_installed_backend(bench, capsys):
    assert run_main("--script", "child.py", "--dry-run", "--repeats", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["jax" in lines[0], "torch" in lines[1], len(lines)] == [True, True, 2]
    assert all("--dataset synthetic" in line for line in lines)


FATES = [
    ("raise", "error", "ValueError: no luck"),
    ("refuse", "error", "Unrecognized options: --epoch"),
    ("kill", "oom", "SIGKILL"),
    ("silent", "error", "neither record nor message"),
    ("anonymous", "error", "the id mine instead"),
    ("oom", "oom", None),
]


@pytest.mark.parametrize("fate, status, error", FATES)
def test_a_failed_run_is_a_row_and_resume_tries_it_again(bench, monkeypatch, fate, status, error):
    monkeypatch.setenv("FATES", json.dumps({"torch1": fate}))
    arguments = ("--backends", "jax", "torch", "--script", "child.py", "--repeats", 2)
    assert run_main(*arguments) == 1
    path = result_file(bench)
    found = {item["id"]: item for item in records.read_records(path)[0]}
    (failed,) = (item for item in found.values() if item["id"].endswith("-r1-torch"))
    assert failed["status"] == status and (error is None or error in failed["error"])
    assert failed["backend"] == "torch" and records.check_structure(failed) == []
    assert len(read_ran(bench)) == 4
    monkeypatch.setenv("FATES", "{}")
    assert run_main(*arguments, "--resume") == 0
    assert [name for name, _ in read_ran(bench)[4:]] == ["torch1"]
    assert run_main(*arguments, "--resume", "--repeats", 3) == 0  # more repeats of the same
    assert len(read_ran(bench)) == 7 and path == result_file(bench)


def start_compare(bench, *arguments, launcher=("--launcher", "env"), **environment):
    """compare.py as a process; `--launcher env` spares it the look for installed backends"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [sys.executable, "-W", "error", ROOT / "compare.py", *launcher]
    command += ["--script", "child.py", "--backends", "jax", "torch", "--repeats", "2", *arguments]
    environment = {**os.environ, "PATH": path, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=bench, env=environment, **pipes)


def wait_for_runs(bench, count, process):
    while not (bench / "ran.txt").exists() or len(read_ran(bench)) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_loses_nothing(bench, number):
    with start_compare(bench, FATES='{"torch2": "hang"}') as process:
        wait_for_runs(bench, 3, process)
        process.send_signal(number)
        shown = process.communicate()[0]
    assert process.returncode == 130, shown
    assert "--resume" in shown and "Traceback" not in shown
    statuses = [item["status"] for item in records.read_records(result_file(bench))[0]]
    assert statuses == ["ok", "ok", "interrupted"]
    with start_compare(bench, "--resume") as process:
        shown = process.communicate()[0]
    assert process.returncode == 0, shown
    assert [name for name, _ in read_ran(bench)[3:]] == ["torch2", "jax2"]


def test_interruption_stops_all_that_started_together(bench):
    arguments = ("--start-together", "2", "--no-parity")
    fates = '{"jax1": "wait", "torch1": "wait"}'
    with start_compare(bench, *arguments, launcher=(), FATES=fates) as process:
        while not (bench / "turns.txt").exists() or "measured" not in read_text(bench):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        shown = process.communicate()[0]
    assert process.returncode == 130, shown
    assert "interrupted after 0 runs" in shown and "Traceback" not in shown
    assert read_text(bench).count("is measured") == 1  # the other one never had its turn
    assert read_text(bench).count("was measured") == 0


def test_a_child_that_was_stopped_did_not_run_out_of_memory(bench, monkeypatch):
    monkeypatch.setattr(compare, "GRACE", 0.1)
    deaf = ["sh", "-c", "trap '' INT; echo ready >ready; sleep 60"]
    run = {"command": deaf, "id": "x", "kind": "train", "name": "jax"}
    with ThreadPoolExecutor() as pool:
        begun = pool.submit(compare.measure_run, run, bench / "a.jsonl", False)
        while not (bench / "ready").exists():
            time.sleep(0.02)
        (child,) = compare.CHILDREN
        compare.stop_child(child)
        record, interrupted = begun.result()
    assert child.returncode == -signal.SIGKILL
    assert record["status"] == "interrupted" and interrupted


def test_a_full_disk_leaves_the_answer_on_the_screen(bench):
    """A file's largest size stands in for it"""
    path = write_file(bench / "a.jsonl", pair_up())
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({2**12}, {2**12}))\n"
    limit += f"import runpy, sys; sys.path[0] = {str(ROOT)!r}\n"
    limit += "runpy.run_path(sys.path[0] + '/compare.py', run_name='__main__')"
    command = [sys.executable, "-c", limit, str(path), "--report", "out"]
    done = subprocess.run(command, cwd=bench, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "torch" in done.stdout and "jax trained" in done.stdout
    assert "was not written" in done.stderr and "Traceback" not in done.stderr


def read_text(bench):
    return (bench / "turns.txt").read_text()


def test_resume_after_a_kill_and_a_torn_line(bench):
    with start_compare(bench, FATES='{"torch2": "hang"}') as process:
        wait_for_runs(bench, 3, process)
        process.kill()
        process.communicate()
    path = result_file(bench)
    assert len(records.read_records(path)[0]) == 2
    with path.open("a") as file:
        file.write('{"schema": 1, "kind": "tr')
    with start_compare(bench, "--resume") as process:
        shown = process.communicate()[0]
    assert process.returncode == 0, shown
    assert "warning: " in shown and "line 3" in shown
    assert len(read_ran(bench)) == 5


# ---- Bad input


def write_newer(path):
    path.write_text(
        json.dumps(create_train_record("jax", 1) | {"schema": records.SCHEMA + 1}) + "\n"
    )
    return [path]


def write_mixed(path):
    items = [create_train_record("jax", 1), create_train_record("torch", 1)]
    items[1]["config"]["dataset"] = "cifar100"
    return [write_file(path, items)]


def write_empty(path):
    path.write_text("")
    return [path]


def write_parity(path):
    return [write_file(path, [records.create_record("parity", status="ok")])]


BAD_INPUT = [
    (["--entries", "mxnet"], "unknown entry 'mxnet': expected one of jax, torch"),
    (["--backends", "native-jax"], "unknown backend 'native-jax': expected one of jax, torch"),
    (["--entries", "jax:fast"], "expected flags after the colon, as in jax:--flag=value"),
    (["--entries", "jax:--a='b"], "quote the flags"),
    (["--entries", "jax:--dataset=x"], "--dataset is the same for all entries"),
    (["--entries", "jax", "jax"], "entry 'jax' is there twice"),
    (["--entries", "tensorflow"], "pip install '.[tensorflow]'"),
    (["--entries", "jax", "--script", "no.py"], "there is no no.py; see --script"),
    (
        ["--entries", "keras-io-jax", "--script", "latency.py"],
        "there to be trained, not to be served",
    ),
    (["--repeats", "0"], "expected --repeats of at least 1, got 0"),
    (["--reference", "best"], "unknown reference 'best': expected one of jax, torch"),
    (["--target-accuracy", "40"], "expected --target-accuracy of 0 to 1, got 40"),
    (["--", "--results-path", "x"], "--results-path cannot stand after --"),
    (["--find-memory", "--resume"], "--find-memory trains with vit.py and prints: leave out --re"),
    (["--find-memory", "--entries", "jax", "native-jax"], "leave out native-jax"),
    (["--entries", "jax:--model-path=~/a.keras"], "expected flags without ~; write a path in full"),
    (["--launcher", "env 'A=1"], "No closing quotation; quote it as in a shell"),
    (["--report", "child.py"], "--report: cannot make the folder child.py: File exists"),
    (["--results-path", "child.py/a.jsonl"], "--results-path: cannot make the folder child.py: "),
    (["--start-together", "0"], "expected --start-together of at least 1, got 0"),
    (["--cool-down", "-1"], "expected --cool-down of 0 seconds or more, got -1.0"),
    (["--cool-down", "nan"], "expected --cool-down of 0 seconds or more, got nan"),
    (["--start-together", "2", "--launcher", "env"], "expected runs of vit.py without --launcher"),
    (["--launcher", "no-such-program"], "cannot start 'no-such-program'"),
    (["missing.jsonl"], "missing.jsonl: expected a file of records"),
    (write_empty, "empty file"),
    (write_newer, "newer than this program's"),
    (write_mixed, "expected one dataset, got cifar100 and synthetic"),
    (write_parity, "expected records of kind train or latency, got none"),
]


@pytest.mark.parametrize("arguments, expected", BAD_INPUT)
def test_bad_input_is_one_line(bench, capsys, arguments, expected):
    made = not isinstance(arguments, list)
    arguments = arguments(bench / "a.jsonl") if made else arguments
    script = (
        [] if made or "--script" in arguments or arguments[0][0] != "-" else ["--script=child.py"]
    )
    assert run_main(*script, *arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [("--backends", "jax"), ("--find-memory",)])
def test_files_are_not_measured(bench, capsys, flags):
    assert run_main(write_file(bench / "a.jsonl", pair_up()), *flags) == 2
    assert "leave out" in capsys.readouterr().err


def test_no_backend_at_all(bench, capsys, monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert run_main() == 2
    assert "pip install '.[jax]'" in capsys.readouterr().err


def test_a_broken_line_is_a_warning(bench, capsys):
    path = write_file(bench / "a.jsonl", pair_up())
    with path.open("a") as file:
        file.write("{broken\n")
    assert run_main(path) == 0
    assert "warning: a.jsonl line 7: not JSON" in capsys.readouterr().out


def test_help_is_quick_and_imports_no_keras():
    code = "import sys, compare; print({'keras', 'jax', 'torch', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


# ---- Records that no program wrote

STRANGE = [None, -1, 0, "x", [], {}, 1e308, 1 << 70, True, "é" * 300, [None], {"a": None}, [[1]]]


def list_places(value, place=()):
    yield place
    keys = list(value) if isinstance(value, dict) else []
    keys = range(min(len(value), 3)) if isinstance(value, list) else keys
    for key in keys:
        yield from list_places(value[key], (*place, key))


def spoil(record, rng):
    """Put something strange into up to four places of a record, or take them out"""
    for _ in range(rng.choice((1, 1, 1, 4))):
        place = rng.choice([place for place in list_places(record) if place])
        inner = record
        for key in place[:-1]:
            inner = inner[key]
        if isinstance(inner, dict) and rng.random() < 0.2:
            del inner[place[-1]]
        else:
            inner[place[-1]] = rng.choice(STRANGE)


@pytest.mark.parametrize("seed", range(60))
def test_a_spoiled_record_never_crashes_a_report(bench, capsys, seed):
    rng = random.Random(seed)
    items = json.loads(json.dumps(pair_up() if seed % 2 else serve_both()))
    spoil(rng.choice(items), rng)
    (bench / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    arguments = ("--report", "out") if seed % 10 < 2 else ()
    code, told = run_main("a.jsonl", *arguments), capsys.readouterr()
    assert code in (0, 2) and (code == 0 or len(told.err.splitlines()) == 1)
