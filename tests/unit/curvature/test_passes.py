"""The gradient's own passes count, and nothing else; nothing is left on anybody's modules."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

from elastic_kfac.curvature.passes import hooks, recorder
from elastic_kfac.curvature.passes.batches import Batch
from elastic_kfac.curvature.passes.recorder import Call, Recorder

N = 8
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))


class Sums:
    """A Linear layer's sums of inputs and of per-sample output gradients."""

    is_wanted = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.clear()

    def clear(self) -> None:
        self.a: Tensor | float = 0.0
        self.g: Tensor | float = 0.0
        self.batches: dict[Batch, None] = {}

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def samples_in(self, inputs: Tensor) -> int | None:
        return None

    def note(self) -> None:
        """Nothing that the inputs do not tell."""

    def condense(self, call: Call) -> Tensor:
        rows = call.inputs.reshape(-1, call.inputs.shape[-1])
        return rows.t() @ rows

    def fold(self, call: Call) -> None:
        self.batches[call.batch] = None
        self.a = self.a + (call.inputs if call.version is None else self.condense(call))
        assert call.gradient is not None
        rows = call.gradient.reshape(-1, call.gradient.shape[-1]) * call.batch.size
        self.g = self.g + rows.t() @ rows

    def sampled(self, call: Call, gradient: Tensor, weight: float) -> None:
        raise NotImplementedError("no labels are sampled here")

    def weight_gradient(self, call: Call) -> Tensor:
        assert call.staged is not None
        rows = call.inputs.reshape(-1, call.inputs.shape[-1])
        return call.staged.reshape(-1, call.staged.shape[-1]).t() @ rows


