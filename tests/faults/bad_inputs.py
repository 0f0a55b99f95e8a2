"""The bad inputs of test_bad_inputs.py: what is typed, what is damaged before, and what the answer says."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from pipeline.sparsity.masks import Masks
from tests.faults.harm import Harm, change_weights, cut, disk, put, remove

UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
MASKS = "{here}/run/prune/masks.safetensors"
ON_DISK = "run_dir={here}/disk/run"
FLOAT_MASK = """
from pipeline.sparsity.patterns import Pattern

class Half(Pattern):
    ratio = 0.5
    def select(self, score_OI, whole_matrix=False):
        return (score_OI > score_OI.median()).float()
"""


class Case(NamedTuple):
    """What is typed in a folder that holds `model/` and a finished `run/` of it, after `harm`, and what the answer says."""

    typed: str
    says: str
    harm: Harm | None = None
    harmed: str = ""  # in words


def text(name: str, content: str | bytes, says: str) -> Case:
    return Case(f"calibration.dataset={{here}}/{name}", says, put(name, content), f"holds `{content or ' '}`")


def changed(json_file: str, **entries) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / json_file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return harm


def filled(name: str, value: float) -> Harm:
    return change_weights(lambda weights: weights[name].fill_(value), "model/model.safetensors")


def written_masks(mask: torch.Tensor, pattern: str, name: str = UP) -> Harm:
    def harm(folder: Path) -> None:
        masks = Masks()
        masks.add(name, mask, pattern)
        masks.save(folder / "masks.safetensors")

    return harm


def one_weight_not_zero(folder: Path) -> None:
    shutil.copytree(folder / "run/prune/model", folder / "pruned")
    row, column = (~Masks.load(folder / "run/prune/masks.safetensors")[UP]).nonzero()[0].tolist()
    index = json.loads((folder / "pruned/model.safetensors.index.json").read_text())
    change_weights(lambda weights: weights[UP][row].__setitem__(column, 0.25), index["weight_map"][UP])(
        folder / "pruned"
    )


def tokenizer_with(**tokens: str) -> Harm:
    """Special tokens that the model has no embedding for."""

    def harm(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        tokenizer.add_special_tokens({f"{kind}_token": token for kind, token in tokens.items()})
        tokenizer.save_pretrained(folder / "model")

    return harm


def saved_splits(folder: Path) -> None:
    rows = Dataset.from_dict({"text": ["the cat sat on the mat ."]})
    DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "d")


def split_files(*names: str) -> Harm:
    def harm(folder: Path) -> None:
        for name in names:
            (folder / "d" / name).parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict({"text": ["the cat sat on the mat ."]}).to_parquet(folder / "d" / name)

    return harm


def together(*harms: Harm) -> Harm:
    return lambda folder: [harm(folder) for harm in harms]


CHAT = json.dumps({"messages": [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "I ."}]})
SPLITS = ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet")


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "model").glob("*token*"):
        path.unlink()


CASES: dict[str, list[Case]] = {
    "Arguments": [
        Case("justaword", "settings are written key=value"),
        Case("modle=x", "unknown key 'modle': did you mean 'model'?"),
        Case("prune.sparcity=0.5", "unknown key 'prune.sparcity': did you mean 'prune.sparsity'?"),
        Case("prune.method.name=wanda", "prune.method={'name': 'wanda'}: a word is needed"),
        Case("prune=wanda", "prune=wanda: this is a section; set one of its keys"),
        Case("'prune.overrides={'", "cannot read prune.overrides={: is a bracket or a quote left open"),
        Case("'model=${oc.env:HF_TOKEN}'", "${...} is not allowed"),
        Case("model=null", "no model: set model=<hub id or folder>"),
        Case("stages=[pretrain,prune]", "exclude each other"),
        Case("stages=[prun]", "did you mean 'prune'?"),
        Case("stages=[finetune]", "finetune needs prune in stages"),
        Case("stages=[reconstruct]", "reconstruct needs prune in stages"),
        Case("stages=[prune,report]", "report needs evaluate in stages"),
        Case("stages=[export]", "export needs prune in stages"),
        Case("stages=[prune,speed]", "speed needs export in stages"),
        Case("seed=-1", "seed=-1 is out of range"),
        Case("timeout_minutes=0", "timeout_minutes=0.0 is out of range"),
        Case("debug=maybe", "debug=maybe: true or false is needed"),
        Case("dtype=float8", "dtype=float8 is not one of auto, float32, bfloat16, float16"),
        Case("attn_implementation=fast", "attn_implementation"),
    ],
    "Recipes": [
        Case("recipe=lama7b_2of4", "no recipe 'lama7b_2of4': did you mean 'llama7b_2of4'?"),
        Case("recipe={here}/none.yaml", "no recipe"),
        Case("recipe={here}/r.yaml", "is not readable YAML", put("r.yaml", "prune: {"), "holds `prune: {`"),
        Case("recipe={here}/r.yaml", "is not readable YAML", put("r.yaml", b"\xff\xfe\x00"), "holds no text"),
        Case("recipe={here}/r.yaml", "should hold key: value lines", put("r.yaml", "- a"), "holds `- a`"),
        Case(
            "recipe={here}/r.yaml",
            "prune.overrides has the key 5: put it in quotes",
            put("r.yaml", "prune: {overrides: {5: dense}}"),
            "holds `prune: {overrides: {5: dense}}`",
        ),
        Case("recipe={here}/r.yaml", "extends itself", put("r.yaml", "extends: r"), "holds `extends: r`"),
        Case("recipe={here}/r.yaml", "no recipe 'tinny'", put("r.yaml", "extends: tinny"), "holds `extends: tinny`"),
        Case("recipe={here}/r.yaml", "did you mean 'seed'?", put("r.yaml", "sed: 1"), "holds `sed: 1`"),
    ],
    "Pruning": [
        Case(
            "recipe={here}/r.yaml",
            "YAML reads 2:4 as 124: set prune.sparsity=2of4",
            put("r.yaml", "prune: {sparsity: 2:4}"),
            "holds `prune: {sparsity: 2:4}`",
        ),
        Case("prune.sparsity=124", "YAML reads 2:4 as 124: set prune.sparsity=2of4"),
        Case("prune.sparsity=1.5", "between 0 and 1"),
        Case("prune.sparsity=0", "between 0 and 1"),
        Case("prune.sparsity=nan", "between 0 and 1"),
        Case("prune.sparsity=4of2", "0 < N < M"),
        Case("prune.sparsity=half", "is not a sparsity"),
        Case("prune.sparsity=1of5", "not divisible by 5"),
        Case("prune.sparsity=./none.py", "prune.sparsity=none.py: no such file"),
        Case(
            "prune.sparsity={here}/p.py",
            "defines 0 subclasses of Pattern: define exactly one",
            put("p.py", "x = 1"),
            "holds `x = 1`",
        ),
        Case(
            "prune.sparsity={here}/p.py",
            "Half.select gave torch.float32 of (32, 32) for model.layers.0.self_attn.q_proj.weight: it should give torch.bool",
            put("p.py", FLOAT_MASK),
            "its masks are floats",
        ),
        Case("prune.method=wandda", "did you mean 'wanda'?"),
        Case("prune.method=./none.py", "no such file"),
        Case(
            "prune.method={here}/m.py",
            "defines 0 subclasses of PruneMethod: define exactly one",
            put("m.py", "x = 1"),
            "holds `x = 1`",
        ),
        Case("prune.method={here}/m.py", "m.py does not load: SyntaxError", put("m.py", "def"), "holds `def`"),
        Case("prune.allocation=owl", "set prune.sparsity=0.5"),
        Case("'prune.overrides={\"*.layers.9.*\": dense}'", "nothing is called"),
        Case("'prune.overrides={\"*down*\": 3}'", "prune.overrides[*down*]"),
        Case("prune.damp=-1", "prune.damp=-1.0 is out of range"),
        Case("calibration.samples=1.5", "calibration.samples=1.5: a whole number is needed"),
        Case("calibration.samples=0", "calibration.samples=0 is out of range"),
        Case("calibration.seq_len=4096", "set calibration.seq_len=128"),
    ],
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
    "Training": [
        Case("finetune.loss=assistant", "holds no conversations, which finetune.loss=assistant needs"),
        Case("finetune.loss=assistent", "is not one of all, assistant: did you mean 'assistant'?"),
        Case("finetune.dataset=self", "what the model itself writes is text to calibrate by only"),
        Case("finetune.rank=0", "finetune.rank=0 is out of range"),
        Case("finetune.rank=many", "finetune.rank=many: a whole number is needed"),
        Case("finetune.lr=nan", "finetune.lr=nan is not a finite number"),
        Case("finetune.lr=1e20", "set a smaller lr than 1e+20"),
        Case("finetune.method=lorra", "did you mean 'lora'?"),
        Case("finetune.method=full finetune.quantize=nf4", "set finetune.method=lora"),
        Case("finetune.quantize=nf3", "did you mean 'nf4'?"),
        Case("finetune.quantize=nf4 finetune.strategy=fsdp", "exclude each other"),
        Case("finetune.effective=cached finetune.dropout=0.1", "set finetune.effective=auto"),
        Case(
            "finetune.method=plain_lora",
            "export needs a sparse model, and finetune.method=plain_lora leaves an adapter",
        ),
        Case("finetune.patience=3", "set finetune.validation="),
        Case("prune.sparsity=0.6 finetune.targets=[query]", "no pruned matrix is called 'query'"),
        Case(
            "'prune.overrides={\"*q_proj*\": dense}' finetune.targets=[q_proj]",
            "no pruned matrix is called 'q_proj'",
        ),
        Case("finetune.targets=[]", "finetune.targets is empty"),
        Case("dtype=bfloat16 finetune.bias=all", "set finetune.precision=bf16-mixed, or dtype=float32"),
        Case("finetune.strategy=fsdp finetune.optimizer=adamw_8bit", "set finetune.optimizer=adamw"),
        Case("finetune.targets=q_proj", "set 'finetune.targets=[q_proj]'"),
        Case("finetune.loggers=[tensorbord]", "did you mean 'tensorboard'?"),
        Case("finetune.seq_len=4096", "set finetune.seq_len=128"),
        Case("stages=[prune,reconstruct] reconstruct.samples=7", "set reconstruct.samples="),
        Case("stages=[prune,reconstruct] reconstruct.samples=1", "reconstruct.samples=1 is out of range"),
        Case(
            "stages=[prune,reconstruct] reconstruct.samples=64 reconstruct.seq_len=4096", "set reconstruct.seq_len=128"
        ),
        Case("stages=[prune,reconstruct] reconstruct.dataset=./nowhere", "no dataset at"),
    ],
    "Evaluation": [
        Case("'evaluate.perplexity=[self]'", "evaluate.perplexity=self"),
        Case("evaluate.windows=0", "evaluate.windows=0 is out of range"),
        Case("evaluate.bos=maybe", "evaluate.bos=maybe: true or false is needed"),
        Case("evaluate.tasks=arc_easy", "set 'evaluate.tasks=[arc_easy]'"),
        Case("evaluate.tasks=[arc_esy]", "unknown task 'arc_esy': did you mean arc_easy"),
        Case("evaluate.tasks=[world_home]", "world_homes"),
        Case("evaluate.tasks=[./none.yaml]", "no task at"),
        Case("evaluate.tasks=[humaneval]", "task 'humaneval' runs code that the model writes"),
        Case("evaluate.seq_len=129", "exceeds the model's 128 positions: set evaluate.seq_len=128"),
        Case("evaluate.batch_size=many", "evaluate.batch_size=many is neither a number nor auto"),
        Case("evaluate.batch_size=0", "evaluate.batch_size=0 is out of range"),
        Case("evaluate.placement=disk", "is not one of auto, whole, stream, device_map"),
        Case(
            "evaluate.perplexity=[{here}/t.txt]",
            "too few for one window of 64",
            put("t.txt", "the cat"),
            "holds `the cat`",
        ),
    ],
    "Sweeps": [
        Case("run_dir=a,b", "run_dir holds for the whole sweep: give it one value"),
        Case("prune.method=wanda,", "a value is missing beside a comma"),
        Case("prune.method=wanda,wnada", "prune.method=wnada is neither known nor a .py file: did you mean 'wanda'?"),
        Case("seed=1,1", "is a value given twice?"),
        Case("evaluate.tasks=boolq,rte", "set 'evaluate.tasks=[boolq,rte]'"),
    ],
    "Commands": [
        Case("compare", "nothing to compare: run launch.py compare runs/a runs/b"),
        Case("compare {here}/nowhere", "is no finished run and holds none"),
        Case(
            "compare {here}/run",
            "results.json is damaged: repeat its command",
            put("run/evaluate/results.json", "{"),
            "`results.json` is cut",
        ),
        Case(
            "compare {here}/run",
            "stage.json is damaged: repeat its command",
            put("run/evaluate/stage.json", "{}"),
            "`stage.json` holds `{}`",
        ),
        Case(
            "compare {here}/run",
            "results.json is damaged: repeat its command",
            changed("run/evaluate/results.json", protocol={}),
            "`results.json` has lost its protocol",
        ),
        Case("verify", "2 paths are needed, 0 given: run `python launch.py verify MODEL_FOLDER MASKS_FILE`"),
        Case(f"verify {{here}}/none {MASKS}", "no model folder"),
        Case(f"verify {{here}} {MASKS}", "has no config.json"),
        Case("verify {here}/model {here}/none", "no mask file"),
        Case("verify {here}/model {here}/model/config.json", "is not a mask file of this project"),
        Case(f"verify {{here}}/model {MASKS}", "should be zero"),
        Case(
            f"verify {{here}}/pruned {MASKS}", "is 0.25 and should be zero", one_weight_not_zero, "one weight is 0.25"
        ),
        Case(
            "verify {here}/model {here}/masks.safetensors",
            "not a mask file",
            put("masks.safetensors", "x"),
            "masks file holds `x`",
        ),
        Case(
            "verify {here}/model {here}/masks.safetensors",
            "break 2of4",
            written_masks(torch.ones(48, 32, dtype=torch.bool), "2of4"),
            "its mask keeps all",
        ),
        Case(
            "verify {here}/model {here}/masks.safetensors",
            "is this another model's mask file?",
            written_masks(torch.ones(4, 4, dtype=torch.bool), "0.5"),
            "a mask of another shape",
        ),
        Case(f"apply {{here}}/model {MASKS}", "run `python launch.py apply MODEL_FOLDER MASKS_FILE TARGET_FOLDER`"),
        Case(f"apply {{here}}/model {MASKS} {{here}}/run", "is there already"),
        Case(f"apply {{here}}/model {MASKS} {{here}}/model/config.json/new", "cannot write"),
        Case(
            "apply {here}/model {here}/masks.safetensors {here}/new",
            "is this another model's mask file?",
            written_masks(torch.ones(48, 32, dtype=torch.bool), "0.5", "model.layers.7.mlp.up_proj.weight"),
            "a mask of a layer that is not there",
        ),
    ],
    "Speed": [
        Case("speed", "a model folder is needed, none given: run `python launch.py speed FOLDER [OTHER ...]`"),
        Case("speed {here}/none", "none is not there: a model folder is needed"),
        Case(f"speed {MASKS}", "masks.safetensors is a file: a model folder is needed"),
        Case("speed {here}/run", "has neither config.json nor compact.json: a model folder is needed"),
        Case("speed {here}/model speed.threads=0", "speed.threads=0 is out of range"),
        Case("speed {here}/model speed.batches=1", "set 'speed.batches=[1]'"),
        Case(
            "speed {here}/model {here}/run/export/compact",
            "compact.json is damaged",
            put("run/export/compact/compact.json", "{}"),
            "`compact.json` holds `{}`",
        ),
    ],
    "Folders": [
        Case("run_dir=~nobody-here/x", "there is no such home folder"),
        Case("run_dir={here}/file", "cannot write {here}/file/.lock", put("file", ""), "`file` is a file"),
        Case("run_dir={here}/file/below", "cannot write {here}/file/below/.lock", put("file", ""), "`file` is a file"),
        Case("run_dir=/proc/run", "cannot write /proc/run/.lock"),
        Case("seed=1", "cannot write {here}/run/.prune/", put("run/.prune", ""), "`run/.prune` is a file"),
    ],
    "Disks": [
        Case(f"{ON_DISK}", "make room, or set run_dir=... on another disk", disk("size=100k"), "a disk of 100 KiB"),
        Case(f"{ON_DISK}", "No space left on device", disk("size=10m,nr_inodes=9"), "a disk that takes 8 files"),
        Case(f"{ON_DISK}", "Read-only file system", disk("size=10m,ro"), "a disk that is read-only"),
    ],
}

# a byte of a finished stage is another, and what is said before the stage is made again
DAMAGED = {  # the report is made anew wherever the run is moved to, as it is here
    "prune": [
        *("masks.safetensors", "model/config.json", "model/tokenizer.json", "model/model.safetensors.index.json"),
        *("model/model-00002-of-00004.safetensors", "layers.csv", "matrices.csv", "model/README.md"),
        *("stage.json", "stage.json: key", "stage.json: artefacts", "stage.json: sha256", "stage.json: digest"),
    ],
    "finetune": ["model/model-00001-of-00001.safetensors", "adapter/adapter_model.safetensors", "metrics.csv"],
    "export": ["compact/compact-00001-of-00001.safetensors", "compact/compact.json", "sizes.json"],
    "evaluate": ["results.json"],
}
DAMAGED_FILES = [(stage, file) for stage, files in DAMAGED.items() for file in files]
