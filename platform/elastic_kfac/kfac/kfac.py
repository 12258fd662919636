"""KFAC: a gradient preconditioner for any first-order optimizer, on any number of ranks.

    preconditioner = KFAC(model, lr=optimizer)
    loss.backward(); preconditioner.step(); optimizer.step()

What is computed is `curvature/`; what passes recorded of it is `recording.py`, what becomes of that
`averages.py`; who computes it, and how it travels, is `distribution/`; when it is refreshed is
`refresh.py`. Nothing here depends on the world size except through sample counts.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import KfacOptions, ShardedConfig
from elastic_kfac.curvature.discovery import (
    clean_name,
    each_parameter,
    find_layers,
    shape_of,
    unwrap,
)
from elastic_kfac.curvature.passes.batches import Batch
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.kfac.averages import Averages
from elastic_kfac.kfac.coverage import Coverage
from elastic_kfac.kfac.distribution import (
    PHASES,
    Basis,
    Calibration,
    Gradients,
    Plan,
    ResizeReport,
    States,
    Timers,
    as_communicator,
    make_distribution,
)
from elastic_kfac.kfac.options import (
    Lr,
    Rates,
    check_arguments,
    damping_rule,
    make_options,
    takes_options,
    value_at,
)
from elastic_kfac.kfac.recording import Recording
from elastic_kfac.kfac.refresh import make_refresh
from elastic_kfac.kfac.state import carry_over, leave, load, memory_usage, move_to, save
from elastic_kfac.kfac.statistics import (
    AGAIN,
    UNFOLLOWED,
    Captured,
    Coming,
    Late,
    Overlap,
    Statistics,
    WarnOnce,
)
from elastic_kfac.kfac.step_bound import StepBound

Phase = Literal["factor_exchange", "factor_update", "decomposition"]


@takes_options
class KFAC:
    """Kronecker-factored preconditioner (Martens and Grosse 2015), distributed as KAISA (SC'21).

    Rewrites `.grad` between `backward()` and `optimizer.step()`. Works on plain,
    DistributedDataParallel and `fully_shard`ed (FSDP2) models; with several ranks, gradients must already
    be averaged when `step()` is called (these wrappers do that), unless `sharding` is given.

    Args:
        model: Its Linear, Conv1d to Conv3d, ConvTranspose1d to 3d, Embedding, MultiheadAttention,
            BatchNorm, LayerNorm, RMSNorm and GroupNorm layers are covered; one warning names the
            others; reasons are in `coverage()`.
        config: Options as one value; keywords replace parts of it.
        lr: The learning rate that the trust region measures steps by: a number, a function of the step,
            or the optimizer itself (or a list of them), so that the two cannot disagree.
        sharding: Shard K-FAC by owner (Osawa et al. 2019) instead of over the KAISA grid. Gradients then
            are local ones of the global mean loss; with `gather="weights"`, `step()` also applies the
            update, with the rates and momentum of `lr`, and no `optimizer.step()` must follow.
        tree: Statistics are reduced by the summation tree of the reproducible mode and handed to
            `step(statistics=...)`.
        accumulation_steps: Backward passes per step, if the loss is divided by their number.
        loss_scale_per_sample: What one sample's loss is multiplied by before backward. None means one
            over the micro-batch size of this rank (a mean loss), divided by `accumulation_steps`; with
            `sharding`, one over the global batch.
        grad_scaler: A `torch.amp.GradScaler` whose scale is on the gradients; unscale before `step()`.
        process_group: A ProcessGroup or Communicator; None takes the default group if there is one.
        calibration: Measured costs that the plan follows; None takes stored ones.
        **options:

    Raises:
        ConfigError: An option that does not exist or is out of range, a model without any covered
            layer, or a state that does not fit the memory budget.
        CommunicationError: Ranks whose models or options differ.
    """

    def __init__(
        self,
        model: nn.Module,
        config: KfacOptions | None = None,
        *,
        lr: Lr = 0.1,
        sharding: ShardedConfig | None = None,
        tree: bool = False,
        accumulation_steps: int = 1,
        loss_scale_per_sample: float | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: dist.ProcessGroup | Communicator | None = None,
        calibration: Calibration | None = None,
        **options: Any,
    ) -> None:
        check_arguments(model, config)
        self.options = self._given = make_options(config, options)
        self.tuned: dict[str, float] = {}
        """Options that `retune` has replaced."""
        if not (isinstance(accumulation_steps, int) and accumulation_steps >= 1):
            raise ConfigError(
                "accumulation_steps is out of range",
                given=accumulation_steps,
                allowed="an integer >= 1",
            )
        self._rates = Rates(lr)
        self.accumulation_steps = accumulation_steps
        self.loss_scale_per_sample = loss_scale_per_sample
        self.grad_scaler = grad_scaler
        self.counters: Counter[str] = Counter()
        self.timers = Timers()
        """Of the parts of `step`; not part of the state."""
        self.on_phase: Callable[[Phase], None] | None = None
        """Called right before statistics are exchanged, factors change, decompositions are exchanged."""
        self.damping_rule = damping_rule(self.options)
        self._model, self._sharding, self._tree = model, sharding, tree
        self.calibration = calibration
        """What the next plan is made from, equal on all ranks; None stands for stored costs."""
        self._warnings = WarnOnce()
        self.covered = Coverage()
        self.bound = StepBound(self.options, self._rates)
        self.overlap = Overlap()
        """What the last step has left to the next one, with `overlap_reduction`."""
        self._pool: Executor | None = None
        self._awaits_group = process_group is None
        """Whether a default process group that is made later is to be joined."""
        self._build(as_communicator(process_group))
        self._last_damping = self.damping
        self._fallbacks = torch.zeros((), dtype=torch.int64, device=self.layers[0].device)
        self._arm()

    def _build(self, communicator: Communicator) -> None:
        """The layers of the model as it is now, and who computes what of them. Collective."""
        found = find_layers(self._model, self.options)
        self._shape = shape_of(self._model)
        self.parameters = {clean_name(n): p for n, p in unwrap(self._model).named_parameters()}
        self.layers = found.layers
        """The covered layers in registration order."""
        self.covered.find(found)
        self.bound.cover(self.layers)
        weights = [layer.parameters[0] for layer in self.layers]
        self._placed = [(w, w.dtype, w.device, w.shape) for w in weights]
        wide = [f"{layer.name} ({layer.kept})" for layer in self.layers if layer.kept]
        named = wide if len(wide) <= 5 else [*wide[:4], f"{len(wide) - 4} more (in `plan`)"]
        text = (
            f"factors wider than max_factor_dim={self.options.max_factor_dim} are kept in part: "
            f"{', '.join(named)}; raise it to keep more, or None to keep all"
        )
        self._warnings.once(text, bool(wide), text)
        if self.options.weight_sharing == "reduce":
            tables = ", ".join(x.name for x in self.layers if isinstance(x.module, nn.Embedding))
            text = (
                f"weight_sharing='reduce' does not apply to Embedding layers: {tables} use expand"
            )
            self._warnings.once(text, bool(tables), text)
        self.refresh = make_refresh(self.layers, self.options)
        self.refresh.ahead.pool = self._pool
        self.distribution = make_distribution(
            Basis(self.layers, communicator, self.options, self.calibration),
            model=self._model,
            sharding=self._sharding,
            tree=self._tree,
        )
        self.averages = Averages(self.distribution, self.refresh, self.options, self.counters)
        self._recording = Recording(self._model, found, self.options, self._warnings)

    def _was_cast(self) -> bool:
        """Whether parameters have another type, device or shape than what is kept for them."""
        return any(
            p.dtype is not dtype or p.device != device or p.shape != shape
            for p, dtype, device, shape in self._placed
        )

    def _follow_model(self) -> bool:
        """Whether layers were frozen, unfrozen, replaced or added; covers what there is now. Collective
        if so."""
        if shape_of(self._model) == self._shape:
            return False
        self.flush()
        new = self.covered.keep(carry_over(self, self._rebuild))
        if new:
            warnings.warn(
                f"the model has changed; K-FAC preconditions from the next pass on: {', '.join(new)}",
                UserWarning,
                stacklevel=4,
            )
        return True

    def _rebuild(self) -> None:
        self.close()
        self._build(self.communicator)

    # -- one step -------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        num_samples: int | None = None,
        loss_scale_per_sample: float | None = None,
        *,
        statistics: Statistics | None = None,
    ) -> None:
        """Replaces the gradients of covered layers by preconditioned ones. Collective.

        Args:
            num_samples: Samples in this rank's loss since the last step. None counts the batch
                dimension of every layer's input.
            loss_scale_per_sample: Overrides the constructor's for this step.
            statistics: With `tree`, the reduced sums of `take_statistics`.

        Raises:
            UsageError: If there are no gradients, or no statistics where they are due (with
                `overlap_reduction`, in the step after).
            NumericalError: If the first decomposition of a layer fails in every way.
        """
        if self._awaits_group and self.plan.world_size == 1:
            world = Communicator.world()
            if world.world_size > 1:
                self.flush()
                move_to(self, world)
        parameters = each_parameter(self._model)
        if not self._gradients_are_usable(parameters):
            self.skip_step()
            return
        self._warnings.once("again", self._recording.are_gradients_marked(), AGAIN)
        self._last_damping = self.damping
        with self.timers("factors"):
            self.overlap.take(self._update_factors)
            due = self.factors_due()
            changed = due and statistics is not None and shape_of(self._model) != self._shape
            self._warnings.once("tree", changed, UNFOLLOWED)
            looks = statistics is None and (due or self.sums_gradients or self._was_cast())
            if looks and self._follow_model():
                due = False  # layers that have changed are covered from the next pass on
            begin = self._reduction(due, num_samples, loss_scale_per_sample, statistics)
            own, defers = Late(self.steps, self.due if due else ()), self._defers()
            found = None if defers or begin is None else begin().wait()
            self.distribution.bring()
            refreshed = self._update_factors(found, own) if due and not defers else set()
        with self.timers("decompositions"):
            for turn in (self.overlap.late, None if defers else own):
                if turn is not None:
                    self._decompose(refreshed, turn.step)
        with self.timers("preconditioning"):
            self._precondition(parameters)
            self.distribution.publish(self._rates, self.steps)
        self.overlap.late = None
        if defers:
            with self.timers("factors"):
                self.overlap.leave(own, begin)
        self.counters["steps"] += 1
        self._recording.mark_gradients()
        self._arm()

    def _defers(self) -> bool:
        """Whether the coming step leaves its statistics and decompositions to the one after it. The first
        does not: without them there is neither curvature to take a step with nor a scale of the loss."""
        trust = self.bound.trust
        knows_scale = trust is None or trust.scale is not None
        return self.options.overlap_reduction and self.steps > 0 and knows_scale

    def _reduction(
        self,
        due: bool,
        num_samples: int | None,
        loss_scale: float | None,
        statistics: Statistics | None,
    ) -> Callable[[], Coming] | None:
        """What starts the reduction of statistics (or of gradients); None where there are none."""
        if statistics is not None:
            given = replace(statistics, are_given=True)
            return lambda: Coming(lambda: given)
        if not (due or self.sums_gradients):
            return None
        captured = self._captured(num_samples, loss_scale)

        def begin() -> Coming:
            self._enter("factor_exchange", if_=due)
            return self.distribution.begin_reduction(captured)

        return begin

    def _decompose(self, refreshed: set[int], step: int) -> None:
        """What is due in a step."""
        renewed = self.averages.decompose(
            refreshed, step, self._tikhonov_at, lambda: self._enter("decomposition")
        )
        if renewed:
            self.bound.look(self.states, renewed)

    def _update_factors(self, statistics: Statistics | None, turn: Late) -> set[int]:
        """Moves the running averages; the layers whose statistics came and were finite."""
        if statistics is not None:
            self.bound.learn_scales(statistics, self.states, self.distribution.total)
            if statistics.faulty:
                self.covered.leave_out(statistics.faulty)
        seen = {i for i, (_, rows) in enumerate(statistics.counts) if rows} if statistics else set()
        # A sharded reduction does not count layers that are left out.
        uncounted = self.distribution.counts_are_local and (
            bool(self.covered.left_out) or self.covered.are_without_gradients(turn.due)
        )
        if statistics is None or not (seen or uncounted or self._recording.took_empty):
            sampled = "" if self.options.fisher == "empirical" else "sample_fisher(output) and "
            raise UsageError(
                "step() found no statistics of a forward and backward pass on any rank",
                allowed="a pass in training mode with gradients enabled since the last step",
                change=f"call {sampled}backward() (not torch.autograd.grad); build KFAC "
                "before a model's first compiled pass",
            )
        # Late ones may be of layers that have been left out since their passes.
        seen = {i for i in seen if self.layers[i].name not in self.covered.left_out}
        self._enter("factor_update")
        if turn.step == self.steps:
            # Late ones would change offsets at a time that depends on when a state is saved.
            self.refresh.see({self.layers[i].name: int(statistics.counts[i][1]) for i in seen})
        self.covered.used |= {self.layers[i].name for i in seen}
        self.covered.name_unseen(turn.due)
        refreshed = self.averages.update(statistics, seen, turn.due, turn.step)
        self.bound.follow_residual(self.states, self.distribution.total)
        return refreshed

    def _precondition(self, parameters: Sequence[nn.Parameter]) -> None:
        """`.grad` becomes ν (F + γI)⁻¹ D in the covered layers that have a decomposition."""
        active = self.distribution.preconditioned_here(self.states)
        layers = [self.layers[i] for i in active]
        decay = self.options.weight_decay
        used = [
            None
            if self.bound.needs_all_columns(layer)
            else layer.used_columns(decay, self._recording.rows_looked_up(layer))
            for layer in layers
        ]
        stacks = self.distribution.stacks.of(active)
        gradients = stacks.gradients(decay, used)
        averages = self.bound.averaged(active, gradients)
        with self.timers("products"):
            results = self.distribution.precondition(
                self.states, Gradients(active, averages, used), self.bound.tikhonov(self.damping)
            )
        for place, layer in enumerate(layers):
            if layer.guarded:  # on every rank alike, so that all keep the same gradient
                good = torch.isfinite(results[place]).all()
                results[place] = torch.where(good, results[place], averages[place])
                self._fallbacks += (~good).to(self._fallbacks)
        self.bound.apply(
            active,
            results,
            gradients,
            used,
            self.distribution.unowned(parameters),
            step=self.steps,
            total=self.distribution.total,
        )
        stacks.set_gradients(results, used)

    # -- around a step --------------------------------------------------------------------------

    def skip_step(self) -> None:
        """Discards the statistics since the last step, because an overflow is in them."""
        self._recording.drop()
        self.counters["skipped_steps"] += 1

    def factors_due(self) -> bool:
        """Whether the coming step refreshes statistics, so that passes are recorded."""
        return any(self.due)

    @property
    def due(self) -> Sequence[frozenset[str]]:
        """The factors that the coming step refreshes, by layer."""
        return self._recording.due

    def captured_samples(self) -> int:
        """Samples that this rank's passes have gone through since the last step."""
        return self._recording.samples

    def take_statistics(
        self, num_samples: int | None = None, loss_scale_per_sample: float | None = None
    ) -> Statistics:
        """This rank's sums since the last call or step, where `factors_due()`."""
        return self._captured(num_samples, loss_scale_per_sample).statistics()

    def _captured(self, num_samples: int | None, loss_scale: float | None) -> Captured:
        captured, faults = self._recording.take(
            num_samples,
            self.loss_scale_per_sample if loss_scale is None else loss_scale,
            passes=None if self.sums_gradients else self.accumulation_steps,
            grad_scale=None if self.grad_scaler is None else self.grad_scaler.get_scale(),
        )
        self.covered.note(faults)
        return captured

    def _gradients_are_usable(self, parameters: Sequence[nn.Parameter]) -> bool:
        """False if a gradient scaler is going to skip this step.

        Raises:
            UsageError: If there are no gradients at all.
        """
        if self.communicator.world_size != self.plan.world_size:
            raise UsageError("step() after leave()", change="call resize(process_group) first")
        join = getattr(self._model, "_join_config", None)
        if join is not None and join.enable and not join.throw_on_early_termination:
            raise UsageError(
                "ranks that have left DistributedDataParallel.join() early are missing in K-FAC's sums",
                change="give every rank the same number of batches (an empty one will do), or use "
                "join(throw_on_early_termination=True)",
            )
        # Of uncovered parameters as well: a scaler skips the step for any of them.
        if not self.sums_gradients and all(p.grad is None for p in parameters):
            raise UsageError("step() found no gradients", change="call loss.backward() first")
        if self.grad_scaler is None:
            return True
        self._rates.require_unscaled(self.grad_scaler)
        usable = self.distribution.all_finite(p.grad for p in parameters if p.grad is not None)
        if not usable:
            self._rates.tell_overflow(self.grad_scaler)
        return usable

    def micro_batch(
        self,
        n: int | None = None,
        *,
        axis: int | None = None,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> AbstractContextManager[Batch]:
        """Describes the samples of the forward calls inside.

            with kfac.micro_batch(mask=is_real):
                loss = criterion(model(tokens), targets)

        Args:
            n: Samples; None counts them in the inputs of the model, or the real rows of `mask` with
                `loss_reduction="positions"`. A parameter as a layer's input is taken for one that all
                samples share, unless it has `n` rows.
            axis: The dimension that counts samples, if not `batch_axis`.
            mask: True where a sample `[n]` or a position is real: `[n, positions]`, or the other way
                round with `axis=1`; `[n, height, width]` for images. Padding then is no part of A and G.
                A layer with other positions (after pooling) counts all of its own; a convolution whose
                output positions are not those of the mask is left out by name.
            scale: What one sample's loss is multiplied by before backward.
        """
        return self._recording.micro_batch(n, axis, mask, scale)

    def _arm(self) -> None:
        self._recording.arm(self.covered.narrowed(self.refresh.statistics_due(self.steps)))

    def _enter(self, phase: Phase, *, if_: bool = True) -> None:
        if if_ and self.on_phase is not None:
            self.on_phase(phase)

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
            likelihood: What the output parameterises.
            draws: Labels per sample for `mc`.
            generator: Source of the labels; reproducible runs pass a seeded one.

        Raises:
            UsageError: If the preconditioner was built with `fisher="empirical"`.
        """
        loss_scale = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        self._recording.sample(output, likelihood, draws, generator, loss_scale)

    # -- properties and reports ------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer steps so far, skipped ones not counted."""
        return self.counters["steps"]

    @property
    def damping(self) -> float:
        """γ at this step, the coupled weight decay included."""
        return self._damping_at(self.steps)

    def _damping_at(self, step: int) -> float:
        """The same at another step, as far as it is known."""
        rule = self.damping_rule
        value = value_at(self.options, "damping", step) if rule is None else rule.value
        return value + self.options.weight_decay

    def _tikhonov_at(self, step: int) -> float:
        return self.bound.tikhonov(self._damping_at(step))

    @property
    def states(self) -> States:
        """What this rank holds of each layer."""
        return self.averages.states

    @property
    def seconds(self) -> dict[str, float]:
        """Host time in each part of `step` so far, s (a device may still be busy)."""
        return {phase: self.timers.seconds[phase] for phase in PHASES}

    @property
    def plan(self) -> Plan:
        """Who decomposes and preconditions what."""
        return self.distribution.plan

    @property
    def communicator(self) -> Communicator:
        """The ranks this preconditioner works with, and what they sent."""
        return self.distribution.communicator

    @property
    def sums_gradients(self) -> bool:
        """Whether `step()` takes local gradients and sums them over the ranks itself."""
        return self.distribution.sums_gradients

    @property
    def updates_weights(self) -> bool:
        """Whether `step()` updates the weights, so that no `optimizer.step()` must follow."""
        return self.distribution.updates_weights

    @property
    def holds_everything(self) -> bool:
        """Whether this rank alone holds the whole state."""
        return not self.distribution.counts_are_local and len(self.plan.columns) == 1

    @property
    def kl_clip_scale(self) -> float:
        """The step scale: what the trust region, or the fixed KL clip, multiplied the last step by."""
        return float(self.bound.scale)

    def factors(self) -> dict[str, dict[str, Tensor]]:
        """The running averages this rank holds, by layer name; treat them as read-only.

        With weight matrices `[g, a]` (a bias is the last column; a convolution is flattened to
        `[out, in·kernel]`): `A` `[a, a]`, or the diagonal `[a]` of an Embedding, and `G` `[g, g]`, with a
        leading dimension for the groups of a grouped convolution. Of a factor wider than
        `max_factor_dim` there are blocks `[blocks, s, s]` along the diagonal (the last one filled up with
        zeros) or the diagonal `[d]`; `plan` has which. Normalisation layers have `F`:
        `[channels, p, p]` over (scale, shift) with `bn_fisher="unit"`, `[p·channels, p·channels]` with
        `full`, its diagonal with `diag`. A factor is at true per-sample scale, so that A ⊗ G estimates
        the Fisher of a mean loss. Several calls of a layer in one pass are further positions; of a
        normalisation layer, parts of each sample's gradient. With `sharding`, only the layers that this
        rank owns.
        """
        return {
            layer.name: dict(state.factors)
            for layer, state in zip(self.layers, self.states, strict=True)
            if state.factors
        }

    def coverage(self) -> dict[str, str]:
        """`covered`, or the reason why not, for every layer with parameters, by name.

        Reasons: `frozen`, a pattern of `skip_layers`, an unsupported type or option, a weight shared by
        modules of different kinds (of one kind, they are one layer under the first one's name), and, once
        a step was made, `unused`: no pass has gone through it so far. The four projections of an
        attention have names of their own. A covered layer's factors are kept whole unless they are wider
        than `max_factor_dim`: `print(kfac.plan)` shows what is kept then.
        """
        return self.covered.report()

    def metrics(self) -> dict[str, float]:
        """Curvature of the last step, for a row of metrics."""
        held = [state for state in self.states if state.factor_updates]
        oldest = min((state.inverse_step for state in held), default=self.steps - 1)
        return {
            "damping": self._last_damping,
            "kl_clip_scale": self.kl_clip_scale,
            "clipped_share": self.bound.shortened_share,
            "factor_updates": max((state.factor_updates for state in held), default=0),
            "inverse_age_steps": max(0, self.steps - 1 - oldest),
            "fallbacks": self.counters["inverse_failures"] + int(self._fallbacks),
        }

    def memory_usage(self) -> dict[str, int]:
        """Bytes this rank holds by category (`factors`, `second_order`, `pending`, where they are used
        `snapshots`, `momentum` and the trust region's `last_step`), and their total."""
        return memory_usage(self, [*self._recording.tensors, *self.overlap.tensors])

    # -- adaptive damping -----------------------------------------------------------------------

    def predicted_change(self, lr: float | None = None) -> float:
        """Change of the loss that the quadratic model predicts for the step δ just prepared.

        `M(δ) − M(0) = ∇Lᵀδ + ½ δᵀ(F + γI)δ` with the damped K-FAC curvature, for which
        `(F + γI) P = D`. δ is the whole step, momentum included, with `trust_region="adaptive"` and SGD
        behind it; otherwise, or for a given `lr`, it is `−lr·ν·P`. Call after `step()`. Collective with
        `sharding`.
        """
        return self.bound.predicted_change(lr, self.steps, self.distribution.total)

    def reduction_due(self) -> bool:
        """Whether the rule for damping needs the change of the loss in the coming step."""
        adaptive = self.damping_rule
        return adaptive is not None and (self.steps + 1) % adaptive.rule.interval == 0

    def adapt_damping(self, actual_change: float) -> float:
        """Adapts γ to the change of the mean loss over the last step's samples; returns ρ, the ratio to
        the predicted change. Call after `optimizer.step()`. Collective with `sharding`."""
        assert self.damping_rule is not None
        return self.damping_rule.update(actual_change, self.predicted_change())

    def decompose_in(self, pool: Executor | None) -> None:
        """Where large decompositions are computed between the statistics and the step that uses them,
        with `stagger`: any `concurrent.futures.Executor` over processes, a thread with None.

        The results are those of the step itself; only where they are computed changes. The pool stays
        yours to shut down.
        """
        self._pool = self.refresh.ahead.pool = pool

    def retune(self, **values: float) -> None:
        """Goes on with other intervals or another damping than it was built with: numbers for
        `factor_update_steps`, `inverse_update_steps` and `damping`. Without any, with those again.

        They are a part of the state. Call it on all ranks alike, between steps.
        """
        if values == self.tuned:
            return
        self.tuned, self.options = values, self._given.model_copy(update=values)
        for part in (self.refresh, self.bound, self.distribution, self.averages):
            part.options = self.options
        self._arm()

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The world-size-free state, equal on every rank. Collective.

        Factors and decompositions by layer name, counters, and the state of adaptive rules: a run
        continues from it bit for bit, at this or any other world size and distribution.

        Raises:
            UsageError: If other ranks do not call it within two minutes, or the group's timeout. Where
                this rank alone holds everything (`grad_worker_frac=1`, no adaptive rules) it may also
                be called alone.
        """
        if not self.holds_everything or self.options.refresh == "adaptive":
            self.communicator.meet("KFAC.state_dict()", seconds=120)
        self.flush()
        return save(self)

    def collect_state(self) -> dict[str, Any]:
        """`state_dict()` for a loop whose ranks all come here: a peer that dies on the way is noticed by
        the first collective, instead of being waited for. Collective."""
        self.flush()
        return save(self)

    def flush(self) -> None:
        """Waits for the last step's statistics and for what the device still has to tell about them, so
        that averages and counters are final."""
        self.overlap.take(self._update_factors)
        self.averages.settle()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()` of any world size; keeps only what this rank needs.

        Raises:
            StateError: If it belongs to another model, other options or another version; nothing is
                changed then.
        """
        self.averages.forget_update()
        load(self, state)
        self._recording.drop()
        self._arm()

    def resize(self, process_group: dist.ProcessGroup | Communicator | None) -> ResizeReport:
        """Goes on with another set of ranks. Collective over the new set.

        Keeps what this rank holds and receives what it lacks from ranks that hold it, under the plan that
        moves the fewest bytes: a rank that has just joined with a fresh preconditioner gets the state of
        the ranks that went furthest. Statistics that were under way and are lost with a peer do not enter
        the averages.
        """
        self.flush_what_came()
        self.distribution.calibration = self.calibration
        report = move_to(self, as_communicator(process_group))
        self._recording.drop()
        self._arm()
        return report

    def leave(self) -> None:
        """Drops every reference to process groups and work under way; `resize` must follow.

        What this rank holds, its plan and its number stay. Statistics that were under way are waited for;
        those that are lost with a peer do not enter the averages.
        """
        self.flush_what_came()
        leave(self)

    def flush_what_came(self) -> None:
        """`flush` where peers may be lost: statistics that went with them do not enter the averages."""
        self.overlap.take_what_came(self._update_factors)
        self.averages.settle()

    def close(self) -> None:
        """Removes the hooks; the model is as before."""
        self.overlap.end()
        self._recording.close()
        self.refresh.ahead.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> KFAC:
        """With a copy of the model, `copy.deepcopy((model, kfac))`: it follows the copy."""
        self.flush()
        twin = memo[id(self)] = type(self).__new__(type(self))
        own = {name: v for name, v in vars(self).items() if name != "_pool"}
        vars(twin).update({name: copy.deepcopy(v, memo) for name, v in own.items()})
        twin._pool, twin._shape = None, shape_of(twin._model)
        return twin

    def __reduce__(self) -> str:
        raise UsageError(
            "a KFAC is bound to its process and cannot be pickled",
            change="save kfac.state_dict(), and build KFAC in the other process",
        )
