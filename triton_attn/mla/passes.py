"""The backward pass of a prefill as a function: callers that save their own tensors need no autograd of ours."""

import torch
from torch import Tensor

from .._host.backend import use_kernel
from .._host.call import Lengths
from .._host.observers import without_autocast
from . import reference
from .api import PrefillCall


@without_autocast
def backward_pass(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    tensors: tuple[Tensor, ...],
    *,
    causal: bool,
    softmax_scale: float,
    max_workspace_bytes: int,
) -> list[Tensor]:
    """Gradients of the six tensors of a dense `mla_prefill`, of which out and lse are the results.

    Those of kv_latent and k_pe are in fp32 (fp64 for fp64), so that callers can add them up.
    """
    if use_kernel(dout):
        from .autograd import prefill_gradients  # the package can be imported without triton

        results = dout if dout.stride(-1) == 1 else dout.contiguous(), dlse, out, lse
        lengths = Lengths(None, None, out.shape[1], tensors[2].shape[1])
        call = PrefillCall(*tensors, lengths, softmax_scale, causal)
        return prefill_gradients(call, results, max_workspace_bytes, [True] * len(tensors))
    dtype = torch.promote_types(dout.dtype, torch.float32)
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    with torch.enable_grad():
        results = reference.mla_prefill(*leaves, causal=causal, softmax_scale=softmax_scale, return_lse=True)
    of_results = dout.to(dtype), torch.zeros_like(lse) if dlse is None else dlse
    return list(torch.autograd.grad(results, leaves, of_results))
