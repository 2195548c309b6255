"""A kernel is a folder: its cases are found by the report, the benches and the tests."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels_compiled import run_case
from kernels_testing import using

from pipeline import kernels
from pipeline.kernels.cases import Sizes, all_cases, ops

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ops())
def test_every_op_is_a_folder_with_its_parts(name):
    folder = ROOT / "pipeline/kernels" / name
    assert {f.name for f in folder.glob("*.py")} == {
        "__init__.py", "reference.py", "triton.py", "cases.py",
    }  # fmt: skip
    assert callable(getattr(kernels, name))
    assert (ROOT / f"tests/kernels/test_kernel_{name}.py").is_file()
    source = (folder / "triton.py").read_text()
    written = set(re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE))
    stated = {k for case in ops()[name].CASES for k in case.kernels}
    assert written == stated


@pytest.mark.parametrize("case", all_cases().values(), ids=all_cases())
def test_every_case_runs_and_says_whether_it_has_a_gradient(case):
    with using("reference"):
        small = Sizes(2, side=32, patch=8, width=16, decoder=16, keep=4, dtype=torch.float32)
        out = case.inputs(small)()
        has = isinstance(out, torch.Tensor) and out.requires_grad
        assert has == case.gradient
        run_case(case, torch.float32, "demo")


def test_no_list_of_ops_is_kept_by_hand():
    for path in ("helpers/kernels_compiled.py", "helpers/kernels_traffic.py",
                 "bench/kernels_report.py", "bench/roofline.py"):  # fmt: skip
        source = (ROOT / "tests" / path).read_text()
        for name in set(ops()) - {"sample_masks"}:  # which traffic uses for its positions
            assert name not in source, (path, name)


DOUBLE = {
    "__init__.py": '''
        """out = 2 x."""

        from pipeline.kernels import backend
        from pipeline.kernels.double.reference import double_reference


        def double(x):
            """x: any float tensor, contiguous."""
            if backend.implementation() == "triton":
                from pipeline.kernels.double.triton import double_triton as run
            else:
                run = double_reference
            return run(x)
    ''',
    "reference.py": """
        def double_reference(x):
            return 2 * x
    """,
    "triton.py": """
        import torch
        import triton
        import triton.language as tl


        @triton.jit
        def double_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
            at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < count), mask=at < count)


        def double_triton(x):
            out = torch.empty_like(x)
            double_kernel[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), BLOCK=1024)
            return out
    """,
    "cases.py": """
        from pipeline.kernels.cases import Case
        from pipeline.kernels.double import double

        PHASE = "loss"


        def _inputs(s):
            x = s.leaf(s.batch, s.width).detach()
            return lambda: double(x)


        CASES = (Case("double", _inputs, kernels=("double",), wide=("double",)),)
    """,
}

LIST = """
from kernels_compiled import compile_for, recorded, run_case
from pipeline.kernels.cases import all_cases, ops
from bench_gpu import calls
from pipeline.kernels.cases import Sizes
import torch
assert "double" in ops()
assert "double" in calls(Sizes(2, side=32, patch=8, width=16, decoder=16, keep=4))
with recorded() as launches:
    run_case(all_cases()["double"], torch.bfloat16, "vit-b16")
compiled = compile_for(launches[0], 90)
assert compiled.spills == 0 and max(compiled.loads) == 128, compiled
print("found")
"""


def test_a_new_folder_is_in_every_list(tmp_path):
    for package in ("pipeline", "shard_tools"):
        shutil.copytree(ROOT / package, tmp_path / package)
    folder = tmp_path / "pipeline/kernels/double"
    folder.mkdir()
    for name, text in DOUBLE.items():
        (folder / name).write_text(inspect.cleandoc(text) + "\n")
    paths = [tmp_path, ROOT / "tests/helpers", ROOT / "tests/bench"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LIST], capture_output=True, text=True, cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
    )  # fmt: skip
    assert done.stdout == "found\n", done.stderr[-2000:]
