"""One vote a pair: the four training sets of Beyond the Binary, beside a test set of your own.

    python data_prep/binary.py --run runs/webgpt --set webgpt --test FILE           (from the hub)
    python data_prep/binary.py --run runs/webgpt --set webgpt --test FILE --source webgpt.parquet
    python data_prep/binary.py --run runs/binary --set webgpt hh summarize gptj --test FILE

Writes RUN/data, in which train has the pairs of one vote (as with --min-votes 1 elsewhere), for
`--loss bt` and `--loss margin`. The sets, of which only the train files are trained on:

    webgpt     openai/webgpt_comparisons: question {full_text, ..}, answer_0, answer_1, score_0,
               score_1. The higher score is the vote, equal ones are a tie: --ties half keeps them
    hh         Anthropic/hh-rlhf: chosen, rejected, dialogues that share all but the last answer.
               Turns of one speaker in succession become one
    summarize  openai/summarize_from_feedback, as data_prep/tldr.py reads it
    gptj       Dahoas/synthetic-instruct-gptj-pairwise: prompt, chosen, rejected

One vote says nothing of how many agree, so the test split comes from a FILE as data_prep/votes.py
reads it, whose pairs have two votes or more; of its rows those with the split train are trained on
too, without their categories and p_true. Train prompts that are in the test split are dropped and
counted. The paper's annotators said how many of ten people would prefer a response: p with n = 10
(docs/data.md). Nobody cast these votes, hence --votes dependent. With several sets --source is a
directory that has one of the name of each.
"""

import argparse
import functools
import os
import re

from pairwise import cli, data, rows
from pairwise.prepare import prompts, published

import tldr
import votes

ROLES = {"Human": "user", "Assistant": "assistant"}
TURN, ANSWER = re.compile(r"\n\n(Human|Assistant):"), "\n\nAssistant:"


# ---- one row of a set: (messages, first response, second, votes for it, for the second, ties), or
# the reason why there is none


def webgpt(where, row):
    question = row.get("question")
    if not isinstance(question, dict):
        raise rows.wrong(where, "question", question, "an object")
    prompt = rows.string(where, "question: full_text", question.get("full_text"))
    answers = [rows.string(where, name, row.get(name)) for name in ("answer_0", "answer_1")]
    scores = [row.get(name) for name in ("score_0", "score_1")]
    for number, score in enumerate(scores):
        if not rows.is_number(score) or not -1 <= score <= 1:
            raise rows.wrong(where, f"score_{number}", score, "a number from -1 to 1")
    first, second = scores
    user = [{"role": "user", "content": prompt}]
    return user, *answers, float(first > second), float(second > first), float(first == second)


def hh(where, row):
    texts = [rows.string(where, name, row.get(name)) for name in ("chosen", "rejected")]
    start = os.path.commonprefix(texts)
    start = start[: max(start.rfind(ANSWER), 0)]
    answers = [text[len(start) :].removeprefix(ANSWER) for text in texts]
    before, *turns = TURN.split(start)
    if before or not turns or any(TURN.search(answer) for answer in answers):
        return "dialogues that do not share all turns but the last answer"
    messages = []
    for speaker, content in zip(turns[::2], turns[1::2]):
        if messages and messages[-1]["role"] == ROLES[speaker]:
            messages[-1]["content"] += f"\n\n{content.strip()}"
        else:
            messages.append({"role": ROLES[speaker], "content": content.strip()})
    if messages[-1]["role"] != "user":
        return "prompt that does not end with a turn of the user's"
    return messages, *(answer.strip() for answer in answers), 1.0, 0.0, 0.0


def gptj(where, row):
    prompt, *answers = (
        rows.string(where, name, row.get(name)) for name in ("prompt", "chosen", "rejected")
    )
    return [{"role": "user", "content": prompt}], *answers, 1.0, 0.0, 0.0


def of_rows(read, source_rows, args):
    """Yield what `read`, one of the three above, makes of every row, as a Comparison."""
    for split, where, row in source_rows:
        found = read(where, row)
        comparison = functools.partial(prompts.Comparison, None, split=split, where=where)
        yield found if isinstance(found, str) else comparison(*found)


WEBGPT = published.Published(
    name="webgpt",
    hub="openai/webgpt_comparisons",
    options={  # The repository is a script, which is not run.
        "data_files": {"train": "default/train/*.parquet"},
        "revision": "refs/convert/parquet",
    },
    files="default/train (revision refs/convert/parquet)",
    rows={"train": 19578},
    fields=("question", "answer_0", "answer_1", "score_0", "score_1"),
)
HH = published.Published(
    name="hh",
    hub="Anthropic/hh-rlhf",
    options={},
    files="the train and test files of its four folders",
    rows={"train": 160800, "test": 8552},
    fields=("chosen", "rejected"),
)
GPTJ = published.Published(
    name="gptj",
    hub="Dahoas/synthetic-instruct-gptj-pairwise",
    options={},
    files="the parquet file",
    rows={"train": 33143},
    fields=("prompt", "chosen", "rejected"),
)
SETS = {
    "webgpt": (WEBGPT, functools.partial(of_rows, webgpt)),
    "hh": (HH, functools.partial(of_rows, hh)),
    "summarize": (tldr.DATA, tldr.comparisons),
    "gptj": (GPTJ, functools.partial(of_rows, gptj)),
}


# ---- all of them, and the test split


def comparisons(args, sources, others):
    """Yield the Comparisons of the test file, then those of the train rows of every source.

    sources: {name of SETS: published.Source}; others: a set that gets the names of the columns of
    the test file that nothing reads."""
    facts = {}
    for item in votes.comparisons(args.test, others, facts):
        if isinstance(item, str):
            yield item
        elif item.split == "train":  # The sets have neither, and rows of one prompt must agree.
            yield item._replace(categories=None, p_true=None)
        else:
            yield item._replace(split=item.split or "test")
    if facts:
        raise cli.InputError(f"{args.test}: no column prompt found, one expected")
    for name, source in sources.items():
        _, read = SETS[name]
        for item in read(source.rows(), args):
            if isinstance(item, str):
                yield item
            elif item.split in (None, "train"):
                yield item._replace(split="train")
            else:
                yield "pair of a split that is not trained on"


def main(args):
    names, several = list(dict.fromkeys(args.set)), len(set(args.set)) > 1
    if several and args.revision:
        raise cli.InputError(f"--revision {args.revision}: one --set expected, {len(names)} found")
    sources, inputs, others = {}, {}, set()
    for name in names:
        path = args.source / name if several and args.source else args.source
        of_set = argparse.Namespace(**(vars(args) | {"source": path}))
        sources[name] = published.Source(of_set, SETS[name][0])
        inputs |= {f"{key} {name}": text for key, text in sources[name].inputs.items()}
    inputs["test"] = published.hash_source(args.test, {None: [args.test]})
    facts = {"source": {name: source.facts for name, source in sources.items()}}
    given = functools.partial(comparisons, args, sources, others)
    prompts.prepare(args, "+".join(names), given, args.votes, inputs, {}, facts=facts)
    rows.print_unused(args.test, others)


def parse_args(argv=None):
    parser = published.parser(__doc__)
    add = parser.add_argument
    add("--set", required=True, nargs="+", choices=SETS, help="what to train on")
    test_help = "the test split: a file of data_prep/votes.py"
    add("--test", required=True, type=cli.path, metavar="FILE", help=test_help)
    votes_help = "how the votes of the test split arose"
    add("--votes", choices=data.VOTE_KINDS, default="dependent", help=votes_help)
    parser.set_defaults(min_votes=1, cnndm="drop", repeated="count")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
