"""The members of a trained run put to work on new responses: what score.py and respond.py share."""

from pathlib import Path

import numpy as np
import torch

from pairwise import cli, run_dir
from pairwise import reward_model as rm
from pairwise.levels import hardened, read_members


def add_arguments(parser):
    """The flags of every script that loads a run's members."""
    add = parser.add_argument
    add("--run", required=True, type=Path, help="a trained run directory")
    add("--base", help="the base model, where it is no longer where the run found it")
    add(
        "--micro-batch-tokens",
        type=cli.natural,
        default=8192 if torch.cuda.is_available() else 1024,
        help="tokens run in one forward pass",
    )
    rm.add_flags(parser)


def open_run(args, samples=False):
    """(alpha, settings): the weights of all members, float64 (k,), and the run's settings, of member 1, with `base` as it is found now.

    samples: the base itself is needed too, to sample from. Raises InputError where members or weights are missing, or the base is another.
    """
    run = args.run
    alpha = run_dir.read_weights(run, run_dir.count_members(run))
    if found := read_members(run):  # a hardened run has the members of its source
        run = found[0]
    stages = run_dir.read_json(run / "manifest.json")["stages"]
    name = "joint" if "joint" in stages else run_dir.member_name(1)
    entry = stages.get(name)
    if not entry or not (run / name).is_dir():
        raise cli.InputError(
            f"{run}: no trained members found; a run directory with {name}/ expected"
        )
    base = args.base or (str(run / "base") if (run / "base").is_dir() else entry["base"])
    if entry["settings"]["train"] == "from":
        if samples and not args.base:
            raise cli.InputError(
                f"{run}: its members are existing models; --base, the model that samples the answers, expected"
            )
        if not samples and (args.base or args.chat_template):
            raise cli.InputError(
                f"--base and --chat-template are for trained members; where those of {run} are, each member's source.json says"
            )
    elif (
        samples or entry["settings"]["train"] != "full" or args.chat_template
    ):  # a full member has base and template in its own directory
        rm.check_base(entry, base, args.chat_template)
    return alpha, entry["settings"] | {"base": base}


def rewards_of_run(run, k, settings, questions, args):
    """float32 (k, R): every member's reward of every response, in the order of the questions; each is encoded as in training.

    settings: the run's, of member 1; questions: [(prompt as given, messages, responses)]. Members of a head run share one pass over the base;
    existing models (--from) have each their own tokens; of a hardened run the source's members are run, and then the formulas.
    """
    if found := read_members(run):
        source, formulas = found
        return hardened(
            formulas,
            rewards_of_run(source, run_dir.count_members(source), settings, questions, args),
        )
    joint = (run / "joint").is_dir()  # one model with k heads
    members = [run / "joint"] if joint else [run / run_dir.member_name(j) for j in range(1, k + 1)]
    if settings["train"] == "from":
        sources = [
            rm.read_source(directory) for directory in members
        ]  # all are there, before the first is run
        return np.stack(
            [
                rewards_of_source(run, j, source, questions, args)
                for j, source in enumerate(sources, 1)
            ]
        )
    heads = all((directory / "head.safetensors").exists() for directory in members)
    tokenizer = rm.load_tokenizer(
        members[0] if settings["train"] == "full" else settings["base"], args.chat_template
    )
    dtype = getattr(torch, settings["dtype"])
    sequences = rm.encode_split(
        tokenizer, [q[1] for q in questions], [q[2] for q in questions], settings["max_length"]
    )
    if heads:
        model = rm.load_base(settings["base"], tokenizer, dtype, args.device)
        features = torch.from_numpy(rm.features_of(model, sequences, args.micro_batch_tokens))
        rewards = [
            rm.score_features(features, weight[None])
            for directory in members
            for weight in rm.load_head(directory)
        ]
    elif joint:
        model = rm.load_joint(run, settings["base"], tokenizer, dtype, args.device)
        rewards = list(rm.score_sequences(model, sequences, args.micro_batch_tokens, "joint").T)
    else:
        rewards = [
            rm.score_sequences(
                rm.load_member(run, j, settings["base"], tokenizer, dtype, args.device),
                sequences,
                args.micro_batch_tokens,
                f"member {j}",
            )
            for j in range(1, k + 1)
        ]
    return np.stack(rewards)


def rewards_of_source(run, j, source, questions, args):
    """float32 (R,): the rewards of member j, an existing model, in its own tokens and template; source: rm.read_source's."""
    tokenizer = rm.load_tokenizer(
        source["model"], source["template"], f"{run / run_dir.member_name(j) / 'source.json'}:"
    )
    model = rm.load_member(
        run, j, source["model"], tokenizer, getattr(torch, source["dtype"]), args.device
    )
    sequences = rm.encode_split(
        tokenizer, [q[1] for q in questions], [q[2] for q in questions], source["max_length"]
    )
    return rm.score_sequences(model, sequences, args.micro_batch_tokens, f"member {j}")
