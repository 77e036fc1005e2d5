"""What README.md and docs/ say is so: commands exist and run, tables are those of committed files,
and results/demo follows from its rewards."""

import contextlib
import importlib.util
import io
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments/README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {  # what is added to a command, so that the test is short
    "data_prep/demo.py": "--prompts 40 --responses 3 --texts 200 --test-share 0.3",
    "data_prep/continuations.py": "--max-tokens 8",
    "extras/respond.py": "--max-tokens 8",
    "extras/synthetic_judgments.py": "--count 2",
}
STANDS_FOR = {  # what a placeholder of the pages is in the test
    "NAME_OR_DIR": "runs/demo/base",
    "INSTRUCTION_TUNED_MODEL": "runs/demo/base",
    "MODEL_A": "runs/demo/member_01",
    "MODEL_B": "runs/demo/member_02",
    "/tmp/demo": "evaluated",
}
NEEDS_MORE = (  # a hub, a GPU, more than a minute, or packages of benchmarks/requirements.txt
    "multipref",
    "data_prep/prism.py",
    "SmolLM2",
    "ukpconvarg1",
    "ukp_full",
    "writing_full",
    "experiments/",
    "benchmarks/",
    "setup.py",
    "--run runs/margin --base",
    "data_prep/binary.py",
    "runs/regularized",
    "--refit",
)


def commands(page):
    """The commands of a page's indented blocks, each a list of words, without comments."""
    lines = re.findall(r"^    ((?:python|bash) .*)$", page.read_text(encoding="utf-8"), re.M)
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [words for page in PAGES for words in commands(page)]


def load(script):
    """A script as a module."""
    name = "documented_" + re.sub(r"\W", "_", script)
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_of(script):
    """The flags that a script's --help names."""
    text = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(text):
        load(script).parse_args(["--help"])
    assert stopped.value.code == 0
    return set(re.findall(r"--[a-z][a-z-]*", text.getvalue()))


SCRIPTS = sorted(
    {w[1] for w in COMMANDS if w[0] == "python" and w[1] != "setup.py" and "benchmarks" not in w[1]}
)


