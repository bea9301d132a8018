"""Which form runs, and why; and that our arguments reach flash-linear-attention under its names and in its order.

Where there is no GPU its functions are stood in for by stubs with the real names and parameters (0.6), which compute
with our definitions: a wrong sign, scale or order changes the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from halobench.errors import UserError
from halobench.kernels import backend as backends
from halobench.kernels.backend import choose, compute_dtype, explain
from halobench.kernels.delta_rule.fla import delta_rule_fla
from halobench.kernels.delta_rule.naive import delta_rule_naive
from halobench.kernels.delta_rule.recurrence import delta_rule
from halobench.kernels.dplr.fla import dplr_fla
from halobench.kernels.dplr.naive import dplr_naive
from halobench.kernels.dplr.recurrence import dplr
from halobench.kernels.scalar_decay.fla import scalar_decay_fla
from halobench.kernels.scalar_decay.naive import scalar_decay_naive
from halobench.kernels.scalar_decay.recurrence import scalar_decay
from halobench.kernels.vector_decay.fla import vector_decay_fla
from halobench.kernels.vector_decay.naive import vector_decay_naive
from halobench.kernels.vector_decay.recurrence import vector_decay
from tests.kernel_forms import H, K, V, assert_same, draw, log_decay, state, unit

OPERATORS = ("scalar_decay", "vector_decay", "delta_rule", "dplr")
RECURRENCE: dict[str, Callable[..., Any]] = {
    "scalar_decay": scalar_decay, "vector_decay": vector_decay, "delta_rule": delta_rule, "dplr": dplr,
}  # fmt: skip
NAIVE: dict[str, Callable[..., Any]] = {
    "scalar_decay": scalar_decay_naive, "vector_decay": vector_decay_naive,
    "delta_rule": delta_rule_naive, "dplr": dplr_naive,
}  # fmt: skip
HOOK: dict[str, Callable[..., Any]] = {
    "scalar_decay": scalar_decay_fla, "vector_decay": vector_decay_fla, "delta_rule": delta_rule_fla, "dplr": dplr_fla,
}  # fmt: skip


def arguments(case: str, tokens: int, key: int = K, value: int = V) -> tuple[str, list[Tensor | None]]:
    """The operator and its inputs for a case such as "delta_rule per channel"."""
    operator, _, kind = case.partition(" ")
    q, k, v = draw(tokens, key, seed=1), unit(draw(tokens, key, seed=2)), draw(tokens, value, seed=3)
    decay = {
        "constant": -torch.tensor([0.9, 0.05, 0.001], dtype=torch.float64),
        "per token": log_decay(tokens),
        "per head": log_decay(tokens),
        "per channel": log_decay(tokens, key),
        "no decay": None,
    }[kind]
    if operator == "delta_rule":
        return operator, [q, k, v, draw(tokens, seed=4).sigmoid(), decay]
    if operator == "dplr":
        kappa = unit(draw(tokens, key, seed=5))
        return operator, [q, k, v, -kappa, kappa * draw(tokens, key, seed=6).sigmoid(), decay]
    return operator, [q, k, v, decay]


CASES = (
    "scalar_decay constant",
    "scalar_decay per token",
    "vector_decay per channel",
    "delta_rule no decay",
    "delta_rule per head",
    "delta_rule per channel",
    "dplr per channel",
)


def to(tensors: list[Tensor | None], *target: Any) -> list[Tensor | None]:
    return [None if x is None else x.to(*target) for x in tensors]


def on_gpu(dtype: torch.dtype = torch.bfloat16, key: int = 64, requires_grad: bool = False) -> Any:
    """What `choose` looks at of a CUDA tensor."""
    return SimpleNamespace(
        device=torch.device("cuda", 0), dtype=dtype, shape=(1, 8, 2, key), requires_grad=requires_grad
    )


# The parameters of fla 0.6.0, in order; None of them may be passed under another name.
def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    assert (g is None) != (g_gamma is None) and not kwargs and not state_v_first
    assert g_gamma is None or not g_gamma.requires_grad, "fla has no gradient of g_gamma"
    decay = g if g_gamma is None else g_gamma
    return finish(scalar_decay_naive(q, k, v, decay, scale=scale, initial_state_BHKV=initial_state), output_final_state)


def chunk_gla(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None,
):  # fmt: skip
    assert q.shape == k.shape == g.shape
    return finish(vector_decay_naive(q, k, v, g, scale=scale, initial_state_BHKV=initial_state), output_final_state)


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    assert q.dtype == k.dtype == v.dtype != torch.float32 and not use_qk_l2norm_in_kernel and not kwargs
    return finish(
        delta_rule_naive(q, k, v, beta, None, scale=scale, initial_state_BHKV=initial_state), output_final_state
    )


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None, **kwargs,
):  # fmt: skip
    assert g.ndim == 3 and not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or state_v_first or kwargs)
    return finish(delta_rule_naive(q, k, v, beta, g, scale=scale, initial_state_BHKV=initial_state), output_final_state)


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
    lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, cp_context=None, use_graph=False, max_num_seqs=None, **kwargs,
):  # fmt: skip
    assert g.ndim == 4 and not (use_qk_l2norm_in_kernel or use_gate_in_kernel or use_beta_sigmoid_in_kernel)
    assert not (state_v_first or return_intermediate_states or safe_gate or kwargs)
    return finish(delta_rule_naive(q, k, v, beta, g, scale=scale, initial_state_BHKV=initial_state), output_final_state)


def chunk_dplr_delta_rule(
    q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    safe_gate=False, chunk_size=None, disable_recompute=False, cp_context=None, lower_bound=None, **kwargs,
):  # fmt: skip
    assert not kwargs and not safe_gate
    return finish(dplr_naive(q, k, v, a, b, gk, scale=scale, initial_state_BHKV=initial_state), output_final_state)


def finish(result: tuple[Tensor, Tensor], output_final_state: bool) -> tuple[Tensor, Tensor | None]:
    o, last = result
    assert last.dtype == torch.float32
    return o, last if output_final_state else None


STUBS = {
    "simple_gla": chunk_simple_gla,
    "gla": chunk_gla,
    "delta_rule": chunk_delta_rule,
    "gated_delta_rule": chunk_gated_delta_rule,
    "kda": chunk_kda,
    "generalized_delta_rule": chunk_dplr_delta_rule,
}


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package, whose functions are the stubs above."""
    package, ops = ModuleType("fla"), ModuleType("fla.ops")
    package.__version__ = "0.6.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops", ops)
    for name, stub in STUBS.items():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, stub.__name__, stub)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


