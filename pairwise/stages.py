"""What stages of training share besides the loop: data encoded for a member, and the member saved,
scored and entered in the run. A member is a RewardModel, or the weight (K, d) of heads alone.
"""

import contextlib
import os
import re

from pairwise import chats, cli, features, files, manifest, members, provenance, run_dir
from pairwise import reward_model as rm
from pairwise.scale import parallel

import numpy as np
import torch


def texts_of(splits):
    """Return {split: (messages (P,), responses (P,) lists of str)}."""
    return {name: (split.messages, split.responses) for name, split in splits.items()}


def encode(args, texts, tokenizer):
    """Return {name: token ids of every distinct response, R lists}, and {name: how many of them
    are cut by --max-length}; texts: as of texts_of."""
    encoded, counts = {}, {}
    for name in texts:
        given = (tokenizer, *texts[name], args.max_length)
        encoded[name], counts[name] = chats.encode_counted(*given)
    return encoded, counts


def count_special(texts, tokenizer):
    """Return how many distinct texts, of prompts and responses, have the text of a special token in
    them, such as <|eos|>. It becomes that token, and ends a turn, say, that goes on.

    texts: as of texts_of."""
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    has_one = re.compile("|".join(re.escape(token) for token in sorted(special) if token) or "(?!)")
    prompts = {m["content"] for messages, _ in texts.values() for chat in messages for m in chat}
    responses = {text for _, groups in texts.values() for group in groups for text in group}
    return sum(has_one.search(text) is not None for text in prompts | responses)


def special_words(count):
    """Return what a script prints about texts with special tokens: nothing where there are none."""
    return f", {count:,} texts have the text of a special token in them" if count else ""


def encode_for(args, stage, texts, tokenizer, inputs):
    """Return {name: what a member is trained on and scores}: token ids, R lists, or features, and
    {name: how many texts are cut}.

    Features, of --train head, are float32 (R, d), one per response under the frozen base, computed
    once for all members of a run in a stage of its own, called `stage` and made from `inputs`.
    """
    if args.train != "head":
        return encode(args, texts, tokenizer)
    entry = (args.run, stage, {name: getattr(args, name) for name in ("max_length", "dtype")})
    paths = {name: args.run / "features" / f"{name}.npy" for name in texts}
    if not manifest.stage_done(*entry, inputs, list(paths.values())):
        started = manifest.begin_stage(*entry, inputs)
        encoded, counts = encode(args, texts, tokenizer)
        made, from_cache = features.of_texts(args, stage, texts, encoded, tokenizer)
        for name, path in paths.items():
            files.write_array(path, made[name])
        facts = {"threads": args.threads, "device": args.device, "texts_cut": counts}
        facts["texts_from_cache"] = from_cache
        manifest.end_stage(*entry, inputs, started, **facts)
    else:
        manifest.check(args.run, *paths.values())
    made = {name: files.read_array(path) for name, path in paths.items()}
    for name, (_, responses) in texts.items():
        found, count = made[name], sum(map(len, responses))
        if found.dtype != np.float32 or found.ndim != 2 or len(found) != count:
            wrong = f"{found.dtype} {found.shape} found, float32 ({count}, d) expected"
            raise cli.InputError(f"{paths[name]}: {wrong}")
    return made, manifest.entries(args.run)[stage]["texts_cut"]


def identical_pairs(split, encoded):
    """Return the pairs of one token sequence (encoded: R lists) or one feature (R, d) twice, as
    bool (N,)."""
    return np.array([np.all(encoded[a] == encoded[b]) for a, b in zip(split.a, split.b)])


def encoding_facts(splits, encoded, counts):
    """Return what encoding has made of the texts: facts for the manifest, and words to print.

    Pairs that it made identical tie in every split, and are not trained on; counts: of encode_for.
    """
    identical = {name: int(identical_pairs(splits[name], encoded[name]).sum()) for name in splits}
    facts = {"identical_pairs_by_split": identical, "texts_cut": counts}
    words = count_words("pairs identical after encoding, which tie", identical)
    return facts, words + cut_words(counts)


