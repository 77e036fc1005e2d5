"""The demo: a simulated population with known truth, and a tiny Llama that has read its language.

    python data_prep/demo.py --run runs/demo --seed 0          (about a minute on 2 cores)

Writes RUN/data (the contract of pairwise/data.py, with p_true) and RUN/base, a plain transformers
directory: the base model.

The population. Five viewpoints with unequal weights judge a response by its visible attributes;
what they like depends on who is asking, so no single reward explains the votes. A flaw (a rude
remark) is disliked by all. Within a viewpoint people differ by logistic noise, so the fraction of
the population that prefers a to b is exactly

    p_true = sum_v weight_v sigmoid((u_v(x, a) - u_v(x, b)) / noise),
    u_v(x, y) = (TASTE_v + CONTEXT_v[x]) . attributes(y).

A vote draws an annotator from that population. The numbers below were fixed by looking at p_true
alone: the error floor of any single reward, mean min(p_true, 1 - p_true)^2, and that of a coin
flip, mean (p_true - 1/2)^2, are both well above .05.
"""

import itertools
import math
import time

from pairwise import cli, data, files, manifest
from pairwise.prepare import prompts

import numpy as np

# ---- text: every attribute shows in a few regular words

FOUR_TIPS = {
    "sleep better": "go to bed at ten; turn off the screen; drink no coffee; walk in the evening",
    "save money": "write down every cost; cook at home; cancel one plan; set a small goal",
    "pass the exam": "read one chapter a day; solve old tests; teach a friend; rest before the day",
    "find a new job": "update your letter; call two people; practise the talk; look every morning",
    "get fit": "take the stairs; run twice a week; lift light weights; stretch each day",
    "grow tomatoes": "use rich soil; water at dawn; give them sun; tie up the stems",
    "calm my dog": "play before noon; keep a steady hour; use a soft voice; reward the quiet",
    "learn to cook": "start with soup; buy a sharp knife; taste as you go; repeat one dish",
    "write a speech": "open with a story; keep three points; read it aloud; end with thanks",
    "move to a new town": "visit it in winter; ask about rent; pack one room a day; "
    "meet the neighbours",
    "talk to my son": "listen before you speak; choose a quiet time; ask about his day; "
    "share a meal",
    "fix my bike": "clean the chain; check the brakes; fill the tyres; oil the gears",
}
TOPICS = {topic: tuple(tips.split("; ")) for topic, tips in FOUR_TIPS.items()}
CONTEXTS = {
    "hurry": "i am in a hurry",
    "sad": "i feel low today",
    "work": "this is for my boss",
    "study": "i want to understand it",
}
WHEN = (
    "this week; before summer; after the holidays; on my own; with my sister; "
    "without much help; for the first time; at last; again; this year"
).split("; ")
ASK = (
    "how can i {topic} {when} ?",
    "what helps to {topic} {when} ?",
    "i need to {topic} {when} , any advice ?",
)
PROMPTS = list(itertools.product(TOPICS, CONTEXTS, WHEN, range(len(ASK))))

ATTRIBUTES = ("long", "hedged", "formal", "evidence", "warm", "direct", "list", "rude")
OPENING = {0: "hey ,", 1: "dear reader ,"}
WARM = "i feel with you and i am glad that you ask ."
EVIDENCE = "research with many people shows that this works ."
HEDGE = "perhaps it depends , i may be wrong ."
RUDE = "what a stupid question ."
# By these regular expressions an attribute is seen in any text that the base writes: the report
# says with them what each member likes.
PATTERNS = {
    "long": r"then .* then |3 \)",
    "hedged": "perhaps",
    "formal": "dear reader",
    "evidence": "research",
    "warm": "glad",
    "direct": "you must",
    "list": r"1 \)",
    "rude": "stupid",
}


def write_prompt(topic, context, when, ask):
    """Return the user's text."""
    return f"{CONTEXTS[context]} . {ASK[ask].format(topic=topic, when=when)}"


def write_response(topic, attributes, tips):
    """Return the assistant's text.

    attributes: {name: 0 or 1}; tips: indices into the topic's advice, in order.
    """
    advice = [TOPICS[topic][i] for i in tips[: 4 if attributes["long"] else 2]]
    lead = "you must" if attributes["direct"] else "one way is to"
    if attributes["list"]:
        items = " ".join(f"{number} ) {tip} ;" for number, tip in enumerate(advice, 1))
        body = f"{lead} : {items}"
    else:
        body = f"{lead} {' . then '.join(advice)} ."
    sentences = (
        OPENING[attributes["formal"]],
        RUDE if attributes["rude"] else "",
        WARM if attributes["warm"] else "",
        body,
        EVIDENCE if attributes["evidence"] else "",
        HEDGE if attributes["hedged"] else "",
    )
    return " ".join(sentence for sentence in sentences if sentence)


