"""Architectures and recipes: what a name stands for, what they cost, and that they train."""

import json
import re

import h5py
import numpy as np
import pytest
from conftest import SMALL, read_last_record, refusal, run_code, run_vit

# ---- names -------------------------------------------------------------------------------------


def parse(*words):
    import vit

    return vit.parse_config(words)


def test_flags_win_over_a_variant_that_over_a_recipe():
    config = parse("--recipe", "deit")
    assert (config.variant, config.projection_dim, config.patch_size) == ("Ti/4", 192, 4)
    assert (config.learning_rate, config.batch_size, config.mixup) == (5e-4, 1024, 0.8)
    assert (config.mlp_head_units, config.head_dim, config.pool) == ((), 64, "token")
    config = parse("--recipe=deit", "--variant=S/8", "--num_heads", "3", "--mixup=0", "--pool=mean")
    assert (config.variant, config.projection_dim, config.patch_size) == ("S/8", 384, 8)
    assert (config.num_heads, config.mixup, config.cutmix, config.pool) == (3, 0, 1.0, "mean")


def test_a_flag_that_repeats_a_default_wins_too():
    config = parse("--recipe=tiny", "--learning-rate=0.001", "--no-decay-kernels-only")
    assert config.learning_rate == 0.001 and not config.decay_kernels_only
    config = parse("--mlp-head-units", "8", "4", "--recipe=tiny")
    assert config.mlp_head_units == (8, 4) and config.pool == "attention"


def test_what_is_typed_voids_what_it_makes_meaningless():
    config = parse("--recipe=tiny", "--transformer-units", "64", "128")
    assert (config.transformer_units, config.mlp_ratio) == ((64, 128), None)
    config = parse("--recipe", "tiny", "--schedule", "constant")
    assert (config.schedule, config.warmup_epochs) == ("constant", 0)
    assert parse("--recipe=tiny", "--schedule=cosine").warmup_epochs == 5
    config = parse("--recipe=deit", "--no-augment")
    assert (config.policy, config.erasing, config.mixup, config.cutmix) == ("none", 0, 0, 0)


def test_fewer_epochs_of_a_recipe_warm_up_as_much_less():
    assert parse("--recipe=tiny", "--num-epochs", "10").warmup_epochs == 0.5
    assert parse("--recipe=mae", "--num_epochs=30").warmup_epochs == 2
    config = parse("--recipe=tiny", "--num-epochs=10", "--warmup-epochs=3")
    assert config.warmup_epochs == 3
    assert parse("--recipe=tiny", "--num-epochs=10", "--schedule=constant").warmup_epochs == 0
    assert parse("--recipe=keras-io", "--num-epochs=10").warmup_epochs == 0


def test_a_variant_is_that_of_the_literature_whatever_the_recipe():
    config = parse("--recipe=tiny", "--variant=S/16", "--image-size=224")
    assert (config.stem, config.position, config.pool) == ("patch", "learned", "token")


def test_the_default_recipe_changes_nothing():
    assert parse("--recipe=keras-io") == parse()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--recipe=fast"], "expected one of keras-io, deit, mae, small, tiny; got fast"),
        (
            ["--variant=XL/16"],
            "expected SIZE/PATCH such as B/16, with Ti, S, B, L, H, g; got XL/16",
        ),
        (["--variant", "B"], "expected SIZE/PATCH such as B/16"),
        (["--variant", "B/16"], "--image-size: expected a multiple of --patch-size 16, got 72"),
        (["--stem=conv"], "--stem conv: expected --patch-size 2, 4, 8 or 16, got 6"),
        (
            ["--position=sincos", "--projection-dim=62"],
            "expected --projection-dim to be a multiple",
        ),
        (["--warmup-epochs=3"], "expected --schedule cosine, got constant"),
        (["--no-augment", "--mixup=0.8"], "--no-augment: expected no --policy"),
        (["--schedule=cosine", "--warmup-epochs=10"], "expected less than --num-epochs 10"),
        (["--mixup=0.2", "--batch-size=25"], "expected an even --batch-size"),
        (["--mlp-ratio=4", "--transformer-units", "8", "64"], "none beside --transformer-units"),
        (["--rand-magnitude=11"], "--rand-magnitude: expected 0 to 10, got 11"),
    ],
)
def test_clashes_are_one_line(capsys, flags, told):
    assert told in refusal(lambda flags: parse(*flags), flags, capsys)


