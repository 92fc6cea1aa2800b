"""The DeepSpeed plug-in: `{"optimizer": {"type": "Addax", "params": {...}}}`.

DeepSpeed resolves an optimizer's name through `torch.optim` and then decides by ZeRO stage what to
build around it. `register` redirects those two decisions for our optimizer and leaves every other
optimizer to DeepSpeed. Names of DeepSpeed's internals were checked against version 0.19.
"""

import functools
from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint.constants import OPTIMIZER_STATE_DICT, ZERO_STAGE
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

from addax_ds.core.skeleton import strip
from addax_ds.engines.base import Engine
from addax_ds.engines.deepspeed_state import flat_groups, load_flat_groups
from addax_ds.engines.replicated import Replicated
from addax_ds.engines.zero3 import Zero3
from addax_ds.engines.zero_init import hpz_group
from addax_ds.errors import UserError


def register(addax: type) -> None:
    """Have DeepSpeed engines treat optimizers of class `addax` as this file says (idempotent)."""
    if getattr(DeepSpeedEngine, "_addax_registered", False):
        return
    check, configure = DeepSpeedEngine._do_optimizer_sanity_check, DeepSpeedEngine._configure_zero_optimizer

    @functools.wraps(check)
    def check_or_refuse(engine: DeepSpeedEngine, optimizer: Any) -> Any:
        if not isinstance(optimizer, addax):
            return check(engine, optimizer)
        refuse(engine)
        return ZERO_OPTIMIZATION  # at every stage the next decision is ours

    @functools.wraps(configure)
    def configure_or_attach(engine: DeepSpeedEngine, optimizer: Any) -> Any:
        return DeepSpeedAddax(engine, optimizer) if isinstance(optimizer, addax) else configure(engine, optimizer)

    DeepSpeedEngine._do_optimizer_sanity_check = check_or_refuse
    DeepSpeedEngine._configure_zero_optimizer = configure_or_attach
    DeepSpeedEngine._addax_registered = True


def refuse(engine: DeepSpeedEngine) -> None:
    """Raise a `UserError` for every setting that would be ignored or give wrong numbers."""
    config = engine._config
    zero, written = config.zero_config, config._param_dict
    offload_param = getattr(zero.offload_param, "device", "none")
    offload_optimizer = getattr(zero.offload_optimizer, "device", "none")
    refusals = {
        # DeepSpeed's own default is 1.0, so only what the user wrote counts.
        "gradient_clipping": (
            float(written.get("gradient_clipping") or 0) > 0,
            "in-place updates know no global norm: set it to 0",
        ),
        "gradient_accumulation_steps": (
            config.gradient_accumulation_steps > 1,
            "it would apply each micro-batch on moved weights: set it to 1, train_step cuts batches itself",
        ),
        "fp16": (config.float16_config.enabled, "float16 would need a loss scale: use bf16"),
        "torch_autocast": (config.torch_autocast_enabled, "zeroth-order forwards would not be cast: use bf16"),
        "zero_optimization.offload_optimizer": (
            offload_optimizer not in (None, "none"),
            "Addax has no optimizer state to offload: remove it",
        ),
        "zero_optimization.offload_param.device": (
            offload_param == "nvme",
            "in-memory updates would be lost on NVMe: use cpu",
        ),
        "zero_optimization.zero_quantized_weights": (
            zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights or zero.zero_quantized_gradients,
            "perturbations would be rounded away: remove the quantized settings",
        ),
        "zero_optimization.zenflow": (bool(engine.zenflow), "it defers updates: remove it"),
        "compile.deepcompile": (config.compile_config.deepcompile, "it bypasses module hooks: remove it"),
        "tensor_parallel": (engine.autotp_size() > 1, "tensor parallelism is not supported: remove it"),
        "pipeline parallelism": (engine.pipeline_parallelism, "give deepspeed.initialize a plain module"),
        "expert parallelism": (engine.has_moe_layers, "DeepSpeed MoE layers are not supported: use a dense model"),
    }
    for setting, (present, remedy) in refusals.items():
        if present:
            raise UserError(f"DeepSpeed setting {setting} cannot be used with Addax: {remedy}")


def attach(engine: DeepSpeedEngine) -> Engine:
    """What holds the weights at the engine's ZeRO stage."""
    skeleton = strip(engine.module)
    stage = engine.zero_optimization_stage()
    if stage < 3:
        held = Replicated(engine.module, skeleton)
        held.name = f"zero{int(stage)}"
        return held
    timers = engine.timers
    offload = DeepSpeedZeRoOffload(
        engine.module,
        timers=timers,
        ds_config=engine.config,
        overlap_comm=engine.zero_overlap_comm(),
        prefetch_bucket_size=engine.zero_prefetch_bucket_size(),
        max_reuse_distance=engine.zero_max_reuse_distance(),
        max_live_parameters=engine.zero_max_live_parameters(),
        param_persistence_threshold=engine.zero_param_persistence_threshold(),
        model_persistence_threshold=engine.zero_model_persistence_threshold(),
        offload_param_config=engine.zero_offload_param(),
        mpu=engine.mpu,
        zero_param_parallel_group=hpz_group(engine.zero_hpz_partition_size(), engine.world_size),
        zero_module_granularity_threshold=engine.zero_module_granularity_threshold(),
        log_trace_cache_warnings=engine.zero_log_trace_cache_warnings(),
    )
    return Zero3(engine.module, skeleton, offload, engine.device)


