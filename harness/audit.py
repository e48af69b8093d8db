"""Known vulnerabilities of the locked packages; one that is being exploited is an error.

    make advisories     fetch what is known: OSV's advisories for PyPI, CISA's list of the exploited
    make audit          compare what is locked with it; needs no network

    python harness/audit.py LOCK... PyPI.zip known_exploited_vulnerabilities.json

Exit code 0 where no locked version has a vulnerability that is known to be exploited (others are
listed), 1 where one has, 2 where a file is missing or is none of these.
"""

import json
import re
import sys
import zipfile
from datetime import date
from pathlib import Path

from packaging.version import InvalidVersion, Version


def read_pins(lock):
    """The versions of each package in a lock file's text: a platform may have its own, but builds
    of one version (`+cpu`) count as that."""
    pins = {}
    for name, version in re.findall(r"^(\S+?)==([^\s;\\+]+)", lock, re.M):
        versions = pins.setdefault(normalize(name), [])
        if version not in versions:
            versions.append(version)
    return pins


def normalize(name):
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_affected(version, affected):
    """Whether an advisory's `affected` entry means a version, by the rule of OSV's schema
    (https://ossf.github.io/osv-schema/): it is listed, or lies in a range of versions."""
    if version in affected.get("versions", ()):
        return True
    here = Version(version)
    ranges = (each for each in affected.get("ranges", ()) if each.get("type") != "GIT")  # commits
    for events in (each["events"] for each in ranges):
        try:
            bounds = [(Version(bound), kind) for event in events for kind, bound in event.items()]
        except InvalidVersion:  # of an old form
            continue
        inside = False
        for bound, kind in sorted(bounds):
            if kind == "introduced" and here >= bound:
                inside = True
            if (kind == "fixed" and here >= bound) or (kind == "last_affected" and here > bound):
                inside = False
        if inside:
            return True
    return False


def find_vulnerabilities(pins, archive, exploited):
    """A row for each advisory that means a pinned version.

    Args:
        pins: of `read_pins`.
        archive: a ZipFile with an advisory in OSV's format in each .json file.
        exploited: the set of CVE numbers that are known to be exploited.

    Returns:
        (is_exploited, package, version, advisory, its other names, summary), the exploited first.
    """
    rows = set()
    for member in archive.namelist():
        advisory = json.loads(archive.read(member))
        if advisory.get("withdrawn"):
            continue
        names = {advisory["id"], *advisory.get("aliases", ())}
        for affected in advisory.get("affected", ()):
            package = affected.get("package", {})
            name = normalize(package.get("name", ""))
            versions = pins.get(name, ()) if package.get("ecosystem") == "PyPI" else ()
            for version in versions:
                if is_affected(version, affected):
                    others = " ".join(sorted(names - {advisory["id"]}))
                    found = (name, version, advisory["id"], others, advisory.get("summary", ""))
                    rows.add((bool(names & exploited), *found))
    return sorted(rows, key=lambda row: (not row[0], *row[1:]))


def main(*paths):
    *locks, advisories, exploited = paths
    try:
        pins = read_pins("".join(Path(lock).read_text() for lock in locks))
        catalogue = json.loads(Path(exploited).read_text())
        known = {item["cveID"] for item in catalogue["vulnerabilities"]}
        with zipfile.ZipFile(advisories) as archive:
            rows = find_vulnerabilities(pins, archive, known)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        print(
            f"audit.py: error: expected a lock file, OSV's PyPI.zip and CISA's catalogue, got "
            f"{type(error).__name__}: {error}: make advisories fetches the last two",
            file=sys.stderr,
        )
        return 2
    for is_exploited, name, version, *others in rows:
        print("EXPLOITED" if is_exploited else "known", f"{name} {version}:", *filter(None, others))
    age = date.today() - date.fromtimestamp(Path(advisories).stat().st_mtime)
    count = sum(row[0] for row in rows)
    print(
        f"{sum(map(len, pins.values()))} locked packages: {len(rows)} known vulnerabilities, "
        f"{count} of them exploited (advisories are {age.days} days old)"
    )
    return 1 if count else 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
