"""Talk to a causal language model: in a terminal (`interact`) or from a program (`respond`).

    chat = ChatInterface(model_id="smollm2", adapter="runs/demo/adapter")
    chat.respond("When did Ghana become independent?")       # one reply; the conversation is remembered
    chat.interact()                                          # the same, typed, token by token

Tokens are written as they are made, from within `generate` itself: no second thread, so an exception of the
model reaches the caller and Ctrl-C stops a reply at once. A reply that did not finish leaves no trace in the
conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from orbit.adapter import AdapterError, Route, TaskError, current_route, load, merged, route, tasks
from orbit.chat.head import contiguous_head
from orbit.core.extras import need
from orbit.core.runtime import resolve_device
from orbit.data.sft import pad_token_id
from orbit.data.template import encode, render

COMMANDS = "/reset forgets the conversation, /adapter NAME|off switches, /quit leaves"


class ChatInterface:
    """A conversation with a model.

    Args:
        model: a causal LM with `generate`; its tokenizer must be given too.
        model_id: in place of `model`: a Hugging Face name, a folder, or "smollm2" (`orbit.demo.smollm2`).
        tokenizer: default, with `model_id`: the one beside the model.
        device: default: where `model` is; with `model_id`, CUDA when there is one, else the CPU.
        adapter: a PEFT folder to load, or the name of a task that the model already has.
        dtype: of the weights loaded from `model_id`: "auto" is as stored.
        system: a system message that opens every conversation.
        max_new_tokens: the longest reply.

    Raises:
        ValueError: neither or both of `model` and `model_id`; a model without a tokenizer; an absent device.
        TaskError: an adapter that is neither a folder nor a task of the model.
        TypeError: a model that cannot generate.
        MissingExtraError: with `model_id`, transformers is not installed.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        model_id: str | Path | None = None,
        tokenizer: Any = None,
        device: torch.device | str | None = None,
        adapter: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        system: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        if (model is None) == (model_id is None):
            raise ValueError(
                "ChatInterface needs either a model or a model_id: ChatInterface(model=model, "
                "tokenizer=tokenizer) or ChatInterface(model_id='path/to/model')"
            )
        if model is not None and tokenizer is None:
            raise ValueError(
                f"ChatInterface(model={type(model).__name__}) needs its tokenizer too: pass tokenizer="
            )
        if model is None:
            assert model_id is not None
            model, tokenizer = _load(model_id, tokenizer, dtype)
            device = resolve_device(device)
        if not callable(getattr(model, "generate", None)):
            raise TypeError(
                f"{type(model).__name__} has no generate(): ChatInterface talks to transformers' causal LMs"
            )
        self.model: Any = model if device is None else model.to(resolve_device(device))
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.system = system
        known = tasks(self.model)
        self.adapter: Route = (merged(self.model) or current_route(self.model)) if known else None
        if adapter is not None:
            self.use_adapter(adapter)
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def reset(self) -> None:
        """Forget the conversation (but for the system message)."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def use_adapter(self, adapter: str | Path | None) -> None:
        """Answer with this adapter from now on: a loaded task's name, a PEFT folder, or None for the base.

        A folder is loaded once, as a task of the folder's path.

        Raises:
            TaskError: it is neither. AdapterFileError: the folder does not fit the model.
        """
        known = tasks(self.model)
        if adapter is None or str(adapter) in known:
            self.adapter = None if adapter is None else str(adapter)
            return
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise TaskError(
                f"adapter {str(adapter)!r} is neither a folder with adapter_config.json nor a loaded task "
                f"({', '.join(known) or 'none is loaded'})"
            )
        load(self.model, adapter, name=str(adapter))
        self.adapter = str(adapter)

    def respond(self, message: str, on_text: Callable[[str], object] | None = None, **generate: Any) -> str:
        """Say something and get the reply; both join the conversation once the reply is complete.

        Args:
            message: the user's turn.
            on_text: called with each piece of the reply as it is made.
            generate: arguments of `model.generate`, over the defaults (greedy, `max_new_tokens`).
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = encode(self.tokenizer, render(self.tokenizer, messages, add_generation_prompt=True))
        ids = torch.tensor([prompt], device=self.device)
        settings: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "pad_token_id": pad_token_id(self.tokenizer),
            **generate,
        }
        if on_text is not None:
            settings["streamer"] = _streamer(self.tokenizer, on_text)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self._steered(), contiguous_head(self.model):
                made = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        finally:
            self.model.train(training)
        reply = self._text(made[0, ids.shape[1] :])
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply

    def interact(self, input: Iterable[str] | None = None, output: TextIO | None = None) -> None:
        """Chat until `/quit`, the end of input, or Ctrl-C.

        Args:
            input: the lines that the user types; default: the terminal.
            output: where prompts and replies go; default: stdout.
        """
        out = sys.stdout if output is None else output

        def say(text: str) -> None:
            out.write(text)
            out.flush()

        say(f"{COMMANDS}\n")
        try:
            for line in _typed() if input is None else input:
                if not (line := line.strip()):
                    continue
                if line.startswith("/"):
                    if line == "/quit":
                        return
                    say(f"{self._command(line)}\n")
                    continue
                self.respond(line, on_text=say)
                say("\n")
        except KeyboardInterrupt:
            say("\n")

    def _command(self, line: str) -> str:
        name, _, argument = line.partition(" ")
        if name == "/reset" and not argument:
            self.reset()
            return "(the conversation is forgotten)"
        if name == "/adapter" and argument.strip():
            try:
                self.use_adapter(None if argument.strip() == "off" else argument.strip())
            except AdapterError as error:
                return f"({error})"
            return f"(answering with {self.adapter or 'the base model'})"
        return f"({line!r} is no command: {COMMANDS})"

    def _steered(self) -> AbstractContextManager[None]:
        """Inside, the model answers with `self.adapter`; one that is merged into the weights needs no route."""
        here = merged(self.model)
        settled = not tasks(self.model) or (here is not None and here == self.adapter)
        return nullcontext() if settled else route(self.model, self.adapter)

    def _text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _load(model_id: str | Path, tokenizer: Any, dtype: torch.dtype | str) -> tuple[Any, Any]:
    need("llm", "transformers", "jinja2")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from orbit.demo.smollm2 import resolve_model

    folder = resolve_model(model_id)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder) if tokenizer is None else tokenizer


def _streamer(tokenizer: Any, on_text: Callable[[str], object]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Hands each finished piece of text to a function, in generate's own thread."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _typed() -> Iterable[str]:
    """Lines from the terminal until its end."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
