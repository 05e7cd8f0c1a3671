"""The engine's own programs, compiled ahead of time for devices that need not be there (`diptych.plan`).

The functions are those that the engine calls (training, scoring, switch, decode), with models and batches that are only
shapes (`abstract`). For a TPU the compiler is libtpu's, which runs on any Linux machine; `cpu:N` compiles for N virtual
devices of this one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diptych.algorithms.losses import pairwise_reward_loss, ppo_policy_loss, ppo_value_loss, sft_loss
from diptych.engine import Loss
from diptych.families.decoder import DecoderConfig
from diptych.families.family import model_slots
from diptych.plan.hardware import Topology
from diptych.plan.programs import Collective, Phase, Program
from diptych.plan.workload import Held, Rollouts, Supervised, Workload, filled
from diptych_jax import decode, flops, hlo, kernels, scoring, switch, training, weights
from diptych_jax.abstract import Shapes
from diptych_jax.mesh import replicated

Report = Callable[[str], None]


class Task(NamedTuple):
    """A program to compile. trips: of loops whose length is not in the program."""

    name: str
    phase: Phase
    held: Held
    calls: int
    mesh: Mesh
    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    batch: Any = ()
    trips: float = 1.0
    counted: bool = True  # False: there are no products in it


def plan_programs(workload: Workload, topology: Topology, *, report: Report) -> list[Program]:
    """Compile every program of the workload; `report` is told of each. A program that does not fit the device's memory
    comes back with the compiler's words in `refused`."""
    planner = _Planner(workload, topology, report)
    return planner.programs()


