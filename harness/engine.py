"""Compiled training and inference steps for each backend, and what the device says about them.

Everything in a step happens on the device: the uint8 pictures lie there once, a batch is gathered
by its indices, augmented, and trained on, in one compiled graph. On JAX that graph is scanned over
several steps with donated state; on PyTorch Keras' whole training step, backward included, is
traced once to ATen operations and compiled by inductor, and the Keras optimiser's own variables
are updated in place; on TensorFlow XLA compiles gradients and update.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import platform
import resource
import warnings
from functools import cache, partial, wraps
from operator import itemgetter
from unittest import mock

import keras
import numpy as np

from harness import ending
from harness.optimizer import Muon, flatten
from harness.telemetry import HOST_MEMORY

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax
elif BACKEND == "torch":
    import torch

    # As XLA does. Training comes to such numbers, gradients and their squares below 1e-38, within
    # a dozen steps, and a CPU takes many times as long for them. Threads take this over from
    # the one that starts them, so it comes before PyTorch has any.
    torch.set_flush_denormal(True)
elif BACKEND == "tensorflow":
    import tensorflow as tf

DATA_LIMIT = resource.getrlimit(resource.RLIMIT_DATA)  # (soft, hard), whoever set them

# ---------------------------------------------------------------------------------------------
# The device


def on_gpu():
    """Whether this backend computes on a GPU."""
    if BACKEND == "jax":
        return jax.default_backend() == "gpu"
    if BACKEND == "torch":
        return torch.cuda.is_available()
    return bool(tf.config.list_physical_devices("GPU"))


def gpu_name():
    """The GPU's name as the backend gives it; None where it computes on the CPU."""
    if not on_gpu():
        return None
    if BACKEND == "jax":
        return jax.local_devices()[0].device_kind
    if BACKEND == "torch":
        return torch.cuda.get_device_name()
    return tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0]).get(
        "device_name"
    )


def limit_memory(gigabytes):
    """Cap what this process takes from now on: PyTorch's share of a GPU; JAX has read its own when
    it started. Without a GPU the kernel refuses more data (Linux), until `lift_limit`."""
    size = int(gigabytes * 1e9)
    if not on_gpu():
        before, hard = DATA_LIMIT
        known = [limit for limit in (before, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([size, *known]), hard))
    elif BACKEND == "torch":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0))


def lift_limit():
    """Let what comes after a run have the host's memory as before."""
    resource.setrlimit(resource.RLIMIT_DATA, DATA_LIMIT)


def set_precision(precision):
    """Make matrix products mean the same on every backend; call before the model is built.

    `float32` is full float32 (JAX would take TF32 on Ampere and later), `tf32` keeps float32
    arrays and rounds the factors to TF32, the 16-bit ones are Keras' mixed precision policies:
    weights in float32, arithmetic in 16 bits, on a GPU TF32 where a layer's is in float32.

    Returns:
        what matrix products will really run in: a CPU has no TF32 and runs float32 instead.

    Raises:
        ValueError: JAX's attention has no float16 on the CPU.
    """
    if precision == "float16" and BACKEND == "jax" and not on_gpu():
        raise ValueError(
            "--precision: expected float32 or bfloat16 on JAX without a GPU, got float16"
        )
    keras.mixed_precision.set_dtype_policy(
        {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}.get(precision, "float32")
    )
    allows_tf32 = precision != "float32" and on_gpu()
    if BACKEND == "jax":
        # XLA joins products with what is around them at its default precision alone.
        products = "tensorfloat32" if precision == "tf32" else "default"
        jax.config.update("jax_default_matmul_precision", products if allows_tf32 else "highest")
    elif BACKEND == "torch":
        torch.backends.cuda.matmul.allow_tf32 = allows_tf32
        torch.backends.cudnn.allow_tf32 = allows_tf32
        # Inductor advises to turn on what was not asked for.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    else:
        tf.config.experimental.enable_tensor_float_32_execution(allows_tf32)
    return "float32" if precision == "tf32" and not allows_tf32 else precision


def synchronize():
    """Wait until the device has done all work given to it."""
    if BACKEND == "jax":
        jax.block_until_ready(jax.live_arrays())
    elif BACKEND == "torch" and torch.cuda.is_available():
        torch.cuda.synchronize()
    elif BACKEND == "tensorflow":
        tf.test.experimental.sync_devices()


def place(array):
    """Put a NumPy array on the device, and wait until it is there."""
    if BACKEND == "jax":
        return wait(jax.device_put(array))
    return wait(keras.ops.convert_to_tensor(array))


def wait(array):
    """Wait until a device's array is computed; returns it."""
    if BACKEND == "jax":
        return jax.block_until_ready(array)
    synchronize()
    return array


def device_peak_bytes():
    """The allocator's peak on the GPU since the process began.

    Returns:
        (bytes, source), or (None, reason) where there is nothing to read.
    """
    if not on_gpu():
        return None, HOST_MEMORY
    if BACKEND == "jax":
        statistics = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics:
            return statistics["peak_bytes_in_use"], "jax memory_stats peak_bytes_in_use"
        return None, "this JAX device gives no memory statistics"
    if BACKEND == "torch":
        return torch.cuda.max_memory_allocated(), "torch.cuda.max_memory_allocated"
    return tf.config.experimental.get_memory_info("GPU:0")["peak"], "tensorflow get_memory_info"


# ---------------------------------------------------------------------------------------------
# Steps


