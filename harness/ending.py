"""How a run ends: a status and a line for its record, an exit code for the shell.

The exit codes are listed at the top of vit.py. An exception that is no surprise says itself what
it means: its class has `ending`, a status and an exit code.
"""

import concurrent.futures
import contextlib
import ctypes
import io
import os
import signal
import subprocess
import sys
import threading
import traceback

NOT_WRITTEN = 6
OUT_OF_MEMORY = (  # each framework words it in its own way
    *("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "can't allocate memory"),
    "can't start new thread",  # for want of memory for its stack
    *("not enough memory", "OOM when allocating", "bad_alloc", "Cannot allocate memory"),
    "STATUS_ALLOC_FAILED",  # of CUDA's libraries
    "YNNPACK operation failed",  # JAX's on a CPU, when it can't have its working memory
    "NVML_SUCCESS == r INTERNAL ASSERT",  # PyTorch's on a Jetson that has no memory left
)
KILLED = "killed (SIGKILL), most likely because memory ran out"  # it leaves a process no word


class Terminated(BaseException):
    """SIGTERM; like KeyboardInterrupt no Exception, so that nothing swallows it."""


def end_with_parent():
    """Have SIGTERM end this process as soon as the one that started it is gone, however that
    ended (Linux; elsewhere nothing changes)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, man 2 prctl; it survives an exec
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def end_at_once():
    """Until a run begins there is nothing to write: Ctrl-C ends the process without a trace."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Supervisor:
    """Runs children one after the other, and hands signals on to the one that runs: it writes its
    record first. `stopped` is the signal that came, or None."""

    def __init__(self, *numbers):
        self.child = self.stopped = None
        for number in numbers:
            signal.signal(number, self.forward)

    def forward(self, number, frame):
        self.stopped = number
        if self.child is not None:
            self.child.send_signal(number)

    def run(self, command, **variables):
        """The exit code of a command, with more variables of the environment."""
        self.child = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
            start_new_session=True,  # the terminal's Ctrl-C comes once, by `forward`
        )
        if self.stopped:  # before it was there
            self.child.send_signal(self.stopped)
        return self.child.wait()


class _Output(io.FileIO):
    """What cannot be written, as to a file on a full disk, is dropped; that nobody reads any more
    is an error as ever, once."""

    is_read = True

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if self.is_read and isinstance(error, BrokenPipeError):
                self.is_read = False
                raise
            return len(data)


def outlive_full_disk():
    """Let no line that this process prints end it."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        binary = getattr(stream, "buffer", None)
        raw = getattr(binary, "raw", binary)  # with PYTHONUNBUFFERED there is no buffer between
        if isinstance(raw, io.FileIO) and not isinstance(raw, _Output):
            stream.flush()
            output = _Output(stream.fileno(), "w", closefd=False)
            names = ("encoding", "errors", "line_buffering", "write_through")
            options = {option: getattr(stream, option) for option in names}
            output = output if raw is binary else io.BufferedWriter(output)
            setattr(sys, name, io.TextIOWrapper(output, **options))


def end_with(call):
    """End this process with the exit code that `call` returns; Ctrl-C, and that nobody reads the
    output any more, have their own."""
    outlive_full_disk()
    try:
        code = call()
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        sys.stdout, code = open(os.devnull, "w"), 141
    leave(code)


def leave(code):
    """End this process; threads at work in a library would crash where it is taken down."""
    if LEFT:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


RUNNING = []  # something while a signal may still end the run
ASKED = []  # the signals that came
IN_STEPS = []  # something while a step is to be finished first
LEFT = []  # something for each thread that is still at work


@contextlib.contextmanager
def finishing_steps():
    """Within it SIGTERM and Ctrl-C wait for `check`; a second one does not."""
    IN_STEPS.append(True)
    try:
        yield
        check()
    finally:
        IN_STEPS.clear()


@contextlib.contextmanager
def compiling():
    """Within it, in a step, SIGTERM and Ctrl-C do not wait: a compilation may take a minute."""
    paused = [*IN_STEPS]
    IN_STEPS.clear()
    try:
        check()
        yield
    finally:
        IN_STEPS.extend(paused)


def wait_for(call):
    """What `call` returns, from a thread of its own. Signals are looked at by Python's main thread
    alone, and not while that is in a compiler of C++; one that ends the run leaves it at work."""
    done = concurrent.futures.Future()

    def work():
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    LEFT.append(True)
    with compiling():
        while not done.done():
            with contextlib.suppress(concurrent.futures.TimeoutError):
                done.exception(timeout=0.1)
    LEFT.pop()  # not where a signal has ended the run: then the thread is still at work
    return done.result()


def check():
    """A step is done: end the run here if that was asked for."""
    if ASKED:
        raise_signal()


def raise_signal():
    raise KeyboardInterrupt if ASKED[0] == signal.SIGINT else Terminated


def end_run(number, frame):
    """The handler of a run's signals."""
    if not RUNNING:
        return
    if number != signal.SIGALRM:
        ASKED.append(number)
    if IN_STEPS and len(ASKED) == 1 and number != signal.SIGALRM:
        return
    # Python drops what is raised while an object is being deleted, say: then it comes again.
    signal.setitimer(signal.ITIMER_REAL, 2)
    raise_signal()


def run_to_end(run, remedy):
    """Call `run`, a function without arguments, and tell how it ended.

    SIGTERM ends it as Ctrl-C does; afterwards both are ignored, since the record comes first, but
    for a second Ctrl-C, which ends the process at once.

    Args:
        remedy: what to do where the memory did not suffice, such as "lower --batch-size 256".

    Returns:
        (status, error, exit code): error is one line, or None. An unexpected one is printed with
        its traceback.
    """
    ASKED.clear()
    RUNNING.append(True)
    handle_signals(end_run)
    try:
        ended = run_to_error(run, remedy)
    except KeyboardInterrupt:
        ended = "interrupted", "Ctrl-C", 130
    except Terminated:  # also while an error was looked at: a sweep's end breaks its pipe first
        ended = "interrupted", "SIGTERM", 143
    # At once: one that came while the frames of the run were taken down is looked at in the next
    # call of a Python function, and what it raised there would end the process without a record.
    RUNNING.clear()
    handle_signals(signal.SIG_IGN)
    if ended[0] == "interrupted":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return ended


def handle_signals(handler):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, handler)


def run_to_error(run, remedy):
    """As `run_to_end`, but for the signals."""
    try:
        run()
        return "ok", None, 0
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # what follows would fail, too
        return "interrupted", "nobody reads the output any more", 141
    except Exception as error:
        return judge(error, remedy)


def judge(error, remedy):
    if hasattr(error, "ending"):
        status, code = error.ending
        return status, str(error), code
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    line = lines[0][:300]
    if is_out_of_memory(error):  # Keras may put lines of its own before the allocator's
        told = (line[:300] for line in lines if any(sign in line for sign in OUT_OF_MEMORY))
        return "oom", f"out of memory: {remedy} ({next(told, line)})", 3
    traceback.print_exception(error)
    return "error", line, 1


def is_out_of_memory(error):
    """Whether an exception is an allocator's."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)
