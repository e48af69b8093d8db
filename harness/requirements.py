"""The pins of pyproject.toml, one a line: what an image installs before the code is copied.

    python requirements.py dependencies sweep <pyproject.toml
    python requirements.py --lock=requirements.lock dependencies sweep <pyproject.toml
    python requirements.py --lock=requirements.lock --without=base.txt dependencies <pyproject.toml

Groups are `dependencies` or an extra's name. With a lock file (see `make lock`) all that they need
is printed with its hashes, for `pip install --require-hashes`; but PyTorch, whose builds for
different devices have one version and come from different places, and the packages that a file,
as `pip list --format=freeze` prints it, names. Exit code 1 for a group that is not there.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

NOT_LOCKED = {"torch"}


def list_requirements(project, groups):
    """The requirements of groups of a pyproject's `project` table, in their order."""
    known = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    for group in groups:
        if group not in known:
            sys.exit(f"requirements.py: expected groups of {', '.join(known)}, got {group}")
    return [requirement for group in groups for requirement in known[group]]


def list_locked(project, groups, lock, without=()):
    """The blocks of a lock file, its text as uv writes it, that groups need: each names the
    packages that want it after "via". What is needed `without` those is not among them."""
    own, wanted, found = project["name"], set(), {}
    for requirement in list_requirements(project, groups):
        if requirement.startswith(f"{own}["):  # some of its own groups
            extras = requirement[len(own) + 1 : -1].split(",")
            wanted |= {name_package(each) for each in list_requirements(project, extras)}
        else:
            wanted.add(name_package(requirement))
    blocks = re.findall(r"^[a-z0-9].*\n(?: .*\n)*", lock, re.M)
    blocks = [block for block in blocks if name_package(block) not in without]
    has_cuda, size = any(group.endswith("cuda12") for group in groups), None
    while size != len(found):
        size = len(found)
        for block in blocks:
            name, wanting = name_package(block), set(re.findall(r"# +(?:via )?(\S+)", block))
            # JAX and TensorFlow want these only with their extras.
            is_spared = name.startswith(("jax-cuda12", "nvidia-")) and not has_cuda
            if name in wanted or wanting & wanted and not is_spared:
                wanted.add(name)
                found[block] = None
    missing = wanted - {name_package(block) for block in found} - {*NOT_LOCKED, *without}
    if missing:
        sys.exit(f"requirements.py: not in the lock file: {', '.join(sorted(missing))}: make lock")
    return list(found)


def name_package(requirement):
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock", type=Path)
    parser.add_argument("--without", type=Path)
    parser.add_argument("groups", nargs="+")
    asked = parser.parse_args()
    table = tomllib.load(sys.stdin.buffer)["project"]
    if asked.lock:
        base = asked.without.read_text() if asked.without else ""
        without = {name_package(line) for line in base.splitlines()}
        print(*list_locked(table, asked.groups, asked.lock.read_text(), without), sep="")
    else:
        print(*list_requirements(table, asked.groups), sep="\n")
