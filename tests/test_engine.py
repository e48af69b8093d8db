"""The compiled steps against Keras' own `fit`.

Each check runs on both backends, in a child process."""

import pytest
from conftest import BACKENDS, run_code, run_python

TRAIN = """
import json, os, numpy as np, keras, vit
from harness import augment, data, engine, telemetry
from harness.dropout import Dropout
from harness.optimizer import Muon
backend = keras.backend.backend()
flags = dict(transformer_layers=1, mlp_head_units=(32,), projection_dim=16, num_heads=2,
             image_size=32, patch_size=8, batch_size=20, seed=1)
config = vit.ViTConfig(**flags, dropout=0, attention_dropout=0, head_dropout=0)
pictures = data.load_dataset("synthetic", train_images=200, test_images=50, validation_split=0)
x, y = pictures.x_train, pictures.y_train

def create(optimizer=None, layers=()):
    if layers:  # which compile in less time
        model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(), *layers, keras.layers.Dense(100)])
    else:
        model = vit.create_vit_classifier(config, mean=100.0, variance=3600.0)
    model.compile(
        optimizer=optimizer or keras.optimizers.AdamW(1e-3, weight_decay=0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")])
    return model

def split(rows, parts=2):  # of each batch
    return rows.reshape(len(rows), parts, -1, *rows.shape[2:])

def train(model, order, apply=None, draws=None, parts=2, at_once=1):
    engine.build_state(model, 20)
    training = engine.compile_train_steps(model, apply)
    training.load(x, y)
    losses = []
    for row in range(0, len(order), at_once):
        rows = slice(row, row + at_once)
        pictures = {name: split(drawn[rows], parts) for name, drawn in (draws or {}).items()}
        found = training.run(split(order[rows], parts), pictures)
        losses += found().tolist()
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
schedule = keras.optimizers.schedules.CosineDecay(0.01, 10)
found = []
for make, steps in (
    (lambda: keras.optimizers.AdamW(1e-3, weight_decay=0.1), 10),
    (lambda: keras.optimizers.SGD(schedule, momentum=0.9), 4),
    (lambda: keras.optimizers.AdamW(schedule, weight_decay=0.1, clipnorm=0.1), 4),
    (lambda: keras.optimizers.Muon(1e-3, weight_decay=0.1), 4),
    (lambda: Muon(1e-3, weight_decay=0.1, adam_weight_decay=0.1, nesterov=False, rms_rate=None), 4),
    (lambda: Muon(
        schedule, weight_decay=0.1, adam_weight_decay=0.1, global_clipnorm=0.1, use_ema=True,
        ema_momentum=0.5,
    ), 4),
    (lambda: keras.optimizers.AdamW(
        schedule, weight_decay=0.1, global_clipnorm=0.1, use_ema=True, ema_momentum=0.5
    ), 4),
):
    compiled, plain = create(optimizer=make()), create(optimizer=make())
    losses, _ = train(compiled, order[:steps], parts=5)
    plain_losses, plain_accuracies = train_on_batches(plain, order[:steps])
    weights = [np.abs(a - b).max() for a, b in zip(compiled.get_weights(), plain.get_weights())]
    accuracies = [float(compiled.get_metrics_result()["accuracy"]), plain_accuracies[-1]]
    averages = []
    for model in (compiled, plain) if compiled.optimizer.use_ema else ():
        kept = model.optimizer._model_variables_moving_average
        averages.append([float(keras.ops.sum(keras.ops.abs(v))) for v in kept])
    iterations = int(compiled.optimizer.iterations)
    found.append([losses, plain_losses, float(max(weights)), accuracies, iterations, averages])
print(json.dumps(found))
"""
)


