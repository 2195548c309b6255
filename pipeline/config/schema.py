"""The sections of a recipe: typed, frozen groups of keys that refuse unknown ones."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Steps = Annotated[int, Field(ge=0)]  # 0: never


class Section(BaseModel):
    """A frozen group of recipe keys that refuses unknown ones."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class EncoderRecipe(Section):
    """f: a timm ViT. `options` are further keywords of timm.create_model (patch_size, depth, …).

    init: initial weights and position table as in `mae`, or as in `mocov3` (table with the row
    first, q, k and v initialised apart, class token N(0, 1e-6)). freeze_patch: the patch
    embedding keeps its random weights (MoCo v3).
    """

    arch: str = "vit_base_patch16_224"
    image_size: Positive = 224
    options: dict[str, Any] = {}
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


class ViewsRecipe(Section):
    """(T1, T2). T1 masks the share `mask_ratio`; T2 is what `second` says.

    second_mask_ratio: what an `independent` T2 masks.

    second: pixels (no second view), complement, independent, none (T2 hides nothing of the same
    crop), crop (another random crop of the image, nothing hidden). mask_ratio 0: no masking; MAE's
    loss is then on every patch. cutmix: the probability that a box of a view, of a share of the
    area uniform in 0 … 1, shows another image of the micro-batch instead; each view has its own
    box, drawn before masks and jitter are applied, and MAE's target stays the clean image.
    """

    mask_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.75
    second: Literal["pixels", "complement", "independent", "none", "crop"] = "pixels"
    second_mask_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
    cutmix: Fraction = 0.0
    jitter: JitterRecipe = JitterRecipe()


class DecoderRecipe(Section):
    """The decoder of the reconstruction measure (MAE's values for ViT-B)."""

    width: Positive = 512
    depth: Positive = 8
    heads: Positive = 16


class ReconstructionRecipe(Section):
    """M = Eq. 3 for MAE (second: pixels), Eq. 8 with weight `lambda` for R-MAE."""

    kind: Literal["reconstruction"]
    lambda_: Annotated[float, Field(alias="lambda", ge=0.0)] = 1.0
    norm_pix: bool = True
    decoder: DecoderRecipe = DecoderRecipe()


class HeadsRecipe(Section):
    """Widths and depths of the projector p and the predictor q.

    Linear layers with GELU between them; batch_norm: MoCo v3's heads instead (no biases, batch
    norm over all ranks and ReLU after each layer, after the last one a norm without scale).
    """

    hidden: Positive = 2048
    out: Positive = 768
    projector_layers: Positive = 2
    predictor_layers: Positive = 2
    batch_norm: bool = False


class InfoNCERecipe(Section):
    """M = Eq. 9-10."""

    kind: Literal["infonce"]
    tokens: Literal["patch", "cls", "mean_patch", "patch+cls"] = "patch"
    negatives: Literal["all", "position", "image"] = "position"
    temperature: Annotated[float, Field(gt=0.0)] = 0.2
    symmetric: bool = False
    scale_2tau: bool = False
    heads: HeadsRecipe = HeadsRecipe()


class BYOLRecipe(Section):
    """M = 2 - 2 cos(q(p(z1)), p'(z2))."""

    kind: Literal["byol"]
    tokens: Literal["patch", "cls", "mean_patch", "patch+cls"] = "patch"
    symmetric: bool = False
    heads: HeadsRecipe = HeadsRecipe()


class EMARecipe(Section):
    """The teacher's momentum; `cosine` raises it to 1 over the run."""

    momentum: Fraction = 0.996
    schedule: Literal["constant", "cosine"] = "constant"


class WeightDecayRecipe(Section):
    """Weight decay of matrices; `tokens` says whether class and mask tokens decay too (as MAE)."""

    value: Annotated[float, Field(ge=0.0)] = 0.05
    tokens: bool = True


class OptimizerRecipe(Section):
    """lr = base_lr * batch_size / 256, linear warm-up, cosine to min_lr, per step.

    A step whose gradient is not finite is skipped; skip_limit of them in a row end the run.
    """

    kind: Literal["adamw"] = "adamw"
    base_lr: Annotated[float, Field(gt=0.0)] = 1.5e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: WeightDecayRecipe = WeightDecayRecipe()
    gradient_clipping: Annotated[float, Field(ge=0.0)] = 0.0
    epochs: Annotated[float, Field(gt=0.0)] = 100
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 20
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    skip_limit: Positive = 10


class CropRecipe(Section):
    """RandomResizedCrop (antialiased bicubic) and horizontal flip."""

    scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True


class DataRecipe(Section):
    """The order of the samples (partitions, window) and how each one is cut.

    samples_per_epoch: > 0 makes an epoch of that many draws with replacement (few images).
    randaugment: a timm policy such as rand-m9-mstd0.5-inc1, applied after the crop; "" is off.
    """

    partitions: Positive = 64
    window: Positive = 8
    samples_per_epoch: Steps = 0
    crop: CropRecipe = CropRecipe()
    randaugment: str = ""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    workers: Annotated[int, Field(ge=-1)] = -1
    on_error: Literal["fail", "skip"] = "fail"


class MonitorRecipe(Section):
    """How often (in steps) to log, draw pictures, save and probe; it changes no result.

    occlusion_steps: CKA of the features of whole and occluded images; knn_steps: a k-NN
    classifier of the features; 0 is off. Both look at `images` held-out images, taken evenly
    from the shard folder `held_out` ("": the folder `val` beside the training shards).
    on_disk_full: where a checkpoint cannot be written, stop, or continue to the next one (the last
    one of a run must be written).
    """

    log_steps: Positive = 20
    picture_steps: Positive = 1000
    save_steps: Positive = 1000
    keep_checkpoints: Positive = 2
    on_disk_full: Literal["stop", "continue"] = "stop"
    occlusion_steps: Steps = 0
    knn_steps: Steps = 0
    held_out: str = ""
    images: Annotated[int, Field(ge=8)] = 256
