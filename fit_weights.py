"""Mixture weights for every prefix of the ensemble: the weights that minimise the training error (section 4), a small quadratic program.

    python fit_weights.py --run runs/demo          (under a second)

minimise  mean over train pairs of (sum_j alpha_j V_j - p)^2    subject to    alpha_j >= 0, sum_j alpha_j = 1        (equation 2 in alpha)

Writes RUN/weights.json: for k = 1..K {k, alpha, fit: "qp", train_mse, kkt}.
"""

from pathlib import Path

import numpy as np

from pairwise.run_dir import (
    Parser, begin_stage, count_members, data_hashes, end_stage, hash_file, import_evaluator, read_rewards, read_split, reward_path, run_main, unchanged,
    write_json)

evaluator = import_evaluator()


def error_matrix(vote_vote, vote_p, p_p):
    """Q float64 (k, k) with alpha' Q alpha = mean (p_hat - p)^2 wherever sum alpha = 1: Q = mean (V_i - p)(V_j - p).

    vote_vote (k, k): mean V_i V_j; vote_p (k,): mean V_j p; p_p: mean p^2.
    """
    return vote_vote - vote_p[:, None] - vote_p[None, :] + p_p


def simplex_weights(q):
    """argmin of alpha' Q alpha over the simplex, float64 (k,); q float64 (k, k), symmetric and positive semidefinite.

    Nonnegative least squares finds u = argmin |L u|^2 + t^2 (sum u - 1)^2 with Q = L'L: for any sum s the best u is s times the wanted
    alpha, so alpha = u / sum u is exact, not a penalty's approximation. t only sets the scale. Members that vote alike (all entries of Q
    equal) cannot be told apart: uniform weights.
    """
    k = len(q)
    if np.ptp(q) == 0:
        return np.full(k, 1 / k)
    values, vectors = np.linalg.eigh(q)
    root = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T
    t = np.sqrt(np.trace(q) / k)
    u = nonnegative_least_squares(np.vstack([root, np.full((1, k), t)]), np.append(np.zeros(k), t))
    return u / u.sum()


def nonnegative_least_squares(a, b):
    """argmin |A u - b|^2 over u >= 0, float64 (k,), for A of any rank: Lawson and Hanson's active set method.

    scipy.optimize.nnls (1.15 to 1.17 at least) can return a point that is not optimal where a member is as good in the mixture as out of
    it, which copies and opposites of members bring about (scipy issue 25389): seen in 28 of 39,175 random problems.
    """
    k = a.shape[1]
    u, free = np.zeros(k), np.zeros(k, bool)

    def best_on(members):
        found = np.zeros(k)
        found[members] = np.linalg.lstsq(a[:, members], b, rcond=None)[0]
        return found

    for _ in range(100 * k):  # a few per member are needed; rounding cannot make it endless
        gain = np.where(free, -np.inf, a.T @ (b - a @ u))
        j = gain.argmax()
        if gain[j] <= 1e-14 * np.sum(a * a):
            break
        grown = free | (np.arange(k) == j)
        wanted = best_on(grown)
        if wanted[j] <= 0:  # the largest gain was rounding
            break
        free = grown
        while (wanted[free] <= 0).any():  # go towards the wanted point as far as all stay positive, and drop who reaches zero
            low = np.flatnonzero(free & (wanted <= 0))
            steps = u[low] / (u[low] - wanted[low])
            u = u + steps.min() * (wanted - u)
            u[low[steps.argmin()]] = 0
            free &= u > 0
            u[~free] = 0
            wanted = best_on(free)
        u = wanted
    return u


def kkt_residual(q, alpha):
    """How far alpha is from optimal: max of the duality gap alpha'g - min_j g_j with g = 2 Q alpha (an upper bound on the excess training
    error), of the slackness |alpha_j (g_j - min g)| of each member, and of the constraints' violation. Zero at the optimum."""
    gradient = 2 * q @ alpha
    slack = gradient - gradient.min()
    return float(max(alpha @ slack, (alpha * slack).max(), abs(alpha.sum() - 1), -alpha.min(), 0.0))


def fit_prefixes(q):
    """The list of weights.json for error matrix q (K, K)."""
    prefixes = []
    for k in range(1, len(q) + 1):
        part = q[:k, :k]
        alpha = simplex_weights(part)
        prefixes.append({"k": k, "alpha": alpha.tolist(), "fit": "qp", "train_mse": float(alpha @ part @ alpha), "kkt": kkt_residual(part, alpha)})
    return prefixes


def main(args):
    run = args.run
    data, k = read_split(run, "train"), count_members(run)
    rewards = read_rewards(run, "train", k, (int(data.response_start[-1]),))
    inputs = data_hashes(run) | {f"rewards of member {j}": hash_file(reward_path(run, j, "train")) for j in range(1, k + 1)}
    if unchanged(run, "weights", {}, inputs, [run / "weights.json"]):
        print(f"weights: {run / 'weights.json'} is up to date, skipped")
        return
    sums = evaluator.pair_statistics(rewards, data.a, data.b, data.p, data.pair_start)
    pairs = len(data.a)
    q = error_matrix(sums["vote_vote"].sum(0) / pairs, sums["vote_p"].sum(0) / pairs, sums["p_p"].sum() / pairs)
    started = begin_stage(run, "weights", {}, inputs)
    prefixes = fit_prefixes(q)
    write_json(run / "weights.json", prefixes)
    end_stage(run, "weights", {}, inputs, started)
    last = prefixes[-1]
    alpha = " ".join(f"{weight:.3f}" for weight in last["alpha"])
    print(f"weights: k={k}, train error {last['train_mse']:.4f}, alpha {alpha}, KKT residual {last['kkt']:.0e}")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--run", required=True, type=Path, help="run directory with data/ and rewards/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main, parse_args())
