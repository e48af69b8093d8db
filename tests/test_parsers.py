"""Whatever is given to the parsers of configurations and records, they answer in a line."""

import dataclasses
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import vit
from harness import record

# The same examples each time.
settings.register_profile(
    "project",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("project")

FIELDS = [field.name.replace("_", "-") for field in dataclasses.fields(vit.ViTConfig)]
VALUES = st.one_of(
    st.integers(-3, 300).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["true", "False", "none", "[1, 2]", "[]", "[", '["a"]', "", "--", "-", "=", "jax"]
    ),
    st.sampled_from(
        ["tiny", "B/16", "B/0", "fit", "conv", "synthetic", "cosine", "1e400", "x.keras"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8),
)
FLAGS = st.one_of(
    st.tuples(st.sampled_from(FIELDS), VALUES).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
    st.tuples(st.sampled_from(FIELDS), VALUES).map(lambda pair: [f"--{pair[0]}", pair[1]]),
    st.sampled_from(FIELDS).map(lambda name: [f"--no-{name}"]),
    VALUES.map(lambda value: [value]),
)


@settings(max_examples=30)
@given(st.lists(FLAGS, max_size=4))
@example([["--loader-workers=-1"]])
def test_a_command_line_is_a_configuration_or_one_line(capsys, parts):
    words = [word for part in parts for word in part]
    capsys.readouterr()
    try:
        assert isinstance(vit.parse_config(words), vit.ViTConfig)
    except SystemExit as ending:
        told = capsys.readouterr().err
        assert ending.code in (0, 2), words
        assert ending.code == 0 or len(told.splitlines()) == 1 and "error: " in told, told


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda values: st.one_of(
        st.lists(values, max_size=3), st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=8,
)
GOOD = record.create_record("train", status="ok", id="a")
CHANGED = st.dictionaries(st.sampled_from([*record.KEYS, "other"]), JSON, max_size=3)
LINES = st.one_of(
    st.binary(max_size=40),
    JSON.map(lambda value: json.dumps(value).encode()),
    CHANGED.map(lambda change: json.dumps({**GOOD, **change}).encode()),
)


@settings(max_examples=200)
@given(st.lists(LINES, max_size=4))
def test_a_file_of_records_is_read_or_refused(tmp_path, lines):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        found, problems = record.read_records(path)
    except record.RecordError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert all("\n" not in problem for problem in problems)
    for item in found:
        assert record.check_structure(item) == []
        assert json.loads(record.dump_record(item)) == item


def test_a_good_record_is_among_what_is_read(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(record.dump_record(GOOD).encode() + b"\xff\n[1]\n")
    found, problems = record.read_records(path)
    assert len(found) == 1 and len(problems) == 2


@pytest.mark.parametrize("word", ["--dataset=\ud800", "--results-path=a\x00b"])
def test_what_no_file_can_be_called(capsys, word):
    try:
        vit.parse_config([word])
    except SystemExit as ending:
        assert ending.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
