"""ViT-B/16 and ResNet-50 in plain JAX: what serving by Keras on JAX is measured against
(`latency.py --native`). Parameters are trees of float32 arrays, random.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

# ---------------------------------------------------------------------------------------------
# ViT-B/16

DIM, DEPTH, HEADS, HIDDEN, PATCH, SIZE, CLASSES = 768, 12, 12, 3072, 16, 224, 1000
TOKENS = (SIZE // PATCH) ** 2 + 1


def draw_dense(rng, inputs, outputs):
    kernel = rng.standard_normal((inputs, outputs), "float32") / inputs**0.5
    return {"kernel": kernel, "bias": np.zeros(outputs, "float32")}


def draw_norm(width):
    return {"scale": np.ones(width, "float32"), "bias": np.zeros(width, "float32")}


def draw_vit(rng):
    def draw_block():
        return {
            "norm1": draw_norm(DIM),
            "qkv": draw_dense(rng, DIM, 3 * DIM),
            "out": draw_dense(rng, DIM, DIM),
            "norm2": draw_norm(DIM),
            "mlp": [draw_dense(rng, DIM, HIDDEN), draw_dense(rng, HIDDEN, DIM)],
        }

    return {
        "token": 0.02 * rng.standard_normal((1, 1, DIM), "float32"),
        "positions": 0.02 * rng.standard_normal((1, TOKENS, DIM), "float32"),
        "patches": draw_dense(rng, 3 * PATCH**2, DIM),
        "blocks": [draw_block() for _ in range(DEPTH)],
        "norm": draw_norm(DIM),
        "head": draw_dense(rng, DIM, CLASSES),
    }


def dense(p, x):
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def normalize(p, x):
    """Layer normalisation, in float32."""
    y = x.astype("float32")
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]
    return y.astype(x.dtype)


def apply_vit(p, x):  # (batch, size, size, 3), normalised
    batch, rows = x.shape[0], SIZE // PATCH
    x = x.reshape(batch, rows, PATCH, rows, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = dense(p["patches"], x.reshape(batch, rows * rows, -1))
    token = jnp.broadcast_to(p["token"].astype(x.dtype), (batch, 1, DIM))
    x = jnp.concatenate([token, x], 1) + p["positions"].astype(x.dtype)
    for block in p["blocks"]:
        qkv = dense(block["qkv"], normalize(block["norm1"], x))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, TOKENS, 3, HEADS, -1), 2, 0)
        h = jax.nn.dot_product_attention(q, k, v).reshape(batch, TOKENS, DIM)
        x = x + dense(block["out"], h)
        h = jax.nn.gelu(dense(block["mlp"][0], normalize(block["norm2"], x)), approximate=False)
        x = x + dense(block["mlp"][1], h)
    return dense(p["head"], normalize(p["norm"], x[:, 0]))


# ---------------------------------------------------------------------------------------------
# ResNet-50

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width, blocks


def draw_convolution(rng, size, inputs, outputs):
    kernel = rng.standard_normal((size, size, inputs, outputs), "float32")
    return {
        "kernel": kernel * (2 / (size * size * inputs)) ** 0.5,
        **draw_norm(outputs),
        "mean": np.zeros(outputs, "float32"),
        "variance": np.ones(outputs, "float32"),
    }


def draw_resnet(rng):
    parameters, inputs = {"stem": draw_convolution(rng, 7, 3, 64), "stages": []}, 64
    for width, blocks in STAGES:
        stage = []
        for block in range(blocks):
            layers = [
                draw_convolution(rng, 1, inputs, width),
                draw_convolution(rng, 3, width, width),
                draw_convolution(rng, 1, width, 4 * width),
            ]
            shortcut = [] if block else [draw_convolution(rng, 1, inputs, 4 * width)]
            stage.append({"layers": layers, "shortcut": shortcut})
            inputs = 4 * width
        parameters["stages"].append(stage)
    return parameters | {"head": draw_dense(rng, inputs, CLASSES)}


def convolve(p, x, stride=1):
    """A convolution and its batch normalisation."""
    pad = p["kernel"].shape[0] // 2
    scale = p["scale"] * jax.lax.rsqrt(p["variance"] + 1e-5)
    x = jax.lax.conv_general_dilated(
        x,
        p["kernel"].astype(x.dtype),
        (stride, stride),
        [(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return x * scale.astype(x.dtype) + (p["bias"] - p["mean"] * scale).astype(x.dtype)


def apply_resnet(p, x):  # (batch, 224, 224, 3), normalised
    x = jax.nn.relu(convolve(p["stem"], x, 2))
    window = (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window)
    for number, stage in enumerate(p["stages"]):
        for index, block in enumerate(stage):
            stride = 2 if number and index == 0 else 1
            first, second, third = block["layers"]
            h = jax.nn.relu(convolve(first, x))
            h = convolve(third, jax.nn.relu(convolve(second, h, stride)))
            for layer in block["shortcut"]:
                x = convolve(layer, x, stride)
            x = jax.nn.relu(h + x)
    return dense(p["head"], x.mean((1, 2)))


# ---------------------------------------------------------------------------------------------
# Serving

MODELS = {"vit-b16": (draw_vit, apply_vit), "resnet50": (draw_resnet, apply_resnet)}


def create_forward(name, mean, variance, precision):
    """(a compiled function from uint8 pixels (batch, 224, 224, 3) on the device to logits, number
    of parameters)"""
    draw, apply = MODELS[name]
    parameters = jax.device_put(draw(np.random.default_rng(0)))
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    mean, scale = jnp.float32(mean), jax.lax.rsqrt(jnp.float32(variance))

    @jax.jit
    def compute(parameters, pixels):
        x = (pixels.astype("float32") - mean) * scale
        return apply(parameters, x.astype(dtype)).astype("float32")

    count = sum(  # running means and variances of batch normalisation are no parameters
        array.size
        for path, array in jax.tree_util.tree_leaves_with_path(parameters)
        if path[-1].key not in ("mean", "variance")
    )
    return partial(compute, parameters), count
