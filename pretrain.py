"""Masked pre-training of vit.py's encoder, without labels, on a Keras 3 backend of your choice.

    python pretrain.py --no-use-wandb --image-size 32 --patch-size 4
    python vit.py --no-use-wandb --image-size 32 --patch-size 4 --init-weights pretrained.npz

Three quarters of a picture's patches are left out; the encoder sees the others, a small decoder has
to paint the missing ones (He et al. 2021, https://arxiv.org/abs/2111.06377). What it has learned,
the encoder's weights, goes to --weights-path for vit.py, and some pictures, masked, painted and
whole, to --grid-path. Flags are those of vit.py and the few below; so are record and exit codes.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from harness import ending, environment

if __name__ == "__main__":
    ending.end_at_once()
    environment.read_dotenv()
    environment.keep_memory()

import vit  # noqa: E402
from harness.cli import check_writable, fail, name_flag, parse, refuse  # noqa: E402
from harness.layers import GlorotUniform, RandomUniform, embed_positions  # noqa: E402
from harness.weights import load_encoder_weights, save_encoder_weights  # noqa: E402
from vit import keras, layers, np, ops  # noqa: E402


@dataclass
class PretrainConfig(vit.ViTConfig):
    """vit.py's choices, some with other defaults, and those of pre-training."""

    mask_ratio: float = 0.75  # share of the patches that the encoder does not see
    decoder_dim: int = 64  # width
    decoder_layers: int = 2
    decoder_heads: int = 4
    weights_path: Path = Path("pretrained.npz")  # the encoder's weights
    grid_path: Path = Path("pretrained.png")  # pictures: masked, painted, whole
    # Of the paper's table 8, but for the length; only flips and crops augment.
    num_epochs: int = 50
    learning_rate: float = 1.5e-4
    learning_rate_batch: int | None = 256
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    decay_kernels_only: bool = True
    beta_2: float = 0.95
    dropout: float = 0.0
    attention_dropout: float = 0.0
    rotation: float = 0.0
    zoom: float = 0.0
    crop_padding: int = 4
    validation_split: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        dim, heads = self.decoder_dim, self.decoder_heads
        is_plain = self.trainer == "fit" or not self.jit_compile
        refuse(
            (
                self.recipe != "keras-io",
                f"--recipe: expected none, which are for training with labels; got {self.recipe}",
            ),
            (self.stem != "patch", "--stem: expected patch, whose patches can be hidden, got conv"),
            (
                not 0 < self.mask_ratio < 1 or self.num_visible in (0, self.num_patches),
                f"--mask-ratio: expected to hide some of {self.num_patches} patches, not all, "
                f"got {self.mask_ratio}",
            ),
            (
                min(dim, heads) < 1 or dim % 4 or dim % heads,
                f"--decoder-dim: expected a multiple of 4 and --decoder-heads {heads}, got {dim}",
            ),
            (
                self.decoder_layers < 1,
                f"--decoder-layers: expected above 0, got {self.decoder_layers}",
            ),
            (self.mixup or self.cutmix, "--mixup, --cutmix: expected none, there are no labels"),
            (self.validation_split, "--validation-split: expected 0, there are no labels"),
            (
                self.checkpoint_path or self.model_path,
                "--checkpoint-path, --model-path: expected none: --weights-path has the encoder's",
            ),
            (self.fit_memory, "--fit-memory: expected a smaller --micro-batch-size instead"),
            (is_plain, "--trainer, --jit-compile: expected compiled training, got Keras' fit"),
        )

    @property
    def num_visible(self):
        return round(self.num_patches * (1 - self.mask_ratio))


# ---------------------------------------------------------------------------------------------
# The model


class Select(layers.Layer):
    """The tokens (batch, tokens, dim) at some places (batch, count), a class token before them."""

    def __init__(self, class_token=False, **kwargs):
        super().__init__(**kwargs)
        self.first = int(class_token)

    def call(self, x, places):
        chosen = ops.take_along_axis(x[:, self.first :], ops.expand_dims(places, 2), axis=1)
        return ops.concatenate([x[:, : self.first], chosen], axis=1) if self.first else chosen


