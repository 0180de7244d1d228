"""What a pooled model must refuse: everything that would read or move weights that are not all here.

Every guard is an attribute of an instance, set on each module from the root down to the pooled projections, so a call
that enters in the middle of the tree is refused before it has changed anything. Undo removes them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import nn

from ..errors import SidpError

# On every module between the root and a pooled projection. `_apply` is what .to(), .half(), .cuda() and share_memory()
# come down to; the last two are what copy.deepcopy and pickle (torch.save) ask for.
_EVERYWHERE = {
    "_apply": "moving or casting (.to(), .half(), .cuda(), ...)",
    "state_dict": "state_dict()",
    "load_state_dict": "load_state_dict()",
    "__deepcopy__": "copy.deepcopy",
    "__reduce_ex__": "pickling (torch.save) or copying",
}
_ON_ROOT = {
    "save_pretrained": "save_pretrained()",
    "push_to_hub": "push_to_hub()",
    "add_adapter": "add_adapter()",
    "load_adapter": "load_adapter()",
    "enable_peft_hotswap": "enable_peft_hotswap()",
}


class GuardedAttributes:
    """Instance attributes set over a module's own, and the way back."""

    def __init__(self) -> None:
        self._undo: list[tuple[nn.Module, str, bool, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        had = name in module.__dict__
        self._undo.append((module, name, had, module.__dict__.get(name)))
        module.__dict__[name] = value

    def restore(self) -> None:
        while self._undo:
            module, name, had, value = self._undo.pop()
            if had:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)


def install_guards(guarded: GuardedAttributes, root: nn.Module, paths: Iterable[str]) -> None:
    """Refuse what cannot be done to a pooled model, on `root` and on every module along each of the dotted `paths`."""
    on_the_way = {id(root): root}
    for path in paths:
        module = root
        for part in path.split("."):
            module = module._modules[part]  # type: ignore[assignment]
            on_the_way[id(module)] = module
    for module in on_the_way.values():
        for name, what in _EVERYWHERE.items():
            guarded.set(module, name, _refuse(what))
        guarded.set(module, "named_modules", _refuse_peft(module.named_modules))
        guarded.set(module, "train", _refuse_true(module.train, "train()"))
        guarded.set(module, "requires_grad_", _refuse_true(module.requires_grad_, "requires_grad_()"))
    for name, what in _ON_ROOT.items():
        if hasattr(root, name):
            guarded.set(root, name, _refuse(what))


def refuse(what: str) -> NoReturn:
    raise SidpError(
        f"{what} is refused on a pooled model: most of its FFN weights live with other ranks. Call "
        "sidp.unpool_model(model) first, which gives it ordinary weights again."
    )


def _refuse(what: str) -> Callable[..., NoReturn]:
    def guard(*args: Any, **kwargs: Any) -> NoReturn:
        refuse(what)

    return guard


def _refuse_true(own: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Let `eval()` and `requires_grad_(False)` pass; a pooled model is for inference only."""

    def guard(*args: Any, **kwargs: Any) -> Any:
        if (*args, *kwargs.values(), True)[0]:
            refuse(f"{what}, which is for training,")
        return own(*args, **kwargs)

    return guard


def _refuse_peft(own: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT has no hook of ours to call, but every one of its tuners walks the modules before it replaces any."""

    def guard(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_globals.get("__name__", "").partition(".")[0] == "peft":
                refuse("adding an adapter with PEFT")
            frame = frame.f_back  # type: ignore[assignment]
        return own(*args, **kwargs)

    return guard
