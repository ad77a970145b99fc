"""Functions that are one kernel on CUDA: the compiler takes them whole, and what it makes of them is the same."""

import shutil
import warnings

import pytest
import torch
import torch._dynamo.testing
from helpers import largest_difference, report

from mmsr import attention, engine, vision
from mmsr.system import fuse
from mmsr.system.fuse import compiles, fused


def rotation(n: int):
    x, angles = torch.randn(n, 3, 8), torch.randn(n, 1, 4)
    return x.requires_grad_(), angles.cos(), angles.sin()


def mlp(n: int):
    return torch.randn(n, 12, requires_grad=True), torch.randn(n, 12, requires_grad=True)


def parts(n: int):
    place = torch.randperm(2 * n)[:n]
    return place, torch.randn(2 * n, 3, 2, 8), torch.randn(2 * n, 3, 2), torch.randn(n, 3, 2, 8), torch.randn(n, 3, 2)


def logps(n: int):
    return (torch.randn(n, 30).log_softmax(-1),)


FUNCTIONS = [
    (vision.rotate, rotation),
    (vision.gated, mlp),
    (attention._merge_kernel_parts, parts),
    (engine.probabilities, logps),
]


def values_and_gradients(function, arguments):
    out = function(*arguments)
    wanted = [x for x in arguments if x.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out, *(torch.autograd.grad((out * weights).sum(), wanted) if wanted else ())]


def compiled_and_plain(backend: str, function, arguments) -> float:
    """Largest difference of values and gradients, over some sizes."""
    torch._dynamo.reset()
    compiled = torch.compile(function.__wrapped__, backend=backend, fullgraph=True, dynamic=True)
    worst = 0.0
    for n in (5, 64):
        torch.manual_seed(n)
        given = arguments(n)
        for ours, plain in zip(values_and_gradients(compiled, given), values_and_gradients(function, given)):
            assert ours.dtype == plain.dtype
            worst = max(worst, largest_difference(ours, plain))
    return worst


@pytest.mark.first_is_quick
@pytest.mark.parametrize("function, arguments", FUNCTIONS)
def test_a_fused_function_cannot_be_traced_whole(function, arguments):
    assert compiled_and_plain("aot_eager", function, arguments) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which the compiler wants on a CPU")
@pytest.mark.parametrize("function, arguments", FUNCTIONS)
def test_a_fused_function_computes_something_else(function, arguments, record_property):
    """By the compiler that makes CUDA's kernels, here for the CPU."""
    worst = compiled_and_plain("inductor", function, arguments)
    report(record_property, f"fused against plain, {function.__name__}", worst)
    assert worst < 2e-6


def test_bits_on_the_cpu_are_a_compilers(monkeypatch):
    """The same machine must give the same bits whether it has a compiler or not."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    for function, arguments in FUNCTIONS:
        function(*arguments(3))


def test_a_machine_without_a_compiler_ends_the_run(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(torch, "ones", lambda *size, device, **more: torch.zeros(*size, **more))
    compiles.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"not fused \(Failed to find C compiler"):
        assert not compiles()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compiles(), "said once"
    compiles.cache_clear()


def test_a_sampler_that_comes_first_turns_fusing_off(monkeypatch):
    """The trial has a backward pass, and sampling runs without gradients."""
    ones = torch.ones
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    monkeypatch.setattr(torch, "ones", lambda *size, device, **more: ones(*size, **more))
    compiles.cache_clear()
    with torch.no_grad():
        assert compiles()
    compiles.cache_clear()


def test_a_function_is_compiled_again_for_every_call(monkeypatch):
    """What a GPU would do, with tensors that say they are on one."""
    made = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(fuse, "compiles", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, **how: made.append(how) or function)
    double = fused(lambda x: 2 * x)
    for _ in range(3):
        assert double(torch.ones(2).as_subclass(OnGpu)).tolist() == [2, 2]
    assert made == [dict(dynamic=True)]


@pytest.mark.slow
def test_rotation_is_compiled_for_every_batch_until_the_compiler_gives_up():
    """The tower's and the decoder's, sampling and training, heads and key heads, one token and many."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    rotate = torch.compile(vision.rotate.__wrapped__, backend=counter, dynamic=True)

    def decoder(n: int, train: bool) -> None:
        hidden = torch.randn(n, 32, 8).bfloat16().requires_grad_(train)
        angles = torch.randn(n, 1, 4).bfloat16()
        for heads in (hidden[:, :28].contiguous(), hidden[:, :4].contiguous()):
            rotate(heads, angles.cos(), angles.sin())

    def tower(n: int, train: bool) -> None:
        qkv = torch.randn(n, 3, 16, 8).bfloat16().requires_grad_(train)
        angles = torch.randn(n, 1, 4)
        for heads in qkv.unbind(1)[:2]:
            rotate(heads, angles.cos(), angles.sin())

    for step in range(3):
        with torch.no_grad():
            tower(400 + step, False)
            decoder(900 + step, False)
            for slots in (64, 32, 16, 8, 1):
                decoder(slots, False)
        for batch in (700, 701, 650):
            tower(300 + batch, True)
            decoder(batch + step, True)
    print(f"{counter.frame_count} compilations")
    assert counter.frame_count <= torch._dynamo.config.recompile_limit - 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("function, arguments", FUNCTIONS)
def test_cudas_fused_kernel_computes_something_else(function, arguments, record_property):
    """The functions as the program calls them there, against their plain form on the CPU."""
    assert compiles(), "torch.compile does not work on this machine: all is right, but slower"
    torch.manual_seed(0)
    here = arguments(64)
    there = [x.detach().cuda().requires_grad_(x.requires_grad) for x in here]
    plain = values_and_gradients(function, here)
    worst = max(largest_difference(a.cpu(), b) for a, b in zip(values_and_gradients(function, there), plain))
    report(record_property, f"fused on cuda against plain, {function.__name__}", worst)
    assert worst < 1e-5
