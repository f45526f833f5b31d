"""A device "standin" for machines without a GPU: the CPU computes, and torch keeps its tensors apart from
CPU tensors as it does those of a GPU.

`install` registers it for this process; REFLUX_TEST_DEVICE=standin runs the suite on it. A tensor of the
device shares its memory with a CPU tensor, its twin, which computes. As on a GPU, an operation on tensors of
two devices raises RuntimeError, and `.numpy()` raises TypeError. What goes by the name "cuda" is not tried:
autocast and Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from reflux.models import placement

NAME = "standin"
HERE, CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), torch.device("cpu")
# operations that read CPU tensors beside those of the device, as they do on a GPU
MIXED = ("aten::index", "aten::index_put_", "aten::_index_put_impl_")
UNORDERED = ("aten::cumsum", "aten::bincount", "aten::histc", "aten::put_", "aten::nll_loss2d_forward")
# the registrations last as long as they do
_library, _aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def install() -> None:
    """Make the device known to torch, and let device "auto" be it; once per process."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    _library.fallback(_run, "PrivateUse1")
    _aten.impl("convolution_overrideable", _convolution, "PrivateUse1")
    _aten.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    placement.first_device = lambda: NAME
    # A module that moves keeps its parameters, and with them the ties between them, as on a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation that reads a tensor of the device, or makes one."""
    name = op._schema.name
    if name in SPECIAL:
        return SPECIAL[name](op, *args, **kwargs)
    leaves = pytree.tree_leaves((args, kwargs))
    _refuse_nondeterministic(name, leaves)
    if name not in MIXED:
        _refuse_two_devices(name, [*args, *kwargs.values()])
    args = tuple(
        _number(value, declared) for value, declared in zip(args, op._schema.arguments, strict=False)
    )
    here = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == NAME}
    twins = {key: _twin(tensor) for key, tensor in here.items()}
    # An empty output is given its shape, and the memory for it, by the operation.
    empty = [a.name for a in op._schema.arguments if a.is_out and not kwargs[a.name].numel()]
    twins |= {id(kwargs[name]): torch.empty(0, dtype=kwargs[name].dtype) for name in empty}

    def moved(leaf: Any) -> Any:
        return twins.get(id(leaf), CPU if isinstance(leaf, torch.device) else leaf)

    given_args, given_kwargs = pytree.tree_map(moved, (args, kwargs))
    found = op(*given_args, **given_kwargs)
    for key in empty:
        _placed(kwargs[key], _lent(given_kwargs[key]), given_kwargs[key])
    own = {id(twin): here[key] for key, twin in twins.items()}
    shared = {twin.untyped_storage().data_ptr(): here[key] for key, twin in twins.items()}

    def back(made: Tensor) -> Tensor:
        if id(made) in own:
            return own[id(made)]
        base = shared.get(made.untyped_storage().data_ptr()) if made.numel() else None
        if base is None:
            return _over(_lent(made), made)
        with torch.inference_mode(base.is_inference()):
            return _over(base.untyped_storage(), made)

    return pytree.tree_map_only(Tensor, back, found)


def _refuse_nondeterministic(name: str, leaves: list[Any]) -> None:
    """RuntimeError for the sums that torch has in no deterministic form on a GPU."""
    floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
    if torch.are_deterministic_algorithms_enabled() and name in UNORDERED and floats:
        raise RuntimeError(f"{name} does not have a deterministic implementation")


def _number(value: Any, declared: Any) -> Any:
    """A number in the place of a tensor is given as a tensor without dimensions."""
    if isinstance(value, int | float) and str(declared.type) == "Tensor":
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return value


def _refuse_two_devices(name: str, values: list[Any]) -> None:
    """RuntimeError where a CPU tensor stands beside one of the device. A CPU tensor without dimensions is
    taken as a number, but not in a list of tensors.
    """
    listed = [leaf for value in values if isinstance(value, list | tuple) for leaf in value]
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim] + [
        v for v in listed if isinstance(v, Tensor)
    ]
    if len({tensor.device for tensor in tensors}) > 1:
        raise RuntimeError(
            f"{name}: expected all tensors on one device, but some are on {NAME} and some on cpu"
        )


def _twin(tensor: Tensor) -> Tensor:
    """The CPU tensor over the same memory."""
    storage = tensor.untyped_storage()
    lent = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    made = torch.empty(0, dtype=tensor.dtype)
    return made.set_(lent, tensor.storage_offset(), tensor.shape, tensor.stride())


def _lent(made: Tensor) -> Any:
    """The memory of a CPU tensor as a storage of the device, which keeps it alive."""
    storage = made.untyped_storage()
    lent = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device(NAME, 0), storage.nbytes()
    )
    lent.owner = storage
    return lent


def _over(storage: Any, like: Tensor) -> Tensor:
    """A tensor of the device over `storage`, with the shape and strides of `like`."""
    return _placed(torch._C._acc.create_empty_tensor((0,), like.dtype), storage, like)


def _placed(tensor: Tensor, storage: Any, like: Tensor) -> Tensor:
    place = (storage, like.storage_offset(), list(like.shape), list(like.stride()))
    return aten.set_.source_Storage_storage_offset.redispatch(HERE, tensor, *place)


def _resize(op: Any, tensor: Tensor, size: Any, **kwargs: Any) -> Tensor:
    made = torch.empty(0, dtype=tensor.dtype).set_(_twin(tensor).clone()).resize_(size)
    return _placed(tensor, _lent(made), made)


def _convolution(*args: Any) -> Any:
    return _run(aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any) -> Any:
    return _run(aten.convolution_backward.default, grad, x, weight, [len(weight)], *args)


def _copy_from(op: Any, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Between the device and the CPU in either direction, or within the device."""
    ends = (tensor if tensor.device.type == "cpu" else _twin(tensor) for tensor in (target, source))
    next(ends).copy_(next(ends))
    return target


def _histc(op: Any, values: Tensor, *args: Any) -> Tensor:
    """Of whole numbers too, as on a GPU."""
    _refuse_nondeterministic("aten::histc", [values])
    made = op(_twin(values).double(), *args).to(values.dtype)
    return _over(_lent(made), made)


def _set(op: Any, tensor: Tensor, *source: Any) -> Tensor:
    return op.redispatch(HERE, tensor, *source)


aten = torch.ops.aten
SPECIAL = {
    "aten::resize_": _resize,
    "aten::set_": _set,
    "aten::histc": _histc,
    "aten::_copy_from": _copy_from,
    # 0: the products and the softmax themselves
    "aten::_fused_sdp_choice": lambda op, *args, **kwargs: 0,
}
