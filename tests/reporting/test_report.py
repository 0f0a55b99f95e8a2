"""The report shows every number, with missing parts and with any names."""

import base64
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.reporting import card, headline, plots, published, report, series, summary
from pipeline.settings import reader, schema
from tests.reporting.report_files import (
    Page,
    make_results,
    shown,
    write_report,
    write_run,
)

PLAIN = ("dense", "pruned", "finetuned")
RAW = "Salesforce/wikitext:wikitext-2-raw-v1@test"
HOSTILE = '<script>alert(1)</script> | `x` </style> & "quote"'


@pytest.mark.parametrize("names", [summary.MODELS, summary.MODELS[:2], summary.MODELS[:1], ("pruned",)])
def test_every_number_is_in_every_format(tmp_path: Path, names: tuple) -> None:
    results = make_results(*names)
    page, card = write_report(tmp_path, results)
    for text in (Page(page).text, card, shown(tmp_path)):
        for model in results["models"].values():
            assert f"{model['perplexity']['wikitext2']:.2f}" in text
            assert f"{model['perplexity']['ptb']:,.0f}" in text
            assert f"{100 * model['sparsity']['overall']:.2f}" in text
            assert f"{100 * model['zero_shot_mean']:.1f}" in text
            for scores in model["zero_shot"].values():
                assert f"{100 * scores['acc']:.1f} ± {100 * scores['acc_stderr']:.1f}" in text
            assert f"{100 * model['zero_shot']['arc_easy']['acc_norm']:.1f}" in text
        assert all(note in text for note in results["protocol"]["notes"])
    for text in (Page(page).text, card):
        assert all(str(value) in text for value in (256, 77, "123 windows of 256 tokens", "2.13.0", "0.4.13"))
        assert ("1 h 2 min" in text) == ("pruned" in names)
        assert all(
            words in text for words in ("3.21 GiB", "2 x Abacus 9000", "Python 3.12.1", "c0ffee", "Once there was")
        )
        for place, model in enumerate(results["models"].values()):
            assert model["hash"] in text
            assert f"{model['perplexity']['wikitext2']:.2f} ± {model['perplexity_stderr']['wikitext2']:.2f}" in text
            assert model["continuations"][1] in text
            if "dense" in model["differences"]:
                assert f"×{math.exp(0.7 + place / 10):.3g} ± 0.0" in text
                assert f"−{2 * place:.1f} ± 1.5" in text


@pytest.mark.parametrize("missing", ["perplexity", "zero_shot", "sparsity", "mask_violations"])
def test_missing_measurements_are_left_out(tmp_path: Path, missing: str) -> None:
    results = make_results(*summary.MODELS)
    for model in results["models"].values():
        del model[missing]
        if missing == "zero_shot":
            model["zero_shot_mean"] = None
    page, card = write_report(tmp_path, results)
    label = {"perplexity": "Perplexity (", "zero_shot": "Zero-shot, %", "sparsity": "sparsity, %"}
    label["mask_violations"] = "violations"
    for text in (Page(page).text, card, shown(tmp_path)):
        text = " ".join(text.split())  # with four models the terminal cuts titles
        assert {key for key, words in label.items() if words not in text} == {missing}
        assert "None" not in text


