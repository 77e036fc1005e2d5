"""PersonalLLM (namkoong-lab/PersonalLLM): eight answers to every prompt, scored by ten reward models; RUN/data with every pair of answers.

    python data_prep/personalllm.py --run runs/personalllm                   (from the hub)
    python data_prep/personalllm.py --run runs/personalllm --source DIR

A row is a prompt: prompt, response_1 .. response_8 and response_1_gemma_2b .. response_8_oasst_pythia_1b, a score for each answer and reward
model. Each reward model is one annotator and votes for the answer that it scores higher; equal scores are a tie. The ten are the whole population, so
there is no sampling error. The official split is kept. Equal answers to a prompt count once.

beaver_7b is a cost model, for which lower should be better; the published scores are used as they are, as public code does, unless
--beaver negated. The paper doesn't say.
"""

from itertools import combinations

from pairwise import cli
from pairwise.prepare.prompts import Comparison
from pairwise.prepare.published import Published, parser, prepare_published
from pairwise.rows import string, wrong

ANNOTATORS = (
    "gemma_2b",
    "gemma_7b",
    "mistral_raft",
    "mistral_ray",
    "mistral_weqweasdas",
    "llama3_sfairx",
    "oasst_deberta_v3",
    "beaver_7b",
    "oasst_pythia_7b",
    "oasst_pythia_1b",
)
RESPONSES = tuple(f"response_{i}" for i in range(1, 9))
SCORES = tuple(f"{response}_{annotator}" for response in RESPONSES for annotator in ANNOTATORS)
DATA = Published(
    "personalllm",
    "namkoong-lab/PersonalLLM",
    {},
    "its train and test files",
    {"train": 9402, "test": 1000},
    ("prompt", *RESPONSES, *SCORES),
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
    value = row.get(field)
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) < float("inf")
    ):
        raise wrong(where, field, value, "a finite number")
    return value


def comparisons(rows, args):
    """The Comparison of every two answers of every row."""
    seen = (
        set()
    )  # a prompt may occur twice, and so may an answer to it: the annotators are the same ten
    signs = [
        -1 if annotator == "beaver_7b" and args.beaver == "negated" else 1
        for annotator in ANNOTATORS
    ]
    for split, where, row in rows:
        messages = [{"role": "user", "content": string(where, "prompt", row.get("prompt"))}]
        answers = [string(where, response, row.get(response)) for response in RESPONSES]
        scores = [
            [
                sign * score(where, row, f"{response}_{annotator}")
                for sign, annotator in zip(signs, ANNOTATORS)
            ]
            for response in RESPONSES
        ]
        for i, j in combinations(range(len(RESPONSES)), 2):
            pair = (split, messages[0]["content"], *sorted((answers[i], answers[j])))
            if pair in seen:
                yield "pair of answers that is there already"
                continue
            seen.add(pair)
            a = sum(x > y for x, y in zip(scores[i], scores[j]))
            b = sum(x < y for x, y in zip(scores[i], scores[j]))
            yield Comparison(
                None,
                messages,
                answers[i],
                answers[j],
                a,
                b,
                len(ANNOTATORS) - a - b,
                split=split,
                where=where,
            )


def main(args):
    prepare_published(
        args, DATA, comparisons, "population", PAPER, {"beaver": ("published", "negated")}
    )


def parse_args(argv=None):
    made = parser(__doc__)
    made.add_argument(
        "--beaver",
        choices=("published", "negated"),
        default="published",
        help="the sign of the cost model's scores",
    )
    return made.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
