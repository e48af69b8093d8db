"""Serving: figures of each batch size, load, weights from elsewhere, and what is refused."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    MODEL,
    ROOT,
    SMALL,
    child_environment,
    only_line,
    run_code,
    run_python,
    run_vit,
)
from PIL import Image

from harness import record

QUICK = ("--iterations=20", "--warmup=2")


def run_latency(folder, *flags, model_flags=MODEL, **environment):
    return run_python(folder, ROOT / "latency.py", *flags, "--", *model_flags, **environment)


def read_all(folder):
    records, problems = record.read_records(folder / "results.jsonl")
    assert problems == []
    return records


# ---- figures -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(backend, tmp_path_factory):
    """A batch size that cannot fit, and one that does."""
    folder = tmp_path_factory.mktemp("served")
    sizes = ("--batch-sizes", "1000000000", "4")
    done = run_latency(folder, *QUICK, *sizes, f"--keras-backend={backend}")
    return done, read_all(folder)


def test_each_batch_size_leaves_a_good_record(served, backend):
    done, records = served
    assert [item["status"] for item in records] == ["oom", "ok"], done.stderr
    assert [item["config"]["batch_size"] for item in records] == [10**9, 4]
    for item in records:
        assert record.check_record(item) == []
        assert (item["kind"], item["backend"]) == ("latency", backend)
    model = records[1]["model"]
    assert model["flops_per_image"] > model["parameters"] > 10_000
    # Writing a model's file holds it in memory once more, which would count as serving's.
    assert "bytes_on_disk" not in model


def test_the_figures_are_those_of_the_iterations(served):
    timing = served[1][1]["timing"]
    seconds = np.array(timing["iteration_seconds"])
    assert len(seconds) == 20 and (seconds > 0).all()
    for share in (50, 90, 95, 99):
        assert timing[f"p{share}_seconds"] == pytest.approx(np.percentile(seconds, share))
    assert timing["mean_seconds"] == pytest.approx(seconds.mean())
    assert timing["std_seconds"] == pytest.approx(seconds.std(ddof=1))
    assert timing["images_per_second"] == pytest.approx(4 / seconds.mean())
    assert timing["compile_seconds"] > seconds.max() and 0 < timing["copy_seconds"] < 0.1
    assert 0 < timing["mfu"] < 1


def test_a_batch_too_large_is_a_row_and_the_others_run(served):
    done, _ = served
    assert done.returncode == 3
    failed, title, names, row, *_ = done.stdout.splitlines()
    assert failed.startswith("1000000000 oom: out of memory: lower --batch-sizes 1000000000")
    assert names.split()[:3] == ["batch", "p50", "ms"] and row.split()[0] == "4"
    assert "not measured: energy.joules_per_image: " in done.stdout
    assert max(map(len, (failed, title, names, row))) <= 100


def test_models_are_counted_and_not_typed_in(tmp_path):
    done = run_latency(tmp_path, "--list-models", model_flags=())
    assert done.returncode == 0, done.stderr
    rows = {words[0]: words for line in done.stdout.splitlines() if (words := line.split())}
    assert rows["vit"][1:3] == ["21,759,012", "0.20"]
    assert rows["vit-b16"][1:] == ["86,567,656", "17.56", *"224 x 224 x 3".split()]
    assert rows["vit-l16"][1] == "304,326,632" and rows["vit-ti16"][1] == "5,717,416"
    assert rows["resnet50"][1:3] == ["25,636,712", "4.09"]


def test_either_data_format_computes_the_same(tmp_path, backend):
    code = f"""
import json
import numpy as np
import latency

flags = {list(MODEL)!r}
rng = np.random.default_rng(0)
found = []
for format in ("channels_last", "channels_first"):
    config = latency.LatencyConfig(data_format=format)
    model = latency.create_model(config, flags)
    if not found:
        weights, x = model.get_weights(), rng.integers(0, 256, (2, 32, 32, 3)).astype("float32")
    model.set_weights(weights)
    found.append(latency.keras.ops.convert_to_numpy(model(x, training=False)))
    x = x.transpose(0, 3, 1, 2)
