"""What this machine can tell: what it is, what power and memory a run takes, what disturbs a run.

    python -m harness.telemetry           this machine's page, Markdown
    python -m harness.telemetry --json    the same, for programs

A sensor that is absent answers None, never an exception. A dictionary made here that may hold a
None also holds "notes", the reasons in the form in which a record keeps them ("device.power_mode:
not readable ..."): pop them into the record's notes. `root` is where /proc, /sys and /etc are read.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from harness import environment

SAMPLE_SECONDS = 0.1  # how often power is read: often enough for a trapezoid, too rarely to disturb
COUNTER_SECONDS = 10.0  # RAPL counters wrap within minutes: read them well before a second time
SHORT_WINDOW_SECONDS = 5.0  # NVML renews its counter every 0.1 s and averages its power over 1 s
INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO in Linux' include/linux/proc_ns.h
JETSON_GPUS = (".gpu", ".ga10b", ".gv11b")  # ends of the GPU's devfreq names: L4T 36, 35, Xavier
# AGX Orin's memory rail hangs behind its 5 V rail, say users citing NVIDIA's Jetson Linux
# Developer Guide (not yet checked on a board): shown on its own, not counted twice in the sum.
NESTED_RAILS = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
HOST_MEMORY = "computed on the CPU, where device memory is host memory"  # why no device has a peak
THROTTLES = {  # bit: (what holds the clocks back, remedy); nvmlClocksEventReason* in nvml.h
    0x04: ("power cap", "raise the power limit, or compare under the same one"),
    0x08: ("hardware slowdown", "check cooling and power supply"),
    0x20: ("thermal", "let the GPU cool down and run again"),
    0x40: ("thermal, by hardware", "let the GPU cool down and check its cooling"),
    0x80: ("power brake", "check the power supply"),
}
GPU_FIELDS = {  # field: (question to NVML, arguments after the GPU, from its answer to the value)
    "name": ("nvmlDeviceGetName", (), str),
    "memory_bytes": ("nvmlDeviceGetMemoryInfo", (), lambda memory: memory.total),
    "power_cap_watts": ("nvmlDeviceGetEnforcedPowerLimit", (), lambda milliwatts: milliwatts / 1e3),
    "gpu_mhz": ("nvmlDeviceGetClockInfo", (1,), int),  # 1 is NVML_CLOCK_SM, 2 NVML_CLOCK_MEM
    "gpu_max_mhz": ("nvmlDeviceGetMaxClockInfo", (1,), int),
    "gpu_memory_mhz": ("nvmlDeviceGetClockInfo", (2,), int),
    "throttle_reasons": (
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        (),
        lambda bits: [name for bit, (name, _) in THROTTLES.items() if bits & bit],
    ),
    "other_processes": (  # those that compute; a desktop's drawing ones are always there
        "nvmlDeviceGetComputeRunningProcesses",
        (),
        lambda processes: sorted({process.pid for process in processes} - {os.getpid()}),
    ),
}
DRIVER_FIELDS = {  # the driver's version, and the newest CUDA that it runs (12060 is 12.6)
    "driver": ("nvmlSystemGetDriverVersion", (), str),
    "cuda": ("nvmlSystemGetCudaDriverVersion", (), lambda v: f"{v // 1000}.{v % 1000 // 10}"),
}
GPU_FACTS = ("name", "memory_bytes", "power_cap_watts", "driver", "cuda")
BACKENDS = {"jax": ("jax", "jaxlib"), "torch": ("torch",), "tensorflow": ("tensorflow",)}
COMPARED = {  # what must not change during a run
    "power_mode": "power mode changed from {} to {}",
    "power_cap_watts": "GPU power cap changed from {:g} W to {:g} W",
    "cpu_max_mhz": "CPU clock limit changed from {:g} MHz to {:g} MHz",
    "gpu_max_mhz": "highest GPU clock changed from {:g} MHz to {:g} MHz",
}


def describe_machine(root="/"):
    """What the machine is, for a record's `device`: a dictionary, with `read_conditions` in it.

    memory_bytes is the host's; `gpus` lists what NVML sees; board_model and l4t_release are a
    Jetson's. The reasons for what is None are in "notes".
    """
    cpu = _read_text(root, "proc/cpuinfo") or ""
    l4t = _read_text(root, "etc/nv_tegra_release")  # "# R36 (release), REVISION: 4.3, GCID: ..."
    l4t = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", l4t or "")
    conditions = read_conditions(root)
    nvml, _, reason = _open_gpu(0)
    count, reasons = _ask({"gpus": ("nvmlDeviceGetCount", (), int)}, nvml, reason)
    gpus = [read_gpu(index) for index in range(count["gpus"] or 0)]
    device = {
        "node_name": platform.node() or None,
        "architecture": platform.machine() or None,
        "os": _find(r'^PRETTY_NAME="?([^"\n]*)', _read_text(root, "etc/os-release")),
        "kernel": _read_text(root, "proc/sys/kernel/osrelease"),
        "cpu_name": _find(r"^model name\s*:\s*(.+)", cpu),
        "logical_cores": len(re.findall(r"^processor\s*:", cpu, re.MULTILINE)) or None,
        "usable_cores": environment.count_cores(root),
        "memory_bytes": _read_kilobytes(root, "proc/meminfo", "MemTotal"),
        # Docker hides the device tree; the second file holds the same name and stays visible.
        "board_model": _read_text(root, "proc/device-tree/model")
        or _read_text(root, "sys/devices/soc0/machine"),
        "l4t_release": f"{l4t[1]}.{l4t[2]}" if l4t else None,
        "gpus": None if reasons else [{key: gpu[key] for key in GPU_FACTS} for gpu, _ in gpus],
    }
    reasons |= {"board_model": "no device tree", "l4t_release": "no /etc/nv_tegra_release"}
    reasons |= {f"gpus.{field}": why for _, whys in gpus for field, why in whys.items()}
    notes = _explain("device", device, reasons) + conditions["notes"]
    return device | conditions | {"notes": notes}


def read_conditions(root="/"):
    """What a run depends on, as it is now. Take one snapshot before the backend first uses the GPU
    and one while it is still warm: `compare_conditions` says what was wrong.

    on_battery: no charger is connected. clocks in MHz: the fastest CPU core's and the limit in
    force; the GPU's and its highest, which on a Jetson is the limit in force (from devfreq) and
    elsewhere what the chip can do, whatever nvidia-smi limits it to. throttle_reasons: what holds
    the GPU's clocks back at this moment. other_processes: [{pid, name}] that compute on the GPU,
    but for runs that wait for this one (compare.py --start-together).
    """
    gpu, reasons = read_gpu()
    gpu |= _read_devfreq(root)
    clocks = {"cpu_mhz": _read_fastest(root, "scaling_cur_freq")}
    clocks |= {"cpu_max_mhz": _read_fastest(root, "scaling_max_freq")}
    clocks |= {key: gpu[key] for key in ("gpu_mhz", "gpu_max_mhz", "gpu_memory_mhz")}
    others = gpu["other_processes"]
    if others is not None:
        others = [{"pid": pid, "name": _read_text(root, f"proc/{pid}/comm")} for pid in others]
        others = [one for one in others if not _shares_turns(root, one["pid"])]
    conditions = {
        "on_battery": _read_on_battery(root),
        "power_mode": _read_power_mode(root),
        "power_cap_watts": gpu["power_cap_watts"],
        "clocks": clocks,
        "throttle_reasons": gpu["throttle_reasons"],
        "other_processes": others,
        # In a container NVML names the host's process ids: ours cannot be told from the others.
        "own_pid_known": _read_link(root, "proc/self/ns/pid") in (None, INITIAL_PID_NAMESPACE),
    }
    reasons["power_mode"] = "no nvpmodel here (it is a Jetson's)"
    reasons["other_processes.name"] = "not among the processes visible here"
    return conditions | {"notes": _explain("device", conditions, reasons)}


def _shares_turns(root, pid):
    """Whether a process is one of those that compare.py --start-together began with this one, and
    which wait while this one is measured."""
    if not os.environ.get("VIT_TURN"):
        return False
    turns = os.path.dirname(os.environ["VIT_TURN"])
    variables = _read_text(root, f"proc/{pid}/environ") or ""
    return f"\0VIT_TURN={turns}/" in "\0" + variables


def compare_conditions(before, after):
    """What makes a run between two snapshots doubtful: one-line warnings, each with its remedy."""
    warnings = []
    if before["on_battery"] or after["on_battery"]:
        warnings.append("on battery: plug in the charger and run again")
    for key, change in COMPARED.items():
        old, new = ((snapshot | snapshot["clocks"])[key] for snapshot in (before, after))
        if None not in (old, new) and old != new:
            warnings.append(f"{change.format(old, new)} during the run: fix it and run again")
    held = (before["throttle_reasons"] or []) + (after["throttle_reasons"] or [])
    for name, remedy in THROTTLES.values():
        if name in held:
            warnings.append(f"GPU throttled: {name}: {remedy}")
    others = {one["pid"]: one["name"] for one in before["other_processes"] or []}
    if after["own_pid_known"]:
        others |= {one["pid"]: one["name"] for one in after["other_processes"] or []}
    elif os.environ.get("VIT_TURN"):  # which of them wait cannot be seen from in here
        others = {}
    for pid, name in others.items():
        who = f"pid {pid} ({name or 'name unknown'})"
        warnings.append(f"another process uses the GPU: {who}: stop it and run again")
    return warnings


def read_gpu(index=None):
    """One GPU through NVML: (values, reasons for those that are None), by the fields of GPU_FIELDS
    and DRIVER_FIELDS. Nothing answers without a GPU: then every value is None.

    index: NVML's number; None is the one that this process computes on, the first of
    CUDA_VISIBLE_DEVICES (in the order of CUDA_DEVICE_ORDER=PCI_BUS_ID, which environment.py sets).
    other_processes: process ids but our own.
    """
    nvml, handle, reason = _open_gpu(index)
    values, reasons = _ask(GPU_FIELDS, nvml, reason, handle)
    driver, unknown = _ask(DRIVER_FIELDS, nvml, reason)
    return values | driver, reasons | unknown


def read_jetson_rails(root="/", channels=None):
    """A Jetson's INA3221 power monitors: [{label, millivolts, milliamperes, watts}], [] if none.

    channels: what `_find_channels` found, to spare the search. What cannot be read is None.
    """
    rails = []
    for label, voltage, current in _find_channels(root) if channels is None else channels:
        rail = {"label": label, "millivolts": _read_number(voltage)}
        rail["milliamperes"] = _read_number(current)
        known = None not in rail.values()
        rail["watts"] = rail["millivolts"] * rail["milliamperes"] / 1e6 if known else None
        rails.append(rail)
    return rails


# ---- energy ------------------------------------------------------------------------------------


class EnergyMeter:
    """Joules of a window: `start()`, the work, `stop()`. Made by `create_energy_meter`.

    source: the sensor's name, or None, and then `reason` says why there is none.

    The caller synchronises the device before both. A thread reads the sensor in between, where
    it must be read often; it is gone when `stop` returns.
    """

    def __init__(self, source, reason):
        self._source, self._reason, self._thread, self._begin = source, reason, None, None
        self.source, self.reason = source and source["name"], reason

    def start(self):
        """Begin a window."""
        self._joules, self._last, self._failed, self._broken = {}, None, 0, self._reason
        self._begin, self._end = time.perf_counter(), threading.Event()
        if self._source is None:
            return
        if not self._sample():
            self._broken = "the sensor did not answer at the start"
        if self._source["every_seconds"]:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self):
        """End the window: {joules, source, window_seconds, rails: {label: joules}, notes}.

        joules, source and rails are None, with a reason in notes, when nothing could be measured.
        """
        if self._begin is None:
            raise RuntimeError("expected start() before stop()")
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        if self._source is not None and not self._sample():
            self._broken = self._broken or "the sensor did not answer at the end"
        window, self._begin = time.perf_counter() - self._begin, None
        result = {"joules": None, "source": None, "window_seconds": window, "rails": None}
        if self._broken:
            return result | {"notes": [f"energy: {self._broken}"]}
        name, summed, notes = self._source["name"], self._source["summed"], []
        joules = sum(value for label, value in self._joules.items() if label in summed)
        if not joules > 0:  # stands still, or NaN: a 0 would look like a measurement
            return result | {"notes": [f"energy: {name} did not advance"]}
        if self._source["rails"]:
            result["rails"] = self._joules
        else:
            notes.append("energy.rails: NVML knows the whole board only")
        if window < SHORT_WINDOW_SECONDS:
            advice = f"unreliable, measure {SHORT_WINDOW_SECONDS:g} s or more"
            notes.append(f"energy.window_seconds: {window:.1f} s is short: {advice}")
        if self._failed:
            notes.append(f"energy.joules: {self._failed} readings failed and were bridged")
        return result | {"joules": joules, "source": name, "notes": notes}

    def _watch(self):
        while not self._end.wait(self._source["every_seconds"]):
            self._sample()

    def _sample(self):
        values, now = self._source["read"](), time.perf_counter()
        if None in values.values():
            self._failed += 1
            return False
        then, previous = self._last or (now, values)
        for label, value in values.items():
            if "wraps" in self._source:  # a counter of joules
                step = value - previous[label]
                if step < 0:  # wrapped, once at most since the last reading
                    step += self._source["wraps"].get(label) or float("nan")
            else:  # watts: trapezoid
                step = (value + previous[label]) / 2 * (now - then)
            self._joules[label] = self._joules.get(label, 0.0) + step
        self._last = now, values
        return True


def create_energy_meter(root="/", device="gpu"):
    """A meter on the first source of SOURCES[device] that works here, else one that says why none.

    device: "gpu" or "cpu", where the work runs. Sources differ in what they cover (a board, a
    package, a whole module): never compare joules across them.
    """
    reasons = []
    for create_source in SOURCES[device]:
        source, reason = create_source(root)
        if source is not None:
            return EnergyMeter(source, None)
        reasons.append(reason)
    return EnergyMeter(None, f"no readable power sensor ({'; '.join(dict.fromkeys(reasons))})")


# A source is a dictionary. name; read() -> {label: watts, or joules where there are "wraps"}, None
# for what does not answer; every_seconds, or None; rails, whether its labels are worth showing;
# summed, the labels that make the total; wraps, {label: joules at which a counter begins anew}.
def _create_nvml_source(root, name, question, **how):
    nvml, handle, reason = _open_gpu()
    fields = {"gpu": (question, (), lambda thousandths: thousandths / 1e3)}  # mJ or mW
    reasons = _ask(fields, nvml, reason, handle)[1]
    if reasons:
        return None, reasons["gpu"] if nvml is None else f"{name}: {reasons['gpu']}"
    how |= {"name": name, "rails": False, "summed": ("gpu",)}
    return how | {"read": lambda: _ask(fields, nvml, reason, handle)[0]}, None


def _create_jetson(root):
    channels = _find_channels(root)
    readable = {rail["label"] for rail in read_jetson_rails(root) if rail["watts"] is not None}
    channels = [channel for channel in channels if channel[0] in readable]
    if not channels:
        return None, "no readable INA3221 rails under /sys/bus/i2c/drivers/ina3221"
    name, summed = "INA3221 VDD_IN", {"VDD_IN"}  # the whole module's input, on Orin NX and Nano
    if "VDD_IN" not in readable:
        name = "INA3221 sum of monitored rails"
        summed = {label for label in readable if NESTED_RAILS.get(label) not in readable}

    def read():
        return {rail["label"]: rail["watts"] for rail in read_jetson_rails(root, channels)}

    how = {"name": name, "read": read, "every_seconds": SAMPLE_SECONDS}
    return how | {"rails": True, "summed": summed}, None


def _create_rapl(root):
    folders = sorted(Path(root, "sys/class/powercap").glob("intel-rapl:*"))  # AMD's too
    domains = {_read_text(folder, "name") or "": folder for folder in folders}
    domains = {name: path for name, path in domains.items() if name.startswith("package")}
    if not domains:
        return None, "no RAPL package under /sys/class/powercap"

    def read(file="energy_uj"):
        numbers = {name: _read_number(path / file) for name, path in domains.items()}
        return {name: None if n is None else n / 1e6 for name, n in numbers.items()}

    if None in read().values():
        remedy = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        return None, f"RAPL is not readable by this user: {remedy}"
    how = {"name": "RAPL packages", "read": read, "every_seconds": COUNTER_SECONDS}
    return how | {"rails": True, "summed": domains, "wraps": read("max_energy_range_uj")}, None


_create_nvml_counter = partial(
    _create_nvml_source,
    name="NVML energy counter",
    question="nvmlDeviceGetTotalEnergyConsumption",
    every_seconds=None,
    wraps={},
)
_create_nvml_power = partial(
    _create_nvml_source,
    name="NVML power",
    question="nvmlDeviceGetPowerUsage",
    every_seconds=SAMPLE_SECONDS,
)
SOURCES = {  # tried in this order
    "gpu": (_create_nvml_counter, _create_nvml_power, _create_jetson),
    "cpu": (_create_jetson, _create_rapl),
}


# ---- this process, its libraries, its code -----------------------------------------------------


def host_peak_bytes(root="/"):
    """The most memory that this process ever held resident (VmHWM), or None where /proc lacks it.

    The mark spans the process's whole life, imports and compilation included, and is not reset
    between measurements: one process per measurement.
    """
    return _read_kilobytes(root, "proc/self/status", "VmHWM")


def host_rss_bytes(root="/"):
    """The memory that this process holds resident now (VmRSS), or None where /proc lacks it."""
    return _read_kilobytes(root, "proc/self/status", "VmRSS")


def read_version(name):
    """That of an installed package, or None. TensorFlow without CUDA is a package of its own."""
    for package in (name, f"{name}-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def read_versions(backend):
    """Versions for a record, found without importing: python, keras, numpy, the backend's own
    libraries, the driver and the newest CUDA that it runs. backend as in a record ("native-jax").
    """
    libraries = BACKENDS.get(backend.rpartition("-")[2], ())
    versions, reasons = {"python": platform.python_version()}, {}
    for name in ("keras", *libraries, "numpy"):
        versions[name], reasons[name] = read_version(name), f"{name} is not installed"
    nvml, _, reason = _open_gpu()
    driver, unknown = _ask(DRIVER_FIELDS, nvml, reason)
    versions |= driver
    return versions | {"notes": _explain("versions", versions, reasons | unknown)}


def read_git(folder="."):
    """{commit, dirty, notes} of the repository around `folder`; untracked files are not dirty."""
    unknown = {"commit": None, "dirty": None}
    folder = Path(folder).resolve()
    top = next((path for path in (folder, *folder.parents) if (path / ".git").exists()), None)
    if top is None:
        return unknown | {"notes": [f"git: {folder.name or folder} is in no git repository"]}
    # Naming both folders spares git's check of their owner, which fails on a mount in a container.
    command = ["git", f"--git-dir={top / '.git'}", f"--work-tree={top}", "--no-optional-locks"]
    command += ["-c", "core.fsmonitor=false", "status", "--porcelain=v2", "--branch"]
    text, reason = _run([*command, "--untracked-files=no"])
    commit = _find(r"^# branch\.oid ([0-9a-f]{40,64})$", text)
    if commit is None:
        return unknown | {"notes": [f"git: {reason or 'no commit yet'}"]}
    dirty = any(not line.startswith("#") for line in text.splitlines())
    return {"commit": commit, "dirty": dirty, "notes": []}


# ---- helpers -----------------------------------------------------------------------------------


def _open_gpu(index=None):
    """(pynvml, the GPU's handle, None), or (None, None, why not)."""
    try:
        import pynvml  # here: optional
    except ImportError:
        return None, None, "nvidia-ml-py is not installed"
    name = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    name = name if index is None else str(index)
    try:
        pynvml.nvmlInit()
        if name.isdigit():
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(name)), None
        if name.startswith("GPU-"):
            return pynvml, pynvml.nvmlDeviceGetHandleByUUID(name), None
    except pynvml.NVMLError as error:
        return None, None, f"NVML: {error}"
    return None, None, f"CUDA_VISIBLE_DEVICES names no GPU ({name!r})"


