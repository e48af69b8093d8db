"""Dropout whose masks are the same on every backend, and cost a few integer operations.

JAX draws masks with threefry and PyTorch with a Mersenne twister or Philox: on a CPU that is up
to a third of this model's training step, since attention alone asks for 660,000 random numbers a
picture. Here a mask is a hash of the element's number, keyed by the layer and the step: all
backends vectorise it, fuse it with the multiplication, and drop the same elements.
"""

import math

import keras
from keras import layers, ops


def hash_bits(x, key=0):
    """Mix int32 bits: the function `lowbias32` of C. Wellons' "Hash Prospector" (2018, constants
    of 2022), with a key added between its rounds so that two keys never give permuted masks.

    Multiplication wraps; shifts are made logical by masking the sign's copies off.
    """
    x = x ^ ops.bitwise_and(ops.right_shift(x, 16), 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ ops.bitwise_and(ops.right_shift(x, 15), 0x1FFFF)
    x = (x + key) * 0x735A2D97
    return x ^ ops.bitwise_and(ops.right_shift(x, 15), 0x1FFFF)


@keras.saving.register_keras_serializable("vit")
class Dropout(layers.Dropout):
    """keras.layers.Dropout with hashed masks."""

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        state = ops.cast(self.seed_generator.next(), "int32")  # (the layer's seed, calls so far)
        first_key = hash_bits(state[0] + hash_bits(state[1]))
        second_key = hash_bits(first_key + 1)
        shape = ops.shape(inputs)  # on TensorFlow the batch may be unknown
        number = ops.reshape(ops.arange(math.prod(shape), dtype="int32"), shape)
        bits = ops.bitwise_and(hash_bits(number + first_key, second_key), 0x7FFFFFFF)
        keep = bits >= round(self.rate * 2**31)
        return ops.where(keep, inputs / (1 - self.rate), ops.zeros_like(inputs))


@keras.saving.register_keras_serializable("vit")
class MultiHeadAttention(layers.MultiHeadAttention):
    """keras.layers.MultiHeadAttention with hashed masks, fused wherever nothing is dropped.

    Keras' own takes the fused kernel only at dropout 0, not at inference.
    """

    def _build_attention(self, rank):
        super()._build_attention(rank)
        self._dropout_layer = Dropout(self._dropout, dtype=self._dropout_layer.dtype_policy)

    def _compute_attention(self, query, key, value, mask=None, training=None, *args, **kwargs):
        rate = self._dropout
        self._dropout = rate if training else 0.0
        try:
            return super()._compute_attention(query, key, value, mask, training, *args, **kwargs)
        finally:
            self._dropout = rate
