"""Conversations in all common formats are tokenised by the chat template, and only the chosen tokens have loss."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pipeline.data import chat, sources, token_windows
from pipeline.recovery import distillation
from pipeline.recovery.held_out import HeldOut
from pipeline.recovery.training import fit
from pipeline.runtime.errors import UserError
from pipeline.settings.schema import Finetune
from pipeline.tasks.language_modeling import LanguageModeling
from tests.conftest import QUICK, byte_tokenizer
from tests.engine.test_decoder import small_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
# shows the assistant's reasoning only in the last turn, as Qwen3 does
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and loop.last %}<think>{% endif %}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + CHATML
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "\nSo."},
]
SHORT = TURNS[1:3]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
    for turn in TURNS
]


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer("<|im_end|>", "<|im_start|>")
    tokenizer.chat_template = template
    return tokenizer


def text(turns: list[dict]) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def written(folder, *rows: dict):
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sources.source(str(path), section="finetune")


FORMS = {
    "messages": ({"messages": TURNS}, TURNS),
    "a text beside them is taken": ({"messages": TURNS, "prompt": "Who?"}, TURNS),
    "ShareGPT": ({"conversations": SHAREGPT}, TURNS),
    "conversations of roles": ({"conversations": TURNS}, TURNS),
    "prompt and response": ({"prompt": "Who?", "response": "I."}, SHORT),
    "prompt and completion": ({"prompt": "Who?", "completion": "I.", "id": 1}, SHORT),
    "prompt and completion of turns": ({"prompt": TURNS[:2], "completion": TURNS[2:3]}, TURNS[:3]),
    "parts of text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, TURNS[2]]}, SHORT),
}


@pytest.mark.parametrize(("row", "turns"), FORMS.values(), ids=FORMS)
def test_every_format_is_rendered_by_the_chat_template(tmp_path, row, turns):
    source, tokenizer = written(tmp_path, row), chat_tokenizer()
    expected = tokenizer(text(turns), add_special_tokens=False).input_ids
    assert token_windows.joined(source, tokenizer).tolist() == expected
    assert token_windows.calibration(source, tokenizer, 1, len(expected), 0)[0].tolist() == expected
    (first,) = sources.first_rows(source)
    assert chat.tokens(first, tokenizer) == expected


def test_a_chosen_column_may_hold_a_conversation(tmp_path):
    Dataset.from_list([{"a": {"chat": TURNS}, "text": "no"}]).to_parquet(tmp_path / "a.parquet")
    source, tokenizer = sources.source(str(tmp_path / "a.parquet"), column="a.chat"), chat_tokenizer()
    assert tokenizer.decode(token_windows.joined(source, tokenizer)) == text(TURNS)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
def test_only_assistant_tokens_have_loss(template):
    tokenizer = chat_tokenizer(template)
    marked = torch.tensor(chat.tokens({"messages": TURNS}, tokenizer, "assistant"))
    ids, labels = token_windows.ids_and_labels(marked)
    assert tokenizer.decode(ids) == text(TURNS)
    assert tokenizer.decode(labels[labels != -100]) == "I.<|im_end|>\n\nSo.<|im_end|>\n"
    assert torch.equal(labels[labels != -100], ids[labels != -100])


SPACED = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": " I and "}, *TURNS[3:]]
BARE = MARKED.replace("<|im_end|>\n{% endgen", "{% endgen").replace(
    "{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"
)


@pytest.mark.parametrize("template", [CHATML, MARKED, BARE], ids=["by prefixes", "by marks", "by marks without an end"])
def test_spaces_have_loss_in_tokenizers_that_trim_offsets(template):
    """Offsets of GPT-NeoX's tokens leave spaces out: transformers' own mask then stops, or never ends."""
    tokenizer = chat_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    _, labels = token_windows.ids_and_labels(torch.tensor(chat.tokens({"messages": SPACED}, tokenizer, "assistant")))
    end = "" if template == BARE else "<|im_end|>\n"
    assert tokenizer.decode(labels[labels != -100]) == f" I and {end}\nSo.{end}"


@pytest.mark.parametrize("loss", ["all", "assistant"])
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by prefixes", "by marks"])
def test_a_template_with_a_date_gives_the_same_text_every_day(template, loss):
    tokenizer = chat_tokenizer("{{ strftime_now('%d %b %Y') }}" + template)
    ids, _ = token_windows.ids_and_labels(torch.tensor(chat.tokens({"messages": TURNS}, tokenizer, loss)))
    assert tokenizer.decode(ids) == "26 Jul 2024" + text(TURNS)


def test_a_conversation_that_starts_with_the_assistant():
    tokenizer = chat_tokenizer()
    _, labels = token_windows.ids_and_labels(
        torch.tensor(chat.tokens({"messages": TURNS[2:4]}, tokenizer, "assistant"))
    )
    assert tokenizer.decode(labels[labels != -100]) == "I.<|im_end|>\n"


def test_eos_is_added_if_the_template_adds_none():
    tokenizer = chat_tokenizer("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                               "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    ids, labels = token_windows.ids_and_labels(torch.tensor(chat.tokens({"messages": SHORT}, tokenizer, "assistant")))
    assert tokenizer.decode(ids) == "[user]Who?[assistant]I.<|im_end|>"
    assert tokenizer.decode(labels[labels != -100]) == "I.<|im_end|>"


REFUSED = {
    "no template": (None, {"messages": TURNS}, "has no chat template"),
    "an earlier turn is written otherwise": (
        FORGETFUL,
        {"messages": TURNS},
        r"turn 3, the assistant's, differently .*loss=all",
    ),
    "the template refuses": (PICKY, {"messages": TURNS}, "of system, user.*: no system role here"),
    "an unknown speaker": (CHATML, {"messages": [{"role": "narrator", "content": "x"}]}, "has a turn by 'narrator'"),
    "no speaker": (CHATML, {"messages": [{"speaker": "user", "content": "x"}]}, "has a turn by 'None'"),
    "pictures": (CHATML, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "holds pictures"),
    "turn without text": (CHATML, {"messages": [{"role": "user", "text": "x"}]}, "a turn by 'user' without text"),
    "no answers": (
        CHATML,
        {"messages": TURNS[:2]},
        "holds no answers of an assistant to learn from: set finetune.loss=all",
    ),
    "plain text": (CHATML, {"text": "x"}, "holds no conversations, which finetune.loss=assistant needs"),
}


@pytest.mark.parametrize(("template", "row", "says"), REFUSED.values(), ids=REFUSED)
def test_malformed_conversations_are_refused(tmp_path, template, row, says):
    with pytest.raises(UserError, match=says) as refusal:
        token_windows.packed(written(tmp_path, row), chat_tokenizer(template), 8, 1, 0, loss="assistant")
    assert "chat.jsonl" in str(refusal.value) and "\n" not in str(refusal.value)


def test_packing_keeps_the_tokens_with_loss(tmp_path):
    source, tokenizer = written(tmp_path, *({"messages": TURNS[: 3 + 2 * (i % 2)]} for i in range(6))), chat_tokenizer()
    plain = token_windows.packed(source, tokenizer, 16, 20, 0)
    ids, labels = token_windows.ids_and_labels(token_windows.packed(source, tokenizer, 16, 20, 0, loss="assistant"))
    assert torch.equal(ids, plain) and (plain >= 0).all()
    output = tokenizer.decode(labels[labels != -100])
    assert set(output.replace("\n\n", "\n").split("<|im_end|>\n")) <= {"I.", "\nSo.", "So.", ""} and "I." in output
    assert token_windows.ids_and_labels(plain)[1] is plain


# 4 windows per step, some without tokens with loss; one step has none at all
MARKS = torch.rand(8 * 4, 12, generator=torch.Generator().manual_seed(2))
WINDOWS = torch.randint(3, 61, (8 * 4, 12), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.where(torch.linspace(0, 1, 32)[:, None] > MARKS, ~WINDOWS, WINDOWS)
WINDOWS[4:8] = torch.where(WINDOWS[4:8] >= 0, ~WINDOWS[4:8], WINDOWS[4:8])


def different_model():
    model = small_model("llama")
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model


def trained(folder, windows, batch_size: int, accumulate: int, **more):
    model = small_model("llama")
    settings = Finetune(
        max_steps=len(windows) // 4, batch_size=batch_size, accumulate=accumulate, lr=1e-2, warmup=0, **more
    )
    teacher = different_model() if settings.distill else None
    fit(model, windows, settings, 0, folder, teacher=teacher)
    return dict(model.named_parameters())


def reference_training(windows, share: float):
    """The same as one plain loop: per step, cross-entropy (and divergence) of the labelled tokens divided by their number."""
    model, teacher = small_model("llama"), different_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    steps = len(windows) // 4
    for step, batch in enumerate(windows.split(4)):
        ids, labels = token_windows.ids_and_labels(batch)
        kept = labels[:, 1:] != -100
        logits = model(ids).logits[:, :-1][kept]
        loss = F.cross_entropy(logits, labels[:, 1:][kept], reduction="sum")
        if share:
            teacher_BTV = teacher(ids).logits[:, :-1][kept].detach().log_softmax(-1)
            loss = (1 - share) * loss + share * F.kl_div(
                logits.log_softmax(-1), teacher_BTV, log_target=True, reduction="sum"
            )
        (loss / max(1, kept.sum())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_token_counts_equally_for_any_split_of_a_step(tmp_path, share):
    expected = reference_training(WINDOWS, share)
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        weights = trained(tmp_path / str(batch_size), WINDOWS, batch_size, accumulate, distill=share)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-3)


def test_validation_is_the_mean_over_the_assistants_tokens(tmp_path):
    model = small_model("llama")
    ids, labels = token_windows.ids_and_labels(WINDOWS)
    expected = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), labels[:, 1:]).exp().item()
    for batch_size in (1, 3, 32):
        found = HeldOut(WINDOWS, batch_size, 0, tmp_path).measure(model, torch.device("cpu"))
        assert found == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_the_loss_is_the_models_own():
    model, ids = small_model("llama"), WINDOWS[:4].where(WINDOWS[:4] >= 0, ~WINDOWS[:4])
    expected, task = model(ids, labels=ids).loss, LanguageModeling()
    predicted, targets = task.predictions(model(ids).logits), task.targets(ids)
    torch.testing.assert_close(distillation.loss(predicted, None, targets, 0.0, 1.0), expected)


@pytest.mark.slow
def test_a_chat_through_the_whole_pipeline(tiny_llama, tmp_path, typed):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    ask = "{% if m['role'] == 'user' %}Who is {{ m['content'] }} ? {% else %}{{ m['content'] }} {% endif %}"
    (folder / "chat_template.jinja").write_text(f"{{% for m in messages %}}{ask}{{% endfor %}}")
    rows = [{"messages": [{"role": "user", "content": "she"}, {"role": "assistant", "content": f"the {word} ."}]}
            for word in ("cat", "dove", "mason", "baker") * 40]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = tmp_path / "chat.jsonl"
    settings = [*QUICK, f"model={folder}", f"run_dir={tmp_path}/runs/run", f"calibration.dataset={chats}"]
    settings += [f"finetune.dataset={chats}", "finetune.loss=assistant", f"finetune.validation={chats}"]
    settings += [f"evaluate.perplexity=[{chats}]", "evaluate.continuations=1"]
    code, output, lines = typed(*settings)
    assert code == 0, lines
    assert "validation perplexity" in output
    (prompt,) = json.loads((tmp_path / "runs/run/evaluate/results.json").read_text())["protocol"]["prompts"]
    assert prompt == "she"
