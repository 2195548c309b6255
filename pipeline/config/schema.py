"""The sections of a recipe: typed, frozen groups of keys that refuse unknown ones."""

from __future__ import annotations

import importlib
import re
import reprlib
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

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
from pydantic_core import PydanticCustomError

from pipeline.config.installed import keys_of
from pipeline.errors import UserError
from shard_tools.home import expand_home

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Above0 = Annotated[float, Field(gt=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Steps = Annotated[int, Field(ge=0)]  # 0: never


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
    "mlp_ratio": Annotated[float, Field(gt=0.0)],
    "qkv_bias": bool,
    "qk_norm": bool,
    "proj_bias": bool,
    "init_values": Annotated[float, Field(gt=0.0)] | None,
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
                f"{key} is no option that a plain ViT can be trained with; those are {known}"
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
    policies = module.POLICIES if module else keys_of("pipeline", "method/masking.py", "POLICIES")
    if name not in policies:
        raise ValueError(f"input should be {' or '.join(policies)}")
    return name


def augmentation(policy: str) -> str:
    """A policy of timm's RandAugment, or "". ValueError where it is certainly none."""
    if policy and policy.split("-")[0] != "rand":
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


class DecoderRecipe(Section):
    """The decoder of the reconstruction measure (MAE's values for ViT-B).

    attention: self, MAE's, where all tokens attend to all; or cross, CrossMAE's, where each
    predicted patch attends to the encoder's tokens alone.
    """

    width: Positive = 512
    depth: Positive = 8
    heads: Positive = 16
    attention: Literal["self", "cross"] = "self"


class MeasureRecipe(Section):
    """Settings of M, common part; the class of each kind is in MEASURES.

    What the kind needs and can do: needs_teacher (an EMA of f encodes T2), needs_second_view (T2
    is a view, not pixels), reconstructs (it has a decoder), batch_negatives (its negatives come
    from the images of a micro-batch).
    """

    needs_teacher: ClassVar[bool] = False
    needs_second_view: ClassVar[bool] = False
    reconstructs: ClassVar[bool] = False
    batch_negatives: ClassVar[bool] = False

    kind: str

    @property
    def exchanges(self) -> bool:
        """Whether ranks send each other anything while the loss is computed."""
        return self.batch_negatives

    @property
    def least_images(self) -> int:
        """Images of a micro-batch, of all ranks, with fewer than which the loss is a constant."""
        return 1

    if TYPE_CHECKING:  # each kind has its own further settings

        def __getattr__(self, name: str) -> Any: ...

    def check(self, encoder: EncoderRecipe, views: ViewsRecipe) -> None:
        """Raise ValueError, naming the keys, where encoder and views do not suit the measure."""
        if self.needs_second_view and views.second == "pixels":
            raise ValueError(
                f"measure {self.kind} compares two encoded views: set views.second to "
                "complement, independent, none or crop"
            )


class ReconstructionRecipe(MeasureRecipe):
    """M = Eq. 3 for MAE (second: pixels), Eq. 8 with weight `lambda` for R-MAE."""

    reconstructs: ClassVar[bool] = True

    kind: Literal["reconstruction"]
    lambda_: Annotated[float, Field(alias="lambda", ge=0.0)] = 1.0
    norm_pix: bool = True
    decoder: DecoderRecipe = DecoderRecipe()

    def check(self, encoder: EncoderRecipe, views: ViewsRecipe) -> None:
        """The decoder fills in masked patches, and both views must be of the same crop."""
        super().check(encoder, views)
        if encoder.masked_tokens != "drop":
            raise ValueError(f"measure {self.kind} needs encoder.masked_tokens: drop")
        if views.second == "crop":
            raise ValueError(f"measure {self.kind} cannot compare two crops (views.second: crop)")
        if views.mask_ratio == 0 and views.second != "pixels":
            raise ValueError(
                "views.mask_ratio 0 leaves R-MAE no masked patch to compare: set views.second to "
                "pixels"
            )


class HeadsRecipe(Section):
    """Widths and depths of the projector p and the predictor q.

    Linear layers with an activation between them; batch_norm: MoCo v3's heads instead (no biases,
    torch's default initial weights, batch norm over all ranks after each layer, after the last one
    a norm without scale). activation: auto is relu with batch_norm, as MoCo v3, and gelu without.
    """

    hidden: Positive = 2048
    out: Positive = 768
    projector_layers: Positive = 2
    predictor_layers: Positive = 2
    batch_norm: bool = False
    activation: Literal["auto", "gelu", "relu"] = "auto"


class ContrastRecipe(MeasureRecipe):
    """What the contrastive measures share; `tokens`: which tokens are compared (Tab. 3)."""

    needs_teacher: ClassVar[bool] = True
    needs_second_view: ClassVar[bool] = True

    tokens: Literal["patch", "cls", "mean_patch", "patch+cls"] = "patch"
    symmetric: bool = False
    heads: HeadsRecipe = HeadsRecipe()

    @property
    def exchanges(self) -> bool:
        """Keys, or the statistics of batch norm."""
        return self.batch_negatives or self.heads.batch_norm

    @property
    def least_images(self) -> int:
        """Batch norm needs two rows."""
        return 2 if self.heads.batch_norm else 1

    @property
    def contrasts_patches(self) -> bool:
        """Whether patch tokens are compared position by position (mean_patch is one token)."""
        return self.tokens.startswith("patch")

    def check(self, encoder: EncoderRecipe, views: ViewsRecipe) -> None:
        """Patch tokens can be compared only at positions that both views have."""
        super().check(encoder, views)
        if views.predicted < 1:
            raise ValueError(
                f"views.predicted {views.predicted:g} is a share of reconstructed patches, and "
                f"measure {self.kind} reconstructs none: leave it at 1"
            )
        if not self.contrasts_patches:
            return
        if views.second == "crop":
            raise ValueError(
                "two crops (views.second: crop) share no patch position: set measure.tokens to "
                "cls or mean_patch"
            )
        if encoder.masked_tokens == "drop" and views.second == "complement":
            raise ValueError(
                "without mask tokens (encoder.masked_tokens: drop) complementary views share no "
                "patch position: set measure.tokens to mean_patch or cls, or views.second to "
                "independent"
            )


class InfoNCERecipe(ContrastRecipe):
    """M = Eq. 9-10."""

    batch_negatives: ClassVar[bool] = True

    kind: Literal["infonce"]
    negatives: Literal["all", "position", "image"] = "position"
    temperature: Annotated[float, Field(gt=0.0)] = 0.2
    scale_2tau: bool = False

    @property
    def least_images(self) -> int:
        """A query needs a negative: other patches of its own image, or another image."""
        alone = self.contrasts_patches and self.negatives != "position"
        return super().least_images if alone else 2

    def check(self, encoder: EncoderRecipe, views: ViewsRecipe) -> None:
        """One token per image has no other token of the image for a negative."""
        super().check(encoder, views)
        if self.negatives == "image" and not self.contrasts_patches:
            raise ValueError(
                f"measure.tokens {self.tokens} is one token per image, which leaves no negative "
                "for measure.negatives: image; set it to position or all"
            )


class BYOLRecipe(ContrastRecipe):
    """M = 2 - 2 cos(q(p(z1)), p'(z2))."""

    kind: Literal["byol"]


# kind → settings. Those of a measure that is added are beside its class, in method/measures,
# which enters them here when it is imported.
MEASURES: dict[str, type[MeasureRecipe]] = {
    "reconstruction": ReconstructionRecipe,
    "infonce": InfoNCERecipe,
    "byol": BYOLRecipe,
}


def measure_class(kind: object) -> type[MeasureRecipe] | None:
    """The settings class of a kind of measure, or None.

    A kind that is not known may be one of method/measures, which is then imported by its name.
    """
    if not isinstance(kind, str):
        return None
    if kind not in MEASURES and kind in measure_kinds():
        importlib.import_module("pipeline.method.measures")
    return MEASURES.get(kind)


def measure_kinds() -> tuple[str, ...]:
    """Every kind of measure that there is."""
    added = keys_of("pipeline", "method/measures/__init__.py", "MEASURES")
    return tuple(dict.fromkeys([*MEASURES, *added]))


def measure_settings(value: Any) -> Any:
    """The mapping of a recipe's `measure` → settings of its kind; ValidationError inside it."""
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        text = "key 'measure.kind' is missing; valid: {kinds}"
        raise PydanticCustomError("measure_kind", text, {"kinds": ", ".join(measure_kinds())})
    settings = measure_class(value["kind"])
    if settings is None:
        text = "key 'measure.kind': {kind} is none of {kinds}"
        context = {"kind": SHORT.repr(value["kind"]), "kinds": ", ".join(measure_kinds())}
        raise PydanticCustomError("measure_kind", text, context)
    return settings.model_validate(value)


class EMARecipe(Section):
    """The teacher's momentum; `cosine` raises it to 1 over the run."""

    momentum: Fraction = 0.996
    schedule: Literal["constant", "cosine"] = "constant"


class WeightDecayRecipe(Section):
    """Weight decay of matrices; `tokens` says whether cls and mask tokens decay too (as MAE)."""

    value: Annotated[float, Field(ge=0.0)] = 0.05
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
    base_lr: Annotated[float, Field(gt=0.0)] = 1.5e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: WeightDecayRecipe = WeightDecayRecipe()
    gradient_clipping: Annotated[float, Field(ge=0.0)] = 0.0
    epochs: Annotated[float, Field(gt=0.0)] = 100
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
        raise ValueError("the shares of the run, first in each entry, must rise from above 0")
    if shares and shares[-1] != 1.0:
        raise ValueError("the last entry must be [1, encoder.image_size], the end of the run")
    return sizes


class DataRecipe(Section):
    """The order of the samples (partitions, window) and how each one is cut.

    samples_per_epoch: > 0 makes an epoch of that many draws with replacement (few images).
    sizes: [share of the run, side in pixels] of phases one after another: until that share of the
    optimizer steps crops are that large, and f and its decoder have the positions of a model of
    that size. The last is [1, encoder.image_size]; none: every crop has encoder.image_size.
    randaugment: a timm policy such as rand-m9-mstd0.5-inc1, applied after the crop; "" is off.
    """

    partitions: Positive = 64
    window: Positive = 8
    samples_per_epoch: Steps = 0
    crop: CropRecipe = CropRecipe()
    sizes: Annotated[tuple[tuple[Fraction, Positive], ...], AfterValidator(size_schedule)] = ()
    randaugment: Annotated[str, AfterValidator(augmentation)] = ""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[Above0, Above0, Above0] = IMAGENET_STD
    workers: Annotated[int, Field(ge=-1)] = -1
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
