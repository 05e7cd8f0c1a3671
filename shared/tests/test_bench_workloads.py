"""Workloads: names, changes and errors; their parameters and FLOPs; the screen that a profile fills."""

import dataclasses
import math

import pytest

from diptych.bench import profile
from diptych.bench.flops import decode_bytes, parameters, phase_flops
from diptych.bench.profile import Row, by_kind, grouped, kind, profile_screen
from diptych.bench.workloads import CPU_SET, GPU_SET, WORKLOADS, workload
from diptych.errors import UserError
from diptych.weights.huggingface import initial_checkpoint

# Names and changes -----------------------------------------------------------------------------------------------


def test_named_workloads():
    assert workload("tiny") == WORKLOADS["tiny"]
    assert set(CPU_SET) | set(GPU_SET) <= set(WORKLOADS)
    assert all(name == one.name for name, one in WORKLOADS.items())


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("batch=32", "batch", 32),
        ("micro_batch=4", "micro_batch", 4),
        ("micro_batch=null", "micro_batch", None),
        ("ffn=none", "ffn", None),
        ("forced=false", "forced", False),
        ("architecture=opt", "architecture", "opt"),
        ("precision=bfloat16", "precision", "bfloat16"),
        ("remat=full", "remat", "full"),
    ],
)
def test_changes(setting, field, value):
    changed = workload("small", [setting])
    assert getattr(changed, field) == value
    assert changed.name == f"small[{setting}]"
    assert (
        dataclasses.replace(changed, **{field: getattr(WORKLOADS["small"], field)}, name="small") == WORKLOADS["small"]
    )


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("smal", [], "no workload 'smal': there are tiny, small"),
        ("small", ["rows=3"], "a workload has no 'rows'; it has architecture"),
        ("small", ["name=mine"], "a workload has no 'name'"),
        ("small", ["batch=many"], "batch=many: a whole number is wanted"),
        ("small", ["batch"], "batch: a whole number is wanted"),
        ("small", ["batch=none"], "batch=none: a whole number is wanted"),
        ("small", ["forced=yes"], "forced=yes: true or false is wanted"),
        ("small", ["precision=float16"], "float32, float64, bfloat16 are the choices"),
        ("small", ["batch=0"], "batch must be 1 or more, got 0"),
        ("small", ["layers=-1"], "layers must be 1 or more, got -1"),
        ("small", ["vocabulary=8"], "vocabulary must be 16 or more, got 8"),
        ("small", ["heads=3"], "heads must divide width, and kv_heads heads"),
        ("small", ["kv_heads=3"], "heads must divide width, and kv_heads heads"),
        ("small", ["mini_batches=3"], "batch must divide into mini_batches"),
        ("small", ["micro_batch=5"], "and these into micro_batch rows"),
        ("small", ["mini_batches=2", "micro_batch=16"], "and these into micro_batch rows"),
    ],
)
def test_what_is_no_workload(name, settings, words):
    with pytest.raises(UserError) as caught:
        workload(name, settings)
    assert words in str(caught.value)


# Parameters and FLOPs --------------------------------------------------------------------------------------------

SMALLER = ["layers=2", "width=32", "vocabulary=64"]
SHAPES = [
    workload("tiny"),
    workload("tiny", ["kv_heads=2", "tied=true", *SMALLER]),
    workload("tiny", ["architecture=qwen2", *SMALLER]),
    workload("opt-125m", ["heads=4", *SMALLER]),
    workload("rnn", SMALLER),
]


@pytest.mark.parametrize("work", SHAPES, ids=lambda work: work.name)
def test_parameters_are_those_of_the_checkpoint(work):
    weights = initial_checkpoint(work.config(), seed=0).weights
    assert parameters(work) == sum(math.prod(weights[name].shape) for name in weights)


def test_opt_125m_is_that():
    """125,239,296 parameters with 2050 positions; here as many as a row has."""
    shape = WORKLOADS["opt-125m"]
    positions = shape.config()["max_position_embeddings"]
    assert parameters(shape) == 125_239_296 - (2048 - positions) * shape.width


def test_flops_by_hand():
    """Two rows of 3+2 tokens through one layer of width 4, feed-forward 8, vocabulary 16."""
    work = workload(
        "tiny",
        ["layers=1", "width=4", "heads=1", "ffn=8", "vocabulary=16", "batch=2", "prompt=3", "answer=2", "epochs=3"],
    )
    matrices = 4 * 4 * 4 + 3 * 4 * 8
    tokens, head = 2 * 5, 2 * 4 * 16
    layers = tokens * (2 * matrices + 4 * 5 * 4)  # products with weights; scores and values over whole rows
    found = phase_flops(work)
    assert found["score/reference"] == layers + 2 * 2 * head  # the head at the answers
    assert found["score/critic"] == found["score/reward"] == layers + tokens * 2 * 4
    assert found["update/policy"] == 3 * 3 * found["score/reference"]
    assert found["update/critic"] == 3 * 3 * found["score/critic"]
    assert found["prefill"] == 2 * 3 * (2 * matrices + 4 * 3 * 4) + 2 * head
    assert found["decode"] == 2 * (2 * matrices + 4 * (3 + 1) * 4) + 2 * head


