"""W&B's sweep files in Optuna's terms, and a study that outlives its workers.

Several machines may share a study, and any of them may die. Optuna's storage hands every trial to
one worker only. A worker gives signs of life; a trial whose worker shows none is begun anew by
whoever asks next. Optuna's own callback for that would also carry over what the dead trial told
the pruner and the budget, so `requeue` stands in its place.
"""

import json
import time
import warnings

import optuna
import sqlalchemy.exc
from optuna.trial import TrialState

from harness.cli import BadInput
from harness.record import dig

# Heartbeats and constraints; without Optuna's word that they may change one day.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
HEARTBEAT, GRACE = 10, 60  # seconds between signs of life, and until a worker counts as dead
ATTEMPTS = 3  # of a trial whose worker died: it may be the trial that kills
GRID = ("grid_id", "search_space")  # what Optuna's GridSampler keeps with a trial
MACROS = {"${env}", "${interpreter}", "${program}", "${args}"}
RANGES = {  # distribution in a sweep file: (method of optuna.Trial, its options)
    "int_uniform": ("suggest_int", {}),
    "uniform": ("suggest_float", {}),
    "log_uniform_values": ("suggest_float", {"log": True}),
}
COSTS = (("seconds", "seconds of training", 1), ("peak_bytes", "peak MiB", 2**20))
# Optuna's traces of a Pareto front from the last, each by one colour instead of trials' numbers.
FRONT = (("on the front", "#D55E00"), ("not on it", "#0072B2"), ("over budget", "#BBBBBB"))
UNREACHABLE = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def read_sweep(path, fixed, leave_out):
    """A sweep file's content, with its parameters as "space", {name: (method of optuna.Trial, its
    options)}, and "constants", {name: value}.

    BadInput: one line with what was expected.

    Args:
        fixed: parameters that take the place of the file's.
        leave_out: flags (num-epochs) whose parameters are set elsewhere.
    """
    try:
        sweep = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"--config: expected a sweep file in JSON, got {path}: {error}") from error
    checks = {  # field: (whether a value is possible, what is expected)
        "program": (lambda got: isinstance(got, str), "a script such as vit.py"),
        "method": (("random", "grid", "bayes").__contains__, "random, grid or bayes"),
        "metric.name": (lambda got: isinstance(got, str), "a metric such as val_top-5-accuracy"),
        "metric.goal": (("maximize", "minimize").__contains__, "maximize or minimize"),
        "parameters": (lambda got: isinstance(got, dict), "an object"),
        "run_cap": (lambda got: got is None or is_count(got), "a number of trials"),
        "command": (
            lambda got: (
                got is None
                or (isinstance(got, list) and all(w in MACROS for w in got if is_macro(w)))
            ),
            f"a list of flags and {' '.join(sorted(MACROS))}",
        ),
    }
    if dig(sweep, "early_terminate") is not None:
        first = "min_iter" if dig(sweep, "early_terminate.max_iter") is None else "max_iter"
        checks["early_terminate.type"] = (("hyperband",).__contains__, "hyperband")
        checks[f"early_terminate.{first}"] = (is_count, "a number of epochs")
        for name, least in (("eta", 2), ("s", 1)):
            checks[f"early_terminate.{name}"] = (
                lambda got, least=least: got is None or is_count(got, least),
                f"a whole number of at least {least}",
            )
    for field, (accepts, expected) in checks.items():
        got = dig(sweep, field)
        if not accepts(got):
            raise BadInput(f"{path}: {field}: expected {expected}, got {json.dumps(got)}")
    space, constants = {}, {}
    for name, spec in (sweep["parameters"] | fixed).items():
        if name.replace("_", "-") in leave_out:
            continue
        if isinstance(spec, dict) and "value" in spec:
            constants[name] = spec["value"]
            continue
        try:
            method, options = space[name] = read_parameter(spec)
            getattr(optuna.create_study().ask(), method)(name, **options)  # does Optuna take it?
        except (TypeError, ValueError) as error:
            raise BadInput(f"{path}: {name}: {error}, got {json.dumps(spec)}") from error
        if sweep["method"] == "grid" and "choices" not in options:
            raise BadInput(f"{path}: {name}: expected values, for a grid; or the method random")
    _, epochs = space.get("num_epochs", ("", {}))
    for number in epochs.get("choices", [constants.get("num_epochs", epochs.get("low", 1))]):
        if not is_count(number):
            got = json.dumps(number)
            raise BadInput(f"{path}: num_epochs: expected whole numbers above 0, got {got}")
    flags = [str(word) for word in sweep.get("command") or () if not is_macro(word)]
    return {**sweep, "space": space, "constants": constants, "flags": flags}


def is_count(got, least=1):
    return isinstance(got, int) and not isinstance(got, bool) and got >= least


def is_macro(word):
    """Whether W&B's agent fills in this word of a sweep file's command"""
    return str(word).startswith("${")


