"""Rotary positions whose factors depend on the longest sequence of a forward pass.

"longrope" (Phi 3, Phi 4 mini) has two sets of factors, the second for more tokens than the base was
first trained on; "dynamic" has a set for every length beyond the base's positions, and keeps the
last. A sequence is run with the factors that it has alone: beside others that have the same.
"""


def kinds(config):
    """Return the rotary positions that a text config has, dicts; there may be one for a kind of
    layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


def is_dynamic(config):
    """Return whether the factors grow with the length, which then may be any."""
    return any("dynamic" in str(each.get("rope_type")) for each in kinds(config))


def apart(config, sequences):
    """Return the indices of sequences, lists of token ids, in lists that may share a forward pass,
    the longest first."""
    first = "original_max_position_embeddings"
    ends = [each[first] for each in kinds(config) if each.get("rope_type") == "longrope"]
    least = config.max_position_embeddings if is_dynamic(config) else float("inf")
    groups = {}
    for i, ids in enumerate(sequences):
        factors = max(len(ids), least), *(len(ids) > end for end in ends)
        groups.setdefault(factors, []).append(i)
    return [groups[factors] for factors in sorted(groups, reverse=True)]


def reset(model):
    """Give a model the factors back that it had before it met a sequence beyond its positions."""
    if not is_dynamic(model.config.get_text_config()):
        return
    for module in model.modules():
        for name, original in [*module.named_buffers(recurse=False)]:
            kind, found, _ = name.partition("original_inv_freq")
            cached = f"{kind}max_seq_len_cached"
            if found and getattr(module, cached, 0) > module.original_max_seq_len:
                setattr(module, f"{kind}inv_freq", original.clone())
                setattr(module, cached, module.original_max_seq_len)