def test_bytes_of_decoding_by_hand():
    settings = ["layers=1", "width=4", "heads=1", "ffn=8", "vocabulary=16", "batch=2", "prompt=3", "answer=3"]
    work = workload("tiny", settings)
    weights = 4 * 4 * 4 + 3 * 4 * 8 + 3 * 4 + 16 * 4  # matrices, norms, head: not the embedding
    cache = 2 * 4 * (3 + 1.5) * 2
    assert decode_bytes(work) == 2 * 4 * (weights + cache)
    assert decode_bytes(workload("tiny", [*settings, "precision=bfloat16"])) == decode_bytes(work) / 2
    assert decode_bytes(workload("tiny", [*settings, "tied=true"])) == decode_bytes(work)  # the head is read either way


# The screen of a profile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("aten::mm", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("jit_gradients/ynn_fusion.27", "matrix products"),
        ("jit_program/dot.3", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("nvjet_tst_128x256_64x4", "matrix products"),
        ("mkldnn::_reorder_linear_weight", "copies"),
        ("aten::copy_", "copies"),
        ("aten::cat", "copies"),
        ("jit_gradients/copy_bitcast_fusion.6", "copies"),
        ("Memcpy DtoH (Device -> Pageable)", "copies"),
        ("aten::index_copy_", "gather, scatter"),
        ("aten::embedding_dense_backward", "gather, scatter"),
        ("jit_program/bitcast_dynamic-update-slice_fusion", "gather, scatter"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("__cudnn$fmhaSoftmax", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("jit_apply/multiply_add_fusion", "optimizer"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("jit_gradients/all-reduce.1", "communication"),
        ("jit_program/while.3", "calls and views"),
        ("aten::transpose", "calls and views"),
        ("autograd::engine::evaluate_function: MmBackward0", "calls and views"),
        ("aten::mul", profile.REST),
        ("aten::_log_softmax", profile.REST),
        ("aten::masked_fill_", profile.REST),
        ("jit_gradients/add_rsqrt_fusion.2", profile.REST),
        ("jit_gradients/convert_select_fusion", profile.REST),
    ],
)
def test_kinds(operation, expected):
    assert kind(operation) == expected


def test_operations_of_one_name_are_one():
    rows = [
        Row("jit_a/dot.1", 1.0, 2),
        Row("jit_a/dot.12.clone", 3.0, 4),
        Row("jit_b/dot.1", 2.0, 1),
        Row("jit_a/dot", 1.0, 1),
    ]
    assert grouped(rows) == [Row("jit_a/dot", 5.0, 7, 3), Row("jit_b/dot", 2.0, 1)]


def test_kinds_and_overhead_are_the_whole():
    rows = [Row("aten::mm", 0.5, 3), Row("aten::mul", 0.1, 2), Row("aten::bmm", 0.1, 1)]
    found = by_kind(rows, 1.0)
    assert [(row.name, row.calls) for row in found] == [
        ("matrix products", 4), (profile.REST, 2), (profile.OVERHEAD, 0)
    ]  # fmt: skip
    assert sum(row.seconds for row in found) == pytest.approx(1.0)
    assert by_kind(rows, 0.4)[-1] == Row(profile.OVERHEAD, 0.0, 0)  # two threads at once


def test_a_screen(tmp_path):
    trace = tmp_path / "plugins" / "profile" / "2026"
    trace.mkdir(parents=True)
    (trace / "host.trace.json.gz").touch()
    operations = [{"name": f"jit_a/{'abcdefghijklmnopqrst'[i]}_fusion", "seconds": 0.02, "calls": 2} for i in range(20)]
    operations[0] = {"name": "jit_a/dot" + "t" * 80, "seconds": 0.04, "calls": 3}
    phases = {"rollout": 0.25, "update/policy": 0.5, "switch": 0.0, "other": 0.25}
    screen = profile_screen(
        "jax",
        {
            "operations": operations,
            "iteration": {"seconds": 1.0, "phases": phases},
            "files": [str(trace / "host.xplane.pb")],
        },
        workload("tiny"),
    )
    lines = screen.splitlines()
    assert max(map(len, lines[:-2])) <= 120
    assert len(lines) <= 45
    assert lines[0].startswith("jax: llama, 2 layers")
    assert "update/policy        0.5000   50.0 %" in screen
    assert "framework overhead     0.5800   58.0 %" in screen
    assert sum("_fusion" in line for line in lines) == profile.DEAREST - 1
    assert "host.trace.json.gz (open it at https://ui.perfetto.dev)" in lines[-2]
    assert lines[-1].endswith(f"xprof --logdir {tmp_path})")
