"""A model that is a mixture of LoRA experts, and still its model.

`mix` (`mixing.py`) gives the model's class a generated subclass, as a graft does with a layer: its parameters keep
their names, it is still a `PreTrainedModel` with its `generate`, `save_pretrained` and place in `transformers.Trainer`,
and its forward makes two passes of its own (`passes/forward.py`). The classifier is a submodule, `xlora_classifier`.

The mixture is what the model computes where nobody chose a task: `model(x, task="math")`, `with route(model, None)` and
`set_route` go before it, and `model.disable()` is the base model.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orbit.adapter.graft import Graft
from orbit.adapter.inject import adapter_parameters, base_state_dict, set_trainable
from orbit.adapter.routes.replay import History, in_backward
from orbit.adapter.routes.route import route, state_of
from orbit.adapter.routes.state import outside_graphs
from orbit.xlora import files
from orbit.xlora.classifier import Classifier
from orbit.xlora.config import xLoRAConfig
from orbit.xlora.errors import XLoRAError
from orbit.xlora.experts import expert_layers
from orbit.xlora.generation.approximation import Approximation
from orbit.xlora.generation.arguments import generate_arguments
from orbit.xlora.log import ScalingsLog, save_scalings_log
from orbit.xlora.passes.forward import run
from orbit.xlora.passes.memory import Memory


class xLoRAModel(nn.Module):
    """What a mixture is besides its own class: document 001's Model API.

    Attributes:
        xlora_config: the settings, the model's own copy. Those that are no sizes may be changed between forwards.
        xlora_experts: the names of the tasks that are mixed, in the order of the scalings' last axis.
        xlora_classifier: the router.
        xlora_log: predictions.
        xlora_approximation: of the running `approximate` block, or None.
        xlora_memory: of the running `remember` block, or None.
    """

    xlora_config: xLoRAConfig
    xlora_experts: tuple[str, ...]
    xlora_classifier: Classifier
    xlora_log: ScalingsLog
    xlora_approximation: Approximation | None = None
    xlora_memory: Memory | None = None
    _xlora_original: type[nn.Module]

    # -- the layers ------------------------------------------------------------------------------------------

    def xlora_layers(self) -> dict[str, Graft]:
        """The layers that carry experts, by dotted name, in the order of the scalings' third axis."""
        return expert_layers(self, self.xlora_experts)

    def xlora_places(self) -> Mapping[int, int]:
        """The place of each of these layers on that axis, by `id(layer)`."""
        return self._xlora_layout()[1]

    def xlora_flat(self) -> Collection[int]:
        """Those of them, by `id(layer)`, that may be given all tokens in order as one axis, as OPT does.

        A layer in a list within a block is one of several that each get some tokens of a mixture of experts.
        """
        return self._xlora_layout()[2]

    def _xlora_layout(self) -> tuple[tuple[Graft, ...], Mapping[int, int], Collection[int]]:
        kept = self.__dict__.get("_xlora_kept")
        if kept is None:
            layers = self.xlora_layers()
            lists = [f"{path}." for path, module in self.named_modules() if isinstance(module, nn.ModuleList)]
            places = {id(layer): k for k, layer in enumerate(layers.values())}
            flat = {id(layers[path]) for path in layers if sum(map(path.startswith, lists)) < 2}
            kept = self.__dict__["_xlora_kept"] = tuple(layers.values()), places, flat
        return kept

    # -- on and off ------------------------------------------------------------------------------------------

    def xlora_acts(self) -> bool:
        """Does the next forward mix experts, rather than follow a task that somebody chose?"""
        return not state_of(self).is_chosen()

    @outside_graphs
    def _xlora_mixes(self) -> bool:
        """`xlora_acts`, and in a replay of the whole model what its forward did, whatever was chosen since."""
        history = self.__dict__.setdefault("_xlora_history", History(_MIXES))
        if in_backward():
            return history.route_of_replay() == _MIXES
        acts = self.xlora_acts()
        history.note(_MIXES if acts else None)
        return acts

    @contextmanager
    def disable(self) -> Iterator[None]:
        """`with model.disable():` the base model, bit for bit."""
        with route(self, None):
            yield

    # -- what is trained -------------------------------------------------------------------------------------

    def set_use_trainable_adapters(self, use_trainable_adapters: bool) -> None:
        """Set whether the experts train beside the classifier."""
        for expert in self.xlora_experts:
            set_trainable(self, expert, use_trainable_adapters)
        self.xlora_config.use_trainable_adapters = use_trainable_adapters

    def get_use_trainable_adapters(self) -> bool:
        """Does any expert train?"""
        return any(
            parameter.requires_grad
            for expert in self.xlora_experts
            for parameter in adapter_parameters(self, expert).values()
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that train, all numbers), the classifier's and the experts' included."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how much trains: of all, of the classifier and of the experts."""
        trains, total = self.get_nb_trainable_parameters()
        router = sum(p.numel() for p in self.xlora_classifier.parameters() if p.requires_grad)
        experts = sum(
            p.numel()
            for e in self.xlora_experts
            for p in adapter_parameters(self, e).values()
            if p.requires_grad
        )
        print(
            f"trainable params: {trains:,d} || all params: {total:,d} || trainable%: {100 * trains / total:.4f} "
            f"|| classifier: {router:,d} || experts: {experts:,d}"
        )

    # -- scalings --------------------------------------------------------------------------------------------

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Scale all experts by `value` in the scaling pass from now on; None is 1/n for n experts."""
        self.xlora_config.scaling_pass_value = 1 / len(self.xlora_experts) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """The last prediction (batch, seq, layers, experts), before top-k and the global weight; None before any."""
        return self.xlora_log.latest

    def enable_scalings_logging(self) -> None:
        """Log the prediction of every forward from now on."""
        self.xlora_log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stop logging and clear the log."""
        self.xlora_log.enabled = False
        self.xlora_log.entries.clear()

    def get_scalings_log(self) -> list[Tensor]:
        """A shallow copy of the log."""
        return list(self.xlora_log.entries)

    def flush_log_scalings(self, path: str | os.PathLike[str]) -> None:
        """Write the log (num_logged, batch, seq, layers, experts) to `path`.npy, or where its tensors differ in shape
        to one file for each sequence length and a JSON file that restores the order. The log stays.

        Raises:
            XLoRAError: the log is empty, or the path has an extension.
        """
        save_scalings_log(path, self.xlora_log.entries)

    def print_scalings_predictions(self, n_predictions_lifetime: int) -> None:
        """Print the predictions of the next n forwards.

        Raises:
            XLoRAError: n is no integer ≥ 0.
        """
        if not isinstance(n_predictions_lifetime, int) or n_predictions_lifetime < 0:
            raise XLoRAError(
                f"print_scalings_predictions({n_predictions_lifetime!r}): it must be an integer ≥ 0"
            )
        self.xlora_log.to_print = n_predictions_lifetime

    # -- files -----------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        peft: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the mixture, without the base model: settings, classifier and experts; `from_pretrained` reads it.

        Args:
            save_directory: the folder. A new one appears complete, in an old one each file is replaced.
            is_main_process: does this process write?
            state_dict: take the tensors from here instead of the model, by the model's names.
            peft: write what PEFT loads. Its experts are called 0, 1, …, in our order.
            safe_serialization: write the classifier as safetensors, else for torch.load.
            kwargs: `max_shard_size`, by which nothing here is split.

        Raises:
            XLoRAError: an unknown argument, a tensor that `state_dict` lacks, what PEFT cannot hold, or a folder that
                has a config of the other format. OSError: from the file system.
        """
        for name in kwargs.keys() - {"max_shard_size"}:
            raise XLoRAError(f"save_pretrained({name}={kwargs[name]!r}) cannot be honoured for a mixture")
        files.save(
            self,
            Path(save_directory),
            state_dict=state_dict,
            peft=peft,
            safe_serialization=safe_serialization,
            writes=is_main_process,
        )

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """What `transformers.Trainer` need not miss in its checkpoints: the base model."""
        return set(base_state_dict(self))

    # -- copies ----------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self._xlora_original,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        inherited = getattr(super(), "__getstate__", None)
        state = dict(self.__dict__ if inherited is None else inherited())
        for transient in ("_xlora_kept", "_xlora_history", "xlora_memory"):
            state.pop(transient, None)
        return state


_MIXES = "a mixture"  # in a model's history, which notes None for a forward under a route that was chosen

xLoraModel = xLoRAModel  # document 001 spells it both ways


def mixture_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of mixtures whose own class is `cls`. It bears the same name, which transformers writes to configs."""
    if cls in _CLASSES:
        return _CLASSES[cls]

    @functools.wraps(cls.forward)  # `generate` and Trainer read the signature
    def forward(self: xLoRAModel, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(cls.forward, self)
        return run(self, own, args, kwargs) if self._xlora_mixes() else own(*args, **kwargs)

    body = {"forward": forward, "_xlora_original": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    if hasattr(cls, "generate"):

        @functools.wraps(cls.generate)
        def generate(self: xLoRAModel, *args: Any, **kwargs: Any) -> Any:
            return cls.generate(self, *args, **generate_arguments(self, kwargs))

        body["generate"] = generate
    _CLASSES[cls] = type(cls.__name__, (xLoRAModel, cls), body)
    return _CLASSES[cls]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    new = mixture_class(cls)
    return new.__new__(new)
