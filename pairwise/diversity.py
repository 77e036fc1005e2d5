"""How differently the members rank continuations: "diversity" of metrics.json. Never imports torch.

In all docstrings there are P prompts, n continuations of each, and K members.
"""

from pairwise import cli, metrics, policies, ranking

import numpy as np

evaluator = cli.import_evaluator()

CASES = 3  # So many prompts are shown with the members' favourites.


def measure(scores, texts, alpha, patterns, resamples, seed):
    """Return the entry of metrics.json.

    kendall_tau is the mean tau-b between two members' rankings (figure 3); win, how far a member's
    favourite falls with another; character, the tau-b between a ranking and what shows in the
    texts; policy, the mean |p_bar - p_hat| of optimal policies (appendix A). A prompt on which a
    member or an attribute is constant has no tau for it and is left out there.

    scores float32 (K, P, n); texts: of `run_dir.read_continuations`, or None; alpha (K,): the
    mixture weights; patterns: {attribute: regular expression}.
    """
    k, prompts, n = scores.shape
    rankings = [scores]
    if texts:
        rankings.append(ranking.attribute_counts(texts["texts"], patterns))
    tau = evaluator.kendall_tau(np.concatenate(rankings))  # (P, K + attributes, the same)
    constant, has_tau = np.isnan(tau), (~np.isnan(tau)).astype(np.float64)
    tau = np.where(constant, 0, tau)
    wins = ranking.win_shares(scores) if n > 1 else np.full((prompts, k, k), 0.5)  # of none
    figures = {
        "prompts": prompts,
        "continuations": n,
        "kendall_tau": metrics.Ratio(tau[:, :k, :k], has_tau[:, :k, :k]),
        "constant_rankings": constant.diagonal(axis1=1, axis2=2).sum(0)[:k].tolist(),
        "win": metrics.Ratio(wins, np.full(prompts, float(n > 1))),
        "repeated": None,
        "character": None,
        "policy": None,
        "favourites": None,
    }
    if texts:
        figures["repeated"] = prompts * n - sum(len(set(answers)) for answers in texts["texts"])
        character = metrics.Ratio(tau[:, k:, :k], has_tau[:, k:, :k])
        figures["character"] = {"attributes": list(patterns), "tau": character}
        figures["favourites"] = favourites(scores, texts, wins) if n > 1 else []
    if texts and texts["logprob"]:
        distance = metrics.Ratio(*policies.distances(scores, texts, alpha))
        figures["policy"] = {"beta": policies.BETAS.tolist(), "distance": distance}
    return metrics.estimate(figures, resamples, seed)


def favourites(scores, texts, wins):
    """Return the CASES prompts on which members rank each other's favourites lowest, of equal ones
    the first, with every member's favourite (appendix G)."""
    k, best = len(scores), ranking.favourites(scores)
    others = wins[:, ~np.eye(k, dtype=bool)]  # (P, K (K-1))
    disagreement = 1 - others.mean(1) if k > 1 else np.zeros(len(wins))
    return [
        {
            "prompt_id": texts["prompt_id"][x],
            "prompt": texts["messages"][x][-1]["content"],
            "disagreement": float(disagreement[x]),
            "texts": [texts["texts"][x][y] for y in best[:, x]],
        }
        for x in np.argsort(-np.round(disagreement, 12), kind="stable")[:CASES]
    ]
