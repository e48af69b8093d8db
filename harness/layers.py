"""Small layers of a Vision Transformer that Keras does not have, and initial weights that depend on
the seed alone."""

import math

import keras
import numpy as np
from keras import layers, ops


@keras.saving.register_keras_serializable("vit")
class GlorotUniform(keras.initializers.GlorotUniform):
    """Keras' default for kernels (Glorot and Bengio 2010), drawn by NumPy's global generator.

    Keras' own draws differ between backends; these depend on the seed alone, and JAX need not
    compile a generator for each shape. `keras.utils.set_random_seed` seeds NumPy's generator.
    """

    def __call__(self, shape, dtype=None):
        if self.input_axes:  # Keras sets both for the kernels of einsums
            fans = [math.prod(shape[a] for a in x) for x in (self.input_axes, self.output_axes)]
        else:  # a convolution's kernel begins with its window
            fans = [math.prod(shape[:-2]) * size for size in shape[-2:]]
        limit = math.sqrt(6 / sum(fans))
        return ops.convert_to_tensor(np.random.uniform(-limit, limit, shape), dtype=dtype)


@keras.saving.register_keras_serializable("vit")
class RandomUniform(keras.initializers.Initializer):
    """Keras' default for embeddings, within 0.05 to either side, drawn like GlorotUniform."""

    def __call__(self, shape, dtype=None):
        return ops.convert_to_tensor(np.random.uniform(-0.05, 0.05, shape), dtype=dtype)


@keras.saving.register_keras_serializable("vit")
class Prepare(layers.Layer):
    """Normalise raw pixels (batch, height, width, channels) and resize to squares, bilinearly.

    Not Keras' own layers. Resizing, as all of Keras' preprocessing, calls itself in training mode
    by default, and layers after it inherit that: `model(pixels)` would drop units. Normalization
    puts its numbers into the compiled code, which then is another for each choice of images;
    here they are weights, and a second start finds its code in the cache.
    """

    def __init__(self, size, mean, variance, **kwargs):
        super().__init__(**kwargs)
        self.size, self.statistics = size, {"mean": mean, "variance": variance}

    def build(self, input_shape):
        for name, values in self.statistics.items():
            values = np.broadcast_to(values, input_shape[-1:])
            weight = self.add_weight(shape=values.shape, trainable=False, name=name)
            weight.assign(values)
            setattr(self, name, weight)

    def call(self, images):
        x = (images - ops.cast(self.mean, images.dtype)) / ops.sqrt(
            ops.cast(self.variance, images.dtype)
        )
        if tuple(images.shape[1:3]) == (self.size, self.size):
            return x
        return ops.image.resize(x, (self.size, self.size), data_format="channels_last")

    def get_config(self):
        return {**super().get_config(), "size": self.size, **self.statistics}


@keras.saving.register_keras_serializable("vit")
class Convolution(layers.Layer):
    """A 3x3 convolution of images (batch, height, width, channels) to (batch, height, width,
    filters); where it halves them, the largest of each 2x2 pixels after a ReLU.

    On JAX and TensorFlow one matrix product over each pixel's neighbourhood: on a CPU XLA's own
    convolution and pooling take more than twice as long, gradients included; PyTorch's are faster
    than that. The largest pixel is found before bias and ReLU, which keep the order, and by
    `maximum`: on PyTorch's CPU the gradient of `max`, which counts ties, would be most of the
    layer's time.
    """

    def __init__(self, filters, halve=True, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.halve = filters, halve

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(3, 3, input_shape[-1], self.filters), initializer=GlorotUniform(), name="kernel"
        )
        self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, x):
        _, height, width, channels = x.shape
        kernel, bias = ops.cast(self.kernel, x.dtype), ops.cast(self.bias, x.dtype)
        if keras.backend.backend() == "torch":
            x = ops.conv(x, kernel, padding="same", data_format="channels_last")
        else:
            x = ops.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = ops.concatenate([x[:, :, i : i + width] for i in range(3)], axis=3)
            x = ops.concatenate([x[:, i : i + height] for i in range(3)], axis=3)
            x = ops.reshape(x, (-1, 9 * channels))
            x = ops.matmul(x, ops.reshape(kernel, (9 * channels, self.filters)))
        if not self.halve:
            return ops.reshape(x + bias, (-1, height, width, self.filters))
        x = ops.reshape(x, (-1, height // 2, 2, width // 2, 2, self.filters))
        x = ops.maximum(x[:, :, 0], x[:, :, 1])
        x = ops.maximum(x[:, :, :, 0], x[:, :, :, 1])
        return ops.relu(x + bias)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "halve": self.halve}


@keras.saving.register_keras_serializable("vit")
class LayerScale(layers.Layer):
    """Scale each channel of a branch by a weight that begins small (Touvron et al. 2021,
    https://arxiv.org/abs/2103.17239)."""

    def __init__(self, initial, **kwargs):
        super().__init__(**kwargs)
        self.initial = initial

    def build(self, input_shape):
        initializer = keras.initializers.Constant(self.initial)
        self.scale = self.add_weight(
            shape=input_shape[-1:], initializer=initializer, name="layer_scale"
        )

    def call(self, x):
        return x * ops.cast(self.scale, x.dtype)

    def get_config(self):
        return {**super().get_config(), "initial": self.initial}


@keras.saving.register_keras_serializable("vit")
class AttentionPool(layers.Layer):
    """The mean of all tokens, weighted by a softmax over one score for each ("sequence pooling" of
    Hassani et al. 2021, https://arxiv.org/abs/2104.05704): (batch, tokens, dim) -> (batch, dim)."""

    def build(self, input_shape):
        self.score = layers.Dense(1, kernel_initializer=GlorotUniform(), dtype=self.dtype_policy)
        self.score.build(input_shape)

    def call(self, x):
        weights = ops.softmax(self.score(x), axis=1)  # (batch, tokens, 1)
        return ops.squeeze(ops.matmul(ops.transpose(weights, (0, 2, 1)), x), 1)


def embed_positions(side, dim):
    """Fixed embeddings of a grid of side * side tokens, float32 (side * side, dim): sines and
    cosines of the column, then of the row, of wavelengths from 2 pi to 10,000 * 2 pi (Vaswani et
    al. 2017 in two dimensions, as in He et al. 2021, https://arxiv.org/abs/2111.06377)."""
    frequency = 1 / 10_000 ** (np.arange(dim // 4) / (dim // 4))
    row, column = np.mgrid[:side, :side].reshape(2, -1, 1) * frequency
    waves = [f(x) for x in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(waves, 1, dtype="float32", casting="same_kind")
