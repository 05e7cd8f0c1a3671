"""What the switch from a train mesh to a decode mesh costs, on virtual CPU devices: bytes, seconds, peak memory.

    python scripts/switch_cost.py --train 1,8,1 --decode 2,4
    python scripts/switch_cost.py --train 2,2,2 --decode 4,2 --chunk-mb 64

The model has the shape of a 1.1 billion parameter Llama with random float32 weights; its decode copy is bfloat16.
"least" is what the decode mesh's shards hold beyond what their devices had already: no way of moving can receive less.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
from collections.abc import Iterator, Mapping

import numpy as np

CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


class RandomTensors(Mapping[str, np.ndarray]):
    """Every tensor of a checkpoint, made when it is looked up."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.shapes = shapes

    def __getitem__(self, name: str) -> np.ndarray:
        return np.random.default_rng(len(name)).standard_normal(self.shapes[name], dtype=np.float32) * np.float32(0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="1,8,1", help="data,fsdp,tensor (default: 1,8,1)")
    parser.add_argument("--decode", default="2,4", help="data,tensor (default: 2,4)")
    parser.add_argument("--dtype", default="bfloat16", help="of the decode copy (default: bfloat16)")
    parser.add_argument("--chunk-mb", type=int, help="megabytes on their way at a time (default: no limit)")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="a smaller model")
    options = parser.parse_args()
    train, decode = ([int(size) for size in text.split(",")] for text in (options.train, options.decode))
    if len(train) != 3 or len(decode) != 2 or math.prod(train) != math.prod(decode):
        parser.error("--train takes three sizes, --decode two, with the same product")
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={math.prod(train)}"

    import jax

    from diptych.families.family import model_slots, read_model, tensor_shapes
    from diptych.layout import MeshShape
    from diptych_jax import switch, weights
    from diptych_jax.mesh import parameter_sharding, train_mesh

    config = read_model({**CONFIG, "num_hidden_layers": options.layers})
    mesh = train_mesh(MeshShape(data=train[0], fsdp=train[1], tensor=train[2]), jax.devices())
    over = switch.meshes(mesh, MeshShape(data=decode[0], tensor=decode[1]))
    model = weights.pack(config, "lm", RandomTensors(tensor_shapes(config, "lm")), np.dtype(np.float32), mesh=mesh)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(model) for shard in leaf.addressable_shards)
    before = peak()
    chunk = None if options.chunk_mb is None else options.chunk_mb * 2**20
    first = switch.switch(model, over, options.dtype, chunk=chunk)  # compiles
    copy = sum(shard.data.nbytes for leaf in jax.tree.leaves(first.model) for shard in leaf.addressable_shards)
    after = peak()
    moved = first.bytes_moved
    del first
    seconds = min(switch.switch(model, over, options.dtype, chunk=chunk).seconds for _ in range(2))
    itemsize = np.dtype(options.dtype).itemsize
    least = sum(
        least_bytes(model.arrays()[name].shape, *(parameter_sharding(slot, m) for m in (over.train, over.decode)))
        for name, slot in model_slots(config, "lm").items()
    )  # fmt: skip
    print(f"{config.num_params / 1e9:.2f} B parameters, train mesh {options.train}, decode mesh {options.decode}")
    print(f"bytes moved       {moved / 1e9:7.3f} GB, least {least * itemsize / 1e9:.3f} GB"
          + (f": {moved / (least * itemsize):.3f} times" if least else ""))  # fmt: skip
    print(f"seconds           {seconds:7.2f}, {moved / seconds / 1e9:.2f} GB/s (fingerprints of both sides included)")
    print(f"masters           {held / 1e9:7.2f} GB, decode copy {copy / 1e9:.2f} GB (all devices)")
    print(f"peak memory       {after / 1e9:7.2f} GB; {before / 1e9:.2f} GB after loading")
    print(f"above both copies {(after - held - copy) / 1e9:7.2f} GB (the process itself included)")


def least_bytes(shape: tuple[int, ...], here, there) -> int:
    """Numbers that the devices do not have yet, over all devices."""
    total = 0
    before = here.devices_indices_map(shape)
    for device, index in there.devices_indices_map(shape).items():
        own = [part.indices(size) for part, size in zip(before[device], shape, strict=True)]
        new = [part.indices(size) for part, size in zip(index, shape, strict=True)]
        common = math.prod(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in zip(own, new, strict=True))
        total += math.prod(stop - start for start, stop, _ in new) - common
    return total


def peak() -> int:
    """Bytes of this process at their most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
