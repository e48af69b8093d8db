# /// script
# requires-python = ">=3.11"
# dependencies = ["keras==3.15.1", "numpy", "tyro", "wandb", "python-dotenv", "nvidia-ml-py",
#                 "pillow"]
# ///
"""Train and measure a Vision Transformer on CIFAR-100 on a Keras 3 backend of your choice.

    python vit.py --no-use-wandb                          JAX, CIFAR-100, ten epochs
    python vit.py --keras-backend torch --no-use-wandb    the same on PyTorch
    python vit.py --dataset synthetic --no-use-wandb      no download: drawn pictures
    uv run --with jax vit.py --no-use-wandb               from nothing

By default the model is that of the keras.io example "Image classification with Vision Transformer"
(https://keras.io/examples/vision/image_classification_with_vision_transformer/); --recipe and
--variant choose others. The file reads in the order of a run: recipes and configuration, backend,
model, augmentation, training, Weights & Biases, main. Each run appends one record of what it
measured to --results-path.

Exit codes: 0 done; 1 an unexpected error; 2 a bad configuration or a missing backend;
3 out of memory; 4 diverged; 5 no data; 6 trained, but something could not be written;
130 interrupted (Ctrl-C); 141 nobody reads the output (SIGPIPE); 143 terminated (SIGTERM).
"""

import dataclasses
import importlib.util
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from harness import ending, environment, fitting, tracking
from harness.cli import (
    BUILT_IN,
    ConfigError,
    accept_cpu,
    check_clashes,
    check_config,
    check_writable,
    choose_micro_batch,
    fail,
    is_compiled,
    list_flags,
    name_flag,
    parse,
    settle_widths,
)

PROCESS_STARTED = environment.find_start()
if __name__ == "__main__":  # once more from the start, before anything that takes time
    ending.end_at_once()
    environment.keep_memory()
BACKENDS = ("jax", "torch", "tensorflow")  # each is a pip extra, too
SERIES = {"VIT_RECORD_ID", "VIT_EPOCHS", "WANDB_SWEEP_ID"}  # a comparison or a sweep sets them

# ---------------------------------------------------------------------------------------------
# Architectures and recipes: flags that a name stands for. What is typed wins over them

VARIANTS = {  # width, depth, heads, width of the MLP
    "Ti": (192, 12, 3, 768),  # Touvron et al. 2021, https://arxiv.org/abs/2012.12877, table 1
    "S": (384, 12, 6, 1536),  # the same
    "B": (768, 12, 12, 3072),  # Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, table 1
    "L": (1024, 24, 16, 4096),  # the same
    "H": (1280, 32, 16, 5120),  # the same
    "g": (1408, 40, 16, 6144),  # Zhai et al. 2022, https://arxiv.org/abs/2106.04560, table 2
}
# One linear layer after the pooling, and nothing dropped.
LINEAR_HEAD = "--mlp-head-units --head-dropout 0 --dropout 0 --attention-dropout 0"
# What DeiT and MAE have in common, for pictures of 32 pixels a side.
STRONG = """
    --variant Ti/4 --image-size 32 --drop-path 0.1 --num-epochs 300 --schedule cosine
    --decay-kernels-only --rotation 0 --zoom 0 --crop-padding 4 --policy rand --erasing 0.25
    --mixup 0.8 --cutmix 1 --label-smoothing 0.1
"""
# This project's own, for CIFAR-100 on small hardware.
SMALL = f"""
    {LINEAR_HEAD} --image-size 32 --patch-size 4 --stem conv --pool attention --head-dim 64
    --optimizer muon --learning-rate 0.002 --schedule cosine --beta-2 0.99 --weight-decay 0.06
    --decay-kernels-only --clip-norm 1 --label-smoothing 0.1 --rotation 0 --zoom 0
    --crop-padding 4 --policy trivial --batch-size 128 --num-epochs 100 --no-best-weights
"""
RECIPES = {
    # https://keras.io/examples/vision/image_classification_with_vision_transformer/
    "keras-io": "",
    # https://arxiv.org/abs/2012.12877, table 9
    "deit": f"""{STRONG} --learning-rate 0.0005 --learning-rate-batch 512 --batch-size 1024
        --weight-decay 0.05 --warmup-epochs 5""",
    # A ViT from scratch, https://arxiv.org/abs/2111.06377, appendix A.2. Its average, 0.9999, spans
    # 32 epochs of ImageNet; so many of CIFAR-100 are 350 steps.
    "mae": f"""{STRONG} --learning-rate 0.0001 --learning-rate-batch 256 --batch-size 4096
        --weight-decay 0.3 --beta-2 0.95 --warmup-epochs 20 --ema 0.997""",
    "small": f"""{SMALL} --projection-dim 256 --transformer-layers 6 --num-heads 4 --mlp-ratio 2
        --drop-path 0.1 --erasing 0.25 --warmup-epochs 10""",
    "tiny": f"""{SMALL} --projection-dim 128 --transformer-layers 2 --num-heads 2 --mlp-ratio 1
        --warmup-epochs 5 --ema 0.999""",
}


def expand_variant(name):
    """The flags of a Vision Transformer such as B/16, size and pixels a side of a patch."""
    size, _, patch = name.partition("/")
    if size not in VARIANTS or not patch.isdecimal() or int(patch) < 1:
        known = ", ".join(VARIANTS)
        raise ConfigError(f"--variant: expected SIZE/PATCH such as B/16, with {known}; got {name}")
    width, depth, heads, hidden = VARIANTS[size]
    return f"""{LINEAR_HEAD} --patch-size {patch} --pool token --projection-dim {width}
        --transformer-layers {depth} --num-heads {heads} --head-dim {width // heads}
        --mlp-ratio {hidden / width} --stem patch --position learned"""