def test_compiled_steps_do_what_fit_does(tmp_path, backend):
    """Running means of the loss agree to 1e-5 over ten steps of AdamW from equal weights, each
    batch computed part by part; so do those of other optimisers, with a schedule."""
    found = run_code(tmp_path, backend, AGAINST_FIT)
    for losses, plain, _, _, iterations, averages in found:
        assert losses == pytest.approx(plain, rel=1e-5) and iterations == len(plain)
        assert averages == [] or averages[0] == pytest.approx(averages[1], rel=1e-3, abs=1e-3)
    assert averages != []  # of the last one
    accuracy, plain_accuracy = found[0][3]
    assert accuracy == pytest.approx(plain_accuracy)
    differences = [case[2] for case in found]
    assert differences.pop(3) < 1e-2  # Keras' own Muon: its steps magnify rounding
    assert max(differences) < 2e-4


WHOLE = (
    TRAIN
    + """
schedule = keras.optimizers.schedules.CosineDecay(0.0, 8, warmup_target=0.01, warmup_steps=3)
compiled, together, loaded, plain = (
    create(keras.optimizers.AdamW(schedule, weight_decay=0.1), [keras.layers.Dense(16, "gelu")])
    for _ in range(4))
for model in (together, loaded, plain):
    model.set_weights(compiled.get_weights())
losses, _ = train(compiled, order, parts=1)
# Several steps in a call, as on a GPU; PyTorch may have a remainder.
at_once, _ = train(together, order, parts=1, at_once={"torch": 4}.get(backend, 5))
plain_losses, _ = train_on_batches(plain, order)
engine.build_state(loaded, 20)
training, one_by_one = engine.compile_train_steps(loaded), []
for rows in order:  # as a loader does
    training.load(x[rows], y[rows])
    found = training.run(np.arange(20, dtype="int32").reshape(1, 1, 20), {})
    one_by_one += found().tolist()
forward = engine.compile_forward(plain)
ours = engine.evaluate(plain, forward, x[:130], y[:130], 50)
keras_own = plain.evaluate(x[:130], y[:130], batch_size=130, verbose=0, return_dict=True)
keras_own = {k: float(v) for k, v in keras_own.items()}
print(json.dumps([losses, at_once, one_by_one, plain_losses, ours, keras_own]))
"""
)


def test_whole_batches_one_that_is_loaded_and_a_remainder(tmp_path, backend):
    losses, at_once, one_by_one, plain, ours, keras_own = run_code(tmp_path, backend, WHOLE)
    assert losses == one_by_one == pytest.approx(plain, rel=1e-5)
    assert at_once == pytest.approx(losses, rel=1e-6)
    assert ours == pytest.approx(keras_own, rel=1e-5)


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

model = create(layers=[keras.layers.Dense(16, "gelu"), Dropout(0.1)])
draw, apply = augment.create_augmentation(config, 200, 32, [127] * 3)
draws = {name: drawn.reshape(10, 20, *drawn.shape[1:]) for name, drawn in draw(0).items()}
_, training = train(model, order, apply, draws)
model.reset_metrics()
first, sizes = count(), []
for epoch in range(1, 50):
    for row in range(0, 10):
        rows = slice(row, row + 1)
        drawn = {name: split(every[rows]) for name, every in draws.items()}
        training.run(split(order[rows]), drawn)
    training.sync()
    model.reset_metrics()
    sizes.append(telemetry.host_rss_bytes())
print(json.dumps([first, count(), max(sizes[-10:]) - max(sizes[5:15])]))
"""
)


def test_nothing_compiles_or_grows_after_the_first_epoch(tmp_path, backend):
    first, last, growth = run_code(tmp_path, backend, AGAIN)
    assert first == last > 0
    assert growth < 30e6  # bytes, over 35 epochs; the model and its optimiser hold 0.6 MB


MASKS = """
import json, zlib, numpy as np, keras, vit
from harness.dropout import Dropout, DropPath
keras.utils.set_random_seed(7)
layer, ones = Dropout(0.2), keras.ops.ones((50, 40, 30))
masks = [np.asarray(keras.ops.convert_to_numpy(layer(ones, training=True)) == 0) for _ in range(3)]
spectra = [np.fft.rfft((m.ravel() - 0.2) / 0.4) for m in masks]
sums = [np.fft.irfft(a * b.conj()) / masks[0].size**0.5 for a in spectra for b in spectra]
sums[0][0] = sums[4][0] = sums[8][0] = 0  # each with itself, not moved
rows = DropPath(0.3)(keras.ops.ones((5000, 3, 4)), training=True)
rows = keras.ops.convert_to_numpy(rows).reshape(5000, 12)
config = vit.parse_config(["--drop-path=0.5", "--transformer-layers=3"])
paths = [layer.rate for layer in vit.create_vit_classifier(config).layers
         if isinstance(layer, DropPath)]
