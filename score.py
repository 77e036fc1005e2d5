"""Score new responses with a trained run: the rewards of all members and the share of the ensemble that prefers each response.

    python score.py --run runs/demo FILE                        (FILE-scores.jsonl, a row per input row)
    python score.py --run runs/demo FILE --out scores.csv       (a row per pair)

FILE: .jsonl, .json, .csv or .parquet (also .gz), rows of `prompt` (text or chat messages) and `responses` (a list), or
`response_a` and `response_b`.   JSONL out: {prompt, responses, rewards: [responses x K], p_hat: [[a, b, p], ..]} with p the weighted share
of members that prefer responses[a] to responses[b] (section 2).   CSV out: row, prompt, response_a, response_b, reward_a_1.., reward_b_1.., p_hat.
"""

import csv
import io
import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from pairwise import reward_model as rm
from pairwise.levels import hardened, read_members
from pairwise.rows import kind, messages, read_rows, text, wrong
from pairwise.run_dir import InputError, Parser, count_members, import_evaluator, member_name, natural, read_json, read_weights, replacing, run_main

evaluator = import_evaluator()
FIELDS = {"prompt": "messages", "responses": "json", "response_a": "text", "response_b": "text"}


def read_questions(path):
    """[(prompt as given, messages, responses)] of every row. Raises InputError with the row, field, what was found and expected."""
    questions = []
    for where, row in read_rows(path, FIELDS):
        if "responses" in row:
            responses = row["responses"]
            if not isinstance(responses, list) or not responses:
                raise wrong(where, "responses", responses, "a list of responses")
        else:
            responses = [row.get("response_a"), row.get("response_b")]
        questions.append((row.get("prompt"), messages(where, row.get("prompt")), [text(where, "response", response) for response in responses]))
    if not questions:
        raise InputError(f"{path}: no row found, at least one expected")
    return questions


def rewards_of_run(run, k, settings, questions, args):
    """float32 (k, R): every member's reward of every response, in the order of the questions; each is encoded as in training.

    settings: the run's, of member 1. Members of a head run share one pass over the base; existing models (--from) have each their own tokens.
    """
    joint = (run / "joint").is_dir()  # one model with k heads
    members = [run / "joint"] if joint else [run / member_name(j) for j in range(1, k + 1)]
    if settings["train"] == "from":
        sources = [rm.read_source(directory) for directory in members]  # all are there, before the first is run
        return np.stack([rewards_of_source(run, j, source, questions, args) for j, source in enumerate(sources, 1)])
    heads = all((directory / "head.safetensors").exists() for directory in members)
    tokenizer = rm.load_tokenizer(members[0] if settings["train"] == "full" else settings["base"], args.chat_template)
    dtype = getattr(torch, settings["dtype"])
    sequences = rm.encode_split(tokenizer, [q[1] for q in questions], [q[2] for q in questions], settings["max_length"])
    if heads:
        model = rm.load_base(settings["base"], tokenizer, dtype, args.device)
        features = torch.from_numpy(rm.features_of(model, sequences, args.micro_batch_tokens))
        rewards = [rm.score_features(features, weight[None]) for directory in members for weight in rm.load_head(directory)]
    elif joint:
        model = rm.load_joint(run, settings["base"], tokenizer, dtype, args.device)
        rewards = list(rm.score_sequences(model, sequences, args.micro_batch_tokens, "joint").T)
    else:
        rewards = [rm.score_sequences(rm.load_member(run, j, settings["base"], tokenizer, dtype, args.device), sequences,
                                      args.micro_batch_tokens, f"member {j}") for j in range(1, k + 1)]
    return np.stack(rewards)


def rewards_of_source(run, j, source, questions, args):
    """float32 (R,): the rewards of member j, an existing model, in its own tokens and template; source: rm.read_source's."""
    tokenizer = rm.load_tokenizer(source["model"], source["template"], f"{run / member_name(j) / 'source.json'}:")
    model = rm.load_member(run, j, source["model"], tokenizer, getattr(torch, source["dtype"]), args.device)
    sequences = rm.encode_split(tokenizer, [q[1] for q in questions], [q[2] for q in questions], source["max_length"])
    return rm.score_sequences(model, sequences, args.micro_batch_tokens, f"member {j}")


