"""experiments/collect.py, fewer_prompts.py and steps.py, and that tables of docs/ are those of
committed files."""

import csv
import json
import shutil

import evaluate
from pairwise import cli, data, run_dir, training

import collect
import fewer_prompts
import numpy as np
import pytest
import steps
from conftest import FULL, REPOSITORY, committed

PAGE = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())  # wherever its lines end


def committed_splits(name):
    lines = (REPOSITORY / "results" / f"{name}_splits.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]


# ---- the scripts


def test_a_row_is_a_run_and_a_number_of_members(full_run, tmp_path, no_figures, capsys):
    runs = [shutil.copytree(full_run, tmp_path / name, symlinks=True) for name in ("a_0", "a_1")]
    for run in runs:
        evaluate.main(evaluate.parse_args(["--run", str(run), "--resamples", "10"]))
    out = tmp_path / "out.csv"
    capsys.readouterr()
    collect.main(collect.parse_args(["--runs", *map(str, runs), "--out", str(out)]))
    with open(out, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["k"]) for row in rows] == [
        (name, k) for name in ("a_0", "a_1") for k in ("1", "2")
    ]
    test = run_dir.read_metrics(runs[0])["splits"]["test"]
    for row, entry in zip(rows, test["ensemble"]):
        assert row["made_by"] == "member" and row["train"] == "full" and row["layout"] == ""
        for name in ("brier", "l1_soft", "pearson"):
            assert float(row[name]) == pytest.approx(entry[name], rel=1e-5), name
        assert row["brier_high"] == ""  # Three test prompts have no interval.
        for name in collect.REFERENCES:
            expected = np.nan if test[name] is None else test[name]
            assert float(row[name] or "nan") == pytest.approx(expected, rel=1e-5, nan_ok=True)
    # Their names differ in the number alone: one line of two runs, for each k.
    assert capsys.readouterr().out.count(": 2 runs, Brier score") == 2
    lines = (tmp_path / "out_splits.jsonl").read_text().splitlines()
    assert [json.loads(line)["runs"] for line in lines] == [["a_0", "a_1"]]
    words = ["--runs", *map(str, runs), "--out", str(tmp_path / "some.csv"), "--k"]
    collect.main(collect.parse_args([*words, "2", "8"]))
    with open(tmp_path / "some.csv", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows[1::2]
    with pytest.raises(cli.InputError, match="a_0: fewer members found than --k 3"):
        collect.main(collect.parse_args([*words, "3", "8"]))
    ids = json.loads(lines[0])["test"]
    assert len(ids) == test["prompts"] and len(set(ids)) == len(ids)


def test_fewer_prompts(full_run, tmp_path, no_figures):
    """The same validation and test files, fewer train prompts, and those of a share in a larger."""
    source, _ = data.read_splits(full_run)
    kept = {}
    for share in ("0.3", "0.6"):
        words = ["--of", str(full_run), "--run", str(tmp_path / share), "--share", share]
        fewer_prompts.main(fewer_prompts.parse_args(words))
        splits, stats = data.read_splits(tmp_path / share)
        assert stats["train_share"] == float(share)
        kept[share] = splits["train"].prompt_id
        assert len(kept[share]) == round(float(share) * len(source["train"].prompt_id))
        for name in source:
            made, given = (run / "data" / f"{name}.parquet" for run in (tmp_path / share, full_run))
            assert (made.read_bytes() == given.read_bytes()) == (name != "train"), name
        places = [source["train"].prompt_id.index(name) for name in splits["train"].prompt_id]
        assert places == sorted(places)
    assert set(kept["0.3"]) < set(kept["0.6"]) < set(source["train"].prompt_id)
    with pytest.raises(cli.InputError, match="share was 0.6, is 0.3"):
        words = ["--of", str(full_run), "--run", str(tmp_path / "0.6"), "--share", "0.3"]
        fewer_prompts.main(fewer_prompts.parse_args(words))
    assert fewer_prompts.drawn(18, 0.01, 0).shape == (1,)
    assert "no_prompts" in fewer_prompts.KEPT  # Without it a run of ids could be trained on.
    for wrong in ("0", "1", "nan", "a quarter"):
        with pytest.raises(SystemExit):
            fewer_prompts.parse_args(["--of", "a", "--run", "b", "--share", wrong])


def test_steps_of_all_kinds(full_run, base, tmp_path, no_figures, monkeypatch):
    """The same training but for the kind: so many rows, and the kinds differ."""
    for name in ("steps_of_prompts", "steps_of_pairs"):  # put back afterwards
        monkeypatch.setattr(training, name, getattr(training, name))
    words = ["--run", str(full_run), "--base", str(base), "--out", str(tmp_path / "out.csv"), *FULL]
    words += ["--k", "1", "--seeds", "0", "--threads", "1", "--kinds", *steps.KINDS]
    steps.main(steps.parse_args(words))
    with open(tmp_path / "out.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == [*steps.KINDS]
    assert len({row["brier_soft"] for row in rows}) == len(steps.KINDS), rows


# ---- the tables


def short(number, digits=4, sign=""):
    return f"{number:{sign}.{digits}f}".replace("0.", ".")


def with_error(values, sign=""):
    """The mean and its standard error."""
    error = short(values.std(ddof=1) / len(values) ** 0.5)
    return f"{short(values.mean(), sign=sign)} ± {error}"


def span(values):
    return f"{short(values.min())} to {short(values.max())}"


def column(rows, name, **where):
    """The column of the rows that have these values, float64."""
    chosen = [row for row in rows if all(row[key] == value for key, value in where.items())]
    return np.array([float(row[name]) for row in chosen])


@pytest.mark.parametrize("name", ["steps_demo", "steps_ukpconvarg1"])
def test_table_of_steps(name):
    rows = committed(f"{name}.csv")
    for k in ("1", "2") if name == "steps_demo" else ("1", "2", "3", "4"):
        whole, pairs = (column(rows, "brier", k=k, steps=kind) for kind in ("prompts", "pairs"))
        less = with_error(whole - pairs, "+")
        cells = f"{short(whole.mean())} | {short(pairs.mean())} | {less}"
        assert f"k = {k} | {cells} |" in PAGE, (k, cells)


def test_tables_of_the_demo():
    front = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = committed("demo_seeds.csv")
    fsam = [row for row in rows if row["run"].rstrip("0123456789") == "fsam_"]
    sizes = ("1", "2", "3", "4", "8")
    brier = [column(fsam, "brier", k=k) for k in sizes]
    references = {
        name: column(fsam, name, k="1") for name in ("coin_flip", "floor_single", "soft_single")
    }
    coin, floor, soft = references.values()
    below = {
        f"below the coin flip (mean {short(coin.mean())})": coin,
        f"below the floor of any single deterministic reward (mean {short(floor.mean())})": floor,
        f"below the single soft model (mean {short(soft.mean())})": soft,
    }
    lines = {
        "Brier score, mean": [short(x.mean()) for x in brier],
        "its range": [span(x) for x in brier],
        "error against the truth, mean": [
            short(column(fsam, "true_error", k=k).mean()) for k in sizes
        ],
    }
    lines |= {
        name: [f"{(x < reference).sum()} of {len(x)}" for x in brier]
        for name, reference in below.items()
    }
    for name, cells in lines.items():
        assert f"| {name} | {' | '.join(cells)} |" in PAGE, (name, cells)
    assert all(f" | {span(x)} |" in front for x in brier[:4])
    for name, kind in [
        ("FSAM", "fsam"),
        ("joint", "joint"),
        ("joint, `--sharpen 4`", "joint4"),
        ("FSAM, hardened", "fsam_hard"),
        ("joint, `--sharpen 4`, hardened", "joint4_hard"),
    ]:
        of_kind = [row for row in rows if row["run"].rstrip("0123456789") == f"{kind}_"]
        x, true = (column(of_kind, figure, k="8") for figure in ("brier", "true_error"))
        assert len(x) == 10
        cells = f"{short(x.mean())} | {span(x)} | {short(true.mean())}"
        assert f"| {name} | {cells} |" in PAGE, (name, cells)


def test_table_of_targets():
    """Beside the runs of the same seeds with `centered`, and paired with them."""
    made = committed("demo_targets.csv")
    seeds = sorted({row["data_seed"] for row in made})
    rows = [row for row in committed("demo_seeds.csv") if row["run"].startswith("fsam_")]
    rows = [row for row in rows if row["made_by"] == "member" and row["data_seed"] in seeds]
    for target in ("residual", "centered", "mixture", "p"):
        of_target = [row for row in rows + made if row["target"] == target]
        assert [row["data_seed"] for row in of_target if row["k"] == "8"] == seeds
        brier = [column(of_target, "brier", k=k) for k in ("1", "2", "3", "4", "8")]
        less = brier[-1] - column(rows, "brier", k="8")
        cells = [short(x.mean()) for x in brier]
        cells.append(short(column(of_target, "true_error", k="8").mean()))
        if target == "centered":
            cells.append("")
        else:
            cells.append(with_error(less, "+"))
        assert f"| `{target}` | {' | '.join(cells)} |".replace("|  |", "| |") in PAGE, cells
    for target, sign, ks, words in (
        ("residual", 1, "24", "({} with two, {} with four)"),
        ("mixture", -1, "28", "below `centered` by {} with two, {} with eight."),
    ):
        of_target, cells = [row for row in made if row["target"] == target], []
        for k in ks:
            less = sign * (column(of_target, "brier", k=k) - column(rows, "brier", k=k))
            cells.append(with_error(less))
        assert words.format(*cells) in TEXT, cells


def test_table_of_batches_and_rates():
    """At k = 4, of the first three seeds; 64 pairs and 3e-3 are the demo's own."""
    made = committed("demo_batches.csv") + committed("demo_seeds.csv")
    made = [row for row in made if row["made_by"] == "member" and row["k"] == "4"]
    made = [row for row in made if row["data_seed"] in ("0", "1", "2")]
    on_valid = {"64": [], "512": []}
    for pairs in on_valid:
        cells = []
        for lr in ("0.0015", "0.003", "0.0075"):
            x = column(made, "brier", pairs_per_step=pairs, lr=lr)
            valid = column(made, "brier_valid", pairs_per_step=pairs, lr=lr)
            assert len(x) == 3
            cells.append(short(x.mean()))
            on_valid[pairs].append(valid.mean())
        [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {pairs} (")]
        assert line.endswith(f"| {' | '.join(cells)} |"), (line, cells)
    for means in on_valid.values():
        assert f"({short(min(means))} to {short(max(means))})" in PAGE


def test_what_is_said_of_the_optimizer():
    rows = committed("optimizer_demo.csv")
    page = " ".join((REPOSITORY / "docs/training.md").read_text(encoding="utf-8").split())
    five, ten, tf32 = (
        ", ".join(short(x) for x in column(rows, "brier", k="2", steps=kind))
        for kind in ("prompts", "frequency_10", "tf32")
    )
    assert f"k = 2 of {ten} with 10, {five} with 5" in page and f"gave {tf32}, no" in page


def test_table_of_sharpness():
    page = (REPOSITORY / "experiments/README.md").read_text(encoding="utf-8")
    rows = committed("joint_sharpen.csv")
    full = [row for row in rows if row["train"] == "full" and row["epochs"] == "1"]
    for s in ("4", "16", "64", "256", "1024", "4096"):
        figures = ("brier_valid", "brier", "brier_soft")
        found = [column(full, name, sharpen=s) for name in figures]
        assert len(found[0]) == 3
        assert f"| {s} | {' | '.join(short(x.mean()) for x in found)} |" in page
    twice = [column(rows, "brier", epochs="2", sharpen=s).item() for s in ("4", "16", "64")]
    twice = [short(x, 3) for x in twice]
    assert "seed 0: {} with 4, {} with 16, {} with 64".format(*twice) in page
    on_heads = [column(rows, "brier_valid", train="head", sharpen=s) for s in ("64", "4", "4096")]
    (a, b), (c, d) = ([short(x, 3) for x in values] for values in zip(*on_heads[:2]))
    assert f"({a} for {b}, {c} for {d}; two seeds)" in page and (on_heads[2] > on_heads[0]).all()


def trained(rows, loss):
    """The rows of single members of a loss."""
    rows = [row for row in rows if row["made_by"] == "member" and row["loss"] == loss]
    return [row for row in rows if row["k"] == "1"]


def rows_on_real_votes(name):
    """{row of the table: cell} of a file of runs with a frozen base."""
    rows = committed(name)
    first, hard = trained(rows, "mse"), [row for row in rows if row["made_by"] == "harden"]
    cells = {f"ensemble, k = {k}": column(rows, "brier", k=k, loss="mse") for k in "124"}
    cells |= {"hardened, k = 8": column(hard, "brier")}
    cells |= {
        words: column(first, figure)
        for words, figure in [
            ("single soft model", "soft_single"),
            ("coin flip", "coin_flip"),
            ("floor of any single deterministic reward", "floor_single"),
            ("floor - C_hat", "floor_excess"),
            ("irreducible error (estimate)", "irreducible"),
        ]
    }
    cells = {words: short(values.mean()) for words, values in cells.items()}
    runs = [row for row in committed("plurality.csv") if row["run"] in {x["run"] for x in first}]
    assert {row["components"] for row in runs} == {"1"}  # By validation prompts none is chosen.
    gain, low = column(runs, "several_gain"), column(runs, "several_gain_low")
    assert f" {with_error(gain, '+')} " in TEXT.replace("(", " ")
    above = f"above 0 in {(low > 0).sum()} of {len(low)}"
    words = "gain of the best mixture of several rewards"
    return cells | {words: f"{short(gain.mean(), sign='+')}, {above}"}


def rows_by_loss(name):
    """{loss: cells}: Brier score, the same scaled, L1, r of all test pairs; then the Brier score by
    agreement of the votes."""
    rows, cells = committed(name), {}
    levels = ("unanimous", "at least 3/4", "above 1/2", "even")
    figures = ["brier_soft", "soft_scaled", "l1_soft", "pearson_soft"]
    figures += [f"brier_soft_1 {level}" for level in levels]
    for loss in ("mse", "bce", "bt", "margin"):
        members = trained(rows, loss)
        cells[loss] = [
            short(column(members, figure).mean()) if figure in rows[0] else "" for figure in figures
        ]
    return cells


SETS = ("ukpconvarg1_head", "ukpconvarg1_gemma_head", "writing_head", "writing_gemma_head")


@pytest.mark.parametrize("at, name", [*enumerate(SETS)])
def test_table_of_real_votes(at, name):
    for words, cell in rows_on_real_votes(f"{name}.csv").items():
        [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {words} |")][-1:]
        assert line.strip("| ").split(" | ")[1 + at] == cell, (line, cell)


@pytest.mark.parametrize("name", ["ukpconvarg1", "writing"])
def test_two_bases_on_real_votes(name):
    """What is said of their difference is of the same splits."""
    split = ("valid", "test")
    bases = (f"{name}_head", f"{name}_gemma_head")
    of_base = [[[line[x] for x in split] for line in committed_splits(base)] for base in bases]
    assert of_base[0] == of_base[1]
    small, gemma = (committed(f"{base}.csv") for base in bases)
    members = [[row for row in rows if row["made_by"] == "member"] for rows in (small, gemma)]
    soft = [column(rows, "soft_single", loss="mse", k="1") for rows in members]
    less = soft[1] - soft[0]
    words = f"{with_error(less)} worse on" if less.mean() > 0 else f"{with_error(-less)} better on"
    assert words in TEXT
    for made, rows, found in zip((small, gemma), members, soft):
        assert with_error(column(made, "brier", made_by="harden") - found) in TEXT
        coin = column(rows, "coin_flip", loss="mse", k="4")
        two, four = (column(rows, "brier", loss="mse", k=k) - coin for k in ("2", "4"))
        if name == "writing":
            count = ("no", "one", "two", "three", "four", "five")[(four < 0).sum()]
            assert f"({with_error(four)}, in {count} of five)" in TEXT
        else:
            assert (four < 0).all() and (two < 0).all()


def by_split(rows, figure, run, k):
    """The figure of the runs RUN_0, RUN_1, .. at k, by data seed, float64 (splits,)."""
    chosen = [row for row in rows if row["run"].rstrip("0123456789") == f"{run}_" and row["k"] == k]
    return np.array([float(row[figure]) for row in sorted(chosen, key=lambda x: x["data_seed"])])


@pytest.mark.parametrize("name, at", [("ukp", 0), ("writing", 3)])
def test_table_of_all_parameters(name, at):
    """Beside the frozen base on the same three splits, and paired with it; three cells a set."""
    files = {"ukp": "ukpconvarg1_{}.csv", "writing": "writing_{}.csv"}
    full, head = (committed(files[name].format(kind)) for kind in ("full", "head"))
    lines = {f"FSAM, k = {k}": ("brier", "centered", "mse", k) for k in ("1", "2", "3", "4")}
    lines["`centered`, hardened, k = 8"] = ("brier", "hard", "hard", "8")
    for loss, run in (("mse", "centered"), ("bce", "bce")):
        lines[f"single soft model, `{loss}`"] = ("soft_single", run, loss, "1")
        lines[f"scaled, `{loss}`"] = ("soft_scaled", run, loss, "1")
    start = PAGE.index("| Brier score, test, mean of three splits | ")
    table = PAGE[start : PAGE.index("\n\n", start)].splitlines()
    assert len(table) == 2 + len(lines)
    for words, (figure, run, loss, k) in lines.items():
        x = by_split(full, figure, f"{name}_full_{run}", k)
        y = by_split(head, figure, f"{name}_{loss}", k)[:3]
        assert len(x) == 3
        cells = [short(x.mean()), short(y.mean()), with_error(x - y, "+")]
        [line] = [line for line in table if line.startswith(f"| {words} | ")]
        assert [cell.strip() for cell in line.split("|")][2 + at : 5 + at] == cells, (words, cells)


def test_all_parameters_on_the_front_page():
    front = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for name, run, words in (
        ("ukpconvarg1", "ukp", "UKPConvArg1"),
        ("writing", "writing", "writing: professional writers' rankings"),
    ):
        rows = committed(f"{name}_full.csv")
        figures = ("brier", "coin_flip", "soft_single", "floor_single")
        means = [by_split(rows, figure, f"{run}_full_centered", "4").mean() for figure in figures]
        assert f"| {words} | {' | '.join(map(short, means))} |" in front


def test_rates_of_gemma_on_writing():
    """Its first split is that of the frozen base."""
    every = committed("writing_gemma_full.csv")
    rows = [row for row in every if row["k"] == "1"]
    assert [float(row["lr"]) for row in rows] == [1e-4, 3e-4, 1e-3]
    valid, test = (
        [float(row[name]) for row in rows] for name in ("soft_single_valid", "soft_single")
    )
    head = column(
        committed("writing_gemma_head.csv"), "soft_single", run="writing_gemma_mse_0", k="1"
    )
    cells = ["{}, {} and {}".format(*map(short, figures)) for figures in (valid, test)]
    words = f"first has {cells[0]} on the 18 validation prompts, {cells[1]} on test prompts, where"
    assert f"{words} the frozen base has {short(head.item())}." in TEXT
    chosen = valid.index(min(valid))
    assert f"choose is {short(test[chosen] - test[chosen - 1])} worse on test prompts" in TEXT
    four = [row for row in every if row["lr"] == rows[chosen]["lr"]]
    assert [row["k"] for row in four] == [*"1234"]
    names = "brier_valid", "brier"
    cells = ["{}, {}, {} and {}".format(*(short(float(x[n])) for x in four)) for n in names]
    assert f"{cells[0]} on validation prompts, {cells[1]} on test prompts" in TEXT
    above = short(float(four[3]["brier"]) - float(four[3]["coin_flip"]))
    frozen = column(committed("writing_gemma_head.csv"), "brier", run="writing_gemma_mse_0", k="4")
    words = f"({above} above it [-.0240, +.0534]), and above four of the frozen base"
    assert f"{words} ({short(frozen.item())})." in TEXT
    [split] = committed_splits("writing_gemma_full")
    first = committed_splits("writing_gemma_head")[0]
    assert (split["valid"], split["test"]) == (first["valid"], first["test"])


def test_eight_members_on_ukpconvarg1():
    """On the first split, beside the run of four."""
    eight = committed("ukpconvarg1_eight.csv")
    brier = [float(row["brier"]) for row in eight]
    assert [row["k"] for row in eight] == [*"12345678"] and sorted(brier, reverse=True) == brier
    four = [x for x in committed("ukpconvarg1_full.csv") if x["run"] == "ukp_full_centered_0"]
    *listed, last = map(short, brier[:4])
    *before, end = (short(float(row["brier"])) for row in four)
    words = f"have {', '.join(listed)} and {last}, those of the table below "
    assert f"{words}{', '.join(before)} and {end}." in TEXT
    *listed, last = map(short, brier[4:])
    assert f"Five to eight have {', '.join(listed)} and {last}." in TEXT
    soft, coin = (float(eight[0][name]) for name in ("soft_single", "coin_flip"))
    words = (
        "bring {} [.0028, .0079]; eight are {} [.0319, .0776] below the coin flip and still {} ["
    )
    less = [short(x) for x in (brier[3] - brier[7], coin - brier[7], brier[7] - soft)]
    assert words.format(*less) in TEXT
    splits = (committed_splits(f"ukpconvarg1_{name}")[0] for name in ("eight", "full"))
    assert len({json.dumps([split["valid"], split["test"]]) for split in splits}) == 1


def test_rounding_on_ukpconvarg1():
    """The run of eight members again, with other kernels and in another order."""
    rows, eight = committed("ukpconvarg1_rounding.csv"), committed("ukpconvarg1_eight.csv")
    avx2, micro = (
        [row for row in rows if row["run"] == f"ukp_{name}_0"] for name in ("avx2", "micro2048")
    )
    test, valid = ([short(float(row[x])) for row in avx2] for x in ("brier", "brier_valid"))
    before = [short(float(row["brier_valid"])) for row in eight[:2]]
    words = "have {} and {}, on validation prompts {} and {} in place of {} and {}."
    assert words.format(*test, *valid, *before) in TEXT
    *listed, last = (short(float(row["brier"])) for row in micro)
    assert f"give {', '.join(listed)} and {last} (" in TEXT
    splits = (committed_splits(f"ukpconvarg1_{name}")[0] for name in ("eight", "rounding"))
    assert len({json.dumps([split["valid"], split["test"]]) for split in splits}) == 1


def test_eight_members_on_writing():
    """On the second split."""
    eight = [
        row for row in committed("writing_full.csv") if row["run"] == "writing_full_centered_1"
    ]
    brier = [float(row["brier"]) for row in eight]
    assert [row["k"] for row in eight] == [*"12345678"]
    assert f"five to eight {', '.join(map(short, brier[4:]))})" in TEXT
    soft, coin = (float(eight[0][name]) for name in ("soft_single", "coin_flip"))
    less = [short(x) for x in (brier[3] - brier[7], coin - brier[7], brier[7] - soft)]
    words = "bring eight {} [-.0053, +.0345] below four and {} [-.0106, +.0555] below the coin flip"
    assert words.format(*less) in TEXT and f"leave them {less[2]} [" in TEXT


def test_learning_rate_on_writing():
    """Chosen on the validation prompts of the first split."""
    rows = [row for row in committed("writing_full.csv") if row["data_seed"] == "0"]
    rates = {row["lr"]: float(row["soft_single_valid"]) for row in trained(rows, "mse")}
    assert len(rates) == 3 and min(rates, key=rates.get) == "0.0003"
    names = (("1e-4", "0.0001"), ("3e-4", "0.0003"), ("1e-3", "0.001"))
    valid = ", ".join(f"{name} {short(rates[lr])}" for name, lr in names)
    assert f"(soft: {valid})" in TEXT, valid


def test_table_of_targets_on_real_votes():
    """Of one split; the learning rate was chosen on its validation prompts."""
    rows = committed("ukpconvarg1_full.csv")
    head = [row for row in committed("ukpconvarg1_head.csv") if row["run"] == "ukp_mse_0"]
    runs = [f"ukp_full_{target}_0" for target in ("residual", "centered", "mixture")]
    fsam = [[row for row in rows if row["run"] == run] for run in runs] + [head]
    for k in ("1", "2", "3", "4"):
        cells = (short(column(x, "brier", k=k).item()) for x in fsam)
        assert f"| FSAM, k = {k} | {' | '.join(cells)} |" in PAGE
    of_seed = [row for row in trained(rows, "mse") if row["data_seed"] == "0"]
    rates = {row["lr"]: float(row["soft_single_valid"]) for row in of_seed}
    assert min(rates, key=rates.get) == "0.001" and len(rates) == 3


def test_table_of_fewer_votes():
    rows, figures = committed("fewer_votes.csv"), {}
    for title, name, seeds in (
        ("UKPConvArg1, frozen base, mean of five splits", "ukp_{}_", "01234"),
        ("UKPConvArg1, frozen base, mean of three", "ukp_{}_", "012"),
        ("UKPConvArg1, adapters, mean of three", "ukp_lora_{}_", "012"),
        ("UKPConvArg1, all parameters, mean of three", "ukp_full_{}_", "012"),
        ("writing, frozen base, mean of five splits", "writing_{}_", "01234"),
        ("writing, frozen base, the first split", "writing_{}_", "0"),
        ("writing, adapters, the first split", "writing_lora_{}_", "0"),
        ("writing, all parameters, the first split", "writing_full_{}_", "0"),
    ):
        whole = "centered" if "full" in name else "all" if "lora" in name else "mse"
        for share, word in (("0.25", "quarter"), ("0.5", "half"), ("", whole)):
            runs = [name.format(word) + seed for seed in seeds]
            found = [row for row in rows if row["run"] in runs]
            assert [row["run"] for row in found] == runs
            assert {row["train_share"] for row in found} == {share}
            figures.setdefault(title, []).append(column(found, "soft_single"))
        cells = " | ".join(short(x.mean()) for x in figures[title])
        assert f"| {title} | {cells} |" in PAGE, cells
    for kind, words in (
        ("all parameters", "are {} with a quarter of the prompts, {} with half, {} with all;"),
        ("adapters", "adapters {}, {}, {}."),
    ):
        both = (figures[f"UKPConvArg1, {of}, mean of three"] for of in (kind, "frozen base"))
        cells = [with_error(x - frozen, "+") for x, frozen in zip(*both)]
        assert words.format(*cells) in TEXT, cells
    valid = {row["run"]: short(float(row["soft_single_valid"])) for row in rows if row["train"]}
    runs = ("ukp_lora_lr1e-3_0", "ukp_lora_all_0", "ukp_lora_lr1e-2_0")
    words = "(UKPConvArg1, soft: 1e-3 {}, 3e-3 {}, 1e-2 {};".format(*(valid[run] for run in runs))
    assert words in TEXT and valid[runs[1]] == min(valid[run] for run in runs)
    runs = ("writing_lora_lr1e-3_0", "writing_lora_all_0", "writing_lora_lr1e-2_0")
    words = "writing: 1e-3 {}, 3e-3 {}, 1e-2 {}).".format(*(valid[run] for run in runs))
    assert words in TEXT and valid[runs[1]] == min(valid[run] for run in runs)
    of_writing = [np.concatenate(figures[title]) for title in figures if "the first split" in title]
    half, whole = (np.ptp(x) for x in np.transpose(of_writing)[1:3])
    assert f"within {short(half)} of each other with half and {short(whole)} with all" in TEXT


@pytest.mark.parametrize(
    "name, title",
    [
        ("ukpconvarg1_head.csv", "UKPConvArg1"),
        ("writing_head.csv", "writing"),
        ("demo_losses.csv", "demo"),
    ],
)
def test_table_of_losses(name, title):
    for loss, cells in rows_by_loss(name).items():
        line = f"| {title}, `{loss}` | {' | '.join(cells)} |".replace("|  |", "| |")
        assert line in PAGE, line


def test_prompts_of_the_splits():
    """Of the reference run those of its seed; none is in two splits, and each is in one fold."""
    split = data.read_split(REPOSITORY / "results/demo", "test")
    seeds = committed_splits("demo_seeds")
    assert seeds[0]["runs"][0] == "fsam_0" and seeds[0]["test"] == [*map(str, split.prompt_id)]
    assert len(seeds) == 10 and all(len(line["runs"]) == 5 for line in seeds)
    for path in (REPOSITORY / "results").glob("*_splits.jsonl"):
        for line in committed_splits(path.name.removesuffix("_splits.jsonl")):
            ids = line["valid"] + line["test"]
            assert ids and len(set(ids)) == len(ids), path
    folds = [set(line["test"]) for line in committed_splits("variants_ukpconvarg1")]
    assert len(set.union(*folds)) == sum(map(len, folds)) == 32
