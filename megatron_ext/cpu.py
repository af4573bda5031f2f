"""What Megatron-Core 0.16.1 takes for granted of CUDA, answered on a machine without it.

    from megatron_ext import cpu
    cpu.prepare()          # once, before the model is built; does nothing where CUDA is available

Two answers; besides, only model/weight_gradient.py may patch a module or a class:

1. Functions of `torch.cuda` that can only raise on such a machine get their meaning on a CPU.
2. Literals such as 'cuda' are constants of a few Megatron-Core functions; those constants are
   exchanged in the functions' code objects. A function that no longer holds the literal raises
   RuntimeError, so a new Megatron-Core version is noticed here and not in the middle of a run.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch


def prepare(device: str = "cpu") -> None:
    """Make Megatron-Core's training path run without CUDA; a second call changes nothing.

    device: where "here" is; "meta" gives tensors shapes but no storage (planning/fake_world.py).
    """
    if torch.cuda.is_available() or getattr(prepare, "done", False):
        return
    _give_meaning_to_torch_cuda(device)
    literals = _literals(device)
    for function in _functions_with_cuda_literals():
        _exchange_literals(function, literals)
    _answer_single_functions()
    prepare.done = True  # type: ignore[attr-defined]


def _literals(device: str) -> dict[Any, Any]:
    """Literal of Megatron-Core -> its meaning on the device."""
    place = "torch." if device == "cpu" else f"torch.{device}."
    kinds = ("FloatTensor", "HalfTensor", "BFloat16Tensor")
    return {"cuda": device, **{f"torch.cuda.{kind}": place + kind for kind in kinds}}


def _give_meaning_to_torch_cuda(device: str) -> None:
    # `device=torch.cuda.current_device()` is how Megatron-Core says "here": tensor_parallel/
    # layers.py:261 (weights), distributed/param_and_grad_buffer.py:783 (gradient buffers),
    # pipeline_parallel/p2p_communication.py:313 (receive buffers), optimizer/optimizer.py:1141.
    torch.cuda.current_device = lambda: torch.device(device)  # type: ignore[assignment,return-value]
    # optimizer/distrib_optimizer.py:1089 (saving), models/common/language_module/
    # language_module.py:244 (tied embeddings): `tensor.cuda()` says "here" as well.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    # Waits for kernels: parallel_state.py:198, p2p_communication.py:398, fully_parallel.py:281.
    # A CPU tensor is ready when its call returns.
    torch.cuda.synchronize = lambda device=None: None
    # Random state of "the device": tensor_parallel/random.py:55, 235-238, 422 (weights, recompute).
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _functions_with_cuda_literals() -> list[Callable[..., Any]]:
    from megatron.core.optimizer import distrib_optimizer, grad_scaler, optimizer
    from megatron.core.pipeline_parallel import schedules

    return [
        optimizer.MixedPrecisionOptimizer.__init__,  # optimizer.py:473 device='cuda'
        optimizer.Float16OptimizerWithFloat16Params.__init__,  # optimizer.py:671 param.type()
        optimizer.FP32Optimizer.__init__,  # optimizer.py:907 device='cuda'
        # grad_scaler.py:15, 71, 74, 77 device='cuda' (fp16)
        grad_scaler.MegatronGradScaler.__init__,
        grad_scaler.DynamicGradScaler.__init__,
        # distrib_optimizer.py:361, 582: accept only parameters whose type() says cuda
        distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups,
        schedules.forward_backward_no_pipelining,  # schedules.py:596 device="cuda"
        schedules.forward_backward_pipelining_with_interleaving,  # schedules.py:983
        schedules.forward_backward_pipelining_without_interleaving,  # schedules.py:2138
    ]


def _exchange_literals(
    function: Callable[..., Any], literals: dict[Any, Any] | None = None
) -> None:
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = function.__code__
    constants = tuple(
        _exchanged(constant, literals or _literals("cpu")) for constant in code.co_consts
    )
    if constants == code.co_consts:
        raise RuntimeError(
            f"{function.__module__}.{function.__qualname__} holds no CUDA literal any more: "
            "this Megatron-Core is not the 0.16.1 that megatron_ext/cpu.py was written for"
        )
    function.__code__ = code.replace(co_consts=constants)


def _exchanged(constant: Any, literals: dict[Any, Any]) -> Any:
    if isinstance(constant, tuple):
        return tuple(_exchanged(item, literals) for item in constant)
    return literals.get(constant, constant) if isinstance(constant, str) else constant


def _answer_single_functions() -> None:
    from megatron.core.tensor_parallel import random

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # tensor_parallel/random.py:72 goes into torch's C++ for the device's generator.
    random._set_cuda_rng_state = set_rng_state