assert paths == [0, 0, 0.25, 0.25, 0.5, 0.5]
assert (rows.min(1) == rows.max(1)).all() and np.allclose(rows[rows > 0], 1 / 0.7)
assert abs((rows == 0).mean() - 0.3) < 0.03  # whole pictures, less in the blocks before the last
print(json.dumps([zlib.crc32(np.stack(masks).tobytes()), [float(m.mean()) for m in masks],
    [float((a & b).mean()) for a, b in zip(masks, masks[1:])],
    [float((masks[0] & np.roll(masks[0], 1, axis)).mean()) for axis in range(3)],
    max(float(abs(s).max()) for s in sums),
    float(keras.ops.max(layer(ones, training=True))), float(keras.ops.min(layer(ones)))]))
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_too_small_for_float32_are_zero(tmp_path, backend):
    """In all threads: a CPU takes many times as long for denormal numbers."""
    code = """
import json, keras, numpy as np
from harness import engine
x, y = np.full((2, 2**22), [[1e-30], [1e-9]], "float32")
product = engine.wait(engine.compile_function(lambda x, y: x * y)(x, y))
print(json.dumps(int(np.count_nonzero(keras.ops.convert_to_numpy(product).view("int32")))))
"""
    threads = {"OMP_NUM_THREADS": "2", "KERAS_BACKEND": backend}
    done = run_python(tmp_path, "-c", code, **threads)
    assert done.stdout.strip() == "0", done.stderr


def test_dropout_masks(tmp_path):
    """60,000 elements: a share of 0.2 has a standard error of 0.0016, one of 0.04 of 0.0008. Of the
    540,000 sums over a mask and itself or another, moved, the largest is a normal one's."""
    (checksum, shares, repeats, neighbours, largest, scale, idle), other = (
        run_code(tmp_path, backend, MASKS) for backend in BACKENDS
    )
    assert checksum == other[0]
    assert shares == pytest.approx([0.2] * 3, abs=0.007)
    assert repeats + neighbours == pytest.approx([0.04] * 5, abs=0.0035)
    assert largest < 6
    assert scale == pytest.approx(1.25) and idle == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_in_parts_is_that_of_the_whole_batch(tmp_path, backend):
    """The same of it is dropped, also where the batch cannot be divided as asked, and its
    derivative by hand on JAX is the one that JAX finds."""
    code = """
import json, keras, numpy as np
from keras import ops
from harness.dropout import MultiHeadAttention
backend = keras.backend.backend()
if backend == "jax":
    import jax
else:
    import torch

def attend(parts, batch, rate):
    keras.utils.set_random_seed(7)
    MultiHeadAttention.parts = parts
    layer = MultiHeadAttention(2, 4, dropout=rate)
    x, weight = keras.random.normal((batch, 5, 8)), keras.random.normal((batch, 5, 8))
    layer.build(x.shape, x.shape)
    *trained, seeds = [[v.value for v in group] for group in (
        layer.trainable_variables, layer.non_trainable_variables)]

    def compute(given):
        *weights, x = given
        found, _ = layer.stateless_call(weights, seeds, x, x, training=True)
        return ops.sum(found * weight), found

    given = [*trained[0], x]
    if backend == "jax":
        gradients, found = jax.grad(compute, has_aux=True)(given)
    else:
        given = [value.detach().requires_grad_() for value in given]
        total, found = compute(given)
        gradients = torch.autograd.grad(total, given)
    found, *gradients = (ops.convert_to_numpy(value).ravel() for value in (found, *gradients))
    gradients = np.concatenate(gradients)
    return np.concatenate([found, gradients / np.abs(gradients).max()])

def compare(*case):
    return float(np.abs(attend(1, *case) - attend(4, *case)).max())

print(json.dumps([compare(batch, rate) for batch in (8, 6, 5) for rate in (0.5, 0)]))
"""
    assert run_code(tmp_path, backend, code) == pytest.approx([0] * 6, abs=1e-6)


