"""Synthetic judgments of pairs, where a data set has one vote a pair (Beyond the Binary, 3.3).

    python extras/synthetic_judgments.py --run runs/mine --base NAME_OR_DIR
    python extras/synthetic_judgments.py .. --prompt FILE --orders one          (as the paper's are)

They are for `train_rm.py --loss margin --margin-from judgments`. A causal language model is asked
--count times which of the two responses is better: half of the times with each of them first, so
that a liking for the first or for "A" cancels, or with --orders one as the pair stands. FILE is a
prompt in the place of ours that has {prompt}, {answer_0} and {answer_1} where the texts belong;
{prompt} is the text of a prompt of one turn, and of others "role: text" for each turn. An answer
that names not exactly one choice counts for neither side. Writes RUN/judgments.jsonl (a line a
train prompt: every raw answer) and adds the column `judgments`, counts {a, b} per pair, to
RUN/data/train.parquet, where they never replace a vote. It is to be run right after the data.
"""

import hashlib
import json
import re

from pairwise import (
    chats,
    cli,
    data,
    files,
    manifest,
    pretrained,
    provenance,
    reward_model,
    sampling,
)

import numpy as np
import pyarrow as pa
import torch

QUESTION = """Two answers to the same message follow the conversation below. Say which one most \
people would rather have got: the one that is correct where there is a right answer, and helpful \
without doing harm where there is none. Reply with "Choice: A" or "Choice: B" and nothing else.

Conversation:
{conversation}

Answer A:
{answer_0}

Answer B:
{answer_1}"""
# A --prompt FILE has these; {conversation}, which always has roles, may be there too.
PLACEHOLDERS = "{prompt}", "{answer_0}", "{answer_1}"


def read_prompt(path):
    """Return the text of a --prompt FILE. Raises InputError unless it has all PLACEHOLDERS."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise cli.InputError(f"--prompt {path}: {error}") from None
    if missing := [name for name in PLACEHOLDERS if name not in text]:
        expected = f"{', '.join(PLACEHOLDERS)} expected"
        raise cli.InputError(f"--prompt {path}: no {' and no '.join(missing)} found, {expected}")
    return text


def question(template, messages, first, second):
    """Return the chat that asks for a choice between two answers, `first` being called A."""
    conversation = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    prompt = messages[0]["content"] if len(messages) == 1 else conversation
    texts = dict(zip(PLACEHOLDERS, (prompt, first, second))) | {"{conversation}": conversation}
    # In one pass, as the texts may have such words too; no other brace means anything.
    text = re.sub("|".join(map(re.escape, texts)), lambda found: texts[found[0]], template)
    return [{"role": "user", "content": text}]


def choice(answer):
    """Return "A" or "B", or None where the answer names not exactly one of them: both ("A or B"),
    one each in two places, or none; a small "a" that words follow is the article ("a tie")."""
    either = r"(?![ \t/,&|]*(?:or|and)?[ \t/,&|]*[AB]\b)"
    found = re.findall(rf"(?m)\b(?i:choice):\W*(?:([AB])\b{either}|([ab])\W*$)", answer)
    named = {(large or small).upper() for large, small in found}
    return named.pop() if len(named) == 1 else None


def count(answers):
    """Return {a, b}, the choices for each response of a pair.

    answers: {"a first": raw answers, "b first": raw answers}, by the response that is called A;
    with --orders one the first alone.
    """
    a_first = [choice(answer) for answer in answers["a first"]]
    b_first = [choice(answer) for answer in answers.get("b first", ())]
    return {
        "a": a_first.count("A") + b_first.count("B"),
        "b": a_first.count("B") + b_first.count("A"),
    }


def questions(template, row, orders):
    """Yield {"a first": chat, and with both orders "b first"} of each pair of a prompt row."""
    for pair in row["pairs"]:
        a, b = row["responses"][pair["a"]], row["responses"][pair["b"]]
        asked = {"a first": (a, b)} | ({"b first": (b, a)} if orders == "both" else {})
        yield {name: question(template, row["messages"], *two) for name, two in asked.items()}


def ask(model, tokenizer, chat, times, args):
    """Return `times` raw answers of the model, by nucleus sampling."""
    prompt = chats.encode(tokenizer, chat)
    longest = sampling.room(model, prompt, args.max_tokens, "a question")
    nucleus = (args.temperature, args.top_p, longest)
    with pretrained.readable(f"--base {args.base}: no answer could be sampled"):
        texts, _ = sampling.sample(model, tokenizer, prompt, times, *nucleus)
    return texts


def judge(model, tokenizer, template, row, args):
    """Return every raw answer about the pairs of a prompt row, for judgments.jsonl."""
    answers = []
    for asked in questions(template, row, args.orders):
        times = args.count // len(asked)
        answers.append({x: ask(model, tokenizer, chat, times, args) for x, chat in asked.items()})
    return {"prompt_id": row["prompt_id"], "pairs": answers}


def hash_texts(rows):
    """Return a hash of what the judgments are about, which their own column does not change."""
    texts = []
    for row in rows:
        pairs = [(pair["a"], pair["b"]) for pair in row["pairs"]]
        texts.append((row["prompt_id"], row["messages"], row["responses"], pairs))
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def write_judgments(path, table, counts):
    """Write a split's table with the column `judgments`: for each prompt, {a, b} of its pairs."""
    if "judgments" in table.column_names:
        table = table.drop_columns("judgments")
    table = table.append_column("judgments", pa.array(counts, data.JUDGMENTS))
    with files.replacing(path) as partial:
        files.write_parquet(partial, table)


