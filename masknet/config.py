"""The model's configuration: the `model` section of a training configuration, and of a bundle's manifest."""

import inspect
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from masknet.norms import NORMS, REFUSED

EPS = 1.0e-5
_NOT_OWN = ("shape", "instance_width", "eps")  # given by the network, or common to all norms


class NormConfig(BaseModel):
    """A normalization slot: the norm's name and its parameters; in YAML also the bare name.

    The parameters are the keyword arguments of the norm's constructor, with its types and defaults.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description=f"one of {', '.join(NORMS)}")
    eps: float = Field(
        default=EPS, gt=0, allow_inf_nan=False, description="added to what is divided by; each norm has its default"
    )

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name in REFUSED:
            raise ValueError(REFUSED[name])
        if name not in NORMS:
            raise ValueError(f"{name!r} is no normalization; there are {', '.join(NORMS)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        name = data.get("name") if isinstance(data, dict) else None
        if not isinstance(name, str) or name not in NORMS:
            return data  # what is wrong with the name is the field's to tell
        own = {key: value for key, value in data.items() if key not in ("name", "eps")}
        try:
            parameters = _parameters(name).model_validate(own).model_dump()
        except ValidationError as error:
            raise ValueError("; ".join(_problem(name, item) for item in error.errors())) from None
        return {"name": name, "eps": data.get("eps", NORMS[name].default_eps), **parameters}

    @property
    def parameters(self) -> dict[str, Any]:
        """Keyword arguments of the norm's constructor."""
        return self.model_dump(exclude={"name"})


@cache
def _parameters(name: str) -> type[BaseModel]:
    """The keyword parameters of a norm's constructor beside eps, as a model that checks them."""
    fields: dict[str, Any] = {
        parameter.name: (parameter.annotation, parameter.default)
        for parameter in inspect.signature(NORMS[name]).parameters.values()
        if parameter.name not in _NOT_OWN
    }
    return create_model(name, __config__=ConfigDict(extra="forbid"), **fields)