def test_a_cuda_graph_gets_what_each_call_is_given(tmp_path):
    """A stand-in graph, which reads and writes the same memory at each replay, as CUDA's does."""
    code = """
import contextlib, json, torch
from unittest import mock
from harness import engine
recorded = []

class Graph:
    def replay(self):
        function, given, found = recorded[0]
        found.copy_(function(*given))

@contextlib.contextmanager
def record(graph, capture_error_mode):
    recorded.append(None)
    yield

def step(order, draws):
    calls.append(len(calls))
    found = order.sum() + draws["shift"]
    if recorded == [None]:
        recorded[0] = (lambda order, draws: order.sum() + draws["shift"]), (order, draws), found
    return found

calls = []
with mock.patch.multiple(torch.cuda, CUDAGraph=Graph, graph=record):
    call = engine._capture(step)
    found = [call(torch.full((2,), n), {"shift": torch.tensor(10 * n)}) for n in range(5)]
print(json.dumps([[int(value) for value in found], len(calls)]))
"""
    found, calls = run_code(tmp_path, "torch", code)
    assert found == [0, 12, 24, 36, 48]  # none was overwritten by a later one
    assert calls == 3  # two that compile, and the one that is recorded


def test_what_a_cuda_graph_records_of_an_optimiser_copies_nothing_to_the_device(tmp_path):
    """On a GPU a tensor made of a number is such a copy, which CUDA refuses within a graph."""
    code = (
        TRAIN
        + """
import torch
from unittest import mock

def make_tensor(data, *given, **named):
    assert isinstance(data, torch.Tensor), f"copied: {data!r}"
    return as_tensor(data, *given, **named)

as_tensor, moved = torch.as_tensor, []
average = dict(weight_decay=0.1, global_clipnorm=0.1, use_ema=True, ema_momentum=0.5)
for optimizer in (keras.optimizers.AdamW(**average), Muon(adam_weight_decay=0.1, **average)):
    model = create(optimizer)
    engine.build_state(model, 20)
    update, list_rates = engine._fuse_adam(optimizer, model.trainable_variables)
    gradients = [torch.ones_like(v.value) for v in model.trainable_variables]
    before = [w.copy() for w in model.get_weights()]
    rates = [rate[0] for rate in list_rates(1)]
    with torch.no_grad(), mock.patch.multiple(torch, as_tensor=make_tensor, tensor=make_tensor):
        update(gradients, *rates)
    weights = zip(before, model.get_weights())
    moved.append(sum(bool((old != new).any()) for old, new in weights) == len(gradients))
print(json.dumps(moved))
"""
    )
    assert run_code(tmp_path, "torch", code) == [True, True]


def test_constants_of_a_trace_are_made_once_and_ranges_where_they_are_read(tmp_path):
    code = """
import json, torch
from torch.fx.experimental.proxy_tensor import make_fx
from harness import engine
table = torch.tensor([1.0, 2.0, 3.0])
def step(x):
    return (x * (table * 2).double() + torch.arange(3),)
graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(3))
rest, constants = engine._evaluate_constants(graph, [])
names = [node.target.__name__ for node in rest.graph.nodes if node.op == "call_function"]
constants = [*constants, torch.ones(3)]
print(json.dumps([constants[0].tolist(), names, rest(*constants)[0].tolist()]))
"""
    constants, names, found = run_code(tmp_path, "torch", code)
    assert constants == [2.0, 4.0, 6.0]
    assert names == ["mul.Tensor", "arange.default", "add.Tensor"]
    assert found == [2.0, 5.0, 8.0]


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


