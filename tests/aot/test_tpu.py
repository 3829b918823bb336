"""Reading compiled programs: numbers that can be counted by hand, and those of TPU programs where libtpu installs."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.aot import chips, hlo, tpu
from llava_jax.console import InputError
from llava_jax.sharding.mesh import fsdp_lines, make_mesh

needs_libtpu = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: no compiler for TPUs"),
]


LOOP = """\
HloModule jit_f, is_scheduled=true, num_partitions=4

%product (p.0: bf16[8,16], p.1: bf16[16,32]) -> bf16[8,32] {
  %p.0 = bf16[8,16]{1,0} parameter(0)
  %p.1 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%scattered (p.2: bf16[8,32]) -> bf16[2,32] {
  %p.2 = bf16[8,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,32]{1,0} all-reduce(%p.2), replica_groups={{0,1,2,3}}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %slice.1 = bf16[2,32]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,32}
}

%body (state: (s32[], bf16[8,16], bf16[4,32])) -> (s32[], bf16[8,16], bf16[4,32]) {
  %state = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%state), index=1
  %w = bf16[4,32]{1,0} get-tuple-element(%state), index=2
  %whole = bf16[16,32]{1,0} all-gather(%w), replica_groups=[1,4]<=[4], dimensions={0}
  %y = bf16[8,32]{1,0:S(1)} fusion(%x, %whole), kind=kOutput, calls=%product
  %z = bf16[2,32]{1,0} fusion(%y), kind=kCustom, calls=%scattered
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) tuple(%next, %x, %w)
}

%condition (state.1: (s32[], bf16[8,16], bf16[4,32])) -> pred[] {
  %state.1 = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %many = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %many), direction=LT
}

ENTRY %main (x.1: bf16[8,16], w.1: bf16[4,32]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0} parameter(0)
  %w.1 = bf16[4,32]{1,0} parameter(1)
  %two = s32[] constant(2)
  %begin = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) tuple(%two, %x.1, %w.1)
  %loop = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) while(%begin), condition=%condition, body=%body
  ROOT %end = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_of_five_products_with_a_gather_and_a_scatter_each():
    work = hlo.Program(LOOP).work
    assert work.flops == 5 * 2 * 8 * 16 * 32
    # Each chip sends its 4 x 32 numbers to three others, and three quarters of its 8 x 32 sums.
    assert work.collectives == {"all-gather": 5 * 3 * 4 * 32 * 2, "reduce-scatter": 5 * 8 * 32 * 2 * 3 / 4}
    assert work.counts == {"all-gather": 5, "reduce-scatter": 5}
    gathered, product, scattered, counter = (4 + 16) * 32 * 2, (8 * 16 + 16 * 32) * 2, 2 * 32 * 2, 3 * 4
    assert work.hbm_bytes == 5 * (gathered + product + scattered + counter)


def test_elements_of_tuples_may_be_written_where_they_are_used():
    """As newer releases of JAX print them."""
    text = re.sub(r"  %(i|x|w|j) = \S+ get-tuple-element\(.*\n", "", LOOP)
    for name, element in (("i", "state#0"), ("x", "state#1"), ("w", "state#2"), ("j", "state.1#0")):
        text = re.sub(rf"%{name}(?=[,)])", f"%{element}", text)
    assert text.count("get-tuple-element") == 1 and "%state.1#0" in text
    assert hlo.Program(text).work == hlo.Program(LOOP).work


def test_a_loop_whose_length_is_not_known():
    text = LOOP.replace("%many = s32[] constant(7)", "%many = s32[] get-tuple-element(%state.1), index=1")
    with pytest.raises(ValueError, match="trip count of body"):
        hlo.Program(text)._work("main")


def test_of_two_branches_the_more_expensive_one_counts():
    text = LOOP.replace(
        "ROOT %end",
        "%c = bf16[8,32]{1,0} conditional(%two, %x.1, %x.1), branch_computations={%nothing, %product}\n  ROOT %end",
    )
    text += "\n%nothing (q: bf16[8,16]) -> bf16[8,16] {\n  ROOT %q = bf16[8,16]{1,0} parameter(0)\n}\n"
    assert hlo.Program(text).work.flops == 6 * 2 * 8 * 16 * 32


def hbm_bytes(instructions: str, computations: str = "") -> float:
    """Of a program that consists of these instructions; `%x` is 64 x 128 numbers of two bytes, `%i` an index."""
    lines = "\n".join(f"  {line.strip()}" for line in instructions.strip().splitlines())
    head = "  %x = bf16[64,128]{1,0} parameter(0)\n  %i = s32[]{:S(6)} parameter(1)\n"
    return hlo.Program(
        f"HloModule m\n\n{computations}\nENTRY %main (x: bf16[64,128]) -> bf16[] {{\n{head}{lines}\n}}\n"
    ).work.hbm_bytes


