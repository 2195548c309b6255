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
    """Per pooling and estimator two charts, a line per group (mean over its seeds; one for each
    choice of shares): CKA of the last block against the share dropped, and CKA at the largest share
    against the block."""
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
        largest = max(max(ratios) for *_, tables in shown for ratios, _ in tables)
        by_ratio: list[Line] = []
        by_block: list[Line] = []
        for colour, label, dashed, tables in shown:
            for ratios, values in averages(tables):
                last = values[:, -1].tolist()
                line = Line(ratios, last, colour, once(label, by_ratio), dashed, marker=True)
                by_ratio.append(line)
                if ratios[-1] == largest:
                    blocks, most = list(range(1, values.shape[1] + 1)), values[-1].tolist()
                    line = Line(blocks, most, colour, once(label, by_block), dashed, marker=True)
                    by_block.append(line)
        charts += [
            line_chart(
                by_ratio, title=f"CKA of the last block, {what}", x="share of patches dropped",
                y="CKA(full, dropped)", limits=(0, 1.02),
            ),
            line_chart(
                by_block, title=f"CKA with {largest:.0%} dropped, {what}", x="block",
                y="CKA(full, dropped)", limits=(0, 1.02),
            ),
        ]  # fmt: skip
    return charts


def once(label: str, lines: Sequence[Line]) -> str:
    """The label of a line, "" where one of these has it."""
    return "" if any(line.label == label for line in lines) else label


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
        results.sort(key=lambda result: len(result["file"]))  # that of the usual settings first
        tables = [(r["ratios"], cka_table(r, pool, hsic)) for r in results]
        found += [(ratios, table) for ratios, table in tables if table is not None][:1]
    return found


def averages(
    tables: Sequence[tuple[list[float], list[Any]]],
) -> list[tuple[list[float], np.ndarray]]:
    """Ratios, ascending, and mean CKA [ratios, blocks] of the tables of the same ratios and blocks,
    of each such kind."""
    kinds: dict[tuple, list[np.ndarray]] = {}
    for ratios, cka in tables:
        order, values = sorted(range(len(ratios)), key=ratios.__getitem__), np.array(cka)
        kind = (tuple(ratios[n] for n in order), values.shape)
        kinds.setdefault(kind, []).append(values[order])
    return [(list(ratios), np.mean(same, axis=0)) for (ratios, _), same in kinds.items()]
