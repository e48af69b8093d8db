"""A Keras model as the file of another runtime, by Keras' own exporter where there is one, and that
runtime serving it.

Each function of EXPORTS takes a model, the shape of a batch (batch, height, width, channels), a
folder and pictures for calibration, and returns Served.
"""

import importlib.util
import io
import logging
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harness.environment import count_cores


class Served(NamedTuple):
    """A model in its runtime."""

    serve: Callable  # from float32 pixels of the one batch to logits, both NumPy
    files: list  # what it was written to
    package: str  # of the runtime, for its version
    on_gpu: bool = False  # where it computes


class ExportError(Exception):
    """A runtime that is not here, or a model that it does not take; the message is one line."""

    ending = ("error", 7)  # status and exit code


@contextmanager
def quiet(module):
    """Converters tell of each layer that they meet; a failure's first line is all that is kept."""
    with (
        warnings.catch_warnings(action="ignore"),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        logging.disable(logging.WARNING)
        try:
            yield
        except Exception as error:
            line = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
            raise ExportError(f"{module} does not take this model: {line}") from error
        finally:
            logging.disable(logging.NOTSET)


def write(model, shape, form, path, **choices):
    """Write the file of one of Keras' formats, for one batch (batch, height, width, channels)."""
    import keras

    pixels = keras.InputSpec(shape=shape, dtype="float32", name="pixels")
    with quiet(form):
        model.export(str(path), format=form, input_signature=[pixels], verbose=False, **choices)
    return path


def write_onnx(model, shape, folder):
    """[the ONNX file, and what of a large model's weights lies beside it]"""
    path = write(model, shape, "onnx", folder / "model.onnx")
    return [path, *folder.glob("model.onnx.data")]


def start_onnx(files, providers):
    """onnxruntime on the first of `files`, by the first of `providers` that it has here."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    has = onnxruntime.get_available_providers()
    providers = [name for name in (*providers, "CPUExecutionProvider") if name in has]
    exact = {"CUDAExecutionProvider": {"use_tf32": "0"}}  # by default it rounds factors to TF32
    providers = [(name, exact.get(name, {})) for name in providers]
    session = onnxruntime.InferenceSession(files[0], options, providers=providers)
    name = session.get_inputs()[0].name
    on_gpu = session.get_providers()[0] != "CPUExecutionProvider"
    return Served(lambda x: session.run(None, {name: x})[0], files, "onnxruntime", on_gpu)


def export_onnx(model, shape, folder, pictures, providers=("CUDAExecutionProvider",)):
    return start_onnx(write_onnx(model, shape, folder), providers)


def export_tensorrt(model, shape, folder, pictures):
    import onnxruntime

    provider = "TensorrtExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ExportError("this onnxruntime has no TensorRT: pip install onnxruntime-gpu, TensorRT")
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # which its libraries read when they are loaded
    return export_onnx(model, shape, folder, pictures, providers=(provider,))


def export_onnx_int8(model, shape, folder, pictures):
    """Static quantisation of weights and of what flows between the products, by the range that
    `pictures` have there; a scale a tensor, since with one a channel onnxruntime 1.32 fails on the
    products that JAX's models have, and was no closer on PyTorch's."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if pictures is None:
        raise ExportError(
            "expected a --dataset of the model's pictures, to calibrate it with these"
        )
    # From opset 21 on onnxruntime 1.32 gives an activation two types.
    plain = write(model, shape, "onnx", folder / "plain.onnx", opset_version=20)
    onnx.save(onnx.load(plain), plain)  # in one file: preparing it does not find a second one
    ready, path = folder / "ready.onnx", folder / "model.int8.onnx"

    class Batches(quantization.CalibrationDataReader):
        def __init__(self):
            count = max(len(pictures) // shape[0], 1)
            batches = np.resize(pictures, (count, *shape)).astype("float32")
            self.batches = iter({"pixels": batch} for batch in batches)

        def get_next(self):
            return next(self.batches, None)

    with quiet("onnxruntime"):
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            path,
            Batches(),
            reduce_range=saturates(),
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        )
    return start_onnx([path], ())


def saturates():
    """Whether this processor adds up products of 8 bits in 16, so that weights should have 7 bits:
    an x86 without VNNI
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html)."""
    try:
        return platform.machine() == "x86_64" and "vnni" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def export_openvino(model, shape, folder, pictures):
    import keras
    import openvino

    if keras.backend.backend() == "torch":
        path = write(model, shape, "openvino", folder / "model.xml")
        files = [path, path.with_suffix(".bin")]
    else:  # there Keras' exporter needs TensorFlow; OpenVINO also reads ONNX
        files = write_onnx(model, shape, folder)
    # Without the hint it would compute in bfloat16 where the processor has that.
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(files[0], "CPU", hints)
    return Served(lambda pixels: compiled(pixels)[0], files, "openvino")


def export_torch(model, shape, folder, pictures):
    """torch.export's program, compiled ahead of time by AOTInductor."""
    import torch

    exported, path = write(model, shape, "torch", folder / "model.pt2"), folder / "model.aoti.pt2"
    device = model.trainable_variables[0].value.device
    with quiet("AOTInductor"):
        program = torch.export.load(exported)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        run = torch._inductor.aoti_load_package(str(path))

    @torch.no_grad()
    def serve(pixels):
        return run(torch.from_numpy(pixels).to(device)).cpu().numpy()

    return Served(serve, [path], "torch", on_gpu=device.type == "cuda")


def export_litert(model, shape, folder, pictures):
    from ai_edge_litert.interpreter import Interpreter

    path = write(model, shape, "litert", folder / "model.tflite")
    interpreter = Interpreter(str(path), num_threads=max(1, int(count_cores())))
    interpreter.allocate_tensors()
    given, got = (
        interpreter.get_input_details()[0]["index"],
        interpreter.get_output_details()[0]["index"],
    )

    def serve(pixels):
        interpreter.set_tensor(given, pixels)
        interpreter.invoke()
        return interpreter.get_tensor(got)

    return Served(serve, [path], "ai-edge-litert")


def export_savedmodel(model, shape, folder, pictures):
    import keras
    import tensorflow

    on_gpu = bool(tensorflow.config.list_physical_devices("GPU"))
    if keras.backend.backend() == "jax" and not on_gpu:
        import jax

        if jax.default_backend() == "gpu":
            remedy = "pip install '.[tensorflow-cuda12]'"
            raise ExportError(f"JAX writes it for a GPU, and TensorFlow finds none: {remedy}")
    path = write(model, shape, "tf_saved_model", folder / "saved_model")
    loaded = tensorflow.saved_model.load(str(path))  # which owns the variables
    return Served(lambda pixels: loaded.serve(pixels).numpy(), [path], "tensorflow", on_gpu)


EXTRA = "pip install '.[export]'"
LITERT = "pip install litert-torch, then pip install --upgrade typing-extensions"
EXPORTS = {  # name: function; by backend the modules that it needs; where to get them
    "onnx": (
        export_onnx,
        {"jax": "jax2onnx onnxruntime", "torch": "onnxscript onnxruntime"},
        EXTRA,
    ),
    "openvino": (export_openvino, {"jax": "jax2onnx openvino", "torch": "openvino"}, EXTRA),
    "torch": (export_torch, {"torch": ""}, ""),
    "litert": (export_litert, {"torch": "litert_torch ai_edge_litert"}, LITERT),
    "savedmodel": (
        export_savedmodel,
        {"jax": "tensorflow", "tensorflow": ""},
        "pip install '.[tensorflow]'",
    ),
}
EXPORTS["onnx-int8"] = (export_onnx_int8, *EXPORTS["onnx"][1:])
EXPORTS["tensorrt"] = (export_tensorrt, *EXPORTS["onnx"][1:])


def export_model(name, model, batch_size, folder, pictures):
    """Write a model and start its runtime.

    Args:
        name: of EXPORTS.
        folder: for the file, which a runtime may read while it serves.
        pictures: uint8 (n, height, width, channels) to calibrate 8 bits with, or None.

    Returns:
        Served.

    Raises:
        ExportError.
    """
    import keras

    function, needed, remedy = EXPORTS[name]
    modules = needed[keras.backend.backend()].split()
    if missing := [module for module in modules if importlib.util.find_spec(module) is None]:
        raise ExportError(f"{' and '.join(missing)} not installed: {remedy}")
    return function(model, (batch_size, *model.input_shape[1:]), folder, pictures)


def count_bytes(paths):
    """Bytes of files, and of all that is in folders."""
    inner = [path for top in paths for path in ([top] if top.is_file() else top.rglob("*"))]
    return sum(path.stat().st_size for path in inner if path.is_file())