def _ask(fields, nvml, reason, *handle):
    """(values, reasons for None); each question by itself, for a Jetson answers only some."""
    values, reasons = dict.fromkeys(fields), {}
    for field, (question, arguments, convert) in fields.items():
        if nvml is None:
            reasons[field] = reason
            continue
        try:
            values[field] = convert(getattr(nvml, question)(*handle, *arguments))
        except (nvml.NVMLError, AttributeError) as error:  # or an nvidia-ml-py too old to ask
            reasons[field] = f"NVML: {error}"
    return values, reasons


def _explain(name, value, reasons):
    """Notes on the Nones in `value`; reasons go by the name inside the group, or its last part."""
    if isinstance(value, dict):
        return [note for k in value for note in _explain(f"{name}.{k}", value[k], reasons)]
    if isinstance(value, list):
        return list(dict.fromkeys(note for one in value for note in _explain(name, one, reasons)))
    known = (reasons.get(name.partition(".")[2]), reasons.get(name.rpartition(".")[2]))
    reason = known[0] or known[1] or "not readable on this machine"
    return [f"{name}: {reason}"] if value is None else []


def _read_text(root, name):
    try:
        return Path(root, name).read_text(errors="replace").strip(" \n\0") or None
    except OSError:
        return None


def _read_number(path):
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def _read_link(root, name):
    try:
        return os.readlink(Path(root, name))
    except OSError:
        return None


