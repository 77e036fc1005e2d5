"""Forward passes without padding and without repeated work.

The sequences of a batch are one row of tokens, what they begin with in common is in it once, and
the last layer runs for the tokens that are read. Positions go on where the prompt ends; an answer
sees the keys of its prompt and its own:

    prompt A, answer 1 | answer 2 | answer 3 | prompt B, answer 1 | ..

The model code is transformers' own: it is given another attention function, and its last layer
other arguments.
"""

import inspect
import sys
from dataclasses import dataclass, field, replace
from itertools import accumulate, product

from pairwise import cli
from pairwise.scale import parallel

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = inspect.signature(varlen_attn).parameters  # The torch releases differ in it.
except ImportError:
    VARLEN = {}

LEAST_SHARED = 16  # Fewer tokens in common are not worth the copies of their keys.
# Sequences with one beginning; this keeps lay_out linear where all begin with one system prompt.
MOST_SHARING = 64


# ---- what shares what


def lay_out(sequences):
    """Return [(tokens shared, [indices])]: groups of sequences that share their beginning, so that
    the fewest tokens are run. Every index is in one group.

    sequences: token ids, lists of int of at least one. Each keeps at least one token of its own.
    Sorted, sequences with the same beginning are neighbours, so groups are runs in that order, and
    the best cut into runs follows from the best cuts of what comes before."""
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    lengths = [len(sequences[i]) for i in order]
    # common[i] is what the sequences order[i - 1] and order[i] share.
    common = [0] + [_common(sequences[i], sequences[j]) for i, j in zip(order, order[1:])]
    fewest, cuts = [0], [None]
    for end in range(1, len(order) + 1):
        best, shared, total = None, lengths[end - 1] - 1, 0
        for begin in range(end - 1, max(-1, end - 1 - MOST_SHARING), -1):
            if begin < end - 1:
                shared = min(shared, common[begin + 1], lengths[begin] - 1)
                if shared < LEAST_SHARED:
                    break
            total += lengths[begin]
            tokens = fewest[begin] + total - shared * (end - 1 - begin)
            if best is None or tokens < best[0]:
                best = tokens, begin, shared if begin < end - 1 else 0
        fewest.append(best[0])
        cuts.append(best)
    groups, end = [], len(order)
    while end:
        _, begin, shared = cuts[end]
        groups.append((shared, order[begin:end]))
        end = begin
    return groups[::-1]


def _common(a, b):
    """Return the number of tokens that two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def count_tokens(sequences):
    """Return the number of tokens that are run for these sequences."""
    return sum(
        shared + sum(len(sequences[i]) - shared for i in group)
        for shared, group in lay_out(sequences)
    )


def batches(sequences, tokens):
    """Yield the indices of sequences in batches that run at most `tokens` tokens.

    What shares a beginning stays together; large groups come first, so that a lack of memory shows
    at once. A sequence that is longer alone is a batch."""
    pieces = []  # [tokens, indices] of groups, cut where they are too large
    for shared, group in lay_out(sequences):
        pieces.append([0, []])
        for i in group:
            own = len(sequences[i]) - (shared if pieces[-1][1] else 0)
            if pieces[-1][1] and pieces[-1][0] + own > tokens:
                pieces.append([0, []])
                own = len(sequences[i])
            pieces[-1][0] += own
            pieces[-1][1].append(i)
    total, batch = 0, []
    for size, indices in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        if batch and total + size > tokens:
            yield batch
            total, batch = 0, []
        total, batch = total + size, batch + indices
    if batch:
        yield batch


@dataclass
class Row:
    """n sequences as one row of T tokens, in n segments, one after the other.

    A segment is what a sequence has of its own, or, of a group's first, all of it."""

    ids: torch.Tensor  # int64 (1, T)
    positions: torch.Tensor  # int64 (1, T), of a token in its sequence
    own: list  # (n,) tokens of each segment
    shared: list  # (n,) tokens that its sequence has before them
    lead: list  # (n,) the segment that begins with those
    ends: torch.Tensor  # int64 (n,) place in the row of each segment's last token
    places: torch.Tensor  # int64 (n,) segment of each sequence, in the order they were given
    varlen: bool  # Attention is one call of torch's kernel, or goes segment by segment.
    # The sliding window of each attention layer, as far as it was called.
    windows: dict = field(default_factory=dict)
    # Masks and cumulative lengths, which are the same in all layers.
    memo: dict = field(default_factory=dict)
    # The attention function is to raise the keys and values it gets,
    capture: bool = False
    # or to take these keys and values, its queries being those of `ends` alone.
    keys: tuple | None = None


