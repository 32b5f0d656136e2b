"""The model's configuration: the `model` section of a training configuration, and of a bundle's manifest."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from masknet.norms import NORMS

EPS = 1.0e-5


class NormConfig(BaseModel):
    """A normalization slot: the norm's name and its parameters; in YAML also the bare name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="layer, rms or none")
    eps: float = Field(
        default=EPS, gt=0, allow_inf_nan=False, description="added to the variance (or mean square) before the root"
    )

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in NORMS:
            raise ValueError(f"{name!r} is no normalization; there are {', '.join(NORMS)}")
        return name


def _from_bare_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


NormSlot = Annotated[NormConfig, BeforeValidator(_from_bare_name)]


class MaskNetConfig(BaseModel):
    """Shape of a MaskNet. Defaults are the paper's but for the embedding width (16 instead of 10)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["parallel", "serial"] = Field(
        default="parallel", description="blocks side by side under an MLP, or stacked"
    )
    embedding_dim: int = Field(default=16, ge=1, description="width d of every field's embedding")
    blocks: int = Field(default=3, ge=1, description="number K of MaskBlocks")
    block_width: int = Field(default=400, ge=1, description="output width h of every MaskBlock")
    reduction_ratio: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="aggregation width of a mask over the width of what it masks",
    )
    embedding_norm: NormSlot = Field(
        default=NormConfig(name="layer"), description="LN_EMB: per field, on the way to the masks' product"
    )
    hidden_norm: NormSlot = Field(
        default=NormConfig(name="layer"), description="LN_HID: in every block, before the ReLU"
    )
    activation: Literal["relu"] = Field(default="relu", description="non-linearity of blocks and head")
    head: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(400, 400), description="widths of the MLP over parallel blocks; [] for serial"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="after every block's and head layer's activation")

    @model_validator(mode="after")
    def _serial_has_no_head(self) -> "MaskNetConfig":
        if self.kind == "serial" and self.head:
            raise ValueError("head must be [] for kind serial, whose prediction layer stands on the last block")
        return self
