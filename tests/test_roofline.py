"""Predicted GPU times must count what a kernel moves and computes, no more and no less."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmsr import attention
from mmsr.plan import PUBLISHED
from mmsr.vision import VisionConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import roofline  # noqa: E402
from roofline import Card, Count, Kept, Kernel, Sizes, as_on_cuda, one_kernel  # noqa: E402


def empty(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def counted(work, *keys_used):
    """(name, bytes read, bytes written, operations) of each kernel, in the order of their first launch."""
    with Count(keys_used) as count:
        work()
    return [(k.name, k.read, k.written, k.operations) for k in count.kernels.elements()]


def test_bias_weight_or_view_of_a_linear_layer_is_miscounted():
    x, weight, bias = empty(8, 16), empty(32, 16), empty(32)
    read = 2 * (8 * 16 + 32 * 16 + 32)
    product = 2 * 8 * 16 * 32
    assert counted(lambda: F.linear(x, weight, bias)) == [("addmm", read, 2 * 8 * 32, product)]
    assert counted(lambda: F.linear(x, weight)) == [("mm", read - 2 * 32, 2 * 8 * 32, product)]


def test_fp32_result_of_half_precision_factors_counts_as_half():
    a, b = empty(3, 8, 16), empty(3, 16, 32)
    work = [("bmm", 2 * 3 * (8 * 16 + 16 * 32), 4 * 3 * 8 * 32, 2 * 3 * 8 * 16 * 32)]
    assert counted(lambda: torch.bmm(a, b, out_dtype=torch.float32)) == work
    assert counted(lambda: attention._product(a[None], b[None])) == work


def test_gather_pays_for_its_whole_source():
    source, index = empty(1000, 64), empty(3, dtype=torch.long)
    chosen = 2 * 3 * 64
    assert counted(lambda: source[index]) == [("index", chosen + 3 * 8, chosen, 0)]
    assert counted(lambda: F.embedding(index, source)) == [("embedding", chosen + 3 * 8, chosen, 0)]


def test_scatter_pays_for_its_whole_target_or_forgets_a_copy_of_it():
    target, index, values = empty(1000, 64), empty(3, dtype=torch.long), empty(3, 64)
    moved, whole = 2 * 3 * 64, 2 * 1000 * 64

    def put():
        target[index] = values

    assert counted(put) == [("index_put_", moved + 3 * 8, moved, 0)]
    assert counted(lambda: target.index_copy(0, index, values)) == [
        ("index_copy", whole + moved + 3 * 8, whole + moved, 0)
    ]
    assert counted(lambda: target.index_add_(0, index, values)) == [("index_add_", 2 * moved + 3 * 8, moved, 0)]


def test_what_is_only_written_counts_as_read_or_what_changes_as_only_read():
    x, y = empty(8, 8), empty(8, 8)
    assert counted(lambda: x.add_(y)) == [("add_", 256, 128, 0)]
    assert counted(lambda: torch._foreach_add_([x], [y])) == [("_foreach_add_", 256, 128, 0)]  # which returns nothing
    assert counted(lambda: x.copy_(y)) == [("copy_", 128, 128, 0)]
    assert counted(lambda: torch.zeros_like(x)) == [("zeros_like", 0, 128, 0)]
    assert counted(lambda: torch.mm(x, y, out=empty(8, 8))) == [("mm", 256, 128, 2 * 8**3)]


def test_expanded_or_repeated_argument_is_read_more_than_once():
    x = empty(8, 1)
    assert counted(lambda: x.expand(8, 100) * 2) == [("mul", 2 * 8, 2 * 800, 0)]
    assert counted(lambda: x * x) == [("mul", 2 * 8, 2 * 8, 0)]


def test_host_work_or_a_view_is_priced():
    assert counted(lambda: (torch.ones(8) + 1, empty(4, 6).T.unflatten(0, (2, 3))[1].detach())) == []


def test_fused_function_is_priced_by_its_parts():
    gate, up = empty(8, 100, grad=True), empty(8, 100, grad=True)
    fused = one_kernel("silu and product")(lambda gate, up: F.silu(gate) * up)
    with Count() as count:
        result = fused(gate, up=up)
        result.backward(empty(8, 100))
    each = 2 * 800
    forward = Kernel("silu and product", "bfloat16 8×100", 2 * each, each)
    backward = Kernel("silu and product backward", "bfloat16 8×100", 3 * each, 2 * each)
    assert count.kernels == {forward: 1, backward: 1} and gate.grad.shape == up.grad.shape == (8, 100)


def test_product_in_a_fused_function_is_lost():
    fused = one_kernel("everything")(lambda a, b: (a @ b).exp())
    with pytest.raises(AssertionError, match="everything cannot be one kernel"), Count():
        fused(empty(4, 4), empty(4, 4))


def test_fused_function_changes_outside_of_a_count():
    x = torch.tensor([1.0], requires_grad=True)
    one_kernel("square")(lambda x: x * x)(x).backward()
    assert x.grad == 2


def test_product_without_a_rule_counts_no_operations():
    with pytest.raises(AssertionError, match="no rule counts the operations of aten.convolution"), Count():
        F.conv2d(empty(1, 3, 8, 8), empty(4, 3, 2, 2))


def test_kernel_costs_the_sum_of_its_three_times_or_the_wrong_one():
    card = Card(bandwidth=100.0, peak=1000.0, wide_peak=10.0)
    assert card.seconds(Kernel("", "", 150, 50, 1000), 0.5) == 2
    assert card.seconds(Kernel("", "", 150, 50, 3000), 0.5) == 3
    assert card.seconds(Kernel("", "", 10, 10, 100), 0.5) == 0.5


def test_fp32_product_is_priced_at_the_rate_of_half_precision():
    with Count() as count:
        empty(4, 4, dtype=torch.float32) @ empty(4, 4, dtype=torch.float32)
    (kernel,) = count.kernels
    assert Card(1e9, peak=128.0, wide_peak=32.0).seconds(kernel, 0) == 4


def test_decode_attention_reads_the_room_and_not_the_keys_in_use():
    q, k, v = empty(4, 6, 8), empty(400, 2, 8), empty(400, 2, 8)
    starts, used = empty(5, dtype=torch.int32), empty(4, dtype=torch.int32)

    def attention_fn():
        attention.FLASH_FORWARD(q, k, v, starts, starts, 1, 100, 0.0, False, False, seqused_k=used)

    small = 2 * q.numel() + 4 * 5 + 4 * 4  # queries, starts, lengths
    token = 2 * 2 * (2 * 8)  # bytes of keys and values
    ((name, whole, _, all_pairs),) = counted(attention_fn)
    ((_, some, written, pairs),) = counted(attention_fn, (k, 10), (v, 10))
    assert (name, whole, all_pairs) == ("_flash_attention_forward", small + 400 * token, 4 * 6 * 8 * 400)
    assert (some, pairs) == (small + 10 * token, 4 * 6 * 8 * 10)
    assert 0 <= written - (2 * q.numel() + 4 * 6 * 4) < 64, "outputs and log-sums, and a few numbers of the dice"


def test_packed_attention_counts_pairs_that_no_query_sees():
    q, k, v = empty(5, 6, 8, grad=True), empty(9, 2, 8, grad=True), empty(9, 2, 8, grad=True)
    segments = attention.Segments.of((3, 2), (3, 6), True, "meta")
    pairs = 1 + 2 + 3 + 5 + 6
    with as_on_cuda(), Count() as count:
        attention.packed_attention(q, k, v, segments).sum().backward()
    operations = {k.name: k.operations for k in count.kernels if k.operations}
    assert operations == {"_varlen_attn": 4 * pairs * 6 * 8, "_varlen_attn_backward": 10 * pairs * 6 * 8}


def test_norm_is_several_kernels():
    norm = torch.nn.RMSNorm(16, device="meta", dtype=torch.bfloat16)
    with as_on_cuda(), Count() as count:
        norm(empty(8, 16, grad=True)).backward(empty(8, 16))
    assert [k.name for k in count.kernels] == ["rms_norm", "rms_norm backward"]


def test_pricing_leaves_its_functions_behind():
    before = attention.packed_attention, attention.backend, F.rms_norm
    with as_on_cuda():
        assert attention.backend(empty(1)) == "varlen"
    assert before == (attention.packed_attention, attention.backend, F.rms_norm)


def test_memory_kept_counts_weights_or_one_storage_twice():
    x, weight = empty(8, 16, grad=True), empty(16, 16, grad=True)
    kept = Kept([weight])
    with kept:
        hidden = x @ weight  # keeps x
        hidden.exp() * x.view(16, 8).view(8, 16)  # keeps the exponential, which both need, and x again
    assert kept.bytes == 2 * 2 * 8 * 16


def tiny():
    tower = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=44, fullatt_block_indexes=(1,))
    sizes = dict(vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(eos_token_id=391, image_token_id=392)
    more = dict(num_key_value_heads=2, mrope_section=(2, 3, 3), vision=VisionConfig(out_hidden_size=64, **tower))
    return replace(PUBLISHED["Qwen2.5-VL-7B"], **sizes, **ids, **more)


def test_a_pass_can_no_longer_be_priced():
    kinds = "decode", "prefill", "training"
    text = roofline.report({"tiny": tiny()}, {"H100": roofline.CARDS["H100"]}, Sizes.tiny(), kinds, with_ops=True)
    table, *others = text.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[2].split(",")[0] for row in rows] == ["decode"] * 2 + ["prefill"] + ["training"] * 5
    assert all(len(row) == len(roofline.HEADER) and float(row[6]) <= float(row[7]) for row in rows)
    assert len(others) == 2 * len(rows)


def test_recomputed_blocks_cost_no_more_operations_or_keep_as_much():
    kept, some, again, *towers = roofline.passes(tiny(), Sizes.tiny(), ["training"])
    for less, more in ((kept, some), (some, again), towers):
        assert less.operations < more.operations and less.kept > more.kept
        assert less.needs_operations == more.needs_operations


@pytest.mark.slow
def test_a_real_shape_or_a_card_is_left_out(capsys):
    roofline.main(["--pass", "decode"])
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows[::3]] == [["| H100", "3B"], ["| H100", "7B"], ["| H200", "3B"], ["| H200", "7B"]]
    assert [row[2] for row in rows[:3]] == ["decode, 128 × 1", "decode, 32 × 4", "decode, 4 × 32"]
