"""float16 on processors without instructions for it, at the speed of float32:

    python recipes/measured/half.py run digits --precision float16

runs any command of grokd.py. There torch sums products of float16 numbers one by one, in a
convolution some fifteen times slower than float32. What such sums give can be had from float32's
kernels, see `FastHalf`; loss scaling, skipped steps and the range and rounding of every result
are float16's own.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import grokd  # noqa: E402

aten = torch.ops.aten
CONTRACTIONS = {
    aten.convolution, aten.convolution_backward, aten.conv2d, aten.linear, aten.matmul, aten.mm,
    aten.addmm, aten.bmm, aten.baddbmm,
}


class FastHalf(TorchDispatchMode):
    """Within it, convolutions and matrix products of float16 are computed by float32's kernels.

    Factors are float16, products and sums float32, and a result is rounded to float16: as GPUs'
    tensor cores do, and torch's float16 kernels for CPUs, but for the order of the sums.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_half = any(isinstance(x, torch.Tensor) and x.dtype == torch.float16 for x in args)
        if not is_half or func.overloadpacket not in CONTRACTIONS:
            return func(*args, **kwargs)
        found = func(*(cast(x, torch.float16, torch.float32) for x in args), **kwargs)
        if isinstance(found, tuple):  # gradients; None where none is asked for
            return tuple(cast(x, torch.float32, torch.float16) for x in found)
        return cast(found, torch.float32, torch.float16)


def cast(value: Any, one: torch.dtype, other: torch.dtype) -> Any:
    """A tensor of dtype `one` as `other`; anything else as it is."""
    return value.to(other) if isinstance(value, torch.Tensor) and value.dtype == one else value


if __name__ == "__main__":
    with FastHalf():
        grokd.main()
