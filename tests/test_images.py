"""The Dockerfiles and scripts as text; and the images, built and run, where `make test-images` asks
for it: IMAGES names them, BUILD_ARGS and GPU are flags of `docker build` and `docker run`."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, read_last_record, run_vit

from harness import requirements

DOCKERFILES = sorted(ROOT.glob("Dockerfile.*"))
SECRET = "key-that-must-not-travel"
SOMEBODY = os.getuid() or 12345  # root's files would prove nothing
FRAMEWORKS = ("jax", "cuda12", "tensorflow", "tensorflow-cpu", "tensorflow-cuda12")
BACKENDS = {"jax": "jax", "pytorch": "torch", "tensorflow": "tensorflow"}
IMAGES = os.environ.get("IMAGES", "").split()
needs_docker = pytest.mark.skipif(not IMAGES, reason="builds images: make test-images")
# What a container can do without: all but the mounted folder and /tmp.
LITTLE = (
    *("--read-only", "--tmpfs", "/tmp:exec", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--network", "none"),
)
NO_GPU = {"VIT_EXPECT_GPU": "1", "CUDA_VISIBLE_DEVICES": ""}

# ---- as text -----------------------------------------------------------------------------------


def lint(program, *files):
    path = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{program} is not installed: pip install -e '.[test]'")
    command = [path, *(["-x"] if program == "shellcheck" else []), *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_dockerfiles_are_clean():
    assert len(DOCKERFILES) == 5
    lint("hadolint", *DOCKERFILES)


def test_scripts_are_clean():
    lint("shellcheck", *sorted(ROOT.glob("*.sh")))


def read_environment(dockerfile):
    text = dockerfile.read_text().replace("\\\n", " ")
    lines = [line[4:] for line in text.splitlines() if line.startswith("ENV ")]
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_differ_in_what_they_must(dockerfile):
    device, framework = dockerfile.name.split(".")[1:]
    jax, own = (read_environment(path) for path in (ROOT / "Dockerfile.ook.jax", dockerfile))
    different = {name for name in jax | own if jax.get(name) != own.get(name)}
    allowed = {"KERAS_BACKEND"}
    if device == "ojo":  # its base has packages, an index and the GPU's libraries of its own
        allowed |= {"PIP_", "PYTHONPATH", "PATH", "NVIDIA_"}
    assert not [name for name in different if not name.startswith(tuple(allowed))]
    assert own["KERAS_BACKEND"] == BACKENDS[framework] and own["VIT_EXPECT_GPU"] == "1"
    assert own.get("PIP_INDEX_URL") == {"ook": None, "ojo": ""}[device]
    text = " ".join(dockerfile.read_text().replace("\\\n", "").split())
    without = {"ook": "", "ojo": "--without=/build/base.txt "}[device]
    asked = f"requirements.py --lock=/build/requirements.lock {without}dependencies sweep"
    assert asked in text and re.search("pip install .*--require-hashes .*-r /build/pins.txt", text)
    assert text.count("pip install") == text.count("--require-hashes")
    assert re.search(r"^ARG BASE_IMAGE=\S+:\S*\d+\.\d+\S*$", dockerfile.read_text(), re.M)


def test_requirements_are_the_projects(capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = requirements.list_requirements(project, ["dependencies", "cuda12"])
    assert listed == [*project["dependencies"], *project["optional-dependencies"]["cuda12"]]
    with pytest.raises(SystemExit, match="expected groups of dependencies, .*, got cuda11"):
        requirements.list_requirements(project, ["cuda11"])


def test_what_is_locked_is_what_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements.lock").read_text()
    groups = ["dependencies", *project["optional-dependencies"]]
    pins = [each.split(";")[0] for each in requirements.list_requirements(project, groups)]
    pins = [re.sub(r"\[.*\]", "", each) for each in pins if "==" in each]
    assert len(pins) > 20 and not [pin for pin in pins if f"\n{pin} " not in f"\n{lock.lower()}"]
    names = {}
    for groups in (["dependencies"], *(["dependencies", framework] for framework in FRAMEWORKS)):
        blocks = requirements.list_locked(project, groups, lock)
        assert all("--hash=sha256:" in block for block in blocks)
        names[groups[-1]] = {requirements.name_package(block) for block in blocks}
    assert {"keras", "h5py", "nvidia-ml-py"} <= names["dependencies"]
    assert names["dependencies"] < names["jax"] < names["cuda12"]
    more = names["cuda12"] - names["jax"]
    assert "jax-cuda12-pjrt" in more and all(re.match("jax-cuda12-|nvidia-", name) for name in more)
    assert names["tensorflow"] - names["tensorflow-cpu"] == {"tensorflow"}
    more = names["tensorflow-cuda12"] - names["tensorflow"]
    assert more and all(name.startswith("nvidia-") for name in more)
    rest = requirements.list_locked(project, ["dependencies"], lock, {"numpy", "ml-dtypes"})
    rest = {requirements.name_package(block) for block in rest}
    assert names["dependencies"] - rest == {"numpy", "ml-dtypes"}
    with pytest.raises(SystemExit, match="not in the lock file: jinja2, keras, .*: make lock"):
        requirements.list_locked(project, ["dependencies"], "")


def test_of_pytorch_one_build_is_installed():
    """By hashes of that build alone, with the libraries that it was built for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = project["optional-dependencies"]["torch"]
    locks = [(ROOT / name).read_text() for name in ("requirements.lock", "requirements-torch.lock")]
    hashes = set()
    for build, toolkit in ("cpu", None), ("cu126", "12.6"), ("", "13.0"):
        torch, *libraries = requirements.list_torch(locks, build)
        assert torch.startswith(pin + (f"+{build} " if build else " "))
        assert not hashes & {*re.findall("sha256:[0-9a-f]{64}", torch)}
        hashes |= {*re.findall("sha256:[0-9a-f]{64}", torch)}
        found = re.findall(r"^cuda-toolkit==(\d+\.\d+)", "".join(libraries), re.M)
        assert found == ([toolkit] if toolkit else []) and all("sha256:" in b for b in libraries)
    rest = requirements.list_locked(project, ["dependencies", "torch"], locks[0])
    names = {requirements.name_package(block) for block in rest}
    assert "sympy" in names and "torch" not in names
    assert [name for name in names if name.startswith(requirements.LIBRARIES)] == ["nvidia-ml-py"]
    cuda, both = (
        {*requirements.list_locked(project, ["dependencies", *groups], locks[0])}
        for groups in (["cuda12"], ["cuda12", "torch"])
    )
    assert both == cuda | {*rest} and "nvidia-cudnn-cu12" in map(requirements.name_package, both)
    with pytest.raises(SystemExit, match="expected a build of '', 'cpu', 'cu126', got 'cu118'"):
        requirements.list_torch(locks, "cu118")