ALL, ROW = 64 * 128 * 2, 128 * 2  # bytes


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("ROOT %y = bf16[64,128]{1,0} copy(%x)", 2 * ALL),
        ("ROOT %y = bf16[64,128]{1,0:S(1)} copy(%x)", ALL),
        ("ROOT %y = bf16[1,128]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,128}", 2 * ROW),
        ("ROOT %y = bf16[1,128]{1,0:S(1)} slice(%x), slice={[3:4], [0:128]}", ROW),
        (
            "%row = bf16[1,128]{1,0:S(1)} constant({...})\n"
            "ROOT %y = bf16[64,128]{1,0} dynamic-update-slice(%x, %row, %i, %i)",
            ROW,
        ),
    ],
)  # fmt: skip
def test_of_a_slice_or_an_update_only_the_part_is_moved(instruction, moved):
    assert hbm_bytes(instruction) == moved


SAME = """\
%same (s: bf16[64,128]) -> bf16[128,64] {
  %s = bf16[64,128]{1,0} parameter(0)
  ROOT %turned = bf16[128,64]{0,1} bitcast(%s)
}
"""


def test_an_argument_that_an_inner_fusion_passes_on_is_read_where_it_is_used():
    outer = """\
%outer (o: bf16[64,128]) -> bf16[{0}] {{
  %o = bf16[64,128]{{1,0}} parameter(0)
  %turned.1 = bf16[128,64]{{0,1}} fusion(%o), kind=kLoop, calls=%same
  ROOT %used = bf16[{0}]{{1,0}} {1}
}}
"""
    fusion = "ROOT %y = bf16[128,64]{1,0:S(1)} fusion(%x), kind=kOutput, calls=%outer"
    assert hbm_bytes(fusion, SAME + outer.format("128,64", "negate(%turned.1)")) == ALL
    sliced = outer.format("1,64", "slice(%turned.1), slice={[3:4], [0:64]}")
    assert hbm_bytes(fusion.replace("128,64", "1,64"), SAME + sliced) == ROW / 2


def test_a_fusion_that_only_changes_the_layout_copies():
    assert hbm_bytes("ROOT %y = bf16[128,64]{0,1} fusion(%x), kind=kLoop, calls=%same", SAME) == 2 * ALL


def test_a_part_that_is_fetched_ahead():
    started = """\
%fetched (f: bf16[64,128]) -> bf16[16,128] {
  %f = bf16[64,128]{1,0} parameter(0)
  ROOT %part = bf16[16,128]{1,0:S(1)} slice(%f), slice={[0:16], [0:128]}
}
"""
    start = """
%begun = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%x), calls=%fetched
ROOT %y = bf16[16,128]{1,0:S(1)} async-done(%begun)
"""
    assert hbm_bytes(start, started) == ALL / 4


def test_attention_of_a_chunk_to_the_positions_before_it():
    """Queries of the last 512 positions of 1,536, in blocks of 256, and keys in blocks of 512."""
    shapes = "s8[1,2,3]{2,1,0}, bf16[8,512,128]{2,1,0}, bf16[2,1536,128]{2,1,0}, bf16[2,1536,128]{2,1,0}"
    kernel = (
        "  ROOT %splash_mha_fwd_no_residuals.1 = bf16[8,512,128]{2,1,0} custom-call(%x), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={' + shapes + "}, "
        'metadata={"block_q": 256, "block_kv": 512}'
    )
    program = "HloModule m\n\nENTRY %main (x: s8[1]) -> bf16[] {\n  %x = s8[1]{0} parameter(0)\n" + kernel + "\n}\n"
    assert hlo.Program(program).work.flops == 2 * 2 * 8 * 128 * (2 * 256) * (3 * 512)


KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "v7x": "TPU7x"}  # in JAX


def test_chips_are_as_jax_knows_them():
    """Which rounds, and has HBM as a whole, of which the compiler keeps a part; of one core."""
    from jax.experimental.pallas import tpu as pallas

    assert KINDS.keys() == chips.CHIPS.keys()
    for kind, chip in chips.CHIPS.items():
        info = pallas.get_tpu_info_for_chip(pallas.ChipVersion({"v7x": "7x"}.get(kind, kind)), 1)
        cores = 2 if kind in ("v4", "v5p") else 1  # two cores are one device
        assert chip.peak == pytest.approx(cores * info.bf16_ops_per_second, rel=0.005)
        assert chip.bandwidth == pytest.approx(cores * info.mem_bw_bytes_per_second, rel=0.13)
        assert 0.9 < chip.hbm / (cores * info.hbm_capacity_bytes) < 1


def test_peaks_of_devices_by_their_names():
    for kind, name in KINDS.items():
        assert chips.device_peak(name) == chips.CHIPS[kind].peak
    assert chips.device_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert chips.device_peak("cpu") is None


@pytest.mark.parametrize(("topology", "count"), [("v5e:4x8", 2), ("v5e:16x16", 4), ("v5p:2x2x4", 4), ("v6e:1x1", 0)])
def test_links(topology, count):
    assert tpu.links(topology) == count


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5litepod-1", "v5e:1x1"), ("v5litepod-8", "v5e:2x4"), ("v5litepod-16", "v5e:4x4"),
        ("v5litepod-256", "v5e:16x16"), ("v6e-4", "v6e:2x2"), ("v6e-128", "v6e:8x16"),
        ("v4-8", "v4:2x2x1"), ("v4-32", "v4:2x2x4"), ("v5p-8", "v5p:2x2x1"), ("v5p-128", "v5p:4x4x4"),
        ("tpu7x-8", "v7x:2x2x1"), ("tpu7x-128", "v7x:4x4x4"),
    ],
)  # fmt: skip
def test_slices_by_the_names_under_which_they_are_reserved(name, topology):
    assert tpu.by_sides(name) == tpu.by_sides(topology) == topology
    assert tpu.slice_name(topology) == tpu.slice_name(name) == name


