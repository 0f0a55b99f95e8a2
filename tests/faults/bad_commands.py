"""Other commands, run folders and disks, and damage of finished runs."""

import torch

from tests.faults.cases import MASKS, ON_DISK, Case, changed, one_weight_not_zero, written_masks
from tests.faults.harm import disk, put

CASES: dict[str, list[Case]] = {
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
        Case(f"apply {{here}}/model {MASKS} {{here}}/run", "exists already"),
        Case(f"apply {{here}}/model {MASKS} {{here}}/model/config.json/new", "cannot write"),
        Case(
            "apply {here}/model {here}/masks.safetensors {here}/new",
            "is this another model's mask file?",
            written_masks(torch.ones(48, 32, dtype=torch.bool), "0.5", "model.layers.7.mlp.up_proj.weight"),
            "a mask of a layer that is not there",
        ),
    ],
    "Speed": [
        Case("speed", "a model folder is needed: run `python launch.py speed FOLDER [OTHER ...]`"),
        Case("speed {here}/none", "none does not exist: a model folder is needed"),
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
        Case(
            f"{ON_DISK}", "free some space, or set run_dir=... on another disk", disk("size=100k"), "a disk of 100 KiB"
        ),
        Case(f"{ON_DISK}", "No space left on device", disk("size=10m,nr_inodes=9"), "a disk that takes 8 files"),
        Case(f"{ON_DISK}", "Read-only file system", disk("size=10m,ro"), "a disk that is read-only"),
    ],
}

# files of finished stages in which one byte is changed; the stage then runs again
DAMAGED = {  # not the report: it runs again because the run folder has moved
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
