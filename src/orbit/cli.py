"""The `orbit` command.

orbit demo [--model PATH] [--out FOLDER]        fine-tune a model on real facts and show what it learned
orbit chat MODEL [--adapter PATH ...]           talk to a model
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from orbit.core.names import nearest


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 2 for wrong usage, 1 for a missing model or adapter."""
    parser, commands = _parser()
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(commands[known.command], unknown)
    from orbit.adapter import AdapterError
    from orbit.core.extras import MissingExtraError, need
    from orbit.demo import FactsError, ModelNotInstalledError
    from orbit.model.errors import SettingError, WeightsError

    try:
        need("llm", "transformers", "jinja2")
        (_demo if known.command == "demo" else _chat)(known)
    except (
        ModelNotInstalledError,
        MissingExtraError,
        FactsError,
        AdapterError,
        SettingError,
        WeightsError,
        OSError,
    ) as error:
        print(f"orbit {known.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="orbit", description="Train, adapt, mix and unlearn PyTorch models.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="fine-tune a language model on real facts and show what it learned", allow_abbrev=False
    )
    demo.add_argument(
        "--model", default="smollm2", help="a Hugging Face causal LM: folder or name (default: smollm2)"
    )
    demo.add_argument(
        "--out", default="runs/demo", help="folder for adapter and figures (default: runs/demo)"
    )
    demo.add_argument(
        "--facts", help="a jsonl of your own: question, paraphrase, answer (default: the demo's)"
    )
    demo.add_argument("--epochs", type=_positive, help="times over the facts")
    demo.add_argument("--seed", type=int, help="of shuffling and initialisation (default: 42)")
    demo.add_argument("--device", type=_device, help='"cuda" or "cpu" (default: CUDA when there is one)')
    chat = commands.add_parser("chat", help="talk to a model", allow_abbrev=False)
    model = chat.add_mutually_exclusive_group()
    model.add_argument(
        "positional",
        nargs="?",
        metavar="MODEL",
        help="a Hugging Face causal LM: folder or name (default: smollm2)",
    )
    model.add_argument("--model", help="the same")
    chat.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER",
        help="in PEFT's format, or an X-LoRA mixture; of several, the first answers",
    )
    chat.add_argument("--system", help="a system message")
    chat.add_argument(
        "--max-new-tokens", type=_positive, default=256, help="the longest reply (default: 256)"
    )
    chat.add_argument("--device", type=_device, help='"cuda" or "cpu" (default: CUDA when there is one)')
    return parser, {"demo": demo, "chat": chat}


def _demo(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from transformers.utils.logging import disable_progress_bar

    from orbit.demo.run import run_demo
    from orbit.demo.train import Recipe

    disable_progress_bar()  # of loading weights; the demo shows its own
    given = {name: value for name in ("epochs", "seed") if (value := getattr(arguments, name)) is not None}
    run_demo(
        model=arguments.model,
        out=arguments.out,
        facts=arguments.facts,
        recipe=replace(Recipe(), **given),
        device=arguments.device,
    )


def _chat(arguments: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from orbit.chat import ChatInterface

    disable_progress_bar()
    ChatInterface(
        model_id=arguments.positional or arguments.model or "smollm2",
        adapter=arguments.adapter,
        device=arguments.device,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
    ).interact()


def _device(text: str) -> str:
    from orbit.core.runtime import resolve_device

    try:
        return str(resolve_device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _refuse(command: argparse.ArgumentParser, unknown: list[str]) -> None:
    """Exit 2, naming the first unknown argument and the nearest option."""
    word = unknown[0].split("=")[0]
    near = nearest(word, command._option_string_actions)
    command.error(f"unknown argument {word}" + (f"; did you mean {near}?" if near else ""))


if __name__ == "__main__":
    sys.exit(main())