class Restore(layers.Layer):
    """Put visible tokens (batch, visible, dim) back where they were, and one learned token at each
    place between, with fixed positions: (batch, patches, dim).

    order: int32 (batch, patches), the patches' numbers, the visible ones first.
    """

    def build(self, x_shape, order_shape):
        self.mask_token = self.add_weight(
            shape=(1, x_shape[-1]), initializer=RandomUniform(), name="mask_token"
        )
        self.positions = self.add_weight(
            shape=(order_shape[1], x_shape[-1]), trainable=False, name="positions"
        )
        self.positions.assign(embed_positions(round(order_shape[1] ** 0.5), x_shape[-1]))

    def call(self, x, order):
        visible, patches = x.shape[1], order.shape[1]
        shape = (ops.shape(x)[0], patches - visible, x.shape[2])
        hidden = ops.broadcast_to(ops.cast(self.mask_token, x.dtype), shape)
        x = ops.concatenate([x, hidden], axis=1)
        back = ops.expand_dims(ops.argsort(order, axis=1), 2)
        return ops.take_along_axis(x, back, axis=1) + ops.cast(self.positions, x.dtype)


class PaintingError(layers.Layer):
    """The mean squared error of each picture's hidden patches, (batch,), against their pixels,
    which are normalised patch by patch (equation in section 3, "Reconstruction target")."""

    def __init__(self, visible, **kwargs):
        super().__init__(**kwargs, dtype="float32")
        self.visible = visible

    def call(self, painted, patches, order):
        error = ops.mean(ops.square(painted - normalise(patches)), axis=2)
        return ops.mean(ops.take_along_axis(error, order[:, self.visible :], axis=1), axis=1)


def normalise(patches):
    mean = ops.mean(patches, axis=2, keepdims=True)
    return (patches - mean) / ops.sqrt(ops.var(patches, axis=2, keepdims=True) + 1e-6)


def create_masked_autoencoder(config, mean, variance):
    """(autoencoder, painter), which share all layers. Both take {"pixels": raw pixels (batch,
    *input_shape), "order": int32 (batch, patches)}; the first gives each picture's error, (batch,),
    the second the patches as painted, normalised, (batch, patches, pixels)."""
    vit.set_seed(config.seed)
    inputs = {
        "pixels": layers.Input(config.input_shape, name="pixels"),
        "order": layers.Input((config.num_patches,), dtype="int32", name="order"),
    }
    pixels, order = inputs["pixels"], inputs["order"]
    x = vit.Prepare(config.image_size, mean, variance)(pixels)
    patches = vit.tokenize(x, config)
    has_token, visible = config.pool == "token", config.num_visible
    x = vit.encode(patches, config, lambda x: Select(has_token)(x, order[:, :visible]))
    x = layers.Dense(config.decoder_dim, kernel_initializer=GlorotUniform())(x)
    x = Restore()(x[:, int(has_token) :], order)
    decoder = dataclasses.replace(
        config,
        projection_dim=config.decoder_dim,
        transformer_layers=config.decoder_layers,
        num_heads=config.decoder_heads,
        head_dim=config.decoder_dim // config.decoder_heads,
        mlp_ratio=4.0,
        transformer_units=None,
        drop_path=0.0,
    )
    x = vit.transform(x, decoder, "decoded")
    painted = layers.Dense(
        patches.shape[2], kernel_initializer=GlorotUniform(), dtype="float32", name="painted"
    )(x)
    error = PaintingError(visible)(painted, patches, order)
    return keras.Model(inputs, error, name="autoencoder"), keras.Model(inputs, painted)


# ---------------------------------------------------------------------------------------------
# Training


def draw_masks(config, count, epoch):
    """The order of each picture's patches, random: int32 (count, patches)."""
    rng = np.random.default_rng((config.seed, epoch, 0x3A5C))
    return np.argsort(rng.random((count, config.num_patches)), axis=1).astype("int32")


