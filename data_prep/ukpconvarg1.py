"""UKPConvArg1: crowd votes on which of two arguments is more convincing, five a pair.

    git clone https://github.com/UKPLab/acl2016-convincing-arguments
    python data_prep/ukpconvarg1.py --run runs/ukpconvarg1 --source acl2016-convincing-arguments

Source: Habernal and Gurevych (ACL 2016), CC-BY-4.0; none of the paper's data sets. Writes RUN/data.
--source is that clone, or a directory with three or more files of its data/UKPConvArg1-full-XML. A
file holds the arguments of one debate and stance, its prompt: annotatedArgumentPair elements with
arg1 and arg2 {id, text, stance}, debateMetaData {title, description} and mTurkAssignments, of which
each mTurkAssignment is a worker's vote, value a1, a2 or equal (a tie). Who the workers are is not
kept. A pair of the same two texts counts once. There is no official split: 10 % of the prompts are
held out, so --test-share 0.25 is a better choice for 32 prompts.
"""

import xml.etree.ElementTree as ET
from functools import partial

from pairwise import cli, rows
from pairwise.prepare import prompts, published

REPOSITORY, FOLDER = "UKPLab/acl2016-convincing-arguments", "UKPConvArg1-full-XML"
FILES = 32
VALUES = ("a1", "a2", "equal")
# Of the corpus' page at UKP Lab. The files hold more pairs, and some arguments have equal texts.
BESIDE, PUBLISHED = "Habernal and Gurevych (2016)", {"responses": 1052, "pairs": 16081}


def xml_files(source):
    """Return (the directory that is read, [Path, ..]) of what --source names."""
    inside = (source / "data" / FOLDER, source / FOLDER)
    folder = next((path for path in inside if path.is_dir()), source)
    paths = sorted(path for path in folder.glob("[!.]*.xml") if path.is_file())
    if not paths:
        expected = f"{FOLDER} or a clone of {REPOSITORY}"
        raise cli.InputError(f"{source}: no .xml file found, {expected} expected")
    return folder, paths


def read_pairs(path):
    """Yield (where, annotatedArgumentPair) of an XML file in UTF-8.

    Raises InputError where it is not one, and for a document type: it could declare entities, which
    unpack to gigabytes or name other files, and without one there are none.
    """
    with open(path, "rb") as file:
        content = file.read(rows.LONGEST + 1)
    if len(content) > rows.LONGEST:
        raise rows.too_long(f"{path.name}: the file")
    text = rows.decoded(content, path.name)
    for mark in ("<!DOCTYPE", "\0"):  # Expat takes text with zeros for UTF-16, the first in it too.
        if mark in text:
            line = text[: text.index(mark)].count("\n") + 1
            raise cli.InputError(f"{path.name} line {line}: {mark!r} found, none expected")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        line, reason = error.position[0], str(error).partition(": line")[0]
        raise cli.InputError(f"{path.name} line {line}: not XML ({reason})") from None
    pairs = root.findall("annotatedArgumentPair")
    if not pairs:
        raise rows.wrong(path.name, "annotatedArgumentPair", None, "pairs of arguments")
    yield from ((f"{path.name} pair {number}", pair) for number, pair in enumerate(pairs, 1))


def comparison(path, where, pair):
    """Return the Comparison of a pair of the file `path`."""

    def text(field, check=rows.text):
        value = pair.findtext(field)
        return check(where, field, None if value is None else value.strip())

    description = (pair.findtext("debateMetaData/description") or "").strip()
    debate = f"Debate: {text('debateMetaData/title')}\n{description}"
    prompt = f"{debate}\nWrite a convincing argument for the stance: {text('arg1/stance')}"
    field = "mTurkAssignments/mTurkAssignment"
    values = [each.findtext("value") for each in pair.findall(field)]
    if not values:
        raise rows.wrong(where, field, None, "the votes")
    values = [rows.one_of(where, f"{field}/value", value, VALUES) for value in values]
    messages = [{"role": "user", "content": prompt}]
    answers = (text("arg1/text", rows.string), text("arg2/text", rows.string))
    votes = map(values.count, VALUES)
    return prompts.Comparison(path.stem, messages, *answers, *votes, where=where)


def comparisons(paths, facts):
    """Yield the Comparison of every pair of the files, or the reason why there is none.

    facts["rows"] becomes {file: number of pairs}.
    """
    seen, facts["rows"] = set(), dict.fromkeys((path.name for path in paths), 0)
    for path in paths:
        for where, pair in read_pairs(path):
            facts["rows"][path.name] += 1
            found = comparison(path, where, pair)
            texts = (path.stem, *sorted((found.response_a, found.response_b)))
            yield "pair of arguments that is there already" if texts in seen else found
            seen.add(texts)


def main(args):
    folder, paths = xml_files(args.source)
    inputs = {"source": published.hash_source(folder, {None: paths})}
    source = {"repository": REPOSITORY}
    facts = {"source": source, "beside": BESIDE}
    beside = {"paper": PUBLISHED, "readings": {}, "facts": facts}
    found = partial(comparisons, paths, source)
    prompts.prepare(args, "ukpconvarg1", found, "sampled", inputs, {}, **beside)
    if "rows" in source:
        read = f"{sum(source['rows'].values()):,} pairs in {len(paths)} files read"
        print(f"data: {read}, {PUBLISHED['pairs']:,} in {FILES} published")


def parse_args(argv=None):
    parser = cli.Parser(__doc__)
    source_help = "a clone of the repository, or its folder of XML files"
    parser.add_argument("--source", required=True, type=cli.path, help=source_help)
    prompts.add_flags(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run_main(main, parse_args())