def test_kernels_are_built_while_others_are_written(tmp_path):
    """Each kernel is asked for when it is written and again in the end, but built once; inductor's
    own functions and the garbage collector's thresholds are as before; what is written is what
    inductor by itself writes."""
    code = """
import os
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath("new")
import collections, contextlib, gc, json, torch
from harness import engine
from torch._inductor import sizevars
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen import common
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
def look():
    functions = PythonWrapperCodegen.define_kernel, sizevars.simplify_index_in_vec_range
    return *functions, common.DtypePropagationOpsHandler, gc.get_threshold()
before, asked, build = look(), [], AsyncCompile.cpp_pybinding
def ask(self, types, source):
    asked.append(source)
    return build(self, types, source)
AsyncCompile.cpp_pybinding = ask
x = torch.arange(4096.0).reshape(64, 64)
def compute(x):
    turned = x.roll(3).reshape(16, 256).t().reshape(64, 64).cos()  # whose places divide
    return [torch.softmax(x @ x.exp(), 1).sin(), turned]
def list_files(folder, ending):
    return sorted(f for *_, files in os.walk(folder) for f in files if f.endswith(ending))
engine._compile_torch(compute, x / 4096)
times, is_as_before = sorted(collections.Counter(asked).values()), look() == before
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath("plain")
engine._compiling_faster = contextlib.nullcontext
engine._compile_torch(compute, x / 4096)
written = [list_files(folder, ".main.cpp") for folder in ("new", "plain")]
print(json.dumps([times, len(list_files("new", ".main.so")), is_as_before, *written]))
"""
    times, built, is_as_before, ours, plain = run_code(tmp_path, "torch", code)
    assert times == [2] * built and built > 1 and is_as_before
    assert ours == plain and len(ours) == built


FROZEN = """
import os
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath("cache")  # nobody has filled it before
import json, numpy as np, keras, vit
from harness import engine
from torch._dynamo.utils import counters

engine.PACKED_PRODUCT = 5000  # the last one, of 3 * 384 * 3, stays as it is
keras.utils.set_random_seed(0)
x = inputs = keras.Input((12, 12, 4))
for layer in (
    keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
    keras.layers.Conv2D(8, 3, strides=2, use_bias=False, groups=2),
    keras.layers.BatchNormalization(),
    keras.layers.DepthwiseConv2D(3, dilation_rate=2, padding="same"),
    keras.layers.Permute((3, 1, 2)),
    keras.layers.Conv2D(6, 1, data_format="channels_first"),
    keras.layers.Conv2DTranspose(4, 2, strides=2, data_format="channels_first"),
    keras.layers.Conv2D(5, 3, data_format="channels_first"),
    keras.layers.Flatten(),
    keras.layers.Reshape((64, 5)),
    keras.layers.Dense(7, activation="gelu"),
    keras.layers.EinsumDense("btd,dhk->bthk", (64, 2, 3), bias_axes="hk"),
    keras.layers.Flatten(),
    keras.layers.Dense(3),
):
    x = layer(x)
model = keras.Model(inputs, x)
forward = engine.compile_forward(model, is_frozen=True)
differences = []
for seed in range(2):
    pixels = np.random.default_rng(seed).normal(size=(3, 12, 12, 4)).astype("float32")
    expected = model(pixels).detach().numpy()
    differences.append(float(abs(forward(pixels).numpy() - expected).max() / abs(expected).max()))
print(json.dumps([differences, len(engine._PACKED), counters["inductor"]["fxgraph_cache_hit"]]))
"""


def test_kernels_that_stay_are_put_in_order_once(tmp_path):
    """Convolutions of every kind and products, frozen, give what the model gives, and a second
    start finds them compiled."""
    for hits in (0, 1):
        differences, packed, found = run_code(tmp_path, "torch", FROZEN)
        assert max(differences) < 1e-6 and packed == 7 and found == hits


