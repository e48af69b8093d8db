"""Telemetry: recorded machines as folders, NVML as a small stand-in; absent sensors are null."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from harness import record as rec
from harness import stopwatch, telemetry
from harness.stopwatch import Stopwatch

ROOT = Path(__file__).resolve().parent.parent
RAPL = "sys/class/powercap/intel-rapl:0"
AGX_ORIN = {  # label, millivolts, milliamperes of each channel; 1-0040 and 1-0041
    "1-0040": [("VDD_GPU_SOC", 19920, 160), ("VDD_CPU_CV", 19928, 40), ("VIN_SYS_5V0", 5008, 520)],
    "1-0041": [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 19928, 20), ("NC", 0, 0)],
}
ORIN_NX = {
    "1-0040": [("VDD_IN", 5032, 1000), ("VDD_CPU_GPU_CV", 5032, 200), ("VDD_SOC", 5032, 300)]
}
JETSON = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nprocessor\t: 1\n",
    "proc/meminfo": "MemTotal:       64336632 kB\nMemFree:        1 kB\n",
    "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1300500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "2201600\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1728000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq": "2201600\n",
}


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def write_rails(root, chips):
    for number, (chip, channels) in enumerate(chips.items(), 3):
        folder = f"sys/bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon{number}"
        files = {f"{folder}/in7_label": "sum of shunt voltages\n", f"{folder}/in7_input": "360\n"}
        files[f"{folder}/curr7_input"] = "180\n"
        for channel, (label, millivolts, milliamperes) in enumerate(channels, 1):
            files[f"{folder}/in{channel}_label"] = f"{label}\n"
            files[f"{folder}/in{channel}_input"] = f"{millivolts}\n"
            files[f"{folder}/curr{channel}_input"] = f"{milliamperes}\n"
            files[f"{folder}/in{channel + 3}_input"] = "280\n"  # shunt microvolts, unlabelled
        write_tree(root, files)
    return root


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """No test depends on the machine that it runs on."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """Each reading of the clock is ten seconds after the one before."""
    ticks = itertools.count(0, 10)
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: float(next(ticks)))


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for pynvml; a test sets an answer to None for "not supported"."""
    answers = {
        "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090 Laptop GPU",
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=17171480576),
        "nvmlDeviceGetEnforcedPowerLimit": 175000,
        "nvmlDeviceGetClockInfo": 1455,
        "nvmlDeviceGetMaxClockInfo": 3105,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
        "nvmlDeviceGetComputeRunningProcesses": [types.SimpleNamespace(pid=os.getpid())],
        "nvmlSystemGetDriverVersion": "575.64.03",
        "nvmlSystemGetCudaDriverVersion": 12090,
        "nvmlDeviceGetTotalEnergyConsumption": itertools.count(1_000_000, 500_000),
        "nvmlDeviceGetPowerUsage": 50_000,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlDeviceGetHandleByUUID": "handle",
        "nvmlInit": 0,
    }
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})

    def create_question(name):
        def ask(*arguments):
            answer = answers[name]
            if answer is None:
                raise module.NVMLError("Not Supported")
            return next(answer) if isinstance(answer, itertools.count) else answer

        return ask

    for name in answers:
        setattr(module, name, create_question(name))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    module.answers = answers
    return module


def find_unexplained(group, values):
    """The nulls that the notes leave unexplained, by the record's own rule."""
    record = rec.create_record("train", backend="jax", precision="float32")
    record |= {group: values, "notes": values["notes"]}
    record[group] = {key: value for key, value in values.items() if key != "notes"}
    return rec.check_record(record)


def test_a_jetson_is_described(tmp_path):
    device = telemetry.describe_machine(write_rails(write_tree(tmp_path, JETSON), AGX_ORIN))
    expected = {
        "board_model": "NVIDIA Jetson AGX Orin Developer Kit",
        "l4t_release": "36.4.3",
        "os": "Ubuntu 22.04.5 LTS",
        "kernel": "5.15.148-tegra",
        "cpu_name": "ARMv8 Processor rev 1 (v8l)",
        "logical_cores": 2,
        "memory_bytes": 64336632 * 1024,
        "power_mode": "MODE_30W",
        "gpus": None,
    }
    assert {key: device[key] for key in expected} == expected
    assert device["clocks"] == {
        "cpu_mhz": 1728.0,
        "cpu_max_mhz": 2201.6,
        "gpu_mhz": 306.0,
        "gpu_max_mhz": 1300.5,
        "gpu_memory_mhz": None,
    }
    assert find_unexplained("device", device) == []


