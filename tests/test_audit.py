"""Which advisories mean a locked version, and which of these end the audit with an error."""

import json
import re
import zipfile

import pytest
from conftest import ROOT, only_line, run_python

LOCK = """\
# made by a tool
left-pad==1.2.0 ; sys_platform == "linux" \\
    --hash=sha256:00
right_x==1
"""


def advise(name, package="Left_Pad", ecosystem="PyPI", **about):
    return {
        "id": name,
        "summary": f"what {name} says",
        **about,
        "affected": [{"package": {"name": package, "ecosystem": ecosystem}, **about}],
    }


def between(*events, kind="ECOSYSTEM"):
    return {"ranges": [{"type": kind, "events": list(events)}]}


ADVISORIES = [
    advise("LISTED", versions=["1.1.0", "1.2.0"], aliases=["CVE-1"]),
    advise("OTHER-VERSION", versions=["1.1.0"]),
    advise("IN-RANGE", **between({"introduced": "0"}, {"fixed": "1.10.0"})),  # 1.2 comes before
    advise("FIXED", **between({"introduced": "0"}, {"fixed": "1.2.0"})),
    advise("CAME-BACK", **between({"fixed": "1.1"}, {"introduced": "0"}, {"introduced": "1.2a1"})),
    advise("LAST", **between({"introduced": "1"}, {"last_affected": "1.2.0"})),
    advise("PAST", **between({"introduced": "1"}, {"last_affected": "1.1.9"})),
    advise("COMMITS", **between({"introduced": "0"}, {"fixed": "deadbeef"}, kind="GIT")),
    advise("COMMITS-UNFIXED", **between({"introduced": "0"}, kind="GIT")),
    advise("WITHDRAWN", versions=["1.2.0"], withdrawn="2026-01-01T00:00:00Z"),
    advise("ELSEWHERE", ecosystem="npm", versions=["1.2.0"]),
    advise("NOT-LOCKED", package="wrong-pad", versions=["1.2.0"]),
    {"id": "ABOUT-NOTHING"},  # which the schema allows
]
MEANT = ["CAME-BACK", "IN-RANGE", "LAST", "LISTED"]


@pytest.fixture
def audit(tmp_path):
    (tmp_path / "lock").write_text(LOCK)
    with zipfile.ZipFile(tmp_path / "PyPI.zip", "w") as archive:
        for advisory in ADVISORIES:
            archive.writestr(f"{advisory['id']}.json", json.dumps(advisory))

    def run(*exploited, catalogue="known.json"):
        items = [{"cveID": number} for number in exploited]
        (tmp_path / "known.json").write_text(json.dumps({"vulnerabilities": items}))
        return run_python(tmp_path, ROOT / "harness/audit.py", "lock", "PyPI.zip", catalogue)

    return run


def test_what_is_known_is_listed_and_no_error(audit):
    done = audit("CVE-2")
    *rows, summary = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert rows == [
        f"known left-pad 1.2.0: {name} {'CVE-1 ' * (name == 'LISTED')}what {name} says"
        for name in MEANT
    ]
    assert summary.startswith("2 locked packages: 4 known vulnerabilities, 0 of them exploited")


def test_what_is_exploited_comes_first_and_is_an_error(audit):
    done = audit("CVE-1", "CVE-2")
    rows = done.stdout.splitlines()
    assert done.returncode == 1 and rows[0].startswith("EXPLOITED left-pad 1.2.0: LISTED CVE-1")
    assert len(rows) == 5 and "1 of them exploited (advisories are 0 days old)" in rows[-1]


@pytest.mark.parametrize("catalogue", ["absent.json", "lock", "PyPI.zip"])
def test_no_advisories_is_one_line(audit, catalogue):
    done = audit(catalogue=catalogue)
    assert done.returncode == 2 and done.stdout == ""
    assert "make advisories" in only_line(done, "audit.py: error: ")


def test_every_locked_package_is_looked_for():
    from harness import audit

    locks = [(ROOT / name).read_text() for name in ("requirements.lock", "requirements-torch.lock")]
    pins = audit.read_pins(locks[0])
    assert sum(map(len, pins.values())) == len(re.findall(r"^[^ #]", locks[0], re.M))
    both = audit.read_pins("".join(locks))
    assert both["keras"] == ["3.15.1"] and both["torch"] == pins["torch"]  # of all its builds
    assert len(both["nvidia-cudnn-cu12"]) == 2 and "nvidia-cudnn-cu13" in both
