"""Perplexity of a model on a text, as the pruning papers compute it. Pure torch; the caller provides the sum over ranks.

Shapes: N = windows, B = windows per batch, T = seq_len tokens, V = vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.engine.blocks import find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.evaluation.paired import standard_error
from pipeline.runtime.errors import UserError

# positions whose logits are in float32 at a time: 256 MiB with a vocabulary of 256K, where a whole window takes 2 GiB
POSITIONS = 256

Logits = Callable[[list[Tensor]], Iterator[Tensor]]  # batches (B, T) -> the logits (B, T, V) of each
Progress = Callable[[str], None]  # called with progress text, such as "12 of 166 windows"


def windows(ids: Tensor, seq_len: int, count: int | None = None, bos: int | None = None) -> Tensor:
    """Cuts token ids (tokens,) into consecutive windows, (tokens // seq_len, seq_len); the remainder is dropped.

    `count` limits the number of windows. With `bos`, each window is that token and seq_len - 1 tokens of text; a `bos` that
    starts the text is skipped. Raises `UserError` if the text is shorter than one window.
    """
    if bos is not None:
        body = windows(ids[1:] if ids[:1].tolist() == [bos] else ids, seq_len - 1, count)
        return torch.cat([torch.full((len(body), 1), bos, dtype=body.dtype), body], dim=1)
    if len(ids) < max(seq_len, 2):
        hint = f"set evaluate.seq_len={len(ids)} or less" if len(ids) > 1 else "set another text"
        raise UserError(f"the text gives {len(ids)} tokens, too few for one window of {seq_len}: {hint}")
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)[:count]


def full_logits(model: nn.Module) -> Logits:
    """The logits of a Hugging Face causal LM in evaluation mode, on its device or devices."""
    return lambda batches: (model(input_ids=batch.to(model.device), use_cache=False).logits for batch in batches)


def streamed_logits(model: nn.Module, device: torch.device, report: Progress = lambda text: None) -> Logits:
    """The same logits as `full_logits`, bit for bit, computed layer by layer: `device` holds one layer, the embeddings and the
    head; the hidden states of all batches are kept in host memory."""

    def logits(batches: list[Tensor]) -> Iterator[Tensor]:
        blocks, passed = find_blocks(model), itertools.count(1)
        forwards = LayerwiseForwards(model, blocks, call, batches, device, torch.device("cpu"))
        with forwards:
            yield from forwards.results(lambda block: report(f"layer {next(passed)} of {len(blocks)}"))

    def call(batch_BT: Tensor) -> Tensor:
        return model(input_ids=batch_BT, use_cache=False).logits

    return logits


@torch.no_grad()
def window_losses(
    logits: Logits,
    windows_NT: Tensor,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    report: Progress = lambda text: None,
) -> Tensor:
    """The mean loss in nats of each window's T - 1 predicted tokens, (N,) float64 on the CPU, the same on all ranks.

    `batch_size` is in windows. Rank r computes the batches r, r + world_size, ...: batches stay whole, so the bits do not
    depend on the number of processes. `all_sum` sums a tensor over the ranks. `report` gets the progress of this rank.
    Raises `UserError` on all ranks if the loss of a window is not finite.
    """
    batches = windows_NT.split(batch_size)[rank::world_size]
    # each window's loss is zero on all ranks but one, so the sum over ranks is exact
    loss_N = torch.zeros(len(windows_NT), dtype=torch.float64)
    positions = torch.arange(len(windows_NT)).split(batch_size)[rank::world_size]
    for done, (batch_BT, position, logits_BTV) in enumerate(zip(batches, positions, logits(list(batches))), 1):
        loss_N[position] = torch.stack([_window_loss(*window) for window in zip(logits_BTV, batch_BT)]).cpu()
        report(f"{sum(map(len, batches[:done]))} of {sum(map(len, batches))} windows")
    loss_N = all_sum(loss_N)
    if not loss_N.isfinite().all():
        window = int(loss_N.isfinite().logical_not().nonzero()[0])
        raise UserError(
            f"the loss of window {window + 1} of {len(loss_N)} is {loss_N[window].item()}: the model is broken, or its "
            "numbers overflow float16 (then set dtype=bfloat16 or dtype=float32)"
        )
    return loss_N


def perplexity(loss_N: Tensor) -> float:
    """exp of the mean loss over windows (SparseGPT and Wanda)."""
    return loss_N.mean().exp().item()


def perplexity_error(losses: list[float]) -> float | None:
    """The standard error of the perplexity by the delta method: the error of exp(x) is exp(x) times that of x. None for one
    window."""
    error = standard_error(losses)
    return None if error is None else perplexity(torch.tensor(losses, dtype=torch.float64)) * error


def _window_loss(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Mean loss in nats of tokens 2..T given those before: float32 per token, float64 over the window."""
    targets_T = ids_T[1:].to(logits_TV.device)
    parts = zip(logits_TV[:-1].split(POSITIONS), targets_T.split(POSITIONS), strict=True)
    losses = [F.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in parts]
    return torch.cat(losses).double().mean()
