"""`compare`: each number is in its row and column, and runs that cannot be compared are marked or refused."""

import copy
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from pipeline.commands import compare
from pipeline.reporting import series
from pipeline.runtime import checksums
from pipeline.runtime.errors import UserError
from pipeline.settings import reader, schema
from pipeline.stages import siblings
from tests.reporting.report_files import Page, make_results
from tests.reporting.test_report import HOSTILE, PLAIN


def write_run(folder: Path, *settings: str, results: dict | None = None, model: str | None = "some/model") -> dict:
    """Writes the parts of a run that `compare` reads, with distinct numbers; returns its results."""
    recipe = reader.load(["recipe=tiny", "stages=[prune,finetune,evaluate,report]", "model=some/model", *settings])
    recipe.model = model
    evaluate = folder / "evaluate"
    evaluate.mkdir(parents=True)
    results = results or make_results(*PLAIN)
    for name in PLAIN[1:]:
        results["models"][name]["perplexity"]["wikitext2"] += len(list(folder.parent.glob("*"))) / 10
    checksums.write(evaluate, {"recipe": schema.plain(recipe)})
    (evaluate / "results.json").write_text(json.dumps(results))
    return results


def rows(out: Path) -> list[list[str]]:
    """The cells of the Markdown table by row."""
    lines = (out / "compare.md").read_text().splitlines()
    return [[cell.strip(" *") for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]


def compared(*folders: Path) -> list[list[str]]:
    compare.main([*map(str, folders), f"out={folders[0].parent}/out"])
    return rows(folders[0].parent / "out")


def test_each_number_is_in_its_row_and_column(tmp_path, capsys):
    methods, patterns = ("magnitude", "wanda"), ("0.5", "2of4", "4:8")
    expected = {
        (method, pattern): write_run(
            tmp_path / f"{method}{pattern[:1]}", f"prune.method={method}", f'prune.sparsity="{pattern}"'
        )
        for method in methods
        for pattern in patterns
    }
    compare.main([str(tmp_path)])
    table = rows(tmp_path)
    assert table[0] == ["", "0.5", "2:4", "4:8"]
    start = next(place for place, row in enumerate(table) if row[0].startswith("wikitext2 perplexity"))
    assert [row[0] for row in table[start + 1 : start + 6]] == [
        *("dense", "magnitude", "magnitude + LoRA", "Wanda", "Wanda + LoRA")
    ]
    output = capsys.readouterr().out
    page = Page((tmp_path / "compare.html").read_text()).text
    for place, method in enumerate(methods):
        for column, pattern in enumerate(patterns, 1):
            for line, model in ((1, "dense"), (2 + 2 * place, "pruned"), (3 + 2 * place, "finetuned")):
                value = expected[method, pattern]["models"][model]["perplexity"]["wikitext2"]
                cell = table[start + line][column]
                assert cell.startswith(f"{value:.2f} ± ")
                assert cell in output and cell in page
    (mean,) = (row for row in table if row[0].startswith("mean accuracy"))
    assert table[table.index(mean) + 1][1].startswith("65.9 ±")
    assert "Mean accuracy of arc_easy, boolq." in page
    Page((tmp_path / "compare.svg").read_text())


def test_rows_show_the_settings_that_differ(tmp_path):
    write_run(tmp_path / "a", "finetune.lr=0.001")
    write_run(tmp_path / "b", "finetune.lr=0.002")
    labels = [row[0] for row in compared(tmp_path / "a", tmp_path / "b")]
    assert labels.count("dense") == 3  # of two data sets and the accuracy
    assert labels.count("Wanda") == 3  # pruned alike
    assert "Wanda + LoRA (finetune.lr=0.001)" in labels and "Wanda + LoRA (finetune.lr=0.002)" in labels


def test_files_with_the_same_label_have_rows_of_their_own(tmp_path):
    """They were taken for runs of equal settings, of which only the first was shown."""
    bases = {"prune.refine": "refinements import Refinement", "prune.allocation": "allocation import Allocation"}
    for place in ("a", "b"):
        settings = ["prune.sparsity=0.5"]
        for key, base in bases.items():
            path = tmp_path / place / f"{key}_{place}.py"
            path.parent.mkdir(exist_ok=True)
            name = base.split()[-1]
            path.write_text(f"from pipeline.pruning.{base}\nclass Mine({name}):\n    label = 'swaps'\n")
            settings.append(f"{key}={path}")
        results = make_results(*PLAIN) | {"methods": {key: {"label": "swaps"} for key in bases}}
        write_run(tmp_path / "runs" / place, *settings, results=results)
    write_run(tmp_path / "runs/c", "prune.sparsity=0.5", "prune.refine=swaps")
    labels = {row[0] for row in compared(*(tmp_path / "runs" / place for place in "abc"))}
    for place in ("a", "b"):
        files = (f"{key}={tmp_path / place / f'{key}_{place}.py'}" for key in bases)
        assert f"Wanda + swaps ({', '.join(files)})" in labels
    assert "Wanda + swaps (prune.refine=swaps, prune.allocation=uniform)" in labels


def test_each_model_has_its_own_rows(tmp_path):
    write_run(tmp_path / "a", model="./models/small")
    write_run(tmp_path / "b", model="org/large")
    labels = [row[0] for row in compared(tmp_path / "a", tmp_path / "b")]
    assert "small, wikitext2 perplexity (lower is better)" in labels
    assert "org/large, wikitext2 perplexity (lower is better)" in labels
    assert labels.count("dense") == 6


@pytest.mark.slow
def test_models_of_the_same_short_name_keep_their_rows(tmp_path):
    for name in ("a", "b"):
        results = make_results(*PLAIN)
        results["models"]["dense"]["hash"] = name
        write_run(tmp_path / name, results=results, model=f"/{name}/model")
    labels = [row[0] for row in compared(tmp_path / "a", tmp_path / "b")]
    assert labels.count("dense") == labels.count("Wanda") == 6
    assert "/b/model, wikitext2 perplexity (lower is better)" in labels


def test_rows_show_the_settings_of_permute_and_the_seed_of_a_model_trained_here(tmp_path):
    stages = "stages=[permute,prune,finetune,evaluate,report]"
    for rounds in (0, 2):
        write_run(tmp_path / f"{rounds}", stages, f"permute.rounds={rounds}")
    labels = [row[0] for row in compared(tmp_path / "0", tmp_path / "2")]
    assert labels.count("Wanda + permuted channels (permute.rounds=2)") == 3
    assert labels.count("dense") == 3
    stages = "stages=[pretrain,prune,finetune,evaluate,report]"
    for seed in (0, 1):
        write_run(tmp_path / f"seed{seed}", stages, "model=null", f"seed={seed}", model=None)
    labels = [row[0] for row in compared(tmp_path / "seed0", tmp_path / "seed1")]
    assert labels.count("dense (seed=1)") == labels.count("Wanda (seed=1)") == 3


def test_another_protocol_is_marked(tmp_path):
    write_run(tmp_path / "a")
    other = make_results(*PLAIN)
    other["protocol"]["seq_len"] = 512
    write_run(tmp_path / "b", results=other)
    labels = [row[0] for row in compared(tmp_path / "a", tmp_path / "b")]
    assert "Wanda (evaluate.seq_len=256)" in labels and "dense (evaluate.seq_len=512)" in labels
    assert (
        "the runs differ in evaluate.seq_len: their numbers are not comparable"
        in (tmp_path / "out/compare.md").read_text()
    )


def test_another_text_of_the_same_name_is_refused(tmp_path):
    write_run(tmp_path / "a")
    other = make_results(*PLAIN)
    other["protocol"]["datasets"]["wikitext2"] = "some/set:tokenised@test, 123 windows of 256 tokens"
    write_run(tmp_path / "b", results=other)
    with pytest.raises(UserError, match="wikitext2 is some/set:config@test in .*a and some/set:tokenised@test in .*b"):
        compared(tmp_path / "a", tmp_path / "b")


def test_equal_settings_with_other_numbers_are_noted(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")  # with other pruned and finetuned perplexities
    assert len([row for row in compared(tmp_path / "a", tmp_path / "b") if row[0] == "Wanda"]) == 3
    text = (tmp_path / "out/compare.md").read_text()
    assert "Wanda: runs of equal settings differ in wikitext2 perplexity; the first is shown" in text
    assert "dense: runs of equal settings differ" not in text


def test_the_mean_is_over_the_tasks_that_all_runs_have(tmp_path):
    write_run(tmp_path / "a")
    fewer = make_results(*PLAIN)
    for model in fewer["models"].values():
        del model["zero_shot"]["boolq"]
    write_run(tmp_path / "b", "prune.method=magnitude", results=fewer)
    table = compared(tmp_path / "a", tmp_path / "b")
    (mean,) = (row for row in table if row[0].startswith("mean accuracy"))
    assert table[table.index(mean) + 1][1] == "61.1 ± 1.3"
    assert "not in the mean accuracy, as not all runs have them: boolq" in (tmp_path / "out/compare.md").read_text()


def test_unfinished_runs_are_reported_and_no_run_is_an_error(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "b" / "prune").mkdir(parents=True)
    (tmp_path / "runs" / "b" / "prune" / "stage.json").write_text("{}")
    compare.main([str(tmp_path / "runs")])
    assert "not finished: b" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no finished run and holds none"):
        compare.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="nothing to compare"):
        compare.main([])
    write_run(
        tmp_path / "c", results={"models": {name: {"perplexity": {"wikitext2": 1}} for name in PLAIN}, "protocol": {}}
    )
    (tmp_path / "c/evaluate/results.json").write_text('{"models": {"dense": {}}, "protocol": {}}')
    with pytest.raises(UserError, match="the runs have no perplexity"):
        compare.main([str(tmp_path / "c")])


def test_names_are_escaped(tmp_path):
    results = make_results(*PLAIN)
    results["protocol"]["notes"] = [HOSTILE]
    for model in results["models"].values():
        model["perplexity"][HOSTILE] = 7.0
    write_run(tmp_path / "a", results=results, model=HOSTILE)
    write_run(tmp_path / "b", results=copy.deepcopy(results), model="$x$")
    compare.main([str(tmp_path)])
    page = Page((tmp_path / "compare.html").read_text())
    assert "script" not in page.tags and HOSTILE in page.text and "$x$" in page.text
    assert "<script" not in (tmp_path / "compare.md").read_text() + (tmp_path / "compare.svg").read_text()


def test_a_diverged_method_is_reported_and_the_others_are_drawn(tmp_path):
    results = make_results(*PLAIN)
    for name, value in zip(PLAIN, (5.0, 123456.0, math.inf)):
        results["models"][name]["perplexity"] = {"wikitext2": value}
    write_run(tmp_path / "a", results=results)
    cells = [row[1] for row in compared(tmp_path / "a")]
    assert "123,456 ± 0" in cells and "inf" in cells
    assert "nan" not in (tmp_path / "out/compare.svg").read_text()


def test_experts_are_averaged_and_equal_series_share_a_line():
    rows = [
        {"layer": str(layer), "matrix": f"model.layers.{layer}.{name}", "sparsity": str(share)}
        for layer in range(2)
        for name, share in (("a.q.weight", 0.5), ("b.down[0]", 0.4), ("b.down[1]", 0.6), ("c.up.weight", 0.7))
    ]
    averaged = series.by_type(rows, "sparsity")
    assert averaged.to_dict() == {"q": {0: 0.5, 1: 0.5}, "down": {0: 0.5, 1: 0.5}, "up": {0: 0.7, 1: 0.7}}
    assert list(series.merge_equal(averaged)) == ["q, down", "up"]
    assert list(series.merge_equal(pd.DataFrame({name: averaged["q"] for name in "abc"}))) == ["all 3 matrices"]


def test_a_stage_with_the_same_key_is_linked(tmp_path):
    for name, key in (("a", "other"), ("b", "same")):
        (tmp_path / name / "prune/model").mkdir(parents=True)
        checksums.write(tmp_path / name / "prune", {"key": key})
        (tmp_path / name / "prune/model/weights").write_text(name)
    (tmp_path / "c").mkdir()
    assert siblings.reuse(tmp_path / "c/prune", "same") == tmp_path / "b"
    assert (tmp_path / "c/prune/model/weights").samefile(tmp_path / "b/prune/model/weights")
    assert siblings.reuse(tmp_path / "d/prune", "unknown") is None and not (tmp_path / "d").exists()
    assert not (tmp_path / "c/.prune").exists()
