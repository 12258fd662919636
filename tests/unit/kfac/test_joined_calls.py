"""Several calls of a model in one backward pass: a sum of means is taken as it is, one mean is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.training_loops import X, Y, mlp

Loss = Callable[[nn.Module], Tensor]
ONE_MEAN: dict[str, Loss] = {
    "concatenated outputs, cross-entropy": lambda m: F.cross_entropy(torch.cat(_pair(m)), Y),
    "concatenated outputs, squares": lambda m: torch.cat(_pair(m)).square().mean(),
    "sum divided": lambda m: sum(_means(m)) / 2,  # type: ignore[arg-type,return-value]
    "sum halved": lambda m: 0.5 * sum(_means(m)),  # type: ignore[arg-type,return-value]
    "mean of means": lambda m: torch.stack(_means(m)).mean(),
}
SUMS: dict[str, Loss] = {
    "sum": lambda m: sum(_means(m)),  # type: ignore[arg-type,return-value]
    "weighted sum": lambda m: _means(m)[0] + 0.5 * _means(m)[1],
    "stacked sum": lambda m: torch.stack(_means(m)).sum(),
    "critic": lambda m: m(X[:5]).mean() - m(X[5:]).mean(),
    "two views": lambda m: (m(X) - m(X + 1)).square().mean(),
    "sum of samples": lambda m: (_each(m, X) + _each(m, X + 1)).mean(),
    "one call": lambda m: F.cross_entropy(m(X), Y) / 2,
    "a target of its own": lambda m: F.cross_entropy(m(X), m(X).detach().softmax(1)) / 2,
}


def _pair(model: nn.Module) -> list[Tensor]:
    return [model(X[:5]), model(X[5:])]


def _means(model: nn.Module) -> list[Tensor]:
    return [F.cross_entropy(model(X[:5]), Y[:5]), F.cross_entropy(model(X[5:]), Y[5:])]


def _each(model: nn.Module, inputs: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), Y, reduction="none")


def _warned(loss: Loss, passes: int = 1, **options: float) -> list[str]:
    model = mlp()
    kfac = KFAC(model, factor_update_steps=1, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            for _ in range(passes):
                loss(model).backward()
            kfac.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("name", ONE_MEAN)
def test_one_mean_over_several_calls_is_named_once_with_what_to_pass(name: str) -> None:
    (text,) = _warned(ONE_MEAN[name])
    assert "2 calls of the model meet in one loss" in text and "1/8 for all" in text
    assert _warned(ONE_MEAN[name], loss_scale_per_sample=1 / 8) == []


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_means_is_taken_as_it_is(name: str) -> None:
    assert _warned(SUMS[name]) == []


def test_passes_one_after_the_other_do_not_meet() -> None:
    halves = iter([slice(0, 5), slice(5, 8)] * 2)

    def loss(model: nn.Module) -> Tensor:
        half = next(halves)
        return F.cross_entropy(model(X[half]), Y[half]) / 2

    assert _warned(loss, passes=2, accumulation_steps=2) == []


@pytest.mark.parametrize(
    ("divisor", "zeroes", "named"), [(2, False, True), (1, False, False), (2, True, False)]
)
def test_divided_passes_are_named_unless_their_number_is_given(
    divisor: int, zeroes: bool, named: bool
) -> None:
    def loss(model: nn.Module) -> Tensor:
        if zeroes:
            model.zero_grad()
        value = F.cross_entropy(model(X), Y)
        return value / divisor if divisor > 1 else value

    texts = _warned(loss, passes=2)
    assert ["pass accumulation_steps" in text for text in texts] == [True] * named
    assert _warned(loss, passes=2, accumulation_steps=2) == []


def test_a_second_step_on_the_same_gradients_is_named_once() -> None:
    model = mlp()
    kfac = KFAC(model)
    F.cross_entropy(model(X), Y).backward()
    kfac.step()
    with pytest.warns(UserWarning, match="called again without a backward pass"):
        kfac.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for zeroes in (True, False):
            if zeroes:
                model.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            kfac.step()


def test_one_mean_with_its_scale_is_that_of_one_call() -> None:
    one, two = mlp(), mlp()
    whole, joined = KFAC(one), KFAC(two, loss_scale_per_sample=1 / 8)
    F.cross_entropy(one(X), Y).backward()
    ONE_MEAN["concatenated outputs, cross-entropy"](two).backward()
    whole.step()
    joined.step()
    for name, factors in whole.factors().items():
        for factor, value in factors.items():
            torch.testing.assert_close(joined.factors()[name][factor], value)
