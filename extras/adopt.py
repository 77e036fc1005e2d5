"""Make an existing reward model member J of a run: nothing is trained, it scores all data.

    python extras/adopt.py --run RUN --iteration J --model MODEL          (then fit_weights.py)

MODEL is a hub id or a directory with num_labels 1. All members of its run are such models, of any
kind, each with its own tokens, chat template, --dtype and --max-length. It writes
RUN/rewards/0j_SPLIT.npy and RUN/member_0j, which says where the model is.
"""

import time

from pairwise import cli, data, existing, files, manifest, provenance, run_dir, stages, training
from pairwise import reward_model as rm
from pairwise.scale.offload import names_memory_flags

import torch


def check_kind(run, j):
    """Raise InputError where the other members of the run are not existing models, or too few."""
    run_dir.check_own_run(run)
    run_dir.check_next(run, j)
    first = run_dir.first_with_model(run, j)
    if first and run_dir.kind_of(run, j=first) != "existing":
        raise cli.InputError(
            f"{run}: member {first} is not an existing model; a run is of existing models, the "
            "first with --iteration 1, or of trained ones"
        )


def write_source(args, fingerprint, template):
    """Write RUN/member_0j: where the model is, what identifies it, and how it scored the data."""
    directory = args.run / run_dir.member_name(args.iteration)
    source = provenance.kept(args.base, args.run, "model")
    source |= {"fingerprint": fingerprint, "dtype": args.dtype, "max_length": args.max_length}
    with files.replacing(directory) as partial:
        partial.mkdir()
        files.write_json(partial / "source.json", source)
        if args.chat_template or args.date:
            (partial / "chat_template.jinja").write_text(template, encoding="utf-8")


@names_memory_flags
def main(args):
    """Score all splits and continuations with the model, unless that is done."""
    run, j, name, member = args.run, args.iteration, run_dir.member_name(args.iteration), None
    rm.settle(args)
    check_kind(run, j)
    splits, _ = data.read_splits(run)
    tokenizer = provenance.open_base(args, "--model")
    inputs = data.hashes(run) | provenance.base_hashes(args.base, args.chat_template)
    settings = {"train": "from", "dtype": args.dtype, "max_length": args.max_length}
    settings |= {"date": args.date} if args.date else {}
    stage, texts = (run, name, settings, inputs), run_dir.read_continuations(run)
    outputs = [run / name, *(run_dir.reward_path(run, j, split) for split in splits)]
    if manifest.stage_done(*stage, outputs):
        print(f"member {j}: {run / name} is there, skipped")
    else:
        dtype = getattr(torch, args.dtype)
        member = existing.load_reward_model(args.base, tokenizer, dtype, args.device, "--model")
        started = manifest.begin_stage(*stage)
        of_splits = stages.texts_of(splits)
        special = stages.count_special(of_splits, tokenizer)
        encoded, counts = stages.encode(args, of_splits, tokenizer)
        encoding, words = stages.encoding_facts(splits, encoded, counts)
        scores = stages.score(args, member, encoded, f"member {j}")
        stages.check_finite(scores, f"--model {args.base}", "; --dtype float32 may help")
        stages.write_rewards(run, j, scores)
        write_source(args, inputs["base model"], tokenizer.chat_template)
        facts = stages.facts(args) | encoding | {"texts_with_special_tokens": special}
        manifest.end_stage(*stage, started, **facts)
        seconds = f"{time.time() - started:.0f} s{stages.special_words(special)}{words}"
        print(f"member {j}: {args.base} scored all data in {seconds}")
    if texts:
        stages.score_continuations(args, j, member, tokenizer, texts, inputs)


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "run directory with data/")
    words = "make the model member J, 1 to 99"
    add("--iteration", required=True, type=cli.member_number, metavar="J", help=words)
    words = "reward model: hub id or transformers directory"
    add("--model", required=True, dest="base", metavar="MODEL", help=words)
    rm.add_flags(parser)
    training.add_scoring_flags(parser)
    parser.set_defaults(train="from")
    args = parser.parse_args(argv)
    training.fill_in(args)
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
