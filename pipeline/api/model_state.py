"""Owns what a function of the API must leave as it was: all of a model but its weights, and the process's random state."""

import copy
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def kept(*models: nn.Module) -> Iterator[None]:
    """Within, the models are in evaluation mode and want no gradients. Afterwards their modes, `requires_grad`, gradients and
    places are what they were, and so are the states of random numbers and of Ctrl-C."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    wanted = [(p, p.requires_grad, p.grad) for model in models for p in model.parameters()]
    homes = [(tensor, tensor.data) for model in models for tensor in [*model.parameters(), *model.buffers()]]
    python, arrays = random.getstate(), np.random.get_state()
    handler = signal.getsignal(signal.SIGINT)
    grad = torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for model in models:
                model.eval().requires_grad_(False)
            for parameter, _, _ in wanted:
                parameter.grad = None
            yield
    except SystemExit as error:  # so Lightning answers a Ctrl-C, having set it to be ignored
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        torch.set_grad_enabled(grad)
        random.setstate(python)
        np.random.set_state(arrays)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        for tensor, home in homes:
            tensor.data = home  # Lightning's teardown takes a model to the host
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in wanted:
            parameter.requires_grad_(requires_grad).grad = gradient


def with_same_weights(model: nn.Module) -> nn.Module:
    """A model of its own modules, to attach to and to hook into, whose parameters and buffers are those of `model`."""
    shared: dict[int, Tensor] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)
