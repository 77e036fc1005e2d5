"""Turn two members into policies by TRL's DPOTrainer, and tell what differs between the policies'
answers to prompts that neither has seen.

    bash run_all.sh demo 4 --run runs/policies --continuations 60 --top-p 1
    python experiments/policies.py --run runs/policies --out runs/policies/dpo --prompts 30

The second takes about ten minutes on one thread. It prints two tables over the test prompts that
have no continuations, with standard errors over prompts: the fraction of the base's and of each
policy's answers in which an attribute shows, beside Kendall's tau of the members' rewards with it
on the continuations; and how each member rewards the answers. It needs benchmarks/requirements.txt.
Other flags are those of TRL's DPO script: --learning_rate 1e-5, say.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from pairwise import (
    chats,
    cli,
    data,
    evaluator,
    members,
    provenance,
    ranking,
    reward_model,
    run_dir,
    sampling,
)

import numpy as np
import policy_pairs
import torch


def train(args, j):
    """Train policy j on pairs of its member's rewards; return its directory."""
    directory = args.out / f"policy_{j:02d}"
    pairs = directory / "pairs" / "train.jsonl"
    words = ["--run", str(args.run), "--member", str(j), "--out", str(pairs)]
    policy_pairs.main(policy_pairs.parse_args(words))
    flags = {
        "model_name_or_path": args.base,
        "dataset_name": directory / "pairs",
        "output_dir": directory / "model",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-4,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "seed": args.seed,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "trl.scripts.dpo", "--use_cpu", *words, *args.dpo]
    if subprocess.run(command).returncode:
        raise cli.InputError(f"policy {j}: TRL's DPO failed, as it says above")
    return directory / "model"


def with_error(values):
    """The mean and the standard error of values (prompts,), in words."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def print_table(head, rows):
    """Print a table as Markdown has it."""
    print()
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def unseen_prompts(args, continuations):
    """The messages of test prompts without continuations, --prompts at most."""
    test, with_continuations = data.read_split(args.run, "test"), set(continuations["prompt_id"])
    prompts = zip(test.prompt_id, test.messages)
    unseen = [messages for name, messages in prompts if name not in with_continuations]
    unseen = unseen[: args.prompts]
    if len(unseen) < 2:
        raise cli.InputError(
            f"{args.run}: {len(unseen)} test prompts without continuations found, "
            "at least 2 expected"
        )
    return unseen


def tau_with_attributes(args, texts, patterns):
    """Kendall's tau (attributes, members) of the members' rewards of the continuations with what
    shows in them, averaged over prompts."""
    counts = ranking.attribute_counts(texts, patterns)
    stored = run_dir.read_rewards(args.run, "continuations", max(args.members), counts.shape[1:])
    rewards = stored[np.array(args.members) - 1]
    tau = np.nanmean(evaluator.kendall_tau(np.concatenate([rewards, counts])), 0)
    return tau[len(rewards) :, : len(rewards)]


def sample_answers(args, policies, tokenizer, prompts):
    """{policy: lists of --count answers to every prompt}."""
    encoded = [chats.encode(tokenizer, messages) for messages in prompts]
    answers = {}
    for name, directory in policies.items():
        model = sampling.load_language_model(str(directory), "cpu")
        torch.manual_seed(args.seed)
        answers[name] = [
            sampling.sample(model, tokenizer, prompt, args.count, 1.0, 1.0, args.max_tokens)[0]
            for prompt in encoded
        ]
    return answers


def mean_rewards(args, j, tokenizer, prompts, answers):
    """Member j's mean reward of each prompt's answers, float32 (prompts,)."""
    member = members.load_member(args.run, j, args.base, tokenizer, torch.float32, "cpu")
    sequences = chats.encode_split(tokenizer, prompts, answers, args.max_length)
    return reward_model.score_sequences(member, sequences, 8192).reshape(len(prompts), -1).mean(1)


def main(args):
    if importlib.util.find_spec("trl") is None:
        raise cli.InputError("trl is not installed; benchmarks/requirements.txt has it")
    torch.set_num_threads(args.threads)
    args.base = provenance.base_of(args.run, args.base or str(args.run / "base"))
    continuations = run_dir.read_continuations(args.run)
    if continuations is None:
        words = "no such file; data_prep/continuations.py makes it"
        raise cli.InputError(f"{args.run / 'continuations.parquet'}: {words}")
    stats = data.read_stats(args.run)
    patterns = stats.get("attributes", ranking.ATTRIBUTES)
    prompts = unseen_prompts(args, continuations)
    tau = tau_with_attributes(args, continuations["texts"], patterns)

    policies = {"base": args.base} | {f"policy {j}": train(args, j) for j in args.members}
    tokenizer = chats.load_tokenizer(
        args.base, args.chat_template, date=provenance.date_of(args.run)
    )
    answers = sample_answers(args, policies, tokenizer, prompts)
    shows = {name: ranking.attribute_counts(x, patterns) > 0 for name, x in answers.items()}
    rows = []
    for i in np.argsort(-np.abs(tau[:, 0] - tau[:, -1]), kind="stable"):
        fractions = [with_error(shown[i].mean(1)) for shown in shows.values()]
        rows.append([list(patterns)[i], *fractions, *(f"{x:.2f}" for x in tau[i])])
    print_table(["attribute", *policies, *(f"tau of member {j}" for j in args.members)], rows)

    rows = []
    for j in args.members:
        rewards = [mean_rewards(args, j, tokenizer, prompts, x) for x in answers.values()]
        rows.append([f"member {j}", *map(with_error, rewards)])
    print_table(["mean reward by", *policies], rows)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--run",
        required=True,
        type=cli.path,
        help="a finished run directory with continuations of some of its test prompts",
    )
    add("--members", type=cli.member_number, nargs="+", default=[1, 2], help="whose policies")
    words = "directory for the pairs and the policies"
    add("--out", required=True, type=run_dir.output, help=words)
    add("--base", help="base model (default: RUN/base)")
    add("--chat-template", metavar="FILE", help="Jinja chat template, for a base without one")
    add("--prompts", type=cli.natural, default=40, help="unseen test prompts, at most")
    add("--count", type=cli.natural, default=20, help="answers of each policy to each")
    add("--max-tokens", type=cli.natural, default=128, help="longest answer")
    add(
        "--max-length",
        type=cli.natural,
        default=2048,
        help="of a prompt with its answer, for the members",
    )
    add("--seed", type=cli.seed, default=0, help="of DPO and of what is sampled")
    add("--threads", type=cli.threads, default=os.cpu_count(), help="CPU threads (default: all)")
    args, args.dpo = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
