"""The report and `compare` show the results of export and speed, losses included, if the stages ran."""

import json
import shutil

import pandas as pd
import pytest

from pipeline.reporting import costs, plots
from pipeline.runtime import checksums
from pipeline.settings import reader, schema
from tests.reporting.test_compare import compared, write_run
from tests.reporting.test_report import PLAIN, Page, make_results, write_report

SIZES = {
    "matrices": 21,
    "matrix_bytes": {"ordinary": 4 * 2**20, "compact": 2.25 * 2**20},
    "file_bytes": {"ordinary": 8 * 2**20, "compact": 5 * 2**20},
}


def rates(*values: float) -> dict:
    return {"median": sorted(values)[len(values) // 2], "least": min(values), "most": max(values), "all": list(values)}


def make_speed(gain: float = 1.8, kernels: str | None = "avx512") -> dict:
    """Three repeats; the machine is twice as fast in the last one."""
    models = {}
    for name, factor in (("ordinary", 1.0), ("compact", gain)):
        models[name] = {
            **{"format": name, "dtype": "bfloat16", "file_bytes": 5, "memory_bytes": 3e6 / factor},
            **{"load_seconds": 0.5, "first_token_seconds": 0.75},
            "prefill": {"128": rates(1000, 1100, 2100)},
            "decode": {"1": rates(10 * factor, 11 * factor, 20 * factor), "4": rates(31, 32, 60)},
        }
    micro = {"ordinary": 20.0, "compact": 20.0 / gain}
    return {
        "models": models,
        "products": [{"shape": "48 x 32", "matrices": 6, "tokens": 1, "microseconds": micro}],
        "same_tokens": {"compact": 0.75},
        "machine": {
            **{"hardware": "Abacus 9000, 2 cores", "flags": ["avx2"], "kernels": kernels},
            **{"threads": 2, "torch": "2.13.0", "load": 0.1},
        },
        "settings": {"repeats": 3, "prompt": 16, "new_tokens": 64, "threads": 2},
        "notes": ["prompts are cut to the model's 128 positions"],
    }


@pytest.mark.parametrize(
    ("sizes", "speed", "sentence"),
    [
        (None, None, ""),
        (SIZES, None, "The compact folder has 0.62× the bytes of the ordinary one."),
        (SIZES, make_speed(), "0.62× the bytes of the ordinary one and 1.80× its decode speed at batch 1 on 2 threads"),
        (SIZES, make_speed(0.6), "and 0.60× its decode speed (slower) at batch 1"),
        (SIZES, make_speed(1.0), "and 1.00× its decode speed at batch 1"),
    ],
)
def test_the_headline_states_gains_and_losses(sizes, speed, sentence):
    headline = costs.headline(sizes, speed)
    assert sentence in headline and bool(sentence) == bool(headline)


def test_ratios_are_within_each_repeat():
    assert costs.speed_ratio(make_speed(1.8)) == pytest.approx(1.8)
    assert costs.speed_ratio({"models": {"ordinary": {"decode": {}}, "compact": {"decode": {}}}}) is None
    header, rows = costs.table(SIZES, make_speed())
    assert header == ["", "ordinary", "compact", "compact / ordinary"]
    assert ["pruned matrices, MiB", "4.00", "2.25", "0.56×"] in rows
    assert ["decode, batch 1, tokens/s", "11.0 (10.0–20.0)", "19.8 (18.0–36.0)", "1.80× (1.80–1.80)"] in rows
    assert costs.products(make_speed())[1] == [["48 x 32", "6", "1", "20.0", "11.1", "1.80×"]]


def test_missing_kernels_and_notes_are_shown():
    assert "no kernels for compact matrices" in costs.circumstances(make_speed(0.3, kernels=None))[0]
    assert "Prompts are cut to the model's 128 positions." in costs.circumstances(make_speed())[0]
    assert "75% equal those of ordinary" in costs.circumstances(make_speed())[1]


def test_a_gpu_is_named_with_the_forms_of_the_matrices():
    speed = make_speed(kernels="Triton 3.6.0")
    assert costs.forms(speed) == ([], [])
    speed["machine"]["device"] = "cuda"
    times = {"bitmask": {"1": 8.04, "16": 12.0}, "dense": {"1": 12.0, "16": 13.0}}
    kind = {"shape": "48 x 32", "dtype": "bfloat16", "pattern": "50% kept", "matrices": 6, "form": "bitmask"}
    speed["models"]["compact"]["forms"] = [kind | {"microseconds": times}]
    header, rows = costs.forms(speed)
    assert rows == [["48 x 32", "6", "bfloat16, 50% kept", "bitmask", "1, 16", "8.0, 12.0", "–", "12.0, 13.0"]]
    assert len(header) == len(rows[0])
    assert "batch 1 on the GPU" in costs.headline(SIZES, speed)
    measured, meaning = costs.circumstances(speed)
    assert "on its GPU; kernels of Triton 3.6.0" in measured and "allocated on the GPU" in meaning


def test_a_report_without_the_stages_says_how_to_run_them(tmp_path):
    page, text = write_report(tmp_path, make_results(*PLAIN))
    for found in (Page(page).text, text):
        assert "stages=[prune,finetune,export,evaluate,speed,report]" in found
        assert "Size and speed" not in found and "compact folder has" not in found


@pytest.mark.slow
def test_compare_shows_the_speed_of_runs_that_have_it(tmp_path):
    for name, method, gain in (("a", "wanda", 1.8), ("b", "magnitude", 0.9), ("c", "sparsegpt", None)):
        write_run(tmp_path / name, f"prune.method={method}")
        if gain:
            write_costs(tmp_path / name, make_speed(gain))
    table = compared(*(tmp_path / name for name in "abc"))
    start = next(place for place, row in enumerate(table) if row[0].startswith("decode speed"))
    assert table[start][0].endswith("(higher is better)")
    assert table[start + 1 :] == [["Wanda + LoRA", "1.80"], ["magnitude + LoRA", "0.90"]]
    assert "Wanda + LoRA" in Page((tmp_path / "out/compare_speed.svg").read_text()).text
    assert "Quality against speed" in (tmp_path / "out/compare.md").read_text()
    assert "different machines" not in (tmp_path / "out/compare.md").read_text()
    other = make_speed()
    other["machine"]["threads"] = 64
    write_costs(tmp_path / "c", other)
    compared(*(tmp_path / name for name in "abc"))
    assert "measured on different machines, threads or kernels" in (tmp_path / "out/compare.md").read_text()


@pytest.mark.slow
def test_the_cells_of_a_sweep_over_speed_are_two_measures(tmp_path):
    """They share the evaluation, whose record names the settings of the first cell."""
    folders = [tmp_path / "a", tmp_path / "b"]
    write_run(folders[0])
    shutil.copytree(*folders)
    for threads, (folder, gain) in enumerate(zip(folders, (1.8, 1.2)), 1):
        write_costs(folder, make_speed(gain), f"speed.threads={threads}")
    table = compared(*folders)
    for threads, gain in ((1, "1.80"), (2, "1.20")):
        place = next(place for place, row in enumerate(table) if f"batch 1, speed.threads={threads}" in row[0])
        assert table[place + 1] == ["Wanda + LoRA", gain]
    assert "equal settings" not in (tmp_path / "out/compare.md").read_text()
    plot = Page((tmp_path / "out/compare_speed.svg").read_text()).text
    assert "speed.threads=2" in plot


def test_a_logarithmic_axis_has_plain_numbers():
    """It had the source of matplotlib's math text, which is not parsed because names may hold a $."""
    rows = [("dense", "-", False, 4.6, 1.0), ("Wanda", "2:4", True, 62.0, 2.0)]
    part = pd.DataFrame(rows, columns=["label", "pattern", "is_sparse", "perplexity", "speed"])
    plot = plots.quality_and_speed([("text", part)])
    assert "mathdefault" not in plot and all(f">{number}<" in plot for number in (5, 10, 20, 50))


def write_costs(run, speed: dict, *settings: str) -> None:
    """Adds the stages export and speed, made from the evaluated models, to a finished run."""
    recipe = schema.plain(reader.load(["model=some/model", "stages=[prune,export,speed]", *settings]))
    evaluated = checksums.read(run / "evaluate")
    read = {"prune": "1", "finetune": "2"}
    checksums.write(run / "evaluate", evaluated | {"made_from": {"read": read}})
    for stage, file, what in (("export", "sizes.json", SIZES), ("speed", "results.json", speed)):
        (run / stage).mkdir()
        made_from = {"read": read | ({"export": "3"} if stage == "speed" else {})}
        checksums.write(run / stage, {"recipe": recipe, "made_from": made_from})
        (run / stage / file).write_text(json.dumps(what))
