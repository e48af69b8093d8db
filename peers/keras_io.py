"""The keras.io example's layers under plain Keras `fit`: what users start from.

    python peers/keras_io.py --keras-backend torch --dataset synthetic --num-epochs 2

Model and flags of vit.py; but normalisation, resizing, flip, rotation and zoom are Keras'
preprocessing layers inside the model, at the model's own size, attention is Keras' own, random
numbers are the backend's, and batches come from the host. Patches, order and record are vit.py's.
(https://keras.io/examples/vision/image_classification_with_vision_transformer/)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from harness import environment  # noqa: E402

if __name__ == "__main__":
    environment.read_dotenv()
    environment.keep_memory()

import vit  # noqa: E402
from harness.cli import fail, name_flag  # noqa: E402

FIXED = (  # choices of vit.py's that the example does not have
    *("stem", "position", "pool", "mlp_ratio", "drop_path", "layer_scale", "init_weights"),
    *("flip", "rotation", "zoom", "crop_padding", "policy", "erasing", "mixup", "cutmix"),
    *("label_smoothing", "optimizer"),
)


def create_model(config, mean, variance):
    """vit.create_vit_classifier's model, of Keras' own layers, with the augmentation inside."""
    keras, layers = vit.keras, vit.layers
    vit.set_seed(config.seed)
    augmentation = [layers.Normalization(mean=mean, variance=variance)]
    augmentation += [layers.Resizing(config.image_size, config.image_size)]
    if config.augment:
        augmentation += [layers.RandomFlip("horizontal"), layers.RandomRotation(factor=0.02)]
        augmentation += [layers.RandomZoom(height_factor=0.2, width_factor=0.2)]

    def mlp(x, units, rate):
        for width in units:
            x = layers.Dropout(rate)(layers.Dense(width, activation="gelu")(x))
        return x

    pixels = layers.Input(config.input_shape)
    x = keras.Sequential(augmentation, name="data_augmentation")(pixels)
    x = vit.PatchEncoder(config.num_patches, config.projection_dim)(
        vit.Patches(config.patch_size)(x)
    )
    for _ in range(config.transformer_layers):
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        attention = layers.MultiHeadAttention(
            config.num_heads, config.head_dim, dropout=config.attention_dropout
        )
        x = layers.Add()([x, attention(h, h)])
        h = mlp(
            layers.LayerNormalization(epsilon=1e-6)(x), config.transformer_units, config.dropout
        )
        x = layers.Add()([x, h])
    x = layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(x))
    x = layers.Dropout(config.head_dropout)(x)
    x = mlp(x, config.mlp_head_units, config.head_dropout)
    return keras.Model(pixels, layers.Dense(config.num_classes, dtype="float32")(x))


def drop_augmentation(config, x_train, create=vit.create_data_augmentation):
    """What vit.create_data_augmentation gives, without the augmentation: the model has it."""
    return create(config, x_train)[0], None, None


if __name__ == "__main__":
    vit.create_vit_classifier, vit.create_data_augmentation = create_model, drop_augmentation
    config, default = vit.parse_config([*sys.argv[1:], "--trainer=fit"]), vit.ViTConfig()
    for name in FIXED:
        if getattr(config, name) != getattr(default, name):
            got = f"expected {getattr(default, name)}, as the example has it"
            fail(f"{name_flag(name)}: {got}, got {getattr(config, name)}")
    vit.ending.leave(vit.main(config, subject=f"keras-io-{vit.engine.BACKEND}"))