print(json.dumps(float(abs(found[0] - found[1]).max())))
"""
    assert run_code(tmp_path, backend, code) < 1e-5


# ---- load --------------------------------------------------------------------------------------


def test_a_rate_beyond_reach_is_said(tmp_path):
    flags = ("--load=poisson", "--rate=100000", "--seconds=0.01")
    done = run_latency(tmp_path, *QUICK, *flags)
    assert done.returncode == 0, done.stderr
    (item,) = read_all(tmp_path)
    timing = item["timing"]
    assert record.check_record(item) == []
    assert len(timing["load_iteration_seconds"]) == 1000
    assert timing["served_per_second"] < 95_000
    assert any("requests/s could not be sustained" in note for note in item["notes"])
    assert "could not be sustained" in done.stdout
    # Those that come later wait for all before them.
    assert timing["load_p99_seconds"] > 10 * timing["p50_seconds"]


def test_load_reports_latency_and_the_highest_rate_that_keeps_it(tmp_path):
    flags = ("--load=uniform", "--rate=25", "--seconds=0.2", "--slo-ms=1000")
    done = run_latency(tmp_path, *QUICK, *flags)
    assert done.returncode == 0, done.stderr
    (item,) = read_all(tmp_path)
    timing = item["timing"]
    assert len(timing["load_iteration_seconds"]) == 5
    assert timing["slo_per_second"] > 0 and "p99 within 1000 ms up to" in done.stdout


def test_requests_wait_for_those_before_them(tmp_path):
    code = """
import json, time
import numpy as np
import latency

latencies, served, _ = latency.serve(lambda: time.sleep(0.05), np.array([0, 0, 0, 1.0]))
print(json.dumps([latencies.tolist(), served]))
"""
    latencies, served = run_code(tmp_path, "jax", code)
    first, second, third, late = latencies
    assert 0.05 <= first < second < third and second >= 0.1 and third >= 0.15
    assert late >= 0.05 and served < 4


def test_what_is_sustained_is_told_by_what_came(tmp_path):
    """On a clock of its own. Random arrivals may be fewer than their rate says, and under a
    generous limit a queue may grow for all of a short window"""
    code = """
import json
import latency


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


latency.time, found = Clock(), []
for seconds, choices in (
    (0.001, {"load": "poisson"}),
    (0.001, {"load": "poisson", "rate": 5.0, "seconds": 20.0}),
    (0.1, {"load": "poisson", "rate": 20.0}),
    (0.005, {"load": "uniform", "seconds": 1.0, "slo_ms": 1000.0}),
    (0.005, {"load": "uniform", "seconds": 10.0, "slo_ms": 6.0}),
):
    notes, config = [], latency.LatencyConfig(**choices)
    figures = latency.measure_load(config, lambda: latency.time.sleep(seconds), notes)
    found.append([notes, figures.get("slo_per_second")])
print(json.dumps(found))
"""
    plenty, fewer, overload, generous, strict = run_code(tmp_path, "jax", code)
    assert plenty == fewer == [[], None]
    assert "20 requests/s could not be sustained, 9." in overload[0][0]
    assert 200 / 1.05 < generous[1] < 200 * 1.06 and 200 / 1.05 < strict[1] < 200 * 1.06


# ---- weights from elsewhere --------------------------------------------------------------------

SHAKE = """
import torch

torch.manual_seed(0)


def shake(module):
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn_like(value) * 0.1
            value.copy_(value + (noise.abs() if "var" in name else noise))
    return module.eval()
"""
WEIGHTS = (
    SHAKE
    + """
import json
from pathlib import Path
import numpy as np
import keras
import latency, vit
from harness.resnet import create_resnet50
from harness.weights import load_state_dict
from peers import imagenet_torch

NAMES = [  # of timm and DeiT, where torchvision has others
    ("class_token", "cls_token"), ("encoder.pos_embedding", "pos_embed"),
    ("conv_proj.", "patch_embed.proj."), ("encoder.layers.encoder_layer_", "blocks."),
    ("ln_1", "norm1"), ("ln_2", "norm2"), ("self_attention.in_proj_", "attn.qkv."),
    ("self_attention.out_proj", "attn.proj"), ("mlp.0", "mlp.fc1"), ("mlp.3", "mlp.fc2"),
    ("encoder.ln", "norm"), ("heads.head", "head"),
]


def difference(model, module, side):
    x = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype("float32")
    ours = keras.ops.convert_to_numpy(model(x, training=False))
    theirs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    return float(abs(ours - theirs).max() / abs(theirs).max())


