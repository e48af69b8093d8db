"""Records: written whole or not at all, read without ever crashing, every null explained."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from harness import record as rec

ROOT = Path(__file__).resolve().parent.parent


def make_record(**fields):
    return rec.create_record("train", status="ok", backend="jax", precision="float32", **fields)


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_new_record_has_every_key_in_order_and_is_good():
    record = make_record()
    assert tuple(record) == rec.KEYS
    assert rec.check_record(record) == []
    assert record["started"].endswith("Z") and len(record["started"]) == 20
    assert record["id"] != make_record()["id"]
    assert rec.create_record("latency")["status"] == "error"
    record["device"]["kind"] = "cpu"
    assert make_record()["device"] == {}  # groups are not shared between records


@pytest.mark.parametrize("arguments", [("race", {}), ("train", {"colour": "red"})])
def test_create_record_refuses_what_it_does_not_know(arguments):
    kind, fields = arguments
    with pytest.raises(ValueError, match="expected .* got"):
        rec.create_record(kind, **fields)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": 9}, "schema 9 is newer than this program's 1: update the program"),
        ({"schema": 0}, "schema: expected 1, got '0'"),
        ({"schema": True}, "schema: expected int, got bool"),
        ({"kind": "race"}, "kind: expected train, pretrain, latency, parity, got 'race'"),
        ({"status": "fine"}, "status: expected ok, oom"),
        ({"memory": [1]}, "memory: expected dict, got list"),
        ({"notes": [1]}, "notes: expected a list of strings"),
        ({"argv": [1]}, "argv: expected a list of strings"),
        ({"colour": "red"}, "key 'colour' is unknown"),
    ],
)
def test_check_record_names_each_problem(change, problem):
    (found,) = rec.check_record(make_record() | change)
    assert found.startswith(problem) and "\n" not in found


def test_a_missing_key_is_named():
    record = make_record()
    del record["energy"]
    assert rec.check_record(record) == ["key 'energy' is missing"]


def test_every_null_needs_a_reason():
    record = make_record(memory={"device_peak_bytes": None, "host_peak_bytes": 5})
    record["device"] = {"clocks": {"gpu_mhz": None}, "gpus": [{"name": "x", "memory_bytes": None}]}
    record["quality"] = {"loss": [1.0, None, None]}
    names = [problem.split(" ")[0] for problem in rec.check_record(record)]
    assert names == [
        "device.clocks.gpu_mhz",
        "device.gpus.memory_bytes",
        "memory.device_peak_bytes",
        "quality.loss",
    ]
    record["notes"] = [
        "device: all unknown",
        "memory.device_peak_bytes: not on the CPU",
        "quality.loss: diverged",
    ]
    assert rec.check_record(record) == []
    record["backend"] = None
    assert "backend is null without a reason" in rec.check_record(record)[0]


def test_the_most_specific_reason_wins():
    notes = ["memory: group", "memory.device_peak_bytes: own", "on battery: plug in the charger"]
    record = make_record(notes=notes)
    assert rec.reason_for(record, "memory.device_peak_bytes") == "own"
    assert rec.reason_for(record, "memory.host_peak_bytes") == "group"
    assert rec.reason_for(record, "memory.device_peak") == "group"  # a prefix is not the field
    assert rec.reason_for(record, "energy.joules") is None


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    first = make_record(config={"seed": 1, "name": "Ärger\n"})
    second = make_record()
    rec.append_record(path, first)
    rec.append_record(str(path), second)
    assert rec.read_records(path) == ([first, second], [])
    assert len(path.read_bytes().splitlines()) == 2


def test_values_become_plain_and_non_finite_becomes_null_with_a_reason(tmp_path):
    path = tmp_path / "results.jsonl"
    record = make_record(
        config={"data": Path("/data"), "betas": (0.9, 0.99)},
        model={"parameters": np.int64(7), "scale": np.float32(0.5), "shape": np.array([1, 2])},
        quality={"loss": [1.0, float("nan"), np.float32("inf")]},
        timing={"build_seconds": float("inf")},
        notes=["timing: the clock broke"],
    )
    rec.append_record(path, record)
    ((read,), problems) = rec.read_records(path)
    assert problems == [] and rec.check_record(read) == []
    assert read["config"] == {"data": "/data", "betas": [0.9, 0.99]}
    assert read["model"] == {"parameters": 7, "scale": 0.5, "shape": [1, 2]}
    assert read["quality"] == {"loss": [1.0, None, None]}
    assert read["timing"] == {"build_seconds": None}
    assert rec.reason_for(read, "timing.build_seconds") == "the clock broke"
    assert rec.reason_for(read, "quality.loss").startswith("not a finite number")
    assert record["notes"] == ["timing: the clock broke"]  # the caller's record is left alone


def test_a_value_without_a_json_form_leaves_the_file_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(TypeError):
        rec.append_record(path, make_record(config={"odd": object()}))
    assert not path.exists()


def test_many_processes_lose_and_tear_nothing(tmp_path):
    path = tmp_path / "results.jsonl"
    code = (
        "import sys; from harness import record as rec\n"
        "for turn in range(50):\n"
        "    padding = 'x' * (turn * 300)\n"
        "    config = {'who': int(sys.argv[2]), 'turn': turn, 'padding': padding}\n"
        "    rec.append_record(sys.argv[1], rec.create_record('train', config=config))\n"
    )
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda who: run_python(code, path, who), range(8)))
    assert [process.stderr for process in done] == [""] * 8
    records, problems = rec.read_records(path)
    assert problems == []
    seen = [(record["config"]["who"], record["config"]["turn"]) for record in records]
    assert sorted(seen) == [(who, turn) for who in range(8) for turn in range(50)]
    for who in range(8):  # each process' own order is kept
        assert [turn for one, turn in seen if one == who] == list(range(50))


def test_after_a_torn_line_the_next_record_starts_a_new_one(tmp_path):
    path = tmp_path / "results.jsonl"
    first, last = make_record(), make_record()
    rec.append_record(path, first)
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "kind": "tr')
    rec.append_record(path, last)
    records, problems = rec.read_records(path)
    assert records == [first, last]
    (problem,) = problems
    assert problem.startswith("results.jsonl line 2: not JSON (Unterminated string")
    assert problem.endswith(": skipped")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "results.jsonl"
    rec.append_record(path, make_record())
    before = path.read_bytes()
    code = (
        "import resource, signal, sys; from harness import record as rec\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "try: rec.append_record(sys.argv[1], rec.create_record('train'))\n"
        "except OSError as error: print('refused', error.errno)\n"
    )
    # Room for 100 bytes more: a short write. Room for none: a failed one.
    for room, number in ((100, errno.ENOSPC), (0, errno.EFBIG)):
        done = run_python(code, path, len(before) + room)
        assert (done.stdout.strip(), done.stderr) == (f"refused {number}", "")
        assert path.read_bytes() == before
    rec.append_record(path, make_record())
    assert len(rec.read_records(path)[0]) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_no_space_is_an_os_error():
    with pytest.raises(OSError) as caught:
        rec.append_record("/dev/full", make_record())
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="this system has no /dev/null")
def test_records_may_be_thrown_away():
    rec.append_record("/dev/null", make_record())  # which no disk keeps: there is nothing to sync


def test_broken_lines_are_named_and_skipped(tmp_path):
    path = tmp_path / "results.jsonl"
    good = json.dumps(make_record()).encode()
    newer = json.dumps(make_record() | {"schema": 9, "shape": 1}).encode()
    broken = {
        b"\xff\xfe{}": "not JSON ('utf-8' codec",
        b"[" * 100_000: "not JSON (",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000: "not JSON (",
        b'{"loss": NaN}': "not JSON (NaN is no JSON value)",
        b"9" * 5000: "not JSON (",
        b"[1]": "expected a JSON object, got list",
        b"null": "expected a JSON object, got NoneType",
        b"\x00\x01": "not JSON (",
        b"{}": "key 'schema' is missing",
        newer: "schema 9 is newer than this program's 1: update the program",
        b'{"\\ud800": "\\ud800"}': "key 'schema' is missing",
    }
    path.write_bytes(b"\n".join([good, *broken, b"", good]))
    records, problems = rec.read_records(path)
    assert len(records) == 2 and len(problems) == len(broken)
    for number, (expected, problem) in enumerate(zip(broken.values(), problems, strict=True), 2):
        assert problem.startswith(f"results.jsonl line {number}: {expected}")
        assert problem.endswith(": skipped") and "\n" not in problem
        problem.encode()  # can be printed


def test_arbitrary_bytes_never_crash(tmp_path):
    path = tmp_path / "results.jsonl"
    good = json.dumps(make_record()).encode()
    generator = np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(good * 2)
        for _ in range(generator.integers(1, 20)):
            content[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(bytes(content) + b"\n" + good)
        records, _ = rec.read_records(path)
        assert records[-1:] == [json.loads(good)]


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_nothing_to_read_is_one_line_with_a_remedy(tmp_path, content):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(rec.RecordError, match="expected .*, got .*: ") as caught:
        rec.read_records(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(rec.RecordError):
        rec.read_records(tmp_path)  # a folder


def test_the_module_needs_nothing_but_the_standard_library():
    code = (
        "import sys; import harness.record\n"
        "names = {'keras', 'jax', 'torch', 'numpy', 'pynvml', 'harness.telemetry'}\n"
        "print(sorted(names & set(sys.modules)))\n"
    )
    assert run_python(code).stdout == "[]\n"
