"""ResNet-50 as its weights are trained today: keras.applications' with torchvision's strides.

keras.applications follows the first paper (He et al. 2015, https://arxiv.org/abs/1512.03385): a
block that halves the picture does so in its first, 1x1, convolution, which discards three quarters
of its input. What torchvision and timm hold does so in the 3x3 convolution ("ResNet v1.5"): as many
numbers, 25,636,712, and 4.1 instead of 3.9 G multiply-accumulates.
"""

import re

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("vit")
class HalvingConv2D(layers.Conv2D):
    """A 3x3 convolution of stride 2 with a row and a column of zeros on each side: Keras' padding
    "same" has none before the first pixel of an even side, PyTorch's has."""

    def call(self, inputs):
        pad = ((0, 0), (1, 1), (1, 1), (0, 0))
        if self.data_format == "channels_first":
            pad = ((0, 0), (0, 0), (1, 1), (1, 1))
        x = ops.conv(
            ops.pad(inputs, pad),
            ops.cast(self.kernel, inputs.dtype),
            strides=list(self.strides),
            padding="valid",
            data_format=self.data_format,
        )
        shape = (1, -1, 1, 1) if self.data_format == "channels_first" else (1, 1, 1, -1)
        return x + ops.cast(ops.reshape(self.bias, shape), x.dtype)


def create_resnet50(data_format="channels_last"):
    """A model from normalised pixels, 224 a side, to 1,000 logits; its convolutions compute in
    `data_format`, which is also that of the pixels."""

    def revise(layer):
        kind, config = type(layer), layer.get_config()
        if re.fullmatch("conv[345]_block1_1_conv", layer.name):
            config["strides"] = (1, 1)
        elif re.fullmatch("conv[345]_block1_2_conv", layer.name):
            kind, config["strides"] = HalvingConv2D, (2, 2)
        elif isinstance(layer, layers.BatchNormalization):
            config["epsilon"] = 1e-5  # PyTorch's default
        elif layer.name == "predictions":
            config["dtype"] = "float32"
        return kind.from_config(config)

    before = keras.config.image_data_format()
    keras.config.set_image_data_format(data_format)  # keras.applications has no argument for it
    try:
        original = keras.applications.ResNet50(weights=None, classifier_activation=None)
    finally:
        keras.config.set_image_data_format(before)
    return keras.models.clone_model(original, clone_function=revise)
