"""What a training run needs to go on after it was killed, in files that are whole or not there.

A run's folder is named after its choices, so that the same command finds it again, and belongs to
one process at a time. In it are the state after the last epoch and after the one before it, and
the weights of the best epochs. It is removed when the run has come to its end.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

SCHEMA = 3  # goes up when a file's meaning changes
STATES = ("state.npz", "state.before.npz")  # the newer first
# Choices on which a training does not depend, but for rounding.
OTHER = {
    *("keras_backend", "node_name", "verbose", "resume", "keep_state", "allow_cpu", "use_wandb"),
    *("results_path", "checkpoint_path", "model_path", "loader_workers", "loader_prefetch"),
    *("fit_memory", "memory_limit"),
}


class StateError(Exception):
    """What is no whole state of this run; the message is one line."""

    ending = ("error", 2)  # status and exit code


class State(NamedTuple):
    """A run after some epochs."""

    facts: dict  # name, epochs, history, epoch_seconds, validation_seconds, best, wandb_id ...
    arrays: list  # of `list_variables`


@dataclass
class RunFiles:
    """Where a run has its files, and what is known of it."""

    name: str  # of `name_run`
    folder: Path  # no other process has it
    state: State | None = None  # to go on with
    is_kept: bool = True  # whether a state is written after each epoch
    best: dict | None = None  # epoch and accuracy of the weights of `KeepBest`
    wandb_id: str | None = None
    problems: list = field(default_factory=list)  # what could not be written, a line each

    @property
    def epochs(self):
        """How many are done."""
        return self.state.facts["epochs"] if self.state else 0

    def save(self, what, write, path, model=None, before=None):
        """`replace`; a failure is told once and noted, and the run goes on. Returns whether it was
        written. model: whose variables are all to be in the file, which takes room."""
        variables = list_variables(model) if model else []
        room = sum(4 * math.prod(v.shape) + 4096 for v in variables)
        try:
            replace(path, write, room, before)
            return True
        except OSError as error:
            line = f"not written: {what}: {error.strerror or error}"
            if line not in self.problems:
                self.problems.append(line)
                tell(line)
            return False


def name_run(choices):
    """12 hex digits for a configuration, a dict, by all that its training depends on."""
    kept = {k: v for k, v in choices.items() if k not in OTHER and not k.startswith("wandb")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# Folders


def open_files(root, name, is_resumed):
    """`open_folder`; where that cannot be, as without a root, which is told and noted."""
    try:
        return open_folder(root, name, is_resumed)
    except OSError as error:
        files = open_folder(None, name, is_resumed)
        files.problems.append(f"not written: {root}, states for --resume: {error.strerror}")
        tell(f"{files.problems[0]} (see --no-keep-state)")
        return files


def open_folder(root, name, is_resumed):
    """A folder for a run: RunFiles.

    Args:
        root: where runs have their folders; None: a temporary one, without states.
        name: of `name_run`.
        is_resumed: take the folder whose run came furthest, if there is one; else one without a
            state, and say where one was left.

    Raises:
        OSError: there can be none.
    """
    if root is None:
        return RunFiles(name, Path(tempfile.mkdtemp(prefix="keras-vit-")), is_kept=False)
    root.mkdir(parents=True, exist_ok=True)
    found = []  # (path, lock, state)
    for path in sorted(root.glob(f"{name}-*")):
        if (lock := take(path)) is not None:
            found.append((path, lock, read_newest(path, name)))
    stopped = [each for each in found if each[2]]
    chosen = next((each for each in found if not each[2]), None)
    if is_resumed and stopped:
        chosen = max(stopped, key=lambda each: each[2].facts["epochs"])
    for path, lock, state in found:
        if lock != (chosen and chosen[1]):
            os.close(lock)
            if state and not is_resumed:
                tell(f"{path}: a run of this command after epoch {state.facts['epochs']}: --resume")
    number = len(list(root.glob(f"{name}-*")))
    while chosen is None:
        number += 1
        path = root / f"{name}-{number}"
        path.mkdir(parents=True, exist_ok=True)
        if (lock := take(path)) is not None:
            chosen = path, lock, None
    if is_resumed and not chosen[2]:
        tell("--resume: there is no run of this command to go on with: epoch 1")
    return RunFiles(name, chosen[0], chosen[2])


def take(path):
    """Lock a folder until this process ends: a descriptor, or None where another has it. OSError:
    here nothing can be locked, as on some network file systems."""
    import fcntl  # not on Windows, where harness/record.py is read all the same

    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last owner may just have removed it.
        if os.path.samestat(os.fstat(lock), os.stat(path / "lock")):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def close_folder(files, is_over):
    """Remove a run's folder if that is over, or nothing in it is worth going on with."""
    if is_over or not any((files.folder / name).exists() for name in STATES):
        shutil.rmtree(files.folder, ignore_errors=True)
        if files.is_kept:
            with suppress(OSError):
                files.folder.parent.rmdir()  # if it was the last


def tell(line):
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# Files


