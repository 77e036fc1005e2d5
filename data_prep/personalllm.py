"""PersonalLLM: eight answers to every prompt, scored by ten reward models.

    python data_prep/personalllm.py --run runs/personalllm                   (from the hub)
    python data_prep/personalllm.py --run runs/personalllm --source DIR

Source: namkoong-lab/PersonalLLM. Writes RUN/data with every pair of answers. A row is a prompt:
prompt, response_1 .. response_8 and response_1_gemma_2b .. response_8_oasst_pythia_1b, a score for
each answer and reward model. Each reward model is one annotator and votes for the answer that it
scores higher; equal scores are a tie. The ten are the whole population, so there is no sampling
error. The official split is kept. Equal answers to a prompt count once.

beaver_7b is a cost model, for which lower should be better; the published scores are used as they
are, as public code does, unless --beaver negated. The paper does not say.
"""

from itertools import combinations

from pairwise import cli, rows
from pairwise.prepare import prompts, published

ANNOTATORS = (
    "gemma_2b gemma_7b mistral_raft mistral_ray mistral_weqweasdas llama3_sfairx oasst_deberta_v3 "
    "beaver_7b oasst_pythia_7b oasst_pythia_1b"
).split()
RESPONSES = tuple(f"response_{i}" for i in range(1, 9))
SCORES = tuple(f"{response}_{annotator}" for response in RESPONSES for annotator in ANNOTATORS)
DATA = published.Published(
    name="personalllm",
    hub="namkoong-lab/PersonalLLM",
    options={},
    files="its train and test files",
    rows={"train": 9402, "test": 1000},
    fields=("prompt", *RESPONSES, *SCORES),
)
PAPER = {
    "pairs": 263256,
    "train_pairs": 263256,
    "train_prompts": 9402,
    "test_prompts": 1000,
    "annotators_mean": 10.0,
    "majority_mean": 0.76,
}


def score(where, row, field):
    """Return a reward model's score. Raises InputError unless it is a finite number."""
    value = row.get(field)
    if not rows.is_number(value) or not abs(value) < float("inf"):
        raise rows.wrong(where, field, value, "a finite number")
    return value


def comparisons(source_rows, args):
    """Yield the Comparison of every two answers of every row."""
    # A prompt may occur twice, and so may an answer to it: the annotators are the same ten.
    seen = set()
    signs = dict.fromkeys(ANNOTATORS, 1) | {"beaver_7b": -1 if args.beaver == "negated" else 1}
    for split, where, row in source_rows:
        prompt = rows.string(where, "prompt", row.get("prompt"))
        messages = [{"role": "user", "content": prompt}]
        answers = [rows.string(where, response, row.get(response)) for response in RESPONSES]
        scores = [
            [signs[name] * score(where, row, f"{response}_{name}") for name in ANNOTATORS]
            for response in RESPONSES
        ]
        for i, j in combinations(range(len(RESPONSES)), 2):
            pair = (split, prompt, *sorted((answers[i], answers[j])))
            if pair in seen:
                yield "pair of answers that is there already"
                continue
            seen.add(pair)
            votes_a = sum(x > y for x, y in zip(scores[i], scores[j]))
            votes_b = sum(x < y for x, y in zip(scores[i], scores[j]))
            votes = (votes_a, votes_b, len(ANNOTATORS) - votes_a - votes_b)
            source = {"split": split, "where": where}
            yield prompts.Comparison(None, messages, answers[i], answers[j], *votes, **source)


def main(args):
    choices = {"beaver": ("published", "negated")}
    published.prepare_published(args, DATA, comparisons, "population", PAPER, choices)


def parse_args(argv=None):
    parser = published.parser(__doc__)
    beaver_help = "the sign of the cost model's scores"
    signs = ("published", "negated")
    parser.add_argument("--beaver", choices=signs, default="published", help=beaver_help)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
