"""The paper's Fig. 1 from results of eval/cka.py: CKA against the share of dropped patches."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from eval.reporting.charts import Line, line_chart
from eval.reporting.run_records import Group
from eval.reporting.tables import is_random

# How a result of eval/cka.py pools → what a chart says.
POOLS = {
    "kept-in-both": "mean of the patches in both",
    "all-kept": "mean of all patches against those kept",
    "cls": "cls token",
}


def cka_charts(groups: Sequence[Group]) -> list[str]:
    """Per pooling and estimator two charts, a line per group (mean over its seeds): CKA of the
    last block against the share dropped, and CKA at the largest share against the block."""
    charts = []
    for (pool, what), hsic in product(POOLS.items(), ("unbiased", "biased")):
        lines = []
        for colour, group in enumerate(groups):
            found = tables_of([group], pool, hsic, random=False)
            lines.append((colour, group.label, False, found))
        lines.append((6, "random encoder", True, tables_of(groups, pool, hsic, random=True)))
        shown = [line for line in lines if line[3]]
        if not shown:
            continue
        what += "" if hsic == "unbiased" else ", biased HSIC"
        by_ratio, by_block = [], []
        for colour, label, dashed, tables in shown:
            ratios, values = average(tables)
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


def cka_table(result: dict[str, Any], pool: str, hsic: str = "unbiased") -> list[Any] | None:
    """CKA [ratios][blocks] of a result pooled and estimated this way, None where it has none.

    Results from before 0.2 have one table, of mean_patch (today's all-kept) or cls.
    """
    old = {"mean_patch": "all-kept"}.get(result.get("pool", ""), result.get("pool"))
    variants = result.get("variants") or [{"pool": old, "hsic": "unbiased", "cka": result["cka"]}]
    same = (v["cka"] for v in variants if (v["pool"], v["hsic"]) == (pool, hsic))
    return next(same, None)


def tables_of(
    groups: Sequence[Group], pool: str, hsic: str, *, random: bool
) -> list[tuple[list[float], list[Any]]]:
    """(ratios, CKA) of the groups' runs, pooled and estimated one way, of pretrained or of random
    encoders; each run once."""
    found = []
    for run in (run for group in groups for run in group.runs):
        results = [r for r in run.results if r.get("protocol") == "cka" and is_random(r) == random]
        tables = [(r["ratios"], cka_table(r, pool, hsic)) for r in results]
        found += [(ratios, table) for ratios, table in tables if table is not None][:1]
    return found


def average(tables: Sequence[tuple[list[float], list[Any]]]) -> tuple[list[float], np.ndarray]:
    """Ratios and mean CKA [ratios, blocks] of the tables that have the first one's shape."""
    ratios = tables[0][0]
    values = [np.array(cka) for others, cka in tables if others == ratios]
    return ratios, np.mean([v for v in values if v.shape == values[0].shape], axis=0)