# ---- what the models are -----------------------------------------------------------------------

COUNT = """
import json, math, keras, vit
from harness import engine
vit.GlorotUniform.__call__ = lambda self, shape, dtype=None: keras.ops.zeros(shape, dtype)
counts = {}
for name in ("Ti/16", "S/16", "B/16", "L/16"):
    config = vit.parse_config(["--variant", name, "--image-size", "224"])
    config.num_classes, config.input_shape = 1000, (224, 224, 3)
    model = vit.create_vit_classifier(config)
    counts[name] = [model.count_params() - 6, engine.count_flops(model)]
    del model
for name in ("small", "tiny"):
    model = vit.create_vit_classifier(vit.parse_config(["--recipe", name]))
    counts[name] = [model.count_params() - 6, engine.count_flops(model)]
print(json.dumps(counts))
"""


def test_parameters_and_flops_are_the_literatures(tmp_path):
    """Parameters as DeiT's and ViT's papers and timm's models have them (6 more are the pixels'
    mean and variance); ViT-B/16 has 17.6 G multiply-accumulates, DeiT-Ti 1.3 and DeiT-S 4.6."""
    counts = run_code(tmp_path, "jax", COUNT)
    assert [counts[name][0] for name in ("Ti/16", "S/16", "B/16", "L/16")] == [
        *(5_717_416, 22_050_664, 86_567_656, 304_326_632)
    ]
    giga = [counts[name][1] / 2e9 for name in ("Ti/16", "S/16", "B/16")]
    assert giga == pytest.approx([1.3, 4.6, 17.6], abs=0.06)
    assert counts["small"][0] <= 4_000_000 and counts["tiny"][0] <= 350_000


SHARED = """
import keras
from harness import engine
first, second = keras.Input((8,)), keras.Input((8,))
dense, block = keras.layers.Dense(4), keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
total = block(dense(first)) + block(dense(second))
print(engine.count_flops(keras.Model([first, second], total)))
"""


def test_a_layer_that_is_used_twice_counts_twice(tmp_path):
    assert run_code(tmp_path, "jax", SHARED) == 2 * 2 * (8 * 4 + 4 * 3)


def test_sincos_positions():
    import vit

    grid = vit.embed_positions(4, 8).reshape(4, 4, 8)
    assert (grid[:, 1, :4] == grid[0, 1, :4]).all() and (grid[1, :, 4:] == grid[1, 0, 4:]).all()
    assert grid[2, 3] == pytest.approx(
        [*np.sin([3, 0.03]), *np.cos([3, 0.03]), *np.sin([2, 0.02]), *np.cos([2, 0.02])], abs=1e-6
    )


CHOICES = """
import json, keras, numpy as np, vit
pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype("uint8")
small = ["--image-size=32", "--patch-size=8", "--projection-dim=32", "--num-heads=2",
         "--transformer-layers=2", "--mlp-head-units=64"]
told = {{}}
for flags in {choices!r}:
    model = vit.create_vit_classifier(vit.parse_config(small + flags))
    logits = keras.ops.convert_to_numpy(model(pictures))
    trained = keras.ops.convert_to_numpy(model(pictures, training=True))
    model.save("model.keras")
    again = keras.ops.convert_to_numpy(keras.saving.load_model("model.keras")(pictures))
    told[" ".join(flags)] = [logits.tolist(), trained.shape, float(abs(again - logits).max()),
                             sorted({{v.name for v in model.trainable_variables}})]
print(json.dumps(told))
"""
FLAGS = [
    *(["--stem=conv"], ["--pool=mean"], ["--pool=token"], ["--pool=attention"]),
    *(["--position=sincos"], ["--position=sincos", "--pool=token"], ["--mlp-ratio=3"]),
    *(["--head-dim=8"], ["--drop-path=0.5"], ["--layer-scale=0.1"]),
    ["--stem=conv", "--patch-size=2", "--pool=token", "--attention-dropout=0"],
]


