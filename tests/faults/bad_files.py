"""Input files: models, tokenizers, texts and mirrors."""

import json

import torch

from tests.faults.cases import (
    CHAT,
    DOWN,
    SPLITS,
    UP,
    Case,
    changed,
    filled,
    no_tokenizer,
    saved_splits,
    split_files,
    text,
    together,
    tokenizer_with,
)
from tests.faults.harm import change_weights, cut, put, remove

CASES: dict[str, list[Case]] = {
    "Models": [
        Case("model=./nowhere", "model=./nowhere: no such folder"),
        Case("model=nobody/nothing", "cannot fetch model=nobody/nothing"),
        Case("model={here}", "has no config.json"),
        Case("", "has no weights", remove("model/model.safetensors"), "`model.safetensors` is removed"),
        Case("", "model.safetensors (", cut("model/model.safetensors"), "`model.safetensors` is cut in half"),
        Case("", "(0 bytes) is damaged", cut("model/model.safetensors", 0), "`model.safetensors` is empty"),
        Case(
            "",
            "model.safetensors (42 bytes) is damaged or incomplete",
            put("model/model.safetensors", "version https://git-lfs.github.com/spec/v1"),
            "`model.safetensors` is a git-lfs pointer",
        ),
        Case("", "config.json (", cut("model/config.json"), "`config.json` is cut in half"),
        Case("", "config.json (0 bytes) is damaged", cut("model/config.json", 0), "`config.json` is empty"),
        Case("", "model_type", put("model/config.json", "{}"), "`config.json` holds `{}`"),
        Case("", "spaceship", changed("model/config.json", model_type="spaceship"), "`model_type` is `spaceship`"),
        Case(
            "",
            "(32, 96) by config.json",
            changed("model/config.json", intermediate_size=96),
            "`intermediate_size` is 96",
        ),
        Case("", "model.layers.3.", changed("model/config.json", num_hidden_layers=4), "`num_hidden_layers` is 4"),
        Case(
            "", "holds model.layers.2.", changed("model/config.json", num_hidden_layers=2), "`num_hidden_layers` is 2"
        ),
        Case(
            "",
            "is quantised by gptq",
            changed("model/config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
            "`quantization_config` names gptq",
        ),
        Case(
            "",
            "holds a BertForMaskedLM",
            changed("model/config.json", architectures=["BertForMaskedLM"]),
            "`architectures` is `[BertForMaskedLM]`",
        ),
        Case(
            "seed=1",
            "makes transformers load an adapter",
            put("model/adapter_config.json", "{}"),
            "`adapter_config.json` lies beside the weights",
        ),
        Case(
            "",
            f"lacks {UP} (1 missing)",
            change_weights(lambda weights: weights.pop(UP), "model/model.safetensors"),
            "a weight is missing",
        ),
        Case(
            "",
            f"{UP} is (3, 3) in the files",
            change_weights(lambda weights: weights.update({UP: torch.zeros(3, 3)}), "model/model.safetensors"),
            "a weight is of another shape",
        ),
        Case("", f"{UP} holds weights that are not finite", filled(UP, torch.inf), "a weight is infinite"),
        Case("", f"scores of {UP} are not finite", filled(UP, 3e38), "a weight is 3e38"),
        Case("", f"the inputs of {DOWN} are not finite", filled(UP, 1e30), "a weight is 1e30"),
        Case("prune.method=sparsegpt", f"updates of {UP} overflow", filled(UP, 3e38), "a weight is 3e38"),
        Case(
            "",
            "run only with trust_remote_code=true",
            changed("model/config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
            "`config.json` names code",
        ),
        Case(
            "seed=1",
            "names the shard '../x.safetensors'",
            put("model/model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
            "an index names a file outside",
        ),
    ],
    "Tokenizers": [
        Case("", "has no usable tokenizer", no_tokenizer, "`tokenizer*` are removed"),
        Case("", "tokenizer.json (", cut("model/tokenizer.json"), "`tokenizer.json` is cut in half"),
        Case(
            "",
            "KeyError: 'added_tokens': copy tokenizer.json",
            put("model/tokenizer.json", "{}"),
            "`tokenizer.json` holds `{}`",
        ),
        Case(
            "", "tokenizer_config.json (", cut("model/tokenizer_config.json"), "`tokenizer_config.json` is cut in half"
        ),
    ],
    "Special tokens and chats": [
        Case(
            "",
            "has the eos token '[END]' with id 552, but the model 552 embedding rows: set eos_token in its tokenizer_config",
            tokenizer_with(eos="[END]"),
            "the token that ends a text has no embedding",
        ),
        Case("", "has the unk token '[UNK]' with id 552", tokenizer_with(unk="[UNK]"), "nor has that of unknown words"),
        Case(
            "",
            "the model only 9 embedding rows: is the tokenizer or config.json another model's?",
            changed("model/config.json", vocab_size=9),
            "`vocab_size` is 9",
        ),
        Case(
            "calibration.dataset={here}/c.jsonl",
            "holds conversations, but the model's tokenizer has no chat template",
            put("c.jsonl", CHAT),
            f"holds `{CHAT}`",
        ),
        Case(
            "finetune.dataset={here}/c.jsonl finetune.loss=assistant",
            "the chat template refuses a conversation of user, assistant: no",
            together(put("c.jsonl", CHAT), put("model/chat_template.jinja", "{{ raise_exception('no') }}")),
            "its chat template refuses all",
        ),
        Case(
            "finetune.dataset={here}/c.jsonl finetune.loss=assistant",
            "a conversation has a turn by 'narrator': the known roles are user, human, assistant",
            together(
                put("c.jsonl", CHAT.replace("user", "narrator")), put("model/chat_template.jinja", "{{ messages }}")
            ),
            "a narrator speaks",
        ),
    ],
    "Folders of text": [
        Case(
            "calibration.dataset={here}/d@validation",
            "has no split 'validation': the splits there are test, train",
            split_files(*SPLITS),
            "holds train and test",
        ),
        Case(
            "finetune.validation={here}/d",
            "has no split 'validation': the splits there are test, train",
            split_files(*SPLITS),
            "holds train and test",
        ),
        Case(
            "calibration.dataset={here}/d@validation",
            "the splits there are train, test",
            saved_splits,
            "was left by `save_to_disk`, with train and test",
        ),
        Case(
            "calibration.dataset={here}/d",
            "has configurations de, en: name one of them",
            split_files(*(f"{config}/{name}" for config in ("de", "en") for name in SPLITS)),
            "holds two configurations",
        ),
        Case(
            "calibration.dataset={here}/d:fr",
            "has no configuration 'fr': it has de",
            split_files("de/train.parquet"),
            "holds one configuration",
        ),
        Case(
            "calibration.dataset={here}/d",
            "several formats (a.parquet, b.txt)",
            together(split_files("a.parquet"), put("d/b.txt", "the cat")),
            "holds two forms",
        ),
        Case(
            "calibration.dataset={here}/d",
            "it holds no file of text",
            put("d/dataset_info.json", "{}"),
            "holds metadata only",
        ),
        Case("calibration.dataset={here}/t.gz", "such as t.jsonl.gz", put("t.gz", "a"), "does not name its format"),
        Case(
            "calibration.dataset={here}/t.txt",
            "is a git-lfs pointer",
            put("t.txt", "version https://git-lfs.github.com/spec/v1"),
            "is a git-lfs pointer",
        ),
        Case("calibration.dataset={here}/t.txt@test", "is a single file", put("t.txt", "a"), "is a single file"),
        Case(
            "finetune.dataset={here}/t.jsonl",
            "it has id, data.body; set finetune.column",
            put("t.jsonl", '{"id": 1, "data": {"body": "a"}}'),
            'holds `{"id": 1, "data": {"body": "a"}}`',
        ),
        Case(
            "evaluate.column=data.text 'evaluate.perplexity=[{here}/t.jsonl]'",
            "has no column 'data.text': it has id, data.body; set evaluate.column",
            put("t.jsonl", '{"id": 1, "data": {"body": "a"}}'),
            'holds `{"id": 1, "data": {"body": "a"}}`',
        ),
    ],
    "Texts": [
        Case("calibration.dataset=./nowhere", "no dataset at"),
        Case("calibration.dataset=", "calibration.dataset=None: a word is needed"),
        Case("calibration.dataset=\"''\"", "calibration.dataset is empty"),
        Case("calibration.dataset=nobody/nothing", "cannot load nobody/nothing@train"),
        Case("calibration.dataset=c4@test", "c4 has no split 'test': use one of train, validation"),
        Case("calibration.dataset={here}/t.docx", "the formats are .parquet", put("t.docx", "a"), "is no text file"),
        text("t.txt", "", "is empty"),
        text("t.txt", b"\xff\xfe\xfa" * 9, "cannot load"),
        text("t.jsonl", '{"text": "a', "JSON parse error"),
        text("t.json.gz", "text", "ot a gzipped file"),
        text("t.parquet", "text", "Parquet file size"),
        text("t.jsonl", '{"text": 3}', "should hold text, but its first row is 3"),
        text("t.jsonl", '{"text": null}', "holds no text"),
        text("t.jsonl", '{"title": "a"}', "no column 'text' or 'input_ids': it has title"),
        text("t.jsonl", '{"input_ids": [0.5]}', "should hold token ids"),
        Case(
            "calibration.dataset={here}/t.jsonl",
            "holds token 1000000, but the model knows",
            put("t.jsonl", json.dumps({"input_ids": [10**6] * 256})),
            "holds tokens of another vocabulary",
        ),
        text("t.txt", "the cat sat on the mat .\n" * 2, "set a longer text or a shorter calibration.seq_len"),
        Case(
            "calibration.dataset={here}/t.txt",
            "set calibration.samples=",
            put("t.txt", "the cat sat on the mat .\n" * 20),
            "holds 20 short lines",
        ),
        Case("finetune.dataset=./nowhere", "no dataset at"),
        Case("evaluate.perplexity=[./nowhere]", "no dataset at"),
        Case("finetune.validation=./nowhere", "no dataset at"),
    ],
    "Mirrors": [
        Case("mirror=./nowhere calibration.dataset=wikitext2", "nowhere"),
        Case("mirror={here} calibration.dataset=a/b", "the mirror has no {here}/a/b/default/train-*.parquet"),
        Case(
            "mirror={here} calibration.dataset=a/b@validation",
            "(splits there: train)",
            put("a/b/default/train-0.parquet", ""),
            "only `train` is there",
        ),
        Case("mirror={here} evaluate.tasks=[boolq]", "no {here}/aps/super_glue/boolq/validation-*.parquet"),
    ],
}
