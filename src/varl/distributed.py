"""Many processes as one: who draws and trains which rows, and what the processes tell each other.

``torchrun`` starts the processes; each holds a ``Distributed``, and with one process every method of it is trivial. The
rows of an update (its trained sequences, each with its continuations) are dealt in equal, contiguous shares; every draw
is seeded by its row, so what is drawn depends on nothing of this. Scores are gathered, every process computes the
returns and advantages of all groups, learns from its own rows with the divisor of all, and gradients are summed.

- ``ddp``: every process holds the model; gradients are summed once an optimizer step, in flat buckets. This is the sum
  that DistributedDataParallel makes, without its overlap with the last backward pass; a policy is called through
  ``hidden`` and ``logits``, not through one forward, which the wrapper could not follow.
- ``fsdp2``: blocks, and the rest together, are sharded by ``fully_shard``; ``hidden`` and ``logits`` are its forward.

What travels is tensors, and plain values as JSON: nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from varl.config import ParallelConfig
from varl.ending import end_with_launcher, guarded
from varl.models.blocks import blocks_of
from varl.policy import Policy
from varl.rewards.base import RewardOutput

__all__ = ["Distributed", "Stage"]

Stage = Callable[[str], AbstractContextManager[Any]]
"""Times what is done within it, by name."""

BUCKET = 32 * 2**20
"""Numbers that one all-reduce sums: large enough to use the network, small beside a model."""
ENTRIES = ("hidden", "logits", "prefill")
"""The differentiable methods of a policy: where its parameters are read in training."""
FIRST = "_first_of_all_units"
ENVIRONMENT = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
"""What ``torchrun`` sets, and what holds without it."""
LAUNCHER_S = 15.0
"""How long ``torchrun``, which keeps the common store, may take to answer: it is there before its processes."""


class Distributed:
    """This process among all.

    Args:
        config: how the processes share the work.
        device: of the model; a GPU without a number becomes the one of ``local_rank``.
        rank, size, local_rank: number of this process, of all, and its number on its machine; ``here`` reads them from
            what ``torchrun`` sets.

    Raises:
        RuntimeError: if the processes cannot find each other within ``config.timeout``.
    """

    def __init__(
        self,
        config: ParallelConfig | None = None,
        device: torch.device | None = None,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
    ) -> None:
        self.config, self.device = config or ParallelConfig(), device or torch.device("cpu")
        self.rank, self.size = rank, size
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local_rank if self.device.index is None else self.device.index)
            torch.cuda.set_device(self.device)
        self._store: dist.Store | None = None
        self._kept: list[FSDPModule] = []
        if self.size > 1 or self.sharded:
            self._join()

    @classmethod
    def here(cls, config: ParallelConfig, device: torch.device) -> Distributed:
        """This process, as ``torchrun`` started it, or alone."""
        return cls(config, device, *(int(os.environ.get(name, default)) for name, default in ENVIRONMENT.items()))

    def _join(self) -> None:
        if dist.is_initialized():
            return
        timeout = timedelta(seconds=self.config.timeout)
        if self.size == 1:
            store: dist.Store = dist.HashStore()
        else:
            end_with_launcher()
            launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            first = min(timeout, timedelta(seconds=LAUNCHER_S)) if launched else timeout
            store = next(iter(dist.rendezvous("env://", self.rank, self.size, timeout=first)))[0]
            store.set_timeout(timeout)
            # torchrun --max-restarts starts processes again with the store of those that failed.
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self._store = dist.PrefixStore("varl", store)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether the model's parameters are spread over the processes."""
        return self.config.mode == "fsdp2"

    # Rows and values.

    def share(self, rows: int) -> range:
        """The rows of this process: as many as any other has, in order.

        Raises:
            ValueError: if the processes cannot share them equally.
        """
        if rows % self.size:
            raise ValueError(
                f"an update's {rows} sequences (method.prompts x method.group) cannot be shared equally by {self.size} "
                f"processes; make them a multiple of {self.size}"
            )
        each = rows // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def portion(self, items: int) -> range:
        """The items of this process where the shares need not be equal: nothing may be shared while they are done."""
        return range(items * self.rank // self.size, items * (self.rank + 1) // self.size)

    def gather(self, rows: Tensor, everywhere: bool = True) -> Tensor:
        """The rows of all processes, in order, on the CPU; their numbers may differ.

        Args:
            everywhere: False sends them to the main process only; the others get none.
        """
        rows = rows.detach().cpu().contiguous()
        if self.size == 1:
            return rows
        counts = [int(count) for count in self.gather_values(len(rows))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        # As bytes: gloo does not send every type.
        sent = padded.flatten().view(torch.uint8)
        parts = [torch.empty_like(sent) for _ in counts] if everywhere or self.main else None
        if everywhere:
            dist.all_gather(parts, sent)
        else:
            dist.gather(sent, parts)
        if parts is None:
            return rows[:0]
        whole = [part.view(rows.dtype).view(padded.shape) for part in parts]
        return torch.cat([part[:count] for part, count in zip(whole, counts, strict=True)])

    def gather_values(self, value: Any) -> list[Any]:
        """Everyone's value, by rank; values are what JSON holds, and NaN."""
        if self.size == 1:
            return [value]
        words = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(words)]))
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(words)] = words
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return [json.loads(bytes(part[: int(n)].numpy())) for part, n in zip(parts, lengths, strict=True)]

    def alike(self, output: RewardOutput) -> RewardOutput:
        """The output with everything that the output of any process holds.

        What a reward gives may differ between processes, most of all where it failed on one of them. What comes after
        must not: each process would wait in another place for the others.
        """
        own = [list(output.parts), output.regions is not None, output.texts is not None]
        for names, regions, texts in self.gather_values(own):
            none = torch.zeros(0)
            parts = dict.fromkeys(names, none)
            output = output.holding(
                RewardOutput(none, none.bool(), [] if regions else None, parts, [] if texts else None)
            )
        return output

    def gather_scores(self, output: RewardOutput) -> RewardOutput:
        """Everyone's scores and their parts, in order, without regions and texts; what a process lacks is NaN."""
        own = {name: values.tolist() for name, values in {"": output.score, **output.parts}.items()}
        of_all = self.gather_values({"failed": output.failed.tolist(), "parts": own})
        failed = [flag for one in of_all for flag in one["failed"]]
        names = dict.fromkeys(name for one in of_all for name in one["parts"])
        parts = {
            name: torch.tensor([v for one in of_all for v in one["parts"].get(name, [math.nan] * len(one["failed"]))])
            for name in names
        }
        return RewardOutput(parts.pop(""), torch.tensor(failed), parts=parts)

    # The model.

    @property
    def loads_on(self) -> torch.device:
        """Where a policy is built: what will be sharded comes to the device block by block."""
        return torch.device("cpu") if self.sharded else self.device

    def place(self, policy: Policy, precision: str) -> None:
        """Make a policy the same in all processes; with fsdp2, shard what is trained and move the rest to the device.

        Args:
            precision: ``bfloat16`` if it computes under autocast.
        """
        if self.size > 1:
            # What was read from files is the same already; adapters, and random weights, are not.
            for parameter in policy.trainable.parameters():
                dist.broadcast(parameter.detach(), 0)
        if self.sharded:
            self._shard(policy, torch.bfloat16 if precision == self.config.param_dtype == "bfloat16" else None)
            for part in cast(nn.Module, policy).children():
                if part is not policy.trainable:
                    part.to(self.device)

    def _shard(self, policy: Policy, param_dtype: torch.dtype | None) -> None:
        module, own = cast(nn.Module, policy), set(policy.trainable.parameters())
        mesh = init_device_mesh(self.device.type, (self.size,))
        offload = CPUOffloadPolicy(self.device.type == "cuda") if self.config.cpu_offload else OffloadPolicy()
        # The stream of features stays as autocast leaves it; only what is gathered, the blocks' weights, is rounded.
        halved = MixedPrecisionPolicy(param_dtype, torch.float32 if param_dtype else None, cast_forward_inputs=False)
        blocks = blocks_of(policy.trainable)
        for block in blocks:
            for norm in [part for part in block.modules() if param_dtype and type(part) is nn.LayerNorm]:
                # torch's own takes no rounded weights beside fp32 features.
                fully_shard(norm, mesh=mesh, offload_policy=offload)
            fully_shard(block, mesh=mesh, mp_policy=halved, offload_policy=offload)
        others = {parameter for parameter in module.parameters() if parameter not in own}
        fully_shard(module, mesh=mesh, offload_policy=offload, ignored_params=others)
        for name in ENTRIES:
            register_fsdp_forward_method(module, name)
        for unit in _units(policy):
            # Every process divides by the rows of all: gradients add up.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        # Until ``let_go``, two units stay whole: the root, which each chunk of the head would gather
        # again in the backward pass, and the last block, which a shared prefix enters by its keys and values alone,
        # where nothing would tell the unit to gather its weights.
        root = cast(FSDPModule, module)
        self._kept += [root, cast(FSDPModule, blocks[-1])]
        for unit in self._kept:
            unit.set_reshard_after_backward(False, recurse=False)
        # The first unit to run becomes the root of all; drawing would begin with a block.
        setattr(module, FIRST, lambda: None)
        register_fsdp_forward_method(module, FIRST)
        getattr(module, FIRST)()
        root.reshard()
        warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # nobody writes to features in place

    @contextmanager
    def gathered(self, *policies: Policy, stage: Stage | None = None) -> Iterator[None]:
        """Within it the policies' parameters are whole: gathered once, however often they are read; no gradients.

        Every process must enter and leave; in between none waits for another.

        Args:
            stage: times the gathering, as ``gather``.
        """
        units = [unit for policy in policies for unit in _units(policy)] if self.sharded else []
        if units:
            with stage("gather") if stage else nullcontext():
                for unit in units:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(unit not in policies, recurse=False)
                unit.reshard()

    def let_go(self) -> None:
        """Shard the units again that stay whole between backward passes."""
        for unit in self._kept:
            unit.reshard()

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes; sharded ones were summed in the backward pass."""
        self.let_go()
        if self.size == 1 or self.sharded:
            return
        bucket: list[Tensor] = []
        for gradient in [p.grad for p in parameters if p.grad is not None]:
            if bucket and (sum(g.numel() for g in bucket) >= BUCKET or gradient.dtype != bucket[0].dtype):
                _sum(bucket)
                bucket = []
            bucket.append(gradient)
        if bucket:
            _sum(bucket)

    @staticmethod
    def clip(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
        """Scale the gradient of all parameters down to a norm of ``largest``; returns the norm that it had, []."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self, state: Any) -> Any:
        """A nested state with whole tensors, on the CPU where they were sharded; every process must ask for it.

        The main process gets it; the others get None in place of sharded tensors.
        """
        if isinstance(state, dict):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self.whole(value) for value in state)
        if not isinstance(state, DTensor):
            return state
        full = state.full_tensor()
        return full.cpu() if self.main else None

    @staticmethod
    def spread(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors sharded as others of their names are; nothing is sent, for every process has the whole."""

        def one(tensor: Tensor, like: Tensor | None) -> Tensor:
            if not isinstance(like, DTensor) or tensor.shape != like.shape:
                return tensor
            tensor = tensor.to(like.device, like.dtype)
            return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

        return {name: one(tensor, like.get(name)) for name, tensor in state.items()}

    def export(self, policy: Policy, write: Callable[[], object]) -> None:
        """Let the main process write a policy's whole tensors; every process must take part.

        Args:
            write: asks once for the state dict of what is trained, or of a module that it is part of.
        """

        def whole(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
            for name in [name for name in state if name.startswith(prefix)]:
                full = self.whole(state[name])
                state[name] = state[name] if full is None else full

        hook = policy.trainable.register_state_dict_post_hook(whole)
        try:
            if self.main:
                write()
            elif self.sharded:
                policy.trainable.state_dict()
        finally:
            hook.remove()

    def guarded(self) -> AbstractContextManager[None]:
        """Around a run: when a process fails, all end. The first one to fail says why, the others are silent."""
        return guarded(self._store, self.rank, self.size)


def _units(policy: Policy) -> list[FSDPModule]:
    return [part for part in cast(nn.Module, policy).modules() if isinstance(part, FSDPModule)]


def _sum(gradients: list[Tensor]) -> None:
    """Add up gradients of one type over the processes, in place."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
