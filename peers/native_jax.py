"""The Vision Transformer of vit.py in plain JAX: what Keras on JAX is measured against.

    python peers/native_jax.py --dataset synthetic --num-epochs 2

Same model, initial weights, pictures, order, augmentation, optimiser, figures, record, and exit
codes as `vit.py --keras-backend jax`; no Keras, no Flax, no Optax. A step is one jitted function of
a donated state; on a GPU up to 32 steps are scanned in one call. There Keras takes cuDNN's fused
attention where none of it is dropped, in 16 bits; here it is products and a softmax.
"""

import math
import sys
import time
from functools import partial
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness.telemetry import HOST_MEMORY  # noqa: E402
from peers import common  # noqa: E402

if __name__ == "__main__":  # --help and bad flags end here, before the slow import
    CONFIG = common.start(sys.argv[1:], __doc__.split("\n\n")[0], "jax")

_import_started = time.perf_counter()
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

IMPORT_SECONDS = common.IMPORT_SECONDS + time.perf_counter() - _import_started

# ---------------------------------------------------------------------------------------------
# The model: parameters are a tree of float32 arrays, arithmetic is in dtype


def normalize(p, x):
    """Layer normalisation, in float32."""
    x = x.astype("float32")
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(p, x, dtype):
    return x.astype(dtype) @ p["kernel"].astype(dtype) + p["bias"].astype(dtype)


def dropout(x, rate, key, shape=None, first_number=0):
    """Zero a share `rate` of x and scale the rest; nothing without a key, uint32 (2,). The mask is
    of another shape if given, as for a whole branch of a picture (drop path).

    The mask is a hash of the element's number (multipliers of `lowbias32`, C. Wellons' "Hash
    Prospector", with a key added before and between them). XLA fuses it with what comes before and
    after; on a CPU jax.random.bernoulli's generators cost more.
    """
    if key is None or rate == 0:
        return x
    first, second = key
    shape = shape or x.shape
    bits = jax.lax.iota("uint32", math.prod(shape)).reshape(shape) + jnp.uint32(first_number)
    bits = (bits + first) * jnp.uint32(0x21F0AAAD)
    bits = ((bits ^ (bits >> 15)) + second) * jnp.uint32(0x735A2D97)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0x21F0AAAD)
    keep = bits >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * (1 / (1 - rate)), 0).astype(x.dtype)


gelu = partial(jax.nn.gelu, approximate=False)


def mlp(layers, x, rate, keys, dtype, last=gelu):
    for number, layer in enumerate(layers, start=1):
        activation = gelu if number < len(layers) else last
        x = dropout(activation(dense(layer, x, dtype)), rate, next(keys))
    return x


