"""Restores what a function of the API must not change: a model's state other than its weights, and the random state."""

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from pipeline.models.copying import copy_of
from pipeline.models.pointwise import mark_pointwise


@contextmanager
def preserved(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in evaluation mode without gradients. Afterwards their modes, `requires_grad`, gradients and
    storage are restored, and so are the random states and the handler of Ctrl-C."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    gradients = [(p, p.requires_grad, p.grad) for model in models for p in model.parameters()]
    storage = [(tensor, tensor.data) for model in models for tensor in [*model.parameters(), *model.buffers()]]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    handler = signal.getsignal(signal.SIGINT)
    grad_enabled = torch.is_grad_enabled()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for model in models:
                model.eval().requires_grad_(False)
            for parameter, _, _ in gradients:
                parameter.grad = None
            yield
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        torch.set_grad_enabled(grad_enabled)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        for tensor, data in storage:
            tensor.data = data  # Lightning's teardown moves models to the host
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in gradients:
            parameter.requires_grad_(requires_grad).grad = gradient


@contextmanager
def pointwise(wanted: bool, *models: nn.Module) -> Iterator[None]:
    """Inside, 1x1 convolutions of the models are matrices to prune, if `wanted`; afterwards they are as before."""
    kinds = [(module, type(module)) for model in models for module in model.modules()]
    try:
        for model in models if wanted else ():
            mark_pointwise(model)
        yield
    finally:
        for module, kind in kinds:
            module.__class__ = kind


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules, for adapters and hooks, that shares the parameters and buffers of `model`. Raises as `copy_of`."""
    return copy_of(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