def steps_per_call(steps):
    """How many of an epoch's `steps` go to the device at once; the last ones may be fewer.

    On a GPU a call costs the host about as much as a small step costs the device, so JAX scans
    over up to 32, of which there must be no remainder, to be compiled for itself, and PyTorch
    starts as many without waiting. On a CPU a step is long and the user wants to see and to stop
    each one.
    """
    if BACKEND == "tensorflow" or not on_gpu():
        return 1
    if BACKEND == "torch":
        return 32
    return max(n for n in range(1, 33) if steps % n == 0)


def build_state(model, batch_size):
    """Create the variables of optimiser, loss and metrics, which Keras would do at the first step.

    A model that runs steps compiled here must have had its state built.
    """
    model.optimizer.build(model.trainable_variables)
    labels = np.zeros(batch_size, "int32")
    outputs = np.zeros((batch_size, *model.output_shape[1:]), "float32")
    labels, outputs = keras.ops.convert_to_tensor(labels), keras.ops.convert_to_tensor(outputs)
    model.compute_loss(y=labels, y_pred=outputs)
    model.compute_metrics(None, labels, outputs)
    model.reset_metrics()


def compile_train_steps(model, augment=None):
    """Compile training on pictures that lie on the device.

    Args:
        model: a compiled Keras model whose state `build_state` has created.
        augment: None, or a function of (images, labels, draws) of a batch, made of keras.ops, that
            gives float32 images and what the model's loss takes for labels.

    Returns:
        An object with three methods. load(images, labels) puts pictures on the device, instead of
        those before: uint8 (n, height, width, channels), NumPy or PyTorch, and int32 (n,), NumPy.
        run(order, draws) trains a step per row, which on a GPU it does not wait for, and returns a
        function that does, and gives the epoch's running mean of the loss after each, NumPy
        (steps,); order: int32 (steps, parts, images) indices of the pictures; draws: arrays (steps,
        parts, images, ...), a dict. A batch is computed part by part; the step is that of the mean
        of its parts' gradients, so that memory for one part is enough. sync() brings the model's
        variables up to date, for whoever reads or writes them between runs.
    """
    training = {"jax": _JaxTraining, "torch": _TorchTraining, "tensorflow": _TensorFlowTraining}
    return training[BACKEND](model, augment)


def compile_function(function):
    """A function of arrays, for the host's own loop: jitted, but on PyTorch, where plain `fit`
    is eager, left as it is."""
    if BACKEND == "jax":
        return jax.jit(function)
    if BACKEND == "tensorflow":
        return _compile_tensorflow(function)
    return lambda *given: function(*keras.tree.map_structure(keras.ops.convert_to_tensor, given))


def infer(model, pixels):
    """Logits of a batch, NumPy, as Keras computes them, uncompiled; on a GPU its memory is not
    counted in what PyTorch tells of its peak."""
    with torch.no_grad() if BACKEND == "torch" else contextlib.nullcontext():
        logits = keras.ops.convert_to_numpy(model(pixels, training=False))
    if BACKEND == "torch" and on_gpu():
        torch.cuda.reset_peak_memory_stats()
    return logits


def compile_forward(model, is_frozen=False):
    """Compile inference: a function from a batch of pixels, NumPy or device, to device logits.

    is_frozen: the weights stay as they are now. On PyTorch what is made of weights alone, such as
        kernels in its own layout, is then made once.
    """
    groups = model.trainable_variables, model.non_trainable_variables

    def read_weights():
        return [[v.value for v in group] for group in groups]

    read = partial(lambda weights: weights, read_weights()) if is_frozen else read_weights
    if BACKEND == "tensorflow":
        return _compile_tensorflow(partial(model, training=False))
    compiled = {}
    if BACKEND == "jax":
        infer = jax.jit(lambda *state_and_x: model.stateless_call(*state_and_x)[0])

        def call(x):
            kind = x.shape, x.dtype
            if kind not in compiled:
                compiled[kind] = ending.wait_for(infer.lower(*read(), x).compile)
                _drop_garbage()
            return compiled[kind](*read(), x)

        return call

    @torch.no_grad()
    def forward(x):
        x = keras.ops.convert_to_tensor(x)
        if x.shape not in compiled:
            run = _compile_torch(
                lambda state, x: [model.stateless_call(*state, x)[0]],
                read(),
                x,
                freeze=is_frozen,
            )
            call = lambda x: run(read(), x)[0]  # noqa: E731
            compiled[x.shape] = _capture(call) if is_frozen and on_gpu() else call
        return compiled[x.shape](x)

    return forward


def evaluate(model, forward, images, labels, batch_size):
    """Loss and metrics of a model on a whole data set, as `model.evaluate` gives them.

    The logits of all pictures are computed first, in batches of one size (the last one is filled
    up), so that one compiled function serves any data set; loss and metrics are exact.

    Args:
        images: an array (n, height, width, channels), or what has a method `batches` that gives
            batches of any size for an order (n,).
        batch_size: of what is computed at once.

    Returns:
        dict of floats, by the metrics' names.
    """
    is_streamed = hasattr(images, "batches")
    logits = []
    for batch in images.batches(np.arange(len(images))) if is_streamed else [images]:
        batch = np.asarray(batch)
        for first in range(0, len(batch), batch_size):
            part = batch[first : first + batch_size]
            missing = batch_size - len(part)
            if missing:
                part = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)])
            logits.append(forward(part)[: batch_size - missing])
    logits, labels = keras.ops.concatenate(logits), keras.ops.convert_to_tensor(labels)
    model.reset_metrics()
    loss = model.compute_loss(y=labels, y_pred=logits, training=False)
    model.compute_metrics(None, labels, logits)
    results = {name: float(value) for name, value in model.get_metrics_result().items()}
    model.reset_metrics()
    return {**results, "loss": float(loss)}


def _make_batch(images, labels, index, draws, augment):
    images, labels = (keras.ops.take(array, index, axis=0) for array in (images, labels))
    if augment is None:
        return keras.ops.cast(images, "float32"), labels
    return augment(images, labels, draws)


