"""A kernel is a folder: its cases are found by the report, the benches and the tests."""

import re
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
