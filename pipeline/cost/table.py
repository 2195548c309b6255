"""A plan of `pipeline/estimate.py` as text: memory by ZeRO stage, then what sets the pace."""

from __future__ import annotations

from typing import Any

SIZES = "data.sizes: FLOPs and times are means over the run, memory is that of the full size"


def table(plan: dict[str, Any]) -> str:
    """The plan, as `predict` makes it, in lines for the terminal."""
    peak = f"at {plan['utilisation']:.0%} of the peak in {plan['precision']}"
    gpus = f"{plan['gpus']} {plan['gpu'].upper()} of {plan['gpu_memory_gb']:g} GB"
    slower = f"({plan['bound']}; {plan['gpu_bound_hours']} {peak})"
    lines = [
        f"{plan['recipe']}: {plan['trained_parameters'] / 1e6:.1f} M trained parameters, "
        f"{plan['flops_per_step'] / 1e12:.1f} TFLOP per step, {plan['steps']} steps",
        f"{plan['hours']} hours on {gpus} " + (peak if plan["bound"] == "GPU-bound" else slower),
        *([SIZES] if plan["sizes"] else []),
        "",
        "ZeRO  micro-batch  accum.  weights  gradients  optimizer  teacher  activations   sum GB"
        "  sent GB/step",
    ]
    for row in plan["stages"]:
        parts = ("weights", "gradients", "optimizer", "teacher", "activations")
        widths = (9, 11, 11, 9, 13)
        cells = "".join(f"{row[f'{p}_gb']:{w}.2f}" for p, w in zip(parts, widths, strict=True))
        fits = "" if row["fits"] else "  does not fit"
        lines.append(
            f"{row['stage']:4}{row['micro_batch']:13}{row['accumulation']:8}{cells}"
            f"{row['memory_gb']:9.2f}{row['sent_gb_per_step']:14.3f}{fits}"
        )
    stage = plan["recommended_stage"]
    others = [row["stage"] for row in plan["stages"] if row["run_as"] != row["stage"]]
    if others:
        listed = " and ".join(map(str, others))
        lines.append(f"with CUDA graphs ZeRO {listed} run as 1 (--no-graphs: cuda_graphs false)")
    advice = "no stage fits: more GPUs, a smaller micro-batch, --no-graphs or --checkpointing"
    lines.append(
        advice if stage is None else f"recommended: ZeRO {stage} (the lowest from 1 up that fits)"
    )
    lines += [
        "",
        f"ms per step of a rank, at {plan['launch_ms'] * 1e3:.1f} µs of the host per launch and "
        f"{plan['core_images']:g} images/s per core on {plan['cores']} cores per GPU",
        "ZeRO  launches      GPU     host   loader  cores that keep it fed",
    ]
    for row in plan["stages"]:
        times = "".join(f"{row[f'{part}_ms']:9.1f}" for part in ("gpu", "host", "loader"))
        lines.append(
            f"{row['stage']:4}{row['launches']:10}{times}{row['cores_needed']:8}  {row['bound']}"
        )
    return "\n".join(lines)