class _Planner:
    def __init__(self, workload: Workload, topology: Topology, report: Report):
        self.workload, self.topology, self.report = workload, topology, report
        # As the engine's own `create` does.
        if workload.compute == "float64":
            jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        self.shapes = Shapes(workload, topology)
        self._done: dict[Any, Program] = {}

    def programs(self) -> list[Program]:
        tasks = [task for step in self.workload.supervised for task in self.supervised(step)]
        if self.workload.rollouts is not None:
            tasks += self.rollouts(self.workload.rollouts)
        found = []
        for index, task in enumerate(tasks):
            started = time.perf_counter()
            program = self.compiled(task)
            seconds = time.perf_counter() - started
            words = "does not fit" if program.refused else f"{seconds:.0f} s"
            self.report(f"compiled {index + 1}/{len(tasks)} {task.phase}: {task.name} ({words})")
            found.append(program)
        return found

    def kernel(self, held: Held) -> Any:
        platform = self.topology.chip.kind
        return kernels.choose(
            self.workload.settings.attention, platform=platform, dtype=self.workload.compute, config=held.config
        ).name

    # Programs ------------------------------------------------------------------------------------------------------

    def supervised(self, step: Supervised) -> list[Task]:
        if step.stage == "sft":
            loss = Loss(function=sft_loss, reads="logprobs", balance=step.model.balance)
            arrays, denominators = {"mask": step.columns}, ("num_tokens",)
        else:
            loss = Loss(
                function=pairwise_reward_loss,
                reads="scores",
                options=(("center_coef", 0.01),),
                balance=step.model.balance,
            )
            arrays, denominators = {"end_mask": step.columns}, ("num_pairs",)
        phase: Phase = "sft" if step.stage == "sft" else "reward"
        return self.update(
            step.model, loss, arrays, denominators, phase=phase, rows=step.rows, micro=step.micro, columns=step.columns,
            first=1, calls=1,
        )  # fmt: skip

    def update(
        self,
        held: Held,
        loss: Loss,
        arrays: dict[str, int],
        denominators: tuple[str, ...],
        *,
        phase: Phase,
        rows: int,
        micro: int,
        columns: int,
        first: int,
        calls: int,
    ) -> list[Task]:
        """The gradients of a step and the optimizer's part. arrays: the loss's own, and how many columns each has."""
        mesh, floats = self.shapes.mesh(held.mesh), self.workload.masters
        trained, frozen = weights.split(self.shapes.model(held, mesh, floats))
        many, micro = rows // micro, filled(micro, held.mesh)
        batch = {
            name: self.shapes.rows(mesh, "int32" if name == "columns" else floats, many, micro, width, axis=1)
            for name, width in arrays.items()
        }
        tokens, attention, positions = (
            self.shapes.rows(mesh, dtype, many, micro, columns, axis=1) for dtype in ("int32", "bool", "int32")
        )
        inputs = training.Inputs(
            tokens_MBT=tokens,
            attention_MBT=attention,
            positions_MBT=positions,
            arrays=batch,
            denominators={name: self.shapes.number(mesh) for name in denominators},
            temperature=self.shapes.number(mesh),
            num_routed=self.shapes.number(mesh),
        )  # pyright: ignore[reportArgumentType]
        program = training.Program(
            loss=loss, first=first, chunk=self.workload.chunk, remat=self.workload.settings.remat,
            compute=self.workload.compute, kernel=self.kernel(held),
        )  # fmt: skip
        common = {"phase": phase, "held": held, "calls": calls, "mesh": mesh}
        return [
            Task(
                **common, name=f"{held.name} gradients", function=training.gradients, static={"program": program},
                arguments=(trained, frozen, inputs), batch=inputs,
            ),
            Task(
                **common, name=f"{held.name} optimizer", function=training.apply, static={"spec": held.optimizer},
                arguments=(self.shapes.state(held, mesh), trained, self.shapes.number(mesh)), batch=trained,
            ),
        ]  # fmt: skip

    def rollouts(self, rollouts: Rollouts) -> list[Task]:
        return [*self.rollout(rollouts), *self.scoring(rollouts), *self.updates(rollouts)]

    def scoring(self, rollouts: Rollouts) -> list[Task]:
        tasks = []
        calls = -(-rollouts.rows // rollouts.micro)
        for held in rollouts.models:
            mesh = self.shapes.mesh(held.mesh)
            model = self.shapes.model(held, mesh, self.workload.stored(held))
            batch = self.shapes.tokens(mesh, filled(rollouts.micro, held.mesh), rollouts.columns)
            static: dict[str, Any] = {"compute": self.workload.compute, "kernel": self.kernel(held)}
            arguments: tuple[Any, ...] = (model, *batch)
            if held.head == "lm":
                arguments += (self.shapes.number(mesh),)
                static |= {"first": rollouts.prompt, "chunk": self.workload.chunk}
            function, what = (
                (scoring.logprobs, "log-probabilities") if held.head == "lm" else (scoring.scores, "scores")
            )
            twice = 2 if held.role == "policy" and rollouts.reference is None else 1
            tasks.append(
                Task(f"{held.name} {what}", "scoring", held, calls * twice, mesh, function, arguments, static, batch)
            )
        return tasks

    def updates(self, rollouts: Rollouts) -> list[Task]:
        policy, critic, columns = rollouts.policy, rollouts.critic, rollouts.columns
        sizes: dict[str, Any] = {
            "phase": "update", "rows": rollouts.mini_rows, "micro": rollouts.micro, "calls": rollouts.steps,
        }  # fmt: skip
        policy_loss = Loss(
            function=ppo_policy_loss,
            reads="logprobs",
            options=(("clip_range", 0.2),),
            entropy=True,
            balance=policy.balance,
        )
        value_loss = Loss(
            function=ppo_value_loss, reads="scores", options=(("value_clip_range", 0.2), ("value_coef", 0.1)),
            balance=critic.balance,
        )  # fmt: skip
        return [
            *self.update(
                policy, policy_loss, dict.fromkeys(("old_logprobs", "advantages", "mask"), columns), ("num_tokens",),
                columns=columns, first=rollouts.prompt, **sizes,
            ),
            *self.update(
                critic, value_loss, dict.fromkeys(("columns", "old_values", "returns", "mask"), columns),
                ("num_tokens",), columns=columns, first=1, **sizes,
            ),
        ]  # fmt: skip

    def rollout(self, rollouts: Rollouts) -> list[Task]:
        """The switch, layer by layer, and the decode program."""
        held, compute = rollouts.policy, self.workload.compute
        over = switch.meshes(self.shapes.mesh(held.mesh), rollouts.decode)
        masters = self.workload.masters
        arrays, adapter = self.shapes.arrays(held, over.train, masters), self.shapes.adapter(held, over.train, masters)
        table = model_slots(held.config, "lm")
        in_layers = [name for name, slot in table.items() if slot.per_layer and isinstance(held.config, DecoderConfig)]
        groups = [[name] for name in table if name not in in_layers] + ([in_layers] if in_layers else [])
        tasks = []
        for names in groups:
            one_layer = names is in_layers
            tasks.append(
                Task(
                    f"switch of {'a layer' if one_layer else names[0]}", "rollout", held,
                    held.config.num_layers if one_layer else 1, over.fine, switch.depart,
                    ({name: arrays[name] for name in names}, adapter, self.shapes.number(over.fine, "int32")),
                    {"table": tuple((name, table[name]) for name in names), "over": over, "dtype": compute,
                     "one_layer": one_layer},
                    counted=False,
                )
            )  # fmt: skip
        return [*tasks, self.decoding(rollouts, over.decode)]

    def decoding(self, rollouts: Rollouts, mesh: Mesh) -> Task:
        """The decode program as `decode.generate` calls it, of rows that all take `new` tokens."""
        held, compute, sampling = rollouts.policy, self.workload.compute, rollouts.sampling
        wide = str(jnp.promote_types(compute, jnp.float32))
        copy = self.shapes.decode_copy(held, mesh)
        shards = rollouts.decode.data
        slots = -(-min(sampling.decode_rows or rollouts.rows, rollouts.rows) // shards) * shards
        rows, greedy = -(-rollouts.rows // shards) * shards, sampling.temperature == 0
        queue = decode.Queue(
            self.shapes.rows(mesh, "int32", rows, rollouts.prompt),
            self.shapes.rows(mesh, "int32", rows),
            self.shapes.rows(mesh, wide, rows, rollouts.new),
        )  # pyright: ignore[reportArgumentType]
        stops = jax.ShapeDtypeStruct((len(sampling.stop_token_ids),), jnp.int32, sharding=replicated(mesh))
        platform = self.topology.chip.kind
        settings = decode.Settings(
            num_new=rollouts.new, slots=slots, shards=shards, greedy=greedy, top_k=0 if greedy else sampling.top_k,
            nucleus=not greedy and sampling.top_p < 1, prefill=(rollouts.prompt,),
            prefixes=decode.prefixes(rollouts.prompt, rollouts.columns, platform),
        )  # fmt: skip
        numbers = (self.shapes.number(mesh, wide), self.shapes.number(mesh, wide))
        return Task(
            "decode", "rollout", held, 1, mesh, decode.program, (copy, queue, *numbers, stops), {"settings": settings},
            batch=queue, trips=float(rollouts.new - 1),
        )  # fmt: skip

    # Compilation ---------------------------------------------------------------------------------------------------

    def compiled(self, task: Task) -> Program:
        """The program, compiled and measured; another role's, where that is the same program."""
        leaves = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(task.arguments))
        key = (task.function, task.held.config, task.held.head, leaves, tuple(sorted(task.static.items())))
        if key not in self._done:
            self._done[key] = self.measured(task)
        done = self._done[key]
        return replace(done, name=task.name, phase=task.phase, role=task.held.role, calls=task.calls)

    def measured(self, task: Task) -> Program:
        started = time.perf_counter()
        # What the mathematics asks for: traced without a mesh, where nothing is said of devices.
        counted = flops.NONE
        if task.counted:
            traced = task.function.trace(*_unplaced(task.arguments), **task.static)
            counted = flops.count(traced.jaxpr, while_trips=task.trips)
        base = Program(
            name=task.name, phase=task.phase, role=task.held.role, calls=task.calls, seconds=0.0,
            devices=task.mesh.size, flops=counted.all, needed_flops=counted.needed,
        )  # fmt: skip
        with jax.set_mesh(task.mesh):
            lowered = task.function.lower(*task.arguments, **task.static)
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return replace(base, seconds=time.perf_counter() - started, refused=_words(str(error)))
        memory, done = compiled.memory_analysis(), hlo.work(compiled.as_text(), unknown_trips=task.trips)
        return replace(
            base,
            seconds=time.perf_counter() - started,
            argument=float(memory.argument_size_in_bytes),
            output=float(memory.output_size_in_bytes),
            alias=float(memory.alias_size_in_bytes),
            temporary=float(memory.temp_size_in_bytes),
            batch=_local_bytes(task.batch),
            device_flops=done.flops,
            hbm=done.moved,
            collectives=self.collectives(done.collectives, task.mesh),
        )

    def collectives(self, moves: Sequence[hlo.Move], mesh: Mesh) -> tuple[Collective, ...]:
        """Moves of one kind over groups of one shape, together."""
        found: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for move in moves:
            links, hops = self.route([mesh.devices.flat[index] for index in move.group])
            if move.kind == "all-reduce":
                hops *= 2
            total = found[move.kind, len(move.group), links, hops]
            total[0] += move.times
            total[1] += move.sent
        return tuple(
            Collective(kind=kind, devices=size, links=links, hops=hops, count=count, bytes=sent)
            for (kind, size, links, hops), (count, sent) in sorted(found.items(), key=lambda item: -item[1][1])
        )

    def route(self, group: Sequence[Any]) -> tuple[int, int]:
        """(links that a device sends over at once, hops from one end to the other) of a group's collectives: along each
        axis of the grid on which the group extends, two links where the axis is a ring that it fills, else one."""
        if self.topology.chip.kind == "cpu":
            return 1, len(group) - 1
        links = hops = 0
        for axis, size in enumerate(self.topology.sizes):
            extent = len({device.coords[axis] for device in group})
            if extent > 1:
                full = extent == size and self.topology.is_ring(axis)
                links, hops = links + (2 if full else 1), hops + (extent // 2 if full else extent - 1)
        return max(links, 1), max(hops, 1)


def _unplaced(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _local_bytes(tree: Any) -> float:
    """Bytes of one device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(np.prod(x.sharding.shard_shape(x.shape), dtype=float) * x.dtype.itemsize for x in leaves))


def _words(error: str) -> str:
    """The compiler's first sentence about the memory it lacks."""
    line = next((line for line in error.splitlines() if "xceed" in line or "memory" in line.lower()), error)
    return line.strip()[:300]
