"""The pins of pyproject.toml, one a line: what an image installs before the code is copied.

    python requirements.py dependencies sweep <pyproject.toml

Groups are `dependencies` or an extra's name. Exit code 1 for a group that is not there.
"""

import sys
import tomllib


def list_requirements(project, groups):
    """The requirements of groups of a pyproject's `project` table, in their order."""
    known = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    for group in groups:
        if group not in known:
            sys.exit(f"requirements.py: expected groups of {', '.join(known)}, got {group}")
    return [requirement for group in groups for requirement in known[group]]


if __name__ == "__main__":
    print(*list_requirements(tomllib.load(sys.stdin.buffer)["project"], sys.argv[1:]), sep="\n")