def test_an_image_for_a_gpu_does_not_measure_the_cpu(tmp_path, backend):
    done = run_vit(tmp_path, *SMALL, backend=backend, **NO_GPU)
    assert done.returncode == 2 and not (tmp_path / "results.jsonl").exists()
    assert "expected a GPU" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags, told", [(["--allow-cpu"], {}), ([], {"JAX_PLATFORMS": "cpu"})])
def test_unless_it_is_told_to(tmp_path, flags, told):
    done = run_vit(tmp_path, *SMALL, *flags, **NO_GPU, **told)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_last_record(tmp_path)["device"]["kind"] == "cpu"


# ---- built and run -----------------------------------------------------------------------------


def docker(*words):
    done = subprocess.run(["docker", *words], capture_output=True, text=True)
    done.output = done.stdout + done.stderr
    return done


def build(image, checkout):
    tag = f"vit-test:{image.replace('.', '-')}"
    arguments = shlex.split(os.environ.get("BUILD_ARGS", ""))
    file = checkout / f"Dockerfile.{image}"
    done = docker("build", *arguments, "-f", str(file), "-t", tag, str(checkout))
    assert done.returncode == 0, done.output[-3000:]
    return tag


def inspect(tag):
    return json.loads(docker("image", "inspect", tag).stdout)[0]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A fresh copy of the project, somebody's, with a secret in it."""
    folder = tmp_path_factory.mktemp("images") / "checkout"
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / ".env").write_text(f"WANDB_API_KEY={SECRET}\n")
    for path in (folder, *folder.rglob("*")):
        os.chown(path, SOMEBODY, SOMEBODY if os.getuid() == 0 else -1)
    folder.parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module", params=IMAGES)
def image(request, checkout):
    return request.param, build(request.param, checkout)


