"""Forward passes without padding and without repeated work: the sequences of a batch are one row of tokens, what they begin with in common
is in it once, and the last layer runs for the tokens that are read. The model code is transformers' own: it is given another attention
function, and its last layer other arguments.

    prompt A, answer 1 | answer 2 | answer 3 | prompt B, answer 1 | ..     positions go on where the prompt ends, keys are the prompt's and its own
"""

import inspect
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pairwise import cli

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = inspect.signature(varlen_attn).parameters  # the torch releases differ in it
except ImportError:
    VARLEN = {}

LEAST_SHARED = 16  # tokens: under that, a beginning in common is not worth the copies of its keys
MOST_SHARING = 64  # sequences with one beginning: keeps lay_out linear where all begin with the same system prompt


# ---- what shares what


def lay_out(sequences):
    """Groups of sequences that share their beginning, so that the fewest tokens are run: [(tokens shared, [indices])], every index once.

    sequences: token ids, lists of int of at least one. Each keeps at least one token of its own. Sorted, sequences with the same beginning
    are neighbours, so groups are runs in that order, and the best cut into runs follows from the best cuts of what comes before.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    lengths = [len(sequences[i]) for i in order]
    common = [0] + [
        _common(sequences[i], sequences[j]) for i, j in zip(order, order[1:])
    ]  # common[i]: of order[i - 1] and order[i]
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
    """Tokens that two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def count_tokens(sequences):
    """Tokens that are run for these sequences."""
    return sum(
        shared + sum(len(sequences[i]) - shared for i in members)
        for shared, members in lay_out(sequences)
    )


def batches(sequences, tokens):
    """Indices of sequences in batches that run at most `tokens` tokens, what shares a beginning together; large groups first (out of
    memory shows at once). A sequence that is longer alone is a batch."""
    parts = []
    for shared, members in lay_out(sequences):
        parts.append([0, []])
        for i in members:
            own = len(sequences[i]) - (shared if parts[-1][1] else 0)
            if parts[-1][1] and parts[-1][0] + own > tokens:
                parts.append([0, []])
                own = len(sequences[i])
            parts[-1][0] += own
            parts[-1][1].append(i)
    total, batch = 0, []
    for size, members in sorted(parts, key=lambda part: (-part[0], part[1])):
        if batch and total + size > tokens:
            yield batch
            total, batch = 0, []
        total, batch = total + size, batch + members
    if batch:
        yield batch


@dataclass
class Row:
    """Sequences as one row of T tokens, in segments: what a sequence has of its own, or, of a group's first, all of it."""

    ids: torch.Tensor  # int64 (1, T)
    positions: torch.Tensor  # int64 (1, T), of a token in its sequence
    own: list  # (n,) tokens of each segment; they lie in the row one after the other
    shared: list  # (n,) tokens that its sequence has before them,
    lead: list  # (n,) and the segment that begins with those
    ends: torch.Tensor  # int64 (n,) place in the row of each segment's last token
    places: torch.Tensor  # int64 (n,) segment of each sequence, in the order they were given
    varlen: bool  # attention in one call of torch's kernel, or segment by segment
    windows: dict = field(
        default_factory=dict
    )  # sliding window of each attention layer, as far as it was called
    memo: dict = field(default_factory=dict)  # masks and cumulative lengths, the same in all layers
    capture: bool = False  # the attention function is to raise what it got as keys and values,
    keys: tuple | None = (
        None  # or to take these keys and values, the queries being those of `ends` alone
    )

    @classmethod
    def of(cls, sequences, device, varlen=False):
        groups = lay_out(sequences)
        members = [i for _, group in groups for i in group]
        shared = [tokens if i != group[0] else 0 for tokens, group in groups for i in group]
        lead = [
            start
            for start, group in zip(_starts(len(group) for _, group in groups), groups)
            for _ in group[1]
        ]
        ids = [token for i, skip in zip(members, shared) for token in sequences[i][skip:]]
        positions = [
            place for i, skip in zip(members, shared) for place in range(skip, len(sequences[i]))
        ]
        own = [len(sequences[i]) - skip for i, skip in zip(members, shared)]
        places = sorted(range(len(members)), key=members.__getitem__)
        ends = [start - 1 for start in _starts(own)[1:]]
        ids, positions, ends, places = (
            torch.tensor(values, device=device) for values in ([ids], [positions], ends, places)
        )
        return cls(ids, positions, own, shared, lead, ends, places, varlen)


