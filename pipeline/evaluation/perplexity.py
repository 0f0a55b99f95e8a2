"""Owns the perplexity of a model on a text, as the pruning papers compute it. Pure torch: the sum over ranks is given.

Shapes: N = windows, B = windows of a batch, T = seq_len tokens, D = width, V = vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.engine.blocks import find_blocks
from pipeline.engine.layerwise import LayerwiseForwards
from pipeline.runtime.errors import UserError

# positions whose logits are in float32 at a time: with a vocabulary of 256K 256 MiB, where a whole window takes 2 GiB
POSITIONS = 256

Logits = Callable[[list[Tensor]], Iterator[Tensor]]  # batches (B, T) -> the logits (B, T, V) of each
Tell = Callable[[str], None]  # is told how far it is, such as "12 of 166 windows"


def windows(ids: Tensor, seq_len: int, count: int | None = None, bos: int | None = None) -> Tensor:
    """Cuts token ids (tokens,) into (tokens // seq_len, seq_len) windows end to end; what is left over is not used.

    `count`: only so many, the first. With `bos`, each window is that token and seq_len - 1 of the text, in which a `bos` at
    the beginning does not count. Raises `UserError` where the text is shorter than one window.
    """
    if bos is not None:
        body = windows(ids[1:] if ids[:1].tolist() == [bos] else ids, seq_len - 1, count)
        return torch.cat([torch.full((len(body), 1), bos, dtype=body.dtype), body], dim=1)
    if len(ids) < max(seq_len, 2):
        hint = f"set evaluate.seq_len={len(ids)} or less" if len(ids) > 1 else "choose another text"
        raise UserError(f"the text gives {len(ids)} tokens, too few for one window of {seq_len}: {hint}")
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)[:count]


def whole(model: nn.Module) -> Logits:
    """The logits of a Hugging Face causal LM in evaluation mode, on the device (or the devices) it is on."""
    return lambda batches: (model(input_ids=batch.to(model.device), use_cache=False).logits for batch in batches)


def streamed(model: nn.Module, device: torch.device, tell: Tell = lambda text: None) -> Logits:
    """The same, layer by layer: the device holds one layer, the embeddings and the head; the forwards of all batches wait in
    the host's memory. To the bit what `whole` gives on that device."""

    def logits(batches: list[Tensor]) -> Iterator[Tensor]:
        blocks, passed = find_blocks(model), itertools.count(1)
        forwards = LayerwiseForwards(model, blocks, call, batches, device, torch.device("cpu"))
        with forwards:
            yield from forwards.results(lambda block: tell(f"layer {next(passed)} of {len(blocks)}"))

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
    tell: Tell = lambda text: None,
) -> Tensor:
    """(N,) float64 on the CPU: the mean loss, in nats, of each window's T - 1 predicted tokens.

    `batch_size` is in windows. Rank r of `world_size` takes the batches r, r + world_size, ...: whole batches, so that
    every window is computed in the same company, hence to the same bits, on any number of processes. `all_sum` sums a
    tensor over the ranks and returns it; all ranks return the same. `tell` hears of the windows of this rank.
    Raises `UserError`, on all ranks, where the loss of a window is not finite.
    """
    batches = windows_NT.split(batch_size)[rank::world_size]
    # float64: a sum over ranks that is exact, each window's loss being zero on all ranks but one
    loss_N = torch.zeros(len(windows_NT), dtype=torch.float64)
    place_of = torch.arange(len(windows_NT)).split(batch_size)[rank::world_size]
    for done, (batch_BT, places, logits_BTV) in enumerate(zip(batches, place_of, logits(list(batches))), 1):
        loss_N[places] = torch.stack([_window_loss(*window) for window in zip(logits_BTV, batch_BT)]).cpu()
        tell(f"{sum(map(len, batches[:done]))} of {sum(map(len, batches))} windows")
    loss_N = all_sum(loss_N)
    if not loss_N.isfinite().all():
        window = int(loss_N.isfinite().logical_not().nonzero()[0])
        raise UserError(
            f"the loss of window {window + 1} of {len(loss_N)} is {loss_N[window].item()}: the model is broken, or its "
            "numbers leave the range of float16 (then set dtype=bfloat16 or dtype=float32)"
        )
    return loss_N


def perplexity(loss_N: Tensor) -> float:
    """exp of the mean over the windows of their mean losses (SparseGPT and Wanda)."""
    return loss_N.mean().exp().item()


def _window_loss(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Mean loss, in nats, of the tokens 2..T given those before them: float32 per token, float64 over the window."""
    targets_T = ids_T[1:].to(logits_TV.device)
    parts = zip(logits_TV[:-1].split(POSITIONS), targets_T.split(POSITIONS), strict=True)
    losses = [F.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in parts]
    return torch.cat(losses).double().mean()
