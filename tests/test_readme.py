"""What the README says is so: its commands exist, its table is results/demo's, and results/demo is re-derived from its rewards."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    set(re.findall(r"python\s+((?:data_prep/)?\w+\.py)((?:[ \t]+[\w./-]+)*)", README))
)


def test_scripts_and_flags_exist():
    flags = {}
    for script, words in COMMANDS:
        flags.setdefault(script, set()).update(re.findall(r"--[a-z-]+", words))
    assert {
        "train_rm.py",
        "fit_weights.py",
        "evaluate.py",
        "score.py",
        "data_prep/demo.py",
    } <= flags.keys()
    for script, used in flags.items():
        if script == "setup.py":
            continue
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert used - {"--help"} <= set(re.findall(r"--[a-z-]+", done.stdout)), script


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_table_is_the_reference_run():
    test = json.loads((ROOT / "results/demo/metrics.json").read_text())["splits"]["test"]
    for entry in test["ensemble"]:
        low, high = entry["brier_ci"]
        row = f"| {entry['k']} | {entry['brier']:.4f} | {low:.4f} to {high:.4f} | {entry['true_error']:.4f} |"
        assert row in README, row
    for name, key, true in [
        ("floor of any single deterministic reward", "floor_single", "floor_true"),
        ("coin flip", "coin_flip", "coin_true"),
        ("single soft model", "soft_single", "soft_true"),
    ]:
        row = f"| {name} | {test[key]:.4f} | | {test[true]:.4f} |"
        assert row in README, row
    assert f"| irreducible error (estimate) | {test['irreducible']:.4f} | | 0 |" in README


def test_benchmark_table_is_the_stored_run():
    parts = json.loads((ROOT / "benchmarks/evaluator.json").read_text())["parts"]
    tables = [table for part in parts.values() for table in part]
    ours, one = "this repository", "this repository, one thread"
    columns = [
        ours,
        one,
        "hyper-corr in numba",
        "pandas, DataFrame.corr",
        "scipy, a call a pair",
        "numba brute force",
        "numpy",
    ]
    form = lambda ms: f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"  # noqa: E731
    times = lambda x: f"{x:,.0f}" if x >= 10 else f"{x:.1f}"  # noqa: E731
    assert f"| | {' | '.join(columns)} |" in README
    for table in tables:
        rows = {row["contender"]: row for row in table["rows"]}
        rows["numpy"] = min(
            (row for name, row in rows.items() if name.startswith("numpy")),
            key=lambda row: row["median_ms"],
            default=None,
        )
        cells = [
            ""
            if not rows.get(name)
            else form(rows[name]["median_ms"])
            + (f" ({times(rows[name]['times_ours'])})" if name not in (ours, one) else "")
            for name in columns
        ]
        assert f"| {table['title']} | {' | '.join(cells)} |" in README, (
            f"| {table['title']} | {' | '.join(cells)} |"
        )


def test_training_table_is_the_stored_run():
    tables = json.loads((ROOT / "benchmarks/training.json").read_text())["tables"]
    two, eight = (
        [row for row in table["rows"] if not row["name"].startswith("TRL")] for table in tables
    )
    for a, b in zip(two, eight, strict=True):
        assert f"| {a['name']} | {a['times_trl']:.1f} | {b['times_trl']:.1f} |" in README, a["name"]


def numbers(value, path=""):
    """{path: number or text} of a nested JSON value."""
    if isinstance(value, dict):
        return {
            k: v for name, part in value.items() for k, v in numbers(part, f"{path}/{name}").items()
        }
    if isinstance(value, list):
        return {
            k: v
            for index, part in enumerate(value)
            for k, v in numbers(part, f"{path}/{index}").items()
        }
    return {path: value}


def test_reference_run_is_re_derived(tmp_path):
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--run", "results/demo", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    committed = numbers(json.loads((ROOT / "results/demo/metrics.json").read_text()))
    derived = numbers(json.loads((tmp_path / "metrics.json").read_text()))
    assert committed.keys() == derived.keys()
    for path, value in committed.items():
        assert derived[path] == (
            pytest.approx(value, abs=1e-12) if isinstance(value, float) else value
        ), path


def test_reference_run_is_small_and_without_weights():
    files = [path for path in (ROOT / "results/demo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert not [path for path in files if path.suffix == ".safetensors"]
