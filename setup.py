import os

from setuptools import find_packages, setup

# The configs are installed within the package, where `dfd` finds them (engine/config/find.py).
CONFIGS = {
    "dfd" + folder.removeprefix(".").replace(os.sep, "."): folder.removeprefix(f".{os.sep}")
    for folder, _, files in os.walk(os.path.join(".", "configs"))
    if any(file.endswith((".py", ".txt")) for file in files)
}

# detectron2, torch and torchvision are not listed: they must match each other and the machine's
# CUDA, and a build that is already there must be kept. `make setup` installs them where missing.
setup(
    name="dfd",
    version="0.1.0",
    description="Disparity Feature Distillation for Detectron2 detectors",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"dfd": "projects/dfd", **CONFIGS},
    packages=["dfd", *(f"dfd.{name}" for name in find_packages("projects/dfd")), *CONFIGS],
    package_data=dict.fromkeys(CONFIGS, ["*.txt"]),
    entry_points={"console_scripts": ["dfd = dfd.cli:main"]},
    install_requires=[
        "fvcore",
        "hydra-core",
        "iopath",
        "jinja2",
        "matplotlib",
        "numpy>=1.26",
        "omegaconf",
        "opencv-python-headless",
        "pillow",
        "pycocotools",
        "safetensors",
        "scipy",
        "shapely",  # fvcore crops polygons with it.
        "tabulate",
        "tensorboard",
        "timm>=1.0.31,<1.1",  # Private parts of it are used; 1.0.20 fails.
    ],
    extras_require={
        "cluster": ["submitit"],
        "export": ["onnx", "onnxruntime"],
        "dev": ["pytest", "pytest-xdist", "ruff"],
    },
)