# ---- population (fixed by p_true alone)

#            weight  long hedged formal evidence warm direct list  rude
VIEWPOINTS = {
    "carer": (0.28, (0.4, 0.2, -0.4, -0.3, 1.8, -0.8, -0.4, -4.0)),
    "expert": (0.24, (0.8, -0.9, 1.0, 1.8, -0.8, 0.3, 0.2, -4.0)),
    "busy": (0.20, (-1.8, -0.6, -0.5, -0.4, -0.8, 1.2, 1.0, -4.0)),
    "careful": (0.16, (0.9, 1.8, 0.6, 0.9, 0.2, -1.2, 0.2, -4.0)),
    "casual": (0.12, (-0.9, 0.3, -1.8, -0.8, 0.6, 0.4, -0.8, -4.0)),
}
#             what the viewpoint changes in a context, same attributes
IN_CONTEXT = {
    ("carer", "sad"): (0.0, 0.0, -0.5, -0.5, 1.0, -0.5, -0.5, 0.0),
    ("carer", "work"): (0.0, 0.0, 1.2, 0.6, -1.2, 0.4, 0.4, 0.0),
    ("expert", "study"): (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    ("expert", "sad"): (-0.6, 0.6, -0.6, -1.0, 1.0, 0.0, 0.0, 0.0),
    ("busy", "hurry"): (-1.0, 0.0, 0.0, 0.0, -0.5, 0.5, 0.5, 0.0),
    ("busy", "study"): (1.6, 0.0, 0.0, 0.6, 0.0, 0.0, 0.0, 0.0),
    ("careful", "work"): (0.0, 0.6, 0.6, 0.6, -0.6, 0.0, 0.0, 0.0),
    ("careful", "hurry"): (-1.6, -0.6, 0.0, 0.0, 0.0, 1.0, 0.6, 0.0),
    ("casual", "sad"): (0.6, 0.0, -0.4, 0.0, 1.0, 0.0, 0.0, 0.0),
    ("casual", "hurry"): (-0.6, 0.0, 0.0, 0.0, -0.6, 0.6, 0.6, 0.0),
}
NOISE = 0.5
ANNOTATORS = 4  # votes a pair
RUDE_SHARE = 0.3  # of the responses; the other attributes are fair coins


def utilities(context, attributes):
    """Return u_v(x, y), float64 (viewpoints, responses), of attributes (responses, attributes)."""
    tastes = np.array([taste for _, taste in VIEWPOINTS.values()])
    changes = [IN_CONTEXT.get((name, context), [0.0] * len(ATTRIBUTES)) for name in VIEWPOINTS]
    return (tastes + changes) @ attributes.T


def population_share(context, attributes):
    """Return p_true of every ordered pair, float64 (responses, responses).

    It is the fraction of the population that prefers the row to the column.
    """
    weights = np.array([weight for weight, _ in VIEWPOINTS.values()])
    u = utilities(context, attributes)
    return np.tensordot(weights, 1 / (1 + np.exp(-(u[:, :, None] - u[:, None, :]) / NOISE)), axes=1)


def draw_attributes(rng, count):
    """Draw attributes, float64 (count, attributes) of zeros and ones."""
    chance = [RUDE_SHARE if name == "rude" else 0.5 for name in ATTRIBUTES]
    return (rng.random((count, len(ATTRIBUTES))) < chance).astype(float)


def respond(rng, topic, attributes):
    """Return a response with these attributes, (attributes,) of zeros and ones."""
    return write_response(topic, dict(zip(ATTRIBUTES, attributes.astype(int))), rng.permutation(4))


def comparisons(prompt_count, responses, seed):
    """Yield a Comparison for every pair of responses to every prompt.

    Its votes are those of ANNOTATORS drawn from the population.
    """
    rng = np.random.default_rng([seed, 0])
    drawn = sorted(rng.choice(len(PROMPTS), prompt_count, replace=False))
    for number, index in enumerate(drawn):
        topic, context, when, ask = PROMPTS[index]
        attributes_of = {}  # text: its attributes
        while len(attributes_of) < responses:
            attributes = draw_attributes(rng, 1)[0]
            attributes_of.setdefault(respond(rng, topic, attributes), attributes)
        texts = list(attributes_of)
        p_true = population_share(context, np.array(list(attributes_of.values())))
        messages = [{"role": "user", "content": write_prompt(topic, context, when, ask)}]
        for a, b in itertools.combinations(range(responses), 2):
            votes_a, p = int(rng.binomial(ANNOTATORS, p_true[a, b])), float(p_true[a, b])
            votes = (votes_a, ANNOTATORS - votes_a, 0)
            prompt_id = f"demo-{number:04d}"
            yield prompts.Comparison(prompt_id, messages, texts[a], texts[b], *votes, p_true=p)


# ---- base model

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pretraining_chats(split, count, rng):
    """Yield (prompt text, response text): train prompts, fresh responses. No vote is seen."""
    for _ in range(count):
        text = split.messages[rng.integers(len(split.messages))][-1]["content"]
        topic = next(topic for topic in TOPICS if f" {topic} " in text)
        yield text, respond(rng, topic, draw_attributes(rng, 1)[0])


def train_tokenizer(texts, vocabulary):
    """Return a byte-level BPE tokenizer with a chat template and a pad token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokens = {f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad")}
    tokens["chat_template"] = CHAT_TEMPLATE
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def new_llama(tokenizer):
    """Return an untrained Llama of about a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384}
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: getattr(tokenizer, name) for name in names}
    sizes |= dict.fromkeys(counts, 4) | {"max_position_embeddings": 512}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, **tokens))