def create():
    flags = "--image-size 32 --patch-size 8 --pool token --projection-dim 64 --num-heads 4"
    flags += " --head-dim 16 --transformer-layers 2 --mlp-ratio 2 --mlp-head-units"
    config = vit.parse_config([*flags.split(), "--dropout=0", "--num-classes=10"])
    return vit.create_vit_classifier(config, mean=0.0, variance=1.0)


found = {}
module = shake(imagenet_torch.VisionTransformer(32, 8, 64, 2, 4, 128, 10))
torch.save(module.state_dict(), "vit.pth")
load_state_dict(model := create(), Path("vit.pth"))
found["torchvision"] = difference(model, module, 32)
named = {}
for name, value in module.state_dict().items():
    for old, new in NAMES:
        name = name.replace(old, new)
    named[name] = value
torch.save({"model": named}, "deit.pth")
load_state_dict(model := create(), Path("deit.pth"))
found["timm"] = difference(model, module, 32)
from safetensors.torch import save_file
save_file({k: v.contiguous() for k, v in named.items()}, "vit.safetensors")
load_state_dict(model := create(), Path("vit.safetensors"))
found["safetensors"] = difference(model, module, 32)
module = shake(imagenet_torch.ResNet50())
torch.save(module.state_dict(), "resnet.pth")
load_state_dict(model := create_resnet50(), Path("resnet.pth"))
found["resnet"] = difference(model, module, 224)
config = latency.LatencyConfig(model="vit-ti16", normalization="half")
prepare = next(part for part in latency.create_model(config, []).layers if hasattr(part, "mean"))
found["half"] = np.ravel(keras.ops.convert_to_numpy(prepare.mean)).tolist()
print(json.dumps(found))
"""
)


def test_weights_of_torchvision_timm_and_deit_give_their_logits(tmp_path, backend):
    found = run_code(tmp_path, backend, WEIGHTS)
    assert found.pop("half") == [127.5] * 3
    assert set(found) == {"torchvision", "timm", "safetensors", "resnet"}
    assert max(found.values()) < 1e-4, found
    # The ResNet's are no Vision Transformer's: the first ten that clash, and how many there are.
    flags = ("--model=vit-ti16", "--weights=resnet.pth", "--batch-sizes=1")
    done = run_latency(tmp_path, *flags, f"--keras-backend={backend}", model_flags=())
    line = only_line(done)
    assert done.returncode == 2 and line.count(";") == 9
    assert "--weights resnet.pth is of another architecture: " in line
    scaled = ("--variant=Ti/4", "--layer-scale=0.1", "--image-size=32")
    flags = ("--weights=vit.safetensors", "--batch-sizes=1", f"--keras-backend={backend}")
    done = run_latency(tmp_path, *flags, model_flags=scaled)
    assert done.returncode == 2 and "expected a model without --layer-scale" in only_line(done)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--batch-sizes", "1", "0"], "--batch-sizes: expected sizes above 0, got 1 0"),
        (["--model=vgg"], "--model: expected a file PATH.keras or one of vit, vit-ti16"),
        (["--model=none.keras"], "--model: expected a Keras model, got none.keras"),
        (["--model=text.keras"], "expected a Keras model, got text.keras: it is no zip archive"),
        (["--model=resnet50", "--weights=text.pth"], "--weights: expected a state dict in .pth"),
        (["--slo-ms=5"], "--slo-ms: expected milliseconds above 0, and --load"),
        (["--load=uniform", "--rate=0"], "--rate: expected above 0, got 0"),
        (["--native"], "--native: expected --model vit-b16 or resnet50, got vit"),
        (["--keras-backend=mxnet"], "invalid choice 'mxnet'"),
        (["--keras-backend=tensorflow"], "the tensorflow backend is not installed: pip install"),
        (["--export", "torch"], "--export torch: expected another --keras-backend than jax"),
        (["--export", "onnx", "--precision=bfloat16"], "--export: expected --precision float32"),
        (["--dataset=none"], "--dataset: expected cifar100, synthetic or a folder, got none"),
        (["--iterations=1"], "--iterations: expected 2 or more, got 1"),
        (["--export", "onnx", "--export-path=text.pth"], "--export-path: expected a file that can"),
        (["--data-format=channels_first", "--model=text.keras"], "--data-format: expected none"),
        (["--native", "--model=vit-b16", "--precision=float16"], "or bfloat16, got float16"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, told):
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "text.pth").write_text("no weights")
    done = run_latency(tmp_path, *flags, model_flags=())
    assert done.returncode == 2 and told in only_line(done)


def test_a_file_is_served_in_the_precision_that_it_was_saved_in(tmp_path):
    """Its layers say what they compute in, whatever is asked for"""
    code = f"""
