"""run_sweep_*.sh, with a docker that runs containers' commands right here and W&B's real programs
against a stand-in for its server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL, child_environment, read_last_record
from wandb_server import SWEEP, WandbServer

from harness import sweep_file

KEY = "k" * 40
ACCOUNT = {"WANDB_API_KEY": KEY, "WANDB_ENTITY": "us"}
DOCKER = """#!/usr/bin/env bash
echo "docker $*" >>"$LOG"
case "$*" in *"${FAIL:-nothing}"*) exit 7 ;; esac
[ "$1" = run ] || exit 0
case " $* " in
  *" -e KEY_ON_STDIN=1 "*) read -r WANDB_API_KEY ;;
  *) unset WANDB_API_KEY ;;  # a container has its own environment
esac
while [[ $1 != vit:* ]]; do shift; done
shift
exec "$@"
"""
CONFIG = {
    "name": "small",
    "program": "vit.py",
    "method": "grid",
    "metric": {"name": "val_top-5-accuracy", "goal": "maximize"},
    "command": ["${env}", "${interpreter}", "${program}", *SMALL, "${args}"],
    "parameters": {
        "learning_rate": {"values": [0.00001, 0.001]},
        "keras_backend": {"values": ["jax", "torch"]},
    },
}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the scripts use, with a small sweep and a docker of our own on the PATH."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "harness", folder / "harness")
    for name in ("vit.py", "run_sweep_ook.sh", "run_sweep_ojo.sh"):
        shutil.copy(ROOT / name, folder)
    text = json.dumps(CONFIG).replace("1e-05", "0.00001")  # which YAML 1.1 would take for a word
    (folder / "sweep_config.json").write_text(text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text(DOCKER)
    (tmp_path / "bin" / "docker").chmod(0o755)
    (tmp_path / "docker.log").touch()
    return folder


def run_sweep(checkout, *arguments, script="run_sweep_ook.sh", **environment):
    """Returns the finished script, with `docker`: the lines of its docker commands."""
    folder = checkout.parent
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    log = folder / "docker.log"
    variables = child_environment(checkout, PATH=path, LOG=str(log), **environment)
    del variables["PYTHONPATH"]  # its own copy
    del variables["WANDB_SILENT"]  # it would keep the sweep's id to itself
    done = subprocess.run(
        [str(checkout / script), *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
    )
    done.docker = log.read_text().splitlines()
    return done


def test_a_sweep_of_two_trials(checkout):
    rates = [0.00001, 0.001]
    trials = [{"learning_rate": r, "keras_backend": "jax", "node_name": "ook"} for r in rates]
    with WandbServer(trials) as server:
        where = {"WANDB_BASE_URL": server.url, "WANDB_MODE": "offline"}
        done = run_sweep(checkout, "jax", COUNT="2", **ACCOUNT, **where)
    assert done.returncode == 0, done.stdout + done.stderr
    # W&B's own word for where it is
    assert (
        f"jax: {server.url}/someone/keras3_edge_baseline/sweeps/{SWEEP}" in done.stdout.splitlines()
    )
    # created as W&B reads it: named, its node and backend fixed, 1e-05 a number
    (created,) = map(yaml.safe_load, server.sweeps)
    assert created["name"] == "small-ook-jax"
    assert created["parameters"]["node_name"]["value"] == "ook"
    assert created["parameters"]["keras_backend"]["value"] == "jax"
    assert created["parameters"]["learning_rate"]["values"] == rates
    # both trials ran, with the sweep's values
    records = [json.loads(line) for line in (checkout / "results.jsonl").read_text().splitlines()]
    assert [record["config"]["learning_rate"] for record in records] == rates
    assert read_last_record(checkout)["config"]["node_name"] == "ook"
    assert {record["status"] for record in records} == {"ok"}
    assert len(list(checkout.glob("wandb/offline-run-*"))) == 2
    # the key is in no command, and no container's environment is told it
    assert all(KEY not in line and "WANDB_API_KEY" not in line for line in done.docker)


def test_an_agent_whose_trials_fail_is_no_success(checkout):
    with WandbServer([{"learning_rate": -1}]) as server:
        server.sweeps = [json.dumps(CONFIG)]
        where = {"WANDB_BASE_URL": server.url, "WANDB_MODE": "offline"}
        done = run_sweep(checkout, "jax", SWEEP_ID=SWEEP, **ACCOUNT, **where)
    assert done.returncode == 1
    assert "jax: failed: no trial ended well" in done.stdout
    assert len(server.sweeps) == 1  # it was joined


@pytest.mark.parametrize("script, flags", [("ook", "--gpus all"), ("ojo", "--runtime nvidia")])
def test_a_dry_run_prints_the_commands_and_no_key(checkout, script, flags):
    lines = f'WANDB_API_KEY="{KEY}" # mine\n export WANDB_ENTITY = us  # ours\r\n$(touch x)\n'
    (checkout / ".env").write_text(lines)
    done = run_sweep(checkout, "both", script=f"run_sweep_{script}.sh", DRY_RUN="1", COUNT="3")
    assert (done.returncode, done.docker, done.stderr) == (0, [], "")
    lines = done.stdout.splitlines()
    for framework in ("jax", "pytorch"):
        assert (
            f"docker build -f Dockerfile.{script}.{framework} -t vit:{script}-{framework} . "
            in lines
        )
    assert "pytorch: https://wandb.ai/us/keras3_edge_baseline/sweeps/SWEEP_ID" in lines
    runs = [line for line in lines if line.startswith("docker run")]
    assert len(runs) == 6 and all(flags in line for line in runs)
    safe = f"--user {os.getuid()}:{os.getgid()} --read-only --tmpfs /tmp:exec --cap-drop ALL"
    assert all(safe in line and f"-v {checkout}:/app" in line for line in runs)
    assert runs[2].rstrip().endswith("wandb agent --count 3 us/keras3_edge_baseline/SWEEP_ID")
    assert KEY not in done.stdout and not list(checkout.rglob("x"))


def test_one_backend_failing_does_not_hide_the_other(checkout):
    (checkout / "sweep.py").write_text("import sys\nprint('local', *sys.argv[1:])\n")
    done = run_sweep(checkout, "both", LOCAL="1", FAIL="Dockerfile.ook.jax")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "local --backend torch --count 20",
        "jax: failed: the image was not built",
        "pytorch: done",
    ]
    done = run_sweep(checkout, "both", LOCAL="1", FAIL="sweep.py --backend torch", COUNT="5")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["jax: done", "pytorch: failed: sweep.py failed"]


@pytest.mark.parametrize(
    "arguments, environment, told",
    [
        (["jax"], {}, "WANDB_API_KEY is not set: write it into .env"),
        (["jax"], {}, "without an account: LOCAL=1 ./run_sweep_ook.sh jax"),
        (["jax"], {"WANDB_API_KEY": KEY}, "WANDB_ENTITY is not set"),
        (["flax"], {}, "expected jax, pytorch, both or help, got 'flax'"),
        ([], {}, "expected jax, pytorch, both or help, got ''"),
        (["jax", "--count", "3"], {}, "expected one word, got 'jax --count 3'"),
        (["jax"], {"COUNT": "many"}, "COUNT: expected 1 or more, got many"),
        (["both"], {"SWEEP_ID": "x"}, "expected jax or pytorch with it, got both"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    checkout, arguments, environment, told
):
    done = run_sweep(checkout, *arguments, **environment)
    assert (done.returncode, done.docker) == (2, [])
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_sweep_that_cannot_be_created(checkout):
    done = run_sweep(checkout, "jax", FAIL="wandb sweep", **ACCOUNT)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "jax: failed: the sweep was not created"


def test_help(checkout):
    done = run_sweep(checkout, "help", script="run_sweep_ojo.sh")
    assert done.returncode == 0 and done.stdout.startswith("./run_sweep_ojo.sh jax | pytorch")


def test_a_sweep_without_a_name():
    fixed = sweep_file.fix({"parameters": {"x": {"value": 1}}}, "ook", "jax")
    assert fixed["name"] == "ook-jax"
    assert set(fixed["parameters"]) == {"x", "node_name", "keras_backend"}