RESIDUAL = """
import json, numpy as np, keras
from keras import layers
from harness import engine

keras.utils.set_random_seed(0)
keras.config.set_image_data_format("channels_first")
graphs, split = [], engine._evaluate_constants
def keep(graph, known):
    graphs.append(split(graph, known))
    return graphs[-1]
engine._evaluate_constants = keep

def convolve(x, filters=8, size=3, **choices):
    x = layers.Conv2D(filters, size, padding="same", **choices)(x)
    return layers.BatchNormalization(axis=1)(x)

inputs = keras.Input((4, 12, 12))
stem = layers.ReLU()(convolve(inputs))
x = layers.ReLU()(convolve(stem))
x = layers.ReLU()(layers.Add()([convolve(x), stem]))  # into the stem's memory
x = layers.ReLU()(layers.Add()([convolve(x, 6, size=1), convolve(x, 6)]))  # one by another
summed = layers.Add()([convolve(x, 6), x])  # and x is read again: not into its memory
summed = layers.Multiply()([summed, layers.GlobalAveragePooling2D(keepdims=True)(x)])
turned = layers.Permute((1, 3, 2))(summed)
summed = layers.Add()([convolve(turned, 6), turned])  # a view's
x = layers.Add()([convolve(summed, 4), inputs])  # nor into what is given
x = layers.Subtract()([inputs, convolve(x, 4, activation="gelu")])
for y in (layers.ReLU()(convolve(inputs, 4)), convolve(inputs, 4)):  # the second's zeros may win
    x = layers.Add()([x, layers.MaxPooling2D(3, strides=1)(layers.ZeroPadding2D(1)(y))])
model = keras.Model(inputs, layers.Flatten()(layers.Conv2D(2, 3, strides=2, padding="same")(x)))
for layer in model.layers:
    if isinstance(layer, layers.BatchNormalization):
        for variable in layer.variables:
            variable.assign(np.random.default_rng(len(graphs)).uniform(0.5, 2, variable.shape))
forward = engine.compile_forward(model, is_frozen=True)
differences = []
for seed in (0, 1, 1):
    pixels = np.random.default_rng(seed).normal(size=(3, 4, 12, 12)).astype("float32")
    given = keras.ops.convert_to_tensor(pixels.copy())
    expected = model(pixels).detach().numpy()
    differences.append(float(abs(forward(given).numpy() - expected).max() / abs(expected).max()))
    differences.append(float(abs(given.numpy() - pixels).max()))
nodes = graphs[-1][0].graph.nodes
names = [f"{node.target}.".split(".")[1] for node in nodes if node.op == "call_function"]
told = ("convolve_packed", "convolve_into_packed", "clone", "relu", "mul_", "mul")
told += ("constant_pad_nd",)
print(json.dumps([differences, [names.count(name) for name in told]]))
"""


def test_what_follows_a_convolution_becomes_a_part_of_it(tmp_path):
    """Batch normalisation, a sum and ReLU; a sum in place only where nobody reads what was there"""
    differences, counts = run_code(tmp_path, "torch", RESIDUAL)
    assert max(differences) < 1e-5
    # copied are what is summed and read again, twice, what is given, and pixels to flatten them;
    # what is normalised after GELU is scaled, and what is multiplied by the mean; padded are the
    # last convolution, on two sides, and the pooling of what may be below zero
    assert counts == [6, 5, 4, 0, 1, 1, 2]


def test_a_cache_that_processors_share(tmp_path):
    """A home folder or a volume outlives the machine; inductor alone loads the other's graph."""
    code = """
from harness import environment
environment.set_variables()
import torch
print(torch.compile(torch.exp)(torch.zeros(1024)).tolist()[:2])
"""
    for capability in ("avx2", "default"):  # with vector instructions, where there are any
        changes = {"XDG_CACHE_HOME": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = run_python(tmp_path, "-c", code, **changes)
        assert (done.returncode, done.stdout) == (0, "[1.0, 1.0]\n"), done.stderr
