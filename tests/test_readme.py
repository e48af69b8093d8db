"""The README's commands, run as they stand there but for flags that make them short."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import MODEL, ROOT, SMALL, child_environment

from harness.cli import parse, split_words

TEXT = (ROOT / "README.md").read_text()
LINES = [
    line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.split("\n")
]
COMMANDS = [line.split("  #")[0].strip() for line in LINES if line and not line.startswith("#")]
PYTHON = [command for command in COMMANDS if re.match(r"(\w+=\S+ )*python ", command)]

# Of the commands that train, serve or pre-train these are run; of the others, which would run the
# same again, the flags must do.
RUN = ("KERAS_BACKEND", "--resume", "python latency.py", "python parity.py")


def is_run(command):
    return any(part == command or part.startswith(("K", "-")) and part in command for part in RUN)


def test_the_first_screen_sets_everything_up():
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert "make demo" in "\n".join(TEXT.split("\n")[:45])


@pytest.mark.parametrize("command", PYTHON)
def test_python_commands(command, tmp_path):
    words = shlex.split(command)
    environment = child_environment(tmp_path, WANDB_MODE="disabled")
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    script = words[1]
    words = [sys.executable, str(ROOT / script), *words[2:]]
    small = [*SMALL, f"--checkpoint-path={tmp_path / 'b.weights.h5'}"]
    if script == "pretrain.py":
        import pretrain

        assert parse(pretrain.PretrainConfig, words[2:], "", pretrain.vit.PRESETS).num_epochs
        return
    if script == "vit.py":
        import vit

        assert vit.parse_config([*words[2:], "--dataset=synthetic"])  # as they are
        words += [*small, "--warmup-epochs=0", "--drop-path=0", "--trainer=fit"]
        words += ["--loader=resident"]  # fit has no other
        if not is_run(command):
            assert vit.parse_config(words[2:]).num_epochs == 1
            return
    elif script == "latency.py":  # few iterations of a small model
        split = words.index("--") if "--" in words else len(words)
        quick = ["--model=vit", "--iterations=2", "--warmup=0", "--seconds=0.5"]
        quick += ["--dataset=synthetic", "--test-images=20"]
        model = [] if "--list-models" in words else ["--", *words[split + 1 :], *MODEL]
        words = [*words[:split], *quick, "--batch-sizes", "1", *model]
        if not is_run(command):
            import latency

            _, flags = latency.parse_words(words[2:])
            assert latency.vit.parse_config(flags).num_epochs
            return
    elif script == "parity.py":  # one backend's half
        words[2:2] = ["--observed=jax.npz"]
        split = words.index("--") if "--" in words else len(words)
        model = ["--", *words[split + 1 :], *MODEL]
        words = [*words[:split], "--backends", "jax", *model]
        if not is_run(command):
            import parity

            own, flags = split_words(words[2:])
            assert parse(parity.ParityConfig, own, "").backends == ("jax",)
            assert parity.vit.parse_config(flags).num_epochs
            return
    elif any(word.endswith(".jsonl") for word in words):  # a report on records that are here
        words = [str(ROOT / word) if word.startswith("results/") else word for word in words]
    elif script == "sweep.py":  # the study is opened, and no trial begun
        words.insert(words.index("--") if "--" in words else len(words), "--count=0")
    else:
        words.insert(2, "--dry-run")
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if script == "sweep.py":
        assert done.returncode == 1 and "none was begun" in done.stdout, done.stderr[-2000:]
    else:
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    words = [*shlex.split(command), "--dry-run"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_linked_file_is_here():
    links = re.findall(r"\]\(((?!https?://|#)[^)]+)\)", TEXT)
    assert links and not [link for link in links if not (ROOT / link.split("#")[0]).exists()]


def test_every_field_of_the_record_is_explained():
    from harness.record import MEASURED

    names = {name for kind in MEASURED.values() for group in kind.values() for name in group}
    assert not [name for name in sorted(names) if f"`{name}`" not in TEXT]
