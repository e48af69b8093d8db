"""The command line of a flat configuration: one dataclass, parsed by tyro, refused in one line."""

import dataclasses
import json
import sys


class ConfigError(Exception):
    """An impossible value, in one line: expected and got. (tyro would frame a ValueError.)"""


def fail(message, code=2):
    """End the process with one line on stderr and an exit code."""
    print(f"{sys.argv[0].rpartition('/')[2]}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def name_flag(field):
    """The flag of a field, as it is written in messages: num_epochs -> --num-epochs"""
    return "--" + field.replace("_", "-")


def parse(kind, argv, description):
    """An instance of the dataclass `kind` from a command line; ends the process on --help and on
    errors.

    Beside tyro's own forms it takes what W&B's sweep agents send: `--use_wandb=True`, and lists
    as `--wandb-tags=["a","b"]`.
    """
    import tyro

    types = {f.name: f.type for f in dataclasses.fields(kind)}
    arguments, words = [], list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        is_known = flag.startswith("--") and name in types
        if is_known and types[name] is bool and not equals:
            equals = words and words[0].lower() in ("true", "false")
            value = words.pop(0) if equals else ""
        if is_known and types[name] is bool and value.lower() in ("true", "false"):
            arguments.append(flag if value.lower() == "true" else f"--no-{flag[2:]}")
            continue
        if is_known and not equals and words and words[0].startswith("["):
            equals, value = "=", words.pop(0)
        if is_known and value.startswith("["):
            try:
                arguments += [flag, *map(str, json.loads(value))]
                continue
            except ValueError:
                fail(f"{flag}: expected a list such as [1, 2], got {value}")
        arguments.append(f"{flag}={value}" if equals else flag)
    try:
        return tyro.cli(kind, args=arguments, description=description)
    except ConfigError as error:
        fail(error)


def check_writable(**paths):
    """End the process at once, not after hours, where a result could not be written.

    paths: by field names. Their folders are created.
    """
    for field, path in paths.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
        except OSError as error:
            expected = "expected a file that can be written"
            fail(f"{name_flag(field)}: {expected}, got {path}: {error.strerror}")
