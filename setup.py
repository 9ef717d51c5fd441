"""Package `detection-plugins`: metadata, requirements and extras.

Requirements are ranges: an environment that already works keeps its versions. The exact
versions that the tests run with are in constraints.txt.
"""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/detection-plugins/detection-plugins"

# tools/setup_environment.py reads this dictionary without running the file: literals only.
EXTRAS = {
    # Added to each framework's extra below
    "either": [
        "torchvision>=0.16",
        "pycocotools>=2.0.6",
        "msgspec>=0.18",  # reads annotation files of GB
        "Pillow>=9.0",
        "scipy>=1.7",  # intervals and p-values of a comparison
        "tabulate>=0.9",
        "tqdm>=4.60",
    ],
    # Detectron2 itself is not named. It is not on the package index, so pip would look there for
    # whatever else goes by that name. Install it first, as its own guide says, or without
    # compiled ops by `pip install ./packaging/detectron2`; one that is there already is kept.
    "detectron2": [
        "fvcore>=0.1.5",
    ],
    "mmdet": [
        "mmdet>=3.3,<3.4",
        "mmengine>=0.10.4",
        "mmcv>=2.0.0rc4,<2.2.0",  # with its ops; mmdet 3.3 refuses 2.2.0
        "six",  # mmdet needs it
        "setuptools<81",  # mmengine imports pkg_resources
    ],
    # Where OneDL's forks are, which go by the import names of OpenMMLab's packages: instead of
    # `mmdet`, which would write over them.
    "onedl": [
        "onedl-mmdetection>=3.4,<4",
        "onedl-mmengine>=0.10.8,<1",
        "onedl-mmcv>=2.3,<3",  # with its ops
    ],
    # Detectron2 evaluates these datasets with their own packages.
    "lvis": [
        "lvis>=0.5.3",
    ],
    "cityscapes": [
        "cityscapesscripts>=2.2",
    ],
    # Classifiers with the plugins, beside the extra `mmdet`. Not for an environment that has
    # onedl-mmpretrain, which goes by the same import name.
    "mmpretrain": [
        "mmpretrain>=1.2,<2",
    ],
    # Panoptic quality
    "panoptic": [
        "hotcoco>=1.3,<2",
    ],
    # Grounding DINO and GLIP read their prompts with it; mmdet 3.3's layers that fuse GLIP's image
    # and text do not work with 4.53 and later.
    "grounding": [
        "transformers>=4.35,<4.53",
    ],
    # Block plugins named timm:…
    "timm": [
        "timm>=1.0.20",
    ],
    # Grad-CAM in tools/visualize_attention.py
    "visualization": [
        "grad-cam>=1.5",
        "matplotlib>=3.5",
    ],
    # Trials of tools/try_plugins.py as jobs of a Slurm cluster
    "slurm": [
        "submitit>=1.5",
    ],
    # Building docs/
    "docs": [
        "furo>=2024.8.6",
        "myst-parser>=4.0",
        "sphinx>=8.1",
    ],
    "dev": [
        "hypothesis>=6",
        "lvis>=0.5.3",
        "mypy>=1.8",
        "onnx>=1.16",
        "onnxruntime>=1.17",
        "onnxscript>=0.1",  # torch.onnx.export needs it
        "pytest>=8",
        "pytest-xdist>=3.7",
        "ruff>=0.6",
    ],
}
for framework in ("detectron2", "mmdet", "onedl"):
    EXTRAS[framework] += EXTRAS["either"]
del EXTRAS["either"]


# Fast paths on a CPU: plain C that calls neither Python nor PyTorch, and so needs no rebuild for
# another version of PyTorch.
KERNELS = Extension(
    "plugin_core.kernels._library",
    sources=["plugin_core/kernels/triplet_attention.c"],
    depends=["plugin_core/kernels/triplet_attention_of_type.h"],
    extra_compile_args=["-O3", "-fopenmp"],
    extra_link_args=["-fopenmp", "-lm"],
    optional=True,  # without a compiler the plain formulas are used
)


def long_description() -> str:
    """Return the README's text, or nothing where the README was not shipped along."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    # On a package index, relative links lead nowhere.
    text = re.sub(r"!\[([^]]*)\]\((?!https?:)", rf"![\1]({REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^]]*\])\((?!https?:|#)", rf"\1({REPOSITORY}/blob/main/", text)


def version() -> str:
    """Read ``plugin_core.__version__`` without importing the package."""
    text = (ROOT / "plugin_core" / "__init__.py").read_text(encoding="utf-8")
    (found,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found


def files(package: str, *patterns: str) -> list[str]:
    """List files of a package by patterns that may go through links to other folders."""
    folder = ROOT / package
    return [str(p.relative_to(folder)) for pattern in patterns for p in folder.glob(pattern)]


setup(
    name="detection-plugins",
    version=version(),
    description="Published attention, batch and multimodal methods as plugins for Detectron2 "
    "and MMDetection",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url=REPOSITORY,
    project_urls={
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    python_requires=">=3.10",
    packages=find_packages(
        include=[
            "plugin_core",
            "plugin_core.*",
            "d2_plugins",
            "d2_plugins.*",
            "mm_plugins",
            "mm_plugins.*",
        ]
    ),
    ext_modules=[KERNELS],
    package_data={
        "plugin_core": [
            "py.typed",
            "kernels/*.c",
            "kernels/*.h",
            "evaluation/comparison/published_results.json",
            *files("plugin_core", "tools/*.py", "tools/*/*.py"),
        ],
        # Of a checkout these folders are links to configs/ and tools/.
        "d2_plugins": ["py.typed", *files("d2_plugins", "configs/*/*")],
        "mm_plugins": ["py.typed", *files("mm_plugins", ".mim/*.yml", ".mim/configs/*/**/*.py")],
    },
    entry_points={"console_scripts": ["detection-plugins = plugin_core.command_line:main"]},
    zip_safe=False,
    install_requires=["torch>=2.1", "numpy"],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
