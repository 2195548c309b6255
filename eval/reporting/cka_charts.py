"""The paper's Fig. 1 from results of eval/cka.py: CKA against the share of dropped patches."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.reporting.charts import Line, line_chart
from eval.reporting.run_records import Group
from eval.reporting.tables import is_random


def cka_charts(groups: Sequence[Group]) -> list[str]:
    """Per pooling two charts, a line per group (mean over its seeds): CKA of the last block
    against the share dropped, and CKA at the largest share against the block."""
    charts = []
    for pool in ("mean_patch", "cls"):
        lines = []
        for colour, group in enumerate(groups):
            lines.append((colour, group.label, False, results_of([group], pool, random=False)))
        lines.append((6, "random encoder", True, results_of(groups, pool, random=True)))
        shown = [line for line in lines if line[3]]
        if not shown:
            continue
        what = "mean of patches" if pool == "mean_patch" else "class token"
        by_ratio, by_block = [], []
        for colour, label, dashed, results in shown:
            ratios, values = average(results)
            blocks = list(range(1, values.shape[1] + 1))
            last, most = values[:, -1].tolist(), values[-1].tolist()
            by_ratio.append(Line(ratios, last, colour, label, dashed, marker=True))
            by_block.append(Line(blocks, most, colour, label, dashed, marker=True))
        largest = f"{max(line.x[-1] for line in by_ratio):.0%}"
        charts += [
            line_chart(
                by_ratio, title=f"CKA of the last block, {what}", x="share of patches dropped",
                y="CKA(full, dropped)", limits=(0, 1.02),
            ),
            line_chart(
                by_block, title=f"CKA with {largest} dropped, {what}", x="block",
                y="CKA(full, dropped)", limits=(0, 1.02),
            ),
        ]  # fmt: skip
    return charts


def results_of(groups: Sequence[Group], pool: str, *, random: bool) -> list[dict[str, Any]]:
    """CKA results of the groups' runs with one pooling, of pretrained or of random encoders."""
    return [
        result
        for group in groups
        for run in group.runs
        for result in run.results
        if result.get("protocol") == "cka"
        and result.get("pool") == pool
        and is_random(result) == random
    ]


def average(results: Sequence[dict[str, Any]]) -> tuple[list[float], np.ndarray]:
    """Ratios and mean CKA [ratios, blocks] of the results that have the first one's shape."""
    ratios = results[0]["ratios"]
    tables = [np.array(r["cka"]) for r in results if r["ratios"] == ratios]
    alike = [table for table in tables if table.shape == tables[0].shape]
    return ratios, np.mean(alike, axis=0)
