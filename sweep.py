"""The sweep of sweep_config.json without an account or a server: by Optuna, on an SQLite file.

    python sweep.py --backend jax --count 20           # 20 trials; kill it, and the same goes on
    python sweep.py --backend jax -- --dataset synthetic --num-epochs 5    # fixed for all trials
    python sweep.py --backend jax --budget memory.host_peak_bytes=4e9      # the best within 4 GB
    python sweep.py --storage postgresql://user@host/database              # on several machines
    python sweep.py --backend jax --count 0            # no trial, only the report so far

Each trial is a process, vit.py with the sampled flags, and leaves its record. What stands after
`--` goes to every trial as it is and takes a parameter out of the search. `method` is random, grid
or bayes (Optuna's TPE); `early_terminate` gives each epoch's metric to Optuna's HyperbandPruner,
and a trial that does not promise enough is ended. A trial counts with its best epoch. One that
fails or runs out of memory is marked, and the sweep goes on, unless three end in an error in a row.

A study is named after the backend and a hash over file, flags and budget: the same command finds it
again, and on another machine its colleagues. Its records, page and database are
results/sweep-STUDY.jsonl, .html and .db. A trial whose worker gives no sign of life for a minute is
begun anew by whoever asks next, three times at most.

`--budget FIELD=NUMBER ...`: at most so much in these fields of the record, such as
timing.evaluation_seconds or memory.device_peak_bytes. A trial beyond it is never the best, and
bayes learns to stay within.

Exit codes: 0 a best trial was found; 1 none was, three errors in a row, or the database was lost;
2 bad input; 130 interrupted (Ctrl-C, SIGTERM).
"""

import datetime
import hashlib
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import rich.box
from rich.console import Console
from rich.table import Column, Table

from harness.cli import BadInput, fail, list_flags, parse_split
from harness.ending import KILLED
from harness.record import RecordError, dig, read_records, reason_for

try:
    import optuna
    from optuna.trial import TrialState

    from harness import study as studies
except ModuleNotFoundError as error:  # the only command that needs them
    fail(f"{error.name} is not installed: pip install '.[sweep]'")

ROOT = Path(__file__).resolve().parent
BACKENDS = ("jax", "torch", "tensorflow")
FAILURES = 3  # errors in a row that end a sweep


@dataclass
class SweepConfig:
    """Search the parameters of a sweep file. What follows -- goes to every trial as it is."""

    config: Path = ROOT / "sweep_config.json"  # a sweep file as W&B has them, in JSON
    backend: str | None = None  # jax, torch or tensorflow for all trials (default: the file's)
    count: int = 20  # trials of the study, by all workers together; 0 only reports
    storage: str | None = None  # postgresql://... to share (default: results/sweep-STUDY.db)
    study: str | None = None  # name (default: of the backend, the file, the flags and the budget)
    budget: tuple[str, ...] = ()  # FIELD=NUMBER: at most so much in a field of the record


class TrialFailed(Exception):
    """A trial that is marked as failed; the sweep goes on."""


# ---- What to search ------------------------------------------------------------------------------


def list_words(parameters, sweep, work):
    """The flags of a run: of the sweep file's command, of a trial, and those after --, which alone
    can have it logged to W&B"""
    words = [word for word in sweep["flags"] if list_flags([word]) != {"use-wandb"}]
    words += [] if "use-wandb" in list_flags(work) else ["--no-use-wandb"]
    for name, value in parameters.items():
        value = json.dumps(value) if isinstance(value, list) else value
        words.append(f"--{name.replace('_', '-')}={value}")
    return [*words, *work]


def find_program(name):
    """What a trial runs: the sweep file's program, here or beside this file"""
    path = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if path is None:
        raise BadInput(f"program: expected a script such as vit.py, got {name}, which is not here")
    return path


def read_budget(texts):
    """("timing.total_seconds=60",) -> {"timing.total_seconds": 60.0}"""
    budget = {}
    for text in texts:
        field, _, number = text.partition("=")
        try:
            budget[field] = float(number)
        except ValueError:
            budget[field] = math.nan
        if math.isnan(budget[field]):
            expected = "FIELD=NUMBER, such as memory.host_peak_bytes=4e9"
            raise BadInput(f"--budget: expected {expected}, got {text!r}")
    return budget


# ---- A trial -------------------------------------------------------------------------------------


