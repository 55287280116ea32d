"""Cases of context-parallel MLA, for the checks of parallel_ranks."""

from dataclasses import dataclass, field, replace

import parallel_ranks
import torch
import torch.distributed as dist
from sharded_caches import largest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from triton_attn import mla_prefill, reference
from triton_attn.parallel import context_parallel_mla_prefill, latent


@dataclass(frozen=True, kw_only=True)
class Case(parallel_ranks.Case):
    """A call of whole sequences. head_dim and head_dim_v are those of q_nope and of a head of out."""

    num_heads_q: int = 3
    head_dim_v: int = 12
    rope: int = 8
    rank: int = 32
    options: dict = field(default_factory=dict)

    keys = "dkv_latent", "dk_pe"

    def elements(self, ranks=1):
        heads = self.num_heads_q // ranks
        of_queries = dict(dq_nope=heads * self.head_dim, dq_pe=heads * self.rope)
        return of_queries | dict(dkv_latent=self.rank, dk_pe=self.rope)

    @property
    def head_dims(self):
        return latent.LATENTS.costs_of((self.num_heads_q, self.head_dim, self.rope, self.rank, self.head_dim_v))

    def inputs(self):
        return Inputs(self)

    operator = "context_parallel_mla_prefill"

    @property
    def passes(self):
        return latent


class Inputs(parallel_ranks.WholeTensors):
    names = "out", "lse", "dq_nope", "dq_pe", "dkv_latent", "dk_pe", "dw_uk", "dw_uv"

    def __init__(self, case):
        super().__init__(case)
        shapes = (case.num_heads_q, case.head_dim), (case.num_heads_q, case.rope), (case.rank,), (case.rope,)
        self.rows = [self.draw(*case.rows, *shape) for shape in shapes]
        dims = case.head_dim, case.head_dim_v
        self.parameters = [self.draw(case.num_heads_q, dim, case.rank) * case.rank**-0.5 for dim in dims]
        self.dout, self.dlse = self.draw(*case.rows, case.num_heads_q, case.head_dim_v), self.draw_dlse()

    def attend_to(self, leaves, mesh):
        """out and lse of this rank."""
        options = self.case.options
        return context_parallel_mla_prefill(*leaves, **self.packing, **self.placing(mesh), return_lse=True, **options)

    def by(self, attend, dtype):
        """out, lse and gradients of one process."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in (*self.rows, *self.parameters)]
        options = {name: x for name, x in self.case.options.items() if name in ("causal", "softmax_scale")}
        if self.case.documents is not None:
            cu_seqlens, most = self.case.cu_seqlens, self.case.rows[0]
            lengths = dict(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=most, max_seqlen_k=most)
            options |= lengths
        outputs = attend(*leaves, return_lse=True, **options)
        return *(x.detach() for x in outputs), *self.gradients(outputs, leaves)

    def of_one_process(self):
        """In fp64, and what shows the accuracy that the inputs allow: torch, and one process with the kernels, which
        round keys and values."""
        exact = self.by(reference.mla_prefill, torch.float64)
        return exact, [self.by(attend, self.case.dtype) for attend in (reference.mla_prefill, mla_prefill)]

    def rounding(self, out):
        """The rounding errors of gradients whose large terms cancel, as of rows that see one key."""
        products = self.dout.double() * out.double()
        if not products.numel():
            return {}
        q_nope, q_pe, latents, rope_keys = (x.double() for x in self.rows)
        w_uk, _ = (x.double() for x in self.parameters)
        k_nope = torch.einsum("...r, hdr -> ...hd", latents, w_uk)
        scale = self.case.options.get("softmax_scale", (self.case.head_dim + self.case.rope) ** -0.5)
        row = torch.linalg.vector_norm(products, dim=-1).max().item() * 4 * torch.finfo(torch.float32).eps * scale
        sums = row * self.case.rows[-1] ** 0.5  # over the queries that see a key
        of_k_nope, of_k_pe = sums * largest(q_nope), sums * largest(q_pe)
        return dict(
            dq_nope=row * largest(k_nope),
            dq_pe=row * largest(rope_keys),
            dk_pe=of_k_pe * self.case.num_heads_q**0.5,
            dkv_latent=of_k_nope * torch.linalg.vector_norm(w_uk, dim=(0, 1)).max().item(),
            dw_uk=of_k_nope * largest(latents) * self.case.batch**0.5,
        )


class Layer(torch.nn.Module):
    """MLA with weights that FSDP2 may shard."""

    def __init__(self, inputs):
        super().__init__()
        self.w_uk, self.w_uv = (torch.nn.Parameter(x.clone()) for x in inputs.parameters)

    def forward(self, rows, inputs, mesh):
        return inputs.attend_to((*rows, self.w_uk, self.w_uv), mesh)[0]


def check_fsdp(case, mesh):
    """Weights that FSDP2 shards over one dimension of a mesh have the gradients of one process, whose batches are those
    of the ranks of this dimension, and whose sequences are sharded over the other. The layer is checkpointed."""
    grid = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("dp", "cp"))
    batches = [replace(case, seed=case.seed + i).inputs() for i in range(2)]
    for inputs in batches:
        inputs.parameters = batches[0].parameters
    layer, inputs = Layer(batches[0]), batches[grid.get_local_rank("dp")]
    fully_shard(layer, mesh=grid["dp"])
    rows = [inputs.own(x, grid["cp"]).requires_grad_() for x in inputs.rows]
    out = checkpoint(layer, rows, inputs, grid["cp"], use_reentrant=False)
    out.backward(inputs.own(inputs.dout, grid["cp"]))
    exact = [replace(each.case, dlse=False).inputs() for each in batches]
    for each in exact:
        each.parameters = batches[0].parameters
    exact = [each.by(reference.mla_prefill, torch.float64) for each in exact]
    for name, parameter, index in (("w_uk", layer.w_uk, 6), ("w_uv", layer.w_uv, 7)):
        gradient = 2 * parameter.grad.full_tensor()  # FSDP has averaged over "dp"
        dist.all_reduce(gradient, group=grid["cp"].get_group())
        expected = exact[0][index] + exact[1][index]
        torch.testing.assert_close(gradient.double(), expected, atol=1e-4, rtol=1e-4, msg=name)
