"""Owns the perplexity of a model on a text, as the pruning papers compute it. Pure torch: the sum over ranks is given.

Shapes: N = windows, B = windows of a batch, T = seq_len tokens, V = vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import UserError

# positions whose logits are in float32 at a time: with a vocabulary of 256K 256 MiB, where a whole window takes 2 GiB
POSITIONS = 256


def windows(ids: Tensor, seq_len: int) -> Tensor:
    """Cuts token ids (tokens,) into (tokens // seq_len, seq_len) windows end to end; what is left over is not used.

    Raises `UserError` where the text is shorter than one window.
    """
    if len(ids) < max(seq_len, 2):
        hint = f"type evaluate.seq_len={len(ids)} or less" if len(ids) > 1 else "choose another text"
        raise UserError(f"the text gives {len(ids)} tokens, too few for one window of {seq_len}: {hint}")
    return ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    windows_NT: Tensor,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    all_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """exp of the mean over the windows of the mean loss of a window's T - 1 predicted tokens (SparseGPT and Wanda).

    `model` is a Hugging Face causal LM, measured on the device it is on; `batch_size` is in windows. Rank r of
    `world_size` takes the batches r, r + world_size, ...: whole batches, so that every window is computed in the same
    company, hence to the same bits, on any number of processes. `all_sum` sums a tensor over the ranks and returns it;
    all ranks return the same number. `progress(done, of)` is told the windows of this rank.
    Raises `UserError`, on all ranks, where the loss of a window is not finite.
    """
    batches = range(0, len(windows_NT), batch_size)[rank::world_size]
    mine = sum(len(windows_NT[start : start + batch_size]) for start in batches)
    # float64: a sum over ranks that is exact, each window's loss being zero on all ranks but one
    loss_N = torch.zeros(len(windows_NT), dtype=torch.float64, device=model.device)
    training, done = model.training, 0
    model.eval()
    try:
        for start in batches:
            batch_BT = windows_NT[start : start + batch_size].to(model.device)
            logits_BTV = model(input_ids=batch_BT, use_cache=False).logits
            for i in range(len(batch_BT)):
                loss_N[start + i] = _window_loss(logits_BTV[i], batch_BT[i])
            done += len(batch_BT)
            if progress:
                progress(done, mine)
    finally:
        model.train(training)
    loss_N = all_sum(loss_N)
    if not loss_N.isfinite().all():
        window = int(loss_N.isfinite().logical_not().nonzero()[0])
        raise UserError(
            f"the loss of window {window + 1} of {len(loss_N)} is {loss_N[window].item()}: the model is broken, or its "
            "numbers leave the range of float16 (then type dtype=bfloat16 or dtype=float32)"
        )
    return loss_N.mean().exp().item()


def _window_loss(logits_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Mean loss, in nats, of the tokens 2..T given those before them: float32 per token, float64 over the window."""
    targets_T = ids_T[1:].to(logits_TV.device)
    parts = zip(logits_TV[:-1].split(POSITIONS), targets_T.split(POSITIONS), strict=True)
    losses = [F.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in parts]
    return torch.cat(losses).double().mean()
