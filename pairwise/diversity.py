"""How differently the members rank continuations, and how calibrated the policies are that they
stand for: "diversity" and "policy" of metrics.json. Never imports torch.

In all docstrings there are P prompts, n continuations of each, and K members.
"""

from pairwise import cli, files, metrics, ranking, run_dir, soft_model, weights

import numpy as np

evaluator = cli.import_evaluator()

BETAS = np.logspace(1, -4, 11)  # They reach from the base model to the members' favourites.
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
        distance = metrics.Ratio(*policy_distance(scores, texts, alpha))
        figures["policy"] = {"beta": BETAS.tolist(), "distance": distance}
    return metrics.estimate(figures, resamples, seed)


def policy_distance(scores, texts, alpha):
    """Return |p_bar - p_hat| with each of BETAS, float64 (P, betas), summed over all pairs of a
    prompt's distinct continuations, and the number of these pairs, float64 (P,)."""
    sums, pairs = [], []
    for x, (answers, logprob) in enumerate(zip(texts["texts"], texts["logprob"])):
        distinct = ranking.distinct(answers)
        rewards, logprob = scores[:, x, distinct], np.array(logprob)[distinct]
        p_hat = ranking.reward_mixture(rewards, alpha)
        p_bars = [ranking.policy_mixture(rewards, logprob, alpha, beta) for beta in BETAS]
        sums.append([np.minimum(np.abs(p_bar - p_hat), 1).sum() for p_bar in p_bars])
        pairs.append(float(len(p_hat)))
    return np.array(sums), np.array(pairs)


def read_logprob(run, responses):
    """Return log pi_0 of each test response, float32 (R,), that extras/policy_logprob.py has left;
    None where it has not. Raises InputError where they are not R finite numbers."""
    path = run / "logprob" / "test.npy"
    run_dir.check(run, path)
    if not path.exists():
        return None
    stored = files.read_array(path)
    if stored.dtype != np.float32 or stored.shape != (responses,) or not np.isfinite(stored).all():
        found = f"{stored.dtype} {stored.shape} found"
        raise cli.InputError(f"{path}: {found}, float32 ({responses},) expected, all of it finite")
    return stored


def policy_calibration(split, rewards, logprob, alpha):
    """Return the figures of appendix A's condition, p_bar = p, on annotated pairs, by BETAS: how
    far p_bar is from p_hat, and its squared error and cross-entropy against p (appendix E);
    `base` is the base alone, beta infinite, and the ensemble's Brier score is that of beta 0.

    rewards float32 (K, R), logprob (R,), alpha (K,)."""
    differences = soft_model.reward_differences(rewards, split.a, split.b)
    votes = weights.member_votes(rewards, split.a, split.b)
    p_hat, p = weights.p_hat_of(alpha, votes), split.p
    ratio = logprob[split.a].astype(np.float64) - logprob[split.b]
    sums = []  # of (distance, squared error, cross-entropy), (P, 3) for every beta
    for beta in (*BETAS, np.inf):
        log_first, log_second = ranking.log_policies(differences / beta + ratio, alpha)
        p_bar = np.exp(log_first)
        terms = np.abs(p_bar - p_hat), (p_bar - p) ** 2, -p * log_first - (1 - p) * log_second
        sums.append(metrics.by_prompt(split, np.stack(terms)))
    tops, pairs = np.stack(sums, 1), np.diff(split.pair_start).astype(np.float64)
    names = "distance", "brier", "cross_entropy"
    figures = {name: metrics.Ratio(tops[:, :-1, i], pairs) for i, name in enumerate(names)}
    base = {name: metrics.Ratio(tops[:, -1, i], pairs) for i, name in enumerate(names)}
    return {"beta": BETAS.tolist()} | figures | {"base": base}


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