class DeepSpeedAddax(ZeROOptimizer):
    """What `deepspeed.initialize` returns as the optimizer: Addax, with what an engine asks of one.

    It adds DeepSpeed's bookkeeping to `train_step` and hands everything else on.
    """

    # No loss is ever scaled; the base class asks for each of these.
    custom_loss_scaler = False
    torch_autocast_gradscaler = None
    loss_scaler = None
    overflow = False

    def __init__(self, engine: DeepSpeedEngine, optimizer: Any) -> None:
        super().__init__()
        self.optimizer = optimizer
        self._engine = engine
        optimizer.attach(attach(engine))
        self.dp_process_group = engine.seq_data_parallel_group
        # Gradients are reduced in their hooks, and there is no norm to clip by.
        engine.enable_backward_allreduce = False
        engine._config.gradient_clipping = 0.0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def engine(self) -> Engine:
        return self.optimizer.engine

    @property
    def config(self) -> Any:
        return self.optimizer.config

    @property
    def steps(self) -> int:
        return self.optimizer.steps

    @steps.setter
    def steps(self, taken: int) -> None:
        self.optimizer.steps = taken

    @property
    def placement(self) -> str:
        return self.optimizer.placement

    @property
    def placement_reason(self) -> str:
        return self.optimizer.placement_reason

    @property
    def queries(self) -> int:
        return self.optimizer.queries

    @queries.setter
    def queries(self, queries: int) -> None:
        self.optimizer.queries = queries

    def train_step(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `Addax.train_step`; steps the engine's schedule, counters and monitor too."""
        metrics = self.optimizer.train_step(*args, **kwargs)
        engine = self._engine
        engine.global_steps += 1
        engine.global_samples += engine.train_batch_size()
        if metrics["skipped"]:
            engine.skipped_steps += 1
        elif engine.lr_scheduler is not None:
            engine.lr_scheduler.step()
        if engine.monitor.enabled and engine.global_rank == 0:
            scalars = {"loss_fo": metrics["loss_fo"], "lr": metrics["lr"]}
            scalars.update({f"g0_{query}": g0 for query, g0 in enumerate(metrics["g0"])})
            engine.monitor.write_events(
                [(f"Train/Addax/{k}", v, engine.global_samples) for k, v in scalars.items() if v is not None]
            )
        return metrics

    def probe(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """See `Addax.probe`; then `engine.backward(loss)` and `engine.step()`."""
        return self.optimizer.probe(*args, **kwargs)

    def run_guests(self, *args: Any, **kwargs: Any) -> list[Any]:
        """See `Addax.run_guests`."""
        return self.optimizer.run_guests(*args, **kwargs)

    def replay(self, *args: Any, **kwargs: Any) -> None:
        """See `Addax.replay`."""
        self.optimizer.replay(*args, **kwargs)

    @property
    def gradients_left_out(self) -> int:
        return self.optimizer.gradients_left_out

    def step(self, closure: None = None) -> None:
        """Called by `engine.step()`."""
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Gradients are freed as they are applied; this clears any that a user made."""
        self.optimizer.zero_grad(set_to_none)

    # DeepSpeed names the weights of its checkpoints by these groups.

    @property
    def fp16_groups(self) -> list[list[Any]]:
        """All trainable parameters, in one group."""
        return [[parameter for parameter in self._engine.module.parameters() if parameter.requires_grad]]

    bit16_groups = fp16_groups

    def state_dict(self) -> dict[str, Any]:
        """See `Addax.state_dict`; from ZeRO-1 on with this rank's part of the weights, as DeepSpeed saves it."""
        state, stage = self.optimizer.state_dict(), int(self._engine.zero_optimization_stage())
        if stage == 0:
            return state
        group = self.dp_process_group
        ranks = dist.get_rank(group), dist.get_world_size(group)
        return {OPTIMIZER_STATE_DICT: state, **flat_groups(self.fp16_groups[0], stage, *ranks)}

    def load_state_dict(
        self,
        state_dict: dict[str, Any] | None = None,
        state_dict_list: list[dict[str, Any]] | None = None,
        load_optimizer_states: bool = True,
        **_: Any,
    ) -> None:
        """See `Addax.load_state_dict`; DeepSpeed's `load_checkpoint` gives a list with every rank's part."""
        if state_dict_list is not None:
            state_dict = state_dict_list[dist.get_rank(self.dp_process_group)]
        assert state_dict is not None, "nothing to load"
        if OPTIMIZER_STATE_DICT not in state_dict:
            self.optimizer.load_state_dict(state_dict)
            return
        if state_dict[ZERO_STAGE] == 3:
            load_flat_groups(self.fp16_groups[0], state_dict)
        if load_optimizer_states:
            self.optimizer.load_state_dict(state_dict[OPTIMIZER_STATE_DICT])
        self.engine.after_step(True)

    def _restore_from_bit16_weights(self) -> None:
        """DeepSpeed calls it when it has loaded a module alone: there is no copy of the weights to refresh."""

    def checkpoint_event_prologue(self) -> None:
        """DeepSpeed calls it before it saves: drop gathered copies."""
        self.engine.after_step(True)

    def empty_partition_cache(self) -> None:
        """DeepSpeed calls it before it reads the weights: drop gathered copies."""
        self.engine.after_step(True)
