"""The report of image classifiers: accuracy by class, and examples with each model's answer."""

import base64
import io
import json

import torch
from PIL import Image

from pipeline.data import images, sources
from pipeline.evaluation import accuracy
from pipeline.reporting import image_answers
from pipeline.settings.schema import Pretrain
from pipeline.stages.pretrain import toy
from tests.reporting import report_files
from tests.reporting.report_files import Page, make_results, write_report
from tests.reporting.test_report import HOSTILE


def test_answers_classes_and_examples_agree_with_a_plain_loop():
    made = toy(Pretrain(dataset="digits", hidden_size=16, intermediate_size=16, layers=1, heads=2))
    torch.manual_seed(0)
    model = made.model_class(made.config).eval()
    shown = images.evaluated(sources.source("digits", split="test"), made.processor, made.config, 50)
    right = accuracy.right_answers(model, shown, batch_size=16)
    with torch.no_grad():
        answers = [model(pixel_values=shown[i][0][None]).logits.argmax().item() for i in range(50)]
    labels = [shown[i][1] for i in range(50)]
    assert right["answer"] == answers and right["label"] == labels
    assert right["acc"] == [float(label == answer) for label, answer in zip(labels, answers)]
    counts = {name: (hits, of) for name, hits, of in accuracy.by_class(right, made.config.id2label)}
    for digit in set(labels):
        of = [answer for answer, label in zip(answers, labels) if label == digit]
        assert counts[str(digit)] == (of.count(digit), len(of))
    assert sum(of for _, of in counts.values()) == 50
    found = accuracy.examples(shown, {"dense": right}, made.config.id2label)
    assert len(found) == accuracy.EXAMPLES
    place = accuracy.chosen({"dense": right["acc"]})[3]
    assert found[3]["class"] == str(labels[place]) and found[3]["answers"] == {"dense": str(answers[place])}
    picture = Image.open(io.BytesIO(base64.b64decode(found[3]["image"])))
    assert picture.tobytes() == shown.rows.image(shown.places[place], 1).tobytes()


def test_chosen_examples_show_what_was_lost_and_recovered():
    dense, pruned, last = [1.0] * 100, [1.0] * 100, [1.0] * 100
    pruned[70:] = [0.0] * 30
    last[80:] = [0.0] * 20
    places = accuracy.chosen({"dense": dense, "pruned": pruned, "finetuned": last})
    assert places == sorted(set(places)) and len(places) == 12
    assert [sum(low <= place < high for place in places) for low, high in ((0, 70), (70, 80), (80, 100))] == [3, 6, 3]
    assert len(accuracy.chosen({"dense": dense})) == 12 and accuracy.chosen({"dense": [1.0, 0.0]}) == [0, 1]


def results(names: list[str]) -> dict:
    """Class i of 40 has 100 images; pruning loses i of them."""
    found = make_results("dense", "pruned", "finetuned")
    lost = {"dense": 0, "pruned": 1, "finetuned": 0.5}
    for model, share in lost.items():
        rows = [[name, 100 - share * i, 100] for i, name in enumerate(names)]
        found["models"][model] |= {"accuracy": {"photos": {"acc": 0.5}}, "classes": {"photos": rows}}
    return found


def test_the_classes_with_the_largest_drops_come_first():
    ((caption, frame),) = image_answers.by_class(results([f"class {i}" for i in range(40)])).items()
    assert list(frame.index) == [f"class {i}" for i in range(39, 9, -1)]
    assert "10 of 40 classes" in caption and "left out" in caption
    assert frame.loc["class 20"].to_dict() == {"dense": 1.0, "pruned": 0.8, "finetuned": 0.9}
    ((caption, frame),) = image_answers.by_class(results(["crane", "crane"])).items()  # two of ImageNet's classes
    assert "left out" not in caption and frame.pruned.tolist() == [0.99, 1.0]


def test_the_report_shows_classes_and_examples_under_any_name(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    answers = {"dense": HOSTILE, "pruned": "my_other *class*", "finetuned": HOSTILE}
    example = {"image": base64.b64encode(file.getvalue()).decode(), "class": HOSTILE, "answers": answers}
    write = json.dumps({"photos": [example]})

    def with_examples(root, found, usual=report_files.write_run):
        inputs = usual(root, found)
        (inputs["evaluate"] / "examples.json").write_text(write)
        return inputs

    monkeypatch.setattr(report_files, "write_run", with_examples)
    page, card = write_report(tmp_path, results(["owl", HOSTILE]))
    seen = Page(page)
    assert "script" not in seen.tags and ("alt", f"An image of class {HOSTILE}") in seen.attributes
    assert "pruned: my_other *class*" in seen.text and f"data:image/png;base64,{example['image']}" in page
    assert "Accuracy by class on photos" in seen.text
    assert "## Examples of photos" in card and "base64" not in card and "| owl | 100 | 100 | 100 |" in card