def run_pretraining(config, dataset, report, files, run=None):
    """Build, train, write the encoder's weights and the pictures. As vit.run_experiment."""
    started = time.perf_counter()
    nothing = np.empty((0, *dataset.x_train.shape[1:]), "uint8")
    dataset = dataset._replace(x_validation=nothing)  # of a folder that has some
    statistics, draw, apply = vit.create_data_augmentation(config, dataset.x_train)
    model, painter = create_masked_autoencoder(config, **statistics)
    if config.init_weights:
        load_encoder_weights(model, config.init_weights)
    steps = len(dataset.x_train) // config.batch_size
    model.compile(
        optimizer=vit.create_optimizer(config, model, steps),
        loss=lambda labels, errors: errors,
    )
    report["timing"]["build_seconds"] = time.perf_counter() - started

    def draw_all(epoch):
        masks = {"order": draw_masks(config, len(dataset.x_train), epoch)}
        return masks | (draw(epoch) if draw else {})

    def apply_all(images, labels, draws):
        if apply:
            images, labels = apply(images, labels, draws)
        return {"pixels": ops.cast(images, "float32"), "order": draws["order"]}, labels

    callbacks = vit.list_callbacks(config, run)
    vit.train(model, dataset, config, draw_all, apply_all, report, callbacks, files)
    pictures = dataset.x_test[:8]
    masks = draw_masks(config, len(pictures), config.num_epochs)
    results = {
        "weights_path": partial(save_encoder_weights, model),
        "grid_path": partial(save_grid, painter, pictures, masks, config, statistics),
    }
    written = [
        files.save(name_flag(field), write, getattr(config, field))
        for field, write in results.items()
    ]
    if all(written) and config.verbose:
        print(f"  {'encoder':<14} {config.weights_path}, pictures {config.grid_path}")


def save_grid(painter, images, order, config, statistics, path):
    """Write a picture of a row an image: masked, painted where it was masked, whole."""
    from PIL import Image

    size, patch = config.image_size, config.patch_size
    pixels = ops.convert_to_tensor(images, "float32")
    inputs = {"pixels": pixels, "order": ops.convert_to_tensor(order)}
    painted = ops.convert_to_numpy(painter(inputs, training=False))
    prepared = vit.Prepare(size, **statistics)(pixels)
    whole = ops.convert_to_numpy(vit.Patches(patch)(prepared))
    # What is painted is normalised: its mean and spread are those of the true patch.
    painted = painted * whole.std(axis=2, keepdims=True) + whole.mean(axis=2, keepdims=True)
    hidden = np.zeros((*order.shape, 1), bool)
    np.put_along_axis(hidden, order[:, config.num_visible :, None], True, axis=1)
    rows = [np.where(hidden, 0, whole), np.where(hidden, painted, whole), whole]
    side, count = size // patch, len(images)
    grid = np.stack(rows, 1).reshape(count, 3, side, side, patch, patch, 3)
    grid = grid.transpose(0, 2, 4, 1, 3, 5, 6).reshape(count * size, 3 * size, 3)
    grid = grid * np.sqrt(statistics["variance"]) + statistics["mean"]
    picture = Image.fromarray(np.clip(grid, 0, 255).astype("uint8"))
    zoom = max(1, 96 // size)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)
    picture.save(path)


if __name__ == "__main__":
    CONFIG = parse(
        PretrainConfig, sys.argv[1:], __doc__.split("\n\n")[0], {"variant": vit.PRESETS["variant"]}
    )
    check_writable(weights_path=CONFIG.weights_path, grid_path=CONFIG.grid_path)
    if CONFIG.grid_path.suffix.lower() not in (".png", ".jpg", ".webp"):
        fail(f"--grid-path: expected a name that ends with .png, got {CONFIG.grid_path}")
    vit.ending.leave(vit.main(CONFIG, kind="pretrain", experiment=run_pretraining))
