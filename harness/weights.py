"""Weights from a file: into a model whose architecture must be theirs."""

import zipfile

import numpy as np


def list_encoder_weights(model):
    """[(name, variable)] of all that an encoder trains, in order: from the layer that vit.py calls
    patch_encoder to the one that it calls encoded."""
    first, last = (model.layers.index(model.get_layer(n)) for n in ("patch_encoder", "encoded"))
    layers = [layer for layer in model.layers[first : last + 1] if layer.trainable_variables]
    return [  # a path begins with the layer's own name, which depends on what was built before
        (f"{number:03d} {variable.path.partition('/')[2]}", variable)
        for number, layer in enumerate(layers)
        for variable in layer.trainable_variables
    ]


class WeightsError(Exception):
    """A file does not hold this encoder's weights; the message is one line."""

    ending = ("error", 2)  # status and exit code


def load_encoder_weights(model, path):
    """Set an encoder's weights from the .npz that pretrain.py writes. Raises WeightsError."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            given = dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, TypeError) as error:
        raise WeightsError(
            f"--init-weights: expected a file of pretrain.py, got {path}: {error}"
        ) from error
    ours = list_encoder_weights(model)
    wanted = {name: tuple(v.shape) for name, v in ours}
    found = {name: array.shape for name, array in given.items()}
    clashes = [
        f"{name} {wanted.get(name, 'missing')} here, {found.get(name, 'missing')} there"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if clashes:
        raise WeightsError(
            f"--init-weights {path} is of another architecture: {len(clashes)} weights differ from "
            f"the {len(wanted)} here: {'; '.join(clashes[:10])}"
        )
    for name, variable in ours:
        variable.assign(given[name])


def save_encoder_weights(model, path):
    """Write what `load_encoder_weights` reads. Raises OSError."""
    with open(path, "wb") as file:  # np.savez would add a suffix
        np.savez(file, **{name: variable.numpy() for name, variable in list_encoder_weights(model)})
