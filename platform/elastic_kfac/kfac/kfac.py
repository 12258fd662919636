"""KFAC: a gradient preconditioner for any first-order optimizer, on any number of ranks.

    preconditioner = KFAC(model, lr=optimizer)
    loss.backward(); preconditioner.step(); optimizer.step()

What is computed is `curvature/`; who computes it is `placement/`; how it travels is
`kfac_exchange.py`. Nothing here depends on the world size except through sample counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.curvature.block import Block, BlockOptions
from elastic_kfac.curvature.capture import Capture, find_layers
from elastic_kfac.curvature.damping import LevenbergMarquardt, Scheduled, scheduled_value
from elastic_kfac.curvature.fisher import fisher_losses
from elastic_kfac.curvature.preconditioning import inner_products, kl_clip_scale
from elastic_kfac.errors import NumericalError, UsageError
from elastic_kfac.kfac.kfac_exchange import Exchange, Moment, as_communicator
from elastic_kfac.kfac.kfac_options import (
    check_options,
    check_scheduled,
    rates_of,
    warn_if_layers_disagree,
)
from elastic_kfac.kfac.kfac_state import check_state, load_layers, memory_usage, save_layers
from elastic_kfac.kfac.kfac_statistics import Statistics, apply_statistics, take_statistics
from elastic_kfac.kfac.timing import timed
from elastic_kfac.placement.costs import CostModel
from elastic_kfac.placement.plan import Plan

STATE_VERSION = 1


class KFAC:
    """Kronecker-factored preconditioner (Martens and Grosse 2015), distributed as KAISA (SC'21).

    Rewrites `.grad` between `backward()` and `optimizer.step()`. Works on plain and
    DistributedDataParallel models; with several ranks, gradients must already be averaged when
    `step()` is called (DDP does that).

    Every hyperparameter below that is a number may also be a function of the step, except where noted.

    Args:
        model: Its Linear, Conv2d, Embedding, MultiheadAttention, BatchNorm, LayerNorm and GroupNorm
            layers are covered; every other parameter keeps its plain gradient and is named in one
            warning.
        lr: The learning rate the KL clip measures with, or the optimizer itself, so that the schedule
            and the clip cannot disagree.
        damping: γ, at true per-sample scale: it competes with the eigenvalues of A ⊗ G, which have the
            scale of squared per-sample gradients. Too small lets noise in flat directions dominate the
            step; too large turns K-FAC into plain gradient descent. A `LevenbergMarquardt` adapts it.
        factor_decay: Weight of the OLD factor in the moving average, in [0, 1).
        factor_update_steps: Steps between factor updates.
        inverse_update_steps: Steps between decompositions; a multiple of `factor_update_steps`.
        stagger: Spread the decompositions of layers over the interval, by layer index (not schedulable).
        kl_clip: Bound κ on the approximate KL divergence of a step; None switches it off.
        grad_worker_frac: Share of ranks that precondition a layer; 1/N is MEM-OPT, 1 COMM-OPT, "auto"
            the planner's choice. Its rounding is `placement.planner.columns_for_fraction`.
        method: `eigen` applies (A ⊗ G + γI)⁻¹ exactly; `inverse` the factored Tikhonov form.
        inverse_damping: How `inverse` splits γ: `pi`, `sqrt` or `plain`.
        factor_scale: `per_sample`, or `sc20` / `kaisa` for comparison with published code.
        fisher: `empirical` uses the training gradients; `1mc`, `mc` and `exact` need
            `sample_fisher(output)` before `backward()`.
        weight_sharing: `expand` treats positions of a Linear as samples of a shared weight, `reduce`
            averages them (Eschenhagen et al. 2023).
        bn_fisher: `unit`, `full` or `diag` for normalisation layers.
        bn_damping_multiplier: Factor on γ for BatchNorm.
        skip_layers: Regular expressions on layer names.
        weight_decay: The coupled form: D ← D + wd·W and γ ← γ + wd. Leave the optimizer's own at 0.
        ema_init: `first` starts the average from the first statistic, `identity` from I.
        precompute: Cache 1 / (d_G d_Aᵀ + γ) with a decomposition; freezes γ until the next one.
        accumulation_steps: Backward passes per step, if the loss is divided by their number.
        loss_scale_per_sample: What one sample's loss is multiplied by before backward. None means one
            over the micro-batch size of this rank (a mean loss), divided by `accumulation_steps`.
        grad_scaler: A `torch.amp.GradScaler` whose scale is on the gradients; unscale before `step()`.
        process_group: A ProcessGroup or Communicator; None takes the default group if there is one.
        symmetry_aware: Send triangles of symmetric tensors.
        bucket_mib: Size of communication buckets.
        colocate: Decompose A and G of a layer on the same rank.
        costs: Seconds per decomposition by size, the same on all ranks; None takes stored measurements.
        memory_budget_bytes: Per rank, for factors and decompositions, when `grad_worker_frac="auto"`.

    Raises:
        ConfigError: A value out of range, or a model without any supported layer.
        CommunicationError: Ranks whose models or options differ.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: Scheduled | torch.optim.Optimizer = 0.1,
        damping: Scheduled | LevenbergMarquardt = 1e-3,
        factor_decay: Scheduled = 0.95,
        factor_update_steps: int | Callable[[int], float] = 1,
        inverse_update_steps: int | Callable[[int], float] = 10,
        stagger: bool = False,
        kl_clip: Scheduled | None = 1e-3,
        grad_worker_frac: float | Literal["auto"] = 1.0,
        method: Literal["eigen", "inverse"] = "eigen",
        inverse_damping: Literal["pi", "sqrt", "plain"] = "pi",
        factor_scale: Literal["per_sample", "sc20", "kaisa"] = "per_sample",
        fisher: Literal["empirical", "1mc", "mc", "exact"] = "empirical",
        weight_sharing: Literal["expand", "reduce"] = "expand",
        bn_fisher: Literal["unit", "full", "diag"] = "unit",
        bn_damping_multiplier: float = 1.0,
        skip_layers: Sequence[str] = (),
        weight_decay: float = 0.0,
        ema_init: Literal["first", "identity"] = "first",
        precompute: bool = False,
        accumulation_steps: int = 1,
        loss_scale_per_sample: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | Communicator | None = None,
        symmetry_aware: bool = True,
        bucket_mib: float = 25.0,
        colocate: bool = True,
        costs: CostModel | None = None,
        memory_budget_bytes: float | None = None,
    ) -> None:
        self.options = BlockOptions(
            method=method,
            inverse_damping=inverse_damping,
            factor_scale=factor_scale,
            weight_sharing=weight_sharing,
            bn_fisher=bn_fisher,
            bn_damping_multiplier=bn_damping_multiplier,
            precompute=precompute,
            ema_init=ema_init,
        )
        check_options(
            self.options,
            fisher=fisher,
            grad_worker_frac=grad_worker_frac,
            weight_decay=weight_decay,
            accumulation_steps=accumulation_steps,
            colocate=colocate,
        )
        self._scheduled: dict[str, Any] = {
            "damping": damping,
            "factor_decay": factor_decay,
            "factor_update_steps": factor_update_steps,
            "inverse_update_steps": inverse_update_steps,
            "kl_clip": kl_clip,
            "lr": lr,
        }
        for name, value in self._scheduled.items():
            if not callable(value) and not isinstance(value, torch.optim.Optimizer):
                check_scheduled(name, value)
        self.fisher = fisher
        self.stagger = stagger
        self.weight_decay = weight_decay
        self.accumulation_steps = accumulation_steps
        self.loss_scale_per_sample = loss_scale_per_sample
        self.grad_scaler = grad_scaler
        self.counters: Counter[str] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        """Time of the host in each part of `step`; it is no state."""
        self._warned = False
        layers = find_layers(model, self.options, skip_layers)
        self.blocks: tuple[Block, ...] = tuple(b for layer in layers for b in layer.blocks)
        self._last_clip = torch.ones((), dtype=torch.float64)
        self._last_product: Tensor | None = None
        self._fallbacks = torch.zeros((), dtype=torch.int64, device=self.blocks[0].device)
        self._exchange = Exchange(
            self.blocks,
            as_communicator(process_group),
            grad_worker_frac=grad_worker_frac,
            inverse_update_steps=int(self._value("inverse_update_steps")),
            colocate=colocate,
            symmetry_aware=symmetry_aware,
            bucket_mib=bucket_mib,
            costs=costs,
            memory_budget_bytes=memory_budget_bytes,
        )
        self._capture = Capture(layers, fisher=fisher)
        self._arm()

    # -- hyperparameters -----------------------------------------------------------------------

    def _value(self, name: str) -> float:
        value = self._scheduled[name]
        if not callable(value):
            return float(value)
        result = scheduled_value(value, self.steps)
        check_scheduled(name, result, step=self.steps)
        return result

    @property
    def steps(self) -> int:
        """Optimizer steps so far, skipped ones not counted."""
        return self.counters["steps"]

    @property
    def damping(self) -> float:
        """γ at this step, the coupled weight decay included."""
        return self._value("damping") + self.weight_decay

    @property
    def plan(self) -> Plan:
        """Who decomposes and preconditions what."""
        return self._exchange.plan

    @property
    def communicator(self) -> Communicator:
        """The ranks this preconditioner works with, and what they sent."""
        return self._exchange.communicator

    @property
    def raw_gradient_fallbacks(self) -> int:
        """How often a normalisation layer kept its plain gradient because P was not finite."""
        return int(self._fallbacks)

    @property
    def kl_clip_scale(self) -> float:
        """ν of the last step."""
        return float(self._last_clip)

    def factors_due(self) -> bool:
        """Whether the coming step updates the factors, so that passes are recorded."""
        return self.steps % int(self._value("factor_update_steps")) == 0

    def _inverse_due(self, index: int) -> bool:
        interval = int(self._value("inverse_update_steps"))
        offset = 0
        if self.stagger:
            # Whole factor intervals, so that a decomposition always sees fresh factors.
            slots = max(1, interval // int(self._value("factor_update_steps")))
            offset = (index * slots // len(self.blocks)) * (interval // slots)
        return self.steps == 0 or self.steps % interval == offset

    def _learning_rates(self, blocks: Sequence[Block]) -> list[float]:
        lr = self._scheduled["lr"]
        if isinstance(lr, torch.optim.Optimizer):
            return rates_of(lr, blocks)
        return [self._value("lr")] * len(blocks)

    # -- one step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        num_samples: int | None = None,
        loss_scale_per_sample: float | None = None,
        *,
        statistics: Statistics | None = None,
    ) -> None:
        """Replaces the gradients of covered layers by preconditioned ones; a collective call.

        Args:
            num_samples: Samples in this rank's loss since the last step. None counts the batch
                dimension of every layer's input.
            loss_scale_per_sample: Overrides the constructor's for this step.
            statistics: Sums of `take_statistics` that were reduced over all ranks already.

        Raises:
            UsageError: If there are no gradients or no statistics where they are due.
            NumericalError: If the very first decomposition of a layer fails in every way.
        """
        active = [block for block in self.blocks if block.has_gradient()]
        if not active:
            raise UsageError("step() found no gradients", change="call loss.backward() first")
        if self.grad_scaler is not None and not self._gradients_finite(active):
            self.skip_step()  # the scaler will skip it too
            return
        with timed(self.seconds, "factors"):
            if self.factors_due():
                if statistics is None:
                    own = self.take_statistics(num_samples, loss_scale_per_sample)
                    statistics = self._exchange.reduce_statistics(own)
                self._exchange.announce("factor_update")
                self._update_factors(statistics)
        with timed(self.seconds, "decompositions"):
            self._decompose()
        with timed(self.seconds, "preconditioning"):
            self._precondition([block for block in active if block.inverse_step >= 0])
        self.counters["steps"] += 1
        self._arm()

    def skip_step(self) -> None:
        """Forgets the statistics since the last step, because there was an overflow in it."""
        for block in self.blocks:
            block.drop_pending()
        self.counters["skipped_steps"] += 1

    def _arm(self) -> None:
        self._capture.active = self.factors_due()

    def _gradients_finite(self, blocks: Sequence[Block]) -> bool:
        sums = [p.grad.sum() for b in blocks for p in b.parameters if p.grad is not None]
        total = torch.stack([s.float() for s in sums]).sum()
        return self._exchange.all_finite(total)

    def take_statistics(
        self, num_samples: int | None = None, loss_scale_per_sample: float | None = None
    ) -> Statistics:
        """This rank's sums since the last call or step, where `factors_due()`."""
        if num_samples is None and not self._warned:
            self._warned = warn_if_layers_disagree(self.blocks)
        scale = loss_scale_per_sample
        if scale is None:
            scale = self.loss_scale_per_sample
        extra = 1.0 if scale is not None else 1.0 / self.accumulation_steps
        if self.grad_scaler is not None:
            extra *= self.grad_scaler.get_scale()
        return take_statistics(self.blocks, num_samples, scale, extra)

    def _update_factors(self, statistics: Statistics) -> None:
        if not any(rows for _, rows in statistics.counts):
            raise UsageError(
                "step() found no statistics of a forward and backward pass",
                allowed="a pass in training mode with gradients enabled since the last step",
                change="build KFAC before the first (compiled) forward pass"
                + ("" if self.fisher == "empirical" else ", and call sample_fisher(output)"),
            )
        discarded = apply_statistics(self.blocks, statistics, self._value("factor_decay"))
        if discarded:
            self.counters["discarded_statistics"] += discarded

    def _decompose(self) -> None:
        due = [
            block
            for index, block in enumerate(self.blocks)
            if block.factor_updates and (block.inverse_step < 0 or self._inverse_due(index))
        ]
        damping = self.damping
        for block in due:
            names = self._exchange.factors_to_decompose(block)
            if names:
                try:
                    block.second_order.update(block.decompose(names, damping))
                except NumericalError:
                    self.counters["inverse_failures"] += 1
                    if block.inverse_step < 0:
                        raise
            # Ranks that do not hold the decomposition know its age all the same.
            block.inverse_step = self.steps
        self._exchange.share_second_order(due)

    def _precondition(self, blocks: Sequence[Block]) -> None:
        if not blocks:
            return
        gradients = [block.gradient(self.weight_decay) for block in blocks]
        results = self._exchange.precondition(blocks, gradients, self.damping)
        for index, block in enumerate(blocks):
            if block.guarded:  # on every rank alike, so that all keep the same gradient
                good = torch.isfinite(results[index]).all()
                results[index] = torch.where(good, results[index], gradients[index])
                self._fallbacks += (~good).to(self._fallbacks)
        products = inner_products(results, gradients)
        scale = torch.ones_like(products[0])
        if self._scheduled["kl_clip"] is not None:
            rates = self._learning_rates(blocks)
            scale = kl_clip_scale(products, rates, self._value("kl_clip"))
            torch._foreach_mul_(results, scale.to(results[0].dtype))
        self._last_clip, self._last_product = scale, products.sum()
        for block, value in zip(blocks, results, strict=True):
            block.set_gradient(value)

    # -- Fisher --------------------------------------------------------------------------------

    def sample_fisher(
        self,
        output: Tensor,
        *,
        likelihood: Literal["categorical", "gaussian"] = "categorical",
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """Propagates labels drawn from the model itself; call between the forward and `backward()`.

        G then is the model's own Fisher (an unbiased estimate for `1mc` and `mc`, all classes for
        `exact`); parameter gradients are not touched. Does nothing on steps without factor update.

        Args:
            output: Logits `[n, classes, ...]`, or predicted means `[n, ...]` of unit variance.
            draws: Labels per sample for `mc`.
            generator: Where the labels come from; reproducible runs pass a seeded one.

        Raises:
            UsageError: If the preconditioner was built with `fisher="empirical"`.
        """
        if self.fisher == "empirical":
            raise UsageError(
                "sample_fisher needs a sampled Fisher",
                given="fisher='empirical'",
                allowed="1mc, mc, exact",
            )
        if not self._capture.active:
            return
        parameters = [p for block in self.blocks for p in block.parameters]
        parameters = list(dict.fromkeys(parameters))
        scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        losses = fisher_losses(
            output.float() if output.dtype in (torch.half, torch.bfloat16) else output,
            self.fisher,
            likelihood,
            1 if self.fisher == "1mc" else draws,
            generator,
        )
        try:
            for loss, weight in losses:
                self._capture.sampling_weight = weight / (scale * scale)
                torch.autograd.grad(loss * scale, parameters, retain_graph=True, allow_unused=True)
        finally:
            self._capture.sampling_weight = None

    # -- damping -------------------------------------------------------------------------------

    def predicted_change(self, lr: float | None = None) -> float:
        """Change of the loss that the quadratic model predicts for the step `−lr·ν·P` just prepared.

        `M(δ) − M(0) = ∇Lᵀδ + ½ δᵀ(F + γI)δ` with the damped K-FAC curvature, for which
        `(F + γI) P = D`. Call between `step()` and `optimizer.step()`.
        """
        if self._last_product is None:
            raise UsageError("predicted_change() needs a step() first")
        rate = self._learning_rates(self.blocks[:1])[0] if lr is None else lr
        size = rate * float(self._last_clip)
        return float(self._last_product) * (0.5 * size * size - size)

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The world-size-free state, equal on every rank; a collective call.

        Factors and the decompositions in use by layer name, counters, and the damping rule's own state:
        a run continues from it bit for bit, at this or any other world size.
        """
        damping = self._scheduled["damping"]
        return {
            "version": STATE_VERSION,
            "options": self._identity(),
            "counters": dict(self.counters),
            "damping": damping.state_dict() if isinstance(damping, LevenbergMarquardt) else None,
            "layers": save_layers(self.blocks, self._exchange.gather_second_order()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()` of a run of any world size; keeps only what this rank needs.

        Raises:
            StateError: If it belongs to another model, other options or another version; nothing is
                changed then.
        """
        check_state(state, STATE_VERSION, self._identity(), self.blocks)
        load_layers(self.blocks, state["layers"], self._exchange.is_gradient_worker)
        self.counters = Counter({name: int(n) for name, n in state["counters"].items()})
        damping = self._scheduled["damping"]
        if isinstance(damping, LevenbergMarquardt) and state["damping"] is not None:
            damping.load_state_dict(state["damping"])
        self._arm()

    def _identity(self) -> dict[str, Any]:
        return {
            "method": self.options.method,
            "factor_scale": self.options.factor_scale,
            "bn_fisher": self.options.bn_fisher,
            "precompute": self.options.precompute,
        }

    def resize(self, process_group: dist.ProcessGroup | Communicator | None) -> Plan:
        """Works on with another set of ranks; a collective call over the new set.

        Re-plans, keeps what this rank already holds, and fetches what it needs from ranks that hold it:
        a rank that has just joined with a fresh preconditioner receives factors, decompositions and
        counters of the ranks that went furthest.
        """
        newest = self._exchange.resize(as_communicator(process_group), self.counters)
        self.counters = Counter(newest)
        for block in self.blocks:
            block.drop_pending()
        self._arm()
        return self.plan

    def memory_usage(self) -> dict[str, int]:
        """Bytes this rank holds: factors, second_order, pending sums, and their total."""
        return memory_usage(self.blocks)

    def announce_to(self, listener: Callable[[Moment], None]) -> None:
        """Has `listener` told right before statistics or decompositions are exchanged."""
        self._exchange.announce = listener

    def close(self) -> None:
        """Removes the hooks; the model is as before."""
        self._capture.close()
