"""Many named tasks on any model, chosen per call: the face of document 004 over `orbit.adapter`.

    import orbit.multitask as LoRA

    model = LoRA.Model(model=model)            # every Linear, Embedding, Conv and attention, and registered modules
    model.add_task("anime")                    # a new task changes nothing until it is trained
    model(x)                                   # the base model, always
    model(x, task="anime")                     # one task
    model(x, task=["anime", None])             # one per row of the batch, None for the base
    model(x, tasks=["anime", "birds"])         # several together; or {"anime": 0.7, "birds": 0.3}
    model.state_dict()                         # the base's parameters, under the base's names
    model.state_dict(task="anime")             # the task's, which load into any task of the same shapes

`Model` is a module that holds the model, as `model.model`, and passes on what it does not know itself. It differs
from `orbit.adapter.inject` in its habits: every layer is adapted, the last one too; nothing is frozen until you
say so; no task is current unless a call names it.

Inside another module its state is whole, base and tasks together, because that is what the other's checkpoint is
for: `parent.state_dict()` holds `head.0.weight` and `head.0.lora_A.anime.weight`, and loads strictly. So are the
checkpoints of a training run, which take the state of `checkpoint_module`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from orbit import adapter
from orbit.adapter import (
    AdapterConfig,
    InjectReport,
    StateError,
    TaskError,
    register_base_module_wrapper,
    set_route,
)
from orbit.adapter.inject import base_parameters
from orbit.adapter.merge import refuse_merged
from orbit.adapter.reach import fitting_ranks

__all__ = ["Model", "register_base_module_wrapper"]

_INNER = "model."


class Model(nn.Module):
    """A model with tasks.

    Args:
        model: any module, changed in place: its layers are grafted when the first task is added.
        r: the rank of a task's updates; smaller in layers that have no such rank.
        alpha: the numerator of their scale alpha/r.
        **settings: more fields of `orbit.adapter.AdapterConfig`, the defaults of every task: dora, gated, rslora,
            dropout, targets, exclude, …

    Raises:
        ConfigError: a setting lies outside its range. TypeError: an unknown one, or no module.
    """

    def __init__(self, model: nn.Module, r: int = 8, alpha: float = 16.0, **settings: Any) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"LoRA.Model adapts an nn.Module, got {type(model).__name__}")
        self.model = model
        self._settings = {"targets": ("re:.*",), **settings, "r": r, "alpha": alpha}
        AdapterConfig(**self._settings)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward. `task=` and `tasks=` are taken before, if the tasks were added here."""
        given = {key: kwargs.pop(key) for key in ("task", "tasks") if key in kwargs}
        if not any(way is not None for way in given.values()):
            return self.model(*args, **kwargs)
        if not self.tasks:
            raise TaskError(f"{', '.join(given)}= names a task and the model has none; add_task(name) first")
        with adapter.route(self, **given):  # they were added to a module that this one is part of
            return self.model(*args, **kwargs)

    # -- tasks -----------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, in the order in which they were added."""
        return adapter.tasks(self)

    def add_task(self, name: str, **settings: Any) -> InjectReport:
        """Add a task that changes nothing until it is trained. Calls without a task stay with the base model.

        Args:
            name: any non-empty string that is no task yet.
            **settings: fields of AdapterConfig that differ from the model's defaults.

        Raises:
            TaskError, ConfigError, TargetError, GraftError, RouteError: the model is unchanged.
        """
        config = AdapterConfig(**{**self._settings, **settings})
        if "r" not in settings:
            config = fitting_ranks(self, config, _INNER)
        report = adapter.inject(self, config, name, freeze_base=False)
        set_route(self, None)
        return report

    def remove_task(self, name: str) -> None:
        """Take a task out.

        Raises:
            TaskError: no such task. RouteError: merged or running.
        """
        adapter.remove(self, name)

    def rename_task(self, old: str, new: str) -> None:
        """Give a task another name.

        Raises:
            TaskError: no task `old`, or there is a task `new`. RouteError: merged or running.
        """
        adapter.rename(self, old, new)

    def requires_grad_(self, requires_grad: bool = True, task: str | None = None) -> Model:
        """Train or freeze the base's parameters, or one task's.

        Raises:
            TaskError: no such task.
        """
        if task is None:
            for parameter in base_parameters(self):
                parameter.requires_grad_(requires_grad)
        else:
            adapter.set_trainable(self, task, requires_grad)
        return self

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, task: str | None = None, **kwargs: Any) -> Any:
        """The base's parameters and buffers under the base's names, or one task's under its layers' names.

        Inside another module's `state_dict()`, both, for all tasks.

        Raises:
            TaskError: no such task.
        """
        if (
            args or kwargs.get("destination") is not None
        ):  # a parent's state_dict, or one of torch's older calls
            return self.model.state_dict(*args, **kwargs)
        if task is not None:
            prefix = kwargs.get("prefix", "")
            return {prefix + key: value for key, value in self._task_state(task, **kwargs).items()}
        return adapter.base_state_dict(self.model, **kwargs)

    @property
    def checkpoint_module(self) -> nn.Module:
        """The module whose own `state_dict()` is base and tasks together, for checkpoints of a training run."""
        return self.model

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
        task: str | None = None,
    ) -> _IncompatibleKeys:
        """Set the base's parameters and buffers, or one task's.

        Raises:
            TaskError: no such task. MergeError: it is merged.
            StateError: the task's tensors are missing, there are others, or they have other shapes.
            RuntimeError: the same of the base's, from torch.
        """
        if task is None:
            base = adapter.base_state_dict(self.model)
            unexpected = [key for key in state_dict if key not in base]
            if strict and unexpected:
                raise StateError(
                    f"the base model has no {', '.join(map(repr, unexpected[:3]))}"
                    f"{' …' if len(unexpected) > 3 else ''}; a task's tensors are loaded with task="
                )
            own = {key: value for key, value in state_dict.items() if key in base}
            missing, more = self.model.load_state_dict(own, strict=strict, assign=assign)
            missing = [key for key in missing if key in base]
            return _IncompatibleKeys(missing, [*unexpected, *more])
        return self._load_task(state_dict, strict, assign, task)

    def _load_task(
        self, state_dict: Mapping[str, Any], strict: bool, assign: bool, task: str
    ) -> _IncompatibleKeys:
        own = self._task_state(task)
        refuse_merged(self, task)
        missing = [key for key in own if key not in state_dict]
        unexpected = [key for key in state_dict if key not in own]
        wrong = [key for key in own if key in state_dict and _shape(state_dict[key]) != _shape(own[key])]
        said = []
        if strict:
            said += [f"missing: {', '.join(missing)}"] if missing else []
            said += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
        for key in wrong:
            said.append(f"{key} is {_shape(state_dict[key])} and should be {_shape(own[key])}")
        if said:
            raise StateError(f"this is no state of task {task!r}: {'; '.join(said)}")
        for name, owner in self._owners(task).items():
            inside = {
                key[len(name) :]: value
                for key, value in state_dict.items()
                if key.startswith(name) and key in own
            }
            owner.load_state_dict(inside, strict=False, assign=assign)
        return _IncompatibleKeys(missing, unexpected)

    def _task_state(self, task: str, keep_vars: bool = False, **_: Any) -> dict[str, Tensor]:
        return {
            f"{name}{key}": value
            for name, owner in self._owners(task).items()
            for key, value in owner.state_dict(keep_vars=keep_vars).items()
        }

    def _owners(self, task: str) -> dict[str, nn.Module]:
        """What owns the task's tensors, by "<layer>.<container>."."""
        return {
            f"{path.removeprefix('model').removeprefix('.')}.{bank}.".removeprefix("."): owner
            for path, layer in adapter.task_layers(self, task).items()
            for bank, owner in layer.owners(task).items()
        }

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # As part of another module: what was saved without the name of the wrapped model gets it back.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}{_INNER}{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # -- the wrapped model -----------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if name == "model" or "model" not in modules:
                raise
            return getattr(modules["model"], name)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
