#!/usr/bin/env bash
# Makes the virtual environment $VENV with everything the project needs (`make setup`).
# Does nothing when that was done already; repairs an environment it left unfinished.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
python=${PYTHON:-}
venv_python=$venv/bin/python
made=$venv/.dfd-made             # this script made the environment, so it may remove it
stamp=$venv/.dfd-stamp           # written last, removed first
own_detectron2=$venv/.dfd-detectron2
packages=(
    torch torchvision 'timm>=1.0.31,<1.1' 'numpy>=1.26' setuptools opencv-python-headless omegaconf hydra-core iopath
    fvcore yacs pycocotools tabulate termcolor cloudpickle tqdm tensorboard matplotlib packaging
    safetensors scipy shapely submitit onnx onnxruntime black pytest pytest-xdist ruff
)
export PIP_DISABLE_PIP_VERSION_CHECK=1
volume=--quiet
[ ! -t 1 ] || volume=--progress-bar=on

die() {
    echo "setup: $*" >&2
    exit 1
}

step() {
    echo "setup: step $1 of 5: $2"
}

# Prints the version; fails for one that is too old, too new, or a shim that does not run.
supported() {
    "$1" -c 'import sys; v = sys.version_info[:2]; print("%d.%d" % v)
sys.exit(not (3, 10) <= v <= (3, 14))' 2>/dev/null
}

has_detectron2() {
    "$1" -c 'import torch, detectron2' >/dev/null 2>&1
}

# Whether the environment's detectron2 is the user's; a build of theirs goes by its own name.
keeps_detectron2() {
    has_detectron2 "$venv_python" || return
    [ ! -e "$own_detectron2" ] ||
        "$venv_python" -c 'from importlib import metadata; metadata.version("detectron2")' 2>/dev/null
}

makes_venvs() {
    "$1" -c 'import ensurepip, venv' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        supported "$candidate" >/dev/null || continue
        [ -n "$python" ] || python=$candidate
        if makes_venvs "$candidate"; then
            python=$candidate
            return
        fi
    done
    [ -n "$python" ] ||
        die "no Python 3.10 to 3.14 on PATH; install one or name one: make setup PYTHON=/path/to/python3.13"
}

make_venv() {
    local version
    [ -n "$python" ] || find_python
    version=$(supported "$python")
    makes_venvs "$python" ||
        die "$python has no venv module; install it (Debian, Ubuntu: apt install python$version-venv) or name another Python: make setup PYTHON=/path/to/python3.13"
    mkdir -p "$venv"
    touch "$made"
    if ! has_detectron2 "$python"; then
        step 1 "making $venv with Python $version"
        "$python" -m venv "$venv"
        return
    fi
    step 1 "making $venv with Python $version, on top of the detectron2 that $python has"
    if "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        # --system-site-packages would show the packages behind that environment, not its own.
        "$python" -m venv "$venv"
        "$python" -c 'import site
for path in site.getsitepackages():
    print(f"import site; site.addsitedir({path!r})")' >"$(site_packages)/dfd-base.pth"
    else
        "$python" -m venv --system-site-packages "$venv"
    fi
}

site_packages() {
    "$venv_python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
}

# The packages that cannot be imported yet, or are outside their bound, go to standard output, the
# constraints to the file $1: what is there stays, torch, torchvision and numpy in exactly the
# version they have.
missing_packages() {
    "$venv_python" - "$1" "${packages[@]}" <<'PYTHON'
import sys
from importlib import metadata, util

from pip._vendor.packaging.requirements import Requirement

modules = {"opencv-python-headless": "cv2", "hydra-core": "hydra", "pytest-xdist": "xdist"}


def wanted(package):
    asked = Requirement(package)
    if not util.find_spec(modules.get(asked.name, asked.name)):
        return True
    return bool(asked.specifier) and metadata.version(asked.name) not in asked.specifier


print(*filter(wanted, sys.argv[2:]))
with open("constraints.txt") as pins, open(sys.argv[1], "w") as output:
    for pin in pins:
        name = pin.partition("==")[0]
        try:
            version = metadata.version(name)
        except (metadata.PackageNotFoundError, ValueError):
            if name not in ("torch", "torchvision"):
                output.write(pin)
        else:
            if name in ("torch", "torchvision", "numpy"):
                output.write(f"{name}=={version}\n")
PYTHON
}

wanted="$(pwd -P) $(cat constraints.txt requirements-detectron2.txt setup.py tools/setup_env.sh | cksum)"

python_version=
if [ -n "$python" ]; then
    python_version=$(supported "$python") ||
        die "$python is not a working Python 3.10 to 3.14; name another: make setup PYTHON=/path/to/python3.13"
fi

if [ -e "$made" ] && [ ! -e "$stamp" ]; then
    echo "setup: $venv was left unfinished; starting again"
    rm -rf "$venv"
fi

trap 'echo "setup: failed; see above, then run the same command again" >&2' ERR

if [ -z "$(ls -A "$venv" 2>/dev/null)" ]; then
    make_venv
else
    version=$(supported "$venv_python") ||
        die "$venv holds no working Python 3.10 to 3.14; remove it or choose another: make setup VENV=/path/to/venv"
    [ -z "$python" ] || [ "$version" = "$python_version" ] ||
        die "$venv has Python $version, $python is $python_version; remove $venv or choose another: make setup VENV=/path/to/venv"
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        echo "setup: $venv is up to date"
        exit
    fi
    rm -f "$stamp"
    step 1 "using $venv (Python $version)"
fi

step 2 "build tools"
tools=(setuptools)
[ ! -e "$made" ] || tools+=(pip)
"$venv_python" -m pip install --quiet -c constraints.txt "${tools[@]}"

constraints=constraints.txt
keep=
if keeps_detectron2; then
    keep=yes
    constraints=$venv/.dfd-constraints.txt
    read -ra packages < <(missing_packages "$constraints")
fi
if [ -n "$keep" ]; then
    step 3 "keeping torch, torchvision and numpy as they are; adding: ${packages[*]:-nothing}"
else
    step 3 "packages (torch with its CUDA libraries is a download of several GB)"
fi
if [ "${#packages[@]}" -gt 0 ]; then
    "$venv_python" -m pip install "$volume" --no-build-isolation -c "$constraints" "${packages[@]}"
fi

detectron2_pin=$(cksum <requirements-detectron2.txt)
if [ -n "$keep" ]; then
    step 4 "keeping detectron2 as it is: $("$venv_python" -c 'import detectron2; print(*detectron2.__path__)')"
elif [ "$(cat "$own_detectron2" 2>/dev/null)" = "$detectron2_pin" ] && has_detectron2 "$venv_python"; then
    step 4 "detectron2 is there"
else
    step 4 "detectron2"
    echo unfinished >"$own_detectron2"
    "$venv_python" -m pip install --quiet --require-hashes --no-deps --only-binary=:all: \
        --python-version 3.10 --implementation cp --abi none \
        --upgrade --target "$(site_packages)" -r requirements-detectron2.txt
    # Built for another torch: Python 3.10 would load it wherever its CUDA libraries are found.
    rm -f "$(site_packages)"/detectron2/_C.*.so
    echo "$detectron2_pin" >"$own_detectron2"
fi

step 5 "the project itself"
PYTHONWARNINGS=ignore "$venv_python" -m pip install --quiet --no-deps --no-build-isolation -e .

echo "$wanted" >"$stamp"
echo "setup: done"
