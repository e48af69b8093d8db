"""Weights & Biases, imported only when it is used: a run is opened without ever asking a person."""

import contextlib
import importlib.util
import netrc
import os
import sys

PROJECT = "keras3_edge_baseline"  # unless WANDB_PROJECT names another


def start_run(refusal, **settings):
    """A W&B run: online with a key, else offline with a line of advice, never a prompt.

    ValueError: wandb is not installed; the message is one line.

    Args:
        refusal: the flag that does without W&B, for the advice.
        settings: of wandb.init.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb is not installed: pip install wandb, or run with {refusal}")
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and not has_key():
        mode = "offline"
        print(
            "W&B: no API key, so this run is logged offline. Set WANDB_API_KEY to log online, "
            f"or {refusal} not to log.",
            file=sys.stderr,
        )
    try:
        return wandb.init(mode=mode, settings=wandb.Settings(init_timeout=10), **settings)
    except Exception as error:
        print(f"warning: W&B: {error}: this run is logged offline", file=sys.stderr)
        return wandb.init(mode="offline", **settings)


def has_key():
    """Whether W&B would find an API key: in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
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


def log_files(run, kind, files):
    """Add files, {name: text or bytes}, to a run as one artifact, called after kind and run."""
    import wandb

    artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind)
    for name, content in files.items():
        with artifact.new_file(name, mode="wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    run.log_artifact(artifact)


def log_page(run, name, html):
    """Show a page of HTML on the run's dashboard."""
    import wandb

    run.log({name: wandb.Html(html, inject=False)})
