"""Completions attend to their prompt and themselves as one call over all keys with a mask has them do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import trainers.suffix_attention as module
from trainers.suffix_attention import SuffixRows, can_merge, masked_attention, suffix_attention

CPU = torch.device("cpu")
Attention = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _tried_anew() -> Iterator[None]:
    can_merge.cache_clear()
    yield
    can_merge.cache_clear()


def inputs(prefix: int, num_tokens: int, *, heads: int = 6, kv_heads: int = 2, dim: int = 8) -> list[Tensor]:
    """Query, key and value as a model has them: views whose heads lie beside each other in memory."""
    torch.manual_seed(0)
    shapes = ((num_tokens, heads), (prefix + num_tokens, kv_heads), (prefix + num_tokens, kv_heads))
    return [torch.randn(1, *shape, dim).transpose(1, 2).requires_grad_() for shape in shapes]


def result_and_gradients(attend: Attention, given: list[Tensor], rows: SuffixRows) -> list[Tensor]:
    out = attend(*given, rows, 0.3)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, given, slope)]


LENGTHS = [(5,), (3, 3), (7, 1, 12), (0, 4, 0, 2), (2,) * 16]


@pytest.mark.parametrize("prefix", [1, 33, 600])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_both_ways_are_equal(lengths: tuple[int, ...], prefix: int) -> None:
    """One completion and many, of unlike lengths and of none, after short and long prompts; query heads in groups."""
    rows, given = SuffixRows.of(lengths, CPU), inputs(prefix, sum(lengths))
    assert can_merge(CPU, torch.float32, 8)
    mine, theirs = (result_and_gradients(attend, given, rows) for attend in (suffix_attention, masked_attention))
    for found, wanted in zip(mine, theirs, strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_the_mask_is_that_of_completions_apart() -> None:
    """What both ways are held against: every completion by itself after the prompt, by torch's causal attention."""
    rows = SuffixRows.of((4, 3), CPU)
    query, key, value = inputs(9, 7, heads=2)
    found = masked_attention(query, key, value, rows, 0.3)
    for tokens in (slice(0, 4), slice(4, 7)):
        own_keys = [torch.cat([part[:, :, :9], part[:, :, 9:][:, :, tokens]], dim=2) for part in (key, value)]
        length = tokens.stop - tokens.start
        seen = torch.ones(length, 9 + length, dtype=torch.bool).tril(9)
        alone = torch.nn.functional.scaled_dot_product_attention(query[:, :, tokens], *own_keys, seen, scale=0.3)
        torch.testing.assert_close(found[:, :, tokens], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_lies_as_near_to_fp32_as_one_call_does(dtype: torch.dtype) -> None:
    rows, given = SuffixRows.of((40, 31, 8), CPU), inputs(200, 79)
    half = [part.detach().to(dtype).requires_grad_() for part in given]
    truth = result_and_gradients(masked_attention, [part.detach().float().requires_grad_() for part in half], rows)
    assert can_merge(CPU, dtype, 8)
    merged, masked = (result_and_gradients(attend, half, rows) for attend in (suffix_attention, masked_attention))
    for mine, theirs, wanted in zip(merged, masked, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine.float() - wanted).norm() < 2 * (theirs.float() - wanted).norm()


def test_completions_cannot_see_each_other() -> None:
    rows = SuffixRows.of((6, 9, 4), CPU)
    query, key, value = (part.detach() for part in inputs(20, 19))
    before = suffix_attention(query, key, value, rows, 0.3)
    changed = [part.clone() for part in (key, value)]
    for part in changed:
        part[:, :, 26:35] += 1  # the second one's
    after = suffix_attention(query, *changed, rows, 0.3)
    moved = (after - before).abs().amax(dim=(0, 1, 3))
    assert bool((moved[6:15] > 1e-3).all())
    assert not moved[:6].any() and not moved[15:].any()


def test_nothing_is_copied_for_completions_or_heads() -> None:
    """What is kept for the backward pass: the inputs themselves, the result and the log-sum-exp. No mask."""
    rows, given = SuffixRows.of((5,) * 8, CPU), inputs(300, 40)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
        suffix_attention(*given, rows, 0.3)
    own = {part.untyped_storage().data_ptr() for part in given}
    new = [tensor.numel() for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert sorted(new) == [6 * 40, 6 * 40 * 8]


# ---------------------------------------------------------------------------------------------- where kernels fail
def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("No available kernel.\nmore about it")


def off(*given: Any, **options: Any) -> Any:
    out, lse, further = honest(*given, **options)
    return out, lse + 0.1 * options["causal"], further


honest = module._attend


@pytest.mark.parametrize(("kernel", "says"), [(refuse, "No available kernel."), (off, "they are off by 0.")])
def test_a_kernel_that_does_not_serve_is_not_used(
    kernel: Any, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not there, or with another log-sum-exp than it should have: the same result by the mask, said once."""
    rows, given = SuffixRows.of((7, 1, 12), CPU), inputs(33, 20)
    wanted = result_and_gradients(masked_attention, given, rows)
    monkeypatch.setattr(module, "_attend", kernel)
    with caplog.at_level(logging.INFO, logger="vtg"):
        found = [result_and_gradients(suffix_attention, given, rows) for _ in range(2)]
    assert all(torch.equal(mine, theirs) for run in found for mine, theirs in zip(run, wanted, strict=True))
    assert caplog.text.count("attend by a mask, as attention kernels on cpu in float32 do not serve") == 1
    assert says in caplog.text


def test_a_backward_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._attend_backward
    monkeypatch.setattr(module, "_attend_backward", lambda *a, **k: tuple(1.01 * part for part in right(*a, **k)))
    assert not can_merge(CPU, torch.float32, 8)


def test_the_trial_leaves_the_random_state_and_works_anywhere() -> None:
    """In a pass without gradients, in inference mode, under autocast."""
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert can_merge(CPU, torch.float32, 32)
    can_merge.cache_clear()
    with torch.no_grad():
        assert can_merge(CPU, torch.float32, 32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dim", [8, 64, 128])  # 128: the real models
@pytest.mark.parametrize("dtype", module.TOLERANCE)
def test_the_trial_leaves_room_for_rounding(dtype: torch.dtype, dim: int) -> None:
    assert module._merge_error(CPU, dtype, dim) < module.TOLERANCE[dtype] / 2


def test_other_types_and_dropout_take_the_mask() -> None:
    rows, given = SuffixRows.of((3, 2), CPU), inputs(4, 5)
    assert not can_merge(CPU, torch.float64, 8)
    torch.manual_seed(1)
    dropped = suffix_attention(*given, rows, 0.3, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(dropped, masked_attention(*given, rows, 0.3, dropout=0.5))
    assert not torch.allclose(dropped, suffix_attention(*given, rows, 0.3))


def test_the_cuda_kernels_are_called_as_they_are_declared() -> None:
    """Without a GPU: torch checks names, arguments and shapes on tensors that hold no numbers."""
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, heads, length, 64, dtype=torch.bfloat16, device="cuda")
            for heads, length in ((4, 8), (4, 20), (4, 20))
        )
        out, lse, further = module._attend(query, key, value, causal=False, scaling=0.1)
        slopes = module._attend_backward(out, query, key, value, out, lse, further, causal=False, scaling=0.1)
    assert out.shape == query.shape and lse.shape == (1, 4, 8) and lse.dtype == torch.float32
    assert [slope.shape for slope in slopes] == [query.shape, key.shape, value.shape]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert can_merge(torch.device("cuda"), torch.bfloat16, 128)
    rows = SuffixRows.of((40, 31, 8), torch.device("cuda"))
    half = [part.detach().cuda().bfloat16().requires_grad_() for part in inputs(200, 79, heads=8, dim=128)]
    wide = [part.detach().float().requires_grad_() for part in half]
    slope = torch.linspace(-1, 1, half[0].numel(), device="cuda").view(half[0].shape)
    runs = []
    for attend, given in ((suffix_attention, half), (masked_attention, half), (masked_attention, wide)):
        out = attend(*given, rows, 0.1)
        runs.append([out, *torch.autograd.grad(out, given, slope.to(out.dtype))])
    for mine, theirs, wanted in zip(*runs, strict=True):
        assert (mine.float() - wanted).norm() < 2 * (theirs.float() - wanted).norm()
