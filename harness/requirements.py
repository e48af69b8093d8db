"""The pins of pyproject.toml, one a line: what is installed before the code is.

    python requirements.py dependencies sweep <pyproject.toml
    python requirements.py --lock=requirements.lock dependencies sweep <pyproject.toml
    python requirements.py --lock=requirements.lock --without=base.txt dependencies <pyproject.toml
    python requirements.py --lock=requirements.lock --lock=requirements-torch.lock --torch=cu126

Groups are `dependencies` or an extra's name. With a lock file (see `make lock`) all that they need
is printed with its hashes, for `pip install --require-hashes --no-deps`; but the packages that a
file, as `pip list --format=freeze` prints it, names, and PyTorch. That has a build for each kind of
device, all of one version: `--torch` prints one, and what it needs of CUDA, instead. Exit code 1
for a group or a build that is not there.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

# PyTorch's libraries. JAX and TensorFlow want others of these names, with their CUDA extras alone.
LIBRARIES = ("cuda-", "nvidia-", "triton")


def list_requirements(project, groups):
    """The requirements of groups of a pyproject's `project` table, in their order."""
    known = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    for group in groups:
        if group not in known:
            sys.exit(f"requirements.py: expected groups of {', '.join(known)}, got {group}")
    return [requirement for group in groups for requirement in known[group]]


def list_locked(project, groups, lock, without=()):
    """The blocks of a lock file, its text as uv writes it, that groups need, but PyTorch. What is
    needed `without` those packages is not among them."""
    own, wanted = project["name"], set()
    for requirement in list_requirements(project, groups):
        if requirement.startswith(f"{own}["):  # some of its own groups
            extras = requirement[len(own) + 1 : -1].split(",")
            wanted |= {name_package(each) for each in list_requirements(project, extras)}
        else:
            wanted.add(name_package(requirement))
    has_cuda = any(group.endswith("cuda12") for group in groups)
    blocks = [block for block in split_blocks(lock) if name_package(block) not in without]
    found = find_needed(blocks, wanted, (*LIBRARIES, "jax-cuda12"))
    if has_cuda:  # what JAX and TensorFlow want of CUDA, and not what the index's own PyTorch does
        others = [block for block in blocks if name_package(block) != "torch"]
        found += find_needed(others, wanted - {"torch"}, ("cuda-", "triton"))
    missing = wanted - {*map(name_package, found)} - {*without}
    if missing:
        sys.exit(f"requirements.py: not in the lock file: {', '.join(sorted(missing))}: make lock")
    return [block for block in dict.fromkeys(found) if name_package(block) != "torch"]


def list_torch(locks, build):
    """The blocks of a build of PyTorch, such as cpu or cu126, and of what it needs of CUDA; of the
    package index's own, for CUDA 13, by the build "". It is in one of the lock files."""
    known = {}  # build: its block and those beside it
    for blocks in map(split_blocks, locks):
        for block in blocks:
            if found := re.match(r"torch==[^\s+]+\+?(\S*)", block):
                known[found[1]] = block, blocks
    if build not in known:
        expected = ", ".join(map(repr, known))
        sys.exit(f"requirements.py: expected a build of {expected}, got {build!r}")
    block, blocks = known[build]
    needed = find_needed(blocks, {"torch"}) if build != "cpu" else []
    return [block, *(each for each in needed if name_package(each).startswith(LIBRARIES))]


def split_blocks(lock):
    """A lock file's packages: each with its hashes and, after "via", the packages that want it."""
    return re.findall(r"^[a-z0-9].*\n(?: .*\n)*", lock, re.M)


def find_needed(blocks, wanted, spared=()):
    """The blocks of packages that are wanted, and of what these need, but for names that begin as
    those `spared`."""
    names, found, size = {*wanted}, {}, None
    while size != len(found):
        size = len(found)
        for block in blocks:
            name, wanting = name_package(block), set(re.findall(r"# +(?:via )?(\S+)", block))
            if name in wanted or wanting & names and not name.startswith(spared):
                names.add(name)
                found[block] = None
    return list(found)


def name_package(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock", type=Path, action="append", default=[])
    parser.add_argument("--without", type=Path)
    parser.add_argument("--torch")
    parser.add_argument("groups", nargs="*")
    asked = parser.parse_args()
    locks = [path.read_text() for path in asked.lock]
    if asked.torch is not None:
        print(*list_torch(locks, asked.torch), sep="")
        sys.exit()
    table = tomllib.load(sys.stdin.buffer)["project"]
    if locks:
        base = asked.without.read_text() if asked.without else ""
        without = {name_package(line) for line in base.splitlines()}
        print(*list_locked(table, asked.groups, locks[0], without), sep="")
    else:
        print(*list_requirements(table, asked.groups), sep="\n")
