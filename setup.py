"""Build the C++ evaluator, csrc/ -> pairwise/evaluator, for `from pairwise import evaluator`.

pip install --no-build-isolation --no-deps --use-pep517 -e .      (installed, editable)
python setup.py build_ext --inplace                                (built only)
"""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

evaluator = Pybind11Extension(
    "pairwise.evaluator",
    sources=sorted(glob("csrc/*.cpp")),
    # An extension is rebuilt when it is older than its sources or these: a header that were
    # missing here would leave an old build.
    depends=[*sorted(glob("csrc/*.hpp")), "setup.py"],
    cxx_std=17,
    # It is one binary for every CPU, with IEEE arithmetic, on which ties, infinities and equal
    # results on all machines rely: hence no -march=native, no -ffast-math, and no fused
    # multiply-add where the CPU has one.
    extra_compile_args=["-O3", "-ffp-contract=off", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(
    name="pairwise-calibrated-rewards",
    version="0.1.0",
    description="Pairwise calibrated reward ensembles",
    python_requires=">=3.11",
    packages=["pairwise", "pairwise.prepare", "pairwise.scale"],
    package_data={"pairwise": ["*.pyi", "*.jinja"]},
    ext_modules=[evaluator],
    install_requires=[],  # requirements.txt pins everything
)
