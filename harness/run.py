"""A run and its record, for this project's models and for those by hand."""

import time

from harness import ending, environment, record, telemetry
from harness.stopwatch import measure_matmul


def run_recorded(
    run,
    report,
    path,
    *,
    device,
    library,
    machine,
    started,
    remedy,
    is_compiled=True,
    is_shown=False,
    problems=(),
    runtime=None,
):
    """Call `run`, complete its record `report` however that ends, and append it to `path`.

    Args:
        device: has `device_peak_bytes`, `create_matmul` and `synchronize`: harness/engine.py, or a
            model by hand.
        library: the framework whose compilation cache is looked at, if the run `is_compiled`.
        machine: what telemetry.describe_machine told before.
        started: time.perf_counter() of when the process began.
        remedy: what to do where the memory did not suffice.
        is_shown: whether a summary is printed.
        problems: a list of what could not be written on the way.
        runtime: the other one that computes, if it is not the framework.

    Returns:
        the exit code.
    """
    kind, cached = report["device"]["kind"], environment.count_compiled(library, is_compiled)
    status, error, exit_code = ending.run_to_end(run, remedy)
    # Before a product as large as this machine is measured by, which takes more power than a run.
    compiled_files = cached, environment.count_compiled(library, is_compiled)
    host_peak, device_peak = telemetry.host_peak_bytes(), device.device_peak_bytes()
    conditions = telemetry.read_conditions()
    if runtime:
        host_peak = None
        told = f"Keras made the file in the same process: what {runtime} took of it is not known"
        report["notes"].append(f"memory.host_peak_bytes: {told}")
    if runtime and report["device"]["kind"] == "gpu":
        device_peak = None, f"{runtime} does not tell what it took of the GPU"
    elif runtime:
        device_peak = None, telemetry.HOST_MEMORY
    matmul = None, None
    if status == "ok" and report["device"]["kind"] != kind:
        matmul = None, "an exported model computed on another device than the backend's"
    elif status == "ok":
        matmul = measure_matmul(device.create_matmul, device.synchronize, kind)
    record.finish_record(
        report,
        status,
        error,
        matmul=matmul,
        compiled_files=compiled_files,
        device_peak=device_peak,
        host_peak_bytes=host_peak,
        total_seconds=time.perf_counter() - started,
        warnings=[*problems, *telemetry.compare_conditions(machine, conditions)],
    )
    is_written = record.deliver_record(path, report, is_shown)
    return exit_code or (0 if is_written and not problems else ending.NOT_WRITTEN)
