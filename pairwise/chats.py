"""Chats into token ids: the tokenizer of a base, its chat template, and one encode() for all."""

import contextlib
import datetime
import re
import signal
import threading
from pathlib import Path

from pairwise import cli, pretrained

from transformers import AutoTokenizer

# Spare or reserved tokens that can pad, the first that a tokenizer has.
PAD_NAMES = (
    "<|finetune_right_pad_id|> <|reserved_special_token_0|> <|pad|> <pad> [PAD] <|endoftext|> <unk>"
).split()
# strftime's, of a day alone; with a dash it writes no zero before a number.
DATE_CODES = "-d -m -j a A b B c C d D e F g G h H I j m M p r R S T u U V w W x X y Y".split()
TEMPLATE_SECONDS = 10  # A chat template takes less than a millisecond.


def load_tokenizer(base, chat_template=None, named="--base", date=None):
    """Return the base's tokenizer, with a chat template, right padding and a pad token of its own.

    The pad token is never the eos token. base: as of pretrained.pinned; chat_template: file with a
    Jinja template, for a base that has none; named: what named the base, for errors; date: what
    the template is to write as today, YYYY-MM-DD, where it asks. Raises InputError where the base
    cannot be read, has no chat template and none is given, or has no token that can pad."""
    failure = "no tokenizer could be loaded; a directory made by save_pretrained expected"
    tokenizer = pretrained.read(AutoTokenizer, base, named, failure)
    template = tokenizer.chat_template
    if chat_template:
        try:
            template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise cli.InputError(f"--chat-template {chat_template}: {error}") from None
    if isinstance(template, dict):  # A tokenizer may have several: {name: template}.
        template = template.get("default")
    if not template:
        which = " called default" if tokenizer.chat_template else ""
        words = f"has no chat template{which}; name a Jinja file with --chat-template FILE"
        raise cli.InputError(f"{named} {base} {words}")
    tokenizer.chat_template = dated(template, date) if date else template
    usable = tokenizer.get_vocab().keys() - {tokenizer.eos_token, tokenizer.bos_token}
    spare = [name for name in (tokenizer.pad_token, *PAD_NAMES) if name in usable]
    if not spare:
        words = "its pad token is its eos token, and no spare one was found among"
        raise cli.InputError(f"{named} {base}: {words} {', '.join(PAD_NAMES)}")
    tokenizer.pad_token, tokenizer.padding_side = spare[0], "right"
    try:
        encode(tokenizer, [{"role": "user", "content": "a question"}], "an answer")
    except cli.InputError as error:
        named = f"--chat-template {chat_template}" if chat_template else f"{named} {base}"
        raise cli.InputError(f"{named}: {error}") from None
    return tokenizer


def dated(template, date):
    """Return a chat template that writes `date`, YYYY-MM-DD, wherever it would write today's.

    Templates ask transformers' strftime_now for that. A macro of this name goes before it, so that
    the text of the template alone, in a member's directory, says how every chat was rendered."""
    if "strftime_now" not in template or date_in(template):
        return template
    day = datetime.date.fromisoformat(date)
    written = "".join(f"|replace('%{code}', '{day.strftime('%' + code)}')" for code in DATE_CODES)
    macro = "{%- macro strftime_now(format) -%}{{ format" + written + " }}{%- endmacro %}"
    return f"{{#- today is {date} -#}}{macro}{{{{ '' }}}}{template}"


def date_in(template):
    """Return the date, YYYY-MM-DD, that `dated` has put into a chat template; None without one."""
    found = re.match(r"\{#- today is (\S+) -#\}", template)
    return found and found[1]


def encode(tokenizer, messages, response=None, max_length=None):
    """Return the token ids (list of int) of a prompt and a response.

    messages: [{role, content}, ..]; response None: the prompt is made ready to be answered.
    There is exactly one BOS where the tokenizer has one. Where there are more than max_length
    tokens, they are cut from the left, of the prompt first and then of the response, never its
    end; the BOS stays. Raises InputError where the chat template fails."""
    chat = messages if response is None else [*messages, {"role": "assistant", "content": response}]
    text = rendered(tokenizer, chat, response is None)
    with pretrained.readable("the tokenizer fails"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
    bos = [tokenizer.bos_token_id]
    lead = next(i for i in range(len(ids) + 1) if ids[i : i + 1] != bos)
    if not lead and tokenizer("").input_ids[:1] != bos:
        bos = []  # Neither the template nor the tokenizer begins with one.
    return cut(tokenizer, bos + ids[lead:], max_length)


def cut(tokenizer, ids, max_length):
    """Return the token ids of a prompt and a response, cut from the left; the BOS stays."""
    excess = max(0, len(ids) - max_length) if max_length else 0
    bos = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    return bos + ids[len(bos) + excess :]


def rendered(tokenizer, chat, open_ended):
    """Return the text that the chat template makes of a chat; open_ended: ready to be answered.

    Raises InputError where the template fails or does not end, or makes nothing of the chat."""
    try:
        with time_limit(TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=open_ended
            )
        if text:
            return text
        reason = "it makes an empty text"
    except MemoryError:
        raise
    except Exception as error:  # A template is a program, and fails like one.
        reason = cli.first_line(error)
    turns = f"turns of {', '.join(message['role'] for message in chat)}"
    raise cli.InputError(f"the chat template fails ({reason}) on {turns}")


@contextlib.contextmanager
def time_limit(seconds):
    """Raise TimeoutError inside, once this process has computed for so many seconds.

    A signal costs microseconds, where a process to render in would take seconds; it is counted in
    CPU time, so that a call that was stopped and goes on is not late. It reaches the main thread
    alone, in which all scripts run; in another one there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it has not ended after {seconds} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def encode_split(tokenizer, messages, responses, max_length):
    """Return the token ids of every distinct response with its prompt, in data order: R lists.

    messages (P,): the prompts; responses (P,): lists of str."""
    return encode_counted(tokenizer, messages, responses, max_length)[0]


def encode_counted(tokenizer, messages, responses, max_length):
    """Return what encode_split returns, and how many of the lists max_length has cut."""
    whole = [
        encode(tokenizer, chat, text) for chat, texts in zip(messages, responses) for text in texts
    ]
    encoded = [cut(tokenizer, ids, max_length) for ids in whole]
    return encoded, sum(len(ids) < len(uncut) for ids, uncut in zip(encoded, whole))
