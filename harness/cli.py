"""The command line of a flat configuration: one dataclass, parsed by tyro, refused in one line."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys

BUILT_IN = ("cifar100", "synthetic")  # data sets; others are folders
ACCEPTED = {  # field of a configuration: (whether a value is possible, what is expected)
    **dict.fromkeys(
        (
            *("train_images", "test_images", "image_size", "patch_size", "projection_dim"),
            *("num_heads", "head_dim", "transformer_layers", "batch_size", "micro_batch_size"),
            *("num_epochs", "mlp_ratio", "learning_rate_batch", "clip_norm", "rand_layers"),
            *("loader_prefetch", "memory_limit", "learning_rate"),
        ),
        (lambda value: 0 < value < math.inf, "above 0"),
    ),
    **dict.fromkeys(
        (
            *("validation_split", "dropout", "attention_dropout", "head_dropout", "drop_path"),
            *("zoom", "label_smoothing", "beta_1", "beta_2", "ema"),
        ),
        (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    ),
    **dict.fromkeys(
        ("erasing", "mix_probability", "mix_switch", "rotation"),
        (lambda value: 0 <= value <= 1, "0 to 1"),
    ),
    **dict.fromkeys(
        (
            *("mixup", "cutmix", "warmup_epochs", "final_learning_rate", "rand_std"),
            *("weight_decay", "loader_workers", "max_unreadable"),
        ),
        (lambda value: 0 <= value < math.inf, "at least 0"),
    ),
    **dict.fromkeys(
        ("mlp_head_units", "transformer_units"),
        (lambda value: all(width > 0 for width in value), "widths above 0"),
    ),
    "rand_magnitude": (lambda value: 0 <= value <= 10, "0 to 10"),
    "crop_padding": (lambda value: 0 <= value < 32, "0 to 31"),
    "seed": (lambda value: 0 <= value < 2**31, "0 to 2147483647"),
    "num_classes": (lambda value: value > 1, "2 or more"),
    "input_shape": (
        lambda value: value[0] == value[1] > 0 and value[2] == 3,
        "squares of 3 colours, such as 32 32 3",
    ),
}


class BadInput(Exception):
    """One line for the user: what was expected, what came, what to do. Exit status 2."""


class ConfigError(Exception):
    """An impossible value, in one line: expected and got. (tyro would frame a ValueError.)"""

    ending = ("error", 2)  # status and exit code


def fail(message, code=2):
    """End the process with one line on stderr and an exit code."""
    print(f"{sys.argv[0].rpartition('/')[2]}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def name_flag(field):
    """The flag of a field, as it is written in messages: num_epochs -> --num-epochs"""
    return "--" + field.replace("_", "-")


def list_flags(words):
    """Names of the flags: `--use_wandb=True`, `--no-use-wandb` -> {"use-wandb"}"""
    names = [word[2:].split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    return {name.removeprefix("no-") for name in names}


def split_words(words):
    """(what stands before the first --, what stands after it)"""
    split = words.index("--") if "--" in words else len(words)
    return words[:split], words[split + 1 :]


def parse_split(kind, argv, description, own=None):
    """(an instance of the dataclass `kind`, its flags, another program's flags, which stand after
    a --) from a command line; ends the process on --help and on errors.

    own: fields, those of `kind` if None, whose flags are refused after the --. So are all where
        `kind` has a model and that is another than vit.py's.
    """
    flags, others = split_words(argv)
    config = parse(kind, flags, description)
    own = [field.name for field in dataclasses.fields(kind)] if own is None else own
    if misplaced := sorted(list_flags(others) & {field.replace("_", "-") for field in own}):
        fail(f"--{misplaced[0]}: expected before --")
    if others and (model := getattr(config, "model", "vit")) != "vit":
        fail(f"expected flags after -- for --model vit alone, got --model {model}")
    return config, flags, others


def parse(kind, argv, description, presets=None):
    """An instance of the dataclass `kind` from a command line; ends the process on --help and on
    errors.

    Beside tyro's own forms it takes what W&B's sweep agents send: `--use_wandb=True`, and lists
    as `--wandb-tags=["a","b"]`.

    Args:
        presets: {field: function}, the weaker first. Where the field is given, the function of its
            value tells what flags it stands for, which those in argv win over; it may raise
            ConfigError.
    """
    import tyro

    types = {f.name: f.type for f in dataclasses.fields(kind)}
    arguments, words = [], list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        is_known = flag.startswith("--") and name in types
        if is_known and types[name] is bool and not equals:
            equals = words and words[0].lower() in ("true", "false")
            value = words.pop(0) if equals else ""
        if is_known and types[name] is bool and value.lower() in ("true", "false"):
            arguments.append(flag if value.lower() == "true" else f"--no-{flag[2:]}")
            continue
        takes_list = is_known and "tuple" in str(types[name])
        if takes_list and not equals and words and words[0].startswith("["):
            equals, value = "=", words.pop(0)
        if takes_list and value.startswith("["):
            try:
                arguments += [flag, *map(str, json.loads(value))]
                continue
            except ValueError:
                fail(f"{flag}: expected a list such as [1, 2], got {value}")
        arguments.append(f"{flag}={value}" if equals else flag)
    told = io.StringIO()
    try:
        arguments = expand_presets(arguments, presets or {})
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=arguments, description=description)
    except ConfigError as error:
        fail(error)
    except SystemExit as ending:
        if not ending.code:  # --help
            raise
        fail(f"{unframe(told.getvalue())} (see --help)")


VOID = {  # what is typed: the flags of a preset that it leaves without a meaning
    "--transformer-units": ("--mlp-ratio",),
    "--schedule=constant": ("--warmup-epochs", "--final-learning-rate"),
    "--no-augment": ("--policy", "--erasing", "--mixup", "--cutmix"),
}


def expand_presets(arguments, presets):
    """`arguments`, before them the words that their presets' flags stand for: the last one wins.
    Where the epochs are typed, a preset's warm-up is as large a part of them as of the preset's."""
    words, void = [], []
    for flag, value in list_values(arguments):
        void += [*VOID.get(flag, ()), *VOID.get(f"{flag}={value}", ())]
    typed = dict(list_values(arguments))
    for field, expand in presets.items():
        if (given := typed.get(name_flag(field))) is not None:
            words += expand_presets(expand(given).split(), presets)
    kept, is_kept = [], True
    for word in words:
        is_kept = word not in void if word.startswith("--") else is_kept
        kept += [word] if is_kept else []
    preset, epochs = dict(list_values(kept)), typed.get("--num-epochs", "")
    if {"--num-epochs", "--warmup-epochs"} <= preset.keys() and epochs.isdecimal():
        share = float(preset["--warmup-epochs"]) / float(preset["--num-epochs"])
        kept += ["--warmup-epochs", f"{share * int(epochs):g}"]
    return [*kept, *arguments]


def list_values(words):
    """(flag, value) of each word; what follows a flag counts as its value."""
    for word, following in zip(words, [*words[1:], ""]):
        flag, equals, value = word.partition("=")
        yield flag.replace("_", "-"), value if equals else following


def unframe(text):
    """The message in what tyro prints: a title, the message, a rule, advice; all in a frame."""
    text = re.sub(r"\x1b\[[\d;]*m|[│╰╯]", "", text.partition("\n")[2])
    parts = [" ".join(part.split()) for part in re.split("[─-]{5,}", text)]
    return next(filter(None, parts), "")


def check_ranges(config):
    """Raise ConfigError where a field's value is impossible, whatever the others are."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        accepts, expected = ACCEPTED.get(field.name, (None, None))
        if accepts and value is not None and not accepts(value):
            raise ConfigError(f"{name_flag(field.name)}: expected {expected}, got {value}")