def _list_compiler_options():
    """By default XLA orders a CPU's operations so that more of them can run side by side. In order
    of least memory the default model's activations take a tenth less, and two cores lose nothing.
    """
    if on_gpu() or jax.__version_info__ < (0, 10):  # as a Jetson's, which may not know it
        return {}
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class _JaxTraining:
    """Scans over steps and, within a step, over the parts of its batch, whose gradients add up.
    The state is donated, so it exists once."""

    def __init__(self, model, augment):
        self.model, self.state, self.compiled = model, None, None
        differentiate = jax.value_and_grad(model.compute_loss_and_updates, has_aux=True)

        def train_steps(state, images, labels, order, draws):
            def add_part(trainable, optimizer, carried, part):
                sums, non_trainable, metrics = carried
                x, y = _make_batch(images, labels, *part, augment)
                (_, (loss, outputs, non_trainable, metrics)), gradients = differentiate(
                    *(trainable, non_trainable, metrics, x, y, None),
                    training=True,
                    optimizer_variables=optimizer,
                )
                mapping = zip(model.metrics_variables, metrics)
                with keras.StatelessScope(state_mapping=list(mapping)) as scope:
                    logs = _update_metrics(model, x, y, outputs, loss)
                metrics = [scope.get_current_value(v) for v in model.metrics_variables]
                sums = jax.tree.map(jax.numpy.add, sums, gradients)
                return (sums, non_trainable, metrics), logs["loss"]

            def train_step(state, parts):
                trainable, non_trainable, optimizer, metrics = state
                carried = (jax.tree.map(jax.numpy.zeros_like, trainable), non_trainable, metrics)
                carried, losses = jax.lax.scan(
                    partial(add_part, trainable, optimizer), carried, parts
                )
                sums, non_trainable, metrics = carried
                gradients = [total / len(losses) for total in sums]
                trainable, optimizer = model.optimizer.stateless_apply(
                    optimizer, gradients, trainable
                )
                return (trainable, non_trainable, optimizer, metrics), losses[-1]

            return jax.lax.scan(train_step, state, (order, draws))

        self.train_steps = jax.jit(train_steps, donate_argnums=0)

    def load(self, images, labels):
        self.images, self.labels = jax.device_put((np.asarray(images), labels))

    def _variables(self):
        return (
            self.model.trainable_variables,
            self.model.non_trainable_variables,
            self.model.optimizer.variables,
            self.model.metrics_variables,
        )

    def run(self, order, draws):
        if self.state is None:
            self.state = tuple([v.value for v in group] for group in self._variables())
        arguments = (self.state, self.images, self.labels, order, draws)
        if self.compiled is None:
            lowered = self.train_steps.lower(*arguments)
            self.compiled = ending.wait_for(partial(lowered.compile, _list_compiler_options()))
            jax.clear_caches()  # of what was traced: 0.1 GB
            _drop_garbage()
        self.state, losses = self.compiled(*arguments)
        return partial(np.asarray, losses)

    def sync(self):
        for variables, values in zip(self._variables(), self.state or ()):
            for variable, value in zip(variables, values):
                variable.assign(value)
        self.state = None


