"""Owns the validation of a training on the assistant's words only: the perplexity of those, each counting the same."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from callbacks.validation import Validation
from pipeline import data, distill, processes


class ValidationOfAnswers(Validation):
    """Of windows with tokens that bear no loss: see `data.ids_and_labels`."""

    @torch.no_grad()
    def measure(self, module, context: Callable[[], AbstractContextManager] = nullcontext) -> float:
        """exp of the mean loss of all tokens that bear one, the same on any number of processes."""
        world_size, rank = processes.world_size(), processes.rank()
        batches = self.windows_NT.split(self.batch_size)
        total = torch.zeros(2, dtype=torch.float64, device=module.device)
        module.model.eval()
        for start in range(0, len(batches), world_size):
            mine = min(start + rank, len(batches) - 1)  # a sharded model needs every rank, a rank without a batch too
            ids_BT, labels_BT = data.ids_and_labels(batches[mine].long().to(module.device))
            with context():
                logits_BTV = module.model(input_ids=ids_BT, use_cache=False).logits
            if mine == start + rank:
                total[0] += distill.loss(logits_BTV, None, labels_BT, 0.0, 1.0, count=1.0)
                total[1] += (labels_BT[:, 1:] >= 0).sum()
        module.model.train()
        loss, count = processes.all_sum(total).tolist()
        return math.exp(min(loss / max(count, 1.0), 700.0))