class Runner:
    """Runs a trial in a process of its own: Optuna calls it, and gets the best epoch's metric"""

    def __init__(self, config, work, console):
        fixed = {"keras_backend": {"value": config.backend}} if config.backend else {}
        self.sweep = studies.read_sweep(config.config, fixed, leave_out=list_flags(work))
        self.space, self.constants = self.sweep["space"], self.sweep["constants"]
        self.work, self.console, self.budget = work, console, read_budget(config.budget)
        self.program = find_program(self.sweep["program"])
        self.metric = self.sweep["metric"]["name"]
        self.choose = max if self.sweep["metric"]["goal"] == "maximize" else min
        grid = [len(options.get("choices", ())) for _, options in self.space.values()]
        is_grid = self.sweep["method"] == "grid"
        self.count = min(config.count, math.prod(grid)) if is_grid else config.count
        self.count = min(self.count, self.sweep.get("run_cap") or self.count)
        told = json.dumps([self.sweep, work, self.budget])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:8]
        self.study = config.study or f"{config.backend or 'all'}-{self.fingerprint}"
        self.stem = f"results/sweep-{self.study}"

    def __call__(self, trial):
        try:
            return self.measure(trial)
        except KeyboardInterrupt:
            studies.requeue(trial.study, trial.study.trials[trial.number], is_dead=False)
            raise

    def measure(self, trial):
        origins = sorted(studies.find_origin(item) for item in studies.list_latest(trial.study))
        if origins.index(studies.find_origin(trial)) >= self.count:
            give_up(trial, "surplus", "another worker was quicker")
        trial.set_user_attr("node", platform.node())
        sampled = {n: getattr(trial, m)(n, **options) for n, (m, options) in self.space.items()}
        record_id = f"sweep-{self.study}-t{trial.number}"
        values, is_pruned, failure = self.run(trial, sampled, record_id)
        record = find_record(f"{self.stem}.jsonl", record_id, trial.datetime_start)
        memory = "device" if dig(record, "device.kind") == "gpu" else "host"
        for name, value in {
            "record": record_id,
            "seconds": sum(dig(record, "timing.epoch_seconds") or []),
            "images_per_second": dig(record, "timing.train_images_per_second"),
            "peak_bytes": dig(record, f"memory.{memory}_peak_bytes"),
        }.items():
            trial.set_user_attr(name, value)
        if is_pruned:
            raise optuna.TrialPruned
        if dig(record, "status") != "ok":
            give_up(trial, *((record["status"], record["error"]) if record else failure))
        if not values:
            give_up(trial, "error", f"no epoch had the metric {self.metric}")
        for field, most in self.budget.items():
            if not isinstance(dig(record, field), int | float):
                reason = reason_for(record, field) or "a record has no number of that name"
                raise BadInput(f"--budget: {field} is not measured here: {reason}")
            trial.set_constraint(field, dig(record, field) - most)
        return self.choose(values)

    def run(self, trial, sampled, record_id):
        """A child process: (the metric of each epoch, whether pruned, (status, error) in case it
        left no record)
        """
        values, is_pruned = [], False
        environment = {**os.environ, "VIT_RECORD_ID": record_id, "VIT_EPOCHS": "/dev/stdout"}
        environment.setdefault("WANDB_RUN_GROUP", self.study)
        # Seen on a terminal only, and seldom drawn: the trial is being measured.
        progress = self.console.status(f"trial {trial.number}", refresh_per_second=1)
        with tempfile.TemporaryDirectory() as folder, progress:
            command = [sys.executable, str(self.program)]
            command += ["--no-verbose", f"--results-path={self.stem}.jsonl"]
            command += [f"--checkpoint-path={folder}/best.weights.h5"]
            with open(f"{folder}/stderr", "w") as errors:
                child = subprocess.Popen(
                    command + list_words(self.constants | sampled, self.sweep, self.work),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # the terminal's Ctrl-C is for the sweep, not for it
                )
            try:
                for told in read_epochs(child.stdout, self.metric):
                    values.append(told[self.metric])
                    trial.report(values[-1], told["epoch"])
                    place = f"trial {trial.number}, epoch {told['epoch']}/{told['epochs']}"
                    progress.update(f"{place}: {values[-1]:.4g}")
                    # After the last epoch there is nothing left to save.
                    is_pruned = told["epoch"] < told["epochs"] and trial.should_prune()
                    if is_pruned:
                        break
                else:
                    child.wait()
            finally:
                stop_child(child)
            told = Path(folder, "stderr").read_text(errors="replace").strip()
        failure = "error", told.split("\n")[-1] or "it left neither record nor message"
        if child.returncode == -signal.SIGKILL:
            failure = "oom", KILLED
        return values, is_pruned, failure


def give_up(trial, status, error):
    trial.set_user_attr("status", status)
    trial.set_user_attr("error", error)
    raise TrialFailed(error)


