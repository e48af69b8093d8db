"""Little memory: a cap on what a run may take, and how much of a batch fits, found by trying.

Each try is a process, since no framework gives all memory back after it has run out, and the kernel
may kill one without a word.
"""

import os
import signal
import sys

from harness import ending, record

TRIED = "VIT_DID_NOT_FIT"  # names the sizes for the record of the run that follows


def limit_memory(gigabytes, gpu_bytes):
    """Cap the memory of this process, before it asks a framework for a device, on a GPU of
    `gpu_bytes` by what JAX reads then (engine.limit_memory tells PyTorch).

    Raises:
        ValueError: the GPU has less than that.
    """
    share = gigabytes * 1e9 / gpu_bytes
    if share > 1:
        raise ValueError(
            f"--memory-limit: expected at most the GPU's {gpu_bytes / 1e9:.1f} GB, got {gigabytes}"
        )
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)  # the newer name; both are an error
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(share)


def list_sizes(batch_size, largest, is_even):
    """Divisors of a batch from `largest` downwards, each at most half the one before."""
    sizes = [largest]
    for size in range(largest // 2, 0, -1):
        fits = batch_size % size == 0 and not (is_even and size % 2)
        if fits and size <= sizes[-1] // 2:
            sizes.append(size)
    return sizes


def run_smaller(command, sizes, path, is_capped, choices):
    """Run a command with --micro-batch-size of each of the sizes (None: without that flag), until
    one does not run out of memory; returns its exit code, that of the last if none.

    Args:
        path: of the records: one is written here where the last was killed, and could not itself.
        is_capped: whether memory that cannot be had may end a process by an abort, too.
        choices: all of the run's, for that record.
    """
    ending.outlive_full_disk()
    tried, supervisor = [], ending.Supervisor(signal.SIGINT, signal.SIGTERM)
    kills = [signal.SIGKILL, *((signal.SIGABRT, signal.SIGSEGV) if is_capped else ())]
    for size in sizes:
        flags = [f"--micro-batch-size={size}"] if size else []
        code = supervisor.run([*command, *flags], **{TRIED: " ".join(map(str, tried))})
        tried.append(size)
        if supervisor.stopped or (code != 3 and -code not in kills):
            break
        if size != sizes[-1]:
            print(
                f"--fit-memory: parts of {size} images did not fit: smaller ones", file=sys.stderr
            )
    if -code in kills:
        remedy = "take a smaller model or --image-size" if size else "lower --micro-batch-size"
        remedy += " or raise --memory-limit" if is_capped else ""
        error = f"out of memory: {remedy} (ended by {signal.Signals(-code).name})"
        choices = choices | ({"micro_batch_size": size} if size else {})
        record.note_loss(path, "train", status="oom", error=error, config=choices)
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        return 3
    return code if code >= 0 else 128 - code


def describe_tried():
    """A note for the record of a run for which larger parts did not fit, or None."""
    tried = os.environ.get(TRIED)
    return (
        f"--fit-memory: parts of {', '.join(tried.split())} images did not fit" if tried else None
    )