def convolve(layers, x, dtype):
    """3x3 convolutions, all but the last with a ReLU and the largest of each 2x2 pixels: pictures
    (batch, side, side, 3) to tokens (batch, patches, dim).

    One product over each pixel's neighbourhood: on a CPU XLA's own convolution and pooling, with
    their gradients, take more than twice as long.
    """
    for number, layer in enumerate(layers, start=1):
        batch, side, _, channels = x.shape
        x = jnp.pad(x.astype(dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate([x[:, :, i : i + side] for i in range(3)], axis=3)
        x = jnp.concatenate([x[:, i : i + side] for i in range(3)], axis=3)
        kernel = layer["kernel"].astype(dtype).reshape(9 * channels, -1)
        x = x.reshape(-1, 9 * channels) @ kernel
        if number < len(layers):  # the largest first: bias and ReLU keep the order
            x = x.reshape(batch, side // 2, 2, side // 2, 2, -1)
            x = jnp.maximum(x[:, :, 0], x[:, :, 1])  # XLA takes longer for a maximum over axes
            x = jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])
            x = jax.nn.relu(x + layer["bias"].astype(dtype))
        else:
            x = x.reshape(batch, side * side, -1) + layer["bias"].astype(dtype)
    return x


def attend(p, x, config, key, dtype):
    """Multi-head self-attention: (batch, patches, dim) -> the same.

    The projections write and read (batch, heads, patches, size), which XLA's batched products on a
    CPU take as it is; with the heads behind the patches they transpose. There each such product
    runs on one core; in training it is made for four parts of a batch, of which some run at once.
    """
    is_divided = key is not None and jax.default_backend() == "cpu"
    qkv, out = jax.tree.map(lambda array: array.astype(dtype), (p["qkv"], p["out"]))
    x = jnp.einsum("bpc,cnhs->nbhps", x.astype(dtype), qkv["kernel"])
    x, parts = x + qkv["bias"][:, None, :, None], []
    for q, k, v in jnp.split(x, math.gcd(4, x.shape[1]) if is_divided else 1, axis=1):
        scores = jnp.einsum("bhqs,bhks->bhqk", q * config.head_dim**-0.5, k)
        shares = jax.nn.softmax(scores.astype("float32")).astype(dtype)
        first = len(parts) * shares.size
        shares = dropout(shares, config.attention_dropout, key, first_number=first)
        parts.append(jnp.einsum("bhqk,bhks->bhqs", shares, v))  # (batch, heads, patches, size)
    x = jnp.concatenate(parts)
    return jnp.einsum("bhps,hsc->bpc", x, out["kernel"]) + out["bias"]


def create_model(config, dtype):
    """The function forward(parameters, statistics, pixels, key=None): pixels 0 to 255 (batch, 32,
    32, 3) -> float32 logits (batch, classes); a key means training, with dropout. statistics: the
    pixels' mean and one over their standard deviation, per channel; as constants of the compiled
    code they would have it compiled anew for another choice of pictures."""
    size, rows = config.patch_size, config.image_size // config.patch_size
    last = gelu if config.mlp_ratio is None else lambda x: x

    def cut(p, x):
        """Pictures (batch, side, side, 3) to their patches' embeddings (batch, patches, dim)."""
        batch, _, _, channels = x.shape
        x = x.reshape(batch, rows, size, rows, size, channels).transpose(0, 1, 3, 2, 4, 5)
        return dense(p, x.reshape(batch, rows * rows, size * size * channels), dtype)

    def summarize(p, x):
        """Tokens (batch, tokens, dim) to one vector a picture."""
        if config.pool == "attention":
            shares = jax.nn.softmax(dense(p["pool"], x, dtype).astype("float32"), axis=1)
            return jnp.einsum("btc,btd->bd", shares.astype(dtype), x.astype(dtype))
        if config.pool == "token":
            return x[:, 0]
        return x.mean(axis=1) if config.pool == "mean" else x.reshape(len(x), -1)

    def forward(p, statistics, pixels, key=None):
        keys, (mean, scale) = repeat(None), statistics
        if key is not None:
            keys = iter(jax.random.bits(key, (config.num_dropouts, 2), "uint32"))
        batch, channels = pixels.shape[0], pixels.shape[-1]
        x = ((pixels.astype("float32") - mean) * scale).astype(dtype)
        shape = (batch, config.image_size, config.image_size, channels)
        x = jax.image.resize(x, shape, "bilinear", antialias=False)
        x = convolve(p["stem"], x, dtype) if "stem" in p else cut(p["patches"], x)
        if "token" in p:
            token = jnp.broadcast_to(p["token"].astype(dtype), (batch, *p["token"].shape))
            x = jnp.concatenate([token, x], axis=1)
        x = x + p["positions"].astype(dtype)

        def add(x, branch, number):
            if config.drop_path:
                rate = config.drop_path_of(number)
                branch = dropout(branch, rate, next(keys), (batch, 1, 1))
            return x + branch

        for number, block in enumerate(p["blocks"]):
            h = normalize(block["norm1"], x)
            x = add(x, attend(block["attention"], h, config, next(keys), dtype), number)
            h = normalize(block["norm2"], x)
            x = add(x, mlp(block["mlp"], h, config.dropout, keys, dtype, last), number)
        x = summarize(p, normalize(p["norm"], x))
        x = dropout(x, config.head_dropout, next(keys))
        x = mlp(p["head"], x, config.head_dropout, keys, dtype)
        return dense(p["logits"], x, "float32")

    return forward


# ---------------------------------------------------------------------------------------------
# Augmentation and optimiser


def resample(images, maps):
    """What harness.augment.apply_affine does: bilinear, mirrored at the border, one gather.

    images: uint8 (batch, height, width, channels); maps: float32 (batch, 2, 2). Returns float32.
    """
    batch, height, width, _ = images.shape
    center = jnp.array([[(width - 1) / 2], [(height - 1) / 2]])  # (2, 1)
    y, x = jnp.mgrid[:height, :width].reshape(2, -1)
    source = jnp.matmul(maps, jnp.stack([x, y]) - center, precision="highest") + center
    corner = jnp.floor(source)  # (batch, 2, pixels)
    right, below = jnp.moveaxis(source - corner, 1, 0)[..., None]  # shares, (batch, pixels, 1)
    left, top = jnp.moveaxis(corner.astype("int32"), 1, 0)

    def mirror(index, size):
        index = jnp.where(index < 0, -1 - index, index)
        return jnp.clip(jnp.where(index >= size, 2 * size - 1 - index, index), 0, size - 1)

    def pick(row, column):
        pixel = mirror(row, height) * width + mirror(column, width)  # (batch, pixels)
        return jnp.take_along_axis(images.reshape(batch, -1, 3), pixel[..., None], axis=1)

    upper = pick(top, left) * (1 - right) + pick(top, left + 1) * right
    lower = pick(top + 1, left) * (1 - right) + pick(top + 1, left + 1) * right
    return (upper * (1 - below) + lower * below).reshape(images.shape)


def shift(images, maps, fill):
    """What harness.augment.apply_shift does: flips and moves by whole pixels, by one lookup.

    images: uint8 (batch, side, side, 3); maps: float32 (batch, 2, 3); fill: float32 (3,), what lies
    outside. Returns float32 (batch, side, side, 3).
    """
    side = images.shape[1]
    place, center = jnp.arange(side), (side - 1) / 2
    x = (maps[:, 0, :1] * (place - center) + center + maps[:, 0, 2:]).round().astype("int32")
    y = (place + maps[:, 1, 2:]).astype("int32")
    x, y = x[:, None, :], y[:, :, None]
    inside = ((x >= 0) & (x < side) & (y >= 0) & (y < side))[..., None]
    x, y = jnp.clip(x, 0, side - 1), jnp.clip(y, 0, side - 1)
    return jnp.where(inside, images[jnp.arange(len(images))[:, None, None], y, x], fill)


def is_moved_by_muon(config, path):
    """Whether a weight is a hidden layer's kernel and Muon asked for; AdamW moves all others."""
    is_hidden = path[-1].key == "kernel" and path[0].key not in ("pool", "logits")
    return config.optimizer == "muon" and is_hidden


def orthogonalize(x):
    """Matrices (number, rows, columns) with singular values of about 1, by Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-7)
    for a, b, c in common.NEWTON_SCHULZ:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


def update(config, parameters, gradients, first, second, step, rate, dtype):
    """A step of AdamW as Keras writes it: decay first, epsilon 1e-7 beside the uncorrected root
    (Kingma and Ba 2015, end of section 2); or of Muon, where matrices of one shape are computed at
    once, in dtype. Returns parameters and both moments."""
    beta1, beta2 = 0.9, config.beta_2
    alpha = rate * jnp.sqrt(1 - beta2**step) / (1 - beta1**step)
    leaves, tree = jax.tree.flatten_with_path(parameters)
    new, groups = [], {}  # [parameter, moments]; by shape, which of them and a matrix of its move
    for (path, p), g, m, v in zip(leaves, *map(jax.tree.leaves, (gradients, first, second))):
        if path[-1].key == "kernel" or not config.decay_kernels_only:
            p = p - p * (config.weight_decay * rate)
        if is_moved_by_muon(config, path):
            m = common.MOMENTUM * m + g
            is_three = path[-2] == jax.tree_util.DictKey("qkv")  # matrices, of each a row
            move = g + common.MOMENTUM * m
            move = move.reshape((len(p), 3, -1) if is_three else (-1, 1, p.shape[-1]))
            for matrix in jnp.unstack(move, axis=1):
                groups.setdefault(matrix.shape, []).append((len(new), matrix))
        else:
            m = m + (g - m) * (1 - beta1)
            v = v + (g * g - v) * (1 - beta2)
            p = p - alpha * m / (jnp.sqrt(v) + 1e-7)
        new.append([p, m, v])
    moves = {}
    for shape, members in groups.items():
        places, matrices = zip(*members)
        found = orthogonalize(jnp.stack(matrices).astype(dtype)).astype("float32")
        found *= rate * common.STEP_LENGTH * math.sqrt(max(shape))
        for place, move in zip(places, found):
            moves.setdefault(place, []).append(move)
    for place, matrices in moves.items():
        p = new[place][0]
        new[place][0] = p - jnp.stack(matrices, axis=1).reshape(p.shape)
    return [jax.tree.unflatten(tree, values) for values in zip(*new)]


# ---------------------------------------------------------------------------------------------
# Training and evaluation


def score(logits, labels, smoothing=0.0):
    """Loss, correct, correct among the first five: (3, batch); fillers (label -1) count nothing."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)
    expected = (1 - smoothing) * chosen[:, 0] + smoothing * logits.mean(axis=1)
    loss = jax.nn.logsumexp(logits, axis=1) - expected
    rank = (logits > chosen).sum(axis=1)
    return jnp.where(labels < 0, 0, jnp.stack([loss, rank < 1, rank < 5]))


class Peer:
    backend, library = "native-jax", "jax"

    def __init__(self, config):
        on_gpu = jax.default_backend() == "gpu"
        self.config, self.gpu_name = config, jax.local_devices()[0].device_kind if on_gpu else None
        allows_tf32 = config.precision != "float32" and on_gpu
        is_known = on_gpu or config.precision != "tf32"
        self.precision = config.precision if is_known else "float32"
        products = "tensorfloat32" if config.precision == "tf32" else "default"
        jax.config.update("jax_default_matmul_precision", products if allows_tf32 else "highest")

    def build(self, mean, variance):
        dtype = "bfloat16" if self.precision == "bfloat16" else "float32"
        forward = create_model(self.config, dtype)
        self.statistics = jnp.float32(mean), jnp.float32(1 / variance**0.5)
        jit = jax.jit if self.config.jit_compile else lambda function, **_: function
        config = self.config

        def augment(images, maps, statistics):
            if maps is None:
                return images
            if config.crop_padding:
                return shift(images, maps, statistics[0].round())
            return resample(images, maps)

        def compute_loss(parameters, statistics, images, labels, key):
            logits = forward(parameters, statistics, images, key)
            figures = score(logits, labels, config.label_smoothing).mean(axis=1)
            return figures[0], figures

        def score_batch(parameters, statistics, images, labels):
            return score(forward(parameters, statistics, images), labels).sum(axis=1)

        def train_steps(state, order, maps, rates, statistics, images, labels):
            def add_part(parameters, key, sums, part):
                """Gradients and figures of pictures gathered by index, added to those before."""
                number, index, maps = part
                x = augment(images[index], maps, statistics)
                key = jax.random.fold_in(key, number)
                differentiate = jax.grad(compute_loss, has_aux=True)
                found = differentiate(parameters, statistics, x, labels[index], key)
                return jax.tree.map(jnp.add, sums, found), None

            def train_step(state, row):
                *row, rate = row
                step, parameters = state["step"] + 1, state["parameters"]
                parts = len(row[0])
                sums = jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(3)
                key = jax.random.fold_in(state["key"], step)
                sums, _ = jax.lax.scan(
                    partial(add_part, parameters, key), sums, (jnp.arange(parts), *row)
                )
                gradients, figures = jax.tree.map(lambda total: total / parts, sums)
                if config.clip_norm:
                    squares = jax.tree.map(lambda g: jnp.square(g).sum(), gradients)
                    norm = jnp.sqrt(sum(jax.tree.leaves(squares)))
                    factor = jnp.minimum(1, config.clip_norm / norm)
                    gradients = jax.tree.map(lambda g: g * factor, gradients)
                moments = state["first"], state["second"]
                new = update(config, parameters, gradients, *moments, step, rate, dtype)
                new = dict(zip(("parameters", "first", "second"), new))
                if config.ema:  # of the first step's weights, not of those before it
                    kept = jnp.where(step == 1, 0.0, config.ema)
                    new["tested"] = jax.tree.map(
                        lambda a, p: a * kept + p * (1 - kept), state["tested"], new["parameters"]
                    )
                return state | new | {"step": step, "sums": state["sums"] + figures}, None

            return jax.lax.scan(train_step, state, (order, maps, rates))[0]

        self.train_steps = jit(train_steps, donate_argnums=0)
        self.forward = jit(forward)
        self.score = jit(score_batch)

    def load_keras_weights(self, weights):
        """Start from weights in the order and shapes of get_weights() of vit.py's model."""
        weights = iter(weights)

        def take(*names):
            return {name: jnp.asarray(next(weights)) for name in names}

        def take_dense(count):
            return [take("kernel", "bias") for _ in range(count)]

        def take_attention():
            q, k, v, out = take_dense(4)
            qkv = {"kernel": jnp.stack([part["kernel"] for part in (q, k, v)], axis=1)}
            qkv["bias"] = jnp.stack([part["bias"] for part in (q, k, v)])
            return {"qkv": qkv, "out": out}

        def take_block():
            block = {"norm1": take("scale", "bias"), "attention": take_attention()}
            block["norm2"] = take("scale", "bias")
            return block | {"mlp": take_dense(len(self.config.transformer_units))}

        has_stem = self.config.stem == "conv"
        parameters = {"stem": take_dense(len(self.config.stem_filters))} if has_stem else {}
        parameters |= take("positions", *(["token"] if self.config.pool == "token" else []))
        if not has_stem:
            parameters["patches"] = take("kernel", "bias")
        parameters["blocks"] = [take_block() for _ in range(self.config.transformer_layers)]
        parameters["norm"] = take("scale", "bias")
        if self.config.pool == "attention":
            parameters["pool"] = take("kernel", "bias")
        parameters["head"] = take_dense(len(self.config.mlp_head_units))
        parameters["logits"] = take("kernel", "bias")
        self.state = {
            "parameters": parameters,
            "first": jax.tree.map(jnp.zeros_like, parameters),
            "second": jax.tree.map_with_path(
                lambda path, p: jnp.zeros(() if is_moved_by_muon(self.config, path) else p.shape),
                parameters,
            ),
            "step": jnp.int32(0),
            "sums": jnp.zeros(3),  # of the epoch's losses, accuracies and top-5 accuracies
            "key": jax.random.key(self.config.seed),
        }
        if self.config.ema:
            self.state["tested"] = jax.tree.map(jnp.zeros_like, parameters)

    @property
    def tested(self):
        """Which weights are tested: their average, if there is one, or they themselves."""
        return "tested" if self.config.ema else "parameters"

    def count_parameters(self):
        return sum(array.size for array in jax.tree.leaves(self.state["parameters"]))

    def count_flops(self):
        """Of one picture's forward pass."""
        leaves = jax.tree_util.tree_leaves_with_path(self.state["parameters"])
        kernels = (
            (path[0].key, path[1].idx if path[0].key == "stem" else 0, array.size)
            for path, array in leaves
            if path[-1].key == "kernel"
        )
        return common.count_flops(self.config, kernels)

    def place(self, images, labels):
        self.images, self.labels = jax.device_put(images), jax.device_put(labels)

    def create_matmul(self, size):
        dtype = "bfloat16" if self.precision == "bfloat16" else "float32"
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        return lambda: x @ x

    def steps_per_call(self, steps):
        """On a GPU a call costs the host about as much as a small step costs the device."""
        return max(n for n in range(1, 33) if steps % n == 0) if self.gpu_name else 1

    def begin_epoch(self, order, maps, rates):
        self.order, self.maps, self.rates = order, maps, rates
        self.state["sums"] = jnp.zeros(3)

    def run(self, rows):
        maps = None if self.maps is None else self.maps[rows]
        batches = self.order[rows], maps, self.rates[rows]
        with jax.disable_jit(not self.config.jit_compile):  # a scan would be compiled all the same
            pictures = self.statistics, self.images, self.labels
            self.state = self.train_steps(self.state, *batches, *pictures)

    def read_epoch(self):
        return (jax.device_get(self.state["sums"]) / len(self.order)).tolist()

    def evaluate(self, images, labels):
        sums = 0
        for x, y in common.fill_batches(images, labels, self.config.micro_batch_size):
            sums += self.score(self.state[self.tested], self.statistics, x, y)
        return (jax.device_get(sums) / len(images)).tolist()

    def predict(self, images):
        """Logits of a batch, NumPy."""
        return jax.device_get(self.forward(self.state["parameters"], self.statistics, images))

    def keep_weights(self):  # on the host, so as not to count as what training needs
        self.kept = jax.tree.map(np.array, self.state[self.tested])

    def restore_weights(self):
        self.state[self.tested] = jax.device_put(self.kept)

    def synchronize(self):
        jax.block_until_ready(jax.live_arrays())

    def device_peak_bytes(self):
        if not self.gpu_name:
            return None, HOST_MEMORY
        statistics = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" not in statistics:
            return None, "this JAX device gives no memory statistics"
        return statistics["peak_bytes_in_use"], "jax memory_stats peak_bytes_in_use"


if __name__ == "__main__":
    sys.exit(common.main(Peer, CONFIG, IMPORT_SECONDS))
