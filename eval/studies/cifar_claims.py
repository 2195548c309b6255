"""What eval/cifar_paper.py makes on CIFAR-10 and claims of it: rows, claims, and their order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from eval.paper.published import PaperRow
from eval.paper.reproduction import published_anywhere, published_row
from eval.studies.claims import CLAIMS, Claim, Difference

# What a claim calls a row → the table and the name of the row in paper.yaml.
PUBLISHED = {
    "MAE": (4, "MAE"),
    "R-MAE": (1, "R-MAE"),
    "C-MAE": (4, "C-MAE"),
    "C-MAE without mask tokens": (4, "C-MAE without mask tokens"),
    "C-MAE, class token": (3, "instance, class token"),
    "C-MAE, average of patches": (3, "instance, average of patches"),
    "C-MAE, patches and class": (3, "token-wise, patches and class"),
    "C-MAE, BYOL": (4, "C-MAE, BYOL"),
    "MAE, jitter of the whole image": (4, "MAE, jitter of the whole image"),
    "MAE, 1 image": (6, "1 image, stronger augmentation, 5 epochs"),
    "MAE, 10 images": (6, "10 images, stronger augmentation, 5 epochs"),
    "MAE, 100 images": (6, "100 images, stronger augmentation, 10 epochs"),
    "MAE, 1000 images": (6, "1000 images, 100 epochs"),
}
JITTER = "views.jitter.where"
# CrossMAE's decoder on a third of the masked patches.
CROSS, PREDICTED = "measure.decoder.attention=cross", "views.predicted=0.3333"
OWN = {
    "MoCo v3": PaperRow("MoCo v3", {}, recipe="mocov3", set=("optimizer.epochs=100",)),
    "MAE, nothing masked": PaperRow(
        "MAE, nothing masked", {}, recipe="mae", set=("views.mask_ratio=0",),
        caveat="the paper's row is of ViT-S on ImageNet-100",
    ),
    "C-MAE, masked, no jitter": PaperRow(
        "C-MAE, masked, no jitter", {}, recipe="cmae", set=(f"{JITTER}=none",)
    ),
    "C-MAE, nothing masked": PaperRow(
        "C-MAE, nothing masked", {}, recipe="cmae",
        set=("views.mask_ratio=0", "views.second=none", f"{JITTER}=none"),
        caveat="the paper's row is of ViT-S on ImageNet-100",
    ),
    "MoCo v3, 1000 images": PaperRow(
        "MoCo v3, 1000 images", {}, recipe="mocov3", set=("optimizer.epochs=100",), images=1000
    ),
    **{
        f"R-MAE, lambda {value}": PaperRow(
            f"R-MAE, lambda {value}", {}, recipe="rmae", set=(f"measure.lambda={value}",)
        )
        for value in ("0.3", "3")
    },
    "MAE, decoder of 1 block": PaperRow(
        "MAE, decoder of 1 block", {}, recipe="mae", last=("measure.decoder.depth=1",)
    ),
    "MAE, cross decoder": PaperRow(
        "MAE, cross decoder", {}, recipe="mae", set=(PREDICTED,), last=(CROSS,)
    ),
    "R-MAE, cross decoder": PaperRow(
        "R-MAE, cross decoder", {}, recipe="rmae", set=(PREDICTED,), last=(CROSS,)
    ),
    "MAE, 90 % masked": PaperRow(
        "MAE, 90 % masked", {}, recipe="mae", set=("views.mask_ratio=0.9",)
    ),
    "MAE, growing images": PaperRow(
        "MAE, growing images", {}, recipe="mae",
        last=("data.sizes=[[0.5, 16], [0.75, 24], [1, 32]]",),
    ),
    "MAE, early layers first": PaperRow(
        "MAE, early layers first", {}, recipe="mae", last=("optimizer.layer_anneal=0.5",)
    ),
}  # fmt: skip
RANDOM = PaperRow("random", {}, initial="random")
SUPERVISED = PaperRow("supervised", {}, recipe="supervised")
# Trained from scratch for as much compute as MAE's pretraining and finetuning, or for twice that.
LONGER = {"random, as much compute": 1.0, "random, twice the compute": 2.0}
FINETUNED = ", finetuned"  # ends the name of a row after its finetuning
AS_LONG = ", as long"  # ends that of a cheaper road with the time of its method, so more epochs
CLOSE = 0.5  # points that a cheaper road may lose, and within which two rows are as good

# Row → the method whose tuned rates it has, where that is not of its own name.
METHOD_OF = {
    **dict.fromkeys(("MAE, jitter of the whole image", "MAE, 1 image", "MAE, 10 images",
                     "MAE, 100 images", "MAE, 1000 images", "MAE, nothing masked",
                     "MAE, decoder of 1 block", "MAE, 90 % masked", "MAE, cross decoder",
                     "MAE, growing images", "MAE, early layers first"), "MAE"),
    **dict.fromkeys(("R-MAE, lambda 0.3", "R-MAE, lambda 3", "R-MAE, cross decoder"), "R-MAE"),
    **dict.fromkeys(("C-MAE, class token", "C-MAE, average of patches", "C-MAE, patches and class",
                     "C-MAE, BYOL", "C-MAE, masked, no jitter", "C-MAE, nothing masked"), "C-MAE"),
    "MoCo v3, 1000 images": "MoCo v3",
    "supervised": "random",
    **dict.fromkeys(LONGER, "random"),
}  # fmt: skip
METHODS = ("MAE", "R-MAE", "C-MAE", "C-MAE without mask tokens", "MoCo v3", "random")

CHEAPER = ("MAE, cross decoder", "R-MAE, cross decoder", "MAE, decoder of 1 block",
           "MAE, 90 % masked")  # fmt: skip
LATER_ROADS = ("MAE, growing images", "MAE, early layers first")
QUICKER = (*CHEAPER, LATER_ROADS[0])  # those whose step is shorter than their method's


def plain(road: str) -> str:
    """The method of a cheaper road, without what makes it cheaper."""
    return road.split(",", 1)[0]


FEW = tuple(f"MAE, {number} image{'s' * (number > 1)}" for number in (10, 100, 1000))
POOLS = ("kept-in-both", "all-kept")

OTHERS = (
    Claim(
        6,
        "MAE's pretraining and finetuning beat training from scratch for as much compute in all, "
        "and for twice as much",
        tuple(Difference("MAE", name, "finetune") for name in LONGER),
    ),
    Claim(
        7,
        "CKA of full and masked images is higher for MAE than for MoCo v3; finetuning lowers it, "
        "but not to that of training from scratch (Fig. 1; where 70 to 90 % is dropped)",
        tuple(
            Difference(better, worse, f"cka {pool}", "")
            for pool in POOLS
            for better, worse in (
                ("MAE", "MoCo v3"),
                ("MAE", f"MAE{FINETUNED}"),
                (f"MAE{FINETUNED}", "supervised"),
            )
        ),
    ),
    Claim(
        8,
        "Pretraining on 10, 100 and 1000 images beats random initialisation in finetuning (Tab. 6)",
        tuple(Difference(name, "random", "finetune") for name in FEW),
    ),
    Claim(
        9,
        "Masking helps MAE and C-MAE in finetuning (Tab. 5)",
        (
            Difference("MAE", "MAE, nothing masked", "finetune"),
            Difference("C-MAE, masked, no jitter", "C-MAE, nothing masked", "finetune"),
        ),
    ),
    Claim(
        10,
        "Contrasting patch tokens finetunes better than contrasting one token per image, and "
        f"adding the class token changes it by less than {CLOSE:g} points (Tab. 3)",
        (
            Difference("C-MAE", "C-MAE, class token", "finetune"),
            Difference("C-MAE", "C-MAE, average of patches", "finetune"),
            Difference("C-MAE, patches and class", "C-MAE", "finetune", margin=CLOSE),
            Difference("C-MAE", "C-MAE, patches and class", "finetune", margin=CLOSE),
        ),
    ),
    Claim(
        11,
        "InfoNCE is above BYOL for C-MAE, and MAE without jitter above MAE with it, in the linear "
        "probe (Tab. 4)",
        (
            Difference("C-MAE", "C-MAE, BYOL", "linprobe"),
            Difference("MAE", "MAE, jitter of the whole image", "linprobe"),
        ),
    ),
    Claim(
        12,
        "On 1000 images MAE finetunes better than MoCo v3, whose linear probe is better (Tab. 8)",
        (
            Difference("MAE, 1000 images", "MoCo v3, 1000 images", "finetune"),
            Difference("MoCo v3, 1000 images", "MAE, 1000 images", "linprobe"),
        ),
    ),
    Claim(
        13,
        "Our question: R-MAE's PSNR hangs on lambda; at 0.3 or 3 it is above MAE's",
        tuple(
            Difference(f"R-MAE, lambda {value}", "MAE", "psnr", "dB") for value in ("0.3", "3")
        ),
    ),
    Claim(
        14,
        "Our question: a decoder of one block, one of cross-attention on a third of the masked "
        f"patches, and a mask ratio of 0.9 lose at most {CLOSE:g} points",
        tuple(
            Difference(name, plain(name), metric, margin=CLOSE)
            for name in CHEAPER
            for metric in ("finetune", "linprobe")
        ),
    ),
    Claim(
        15,
        "Our question: crops of half and three quarters of the size in three quarters of the "
        "steps, and early layers that learn early (layer_anneal 0.5), lose at most "
        f"{CLOSE:g} points",
        tuple(
            Difference(name, "MAE", metric, margin=CLOSE)
            for name in LATER_ROADS
            for metric in ("finetune", "linprobe")
        ),
    ),
    Claim(
        16,
        "Our question: given the time of their method, and so more images, the cheaper roads are "
        "better",
        tuple(
            Difference(f"{name}{AS_LONG}", plain(name), metric)
            for name in QUICKER
            for metric in ("finetune", "linprobe")
        ),
    ),
)  # fmt: skip
# In the order in which they are made, since a budget may end before the last: the cheaper roads
# before those of Tab. 3 to 8.
_BY_NUMBER = {claim.number: claim for claim in (*CLAIMS, *OTHERS)}
ALL = tuple(_BY_NUMBER[n] for n in (1, 2, 3, 5, 6, 7, 14, 15, 16, 4, 8, 9, 10, 11, 12, 13))
NAMES = (*PUBLISHED, *OWN, *(f"{name}{AS_LONG}" for name in QUICKER), "random", "supervised",
         *LONGER, f"MAE{FINETUNED}")  # fmt: skip


def cifar_row(
    name: str,
    base_lr: dict[str, float],
    finetune_lr: dict[str, float],
    compute: float,
    times: Mapping[str, float] | None = None,
) -> PaperRow:
    """The row that a claim names, with its method's tuned rates (METHOD → rate; none: the scale's).

    compute: what MAE's pretraining and finetuning cost, in finetunings; times: how many of a
    cheaper road's steps take as long as one of its method (ROAD → number; none: 1).
    """
    if name.endswith(FINETUNED):
        base = cifar_row(name.removesuffix(FINETUNED), base_lr, finetune_lr, compute)
        return replace(base, name=name, finetuned=True)
    if name.endswith(AS_LONG):
        road = name.removesuffix(AS_LONG)
        base = cifar_row(road, base_lr, finetune_lr, compute)
        epochs = round(100 * (times or {}).get(road, 1.0))
        return replace(base, name=name, set=(*base.set, f"optimizer.epochs={epochs}"))
    method = method_of(name)
    row = plain_row(name)
    finetune = dict(row.finetune)
    if name in LONGER:
        finetune["epochs"] = round(100 * LONGER[name] * compute)
    if method in finetune_lr:
        finetune["base_lr"] = finetune_lr[method]
    last = row.last
    if method in base_lr and row.recipe not in (None, "supervised"):
        last = (*last, f"optimizer.base_lr={base_lr[method]:g}")
    return replace(row, name=name, finetune=finetune, last=last)


def method_of(name: str) -> str:
    """The method whose tuned rates a row has."""
    name = name.removesuffix(FINETUNED).removesuffix(AS_LONG)
    return METHOD_OF.get(name, name)


def plain_row(name: str) -> PaperRow:
    """The row that a claim names, with the scale's rates."""
    if name in LONGER:
        return replace(RANDOM, name=name)
    if name in PUBLISHED:
        return published_row(*PUBLISHED[name])
    row = {"random": RANDOM, "supervised": SUPERVISED, **OWN}[name]
    return replace(row, published=published_anywhere(row))


def claims_of(numbers: Sequence[int]) -> tuple[Claim, ...]:
    """The claims of these numbers, in the order in which they are made."""
    return tuple(claim for claim in ALL if claim.number in numbers)
