"""A mixture is still its model: copies, other tasks, calls of every form, and its end."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbit.adapter import (
    AdapterConfig,
    MergeError,
    RouteError,
    TaskError,
    adapter_parameters,
    base_state_dict,
    current_route,
    inject,
    merge,
    rename,
    route,
    set_route,
    set_trainable,
    tasks,
)
from orbit.adapter import remove as remove_task
from orbit.adapter.inject import freeze
from orbit.xlora import XLoRAError, mix, remove, xLoRAConfig, xLoRAModel
from tests.xlora.oracle import HIDDEN, NAMES, expert, llama, mixture, tokens


@pytest.fixture
def mixed() -> Any:
    return mixture(layerwise_scalings=True, top_k_lora=2)


@pytest.fixture
def ids() -> Tensor:
    return tokens()


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


# -- copies --------------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
def test_copies(how: Callable[[Any], Any], mixed: Any, ids: Tensor):
    mixed.set_scaling_pass_value(0.3)
    mixed.enable_scalings_logging()
    wanted = mixed(ids).logits
    twin = how(mixed)
    assert type(twin) is type(mixed)
    assert isinstance(twin, xLoRAModel)
    assert torch.equal(twin(ids).logits, wanted)
    assert len(twin.get_scalings_log()) == 2
    assert len(mixed.get_scalings_log()) == 1
    with torch.no_grad():
        for parameter in twin.xlora_classifier.parameters():
            parameter.zero_()
    assert not torch.equal(twin(ids).logits, wanted)
    assert torch.equal(mixed(ids).logits, wanted)
    with pytest.raises(TaskError, match="an expert of the mixture"):
        rename(twin, "facts", "other")


def test_copies_with_a_graph_are_taken_after_a_training_step(mixed: Any, ids: Tensor):
    mixed.train()
    mixed.enable_scalings_logging()
    mixed(ids, labels=ids).loss.backward()
    assert torch.equal(copy.deepcopy(mixed)(ids).logits, mixed(ids).logits)


def _logits(model: Any, ids: Tensor, queue: Any) -> None:
    queue.put(model(ids).logits.detach().numpy())


def test_spawned_processes_have_the_mixture(mixed: Any, ids: Tensor):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_logits, args=(mixed, ids, queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=120))
    process.join(60)
    assert process.exitcode == 0
    torch.testing.assert_close(got, mixed(ids).logits.detach())


def test_a_mixture_inside_another_module(mixed: Any, ids: Tensor):
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    outer, wanted = Outer(mixed), mixed(ids).logits
    assert torch.equal(outer(ids), wanted)
    assert torch.equal(copy.deepcopy(outer)(ids), wanted)
    assert set(tasks(outer)) == set(NAMES)
    with route(outer, None), mixed.disable():
        assert torch.equal(outer(ids), llama()(ids).logits)


# -- state ---------------------------------------------------------------------------------------------------


def test_state_dicts(mixed: Any, ids: Tensor):
    state = mixed.state_dict()
    assert any(key.startswith("xlora_classifier.") for key in state)
    other = mixture(layerwise_scalings=True, top_k_lora=2)
    with torch.no_grad():
        for parameter in [*other.xlora_classifier.parameters(), *adapter_parameters(other).values()]:
            parameter.add_(0.1)
    assert not torch.equal(other(ids).logits, mixed(ids).logits)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, mixed(ids).logits)
    del state["xlora_classifier.layers.0.bias"]
    with pytest.raises(RuntimeError, match="xlora_classifier.layers.0.bias"):
        other.load_state_dict(state)


def test_the_base_of_a_mixture_is_the_base(mixed: Any, ids: Tensor):
    base = llama()
    assert same_bits(bits(base), base_state_dict(mixed))
    before = mixed(ids).logits
    mixed.load_state_dict(base.state_dict())  # strict, and it knows nothing of experts and classifiers
    assert torch.equal(mixed(ids).logits, before)
    assert same_bits(bits(base), {k[2:]: v for k, v in base_state_dict(nn.ModuleList([mixed])).items()})


def test_freezing_the_base_leaves_the_classifier_alone(mixed: Any):
    freeze(mixed)
    assert all(parameter.requires_grad for parameter in mixed.xlora_classifier.parameters())


# -- other tasks ---------------------------------------------------------------------------------------------


def test_disable_is_the_base_bit_for_bit(mixed: Any, ids: Tensor):
    base = llama()
    wanted, before = base(ids).logits, mixed(ids).logits
    with mixed.disable():
        assert torch.equal(mixed(ids).logits, wanted)
        assert torch.equal(
            mixed.generate(ids, max_new_tokens=4, do_sample=False),
            base.generate(ids, max_new_tokens=4, do_sample=False),
        )
    assert torch.equal(mixed(ids).logits, before)
    with pytest.raises(ZeroDivisionError), mixed.disable():
        raise ZeroDivisionError
    assert torch.equal(mixed(ids).logits, before)


def test_a_task_that_is_asked_for_goes_before_the_mixture(mixed: Any, ids: Tensor):
    base, plain = llama(), llama()
    for seed, name in enumerate(NAMES):
        expert(plain, name, seed)
    assert torch.equal(mixed(ids, task="law").logits, plain(ids, task="law").logits)
    rows = ["law", None, "chat"]
    assert torch.equal(mixed(ids, task=rows).logits, plain(ids, task=rows).logits)
    together = {"law": 0.5, "chat": 2.0}
    assert torch.equal(mixed(ids, tasks=together).logits, plain(ids, tasks=together).logits)
    assert torch.equal(mixed(ids, task=None).logits, base(ids).logits)
    with route(mixed, "facts"):
        assert torch.equal(mixed(ids).logits, plain(ids, task="facts").logits)
        assert mixed.get_latest_scalings() is None  # no mixture yet
    before = mixed(ids).logits
    set_route(mixed, "poems")
    assert torch.equal(mixed(ids).logits, plain(ids, task="poems").logits)
    set_route(mixed, None)
    assert torch.equal(mixed(ids).logits, before)
    assert current_route(mixed) is None


def test_experts_keep_their_names_and_places(mixed: Any, ids: Tensor):
    before = mixed(ids).logits
    for change in (lambda: remove_task(mixed, "chat"), lambda: rename(mixed, "chat", "talk")):
        with pytest.raises(
            TaskError, match=r"'chat' is an expert of the mixture LlamaForCausalLM; xlora.remove\(model\)"
        ):
            change()
    with pytest.raises(MergeError, match="'facts' is an expert of the mixture"):
        merge(mixed, "chat")
    assert torch.equal(mixed(ids).logits, before)


def test_a_further_task_has_nothing_to_do_with_the_mixture(mixed: Any, ids: Tensor):
    before, layers = mixed(ids).logits, list(mixed.xlora_layers())
    report = inject(
        mixed, AdapterConfig(r=2, targets=("layers.0",)), "other"
    )  # the decoder's, not the classifier's
    assert not any("xlora" in name for name in report.layers)
    assert all(parameter.requires_grad for parameter in mixed.xlora_classifier.parameters())
    with torch.no_grad():
        for parameter in adapter_parameters(mixed, "other").values():
            parameter.add_(0.1)
    assert not torch.equal(mixed(ids).logits, before)  # it is current, as any task that was just injected
    set_route(mixed, None)
    assert torch.equal(mixed(ids).logits, before)
    assert list(mixed.xlora_layers()) == layers
    with pytest.raises(MergeError, match="expert of the mixture"):
        merge(mixed, "other")
    rename(mixed, "other", "another")
    remove_task(mixed, "another")
    assert torch.equal(mixed(ids).logits, before)


def test_a_task_on_other_layers_does_not_move_the_places():
    mixed = mixture(
        None, {"a": {"targets": ("q_proj",)}, "b": {"targets": ("v_proj",)}}, layerwise_scalings=True
    )
    before = mixed(tokens()).logits
    inject(mixed, AdapterConfig(r=2, targets=("embed_tokens", "o_proj")), "other")
    set_route(mixed, None)
    assert torch.equal(copy.deepcopy(mixed)(tokens()).logits, before)
    assert torch.equal(mixed(tokens()).logits, before)
    assert len(mixed.xlora_layers()) == 4


def test_a_mixture_is_made_once(mixed: Any):
    with pytest.raises(XLoRAError, match="is a mixture of .* already"):
        mix(mixed, ("facts",), xLoRAConfig(HIDDEN))


# -- its end -------------------------------------------------------------------------------------------------


def test_removal_gives_the_base_back(mixed: Any, ids: Tensor):
    base = llama()
    mixed(ids)
    assert remove(mixed) is mixed
    assert type(mixed) is type(base)
    assert vars(mixed).keys() == vars(base).keys()
    assert {type(m) for m in mixed.modules()} == {type(m) for m in base.modules()}
    assert same_bits(bits(base), bits(mixed))
    assert torch.equal(mixed(ids).logits, base(ids).logits)
    with pytest.raises(XLoRAError, match="LlamaForCausalLM is no mixture"):
        remove(mixed)


def test_removal_may_keep_the_experts(mixed: Any, ids: Tensor):
    alone, before = mixed(ids, task="law").logits, mixed(ids).logits
    classifier = mixed.xlora_classifier.state_dict()
    with mixed.disable(), pytest.raises(RouteError, match="while a call or a `with route` is running"):
        remove(mixed)
    remove(mixed, keep_experts=True)
    assert tasks(mixed) == NAMES
    assert torch.equal(mixed(ids, task="law").logits, alone)
    assert torch.equal(mixed(ids).logits, llama()(ids).logits)
    again = mix(mixed, NAMES, xLoRAConfig(HIDDEN, layerwise_scalings=True, top_k_lora=2))
    again.xlora_classifier.load_state_dict(classifier)
    assert torch.equal(again(ids).logits, before)
    remove(mixed, keep_experts=True)
    rename(mixed, "law", "laws")
    merge(mixed, "laws")


# -- calls ---------------------------------------------------------------------------------------------------


def test_outputs_come_in_every_form(mixed: Any, ids: Tensor):
    whole = mixed(ids, labels=ids, output_hidden_states=True, use_cache=False)
    assert len(whole.hidden_states) == 3
    assert whole.past_key_values is None
    as_tuple = mixed(ids, labels=ids, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], whole.loss)
    assert torch.equal(as_tuple[1], whole.logits)
    assert torch.equal(mixed(input_ids=ids, use_cache=False).logits, whole.logits)
    embeds = mixed.get_input_embeddings()(ids)
    assert torch.equal(mixed(inputs_embeds=embeds, use_cache=False).logits, whole.logits)
    torch.testing.assert_close(mixed(ids, logits_to_keep=1).logits, whole.logits[:, -1:])
    mixed.config.use_cache = False
    assert torch.equal(mixed(ids).logits, whole.logits)
    assert mixed(ids).past_key_values is None


def test_attentions_are_those_of_the_main_pass():
    mixed = mixture(llama(attn_implementation="eager"))
    output = mixed(tokens(), output_attentions=True)
    assert [tuple(a.shape) for a in output.attentions] == [(3, 4, 9, 9)] * 2
    torch.testing.assert_close(output.logits, mixture()(tokens()).logits)
    with mixed.disable():
        assert not torch.equal(mixed(tokens(), output_attentions=True).attentions[1], output.attentions[1])


def test_positions_and_masks_reach_both_passes(mixed: Any, ids: Tensor):
    mixed = mixed.double()
    wanted = mixed(ids, use_cache=False).logits
    padded = torch.cat([ids, ids[:, :2]], 1)
    blocked = torch.ones(3, 1, 11, 11).tril()
    blocked[..., 9:, :9] = blocked[..., :9, 9:] = 0
    blocked = (1 - blocked).double() * torch.finfo(torch.float64).min
    positions = torch.cat([torch.arange(9), torch.arange(2)])[None].expand(3, -1)
    got = mixed(padded, attention_mask=blocked, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got[:, :9], wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(got[:, 9:], wanted[:, :2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode: Any, mixed: Any, ids: Tensor):
    wanted = mixed(ids).logits
    with mode():
        assert torch.equal(mixed(ids).logits, wanted)
    mixed.train()
    mixed(ids, labels=ids).loss.backward()  # which nothing that was kept then stands in the way of
    assert all(parameter.grad is not None for parameter in mixed.xlora_classifier.parameters())


def test_the_mode_of_no_module_changes(mixed: Any, ids: Tensor):
    mixed.model.layers[0].train()
    before = {name: module.training for name, module in mixed.named_modules()}
    assert len(set(before.values())) == 2
    mixed(ids, labels=ids)
    mixed.generate(ids, max_new_tokens=2, do_sample=False)
    with mixed.disable():
        mixed(ids)
    assert {name: module.training for name, module in mixed.named_modules()} == before
    assert mixture(llama().train()).xlora_classifier.training
    assert not mixture(llama().eval()).xlora_classifier.training


def test_an_error_inside_leaves_the_mixture_as_it_was(mixed: Any, ids: Tensor):
    before = mixed(ids).logits
    with pytest.raises(IndexError):
        mixed(ids + 1000)
    assert current_route(mixed) is None
    assert torch.equal(mixed(ids).logits, before)


def test_threads_get_the_mixture_or_an_error(mixed: Any, ids: Tensor):
    """Never another route: with two threads in one replica, a call is right or refused."""
    wanted, got, errors = mixed(ids).logits, [], []

    def work() -> None:
        for _ in range(5):
            try:
                got.append(mixed(ids).logits)
            except RouteError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) + len(errors) == 15
    assert got
    assert all(torch.equal(logits, wanted) for logits in got)
    assert torch.equal(mixed(ids).logits, wanted)


# -- what is printed and counted -----------------------------------------------------------------------------


def test_counts(mixed: Any, capsys: pytest.CaptureFixture[str]):
    router = sum(p.numel() for p in mixed.xlora_classifier.parameters())
    experts = sum(p.numel() for p in adapter_parameters(mixed).values())
    base = sum(p.numel() for p in llama().parameters())
    assert mixed.get_nb_trainable_parameters() == (router, router + experts + base)
    assert mixed.get_use_trainable_adapters() is False
    mixed.set_use_trainable_adapters(True)
    assert mixed.get_use_trainable_adapters() is True
    assert mixed.get_nb_trainable_parameters() == (router + experts, router + experts + base)
    mixed.print_trainable_parameters()
    said = capsys.readouterr().out
    assert f"trainable params: {router + experts:,d} || all params: {router + experts + base:,d}" in said
    assert f"classifier: {router:,d} || experts: {experts:,d}" in said
    mixed.set_use_trainable_adapters(False)
    assert mixed.get_nb_trainable_parameters() == (router, router + experts + base)


def test_training_experts_does_not_train_other_tasks(mixed: Any):
    inject(mixed, AdapterConfig(r=2), "other")
    set_trainable(mixed, "other", False)
    mixed.set_use_trainable_adapters(True)
    assert not any(p.requires_grad for p in adapter_parameters(mixed, "other").values())


def test_predictions_are_printed_as_often_as_asked(
    mixed: Any, ids: Tensor, capsys: pytest.CaptureFixture[str]
):
    mixed.print_scalings_predictions(2)
    for _ in range(3):
        mixed(ids)
    said = capsys.readouterr().out
    assert said.count("(3, 9, 14, 4)") == 2


@pytest.mark.parametrize("n", [-1, 1.5, None, "2"])
def test_a_number_of_predictions_that_is_none(n: Any, mixed: Any):
    with pytest.raises(XLoRAError, match="print_scalings_predictions"):
        mixed.print_scalings_predictions(n)


def test_the_log_is_of_predictions_without_graph(mixed: Any, ids: Tensor, tmp_path: Path):
    mixed.train()
    mixed.enable_scalings_logging()
    mixed(ids)
    mixed(ids[:1])
    log = mixed.get_scalings_log()
    assert [tuple(one.shape) for one in log] == [(3, 9, 14, 4), (1, 9, 14, 4)]
    assert not any(one.requires_grad for one in log)
    log.clear()
    assert len(mixed.get_scalings_log()) == 2
    with mixed.disable():
        mixed(ids)
    assert len(mixed.get_scalings_log()) == 2
    checkpoint(lambda: mixed(ids).logits.sum(), use_reentrant=False).backward()
    assert len(mixed.get_scalings_log()) == 3  # its replay is no forward of its own
    torch.testing.assert_close(mixed.get_latest_scalings().sum(-1), torch.ones(3, 9, 14))
    mixed.disable_scalings_logging()
    assert mixed.get_scalings_log() == []
