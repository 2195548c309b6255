"""MFU: estimate's count over the peak of the devices, without waiting for the count."""

import time

import pytest

from pipeline.config.peaks import PEAKS, peak_flops
from pipeline.config.recipe import dump_recipe, load_recipe
from pipeline.cost.dry_run import flops_per_image
from pipeline.runtime.mfu import Mfu, peak_of


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_name(name, bf16):
    for precision in ("bf16", "autocast"):
        assert peak_flops(name, precision) == bf16 * 1e12


def test_fp32_has_a_peak_of_its_own():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert all(set(peaks) == {"bf16", "fp32"} for peaks in PEAKS.values())


@pytest.mark.parametrize(
    "name",
    ["CPU (Intel)", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H800",
     "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Tesla V100-SXM2-16GB"],
)  # fmt: skip
def test_an_unknown_device_is_said_and_its_peak_can_be_given(name):
    peak, line = peak_of(name, "bf16", None)
    assert peak is None
    assert line == f"MFU: not shown, the peak of {name} is not known (--peak-tflops N gives it)"
    assert peak_of(name, "bf16", 2.5) == (2.5e12, "")


def test_the_share_is_estimates_count_over_the_peak(tmp_path):
    recipe = load_recipe("demo_rmae")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    begun = time.perf_counter()
    mfu = Mfu(tmp_path / "recipe.yaml", peak=2 * 5e12, micro_batch=16, ranks=2)
    assert mfu.of(100.0) is None
    assert time.perf_counter() - begun < 0.5  # nothing waits for the count
    expected = flops_per_image(recipe, 16, 2)
    assert mfu.flops_per_image(wait=True) == expected
    assert mfu.of(100.0) == pytest.approx(expected * 100 / 1e13)
    mfu.close()


def test_a_count_that_fails_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.mfu.ESTIMATE", tmp_path / "missing.py")
    mfu = Mfu(tmp_path / "recipe.yaml", peak=1e12, micro_batch=2, ranks=1)
    assert mfu.flops_per_image(wait=True) is None
    assert mfu.problem.startswith("MFU: not shown, counting the FLOPs failed (")
    assert "missing.py" in mfu.problem


def test_a_count_is_taken_once_it_is_there_and_ended_where_nobody_waits(tmp_path, monkeypatch):
    """Of a command that counts at once: 1000 GPUs + micro-batch, and images of two sizes."""
    command = tmp_path / "estimate.py"
    monkeypatch.setattr("pipeline.runtime.mfu.ESTIMATE", command)
    command.write_text(
        "import sys\nsaid = dict(zip(sys.argv[2::2], sys.argv[3::2]))\n"
        "print(1000 * int(said['--gpus']) + int(said['--micro-batch']))\n"
        "print('96 40\\n192 80')"
    )
    mfu = Mfu(tmp_path / "recipe.yaml", peak=1e6, micro_batch=16, ranks=2)
    until = time.monotonic() + 60
    while mfu.of(10.0) is None:  # as a run asks: it never waits
        assert time.monotonic() < until
        time.sleep(0.02)
    assert mfu.of(10.0) == pytest.approx(2016 * 10 / 1e6)
    assert mfu.of(10.0, {96: 3, 192: 1}) == pytest.approx(50 * 10 / 1e6)
    command.write_text("import time\ntime.sleep(300)")
    begun = time.monotonic()
    Mfu(tmp_path / "recipe.yaml", peak=1e6, micro_batch=16, ranks=2).close()
    assert time.monotonic() - begun < 60
