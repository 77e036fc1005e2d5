"""Make a plain transformers directory of a member of a head, lora or jointly trained run.

    python extras/export_member.py --run RUN --member J --base BASE

It writes RUN/member_0j/ with all weights together, beside the head or the adapter alone. A member
of a full run is a plain directory already.
"""

from pairwise import chats, cli, files, manifest, members, pretrained, provenance, run_dir
from pairwise import reward_model as rm
from pairwise.scale import adapter

import torch


def trained_in(run, j):
    """The name of the stage that trained member j: its own, or "joint".

    Raise InputError where there is no such member, or where its directory is a plain one already.
    """
    directory = run / run_dir.member_name(j)
    members.check_models(run, [j])
    if directory.is_symlink():
        raise cli.InputError(
            f"{directory}: a link to the run that this one was pruned from found; --run of that "
            "one expected"
        )
    own = any((directory / name).exists() for name in ("head.safetensors", "adapter"))
    if own and not (directory / "model.safetensors").exists():
        return run_dir.member_name(j)
    joint = manifest.entries(run).get("joint")
    if joint and j <= joint["settings"]["k"] and not directory.exists():
        return "joint"
    wrong = "no such member"
    if (directory / "config.json").exists():
        wrong = "already a plain directory"
    elif (directory / "source.json").exists():
        wrong = "an existing model, a plain directory or hub id already; its source.json says which"
    elif (run / "members.json").exists():
        wrong = "not a model, but a formula of the rewards of another run's; see members.json"
    raise cli.InputError(f"{directory}: {wrong}")


def write_plain(model, tokenizer, directory):
    """Write a plain directory, or all of it but what is there, beside the head or the adapter.

    The adapter keeps a directory of its own: transformers would put one that lies beside the merged
    weights on top of them. The weights come last, as they say that all is there.
    """
    if not directory.exists():
        with files.replacing(directory) as partial:
            members.save_member(model, tokenizer, partial)
        return
    whole = directory.with_name(f".partial-{directory.name}")
    with files.replacing(whole, hashed=False) as partial:
        members.save_member(model, tokenizer, partial)
    for path in sorted(whole.iterdir(), key=lambda path: path.suffix == ".safetensors"):
        path.replace(directory / path.name)
    whole.rmdir()


def main(args):
    """Load the member as it scores, merge its adapters, and write all of it."""
    run, directory = args.run, args.run / run_dir.member_name(args.member)
    stage = trained_in(run, args.member)
    manifest.lock(run)
    torch.set_num_threads(args.threads)
    entry = manifest.entries(run).get(stage)
    if entry is None:
        raise cli.InputError(f"{run / 'manifest.json'}: no entry of {stage} found, one expected")
    run_dir.check_stages(run, stage)
    base = provenance.base_of(run, args.base)
    provenance.check_base(entry, base, args.chat_template)
    pretrained.check_quantized(pretrained.config(base), f"--base {base}", "full")
    date = provenance.date_of(run)
    tokenizer = chats.load_tokenizer(base, args.chat_template, date=date)
    dtype = getattr(torch, entry["settings"]["dtype"])
    member = members.load_member(run, args.member, base, tokenizer, dtype, args.device)
    if (directory / "adapter").exists():
        adapter.merge(member.model)
    write_plain(member.model, tokenizer, directory)
    print(f"{directory}: plain directory written")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_run(parser, "a head, lora or jointly trained run")
    add("--member", required=True, type=cli.member_number, metavar="J", help="the member, 1 to K")
    add("--base", required=True, help="base model that the run was trained from")
    rm.add_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
