"""The non-linearities of blocks and heads, and what goes with each: its initialization and its dropout."""

from torch import nn

from masknet.kernels.products import ReLU

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": ReLU, "elu": nn.ELU, "selu": nn.SELU}


def make_dropout(activation: str, rate: float) -> nn.Module:
    """Alpha dropout after SELU, whose mean and variance it keeps (arXiv 1706.02515); plain dropout after the others."""
    return nn.AlphaDropout(rate) if activation == "selu" else nn.Dropout(rate)


def initialize(linear: nn.Linear, activation: str) -> nn.Linear:
    """LeCun's normal initialization, N(0, 1 / fan-in), for a layer before SELU; torch's own for the others."""
    if activation == "selu":
        nn.init.kaiming_normal_(linear.weight, nonlinearity="linear")
    return linear
