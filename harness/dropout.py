"""Dropout whose masks are the same on every backend, and cost a few integer operations.

JAX draws masks with threefry and PyTorch with a Mersenne twister or Philox: on a CPU that is up
to a third of this model's training step, since attention alone asks for 660,000 random numbers a
picture. Here a mask is a hash of the element's number, keyed by the layer and the step: all
backends vectorise it, fuse it with the multiplication, and drop the same elements.
"""

import math
import operator

import keras
from keras import layers, ops

if keras.backend.backend() == "jax":
    import jax

GOLDEN = -0x61C88647  # 2**32 divided by the golden ratio, odd, as an int32: spreads counters
# TensorFlow's tensors have no >>.
shift = ops.right_shift if keras.backend.backend() == "tensorflow" else operator.rshift


def hash_bits(number, key):
    """31 bits of hash for each int32 number: multiplications that wrap, their upper bits folded
    into the lower ones in between. The multipliers are those of `lowbias32` (C. Wellons' "Hash
    Prospector", 2022).

    The key is added twice, so that two keys never give permuted masks. What only the lower bits
    would gain from is left out: a mask is decided by the upper ones. Every operation here is one
    more in each kernel that drops, and a compiler goes through them all. Plain operators, since
    keras.ops would make a tensor of each constant, which PyTorch then carries along.
    """
    x = (number + key) * 0x21F0AAAD
    x = x ^ shift(x, 15)
    x = (x + key) * 0x735A2D97
    x = x ^ shift(x, 13)
    # A C++ compiler takes a signed product that is compared at once not to wrap.
    return (x * 0x21F0AAAD) & 0x7FFFFFFF


@keras.saving.register_keras_serializable("vit")
class Dropout(layers.Dropout):
    """keras.layers.Dropout with hashed masks."""

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        return inputs * self.draw(ops.shape(inputs), inputs.dtype)

    def draw(self, shape, dtype):
        """What to multiply values of this shape with: 0 for those that are dropped."""
        state = self.seed_generator.state  # counted on here: its own `next` takes twice the steps
        key = ops.cast(state.value, "int32")[0] * GOLDEN
        state.assign(state.value + 1)
        shape = self.mask_shape(shape)  # on TensorFlow the batch may be unknown
        number = ops.reshape(ops.arange(math.prod(shape), dtype="int32"), shape)
        keep = hash_bits(number, key) >= round(self.rate * 2**31)
        return ops.cast(keep, dtype) * (1 / (1 - self.rate))

    def mask_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable("vit")
class DropPath(Dropout):
    """Drops a whole branch for a picture (Huang et al. 2016, https://arxiv.org/abs/1603.09382)."""

    def mask_shape(self, shape):
        return (shape[0], *(1 for _ in shape[1:]))


@keras.saving.register_keras_serializable("vit")
class MultiHeadAttention(layers.MultiHeadAttention):
    """keras.layers.MultiHeadAttention with hashed masks, fused at inference.

    Keras' own takes the fused kernel only at dropout 0, not at inference. In training, heads are
    put before patches once, after one product that projects to queries, keys and values: Keras'
    einsums transpose in each product; on a CPU Keras' fused kernel is not used for training either.
    On a GPU, set `trains_fused`. For JAX on a CPU, set `parts`: XLA multiplies a batch of matrices
    on one core, and some such products, of which none needs another, on several at once.
    """

    trains_fused = False  # where nothing is dropped
    parts = 1  # in which a batch is trained on, where it can be divided so

    def _build_attention(self, rank):
        super()._build_attention(rank)
        self._dropout_layer = Dropout(self._dropout, dtype=self._dropout_layer.dtype_policy)

    def call(self, query, value, key=None, training=False, **masks):
        if not training or (self.trains_fused and not self._dropout):
            rate, self._dropout = self._dropout, 0.0  # what Keras goes by
            try:
                return super().call(query, value, key, training=training, **masks)
            finally:
                self._dropout = rate
        if query is not value or key is not None or any(m is not None for m in masks.values()):
            raise NotImplementedError("dropout is here for self-attention without a mask alone")
        _, tokens, dim = query.shape
        heads, size = self._num_heads, self._key_dim
        parts = (self._query_dense, self._key_dense, self._value_dense)
        kernel = ops.concatenate([ops.reshape(p.kernel, (dim, heads * size)) for p in parts], 1)
        bias = ops.concatenate([ops.reshape(p.bias, (heads * size,)) for p in parts], 0)
        x = project(ops.reshape(query, (-1, dim)), kernel, bias)
        x = ops.transpose(ops.reshape(x, (-1, tokens, 3, heads, size)), (2, 0, 3, 1, 4))
        shape = ops.shape(x)[1], heads, tokens, tokens
        kept = self._dropout_layer.draw(shape, x.dtype) if self._dropout else None
        if self.parts == 1:
            x = attend(x, kept)
        else:
            count = math.gcd(self.parts, shape[0])
            kept = [None] * count if kept is None else ops.split(kept, count)
            x = ops.concatenate(list(map(attend_part, ops.split(x, count, axis=1), kept)))
        x = ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (-1, heads * size))
        out = self._output_dense
        x = project(x, ops.reshape(out.kernel, (heads * size, dim)), out.bias)
        return ops.reshape(x, (-1, tokens, dim))


def attend(x, kept):
    """Queries, keys and values (3, batch, heads, tokens, size) to (batch, heads, tokens, size);
    kept: what the weights of tokens for tokens are multiplied with, or None."""
    return weigh(x, kept)[0]


def weigh(x, kept):
    q, k, v = x[0], x[1], x[2]
    scores = ops.matmul(q * q.shape[-1] ** -0.5, ops.transpose(k, (0, 1, 3, 2)))
    weights = ops.softmax(scores)
    dropped = weights if kept is None else weights * kept
    return ops.matmul(dropped, v), (x, weights, dropped)


def differentiate(saved, gradient):
    """The gradient of `attend` on JAX, from that of its result. Softmax's is weights * (g - sum of
    weights * g), with g what comes back times the mask, which so is needed in `dropped` alone. What
    JAX derives keeps it, and softmax's parts, and writes out each row's sum to the row's length."""
    (q, k, v), weights, dropped = saved
    scale = q.shape[-1] ** -0.5
    scores = dropped * (gradient @ v.mT)
    scores = scores - weights * scores.sum(-1, keepdims=True)
    # Rather the small matrices transposed than those of the scores; XLA would turn that round.
    products = (q * scale).mT @ scores, gradient.mT @ dropped
    dk, dv = (jax.lax.optimization_barrier(product).mT for product in products)
    return jax.numpy.stack([scores @ k * scale, dk, dv]), None  # what is kept is drawn, not learned


attend_part = attend
if keras.backend.backend() == "jax":
    attend_part = jax.custom_vjp(attend)
    attend_part.defvjp(weigh, differentiate)
    # Traced once for all layers and all parts of a batch: 0.4 s of a start. (Where plain `fit` is
    # asked not to compile, this still is.)
    attend, attend_part = jax.jit(attend), jax.jit(attend_part)


def project(x, kernel, bias):
    return ops.matmul(x, ops.cast(kernel, x.dtype)) + ops.cast(bias, x.dtype)