class _TorchTraining:
    """One compiled graph gathers, augments, runs forward and backward and updates the metrics, for
    each part of a batch; then the optimiser updates Keras' own variables in place. On a GPU all of
    a step is one CUDA graph."""

    def __init__(self, model, augment):
        self.model, self.augment, self.compiled = model, augment, None
        self.trained = [v.value for v in model.trainable_variables]
        self.images = None
        self.update, self.list_rates = _fuse_adam(model.optimizer, model.trainable_variables)

    def load(self, images, labels):
        # Keras would copy the pictures even where the device is the CPU.
        device = self.trained[0].device
        loaded = [
            torch.as_tensor(array).to(device, non_blocking=True) for array in (images, labels)
        ]
        if device.type == "cpu" and loaded[0].is_shared():
            # Inductor's code may read some bytes past the end, where a DataLoader's memory ends.
            loaded[0] = loaded[0].clone()
        if on_gpu() and self.images is not None and self.images.shape == loaded[0].shape:
            self.images.copy_(loaded[0], non_blocking=True)  # where a captured step reads them
            self.labels.copy_(loaded[1], non_blocking=True)
            return
        self.images, self.labels = loaded
        self.step = _capture(self._step) if on_gpu() and self.list_rates else self._step

    def _differentiate(self, parts, trainable, carried, images, labels, index, draws):
        """Keras' train step up to the gradients, as a function of tensors, for one of `parts`.

        `carried` is what else a step changes: non-trainable variables (random seeds), the
        optimiser's (read for loss scaling), metrics; each is updated in place.

        Returns:
            the running mean of the loss, and the gradients, one after the other.
        """
        model = self.model
        x, y = _make_batch(images, labels, index, draws, self.augment)
        with torch.enable_grad():
            trainable = [tensor.detach().requires_grad_() for tensor in trainable]
            mapping = [*zip(model.trainable_variables, trainable), *zip(self._carried(), carried)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                outputs = model(x, training=True)
                loss = model.compute_loss(x, y, outputs, training=True)
                logs = _update_metrics(model, x, y, outputs.detach(), loss.detach())
                scaled = model.optimizer.scale_loss(loss) / parts
            gradients = torch.autograd.grad(scaled, trainable)
        for variable, tensor in zip(self._carried(), carried):
            value = scope.get_current_value(variable)
            if value is not None and value is not tensor:
                tensor.copy_(value)
        # Fused optimisers want gradients laid out like their weights.
        return logs["loss"], *(gradient.contiguous() for gradient in gradients)

    def _carried(self):
        model = self.model
        return [
            *model.non_trainable_variables,
            *model.optimizer.variables,
            *model.metrics_variables,
        ]

    def run(self, order, draws):
        with torch.no_grad():
            rates = self.list_rates(len(order)) if self.list_rates else ()
            given = (*keras.tree.map_structure(_send, (order, draws)), rates)
            rows = (keras.tree.map_structure(itemgetter(n), given) for n in range(len(order)))
            return _read_later(torch.stack([self.step(*row) for row in rows]))

    def _step(self, order, draws, rates):
        """A step on a batch in parts: indices (parts, images), draws of as many, its rates, if any.
        Returns the running mean of the loss."""
        sums, carried = None, [variable.value for variable in self._carried()]
        for part in range(len(order)):
            rows = keras.tree.map_structure(itemgetter(part), (order, draws))
            arguments = (self.trained, carried, self.images, self.labels, *rows)
            if self.compiled is None:
                differentiate = partial(self._differentiate, len(order))
                with ending.compiling():
                    self.compiled = _compile_torch(differentiate, *arguments)
            loss, *gradients = self.compiled(*arguments)
            if sums is None:
                sums = gradients
            else:
                torch._foreach_add_(sums, gradients)
        self.update(sums, *rates)
        return loss

    def sync(self):
        """Nothing to do: the variables are updated in place."""


def _compile_tensorflow(function):
    """By XLA, once for each shape; nothing here needs Python's branches rewritten (autograph)."""
    return tf.function(function, jit_compile=True, autograph=False)


class _TensorFlowTraining:
    """Two functions that XLA compiles: forward, backward and metrics of a part of a batch, whose
    gradients add up, and the optimiser's step. Both change Keras' own variables in place."""

    def __init__(self, model, augment):
        self.model, self.augment = model, augment
        self.differentiate = _compile_tensorflow(self._differentiate)
        apply, trainable = model.optimizer.apply, model.trainable_variables
        self.update = _compile_tensorflow(lambda sums: apply(sums, trainable))

    def load(self, images, labels):
        self.images, self.labels = map(tf.convert_to_tensor, (np.asarray(images), labels))

    def _differentiate(self, parts, images, labels, index, draws):
        model, trainable = self.model, self.model.trainable_variables
        x, y = _make_batch(images, labels, index, draws, self.augment)
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = model.compute_loss(x, y, outputs, training=True)
            scaled = model.optimizer.scale_loss(loss) / parts
        gradients = tape.gradient(scaled, [variable.value for variable in trainable])
        return _update_metrics(model, x, y, outputs, loss)["loss"], gradients

    def run(self, order, draws):
        losses = []
        for step, parts in enumerate(order):
            sums = None
            for part, index in enumerate(parts):
                drawn = {name: array[step, part] for name, array in draws.items()}
                loss, gradients = self.differentiate(
                    len(parts), self.images, self.labels, index, drawn
                )
                sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients)]
            self.update(sums)
            losses.append(loss)
        return tf.stack(losses).numpy

    def sync(self):
        """Nothing to do: the variables are changed in place."""


def _update_metrics(model, x, y, outputs, loss):
    """What Keras' own train steps do once the loss is known; returns the running means."""
    tracker = next(metric for metric in model.metrics if metric.name == "loss")
    tracker.update_state(loss, sample_weight=y.shape[0])
    return model.compute_metrics(x, y, outputs)


def _with_room(function):
    """Let a deeply recursive function's calls have their frames in one piece of memory.

    CPython takes 16 KB for frames at once. Where these are full, a call takes more from the kernel
    and its return gives that back: 200,000 times in a compilation by inductor (`push_chunk` in
    Python/pystate.c). For a frame of 2**16 words it takes 1 MB, half of which is left to others.
    """

    @wraps(function)
    def call(*given, **named):
        return function(*given, **named)

    call.__code__ = call.__code__.replace(co_stacksize=2**16)
    return call


