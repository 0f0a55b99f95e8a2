"""The perplexity equals the papers' loop, for any batch size and number of processes."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pipeline.data import sources, token_windows
from pipeline.evaluation import paired
from pipeline.evaluation.perplexity import full_logits, perplexity, streamed_logits, window_losses, windows
from pipeline.runtime.errors import UserError
from tests.conftest import llama_config
from tests.engine.test_decoder import FAMILIES, small_model

VOCABULARY = 97


def tiny_llama(vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    # initializer_range: far from uniform, so that choices of a question do not tie
    changes = {"num_hidden_layers": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
    return LlamaForCausalLM(llama_config(vocabulary, **changes))


def random_windows(tokens: int = 300, seq_len: int = 40) -> torch.Tensor:
    return windows(torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1)), seq_len)


def measured(model, windows_NT: torch.Tensor, batch_size: int, *shared) -> float:
    return perplexity(window_losses(full_logits(model), windows_NT, batch_size, *shared))


def papers_loop(model, ids: torch.Tensor, seq_len: int) -> float:
    """One window at a time: the sum of mean loss * seq_len, divided by the number of tokens."""
    count = len(ids) // seq_len
    total = 0.0
    for i in range(count):
        window = ids[i * seq_len : (i + 1) * seq_len].unsqueeze(0)
        with torch.no_grad():
            total += model(window, labels=window).loss.float().item() * seq_len
    return math.exp(total / (count * seq_len))


@torch.no_grad()
def test_windows_that_begin_with_bos_predict_each_token_once():
    """A window is BOS and seq_len - 1 tokens of the text; all of these are predicted, and none is lost between windows."""
    model, bos = tiny_llama().eval(), 5
    ids = torch.randint(6, VOCABULARY, (41,), generator=torch.Generator().manual_seed(2))
    for text in (ids, torch.cat([torch.tensor([bos]), ids])):  # the tokenizer may already have added one
        windows_NT = windows(text, 11, bos=bos)
        assert windows_NT.shape == (4, 11) and (windows_NT[:, 0] == bos).all()
        assert torch.equal(windows_NT[:, 1:].flatten(), ids[:40])
    expected = (
        torch.tensor([model(window[None], labels=window[None]).loss for window in windows_NT]).mean().exp().item()
    )
    assert measured(model, windows_NT, 3) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(windows(ids, 11, 2, bos), windows_NT[:2])
    assert torch.equal(windows(ids, 10, 2), ids[:20].view(2, 10))
    with pytest.raises(UserError, match="too few for one window"):
        windows(ids[:5], 11, bos=bos)


@pytest.mark.parametrize("seq_len", [2, 40, 300])  # 300: more positions than are converted to float32 at a time
def test_equals_the_papers_loop(seq_len):
    model = tiny_llama().eval()
    ids = torch.randint(VOCABULARY, (627,), generator=torch.Generator().manual_seed(2))
    value = measured(model, windows(ids, seq_len), 3)
    assert value == pytest.approx(papers_loop(model, ids, seq_len), rel=1e-6)


def test_windows_are_consecutive_and_the_rest_is_dropped():
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("tokens", [0, 1, 15])
def test_a_text_shorter_than_a_window_says_what_to_set(tokens):
    remedy = "set evaluate.seq_len=15" if tokens > 1 else "set another text"
    with pytest.raises(UserError, match=f"gives {tokens} tokens, too few for one window of 16: {remedy}"):
        windows(torch.zeros(tokens, dtype=torch.long), 16)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_does_not_change_it(batch_size):
    model = tiny_llama()
    expected = measured(model, random_windows(), 3)
    assert measured(model, random_windows(), batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 9])  # of 7 windows; some ranks have none
def test_ranks_sum_to_the_same_bits(world_size):
    logits = full_logits(tiny_llama().eval())
    alone, shares = window_losses(logits, random_windows(), 2), []
    for rank in range(world_size):
        window_losses(logits, random_windows(), 2, rank, world_size, lambda loss_N: shares.append(loss_N) or alone)
    assert torch.equal(torch.stack(shares).sum(0), alone)
    assert all(((share == 0) | (share == alone)).all() for share in shares)


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)

    def all_sum(tensor):
        dist.all_reduce(tensor)
        return tensor

    value = measured(tiny_llama(), random_windows(), 2, rank, world_size, all_sum)
    torch.save(value, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_compute_the_same(tmp_path):
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second == measured(tiny_llama(), random_windows(), 2)


def test_a_nan_loss_names_its_window():
    model = tiny_llama()
    rows = torch.arange(12).view(3, 4)
    with torch.no_grad():
        model.model.embed_tokens.weight[rows[1, 2]] = float("nan")
    with pytest.raises(UserError, match="window 2 of 3 is nan"):
        measured(model, rows, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_computes_what_the_cpu_does():
    on_cpu = measured(tiny_llama(), random_windows(), 2)
    assert measured(tiny_llama().cuda(), random_windows(), 2) == pytest.approx(on_cpu, rel=1e-4)


def test_leaves_the_model_unchanged_and_reports_progress():
    model, messages = tiny_llama(), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    window_losses(full_logits(model), random_windows(), 3, report=messages.append)
    assert messages == ["3 of 7 windows", "6 of 7 windows", "7 of 7 windows"]
    assert not any(tensor.is_inference() for tensor in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_equals_the_model_exactly(family):
    """Also final norms, heads and changes to logits; the last batch is smaller than the others."""
    ids_NT = torch.randint(3, 61, (5, 24), generator=torch.Generator().manual_seed(3))
    expected = window_losses(full_logits(small_model(family)), ids_NT, 2)
    messages = []
    losses = window_losses(streamed_logits(small_model(family), torch.device("cpu"), messages.append), ids_NT, 2)
    assert torch.equal(losses, expected)
    assert messages == ["layer 1 of 3", "layer 2 of 3", "layer 3 of 3"]


@pytest.mark.slow
def test_equals_the_papers_loop_on_a_real_model_and_text(stories, hub):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(stories), AutoTokenizer.from_pretrained(stories)
    for spec in ("wikitext2", "local/stories"):
        ids = token_windows.joined(sources.source(spec, str(hub), "test"), tokenizer)[: 20 * 256 + 100]
        assert measured(model, windows(ids, 256), 8) == pytest.approx(papers_loop(model, ids, 256), rel=1e-6)


def test_the_paired_error_is_the_error_of_the_differences():
    """If windows are equally hard for both models, it is far below the models' own errors."""
    hard_N = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
    noise_N = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.01
    ours = {
        "losses": {"a": (hard_N + 0.5 + noise_N).tolist(), "one": [1.0]},
        "correct": {"t": [1, 1, 0, 1], "u": [1, 0]},
    }
    theirs = {"losses": {"a": hard_N.tolist(), "one": [2.0]}, "correct": {"t": [1, 0, 0, 0]}}
    difference = paired.difference(ours, theirs)
    change = difference["perplexity"]["a"]
    assert change["log"] == pytest.approx(0.5, abs=4 * change["stderr"])
    assert change["stderr"] == pytest.approx(noise_N.std().item() / 20)
    assert change["stderr"] < 0.01 * paired.standard_error(theirs["losses"]["a"])
    assert difference["zero_shot"] == {"t": {"acc": 0.5, "stderr": pytest.approx((1 / 3) ** 0.5 / 2)}}
    assert difference["perplexity"].keys() == {"a"}  # one window has no standard error
