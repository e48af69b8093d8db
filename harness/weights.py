"""Weights from a file: into a model whose architecture must be theirs."""

import re
import zipfile
from functools import partial

import keras
import numpy as np

from harness.layers import LayerScale


class WeightsError(Exception):
    """A file does not hold this model's weights; the message is one line."""

    ending = ("error", 2)  # status and exit code


def check_shapes(what, wanted, found):
    """Raise WeightsError where {name: shape} here and in a file differ."""
    clashes = [
        f"{name} {wanted.get(name, 'missing')} here, {found.get(name, 'missing')} there"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if clashes:
        raise WeightsError(
            f"{what} is of another architecture: {len(clashes)} weights differ from "
            f"the {len(wanted)} here: {'; '.join(clashes[:10])}"
        )


# ---------------------------------------------------------------------------------------------
# An encoder's, from pretrain.py


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
    check_shapes(f"--init-weights {path}", wanted, found)
    for name, variable in ours:
        variable.assign(given[name])


def save_encoder_weights(model, path):
    """Write what `load_encoder_weights` reads. Raises OSError."""
    with open(path, "wb") as file:  # np.savez would add a suffix
        np.savez(file, **{name: variable.numpy() for name, variable in list_encoder_weights(model)})


# ---------------------------------------------------------------------------------------------
# A state dict's, from PyTorch

RENAMED = (  # torchvision's names of a Vision Transformer; timm's and DeiT's, by which it goes here
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


def load_state_dict(model, path):
    """Set all weights of a Vision Transformer of vit.py with a class token, or of
    harness/resnet.py's ResNet-50, from torchvision's, timm's or DeiT's: a file .safetensors, or one
    of torch.save, from which nothing but arrays is taken.

    Raises:
        WeightsError.
    """
    given = {}
    for name, array in read_arrays(path).items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        given[name] = array
    # How many batches a running mean has seen is of no use at inference.
    given = {k: v for k, v in given.items() if not k.endswith(".num_batches_tracked")}
    if any(isinstance(layer, LayerScale) for layer in model.layers):
        raise WeightsError("--weights: expected a model without --layer-scale, which these lack")
    has_token = any(layer.name == "patch_encoder" for layer in model.layers)
    targets = dict(name_vit(model) if has_token else name_resnet(model))
    wanted = {name: shape for name, (shape, _) in targets.items()}
    check_shapes(f"--weights {path}", wanted, {k: v.shape for k, v in given.items()})
    for name, (_, assign) in targets.items():
        assign(given[name])


def read_arrays(path):
    """{name: float32 array} of a file of weights. Raises WeightsError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return {name: array.astype("float32") for name, array in load_file(path).items()}
        import torch

        saved = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("model", "state_dict"):  # DeiT's and others' training checkpoints
            saved = saved.get(key, saved)
        return {name: tensor.float().numpy() for name, tensor in saved.items()}
    except ImportError as error:
        raise WeightsError(
            f"--weights: reading {path} takes {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:  # a torn file may raise anything
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise WeightsError(
            f"--weights: expected a state dict in .pth or .safetensors, got {path}: {line}"
        ) from error


def to_last(kernel):
    """A convolution's (outputs, inputs, rows, columns) as (rows, columns, inputs, outputs)"""
    return kernel.transpose(2, 3, 1, 0)


def point(variable, convert=lambda array: array, shape=None):
    """(shape of a state dict's array, function that assigns it to a variable, converted first);
    without a shape it is the variable's."""
    own = tuple(variable.shape)
    return shape or own, lambda array: variable.assign(convert(array).reshape(own))


def point_linear(name, layer, shape=None):
    """A dense layer's kernel (inputs, outputs) and bias; there (outputs, inputs)."""
    kernel = layer.kernel
    outputs = int(np.prod(layer.bias.shape))
    there = (outputs, int(np.prod(kernel.shape)) // outputs)
    yield f"{name}.weight", point(kernel, np.transpose, shape or there)
    yield f"{name}.bias", point(layer.bias, shape=(outputs,))


def point_norm(name, layer):
    yield f"{name}.weight", point(layer.gamma)
    yield f"{name}.bias", point(layer.beta)


def name_vit(model):
    """[(timm's name, what `point` gives)] of a Vision Transformer of vit.py."""
    kinds = (keras.layers.LayerNormalization, keras.layers.MultiHeadAttention, keras.layers.Dense)
    norms, attentions, denses = ([x for x in model.layers if isinstance(x, k)] for k in kinds)
    encoder = model.get_layer("patch_encoder")
    positions = encoder.position_embedding
    if not encoder.choices["class_token"] or not encoder.projection:
        raise WeightsError("--weights: expected a model with --pool token and --stem patch")
    tokens, dim = positions.shape
    yield "cls_token", point(encoder.class_token, shape=(1, 1, dim))
    yield "pos_embed", point(positions, shape=(1, tokens, dim))
    pixels = encoder.projection.kernel.shape[0]
    side = round((pixels / 3) ** 0.5)
    shape = (dim, 3, side, side)  # there it is a convolution
    yield "patch_embed.proj.weight", point(encoder.projection.kernel, to_last, shape)
    yield "patch_embed.proj.bias", point(encoder.projection.bias)
    for block, attention in enumerate(attentions):
        name = f"blocks.{block}"
        yield from point_norm(f"{name}.norm1", norms[2 * block])
        parts = (attention._query_dense, attention._key_dense, attention._value_dense)
        for kind, shape in (("weight", (3 * dim, dim)), ("bias", (3 * dim,))):
            yield f"{name}.attn.qkv.{kind}", (shape, partial(assign_parts, parts, kind))
        yield from point_linear(f"{name}.attn.proj", attention._output_dense)
        yield from point_norm(f"{name}.norm2", norms[2 * block + 1])
        yield from point_linear(f"{name}.mlp.fc1", denses[2 * block])
        yield from point_linear(f"{name}.mlp.fc2", denses[2 * block + 1])
    yield from point_norm("norm", norms[-1])
    yield from point_linear("head", denses[-1])


def assign_parts(parts, kind, array):
    """Queries, keys and values, which stand in one array there."""
    for part, share in zip(parts, np.split(array, 3)):
        variable = part.kernel if kind == "weight" else part.bias
        variable.assign(share.T.reshape(variable.shape))


def name_resnet(model):
    """[(torchvision's name, what `point` gives)] of harness/resnet.py's ResNet-50."""
    model = next((part for part in model.layers if isinstance(part, keras.Model)), model)
    ours = [
        layer.name.removesuffix("_conv") for layer in model.layers if layer.name[-5:] == "_conv"
    ]
    if "conv1" not in ours:
        raise WeightsError("--weights: expected a Vision Transformer or a ResNet-50")
    for name in ours:
        convolution, norm = "conv1", "bn1"
        if place := re.fullmatch(r"conv(\d)_block(\d)_(\d)", name):
            stage, block, number = map(int, place.groups())
            parts = (f"conv{number}", f"bn{number}") if number else ("downsample.0", "downsample.1")
            convolution, norm = (f"layer{stage - 1}.{block - 1}.{part}" for part in parts)
        layer, statistics = model.get_layer(f"{name}_conv"), model.get_layer(f"{name}_bn")
        layer.bias.assign(np.zeros(layer.bias.shape))  # there it has none
        shape = tuple(layer.kernel.shape[axis] for axis in (3, 2, 0, 1))
        yield f"{convolution}.weight", point(layer.kernel, to_last, shape)
        yield from point_norm(norm, statistics)
        yield f"{norm}.running_mean", point(statistics.moving_mean)
        yield f"{norm}.running_var", point(statistics.moving_variance)
    yield from point_linear("fc", model.get_layer("predictions"))