def test_every_choice_is_the_same_model_on_every_backend(tmp_path):
    """Equal logits from equal seeds; a saved model gives the same; training mode runs."""
    ours, theirs = (
        run_code(tmp_path, backend, CHOICES.format(choices=FLAGS)) for backend in ("jax", "torch")
    )
    different = set()
    for flags, (logits, shape, saved, names) in ours.items():
        assert np.array(logits) == pytest.approx(np.array(theirs[flags][0]), abs=2e-5), flags
        assert shape == [3, 100] and saved < 1e-6 and theirs[flags][2] < 1e-6
        assert ("position_embedding" in names) == ("sincos" not in flags)
        assert ("class_token" in names) == ("token" in flags)
        different.add(json.dumps(np.round(logits, 4).tolist()))
    assert len(different) == len(FLAGS)


CONVOLUTION = """
import json, keras, numpy as np, vit
ops, images = keras.ops, np.random.default_rng(0).standard_normal((2, 8, 6, 5)).astype("float32")
far = []
for halve in (True, False):
    layer = vit.Convolution(7, halve=halve)
    layer.build(images.shape)
    layer.bias.assign(np.linspace(-1, 1, 7))
    x = ops.conv(images, layer.kernel, padding="same", data_format="channels_last") + layer.bias
    if halve:
        x = ops.max_pool(ops.relu(x), 2, 2, data_format="channels_last")
    far.append(float(ops.max(ops.abs(layer(images) - x))))
sizes = [vit.create_vit_classifier(vit.parse_config(["--recipe", name])).count_params()
         for name in ("tiny", "small")]
print(json.dumps([far, sizes]))
"""


def test_convolution_is_keras_and_the_recipes_are_small(tmp_path, backend):
    far, (tiny, small) = run_code(tmp_path, backend, CONVOLUTION)
    assert max(far) < 1e-5
    assert tiny <= 350_000 and small <= 4_000_000


# ---- that they train ---------------------------------------------------------------------------

STRONG = (
    *("--recipe=mae", *SMALL, "--num-epochs=3", "--warmup-epochs=1", "--ema=0.9"),
    *("--learning-rate=0.001", "--learning-rate-batch=50", "--drop-path=0", "--head-dim=16"),
    *("--clip-norm=0.5", "--stem=conv", "--pool=attention", "--layer-scale=0.1"),
)


def read_weights(path):
    found = []
    with h5py.File(path) as file:
        file["layers"].visititems(lambda _, item: found.append(item))
        return [item[()] for item in found if isinstance(item, h5py.Dataset)]


def test_a_strong_recipe_is_the_same_in_parts_and_through_fit(tmp_path, backend):
    """All of augmentation, soft labels, schedule, clipping, decay mask and average: parts of a
    batch, on this project's compiled steps, train as whole batches do under Keras' fit; and leave
    the same averages, after the last epoch, without --best-weights."""
    found, kept = [], []
    for flag in ("--micro-batch-size=10", "--trainer=fit"):
        path = tmp_path / f"{len(found)}.weights.h5"
        flags = ["--no-best-weights", flag, f"--checkpoint-path={path}"]
        done = run_vit(tmp_path, *STRONG, *flags, backend=backend)
        assert done.returncode == 0, done.stderr
        found.append(read_last_record(tmp_path))
        kept.append(read_weights(path))
    ours, theirs = found
    for name in ("loss", "val_loss"):
        assert ours["quality"][name] == pytest.approx(theirs["quality"][name], rel=2e-3), name
    for name in ("accuracy", "val_accuracy", "test_top5_accuracy"):
        assert ours["quality"][name] == pytest.approx(theirs["quality"][name], abs=0.03), name
    assert ours["config"]["recipe"] == "mae" and ours["config"]["weight_decay"] == 0.3
    assert len(kept[0]) == len(kept[1]) > 10
    for compiled, fit in zip(*kept):
        np.testing.assert_allclose(compiled, fit, rtol=1e-3, atol=2e-4)


