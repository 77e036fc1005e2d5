"""The simulated population: its truth is exact, its floors are high, its text shows attributes."""

import itertools
import math

from data_prep import demo
from pairwise.ranking import attribute_counts

import numpy as np
import pyarrow.parquet as pq
import pytest


def drawn(prompts, responses, seed):
    return list(demo.comparisons(prompts, responses, seed))


def test_population_share_by_hand():
    attributes = np.zeros((2, len(demo.ATTRIBUTES)))
    attributes[0, demo.ATTRIBUTES.index("warm")] = 1
    expected = 0.0
    for name, (weight, taste) in demo.VIEWPOINTS.items():
        change = demo.IN_CONTEXT.get((name, "sad"), [0] * 8)
        gain = taste[demo.ATTRIBUTES.index("warm")] + change[demo.ATTRIBUTES.index("warm")]
        expected += weight / (1 + math.exp(-gain / demo.NOISE))
    assert demo.population_share("sad", attributes)[0, 1] == pytest.approx(expected, abs=1e-12)
    assert sum(weight for weight, _ in demo.VIEWPOINTS.values()) == pytest.approx(1)


def test_share_is_antisymmetric_and_half_between_equals():
    attributes = demo.draw_attributes(np.random.default_rng(0), 6)
    attributes[5] = attributes[0]
    for context in demo.CONTEXTS:
        share = demo.population_share(context, attributes)
        np.testing.assert_allclose(share + share.T, 1, atol=1e-12)
        assert share[0, 5] == pytest.approx(0.5)


def test_no_single_reward_and_no_coin_explains_the_population():
    """What the parameters were fixed by: both floors, from p_true alone, at least .05."""
    for seed in range(10):
        p = np.array([c.p_true for c in drawn(500, 6, seed)])
        assert np.mean(np.minimum(p, 1 - p) ** 2) > 0.08
        assert np.mean((p - 0.5) ** 2) > 0.08


def test_preferences_depend_on_the_context():
    """Another asker, another majority: no reward that ignores the prompt will do."""
    attributes = demo.draw_attributes(np.random.default_rng(1), 40)
    shares = np.stack([demo.population_share(context, attributes) for context in demo.CONTEXTS])
    assert np.mean((shares.max(0) > 0.5) & (shares.min(0) < 0.5)) > 0.1


def test_votes_follow_the_population():
    made = drawn(400, 6, 3)
    p, votes = np.array([c.p_true for c in made]), np.array([c.votes_a for c in made])
    assert all(c.votes_a + c.votes_b == demo.ANNOTATORS for c in made)
    z = (votes - 4 * p).sum() / np.sqrt((4 * p * (1 - p)).sum())
    assert abs(z) < 4
    assert np.mean((votes / 4 - p) ** 2) == pytest.approx(
        np.mean(p * (1 - p) / 4), rel=0.05
    )  # Lemma 1's C, by its variance


def test_same_seed_same_data_other_seed_other_data():
    assert drawn(5, 4, 0) == drawn(5, 4, 0) != drawn(5, 4, 1)


def test_all_pairs_of_distinct_responses():
    made = drawn(7, 5, 0)
    for _, rows in itertools.groupby(made, lambda c: c.prompt_id):
        rows = list(rows)
        assert len(rows) == 10
        assert len({c.response_a for c in rows} | {c.response_b for c in rows}) == 5


@pytest.mark.parametrize("attribute", demo.ATTRIBUTES)
def test_text_shows_the_attribute(attribute):
    for base in itertools.product((0, 1), repeat=len(demo.ATTRIBUTES)):
        row = dict(zip(demo.ATTRIBUTES, base))
        tips = (0, 1, 2, 3)
        assert demo.write_response("get fit", row | {attribute: 0}, tips) != demo.write_response(
            "get fit", row | {attribute: 1}, tips
        )


def test_prepared_data_holds_the_truth_and_no_prompt_twice(tmp_path):
    from pairwise.prepare.prompts import prepare

    args = demo.parse_args(
        ["--run", str(tmp_path), "--seed", "4", "--prompts", "40", "--responses", "4"]
    )
    prepare(args, "demo", lambda: demo.comparisons(40, 4, 4), "sampled", {}, {})
    truth = {}
    for c in demo.comparisons(40, 4, 4):
        truth[c.prompt_id, c.response_a, c.response_b] = (c.votes_a, c.p_true)
        truth[c.prompt_id, c.response_b, c.response_a] = (c.votes_b, 1 - c.p_true)
    seen, first, pairs = [], 0, 0
    for split in ("train", "valid", "test"):
        for row in pq.read_table(tmp_path / "data" / f"{split}.parquet").to_pylist():
            seen.append(row["messages"][0]["content"])
            for pair, p_true in zip(row["pairs"], row["p_true"]):
                votes, p = truth[
                    row["prompt_id"], row["responses"][pair["a"]], row["responses"][pair["b"]]
                ]
                assert (pair["votes_a"], pair["votes_a"] + pair["votes_b"]) == (votes, 4)
                assert p_true == pytest.approx(p, abs=1e-12)
                first, pairs = first + (pair["a"] < pair["b"]), pairs + 1
    assert len(seen) == len(set(seen)) == 40
    assert (
        abs(first - pairs / 2) < 4 * math.sqrt(pairs) / 2
    )  # which response stands first carries no information


def test_pretraining_reads_train_prompts_only_and_no_votes(tmp_path):
    from pairwise.data import read_split
    from pairwise.prepare.prompts import prepare

    args = demo.parse_args(["--run", str(tmp_path), "--prompts", "40", "--responses", "3"])
    prepare(args, "demo", lambda: demo.comparisons(40, 3, 0), "sampled", {}, {})
    train = read_split(tmp_path, "train")
    chats = list(demo.pretraining_chats(train, 200, np.random.default_rng(0)))
    assert {prompt for prompt, _ in chats} <= {
        messages[-1]["content"] for messages in train.messages
    }
    topics = {topic: [tip for tip in tips] for topic, tips in demo.TOPICS.items()}
    assert all(
        any(tip in text for topic, tips in topics.items() if f" {topic} " in prompt for tip in tips)
        for prompt, text in chats
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--prompts", "100000"],
        ["--responses", "1"],
        ["--responses", "4609"],
        ["--prompts", "0"],
        ["--test-share", "1"],
        ["--nonsense", "1"],
    ],
)
def test_wrong_flags_exit_with_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.parse_args(["--run", "x", *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_attribute_shows_by_its_pattern():
    assert tuple(demo.PATTERNS) == demo.ATTRIBUTES
    rng = np.random.default_rng(0)
    for topic in demo.TOPICS:
        rows = demo.draw_attributes(rng, 200)
        np.testing.assert_array_equal(
            attribute_counts([[demo.respond(rng, topic, row) for row in rows]], demo.PATTERNS)[
                :, 0
            ].T,
            rows,
        )