@_with_room
def _compile_torch(function, *arguments, freeze=False):
    """Trace a function of tensors once to ATen operations, and compile these with inductor.

    No dynamo: there is no Python left to follow, no graph breaks, no guards, no recompilation; and
    a second start finds the compiled graph in inductor's cache.

    Args:
        function: from nested lists of tensors to a flat sequence of tensors.
        arguments: an example of what it will be called with.
        freeze: whether all but the last argument, a tensor, will be what it is now.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

    leaves, structure = tree_flatten(arguments)

    def flat(*leaves):
        return tuple(function(*tree_unflatten(leaves, structure)))

    graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*leaves)
    known = leaves[:-1] if freeze else []
    # A constant that the code made on the host would otherwise go to the GPU in every call.
    graph, constants = _evaluate_constants(graph, known) if freeze or on_gpu() else (graph, [])
    leaves = [*constants, *leaves[len(known) :]]
    if hasattr(torch._inductor, "standalone_compile"):
        # A CPU is to keep what softmax's gradient reads twice: a dropout, 30 operations. By itself
        # inductor keeps what has more than 50 there, and computes the rest for each reader.
        kept = {} if on_gpu() else {"realize_opcount_threshold": 28}
        with _compiling_faster(), torch._inductor.config.patch(kept):
            compiled = torch._inductor.standalone_compile(
                graph, leaves, dynamic_shapes="from_example_inputs"
            )
    else:  # before 2.8, such as a Jetson's
        compiled = torch._inductor.compile(graph, leaves)
    _drop_garbage()
    if freeze:  # and not the known ones looked through in each call
        return lambda *arguments: compiled(*constants, arguments[-1])
    return lambda *arguments: compiled(*constants, *tree_leaves(arguments))


@contextlib.contextmanager
def _compiling_faster():
    """Spare inductor waiting; what it writes stays the same.

    It writes all kernels of a graph in Python, on one core, before it has the first one built: here
    the C++ compiler begins on each as soon as that is written. Inductor asks for each again later,
    by its text, and finds it under way. And its only DtypePropagationOpsHandler is set up anew,
    with a rule for each of some hundred operations, whenever an operation asks for it: here once.
    Places in memory are simplified where they divide, not where only their steps are asked for.
    Millions of small objects that live on make Python's garbage collector look in vain: less often.
    """
    from torch._inductor import sizevars
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen import common
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    define = PythonWrapperCodegen.define_kernel

    def define_and_build(self, name, body, *others, **named):
        if body.startswith("async_compile.cpp_pybinding("):
            eval(body, {"async_compile": AsyncCompile()})  # as the module that inductor writes does
        return define(self, name, body, *others, **named)

    simplify = getattr(sizevars, "simplify_index_in_vec_range", None)

    def simplify_divided(index, *others):
        return simplify(index, *others) if index.has(FloorDiv, ModularIndexing) else index

    rules = cache(common.DtypePropagationOpsHandler)
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, *thresholds[1:])
    with (
        mock.patch.object(PythonWrapperCodegen, "define_kernel", define_and_build),
        mock.patch.object(common, "DtypePropagationOpsHandler", rules),
        # some versions of PyTorch have it elsewhere, and go without this
        mock.patch.object(sizevars, "simplify_index_in_vec_range", simplify_divided, create=True),
    ):
        try:
            yield
        finally:
            gc.set_threshold(*thresholds)


def _evaluate_constants(graph, known):
    """Split a traced graph into what depends on its first inputs alone and the rest.

    On a CPU kernels are put in the order that oneDNN multiplies them in, which it would otherwise
    do in each call: a quarter of ResNet-50's time for one picture. What follows a convolution
    number by number becomes a part of it.

    Args:
        graph: torch.fx.GraphModule of ATen operations that change none of their inputs.
        known: tensors, the first inputs; [] for what depends on the graph's own constants alone.

    Returns:
        (graph, constants): the rest, whose first inputs are the constants, then those not known.
    """
    values, rest, copies, has_known = {}, torch.fx.Graph(), {}, bool(known)
    nodes, known = list(graph.graph.nodes), iter(known)

    def is_constant(node):
        # What is made of nothing, such as a range, is computed where it is read: it may be large.
        given = node.all_input_nodes
        return all(n in values for n in given) and (has_known or len(given) > 0)

    for node in nodes:
        if node.op == "placeholder":
            if (value := next(known, None)) is not None:
                values[node] = value
        elif node.op == "get_attr":
            values[node] = getattr(graph, node.target)
        elif node.op == "call_function" and is_constant(node):
            given = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*given[0], **given[1])
    unknown = [node for node in nodes if node not in values]
    packed = [node for node in unknown if _can_pack(node, values)]
    fused, ends, done = set(), {}, set()
    for node in packed:
        if node.target is torch.ops.aten.convolution.default:
            chain, *found = _follow_convolution(node, values, fused)
            fused.update(chain)
            ends[chain[-1]] = (chain, *found)
    needed = [
        node
        for node in values
        if any(
            u not in values and u not in fused and (u not in packed or u.args[1] is not node)
            for u in node.users
        )
    ]
    for node in needed:
        copies[node] = rest.placeholder(node.name)
        if any(user.target is torch.ops.aten.convolution.default for user in node.users):
            # Keras' kernels are turned by a view, whose memory each call would put in order.
            form = torch.channels_last if values[node].dim() == 4 else torch.contiguous_format
            values[node] = values[node].contiguous(memory_format=form)
    for node in unknown:
        if node in ends:
            chain, scale, shift, other, is_rectified = ends[node]
            into = copies.get(other)
            if other is not None and not _is_free(other, ends, done | {*chain}):
                into = rest.call_function(torch.ops.aten.clone.default, (into,))
            given = scale, shift, into, is_rectified, values, copies
            result = rest.call_function(*_pack_convolution(chain[0], *given))
            copies[node] = result if into is None else into
            done.update(chain)
        elif node in fused:
            continue
        elif node in packed:
            copies[node] = rest.call_function(*_pack_product(node, values, copies))
        else:
            copies[node] = rest.node_copy(node, copies.__getitem__)
            if node.target is torch.ops.aten.view.default:
                # Of a convolution, whose channels may now come last in memory.
                copies[node].target = torch.ops.aten.reshape.default
            if node.target is torch.ops.aten.constant_pad_nd.default:
                done.add(node)
            if node.target is torch.ops.aten.max_pool2d_with_indices.default:
                copies[node].args = _pad_in_pool(node, ends, copies)
    _join_convolutions(rest)
    return torch.fx.GraphModule(graph, rest), [values[node] for node in needed]


def _can_pack(node, values):
    """Whether a node of a traced graph is a product, or a convolution of pictures, by a known
    kernel on a CPU."""
    convolution, *products = (
        torch.ops.aten.convolution.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
    )
    if node.target not in (convolution, *products) or node.args[1] not in values:
        return False
    kernel = values[node.args[1]]
    if node.target is convolution:
        bias, is_transposed = node.args[2], node.args[6]
        fits = kernel.dim() == 4 and not is_transposed and (bias is None or bias in values)
    else:  # one large enough to be worth a call from Python
        rows = math.prod(node.args[0].meta["val"].shape[:-1])
        fits = (kernel.dim() == 2 or len(kernel) == 1) and rows * kernel.numel() >= PACKED_PRODUCT
    dtypes = [torch.float32] if torch.backends.mkldnn.is_available() else []
    if dtypes and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    return fits and kernel.device.type == "cpu" and kernel.dtype in dtypes


def _follow_convolution(node, values, taken):
    """What comes after a convolution and nowhere else, and can be part of it: known numbers for
    each channel, such as a bias and batch normalisation; then a sum with another tensor; then ReLU.

    Args:
        taken: nodes that are part of another convolution.

    Returns:
        (nodes, scale, shift, other, is_rectified): the nodes, the convolution first; what to
        multiply it with and to add, (channels,) each; the node to add, or None.
    """
    aten, kernel, bias = torch.ops.aten, values[node.args[1]], node.args[2]
    sums = (aten.add.Tensor, aten.add_.Tensor)
    scale, shift = torch.ones(len(kernel)), torch.zeros(len(kernel))
    shift, nodes = shift if bias is None else shift + values[bias], [node]
    other, is_rectified = None, False
    while kernel.dtype == torch.float32 and len(nodes[-1].users) == 1 and not is_rectified:
        (user,) = nodes[-1].users
        given = [part for part in user.args if part is not nodes[-1]]
        if user in taken or user.kwargs:
            break
        if user.target in (aten.relu.default, aten.relu_.default):
            is_rectified = True
        elif other is not None or len(given) != 1 or not isinstance(given[0], torch.fx.Node):
            break
        elif given[0] not in values:
            if user.target not in sums or given[0].meta["val"].shape != node.meta["val"].shape:
                break
            other = given[0]
        else:
            number = values[given[0]]
            if user.args[0] in values or number.shape != (1, len(kernel), 1, 1):
                break
            number = number.reshape(-1)
            if user.target in sums:
                shift = shift + number
            elif user.target in (aten.sub.Tensor, aten.sub_.Tensor):
                shift = shift - number
            elif user.target in (aten.mul.Tensor, aten.mul_.Tensor):
                scale, shift = scale * number, shift * number
            else:
                break
        nodes.append(user)
    return nodes, scale, shift, other, is_rectified


def _is_free(other, ends, done):
    """Whether a sum may be written where `other` is: the result of another convolution, which none
    but what is done reads, and that as it is, not as a view."""
    return other in ends and all(user in done for user in other.users)


def _peel_zeros(node):
    """(what a node pads with zeros, how many on each side), or the node itself and 0."""
    edges = node.args[1] if node.target is torch.ops.aten.constant_pad_nd.default else []
    if len(edges) == 4 and len({*edges}) == 1 and not any(node.args[2:]):
        return node.args[0], edges[0]
    return node, 0


def _pad_in_pool(node, ends, copies):
    """The arguments of the new graph's max pooling, which itself pads what ReLU has left, instead
    of reading a padded copy: around that zeros change as little as its minus infinity."""
    x, margin = _peel_zeros(node.args[0])
    kernel, *others = node.args[1:]
    is_rectified = x in ends and ends[x][-1]
    reads_indices = any(u.args[1] and u.users for u in node.users)  # beside the largest
    if is_rectified and 0 < 2 * margin <= min(kernel) and len(others) == 1 and not reads_indices:
        others.append([margin, margin])
    else:
        x = node.args[0]
    return copies[x], kernel, *others


def _pack_convolution(node, scale, shift, into, is_rectified, values, copies):
    """Put the kernel of a convolution in order: a custom operation, and what it is to be given.

    Args:
        into: None, or a tensor of the new graph to which the result is added, where it is.
    """
    x, kernel, _, stride, padding, dilation, _, _, groups = node.args
    x, margin = _peel_zeros(x)
    padding = [size + margin for size in padding]
    kernel = (values[kernel] * scale.reshape(-1, 1, 1, 1)).to(values[kernel].dtype)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    given = padding, stride, dilation, groups
    packed = torch.ops.mkldnn._reorder_convolution_weight(kernel, *given, list(x.meta["val"].shape))
    operations = torch.ops.mkldnn
    given, rectified = (packed, shift, *given), "relu" if is_rectified else None
    place, size = len(_PACKED), list(node.meta["val"].shape)
    if into is None:
        convolve = operations._convolution_pointwise.default
        _PACKED.append(lambda x: convolve(x, *given, rectified or "none", [], ""))
        return torch.ops.vit.convolve_packed.default, (copies[x], place, size)
    add = operations._convolution_pointwise_.binary
    _PACKED.append(lambda x, other: add(other, x, *given, "add", 1.0, rectified, [], None))
    return torch.ops.vit.convolve_into_packed.default, (copies[x], place, into)


def _join_convolutions(graph):
    """Make convolutions of which one directly follows the other one operation: each that a compiled
    graph calls goes through Python."""
    follow = (torch.ops.vit.convolve_packed.default, torch.ops.vit.convolve_into_packed.default)
    graph.eliminate_dead_code()  # padding, between them, that they do themselves
    for node in graph.nodes:
        first = node.prev
        if first.target is follow[0] and node.target in follow and [*first.users] == [node]:
            x, place, *others = node.args
            if first is x and first not in others:
                node.args = first.args[0], _compose(first.args[1], place), *others
                graph.erase_node(first)


def _compose(first, second):
    """The place of two convolutions, one after the other."""
    first, second = _PACKED[first], _PACKED[second]
    _PACKED.append(lambda x, *other: second(first(x), *other))
    return len(_PACKED) - 1


def _pack_product(node, values, copies):
    """The same of a product."""
    x, kernel = node.args
    kernel = values[kernel].reshape(values[kernel].shape[-2:]).t().contiguous()
    rows = math.prod(x.meta["val"].shape[:-1])
    packed, multiply = (
        torch.ops.mkldnn._reorder_linear_weight(kernel, rows),
        torch.ops.mkldnn._linear_pointwise.default,
    )
    _PACKED.append(lambda x: multiply(x.contiguous(), packed, None, "none", [], ""))
    given = copies[x], len(_PACKED) - 1, list(node.meta["val"].shape)
    return torch.ops.vit.multiply_packed.default, given


PACKED_PRODUCT = 20_000_000  # multiply-accumulates, half a millisecond

# Products by kernels in oneDNN's order. A compiled graph names them by their place here: a tensor
# without strides can be none of its inputs, and as a constant keeps it from inductor's cache.
_PACKED = []

if BACKEND == "torch":
    for _name in ("convolve_packed", "multiply_packed"):
        torch.library.define(f"vit::{_name}", "(Tensor x, int place, int[] size) -> Tensor")
        torch.library.impl(f"vit::{_name}", "CPU", lambda x, place, size: _PACKED[place](x))
    torch.library.define(
        "vit::convolve_into_packed", "(Tensor x, int place, Tensor(a!) other) -> ()"
    )

    @torch.library.impl("vit::convolve_into_packed", "CPU")
    def _(x, place, other):
        _PACKED[place](x, other)

    @torch.library.register_fake("vit::convolve_packed")
    def _(x, place, size):
        return x.new_empty(size).contiguous(memory_format=torch.channels_last)

    @torch.library.register_fake("vit::multiply_packed")
    def _(x, place, size):
        return x.new_empty(size)

    @torch.library.register_fake("vit::convolve_into_packed")
    def _(x, place, other):
        pass


def _drop_garbage():
    """Give back what a compiler has left, hundreds of megabytes."""
    gc.collect()
    return_memory()


def return_memory():
    """Give the kernel back what is free, which environment.TUNABLES keep: after an epoch what
    evaluating and saving took once, 0.2 GB on JAX. It takes some milliseconds."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _fuse_adam(optimizer, variables):
    """The update that a Keras optimiser makes, through PyTorch's fused kernel where it can be.

    Adam, AdamW and the part of Muon that is AdamW run fused, with clipping by the global norm and
    an average of the weights if asked for; anything else (weights with a constraint, too) runs
    Keras' own update. Keras adds epsilon to sqrt(v) before the bias correction, PyTorch after
    (Kingma and Ba 2015, end of section 2), so PyTorch's kernel is told of a step so late that it
    corrects nothing, and gets a rate that has been corrected.

    Returns:
        (update, list_rates). update(gradients, *rates), tensors. list_rates(steps) gives what the
        coming steps are to get, a tuple of (steps,), or is None where that is nothing.
    """
    # On PyTorch Keras makes an optimiser of a backend class with the same name.
    is_muon = isinstance(optimizer, Muon)
    plain = (is_muon or type(optimizer).__name__ in ("Adam", "AdamW")) and not any(
        (
            any(variable.constraint is not None for variable in variables),
            not is_muon and optimizer.amsgrad,
            is_muon and optimizer.adam_weight_decay != optimizer.weight_decay,
            is_muon and optimizer.adam_lr_ratio != 1,
            optimizer.clipnorm,
            optimizer.clipvalue,
            optimizer.ema_overwrite_frequency,
            optimizer.gradient_accumulation_steps,
            optimizer.loss_scale_factor,
        )
    )
    if not plain:
        return lambda gradients: optimizer.apply(gradients, variables), None

    # PyTorch's state is Keras' variables themselves, so that saving a model saves it.
    fused = [n for n, v in enumerate(variables) if not (is_muon and optimizer.is_matrix(v))]
    if is_muon:
        moments = optimizer.momentums, optimizer.adam_velocities
        beta_1, beta_2 = optimizer.adam_beta_1, optimizer.adam_beta_2
    else:
        moments = optimizer._momentums, optimizer._velocities
        beta_1, beta_2 = optimizer.beta_1, optimizer.beta_2
    tensors, momentums, velocities = (
        [group[n].value for n in fused] for group in (variables, *moments)
    )
    decay = optimizer.weight_decay or 0.0
    decayed = [v.value for v in variables if decay and optimizer._use_weight_decay(v)]
    late = [torch.tensor(1e9, device=tensors[0].device)] * len(tensors)
    steps_done = int(optimizer.iterations.value)
    has_stepped = steps_done > 0
    move_matrices = _fuse_muon(optimizer, variables) if is_muon else None

    def list_rates(steps):
        nonlocal steps_done
        coming = range(steps_done, steps_done + steps)
        steps_done += steps
        rates = optimizer._learning_rate
        if isinstance(rates, keras.optimizers.schedules.LearningRateSchedule):
            with keras.device("cpu"):  # a schedule's branches would wait for a GPU in each step
                rates = np.float32([float(rates(step)) for step in coming])
            rates = _send(rates)
        else:
            rates = keras.ops.convert_to_tensor(optimizer.learning_rate).expand(steps)
        factors = [math.sqrt(1 - beta_2 ** (n + 1)) / (1 - beta_1 ** (n + 1)) for n in coming]
        return rates, rates * _send(np.float32(factors))

    def update(gradients, rate, corrected):
        nonlocal has_stepped
        if optimizer.global_clipnorm:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            norm = norm.clamp(min=optimizer.global_clipnorm)
            torch._foreach_mul_(gradients, optimizer.global_clipnorm / norm)
        if decayed:
            torch._foreach_mul_(decayed, 1 - rate * decay)
        if is_muon:
            move_matrices(gradients, rate)
        torch._fused_adamw_(
            *(tensors, [gradients[n] for n in fused], momentums, velocities, [], late),
            lr=corrected,
            beta1=beta_1,
            beta2=beta_2,
            weight_decay=0.0,
            eps=optimizer.epsilon,
            amsgrad=False,
            maximize=False,
        )
        if optimizer.use_ema:  # which starts at the first step's weights
            averages = [v.value for v in optimizer._model_variables_moving_average]
            share = 1 - optimizer.ema_momentum if has_stepped else 1.0
            torch._foreach_lerp_(averages, [v.value for v in variables], share)
        has_stepped = True
        optimizer.iterations.value.add_(1)

    return update, list_rates


