"""DeepSpeed behind one small class; the only file that imports it."""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.train.meters import MeterConfig
from fastmllm.train.partition import Piece, adopt_masters, partition, share_of

DTYPES = ("auto", "float32", "bfloat16")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HYPERPARAMETERS = ("weight_decay", "betas", "eps")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Choose how a step is spread over memory and ranks; nothing here changes what is learned, but `dtype`.

    Args:
        zero_stage: what the ranks share out: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters.
        dtype: parameters in the forward pass, "float32" or "bfloat16" (fp32 master copy). "float32" casts
            nothing: a frozen part that was loaded in bfloat16 stays so. "auto" is the one that a recipe's `model.dtype`
            decides on (`fastmllm.run.engine_for`); by itself it casts nothing either.
        accumulation: micro-batches in a step, on each rank.
        bucket_elements: upper bound on a reduction bucket; the trainable count is used when it is smaller.
        offload: "none", or "cpu" to keep the optimizer state in host memory (stages 2 and 3).
        timeout_s: seconds after which a collective that a rank does not join is an error, on every rank.
        heartbeat_s: seconds after which a rank whose process does not answer ends the job (`watchdog`), however long a
            step takes; 0 = only `timeout_s` counts.
        workers: processes of each rank that read the shards of a stage with sources; 0 = none.
        feature_cache_gib: disk for a frozen encoder's features of the shards' images, in the asset cache; 0 = none.
        meters: where the figures of a step go, and what MFU is a share of.
    """

    zero_stage: int = 2
    dtype: str = "auto"
    accumulation: int = 1
    bucket_elements: int = 50_000_000
    offload: str = "none"
    timeout_s: float = 600.0
    heartbeat_s: float = 15.0
    workers: int = 0
    feature_cache_gib: float = 0.0
    meters: MeterConfig = field(default_factory=MeterConfig)

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine: zero_stage is {self.zero_stage}; choose 0, 1, 2 or 3")
        if self.dtype not in DTYPES:
            raise ValueError(f"engine: dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.dtype == "bfloat16" and self.zero_stage == 0:
            raise ValueError(
                "engine: bfloat16 with zero_stage 0 is refused: DeepSpeed's stage-0 bf16 optimizer takes a real AdamW "
                "step while it initializes, so Adam's counter is one ahead and losses drift; use zero_stage 1 or more"
            )
        if self.offload not in ("none", "cpu"):
            raise ValueError(f"engine: offload is {self.offload!r}; choose none or cpu")
        if self.offload == "cpu" and self.zero_stage < 2:
            raise ValueError(f"engine: offload=cpu needs zero_stage 2 or 3, not {self.zero_stage}")
        if self.accumulation < 1 or self.bucket_elements < 1 or self.timeout_s <= 0:
            raise ValueError("engine: accumulation, bucket_elements and timeout_s must be positive")
        if self.heartbeat_s < 0:
            raise ValueError(f"engine: heartbeat_s is {self.heartbeat_s}; give seconds, or 0 for no heartbeat")
        if self.workers < 0 or self.feature_cache_gib < 0:
            raise ValueError(
                f"engine: workers is {self.workers}, feature_cache_gib {self.feature_cache_gib}; neither is below 0"
            )

    def to_dict(self, *, clip: float, num_trainable: int) -> dict[str, Any]:
        """Return DeepSpeed's configuration.

        Args:
            clip: largest global gradient norm; 0 does not clip.
            num_trainable: elements that learn; bounds the buckets, which DeepSpeed allocates whole.
        """
        bucket = -(-min(self.bucket_elements, num_trainable) // 64) * 64  # stages 1 and 2 align on it
        zero: dict[str, Any] = {"stage": self.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self.zero_stage == 3:
            zero |= {"stage3_prefetch_bucket_size": bucket}
        if self.offload == "cpu":
            zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # batches are packed: DeepSpeed only counts with it
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": 0.0 if self.zero_stage == 0 else float(clip),  # stage 0's fails on scalars
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # else offload compiles DeepSpeedCPUAdam
            "steps_per_print": None,
            "wall_clock_breakdown": False,
        }
        if self.dtype == "bfloat16":
            config["bf16"] = {"enabled": True}
        return config


def _deepspeed() -> Any:
    """Import DeepSpeed, quietly, for the device at hand and without its compile-on-import traps."""
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            f"training needs DeepSpeed, and importing it failed ({error}); install torch first, then: "
            "pip install deepspeed==0.19.8"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Stage 3 calls collectives by their old names, several times a step.
    warnings.filterwarnings("ignore", message=r".torch\.distributed\.\w+. is deprecated", category=FutureWarning)
    if not has_cuda:
        # Built with the C++ compiler at the first init (a minute or more), and used for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def launched_world_size() -> int:
    """Return the number of ranks that the launcher's environment names; 1 without a launcher.

    Raises:
        RuntimeError: the environment asks for several ranks but lacks what they need to meet.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if world_size > 1 and missing:
        raise RuntimeError(
            f"WORLD_SIZE is {world_size} but {', '.join(missing)} are not set; start the ranks with torchrun "
            f"(torchrun --nproc_per_node {world_size} ...) or unset WORLD_SIZE"
        )
    return world_size


