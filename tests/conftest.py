"""Shared fixtures: tiny real models, and the command as a user runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Set before torch is imported, also for the processes that tests start: models this small gain nothing from more threads, and
# waiting threads spin and slow down the other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on the CPU

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import launch
from pipeline.data import world
from pipeline.sparsity.masks import Masks

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real trained Llama of 260K parameters; skips the test if it is absent."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("../shared is absent")
    return folder


@pytest.fixture(scope="session")
def hub() -> Path:
    folder = SHARED / "data" / "hub"
    if not folder.is_dir():
        pytest.skip("../shared is absent")
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


def byte_tokenizer(eos: str = "<eos>", *special: str) -> PreTrainedTokenizerFast:
    """One token per byte and per special token."""
    alphabet = [eos, *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([eos, *special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def llama_config(vocabulary: int, **changes) -> LlamaConfig:
    """A tiny Llama with grouped-query attention."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaConfig(vocab_size=vocabulary, **sizes | changes)


def make_tiny_llama(folder: Path) -> Path:
    """Saves a random Llama of three layers with grouped-query attention, and the world's tokenizer; returns the folder."""
    tokenizer = world.tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = llama_config(len(tokenizer), tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def half_llama(tiny_llama, tmp_path_factory) -> Path:
    """`tiny_llama` in float16, as LLaMA and OPT are stored."""
    folder = tmp_path_factory.mktemp("half_llama")
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(folder)
    for path in tiny_llama.glob("*token*"):
        shutil.copy(path, folder)
    return folder


# a run of a few seconds on `tiny_llama`; later settings override
QUICK = (
    "stages=[prune,finetune,evaluate,report]",
    "calibration.dataset=world",
    "calibration.samples=8",
    "calibration.seq_len=32",
    "calibration.batch_size=2",
    "finetune.dataset=world",
    "finetune.seq_len=32",
    "finetune.max_steps=6",
    "finetune.batch_size=4",
    "finetune.lr=1e-2",
    "finetune.checkpoint_every=2",
    "evaluate.perplexity=[world]",
    "evaluate.seq_len=64",
    "evaluate.tasks=[]",
    "evaluate.limit=20",
)


def command(*settings: object, processes: int = 1) -> list[str]:
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *several, "launch.py"]
    return [*launch, *map(str, settings)]


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def espalier(*settings: object, processes: int = 1, expect: int | None = 0) -> str:
    """Runs the command in a subprocess and returns its output. `expect`: the exit code, None for any failure."""
    done = subprocess.run(
        command(*settings, processes=processes),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    seen = done.stdout + done.stderr
    assert done.returncode == expect if expect is not None else done.returncode, seen[-3000:]
    return seen


def compiled_for_gpus(module: str) -> list[str]:
    """The lines that a module prints which compiles Triton kernels for compute capabilities 8.0 and 9.0, without a GPU. Skips
    the test if Triton's CUDA tools are absent."""
    triton = pytest.importorskip("triton")
    if not list(Path(triton.__file__).parent.rglob("cuobjdump")):
        pytest.skip("this triton has no CUDA tools")
    variables = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module, "80", "90"], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


PRUNE = (*QUICK, "stages=[prune]")


def typing(usual, monkeypatch, capsys):
    """A function that runs the command in this process: (exit code, stdout, our lines on stderr)."""

    def run(*settings) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["launch.py", *usual, *map(str, settings)])
        code = launch.main()
        seen = capsys.readouterr()
        return code, seen.out, [line for line in seen.err.splitlines() if line.startswith("espalier: ")]

    return run


@pytest.fixture
def typed(monkeypatch, capsys):
    return typing(PRUNE, monkeypatch, capsys)


@pytest.fixture
def refused(typed):
    """Runs a command that must fail, and returns its one-line message."""

    def run(run_dir: Path, *settings) -> str:
        code, _, lines = typed(f"run_dir={run_dir}", *settings)
        assert code == 2 and len(lines) == 1, lines
        assert not (run_dir / "prune").exists()
        return lines[0]

    return run


@pytest.fixture
def finishes(typed):
    """Runs a command that must succeed, and returns the content of the mask file and the output."""

    def run(run_dir: Path, *settings) -> tuple[bytes, str]:
        code, output, lines = typed(f"run_dir={run_dir}", *settings)
        assert code == 0, lines
        assert not list(run_dir.rglob("*.part"))
        Masks.load(run_dir / "prune/masks.safetensors").check_patterns()
        return (run_dir / "prune/masks.safetensors").read_bytes(), output

    return run


@pytest.fixture(scope="session")
def whole_masks(tiny_llama, tmp_path_factory) -> bytes:
    """The mask file of a run without faults."""
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["launch.py", *PRUNE, f"model={tiny_llama}", f"run_dir={run_dir}"])
        assert launch.main() == 0
    return (run_dir / "prune/masks.safetensors").read_bytes()