def _fuse_muon(optimizer, variables):
    """What `Muon.update_matrices` does, in a quarter of the kernels: a function of all gradients
    and of the rate, a tensor."""
    numbers = [n for n, variable in enumerate(variables) if optimizer.is_matrix(variable)]
    momenta = [optimizer.momentums[n].value for n in numbers]
    weights = [variables[n].value.detach() for n in numbers]
    a, b, c, share = (getattr(optimizer, n) for n in ("muon_a", "muon_b", "muon_c", "momentum"))
    dtype = getattr(torch, keras.config.dtype_policy().compute_dtype)
    groups = {}
    for place, n in enumerate(numbers):
        groups.setdefault(flatten(variables[n]), []).append(place)

    def orthogonalize(x):
        if x.shape[1] > x.shape[2]:
            return orthogonalize(x.mT).mT.contiguous()
        x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).to(dtype)
        for _ in range(optimizer.ns_steps):
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x.float()

    def move_matrices(gradients, rate):
        moves = [gradients[n] for n in numbers]
        torch._foreach_mul_(momenta, share)
        torch._foreach_add_(momenta, moves)
        moves = torch._foreach_add(moves, momenta, alpha=share) if optimizer.nesterov else momenta
        for shape, places in groups.items():
            found = orthogonalize(torch.stack([moves[place].view(shape) for place in places]))
            length = optimizer.rms_rate * math.sqrt(max(shape)) if optimizer.rms_rate else 1.0
            moved = [weights[place].view(shape) for place in places]
            torch._foreach_sub_(moved, (found * (rate * length)).unbind())

    return move_matrices