def pretrain(texts, seed, batch=64, lr=3e-3):
    """Train a tiny Llama on texts, (prompt, response), once; return (model, tokenizer)."""
    from pairwise import chats, reward_model

    import torch
    from tqdm import trange

    tokenizer = train_tokenizer([text for pair in texts for text in pair], vocabulary=1200)
    torch.manual_seed(seed)
    model = new_llama(tokenizer)
    sequences = [
        chats.encode(tokenizer, [{"role": "user", "content": prompt}], response)
        for prompt, response in texts
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    steps = math.ceil(len(sequences) / batch)

    def lr_factor(step):
        """Warm up over 20 steps, then fall as a cosine to zero."""
        return min((step + 1) / 20, 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    started, tokens = time.time(), 0
    with trange(steps, desc="base", unit="step", mininterval=1) as bar:
        for step in bar:
            in_batch = sequences[step * batch : (step + 1) * batch]
            ids, mask = reward_model.pad(in_batch, tokenizer.pad_token_id, "cpu")
            labels = ids.masked_fill(mask == 0, -100)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens += int(mask.sum())
            rate = tokens / (time.time() - started)
            bar.set_postfix_str(f"loss {loss.item():.3f} {rate:,.0f} tokens/s", refresh=False)
    return model, tokenizer


def make_base(args):
    """Train the base model on RUN/data's train prompts and write RUN/base."""
    run, settings = args.run, {"seed": args.seed, "texts": args.texts}
    inputs = data.hashes(run)
    if manifest.stage_done(run, "base", settings, inputs, [run / "base"]):
        print(f"base: {run / 'base'} is there, skipped")
        return
    import torch  # which takes seconds to load

    started = manifest.begin_stage(run, "base", settings, inputs)
    torch.set_num_threads(args.threads)
    train, rng = data.read_split(run, "train"), np.random.default_rng([args.seed, 2])
    model, tokenizer = pretrain(list(pretraining_chats(train, args.texts, rng)), args.seed)
    with files.replacing(run / "base") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    manifest.end_stage(run, "base", settings, inputs, started, threads=args.threads)
    size, seconds = model.num_parameters(), time.time() - started
    print(f"base: {size:,} parameters, trained on {args.texts:,} texts in {seconds:.0f} s")


def main(args):
    settings = {"prompts": args.prompts, "responses": args.responses}

    def population():
        return comparisons(args.prompts, args.responses, args.seed)

    prompts.prepare(
        args, "demo", population, "sampled", {}, settings, facts={"attributes": PATTERNS}
    )
    make_base(args)


# One response has no pair; a topic has 4,608 texts, of which more and more would be drawn again.
responses = cli.number_type("responses", cli.integer, lambda v: 2 <= v <= 100, "from 2 to 100")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    prompts.add_flags(parser, test_share=0.2, valid_share=0.1)
    add("--prompts", type=cli.natural, default=500, help="prompts of the population's data set")
    responses_help = "responses per prompt, all pairs of them voted on"
    add("--responses", type=responses, default=6, help=responses_help)
    add("--texts", type=cli.natural, default=7000, help="texts that the base model reads, once")
    threads = cli.default_threads(1)  # A tiny model gains little by a second.
    add("--threads", type=cli.threads, default=threads, help="CPU threads")
    args = parser.parse_args(argv)
    if args.prompts > len(PROMPTS):
        most = f"at most {len(PROMPTS)} expected, there are no more different ones"
        parser.error(f"--prompts {args.prompts}: {most}")
    return args


if __name__ == "__main__":
    cli.run_main(main, parse_args())