@pytest.fixture
def no_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fla", None)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An H200 and Triton 3.7.1, as far as `choose` looks."""
    triton = ModuleType("triton")
    triton.__version__ = "3.7.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    properties = SimpleNamespace(shared_memory_per_block_optin=232_448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return triton


@pytest.fixture
def no_triton(hopper: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initial", [False, True])
def test_arguments_reach_fla_under_its_names_and_give_the_definition(
    fla: ModuleType, case: str, dtype: torch.dtype, initial: bool
) -> None:
    operator, exact = arguments(case, 9)
    tensors = to(exact, dtype)
    start = state().float() if initial else None
    expected = NAIVE[operator](*tensors, scale=0.3, initial_state_BHKV=start)
    got = HOOK[operator](*tensors, scale=0.3, initial_state_BHKV=start)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert_same(got, expected, 1e-5)


def test_a_constant_decay_that_is_trained_reaches_fla_as_one_with_a_gradient(fla: ModuleType) -> None:
    _, (q, k, v, g) = arguments("scalar_decay constant", 9)
    leaf = g.float().requires_grad_()
    o, _ = scalar_decay_fla(q.float(), k.float(), v.float(), leaf, scale=0.3)
    (gradient,) = torch.autograd.grad(o.square().sum(), leaf)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_is_fla_for_a_cuda_tensor_where_fla_imports_and_ours_cannot_run(
    fla: ModuleType, no_triton: None, operator: str
) -> None:
    assert choose(operator, "auto", on_gpu()) == choose(operator, "fla", on_gpu()) == "fla"
    assert choose(operator, "torch", on_gpu()) == "torch" and choose(operator, "naive", on_gpu()) == "naive"
    told = explain(operator, on_gpu())
    assert told.startswith("fla (torch.bfloat16 on cuda:0, flash-linear-attention 0.6.0; not triton: ")


def test_auto_is_our_triton_kernel_on_cuda_before_fla(fla: ModuleType, hopper: ModuleType) -> None:
    assert choose("scalar_decay", "auto", on_gpu()) == choose("scalar_decay", "triton", on_gpu()) == "triton"
    assert choose("scalar_decay", "fla", on_gpu()) == "fla"
    assert explain("scalar_decay", on_gpu()) == "triton (torch.bfloat16 on cuda:0, triton 3.7.1)"
    assert choose("scalar_decay", "auto", on_gpu(key=256)) == "fla"
    assert "not triton: the size of a head is 256" in explain("scalar_decay", on_gpu(key=256))
    exact = on_gpu(torch.float32)
    assert choose("scalar_decay", "auto", exact) == "fla" and choose("scalar_decay", "triton", exact) == "triton"


@pytest.mark.parametrize(
    ("operator", "like", "reason"),
    [
        ("scalar_decay", torch.zeros(1, 8, 2, 64), "on cpu"),
        ("scalar_decay", on_gpu(torch.float64), "float64"),
        ("scalar_decay", on_gpu(key=256), "size of a head is 256"),
        ("vector_decay", on_gpu(), "no Triton kernel of ours, which scalar_decay, "),
    ],
)
def test_triton_asked_for_by_name_where_it_cannot_run_is_a_user_error_with_the_reason(
    hopper: ModuleType, operator: str, like: Tensor, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        choose(operator, "triton", like)


def test_values_too_large_for_our_kernel_go_to_another_form(
    fla: ModuleType, hopper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [choose("scalar_decay", "auto", on_gpu(), size) for size in (64, 256)] == ["triton", "fla"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, v = torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 256)
    with pytest.raises(UserError, match="size of a head is 256"):
        scalar_decay(q, q, v, torch.zeros(1), scale=1.0, backend="triton")


def test_a_gpu_with_little_shared_memory_does_not_run_our_kernel(
    hopper: ModuleType, no_fla: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = SimpleNamespace(shared_memory_per_block_optin=101_376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    assert choose("scalar_decay", "auto", on_gpu()) == "torch"
    assert "101376 bytes of shared memory" in explain("scalar_decay", on_gpu())


def test_without_triton_ours_is_refused_by_name(no_triton: None) -> None:
    with pytest.raises(UserError, match="triton is not installed"):
        choose("scalar_decay", "triton", on_gpu())


def test_the_interpreter_is_taken_when_asked_for_and_never_by_itself(
    hopper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    like = torch.zeros(1, 8, 2, 64)
    assert choose("scalar_decay", "triton", like) == "triton" and choose("scalar_decay", "auto", like) == "torch"


@pytest.mark.parametrize(
    ("operator", "like", "reason"),
    [
        ("vector_decay", on_gpu(torch.float64), "float64"),
        ("dplr", on_gpu(torch.float32), "float32"),
        ("delta_rule", on_gpu(key=512), "key size is 512"),
        ("scalar_decay", torch.zeros(1, 8, 2, 64), "on cpu"),
    ],
)
def test_what_fla_cannot_compute_runs_in_torch_and_says_why(
    fla: ModuleType, no_triton: None, operator: str, like: Tensor, reason: str
) -> None:
    assert choose(operator, "auto", like) == "torch"
    assert reason in explain(operator, like)
    with pytest.raises(UserError, match=reason):
        choose(operator, "fla", like)


def test_gradients_that_triton_miscompiles_on_hopper_are_not_taken_in_fla(fla: ModuleType, hopper: ModuleType) -> None:
    for version, form in (("3.7.0", "torch"), ("3.7.1", "fla")):
        hopper.__version__ = version  # type: ignore[attr-defined]
        assert choose("delta_rule", "auto", on_gpu(requires_grad=True)) == form
        assert choose("delta_rule", "auto", on_gpu()) == "fla"
        assert choose("scalar_decay", "auto", on_gpu(requires_grad=True)) == "triton"


def test_without_fla_auto_is_torch_and_asking_for_it_says_how_to_get_it(no_fla: None) -> None:
    assert choose("dplr", "auto", on_gpu()) == "torch"
    assert "not installed" in explain("dplr", on_gpu())
    with pytest.raises(UserError, match=r"not installed.*pip install halobench\[cuda\]"):
        choose("dplr", "fla", on_gpu())


def test_a_misspelt_backend_is_a_user_error_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'torch'"):
        choose("dplr", "troch", torch.zeros(1, 1, 1, 1))


def test_fla_is_not_imported_for_a_cpu_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    operator, tensors = arguments("vector_decay per channel", 3)
    RECURRENCE[operator](*tensors, scale=1.0)


def test_autocast_replaces_fp32_and_nothing_else() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(torch.zeros(1)) == torch.bfloat16
        assert compute_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert compute_dtype(torch.zeros(1)) == torch.float32


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "torch", "naive"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_backend_is_the_same_recurrence(case: str, backend: str, tokens: int) -> None:
    operator, tensors = arguments(case, tokens)
    expected = NAIVE[operator](*tensors, scale=0.3, initial_state_BHKV=state())
    assert_same(RECURRENCE[operator](*tensors, scale=0.3, initial_state_BHKV=state(), backend=backend), expected)
    expected = NAIVE[operator](*tensors, scale=0.3)
    assert_same(RECURRENCE[operator](*tensors, scale=0.3, backend=backend), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [65, 512])
def test_fla_on_a_gpu_equals_the_definition_with_its_gradients(case: str, tokens: int) -> None:
    pytest.importorskip("fla")
    operator, exact = arguments(case, tokens, key=64, value=64)
    tensors = to(exact, "cuda", torch.bfloat16)
    if tensors[-1] is not None:
        tensors[-1] = tensors[-1].float()
    start = torch.randn(2, H, 64, 64, device="cuda")
    results = []
    for run, inputs in (
        (HOOK[operator], tensors),
        (NAIVE[operator], to(tensors, torch.float64)),
    ):
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        first = start.to(torch.promote_types(inputs[0].dtype, torch.float32)).requires_grad_()  # type: ignore[union-attr]
        o, last = run(*leaves, scale=0.125, initial_state_BHKV=first)
        gradients = torch.autograd.grad(o.sum() + last.square().sum(), [x for x in (*leaves, first) if x is not None])
        results.append([o, last, *gradients])
    for got, expected in zip(*results, strict=True):
        assert (got.double() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_torch_form_on_a_gpu_equals_the_definition(case: str) -> None:
    operator, exact = arguments(case, 130)
    expected = NAIVE[operator](*exact, scale=0.3)
    got = RECURRENCE[operator](*to(exact, "cuda"), scale=0.3, backend="torch")
    assert_same([x.cpu() for x in got], expected)