def expand_recipe(name):
    if name not in RECIPES:
        raise ConfigError(f"--recipe: expected one of {', '.join(RECIPES)}; got {name}")
    return RECIPES[name]


PRESETS = {"recipe": expand_recipe, "variant": expand_variant}  # the weaker first

# ---------------------------------------------------------------------------------------------
# Configuration: one field a line, the trailing comment is its help


@dataclass
class ViTConfig:
    """Every choice of a run, from a command line by `parse_config`: a recipe or a variant given
    here as a value is a name, no more. Impossible values raise ConfigError."""

    recipe: Literal[tuple(RECIPES)] = "keras-io"  # stands for flags, see vit.py; what is typed wins
    variant: str | None = None  # likewise: a ViT of the literature, SIZE/PATCH such as B/16
    keras_backend: Literal[BACKENDS] | None = None  # default: KERAS_BACKEND, else jax
    # data
    dataset: str = "cifar100"  # or synthetic, drawn without a download, or a folder of pictures
    num_classes: int | None = None  # default: 100, or those of the folder
    input_shape: tuple[int, int, int] | None = None  # default: 32 32 3, in a folder image_size
    train_images: int | None = None  # a class-balanced subset, before the validation split
    test_images: int | None = None  # likewise
    validation_split: float = 0.1  # share of the training images, class-balanced; 0 for none
    max_unreadable: int = 100  # so many of a folder's files are left out, more are an error
    loader: Literal["resident", "torch"] = "resident"  # on the device, or by PyTorch's DataLoader
    loader_workers: int | None = None  # its processes; default: a core less than there are, 1 to 8
    loader_prefetch: int = 2  # batches that each has ready
    # augmentation
    augment: bool = True  # flip, and what follows here; off: only label smoothing
    flip: bool = True  # mirror half of the pictures, left and right
    rotation: float = 0.02  # largest angle, as a share of a full turn
    zoom: float = 0.2  # largest change of height and of width
    crop_padding: int = 0  # shift by up to so many pixels; what is outside gets the mean colour
    policy: Literal["none", "rand", "trivial"] = "none"  # RandAugment, TrivialAugment
    rand_magnitude: float = 9.0  # of RandAugment, 0 to 10, stronger upwards
    rand_std: float = 0.5  # its spread
    rand_layers: int = 2  # its operations a picture, each done with probability 1/2
    erasing: float = 0.0  # share of the pictures from which a rectangle is erased
    mixup: float = 0.0  # beta distribution's parameter; 0 for none
    cutmix: float = 0.0  # likewise
    mix_probability: float = 1.0  # that two pictures are mixed at all
    mix_switch: float = 0.5  # that it is cutmix where both are on
    label_smoothing: float = 0.0  # this share of a label is spread over all classes
    # model
    image_size: int = 72  # pixels a side after resizing
    patch_size: int = 6  # pixels a side of a patch
    stem: Literal["patch", "conv"] = "patch"  # conv: 3x3 convolutions, each halves the picture
    position: Literal["learned", "sincos"] = "learned"  # position embedding
    pool: Literal["flatten", "mean", "token", "attention"] = "flatten"  # from tokens to one vector
    projection_dim: int = 64  # width
    num_heads: int = 4
    head_dim: int | None = None  # width of one head; default: projection_dim
    transformer_layers: int = 8  # depth
    transformer_units: tuple[int, ...] | None = None  # default: 2 * projection_dim, projection_dim
    mlp_ratio: float | None = None  # instead: hidden width over width; no activation at the end
    mlp_head_units: tuple[int, ...] = (2048, 1024)
    dropout: float = 0.1  # after the dense layers of a block
    attention_dropout: float = 0.1
    head_dropout: float = 0.5
    drop_path: float = 0.0  # chance to skip a branch in the last block; less in those before
    layer_scale: float | None = None  # first value of a weight on each channel of a branch
    init_weights: Path | None = None  # of the encoder, from pretrain.py
    # training
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: AdamW but for hidden layers' kernels
    learning_rate: float = 0.001
    learning_rate_batch: int | None = None  # scale learning_rate by batch_size over this
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.0  # the cosine schedule begins with a line from 0 to learning_rate
    final_learning_rate: float = 0.0  # where it ends
    weight_decay: float = 0.0001
    decay_kernels_only: bool = False  # not biases, norms, scales, positions, tokens
    beta_1: float = 0.9
    beta_2: float = 0.999
    clip_norm: float | None = None  # largest global norm of a step's gradients
    ema: float | None = None  # momentum of an average of the weights, which is tested and saved
    best_weights: bool = True  # of the epoch that validated best; off: the last epoch's
    batch_size: int = 256
    micro_batch_size: int | None = None  # computed at once; default: on a CPU a part of the batch
    fit_memory: bool = False  # begin again with half of it, the step as large, until it fits
    memory_limit: float | None = None  # GB that a run may take of the GPU, without one of the host
    num_epochs: int = 10
    resume: bool = False  # go on with this command's run that was stopped, if there is one
    keep_state: bool = field(  # after each epoch, for that, in runs/ beside the records
        default_factory=lambda: not SERIES & os.environ.keys()
    )  # default: yes, but not in comparisons and sweeps, which begin a run again
    seed: int = 0
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"  # of matrix products
    jit_compile: bool = True  # off: plain Keras fit, not compiled
    trainer: Literal["compiled", "fit"] = "compiled"  # fit: Keras' own loop with its defaults
    allow_cpu: bool = False  # go on without a GPU in an image that is made for one
    # files and logs
    checkpoint_path: Path | None = None  # a file NAME.weights.h5 for the weights that were tested
    model_path: Path | None = None  # a file PATH.keras for the whole model, such as for latency.py
    results_path: Path = Path("results.jsonl")  # the record is appended here
    node_name: str = field(default_factory=platform.node)
    verbose: bool = True  # a line an epoch, and a summary
    use_wandb: bool = True
    wandb_project: str = field(
        default_factory=lambda: os.environ.get("WANDB_PROJECT") or tracking.PROJECT
    )
    wandb_entity: str | None = field(default_factory=lambda: os.environ.get("WANDB_ENTITY") or None)
    wandb_run_name: str | None = None
    wandb_tags: tuple[str, ...] = ()

    def __post_init__(self):
        self.keras_backend = self.keras_backend or os.environ.get("KERAS_BACKEND") or "jax"
        settle_widths(self)
        if self.loader_workers is None:
            self.loader_workers = min(max(int(environment.count_cores()) - 1, 1), 8)
        is_folder = self.dataset not in BUILT_IN
        if is_folder:
            self.num_classes = self.num_classes or count_classes(self.dataset)
        self.num_classes = self.num_classes or 100
        size = self.image_size if is_folder else 32
        self.input_shape = tuple(self.input_shape or (size, size, 3))
        check_config(self)
        check_clashes(self)

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