def settle_widths(config):
    """Check each field by itself, and fill in those that others stand for. Raises ConfigError."""
    check_ranges(config)
    dim = config.projection_dim
    config.head_dim = config.head_dim or dim
    if config.mlp_ratio is not None:
        if config.transformer_units is not None:
            raise ConfigError("--mlp-ratio: expected none beside --transformer-units")
        config.transformer_units = (max(1, round(config.mlp_ratio * dim)), dim)
    config.transformer_units = config.transformer_units or (2 * dim, dim)


def check_config(config):
    """Raise ConfigError where a configuration of a model and its training, which `settle_widths`
    has been through, is impossible."""
    refuse(
        (
            config.stem == "conv" and config.patch_size not in (2, 4, 8, 16),
            f"--stem conv: expected --patch-size 2, 4, 8 or 16, got {config.patch_size}",
        ),
        (
            config.warmup_epochs >= config.num_epochs,
            f"--warmup-epochs: expected less than --num-epochs {config.num_epochs}, "
            f"got {config.warmup_epochs}",
        ),
    )
    if config.image_size % config.patch_size:
        raise ConfigError(
            f"--image-size: expected a multiple of --patch-size {config.patch_size}, "
            f"got {config.image_size}"
        )
    if config.transformer_units[-1] != config.projection_dim:
        raise ConfigError(
            "--transformer-units: expected the last to be --projection-dim "
            f"{config.projection_dim} (it is added to the input), got {config.transformer_units}"
        )
    if config.batch_size % (config.micro_batch_size or 1):
        raise ConfigError(
            f"--micro-batch-size: expected a divisor of --batch-size {config.batch_size}, "
            f"got {config.micro_batch_size}"
        )
    if config.dataset not in BUILT_IN:
        return
    limits = {"num_classes": 100}
    if config.dataset == "cifar100":
        limits |= {"train_images": 50_000, "test_images": 10_000}
    for name, available in limits.items():
        asked = getattr(config, name)
        if asked and asked > available:
            raise ConfigError(f"{name_flag(name)}: expected at most {available}, got {asked}")
    if tuple(config.input_shape) != (32, 32, 3):
        raise ConfigError(
            f"--input-shape: expected 32 32 3, as {config.dataset} has it, got {config.input_shape}"
        )
    images = config.train_images or 500 * config.num_classes
    images -= round(images * config.validation_split)
    if config.batch_size > images:
        raise ConfigError(
            f"--batch-size: expected at most the {images} images that are left to train on, "
            f"got {config.batch_size}"
        )