def _send(array):
    """A NumPy array as a tensor; on its way to the GPU, if there is one, without waiting for that
    to finish what it does."""
    copy = torch.from_numpy(np.array(array, order="C"))  # another order would be kept, and not fit
    return copy.pin_memory().to("cuda", non_blocking=True) if on_gpu() else copy


def _read_later(tensor):
    """A function that waits for a tensor, and gives it as a NumPy array. A GPU copies it to the
    host now: a copy asked for later would come after all that it is given until then."""
    if not on_gpu():
        return tensor.numpy
    copy, done = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read():
        done.synchronize()
        return copy.numpy()

    return read


CALLS_TO_CAPTURE = 2  # after the first, until a function is one CUDA graph


def _capture(function):
    """Make the work that a function gives a GPU one CUDA graph: what would cost the host hundreds
    of starts costs it one.
    https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

    Args:
        function: of nested tensors to a tensor, that does not wait for the GPU. The first two calls
            run as they are, since they compile; from then on shapes must stay, and what it reads
            or writes besides its arguments must stay where it is in memory.
    """
    calls, graph, given, found = 0, torch.cuda.CUDAGraph(), None, None

    def call(*arguments):
        nonlocal calls, given, found
        calls += 1
        if calls <= CALLS_TO_CAPTURE:
            return function(*arguments)
        if given is None:
            given = keras.tree.map_structure(torch.clone, arguments)
            # Other threads, such as one that pins a DataLoader's batches, go on with theirs.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = function(*given)
        keras.tree.map_structure(torch.Tensor.copy_, given, arguments)
        graph.replay()
        return found.clone()

    return call