import json
import vit
from harness import engine
for precision in ("float32", "bfloat16"):
    engine.set_precision(precision)
    model = vit.create_vit_classifier(vit.parse_config({list(MODEL)!r}))
    model.save(precision + ".keras")
print(json.dumps(0))
"""
    run_code(tmp_path, "jax", code)
    flags = ("--batch-sizes=1", *QUICK)
    parity = ("--backends", "jax", "--observed=jax.npz", "--steps=0", "--precision=bfloat16")
    for saved, code in (("float32", 2), ("bfloat16", 0)):
        done = run_python(tmp_path, ROOT / "parity.py", f"--model={saved}.keras", *parity)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert code == 0 or "--precision: expected float32, in which" in done.stderr
    for saved, asked in (("float32", "bfloat16"), ("bfloat16", "float32")):
        model = f"--model={saved}.keras"
        done = run_latency(tmp_path, model, f"--precision={asked}", *flags, model_flags=())
        told = f"--precision: expected {saved}, in which {saved}.keras was saved, got {asked}"
        assert done.returncode == 2 and only_line(done).endswith(told)
        done = run_latency(tmp_path, model, f"--precision={saved}", *flags, model_flags=())
        assert done.returncode == 0, done.stderr
    torn = bytearray((tmp_path / "float32.keras").read_bytes())
    torn[2000:4000] = bytes(2000)
    (tmp_path / "torn.keras").write_bytes(torn)
    done = run_latency(tmp_path, "--model=torn.keras", *flags, model_flags=())
    assert done.returncode == 2 and "expected a Keras model, got torn.keras" in only_line(done)


def test_a_row_says_where_it_was_computed_if_not_on_the_gpu(capsys):
    import latency

    def create(kind):
        report = record.create_record("latency", status="ok", backend="torch")
        report["config"] = {"batch_size": 1, "runtime": "onnx", "export": ["onnx"], "model": "vit"}
        report["device"] = {"kind": kind, "name": "a device"}
        report["timing"] = {"p50_seconds": 0.001}
        report["model"] = {"parameters": 5}
        return {**report, "config": {**report["config"], "load": "none", "slo_ms": None}}

    for first, told in (("gpu", [False, True]), ("cpu", [False, False])):
        table = latency.Table()
        for kind in (first, "cpu"):
            table.add(create(kind))
        rows = capsys.readouterr().out.splitlines()[-2:]
        assert [row.endswith("on the CPU") for row in rows] == told


@pytest.mark.parametrize("sizes", [["1"], ["1", "2"]])
def test_nobody_reads_the_table(tmp_path, sizes):
    words = [sys.executable, ROOT / "latency.py", "--batch-sizes", *sizes, *QUICK, "--", *MODEL]
    environment = child_environment(tmp_path)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_code_in_a_model_is_not_run(tmp_path):
    code = """
import keras
run = keras.layers.Lambda(lambda x: (open("ran", "w"), x)[1])
keras.Sequential([keras.Input((32, 32, 3)), run, keras.layers.Flatten()]).save("strange.keras")
print(1)
"""
    run_code(tmp_path, "jax", code)
    (tmp_path / "ran").unlink(missing_ok=True)
    done = run_latency(tmp_path, "--model=strange.keras", "--batch-sizes=1", model_flags=())
    assert done.returncode == 2 and "arbitrary code execution" in only_line(done)
    assert not (tmp_path / "ran").exists()


def test_a_model_of_two_outputs_is_neither_exported_nor_checked(tmp_path):
    code = """
import json
import keras

