"""What a framework reads when it starts: the C library's allocator, caches of compiled code.

All of it must be set before the framework is imported.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import sys
import time
from pathlib import Path

# A training step on a CPU asks for the same gigabytes again and again. By default glibc hands
# every block above 32 MB back to the kernel at once, which then clears it page by page for the
# next step: at batch 256 that was 43 % of PyTorch's step and 24 % of JAX's.
TUNABLES = {  # https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
    "glibc.malloc.mmap_max": 0,  # large blocks come from the heap, too
    "glibc.malloc.trim_threshold": 2**40,  # which is never given back
    "glibc.malloc.hugetlb": 1,  # and asks for transparent huge pages (glibc 2.35 and later)
}
# Before a framework's threads bind this one, too, as OMP_PROC_BIND asks.
BOUND = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
CACHES = {"jax": "JAX_COMPILATION_CACHE_DIR", "torch": "TORCHINDUCTOR_CACHE_DIR"}


def read_dotenv():
    """Set the variables of .env, in this folder or one above, that are not set yet."""
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))


def keep_memory():
    """Start this process again with TUNABLES, once, and only where there is glibc: they must be
    there when a process starts. Whoever sets GLIBC_TUNABLES, to whatever, is left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def find_start():
    """time.perf_counter() of when this process began, before `keep_memory` started it again (Linux;
    elsewhere: now)."""
    try:  # man 5 proc: starttime, in ticks since the machine's start
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        age = 0
    return time.perf_counter() - max(0, age)


def processor():
    """A short name for the instructions that compiled code may use in this process.

    Each has a cache of its own. Inductor does not ask for which processor a cached graph was
    written, and a home folder or a volume may be shared by several: a graph of one with vector
    instructions does not compile on one without (or under ATEN_CPU_CAPABILITY=default).
    """
    lines = []
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    parts = [platform.machine(), os.environ.get("ATEN_CPU_CAPABILITY", ""), *known]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def count_cores(root="/"):
    """Processors that this process may use: all, those that it is bound to, as by taskset, or the
    share of their time that its container has, as by docker run --cpus 1.5 (where there is cgroup
    v2)."""
    cores = len(BOUND) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max" for all
        quota, period = Path(root, "sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def set_variables():
    """Set what JAX, PyTorch and TensorFlow read, where the user has not."""
    # Compiled code outlives the process, so that a second start need not compile again.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keras-vit"
    cache /= processor()
    os.environ.setdefault(CACHES["jax"], str(cache / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault(CACHES["torch"], str(cache / "inductor"))
    # Inductor would otherwise prove with three compilations that the compiler knows the vector
    # instructions of this processor: 8 s of a first start, 2 of each other.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    # JAX would take 75 % of the GPU at once, which hides what a run needs, and never more, which on
    # a Jetson leaves the host some. TensorFlow would take it all.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    is_shared = Path("/etc/nv_tegra_release").exists()
    if not is_shared and "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # both names are an error
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    # Of several GPUs CUDA would take the fastest; NVML, which tells power and clocks, counts slots.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@contextlib.contextmanager
def hide(*modules):
    """Let nobody find modules that they would use if they were installed."""
    hidden = [module for module in modules if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for module in hidden:
            del sys.modules[module]


def has_cuda():
    """Whether CUDA's driver finds a GPU: asked as frameworks ask, but quietly."""
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def finds_cuda(backend):
    """Whether a backend will compute on CUDA, before it is imported: there is a GPU, the backend's
    build is one for it, and JAX_PLATFORMS does not say otherwise."""
    if not has_cuda():
        return False
    if backend == "torch":
        version = Path(importlib.util.find_spec("torch").origin).with_name("version.py")
        return re.search(r"^cuda\b.*= *['\"]", version.read_text(), re.MULTILINE) is not None
    if backend == "jax":
        plugins = importlib.util.find_spec("jax_plugins")
        folders = map(Path, plugins.submodule_search_locations if plugins else ())
        is_built = any(any(folder.glob("xla_cuda*")) for folder in folders)
        return is_built and os.environ.get("JAX_PLATFORMS", "") != "cpu"
    return True


def read_cuda_memory():
    """All memory of the first GPU in bytes, from CUDA's driver; None without a GPU."""
    if not has_cuda():
        return None
    cuda, device, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return total.value


def precompile_header():
    """Before PyTorch's first compilation for a CPU, let another process do what that begins with:
    compiling a header, for seconds, which it does only once a step is traced and scheduled.
    """
    set_variables()  # among them where compiled code lies
    if count_compiled("torch", is_compiled=True) == 0:
        quietly = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        code = "import torch; torch.compile(torch.exp)(torch.ones(1024))"
        command = [sys.executable, "-c", code]
        os.posix_spawn(sys.executable, command, os.environ, file_actions=quietly)


def count_compiled(backend, is_compiled):
    """How many files the persistent compilation cache holds: a cold start adds some.

    0 for TensorFlow, which keeps none, and for PyTorch where it runs eagerly (not is_compiled);
    JAX compiles and keeps single operations, too.
    """
    if backend not in CACHES or (backend == "torch" and not is_compiled):
        return 0
    folder = os.environ.get(CACHES[backend])
    return sum(len(files) for _, _, files in os.walk(folder)) if folder else 0
