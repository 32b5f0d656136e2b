"""The values of MASKNET_KERNELS. Light, so that the command line can tell what is wrong with one."""

from typing import Literal, get_args

Mode = Literal["auto", "fused", "eager"]


class KernelsError(RuntimeError):
    """MASKNET_KERNELS is no mode, or asks for kernels where none can run; the message is for people."""


def mode_of(text: str) -> Mode:
    """The mode; KernelsError for anything else."""
    for mode in get_args(Mode):
        if mode == text:
            return mode
    raise KernelsError(f"MASKNET_KERNELS is {text!r}; it must be one of {', '.join(get_args(Mode))}")