def make_row(sequences, device, varlen=False):
    """Return the Row of n lists of token ids."""
    groups = lay_out(sequences)
    order = [i for _, group in groups for i in group]
    shared = [tokens if i != group[0] else 0 for tokens, group in groups for i in group]
    first = _starts([len(group) for _, group in groups])
    lead = [start for start, (_, group) in zip(first, groups) for _ in group]
    ids, positions = [], []
    for i, skip in zip(order, shared):
        ids += sequences[i][skip:]
        positions += range(skip, len(sequences[i]))
    own = [len(sequences[i]) - skip for i, skip in zip(order, shared)]
    places = sorted(range(len(order)), key=order.__getitem__)
    ends = [start - 1 for start in _starts(own)[1:]]
    ids, positions, ends, places = (
        onto(device, torch.tensor(values)) for values in ([ids], [positions], ends, places)
    )
    return Row(ids, positions, own, shared, lead, ends, places, varlen)


def onto(device, tensor):
    """Return a tensor of the host on a device. What is queued there need not be done first: the
    driver takes a copy of pageable memory before it returns."""
    return tensor.to(device, non_blocking=True)


def _starts(lengths):
    """Return where pieces of these lengths begin, and where the last one ends."""
    return [0, *accumulate(lengths)]


# ---- attention