def test_on_a_jetson_each_question_that_nvml_refuses_is_null_by_itself(tmp_path, nvml):
    for name in nvml.answers:
        if name.startswith("nvmlDeviceGet") and "Handle" not in name and "Count" not in name:
            nvml.answers[name] = None
    nvml.answers["nvmlDeviceGetName"] = "Orin (nvgpu)"
    device = telemetry.describe_machine(write_tree(tmp_path, JETSON))
    assert device["gpus"] == [
        {
            "name": "Orin (nvgpu)",
            "memory_bytes": None,
            "power_cap_watts": None,
            "driver": "575.64.03",
            "cuda": "12.9",
        }
    ]
    assert device["clocks"]["gpu_mhz"] == 306.0  # devfreq knows what NVML does not
    assert device["throttle_reasons"] is None and device["other_processes"] is None
    assert "device.power_cap_watts: NVML: Not Supported" in device["notes"]
    assert find_unexplained("device", device) == []


def test_a_mode_without_a_name_keeps_its_number(tmp_path):
    write_tree(tmp_path, {"var/lib/nvpmodel/status": "pmode:0000\n"})
    assert telemetry.read_conditions(tmp_path)["power_mode"] == "mode 0"


def test_a_machine_that_tells_nothing_gives_nulls_with_reasons(tmp_path):
    device = telemetry.describe_machine(tmp_path)
    for key in ("cpu_name", "logical_cores", "memory_bytes", "kernel", "on_battery", "power_mode"):
        assert device[key] is None
    assert find_unexplained("device", device) == []
    assert telemetry.read_jetson_rails(tmp_path) == []
    assert telemetry.host_peak_bytes(tmp_path) is None
    assert telemetry.compare_conditions(device, telemetry.read_conditions(tmp_path)) == []


def test_this_machine_does_not_crash():
    assert find_unexplained("device", telemetry.describe_machine()) == []


def test_an_nvidia_gpu_is_described(tmp_path, nvml):
    device = telemetry.describe_machine(tmp_path)
    assert device["gpus"][0]["name"] == "NVIDIA GeForce RTX 4090 Laptop GPU"
    assert device["gpus"][0]["memory_bytes"] == 17171480576
    assert device["power_cap_watts"] == 175.0
    assert device["clocks"]["gpu_max_mhz"] == 3105
    assert device["throttle_reasons"] == [] and device["other_processes"] == []