def init_ranks(timeout_s: float = 600.0) -> tuple[int, int, torch.device]:
    """Join the other ranks, or stand alone when no launcher started this process; later calls change nothing.

    Args:
        timeout_s: seconds, for every group that is made afterwards as well.

    Returns:
        rank, world size, device of this rank.
    """
    world_size = launched_world_size()
    deepspeed = _deepspeed()
    torch_backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    timeout = timedelta(seconds=timeout_s)

    def new_group(self: Any, ranks: Sequence[int]) -> Any:
        # DeepSpeed drops the timeout here, and stages 0 to 2 then wait for torch's half hour.
        return torch.distributed.new_group(list(ranks), timeout=timeout)

    torch_backend.new_group = new_group
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not torch.distributed.is_initialized():
        if world_size == 1:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists, even alone
            # A store in memory: no port to find, none to lose to another process.
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            torch.distributed.init_process_group(backend, timeout=timeout)
        atexit.register(_leave_ranks)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


@contextmanager
def _placed_by(place: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Let DeepSpeed take parameters from `place`: one at a time where it shares them out, and all without broadcast.

    It would move the whole model to the device first, and views parameters as bytes, which scalars (gates) refuse.
    """
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    init = importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init

    def share_out(self: Any, params: Iterable[nn.Parameter]) -> None:
        for param in params:
            place(param)
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

    originals = engine._broadcast_model, init._convert_to_zero_parameters
    engine._broadcast_model, init._convert_to_zero_parameters = lambda self: None, share_out
    try:
        yield
    finally:
        engine._broadcast_model, init._convert_to_zero_parameters = originals


def _leave_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Engine:
    """Hold one model, its optimizer and its ranks; made by `create_engine`."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        config: EngineConfig,
        clip: float,
    ) -> None:
        self.model, self.config = model, config
        self.rank, self.world_size, self.device = init_ranks(config.timeout_s)
        # Counts and messages travel between hosts, so that reading them never waits for the device.
        self._hosts = None
        if self.world_size > 1:
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout_s))
        deepspeed = self._deepspeed = _deepspeed()
        self._param_keys = [(p, set(vars(p))) for p in model.parameters()]
        self._module_keys = [(m, set(vars(m))) for m in model.modules()]
        self._learning = [param for group in groups for param in group["params"]]
        self._clip, self._norm = clip, torch.zeros(())
        num_trainable = sum(param.numel() for param in self._learning)
        self._hyperparameters = [
            {"lr": group["lr"]} | {key: group[key] for key in HYPERPARAMETERS if key in group} for group in groups
        ]
        optimizer_groups = [
            {"params": group["params"], **values} for group, values in zip(groups, self._hyperparameters, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(optimizer_groups, fused=True)
        self._homes = [param.device for param in model.parameters()]
        self._linear = nn.functional.linear
        self._stack = len(self._forward_stack())
        settings = config.to_dict(clip=clip, num_trainable=num_trainable)
        with warnings.catch_warnings(), _placed_by(self._place):
            warnings.simplefilter("ignore")
            self._same_start(settings)
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=settings, dist_init_required=False
            )
        self._deep = len(self._forward_stack())

    def _same_start(self, settings: dict[str, Any]) -> None:
        """Give every rank rank 0's parameters; at stage 3 a rank's device has its shares and one whole parameter."""
        if self.config.zero_stage == 3:
            self._deepspeed.zero.Init(module=self.model, config_dict_or_path=settings)
        else:
            for param in self.model.parameters():
                self._place(param)
        self.model.to(self.device)  # the buffers

    def _place(self, param: nn.Parameter) -> None:
        """Put rank 0's value of a parameter on this rank's device, in the engine's dtype."""
        bfloat16 = self.config.dtype == "bfloat16" and param.is_floating_point()
        value = param.detach().to(self.device, torch.bfloat16 if bfloat16 else param.dtype).contiguous()
        if self.world_size > 1:
            torch.distributed.broadcast(value, 0)
        param.data = value

    def loss_sum(self, batch: Any, *compared: Any) -> Tensor:
        """Run the model on a batch (moved to this rank's device), and on what it found when it looked ahead.

        Returns:
            scalar, fp32: the loss summed over the batch's targets.
        """
        loss = self._engine(_to_device(batch, self.device), *compared)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"train: model(batch) gave {what}; it must give the loss summed over targets, a scalar")
        if not loss.requires_grad:
            raise RuntimeError(
                "train: the loss depends on no trainable parameter; run the trainable modules on every batch "
                "(on a batch without images: on one zero image, and add 0 * output.sum())"
            )
        return loss

    def embed(self, batch: Any) -> Any:
        """Return what the model tells of a batch for `compare`, without a graph."""
        with torch.no_grad():
            return self._engine(_to_device(batch, self.device), embed=True)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; gradients are averaged over ranks, summed over micro-batches."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """End a micro-batch; the last of a step updates the parameters."""
        if self.config.zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            self._norm = nn.utils.clip_grad_norm_(self._learning, self._clip or math.inf)
        self._engine.step()
        del self._forward_stack()[self._deep :]  # a recomputed layer ends early, and its hooks leave it there
        if self.config.zero_stage > 0:
            self._norm = self._engine.get_global_grad_norm()

    def set_hyperparameters(self, factor: float) -> None:
        """Set every group's hyperparameters to its own values, its learning rate times a factor.

        They are the trainer's, never a checkpoint's: some DeepSpeed loaders give every group the first one's.
        """
        for group, values in zip(self.optimizer.param_groups, self._hyperparameters, strict=True):
            group.update(values | {"lr": values["lr"] * factor})

    def read(self, loss: Tensor) -> tuple[float, float]:
        """Read the step's loss, summed over ranks, and the gradient norm: the one wait for the device.

        Returns:
            loss sum; global gradient norm before clipping (infinite when a gradient is NaN).
        """
        loss = loss.detach().float().reshape(1)
        if self.world_size > 1:
            torch.distributed.all_reduce(loss)
        norm = torch.as_tensor(self._norm, dtype=torch.float32, device=loss.device)
        first, second = torch.cat([loss, norm.reshape(1)]).tolist()
        return first, second if second >= 0 else math.inf  # DeepSpeed writes -1 for a NaN

    def sum_over_ranks(self, *counts: int) -> list[int]:
        """Sum host integers over ranks."""
        if self.world_size == 1:
            return list(counts)
        total = torch.tensor(counts, dtype=torch.int64)
        torch.distributed.all_reduce(total, group=self._hosts)
        return [int(value) for value in total]

    def counts_of_ranks(self, *counts: int) -> list[list[int]]:
        """Return every rank's host integers, rank by rank."""
        if self.world_size == 1:
            return [list(counts)]
        mine = torch.tensor(counts, dtype=torch.int64)
        ranks = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(ranks, mine, group=self._hosts)
        return [rank.tolist() for rank in ranks]

    def gather(self, value: Any) -> list[Any]:
        """Give every rank the list of every rank's value (a small picklable object)."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self._hosts)
        return values

    def store(self) -> Any:
        """Return a connection of its own to the store where the ranks met."""
        met: Any = torch.distributed.distributed_c10d._get_default_store()
        return met.clone()

    def pieces(self, *, own: bool = False) -> list[Piece]:
        """List what this rank updates: views of weights and optimizer state, by parameter name.

        Args:
            own: a share of what all ranks hold (stage 0), so that the ranks' pieces together have everything once.
        """
        found = list(partition(self.model, self.config.zero_stage, self._engine.optimizer, self.optimizer))
        if own and self.config.zero_stage == 0:
            return [part for piece in found if (part := share_of(piece, self.rank, self.world_size))]
        return found

    def adopt_pieces(self) -> None:
        """Compute with what was written into `pieces` from here on; called by all ranks."""
        adopt_masters(self.config.zero_stage, self._engine.optimizer)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let the model be called between steps as if there were no engine; entered and left by all ranks together.

        At stage 3 its parameters are gathered, and the hooks that share each out again behind its module are away.
        """
        if self.config.zero_stage < 3:
            yield
            return
        offload = self._engine.optimizer.parameter_offload
        with self._deepspeed.zero.GatheredParameters([param for param, _ in self._param_keys]):
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                del self._forward_stack()[self._stack :]  # the hooks put the model there again
                offload.setup_zero_stage3_hooks()

    def close(self) -> None:
        """Give the model back whole: full parameters, nothing of DeepSpeed on them.

        What stage 3 had shared out goes back to the devices where it came from: the whole may fit into the host only.
        """
        params = [param for param, _ in self._param_keys]
        values = []
        for param, home in zip(params, self._homes, strict=True):  # one at a time: all gathered were the model twice
            if self.config.zero_stage == 3:
                with self._deepspeed.zero.GatheredParameters([param]):
                    values.append(param.detach().to(home, copy=True))
            else:  # trainable parameters are views of one flat buffer
                values.append(param.detach().clone() if param.requires_grad else param.detach())
        self._engine.destroy()
        self._restore_process()
        for (param, keys), value in zip(self._param_keys, values, strict=True):
            param.grad = None
            param.data = value
            for key in set(vars(param)) - keys:
                delattr(param, key)
        for module, keys in self._module_keys:
            module._parameters = dict(module._parameters)
            for key in set(vars(module)) - keys:
                delattr(module, key)
        del self._engine

    def abandon(self) -> None:
        """Let go after an error: `close` on one rank; among several nothing is gathered, as the others may not come."""
        with suppress(Exception):  # the error that led here is the one to show
            if self.world_size == 1:
                if self.config.zero_stage == 3:  # part of the model may be gathered
                    self._engine.optimizer._partition_all_parameters()
                self.close()
            else:
                self._engine.destroy()
        self._restore_process()

    def _restore_process(self) -> None:
        """Undo what stage 3 does to the whole process: it replaces F.linear, and never forgets a model."""
        nn.functional.linear = self._linear
        del self._forward_stack()[self._stack :]

    @staticmethod
    def _forward_stack() -> list[Any]:
        stack: list[Any] = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
        return stack


def create_engine(
    model: nn.Module, groups: Sequence[Mapping[str, Any]], config: EngineConfig, clip: float = 0.0
) -> Engine:
    """Put a model whose `model(batch)` is a loss sum behind DeepSpeed.

    Args:
        model: moved to this rank's device, at ZeRO-3 in shares; cast when config.dtype is bfloat16 (buffers keep their
            dtype).
        groups: parameter groups of `rules.apply_rules` (params, lr, weight_decay, betas).
        config: how to spread the step.
        clip: largest global gradient norm; 0 does not clip.

    Returns:
        the engine; `close()` it to use the model elsewhere.

    Raises:
        ImportError: DeepSpeed is missing; says what to install.
    """
    if not groups:
        raise ValueError("train: no parameter learns; give the stage a rule, such as trainable={'connector.*': 1e-3}")
    return Engine(model, groups, config, clip)


def _to_device(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu" or not dataclasses.is_dataclass(batch) or isinstance(batch, type):
        return batch
    moved = {
        field.name: value.to(device, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)