def test_the_pages_name_every_script():
    text = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data_prep/*.py"), *ROOT.glob("extras/*.py")]:
        assert path.stem in text, path


def flags_of_run_all():
    known = set(re.findall(r"--[a-z][a-z-]*", (ROOT / "run_all.sh").read_text(encoding="utf-8")))
    return known | flags_of("train_rm.py") | flags_of("extras/train_joint.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_exist(script):
    used = {w.split("=")[0] for words in COMMANDS if words[1] == script for w in words[2:]}
    known = flags_of(script) | {"--help"}
    if script == "experiments/real_votes.py":  # It gives others to run_all.sh.
        known |= flags_of_run_all()
    assert {word for word in used if word.startswith("--")} <= known


def test_flags_of_run_all_exist():
    known = flags_of_run_all()
    for words in COMMANDS:
        if words[1].endswith("run_all.sh"):
            assert {w.split("=")[0] for w in words if w.startswith("--")} <= known, words


def test_run_all_takes_every_flag_of_the_data():
    text = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    for path in ROOT.glob("data_prep/*.py"):
        if path.stem not in ("prism", "continuations"):
            own = flags_of(f"data_prep/{path.name}") - {"--help", "--run", "--seed"}
            assert not {flag for flag in own if not re.search(rf"{flag}( |\))", text)}, path


def votes_row(i):
    """A row of somebody's votes."""
    pair = {"response_a": "An apple.", "response_b": "It depends on you."}
    return {"prompt": f"Name a fruit, number {i}."} | pair | {"votes_a": 1 + i % 4, "votes_b": 2}


def test_the_rows_of_the_readme_are_a_file(tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n".join(re.findall(r"^    (\{.*\})$", README, re.M)))
    votes = load("data_prep/votes.py")
    words = ["--run", str(tmp_path / "mine"), "--source", str(tmp_path / "mine.jsonl")]
    votes.main(votes.parse_args(words))
    assert (tmp_path / "mine" / "data" / "train.parquet").exists()


def test_commands_run(tmp_path, monkeypatch):
    """The python commands of README and docs, in order, on a small demo that using.md's make."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    example = re.findall(r"^    (\{.*\})$", README, re.M)
    rows = [*map(json.loads, example), *map(votes_row, range(20))]
    choices = [{"choice": "a"} | row for row in rows]
    questions = [{"prompt": "how can i get fit again ?", "responses": ["walk .", "sleep ."]}]
    for name, lines in {"mine": rows, "choices": choices, "questions": questions}.items():
        if name == "choices":
            lines = [{k: v for k, v in row.items() if not k.startswith("votes")} for row in lines]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))

    header = "prompt_id,response_a,response_b,votes_a,votes_b,gpt4_a,gpt4_b,llama_a,llama_b"
    judged = [f"{i},{i}x,{i}y,{1 + i % 3},1,{i % 5},2,0.{i},0.5" for i in range(40)]
    Path("judged.csv").write_text("\n".join([header, *judged]))
    using = commands(ROOT / "docs/using.md")
    later = [words for page in PAGES[:-1] for words in commands(page) if words not in using]
    ran = 0
    for words in using + later:
        line = " ".join(words)
        if words[0] != "python" or any(name in line for name in NEEDS_MORE):
            continue
        words = [STANDS_FOR.get(word, word) for word in words]
        words += SMALL.get(words[1], "").split()
        if words[1] == "extras/export_member.py":
            make_head_run()
        if words[1] == "extras/compare.py":
            for name in ("a1", "a2", "b1", "b2"):
                shutil.copytree("runs/demo", f"runs/{name}")
        module = load(words[1])
        module.main(module.parse_args(words[2:]))
        ran += 1
    assert ran >= 25
    assert Path("runs/demo/report.html").exists() and Path("scores.jsonl").exists()
    assert Path("runs/head/plurality.json").exists()


def make_head_run():
    """runs/head: one head on the features of the small demo's base."""
    Path("runs/head").mkdir()
    shutil.copytree("runs/demo/data", "runs/head/data")
    flags = "--run runs/head --iteration 1 --base runs/demo/base --train head --epochs 2"
    module = load("train_rm.py")
    module.main(module.parse_args(flags.split()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\(([\w./-]*)(#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor[1:] in slugs, anchor


def test_readme_is_short():
    assert len(README.splitlines()) <= 105 and len(README.split()) <= 1100


def test_table_is_the_reference_run():
    test = json.loads((ROOT / "results/demo/metrics.json").read_text())["splits"]["test"]
    for entry in test["ensemble"]:
        low, high = entry["brier_ci"]
        row = f"| {entry['k']} | {entry['brier']:.4f} | {low:.4f} to {high:.4f} "
        row += f"| {entry['true_error']:.4f} | "
        assert row in README, row
    for name, key, true in [
        ("floor of any single deterministic reward", "floor_single", "floor_true"),
        ("coin flip", "coin_flip", "coin_true"),
        ("single soft model", "soft_single", "soft_true"),
    ]:
        row = f"| {name} | {test[key]:.4f} | | {test[true]:.4f} | |"
        assert row in README, row
    assert f"| irreducible error (estimate) | {test['irreducible']:.4f} | | 0 | |" in README
    less = test["ensemble"][-1]["less"]
    low, high = less["floor_single_ci"]
    words = f"{-less['floor_single']:.4f} below", f"-{-low:.4f} to {high:.4f}, contains zero"
    assert all(text.replace("0.", ".") in " ".join(README.split()) for text in words), words


def test_benchmark_table_is_the_stored_run():
    page = (ROOT / "docs/evaluator.md").read_text()
    parts = json.loads((ROOT / "benchmarks/evaluator.json").read_text())["parts"]
    ours, one = "this repository", "this repository, one thread"
    columns = [ours, one, "numba signs and BLAS", "hyper-corr in numba", "pandas, DataFrame.corr"]
    columns += ["polars-ds", "scipy, a call a pair", "numba brute force", "numpy"]

    def cell(name, row):
        if not row:
            return ""
        ms, times = row["median_ms"], row.get("times_ours")
        text = f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
        if name in (ours, one):
            return text
        return text + (f" ({times:,.0f})" if times >= 10 else f" ({times:.1f})")

    assert f"| | {' | '.join(columns)} |" in page
    for table in (table for part in parts.values() for table in part):
        rows = {row["contender"]: row for row in table["rows"]}
        numpy = [row for name, row in rows.items() if name.startswith("numpy")]
        rows["numpy"] = min(numpy, key=lambda row: row["median_ms"], default=None)
        line = " | ".join(cell(name, rows.get(name)) for name in columns)
        assert f"| {table['title']} | {line} |" in page, line


def test_training_table_is_the_stored_run():
    page = (ROOT / "docs/training.md").read_text()
    tables = json.loads((ROOT / "benchmarks/training.json").read_text())["tables"]
    two, eight = (
        [row for row in table["rows"] if not row["name"].startswith("TRL")] for table in tables
    )
    for a, b in zip(two, eight, strict=True):
        row = f"| {a['name']} | {a['times_trl']:.1f} | {b['times_trl']:.1f} |"
        assert row in page, row


def numbers(value, path=""):
    """{path: number or text} of a nested JSON value."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: value}
    return {k: v for name, part in items for k, v in numbers(part, f"{path}/{name}").items()}


def test_reference_run_is_re_derived(tmp_path):
    evaluate = load("evaluate.py")
    words = ["--run", str(ROOT / "results/demo"), "--out", str(tmp_path)]
    evaluate.main(evaluate.parse_args(words))
    committed = numbers(json.loads((ROOT / "results/demo/metrics.json").read_text()))
    derived = numbers(json.loads((tmp_path / "metrics.json").read_text()))
    assert committed.keys() == derived.keys()
    for path, value in committed.items():
        close = pytest.approx(value, abs=1e-12) if isinstance(value, float) else value
        assert derived[path] == close, path


def test_reference_run_is_small_and_without_weights():
    files = [path for path in (ROOT / "results/demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert not [path for path in files if path.suffix == ".safetensors"]


def test_rewardbench_finds_what_the_page_says():
    """results/rewardbench.json is what tests/elsewhere.sh found."""
    rows = json.loads((ROOT / "results/rewardbench.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs/using.md").read_text(encoding="utf-8").split())
    worst = max(row["largest_difference"] for row in rows)
    large = [row for row in rows if max(-row["lowest"], row["highest"]) > 0.1]
    worst_of_large = max(row["largest_difference"] for row in large)
    words = f"rewards to {math.ceil(1e7 * worst) / 10}e-6 of a member's largest, which is below .1"
    assert words in page and f"to {math.ceil(1e7 * worst_of_large)}e-7 (" in page
    [rewardbench] = {row["rewardbench"] for row in rows}
    versions = sorted({row["transformers"].rsplit(".", 1)[0] for row in rows})
    assert f"RewardBench {rewardbench} with transformers {' and '.join(versions)} on" in page
