"""Operations of a program, as XLA counts them before it compiles it."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import jax

from pallas_kernels.prefill_attention import xla as attention
from pallas_kernels.window_scores import xla as scores

_BLOCKS = (
    (attention, "QUERY_BLOCK"), (attention, "KEY_BLOCK"), (scores, "ROW_BLOCK"),
    (scores, "KEY_BLOCK"),
)  # fmt: skip


def operations(function: Callable[..., Any], *args: Any) -> float:
    """Operations that a call runs, of products and of single numbers; a sum of products has two.

    XLA counts what is in a loop once. The loops of prompts are over blocks: here one block holds
    all rows of its array, so that each runs once. That is rows times columns of attention, also
    where a mask leaves nothing.

    Args:
        function: the program, with no attention but that by XLA.
        args: its arguments; shapes are enough.
    """
    with ExitStack() as stack:
        for module, name in _BLOCKS:
            stack.enter_context(patch.object(module, name, 2**31))
        lowered = jax.jit(lambda *given: function(*given)).lower(*args)
    cost: Any = lowered.cost_analysis()
    return float(cost["flops"])
