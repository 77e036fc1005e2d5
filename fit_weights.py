"""Fit the mixture weights of every prefix of the ensemble on the train pairs (section 4).

    python fit_weights.py --run runs/demo                  (under a second)
    python fit_weights.py --run runs/demo --early-stop     (exit code 3: no gain in another member)

    minimise  mean (sum_j alpha_j V_j - p)^2   over alpha_j >= 0, sum_j alpha_j = 1     (equation 2)

Writes RUN/weights.json: for k = 1..K {k, alpha, fit: "qp", train_mse, kkt}.
"""

import sys

from pairwise import cli, data, files, manifest, run_dir, weights

import numpy as np

evaluator = cli.import_evaluator()
# The weights are fitted again when one of these changes.
CODE = "fit_weights.py", "pairwise/data.py", "pairwise/weights.py", evaluator.__file__
STOP = 3  # exit code of --early-stop where no further member is worth training


def quadratic_form(rewards, split):
    """Q float64 (K, K): weights alpha have the training error alpha' Q alpha (equation 2)."""
    pairs = len(split.a)
    # The evaluator sums over each prompt's pairs; here all pairs are one prompt's.
    sums = evaluator.pair_statistics(rewards, split.a, split.b, split.p, np.array([0, pairs]))
    vote_vote, vote_p, p_p = (sums[name][0] / pairs for name in ("vote_vote", "vote_p", "p_p"))
    return weights.error_matrix(vote_vote, vote_p, p_p)


def fit_prefixes(q):
    """The entries of weights.json, for every k = 1..K; q: quadratic_form's."""
    prefixes = []
    for k in range(1, len(q) + 1):
        q_k = q[:k, :k]
        alpha = weights.simplex_weights(q_k)  # This is the argmin of equation (2).
        entry = {"k": k, "alpha": alpha.tolist(), "fit": "qp"}
        error = max(0.0, float(alpha @ q_k @ alpha))  # Rounding can take it below.
        entry |= {"train_mse": error, "kkt": weights.kkt_residual(q_k, alpha)}
        prefixes.append(entry)
    return prefixes


def stops_at(errors, patience):
    """The first k at which the last `patience` members did not bring the error below that of every
    smaller ensemble; None where there is no such k.

    errors: those of k = 1, 2, ..; a gain of less than 1e-9 is rounding. The answer depends on
    errors[:k] alone, so a continued run stops where a new one does.
    """
    for k in range(patience + 1, len(errors) + 1):
        if min(errors[k - patience : k]) > min(errors[: k - patience]) - 1e-9:
            return k
    return None


def early_stop(run, prefixes, patience):
    """Print the validation error of every prefix and whether to stop; exit with STOP where to."""
    path = run / "data" / "valid.parquet"
    if not path.exists():
        needed = "--early-stop needs validation prompts: data prepared with --valid-share"
        raise cli.InputError(f"{path}: no such file; {needed}")
    split = data.some_counted_pairs(run, "valid", data.read_split(run, "valid"))
    rewards = run_dir.read_rewards(run, "valid", len(prefixes), (split.n_responses,))
    votes = weights.member_votes(rewards, split.a, split.b)
    p_hats = [entry["alpha"] @ votes[: entry["k"]] for entry in prefixes]
    errors = [float(np.mean((p_hat - split.p) ** 2)) for p_hat in p_hats]
    last = stops_at(errors, patience)
    idle = "it" if patience == 1 else f"the last {patience}"
    verdict = f"no gain from {idle}, so member {last} is the last" if last else "goes on"
    scores = " ".join(f"{error:.4f}" for error in errors)
    print(f"early stop: Brier score on validation prompts {scores}; {verdict}")
    if last:
        sys.exit(STOP)


def check_kind(run):
    """Raise InputError where the weights of `run` are given by how its members came about."""
    path, kind = run / "weights.json", run_dir.kind_of(run)
    if kind in ("hardened", "pruned"):
        fitted = "those of the run that it was made from are fitted, with --run of that one"
        raise cli.InputError(f"{path}: {kind} weights found, which stay; {fitted}")
    if manifest.entries(run).get("joint", {}).get("settings", {}).get("weights") == "learned":
        learned = "weights found that were learned with the rewards, which stay"
        fitted = "train_joint.py --weights qp leaves them to be fitted"
        raise cli.InputError(f"{path}: {learned}; {fitted}")


def main(args):
    run, path = args.run, args.run / "weights.json"
    split, k = data.read_split(run, "train"), run_dir.count_members(run)
    run_dir.check_whole(run, k)
    if run_dir.reward_path(run, k + 1, "test").exists():
        print(f"weights: member {k + 1} was broken off and does not count")
    rewards = run_dir.read_rewards(run, "train", k, (split.n_responses,))
    inputs = data.hashes(run) | run_dir.hash_rewards(run, k) | manifest.hash_code(*CODE)
    check_kind(run)
    if manifest.unchanged(run, "weights", {}, inputs, [path]):
        print(f"weights: {path} is up to date, skipped")
        prefixes = run_dir.read_prefixes(run)
    else:
        if path.exists() and manifest.entries(run).get("weights", {}).get("edited"):
            words = "edited and accepted, before rewards, data or the code of the weights changed"
            raise cli.InputError(f"{path}: {words}; it is fitted anew once it is moved away")
        split = data.fitted_pairs(split)
        started = manifest.begin_stage(run, "weights", {}, inputs)
        prefixes = fit_prefixes(quadratic_form(rewards, split))
        files.write_json(path, prefixes)
        manifest.end_stage(run, "weights", {}, inputs, started)
        error, kkt = prefixes[-1]["train_mse"], prefixes[-1]["kkt"]
        alpha = " ".join(f"{weight:.3f}" for weight in prefixes[-1]["alpha"])
        print(f"weights: k={k}, train error {error:.4f}, alpha {alpha}, KKT residual {kkt:.0e}")
        ties = weights.member_votes(rewards, split.a, split.b) == 0.5
        if words := weights.tied_words(ties.mean(1), "train pairs"):
            print(f"weights: {words}")
    if args.early_stop:
        early_stop(run, prefixes, args.early_stop)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    cli.add_run(parser, "directory with data/ and rewards/")
    patience = {"nargs": "?", "const": 1, "type": cli.natural, "metavar": "PATIENCE"}
    stops = (
        f"exit with code {STOP} where the last PATIENCE members (1) did not lower "
        "the Brier score on the validation prompts"
    )
    parser.add_argument("--early-stop", **patience, help=stops)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
