"""The Triton kernels against their definitions in PyTorch, in Triton's interpreter; what they compile to.

The tests of the first kind run in a second process, because Triton reads TRITON_INTERPRET when it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it is in the extra dev)")
HERE = Path(__file__).parent


def test_the_kernels_equal_the_paths_that_define_them() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    tests = [str(HERE / name) for name in ("interpreted.py", "interpreted_columns.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "100%" in done.stdout, done.stdout[-500:]


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from sqft.kernels import gradients, weights

TYPES = {"w": "*bf16", "out": "*bf16", "a": "*fp32", "b": "*fp32", "mask": "*u8", "q": "*u8", "zero": "*u8",
         "scale": "*bf16", "start": "*i8", "inside": "*u8", "grad": "*bf16", "factor": "*fp32"}


def ptx(kernel, tile, **constants):
    constants |= {"BO": tile[0], "BI": tile[1]}
    types = {name: "constexpr" if name in constants else TYPES.get(name.removesuffix("_ptr"), "i32")
             for name in kernel.arg_names}
    even = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name not in constants}
    source = triton.compiler.ASTSource(kernel, types, constants, even)
    options = {"num_warps": tile[2], "enable_fp_fusion": FUSED}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


text = ptx(weights._float_kernel, weights.TILE, w_column=1, out_column=1, R=32, MASKED=True)
if not FUSED:
    grid = {"BITS": 4, "WIDTH": 4, "START": 1, "RESULT": 0, "MASKED": True, "INSIDE": True}
    for one in (False, True):
        text += ptx(weights._grid_kernel, weights.GRID_TILE, R=32, ONE_GROUP=one, **grid)
    for of_A in (False, True):
        given = {"scaling": 2.0, "R": 32, "RANKS": 32, "OF_A": of_A, "WIDE": False}
        ptx(gradients._product_kernel, gradients.TILE, MASKED=True, INSIDE=True, **given)
print("FMA", len(re.findall(r"fma", text)), *sorted(set(re.findall(r"div[.]\\w+[.]f32|[.]ftz|approx", text))))
"""


@pytest.mark.parametrize("fused", [False, True])
def test_compiled_for_a_card_no_product_is_fused_and_division_is_exact(fused: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = COMPILE.replace("FUSED", str(fused))
    (tmp_path / "compile.py").write_text(script)
    command = [sys.executable, str(tmp_path / "compile.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = done.stdout.split()
    assert found[2:] == ([] if fused else ["div.rn.f32"])
    assert (int(found[1]) > 0) == fused, "without the setting the compiler does fuse, so the test sees it"
