"""An Optuna study that outlives its workers: several machines share it, and any of them may die.

Optuna's storage hands every trial to one worker only. A worker gives signs of life; a trial whose
worker shows none is begun anew by whoever asks next. Optuna's own callback for that would also
carry over what the dead trial told the pruner and the budget, so `requeue` stands in its place.
"""

import time
import warnings

import optuna
import sqlalchemy.exc
from optuna.trial import TrialState

# Heartbeats and constraints; without Optuna's word that they may change one day.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
HEARTBEAT, GRACE = 10, 60  # seconds between signs of life, and until a worker counts as dead
ATTEMPTS = 3  # of a trial whose worker died: it may be the trial that kills
GRID = ("grid_id", "search_space")  # what Optuna's GridSampler keeps with a trial
UNREACHABLE = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


def create_sampler(method, space):
    """W&B's method as Optuna's sampler. space: {name: (method of optuna.Trial, its options)}"""
    if method == "grid":  # in a shuffled order, the same for every worker
        return optuna.samplers.GridSampler({n: o["choices"] for n, (_, o) in space.items()}, seed=0)
    # Without a seed: with one, every worker and every restart would draw the same trials again.
    return optuna.samplers.TPESampler() if method == "bayes" else optuna.samplers.RandomSampler()


def create_pruner(rules, longest):
    """W&B's early_terminate as Optuna's pruner: both look at epochs min_iter, min_iter * eta, ...

    longest: epochs of the longest trial, or "auto": those of the first that completes.
    """
    if rules is None:
        return optuna.pruners.NopPruner()
    eta = rules.get("eta", 3)
    first = rules.get("min_iter") or max(1, rules["max_iter"] // eta ** rules.get("s", 1))
    return optuna.pruners.HyperbandPruner(first, longest, eta)


def open_study(name, url, **options):
    """The study of this name, created where there is none.

    Raises ValueError, one line, where the database cannot be used.
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
            known = "postgresql://user@host/database or sqlite:///file"
            raise ValueError(f"expected {known}, got {url}: {explain(error)}") from error
        except UNREACHABLE as error:
            if wait is None:
                raise ValueError(f"expected a database, got: {explain(error)}") from error
            time.sleep(wait)


def explain(error):
    """What the database's driver says, in a line."""
    return str(getattr(error, "orig", None) or error.__cause__ or error).strip().splitlines()[0]


def requeue(study, trial, attempt=None):
    """Have a trial begun anew whose worker died (or, with its attempt given, was interrupted)."""
    attempt = attempt or trial.user_attrs.get("attempt", 1) + 1
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


def mirror_study(study, trials, cost):
    """A study in memory of two aims, the trials' values and least `cost`, for a Pareto front.

    cost: a function of a trial.
    """
    mirror = optuna.create_study(directions=[study.direction, "minimize"])
    for trial in trials:
        facts = {"trial": trial.number, "node": trial.user_attrs.get("node")}
        mirror.add_trial(
            optuna.create_trial(
                values=[trial.value, cost(trial)],
                params=trial.params,
                distributions=trial.distributions,
                user_attrs=facts,
                system_attrs=trial.system_attrs,  # with whether it kept the budget
            )
        )
    return mirror