def _starts(lengths):
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


# ---- attention


class Captured(Exception):
    """Carries keys and values out of the last layer; not an error."""


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
    """transformers' attention interface: query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d), None.

    segments: the Row; without one, transformers' own function for a mask, sdpa. Raises NotImplementedError for what it cannot do.
    """
    if segments is None:
        if softcap is None:
            others |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
            return ALL_ATTENTION_FUNCTIONS["sdpa"](
                module, query, key, value, attention_mask, **others
            )
        if attention_mask is None:
            attention_mask = _mask(
                {}, query.shape[2], key.shape[2], sliding_window, query.device, explicit=True
            )
        return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    unknown = [
        name
        for name in ("s_aux", "position_bias", "head_mask", "block_mask")
        if others.get(name) is not None
    ]
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
        k, v = torch.cat(k, 2) if len(k) > 1 else k[0], torch.cat(v, 2) if len(v) > 1 else v[0]
        mask = _mask(
            segments.memo,
            q.shape[2],
            k.shape[2],
            sliding_window,
            q.device,
            explicit=softcap is not None,
        )
        out.append(_attend(q, k, v, mask, scaling, softcap))
    return torch.cat(out, 2).transpose(1, 2), None


def _with_shared(pieces, row):
    """Of each segment the keys (or values) it sees: those of the tokens before it, where it shares them, and its own."""
    return [
        (pieces[lead][:, :, :shared], piece) if shared else (piece,)
        for piece, shared, lead in zip(pieces, row.shared, row.lead)
    ]


def _mask(memo, queries, keys, window, device, explicit=False):
    """bool (queries, keys), True where the last `queries` of `keys` tokens look; "causal" or None where sdpa needs no mask for it."""
    whole = not window or window >= keys
    if whole and not explicit and queries in (1, keys):
        return None if queries == 1 else "causal"
    if (queries, keys, window) not in memo:
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        memo[queries, keys, window] = seen if whole else seen.triu(keys - queries - window + 1)
    return memo[queries, keys, window]


def _attend(q, k, v, mask, scaling, softcap):
    """One segment: q (1, H, t, d), k and v (1, H_kv, s, d) -> (1, H, t, d)."""
    groups = q.shape[1] // k.shape[1]
    if softcap is None:
        causal = isinstance(mask, str)
        return scaled_dot_product_attention(
            q,
            k,
            v,
            None if causal else mask,
            is_causal=causal,
            scale=scaling,
            enable_gqa=groups > 1,
        )
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)  # sdpa has no cap
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(
            ~mask, torch.finfo(scores.dtype).min
        )  # not -inf: a padded token may see nothing, and nan would spread
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _varlen(row, query, keys, values, lengths, scaling, window):
    """All segments in one call; (1, T, H, d). The kernel aligns a segment's queries with the end of its keys, as is meant here."""
    lists = lengths, [sum(piece.shape[2] for piece in pieces) for pieces in keys]
    name = "starts", row.keys is not None
    if name not in row.memo:  # the last layer has other queries
        row.memo[name] = [
            torch.tensor(_starts(lengths), dtype=torch.int32, device=query.device)
            for lengths in lists
        ]
    k, v = (
        torch.cat([piece for pieces in x for piece in pieces], 2)[0].transpose(0, 1)
        for x in (keys, values)
    )
    gqa = {"enable_gqa": query.shape[1] != k.shape[1]} if "enable_gqa" in VARLEN else {}
    looks = (window - 1 if window else -1, 0)  # tokens to the left, to the right
    return varlen_attn(
        query[0].transpose(0, 1),
        k,
        v,
        *row.memo[name],
        *map(max, lists),
        scale=scaling,
        window_size=looks,
        **gqa,
    )[None]


