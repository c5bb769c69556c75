"""Steps compiled for a TPU by its own compiler, on a machine without a TPU.

The tests check the compiler's report on the program: which instructions have results as large as a
table (only scatters into the donated arrays should), and how much memory and traffic it needs.
"""

import importlib.util

import pytest

from benchmarks import compilers, hlo, programs, tpu

NUM_ROWS = tpu.NUM_ROWS
# By what factor a row of each width grows, because a TPU pads it to a multiple of 128 elements.
PADDING_FACTORS = {16: 8, 32: 4, 64: 2, 100: 1.28, 128: 1, 256: 1, 300: 1.28}
# The number of rows of a packed table, by its width. With fewer rows of 16 columns it would fit in
# the TPU's fast memory and would be moved there as a whole.
PACKED_ROWS = {16: 4_000_000, 32: NUM_ROWS, 64: NUM_ROWS, 100: NUM_ROWS, 300: NUM_ROWS}
ROW_CASES = [
    *((kind, width, NUM_ROWS) for kind in ("lazy", "exact") for width in PADDING_FACTORS),
    *(("packed", width, num_rows) for width, num_rows in PACKED_ROWS.items()),
    *((kind, 64, NUM_ROWS) for kind in ("decayed", "init", "lookup", "flush", "not row-major")),
    *((kind, 64, NUM_ROWS) for kind in ("followed lazy", "followed exact")),
    *((kind, 64, NUM_ROWS, 65_536) for kind in ("lazy", "exact, given rows")),
]
# Dense steps, on one leaf.
ONE_LEAF = [2**26]
SCALED8 = ("adamjax", "adam, moments in scaled8")
DENSE_CASES = [
    ("adamjax", "adam"),
    ("adamjax", "clip + adamw + average"),
    ("optax", "clip + adamw"),
    ("adamjax", "adam, moments in bfloat16"),
]
# A vector, and matrices of long and of short columns.
SCALED8_SHAPES = [ONE_LEAF, [2**18, 2**8], [2**13, 2**13]]
# The cases by their keys in `compiled`.
CASES = {
    **{case: ("rows", *case) for case in ROW_CASES},
    **{case: ("dense", *case, [ONE_LEAF]) for case in DENSE_CASES},
    **{("scaled8", *shape): ("dense", *SCALED8, [shape]) for shape in SCALED8_SHAPES},
}


@pytest.fixture(scope="module")
def compiled():
    """The compiler's report on each case. It runs in two processes, and may end them."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which has the TPU's compiler, is not installed: make test-tpu")
    reports = compilers.reports(tpu.COMPILER, "v5e", list(CASES.values()), processes=2)
    found = dict(zip(CASES, reports, strict=True))
    for case, report in found.items():
        assert "failed" not in report, (case, report)
    return found


# The operations that may have a result as large as a table: they pass it on or write into it.
IN_PLACE = {"parameter", "tuple", "get-tuple-element", "while", "scatter", "fusion in place"}


def assert_no_copy(found):
    assert set(found["makers"]) <= IN_PLACE, found["makers"]
    assert found["temporary"] <= 0.02 * found["table"], found


@pytest.mark.parametrize(
    ("kind", "width"),
    [
        *((kind, width) for kind in ("lazy", "exact") for width in PADDING_FACTORS),
        ("decayed", 64),
        ("followed lazy", 64),
        ("followed exact", 64),
    ],
)
def test_a_step_on_a_row_major_table_copies_nothing(compiled, kind, width):
    found = compiled[kind, width, NUM_ROWS]
    assert_no_copy(found)
    # They write the table and its two moments.
    assert found["makers"]["fusion in place"] == 3, found["makers"]
    assert found["donated"] > 0.99 * found["tables"] * PADDING_FACTORS[width], found
    assert found["arguments"] <= 1.01 * PADDING_FACTORS[width] * found["unpadded"], found


@pytest.mark.parametrize("width", PACKED_ROWS)
def test_packed_rows_are_hardly_padded(compiled, width):
    found = compiled["packed", width, PACKED_ROWS[width]]
    assert_no_copy(found)
    assert found["arguments"] <= 1.1 * found["unpadded"], found


@pytest.mark.parametrize("kind", ["lazy", "exact, given rows"])
def test_temporaries_of_a_large_batch_are_those_of_a_block(compiled, kind):
    """The summed gradients of all rows would have 17 MB, so they are never in memory as a whole."""
    assert compiled[kind, 64, NUM_ROWS, 65_536]["temporary"] < 2e6


@pytest.mark.parametrize("kind", ["lookup", "flush"])
def test_reading_rows_and_flushing_copy_nothing(compiled, kind):
    assert_no_copy(compiled[kind, 64, NUM_ROWS])


def test_a_jitted_init_makes_slots_with_the_layout_of_their_table(compiled):
    assert compiled["init", 64, NUM_ROWS]["orders"] == 2 * [[0, 1]]


def test_copies_would_be_seen(compiled):
    found = compiled["not row-major", 64, NUM_ROWS]
    # The table and its two moments are each copied into the row-major layout and back.
    assert found["makers"]["copy"] == 6
    assert found["temporary"] > found["table"]


def test_dense_adam_moves_the_least_bytes_that_it_can(compiled):
    """It reads the parameter, its gradient and two moments, and writes all but the gradient."""
    assert 28 <= compiled["adamjax", "adam"]["bytes"] <= 1.01 * 28


def test_bfloat16_moments_save_their_bytes(compiled):
    found = compiled["adamjax", "adam, moments in bfloat16"]
    assert 20 <= found["bytes"] <= 1.01 * 20
    assert found["temporary_bytes"] < 0.01


@pytest.mark.parametrize("shape", SCALED8_SHAPES, ids=str)
def test_a_step_of_8_bit_moments_reads_gradients_and_codes_again_for_exponents(compiled, shape):
    """The step makes no array of the leaf's size.

    The compiler reports 24 or 27 bytes for each parameter. Weights are read and written: 8 bytes.
    Gradients of 4 bytes are read twice, for some shapes again. The codes of two moments are read 3
    times and written once: 8 bytes.
    """
    found = compiled["scaled8", *shape]
    assert 24 <= found["bytes"] <= 27.2
    assert found["temporary_bytes"] < 0.01


def test_an_average_adds_only_the_bytes_of_reading_and_writing_it(compiled):
    most = compiled["optax", "clip + adamw"]["bytes"] + 4 + 4
    assert compiled["adamjax", "clip + adamw + average"]["bytes"] <= 1.001 * most


# --- figures of the text of a program, without a compiler -----------------------------------------

PROGRAM = """HloModule jit_step