def read_epochs(stream, metric):
    """Yields what vit.py tells of an epoch: {"epoch", "epochs", and each metric}"""
    for line in stream:
        try:
            told = json.loads(line)
        except ValueError:  # a library printed something
            continue
        if isinstance(told, dict) and metric in told:
            yield told


def stop_child(child):
    """End a child that still runs: half a minute to write its record, then by force"""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
        try:
            if child.poll() is None:
                os.killpg(child.pid, number)
                child.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    child.stdout.close()


def find_record(path, record_id, since):
    """The last record of this id that was begun `since`, or None: others are of a study that had
    this name before"""
    since = f"{since.astimezone(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
    try:
        found = [item for item in read_records(path)[0] if item["id"] == record_id]
        return [item for item in found if item["started"] >= since][-1]
    except (RecordError, IndexError):  # it may have died before it wrote one
        return None


def run_trials(study, runner):
    """Until the study has its trials and none is running; raises TrialFailed after FAILURES"""
    errors, is_told = [], False

    def tell(study, trial):
        state, error = studies.name_state(trial), trial.user_attrs.get("error")
        if state == "surplus":
            return
        errors[:] = [*errors, error] if state == "error" else []
        trials = studies.list_latest(study)
        times = [item.duration.total_seconds() for item in trials if item.state.is_finished()]
        workers = 1 + sum(item.state == TrialState.RUNNING for item in trials)
        left = max(0, runner.count - len(times)) * statistics.mean(times) / workers
        values = trial.intermediate_values.values()
        outcome = error or f"{runner.choose(values):.4g}, {len(values)} epochs"
        text = f"{len(times)}/{runner.count} trial {trial.number}: {state}, {outcome}, "
        text += f"{trial.duration.total_seconds():.0f} s"
        runner.console.print(f"{text}, {datetime.timedelta(seconds=round(left))} left")

    while len(errors) < FAILURES:
        optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        is_waiting = any(trial.state == TrialState.WAITING for trial in trials)
        # One whose worker died before its first sign of life runs for ever, and is on no node.
        is_running = any(
            trial.state == TrialState.RUNNING and "node" in trial.user_attrs for trial in trials
        )
        if len(studies.list_latest(study)) < runner.count or is_waiting:
            study.optimize(runner, n_trials=1, catch=(TrialFailed,), callbacks=[tell])
        elif is_running:  # another worker's: if it dies, its trial is ours
            if not is_told:
                told = "waiting for other workers' trials, to begin anew those whose worker died"
                runner.console.print(told)
            is_told = True
            time.sleep(1)
        else:
            return
    raise TrialFailed(f"{FAILURES} errors in a row, the last: {errors[-1]}")


# ---- Report --------------------------------------------------------------------------------------


def create_report(study, runner):
    """What the table and the page show; trials from the best to those that failed"""
    trials, ranks = studies.list_latest(study), ("complete", "over budget", "pruned")
    rows = {}
    for trial in trials:
        facts, values = trial.user_attrs, trial.intermediate_values.values()
        memory = facts.get("peak_bytes")
        cells = [runner.choose(values) if values else None, len(values), facts.get("seconds")]
        cells += [facts.get("images_per_second"), memory and memory / 2**20]
        cells = ["–" if x is None else f"{x:,.0f}" if x >= 1000 else f"{x:.4g}" for x in cells]
        rows[trial.number] = [str(trial.number), studies.name_state(trial), *cells]

    def place(trial):
        state, values = studies.name_state(trial), trial.intermediate_values.values()
        if state not in ranks or not values:
            return len(ranks), 0
        return ranks.index(state), runner.choose(values) * (-1 if runner.choose is max else 1)

    trials.sort(key=place)
    states = [studies.name_state(trial) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = trials[0] if "complete" in states else None
    sentence, command = f"no best trial: {counts or 'none was begun'}", ""
    if best:
        sentence = f"best of {len(trials)} trials ({counts}): trial {best.number}, "
        sentence += f"{runner.metric} {best.value:.4g}"
        words = ["python", runner.sweep["program"]]
        words += list_words(runner.constants | best.params, runner.sweep, runner.work)
        quoted = " ".join(shlex.quote(word).replace(" ", "\0") for word in words)  # never broken
        whole_words = {"break_long_words": False, "break_on_hyphens": False}
        command = textwrap.fill(quoted, 76, subsequent_indent="    ", **whole_words)
    header = ["trial", "", runner.metric, "epochs", "seconds", "images/s", "peak MiB"]
    return {
        "study": study.study_name,
        "best": best,
        "sentence": sentence,
        "command": command.replace("\n", " \\\n").replace("\0", " "),
        "trials": trials,
        "parameters": list(runner.space),
        "header": header,
        "rows": rows,
    }


def print_report(report, console, shown=10):
    """A table of the best, and the command line of the best of all"""
    columns = [Column(name, overflow="fold") for name in report["header"]]
    table = Table(*columns, box=rich.box.SIMPLE, pad_edge=False, collapse_padding=True)
    for trial in report["trials"][:shown]:
        table.add_row(*report["rows"][trial.number])
    console.print(table)
    if len(report["trials"]) > shown:
        console.print(f"{len(report['trials']) - shown} more are in the page")
    console.print(report["sentence"])
    console.print(report["command"], soft_wrap=True)


def write_report(study, report, metric, path):
    """One page that needs nothing from elsewhere"""
    import jinja2
    import plotly.io

    plots, library = {}, True  # plotly's own code stands in the page once
    for title, figure in studies.create_plots(study, report["trials"], metric).items():
        if not isinstance(figure, str):
            figure.update_layout(
                title=None,
                template="plotly_white",
                margin={"t": 30, "r": 30, "l": 60, "b": 10},
                legend={"orientation": "h", "y": 1, "yanchor": "bottom"},
            )
            figure.update_xaxes(automargin=True)
            figure.update_yaxes(automargin=True)
            options = {"full_html": False, "include_plotlyjs": library, "div_id": f"p{len(plots)}"}
            if "Parallel" in title:  # on a phone it is scrolled
                options["default_width"] = f"max(100%, {5 * len(report['parameters'])}rem)"
            figure = plotly.io.to_html(figure, {"displayModeBar": False}, **options)
            library = False
        plots[title] = figure
    loader = jinja2.FileSystemLoader(ROOT / "harness")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=loader)
    template = environment.get_template("sweep_report.html.j2")
    path.write_text(template.render(report=report, plots=plots), encoding="utf-8")