pixels = keras.Input((8, 8, 3))
x = keras.layers.Flatten()(pixels)
keras.Model(pixels, [keras.layers.Dense(n)(x) for n in (2, 3)]).save("two.keras")
print(json.dumps(True))
"""
    run_code(tmp_path, "jax", code)
    flags = ("--model=two.keras", "--batch-sizes=1", *QUICK, "--export", "onnx")
    told = "expected one output of logits (batch, classes), got [(None, 2), (None, 3)]"
    done = run_latency(tmp_path, *flags, model_flags=())
    assert done.returncode == 2 and f"--export: {told}" in done.stderr
    words = (ROOT / "parity.py", "--model=two.keras", "--backends", "jax", "torch")
    done = run_python(tmp_path, *words)
    assert done.returncode == 2 and f"--model two.keras: {told}" in done.stderr
    assert "Traceback" not in done.stderr


def test_flags_before_and_after_the_dashes(tmp_path):
    done = run_latency(tmp_path, model_flags=("--precision=bfloat16",))
    assert done.returncode == 2 and only_line(done).endswith(
        "error: --precision: expected before --"
    )
    done = run_latency(tmp_path, "--model=resnet50")
    assert done.returncode == 2 and "for --model vit alone" in only_line(done)


def test_ctrl_c_waits_for_the_record_of_a_row(tmp_path):
    """A row that takes a second to end, as one does within a large batch, after it was told to."""
    child = """
import os, signal, sys, time
from harness import record

def stop(number, frame):
    time.sleep(1)
    fields = {"id": os.environ["VIT_RECORD_ID"], "status": "interrupted", "error": "Ctrl-C"}
    record.append_record("results.jsonl", record.create_record("latency", **fields))
    sys.exit(130)

signal.signal(signal.SIGINT, stop)
print("begun", flush=True)
time.sleep(60)
"""
    code = f"""
import sys
sys.argv[1:] = ["--batch-sizes", "1", "2", "--results-path=results.jsonl", "--no-verbose"]
import latency
sys.orig_argv = [sys.executable, "-c", {child!r}]
sys.exit(latency.measure_each(*latency.parse_words(sys.argv[1:])))
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=child_environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with parent:
        assert parent.stdout.readline() == "begun\n"
        os.killpg(parent.pid, signal.SIGINT)
    assert parent.returncode == 130
    assert [item["status"] for item in read_all(tmp_path)] == ["interrupted"]


# ---- other runtimes ----------------------------------------------------------------------------

EXPORTED = {  # what each backend is asked for, and which of it is not here
    "jax": ["onnx-int8", "keras-int8", "openvino", "savedmodel"],  # openvino reads onnx
    "torch": ["onnx", "torch", "tensorrt"],  # more would compile for minutes
}
ABSENT = {
    "savedmodel": "tensorflow not installed: pip install '.[tensorflow]'",
    "tensorrt": "this onnxruntime has no TensorRT: pip install onnxruntime-gpu, TensorRT",
}


def test_a_trained_model_is_as_good_in_every_runtime(tmp_path, backend):
    flags = ["--num-epochs=3", "--trainer=fit", "--model-path=m.keras"]
    done = run_vit(tmp_path, *SMALL, *flags, backend=backend)
    assert done.returncode == 0, done.stderr
    (trained,) = read_all(tmp_path)
    flags = [f"--keras-backend={backend}", "--model=m.keras", "--batch-sizes=8", *QUICK]
    flags += ["--export", *EXPORTED[backend], "--export-path=files"]
    flags += ["--dataset=synthetic", "--test-images=100", "--iterations=5"]
    done = run_latency(tmp_path, *flags, model_flags=())
    assert done.returncode == 7, done.stdout + done.stderr
    items = {item["config"]["runtime"]: item for item in read_all(tmp_path)[1:]}
    assert list(items) == ["compiled", "predict", *EXPORTED[backend]]
    for name, item in items.items():
        assert record.check_record(item) == []
        if name in ABSENT:
            assert (item["status"], item["error"]) == ("error", ABSENT[name])
            continue
        assert item["status"] == "ok", item["error"]
        quality, is_rounded = item["quality"], name.endswith("int8")
        expected = trained["quality"]["test_accuracy"]
        assert expected == pytest.approx(quality["test_accuracy"], abs=0.05 if is_rounded else 1e-6)
        assert quality["logits_difference"] < (0.2 if is_rounded else 1e-5)
        assert not is_rounded or quality["logits_difference"] > 1e-4
        assert item["model"]["bytes_on_disk"] > item["model"]["parameters"]
        assert list((tmp_path / "files" / f"8-{name}").iterdir())
    table = done.stdout.splitlines()
    assert table[1].split()[:2] == ["batch", "runtime"] and table[1].split()[-1] == "off"
    assert all(line.split()[0] == "8" for line in table[2 : 2 + len(items)])


