"""Make sweep_config.json one device's: named after node and backend, both fixed as parameters.

    python -m harness.sweep_file ook jax .cache/sweep.yaml

It is read and written as W&B reads it, as YAML 1.1, for which JSON's 1e-05 would be a word.
"""

import sys
from pathlib import Path

import yaml


def fix(sweep, node, backend):
    """The sweep, a dictionary, for one node and backend."""
    fixed = {"node_name": {"value": node}, "keras_backend": {"value": backend}}
    name = "-".join(filter(None, (sweep.get("name"), node, backend)))
    return sweep | {"name": name, "parameters": sweep["parameters"] | fixed}


if __name__ == "__main__":
    node, backend, path = sys.argv[1:]
    sweep = fix(yaml.safe_load(Path("sweep_config.json").read_text()), node, backend)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(sweep))
