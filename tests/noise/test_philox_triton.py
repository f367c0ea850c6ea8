"""Triton's kernels: in its interpreter they compute what the reference does, and they compile without a GPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which torch brings for CUDA alone")
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


@pytest.mark.slow
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
for name, dtype in (("_draw_kernel", "fp32"), ("_add_kernel", "%(dtype)s"), ("_accumulate_kernel", "fp32")):
    kernel = getattr(kernels, name)
    flags = {p.name: %(flags)s for p in kernel.params if p.is_constexpr}
    flags = {n: {"BLOCK": kernels.BLOCK, "UNIT": 2}.get(n, on) for n, on in flags.items()}
    names = [p.name for p in kernel.params]
    own = dict(KINDS, out="*" + dtype, h="*" + dtype)
    signature = {n: "constexpr" if n in flags else own.get(n, "*fp32") for n in names}
    source = ASTSource(kernel, signature, flags)
    made = triton.compile(source, target=GPUTarget("cuda", %(capability)d, 32))
    assert len(made.asm["cubin"]) > 1000, name
    print(name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("capability", "flags"), [(80, True), (90, True), (90, False)])
def test_kernels_compile_for_gpus(capability, flags, dtype, tmp_path):
    """To machine code, by the assembler that comes with Triton; what the interpreter takes need not compile."""
    code = COMPILE % {"dtype": dtype, "flags": flags, "capability": capability}
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert not answer.returncode, answer.stderr
    assert answer.stdout.split() == ["_draw_kernel", "_add_kernel", "_accumulate_kernel"]