def _find(pattern, text):
    found = re.search(pattern, text or "", re.MULTILINE)
    return found.group(1).strip() if found else None


def _run(command):
    """(what a quick command prints, None), or (None, why not)."""
    if shutil.which(command[0]) is None:
        return None, f"{command[0]} is not installed"
    how = {"capture_output": True, "text": True, "errors": "replace", "timeout": 5}
    try:
        return subprocess.run(command, check=True, **how).stdout, None
    except subprocess.CalledProcessError as error:
        return None, (error.stderr.strip() or str(error)).splitlines()[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)


def _read_kilobytes(root, file, name):
    kilobytes = _find(rf"^{name}:\s*(\d+) kB", _read_text(root, file))
    return int(kilobytes) * 1024 if kilobytes else None


def _read_power_mode(root):
    mode = _find(r"pmode:0*(\d+)", _read_text(root, "var/lib/nvpmodel/status"))
    if mode is not None:
        pattern = rf"<\s*POWER_MODEL\s+ID={mode}\s+NAME=(\S+?)\s*>"
        return _find(pattern, _read_text(root, "etc/nvpmodel.conf")) or f"mode {mode}"
    if str(root) != "/":
        return None
    return _find(r"^NV Power Mode:\s*(\S+)", _run(["nvpmodel", "-q"])[0])


