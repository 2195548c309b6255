"""Every kernel compiles for sm_80, sm_90, sm_100, all but one without spills; torch.compile takes
the ops."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from kernels_testing import DEVICE, IMAGENET, assert_agree, noise, random_images, using

from pipeline import kernels
from pipeline.kernels.cases import all_cases

CASES = all_cases().values()
KERNELS = {kernel for case in CASES for kernel in case.kernels}
# These exist to move memory; their tiles are read and written in the widest words.
WIDE = {kernel for case in CASES for kernel in case.wide}


@pytest.fixture(scope="module")
def report():
    """The last line of the quick report, made by compiling for real in another process."""
    if not hasattr(triton.JITFunction, "_pack_args"):
        pytest.skip("Triton 3.4 packs arguments within a launch")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "bench/kernels_report.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Bytes of a thread in local memory (Triton 3.6 as many, 3.8 eight less). InfoNCE, forward
# and backward, takes 936 us so on an H100, and 1566 with half the rows, which fit the registers;
# more than half of the bytes wait for the end, where the gradient is stored.
SPILLS = {
    "token_infonce_backward dq bf16 vit-b16 sm_90": 168,
    "token_infonce_backward dk bf16 vit-b16 sm_90": 168,
}


@pytest.mark.slow
def test_nothing_spills_but_what_is_faster_so(report):
    for row, spilled in report["spilling"].items():
        assert spilled <= SPILLS.get(row, 0), row
    assert report["spills"] == sum(report["spilling"].values())
    assert report["shared"] <= 99 * 1024  # of a program on the smallest GPUs, sm_86 and sm_120
    assert {row.split()[0] for row in report["widest"]} == KERNELS
    for capability in (80, 90, 100):
        for kernel in KERNELS:
            assert any(
                row.startswith(f"{kernel} ") and row.endswith(f"sm_{capability}")
                for row in report["widest"]
            ), (kernel, capability)


@pytest.mark.slow
def test_loads_and_stores_are_vectorised(report):
    for row, (load, store) in report["widest"].items():
        kernel = row.split()[0]
        if kernel in WIDE:
            assert (load, store) == (128, 128), row
        if kernel == "patch_loss":
            assert load == 128, row


def training_loss(image, masks, weights):
    """Every differentiable op once."""
    z = kernels.embed_visible(
        image, masks.visible1, weights["weight"], weights["bias"], None, **IMAGENET
    )
    z = torch.cat([z.mean(1, keepdim=True), z], 1)
    x = kernels.place_tokens(
        z, masks.inverse1, weights["mask_token"], weights["position"], prefix=1
    )
    prediction = (x[:, 1:] @ weights["head"])[:, :12].contiguous()
    loss = kernels.patch_loss(prediction, image, masks.hidden1, patch=8, **IMAGENET)
    contrast, _ = kernels.token_infonce(
        x, x.detach().roll(1, 1), temperature=0.2, negatives="position", offset=0
    )
    return loss.sum() + contrast


def training_inputs():
    image = random_images(2, 32, 32)
    masks = kernels.sample_masks(
        torch.arange(2, device=DEVICE), seed=0, epoch=0, length=16, visible=(4, 0),
        policy="complement",
    )  # fmt: skip
    weights = {
        "weight": noise(16, 3, 8, 8) * 0.1,
        "bias": noise(16),
        "mask_token": noise(16, seed=1),
        "position": noise(17, 16),
        "head": noise(16, 192) * 0.1,
    }
    return image, masks, {name: w.requires_grad_() for name, w in weights.items()}


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_torch_compile_takes_the_ops_whole(implementation):
    """One graph, without breaks: fake tensors and autograd formulas are all there."""
    with using(implementation):
        image, masks, weights = training_inputs()
        expected = training_loss(image, masks, weights)
        wanted = torch.autograd.grad(expected, list(weights.values()))
        torch.compiler.reset()
        compiled = torch.compile(training_loss, backend="aot_eager", fullgraph=True)
        got = compiled(image, masks, weights)
        grads = torch.autograd.grad(got, list(weights.values()))
    assert_agree("loss", got.detach(), expected.detach(), 1e-6)
    for name, grad, want in zip(weights, grads, wanted, strict=True):
        assert_agree(name, grad, want, 1e-5)