def main(args):
    run, path = args.run, args.run / "data" / "train.parquet"
    template = read_prompt(args.prompt) if args.prompt else QUESTION
    data.read_split(run, "train")  # It says what is wrong with the file.
    table, out = files.read_parquet(path), run / "judgments.jsonl"
    rows = table.to_pylist()
    flags = ("count", "top_p", "temperature", "max_tokens", "seed", "orders")
    tokenizer = provenance.open_base(args)
    settings = {flag: getattr(args, flag) for flag in flags}
    settings |= {"date": args.date} if args.date else {}
    inputs = {"texts of data/train.parquet": hash_texts(rows)}
    inputs |= provenance.base_hashes(args.base, args.chat_template)
    inputs |= {"prompt": files.hash_file(args.prompt)} if args.prompt else {}
    done = manifest.stage_done(run, "judgments", settings, inputs, [out])
    if done and "judgments" in table.column_names:
        print(f"judgments: {out} is there, skipped")
        return
    if later := manifest.entries(run).keys() - {"data", "judgments"}:
        order = "judgments come first, right after the data, in another --run"
        raise cli.InputError(f"{path}: {min(later)} was made from it already; {order}")
    reward_model.settle(args)
    model = sampling.load_language_model(args.base, args.device)
    for row in rows:  # Every question must fit before the first is asked.
        for asked in questions(template, row, args.orders):
            encoded = [chats.encode(tokenizer, chat) for chat in asked.values()]
            for ids in encoded:
                where = f"prompt {row['prompt_id']}: a question"
                sampling.room(model, ids, args.max_tokens, where)
            reward_model.check_tokens(model, encoded)
    started = manifest.begin_stage(run, "judgments", settings, inputs, ["data/train.parquet"])

    def answers(number):
        """Judge a prompt with a seed of its own: where a killed run went on does not matter."""
        torch.manual_seed(int(np.random.SeedSequence([args.seed, number]).generate_state(1)[0]))
        return judge(model, tokenizer, template, rows[number], args)

    key = settings | inputs
    judged = sampling.remembered_rows(out, key, len(rows), answers, "judgments")
    counts = [[count(pair_answers) for pair_answers in row["pairs"]] for row in judged]
    write_judgments(path, table, counts)
    manifest.end_stage(run, "judgments", settings, inputs, started, threads=args.threads)
    pair_counts = [pair for pairs in counts for pair in pairs]
    total = args.count * len(pair_counts)
    unclear = total - sum(pair["a"] + pair["b"] for pair in pair_counts)
    print(
        f"judgments: {args.count} for each of {len(pair_counts):,} pairs of {path}; "
        f"{unclear:,} of {total:,} answers name no choice"
    )


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    run_help = "run directory with data/, before its first member is trained"
    cli.add_run(parser, run_help)
    base_help = "instruction-tuned causal language model: hub id or transformers directory"
    add("--base", required=True, help=base_help)
    reward_model.add_flags(parser)
    provenance.add_flags(parser)
    sampling.add_flags(parser, 0.9, 8)
    add(
        "--count",
        type=cli.natural,
        default=10,
        help="judgments of each pair (the paper: 10); with --orders both an even number",
    )
    words = "each response first half of the times, or always as the pair stands"
    add("--orders", choices=("both", "one"), default="both", help=words)
    words = f"a prompt of your own, with {', '.join(PLACEHOLDERS)}"
    add("--prompt", type=cli.path, metavar="FILE", help=words)
    args = parser.parse_args(argv)
    if args.count % 2 and args.orders == "both":
        parser.error(f"--count {args.count}: an even number expected, half of it for each order")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
