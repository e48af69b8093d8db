"""Make the C library keep the memory that it got, in huge pages.

A training step on a CPU asks for the same gigabytes again and again. By default glibc hands every
block above 32 MB back to the kernel at once, which then clears it page by page for the next step:
at batch 256 that was 43 % of PyTorch's step and 24 % of JAX's. The settings must be there when a
process starts, so it starts itself again.
"""

import os
import platform
import sys

TUNABLES = {  # https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html
    "glibc.malloc.mmap_max": 0,  # large blocks come from the heap, too
    "glibc.malloc.trim_threshold": 2**40,  # which is never given back
    "glibc.malloc.hugetlb": 1,  # and asks for transparent huge pages (glibc 2.35 and later)
}


def keep_memory():
    """Start this process again with TUNABLES, once, and only where there is glibc.

    Whoever sets GLIBC_TUNABLES, to whatever, is left alone.
    """
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"{name}={value}" for name, value in TUNABLES.items())
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
