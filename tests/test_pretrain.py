"""pretrain.py as a person uses it: pre-training, its picture, and fine-tuning from its weights."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import (
    ROOT,
    SMALL,
    child_environment,
    only_line,
    read_last_record,
    run_code,
    run_vit,
)
from PIL import Image

from harness.cli import parse

MODEL = (*SMALL, "--num-epochs=6", "--warmup-epochs=1", "--learning-rate=0.005")

run_pretrain = partial(run_vit, script="pretrain.py")


@pytest.fixture(scope="module")
def pretrained(backend, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    done = run_pretrain(folder, *MODEL, "--pool=token", backend=backend)
    assert done.returncode == 0, done.stderr
    assert "pretrained.npz" in done.stdout and "loss" in done.stdout
    return folder


def test_it_learns_and_leaves_a_record(pretrained, backend):
    record = read_last_record(pretrained)
    assert (record["kind"], record["status"], record["backend"]) == ("pretrain", "ok", backend)
    loss = record["quality"]["loss"]
    assert len(loss) == 6 and loss[-1] < 0.9 * loss[0] < 1.5  # 1 is painting the mean colour
    assert record["config"]["mask_ratio"] == 0.75 and record["model"]["parameters"] > 10_000


def test_the_picture_shows_masked_painted_and_whole(pretrained):
    grid = np.asarray(Image.open(pretrained / "pretrained.png"), "int32")
    assert grid.shape == (8 * 96, 3 * 96, 3)  # eight pictures of 32 pixels, three times as large
    masked, painted, whole = grid[:, :96], grid[:, 96:192], grid[:, 192:]
    same = (masked == whole).all(axis=2)
    assert 0.2 < same.mean() < 0.35  # a quarter is seen
    assert (painted == whole).all(axis=2)[same].all()
    error = [abs(picture - whole)[~same].mean() for picture in (masked, painted)]
    assert error[1] < error[0]  # the decoder's guess is nearer than the mean colour


def test_fine_tuning_starts_from_the_encoder(pretrained, backend, tmp_path):
    flags = [*SMALL, "--pool=token", "--trainer=fit"]
    flags += [f"--init-weights={pretrained / 'pretrained.npz'}"]
    done = run_vit(tmp_path, *flags, backend=backend)
    assert done.returncode == 0, done.stderr
    code = f"""
import json, vit
from harness.weights import list_encoder_weights, load_encoder_weights
import numpy as np
config = vit.parse_config({flags!r})
model = vit.create_vit_classifier(config)
before = [v.numpy().copy() for _, v in list_encoder_weights(model)]
load_encoder_weights(model, config.init_weights)
given = dict(np.load(config.init_weights))
after = [v.numpy() for _, v in list_encoder_weights(model)]
print(json.dumps([len(after), sum(bool((a != b).any()) for a, b in zip(after, before)),
                  all((a == given[name]).all() for a, (name, _) in
                      zip(after, list_encoder_weights(model)))]))
