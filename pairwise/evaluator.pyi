"""Types of the C++ evaluator (csrc/); help(pairwise.evaluator) says what each function does."""

from typing import Literal, SupportsIndex, TypedDict

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float32] | NDArray[np.float64]
Indices = NDArray[np.int64] | NDArray[np.int32]
Path = Literal["auto", "portable", "avx2", "avx512"]

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
    rewards: Rewards,  # (k, responses)
    a: Indices,  # (pairs,)
    b: Indices,  # (pairs,)
    p: NDArray[np.float64],  # (pairs,)
    prompt_start: NDArray[np.int64],  # (prompts + 1,)
    path: Path = "auto",
    threads: SupportsIndex = 0,
) -> PairStatistics: ...
def votes(
    rewards: Rewards,  # (k, responses)
    a: Indices,  # (pairs,)
    b: Indices,  # (pairs,)
) -> NDArray[np.uint8]: ...  # (k, pairs), half votes: 0, 1, 2
def kendall_tau(
    scores: Rewards,  # (k, prompts, n)
    path: Path = "auto",
    threads: SupportsIndex = 0,
) -> NDArray[np.float64]: ...  # (prompts, k, k)
def bootstrap_sums(
    sums: NDArray[np.float64],  # (prompts, columns)
    resamples: SupportsIndex,
    seed: SupportsIndex,
    path: Path = "auto",
    threads: SupportsIndex = 0,
) -> NDArray[np.float64]: ...  # (resamples, columns)