%fused_computation.1 (a: f32[1000,64], b: s32[8]) -> f32[8,64] {
  %a = f32[1000,64]{1,0:T(8,128)} parameter(0)
  ROOT %gather.1 = f32[8,64]{1,0:T(8,128)S(1)} gather(%a, %b), offset_dims={1}
}

ENTRY %main.3 (table: f32[1000,64], ids: s32[8], g: bf16[100]) -> f32[1000,64] {
  %table = f32[1000,64]{1,0:T(8,128)} parameter(0)
  %ids = s32[8]{0:T(128)S(1)} parameter(1)
  %g = bf16[100]{0:T(1024)(128)(2,1)} parameter(2)
  %copy-start = (bf16[100]{0:T(1024)(128)(2,1)S(1)}, bf16[100]{0}, u32[]{:S(2)}) copy-start(%g)
  %copy-done = bf16[100]{0:T(1024)(128)(2,1)S(1)} copy-done(%copy-start)
  %read = f32[8,64]{1,0:T(8,128)S(1)} fusion(%table, %ids), kind=kCustom, calls=%fused_computation.1
  %slice-start = ((f32[1000,64]{1,0:T(8,128)}), f32[8,64]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) \
slice-start(%table)
  %both = (f32[1000,64]{1,0:T(8,128)}, f32[]{:T(128)S(6)}) fusion(%table, %read, %copy-done), \
kind=kLoop, calls=%other, backend_config={"estimated_cycles":"70"}
  ROOT %moved = f32[1000,64]{1,0:T(8,128)} get-tuple-element(%both), index=0
}
""".replace("\\\n", "")


def test_traffic_is_the_padded_bytes_from_and_to_the_large_memory():
    table, row = 1000 * 128 * 4, 8 * 128 * 4
    # Reads of g (1,024 elements with padding), of the gathered rows, the slice and the table; and a
    # write of the table.
    assert hlo.traffic(PROGRAM) == 2 * 1024 + row + row + 2 * table
    assert hlo.cycles(PROGRAM) == 70


LOOP = """HloModule jit_step

%fused_computation.1 (a: f32[1000,64], b: s32[8]) -> f32[8,64] {
  %a = f32[1000,64]{1,0} parameter(0)
  ROOT %gather.1 = f32[8,64]{1,0} gather(%a, %b), offset_dims={1}
}

%blocks.2 (carry: (s32[], f32[1000,64], s32[8])) -> (s32[], f32[1000,64], s32[8]) {
  %carry = (s32[], f32[1000,64]{1,0}, s32[8]{0}) parameter(0)
  %ids = s32[8]{0} get-tuple-element(%carry), index=2
  %table = f32[1000,64]{1,0} get-tuple-element(%carry), index=1
  ROOT %rows = f32[8,64]{1,0} fusion(%table, %ids), kind=kLoop, calls=%fused_computation.1
}

%search.3 (carry: (s32[], s32[8])) -> (s32[], s32[8]) {
  %carry = (s32[], s32[8]{0}) parameter(0)
  ROOT %copy.3 = s32[8]{0} copy(%carry)
}

ENTRY %main.4 (start: (s32[], f32[1000,64], s32[8])) -> f32[] {
  %start = (s32[], f32[1000,64]{1,0}, s32[8]{0}) parameter(0)
  %some = (s32[], s32[8]{0}) parameter(1)
  %w = (s32[], f32[1000,64]{1,0}, s32[8]{0}) while(%start), condition=%c, body=%blocks.2
  ROOT %s = (s32[], s32[8]{0}) while(%some), condition=%c, body=%search.3
}
"""


def test_traffic_counts_every_turn_of_a_loop_over_rows():
    """A turn reads the ids and the table, which counts as the gathered rows, and writes these."""
    rows, ids, table = 8 * 64 * 4, 8 * 4, 1000 * 64 * 4
    assert hlo.traffic(LOOP, 5, table) == 5 * (rows + rows + ids)
    assert hlo.traffic(LOOP, 5, table + 1) == hlo.traffic(LOOP) == 0


def test_only_large_batches_are_processed_in_a_loop():
    cases = {**programs.large_cases(1000, 64), **programs.many_tables()[2]}
    cases["usual"] = ("rows", "exact_rows", 64, 1000)
    expected = {name: 32 if "65,536" in name else 0 for name in cases}
    assert {name: programs.block_iterations(case) for name, case in cases.items()} == expected


def test_instructions_with_large_results_are_counted():
    expected = {"parameter": 2, "slice-start": 1, "fusion": 1, "get-tuple-element": 1}
    assert hlo.large_results(PROGRAM, 1000 * 64) == expected