def test_a_wrong_export_shows(tmp_path):
    code = f"""
import json
import numpy as np
import latency

model = latency.create_model(latency.LatencyConfig(), {list(MODEL)!r})
pictures = latency.draw_pixels((32, 32, 3), 6, 0)[0]
right = latency.keras.ops.convert_to_numpy(model(pictures, training=False))
labels = right.argmax(axis=-1)
found = []
for run in (model, lambda x: model(x[:, ::-1])):
    server = latency.Server(lambda pixels: pixels.astype("float32"), run)
    found.append(latency.measure_quality(server, 4, pictures, labels, right[:4]))
print(json.dumps(found))
"""
    right, upside_down = run_code(tmp_path, "jax", code)
    assert right["test_accuracy"] == 1 and right["logits_difference"] < 1e-5
    assert upside_down["test_accuracy"] < 1 and upside_down["logits_difference"] > 1e-3


def test_a_model_of_other_pictures_is_exported_without_an_accuracy(tmp_path):
    code = """
import json
import keras

layers = keras.layers.Input((48, 48, 3)), keras.layers.Flatten(), keras.layers.Dense(5)
keras.Sequential(layers).save("m.keras")
print(json.dumps(True))
"""
    run_code(tmp_path, "jax", code)
    flags = ("--model=m.keras", "--batch-sizes=1", *QUICK, "--export", "onnx", "onnx-int8")
    done = run_latency(tmp_path, *flags, model_flags=())
    *_, plain, rounded = read_all(tmp_path)
    assert done.returncode == 7 and plain["status"] == "ok", done.stderr
    assert plain["quality"]["test_accuracy"] is None and record.check_record(plain) == []
    assert plain["quality"]["logits_difference"] < 1e-5
    told = "expected a --dataset of the model's pictures, to calibrate it with these"
    assert rounded["error"] == told


def test_a_folder_with_few_pictures_and_channels_first(tmp_path):
    """Fewer than are wanted to calibrate with; the model may want its colours first"""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / split / label).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 256, (40, 36, 3), "uint8")
                Image.fromarray(pixels).save(tmp_path / f"pets/{split}/{label}/{number}.png")
    (tmp_path / "pets/train/cat/notes.txt").write_text("no picture")
    model_flags = (*MODEL, "--num-classes=2")
    flags = ["--batch-sizes=4", *QUICK, "--dataset=pets", "--export", "onnx-int8"]
    done = run_latency(tmp_path, *flags, "--data-format=channels_first", model_flags=model_flags)
    assert done.returncode == 0, done.stdout + done.stderr
    items = read_all(tmp_path)
    assert len(items) == 3 and {item["quality"]["test_images"] for item in items} == {12}
    assert all(item["quality"]["test_accuracy"] is not None for item in items)
    assert "not measured: quality" not in done.stdout


# ---- the models by hand ------------------------------------------------------------------------

