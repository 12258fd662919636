"""Token sequences: the next token, masked tokens, and classes of whole sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.data.batch import PADDED_TARGET, Batch, Fields, mask_name
from elastic_kfac.data.columns import Column
from elastic_kfac.data.order import stream_key, uniforms
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.losses import CrossEntropy
from elastic_kfac.tasks.task import Likelihood, TargetTask, Task

MASKING = 8
"""Purpose of counter-based draws; 5 and 6 are mixing's, 7 is that of attacks."""


def token_column(columns: Sequence[Column], name: str) -> Column:
    """The only column of tokens among the inputs.

    Raises:
        ConfigError: If there is none, or several.
    """
    found = [column for column in columns if column.kind == "tokens" and column.role == "input"]
    if len(found) != 1:
        raise ConfigError(
            f"task.name={name} needs one input of tokens",
            given=", ".join(f"{c.name} ({c.kind})" for c in columns),
            change="make the shards from text:PATH",
        )
    return found[0]


class _Tokens(Task):
    """Cross entropy per token: outputs [n, L, vocabulary], targets [n, L], -100 where none counts."""

    counts_terms: ClassVar = True
    has_accuracy: ClassVar = True

    def __init__(self, columns: Sequence[Column], name: str) -> None:
        self._column = token_column(columns, name)

    def num_outputs(self, columns: Sequence[Column]) -> int:
        return self._column.vocabulary

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        return F.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=PADDED_TARGET
        )

    def terms(self, targets: Tensor) -> int:
        return int((targets != PADDED_TARGET).sum())

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(dim=-1) == targets).sum()

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.correct(outputs, targets).double().view(1)

    def fisher(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Likelihood]:
        return outputs[targets != PADDED_TARGET], "categorical"


class CausalLM(_Tokens):
    """Predicts each token from those before it."""

    metrics: ClassVar = {"perplexity": "min", "bits_per_byte": "min", "accuracy": "max"}

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__(columns, "causal_lm")
        if self._column.longest < 2:
            raise ConfigError("task.name=causal_lm needs sequences of two tokens or more")

    def prepare(self, batch: Batch, seed: int, epoch: int) -> Batch:
        if not isinstance(batch.inputs, Fields):
            return replace(batch, inputs=batch.inputs[:, :-1], targets=batch.inputs[:, 1:])
        name, fields = self._column.name, dict(_items(batch.inputs))
        mask = fields[mask_name(name)]
        targets = fields[name].masked_fill(~mask, PADDED_TARGET)[:, 1:]
        # The last token of a sequence has no successor: its position is no term of the loss.
        fields[name], fields[mask_name(name)] = fields[name][:, :-1], mask[:, 1:]
        return replace(batch, inputs=Fields(fields), targets=targets)

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / self._column.bytes_per_token,
            "accuracy": float(sums[0]) / max(terms, 1),
        }


class MaskedLM(_Tokens):
    """Predicts hidden tokens from the rest of their sequence (Devlin et al. 2019, section 3.1).

    Of the chosen tokens 80 % become the mask, 10 % a random token, and 10 % stay. The mask is one more
    token, `vocabulary`, unless `mask_token` names one of the vocabulary. The choice is a function of
    (seed, epoch, sample).
    """

    metrics: ClassVar = {"perplexity": "min", "accuracy": "max"}

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        probability: float = 0.15,
        mask_token: int | None = None,
    ) -> None:
        super().__init__(columns, "masked_lm")
        if not 0 < probability <= 1:
            raise ConfigError(
                "task.arguments.probability out of range", given=probability, allowed="0 to 1"
            )
        vocabulary = self._column.vocabulary
        if mask_token is not None and not 0 <= mask_token < vocabulary:
            raise ConfigError(
                "task.arguments.mask_token is no token",
                given=mask_token,
                allowed=f"0 to {vocabulary - 1}",
            )
        self._probability = probability
        self._mask_token = vocabulary if mask_token is None else mask_token

    def prepare(self, batch: Batch, seed: int, epoch: int) -> Batch:
        name, inputs = self._column.name, batch.inputs
        tokens = inputs[name] if isinstance(inputs, Fields) else inputs
        count, length = tokens.shape
        # As many draws as the longest sequence needs: they must not depend on the others of a batch.
        longest = self._column.longest
        found = uniforms(stream_key(seed, epoch, MASKING), batch.ids, 3 * longest)
        draws = torch.from_numpy(found).to(tokens.device).view(count, 3, longest)
        chosen, kind, other = draws[:, :, :length].unbind(1)
        hidden = chosen < self._probability
        # A sequence without any would not count; its first drawn token is taken.
        real = inputs[mask_name(name)] if isinstance(inputs, Fields) else torch.ones_like(hidden)
        hidden &= real
        least = chosen.masked_fill(~real, 2.0).argmin(dim=1, keepdim=True) if length else None
        if least is not None:
            hidden.scatter_(1, least, True)
        targets = tokens.masked_fill(~hidden, PADDED_TARGET)
        random = (other * self._column.vocabulary).long()
        replaced = torch.where(
            kind < 0.8, self._mask_token, torch.where(kind < 0.9, random, tokens)
        )
        shown = torch.where(hidden, replaced, tokens)
        if isinstance(inputs, Fields):
            return replace(batch, inputs=Fields({**_items(inputs), name: shown}), targets=targets)
        return replace(batch, inputs=shown, targets=targets)

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        return {
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": float(sums[0]) / max(terms, 1),
        }


class SequenceClassification(TargetTask):
    """The class of a whole sequence: outputs [n, classes]; `f1` is the mean over classes."""

    metrics: ClassVar = {"f1": "max", "accuracy": "max"}
    has_accuracy: ClassVar = True

    def __init__(self, columns: Sequence[Column], *, label_smoothing: float = 0.0) -> None:
        token_column(columns, name := "sequence_classification")
        super().__init__(columns, "class", name, "text:PATH?label=NAME")
        self._by_entropy = CrossEntropy(label_smoothing)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._by_entropy.loss(outputs, targets)

    def correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._by_entropy.correct(outputs, targets)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return confusion(outputs.argmax(dim=1), targets, outputs.shape[1]).flatten()

    def values(self, sums: Tensor, terms: int, loss: float) -> dict[str, float]:
        table = sums.view(math.isqrt(len(sums)), -1)
        scores = f1_by_class(table)
        return {
            "f1": float(scores.nanmean()) if bool((~scores.isnan()).any()) else 0.0,
            "accuracy": float(table.trace() / table.sum()),
        }


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts of (truth, prediction), float64 [classes, classes]; truths outside the classes are left
    out."""
    kept = (truth >= 0) & (truth < classes)
    pairs = truth[kept] * classes + predicted[kept]
    return torch.bincount(pairs.flatten(), minlength=classes * classes).double().view(classes, -1)


def f1_by_class(table: Tensor) -> Tensor:
    """2·TP / (2·TP + FP + FN) of each class, which is also the Dice coefficient; NaN for a class that
    neither occurs nor is predicted."""
    right = table.diagonal()
    return 2 * right / (table.sum(0) + table.sum(1))


def _items(fields: Fields) -> dict[str, Any]:
    return {name: fields[name] for name in fields}