def _read_fastest(root, file):
    paths = Path(root, "sys/devices/system/cpu").glob(f"cpu[0-9]*/cpufreq/{file}")
    kilohertz = [number for number in map(_read_number, paths) if number is not None]
    return max(kilohertz) / 1e3 if kilohertz else None


def _read_devfreq(root):
    for folder in sorted(Path(root, "sys/class/devfreq").glob("*")):
        if folder.name.endswith(JETSON_GPUS):
            files = {"gpu_mhz": folder / "cur_freq", "gpu_max_mhz": folder / "max_freq"}
            hertz = {name: _read_number(path) for name, path in files.items()}
            return {name: value / 1e6 for name, value in hertz.items() if value is not None}
    return {}


def _read_on_battery(root):
    folder = Path(root, "sys/class/power_supply")
    if not folder.is_dir():
        return None
    supplies = list(folder.glob("*"))
    mains = [_read_number(s / "online") for s in supplies if _read_text(s, "type") == "Mains"]
    mains = [online for online in mains if online is not None]
    if mains:
        return not any(mains)
    return any(  # a mouse has a battery too, of scope Device
        _read_text(s, "type") == "Battery"
        and _read_text(s, "scope") != "Device"
        and _read_text(s, "status") == "Discharging"
        for s in supplies
    )