class Watched:
    """A model, its recorder, and the sums of its Linear layers and attention projections."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorder = Recorder(model)
        self.sums: dict[str, Sums] = {}
        inside: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                inside.add(id(module.out_proj))
                size = module.embed_dim
                for index, letter in enumerate("qkv"):
                    part = slice(index * size, (index + 1) * size)
                    self._watch(f"{name}.{letter}", module, module.in_proj_weight, part)
                self._watch(f"{name}.o", module, module.out_proj.weight, None)
            elif isinstance(module, nn.Linear) and id(module) not in inside:
                self._watch(name, module, module.weight, None)
        self.recorder.active = True

    def _watch(
        self, name: str, module: nn.Module, weight: nn.Parameter, rows: slice | None
    ) -> None:
        self.sums[name] = Sums(name)
        self.recorder.watch(module, weight, self.sums[name], rows)

    @property
    def faults(self) -> list[tuple[str, str]]:
        return [(layer.name, why) for layer, why in self.recorder.faults if isinstance(layer, Sums)]

    def result(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        self.recorder.settle()
        found = {}
        for name, sums in self.sums.items():
            assert isinstance(sums.a, Tensor) and isinstance(sums.g, Tensor), f"{name} saw nothing"
            found[name] = (sums.a, sums.g, sums.samples)
        return found

    def saw_nothing(self) -> bool:
        self.recorder.settle()
        return all(isinstance(sums.a, float) for sums in self.sums.values())


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return F.cross_entropy(model(x), Y[: len(x)])


def once(loss: Callable[[nn.Module], Tensor] = loss_of) -> dict[str, tuple[Tensor, Tensor, int]]:
    watched = Watched(mlp())
    loss(watched.model).backward()
    return watched.result()


def assert_same(found: Any, right: Any) -> None:
    assert found.keys() == right.keys()
    for name, (a, g, samples) in right.items():
        torch.testing.assert_close(found[name][0], a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[name][1], g, rtol=1e-9, atol=1e-12)
        assert found[name][2] == samples, name


def _input_gradient(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(model(x).sum(), x)


def _frozen_pass(model: nn.Module) -> None:
    model.requires_grad_(False)
    x = X.clone().requires_grad_()
    model(x).square().mean().backward()
    model.requires_grad_(True)


def _dropped(set_to_none: bool) -> Callable[[nn.Module], None]:
    def drop(model: nn.Module) -> None:
        (1000 * loss_of(model, 100 * X)).backward()
        model.zero_grad(set_to_none=set_to_none)

    return drop


def _parameter_probe(model: nn.Module) -> None:
    torch.autograd.grad(loss_of(model), list(model.parameters()))


def _hessian_product(model: nn.Module) -> None:
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model), parameters, create_graph=True)
    torch.autograd.grad(sum((g * g).sum() for g in grads), parameters)


def _per_sample_gradients(model: nn.Module) -> None:
    values = {n: p.detach() for n, p in model.named_parameters()}

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, (x[None],)), y[None])

    vmap(grad(one), (None, 0, 0))(values, X, Y)
    jacrev(lambda x: functional_call(model, values, (x,)))(X)


def _evaluation(model: nn.Module) -> None:
    with torch.no_grad():
        model(X)
    model(X)  # and one that is never differentiated


def _other_inputs(model: nn.Module) -> None:
    x = X.clone().requires_grad_()
    loss_of(model, x).backward(inputs=[x])


ASIDE: dict[str, Callable[[nn.Module], None]] = {
    "input gradient": _input_gradient,
    "frozen pass": _frozen_pass,
    "dropped batch": _dropped(True),
    "dropped batch, zeros": _dropped(False),
    "probe of parameters": _parameter_probe,
    "hessian product": _hessian_product,
    "torch.func": _per_sample_gradients,
    "evaluation": _evaluation,
    "backward to inputs": _other_inputs,
}


@pytest.mark.parametrize("name", ASIDE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_passes_that_reach_no_gradient_do_not_count(name: str, when: str) -> None:
    watched = Watched(mlp())
    if when == "after":
        if name.startswith("dropped"):
            return  # it would drop the real one, too
        loss_of(watched.model).backward()
    ASIDE[name](watched.model)
    if when == "before":
        loss_of(watched.model).backward()
    assert_same(watched.result(), once())
    assert watched.faults == []


def _both(model: nn.Module) -> Tensor:
    out = model(X)
    return F.cross_entropy(out, Y) + out.square().mean()


def test_two_passes_over_one_graph_count_as_their_sum() -> None:
    watched = Watched(mlp())
    out = watched.model(X)
    F.cross_entropy(out, Y).backward(retain_graph=True)
    out.square().mean().backward()
    assert_same(watched.result(), once(_both))


def test_a_loss_and_its_negative_leave_no_output_gradient() -> None:
    watched = Watched(mlp())
    loss = loss_of(watched.model)
    loss.backward(retain_graph=True)
    (-loss).backward()
    assert all(float(g.abs().sum()) == 0 for _, g, _ in watched.result().values())


def test_create_graph_backward_counts_once() -> None:
    watched = Watched(mlp())
    with pytest.warns(UserWarning, match="create_graph"):
        loss_of(watched.model).backward(create_graph=True)
    assert_same(watched.result(), once())
    watched.model.zero_grad()


def test_sharpness_aware_steps_count_the_second_pass() -> None:
    watched = Watched(mlp())
    loss_of(watched.model).backward()
    watched.model.zero_grad()
    loss_of(watched.model).backward()
    assert_same(watched.result(), once())


def test_accumulated_batches_add_up_and_survive_clipping_between() -> None:
    watched = Watched(mlp())
    loss_of(watched.model, X[:4]).backward()
    nn.utils.clip_grad_norm_(watched.model.parameters(), 1e-3)
    F.cross_entropy(watched.model(X[4:]), Y[4:]).backward()
    first, second = Watched(mlp()), Watched(mlp())
    loss_of(first.model, X[:4]).backward()
    F.cross_entropy(second.model(X[4:]), Y[4:]).backward()
    one, two = first.result(), second.result()
    right = {n: (one[n][0] + two[n][0], one[n][1] + two[n][1], N) for n in one}
    assert_same(watched.result(), right)


def test_order_of_unequal_forwards_does_not_matter() -> None:
    found = []
    for reverse in (False, True):
        watched = Watched(mlp())
        parts = [X[:2], X[2:]]
        outputs = {len(x): watched.model(x) for x in (reversed(parts) if reverse else parts)}
        (outputs[2].square().mean() + outputs[6].square().mean()).backward()
        found.append(watched.result())
        assert found[-1]["0"][2] == 8
    assert_same(found[0], found[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_passes_count_once(reentrant: bool) -> None:
    watched = Watched(mlp())

    def run(model: nn.Module) -> Tensor:
        x = X.clone().requires_grad_(reentrant)
        return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), Y)

    for _ in range(2):  # the second time, sound layers are condensed in the forward pass
        watched.model.zero_grad()
        run(watched.model).backward()
        assert_same(watched.result(), once())
    assert watched.faults == []


def test_functional_call_with_other_weights_does_not_count() -> None:
    watched = Watched(mlp())
    other = {n: p.detach().clone().requires_grad_() for n, p in watched.model.named_parameters()}
    F.cross_entropy(functional_call(watched.model, other, (X,)), Y).backward()
    assert watched.saw_nothing()


# -- nothing stays on the modules ----------------------------------------------------------------


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
        return out


def attention_result(watched: Watched) -> dict[str, tuple[Tensor, Tensor, int]]:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3)).double()
    watched.model(x).square().mean().backward()
    assert watched.faults == []
    return watched.result()


def test_attention_projections_explain_their_gradients() -> None:
    found = attention_result(Watched(Attentive().double()))
    assert set(found) == {"attention.q", "attention.k", "attention.v", "attention.o", "head"}
    assert {samples for _, _, samples in found.values()} == {2}


def test_copies_and_pickles_are_strangers_and_models_stay_clean() -> None:
    model = Attentive().double()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    watched = Watched(model)
    assert before.keys() == {name for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys() and "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    twin = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    third = pickle.loads(pickle.dumps(model))
    x = torch.randn(2, 5, 8).double()
    for stranger in (twin, third):
        stranger(x).square().mean().backward()
    assert watched.saw_nothing()
    assert_same(attention_result(watched), attention_result(Watched(Attentive().double())))


def test_two_recorders_on_one_model_close_in_any_order() -> None:
    for first_closed in (0, 1):
        model = Attentive().double()
        both = [Watched(model), Watched(model)]
        both[first_closed].recorder.close()
        other = both[1 - first_closed]
        assert_same(attention_result(other), attention_result(Watched(Attentive().double())))
        assert all(isinstance(sums.a, float) for sums in both[first_closed].sums.values())
        other.recorder.close()


def test_a_forgotten_recorder_leaves_nothing() -> None:
    gc.collect()
    before = len(torch_module._global_forward_hooks)
    model = mlp()
    for _ in range(3):
        watched = Watched(model)
        loss_of(model).backward()
        known = weakref.ref(watched.recorder)
        del watched
        assert known() is None
        assert not model[0].weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        assert not hooks.registry.numbers[id(model[0])]
    assert len(torch_module._global_forward_hooks) == before
    key = id(model[0])
    del model
    gc.collect()
    assert key not in hooks.registry.numbers


def test_an_attention_that_raises_leaves_no_mode_behind() -> None:
    watched = Watched(Attentive().double())
    with pytest.raises(AssertionError):
        watched.model(torch.randn(2, 5, 7).double())
    assert hooks._modes.stack == []
    assert_same(attention_result(watched), attention_result(Watched(Attentive().double())))


# -- does the layer compute W x + b? -------------------------------------------------------------


def test_a_gradient_that_nobody_touched_is_not_looked_at() -> None:
    # DistributedDataParallel writes its reduced gradients before the pass has ended.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        watched = Watched(mlp())
        wrapped = nn.parallel.DistributedDataParallel(watched.model)
        for _ in range(2):  # accumulates
            loss_of(wrapped).backward()
            weights = watched.recorder._weights.values()
            assert all(w.committed and not w.was_touched() for w in weights)
    finally:
        dist.destroy_process_group()


def test_a_weight_inside_and_outside_a_reentrant_checkpoint_counts_both_uses() -> None:
    def loss(model: nn.Module, inside: Callable[[Tensor], Tensor]) -> Tensor:
        first, _, last = model
        return last(first(inside(X.clone().requires_grad_())[:, :4]).tanh()).square().mean()

    right = Watched(mlp())
    loss(right.model, lambda x: right.model[0](x)).backward()  # type: ignore[index]
    watched = Watched(mlp())
    first = watched.model[0]  # type: ignore[index]
    loss(watched.model, lambda x: checkpoint(first, x, use_reentrant=True)).backward()
    assert_same(watched.result(), right.result())
    assert watched.faults == []


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight)


class Gain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight, self.bias)


@pytest.mark.parametrize("model", [Tied, lambda: nn.Sequential(Gain(4, 3))])
def test_layers_that_do_not_explain_their_gradient_are_named(
    model: Callable[[], nn.Module],
) -> None:
    watched = Watched(model().double())
    watched.model(X).square().mean().backward()
    assert len(watched.faults) == 1 and "not that of W x + b" in watched.faults[0][1]


def test_an_input_that_changes_before_backward_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    watched = Watched(model)
    x = X.clone()
    out = model(x).square().mean()
    watched.recorder._unchecked.clear()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.backward()  # torch itself refuses where it needs the input


# -- torch.compile -------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x))
        return out


@pytest.mark.parametrize(("model", "in_place"), [(mlp, False), (Encoder, False), (Encoder, True)])
def test_compiled_models_keep_one_graph_and_give_the_same_statistics(
    model: Callable[[], nn.Module], in_place: bool
) -> None:
    torch._dynamo.reset()
    x = X if model is mlp else torch.randn(2, 5, 8).double()
    eager, traced = Watched(model().double()), Watched(model().double())
    eager.model(x).square().mean().backward()
    expected = eager.result()
    eager.recorder.close()
    compiled = traced.model
    if in_place:
        compiled.compile(fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")  # type: ignore[assignment]
    counters = torch._dynamo.utils.counters
    counters.clear()
    for graphs in (1, 1):
        traced.model.zero_grad()
        compiled(x).square().mean().backward()
        assert_same(traced.result(), expected)
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    traced.recorder.active = False
    compiled(x).square().mean().backward()
    traced.recorder.active = True
    traced.model.zero_grad()
    compiled(x).square().mean().backward()
    # Two graphs, with statistics and without; switching between them costs nothing.
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch.autograd.grad(compiled(x).square().mean(), list(traced.model.parameters()))
    assert_same(traced.result(), expected)
    assert traced.faults == []


def test_torch_still_has_the_private_names() -> None:
    for name in recorder.TORCH_INTERNALS:
        found: Any = torch
        for part in name.split(".")[1:]:
            assert hasattr(found, part), f"torch {torch.__version__} has no {name}"
            found = getattr(found, part)
