"""What a rank holds and sends under each ZeRO stage: the formulas of ZeRO (Rajbhandari et al. 2020,
Sec. 5 and 7) with DeepSpeed's padding."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.cost.dry_run import Work
from pipeline.cost.micro_batch import BF16_WEIGHTS
from pipeline.cost.stepping import Stepping
from pipeline.method.objective import Objective
from pipeline.method.teacher import Teacher, linear_weights

ALIGN = 2  # elements to which DeepSpeed pads a rank's part of a flat group


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory(
    objective: Objective,
    teacher: Teacher | None,
    work: Work,
    stage: int,
    ranks: int,
    precision: str,
    copies: int = 0,
) -> Memory:
    """Bytes on the fullest rank. Stage 1 shares the optimizer's state, 2 also gradients (each rank
    keeps whole those that reach into its part; just its part where bf16's are kept in fp32), 3
    also weights.

    Per trained parameter: weight and gradient, of 2 bytes or 4 by the precision; the optimizer's
    moments in fp32; from stage 1 on an fp32 weight beside them. copies: of all gradients, beside
    them while the activations' memory is held (graph_copies).
    """
    stepping = Stepping(objective)
    groups, size = stepping.sizes, 2 if precision in BF16_WEIGHTS else 4
    trained, part = sum(map(sum, groups)), shard(groups, stage, ranks)
    frozen = [p.numel() for p in objective.parameters() if not p.requires_grad]
    here = [-(-n // ranks) for n in frozen] if stage == 3 else frozen
    if stage == 3 or (stage == 2 and precision == "bf16-fp32-grads"):
        kept = part
    else:
        kept = max(stage2_gradients(groups, ranks)) if stage == 2 else trained
    return Memory(
        weights=((part if stage == 3 else trained) + sum(here)) * size,
        gradients=(kept + copies * trained) * (2 if precision == "bf16" else 4),
        optimizer=sum(
            shard([sizes], stage, ranks) * 4 * (moments + (stage > 0))
            for sizes, moments in zip(groups, stepping.moments, strict=True)
        ),
        teacher=teacher_bytes(teacher, precision) if teacher else 0,
        activations=work.activations,
    )


def shard(groups: list[list[int]], stage: int, ranks: int) -> int:
    """Elements of the optimizer's part on one rank; groups: the parameters' sizes per group."""
    if stage == 0:
        return sum(map(sum, groups))
    if stage == 3:  # every parameter is cut by itself
        return sum(-(-n // ranks) for group in groups for n in group)
    return sum(-(-sum(group) // (ALIGN * ranks)) * ALIGN for group in groups)


def stage2_gradients(groups: list[list[int]], ranks: int) -> list[int]:
    """Elements of gradients that each rank keeps between micro-batches under stage 2: DeepSpeed
    keeps every parameter that overlaps the rank's part, unsharded."""
    kept = [0] * ranks
    for group in groups:
        part, first = shard([group], 2, ranks), 0
        for size in group:
            for rank in range(first // part, (first + size - 1) // part + 1):
                kept[rank] += size
            first += size
    return kept


def teacher_bytes(teacher: Teacher, precision: str) -> int:
    """Bytes of a teacher: fp32, and of its linears a copy in the type of their products."""
    copied = [] if precision == "fp32" else linear_weights(teacher)
    return sum(p.numel() * 4 for p in teacher.parameters()) + sum(p.numel() * 2 for p in copied)


def traffic(
    objective: Objective,
    teacher: Teacher | None,
    work: Work,
    stage: int,
    ranks: int,
    accumulation: int,
    precision: str,
) -> int:
    """Bytes that one rank sends per optimizer step: ring collectives, each part to every rank.

    Gradients: all-reduced at stage 0, scattered at 1 (once a step) and at 2 and 3 (every
    micro-batch). Weights: gathered after the step at 1 and 2; at 3 in every forward and backward,
    and once more for a teacher, in fp32; so that it sees the fp32 weights of a bf16 run, these are
    summed over the ranks at 1 and 2. What Muon makes of its matrices' gradients: gathered at 1 and
    2, in fp32. Keys: gathered in every micro-batch.
    """
    full = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    followed = sum(p.numel() for p in teacher.parameters()) if teacher else 0
    gradient = full * (2 if precision == "bf16" else 4)
    weight = full * (2 if precision in BF16_WEIGHTS else 4)
    sent = {
        0: 2 * gradient,
        1: gradient + weight,
        2: accumulation * gradient + weight,
        3: accumulation * (gradient + 2 * weight) + 4 * followed,
    }[stage]
    if precision in BF16_WEIGHTS and stage < 3:
        sent += 2 * 4 * followed
    if stage in (1, 2):
        sent += 4 * Stepping(objective).gathered
    share = (ranks - 1) / ranks
    return round(share * sent + (ranks - 1) * work.keys * accumulation)


def graph_copies(accumulation: int) -> int:
    """Copies of all gradients beside those of a CUDA graph, whose memory holds the activations'
    too: the joined ones, and the sum of the micro-batches before."""
    return 1 if accumulation == 1 else 2