MUON = """
import json, keras, numpy as np, vit
from harness.optimizer import Muon, flatten

def create():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8,)), keras.layers.Dense(24, "gelu"),
        keras.layers.Dense(6, "gelu"), keras.layers.Dense(5, name="logits")])

numbers, choices = np.random.default_rng(0), {"weight_decay": 0.1, "exclude_layers": ["logits"]}
x, y, models = numbers.normal(size=(4, 32, 8)), numbers.integers(5, size=(4, 32)), []
for optimizer in (Muon(0.01, **choices), keras.optimizers.Muon(0.01, **choices)):
    models.append(create())
    models[-1].compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for batch, labels in zip(x, y):
        models[-1].train_on_batch(batch, labels)
apart = [float(np.abs(a - b).max()) for a, b in zip(*(m.get_weights() for m in models))]
far = float(np.abs(models[0].get_weights()[0] - create().get_weights()[0]).max())

config = vit.parse_config(["--recipe=tiny", "--projection-dim=32"])
model = vit.create_vit_classifier(config)
optimizer = vit.create_optimizer(config, model, 10)
optimizer.build(model.trainable_variables)
moved = [v for v in model.trainable_variables if optimizer.is_matrix(v)]
before = [keras.ops.convert_to_numpy(v) for v in moved]
gradients = [keras.ops.convert_to_tensor(numbers.normal(size=v.shape).astype("f")) for v in moved]
optimizer.update_matrices(gradients, moved, 1.0)
stretched = {}
for old, variable in zip(before, moved):
    shape = flatten(variable)
    step = (old - keras.ops.convert_to_numpy(variable)).reshape(shape) / (0.2 * max(shape) ** 0.5)
    values = np.linalg.svd(step, compute_uv=False)
    key = str(variable.path.split("/")[-2]) + str(shape)
    stretched[key] = [float(np.quantile(values, 0.1)), float(values.max())]
print(json.dumps([apart, far, stretched]))
"""


def test_muon(tmp_path, backend):
    """It is Keras' own where that can be used, and makes orthogonal steps of attention's
    projections and of convolutions, too."""
    apart, far, stretched = run_code(tmp_path, backend, MUON)
    assert max(apart) < 1e-5 and far > 0.01
    assert {re.sub(r"_\d+\(", "(", name) for name in stretched} == {
        *("convolution(27, 8)", "convolution(72, 16)", "convolution(144, 32)"),
        *("query(32, 128)", "key(32, 128)", "value(32, 128)", "attention_output(128, 32)"),
        "dense(32, 32)",
    }
    for smallest, largest in stretched.values():
        assert 0.3 < smallest < largest < 1.4  # the iteration does not make them just 1


AVERAGE = """
import json, keras, numpy as np, vit
config = vit.parse_config(["--ema=0.5", "--image-size=32", "--patch-size=8"])
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
optimizer = vit.create_optimizer(config, model, 10)
optimizer.build(model.trainable_variables)
model.optimizer = optimizer
weight, average = model.trainable_variables[0], optimizer._model_variables_moving_average[0]
weight.assign([[1.0], [2.0]]), average.assign([[3.0], [4.0]])
callback, seen = vit.AverageWeights(), []
callback.set_model(model)
for step in ("on_test_begin", "on_epoch_end", "on_epoch_begin", "on_epoch_end"):
    getattr(callback, step)(*([] if "test" in step else [0]))
    both = [keras.ops.convert_to_numpy(v).ravel().tolist() for v in (weight, average)]
    seen.append(both)
print(json.dumps(seen))
"""


def test_the_average_is_lent_for_validation(tmp_path, backend):
    plain, averaged = [[1, 2], [3, 4]], [[3, 4], [1, 2]]
    assert run_code(tmp_path, backend, AVERAGE) == [averaged, averaged, plain, averaged]


def test_the_schedule(tmp_path):
    code = """
import json, keras, vit
flags = ["--schedule=cosine", "--num-epochs=10", "--warmup-epochs=2", "--learning-rate=0.004"]
flags += ["--learning-rate-batch=512", "--batch-size=256", "--final-learning-rate=0.0001"]
flags += ["--decay-kernels-only", "--weight-decay=0.1", "--pool=token", "--layer-scale=1"]
config = vit.parse_config(flags)
model = vit.create_vit_classifier(config)
optimizer = vit.create_optimizer(config, model, 5)
optimizer.build(model.trainable_variables)
rates = [float(optimizer._learning_rate(step)) for step in (0, 5, 10, 30, 50)]
decayed = {v.name for v in model.trainable_variables if optimizer._use_weight_decay(v)}
others = {v.name for v in model.trainable_variables if not optimizer._use_weight_decay(v)}
print(json.dumps([rates, sorted(decayed), sorted(others)]))
"""
    rates, decayed, others = run_code(tmp_path, "jax", code)
    assert rates == pytest.approx([0, 0.001, 0.002, 0.00105, 0.0001])
    assert decayed == ["kernel"]
    expected = ["beta", "bias", "class_token", "gamma", "layer_scale", "position_embedding"]
    assert others == expected