def _find_channels(root):
    """[(label, voltage file, current file)] of the INA3221 channels that are connected."""
    channels = []
    for path in sorted(Path(root, "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*/in*_label")):
        label, number = _read_text(path.parent, path.name), path.name[2:-6]
        if label and label != "NC" and label.lower() != "sum of shunt voltages":
            files = (path.with_name(f"in{number}_input"), path.with_name(f"curr{number}_input"))
            channels.append((label, *files))
    return channels


# ---- a page of the machine ---------------------------------------------------------------------


def describe_page(root="/"):
    """`describe_machine` and how power is read here: `power_sources` ({"gpu", "cpu"}: the name of
    the sensor for work there, or None) and `rails`, as `read_jetson_rails` has them.
    """
    page = describe_machine(root)
    meters = {device: create_energy_meter(root, device) for device in SOURCES}
    sources = {device: meter.source for device, meter in meters.items()}
    reasons = {f"power_sources.{device}": meter.reason for device, meter in meters.items()}
    notes = page["notes"] + _explain("device", {"power_sources": sources}, reasons)
    return page | {"power_sources": sources, "rails": read_jetson_rails(root), "notes": notes}


def format_page(page):
    """What `describe_page` found, as Markdown: the machine, its GPUs, how it stands now; what it
    does not tell comes last, with the reason."""
    rows = [
        ("board", page["board_model"]),
        ("processor", page["cpu_name"]),
        ("architecture, logical cores", _join(page["architecture"], page["logical_cores"])),
        ("memory", _format(page["memory_bytes"], "{:,.0f} MiB", 2**20)),
        ("system", _join(page["os"], page["kernel"])),
        ("Jetson Linux (L4T)", page["l4t_release"]),
    ]
    for gpu in page["gpus"] or []:
        memory = _format(gpu["memory_bytes"], "{:,.0f} MiB", 2**20)
        rows += [("GPU", _join(gpu["name"], memory))]
        rows += [("driver, newest CUDA that it runs", _join(gpu["driver"], gpu["cuda"]))]
    clocks = page["clocks"]
    cpu = [_format(clocks[name], "{:,.0f} MHz") for name in ("cpu_mhz", "cpu_max_mhz")]
    gpu = [_format(clocks[name], "{:,.0f} MHz") for name in ("gpu_mhz", "gpu_max_mhz")]
    battery = {None: None, True: "yes: plug it in to measure", False: "no"}[page["on_battery"]]
    others = page["other_processes"]
    rows += [
        ("power mode", page["power_mode"]),
        ("GPU power cap", _format(page["power_cap_watts"], "{:g} W")),
        ("CPU clock, limit", _join(*cpu)),
        ("GPU clock, highest", _join(*gpu)),
        ("on battery", battery),
        ("GPU clocks are held back by", _join(*(page["throttle_reasons"] or []))),
        ("others on the GPU", _join(*(f"{p['pid']} {p['name'] or ''}" for p in others or []))),
        ("energy of work on the GPU from", page["power_sources"]["gpu"]),
        ("energy of work on the CPU from", page["power_sources"]["cpu"]),
    ]
    rows += [(f"rail {r['label']}", _format(r["watts"], "{:.2f} W")) for r in page["rails"]]
    lines = [f"# {page['node_name'] or 'This machine'}", "", "| what | value |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in rows if value]
    unknown = {}  # reason: what it is the reason for
    for note in page["notes"]:
        name, _, reason = note.removeprefix("device.").partition(": ")
        unknown.setdefault(reason, []).append(name)
    lines += ["", "Not known here:", ""] if unknown else []
    return "\n".join([*lines, *(f"- {', '.join(what)}: {why}" for why, what in unknown.items())])


def _join(*values):
    return ", ".join(str(value) for value in values if value is not None)


def _format(value, pattern, unit=1):
    return None if value is None else pattern.format(value / unit)


def main():
    """Print the page of this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.telemetry", description="What this machine is, and what it tells."
    )
    parser.add_argument("--json", action="store_true", help="for programs, not as Markdown")
    is_json, page = parser.parse_args().json, describe_page()
    print(json.dumps(page, indent=2) if is_json else format_page(page))


if __name__ == "__main__":
    main()