# ---------------------------------------------------------------------------------------------
# What a model costs, and what the device can do


def create_matmul(size):
    """A function that starts a product of two square matrices in `set_precision`'s precision."""
    x = np.random.default_rng(0).standard_normal((size, size), dtype="float32")
    x = keras.ops.convert_to_tensor(x, keras.config.dtype_policy().compute_dtype)
    return lambda: keras.ops.matmul(x, x)


def count_flops(model):
    """Floating-point operations of one picture's forward pass: matrix products, 2 per
    multiply-accumulate; norms, activations and softmax (under 1 % of a ViT) are left out.

    Computed from the layers' kernels and shapes, so that every backend counts the same. A kernel
    is used once per input position, one of Keras' convolutions once per output position; attention
    multiplies (queries, keys) and (scores, values).
    """
    flops = 0
    graph = getattr(model, "_functional", model)  # a Sequential's own
    for node in itertools.chain(*graph._nodes_by_depth.values()):  # one for each use of a layer
        layer, inputs, outputs = node.operation, node.input_tensors, node.outputs
        if isinstance(layer, keras.Model):
            flops += count_flops(layer)
            continue
        if not isinstance(layer, keras.Layer):
            continue  # an operation, which has no kernels
        positions = math.prod(inputs[0].shape[1:-1]) if inputs else 0  # those of its parts, too
        if hasattr(layer, "data_format"):
            is_first = layer.data_format == "channels_first"
            shape = outputs[0].shape
            positions = math.prod(shape[2:] if is_first else shape[1:-1])
        for part in layer._flatten_layers():
            # Separable and depthwise convolutions have kernels of their own names.
            for name in ("kernel", "depthwise_kernel", "pointwise_kernel"):
                kernel = getattr(part, name, None)
                flops += 2 * positions * math.prod(kernel.shape) if kernel is not None else 0
        if isinstance(layer, keras.layers.MultiHeadAttention):
            flops += 2 * 2 * positions**2 * layer.num_heads * layer.key_dim
    return flops