def count_classes(folder):
    """How many classes a folder of pictures has. Raises ConfigError."""
    from harness import data

    try:
        return len(data.list_classes(folder))
    except data.DataError as error:
        raise ConfigError(f"--{error}") from error


def parse_config(argv):
    """A ViTConfig from flags: those given win over --variant, that over --recipe, that over the
    defaults. Ends the process on --help and on errors."""
    return parse(ViTConfig, argv, __doc__.split("\n\n")[0], PRESETS)


# ---------------------------------------------------------------------------------------------
# The backend, chosen before Keras is imported


def _set_backend_from_env_or_cli(argv):
    """Set KERAS_BACKEND: an explicit --keras-backend wins, then the environment, then jax.

    Ends the process with exit code 2 where the backend is unknown or not installed.
    """
    backend = os.environ.get("KERAS_BACKEND") or "jax"
    for position, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in ("--keras-backend", "--keras_backend"):
            backend = value if equals else (argv[position + 1 : position + 2] or [""])[0]
    if backend not in BACKENDS:
        fail(f"--keras-backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if importlib.util.find_spec(backend) is None:
        fail(
            f"the {backend} backend is not installed: pip install '.[{backend}]', "
            "or choose another with --keras-backend"
        )
    os.environ["KERAS_BACKEND"] = backend
    environment.set_variables()


if __name__ == "__main__":  # --help and bad values end here, before the slow imports
    environment.read_dotenv()
    if os.environ.get("VIT_EPOCHS"):  # a sweep's trial
        ending.end_with_parent()
    _set_backend_from_env_or_cli(sys.argv[1:])
    CONFIG = parse_config(sys.argv[1:])
    finds_cuda = partial(environment.finds_cuda, CONFIG.keras_backend)
    IS_CAPPED = CONFIG.memory_limit is not None and not finds_cuda()
    if (CONFIG.fit_memory or IS_CAPPED) and fitting.TRIED not in os.environ:
        SIZES = [None]
        if CONFIG.fit_memory:
            choose_micro_batch(CONFIG, is_on_gpu=finds_cuda())
            SIZES = fitting.list_sizes(
                CONFIG.batch_size, CONFIG.micro_batch_size, is_even=CONFIG.mixup or CONFIG.cutmix
            )
        check_writable(results_path=CONFIG.results_path)
        COMMAND = [sys.executable, *sys.orig_argv[1:]]
        CHOICES = dataclasses.asdict(CONFIG)
        sys.exit(fitting.run_smaller(COMMAND, SIZES, CONFIG.results_path, IS_CAPPED, CHOICES))
    if not environment.has_cuda():
        accept_cpu(CONFIG.allow_cpu)
        if CONFIG.keras_backend == "torch":
            environment.precompile_header()
else:  # imported, by another command with its own flags or by a test
    _set_backend_from_env_or_cli(sys.argv[1:])
    if not environment.has_cuda():
        accept_cpu("allow-cpu" in list_flags(sys.argv[1:]))

_import_started = time.perf_counter()
# For parts of Keras that are not used here: up to a fifth of each start, and tens of megabytes.
UNUSED = {
    "jax": ("matplotlib", "requests", "tensorflow"),
    "torch": ("matplotlib", "requests", "tensorflow", "jax"),
    "tensorflow": ("matplotlib", "jax"),  # which needs requests itself
}[os.environ["KERAS_BACKEND"]]
with environment.hide(*UNUSED):
    import keras  # noqa: E402
import numpy as np  # noqa: E402
from keras import layers, ops  # noqa: E402

from harness import augment, data, engine, record, state, telemetry  # noqa: E402
from harness.dropout import Dropout, DropPath, MultiHeadAttention  # noqa: E402
from harness.layers import (  # noqa: E402
    AttentionPool,
    Convolution,
    GlorotUniform,
    LayerScale,
    Prepare,
    RandomUniform,
    embed_positions,
)
from harness.optimizer import AverageWeights, create_optimizer, crossentropy  # noqa: E402
from harness.run import run_recorded  # noqa: E402
from harness.stopwatch import Diverged, Progress, Stopwatch  # noqa: E402
from harness.weights import load_encoder_weights  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - _import_started
IMPORT_BYTES = telemetry.host_rss_bytes()
keras.config.set_image_data_format("channels_last")  # whatever ~/.keras/keras.json says

# ---------------------------------------------------------------------------------------------
# The model


@keras.saving.register_keras_serializable("vit")
class Patches(layers.Layer):
    """Cut images (batch, height, width, channels) into flat patches (batch, patches, pixels)."""

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def call(self, images):
        _, height, width, channels = images.shape
        size, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
        x = ops.reshape(images, (-1, rows, size, columns, size, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (batch, rows, columns, size, size, channels)
        return ops.reshape(x, (-1, rows * columns, size * size * channels))

    def get_config(self):
        return {**super().get_config(), "patch_size": self.patch_size}


@keras.saving.register_keras_serializable("vit")
class PatchEncoder(layers.Layer):
    """Project patches to the model's width, put a class token before them, add their positions.

    Args:
        position: "learned", or "sincos", which is fixed.
        class_token: whether there is one.
        project: off where convolutions have made tokens of the model's width.
    """

    def __init__(
        self,
        num_patches,
        projection_dim,
        position="learned",
        class_token=False,
        project=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.choices = {
            "num_patches": num_patches,
            "projection_dim": projection_dim,
            "position": position,
            "class_token": class_token,
            "project": project,
        }
        self.projection = None
        if project:
            self.projection = layers.Dense(
                projection_dim,
                kernel_initializer=GlorotUniform(),
                dtype=self.dtype_policy,
                name="projection",
            )

    def build(self, input_shape):
        if self.projection:
            self.projection.build(input_shape)
        dim, first = self.choices["projection_dim"], int(self.choices["class_token"])
        patches, is_learned = self.choices["num_patches"], self.choices["position"] == "learned"
        self.position_embedding = self.add_weight(
            shape=(first + patches, dim),
            initializer=RandomUniform() if is_learned else "zeros",
            trainable=is_learned,
            name="position_embedding",
        )
        if not is_learned:  # the class token is nowhere
            grid = embed_positions(math.isqrt(patches), dim)
            self.position_embedding.assign(np.pad(grid, ((first, 0), (0, 0))))
        if first:
            self.class_token = self.add_weight(
                shape=(1, dim), initializer=RandomUniform(), name="class_token"
            )

    def call(self, patches):  # (batch, patches, pixels) -> (batch, tokens, dim)
        x = self.projection(patches) if self.projection else patches
        if self.choices["class_token"]:
            token = ops.cast(self.class_token, x.dtype)
            token = ops.broadcast_to(token, (ops.shape(x)[0], 1, x.shape[2]))
            x = ops.concatenate([token, x], axis=1)
        return x + ops.cast(self.position_embedding, x.dtype)

    def get_config(self):
        return {**super().get_config(), **self.choices}


def mlp(x, units, dropout, last_activation="gelu"):
    """Dense layers with GELU and dropout."""
    for index, width in enumerate(units):
        activation = "gelu" if index < len(units) - 1 else last_activation
        x = layers.Dense(width, activation=activation, kernel_initializer=GlorotUniform())(x)
        x = Dropout(dropout)(x)
    return x


def tokenize(images, config):
    """Cut images (batch, size, size, channels) into patches (batch, patches, pixels), or make
    tokens (batch, patches, dim) by convolutions: each halves the images and has twice the filters
    until a pixel stands for a patch, and a last one does not (Xiao et al. 2021,
    https://arxiv.org/abs/2106.14881; with pooling, as in Compact Transformers)."""
    if config.stem == "patch":
        return Patches(config.patch_size)(images)
    x, dim = images, config.projection_dim
    for halving in range(int(math.log2(config.patch_size)), 0, -1):
        x = Convolution(max(dim >> halving, min(dim, 8)))(x)
    x = Convolution(dim, halve=False)(x)
    return layers.Reshape((config.num_patches, dim))(x)


def encode(patches, config, select=lambda tokens: tokens):
    """From patches (batch, patches, pixels) to what they mean, (batch, tokens, dim).

    select: which of the embedded tokens to go on with, for masked pre-training.
    """
    x = PatchEncoder(
        config.num_patches,
        config.projection_dim,
        position=config.position,
        class_token=config.pool == "token",
        project=config.stem == "patch",
        name="patch_encoder",
    )(patches)
    return transform(select(x), config, "encoded")


def transform(x, config, name):
    """Pre-norm transformer blocks, (batch, tokens, dim) to the same; the last layer has a name."""

    def add_branch(x, h, block):
        if config.layer_scale is not None:
            h = LayerScale(config.layer_scale)(h)
        if config.drop_path:
            h = DropPath(config.drop_path * block / max(config.transformer_layers - 1, 1))(h)
        return layers.Add()([x, h])

    last = "gelu" if config.mlp_ratio is None else None
    for block in range(config.transformer_layers):
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        h = MultiHeadAttention(
            num_heads=config.num_heads,
            key_dim=config.head_dim,
            dropout=config.attention_dropout,
            kernel_initializer=GlorotUniform(),
        )(h, h)
        x = add_branch(x, h, block)
        h = layers.LayerNormalization(epsilon=1e-6)(x)
        h = mlp(h, config.transformer_units, config.dropout, last)
        x = add_branch(x, h, block)
    return layers.LayerNormalization(epsilon=1e-6, name=name)(x)


@keras.saving.register_keras_serializable("vit")
class Classifier(keras.Model):
    """A model whose metrics see the likeliest class where labels are shares of classes."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y = ops.argmax(y, axis=-1) if len(y.shape) > 1 else y
        return super().compute_metrics(x, y, y_pred, sample_weight)


def set_seed(seed):
    """Keras' and NumPy's; TensorFlow, if installed, would be imported to be seeded, too."""
    with environment.hide(*UNUSED):
        keras.utils.set_random_seed(seed)


def create_vit_classifier(config, mean=127.5, variance=127.5**2):
    """The classifier, from raw pixels to logits, with weights that depend on the seed alone.

    Args:
        mean, variance: of the training pixels, one number or one per channel; part of the model,
            so that a saved model takes uint8 or float pixels 0 to 255 as they are.

    Returns:
        keras.Model from pixels (batch, *input_shape) to (batch, num_classes) float32 logits.
    """
    set_seed(config.seed)
    pixels = layers.Input(config.input_shape, name="pixels")
    x = Prepare(config.image_size, mean, variance)(pixels)
    x = encode(tokenize(x, config), config)  # (batch, tokens, dim)
    if config.pool == "token":
        x = x[:, 0]
    else:
        pools = {
            "flatten": layers.Flatten,
            "mean": layers.GlobalAveragePooling1D,
            "attention": AttentionPool,
        }
        x = pools[config.pool]()(x)
    x = Dropout(config.head_dropout)(x)
    x = mlp(x, config.mlp_head_units, config.head_dropout)
    logits = layers.Dense(
        config.num_classes, kernel_initializer=GlorotUniform(), dtype="float32", name="logits"
    )(x)
    return Classifier(pixels, logits, name="vit")


# ---------------------------------------------------------------------------------------------
# Pictures and their augmentation


def load_pictures(config, report, runner):
    """The data set of a run, through PyTorch's DataLoader if asked for.

    Raises:
        data.DataError, loader.SharedMemoryError.
    """
    dataset = data.load_for_run(config, report, runner)
    if len(dataset.x_train) < config.batch_size:
        raise data.DataError(
            f"--batch-size: expected at most the {len(dataset.x_train)} images that are left to "
            f"train on, got {config.batch_size}"
        )
    if config.loader == "resident":
        return dataset
    from harness.loader import Loader

    names = ("x_train", "x_validation", "x_test")
    loader = Loader(
        [getattr(dataset, name) for name in names],
        config.batch_size,
        config.loader_workers,
        config.loader_prefetch,
        pin=engine.BACKEND == "torch" and engine.on_gpu(),
    )
    return dataset._replace(**dict(zip(names, loader.streams)))


def create_data_augmentation(config, x_train):
    """What is done to pictures, split by where it belongs.

    Returns:
        (statistics, draw, apply). statistics: mean and variance per channel of x_train, for the
        model, which normalises and resizes so that it can't be fed wrongly. draw and apply are
        those of augment.create_augmentation: random draws on the host, an epoch at once, and what
        they do on the device, outside the differentiated model.
    """
    mean, variance = data.measure_pixels(x_train)
    draw, apply = augment.create_augmentation(config, *x_train.shape[:2], mean)
    return {"mean": mean.tolist(), "variance": variance.tolist()}, draw, apply


# ---------------------------------------------------------------------------------------------
# Training


class Batches(keras.utils.PyDataset):
    """An epoch's batches for Keras' own `fit`: the same pictures, order and draws."""

    def __init__(self, dataset, config, draw, apply):
        super().__init__()
        self.dataset, self.config, self.draw = dataset, config, draw
        self.apply = apply and engine.compile_function(apply)
        self.start(0)

    def start(self, epoch):
        """Draw this epoch. (Keras calls on_epoch_end before the first epoch, too: of no use.)"""
        self.order = data.epoch_order(len(self.dataset.x_train), self.config.seed, epoch)
        self.draws = self.draw(epoch) if self.draw else {}

    def __len__(self):
        return len(self.dataset.x_train) // self.config.batch_size

    def __getitem__(self, step):
        rows = slice(step * self.config.batch_size, (step + 1) * self.config.batch_size)
        index = self.order[rows]
        images, labels = self.dataset.x_train[index], self.dataset.y_train[index]
        if self.apply is None:
            return images, labels
        return self.apply(images, labels, {name: drawn[rows] for name, drawn in self.draws.items()})


def train_plain(model, dataset, config, draw, apply, callbacks, done):
    """Train with Keras' own `fit`, whatever it costs: that is what it is here to show.

    Returns:
        a function of (images, labels) that evaluates: a dictionary of loss and metrics.
    """
    validation = (dataset.x_validation, dataset.y_validation)
    batches = Batches(dataset, config, draw, apply)
    start = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, _: batches.start(epoch))
    model.fit(
        batches,
        validation_data=validation if len(dataset.x_validation) else None,
        validation_batch_size=config.batch_size,
        initial_epoch=done,
        epochs=config.num_epochs,
        callbacks=[start, *callbacks],
        shuffle=False,  # Batches brings its own order
        verbose=0,
    )
    return partial(model.evaluate, batch_size=config.batch_size, verbose=0, return_dict=True)


def train_compiled(model, dataset, config, draw, apply, callbacks, stopwatch, done):
    """Train with this project's compiled steps; what happens in an epoch is what `fit` does.

    Returns:
        a function of (images, labels) that evaluates: a dictionary of loss and metrics.
    """
    steps = len(dataset.x_train) // config.batch_size  # a smaller last batch would compile anew
    is_resident = config.loader == "resident"
    per_call = engine.steps_per_call(steps) if is_resident else 1
    training = engine.compile_train_steps(model, apply)
    if is_resident:
        training.load(dataset.x_train, dataset.y_train)
    forward, at_once = engine.compile_forward(model), config.micro_batch_size
    evaluate = partial(engine.evaluate, model, forward, batch_size=at_once)
    progress = Progress(config.num_epochs, steps, is_shown=config.verbose)
    callbacks = keras.callbacks.CallbackList(callbacks, model=model, epochs=config.num_epochs)

    def plan(epoch):
        """Which pictures are in each part of a batch, (steps, parts, images), and their draws."""
        order = data.epoch_order(len(dataset.x_train), config.seed, epoch)
        order = order[: steps * config.batch_size].reshape(steps, -1, config.micro_batch_size)
        draws = draw(epoch) if draw else {}
        return order, {
            name: drawn[: order.size].reshape(*order.shape, *drawn.shape[1:])
            for name, drawn in draws.items()
        }

    plans, planned = map(plan, range(done, config.num_epochs)), None
    callbacks.on_train_begin()
    for epoch in range(done, config.num_epochs):
        callbacks.on_epoch_begin(epoch)
        order, draws = planned or next(plans)
        running = None
        progress.show(epoch, 0, running)
        if not is_resident:  # a batch is all that lies on the device
            labels = dataset.y_train[order].reshape(steps, -1)
            batches = zip(dataset.x_train.batches(order.ravel()), labels)
            order = np.broadcast_to(np.arange(labels[0].size, dtype=np.int32), labels.shape)
            order = order.reshape(steps, -1, config.micro_batch_size)
        with ending.finishing_steps():
            for first in range(0, steps, per_call):
                rows = slice(first, first + per_call)
                if not is_resident:
                    training.load(*next(batches))
                drawn = {name: array[rows] for name, array in draws.items()}
                losses = training.run(order[rows], drawn)
                if (epoch, first) == (done, 0):
                    stopwatch.end_first_call(order[rows].size)
                # The previous call's losses: reading this call's would leave the device idle.
                progress.show(epoch, first, running)
                running = losses
                ending.check()
        planned = next(plans, None)  # meanwhile
        training.sync()
        progress.show(epoch, steps, running)
        logs = {name: float(value) for name, value in model.get_metrics_result().items()}
        callbacks.on_test_begin()
        model.reset_metrics()
        if len(dataset.x_validation):
            results = evaluate(dataset.x_validation, dataset.y_validation)
            logs |= {f"val_{name}": value for name, value in results.items()}
        callbacks.on_epoch_end(epoch, logs)
        if not engine.on_gpu():  # of which the host's memory is a small part
            engine.return_memory()
        if model.stop_training:
            break
    callbacks.on_train_end()
    return evaluate


def train(model, dataset, config, draw, apply, report, callbacks, files):
    """Train a compiled Keras model, and measure that: the record `report` is filled in on the way,
    so that a run that fails leaves what it had.

    Args:
        draw, apply: of `create_data_augmentation`.
        callbacks: Keras' own, for each epoch.
        files: state.RunFiles, whose state is gone on with and written after each epoch.

    Returns:
        a function of (images, labels) that evaluates: a dictionary of loss and metrics.

    Raises:
        stopwatch.Diverged, state.StateError; whatever the backend raises, its out-of-memory errors
        included.
    """
    report["model"]["parameters"] = sum(math.prod(v.shape) for v in model.trainable_variables)
    report["model"]["flops_per_image"] = engine.count_flops(model)
    history, done, before = keras.callbacks.History(), files.epochs, ((), ())
    if is_compiled(config) or done:
        engine.build_state(model, config.batch_size)
    if done:
        facts = state.restore(model, files.state, dataset.fingerprint)
        history.history = facts["history"]
        before = facts["epoch_seconds"], facts["validation_seconds"]
        report["notes"].append(f"resumed after epoch {done}")
        if config.verbose:
            print(f"goes on after epoch {done}", flush=True)
    stopwatch = Stopwatch(
        epochs=config.num_epochs,
        images_per_epoch=len(dataset.x_train) // config.batch_size * config.batch_size,
        synchronize=engine.synchronize,
        meter=telemetry.create_energy_meter(device=report["device"]["kind"]),
        report=partial(print, flush=True) if config.verbose else lambda line: None,
        before=before,
    )
    # Batch hooks are left alone: overriding them would make Keras wait for every step.
    clock = keras.callbacks.LambdaCallback(
        on_test_begin=lambda logs: stopwatch.end_training(),
        on_epoch_end=stopwatch.end_epoch,
    )
    # In this order: an epoch that was shown is in the record.
    average = AverageWeights() if config.ema is not None else None
    callbacks = [history, clock, *([average] if average else []), *callbacks]
    if files.is_kept:
        keep = state.KeepState(files, history, stopwatch, average, dataset.fingerprint)
        callbacks.append(keep)
    # Last: what others do before an epoch is no part of it.
    begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *given: stopwatch.begin_epoch())
    callbacks.append(begin)
    try:
        if is_compiled(config):
            return train_compiled(model, dataset, config, draw, apply, callbacks, stopwatch, done)
        return train_plain(model, dataset, config, draw, apply, callbacks, done)
    finally:
        figures, energy, reasons = stopwatch.measure(PROCESS_STARTED)
        report["timing"] |= figures
        report["energy"] |= energy
        report["notes"] += reasons
        for name, values in history.history.items():
            report["quality"][record_name(name)] = values


def run_experiment(config, dataset, report, files, run=None):
    """Build, train and test a classifier; `report`, a record, is filled in on the way.

    Args:
        files: state.RunFiles.
        run: an open W&B run, or None.

    Returns:
        the trained model, with the weights that were tested.

    Raises:
        as `train`; WeightsError.
    """
    timing, quality, notes = report["timing"], report["quality"], report["notes"]
    started = time.perf_counter()
    statistics, draw, apply = create_data_augmentation(config, dataset.x_train)
    model = create_vit_classifier(config, **statistics)
    if config.init_weights:
        load_encoder_weights(model, config.init_weights)
    model.compile(
        optimizer=create_optimizer(config, model, len(dataset.x_train) // config.batch_size),
        loss=crossentropy,
        metrics=[
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseTopKCategoricalAccuracy(
                min(5, config.num_classes), name="top-5-accuracy"
            ),
        ],
        jit_compile="auto" if config.jit_compile else False,
    )
    timing["build_seconds"] = time.perf_counter() - started

    has_validation = len(dataset.x_validation) > 0
    best = state.KeepBest(files) if config.best_weights and has_validation else None
    callbacks = [*([best] if best else []), *list_callbacks(config, run)]
    evaluate = train(model, dataset, config, draw, apply, report, callbacks, files)
    if not has_validation:
        missing = ("val_loss", "val_accuracy", "val_top5_accuracy")
        notes += [f"quality.{name}: there are no validation images" for name in missing]
    quality["best_epoch"] = best.load() if best else None
    if not quality["best_epoch"]:
        quality["best_epoch"] = len(quality["loss"])
        notes.append("the last epoch's weights were tested")
    started = time.perf_counter()
    results = evaluate(dataset.x_test, dataset.y_test)
    timing["evaluation_seconds"] = time.perf_counter() - started
    for name in {"accuracy", "top-5-accuracy"} - results.keys():
        names = (prefix + record_name(name) for prefix in ("", "val_", "test_"))
        notes += [f"quality.{name}: no such metric was given to model.compile" for name in names]
    if not math.isfinite(results["loss"]):
        raise Diverged(results["loss"], f"the test after epoch {quality['best_epoch']}")
    quality |= {f"test_{record_name(name)}": value for name, value in results.items()}
    if config.checkpoint_path:
        files.save("--checkpoint-path", model.save_weights, config.checkpoint_path, model)
    if config.model_path:
        files.save("--model-path", model.save, config.model_path, model)
    return model


def list_callbacks(config, run):
    """Who wants to hear of each epoch: an open W&B run, if any, and a sweep."""
    callbacks = [] if run is None else [CustomWandbCallback(run)]
    if os.environ.get("VIT_EPOCHS"):
        tell = partial(tell_epoch, config.num_epochs)
        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=tell))
    return callbacks


def tell_epoch(epochs, epoch, logs):
    """Append an epoch (from 1) and its metrics, a JSON object a line, to the file that VIT_EPOCHS
    names: a sweep that started this run may end it by SIGTERM when it does not promise enough.

    The file may be a pipe. Where its reader is gone, so is the reason for this run: it ends.
    """
    with open(os.environ["VIT_EPOCHS"], "a") as file:
        file.write(json.dumps({"epoch": epoch + 1, "epochs": epochs, **logs}) + "\n")


def record_name(metric):
    """A metric's name in a record: W&B and Keras' log say top-5-accuracy, a key says top5."""
    return metric.replace("top-5-accuracy", "top5_accuracy")


# ---------------------------------------------------------------------------------------------
# Weights & Biases, imported only when it is used


class CustomWandbCallback(keras.callbacks.Callback):
    """Log every metric of every epoch. A failure is told once, and training goes on."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_epoch_end(self, epoch, logs=None):
        tracking.log(self.run, {**logs, "epoch": epoch})


def start_wandb(config, known):
    """Open a W&B run, in the group of its sweep (if any), node and backend; that with the id
    `known`, if any, goes on."""
    backend = keras.backend.backend()
    group = [os.environ.get("WANDB_SWEEP_ID"), config.node_name, backend]
    group = os.environ.get("WANDB_RUN_GROUP") or "-".join(filter(None, group))
    choices = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    try:
        return tracking.start_run(
            "--no-use-wandb",
            project=config.wandb_project,
            entity=config.wandb_entity,
            name=config.wandb_run_name,
            group=group,
            tags=tracking.cut_tags(
                [*config.wandb_tags, backend, config.node_name, Path(config.dataset).name]
            ),
            config=choices | {"backend": backend},
            **({"id": known, "resume": "allow"} if known else {}),
        )
    except ValueError as error:
        fail(error)


def finish_wandb(run, report):
    """Log the test results and figures under their names on the dashboard, add the record as an
    artifact, and close the run. Returns whether nothing was lost."""
    timing, memory, quality = report["timing"], report["memory"], report["quality"]
    results = {
        "total_parameters": report["model"]["parameters"],
        "test_accuracy": quality.get("test_accuracy"),
        "test_top5_accuracy": quality.get("test_top5_accuracy"),
        "train_images_per_second": timing["train_images_per_second"],
        "compile_seconds": timing["compile_seconds"],
        "host_peak_bytes": memory["host_peak_bytes"],
        "device_peak_bytes": memory["device_peak_bytes"],
        "joules_per_image": report["energy"]["joules_per_image"],
    }
    results = {name: value for name, value in results.items() if value is not None}
    final = {f"final_{n}": results[n] for n in results if n.startswith("test_")}
    tracking.log(run, results, {**final, "status": report["status"]})
    files = {"record.json": record.dump_record(report)}
    return tracking.finish_run(run, "record", files, exit_code=int(report["status"] != "ok"))


# ---------------------------------------------------------------------------------------------
# Main


def settle_device(config, compiles=True):
    """Choose device and precision. Returns what matrix products will run in; ends the process with
    exit code 2 where one of them, or what PyTorch `compiles` with, is not to be had."""
    compiler = os.environ.get("CXX") or "g++"
    if engine.BACKEND == "torch" and compiles and shutil.which(compiler) is None:
        advice = ", or --trainer fit" if hasattr(config, "trainer") else ""
        fail(f"PyTorch compiles with {compiler}, which is not here: install it{advice}")
    if not engine.on_gpu():
        accept_cpu(config.allow_cpu)
    MultiHeadAttention.trains_fused = engine.on_gpu()
    MultiHeadAttention.parts = 4 if engine.BACKEND == "jax" and not engine.on_gpu() else 1
    try:
        return engine.set_precision(config.precision)
    except ValueError as error:
        fail(error)


def begin_record(kind, choices, machine, precision, subject=None):
    """A record with all that is known before a run; the arguments are those of `main`, of
    `record.begin_record` and what `settle_device` gives."""
    report = record.begin_record(
        kind,
        config=choices,
        backend=subject or keras.backend.backend(),
        precision=precision,
        machine=machine,
        gpu_name=engine.gpu_name(),
        versions=telemetry.read_versions(keras.backend.backend()),
        git=telemetry.read_git(Path(__file__).parent),
    )
    report["timing"]["import_seconds"] = IMPORT_SECONDS
    report["memory"]["host_import_bytes"] = IMPORT_BYTES
    return report


def main(config, subject=None, kind="train", experiment=run_experiment):
    """One run from configuration to record. Returns the exit code.

    Args:
        subject: what the record shall call its backend, where another command runs another model.
        kind, experiment: of the record, and what is done, where that is not `run_experiment`.
    """
    ending.outlive_full_disk()
    paths = {n: getattr(config, n) for n in ("results_path", "checkpoint_path", "model_path")}
    check_writable(**{name: path for name, path in paths.items() if path})
    if config.loader == "torch" and importlib.util.find_spec("torch") is None:
        fail("--loader torch: expected PyTorch, which is not installed: pip install '.[torch]'")
    machine = telemetry.describe_machine()  # before the backend touches the GPU
    if config.memory_limit and environment.finds_cuda(engine.BACKEND):
        try:
            fitting.limit_memory(config.memory_limit, environment.read_cuda_memory())
        except ValueError as error:
            fail(error)
    precision = settle_device(config, is_compiled(config))
    name = state.name_run({"kind": kind, "subject": subject, **dataclasses.asdict(config)})
    if is_compiled(config):
        choose_micro_batch(config, is_on_gpu=engine.on_gpu())
    elif config.micro_batch_size not in (None, config.batch_size):
        fail("--micro-batch-size: expected none, since Keras' fit trains on whole batches")
    root = config.results_path.parent / "runs" if config.keep_state else None
    files = state.open_files(root, name, config.resume)
    run = None
    if config.use_wandb:
        run = start_wandb(config, files.state and files.state.facts["wandb_id"])
        files.wandb_id = run.id
    report = begin_record(kind, dataclasses.asdict(config), machine, precision, subject)
    if tried := fitting.describe_tried():
        report["notes"].append(tried)
    runner = f"{engine.BACKEND} on {engine.gpu_name() or 'the CPU'}"
    size = "micro_batch_size" if is_compiled(config) else "batch_size"
    remedy = f"lower {name_flag(size)} {getattr(config, size)}"
    remedy = "take a smaller model or --image-size" if getattr(config, size) == 1 else remedy
    remedy += f" or raise --memory-limit {config.memory_limit}" if config.memory_limit else ""

    def run_limited():
        if config.memory_limit:
            engine.limit_memory(config.memory_limit)
        try:
            experiment(config, load_pictures(config, report, runner), report, files, run)
        finally:
            engine.lift_limit()

    exit_code = run_recorded(
        run_limited,
        report,
        config.results_path,
        device=engine,
        library=engine.BACKEND,
        machine=machine,
        started=PROCESS_STARTED,
        remedy=remedy,
        is_compiled=is_compiled(config),
        is_shown=config.verbose,
        problems=files.problems,
    )
    # Before W&B, which may take its time: a run that is over is not to be gone on with.
    state.close_folder(files, is_over=exit_code == 0 or report["status"] == "diverged")
    if run is not None and not finish_wandb(run, report):
        exit_code = exit_code or ending.NOT_WRITTEN
    return exit_code


if __name__ == "__main__":
    ending.leave(main(CONFIG))