NATIVE = (
    SHAKE
    + """
import json
import keras
import numpy as np
import latency, vit
from peers import imagenet_torch


def apart(ours, module, x):
    theirs = module(torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    return float(abs(keras.ops.convert_to_numpy(ours) - theirs).max() / abs(theirs).max())


def to_numpy(tensor):
    return tensor.detach().numpy()


def dense(weight, bias):
    return {"kernel": to_numpy(weight).T, "bias": to_numpy(bias)}


def layer(part):
    return dense(part.weight, part.bias)


def norm(part):
    return {"scale": to_numpy(part.weight), "bias": to_numpy(part.bias)}


def convolution(part, after):
    moments = {"mean": to_numpy(after.running_mean), "variance": to_numpy(after.running_var)}
    return {"kernel": to_numpy(part.weight.permute(2, 3, 1, 0)), **norm(after), **moments}


def block(part):
    attention = part.self_attention
    return {
        "norm1": norm(part.ln_1),
        "qkv": dense(attention.in_proj_weight, attention.in_proj_bias),
        "out": layer(attention.out_proj),
        "norm2": norm(part.ln_2),
        "mlp": [layer(part.mlp[0]), layer(part.mlp[3])],
    }


def bottleneck(part):
    layers = [(part.conv1, part.bn1), (part.conv2, part.bn2), (part.conv3, part.bn3)]
    shortcut = [convolution(*part.downsample)] if part.downsample else []
    return {"layers": [convolution(*pair) for pair in layers], "shortcut": shortcut}


found = {}
small = shake(imagenet_torch.VisionTransformer(32, 8, 64, 2, 4, 128, 10))
imagenet_torch.MODELS["vit-b16"] = lambda: small
if vit.engine.BACKEND == "jax":
    from peers import imagenet_jax

    for name, value in dict(
        DIM=64, DEPTH=2, HEADS=4, HIDDEN=128, PATCH=8, SIZE=32, CLASSES=10, TOKENS=17
    ).items():
        setattr(imagenet_jax, name, value)
    kernel = to_numpy(small.conv_proj.weight.permute(2, 3, 1, 0).reshape(-1, 64))
    tree = {
        "token": to_numpy(small.class_token),
        "positions": to_numpy(small.encoder.pos_embedding),
        "patches": {"kernel": kernel, "bias": to_numpy(small.conv_proj.bias)},
        "blocks": [block(part) for part in small.encoder.layers.values()],
        "norm": norm(small.encoder.ln),
        "head": layer(small.heads.head),
    }
    imagenet_jax.MODELS["vit-b16"] = lambda rng, tree=tree: tree, imagenet_jax.apply_vit
    resnet = shake(imagenet_torch.ResNet50())
    stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    stages = [[bottleneck(part) for part in stage] for stage in stages]
    stem = convolution(resnet.conv1, resnet.bn1)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    tree = {"stem": stem, "stages": stages, "head": layer(resnet.fc)}
    logits = imagenet_jax.apply_resnet(tree, x)
    found["resnet50"] = apart(logits, resnet, x)
config = latency.LatencyConfig(model="vit-b16", native=True, keras_backend=vit.engine.BACKEND)
report = {"precision": "float32", "model": {}, "notes": []}
server = latency.start_native(config, report)
assert report["model"]["parameters"] == sum(value.numel() for value in small.parameters())
mean, variance = latency.list_moments(config.normalization)
pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), "uint8")
x = ((pixels - np.array(mean)) / np.sqrt(variance)).astype("float32")
found["served"] = apart(server.run(server.put(pixels)), small, x)
print(json.dumps(found))
"""
)


def test_the_models_by_hand_compute_what_torchvisions_do(tmp_path, backend):
    """In JAX by the weights of those in PyTorch, which are those of Keras' in the tests above; and
    served, small, as `--native` serves them"""
    found = run_code(tmp_path, backend, NATIVE)
    assert set(found) == {"served"} | ({"resnet50"} if backend == "jax" else set())
    assert max(found.values()) < 1e-4, found


def test_the_models_by_hand_do_the_same_work(tmp_path):
    code = """
import json
import jax
import numpy as np
import latency
from peers import imagenet_jax

found = {}
for name in latency.NATIVE:
    moments = latency.list_moments("imagenet")
    model = latency.MODELS[name]("channels_last", moments)
    forward, parameters = imagenet_jax.create_forward(name, *moments, "float32")
    pixels = np.zeros((1, 224, 224, 3), "uint8")
    cost = jax.jit(forward).lower(pixels).cost_analysis()
    found[name] = [
        parameters,
        int(sum(np.prod(v.shape) for v in model.trainable_variables)),
        cost["flops"] / latency.engine.count_flops(model),
        list(jax.eval_shape(forward, pixels).shape),
    ]
print(json.dumps(found))
"""
    found = run_code(tmp_path, "jax", code)
    parameters, ours, flops, shape = found["vit-b16"]
    assert parameters == ours == 86_567_656 and 1 <= flops < 1.03 and shape == [1, 1000]
    parameters, ours, flops, shape = found["resnet50"]
    # Keras' convolutions have a bias before each batch normalisation: 26,560 numbers more. XLA
    # does not count products with the zeros around a picture.
    assert parameters + 26_560 == ours and 0.95 < flops < 1.03 and shape == [1, 1000]