def cut_words(counts):
    """Return what a script prints about texts that are cut: nothing where there are none."""
    return count_words("texts cut to --max-length", counts)


def count_words(what, counts):
    """Return words for what there is in {split: count}; "" where there is nothing."""
    words = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"; {what}: {words}" if words else ""


@contextlib.contextmanager
def open_log(path, written=True):
    """Yield a file that becomes `path` at the end; where it is not `written`, it goes nowhere."""
    place = files.replacing(path) if written else contextlib.nullcontext(os.devnull)
    with place as partial, open(partial, "w", encoding="utf-8") as log:
        yield log


def load(args, j, tokenizer):
    """Return member j of a run as a RewardModel."""
    dtype = getattr(torch, args.dtype)
    return members.load_member(args.run, j, args.base, tokenizer, dtype, args.device)


def score(args, member, encoded, label):
    """Return {name: rewards float32 (R,), or (R, K) of several heads}; encoded: encode_for's."""
    if isinstance(member, torch.Tensor):
        return {name: rm.score_features(encoded[name], member) for name in encoded}
    tokens = args.micro_batch_tokens
    for sequences in encoded.values():  # Here the advice can name a flag.
        rm.check_positions(member, sequences)
    return {
        name: rm.score_sequences(member, sequences, tokens, f"{label}, {name}")
        for name, sequences in encoded.items()
    }


def check_finite(scores, label, advice=" after the last step; a lower --lr may help", outputs=()):
    """Remove the outputs and raise InputError where one of {name: rewards} is not finite."""
    for name, rewards in scores.items():
        if not np.isfinite(rewards).all():
            for path in outputs if parallel.rank() == 0 else ():
                files.remove(path)
            raise cli.InputError(f"{label}: rewards of {name} are not finite{advice}")


def write_rewards(run, j, scores):
    """Write RUN/rewards/0j_NAME.npy, float32, of {name: rewards}."""
    for name, rewards in scores.items():
        files.write_array(run_dir.reward_path(run, j, name), rewards)


def facts(args):
    """Return what the manifest records of a training or scoring besides its settings."""
    numbers = {name: getattr(args, name) for name in ("threads", "device", "micro_batch_tokens")}
    numbers["base_weights"] = provenance.weights_of(args.base)
    return provenance.kept(args.base, args.run) | numbers


def score_continuations(args, j, member, tokenizer, texts, inputs):
    """Write RUN/rewards/0j_continuations.npy, float32 (prompts, n).

    It is a stage of its own, so that continuations may come later. member: as for `score`, or None
    where it has yet to be loaded; texts: run_dir.read_continuations(run); inputs: {name: hash} that
    the member was made from, of which the data's do not count.
    """
    run, path = args.run, run_dir.reward_path(args.run, j, "continuations")
    hashes = {"continuations.parquet": files.hash_file(run / "continuations.parquet")}
    hashes["base model"] = inputs["base model"]
    rewards_before = {name: inputs[name] for name in inputs if name.startswith("rewards of")}
    stage = (run, f"{run_dir.member_name(j)}_continuations", {}, hashes | rewards_before)
    if parallel.of_first(lambda: manifest.stage_done(*stage, [path])):
        return
    started = parallel.of_first(lambda: manifest.begin_stage(*stage))
    continuations = {"continuations": (texts["messages"], texts["texts"])}
    task = (args, "features_continuations", continuations, tokenizer, hashes)
    encoded, counts = encode_for(*task)
    if args.train == "head":
        directory = members.member_directory(run, j)
        manifest.check(run, directory)
        member = members.load_head(directory, encoded["continuations"].shape[1])
    elif member is None:
        member = load(args, j, tokenizer)
    rewards = score(args, member, encoded, f"member {j}")["continuations"]
    if parallel.rank() == 0:
        files.write_array(path, rewards.reshape(len(texts["messages"]), -1))
        manifest.end_stage(*stage, started, texts_cut=counts)
        if words := cut_words(counts):
            print(f"member {j}, continuations{words}")
