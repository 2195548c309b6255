"""The section `measure` of a recipe: the settings of M, and what each kind needs and can do."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from pipeline.config.installed import keys_of
from pipeline.config.schema import SHORT, EncoderRecipe, Positive, Section, ViewsRecipe


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
                f"views.predicted {views.predicted:g} chooses patches to reconstruct, but measure "
                f"{self.kind} reconstructs none: leave it at 1"
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

    kind: Literal["infonce"]
    negatives: Literal["all", "position", "image"] = "position"
    temperature: Annotated[float, Field(gt=0.0)] = 0.2
    scale_2tau: bool = False

    @property
    def batch_negatives(self) -> bool:  # type: ignore[override]
        """Other patches of the same image come with it."""
        return self.negatives != "image"

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
    added = keys_of("method/measures/__init__.py", "MEASURES")
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
