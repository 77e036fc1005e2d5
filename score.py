"""Score new responses with a trained run: the rewards of all members, and the share of the
ensemble that prefers each response.

    python score.py --run runs/demo FILE                        (FILE-scores.jsonl, a line per row)
    python score.py --run runs/demo FILE --out scores.csv       (a line per pair)

FILE is .jsonl, .json, .csv or .parquet (also .gz), with rows of `prompt` (text or chat messages)
and `responses` (a list), or `response_a` and `response_b`; other columns are named and not used.
JSONL out: {prompt, responses, rewards: [responses x K], p_hat: [[a, b, p], ..]}, with p the
weighted share of members that prefer responses[a] to responses[b] (section 2).
CSV out: row, prompt, response_a, response_b, reward_a_1.., reward_b_1.., p_hat; a row of one
response has no pair, and such rows are counted. Texts that a spreadsheet would take for a formula
(they begin with = + - @, a tab or a carriage return) get a ' before them.
"""

import csv
import io
import json

from pairwise import cli, files, members, rows, run_dir, weights
from pairwise import reward_model as rm

import numpy as np

cli.import_evaluator()  # Where it is missing, that shows before a model is loaded.
FIELDS = {"prompt": "messages", "responses": "json", "response_a": "text", "response_b": "text"}


def read_questions(path, others=None):
    """Return the members.Question of every row; the set `others` gets the names of other columns.

    Raises InputError with the row and field, what was found and what was expected."""
    questions = []
    for where, row in rows.read_rows(path, FIELDS, others=others):
        beside = sorted(row.keys() & {"response_a", "response_b"})
        if "responses" in row and beside:
            forms = f"responses beside {' and '.join(beside)} found, one of the two forms expected"
            raise cli.InputError(f"{where}: {forms}")
        responses = row.get("responses", [row.get("response_a"), row.get("response_b")])
        if not isinstance(responses, list) or not responses:
            raise rows.wrong(where, "responses", responses, "a list of responses")
        prompt = row.get("prompt")
        messages = rows.messages(where, prompt)
        texts = [rows.text(where, "response", response) for response in responses]
        questions.append(members.Question(prompt, messages, texts))
    if not questions:
        raise cli.InputError(f"{path}: no row found, at least one expected")
    return questions


def answers(questions, rewards, alpha):
    """Yield {prompt, responses, rewards, p_hat} of every question.

    rewards float32 (K, R): of all responses, in the order of the questions; alpha (K,)."""
    start = 0
    for prompt, _, responses in questions:
        end = start + len(responses)
        scores, start = np.ascontiguousarray(rewards[:, start:end]), end
        a, b = np.triu_indices(len(responses), 1)  # every pair once
        p_hat = weights.p_hat_of(alpha, weights.member_votes(scores, a, b))
        pairs = list(zip(a.tolist(), b.tolist(), p_hat.tolist()))
        answer = {"prompt": prompt, "responses": responses}
        yield answer | {"rewards": scores.T.tolist(), "p_hat": pairs}


def inert(text):
    """Return a text that no spreadsheet takes for a formula, as OWASP advises."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def as_csv(scored, k):
    """Return CSV text with a line for every pair of every question; scored: of `answers`."""
    out = io.StringIO()
    writer = csv.writer(out)
    rewards = [f"reward_{side}_{j}" for side in "ab" for j in range(1, k + 1)]
    writer.writerow(["row", "prompt", "response_a", "response_b", *rewards, "p_hat"])
    for number, row in enumerate(scored, 1):
        prompt, texts = row["prompt"], row["responses"]
        if not isinstance(prompt, str):
            prompt = json.dumps(prompt, ensure_ascii=False)
        for a, b, p in row["p_hat"]:
            rewards = [*row["rewards"][a], *row["rewards"][b]]
            cells = [inert(text) for text in (prompt, texts[a], texts[b])]
            writer.writerow([number, *cells, *rewards, p])
    return out.getvalue()


def main(args):
    """Score the questions of args.file with all members, and write what they say."""
    rm.settle(args)
    others = set()
    questions = read_questions(args.file, others)
    out = args.out or args.file.with_name(rows.kind(args.file)[0] + "-scores.jsonl")
    if out.is_dir() or out.resolve() == args.file.resolve():
        wrong = "a directory" if out.is_dir() else "the file of questions itself"
        raise cli.InputError(f"--out {out}: {wrong} found, another file expected")
    files.check_writable(out)
    alpha, settings = members.open_run(args)
    rewards = members.rewards_of_run(args.run, settings, questions, args)
    scored = answers(questions, rewards, alpha)
    with (
        files.replacing(out) as partial,
        open(partial, "w", encoding="utf-8", newline="") as file,
    ):
        if out.suffix == ".csv":
            file.write(as_csv(scored, len(alpha)))
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
    alone = sum(len(question.responses) == 1 for question in questions)
    left_out = f"; {alone} of one response left out" if alone and out.suffix == ".csv" else ""
    print(f"{out}: {len(questions)} prompts, {len(alpha)} members{left_out}")
    rows.print_unused(args.file, others)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("file", type=cli.path, metavar="FILE", help="rows of prompt and responses")
    words = "FILE.jsonl or FILE.csv (default: beside FILE, -scores.jsonl)"
    add("--out", type=run_dir.output, help=words)
    members.add_flags(parser)
    args = parser.parse_args(argv)
    if args.out and args.out.suffix not in (".jsonl", ".csv"):
        parser.error(f"--out {args.out}: a name ending in .jsonl or .csv expected")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