def test_the_smallest_results_make_a_report(tmp_path: Path) -> None:
    page, card = write_report(tmp_path, {"models": {"dense": {}}})
    assert "was evaluated" in page and "was evaluated" in card and "dense" in shown(tmp_path)


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    results = make_results(*summary.MODELS)
    for model in results["models"].values():
        model["perplexity"][HOSTILE] = 7.0
        model["zero_shot"][HOSTILE] = {"acc": 0.5}
    results["protocol"]["notes"] = [HOSTILE]
    results["protocol"]["datasets"][HOSTILE] = HOSTILE
    results["versions"][HOSTILE] = HOSTILE
    results["protocol"]["prompts"] = [HOSTILE]
    for model in results["models"].values():
        model["continuations"] = [HOSTILE]
    page, card = write_report(tmp_path, results, model=HOSTILE)
    assert "script" not in Page(page).tags and HOSTILE in Page(page).text
    before_recipe = card[: card.index("## Recipe")]
    assert "<" not in before_recipe and not re.search(r"(?<!\\)`x", before_recipe)
    results_table, _, other_tables = before_recipe.partition("\n## ")
    for part, bars in ((results_table, len(summary.MODELS) + 2), (other_tables, 3)):
        rows = [line for line in part.splitlines() if "alert" in line and line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {bars}, "a name broke out of its cell"


def test_names_are_escaped_in_markdown(tmp_path: Path) -> None:
    names = [
        "_a_ *b* **c** ~~d~~ __e__",
        "# f",
        "- g",
        "+ h",
        "> i",
        "[j](k) ![l](m)",
        "<n>",
        "o\\| p\\",
        "&amp;",
        "`",
        "q_r_s",
    ]
    results = make_results("dense")
    results["models"]["dense"]["perplexity"] = dict.fromkeys(names, 7.0)
    results["models"]["dense"]["continuations"] = [" ".join(names)]
    results["protocol"] |= {"notes": names, "prompts": [names[0]]}
    page = Page(write_report(tmp_path, results, model="# t *u*")[0])
    assert all(page.text.count(name) >= 3 for name in names), [name for name in names if page.text.count(name) < 3]
    assert page.tags.count("h1") == 1 and "# t *u*" in page.text and "a" not in page.tags


def test_names_are_escaped_on_the_terminal(tmp_path: Path) -> None:
    results = make_results(*summary.MODELS)
    name = "[red]x[/nothing]"  # markup of rich
    results["models"]["dense"]["perplexity"][name] = 1.0
    results["protocol"]["notes"] = [f"of {name}"]
    write_run(tmp_path, results)
    assert shown(tmp_path, width=200).count(name) == 2


def test_html_is_self_contained(tmp_path: Path) -> None:
    page, _ = write_report(tmp_path, make_results(*summary.MODELS))
    pictures = [base64.b64decode(found) for found in re.findall(r'src="data:image/svg\+xml;base64,(.*?)"', page)]
    text = re.sub(r'src="data:image/svg\+xml;base64,.*?"', "", page)
    assert Page(text).tags.count("img") == len(pictures) == 5
    assert not {"script", "link", "iframe", "object", "svg"} & set(Page(text).tags)
    assert not re.search(r"https?:|@import|//\w|src=|href=|url\(", text)
    assert len(page) < 300_000
    for picture in pictures:
        parsed = Page(picture.decode())
        ids = [value for name, value in parsed.attributes if name == "id"]
        references = [value for name, value in parsed.attributes if name in ("src", "href", "xlink:href")]
        references += re.findall(r"url\((.*?)\)", picture.decode())
        assert not {"script", "image", "foreignobject"} & set(parsed.tags)
        assert references and all(value[0] == "#" and value[1:] in ids for value in references)


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    results = make_results(*summary.MODELS)
    assert write_report(tmp_path / "a", results) == write_report(tmp_path / "b", results)


def test_a_violation_is_reported(tmp_path: Path) -> None:
    results = make_results(*summary.MODELS)
    results["models"]["finetuned"]["mask_violations"] = 4321
    for text in (*write_report(tmp_path, results), shown(tmp_path)):
        assert "finetuned: 4321 pruned weights are not zero" in text


def test_the_recipe_in_the_report_can_be_loaded(tmp_path: Path) -> None:
    # unquoted, YAML would read 2:4 as 124
    changed = ["finetune.lr=0.00003", 'prune.sparsity="2:4"', "evaluate.tasks=[boolq]"]
    _, card = write_report(tmp_path, make_results(*summary.MODELS), *changed)
    again = tmp_path / "again.yaml"
    again.write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    stages = "stages=[prune,reconstruct,finetune,evaluate,report]"
    first = reader.load(["recipe=tiny", stages, "model=some/model", *changed])
    first.pretrain, first.speed = schema.Pretrain(), schema.Speed()  # settings of absent stages are left out
    assert reader.load([f"recipe={again}"]) == first


@pytest.mark.parametrize(
    "settings, seq_len, dataset, expected",
    [
        (["recipe=llama7b_2of4"], 2048, RAW, (5.68, 11.53, 8.24)),
        (["recipe=llama7b_2of4", "model=./somewhere/llama-7b"], 2048, RAW, (5.68, 11.53, 8.24)),
        (["recipe=llama13b_half", "prune.sparsity=0.50"], 2048, RAW, (5.09, 6.15)),
        (["recipe=llama2_7b_4of8", "prune.sparsity='4:8'"], 4096, RAW, (5.12, 7.97)),
        (["recipe=llama7b_2of4", "prune.overrides={'*.0.*': dense}"], 2048, RAW, (5.68,)),
        (["recipe=llama7b_2of4", "prune.sparsity=1of4"], 2048, RAW, (5.68,)),
        (["recipe=llama7b_half", "prune.group=layer"], 2048, RAW, (5.68,)),
        (["recipe=llama7b_2of4", "calibration.activations=dense"], 2048, RAW, (5.68,)),
        (["recipe=llama7b_2of4", "stages=[permute,prune,finetune,evaluate,report]"], 2048, RAW, (5.68,)),
        (["recipe=llama7b_2of4", "stages=[prune,reconstruct,finetune,evaluate,report]"], 2048, RAW, (5.68, 11.53)),
        (["recipe=llama7b_2of4"], 1024, RAW, ()),
        (["recipe=llama7b_2of4"], 2048, "Salesforce/wikitext:wikitext-2-v1@test", ()),
        (["recipe=opt_125m_half"], 2048, RAW, ()),
    ],
)
def test_published_numbers_match_the_setting(settings: list, seq_len: int, dataset: str, expected: tuple) -> None:
    protocol = {"seq_len": seq_len, "datasets": {"wikitext2": f"{dataset}, 9 windows"}}
    found, source = published.find(reader.load(settings), protocol)
    assert found == dict(zip(PLAIN, expected)) and bool(source) == bool(expected)


def test_published_numbers_are_below_ours(tmp_path: Path) -> None:
    results = make_results(*PLAIN)
    results["protocol"] |= {
        "seq_len": 2048,
        "datasets": {"wikitext2": f"{RAW}, 9 windows"},
    }
    _, card = write_report(tmp_path, results, "prune.sparsity=2of4", model="huggyllama/llama-7b")
    assert "| wikitext2, published | 5.68 | 11.53 | 8.24 |" in card and "Sun et al. 2023" in card


def test_recovered_share() -> None:
    assert summary.recovered(5, 11, 5) == pytest.approx(1)
    assert summary.recovered(5, 11, 11) == 0
    assert summary.recovered(5, 11, 12) < 0
    assert summary.recovered(5, 11, math.sqrt(5 * 11)) == pytest.approx(0.5)
    for nothing in ((5, 5, 5), (5, 4, 3), (5, None, 6), (5, math.inf, 6), (5, math.nan, 6)):
        assert summary.recovered(*nothing) is None


@pytest.mark.parametrize(
    "finetuned, words",
    [(8.0, "52% of the lost log-perplexity was"), (12.0, "Nothing was recovered"), (5.68, "100% of")],
)
def test_headline_says_what_was_recovered(finetuned: float, words: str) -> None:
    settings = reader.load(["recipe=tiny", "model=some/model", "stages=[prune,evaluate,report]"])
    results = {"models": {n: {"perplexity": {"ptb": p}} for n, p in zip(PLAIN, (5.68, 11.53, finetuned))}}
    assert words in headline.headline(settings, results)


def test_headline_and_card_say_how_many_steps_were_trained(tmp_path: Path) -> None:
    settings = reader.load(["recipe=tiny", "model=some/model", "stages=[prune,finetune,evaluate,report]"])
    settings.finetune.patience, metrics = 2, tmp_path / "metrics.csv"
    results = {"models": {name: {"perplexity": {"ptb": 9.0}} for name in PLAIN}}
    for last, words in ((120, "120 of at most 300 steps"), (300, "300 steps")):
        metrics.write_text(f"step,loss\n1,2.5\n{last},1.5\n")
        assert f"after LoRA for {words}." in headline.headline(settings, results, series.read(metrics))
        card.write_model_card(tmp_path, settings, "finetune", images=False, metrics=metrics)
        assert f"({words} of 16 x 128 tokens of world, of which the best" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("values, says", [("exact", ", bit for bit."), ("int8", " of the rounded weights.")])
def test_the_card_of_a_compact_folder_says_what_it_holds(tmp_path: Path, values: str, says: str) -> None:
    settings = reader.load(["recipe=tiny", f"export.values={values}"])
    card.write_model_card(tmp_path, settings, "prune", images=False, compact=True)
    text = (tmp_path / "README.md").read_text()
    assert f"converts it back to an ordinary folder{says}" in text and (values in text) == (values == "int8")


@pytest.mark.parametrize("seconds, text", [(0.14, "0.1 s"), (42.2, "42 s"), (59.7, "1 min 0 s"), (3599.6, "1 h 0 min")])
def test_durations(seconds: float, text: str) -> None:
    assert summary.duration(seconds) == text


def test_terminal_table_is_plain_text_in_80_columns(tmp_path: Path) -> None:
    """Up to four models; five need more."""
    write_report(tmp_path, make_results(*summary.MODELS[:4]))
    text = shown(tmp_path)
    assert "\x1b" not in text and str(tmp_path / "report" / "report.html") in text
    assert max(map(len, text[: text.index("note:")].splitlines())) <= 80


def test_one_point_or_many_can_be_drawn() -> None:
    for count in (1, 2, 5000):
        points = pd.Series(np.linspace(0.5, 1, count), pd.Index(range(count), name="step"), name="loss")
        frame = pd.DataFrame({"q_proj": points, "$x$": points.where(points.index < count / 2 + 1)})
        for svg in (
            plots.by_layer(frame, "pruned weights (%)", 100),
            plots.reconstruction(points, points[::-1]),
            plots.loss(points, points[:0]),
            plots.loss(points, points[:50]),
        ):
            Page(svg)
            assert "nan" not in svg.lower()
    assert len(plots.loss(points, points[:0])) < 40_000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, make_results(*summary.MODELS))


def test_report_imports_neither_torch_nor_matplotlib() -> None:
    heavy = "{'torch', 'lightning', 'transformers', 'matplotlib'}"
    code = f"import sys, pipeline.reporting.report; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parents[2])