def replace(path, write, room, before=None):
    """Have `write` make a file beside `path`, which takes its place when it is on the disk; what
    was there becomes `before`, if given. OSError: it could not be written; all is as it was.

    room: bytes that it will need, about, or 0: HDF5 crashes the process where the disk gets full.
    """
    made = path.with_name(f"new.{uuid.uuid4().hex[:8]}.{path.name}")  # another run's may be there
    try:
        with made.open("wb") as file:
            if room:
                os.posix_fallocate(file.fileno(), 0, room)
        write(made)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(made, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        made.unlink(missing_ok=True)


def write_state(state, path):
    facts = json.dumps(state.facts)
    facts = json.dumps({"facts": facts, "digest": digest(facts, state.arrays), "schema": SCHEMA})
    arrays = {f"{number:05d}": array for number, array in enumerate(state.arrays)}
    with path.open("wb") as file:
        np.savez(file, facts=facts, **arrays)


def digest(facts, arrays):
    found = hashlib.sha256(facts.encode())
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array))
    return found.hexdigest()


def digest_file(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path, name):
    """A State of the run of that name. Raises StateError, whatever is in the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            outer = json.loads(str(file["facts"]))
            arrays = [file[key] for key in sorted(set(file.files) - {"facts"})]
        if outer["schema"] != SCHEMA:
            raise StateError(f"{path}: of another version of this program")
        if digest(outer["facts"], arrays) != outer["digest"]:
            raise StateError(f"{path}: damaged")
        state = State(json.loads(outer["facts"]), arrays)
    except StateError:
        raise
    except Exception as error:  # whatever a zip file's parser comes upon
        line = f"{type(error).__name__}: {error}".strip().splitlines()[0][:100]
        raise StateError(f"{path}: damaged ({line})") from error
    if state.facts["name"] != name:
        raise StateError(f"{path}: another run's")
    return state


def read_newest(folder, name):
    """The newest whole State in a folder, or None; says what it passes over."""
    for number, path in enumerate(folder / name for name in STATES):
        if path.exists():
            try:
                return read_state(path, name)
            except StateError as error:
                tell(f"{error}: {'none is left' if number else 'the one before it is tried'}")
    return None


# ---------------------------------------------------------------------------------------------
# A model's variables


def list_variables(model):
    """All that training changes from epoch to epoch: weights and seeds, moments and averages."""
    return [
        *model.trainable_variables,
        *model.non_trainable_variables,
        *model.optimizer.variables,
    ]


def read(variable):
    """A variable as a NumPy array; on a CPU without the copy that Keras would make."""
    value = variable.value
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def restore(model, state, fingerprint):
    """Set a built model's variables, and return the state's facts. Raises StateError.

    fingerprint: of the pictures, which must be those of the run that stopped.
    """
    if state.facts["data_fingerprint"] != fingerprint:
        raise StateError("--resume: the pictures are not those of the run that stopped")
    variables = list_variables(model)
    shapes = [tuple(v.shape) for v in variables], [array.shape for array in state.arrays]
    if shapes[0] != shapes[1]:
        raise StateError("the state is of another model")
    for variable, array in zip(variables, state.arrays):
        variable.assign(array)
    return state.facts


class KeepState(keras.callbacks.Callback):
    """After each epoch, when other callbacks are done with it: write the state.

    Args:
        history, stopwatch: what is known of the epochs.
        average: the callback that puts averages in the weights' place, or None.
        fingerprint: of the pictures.
    """

    def __init__(self, files, history, stopwatch, average, fingerprint):
        super().__init__()
        self.files, self.history, self.stopwatch = files, history, stopwatch
        self.average, self.fingerprint = average, fingerprint

    def on_epoch_end(self, epoch, logs=None):
        if self.average:
            self.average.swap(False)
        facts = {
            "name": self.files.name,
            "epochs": epoch + 1,
            "history": self.history.history,
            "epoch_seconds": self.stopwatch.epoch_seconds,
            "validation_seconds": self.stopwatch.validation_seconds,
            "data_fingerprint": self.fingerprint,
            "best": self.files.best,
            "wandb_id": self.files.wandb_id,
        }
        arrays = [read(v) for v in list_variables(self.model)]
        newest, before = (self.files.folder / name for name in STATES)
        write = partial(write_state, State(facts, arrays))
        self.files.save("the state, for --resume", write, newest, self.model, before)


class KeepBest(keras.callbacks.Callback):
    """Keep the weights of the epoch that validated best, in a file for each such epoch: by their
    accuracy, or by the loss where that is not measured."""

    def __init__(self, files):
        super().__init__()
        self.files = files
        none = {"epoch": 0, "score": None}
        files.best = files.state.facts["best"] if files.state else none

    @property
    def path(self):
        return self.files.folder / f"best-{self.files.best['epoch']:06d}.weights.h5"

    def on_epoch_end(self, epoch, logs=None):
        files, before = self.files, self.files.best
        score = logs.get("val_accuracy", -logs["val_loss"])
        if before["epoch"] and not score > before["score"]:
            return
        files.best = {"epoch": epoch + 1, "score": score}
        if files.save("the best weights", self.model.save_weights, self.path, self.model):
            files.best["digest"] = digest_file(self.path)
        else:
            files.best = before
        # The two states on the disk may still name the two before.
        for old in sorted(files.folder.glob("best-*.weights.h5"))[:-3]:
            old.unlink(missing_ok=True)

    def load(self):
        """Give the model the best epoch's weights, and return which that was. None where they are
        not there, or not whole, which is told and noted: the model is as it was."""
        if not self.files.best["epoch"]:
            return None
        try:
            if digest_file(self.path) != self.files.best["digest"]:
                raise OSError("damaged")
            self.model.load_weights(self.path)
            return self.files.best["epoch"]
        except OSError as error:
            line = f"lost: {self.path.name}, the best weights: {error.strerror or error}"
            self.files.problems.append(line)
            tell(line)
            return None
