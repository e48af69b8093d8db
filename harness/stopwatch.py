"""How far a training run is, how long its epochs take, and what energy they need."""

import math
import os
import statistics
import sys
import time
from pathlib import Path

UNTOLD = ("loss", "top-5-accuracy", "top5_accuracy")  # the loss has a place of its own


class Diverged(Exception):
    """The loss is no longer a number; the message says when, and what to do."""

    ending = ("diverged", 4)  # status and exit code

    def __init__(self, loss, when):
        super().__init__(f"loss {loss} in {when}: lower --learning-rate")


class Stopwatch:
    """Times epochs from their begin to the start of validation, and reports each in a line. Speed
    and energy are those of this process's own epochs.

    A window opens and closes only after the device is synchronised.

    Args:
        epochs, images_per_epoch: of the run.
        synchronize: a function that waits for the device.
        meter: an energy meter with start() and stop().
        report: a function that takes each epoch's line, such as print.
        before: (seconds of training, of validation) of the epochs that another process trained.
    """

    def __init__(self, epochs, images_per_epoch, synchronize, meter, report, before=((), ())):
        self.epochs, self.images, self.first_images = epochs, images_per_epoch, 0
        self.synchronize, self.meter, self.report = synchronize, meter, report
        self.epoch_seconds, self.validation_seconds = map(list, before)
        self.resumed, self.energy = len(self.epoch_seconds), []

    def begin_epoch(self):
        self.synchronize()
        if len(self.epoch_seconds) == self.resumed + 1:
            wait_for_turn()
        self.is_open = True
        self.meter.start()
        self.started = time.perf_counter()

    def end_first_call(self, images):
        """The very first `images` are trained on, compilation included: what follows is steady."""
        self.synchronize()
        self.first_images, self.first_ended = images, time.perf_counter()
        self.first_seconds = self.first_ended - self.started
        self.meter.stop()
        self.meter.start()

    def end_training(self):
        """The epoch's last step is over; validation may begin."""
        if self.is_open:
            self.synchronize()
            self.ended = time.perf_counter()
            self.epoch_seconds.append(self.ended - self.started)
            self.energy.append(self.meter.stop())
            self.is_open = False

    def end_epoch(self, epoch, logs):
        """logs: loss and metrics by name, those of validation with val_ before it."""
        self.end_training()  # for a run without validation
        self.validation_seconds.append(time.perf_counter() - self.ended)
        for name, when in (("loss", "epoch"), ("val_loss", "the validation after epoch")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise Diverged(logs[name], f"{when} {epoch + 1}")
        self.report(self.describe(epoch, logs))

    def describe(self, epoch, logs):
        """An epoch in a line: what it reached, how fast it was, how long the rest will take."""
        shown = [f"epoch {epoch + 1}/{self.epochs}", f"loss {logs['loss']:.3f}"]
        for name in logs:
            if not name.startswith("val_") and name not in UNTOLD:
                form = "{:.1%}" if name == "accuracy" else "{:.4g}"
                value, validation = form.format(logs[name]), logs.get(f"val_{name}")
                validation = "" if validation is None else f" (val {form.format(validation)})"
                shown.append(f"{name} {value}{validation}")
        seconds = self.steady_seconds() or self.epoch_seconds[-1]
        left = (self.epochs - epoch - 1) * (seconds + self.validation_seconds[-1])
        shown.append(f"{self.images / seconds:,.0f} images/s")
        return "  ".join([*shown, f"{int(left // 60)}:{int(left % 60):02} left"])

    def steady_seconds(self):
        """Seconds of an epoch that compiles nothing: the median of all but the first. After one
        epoch alone, that epoch without its first step, scaled up; None where that is unknown."""
        own = self.epoch_seconds[self.resumed :]
        if len(own) > 1:
            return statistics.median(own[1:])
        after_first = self.images - self.first_images
        if own and self.first_images and after_first > 0:
            return (own[0] - self.first_seconds) * self.images / after_first
        return None

    def measure(self, process_started):
        """The figures of a record.

        Args:
            process_started: time.perf_counter() when the process began.

        Returns:
            (timing, energy, notes): dictionaries of what is known, and the reasons for the rest.
        """
        steady = self.steady_seconds()
        timing = {"epoch_seconds": self.epoch_seconds}
        timing |= {"validation_seconds": self.validation_seconds}
        own = self.epoch_seconds[self.resumed :]
        if not self.epoch_seconds:
            return timing, {}, []
        if steady is None:
            advice = "the only epoch compiled; train 2 epochs or more"
            advice = advice if own else "this process trained no whole epoch"
            names = ("train_images_per_second", "compile_seconds", "start_seconds")
            return timing, {}, [*(f"timing.{n}: {advice}" for n in names), f"energy: {advice}"]
        notes = []
        timing["train_images_per_second"] = self.images / steady
        if len(own) == 1:
            notes.append("one epoch only: its first step was left out of the steady throughput")
        if not self.first_images:  # plain fit: the whole first epoch against a steady one
            timing["compile_seconds"] = max(0.0, own[0] - steady)
            notes.append("timing.start_seconds: Keras' fit does not tell when a step is done")
        else:
            warm = steady * self.first_images / self.images
            timing["compile_seconds"] = max(0.0, self.first_seconds - warm)
            timing["start_seconds"] = self.first_ended - process_started
        windows, images = self.energy[1:], self.images * len(self.energy[1:])
        if not windows:
            windows, images = self.energy, self.images - self.first_images
        notes += dict.fromkeys(note for window in windows for note in window["notes"])
        if any(window["joules"] is None for window in windows):
            return timing, {}, notes
        joules = sum(window["joules"] for window in windows)
        energy = {
            "joules": joules,
            "joules_per_image": joules / images,
            "source": windows[0]["source"],
            "window_seconds": sum(window["window_seconds"] for window in windows),
        }
        if rails := windows[0]["rails"]:
            energy["rails"] = {
                label: sum(window["rails"].get(label, 0.0) for window in windows) for label in rails
            }
        return timing, energy, notes


def wait_for_turn():
    """Before the first epoch that compiles nothing: of several runs that `compare.py
    --start-together` began, one at a time goes on. VIT_TURN names a file that says this one waits;
    it may go on once that is gone, or whoever would remove it is.
    """
    if not os.environ.get("VIT_TURN"):
        return
    turn, parent = Path(os.environ["VIT_TURN"]), os.getppid()
    turn.touch()
    while turn.exists() and os.getppid() == parent:
        time.sleep(0.02)


def measure_matmul(create, synchronize, device, windows=5):
    """Floating-point operations a second of large matrix products, 2 a multiply-accumulate: the
    best of several windows, so that a moment's disturbance does not lower it, each long enough
    for what the host does around it not to count.

    Args:
        create: a function of the matrices' rows that gives one that starts a product.
        synchronize: a function that waits for the device.
        device: "cpu" or "gpu", whose matrices are larger.

    Returns:
        (operations a second, None), or (None, why not): a run is not lost for it.
    """
    size = {"cpu": 2048, "gpu": 4096}[device]
    try:
        multiply = create(size)

        def time_products(count):
            started = time.perf_counter()
            for _ in range(count):
                product = multiply()  # noqa: F841, held: else it need not be computed
            synchronize()
            return time.perf_counter() - started

        time_products(1)  # compiles
        count = 1
        while time_products(count) < 0.05:
            count *= 2
        seconds = min(time_products(count) for _ in range(windows)) / count
    except Exception as error:  # out of memory, say, in the backend's own words
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return 2 * size**3 / seconds, None


class Progress:
    """Counts an epoch's steps in a terminal's line, and checks that the loss is a number."""

    def __init__(self, epochs, steps, is_shown):
        self.epochs, self.steps, self.is_shown = epochs, steps, is_shown and sys.stderr.isatty()

    def show(self, epoch, step, read):
        """read: gives the running mean of the loss up to `step`, (steps of a call,); None yet."""
        state = "compiling ..." if epoch == 0 else ""
        if read is not None:
            losses = read().tolist()
            bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
            if bad is not None:
                step += bad + 1 - len(losses)
                raise Diverged(losses[bad], f"epoch {epoch + 1}, step {step}")
            state = f"loss {losses[-1]:.3f}"
        if self.is_shown:
            line = f"epoch {epoch + 1}/{self.epochs}  step {step}/{self.steps}  {state}"
            end = "\033[K\r" if step < self.steps else "\r\033[K"
            print(line, end=end, file=sys.stderr, flush=True)
