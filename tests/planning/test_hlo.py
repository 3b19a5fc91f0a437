"""Collectives are parsed from the text of programs: as libtpu writes it, and of a program compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from decodax.planning.hlo import ProgramCollective, collectives_of

LINES = """
  %all-reduce.65 = bf16[4096,8]{0,1:T(8,128)(2,1)S(1)} all-reduce(%fusion.195), channel_id=13, replica_groups=mesh['axis_0'=16,'axis_1'=8] {'axis_1'}, to_apply=%add, metadata={op_name="jit(decode)/while/body/Transformer.run/blocks_3/mixer/dot_general" stack_frame_id=67}
  %all-reduce.71 = (f32[8,1]{0,1:T(1,128)S(1)}, f32[8]{0:T(128)S(1)}) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, metadata={op_name="jit(decode)/while/body/sub"}
  %ag = (bf16[2,64]{1,0}, bf16[16,64]{1,0}) all-gather-start(%x), replica_groups=[2,8]<=[16], dimensions={0}
  %agd = bf16[16,64]{1,0} all-gather-done(%ag)
  ROOT %cp = s8[7]{0} collective-permute(%y), source_target_pairs={{0,1},{1,0}}
  %fusion.1 = f32[8]{0} fusion(%all-reduce.65, %all-reduce.71), kind=kLoop
"""  # noqa: E501


def test_lines_as_libtpu_writes_them():
    assert collectives_of(LINES) == [
        ProgramCollective(
            "all-reduce", 2 * 4096 * 8, 8, "jit(decode)/while/body/Transformer.run/blocks_3/mixer/dot_general"
        ),
        ProgramCollective("all-reduce", 4 * 16, 4, "jit(decode)/while/body/sub"),
        ProgramCollective("all-gather", 2 * 16 * 64, 8, ""),
        ProgramCollective("collective-permute", 7, None, ""),
    ]
    assert [one.layer for one in collectives_of(LINES)] == [3, None, None, None]


def test_a_program_compiled_here():
    """A product split over its contracted axis needs one all-reduce over the four devices that hold its shards."""
    devices = np.array(jax.devices()).reshape(2, 4)
    mesh = Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def split(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    whole = NamedSharding(mesh, PartitionSpec("data"))
    product = jax.jit(lambda a, b: a @ b, out_shardings=whole)
    compiled = product.lower(split((6, 20), "data", "tensor"), split((20, 5), "tensor")).compile()
    (found,) = collectives_of(compiled.as_text())
    assert (found.kind, found.num_bytes, found.devices) == ("all-reduce", 4 * 3 * 5, 4)