"""
    count, changed, same = run_code(tmp_path, backend, code)
    assert count == len(np.load(pretrained / "pretrained.npz").files) == changed and same


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--pool=flatten"], "2 weights differ from the 21 here: 000 class_token missing"),
        (["--pool=token", "--projection-dim=16"], "of another architecture"),
    ],
)
def test_weights_of_another_architecture_are_refused(pretrained, tmp_path, backend, flags, told):
    given = f"--init-weights={pretrained / 'pretrained.npz'}"
    done = run_vit(tmp_path, *SMALL, *flags, given, backend=backend)
    assert done.returncode == 2 and told in only_line(done)
    assert read_last_record(tmp_path)["status"] == "error"


@pytest.mark.parametrize("content", [None, b"", b"no weights", b"PK\x03\x04torn"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, content):
    path = tmp_path / "weights.npz"
    if content is not None:
        path.write_bytes(content)
    done = run_vit(tmp_path, *SMALL, f"--init-weights={path}")
    assert done.returncode == 2 and "expected a file of pretrain.py, got" in only_line(done)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--stem=conv", "--patch-size=4", "--image-size=32"], "--stem: expected patch"),
        (["--mask-ratio=1"], "--mask-ratio: expected to hide some of 144 patches"),
        (["--decoder-dim=30"], "--decoder-dim: expected a multiple of 4"),
        (["--mixup=0.5"], "there are no labels"),
        (["--trainer=fit"], "expected compiled training"),
        (
            ["--recipe=mae"],
            "--recipe: expected none, which are for training with labels; got mae",
        ),
        (["--variant=XXL/4"], "--variant: expected SIZE/PATCH"),
        (["--validation-split=0.2"], "--validation-split: expected 0"),
        (["--model-path=m.keras"], "--weights-path has the encoder's"),
        (["--fit-memory"], "expected a smaller --micro-batch-size"),
    ],
)
def test_clashes_are_one_line(capsys, flags, told):
    import pretrain

    with pytest.raises(SystemExit, match="2"):
        parse(pretrain.PretrainConfig, flags, "", pretrain.vit.PRESETS)
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1


def test_pre_training_goes_on_from_weights(pretrained, backend, tmp_path):
    flags = [*MODEL, "--pool=token", f"--init-weights={pretrained / 'pretrained.npz'}"]
    done = run_pretrain(tmp_path, *flags, backend=backend)
    assert done.returncode == 0, done.stderr
    first, later = (
        read_last_record(folder)["quality"]["loss"] for folder in (pretrained, tmp_path)
    )
    assert later[0] < first[0]
    done = run_pretrain(tmp_path, *MODEL, "--pool=token", "--init-weights=none.npz")
    assert done.returncode == 2 and "expected a file of pretrain.py" in only_line(done)


def test_a_picture_of_no_known_kind(tmp_path):
    done = run_pretrain(tmp_path, "--grid-path=pictures")
    assert done.returncode == 2 and "--grid-path: expected a name that ends" in only_line(done)


def test_a_clash_ends_it(tmp_path):
    done = run_pretrain(tmp_path, "--mixup=0.5")
    assert done.returncode == 2
    assert only_line(done).startswith("pretrain.py: error: --mixup, --cutmix: expected none")


def test_a_run_that_is_killed_goes_on(tmp_path):
    flags = [*SMALL, "--num-epochs=20", "--warmup-epochs=1", "--no-use-wandb"]
    found = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "killed":
            words = [sys.executable, "-u", str(ROOT / "pretrain.py"), *flags]
            settings = {"cwd": folder, "env": child_environment(folder), "text": True}
            with subprocess.Popen(words, stdout=subprocess.PIPE, **settings) as child:
                while not child.stdout.readline().startswith("epoch 3/"):
                    assert child.poll() is None
                child.kill()
            assert not (folder / "pretrained.npz").exists()
            flags.append("--resume")
        done = run_pretrain(folder, *flags)
        assert done.returncode == 0, done.stderr
        found.append(read_last_record(folder)["quality"]["loss"])
        with np.load(folder / "pretrained.npz") as arrays:
            found.append([arrays[name].tolist() for name in arrays.files])
    assert "goes on after epoch" in done.stdout
    assert found[:2] == found[2:]


def test_masks_differ_between_pictures_and_epochs(tmp_path):
    code = """
import json, pretrain
config = pretrain.PretrainConfig(image_size=32, patch_size=8)
masks = [pretrain.draw_masks(config, 50, epoch) for epoch in (0, 0, 1)]
print(json.dumps([config.num_visible, (masks[0] == masks[1]).all().item(),
                  (masks[0] == masks[2]).mean().item(), len({tuple(m) for m in masks[0].tolist()}),
                  sorted(masks[0][0].tolist())]))
"""
    visible, repeats, between, different, order = run_code(tmp_path, "jax", code)
    assert visible == 4 and repeats and between < 0.2 and different == 50
    assert order == list(range(16))
