"""What a run loses when it is killed, stopped or has no room to write: nothing."""

import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    MODEL,
    ROOT,
    SMALL,
    child_environment,
    only_line,
    read_last_record,
    read_log,
    read_wandb,
    run_code,
    run_python,
    run_vit,
)
from wandb_server import WandbServer

from harness import record

# Dropout, averages and a schedule: all that a state holds is in use.
KILLS = int(os.environ.get("KILLS", 2))  # a start takes seconds; results/faults.md was made with 30
EPOCHS = 8 * KILLS
ONE_BACKEND = pytest.mark.parametrize("backend", ["jax"], scope="session")  # the same on each
LONG = [*SMALL, f"--num-epochs={EPOCHS}", "--ema=0.9", "--schedule=cosine", "--no-use-wandb"]
LONG += ["--optimizer=muon"]


def start(folder, *flags, backend="jax", **environment):
    command = [sys.executable, "-u", str(ROOT / "vit.py"), f"--keras-backend={backend}"]
    return subprocess.Popen(
        [*command, *LONG, *flags],
        cwd=folder,
        env=child_environment(folder, **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_epoch(child, epoch):
    for line in child.stdout:
        if line.startswith(f"epoch {epoch}/"):
            return
    pytest.fail(child.stderr.read())


def kill_after(folder, epoch, **choices):
    """A run that is killed after an epoch; what it left."""
    with start(folder, **choices) as child:
        wait_for_epoch(child, epoch)
        child.kill()
    (left,) = (folder / "runs").iterdir()
    return left


def losses(item):
    return [item["quality"][name] for name in ("loss", "val_loss", "test_accuracy", "best_epoch")]


@pytest.fixture(scope="module")
def whole(backend, tmp_path_factory):
    """The record of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_vit(folder, *LONG, backend=backend)
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs").exists()
    return read_last_record(folder)


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_were_not(tmp_path, backend, whole):
    moments, kills = random.Random(0), 0
    for kill in range(KILLS):
        with start(tmp_path, "--resume", backend=backend) as child:
            is_early = kill % 5 == 1  # while it loads, restores and compiles
            while not is_early and not child.stdout.readline().startswith("epoch "):
                assert child.poll() is None, child.stderr.read()
            time.sleep(moments.uniform(0, 5 if is_early else 0.5))
            child.kill()
            kills += child.wait() == -signal.SIGKILL
    assert kills == KILLS  # else it had come to its end
    done = run_vit(tmp_path, *LONG, "--resume", backend=backend)
    assert done.returncode == 0, done.stderr
    item = read_last_record(tmp_path)
    assert losses(item) == losses(whole)
    assert len(item["timing"]["epoch_seconds"]) == len(item["quality"]["loss"]) == EPOCHS
    assert any(note.startswith("resumed after epoch ") for note in item["notes"])
    assert "goes on after epoch" in done.stdout and not (tmp_path / "runs").exists()


def test_the_other_backend_goes_on(tmp_path, whole, backend):
    other = {"jax": "torch", "torch": "jax"}[backend]
    kill_after(tmp_path, 3, backend=other)
    done = run_vit(tmp_path, *LONG, "--resume", backend=backend)
    assert done.returncode == 0 and "goes on after epoch " in done.stdout, done.stderr
    item = read_last_record(tmp_path)
    np.testing.assert_allclose(item["quality"]["loss"], whole["quality"]["loss"], rtol=1e-5)


@ONE_BACKEND
def test_a_damaged_state_is_passed_over(tmp_path, whole):
    left = kill_after(tmp_path, 4)
    content = bytearray((left / "state.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (left / "state.npz").write_bytes(content)
    done = run_vit(tmp_path, *LONG, "--resume")
    assert done.returncode == 0 and "state.npz: damaged" in done.stderr
    assert "the one before it is tried" in done.stderr and "goes on after epoch" in done.stdout
    assert losses(read_last_record(tmp_path)) == losses(whole)


@ONE_BACKEND
@pytest.mark.parametrize("harm, told", [("change", "damaged"), ("remove", "No such file")])
def test_best_weights_that_are_not_whole_are_not_tested(tmp_path, backend, harm, told):
    still = "--learning-rate=1e-12"  # so that no later epoch is better than the first
    with start(tmp_path, still) as child:
        wait_for_epoch(child, 3)
        child.kill()
    (path,) = (tmp_path / "runs").glob("*/best-000001.weights.h5")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if harm == "remove":
        path.unlink()
    done = run_vit(tmp_path, *LONG, still, "--resume")
    assert done.returncode == 6, done.stderr
    assert f"lost: {path.name}, the best weights: {told}" in done.stderr
    item = read_last_record(tmp_path)
    assert item["status"] == "ok" and item["quality"]["best_epoch"] == EPOCHS
    assert "the last epoch's weights were tested" in item["notes"]


def test_states_that_are_torn_or_of_another_run_are_not_taken(tmp_path):
    code = """
import json
from pathlib import Path
import numpy as np
from harness import state

path, refused = Path("state.npz"), []
state.write_state(state.State({"name": "a", "epochs": 2}, [np.arange(9.0)]), path)
whole = path.read_bytes()
for size in range(0, len(whole), 97):
    path.write_bytes(whole[:size])
    try:
        state.read_state(path, "a")
    except state.StateError as error:
        refused.append(str(error))
path.write_bytes(whole)
print(json.dumps([
    len(range(0, len(whole), 97)), refused, state.read_newest(Path(), "a").facts,
    state.read_newest(Path(), "b")]))
"""
    count, refused, ours, theirs = run_code(tmp_path, "jax", code)
    assert len(refused) == count and all("state.npz: damaged" in line for line in refused)
    assert ours == {"name": "a", "epochs": 2} and theirs is None


def test_a_state_takes_no_memory_of_its_own(tmp_path, backend):
    code = """
import json
import keras
from harness import state

variable = keras.Variable([1.0, 2.0, 3.0])
arrays = [state.read(variable) for _ in range(2)]
print(json.dumps([arrays[0].tolist(), *(array.ctypes.data for array in arrays)]))
"""
    values, *places = run_code(tmp_path, backend, code)
    assert values == [1, 2, 3] and places[0] == places[1]


def test_where_nothing_can_be_locked_no_states_are_kept(tmp_path):
    found = run_code(
        tmp_path,
        "jax",
        """
import errno, fcntl, json, pathlib
from harness import state

def refuse(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = refuse
files = state.open_files(pathlib.Path("runs"), "name", False)
print(json.dumps([files.is_kept, files.problems]))
""",
    )
    problem = "not written: runs, states for --resume: No locks available"
    assert found == [False, [problem]]


BEST = """
import json, keras, numpy as np
from pathlib import Path
from harness import state
import vit

found = []
for epochs in (
    [{"val_accuracy": a, "val_loss": loss} for a, loss in ((0.3, 1), (0.5, 3), (0.5, 2), (0.4, 0))],
    [{"val_loss": loss} for loss in (2.0, 0.5, 0.5, 0.7)],
):
    files = state.open_files(Path("runs"), str(len(found)), False)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse")
    best = state.KeepBest(files)
    best.set_model(model)
    for epoch, logs in enumerate(epochs):
        model.set_weights([np.full((1, 1), epoch + 1.0)])
        best.on_epoch_end(epoch, logs)
    found.append([best.load(), float(model.get_weights()[0][0, 0])])
print(json.dumps(found))
"""


def test_the_weights_of_the_best_epoch_come_back(tmp_path, backend):
    """By accuracy, or by the loss where there is none; of two as good, the first"""
    assert run_code(tmp_path, backend, BEST) == [[2, 2.0], [2, 2.0]]


def test_without_resume_a_stopped_run_is_named_and_left_alone(tmp_path):
    left = kill_after(tmp_path, 2)
    done = run_vit(tmp_path, *LONG)
    assert done.returncode == 0 and f"runs/{left.name}: a run of this command" in done.stderr
    assert "goes on" not in done.stdout and (left / "state.npz").exists()
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_two_runs_of_one_command_at_once(tmp_path):
    short = "--num-epochs=4"
    with start(tmp_path, short) as first, start(tmp_path, short) as second:
        wait_for_epoch(first, 1)
        first.send_signal(signal.SIGSTOP)
        wait_for_epoch(second, 1)
        folders = list((tmp_path / "runs").iterdir())
        first.send_signal(signal.SIGCONT)
        errors = [child.communicate()[1] for child in (first, second)]
    assert len(folders) == 2, errors
    items, problems = record.read_records(tmp_path / "results.jsonl")
    assert [item["status"] for item in items] == ["ok", "ok"] and not problems
    assert losses(items[0]) == losses(items[1])


@ONE_BACKEND
def test_plain_fit_goes_on_in_the_same_wandb_run(tmp_path, backend):
    flags = [flag for flag in LONG if flag != "--no-use-wandb"]
    flags += ["--trainer=fit", "--num-epochs=4"]
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = run_vit(tmp_path, *flags, wandb=True, **offline)
    assert done.returncode == 0, done.stderr
    undisturbed = read_last_record(tmp_path)
    (tmp_path / "killed").mkdir()
    with start(tmp_path / "killed", *flags, "--use-wandb", **offline) as child:
        wait_for_epoch(child, 2)
        child.kill()
    done = run_vit(tmp_path / "killed", *flags, "--use-wandb", "--resume", wandb=True, **offline)
    assert done.returncode == 0 and "goes on after epoch" in done.stdout, done.stderr
    assert losses(read_last_record(tmp_path / "killed")) == losses(undisturbed)
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    whole, *parts = [log.stem.removeprefix("run-") for log in logs]
    assert len(parts) == 2 and len({whole, *parts}) == 2, logs


@ONE_BACKEND
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_stops_a_run_can_go_on_with_it(tmp_path, whole, number, code):
    with start(tmp_path) as child:
        wait_for_epoch(child, 2)
        child.send_signal(number)
        child.communicate()
    item = read_last_record(tmp_path)
    assert (child.returncode, item["status"]) == (code, "interrupted")
    done = run_vit(tmp_path, *LONG, "--resume")
    assert done.returncode == 0 and "goes on after epoch" in done.stdout
    assert losses(read_last_record(tmp_path)) == losses(whole)


def tell_ending(folder, code):
    """How a run ends that a program defines as `run`, and its standard error"""
    code = f"import os, signal, time\nfrom harness import ending\n{code}\n"
    done = run_python(folder, "-c", f'{code}print(ending.run_to_end(run, "x"))')
    return done.stdout.strip(), done.stderr


def test_a_signal_that_python_drops_comes_again(tmp_path):
    told, errors = tell_ending(
        tmp_path,
        """
class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def run():
    Deaf()
    time.sleep(60)
""",
    )
    assert "Exception ignored" in errors  # else nothing was shown here
    assert told == "('interrupted', 'SIGTERM', 143)"


def test_a_signal_while_an_error_is_looked_at(tmp_path):
    """As when a sweep dies: first its pipe breaks, then SIGTERM comes."""
    told, errors = tell_ending(
        tmp_path,
        """
class Broken(Exception):
    @property
    def ending(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def run():
    raise Broken
""",
    )
    assert (told, errors) == ("('interrupted', 'SIGTERM', 143)", "")


def test_a_signal_that_comes_when_the_run_has_ended(tmp_path):
    """As the one that is raised again does, on a busy machine."""
    told, errors = tell_ending(
        tmp_path,
        """
handle_signals = ending.handle_signals

def hold_up(handler):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    handle_signals(handler)

def run():
    ending.handle_signals = hold_up
    raise ending.Terminated
""",
    )
    assert (told, errors) == ("('interrupted', 'SIGTERM', 143)", "")


def test_a_second_ctrl_c_ends_it_at_once():
    """The first waits for the end of a step that takes a minute."""
    code = """
import time
from harness import ending

def run():
    with ending.finishing_steps():
        print("in a step", flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            time.sleep(0.05)

print(ending.run_to_end(run, "x"), ending.ASKED)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "in a step\n"
        child.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        child.send_signal(signal.SIGINT)
        assert child.communicate(timeout=30)[0] == "('interrupted', 'Ctrl-C', 130) [2, 2]\n"


def test_no_signal_waits_for_a_compiler(tmp_path):
    """Neither in a step, nor where the compiler never returns to Python."""
    code = """
import os, signal, threading, time
from harness import ending

def run():
    with ending.finishing_steps(), ending.compiling():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ending.wait_for(lambda: time.sleep(3600))

ended = ending.run_to_end(run, "x")
print(ended)
ending.leave(ended[2])
"""
    done = run_python(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == ("('interrupted', 'SIGTERM', 143)\n", "")
    assert done.returncode == 143


def test_what_a_compiler_gives_and_raises_is_passed_on():
    from harness import ending

    assert ending.wait_for(lambda: "code") == "code"
    with pytest.raises(MemoryError, match="all of it"):
        ending.wait_for(lambda: (_ for _ in ()).throw(MemoryError("all of it")))
    assert not ending.LEFT


def test_a_run_is_stopped_before_its_first_step(tmp_path):
    caches = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    with start(tmp_path, backend="torch", **caches) as child:
        while "images" not in child.stdout.readline():
            assert child.poll() is None, child.stderr.read()
        time.sleep(1)  # the compiler takes longer
        child.terminate()
    item = read_last_record(tmp_path)
    assert child.returncode == 143 and item["status"] == "interrupted"
    assert item["timing"]["start_seconds"] is None


def run_on_disk(folder, size, *flags, script="vit.py", **environment):
    """A run on a file system of its own; its records and a list of its files stay in `folder`."""
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs disk"
    (folder / "disk").mkdir()
    if subprocess.run([*alone, mount], cwd=folder, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, not even in a namespace of one's own")
    leave = 'cd disk; "$0" "$@"; code=$?; cp *.jsonl ..; ls >../left; exit $code'
    return subprocess.run(
        [*alone, f"{mount} && {leave}", sys.executable, ROOT / script, *flags],
        cwd=folder,
        env=child_environment(folder, **environment),
        capture_output=True,
        text=True,
    )


def test_a_full_disk_is_told_and_training_goes_on(tmp_path):
    """There is room for a record, not for weights and states."""
    done = run_on_disk(tmp_path, "64k", *LONG, "--checkpoint-path=w.weights.h5")
    assert done.returncode == 6, done.stderr
    item = read_last_record(tmp_path)
    told = [note for note in item["notes"] if note.startswith("not written: ")]
    assert item["status"] == "ok" and len(told) == 3, told  # best, state, --checkpoint-path
    assert all(line in done.stderr and line in done.stdout for line in told)
    assert "Traceback" not in done.stderr
    assert item["quality"]["test_accuracy"] is not None
    assert "the last epoch's weights were tested" in item["notes"]
    left = (tmp_path / "left").read_text().split()
    assert "results.jsonl" in left and "w.weights.h5" not in left


def test_pre_training_on_a_full_disk_says_what_is_not_there(tmp_path):
    """There is room for the picture and the record, not for the weights."""
    flags = ("--warmup-epochs=0", "--projection-dim=128", "--no-use-wandb")
    done = run_on_disk(tmp_path, "160k", *SMALL, *flags, script="pretrain.py")
    assert done.returncode == 6 and "Traceback" not in done.stderr, done.stderr
    item = read_last_record(tmp_path)
    assert item["status"] == "ok"
    assert "not written: --weights-path: No space left on device" in item["notes"]
    left = (tmp_path / "left").read_text().split()
    assert "pretrained.npz" not in left and "pretrained.png" in left


def test_serving_on_a_full_disk_leaves_the_table(tmp_path):
    flags = ("--batch-sizes", "1", "2", "--iterations=400", "--", *MODEL)  # 8 kB a record
    done = run_on_disk(tmp_path, "4k", *flags, script="latency.py")
    assert done.returncode == 6 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("the record could not be written") == 2
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row[0] in "12"] == ["1", "2"]
    assert all(float(row[1]) > 0 for row in rows if row[0] in "12")


def test_a_stop_between_two_tries_is_no_try_more(tmp_path):
    """Ctrl-C comes while the one that ran out of memory writes its record, and hears nothing"""
    (tmp_path / "child.py").write_text("""
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("out of memory", flush=True)
time.sleep(1)
sys.exit(3)
""")
    code = "import sys; from harness import fitting; words = [sys.executable, 'child.py']; "
    code += "sys.exit(fitting.run_smaller(words, [8, 4, 2], 'results.jsonl', False, {}))"
    told = {"stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    environment = child_environment(tmp_path)
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **told) as parent:
        assert parent.stdout.readline() == "out of memory\n"
        parent.send_signal(signal.SIGINT)
        assert parent.stdout.read() == ""  # of a second try
    assert parent.returncode == 3


def test_a_disk_that_takes_nothing_is_told_in_a_few_lines(tmp_path):
    done = run_on_disk(tmp_path, "4k", *SMALL, "--trainer=fit", WANDB_MODE="offline")
    assert done.returncode == 6 and "test accuracy" in done.stdout, done.stderr
    assert "record         not written: " in done.stdout
    assert "warning: W&B: not all was written: no space is left in " in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 8, done.stderr


def test_wandb_that_is_switched_off_by_its_own_variable_asks_and_tells_nothing(tmp_path):
    done = run_vit(tmp_path, *SMALL, "--trainer=fit", wandb=True, WANDB_MODE="disabled")
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "wandb").exists()


def test_no_place_for_states_is_told_and_training_goes_on(tmp_path):
    (tmp_path / "runs").write_text("a file, where the folder should be")
    done = run_vit(tmp_path, *SMALL, "--trainer=fit")
    assert done.returncode == 6 and "states for --resume" in done.stdout, done.stderr
    assert read_last_record(tmp_path)["status"] == "ok"


def test_weights_that_are_not_numbers_are_never_the_best():
    from harness.stopwatch import Diverged, Stopwatch

    class Meter:
        start, stop = (lambda self: None), (lambda self: None)

    watch = Stopwatch(3, 100, lambda: None, Meter(), print)
    watch.begin_epoch()
    with pytest.raises(Diverged, match="the validation after epoch 1"):
        watch.end_epoch(0, {"loss": 1.0, "val_loss": float("nan"), "val_accuracy": 0.5})


# ---- too little memory -------------------------------------------------------------------------


def test_parts_of_a_batch_get_smaller_until_they_fit(tmp_path):
    code = """
import os, signal, sys
size = int(sys.argv[-1].partition("=")[2])
with open("ran.txt", "a") as file:
    file.write(f"{size} after [{os.environ['VIT_DID_NOT_FIT']}] ")
if size > 100:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does
sys.exit(3 if size > 30 else 0)
"""
    from harness import fitting

    assert fitting.list_sizes(256, 256, is_even=False) == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert fitting.list_sizes(96, 48, is_even=True) == [48, 24, 12, 6, 2]
    (tmp_path / "child.py").write_text(code)
    words = [sys.executable, "child.py"]
    path = tmp_path / "results.jsonl"

    def run(sizes, is_capped=False):
        code = f"from pathlib import Path; from harness import fitting; words = {words!r}\n"
        code += f"print(fitting.run_smaller(words, {sizes}, Path({str(path)!r}), {is_capped}, "
        code += "{'batch_size': 512}))"
        return run_python(tmp_path, "-c", code)

    done = run([128, 64, 16, 8])
    assert done.stdout.strip() == "0" and "parts of 64 images did not fit" in done.stderr
    ran = (tmp_path / "ran.txt").read_text()
    assert ran == "128 after [] 64 after [128] 16 after [128 64] " and not path.exists()
    done = run([512, 256])  # the last is killed, too, and can write no record
    assert done.stdout.strip() == "3"
    assert "take a smaller model or --image-size (ended by SIGKILL)" in done.stderr
    item = read_last_record(tmp_path)
    assert item["status"] == "oom"
    assert item["config"] == {"batch_size": 512, "micro_batch_size": 256}
    text = (tmp_path / "child.py").read_text()
    (tmp_path / "child.py").write_text(text.replace("SIGKILL", "SIGABRT"))
    assert run([512, 16]).stdout.strip() == str(128 + signal.SIGABRT)  # without a cap a fault
    assert run([512, 16], is_capped=True).stdout.strip() == "0"


def test_an_allocator_that_aborts_under_a_limit_leaves_a_record(tmp_path):
    """With so little JAX mostly dies of SIGSEGV"""
    done = run_vit(tmp_path, *LARGE, "--memory-limit=0.4")
    assert done.returncode == 3, done.stderr[-3000:]
    item = read_last_record(tmp_path)
    assert item["status"] == "oom" and "or raise --memory-limit" in item["error"]


@pytest.mark.parametrize(
    "command",
    [
        ("vit.py", *SMALL),
        ("pretrain.py", *SMALL),
        ("latency.py", "--batch-sizes=1"),
        ("parity.py", "--backends", "jax", "--observed=it.npz"),
    ],
    ids=itemgetter(0),
)
def test_ctrl_c_before_a_run_begins_leaves_no_trace(tmp_path, command):
    (tmp_path / "keras.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    done = run_python(tmp_path, ROOT / command[0], *command[1:], PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


LARGE = [
    *("--dataset=synthetic", "--train-images=300", "--test-images=50", "--validation-split=0"),
    *("--num-epochs=1", "--transformer-layers=1", "--mlp-head-units=64", "--batch-size=300"),
]


def test_a_run_that_does_not_fit_is_run_in_smaller_parts(tmp_path):
    """On a CPU the cap is one on this process's data, as the stand-in for a small device."""
    little = ["--micro-batch-size=300", "--fit-memory", "--memory-limit=1"]
    done = run_vit(tmp_path, *LARGE, *little)
    told = [line for line in done.stderr.splitlines() if line.startswith("--fit-memory: parts of")]
    assert done.returncode == 0 and told, done.stderr[-3000:]
    items, _ = record.read_records(tmp_path / "results.jsonl")
    assert [item["status"] for item in items] == ["oom"] * len(told) + ["ok"]
    assert items[-1]["config"]["batch_size"] == 300
    assert any(note.startswith("--fit-memory: parts of 300") for note in items[-1]["notes"])
    assert "RESOURCE_EXHAUSTED" in items[0]["error"]
    assert "lower --micro-batch-size 300 or raise --memory-limit 1.0" in items[0]["error"]


def test_a_backend_that_is_not_built_for_the_gpu_does_not_find_it(tmp_path, monkeypatch):
    from harness import environment

    for name in ("torch", "jax_plugins"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(environment, "has_cuda", lambda: True)
    version = tmp_path / "torch/version.py"
    version.parent.mkdir()
    (tmp_path / "torch/__init__.py").touch()
    version.write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert not environment.finds_cuda("torch") and not environment.finds_cuda("jax")
    version.write_text("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\n")
    (tmp_path / "jax_plugins/xla_cuda12").mkdir(parents=True)
    importlib.invalidate_caches()
    assert environment.finds_cuda("torch") and environment.finds_cuda("jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert environment.finds_cuda("torch") and not environment.finds_cuda("jax")
    monkeypatch.setattr(environment, "has_cuda", lambda: False)
    assert not environment.finds_cuda("torch")


@pytest.mark.parametrize("command", ["vit.py", "pretrain.py"])
def test_no_more_memory_than_the_gpu_has(tmp_path, command):
    """Every command tells JAX of the limit; one under which it cannot be is refused."""
    code = f"""
import os, runpy, sys
from harness import environment
environment.finds_cuda, environment.read_cuda_memory = (lambda backend: True), (lambda: 6e9)
sys.argv = [{command!r}, *sys.argv[1:]]
import atexit
atexit.register(lambda: print(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]))
runpy.run_path({str(ROOT / command)!r}, run_name="__main__")
"""
    flags = ["--dataset=synthetic", "--no-use-wandb", "--image-size=30", "--num-epochs=1"]
    flags += ["--warmup-epochs=0", "--train-images=40", "--batch-size=20", "--test-images=20"]
    flags += ["--transformer-layers=1", "--mlp-head-units=8", "--validation-split=0"]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0", "KERAS_BACKEND": "jax"}
    done = run_python(tmp_path, "-c", code, *flags, "--memory-limit=3", **environment)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "0.5", done.stderr
    done = run_python(tmp_path, "-c", code, *flags, "--memory-limit=7", **environment)
    assert done.returncode == 2 and "at most the GPU's 6.0 GB, got 7.0" in done.stderr


def test_pytorch_has_too_little_memory(tmp_path):
    done = run_vit(tmp_path, *LARGE, "--trainer=fit", "--memory-limit=1", backend="torch")
    item = read_last_record(tmp_path)
    assert (done.returncode, item["status"]) == (3, "oom"), done.stderr[-3000:]
    assert "lower --batch-size 300 or raise --memory-limit 1.0" in only_line(done)
    assert "can't allocate memory" in item["error"]


# ---- networks ----------------------------------------------------------------------------------


FAULTS = [("silent", None), (None, "silent"), (None, 503)]


@pytest.mark.parametrize("before, later", FAULTS)
def test_a_wandb_server_that_fails_takes_nothing_away(tmp_path, before, later):
    with WandbServer([]) as server:
        server.fault, server.later = before, later
        done = run_vit(
            tmp_path,
            *(*SMALL, "--trainer=fit", "--num-epochs=2"),
            wandb=True,
            WANDB_BASE_URL=server.url,
            WANDB_API_KEY="k" * 40,
            WANDB_DIR=str(tmp_path),
            WANDB_SILENT="false",
        )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    item = read_last_record(tmp_path)
    assert item["status"] == "ok"
    told = "this run is logged offline" if before else "not all was uploaded"
    assert f"warning: W&B: {'' if later else server.url}" in done.stderr and told in done.stderr
    (folder,) = set(re.findall(r"wandb sync (/\S+)", done.stderr))
    (log,) = Path(folder).glob("*.wandb")
    rows, summary, _ = read_wandb(log)
    assert [row["loss"] for row in rows if "val_loss" in row] == item["quality"]["loss"]
    assert summary["final_test_accuracy"] == item["quality"]["test_accuracy"]
    if later:  # else it is an artifact, as without an account
        assert server.runs and not server.history
        assert json.loads(Path(folder, "files", "record.json").read_text()) == item
    else:
        assert not server.runs
        assert [x["artifact"]["type"] for x in read_log(log) if x["type"] == "artifact"] == [
            "record"
        ]


# ---- secrets -----------------------------------------------------------------------------------


def test_the_key_is_in_nothing_that_a_run_leaves(tmp_path):
    key = "0123456789abcdef" * 2 + "deadbeef"
    secret = {"WANDB_API_KEY": key, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = run_vit(tmp_path, *SMALL, "--trainer=fit", wandb=True, **secret)
    assert done.returncode == 0 and key not in done.stdout + done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert not [path for path in files if key.encode() in path.read_bytes()]
