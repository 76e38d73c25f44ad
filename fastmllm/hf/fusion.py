"""The seam: a module computes with our operators after its class is swapped for a subclass of the same name.

Parameters, submodules, hooks, `isinstance` and `str(type)` stay what they were, so that state_dict, save_pretrained,
LoRA, recorded outputs and policies by class name keep working; taking it back is putting the class back.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _all

ORIGINAL, STATE = "_fastmllm_original", "_fastmllm_"
PREPARED = STATE + "prepared"  # the forward that accelerate's mixed precision had bound
LOWERED = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts: neither fp64 nor integers
TOGETHER = STATE + "together"  # where modules keep the one `Together`, if they have to
_FUSED: dict[tuple[type, tuple[type[Fusion], ...]], type] = {}


class Together:
    """What modules share that compute so together or not at all; copies of them share a copy.

    Attributes:
        whole: none of them was unpatched yet.
    """

    def __init__(self) -> None:
        self.whole = True


class Fusion:
    """How one kind of module computes with our operators; never instantiated.

    A subclass names in `overrides` the methods that it replaces and defines a static method of each of those names:
    `forward(module, original, *args, **kwargs)`, where `original(module, *args, **kwargs)` is what it replaces.
    """

    op: ClassVar[str]  # what is asked for in `patch(ops=…)` and shown in the report
    overrides: ClassVar[tuple[str, ...]] = ("forward",)
    reads: ClassVar[tuple[str, ...]] = ()  # properties that it answers: a static method `name(module, original)` each
    one_tensor: ClassVar[bool] = False  # its methods take one tensor, by place; other calls run what they replace

    @staticmethod
    def absent(device: torch.device) -> str | None:
        """Say why no module can compute so on this machine or device, or None: that fails only who asks by name."""
        return None

    @staticmethod
    def refuses(module: nn.Module) -> str | None:
        """Say why this module can never compute so, or None; asked once, when it is patched."""
        return None

    @staticmethod
    def slower(module: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
        """Say why it would be slower there than what transformers runs, or None; asked once, when it is patched."""
        return None

    @staticmethod
    def unsupported(module: nn.Module, *args: Any, **kwargs: Any) -> str | None:
        """Say why this call cannot be computed so, or None; asked at every call, so it never waits for a device."""
        return None

    @staticmethod
    def companions(module: nn.Module) -> list[tuple[nn.Module, type[Fusion]]]:
        """Name other modules that have to be swapped with this one."""
        return []

    @staticmethod
    def backend(device: torch.device) -> str:
        """Name what computes on a device, for the report."""
        return "triton" if device.type == "cuda" else "torch"


def fused_class(original: type, fusions: tuple[type[Fusion], ...]) -> type:
    """Return the subclass of a module's class that computes with some fusions, always the same one."""
    if (original, fusions) not in _FUSED:
        namespace: dict[str, Any] = {
            "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
            ORIGINAL: original, "_fastmllm_fusions": fusions, "__reduce_ex__": _reduce,
            "__init__": _init,
        }  # fmt: skip
        for fusion in fusions:
            for name in fusion.overrides:
                before = namespace.get(name, getattr(original, name))
                namespace[name] = _guarded(fusion, name, before)
            for name in fusion.reads:
                before = namespace.get(name, inspect.getattr_static(original, name))
                namespace[name] = before.getter(_answered(fusion, name, before.fget))
        _FUSED[original, fusions] = type(original.__name__, (original,), namespace)
    return _FUSED[original, fusions]


