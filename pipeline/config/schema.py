"""The sections of a recipe but `measure`: typed, frozen groups that refuse unknown keys."""

from __future__ import annotations

import re
import reprlib
import sys
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pipeline.config.installed import keys_of
from pipeline.errors import UserError
from shard_tools.home import expand_home

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_IMAGES = 1281167  # of the training set

# Beyond it integers of numpy and products of floats overflow.
LARGEST = 10**15
LARGEST_RATE = 1e30  # of learning; fp32 ends at 3.4e38
SMALLEST = 1e-37  # above 0 in fp32, also where numbers below 1.2e-38 are 0
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
Deviation = Annotated[float, Field(ge=1e-6, le=1.0)]  # a step of 8 bits is 4e-3
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Steps = Annotated[int, Field(ge=0, le=LARGEST)]  # 0: never


# YAML aliases can make a value of a few bytes endless when written out.
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 3, 80, 80


class Section(BaseModel):
    """A frozen group of recipe keys that refuses unknown ones."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false (YAML's yes, no, on and off) as numbers, which are 1 and 0 to
        Python."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if _holds_bool(value) and _takes_number(kind):
            raise ValueError("input should be a number, not true or false")
        return value


def _holds_bool(value: Any, depth: int = 2) -> bool:
    """Down to lists in lists, the deepest that a field has: aliases of YAML can nest far."""
    if isinstance(value, list | tuple):
        return depth > 0 and any(_holds_bool(one, depth - 1) for one in value)
    return isinstance(value, bool)


def _takes_number(kind: Any) -> bool:
    return kind in (int, float) or any(map(_takes_number, get_args(kind)))


# Keywords of timm.create_model that f can honour, and what their values are.
ENCODER_OPTIONS: dict[str, Any] = {
    "img_size": Positive,  # as encoder.image_size, which is where it is set
    "patch_size": Positive,
    "embed_dim": Positive,
    "depth": Positive,
    "num_heads": Positive,
    "mlp_ratio": Annotated[float, Field(gt=0.0, le=1000.0)],
    "qkv_bias": bool,
    "qk_norm": bool,
    "proj_bias": bool,
    "init_values": Annotated[float, Field(gt=0.0, le=1000.0)],  # timm takes None for not given
}


def encoder_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options, if f can honour them all; ValueError names one that it cannot.

    The patches are embedded by a kernel of our own and encoder.json must rebuild the encoder, so
    what timm would take beyond these (in_chans, drop_path_rate, dynamic_img_size, reg_tokens, …)
    would be lost.
    """
    for key, value in options.items():
        if key not in ENCODER_OPTIONS:
            known = ", ".join(k for k in ENCODER_OPTIONS if k != "img_size")
            raise ValueError(
                f"{key} is not an option of a plain ViT as it is trained here; valid: {known}"
            )
        try:
            TypeAdapter(ENCODER_OPTIONS[key]).validate_python(value, strict=True)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{key}: {reason[0].lower()}{reason[1:]}, not {value!r}") from None
    return options