def _problem(name: str, item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{place}: unknown key; {name} has {', '.join(['eps', *_parameters(name).model_fields])}"
    return f"{place}: {item['msg']}"


def _from_bare_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


NormSlot = Annotated[NormConfig, BeforeValidator(_from_bare_name)]
_LAYER = NormConfig(name="layer")


class MaskNetConfig(BaseModel):
    """Shape of a MaskNet. Defaults are the paper's but for the embedding width (16 instead of 10)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["parallel", "serial", "residual_serial"] = Field(
        default="parallel", description="blocks side by side under an MLP, stacked, or stacked with residuals"
    )
    embedding_dim: int = Field(default=16, ge=1, description="width d of every field's embedding")
    embedding_init: float = Field(
        default=0.01,
        gt=0,
        allow_inf_nan=False,
        description="standard deviation that embeddings start with; LN_EMB leaves less than 1 of it where its square "
        "is not large beside eps",
    )
    embedding_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of a row's fields whose whole embedding is 0 in a training step, for masks and LN_EMB; the "
        "others are scaled up",
    )
    blocks: int = Field(default=3, ge=1, description="number K of MaskBlocks")
    block_width: int = Field(default=400, ge=1, description="output width h of every MaskBlock")
    reduction_ratio: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="aggregation width of a mask over the width of what it masks",
    )
    embedding_norm: NormSlot = Field(
        default=_LAYER, description="LN_EMB: per field, on the way to the masks' product; [norms](../masknet/README.md)"
    )
    hidden_norm: NormSlot = Field(default=_LAYER, description="LN_HID: in every block, before the activation")
    activation: Literal["relu", "elu", "selu"] = Field(
        default="relu",
        description="non-linearity of blocks and head; selu brings LeCun's initialization and alpha dropout",
    )
    head: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(400, 400), description="widths of the MLP over parallel blocks; [] for the serial kinds"
    )
    pooling: dict[str, Literal["sum", "mean"]] = Field(
        default={}, description="of list fields' embeddings, by table, instead of the schema's: `{genres: sum}`"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="after every block's and head layer's activation")
    placement: Literal["pre", "post", "peri", "mix", "none"] | None = Field(
        default=None, description="where residual_serial has its norms (there `pre` unless given); for no other kind"
    )
    depth_scaling: Literal["none", "layernorm_scaling", "residual"] = Field(
        default="none", description="residual_serial: norms' outputs over √k in block k, or the branches over √n"
    )
    weight_standardization: bool = Field(
        default=False, description="W of every block with rows of mean 0 and deviation 1 (arXiv 1903.10520)"
    )
    mask: bool = Field(default=True, description="false for the ablation without instance-guided masks")
    feed_forward: bool = Field(
        default=True, description="false for the ablation without W, LN_HID and activation: blocks that only mask"
    )

    @model_validator(mode="before")
    @classmethod
    def _residual_is_pre(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") == "residual_serial" and data.get("placement") is None:
            return {**data, "placement": "pre"}
        return data

    @model_validator(mode="after")
    def _has_no_switch_without_effect(self) -> "MaskNetConfig":
        for wrong, reason in (*_shape_rules(self), *_residual_rules(self)):
            if wrong:
                raise ValueError(reason)
        return self


def _shape_rules(config: MaskNetConfig) -> list[tuple[bool, str]]:
    masks_only = not config.feed_forward
    return [
        (
            config.kind != "parallel" and bool(config.head),
            f"head must be [] for kind {config.kind}, whose prediction layer stands on the last block",
        ),
        (masks_only and not config.mask, "mask: false and feed_forward: false leave a block with nothing to do"),
        (
            masks_only and config.hidden_norm.name != "none",
            "feed_forward: false leaves hidden_norm nothing to normalize: set hidden_norm to none",
        ),
        (
            masks_only and config.weight_standardization,
            "weight_standardization is of the blocks' W, which feed_forward: false leaves out",
        ),
        (
            config.hidden_norm.name == "affine" and config.hidden_norm.parameters["centred"],
            "hidden_norm affine needs no centring: the linear layer before it can do that",
        ),
    ]


def _residual_rules(config: MaskNetConfig) -> list[tuple[bool, str]]:
    scaling, placement, norm = config.depth_scaling, config.placement, config.hidden_norm.name
    if config.kind != "residual_serial":
        return [
            (
                placement is not None,
                f"placement {placement} is for kind residual_serial: without a residual, LN_HID stands before the "
                "activation, on the way out of one block and into the next at once",
            ),
            (
                scaling == "layernorm_scaling",
                "depth_scaling layernorm_scaling does nothing without a residual: the next layer norm undoes a "
                "constant factor, LN(W (m ⊙ c H)) = LN(W (m ⊙ H)); use kind residual_serial",
            ),
            (
                scaling == "residual",
                "depth_scaling residual scales residual branches, and only residual_serial has them",
            ),
        ]
    return [
        (config.blocks < 2, "kind residual_serial needs 2 blocks at least: the first one has no residual"),
        (not config.feed_forward, "kind residual_serial adds feed-forward branches: feed_forward must be true"),
        (
            norm == "evonorm_s0",
            "hidden_norm evonorm_s0 stands for a norm and the activation right after it; a residual_serial branch has "
            "its norms elsewhere",
        ),
        (
            placement == "none" and norm != "none",
            f"placement none leaves hidden_norm {norm} unused: set hidden_norm to none",
        ),
        (
            placement != "none" and norm == "none",
            f"placement {placement} of hidden_norm none is placement none: say so",
        ),
        (
            placement == "mix" and config.blocks < 3,
            "placement mix needs 3 blocks at least: with one residual there is nothing to mix",
        ),
        (
            scaling == "layernorm_scaling" and placement not in ("pre", "mix"),
            f"depth_scaling layernorm_scaling scales what a norm hands to its branch, so that placement must be pre or "
            f"mix: with placement {placement} there is no such norm, or another one undoes the factor",
        ),
        (
            scaling == "residual" and config.blocks < 3,
            "depth_scaling residual divides by √n of n residual branches: with 2 blocks n is 1, and nothing changes",
        ),
    ]
