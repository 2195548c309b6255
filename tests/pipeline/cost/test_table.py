"""A plan as text: every number under its heading, in the unit that it names."""

import pytest

from pipeline.cost.table import table

STAGE = {
    "stage": 2, "run_as": 2, "micro_batch": 64, "accumulation": 3, "weights_gb": 1.25,
    "gradients_gb": 2.5, "optimizer_gb": 3.75, "teacher_gb": 4.5, "activations_gb": 5.25,
    "memory_gb": 17.25, "sent_gb_per_step": 0.125, "fits": True, "launches": 1234, "gpu_ms": 11.5,
    "host_ms": 22.5, "loader_ms": 33.5, "cores_needed": 6, "bound": "loader-bound",
}  # fmt: skip
PLAN = {
    "recipe": "mine", "trained_parameters": 111_900_000, "flops_per_step": 123.4e12, "steps": 500,
    "hours": 7.5, "gpu_bound_hours": 5.5, "bound": "GPU-bound", "gpus": 8, "gpu": "h100",
    "gpu_memory_gb": 80.0, "utilisation": 0.29, "precision": "bf16", "sizes": (), "stages": [STAGE],
    "recommended_stage": 2, "launch_ms": 0.0055, "core_images": 1000.0, "cores": 12,
}  # fmt: skip


def test_numbers_are_in_their_units_under_their_headings():
    text = table(PLAN).splitlines()
    assert text[0] == "mine: 111.9 M trained parameters, 123.4 TFLOP per step, 500 steps"
    assert text[1] == "7.5 hours on 8 H100 of 80 GB at 29% of the peak in bf16"
    for heading, values in (
        ("ZeRO  micro-batch", "2 64 3 1.25 2.50 3.75 4.50 5.25 17.25 0.125"),
        ("ZeRO  launches", "2 1234 11.5 22.5 33.5 6 loader-bound"),
    ):
        (above,) = [number for number, line in enumerate(text) if line.startswith(heading)]
        assert text[above + 1].split() == values.split()
    assert "recommended: ZeRO 2 (the lowest from 1 up that fits)" in text
    assert any("at 5.5 µs of the host per launch and 1000 images/s" in line for line in text)
    assert not any("data.sizes" in line or "cuda_graphs" in line for line in text)


@pytest.mark.parametrize(
    ("change", "row", "words"),
    [
        ({"bound": "host-bound"}, {}, "80 GB (host-bound; 5.5 at 29% of the peak in bf16)"),
        ({"sizes": ((1.0, 96),)}, {}, "FLOPs and times are means over the run"),
        ({}, {"fits": False}, "0.125  does not fit"),
        ({}, {"run_as": 1}, "with CUDA graphs ZeRO 2 run as 1"),
        ({"recommended_stage": None}, {}, "no stage fits: more GPUs"),
    ],
)
def test_what_a_plan_says_beside_its_numbers(change, row, words):
    assert words not in table(PLAN)
    assert words in table(PLAN | change | {"stages": [STAGE | row]})
