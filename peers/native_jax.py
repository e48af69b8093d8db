"""The Vision Transformer of vit.py in plain JAX: what Keras on JAX is measured against.

    python peers/native_jax.py --dataset synthetic --num-epochs 2

Same model, initial weights, pictures, order, augmentation, optimiser, figures, record, and exit
codes as `vit.py --keras-backend jax`; no Keras, no Flax, no Optax. A step is one jitted function of
a donated state; on a GPU up to 32 steps are scanned in one call.
"""

import sys
import time
from functools import partial
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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


def dropout(x, rate, key):
    """Zero a share `rate` of x and scale the rest; nothing without a key.

    The mask is a hash of the element's number (`lowbias32` of C. Wellons' "Hash Prospector", with
    a key added between its rounds). XLA fuses it with what comes before and after; on a CPU
    jax.random.bernoulli's generators cost more.
    """
    if key is None or rate == 0:
        return x
    first, second = jax.random.bits(key, (2,), "uint32")
    bits = jax.lax.iota("uint32", x.size).reshape(x.shape) + first
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x21F0AAAD)
    bits = ((bits ^ (bits >> 15)) + second) * jnp.uint32(0x735A2D97)
    keep = (bits ^ (bits >> 15)) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def mlp(layers, x, rate, keys, dtype):
    for layer in layers:
        x = dropout(jax.nn.gelu(dense(layer, x, dtype), approximate=False), rate, next(keys))
    return x


def attend(p, x, config, key, dtype):
    """Multi-head self-attention: (batch, patches, dim) -> the same.

    The projections write and read (batch, heads, patches, size), which XLA's batched products on a
    CPU take as it is; with the heads behind the patches they transpose.
    """
    qkv, out = jax.tree.map(lambda array: array.astype(dtype), (p["qkv"], p["out"]))
    x = jnp.einsum("bpc,cnhs->nbhps", x.astype(dtype), qkv["kernel"])
    q, k, v = x + qkv["bias"][:, None, :, None]  # (batch, heads, patches, size) each
    scores = jnp.einsum("bhqs,bhks->bhqk", q * config.head_dim**-0.5, k)
    shares = jax.nn.softmax(scores.astype("float32")).astype(dtype)
    shares = dropout(shares, config.attention_dropout, key)
    x = jnp.einsum("bhqk,bhks->bhqs", shares, v)
    return jnp.einsum("bhps,hsc->bpc", x, out["kernel"]) + out["bias"]


def create_model(config, mean, variance, dtype):
    """The function forward(parameters, pixels, key=None): pixels 0 to 255 (batch, 32, 32, 3) ->
    float32 logits (batch, classes); a key means training, with dropout."""
    mean, scale = jnp.float32(mean), jnp.float32(1 / variance**0.5)
    size, rows = config.patch_size, config.image_size // config.patch_size
    units = config.transformer_units, config.mlp_head_units
    dropouts = config.transformer_layers * (1 + len(units[0])) + 1 + len(units[1])

    def forward(p, pixels, key=None):
        keys = repeat(None) if key is None else iter(jax.random.split(key, dropouts))
        batch, channels = pixels.shape[0], pixels.shape[-1]
        x = ((pixels.astype("float32") - mean) * scale).astype(dtype)
        shape = (batch, config.image_size, config.image_size, channels)
        x = jax.image.resize(x, shape, "bilinear", antialias=False)
        x = x.reshape(batch, rows, size, rows, size, channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * rows, size * size * channels)
        x = dense(p["patches"], x, dtype) + p["positions"].astype(dtype)
        for block in p["blocks"]:
            h = normalize(block["norm1"], x)
            x = x + attend(block["attention"], h, config, next(keys), dtype)
            h = normalize(block["norm2"], x)
            x = x + mlp(block["mlp"], h, config.dropout, keys, dtype)
        x = normalize(p["norm"], x).reshape(batch, -1)
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


def update_adamw(config, parameters, gradients, first, second, step):
    """AdamW as Keras writes it: decay of all weights first, epsilon 1e-7 beside the uncorrected
    root (Kingma and Ba 2015, end of section 2). Returns parameters and both moments."""
    rate, decay, beta1, beta2 = config.learning_rate, config.weight_decay, 0.9, 0.999
    alpha = rate * jnp.sqrt(1 - beta2**step) / (1 - beta1**step)
    first = jax.tree.map(lambda m, g: m + (g - m) * (1 - beta1), first, gradients)
    second = jax.tree.map(lambda v, g: v + (g * g - v) * (1 - beta2), second, gradients)
    parameters = jax.tree.map(
        lambda p, m, v: p - p * (decay * rate) - alpha * m / (jnp.sqrt(v) + 1e-7),
        *(parameters, first, second),
    )
    return parameters, first, second


# ---------------------------------------------------------------------------------------------
# Training and evaluation