def is_compiled(config):
    """Whether this project's compiled steps train; else Keras' own `fit` does."""
    return config.trainer == "compiled" and config.jit_compile


def check_clashes(config):
    """Raise ConfigError where choices of vit.py cannot be together."""
    refuse(
        (
            config.position == "sincos" and config.projection_dim % 4,
            "--position sincos: expected --projection-dim to be a multiple of 4, "
            f"got {config.projection_dim}",
        ),
        (
            config.schedule == "constant" and (config.warmup_epochs or config.final_learning_rate),
            "--warmup-epochs, --final-learning-rate: expected --schedule cosine, got constant",
        ),
        (
            not config.augment
            and (config.policy != "none" or config.erasing or config.mixup or config.cutmix),
            "--no-augment: expected no --policy, --erasing, --mixup or --cutmix beside it",
        ),
        (
            config.loader == "torch" and not is_compiled(config),
            "--loader torch: expected compiled training, got Keras' fit; or --loader resident",
        ),
        (
            (config.mixup or config.cutmix) and (config.micro_batch_size or config.batch_size) % 2,
            "--mixup, --cutmix: expected an even --batch-size and --micro-batch-size, "
            f"since they mix pairs, got {config.batch_size} and {config.micro_batch_size}",
        ),
        (
            config.fit_memory and not is_compiled(config),
            "--fit-memory: expected compiled training, for Keras' fit has no parts of a batch",
        ),
        (
            config.memory_limit and config.keras_backend == "tensorflow",
            "--memory-limit: expected JAX or PyTorch, got TensorFlow",
        ),
        (
            config.resume and not config.keep_state,
            "--resume: expected no --no-keep-state (which comparisons and sweeps imply)",
        ),
        (
            config.checkpoint_path and not str(config.checkpoint_path).endswith(".weights.h5"),
            "--checkpoint-path: expected a name ending in .weights.h5, "
            f"got {config.checkpoint_path}",
        ),
        (
            config.model_path and config.model_path.suffix != ".keras",
            f"--model-path: expected a name ending in .keras, got {config.model_path}",
        ),
    )


def refuse(*clashes):
    """Raise ConfigError with the message of the first of (whether it is so, message), if any."""
    for is_so, message in clashes:
        if is_so:
            raise ConfigError(message)


def choose_micro_batch(config, is_on_gpu):
    """Set micro_batch_size where the user did not: to the batch, but on a CPU to the largest even
    divisor of it, if any, that is 16 or more and needs about as much memory as 32 pictures do in
    the default model. Parts that large keep all cores busy, and memory is for one.
    """
    tokens = config.num_patches
    numbers = tokens * (config.num_heads * tokens + 16 * config.projection_dim)
    limit = max(32 * 1_843_200 // (config.transformer_layers * numbers), 16)
    sizes = [n for n in range(16, limit + 1, 2) if config.batch_size % n == 0]
    largest = config.batch_size if is_on_gpu else max(sizes, default=config.batch_size)
    config.micro_batch_size = config.micro_batch_size or largest


def accept_cpu(is_allowed):
    """There is no GPU: end the process with exit code 2 in an image that is made for one, unless
    the user said to go on."""
    if os.environ.get("VIT_EXPECT_GPU") == "1":
        if not is_allowed and os.environ.get("JAX_PLATFORMS") != "cpu":
            remedy = "docker run --gpus all (on a Jetson --runtime nvidia), or --allow-cpu"
            fail(f"expected a GPU, for which this image is made, got none: {remedy}")
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX looks for it and prints a traceback


def check_writable(**paths):
    """End the process at once, not after hours, where a result could not be written.

    paths: by field names. Their folders are created.
    """
    for field, path in paths.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
        except OSError as error:
            expected = "expected a file that can be written"
            fail(f"{name_flag(field)}: {expected}, got {path}: {error.strerror}")