def read_parameter(spec):
    """{"distribution": "log_uniform_values", "min": ...} -> ("suggest_float", {"low": ...})

    ValueError: what was expected.
    """
    keys = set(spec) if isinstance(spec, dict) else set()
    if "values" in keys and keys <= {"values", "distribution"}:
        # Optuna's choices must be hashable: a list becomes what stands in a command line.
        choices = [json.dumps(v) if isinstance(v, list) else v for v in spec["values"]]
        return "suggest_categorical", {"choices": choices}
    if {"min", "max"} <= keys <= {"min", "max", "distribution"}:
        low, high = spec["min"], spec["max"]
        is_whole = isinstance(low, int) and isinstance(high, int)
        kind = spec.get("distribution", "int_uniform" if is_whole else "uniform")
        if kind in RANGES:
            method, options = RANGES[kind]
            return method, {"low": low, "high": high, **options}
    raise ValueError(f"expected value, values, or min and max with {', '.join(RANGES)}")


def create_sampler(method, space):
    """W&B's method as Optuna's sampler"""
    if method == "grid":  # in a shuffled order, the same for every worker
        return optuna.samplers.GridSampler({n: o["choices"] for n, (_, o) in space.items()}, seed=0)
    # Without a seed: with one, every worker and every restart would draw the same trials again.
    return optuna.samplers.TPESampler() if method == "bayes" else optuna.samplers.RandomSampler()


def create_pruner(sweep):
    """W&B's early_terminate as Optuna's pruner: both look at epochs min_iter, min_iter * eta ..."""
    rules = sweep.get("early_terminate")
    if rules is None:
        return optuna.pruners.NopPruner()
    epochs = sweep["space"].get("num_epochs", ("", {}))[1]
    longest = max(epochs.get("choices", [epochs.get("high", 0)]))
    longest = longest or sweep["constants"].get("num_epochs", "auto")  # the first's that completes
    eta = rules.get("eta", 3)
    first = rules.get("min_iter") or max(1, rules["max_iter"] // eta ** rules.get("s", 1))
    return optuna.pruners.HyperbandPruner(first, longest, eta)


def open_study(name, url, **options):
    """The study of this name, created where there is none.

    BadInput: one line, where the database cannot be used.
    """
    for wait in (1, 2, 4, None):  # workers that start together race to create the tables
        try:
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"pool_pre_ping": True},
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=requeue,
            )
            return optuna.create_study(
                storage=storage, study_name=name, load_if_exists=True, **options
            )
        except (ImportError, sqlalchemy.exc.ArgumentError) as error:
            known = "postgresql://user@host/database"  # a URL may hold a password: none is shown
            raise BadInput(f"--storage: expected {known}, got: {explain(error)}") from error
        except UNREACHABLE as error:
            if wait is None:
                raise BadInput(f"--storage: expected a database, got: {explain(error)}") from error
            time.sleep(wait)


def explain(error):
    """What the database's driver says, in a line."""
    return str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()[0]


def requeue(study, trial, is_dead=True):
    """Have a trial begun anew whose worker died (or else was interrupted, which does no harm)."""
    attempt = trial.user_attrs.get("attempt", 1) + is_dead
    if attempt <= ATTEMPTS:
        again = optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={"attempt": attempt, "origin": find_origin(trial)},
            system_attrs={k: v for k, v in trial.system_attrs.items() if k in GRID},
        )
        study.add_trial(again)


def find_origin(trial):
    """The number under which a trial was begun first."""
    return trial.user_attrs.get("origin", trial.number)


def list_latest(study):
    """The trials that count: of one that was begun anew the latest, and none that was too many."""
    latest = {find_origin(trial): trial for trial in study.get_trials(deepcopy=False)}
    return [trial for trial in latest.values() if name_state(trial) != "surplus"]


def name_state(trial):
    """running, complete, over budget, pruned; of failed ones "status", or abandoned"""
    if trial.state == TrialState.FAIL:
        return trial.user_attrs.get("status", "abandoned")
    is_over = any(value > 0 for value in trial.constraints.values())
    return "over budget" if is_over else trial.state.name.lower()


def create_plots(study, trials, metric):
    """{title: a figure of plotly, or a sentence that says why there is none}"""
    show, plots = optuna.visualization, {}
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if len({trial.value for trial in complete}) < 2:
        return {"Plots": "They need two trials that completed, with different results."}
    plots["History"] = show.plot_optimization_history(study, target_name=metric)
    plots["Importance of the parameters (PED-ANOVA)"] = show.plot_param_importances(study)
    figure = show.plot_parallel_coordinate(study, target_name=metric)
    figure.update_traces(marker_showscale=False)  # the first axis has it
    plots["Parallel coordinates"] = figure
    for fact, name, unit in COSTS:
        # Optuna prunes studies of one aim only; this one, in memory, has two.
        front = optuna.create_study(directions=[study.direction, "minimize"])
        known = [trial for trial in complete if trial.user_attrs.get(fact)]
        for trial in known:
            again = optuna.create_trial(
                values=[trial.value, trial.user_attrs[fact] / unit],
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={"trial": trial.number, "node": trial.user_attrs["node"]},
                system_attrs=trial.system_attrs,  # with whether it kept the budget
            )
            front.add_trial(again)
        title = f"Pareto front: {metric} against {name}"
        plots[title] = "No trial measured it."
        if known:
            plots[title] = show.plot_pareto_front(front, target_names=[metric, name])
            for trace, (label, colour) in zip(reversed(plots[title].data), FRONT):
                marker = {"color": colour, "showscale": False}
                trace.update(name=label, marker=marker, showlegend=True)
    return plots