def score(logits, labels):
    """Loss, correct, correct among the first five: (3, batch); fillers (label -1) count nothing."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)
    loss = jax.nn.logsumexp(logits, axis=1) - chosen[:, 0]
    rank = (logits > chosen).sum(axis=1)
    return jnp.where(labels < 0, 0, jnp.stack([loss, rank < 1, rank < 5]))


class Peer:
    backend, library = "native-jax", "jax"

    def __init__(self, config):
        on_gpu = jax.default_backend() == "gpu"
        self.config, self.gpu_name = config, jax.local_devices()[0].device_kind if on_gpu else None
        tf32 = config.precision == "tf32" and on_gpu
        self.precision = config.precision if tf32 or config.precision != "tf32" else "float32"
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if tf32 else "highest")

    def build(self, mean, variance):
        dtype = "bfloat16" if self.precision == "bfloat16" else "float32"
        forward = create_model(self.config, mean, variance, dtype)
        jit = jax.jit if self.config.jit_compile else lambda function, **_: function

        def compute_loss(parameters, images, labels, key):
            figures = score(forward(parameters, images, key), labels).mean(axis=1)
            return figures[0], figures

        def train_steps(state, order, maps, images, labels):
            def add_part(parameters, key, sums, part):
                """Gradients and figures of pictures gathered by index, added to those before."""
                number, index, maps = part
                x = images[index] if maps is None else resample(images[index], maps)
                found = jax.grad(compute_loss, has_aux=True)(
                    parameters, x, labels[index], jax.random.fold_in(key, number)
                )
                return jax.tree.map(jnp.add, sums, found), None

            def train_step(state, row):
                step, parameters = state["step"] + 1, state["parameters"]
                parts = len(row[0])
                sums = jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(3)
                key = jax.random.fold_in(state["key"], step)
                sums, _ = jax.lax.scan(
                    partial(add_part, parameters, key), sums, (jnp.arange(parts), *row)
                )
                gradients, figures = jax.tree.map(lambda total: total / parts, sums)
                moments = state["first"], state["second"]
                new = update_adamw(self.config, parameters, gradients, *moments, step)
                new = dict(zip(("parameters", "first", "second"), new))
                return state | new | {"step": step, "sums": state["sums"] + figures}, None

            return jax.lax.scan(train_step, state, (order, maps))[0]

        self.train_steps = jit(train_steps, donate_argnums=0)
        self.forward = jit(forward)
        self.score = jit(lambda p, images, labels: score(forward(p, images), labels).sum(axis=1))

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

        parameters = take("positions")
        parameters["patches"] = take("kernel", "bias")
        parameters["blocks"] = [take_block() for _ in range(self.config.transformer_layers)]
        parameters["norm"] = take("scale", "bias")
        parameters["head"] = take_dense(len(self.config.mlp_head_units))
        parameters["logits"] = take("kernel", "bias")
        self.state = {
            "parameters": parameters,
            "first": jax.tree.map(jnp.zeros_like, parameters),
            "second": jax.tree.map(jnp.zeros_like, parameters),
            "step": jnp.int32(0),
            "sums": jnp.zeros(3),  # of the epoch's losses, accuracies and top-5 accuracies
            "key": jax.random.key(self.config.seed),
        }

    def count_parameters(self):
        return sum(array.size for array in jax.tree.leaves(self.state["parameters"]))

    def count_flops(self):
        """Matrix products of one picture's forward pass, 2 a multiply-accumulate."""
        config, parameters = self.config, self.state["parameters"]
        macs = 0
        for path, array in jax.tree_util.tree_leaves_with_path(parameters):
            if path[-1].key == "kernel":  # used once a patch, in the head once a picture
                is_head = path[0].key in ("head", "logits")
                macs += array.size * (1 if is_head else config.num_patches)
        scores = config.num_patches**2 * config.num_heads * config.head_dim
        return 2 * (macs + 2 * scores * config.transformer_layers)

    def place(self, images, labels):
        self.images, self.labels = jax.device_put(images), jax.device_put(labels)

    def create_matmul(self, size):
        dtype = "bfloat16" if self.precision == "bfloat16" else "float32"
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        return lambda: x @ x

    def steps_per_call(self, steps):
        """On a GPU a call costs the host about as much as a small step costs the device."""
        return max(n for n in range(1, 33) if steps % n == 0) if self.gpu_name else 1

    def begin_epoch(self, order, maps):
        self.order, self.maps = order, maps
        self.state["sums"] = jnp.zeros(3)

    def run(self, rows):
        batches = self.order[rows], None if self.maps is None else self.maps[rows]
        with jax.disable_jit(not self.config.jit_compile):  # a scan would be compiled all the same
            self.state = self.train_steps(self.state, *batches, self.images, self.labels)

    def read_epoch(self):
        return (jax.device_get(self.state["sums"]) / len(self.order)).tolist()

    def evaluate(self, images, labels):
        sums = 0
        for x, y in common.fill_batches(images, labels, self.config.batch_size):
            sums += self.score(self.state["parameters"], x, y)
        return (jax.device_get(sums) / len(images)).tolist()

    def predict(self, images):
        """Logits of a batch, NumPy."""
        return jax.device_get(self.forward(self.state["parameters"], images))

    def keep_weights(self):  # on the host, so as not to count as what training needs
        self.kept = jax.tree.map(np.array, self.state["parameters"])

    def restore_weights(self):
        self.state["parameters"] = jax.device_put(self.kept)

    def synchronize(self):
        jax.block_until_ready(jax.live_arrays())

    def device_peak_bytes(self):
        if not self.gpu_name:
            return None, "computed on the CPU, where device memory is host memory"
        statistics = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" not in statistics:
            return None, "this JAX device gives no memory statistics"
        return statistics["peak_bytes_in_use"], "jax memory_stats peak_bytes_in_use"


if __name__ == "__main__":
    sys.exit(common.main(Peer, CONFIG, IMPORT_SECONDS))
