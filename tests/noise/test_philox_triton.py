"""Triton's kernels: in its interpreter they compute what the reference does, and they compile without a GPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which torch brings for CUDA alone"),
    pytest.mark.slow,  # the interpreter is
]
ROOT = Path(__file__).parents[2]
Found = Callable[[str], dict[str, float]]


@pytest.fixture(scope="module")
def found() -> Found:
    known: dict[str, dict[str, float]] = {}

    def find(part: str) -> dict[str, float]:
        if part not in known:  # all quick parts at once: starting the process takes longest
            parts = ["words", "draws", "added", "accumulated", "few_estimates"] if part != "estimates" else [part]
            command = [sys.executable, "-m", "tests.noise.interpreted", *parts]
            answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            assert not answer.returncode, answer.stderr
            known.update(json.loads(answer.stdout))
        return known[part]

    return find


def test_words_are_those_of_the_reference(found):
    assert found("words") == {f"{size}, stream {stream}": 0 for size in (1, 64, 131) for stream in (0, 1)}


def test_normals_are_those_of_the_reference_and_signs_to_the_bit(found):
    for name, difference in found("draws").items():
        assert difference <= (0.0 if "True" in name else 1e-6), name


def test_rows_are_those_of_the_reference_to_rounding(found):
    """In steps of the dtype at the entry: 4 where normals differ by 1e-6, 1 in half precision."""
    assert len(found("added")) == 17
    for name, steps in found("added").items():
        assert steps <= (1.0 if "float16" in name else 4.0), name


def test_sums_are_those_of_the_reference_to_rounding(found):
    assert len(found("accumulated")) == 20
    for name, difference in found("accumulated").items():
        assert difference <= 1e-6, name


def test_estimates_are_those_without_kernels(found):
    """Losses of float32 differ in their last digit, and weights divide that by sigma."""
    for name, difference in found("few_estimates").items():
        assert difference <= 5e-5, name


def test_estimates_of_every_kind_are_those_without_kernels(found):
    assert len(found("estimates")) == 16
    for name, difference in found("estimates").items():
        assert difference <= 5e-5, name


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flops_lightning.noise import philox_triton as kernels

NUMBERS = dict.fromkeys(("stream", "row_size", "h_stride", "size", "inner", "tokens"), "i32") | {"sigma": "fp32"}
KINDS = NUMBERS | dict.fromkeys(("keys", "index", "bounds"), "*i64")


def compiled(kernel, dtype, capability, flag):
    flags = {p.name: flag for p in kernel.params if p.is_constexpr}
    flags = {n: {"BLOCK": kernels.BLOCK, "UNIT": 2}.get(n, on) for n, on in flags.items()}
    names = [p.name for p in kernel.params]
    own = dict(KINDS, out="*" + dtype, h="*" + dtype)
    signature = {n: "constexpr" if n in flags else own.get(n, "*fp32") for n in names}
    source = ASTSource(kernel, signature, flags)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


for capability, flag in ((80, True), (90, True), (90, False)):
    for name, dtypes in (("_draw", ["fp32"]), ("_add", ["fp32", "bf16", "fp16"]), ("_accumulate", ["fp32"])):
        for dtype in dtypes:
            assert len(compiled(getattr(kernels, name + "_kernel"), dtype, capability, flag)) > 1000
            print(capability, flag, name, dtype)
"""


def test_kernels_compile_for_gpus(tmp_path):
    """To machine code, by the assembler that comes with Triton; what the interpreter takes need not compile."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not answer.returncode, answer.stdout + answer.stderr  # the last line is that of the last that did
    assert len(answer.stdout.splitlines()) == 3 * 5