def run_image(tag, checkout, *command, flags=()):
    """Run as the README does, with the checkout at /app; without W&B."""
    gpu = shlex.split(os.environ.get("GPU", ""))
    mount = ["-v", f"{checkout}:/app", "-e", "WANDB_MODE=disabled"]
    return docker("run", "--rm", *gpu, *mount, *flags, tag, *command)


@needs_docker
def test_an_image_runs_trains_and_leaves_its_users_files(image, checkout):
    name, tag = image
    (checkout / "results.jsonl").unlink(missing_ok=True)
    shutil.rmtree(checkout / ".cache", ignore_errors=True)  # another image's
    train = ["python", "vit.py", *SMALL, "--allow-cpu"]
    user = ("--user", f"{SOMEBODY}:{checkout.stat().st_gid}")
    for flags, cache in (((), "cold"), ((*user, *LITTLE), "warm")):
        done = run_image(tag, checkout, *train, flags=flags)
        assert done.returncode == 0, done.output[-3000:]
        record = read_last_record(checkout)
        assert record["backend"] == BACKENDS[name.split(".")[1]]
        # The cache of compiled code is in the mounted folder: a second start, offline, is warm.
        if record["backend"] != "tensorflow":  # it keeps none
            assert record["timing"]["compile_cache"] == cache
    owners = {path.lstat().st_uid for path in checkout.rglob("*")}
    assert owners == {SOMEBODY}


@needs_docker
def test_a_key_given_on_stdin_is_not_shown_by_inspect(image, checkout):
    user = ["--user", f"{SOMEBODY}:{checkout.stat().st_gid}"]
    words = ["docker", "run", "--rm", "--interactive", "--name", "vit-key", *user, *LITTLE]
    words += ["-e", "KEY_ON_STDIN=1", image[1], "sh", "-c", 'echo "$WANDB_API_KEY"; read -r end']
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as container:
        container.stdin.write(f"{SECRET}\n")
        container.stdin.flush()
        assert container.stdout.readline() == f"{SECRET}\n"
        shown = docker("inspect", "vit-key").output
        container.stdin.write("\n")
        container.stdin.flush()
    assert container.returncode == 0
    assert '"ReadonlyRootfs": true' in shown and SECRET not in shown


@needs_docker
def test_an_image_without_a_gpu_says_so(image, checkout):
    tag = image[1]
    done = docker("run", "--rm", tag, "python", "vit.py", *SMALL, "--no-use-wandb")
    assert done.returncode == 2 and "expected a GPU" in done.stderr
    assert len(done.output.splitlines()) == 1


@needs_docker
def test_an_image_holds_the_pins_and_no_secret(image, checkout):
    name, tag = image
    shown = run_image(tag, checkout, "pip", "list", "--format=freeze").stdout.lower().split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["sweep"]
    pins = [re.sub(r"\[.*\]", "", pin) for pin in pins]  # psycopg[binary]
    if name.startswith("ojo"):  # the base's own NumPy
        pins = [pin for pin in pins if not pin.startswith("numpy")]
    assert [pin for pin in pins if pin.lower() not in shown] == []
    check = docker("run", "--rm", tag, "pip", "check")
    assert check.returncode == 0, check.output
    inside = docker("run", "--rm", tag, "sh", "-c", "find /app -type f | sort").stdout.split()
    assert "/app/vit.py" in inside and not [path for path in inside if "/." in path]
    found = docker("run", "--rm", tag, "grep", "-rl", SECRET, "/app", "/build", "/root", "/tmp")
    assert (found.returncode, found.stdout) == (1, "")


@needs_docker
def test_an_image_runs_without_a_mount_as_anybody(image):
    command = ["python", "vit.py", *SMALL, "--allow-cpu", "--no-use-wandb", "--trainer=fit"]
    done = docker("run", "--rm", "--user", "12345:12345", image[1], *command)
    assert done.returncode == 0 and "test accuracy" in done.stdout, done.output[-3000:]
    assert inspect(image[1])["Config"]["Cmd"] == ["python", "vit.py"]


@needs_docker
def test_an_edit_of_the_code_keeps_the_layers_below(image, checkout):
    name, tag = image
    before = inspect(tag)["RootFS"]["Layers"]
    with (checkout / "vit.py").open("a") as file:
        file.write(f"# edited for {name}\n")
    after = inspect(build(name, checkout))["RootFS"]["Layers"]
    assert before[:-2] == after[:-2] and before[-2] != after[-2]  # code, and what --help left
