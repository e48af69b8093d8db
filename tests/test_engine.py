"""The compiled steps against Keras' own `fit`, and the device's pictures against a slow reference.

Each check runs on both backends, in a child process."""

import numpy as np
import pytest
from conftest import BACKENDS, run_code
from scipy.ndimage import map_coordinates

TRAIN = """
import json, os, numpy as np, keras, vit
from harness import augment, data, engine, telemetry
backend = keras.backend.backend()
flags = dict(transformer_layers=1, mlp_head_units=(32,), projection_dim=16, num_heads=2,
             image_size=32, patch_size=8, batch_size=20, seed=1)
config = vit.ViTConfig(**flags, dropout=0, attention_dropout=0, head_dropout=0)
pictures = data.load_dataset("synthetic", train_images=200, test_images=50, validation_split=0)
x, y = pictures.x_train, pictures.y_train

def create(config=config, optimizer=None):
    model = vit.create_vit_classifier(config, mean=100.0, variance=3600.0)
    model.compile(
        optimizer=optimizer or keras.optimizers.AdamW(1e-3, weight_decay=0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")])
    return model

def split(rows, parts=2):  # of each batch
    return rows.reshape(len(rows), parts, -1, *rows.shape[2:])

def train(model, order, apply=None, draws=None, parts=2):
    engine.build_state(model, 20)
    training = engine.compile_train_steps(model, x, y, apply)
    losses = []
    for row in range(len(order)):
        rows = slice(row, row + 1)
        pictures = None if draws is None else split(draws[rows], parts)
        found = training.run(split(order[rows], parts), pictures)
        losses += [float(value) for value in found]
    training.sync()
    return losses, training

def train_on_batches(model, order):
    # The same through Keras, whose figures are each step's own: running means of both.
    steps = [model.train_on_batch(x[i], y[i], return_dict=True) for i in order]
    return [[float(np.mean([step[name] for step in steps[: n + 1]])) for n in range(len(steps))]
            for name in ("loss", "accuracy")]

order = np.random.default_rng(0).permutation(200).astype("int32").reshape(10, 20)
"""

AGAINST_FIT = (
    TRAIN
    + """
compiled, plain = create(), create()
losses, _ = train(compiled, order, parts={parts})
plain_losses, plain_accuracies = train_on_batches(plain, order)
weights = [np.abs(a - b).max() for a, b in zip(compiled.get_weights(), plain.get_weights())]
accuracies = [float(compiled.get_metrics_result()["accuracy"]), plain_accuracies[-1]]
print(json.dumps([losses, plain_losses, float(max(weights)), *accuracies]))
"""
)


@pytest.mark.parametrize("parts", [1, 5])
def test_compiled_steps_do_what_fit_does(tmp_path, backend, parts):
    """Running means of the loss agree to 1e-5 over ten steps of AdamW from equal weights, whether
    a batch is computed at once or part by part."""
    code = AGAINST_FIT.replace("{parts}", str(parts))
    losses, plain, difference, accuracy, plain_accuracy = run_code(tmp_path, backend, code)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert difference < 2e-4 and accuracy == pytest.approx(plain_accuracy)


EXCHANGED = (
    TRAIN
    + """
schedule = keras.optimizers.schedules.CosineDecay(0.01, 10)
found = []
for make in (
    lambda: keras.optimizers.SGD(schedule, momentum=0.9),
    lambda: keras.optimizers.AdamW(schedule, weight_decay=0.1, global_clipnorm=0.1),
    lambda: keras.optimizers.Adam(schedule),
):
    compiled, plain = create(optimizer=make()), create(optimizer=make())
    losses, _ = train(compiled, order[:4])
    plain_losses, _ = train_on_batches(plain, order[:4])
    found.append([losses, plain_losses, int(compiled.optimizer.iterations)])
print(json.dumps(found))
"""
)


def test_another_optimiser_and_a_schedule(tmp_path, backend):
    for losses, plain, iterations in run_code(tmp_path, backend, EXCHANGED):
        assert losses == pytest.approx(plain, rel=1e-5) and iterations == 4


AGAIN = (
    TRAIN
    + """
compiled = []
if backend == "jax":
    import jax
    def hear(event, seconds, **about):
        if "backend_compile" in event:
            compiled.append(event)
    jax.monitoring.register_event_duration_secs_listener(hear)
def count():
    if backend == "jax":
        return len(compiled)
    import torch
    return torch._dynamo.utils.counters["aot_autograd"]["total"]

model = create(vit.ViTConfig(**flags))
apply, draws = augment.apply_affine, augment.draw_affine(200, 0, 0).reshape(10, 20, 2, 2)
_, training = train(model, order, apply, draws)
first, sizes = count(), []
for epoch in range(1, 50):
    model.reset_metrics()
    for row in range(0, 10):
        training.run(split(order[row:row + 1]), split(draws[row:row + 1]))
    training.sync()
    sizes.append(telemetry.host_rss_bytes())
print(json.dumps([first, count(), max(sizes[-10:]) - max(sizes[5:15])]))
"""
)