def test_every_reserved_slice_has_as_many_chips_as_its_name_says():
    for name, (kind, each, known) in tpu.SLICES.items():
        for count, sides in known.items():
            assert math.prod(tpu.parse_topology(f"{name}-{each * count}")[1]) == count
            assert tpu.larger_slices(f"{kind}:{sides}") == [f"{kind}:{text}" for n, text in known.items() if n > count]
    assert tpu.slice_name("v5e:2x8") is None
    with pytest.raises(InputError, match="--topology v5litepod-17: v5litepod comes in 1, 4, 8, 16, 32, 64, 128, 256$"):
        tpu.parse_topology("v5litepod-17")


@pytest.mark.parametrize(
    "topology", ["v9:2x2", "v5e-16", "v9-8", "v5p-", "v5e", "v5e:8", "v5e:0x2", "v5e:2x2x2x2", "4x4"]
)
def test_topologies_that_are_none(topology):
    with pytest.raises(InputError, match="write it as v5e:4x8"):
        tpu.parse_topology(topology)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install libtpu"):
        tpu.slice_devices("v5e:2x2")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("E1000: ... HLO temporaries (223.5G) exceeds available HBM (15.75G)", int(223.5 * 2**30)),
        ("E1000: ... HLO temporaries (10.41T) exceeds available HBM (15.75G)", int(10.41 * 2**40)),
        ("Ran out of memory in memory space hbm. Used 16.25G of 15.75G hbm.", int(16.25 * 2**30)),
        ("UNIMPLEMENTED: something else", None),
    ],
)
def test_what_a_program_would_have_needed(message, needed):
    assert tpu.out_of_memory(Exception(message)) == needed


class TestOnTpu:
    pytestmark = needs_libtpu

    def test_products_and_gathers_of_a_compiled_program(self):
        """Three layers of x W, W sharded over four chips: all by hand."""
        mesh = make_mesh({"fsdp": 4}, tpu.slice_devices("v5e:2x2"))

        def f(w_LDD, x_BD):
            def layer(x, w):
                return x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())), None

            return jax.lax.scan(layer, x_BD, w_LDD)[0]

        def shape(dims, *spec):
            return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

        compiled = jax.jit(f).lower(shape((3, 512, 512), None, "fsdp"), shape((1024, 512), "fsdp")).compile()
        work = hlo.Program(compiled.as_text()).work
        assert work.flops == 3 * 2 * 256 * 512 * 512
        assert work.collectives == {"all-gather": 3 * 3 * (128 * 512 * 2)}
        assert tpu.memory(compiled).arguments == (3 * 128 * 512 + 256 * 512) * 2

    @pytest.mark.parametrize(("topology", "sides"), [("v5e:4x4", (4, 4)), ("v5p:2x2x4", (2, 2, 4)), ("v6e:1x1", ())])
    def test_gradients_are_scattered_along_lines_of_chips(self, topology, sides):
        devices = tpu.slice_devices(topology)
        mesh = make_mesh({"fsdp": len(devices)}, devices[::-1])
        lines = fsdp_lines(mesh)
        assert [np.array(dimension).shape[1] for dimension in lines] == list(sides)
        coords = np.array([d.coords for d in mesh.devices.flat])
        for dimension in lines:
            for line in dimension:
                assert sum(len(set(axis)) > 1 for axis in coords[list(line)].T) == 1

    @pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2", "v7x:2x2x1"])
    def test_devices_of_a_slice(self, topology):
        devices = tpu.slice_devices(topology)
        assert len(devices) == tpu.device_count(topology)
        chip = chips.CHIPS[tpu.parse_topology(topology)[0]]
        assert chips.device_peak(devices[0].device_kind) == chip.peak

    def test_slices_are_apart_along_data(self):
        devices = tpu.slice_devices("v5e:2x2", slices=2)
        mesh = make_mesh({"data": 2, "fsdp": 4}, devices)
        assert [[d.slice_index for d in row] for row in mesh.devices[:, :, 0]] == [[0] * 4, [1] * 4]
        with pytest.raises(InputError, match="`data` must be a multiple"):
            make_mesh({"fsdp": 8}, devices)

    def test_a_program_that_is_too_large_says_what_it_needs(self):
        from llava_jax.aot.tpu_plan import compile_for_tpu

        mesh = make_mesh({"fsdp": 4}, tpu.slice_devices("v5e:2x2"))
        x = jax.ShapeDtypeStruct((4, 2**33), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
        made = compile_for_tpu(jax.jit(lambda x: x + 1).lower(x))
        assert made.work is None
        assert made.peak == 2 * 2**33 * 4
