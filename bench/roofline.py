"""GPU time of the program's own passes at the real shapes, predicted without a GPU in less than a minute.

    python bench/roofline.py                                              # every card, shape and pass
    python bench/roofline.py --shape 7B --card H100 --pass decode --ops   # and which kernels take the time
    python bench/roofline.py --lora 16                                    # adapters of another rank than 64

The real code runs on meta tensors, which have shapes but no values. A dispatch mode sees every operator that would
launch a kernel, and counts the bytes that it reads and writes and its floating-point operations. A kernel takes the
longest of three times: bytes over bandwidth, operations over peak, and a launch. Views are free. The share of the limit
is that of a decode step replayed from a graph, and of every other pass launched by the host. Each pass is priced twice,
with all weights trained and by LoRA: adapters on every linear layer of the decoder, beside frozen weights.

So the prediction is what the code would take if every kernel ran at the rate of the card: a real kernel is slower. What
else it leaves out: second kernels behind one operator (a sort, a sum over many rows), data that a cache still holds,
waiting for the host, that its copies are slow, the optimizer, and adding up the gradients of several micro-batches.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import FunctionType
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Sequence
from unittest.mock import patch

import common
import torch
import torch.nn.functional as F
from gpu_day import LORA
from gpu_rows import SHAPES, Bench, Sizes, add_adapters
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

from mmsr import attention, engine, lora, model, vision
from mmsr.engine import GeneratedSequence, SequenceGroup
from mmsr.episode import Episode
from mmsr.model import ModelConfig, VLModel
from mmsr.pack import Pack, pack, split_into_micro_batches
from mmsr.plan import GIB
from mmsr.system.chunked_log_probs import chunked_log_probs
from mmsr.update import Features, ImageFeatures, KnownFeatures

META = torch.device("meta")
MEMBERS = 1, 4, 32  # of a prompt, in a decode batch
MICRO_TOKENS = 16384
HEADER = (
    "card", "shape", "pass", "kernels", "GB", "Tflop", "captured, ms", "eager, ms", "limit, ms", "of the limit",
    "kept, GiB", "to full",
)  # fmt: skip
OPS_HEADER = "kernel", "result", "number", "GB", "Tflop", "ms", "share"
OPS = 25  # rows of `--ops` for a pass


# ---- prices


class Kernel(NamedTuple):
    """What one launch moves and computes. `result`: type and shape of what it writes, for the reader."""

    name: str
    result: str
    read: int  # bytes
    written: int  # bytes
    operations: int = 0  # floating-point, of products only: nothing else comes near a peak
    wide: bool = False  # a product of fp32 factors

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Card:
    """Rates of a GPU, per second, and seconds of a launch."""

    bandwidth: float  # bytes
    peak: float = 700e12  # operations of products of bf16 factors
    wide_peak: float = 50e12  # and of fp32 factors, which torch does not round to TF32
    eager: float = 5e-6  # launched by the host
    replayed: float = 1.5e-6  # launched from a captured graph

    def seconds(self, kernel: Kernel, launch: float) -> float:
        peak = self.wide_peak if kernel.wide else self.peak
        return max(kernel.moved / self.bandwidth, kernel.operations / peak, launch)


CARDS = {"H100": Card(3.0e12), "H200": Card(4.3e12)}


# ---- counting


class Count(TorchDispatchMode):
    """Counts, in `kernels`, what would be launched on a GPU while it is entered.

    `keys_used`: pairs of a store of keys or values and how many of its tokens one call of attention reads, all
    sequences together. On the device those lengths are values, which meta tensors lack; without a word every token of
    the store is read.
    """

    active: Count | None = None

    def __init__(self, keys_used: Iterable[tuple[Tensor, float]] = ()):
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.fusing: str | None = None  # the fused kernel of the function whose operators are running now
        self.keys_used = {_storage(store): (store, keys) for store, keys in keys_used}
        self.pairs: dict[int, tuple[Tensor, int]] = {}  # by the storage of `cu_q`: see `tell_lengths`

    def __enter__(self) -> Count:
        assert Count.active is None
        Count.active = self
        return super().__enter__()

    def __exit__(self, *error) -> None:
        Count.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        call = Call(self, op, dict(zip((a.name for a in op._schema.arguments), args)) | kwargs, result)
        if not op.is_view and call.name not in FREE and call.on_device:
            self._add_call(call)
        return result

    def _add_call(self, call: Call) -> None:
        product = call.name in OPERATIONS or call.op.overloadpacket in flop_registry
        assert not product or call.name in OPERATIONS, f"no rule counts the operations of {call.op}"
        if self.fusing:
            assert not product, f"{self.fusing} cannot be one kernel: it has a product, {call.op}"
            return
        if call.name == "addmm" and _copies_first(call):
            self.add("copy before addmm", call.tensors("self"), call.written)
        read, written = RULES.get(call.name, _everything)(call)
        operations = OPERATIONS[call.name](call) if product else 0
        wide = product and call.read[0].dtype == torch.float32
        self.kernels[Kernel(call.name, _describe(call.written), round(read), round(written), operations, wide)] += 1

    def add(self, name: str, read: Iterable[Tensor], written: Sequence[Tensor]) -> None:
        """One more kernel, which reads and writes these tensors once each."""
        self.kernels[Kernel(name, _describe(written), _bytes(read), _bytes(written))] += 1

    def tell_lengths(self, segments: attention.Segments) -> None:
        """Remember how many pairs of query and key the segments with these `cu_q` have."""
        pairs = sum(_pairs(q, k, segments.causal) for q, k in zip(segments.q_lens, segments.k_lens))
        self.pairs[_storage(segments.cu_q)] = segments.cu_q, int(pairs)


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by their names, its result, and the tensors in both."""

    count: Count
    op: Any
    arguments: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return self.op._schema.name.split("::")[1]

    def tensors(self, *names: str) -> list[Tensor]:
        """Those in the arguments of these names."""
        return _tensors([self.arguments.get(name) for name in names])

    @property
    def read(self) -> list[Tensor]:
        """Those in the arguments, but for `out=`."""
        return self.tensors(*(a.name for a in self.op._schema.arguments if not a.is_out))

    @property
    def written(self) -> list[Tensor]:
        """Those in the result, or the arguments that change where there is none."""
        changed = (a.name for a in self.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
        return _tensors(self.result) or self.tensors(*changed)

    @property
    def on_device(self) -> bool:
        return any(x.device == META for x in [*self.read, *self.written])


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _storage(x: Tensor) -> int:
    """Which memory it is a view of: a number that no other storage has while this one lives."""
    return x.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the distinct ones among these; what is only expanded is in memory once."""
    distinct = {id(x): x for x in tensors}
    return sum(_elements(x) * x.element_size() for x in distinct.values())


def _elements(x: Tensor) -> int:
    return math.prod(size for size, stride in zip(x.shape, x.stride()) if stride or not size)


def _describe(written: Sequence[Tensor]) -> str:
    if not written:
        return ""
    largest = max(written, key=Tensor.numel)
    return f"{str(largest.dtype).removeprefix('torch.')} {'×'.join(map(str, largest.shape))}"


# ---- rules: bytes read and written by a call


def _everything(call: Call) -> tuple[float, float]:
    """Every argument once, every result once: right for elementwise kernels, products and reductions."""
    return _bytes(call.read), _bytes(call.written)


def _fill(call: Call) -> tuple[float, float]:
    """An argument tells the shape and is not read."""
    return 0, _bytes(call.written)


def _copy(call: Call) -> tuple[float, float]:
    return _bytes(call.tensors("src")), _bytes(call.written)


def _gather(call: Call) -> tuple[float, float]:
    """Of the source only the chosen elements are read, and the index."""
    index = call.tensors("indices", "index")
    return _bytes(call.written) + _bytes(index), _bytes(call.written)


def _scatter(call: Call) -> tuple[float, float]:
    """Only the chosen places are written, and read where something is added. Else than in place, all is copied too."""
    values, index = call.tensors("values", "source", "src", "value"), call.tensors("indices", "index")
    (target,) = call.tensors("self")
    places = max(x.numel() for x in [*values, *index]) * target.element_size()
    adds = "add" in call.name or call.arguments.get("accumulate")
    copied = 0 if call.name.endswith("_") else _bytes([target])
    return copied + _bytes([*values, *index]) + (places if adds else 0), copied + places


def _back_to_whole(call: Call) -> tuple[float, float]:
    """The gradient of a part: zeros everywhere, then the part."""
    gradient = _bytes(call.tensors("grad_output"))
    return gradient, gradient + _bytes(call.written)


def _keys(call: Call) -> float:
    """How many tokens of keys one call of attention reads."""
    (key,) = call.tensors("key")
    _, used = call.count.keys_used.get(_storage(key), (None, math.prod(key.shape[:-2])))
    return used


def _flash(call: Call) -> tuple[float, float]:
    """Queries, the keys and values in use, and what comes out: scores never leave the chip."""
    (key,), others = call.tensors("key"), call.tensors("query", *STARTS, "cu_seq_k", "cum_seq_k", "seqused_k")
    token = math.prod(key.shape[-2:]) * key.element_size()
    return 2 * _keys(call) * token + _bytes(others), _bytes(call.written)


def _pairs(queries: float, keys: float, causal: bool) -> float:
    """Pairs of a query and a key that it sees; the last query sees every key."""
    return queries * keys - (queries * (queries - 1) / 2 if causal else 0)


def _flash_operations(call: Call) -> int:
    """Two products for each pair, five in the backward pass. Lengths that nobody told are taken as equal."""
    (query,), (starts,) = call.tensors("query"), call.tensors(*STARTS)
    told = call.count.pairs.get(_storage(starts))
    sequences = starts.numel() - 1
    lengths = len(query) / sequences, _keys(call) / sequences
    pairs = told[1] if told else sequences * _pairs(*lengths, call.arguments.get("is_causal", False))
    products = 5 if "backward" in call.name else 2
    return round(2 * products * pairs * query.shape[1] * query.shape[2])


def _copies_first(call: Call) -> bool:
    """Whether what is added to a product is copied to its place before: all but a vector, into a contiguous result.

    As aten/src/ATen/native/cuda/Blas.cpp does it. An `addmm_` adds to what is in its place already.
    """
    (added,) = call.tensors("self")
    return added.dim() > 1 or not call.written[0].is_contiguous()


def _product_operations(call: Call) -> int:
    left = (call.tensors("mat1", "batch1") or call.tensors("self"))[0]
    return 2 * call.written[0].numel() * left.shape[-1]


STARTS = "cu_seq_q", "cum_seq_q"  # where each sequence's queries begin, as varlen_attn and as its kernel call it

# Operators that launch nothing beside the views.
FREE = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_",
}  # fmt: skip
RULES: dict[str, Callable[[Call], tuple[float, float]]] = {
    "copy_": _copy,
    **dict.fromkeys(("fill_", "zero_", "full_like", "ones_like", "zeros_like"), _fill),
    **dict.fromkeys(("new_full", "new_ones", "new_zeros"), _fill),
    **dict.fromkeys(("embedding", "gather", "index", "index_select", "_unsafe_index"), _gather),
    **dict.fromkeys(("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"), _scatter),
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_"), _scatter),
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_"), _scatter),
    **dict.fromkeys(("select_backward", "slice_backward"), _back_to_whole),
    **dict.fromkeys(("_varlen_attn", "_flash_attention_forward"), _flash),
}
OPERATIONS: dict[str, Callable[[Call], int]] = {
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "bmm", "mm"), _product_operations),
    **dict.fromkeys(("_varlen_attn", "_flash_attention_forward", "_varlen_attn_backward"), _flash_operations),
}


# ---- functions that are one kernel on CUDA


def one_kernel(name: str) -> Callable[[Callable], Callable]:
    """Decorator: price a function as one fused kernel, and its gradient as another.

    The kernel reads the function's tensors and writes its results, once each. The gradient's reads the same tensors and
    the gradients of the results, and writes those of the tensors. Outside a `Count` nothing changes. The function may
    have no product in it, and returns a tensor or a tuple of them.
    """

    def fuse(function: Callable) -> Callable:
        @wraps(function)
        def fused(*args, **kwargs):
            if Count.active is None or Count.active.fusing:
                return function(*args, **kwargs)
            leaves, tree = tree_flatten((args, kwargs))

            def run(*tensors: Tensor):
                left = iter(tensors)
                given = [next(left) if isinstance(x, Tensor) else x for x in leaves]
                args, kwargs = tree_unflatten(given, tree)
                return function(*args, **kwargs)

            return _OneKernel.apply(name, run, *_tensors(leaves))

        return fused

    return fuse


class _OneKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, run: Callable, *tensors: Tensor):
        ctx.save_for_backward(*tensors)
        ctx.name, count = name, Count.active
        count.fusing = name
        try:
            result = run(*tensors)
        finally:
            count.fusing = None
        count.add(name, tensors, _tensors(result))
        return result

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        found = [torch.empty_like(x) if want else None for x, want in zip(tensors, wanted)]
        Count.active.add(f"{ctx.name} backward", _tensors([tensors, gradients]), _tensors(found))
        return None, None, *found


# Functions, by module and name, that one kernel computes on CUDA and several on the meta device: one of torch's own,
# and those that the program has torch.compile fuse (mmsr/system/fuse.py).
TORCHS: tuple[tuple[Any, str], ...] = ((F, "rms_norm"),)
FUSED: tuple[tuple[Any, str], ...] = (
    *TORCHS,
    (vision, "rotate"),
    (vision, "gated"),
    (attention, "_merge_kernel_parts"),
    (engine, "probabilities"),
)


def _tell_and_attend(q: Tensor, k: Tensor, v: Tensor, segments: attention.Segments, *rest, **more) -> Tensor:
    Count.active.tell_lengths(segments)
    return packed_attention(q, k, v, segments, *rest, **more)


packed_attention = attention.packed_attention


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Run what would run on CUDA: torch's flash kernel, its precision, and the functions of FUSED as one kernel."""
    instead = {
        packed_attention: _tell_and_attend,
        attention.backend: lambda q: "varlen",
        attention._sum_dtype: lambda q: q.dtype,
        **{getattr(home, name): one_kernel(name)(getattr(home, name)) for home, name in FUSED},
    }
    homes = [module for name, module in sys.modules.items() if name.startswith("mmsr.")]
    homes += [home for home, _ in FUSED if home not in homes]
    with ExitStack() as patches:
        for home in homes:
            for name, value in list(vars(home).items()):
                if isinstance(value, FunctionType) and value in instead:
                    patches.enter_context(patch.object(home, name, instead[value]))
        yield


# ---- passes


class Kept(saved_tensors_hooks):
    """Bytes of the distinct storages that autograd keeps for a backward pass, without those of `parameters`."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.known = {_storage(x) for x in parameters}
        self.found: dict[int, Tensor] = {}
        super().__init__(self._keep, lambda x: x)

    def _keep(self, x: Tensor) -> Tensor:
        x = x.detach()
        if x.device == META and _storage(x) not in self.known:
            self.found[_storage(x)] = x
        return x

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.found.values())


@dataclass
class Pass:
    """Kernels of one pass, what no pass of its kind can do without, and bytes kept for the backward pass."""

    name: str
    kernels: Counter[Kernel]
    needs_bytes: float = 0
    needs_operations: float = 0
    kept: int | None = None
    captured: bool = field(default=False, kw_only=True)  # the product replays it from a graph
    full: Pass | None = field(default=None, kw_only=True)  # of a pass by LoRA: the same with all weights trained

    def seconds(self, card: Card, launch: float) -> float:
        return sum(n * card.seconds(kernel, launch) for kernel, n in self.kernels.items())

    def limit(self, card: Card) -> float:
        return max(self.needs_bytes / card.bandwidth, self.needs_operations / card.peak)

    def launch(self, card: Card) -> float:
        return card.replayed if self.captured else card.eager

    @property
    def operations(self) -> int:
        return sum(n * kernel.operations for kernel, n in self.kernels.items())


KINDS = "decode", "prefill", "training"


def passes(config: ModelConfig, sizes: Sizes, wanted: Sequence[str] = KINDS, rank: int = 0) -> list[Pass]:
    """Every pass of one shape. `sizes`: those of a step. `rank`: of adapters; 0: all weights are trained."""
    bench, policy = Bench(META, sizes, torch.bfloat16, {}), meta_model(config, rank)
    found: list[Pass] = []
    with as_on_cuda():
        if "decode" in wanted:
            batches = [(sizes.decode_batch // sequences, sequences) for sequences in MEMBERS]
            found += [decode(bench, policy, *batch) for batch in batches if all(batch)]
        if "prefill" in wanted:
            found.append(prefill(bench, policy))
        if "training" in wanted:
            found += training(bench, policy)
    return found


def passes_by_lora(config: ModelConfig, sizes: Sizes, wanted: Sequence[str], rank: int, full: list[Pass]) -> list[Pass]:
    """Every pass with adapters of this rank, beside those with all weights trained, `full`."""
    by_name = {one.name: one for one in full}
    found = passes(config, sizes, wanted, rank)
    for one in found:
        one.full = by_name.get(one.name)
        one.name += f", LoRA {rank}"
    return found


def tokens_a_second(
    work: str, options: dict[str, Any], config: ModelConfig, sizes: Sizes, limits: dict[str, float]
) -> float:
    """Of a row of gpu_day.py, at the copy bandwidth (bytes/s) and matrix peak (operations/s) that it has measured.

    Of a decode batch, or of the tokens trained in an update of decoder, head and tower without the optimizer.
    """
    bench, policy = Bench(META, sizes, torch.bfloat16, {}), meta_model(config, options.get("rank", 0))
    card = Card(limits["bandwidth"], limits["matrix"])
    with as_on_cuda():
        if work == "decode":
            found = decode(bench, policy, sizes.decode_batch // options["sequences"], options["sequences"])
            return sizes.decode_batch / found.seconds(card, card.replayed if options["capture"] else card.eager)
        tokens, found = update(bench, policy, policy.config.num_hidden_layers * options["recompute"])
        return tokens / sum(one.seconds(card, card.eager) for one in found)


def meta_model(config: ModelConfig, rank: int = 0) -> VLModel:
    with META:
        policy = config.build().to(torch.bfloat16)
    model.rotary(torch.zeros((3, 1), device=META), config)  # which keeps its frequencies from here on
    return add_adapters(policy, rank)


def decode(bench: Bench, policy: VLModel, prompts: int, sequences: int) -> Pass:
    """A decode step of full slots, half-way through the longest responses."""
    policy = lora.for_sampling(policy, policy, bench.dtype)
    s, slots = bench.sizes, prompts * sequences
    groups = []
    for _ in range(prompts):
        generated = [GeneratedSequence(key) for key in range(sequences)]
        groups.append(SequenceGroup([0] * s.prompt, [], generated))
    engine = bench.engine(policy, slots, s.turn, s.most, capture=False)
    engine.submit(groups)
    half = (2 * s.turn + s.result) / 2
    stores = (engine.cache.prefix, prompts * s.prompt), (engine.cache.suffix, slots * half)
    with torch.no_grad(), Count([(x, keys) for store, keys in stores for x in tree_leaves(store)]) as count:
        engine.decode_step(slots, len(engine.layout.prefix_lens), sequences, engine.cache.room)
    needs = bench.decode_bytes(policy, sum(keys for _, keys in stores))
    return Pass(f"decode, {prompts} × {sequences}", count.kernels, needs, captured=True)


def prefill(bench: Bench, policy: VLModel) -> Pass:
    """One pass over new prompts and their pictures. Nothing in it is computed twice, so it needs what it has."""
    policy = lora.for_sampling(policy, policy, bench.dtype)
    s = bench.sizes
    engine = bench.engine(policy, s.questions * s.group, s.turn, s.most, capture=False)
    prompts = min(s.questions, engine.prefill_tokens // s.prompt)
    groups = bench.groups(policy.config, prompts, s.group)
    engine.submit(groups)
    for row, group in enumerate(groups):
        group.row = row
    with torch.no_grad(), Count() as count:
        engine._prefill_prompts(groups)
    done = Pass(f"prefill, {prompts} prompts", count.kernels)
    done.needs_operations = done.operations
    return done


def training(bench: Bench, policy: VLModel) -> list[Pass]:
    """A micro-batch's passes with no block, two thirds of the blocks, and every block recomputed.

    Then the tower's, or with adapters that of the KL reference, which is the policy without them.
    """
    blocks = policy.config.num_hidden_layers
    some = blocks - max(1, blocks // 3)
    (_, (kept, *tower)), (_, (mixed, *_)), (_, (again, *tower_again)) = (
        update(bench, policy, recomputed) for recomputed in (0, some, blocks)
    )
    found = [kept, mixed, again, *tower, *tower_again]
    return found if tower else [*found, reference(bench, policy)]


def update(bench: Bench, policy: VLModel, recomputed: int) -> tuple[int, list[Pass]]:
    """Forward and backward pass of a micro-batch: its tokens, then decoder and head, then the tower if it is trained.

    `recomputed`: the first so many blocks of the decoder; the tower's where that is all of them.
    """
    blocks = policy.config.num_hidden_layers
    episodes, batch = micro_batch(bench, policy)
    policy.checkpoint_blocks, policy.kept_blocks = True, blocks - recomputed
    how = {0: "kept", blocks: "recomputed"}.get(recomputed, f"{recomputed} of {blocks} blocks recomputed")
    features, tower = tower_passes(policy, batch, how, recompute=recomputed == blocks)
    kernels, kept = decoder_pass(bench, policy, batch, features)
    tokens = len(batch.input_ids)
    needs = bench.decoder_operations(policy, episodes, tokens)
    name = f"training, {tokens:,} tokens, {how}"
    return tokens, [Pass(name, kernels, needs_operations=needs, kept=kept), *tower]


def micro_batch(bench: Bench, policy: VLModel) -> tuple[list[Episode], Pack]:
    s = bench.sizes
    questions = min(s.questions, MICRO_TOKENS // (s.prompt + s.group * (2 * s.turn + s.result)))
    episodes = bench.episodes(policy.config, questions)
    return episodes, pack(episodes, split_into_micro_batches(episodes, MICRO_TOKENS)[0], META)


def reference(bench: Bench, policy: VLModel) -> Pass:
    """A forward pass without adapters. Nothing in it is computed twice, so it needs what it has."""
    _, batch = micro_batch(bench, policy)
    features = known_features(policy, batch)
    with torch.no_grad(), lora.as_reference(policy), Count() as count:
        log_probs(bench, policy, batch, features)
    done = Pass(f"KL reference, {len(batch.input_ids):,} tokens", count.kernels)
    done.needs_operations = done.operations
    return done


def tower_passes(policy: VLModel, batch: Pack, how: str, recompute: bool) -> tuple[Features, list[Pass]]:
    """The features of a batch, and the tower's pass, if it is trained: else the features are those of the rollouts."""
    if not lora.trains_tower(policy):
        return known_features(policy, batch), []
    policy.visual.checkpoint_blocks = False
    plain, _, _ = tower_pass(policy, batch)
    policy.visual.checkpoint_blocks = recompute
    kernels, kept, features = tower_pass(policy, batch)
    distinct = {image.key: image for image in batch.images}
    patches = sum(len(image.patches) for image in distinct.values())
    last = Pass(f"training, tower, {patches:,} patches, {how}", kernels, kept=kept)
    last.needs_operations = Pass("", plain).operations
    return features, [last]


def known_features(policy: VLModel, batch: Pack) -> KnownFeatures:
    """Those that the rollouts have encoded: nobody counts them again."""
    distinct = {image.key: image for image in batch.images}
    with Count(), torch.no_grad():
        features = policy.encode_images(list(distinct.values()))  # (M, d)
    known = dict(zip(distinct, features.split([image.tokens for image in distinct.values()])))
    return KnownFeatures(known, encoded=0)


def tower_pass(policy: VLModel, batch: Pack) -> tuple[Counter[Kernel], int, ImageFeatures]:
    """The pictures of a batch through the tower and back."""
    kept = Kept(policy.parameters())
    with Count() as count:
        with kept:
            features = ImageFeatures(policy, batch.images, train=True)
        features.backward()
    policy.zero_grad(set_to_none=True)
    return count.kernels, kept.bytes, features


def decoder_pass(bench: Bench, policy: VLModel, batch: Pack, features: Features) -> tuple[Counter[Kernel], int]:
    """Log-probabilities of a batch's trained tokens, and the gradient of their sum."""
    kept = Kept(policy.parameters())
    with Count() as count:
        with kept:
            logps = log_probs(bench, policy, batch, features)
        logps.sum().backward()
    policy.zero_grad(set_to_none=True)
    return count.kernels, kept.bytes


def log_probs(bench: Bench, policy: VLModel, batch: Pack, features: Features) -> Tensor:
    """As `Trainer.log_probs` has them (R,)."""
    suppressed = bench.suppressed(policy.config)

    def read(hidden: Tensor, head: Tensor):
        rows = hidden[batch.logits_index]
        return chunked_log_probs(model.logits, rows, head, batch.targets, 1.0, suppressed)

    places = batch.input_ids, batch.position_ids, batch.attention_fn, features.of(batch), batch.image_index
    logps, _ = policy(*places, head_fn=read)
    return logps


# ---- tables


def row(card: Card, one: Pass) -> tuple[str, ...]:
    """The numbers of one pass on one card, as HEADER has them behind the names."""
    captured, eager, limit = one.seconds(card, card.replayed), one.seconds(card, card.eager), one.limit(card)
    moved = sum(n * kernel.moved for kernel, n in one.kernels.items())
    return (
        f"{sum(one.kernels.values()):,}",
        f"{moved / 1e9:,.1f}",
        f"{one.operations / 1e12:,.1f}",
        f"{1e3 * captured:,.1f}",
        f"{1e3 * eager:,.1f}",
        f"{1e3 * limit:,.1f}",
        f"{limit / one.seconds(card, one.launch(card)):.0%}",
        "" if one.kept is None else f"{one.kept / GIB:.1f}",
        "" if one.full is None else f"{to_full(card, one):+.1%}",
    )


def to_full(card: Card, one: Pass) -> float:
    """By how much of its time a pass by LoRA is longer than the one with all weights trained."""
    launch = one.launch(card)
    return one.seconds(card, launch) / one.full.seconds(card, launch) - 1


def ops(card: Card, one: Pass) -> list[tuple[str, ...]]:
    """Kernels alike in name and result, those that take most of a pass first, and a last row for all others."""
    launch, sums = one.launch(card), {}
    for kernel, n in one.kernels.items():
        each = n, n * kernel.moved, n * kernel.operations, n * card.seconds(kernel, launch)
        known = sums.get((kernel.name, kernel.result), (0, 0, 0, 0))
        sums[kernel.name, kernel.result] = tuple(map(sum, zip(known, each)))
    ranked = sorted(sums.items(), key=lambda item: -item[1][3])
    shown, others = ranked[:OPS], [numbers for _, numbers in ranked[OPS:]]
    if others:
        shown.append((("all others", ""), tuple(map(sum, zip(*others)))))
    whole = one.seconds(card, launch)
    return [
        (*names, f"{n:,}", f"{moved / 1e9:,.2f}", f"{done / 1e12:,.2f}", f"{1e3 * t:,.2f}", f"{t / whole:.1%}")
        for names, (n, moved, done, t) in shown
    ]


def report(
    shapes: dict[str, ModelConfig],
    cards: dict[str, Card],
    sizes: Sizes,
    wanted: Sequence[str],
    rank: int = LORA,
    with_ops: bool = False,
) -> str:
    """The table of all passes, without and with adapters of this rank; 0: without.

    `with_ops`: a table of kernels for each of its rows behind it.
    """
    counted = {shape: passes(config, sizes, wanted) for shape, config in shapes.items()}
    for shape, config in shapes.items():
        if rank:
            counted[shape] += passes_by_lora(config, sizes, wanted, rank, full=counted[shape])
    every = [(card, shape, one) for card in cards for shape, found in counted.items() for one in found]
    parts = [common.table(HEADER, [(card, shape, one.name, *row(cards[card], one)) for card, shape, one in every])]
    if with_ops:
        for card, shape, one in every:
            how = "captured" if one.captured else "eager"
            parts.append(f"{card}, {shape}, {one.name}, {how}:\n\n" + common.table(OPS_HEADER, ops(cards[card], one)))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", "--shapes", nargs="+", choices=SHAPES, default=("3B", "7B"), help="these shapes (3B 7B)"
    )
    parser.add_argument("--card", choices=CARDS, help="one card only")
    parser.add_argument("--pass", dest="kind", choices=KINDS, help="one kind of pass only")
    parser.add_argument("--lora", type=int, default=LORA, metavar="R", help=f"rank of the adapters ({LORA}); 0: none")
    parser.add_argument("--unfused", action="store_true", help="as without torch.compile")
    parser.add_argument("--unstacked", action="store_true", help="decode as by `LoRALinear.forward`, layer by layer")
    parser.add_argument("--ops", action="store_true", help=f"the {OPS} kernels that take most of each pass")
    options = parser.parse_args(argv)
    shapes = {name: SHAPES[name] for name in options.shape}
    cards = {name: card for name, card in CARDS.items() if options.card in (None, name)}
    wanted = [kind for kind in KINDS if options.kind in (None, kind)]
    with ExitStack() as patches:
        if options.unfused:
            patches.enter_context(patch(f"{__name__}.FUSED", TORCHS))
        if options.unstacked:
            patches.enter_context(patch.object(lora, "SAME_INPUT", ()))
        print(report(shapes, cards, Sizes(), wanted, options.lora, options.ops))


if __name__ == "__main__":
    main()
