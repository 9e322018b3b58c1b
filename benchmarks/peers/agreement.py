"""Whether two sides gave the same answer."""

from dataclasses import dataclass

import numpy as np

BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of the first token's logits, as a share of the largest logit."""

TIE = 4
"""In bfloat16 greedy tokens may part where two logits differ by less than this times the error
seen in the first token's: rounding then decides between them."""


class Differs(ArithmeticError):
    """Two sides do not compute the same."""


@dataclass(frozen=True)
class Agreement:
    """How far two answers are the same.

    Attributes:
        logits_error: largest difference of the first token's logits, as a share of the largest.
        logits_bound: what it must not exceed.
        tokens: of each answer.
        equal_tokens: before the first difference, of the answer that differs first.
        distinct_tokens: in the reference's first answer: few would prove little.
    """

    logits_error: float
    logits_bound: float
    tokens: int
    equal_tokens: int
    distinct_tokens: int


def agree(
    tokens: np.ndarray,
    first: np.ndarray,
    expected: np.ndarray,
    logits: np.ndarray,
    dtype: str,
) -> Agreement:
    """Compare an answer with the reference.

    In float32 all tokens must be the same. In bfloat16 they may part at a tie.

    Args:
        tokens: greedy tokens [B, n].
        first: logits of the first token [B, V].
        expected: the reference's tokens [B, n].
        logits: the reference's logits of all tokens [B, n, V].
        dtype: that both sides computed in.

    Raises:
        Differs: the logits or the tokens are not the same.
    """
    bound = BOUNDS[dtype]
    largest = np.abs(logits).max(-1)  # [B, n]
    error = float((np.abs(first - logits[:, 0]).max(-1) / largest[:, 0]).max())
    if not error <= bound:  # a NaN too
        raise Differs(f"logits of the first token differ by {error:.2g} of the largest: {bound=}")
    equal = tokens.shape[1]
    for row, parted in enumerate(tokens != expected):
        if not parted.any():
            continue
        at = int(parted.argmax())
        ours, theirs = int(tokens[row, at]), int(expected[row, at])
        gap = float((logits[row, at, theirs] - logits[row, at, ours]) / largest[row, at])
        if dtype == "float32" or gap > TIE * error:
            raise Differs(
                f"token {at} of answer {row} is {ours} instead of {theirs}, whose logits differ by "
                f"{gap:.2g} of the largest"
            )
        equal = min(equal, at)
    return Agreement(error, bound, tokens.shape[1], equal, len(np.unique(expected[0])))
