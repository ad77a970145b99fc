"""Predicted GPU times must count what a kernel moves and computes, no more and no less."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import report

from mmsr import attention, lora
from mmsr.pretrained.published import SIZES  # noqa: E402
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


def test_product_into_a_place_counts_no_operations_or_reads_nothing_there():
    x, weight, place = empty(8, 16), empty(32, 16), empty(8, 100)[:, :32]
    work = ("addmm_", 2 * (8 * 16 + 32 * 16 + 8 * 32), 2 * 8 * 32, 2 * 8 * 16 * 32)
    assert counted(lambda: place.addmm_(x, weight.T)) == [work]


def test_copy_that_a_product_makes_first_is_forgotten():
    """A vector is added by the product's own kernel, but not to columns of a wider tensor."""
    x, weight, bias, whole = empty(8, 16), empty(32, 16), empty(32), empty(8, 32)

    def names(work):
        return [name for name, *_ in counted(work)]

    assert names(lambda: torch.addmm(bias, x, weight.T)) == ["addmm"]
    assert names(lambda: torch.addmm(whole, x, weight.T)) == ["copy before addmm", "addmm"]
    columns = empty(8, 100)[:, :32]
    assert names(lambda: torch.addmm(bias, x, weight.T, out=columns)) == ["copy before addmm", "addmm"]


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
    return replace(SIZES["Qwen2.5-VL-7B"], **sizes, **ids, **more)


def test_a_pass_can_no_longer_be_priced():
    cards = {"H100": roofline.CARDS["H100"]}
    text = roofline.report({"tiny": tiny()}, cards, Sizes.tiny(), roofline.KINDS, rank=4, with_ops=True)
    table, *others = text.split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    kinds = [row[2].split(",")[0] for row in rows]
    full = ["decode"] * 2 + ["prefill"] + ["training"] * 5
    by_lora = ["decode"] * 2 + ["prefill"] + ["training"] * 3 + ["KL reference"]
    assert kinds == full + by_lora
    assert all(len(row) == len(roofline.HEADER) and float(row[6]) <= float(row[7]) for row in rows)
    beside_full = [bool(row[-1]) for row in rows]
    assert beside_full == [False] * len(full) + [True] * (len(by_lora) - 1) + [False]
    assert len(others) == 2 * len(rows)


def test_recomputed_blocks_cost_no_more_operations_or_keep_as_much():
    kept, some, again, *towers = roofline.passes(tiny(), Sizes.tiny(), ["training"])
    for less, more in ((kept, some), (some, again), towers):
        assert less.operations < more.operations and less.kept > more.kept
        assert less.needs_operations == more.needs_operations


# ---- adapters


def test_frozen_weight_gets_a_gradient_or_the_frozen_tower_a_pass():
    kept, _, _, reference = roofline.passes(tiny(), Sizes.tiny(), ["training"], rank=1)
    full, *_ = roofline.passes(tiny(), Sizes.tiny(), ["training"])
    assert "training" in kept.name and "KL reference" in reference.name
    assert 0.6 * full.operations < kept.operations < 0.75 * full.operations  # two thirds, and some attention
    assert 0.6 * full.needs_operations < kept.needs_operations < 0.75 * full.needs_operations
    assert 0.4 * kept.operations < reference.operations < 0.5 * kept.operations


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["3B", "7B"])
def test_adapters_cost_more_than_15_per_cent_of_some_decode_step(shape):
    config = roofline.SHAPES[shape]
    full = roofline.passes(config, Sizes(), ["decode"])
    by_lora = roofline.passes_by_lora(config, Sizes(), ["decode"], 64, full)
    assert len(by_lora) == 3
    for name, card in roofline.CARDS.items():
        for one in by_lora:
            assert 0.05 < roofline.to_full(card, one) <= 0.15, (name, one.name)


@pytest.mark.slow
def test_a_real_shape_or_a_card_is_left_out(capsys):
    roofline.main(["--pass", "decode", "--lora", "0"])
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows[::3]] == [["| H100", "3B"], ["| H100", "7B"], ["| H200", "3B"], ["| H200", "7B"]]
    assert [row[2] for row in rows[:3]] == ["decode, 128 × 1", "decode, 32 × 4", "decode, 4 × 32"]


# ---- what bfloat16 loses


def arrives(found, before, change):
    """How much of a `change` of outputs is in their difference: 1, all of it; 0, nothing."""
    return float(((found.float() - before.float()) * change).sum() / (change * change).sum())


def test_first_step_of_adapters_is_lost_in_a_rounded_product(record_property):
    """One step of Adam at the recipe's rate, on random numbers of 7B's width: every number of B moves by the rate."""
    torch.manual_seed(0)
    width, rank, rate, scale = 3584, 64, 2e-5, 0.5
    x = torch.randn(64, width).bfloat16()
    layer = torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(0, 0.02)
    before = F.linear(x, layer.weight)
    a = (2 * torch.rand(rank, width) - 1) / width**0.5
    b = rate * torch.randn(width, rank).sign()
    change = scale * (x.float() @ a.T) @ b.T
    added_last = torch.addmm(before, F.linear(x, a.bfloat16()), b.bfloat16().T, alpha=scale)
    merged = torch.addmm(layer.weight.float(), b, a, alpha=scale).bfloat16()
    lora.add_adapter(layer, a, b, scale)
    layer.requires_grad_(False)
    shares = {
        "added to a rounded product": arrives(added_last, before, change),
        "merged into the weights": arrives(F.linear(x, merged), before, change),
        "as here": arrives(layer(x), before, change),
    }
    for what, share in shares.items():
        report(record_property, f"of one step, {what}", share)
    same = (merged == layer.weight).float().mean().item()
    report(record_property, "merged weights that are as before", same)
    assert shares["as here"] > 0.9 and max(list(shares.values())[:2]) < 0.1 and same > 0.98