class EncoderRecipe(Section):
    """f: a timm ViT. `options` are further keywords of timm.create_model, see ENCODER_OPTIONS.

    init: initial weights and position table as in `mae`, or as in `mocov3` (table with the row
    first, q, k and v initialised apart, cls token N(0, 1e-6)). freeze_patch: the patch
    embedding keeps its random weights (MoCo v3).
    """

    arch: str = "vit_base_patch16_224"
    image_size: Positive = 224
    options: Annotated[dict[str, Any], AfterValidator(encoder_options)] = {}
    masked_tokens: Literal["drop", "replace"] = "drop"
    init: Literal["mae", "mocov3"] = "mae"
    freeze_patch: bool = False

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels, from the options or the name (vit_base_patch16_224)."""
        given = self.options.get("patch_size")
        if isinstance(given, int) and given > 0:
            return given
        named = re.search(r"(?:^|_)patch([1-9]\d*)(?:_|$)", self.arch)
        return int(named[1]) if named else None

    @property
    def patches(self) -> int:
        """Patches of an image; as if 16 pixels wide where neither options nor name say it."""
        return (self.image_size // (self.patch_size or 16)) ** 2


class JitterRecipe(Section):
    """Colour jitter (SimSiam's values) of the `whole` image or of each view's `visible` patches."""

    where: Literal["none", "whole", "visible"] = "none"
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.4
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    probability: Fraction = 0.8
    grayscale: Fraction = 0.0


def path_text(text: str) -> str:
    """A path (or URL, or timm:NAME) of a recipe, whose `~` no shell has read. ValueError."""
    try:
        return expand_home(text)
    except UserError as error:
        raise ValueError(str(error)) from None


PathText = Annotated[str, AfterValidator(path_text)]


def mask_policy(name: str) -> str:
    """The name of a masking policy; ValueError lists them. The policies are in method/masking."""
    module = sys.modules.get("pipeline.method.masking")
    policies = module.POLICIES if module else keys_of("method/masking.py", "POLICIES")
    if name not in policies:
        raise ValueError(f"input should be {' or '.join(policies)}")
    return name


# timm leaves out what it cannot read of a policy, such as `inc` and `mstdinf`.
_POLICY = re.compile(
    r"rand(-(m\d+|n\d+|mmax\d+|mstd\d+(\.\d+)?|p(0(\.\d+)?|1(\.0+)?)|inc[01]|t(weights|3aw?)))*",
    re.ASCII,
)


def augmentation(policy: str) -> str:
    """A policy of timm's RandAugment, or "". ValueError where it is none."""
    if policy and not _POLICY.fullmatch(policy):
        raise ValueError("input should be a policy of timm such as rand-m9-mstd0.5-inc1")
    return policy


class ViewsRecipe(Section):
    """(T1, T2). T1 masks the share `mask_ratio`; T2 is what `second` says.

    mask: how T1 (and an independent T2) choose what to mask, a policy of method/masking: random
    patches, or blocks (BEiT). second_mask_ratio: what an `independent` T2 masks.

    second: pixels (no second view), complement, independent, none (T2 masks nothing of the same
    crop), crop (another random crop of the image, nothing masked). mask_ratio 0: no masking; MAE's
    loss is then on every patch. cutmix: the probability that a box of a view, of a share of the
    area uniform in 0 … 1, shows another image of the micro-batch instead; each view has its own
    box, drawn before masks and jitter are applied, and MAE's target stays the clean image.
    predicted: the share of the patches masked by T1 at which a reconstruction is taken, another
    uniform draw of them for every image and epoch; both branches of R-MAE predict the same ones.
    """

    mask: Annotated[str, AfterValidator(mask_policy)] = "random"
    mask_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.75
    second: Literal["pixels", "complement", "independent", "none", "crop"] = "pixels"
    second_mask_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    cutmix: Fraction = 0.0
    predicted: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    jitter: JitterRecipe = JitterRecipe()


class EMARecipe(Section):
    """The teacher's momentum; `cosine` raises it to 1 over the run."""

    momentum: Fraction = 0.996
    schedule: Literal["constant", "cosine"] = "constant"


class WeightDecayRecipe(Section):
    """Weight decay of matrices; `tokens` says whether cls and mask tokens decay too (as MAE)."""

    value: Annotated[float, Field(ge=0.0, le=LARGEST_RATE)] = 0.05
    tokens: bool = True


class InitRecipe(Section):
    """Weights to start from, with a schedule and an optimizer of their own: what load_encoder takes
    (a run, an export, a file of facebookresearch/mae, MoCo v3, DINO, …, timm:NAME); "": fresh ones.

    ema: the average that a file keeps beside its weights, or the EMA teacher of a run.
    """

    weights: PathText = ""
    ema: bool = False


class OptimizerRecipe(Section):
    """lr = base_lr * batch_size / 256, linear warm-up, cosine to min_lr, per step.

    layer_decay: every layer of f has this share of the rate of the layer behind it, as in
    finetuning. layer_anneal: f's first layer starts at 1 / layer_anneal of the rate and is at
    min_lr after this share of the run, later layers in between. 1: no such difference; the
    equations are in config/schedules.py.

    kind: adamw, or muon: Muon for the matrices of the transformer blocks, scaled to the size of
    AdamW's updates, and AdamW for the rest (ZeRO 0 to 2); betas and eps are AdamW's in both.
    A step whose gradient is not finite is skipped; skip_limit of them in a row end the run.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    base_lr: Annotated[float, Field(gt=0.0, le=LARGEST_RATE)] = 1.5e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(ge=SMALLEST, le=LARGEST_RATE)] = 1e-8
    weight_decay: WeightDecayRecipe = WeightDecayRecipe()
    gradient_clipping: Annotated[float, Field(ge=0.0)] = 0.0
    epochs: Annotated[float, Field(gt=0.0, le=LARGEST)] = 100
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 20
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    layer_anneal: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    skip_limit: Positive = 10

    @property
    def by_layer(self) -> bool:
        """Whether layers have learning rates of their own."""
        return self.layer_decay < 1 or self.layer_anneal < 1


class CropRecipe(Section):
    """RandomResizedCrop (antialiased) and horizontal flip; MoCo v3's crops are bilinear."""

    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def size_schedule(sizes: tuple[tuple[float, int], ...]) -> tuple[tuple[float, int], ...]:
    """The entries of data.sizes; ValueError where the shares of the run do not rise to 1."""
    shares = [share for share, _ in sizes]
    if any(after <= before for before, after in pairwise((0.0, *shares))):
        raise ValueError("the shares of the run (first in each entry) must be above 0 and rise")
    if shares and shares[-1] != 1.0:
        raise ValueError("the last entry must be [1, encoder.image_size], the end of the run")
    return sizes


class DataRecipe(Section):
    """The order of the samples (partitions, window) and how each one is cut.

    samples_per_epoch: > 0 makes an epoch of that many draws with replacement (few images).
    sizes: [share of the run, side in pixels] of phases one after another: until that share of the
    optimizer steps crops are that large, and f and its decoder have the positions of a model of
    that size. The last is [1, encoder.image_size]; none: every crop has encoder.image_size.
    mean, std: of the pixels, which are numbers in 0 … 1.
    randaugment: a timm policy such as rand-m9-mstd0.5-inc1, applied after the crop; "" is off.
    """

    partitions: Positive = 64
    window: Positive = 8
    samples_per_epoch: Steps = 0
    crop: CropRecipe = CropRecipe()
    sizes: Annotated[tuple[tuple[Fraction, Positive], ...], AfterValidator(size_schedule)] = ()
    randaugment: Annotated[str, AfterValidator(augmentation)] = ""
    mean: tuple[Fraction, Fraction, Fraction] = IMAGENET_MEAN
    std: tuple[Deviation, Deviation, Deviation] = IMAGENET_STD
    workers: Annotated[int, Field(ge=-1, le=1024)] = -1
    on_error: Literal["fail", "skip"] = "fail"


class MonitorRecipe(Section):
    """How often (in steps) to log, draw pictures, save and probe, and where; changes no result.

    log_to: beside log.txt and metrics.jsonl; wandb and mlflow are packages to be installed.
    occlusion_steps: CKA of the features of whole and occluded images; knn_steps: a k-NN
    classifier of the features; 0 is off. Both look at `images` held-out images, taken evenly
    from the shard folder `held_out` ("": the folder `val` beside the training shards).
    on_disk_full: where a checkpoint cannot be written, stop, or continue to the next one (the last
    one of a run must be written).
    """

    log_steps: Positive = 20
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    picture_steps: Positive = 1000
    save_steps: Positive = 1000
    keep_checkpoints: Positive = 2
    on_disk_full: Literal["stop", "continue"] = "stop"
    occlusion_steps: Steps = 0
    knn_steps: Steps = 0
    held_out: PathText = ""
    images: Annotated[int, Field(ge=8)] = 256