def test_nothing_compiles_or_grows_after_the_first_epoch(tmp_path, backend):
    first, last, growth = run_code(tmp_path, backend, AGAIN)
    assert first == last > 0
    assert growth < 30e6  # bytes, over 35 epochs; the model and its optimiser hold 0.3 MB


EVALUATE = (
    TRAIN
    + """
model = create()
engine.build_state(model, 20)
forward = engine.compile_forward(model)
ours = engine.evaluate(model, forward, x[:130], y[:130], 50)
keras_own = model.evaluate(x[:130], y[:130], batch_size=130, verbose=0, return_dict=True)
print(json.dumps([ours, {k: float(v) for k, v in keras_own.items()}]))
"""
)


def test_evaluation_is_exact_with_a_remainder(tmp_path, backend):
    ours, keras_own = run_code(tmp_path, backend, EVALUATE)
    assert ours == pytest.approx(keras_own, rel=1e-5)


MASKS = """
import json, zlib, numpy as np, keras
from harness.dropout import Dropout
keras.utils.set_random_seed(7)
layer, ones = Dropout(0.2), keras.ops.ones((50, 40, 30))
masks = [np.asarray(keras.ops.convert_to_numpy(layer(ones, training=True)) == 0) for _ in range(3)]
print(json.dumps([zlib.crc32(np.stack(masks).tobytes()), [float(m.mean()) for m in masks],
    [float((a & b).mean()) for a, b in zip(masks, masks[1:])],
    [float((masks[0] & np.roll(masks[0], 1, axis)).mean()) for axis in range(3)],
    float(keras.ops.max(layer(ones, training=True))), float(keras.ops.min(layer(ones)))]))
"""


def test_dropout_masks(tmp_path):
    """60,000 elements: a share of 0.2 has a standard error of 0.0016, one of 0.04 of 0.0008."""
    (checksum, shares, repeats, neighbours, scale, idle), other = (
        run_code(tmp_path, backend, MASKS) for backend in BACKENDS
    )
    assert checksum == other[0]
    assert shares == pytest.approx([0.2] * 3, abs=0.007)
    assert repeats + neighbours == pytest.approx([0.04] * 5, abs=0.0035)
    assert scale == pytest.approx(1.25) and idle == 1.0


AUGMENT = """
import json, numpy as np, keras
from harness import augment, engine
images = np.random.default_rng(0).integers(0, 256, (6, 20, 32, 3)).astype("uint8")
maps = augment.draw_affine(6, 5, 2, rotation=0.1)
result = engine.compile_function(augment.apply_affine)(images, maps)
np.save("images.npy", images), np.save("maps.npy", maps)
np.save("result.npy", keras.ops.convert_to_numpy(result))
print(json.dumps([str(keras.backend.standardize_dtype(result.dtype))]))
"""


def test_affine_against_scipy(tmp_path, backend):
    assert run_code(tmp_path, backend, AUGMENT) == ["float32"]
    images, maps, result = (np.load(tmp_path / f"{n}.npy") for n in ("images", "maps", "result"))
    y, x = np.mgrid[:20, :32].reshape(2, -1) - np.array([[9.5], [15.5]])
    for image, (to_x, to_y), got in zip(images.astype("float64"), maps.astype("float64"), result):
        places = [to_y[0] * x + to_y[1] * y + 9.5, to_x[0] * x + to_x[1] * y + 15.5]
        for channel in range(3):
            expected = map_coordinates(image[..., channel], places, order=1, mode="reflect")
            assert np.abs(got[..., channel].ravel() - expected).max() < 0.05  # of 255


def test_draws():
    from harness.augment import draw_affine

    maps = draw_affine(2000, seed=1, epoch=0)
    assert maps.shape == (2000, 2, 2) and maps.dtype == np.float32
    assert (maps == draw_affine(2000, 1, 0)).all() and (maps != draw_affine(2000, 1, 1)).any()
    mirrored = np.linalg.det(maps) < 0
    assert 900 < mirrored.sum() < 1100
    zoom_x = np.hypot(maps[:, 0, 0], maps[:, 1, 0])
    angle = np.arctan2(maps[:, 1, 0], np.abs(maps[:, 0, 0])) / (2 * np.pi)
    assert 0.8 <= zoom_x.min() < 0.81 and 1.19 < zoom_x.max() <= 1.2 + 1e-6
    assert np.abs(angle).max() <= 0.02 + 1e-6 and np.abs(angle).max() > 0.019


def test_a_torch_older_than_standalone_compile(tmp_path):
    code = """
import json, torch
from harness import engine
import torch._inductor
del torch._inductor.standalone_compile
def step(x, state):
    state.copy_(state + 1)
    return [x * 2 + state]
x, state = torch.arange(3.0), torch.ones(())
compiled = engine._compile_torch(step, x, state)
print(json.dumps([compiled(x, state)[0].tolist(), compiled(x, state)[0].tolist(), float(state)]))
"""
    assert run_code(tmp_path, "torch", code) == [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0], 3.0]