class Captured(Exception):
    """Carries keys and values out of the last layer; it is not an error."""


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    segments=None,
    **others,
):
    """Attend, by transformers' attention interface, inside the segments of a row.

    query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d), None. segments: the Row;
    without one transformers' own function for a mask runs, sdpa. Raises NotImplementedError for
    what it cannot do."""
    if segments is None:
        if softcap is not None:
            if attention_mask is None:
                lengths = query.shape[2], key.shape[2]
                attention_mask = _mask({}, *lengths, sliding_window, query.device, explicit=True)
            out = _attend(query, key, value, attention_mask, scaling, softcap)
            return out.transpose(1, 2), None
        others |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **others)
    names = "s_aux", "position_bias", "head_mask", "block_mask"
    unknown = [name for name in names if others.get(name) is not None]
    if unknown or dropout or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"attention with {unknown or 'dropout or both directions'}")
    segments.windows[module] = sliding_window
    if segments.capture:
        raise Captured(key, value)
    if segments.keys:
        key, value = segments.keys
    lengths = [1] * len(segments.own) if segments.keys else segments.own
    keys, values = (_with_shared(x.split(segments.own, 2), segments) for x in (key, value))
    if segments.varlen and softcap is None:
        return _varlen(segments, query, keys, values, lengths, scaling, sliding_window), None
    out = []
    for q, k, v in zip(query.split(lengths, 2), keys, values):
        k, v = (torch.cat(x, 2) if len(x) > 1 else x[0] for x in (k, v))
        sizes, explicit = (q.shape[2], k.shape[2]), softcap is not None
        mask = _mask(segments.memo, *sizes, sliding_window, q.device, explicit)
        out.append(_attend(q, k, v, mask, scaling, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _with_shared(pieces, row):
    """Return the keys (or values) that each segment sees: its own, after those that it shares."""
    return [
        (pieces[lead][:, :, :shared], piece) if shared else (piece,)
        for piece, shared, lead in zip(pieces, row.shared, row.lead)
    ]


def _mask(memo, queries, keys, window, device, explicit=False):
    """Return bool (queries, keys), True where the last `queries` of `keys` tokens look; or
    "causal" or None where sdpa needs no mask for it and none is asked for."""
    whole = not window or window >= keys
    if whole and not explicit and queries in (1, keys):
        return None if queries == 1 else "causal"
    if (queries, keys, window) not in memo:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        memo[queries, keys, window] = seen if whole else seen.triu(keys - queries - window + 1)
    return memo[queries, keys, window]


def _attend(q, k, v, mask, scaling, softcap):
    """Attend in one segment: q (1, H, t, d), k and v (1, H_kv, s, d) -> (1, H, t, d)."""
    groups = q.shape[1] // k.shape[1]
    if softcap is None:
        # For these a GPU has no fused kernel with fewer heads of keys than of queries.
        if groups > 1 and q.is_cuda and (torch.is_tensor(mask) or q.dtype == torch.float32):
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        options = {"is_causal": isinstance(mask, str), "scale": scaling, "enable_gqa": groups > 1}
        mask = None if options["is_causal"] else mask
        return scaled_dot_product_attention(q, k, v, mask, **options)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)  # sdpa has no cap.
    if mask.dtype == torch.bool:
        # A padded token may see nothing: with -inf its nan would spread.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _varlen(row, query, keys, values, lengths, scaling, window):
    """Attend in all segments with one call; return (1, T, H, d).

    The kernel aligns a segment's queries with the end of its keys, as is meant here."""
    lists = lengths, [sum(piece.shape[2] for piece in pieces) for pieces in keys]
    name = "starts", row.keys is not None  # The last layer has other queries.
    if name not in row.memo:
        starts = (torch.tensor(_starts(lengths), dtype=torch.int32) for lengths in lists)
        row.memo[name] = [onto(query.device, each) for each in starts]
    k, v = (
        torch.cat([piece for pieces in x for piece in pieces], 2)[0].transpose(0, 1)
        for x in (keys, values)
    )
    options = {"scale": scaling}
    options["window_size"] = window - 1 if window else -1, 0  # tokens to the left, to the right
    if "enable_gqa" in VARLEN:
        options["enable_gqa"] = query.shape[1] != k.shape[1]
    q = query[0].transpose(0, 1)
    return varlen_attn(q, k, v, *row.memo[name], *map(max, lists), **options)[None]


def _only_read(layer, args, kwargs):
    """Run, as forward pre-hook of the last layer, its keys and values for all tokens, and
    everything else for the tokens that are read.

    The layer is run twice: first for all tokens up to the attention function, which raises the
    keys and values it is given; then, by the caller, for the tokens that are read, with those keys
    and values. No code of the layer is known here, and the gradient flows through both."""
    row = kwargs.get("segments")
    if row is None or row.keys:  # Another hook of ours, from an earlier prepare(), has been here.
        return None
    try:
        # The class's: recomputed, the layer would raise again where nobody catches it.
        type(layer).forward(layer, *args, **kwargs | {"segments": replace(row, capture=True)})
        raise NotImplementedError("a last layer without attention")
    except Captured as captured:
        keys = captured.args

    def take(x):
        if isinstance(x, tuple):
            return tuple(map(take, x))
        whole = torch.is_tensor(x) and x.ndim > 1 and x.shape[1] == row.ids.shape[1]
        return x[:, row.ends] if whole else x

    kwargs = {name: take(x) for name, x in kwargs.items()}
    return take(args), kwargs | {"segments": replace(row, keys=keys)}


# ---- models


AttentionInterface.register("packed", attention)
# This is for calls without a Row.
AttentionMaskInterface.register("packed", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def last_hidden(model, sequences, packs):
    """Return the hidden state of each sequence's last token, float32 (n, d), with gradient.

    model: a transformers model; sequences: n lists of token ids; packs: what prepare(model) has
    returned."""
    row = make_row(sequences, next(model.parameters()).device, packs == "varlen")
    return _run(model, row)[row.places].float()


def _run(model, row):
    """Return the hidden state of each segment's last token, (n, d)."""
    # A mask of four dimensions counts as ready, and transformers makes no other.
    mask = torch.empty(1, 1, 1, 1, device=row.ids.device)
    inputs = {"input_ids": row.ids, "position_ids": row.positions, "attention_mask": mask}
    out = model.base_model(**inputs, use_cache=False, segments=row).last_hidden_state[0]
    # Where the last layer could not be cut, this is the whole row.
    return out if len(out) == len(row.own) else out[row.ends]


@torch.no_grad()
def prepare(model):
    """Make the base of a transformers model run packed rows. Return how, "varlen" or "segments".

    Return None where its hidden states, packed, are not those of one sequence at a time: then it
    is as it was, to be padded, and stderr has the reason. Three short sequences are tried, two
    with one beginning; sliding windows, which are longer, are compared with the configuration."""
    base, device = model.base_model, next(model.parameters()).device
    config, before = model.config.get_text_config(), model.config._attn_implementation
    tokens = [[(start + 37 * i * i) % config.vocab_size for i in range(24)] for start in (5, 11)]
    sequences = [tokens[0] + [7, 8, 9], tokens[1], tokens[0] + [10, 11, 12, 13, 14]]
    kernel, hook, reason = device.type == "cuda" and "window_size" in VARLEN, None, ""
    for varlen, cut in product([True, False] if kernel else [False], (True, False)):
        try:
            alone = torch.stack([_last_alone(base, ids, device) for ids in sequences]).float()
            model.config._attn_implementation = "packed"
            hook = None
            if cut:
                hook = base.layers[-1].register_forward_pre_hook(_only_read, with_kwargs=True)
            row = make_row(sequences, device, varlen)
            error = ((_run(model, row)[row.places].float() - alone).norm() / alone.norm()).item()
            if not error < (1e-4 if next(base.parameters()).dtype == torch.float32 else 0.05):
                raise NotImplementedError(
                    f"packed, hidden states change by {error:.1g} of their size"
                )
            if list(row.windows.values()) != windows(config):
                raise NotImplementedError(
                    "windows of attention that the configuration does not explain"
                )
            return "varlen" if varlen else "segments"
        except Exception as error:  # A model of another kind may make anything of a row.
            if cli.lacks_memory(error):
                raise
            reason = cli.first_line(error)
            model.config._attn_implementation = before
            if hook is not None:
                hook.remove()
    words = f"{type(model).__name__}: sequences are padded, not packed ({reason})"
    if parallel.rank() == 0:
        print(words, file=sys.stderr)  # Standard output may be JSON.
    return None


def _last_alone(base, ids, device):
    """Return the hidden state of the last token of one sequence, run by itself."""
    ids = torch.tensor([ids], device=device)
    return base(input_ids=ids, use_cache=False).last_hidden_state[0, -1]


def windows(config):
    """Return the sliding window of every layer, None for none.

    Raises NotImplementedError where a layer is neither full nor sliding attention."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if set(types) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of {', '.join(sorted(set(types)))}")
    return [window if kind == "sliding_attention" else None for kind in types]
