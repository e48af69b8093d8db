"""Weights & Biases, imported only when it is used: a run is opened without ever asking a person."""

import contextlib
import importlib.util
import logging
import netrc
import os
import shutil
import sys
from pathlib import Path

PROJECT = "keras3_edge_baseline"  # unless WANDB_PROJECT names another
# Seconds. What a server that is not there costs a run: to ask whether it is, at the start and at
# the end, and to wait for the rest to be uploaded. A run that SIGTERM ended has 10 for its end.
# W&B's own variables, where set, win.
ASKING = 3
PATIENCE = {"init_timeout": 5, "finish_timeout": 5}
CLOUD = "api.forge.coreweave.com"  # W&B's own since 0.31; a key for its older name is good there
ROOM = 2**16  # bytes; with less left on a disk, W&B cannot have written all that it keeps there


def start_run(refusal, **settings):
    """A W&B run: online with a key, else offline with a line of advice, never a prompt.

    ValueError: wandb is not installed, or its own settings are wrong; the message is one line.

    Args:
        refusal: the flag that does without W&B, for the advice.
        settings: of wandb.init.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb is not installed: pip install wandb, or run with {refusal}")
    # It would tell another server of its failures: where a network is silent, another 13 s.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # Where a disk is full W&B cannot keep a log of what it does: thousands of lines told of that.
    logging.raiseExceptions = False
    mode = os.environ.get("WANDB_MODE")
    try:
        get_server()
    except Exception as error:  # pydantic's, and what else a file of settings may cause
        raise ValueError(f"W&B: {explain(error)}") from error
    if mode is None and not has_key():
        mode = "offline"
        print(
            "W&B: no API key, so this run is logged offline. Set WANDB_API_KEY to log online, "
            f"or {refusal} not to log.",
            file=sys.stderr,
        )
    if mode in (None, "online", "shared") and (reason := ask_server()):
        mode = "offline"
        print(
            f"warning: W&B: {get_server()}: {reason}: this run is logged offline", file=sys.stderr
        )
    patience = {k: v for k, v in PATIENCE.items() if f"WANDB_{k.upper()}" not in os.environ}
    try:
        options = wandb.Settings(finish_timeout_raises=True, **patience)
        return wandb.init(mode=mode, settings=options, **settings)
    except Exception as error:
        print(f"warning: W&B: {explain(error)}: this run is logged offline", file=sys.stderr)
    try:
        return wandb.init(mode="offline", **settings)
    except Exception as error:
        print(f"warning: W&B: {explain(error)}: this run is not logged", file=sys.stderr)
        return wandb.init(mode="disabled")


def cut_tags(tags):
    """Tags as W&B takes them, of up to 64 characters"""
    return [str(tag)[:64] for tag in tags if tag]


def get_server():
    """Where W&B would log to: WANDB_BASE_URL, what `wandb login --host` left, or its default"""
    import wandb

    return wandb.setup().settings.base_url


def ask_server():
    """Why W&B's server cannot be reached, or None: W&B itself would take 20 s to find out."""
    import http.client  # here: most commands that end early, and runs offline, do without
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(get_server(), timeout=ASKING).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code >= 500 else None  # others are an answer
    except (OSError, ValueError, http.client.HTTPException) as error:
        return explain(error)
    return None


def explain(error):
    """An exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def has_key():
    """Whether W&B would find an API key: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    hosts = {get_server().split("://")[-1].split("/")[0]}
    hosts |= {"api.wandb.ai"} if hosts == {CLOUD} else set()
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
        return any(known.authenticators(host) for host in hosts)
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def forgiving(what):
    """W&B may fail in ways of its own: that is a warning, and what was measured stays."""
    try:
        yield
    except Exception as error:
        print(f"warning: W&B: {what}: {error}", file=sys.stderr)


def log(run, values, summary=None):
    """Log to W&B, which may fail in ways of its own: the run and its record must not."""
    try:
        run.log(values)
        run.summary.update(summary or {})
    except Exception as error:
        print(f"warning: W&B did not take a log: {error}: training goes on", file=sys.stderr)


def finish_run(run, kind, files, exit_code=0):
    """Add files, {name: text or bytes}, to a run as one artifact, called after kind and run, and
    close it. Where the server is gone nothing is waited for, and the files stay in the run's
    folder; what uploads it all is told. Returns whether nothing was lost."""
    import wandb

    contents = {n: c.encode() if isinstance(c, str) else c for n, c in files.items()}
    problems = []
    try:
        if not (run.offline or run.disabled) and (reason := ask_server()):
            for name, content in contents.items():
                kept = Path(run.dir, name)
                kept.write_bytes(content)
                run.save(kept, base_path=run.dir, policy="end")
            raise OSError(f"{get_server()}: {reason}")
        artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
        for name, content in contents.items():
            with artifact.new_file(name, mode="wb") as file:
                file.write(content)
        run.log_artifact(artifact)
    except Exception as error:
        problems.append(error)
    try:
        run.finish(exit_code=exit_code)
    except Exception as error:
        problems.append(error)
    folder = run.settings.sync_dir  # is not there under WANDB_MODE=disabled
    if os.path.isdir(folder) and shutil.disk_usage(folder).free < ROOM:
        print(f"warning: W&B: not all was written: no space is left in {folder}", file=sys.stderr)
        return False
    if problems:
        print(
            f"warning: W&B: not all was uploaded ({explain(problems[0])}); it is kept: "
            f"wandb sync {folder}",
            file=sys.stderr,
        )
    return True


def log_page(run, name, html):
    """Show a page of HTML on the run's dashboard."""
    import wandb

    run.log({name: wandb.Html(html, inject=False)})
