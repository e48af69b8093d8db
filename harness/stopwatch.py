"""How far a training run is, how long its epochs take, and what energy they need."""

import math
import statistics
import sys
import time

UNTOLD = ("loss", "top-5-accuracy", "top5_accuracy")  # the loss has a place of its own


class Diverged(Exception):
    """The loss is no longer a number; the message says when, and what to do."""

    ending = ("diverged", 4)  # status and exit code

    def __init__(self, loss, when):
        super().__init__(f"loss {loss} in {when}: lower --learning-rate")


class Stopwatch:
    """Times epochs from their begin to the start of validation, and reports each in a line.

    A window opens and closes only after the device is synchronised.

    Args:
        epochs, images_per_epoch, batch_size: of the run.
        synchronize: a function that waits for the device.
        meter: an energy meter with start() and stop().
        report: a function that takes each epoch's line, such as print.
    """

    def __init__(self, epochs, images_per_epoch, batch_size, synchronize, meter, report):
        self.epochs, self.images, self.batch_size = epochs, images_per_epoch, batch_size
        self.synchronize, self.meter, self.report = synchronize, meter, report
        self.epoch_seconds, self.validation_seconds, self.energy = [], [], []
        self.first_step_seconds, self.first_step_ended = None, None

    def begin_epoch(self):
        self.synchronize()
        self.is_open = True
        self.meter.start()
        self.started = time.perf_counter()

    def end_first_step(self):
        """The very first step is over, compilation included: what follows is steady."""
        self.synchronize()
        self.first_step_ended = time.perf_counter()
        self.first_step_seconds = self.first_step_ended - self.started
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
        if not math.isfinite(logs["loss"]):
            raise Diverged(logs["loss"], f"epoch {epoch + 1}")
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
        if len(self.epoch_seconds) > 1:
            return statistics.median(self.epoch_seconds[1:])
        after_first = self.images - self.batch_size
        if self.epoch_seconds and self.first_step_seconds and after_first > 0:
            return (self.epoch_seconds[0] - self.first_step_seconds) * self.images / after_first
        return None

    def measure(self, process_started):
        """The figures of a record.

        Args:
            process_started: time.perf_counter() when the process began.

        Returns:
            (timing, energy, notes): dictionaries of what is known, and the reasons for the rest.
        """
        steady, first = self.steady_seconds(), self.first_step_seconds
        timing = {"epoch_seconds": self.epoch_seconds}
        timing |= {"validation_seconds": self.validation_seconds}
        if not self.epoch_seconds:
            return timing, {}, []
        if steady is None:
            advice = "the only epoch compiled; train 2 epochs or more"
            names = ("train_images_per_second", "compile_seconds", "start_seconds")
            return timing, {}, [*(f"timing.{n}: {advice}" for n in names), f"energy: {advice}"]
        notes = []
        timing["train_images_per_second"] = self.images / steady
        if len(self.epoch_seconds) == 1:
            notes.append("one epoch only: its first step was left out of the steady throughput")
        if first is None:  # plain fit: the whole first epoch against a steady one
            timing["compile_seconds"] = max(0.0, self.epoch_seconds[0] - steady)
            notes.append("timing.start_seconds: Keras' fit does not tell when a step is done")
        else:
            one_step = steady * self.batch_size / self.images
            timing["compile_seconds"] = max(0.0, first - one_step)
            timing["start_seconds"] = self.first_step_ended - process_started
        windows, images = self.energy[1:], self.images * len(self.energy[1:])
        if not windows:
            windows, images = self.energy, self.images - self.batch_size
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
        return timing, energy, notes


class Progress:
    """Counts an epoch's steps in a terminal's line, and checks that the loss is a number."""

    def __init__(self, epochs, steps, is_shown):
        self.epochs, self.steps, self.is_shown = epochs, steps, is_shown and sys.stderr.isatty()

    def show(self, epoch, step, losses):
        """losses: the running mean of the loss up to `step`, (steps of a call,), or None yet."""
        state = "compiling ..." if epoch == 0 else ""
        if losses is not None:
            losses = [float(loss) for loss in losses]
            bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
            if bad is not None:
                step += bad + 1 - len(losses)
                raise Diverged(losses[bad], f"epoch {epoch + 1}, step {step}")
            state = f"loss {losses[-1]:.3f}"
        if self.is_shown:
            line = f"epoch {epoch + 1}/{self.epochs}  step {step}/{self.steps}  {state}"
            end = "\033[K\r" if step < self.steps else "\r\033[K"
            print(line, end=end, file=sys.stderr, flush=True)
