"""Signatures of the compiled evaluator (csrc/); help(evaluator) says what each argument and result is."""

from typing import SupportsIndex, TypedDict

import numpy as np
from numpy.typing import NDArray

class PairStatistics(TypedDict):
    pairs: NDArray[np.int64]  # (prompts,)
    decided: NDArray[np.int64]  # (prompts,)
    p: NDArray[np.float64]  # (prompts,)
    p_p: NDArray[np.float64]  # (prompts,)
    vote: NDArray[np.float64]  # (prompts, k)
    vote_p: NDArray[np.float64]  # (prompts, k)
    majority: NDArray[np.float64]  # (prompts, k)
    ties: NDArray[np.int64]  # (prompts, k)
    vote_vote: NDArray[np.float64]  # (prompts, k, k)
    disagreement: NDArray[np.float64]  # (prompts, k, k)

def pair_statistics(
    rewards: NDArray[np.float32],  # (k, responses)
    a: NDArray[np.int64],  # (pairs,)
    b: NDArray[np.int64],  # (pairs,)
    p: NDArray[np.float64],  # (pairs,)
    prompt_start: NDArray[np.int64],  # (prompts + 1,)
) -> PairStatistics: ...
def votes(
    rewards: NDArray[np.float32],  # (k, responses)
    a: NDArray[np.int64],  # (pairs,)
    b: NDArray[np.int64],  # (pairs,)
) -> NDArray[np.uint8]: ...  # (k, pairs), half votes: 0, 1, 2
def kendall_tau(
    scores: NDArray[np.float32] | NDArray[np.float64],  # (k, prompts, n)
) -> NDArray[np.float64]: ...  # (prompts, k, k)
def bootstrap_counts(
    prompts: SupportsIndex, resamples: SupportsIndex, seed: SupportsIndex
) -> NDArray[np.int32]: ...  # (resamples, prompts)