def _only_read(layer, args, kwargs):
    """Forward pre-hook of the last layer: keys and values of all tokens, everything else for the tokens that are read.

    The layer is run twice: first for all tokens up to the attention function, which raises the keys and values it is given; then, by the caller,
    for the tokens that are read, with those keys and values. No code of the layer is known here, and the gradient flows through both.
    """
    row = kwargs.get("segments")
    if (
        row is None or row.keys
    ):  # no row, or another hook of ours, from an earlier prepare(), has been here
        return None
    checkpointing = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = (
        False  # recomputed, it would raise again where nobody catches it; and little is kept
    )
    try:
        layer.forward(*args, **kwargs | {"segments": replace(row, capture=True)})
        raise NotImplementedError("a last layer without attention")
    except Captured as captured:
        keys = captured.args
    finally:
        layer.gradient_checkpointing = checkpointing

    def take(x):
        if isinstance(x, tuple):
            return tuple(map(take, x))
        return (
            x[:, row.ends]
            if torch.is_tensor(x) and x.ndim > 1 and x.shape[1] == row.ids.shape[1]
            else x
        )

    return take(args), {name: take(x) for name, x in kwargs.items()} | {
        "segments": replace(row, keys=keys)
    }


# ---- models


AttentionInterface.register("packed", attention)
AttentionMaskInterface.register(
    "packed", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
)  # for calls without a Row


def last_hidden(model, sequences, packs):
    """Hidden state of each sequence's last token, float32 (n, d), with gradient; sequences: n lists of token ids; packs: what
    prepare(model) returned."""
    row = Row.of(sequences, next(model.parameters()).device, packs == "varlen")
    return _run(model, row)[row.places].float()


def _run(model, row):
    mask = torch.empty(
        1, 1, 1, 1, device=row.ids.device
    )  # four dimensions: a mask that is ready, of which transformers makes no other
    out = model.base_model(
        input_ids=row.ids,
        position_ids=row.positions,
        attention_mask=mask,
        use_cache=False,
        segments=row,
    ).last_hidden_state[0]
    return (
        out if len(out) == len(row.own) else out[row.ends]
    )  # the whole row, where the last layer could not be cut


@torch.no_grad()
def prepare(model):
    """Make a transformers model's base run packed rows. Return how they are run, "varlen" or "segments", or None where its
    hidden states, packed, are not those of one sequence at a time. Then it is as it was, to be padded, and the reason is printed.

    Three short sequences are tried, two with one beginning; sliding windows, longer than those, are compared with the configuration.
    """
    config, base, device = (
        model.config.get_text_config(),
        model.base_model,
        next(model.parameters()).device,
    )
    tokens = [[(start + 37 * i * i) % config.vocab_size for i in range(24)] for start in (5, 11)]
    sequences = [tokens[0] + [7, 8, 9], tokens[1], tokens[0] + [10, 11, 12, 13, 14]]
    was, reason, hook = model.config._attn_implementation, "", None
    for varlen, cut in product(
        ([True, False] if device.type == "cuda" and "window_size" in VARLEN else [False]),
        (True, False),
    ):
        try:
            alone = [
                base(
                    input_ids=torch.tensor([one], device=device), use_cache=False
                ).last_hidden_state[0, -1]
                for one in sequences
            ]
            alone = torch.stack(alone).float()
            model.config._attn_implementation = "packed"
            hook = (
                base.layers[-1].register_forward_pre_hook(_only_read, with_kwargs=True)
                if cut
                else None
            )
            row = Row.of(sequences, device, varlen)
            error = ((_run(model, row)[row.places].float() - alone).norm() / alone.norm()).item()
            if not error < (1e-4 if next(base.parameters()).dtype == torch.float32 else 0.05):
                raise NotImplementedError(
                    f"packed, hidden states change by {error:.1g} of their size"
                )
            if {"dynamic", "longrope"} & rope_types(config):
                raise NotImplementedError("rotary positions that depend on the longest sequence")
            if list(row.windows.values()) != windows(config):
                raise NotImplementedError(
                    "windows of attention that the configuration does not explain"
                )
            return "varlen" if varlen else "segments"
        except Exception as error:  # whatever a model of another kind makes of a row
            reason = cli.first_line(error)
            model.config._attn_implementation = was
            if hook is not None:
                hook.remove()
    print(f"{type(model).__name__}: sequences are padded, not packed ({reason})")
    return None


def windows(config):
    """The sliding window of every layer, None for none; raises NotImplementedError where a layer is neither full nor sliding attention."""
    window = getattr(config, "sliding_window", None)
    types = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    )
    if set(types) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"layers of {', '.join(sorted(set(types)))}")
    return [window if kind == "sliding_attention" else None for kind in types]


def rope_types(config):
    """Kinds of rotary positions in the configuration; a model may have one a kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