@pytest.mark.parametrize("visible", ["", "-1", "none"])
def test_a_hidden_gpu_is_not_asked(nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu, reasons = telemetry.read_gpu()
    assert gpu["name"] is None and "CUDA_VISIBLE_DEVICES" in reasons["name"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234,0")
    assert telemetry.read_gpu()[0]["gpu_mhz"] == 1455


def test_agx_orin_has_no_input_rail_so_its_rails_are_summed(tmp_path, clock):
    root = write_rails(tmp_path, AGX_ORIN)
    rails = telemetry.read_jetson_rails(root)
    assert [rail["label"] for rail in rails] == [
        "VDD_GPU_SOC",
        "VDD_CPU_CV",
        "VIN_SYS_5V0",
        "VDDQ_VDD2_1V8AO",
    ]
    assert rails[0]["watts"] == pytest.approx(19.92 * 0.16)
    result = measure(root, "gpu")
    assert result["source"] == "INA3221 sum of monitored rails"
    seconds = result["rails"]["VDD_GPU_SOC"] / (19.92 * 0.16)
    assert seconds > 0
    assert result["rails"]["VDDQ_VDD2_1V8AO"] == pytest.approx(19.928 * 0.02 * seconds)
    # the memory rail hangs behind VIN_SYS_5V0: shown, not counted twice
    total = 19.92 * 0.16 + 19.928 * 0.04 + 5.008 * 0.52
    assert result["joules"] == pytest.approx(total * seconds)


def test_a_record_has_the_rails_of_all_steady_epochs(tmp_path):
    meter = telemetry.create_energy_meter(write_rails(tmp_path, AGX_ORIN), "gpu")
    watch = Stopwatch(3, 100, lambda: None, meter, print)
    for epoch in range(3):
        watch.begin_epoch()
        time.sleep(0.02)
        watch.end_epoch(epoch, {"loss": 1.0})
    _, energy, _ = watch.measure(0.0)
    nested = energy["rails"]["VDDQ_VDD2_1V8AO"]
    assert nested > 0 and len(energy["rails"]) == 4
    assert energy["joules"] == pytest.approx(sum(energy["rails"].values()) - nested)


@pytest.mark.parametrize("before, epochs", [([], 3), ([], 1), ([14.0, 11.0], 3)])
def test_what_is_steady(monkeypatch, before, epochs):
    """On a clock and a meter of its own, 10 W. An epoch has 100 images in 10 s, the first takes 4 s
    more for its first 10 images, since it compiles; validation takes 2 s and counts nowhere."""
    now = 0.0

    class Meter:
        def start(self):
            self.begun = now

        def stop(self):
            joules, seconds = 10 * (now - self.begun), now - self.begun
            found = {"joules": joules, "window_seconds": seconds, "notes": [], "source": "it"}
            return found | {"rails": {}}

    monkeypatch.setattr(stopwatch, "time", types.SimpleNamespace(perf_counter=lambda: now))
    seconds = before, [2.0] * len(before)
    watch = Stopwatch(len(before) + epochs, 100, lambda: None, Meter(), print, seconds)
    for epoch in range(epochs):
        watch.begin_epoch()
        if epoch == 0:
            now += 5
            watch.end_first_call(10)
        now += 10 if epoch else 9
        watch.end_training()
        now += 2
        watch.end_epoch(len(before) + epoch, {"loss": 1.0})
    timing, energy, notes = watch.measure(process_started=-3.0)
    assert timing["train_images_per_second"] == pytest.approx(10)
    assert timing["compile_seconds"] == pytest.approx(4) and timing["start_seconds"] == 8
    assert timing["epoch_seconds"] == [*before, 14, *[10] * (epochs - 1)]
    assert timing["validation_seconds"] == [2] * len(timing["epoch_seconds"])
    assert energy["joules_per_image"] == pytest.approx(1.0)
    assert energy["window_seconds"] == pytest.approx(10 * (epochs - 1) or 9)
    assert any(note.startswith("one epoch only") for note in notes) == (epochs == 1)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_orin_nx_has_an_input_rail_that_is_the_total(tmp_path, clock, device):
    result = measure(write_rails(tmp_path, ORIN_NX), device)
    assert result["source"] == "INA3221 VDD_IN"
    assert result["joules"] == result["rails"]["VDD_IN"] > 0


def test_a_channel_that_cannot_be_read_is_null_and_left_out(tmp_path, clock):
    root = write_rails(tmp_path, ORIN_NX)
    (root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr2_input").unlink()
    assert telemetry.read_jetson_rails(root)[1]["watts"] is None
    assert set(measure(root, "gpu")["rails"]) == {"VDD_IN", "VDD_SOC"}


def measure(root, device, between=lambda: None):
    meter = telemetry.create_energy_meter(root, device)
    before = threading.active_count()
    meter.start()
    between()
    result = meter.stop()
    assert threading.active_count() <= before
    assert find_unexplained("energy", result) == []
    return result


def write_rapl(root, microjoules, name="package-0"):
    files = {f"{RAPL}/name": name, f"{RAPL}/energy_uj": str(microjoules)}
    core = {f"{RAPL}:0/name": "core", f"{RAPL}:0/energy_uj": "1"}  # a part of the package
    return write_tree(root, files | core | {f"{RAPL}/max_energy_range_uj": "262143328850"})


@pytest.mark.parametrize(
    ("first", "last", "joules"),
    [(1_000_000, 31_000_000, 30.0), (262_133_328_850, 20_000_000, 30.0)],
)
def test_rapl_packages_are_counted_also_when_they_wrap(tmp_path, clock, first, last, joules):
    write_rapl(tmp_path, first)
    result = measure(tmp_path, "cpu", lambda: write_rapl(tmp_path, last))
    assert result["joules"] == pytest.approx(joules)
    assert result["rails"] == {"package-0": pytest.approx(joules)}
    assert result["source"] == "RAPL packages"


def test_a_wrap_of_unknown_range_is_no_figure(tmp_path, clock):
    write_rapl(tmp_path, 500_000)
    (tmp_path / RAPL / "max_energy_range_uj").unlink()

    def wrap():
        write_tree(tmp_path, {f"{RAPL}/energy_uj": "1"})

    assert measure(tmp_path, "cpu", wrap)["joules"] is None


def test_rapl_without_permission_names_the_remedy(tmp_path):
    write_rapl(tmp_path, 1)
    (tmp_path / RAPL / "energy_uj").unlink()
    (tmp_path / RAPL / "energy_uj").mkdir()  # unreadable for root as well
    result = measure(tmp_path, "cpu")
    assert result["joules"] is None and "sudo chmod a+r" in result["notes"][0]


def test_the_nvml_counter_is_first(tmp_path, nvml, clock):
    result = measure(write_rails(tmp_path, ORIN_NX), "gpu")
    # asked at creation, start and stop; 500 J between one answer and the next
    assert (result["joules"], result["source"]) == (500.0, "NVML energy counter")
    assert result["rails"] is None


def test_nvml_power_is_integrated_where_the_counter_is_missing(tmp_path, nvml, clock):
    nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = None
    result = measure(tmp_path, "gpu")
    assert result["source"] == "NVML power"
    assert result["joules"] >= 500.0 and result["joules"] % 500 == 0  # 50 W for 10 s a reading


def test_a_counter_that_stands_still_is_null(tmp_path, nvml, clock):
    nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = 7_000
    result = measure(tmp_path, "gpu")
    assert result["joules"] is None and "did not advance" in result["notes"][0]


def test_a_sensor_that_stops_answering_is_null(tmp_path, nvml, clock):
    def stop():
        nvml.answers.update(nvmlDeviceGetTotalEnergyConsumption=None)

    result = measure(tmp_path, "gpu", stop)
    assert result["joules"] is None and "at the end" in result["notes"][0]


def test_short_windows_are_called_unreliable_and_long_ones_not(tmp_path, nvml, clock, monkeypatch):
    assert not any("unreliable" in note for note in measure(tmp_path, "gpu")["notes"])
    ticks = itertools.count()
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: float(next(ticks)))
    assert any("unreliable" in note for note in measure(tmp_path, "gpu")["notes"])


def test_a_reading_that_fails_in_between_is_bridged_and_said(tmp_path, nvml, clock):
    nvml.answers["nvmlDeviceGetTotalEnergyConsumption"] = None
    failed = threading.Event()

    def ask_power(handle):
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise nvml.NVMLError("GPU is lost")
        return 50_000

    nvml.nvmlDeviceGetPowerUsage = ask_power
    result = measure(tmp_path, "gpu", lambda: failed.wait(30))
    assert result["joules"] > 0
    assert "energy.joules: 1 readings failed and were bridged" in result["notes"]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_no_sensor_is_a_null_object_with_a_reason(tmp_path, device):
    result = measure(tmp_path, device)
    assert result["joules"] is result["source"] is result["rails"] is None
    assert result["window_seconds"] >= 0
    assert result["notes"][0].startswith("energy: no readable power sensor (")


def test_a_meter_measures_again_but_not_without_start(tmp_path, nvml, clock):
    meter = telemetry.create_energy_meter(tmp_path)
    for _ in range(2):
        meter.start()
        assert meter.stop()["joules"] == 500.0
    with pytest.raises(RuntimeError, match="start"):
        meter.stop()


@pytest.mark.parametrize(
    ("supplies", "on_battery"),
    [
        ({"BAT0": ("Battery", "Discharging"), "AC": ("Mains", "0")}, True),
        ({"BAT0": ("Battery", "Charging"), "AC": ("Mains", "1")}, False),
        ({"BAT0": ("Battery", "Discharging"), "AC": ("Mains", "1")}, False),  # a weak charger
        ({"BAT0": ("Battery", "Discharging")}, True),
        ({"mouse": ("Battery", "Discharging", "Device")}, False),
    ],
)
def test_battery(tmp_path, supplies, on_battery):
    for name, (kind, state, *scope) in supplies.items():
        key = "online" if kind == "Mains" else "status"
        folder = f"sys/class/power_supply/{name}"
        write_tree(tmp_path, {f"{folder}/type": kind, f"{folder}/{key}": state})
        write_tree(tmp_path, {f"{folder}/scope": one for one in scope})
    conditions = telemetry.read_conditions(tmp_path)
    assert conditions["on_battery"] is on_battery
    warnings = telemetry.compare_conditions(conditions, conditions)
    assert warnings == ["on battery: plug in the charger and run again"] * on_battery


def test_what_changed_during_a_run_is_a_warning_with_its_remedy(tmp_path, nvml):
    write_tree(tmp_path, JETSON | {"proc/4711/comm": "python\n"})
    before = telemetry.read_conditions(tmp_path)
    write_tree(tmp_path, {"var/lib/nvpmodel/status": "pmode:0000\n"})
    nvml.answers["nvmlDeviceGetEnforcedPowerLimit"] = 80_000
    nvml.answers["nvmlDeviceGetCurrentClocksThrottleReasons"] = 0x1 | 0x20
    pids = [os.getpid(), 4711, 4712]
    processes = [types.SimpleNamespace(pid=pid) for pid in pids]
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = processes
    after = telemetry.read_conditions(tmp_path)
    assert find_unexplained("device", after) == []
    warnings = telemetry.compare_conditions(before, after)
    assert [warning.rpartition(": ")[0] for warning in warnings] == [
        "power mode changed from MODE_30W to MAXN during the run",
        "GPU power cap changed from 175 W to 80 W during the run",
        "GPU throttled: thermal",
        "another process uses the GPU: pid 4711 (python)",
        "another process uses the GPU: pid 4712 (name unknown)",
    ]
    assert telemetry.compare_conditions(before, before) == []


def test_in_a_container_only_processes_from_before_the_run_are_others(tmp_path, nvml):
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to("pid:[4026532999]")
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = [types.SimpleNamespace(pid=7001)]
    busy = telemetry.read_conditions(tmp_path)
    ours = types.SimpleNamespace(pid=7002)  # our own process, by the host's number
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"].append(ours)
    (warning,) = telemetry.compare_conditions(busy, telemetry.read_conditions(tmp_path))
    assert "pid 7001" in warning


def test_runs_that_wait_for_this_one_are_no_others(tmp_path, nvml, monkeypatch):
    monkeypatch.setenv("VIT_TURN", "/tmp/turns/0")
    variables = "HOME=/root\0VIT_TURN=/tmp/turns/1\0"
    write_tree(tmp_path, {"proc/7001/environ": variables, "proc/7002/environ": "HOME=/root\0"})
    processes = [types.SimpleNamespace(pid=pid) for pid in (7001, 7002, 7003)]
    nvml.answers["nvmlDeviceGetComputeRunningProcesses"] = processes
    busy = telemetry.read_conditions(tmp_path)
    assert [one["pid"] for one in busy["other_processes"]] == [7002, 7003]
    told = telemetry.compare_conditions(busy, busy)
    assert len(told) == 2 and "pid 7002" in told[0]
    monkeypatch.setenv("VIT_TURN", "/tmp/turns-of-another/0")
    assert len(telemetry.compare_conditions(busy, telemetry.read_conditions(tmp_path))) == 3


def test_host_memory(tmp_path):
    write_tree(tmp_path, {"proc/self/status": "VmPeak:\t9 kB\nVmHWM:\t  20 kB\nVmRSS:\t  10 kB\n"})
    assert telemetry.host_peak_bytes(tmp_path) == 20 * 1024
    assert telemetry.host_rss_bytes(tmp_path) == 10 * 1024


def test_versions(nvml):
    versions = telemetry.read_versions("native-torch")
    assert {"python", "keras", "torch", "numpy"} < set(versions) and "jax" not in versions
    assert (versions["cuda"], versions["driver"]) == ("12.9", "575.64.03")
    assert {"jax", "jaxlib"} < set(telemetry.read_versions("jax"))


def test_versions_that_are_not_there_are_null_with_a_reason(monkeypatch):
    def refuse(name):
        raise telemetry.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(telemetry.importlib.metadata, "version", refuse)
    versions = telemetry.read_versions("tensorflow")
    assert versions["tensorflow"] is None and versions["driver"] is None
    assert "versions.tensorflow: tensorflow is not installed" in versions["notes"]
    assert find_unexplained("versions", versions) == []


def run_git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_git(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    run_git(tmp_path, "init")
    assert telemetry.read_git(tmp_path)["notes"] == ["git: no commit yet"]
    write_tree(tmp_path, {"a.txt": "1"})
    run_git(tmp_path, "add", "a.txt")
    run_git(tmp_path, "commit", "-m", "first")
    run_git(tmp_path, "worktree", "add", "-b", "b", str(tmp_path / "tree"))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as on a mount in a container
    write_tree(tmp_path, {"untracked.txt": "1"})
    git = telemetry.read_git(tmp_path / "deep")
    assert len(git["commit"]) == 40 and git["dirty"] is False and git["notes"] == []
    write_tree(tmp_path, {"a.txt": "22"})
    assert telemetry.read_git(tmp_path)["dirty"] is True
    assert telemetry.read_git(tmp_path / "tree")["commit"] == git["commit"]
    monkeypatch.setenv("PATH", "")
    absent = telemetry.read_git(tmp_path)
    assert absent["commit"] is None and absent["notes"] == ["git: git is not installed"]


def test_no_repository(tmp_path):
    git = telemetry.read_git(tmp_path)
    assert git["commit"] is None and find_unexplained("git", git) == []


def test_the_module_imports_nothing_heavy():
    code = (
        "import sys; import harness.telemetry\n"
        "names = {'keras', 'jax', 'torch', 'numpy', 'pynvml', 'harness.record'}\n"
        "print(sorted(names & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- a page of the machine ---------------------------------------------------------------------


def test_a_page_of_a_jetson(tmp_path):
    root = write_rails(write_tree(tmp_path, JETSON), AGX_ORIN)
    page = telemetry.describe_page(root)
    text = telemetry.format_page(page)
    for line in (
        "| board | NVIDIA Jetson AGX Orin Developer Kit |",
        "| memory | 62,829 MiB |",
        "| power mode | MODE_30W |",
        "| CPU clock, limit | 1,728 MHz, 2,202 MHz |",
        "| GPU clock, highest | 306 MHz, 1,300 MHz |",
        "| energy of work on the GPU from | INA3221 sum of monitored rails |",
        "| rail VDD_GPU_SOC | 3.19 W |",
    ):
        assert line in text.splitlines()
    assert "None" not in text.partition("Not known here:")[0]
    assert len(page["rails"]) == 4 and json.loads(json.dumps(page)) == page
    assert find_unexplained("device", {k: v for k, v in page.items() if k != "rails"}) == []


def test_a_page_of_a_laptop(tmp_path, nvml):
    text = telemetry.format_page(telemetry.describe_page(tmp_path))
    assert "| GPU | NVIDIA GeForce RTX 4090 Laptop GPU, 16,376 MiB |" in text
    assert "| driver, newest CUDA that it runs | 575.64.03, 12.9 |" in text
    assert "| GPU power cap | 175 W |" in text
    assert "| energy of work on the GPU from | NVML energy counter |" in text
    assert "- l4t_release: no /etc/nv_tegra_release" in text


@pytest.mark.parametrize("quota, cores", [("150000 100000", 1.5), ("max 100000", None)])
def test_the_processors_that_a_run_may_use(tmp_path, monkeypatch, quota, cores):
    monkeypatch.setattr(telemetry.environment, "BOUND", {0, 2, 3})
    write_tree(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    assert telemetry.describe_machine(tmp_path)["usable_cores"] == (cores or 3)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_page_of_this_machine(flags):
    command = [sys.executable, "-m", "harness.telemetry", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if flags:
        assert json.loads(done.stdout)["logical_cores"] == os.cpu_count()
    else:
        assert "| memory | " in done.stdout