# ---- Main ----------------------------------------------------------------------------------------


def run_sweep(config, work, console):
    """Search and report; returns the exit status"""
    if fixed := list_flags(work) & {"results-path", "checkpoint-path", "keras-backend"}:
        raise BadInput(f"--{min(fixed)} cannot stand after --: expected --backend or nothing")
    if config.count < 0:
        raise BadInput(f"--count: expected 0 or more, got {config.count}")
    if config.backend not in (None, *BACKENDS):
        raise BadInput(f"--backend: expected {', '.join(BACKENDS)}, got {config.backend!r}")
    if config.backend and importlib.util.find_spec(config.backend) is None:
        remedy = f"pip install '.[{config.backend}]'"
        raise BadInput(f"--backend: {config.backend} is not installed: {remedy}")
    runner = Runner(config, work, console)
    Path("results").mkdir(exist_ok=True)
    study = studies.open_study(
        runner.study,
        config.storage or f"sqlite:///{runner.stem}.db",
        direction=runner.sweep["metric"]["goal"],
        sampler=studies.create_sampler(runner.sweep["method"], runner.space),
        pruner=studies.create_pruner(runner.sweep),
    )
    if study.user_attrs.get("fingerprint", runner.fingerprint) != runner.fingerprint:
        raise BadInput(
            f"--study {runner.study}: it was begun with another file, other flags or another "
            "budget: give another name, or none"
        )
    study.set_user_attr("fingerprint", runner.fingerprint)
    console.print(f"study {runner.study}: {runner.metric}, {runner.count} trials")
    status = 0
    try:
        if runner.count:
            run_trials(study, runner)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        status = 130
    except TrialFailed as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        status = 1
    report, page = create_report(study, runner), Path(f"{runner.stem}.html")
    print_report(report, console)
    write_report(study, report, runner.metric, page)
    console.print(f"report: {page}")
    return status or (0 if report["best"] else 1)


def main(argv=None):
    """Returns the exit code; those are listed at the top"""
    argv = sys.argv[1:] if argv is None else argv
    config, _, work = parse_split(SweepConfig, argv, __doc__.split("\n\n")[0], own=())
    console = Console(highlight=False, markup=False, emoji=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill is a Ctrl-C
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        return run_sweep(config, work, console)
    except BadInput as error:
        fail(error)
    except studies.UNREACHABLE as error:
        fail(f"the database: {studies.explain(error)}: the same command goes on", code=1)
    except BrokenPipeError:  # nobody reads any more
        sys.stdout = open(os.devnull, "w")
        return 141
    except OSError as error:  # such as a full disk
        text = f"{error.filename or 'a file'} was not written: {error.strerror}"
        fail(f"{text}; trials are kept, the same command goes on", code=1)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