def answers(questions, rewards, alpha):
    """Yield {prompt, responses, rewards, p_hat} for every question; rewards float32 (k, R), alpha (k,)."""
    start = 0
    for prompt, _, responses in questions:
        own = np.ascontiguousarray(rewards[:, start : start + len(responses)])
        start += len(responses)
        a, b = np.array(list(combinations(range(len(responses)), 2)), np.int64).reshape(-1, 2).T.copy()
        p_hat = alpha @ evaluator.votes(own, a, b) / 2
        yield {"prompt": prompt, "responses": responses, "rewards": own.T.tolist(), "p_hat": [[int(i), int(j), float(p)] for i, j, p in zip(a, b, p_hat)]}


def as_csv(rows, k):
    """CSV text with a row for every pair of every question."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["row", "prompt", "response_a", "response_b", *(f"reward_{side}_{j}" for side in "ab" for j in range(1, k + 1)), "p_hat"])
    for number, row in enumerate(rows, 1):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else json.dumps(row["prompt"], ensure_ascii=False)
        for a, b, p in row["p_hat"]:
            writer.writerow([number, prompt, row["responses"][a], row["responses"][b], *row["rewards"][a], *row["rewards"][b], p])
    return out.getvalue()


def main(args):
    torch.set_num_threads(args.threads)
    questions = read_questions(args.file)
    out = args.out or args.file.with_name(kind(args.file)[0] + "-scores.jsonl")
    if out.is_dir() or out.resolve() == args.file.resolve():
        raise InputError(f"--out {out}: {'a directory' if out.is_dir() else 'the file of questions itself'} found, another file expected")
    run, k = args.run, count_members(args.run)
    alpha = read_weights(run, k)
    if found := read_members(run):  # a hardened run: the members of its source, then the formulas
        run, formulas = found
    stages = read_json(run / "manifest.json")["stages"]
    name = "joint" if "joint" in stages else member_name(1)
    entry = stages.get(name)
    if not entry or not (run / name).is_dir():
        raise InputError(f"{run}: no trained members found; a run directory with {name}/ expected")
    base = args.base or (str(run / "base") if (run / "base").is_dir() else entry["base"])
    if entry["settings"]["train"] == "from":
        if args.base or args.chat_template:
            raise InputError(f"--base and --chat-template are for trained members; where those of {run} are, each member's source.json says")
    elif entry["settings"]["train"] != "full" or args.chat_template:  # a full member has base and template in its own directory
        rm.check_base(entry, base, args.chat_template)
    settings = entry["settings"] | {"base": base}
    rewards = rewards_of_run(run, count_members(run), settings, questions, args)
    rows = answers(questions, hardened(formulas, rewards) if found else rewards, alpha)
    with replacing(out) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        file.write(as_csv(rows, k) if out.suffix == ".csv" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(questions)} prompts, {k} members")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="rows of prompt and responses")
    add("--run", required=True, type=Path, help="a trained run directory")
    add("--out", type=Path, help="FILE.jsonl or FILE.csv (default: beside FILE, -scores.jsonl)")
    add("--base", help="the base model, where it is no longer where the run found it")
    add("--chat-template", metavar="FILE", help="Jinja chat template, where the run was made with one")
    add("--micro-batch-tokens", type=natural, default=8192 if torch.cuda.is_available() else 1024, help="tokens run in one forward pass")
    add("--threads", type=natural, default=os.cpu_count(), help="CPU threads (default: all)")
    add("--device", type=rm.device, default=rm.device(), help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if args.out and args.out.suffix not in (".jsonl", ".csv"):
        parser.error(f"--out {args.out}: a name ending in .jsonl or .csv expected")
    return args


if __name__ == "__main__":
    run_main(main, parse_args())