def _guarded(fusion: type[Fusion], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    compute = getattr(fusion, name)

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(type(self), ORIGINAL):  # unpatched since somebody kept this method
            return original(self, *args, **kwargs)
        if fusion.one_tensor and (kwargs or len(args) != 1 or not isinstance(args[0], Tensor)):
            why: str | None = "it is called with other arguments than one tensor"
        else:
            why = _transformed() or _parted(fusion, self) or fusion.unsupported(self, *args, **kwargs)
        if why is None:
            return compute(self, original, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self.__dict__.setdefault(STATE + "fallbacks", Counter())[f"{fusion.op}: {why}"] += 1
        return original(self, *args, **kwargs)

    method.__name__, method.__qualname__ = name, f"{fusion.__name__}.{name}"
    method.__wrapped__ = original  # type: ignore[attr-defined]  # what inspects signatures sees transformers'
    return method


def _answered(fusion: type[Fusion], name: str, original: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    compute = getattr(fusion, name)

    def read(self: nn.Module) -> Any:
        return compute(self, original)

    return read


def _transformed() -> str | None:
    """Name what our operators have no formula for: forward-mode derivatives and the transforms of torch.func."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "torch.func or forward-mode derivatives"
    return None


def _parted(fusion: type[Fusion], module: nn.Module) -> str | None:
    together = module.__dict__.get(TOGETHER) if fusion.op == "compress" else None
    return None if together is None or together.whole else "a part of the model that it needs was unpatched"


def _init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Make what is built from `type(model)`, as from_pretrained does, an instance of transformers' class."""
    self.__class__ = getattr(type(self), ORIGINAL)
    self.__init__(*args, **kwargs)  # type: ignore[misc]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle and copy by original class and fusions: the subclass itself has no name to be found by."""
    cls = type(self)
    return _rebuild, (getattr(cls, ORIGINAL), cls._fastmllm_fusions), self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(original: type, fusions: tuple[type[Fusion], ...]) -> Any:
    return object.__new__(fused_class(original, fusions))


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module's own class is one of ours."""
    return ORIGINAL in type(module).__dict__


def bound_forward(module: nn.Module) -> str | None:
    """Say who has put a forward on the instance, which hides its class's: Liger, `kernels`; None for nobody.

    accelerate's hooks do so too, but keep the class's forward and call it, and leave it behind: `_rebind` follows them.
    Its mixed precision (Trainer's, too) calls the class's inside of autocast: fusions go around that.
    """
    bound = module.__dict__.get("forward")
    if bound is None or "_old_forward" in module.__dict__ or _is_own(module, bound, type(module)):
        return None
    if PREPARED in module.__dict__ or _prepared(module, bound):
        return None
    function = getattr(bound, "__func__", bound)
    said = function.__code__.co_filename if isinstance(function, FunctionType) else type(bound).__module__
    return f"its forward is already replaced, by {said}"


def fuse(module: nn.Module, fusions: tuple[type[Fusion], ...]) -> None:
    """Swap the class of a module."""
    assert not is_fused(module)
    before = type(module)
    module.__class__ = fused_class(before, fusions)
    _rebind(module, before)
    bound = module.__dict__.get("forward")
    if isinstance(bound, MethodType) and _prepared(module, bound, before):
        module.__dict__[PREPARED], function = bound, bound.__func__
        for fusion in fusions:
            function = _guarded(fusion, "forward", function) if "forward" in fusion.overrides else function
        module.__dict__["forward"] = MethodType(function, module)


def restore(module: nn.Module) -> None:
    """Put the class of a module back, and drop what its fusions kept on it."""
    before = type(module)
    module.__class__ = before.__dict__[ORIGINAL]
    if (together := module.__dict__.get(TOGETHER)) is not None:
        together.whole = False
    prepared = module.__dict__.get(PREPARED)
    if prepared is not None and "_original_forward" in module.__dict__:  # accelerate has not taken its own off since
        module.__dict__["forward"] = prepared
    for name in [n for n in module.__dict__ if n.startswith(STATE)]:
        del module.__dict__[name]
    _rebind(module, before)


def _is_own(module: nn.Module, bound: Any, cls: type) -> bool:
    return (
        isinstance(bound, MethodType) and bound.__self__ is module and bound.__func__ is getattr(cls, "forward", None)
    )


def _prepared(module: nn.Module, bound: Any, cls: type | None = None) -> bool:
    """Tell whether a forward is accelerate's mixed precision around the class's own."""
    cls = cls or type(module)
    own = getattr(cls, "forward", None)
    if not isinstance(bound, MethodType) or not _is_own(module, module.__dict__.get("_original_forward"), cls):
        return False
    return inspect.unwrap(bound.__func__, stop=lambda function: function is own) is own


def _rebind(module: nn.Module, before: type) -> None:
    """Point a forward that accelerate kept, or left behind, at the class that the module now has."""
    for name in ("_old_forward", "forward"):
        if _is_own(module, module.__dict__.get(name), before):
            module.__dict__[name] = MethodType(type(module).forward, module)


def hooked(module: nn.Module) -> bool:
    """Tell whether somebody wants to see the calls of a module, or of all modules."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    everywhere = (_all._global_forward_hooks, _all._global_forward_pre_hooks, _all._global_backward_hooks)
    return any(own) or any(everywhere) or "forward" in module.__dict__


def plain(*modules: nn.Module | None) -> str | None:
    """Say why the weights of some linear layers or norms cannot be read past their forward, or None.

    LoRA, quantisation and hooks want to be called, and ZeRO-3 gathers weights when a module is called.
    """
    for module in modules:
        if module is None:
            continue
        if type(module) not in (nn.Linear, nn.LayerNorm) and getattr(type(module), ORIGINAL, None) is not nn.LayerNorm:
            return f"a part of it is {type(module).__name__}, which has to be called"
        if hooked(module):
            return f"its {type(module).__name__} carries hooks"
        if any(hasattr(p, "ds_id") for p in module.parameters(recurse=False)):
            return "ZeRO-3 holds its weights"
    return None


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    names = list(inspect.signature(inspect.unwrap(function)).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def outside_autocast(compute: Callable[..., Tensor], *tensors: Tensor | None, **options: Any) -> Tensor:
    """Call an operator without autocast, its tensors in the dtype in which autocast would run a linear layer.

    Inside of an operator autocast would go on to choose the dtype of each of its steps.
    """
    device = next(t.device.type for t in tensors if t is not None)
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return compute(*tensors, **options)
    dtype = torch.get_autocast_dtype(device)
    cast = [t if t is None or t.dtype not in LOWERED else t.to(dtype) for t in tensors]
    with torch.autocast(device, enabled=False):
        return compute(*cast, **options)


def agrees(ours: Tensor, theirs: Tensor) -> bool:
    """Tell whether two results are the same up to rounding in their dtype."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    scale = float(theirs.double().abs().max())
    return float((ours.double() - theirs.double()).abs().max()) <= 16 * torch.finfo(theirs.dtype).eps * max(
        scale, 1e-30
    )
