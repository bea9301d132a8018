"""`halobench doctor`: versions, hardware, and the form that every operator takes on this machine, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WIDTH = 24
# What a missing package would bring, of those that a machine need not have.
OPTIONAL = {
    "triton": "our GPU kernels need it; torch for CUDA brings it",
    "flash-linear-attention": "GPU kernels of the delta rules, KDA, GLA and RWKV-7; pip install halobench[cuda]",
    "flash-attn": "only transformers uses it, for attn_implementation flash_attention_2; our softmax layers never",
}
RECURRENCES = ("scalar_decay", "vector_decay", "delta_rule", "dplr")


def doctor() -> None:
    """Versions, hardware, and which form of each operator runs here and why."""
    import torch

    from halobench.provenance import environment

    found = environment()
    versions = found["versions"]
    for name, version in versions.items():
        _line(name, version)
    for name, use in OPTIONAL.items():
        if name not in versions:
            _line(name, f"not installed ({use})")
    for name, value in found["hardware"].items():
        _line(name, value)
    gpu = torch.cuda.is_available()
    _line("device", "cuda" if gpu else "cpu: torch sees no GPU; tiny models run well, a 1.7B model does not")
    print(f"\nWhat `--kernels auto` runs for heads of 64 in {'bfloat16' if gpu else 'float32'}, and why:")
    for name, form in forms(torch.device("cuda" if gpu else "cpu")):
        _line(name, form)


def forms(device: torch.device) -> list[tuple[str, str]]:
    """(operator, its form and the reason) on a device, in the dtype that models have there by default."""
    import torch

    from halobench.kernels.backend import explain

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    like = torch.zeros(1, 256, 8, 64, dtype=dtype, device=device)
    return [
        ("attention prefill", _attention(lambda: _attend(like))),
        ("attention decode", explain("decode_attention", like)),
        *[(name, explain(name, like)) for name in RECURRENCES],
        ("window attention", f"torch (in pieces as wide as the window, each by {_attention(lambda: _window(like))})"),
        ("loss", explain("loss", like)),
    ]


def _attend(like: torch.Tensor) -> None:
    from halobench.kernels.attention.softmax import attend

    attend(like, like, like, scale=0.125)


def _window(like: torch.Tensor) -> None:
    import torch

    from halobench.kernels.window_attention.chunked import window_attention

    positions = torch.arange(like.shape[1], device=like.device)[None]
    window_attention(
        like, like, like, positions_BT=positions, padding_mask_BT=None, memory=None, keep_memory=False, window=64,
        sinks=4, scale=0.125,
    )  # fmt: skip


def _attention(run: Callable[[], None]) -> str:
    """The kernel that torch's attention really picks in `run`."""
    from halobench.tasks.kernels_seen import attention_kernels

    with attention_kernels() as seen:
        run()
    return f"sdpa (torch picked its kernel {', '.join(sorted(seen))})"


def _line(name: str, value: object) -> None:
    print(f"{name:>{WIDTH}}  {value}")
