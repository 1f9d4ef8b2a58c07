"""The options of the layers with an SVD branch, and which of them go together."""

from typing import Literal

from pydantic import Field, model_validator

from ..kernels.operands import FOLDED_PRODUCT, require_int32_sums
from .base import Scheme
from .int4 import Iterations, Solver, check_rank


class SVDQScheme(Scheme):
    """Options of the SVD-branch layers."""

    rank: int = Field(32, ge=0, le=1024, description="rank of the 16-bit branch; 0: no branch")
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        64, description="input features that share a scale; also the size of the rotation; a power of two"
    )
    smooth: Literal["auto", "activations", "weights", "none"] = Field(
        "auto",
        description="what the smooth_factor comes from; 'auto': activations if there is calibration data",
    )
    smooth_alpha: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the outliers that moves to the other side; none given: by activations what makes the "
        "least error of the output, searched for each layer; by weights 0.1, which know less: "
        "0.5 there is harmful under a rotation",
    )
    rotate: bool = Field(True, description="Hadamard rotation inside each group")
    rotation_signs: Literal["auto", "searched", "random", "none"] = Field(
        "auto",
        description="signs of the features before the rotation, kept in smooth_factor; searched: for each group the "
        "best of 32, needs calibration data; 'auto': searched if there is any, else random, and none where nothing is "
        "rotated or smoothed",
    )
    scales: Literal["two_level", "group", "group_half"] = Field(
        "two_level",
        description="two_level: one float a row times an integer 1..16 a group, one int8 product for the whole "
        "row; group: a float a group, slower and without zero points; group_half: the same with scales and "
        "smooth_factor that 16 bits hold, as nunchaku stores them",
    )
    zero_point: bool | None = Field(
        None,
        description="a zero point for each group of weights, in the four bits that its integer leaves of a byte; none "
        "given: with two-level scales, which alone can have them",
    )
    rounding: Literal["auto", "gptq", "rtn"] = Field(
        "auto", description="gptq needs calibration data; 'auto': gptq if there is any, else nearest"
    )
    svd: Solver = "randomized"
    iterations: Iterations = 8

    @model_validator(mode="after")
    def _signs_need_a_rotation(self) -> "SVDQScheme":
        if not self.rotate and self.rotation_signs in ("searched", "random"):
            raise ValueError(
                f"rotation_signs: {self.rotation_signs} has no rotation to serve; set rotate: true, or "
                "rotation_signs: none"
            )
        return self

    @model_validator(mode="after")
    def _zero_points_need_integers(self) -> "SVDQScheme":
        for name in ("zero_point", "act_zero_point"):
            if getattr(self, name, None) and self.scales != "two_level":
                raise ValueError(
                    f"{name}: true needs scales: two_level, not {self.scales}; leave one of the two options out"
                )
        return self

    @property
    def uses_zero_point(self) -> bool:
        """Whether a group of weights has a zero point."""
        return self.scales == "two_level" if self.zero_point is None else self.zero_point

    @property
    def uses_act_zero_point(self) -> bool:
        """Whether a group of activations has a zero point."""
        return False

    def has_factor(self) -> bool:
        """Whether x is divided by a smooth_factor."""
        return self.smooth != "none" or self.rotation_signs in ("searched", "random")

    def check_shape(self, in_features: int, out_features: int) -> None:
        check_rank(self.rank, in_features, out_features)
        require_int32_sums(-(-in_features // self.group_size) * self.group_size, FOLDED_PRODUCT)

    def needs_data(self) -> str:
        if self.smooth == "activations":
            return "smooth: activations needs calibration data; give some, or set smooth: weights"
        if self.rotation_signs == "searched":
            return "rotation_signs: searched needs calibration data; give some, or set rotation_signs: random"
        if self.rounding == "gptq":
            return "rounding: gptq needs calibration data; give some, or set rounding: rtn"
        return ""


class SVDQW4A4Scheme(SVDQScheme):
    """Options of W4A4."""

    act_zero_point: bool | None = Field(
        None,
        description="a zero point for each group of activations: 16 codes from the least to the largest of the group, "
        "at no cost in time; none given: with two-level scales, which alone can have them",
    )

    @property
    def uses_act_zero_point(self) -> bool:
        return self.scales == "two_level" if self.act_zero_point is None else self.act_zero_point
