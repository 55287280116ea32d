"""A double of SGLang 0.5.23 for its attention back ends: the names that triton_attn.interop.sglang imports and the
objects that SGLang passes, with the same attributes, arguments, shapes and dtypes. It is written from reading that
version and has no code of it. SGLang itself does not import on a CPU.
"""

import enum
import sys
from types import ModuleType, SimpleNamespace

import torch

Mode = enum.IntEnum(
    "ForwardMode", "EXTEND DECODE MIXED IDLE TARGET_VERIFY DRAFT_EXTEND_V2 PREBUILT SPLIT_PREFILL DLLM_EXTEND"
)
Mode.is_decode = lambda self: self is Mode.DECODE
Mode.is_idle = lambda self: self is Mode.IDLE
AttentionType = enum.Enum("AttentionType", "DECODER DECODER_BIDIRECTIONAL ENCODER_ONLY")
PARALLEL = SimpleNamespace(dcp_enabled=False)


class AttentionBackend:
    """The methods that a runner calls, with the defaults of the abstract class."""

    needs_cpu_seq_lens = True
    forward_metadata = None

    def init_forward_metadata(self, forward_batch):
        self.init_forward_metadata_out_graph(forward_batch)
        self.init_forward_metadata_in_graph(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch, in_capture=False):
        pass

    def init_forward_metadata_in_graph(self, forward_batch):
        pass

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        raise NotImplementedError

    def get_cuda_graph_seq_len_fill_value(self):
        raise NotImplementedError

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if forward_batch.forward_mode.is_idle():
            return q.new_empty(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        run = self.forward_decode if forward_batch.forward_mode.is_decode() else self.forward_extend
        return run(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def forward_decode(self, *args, **kwargs):
        raise NotImplementedError

    def forward_extend(self, *args, **kwargs):
        raise NotImplementedError


class KVWriteLoc:
    """Where new tokens go: `loc` in the pool, `swa_loc` in the pool of window layers."""

    def __init__(self, loc, swa_loc=None):
        self.loc, self.swa_loc = loc, swa_loc

    @classmethod
    def for_batch(cls, forward_batch, *, swa_loc=None, full_loc=None):
        return cls(forward_batch.out_cache_loc, swa_loc)


def Layer(num_heads, num_heads_kv, head_dim, v_head_dim=None, layer_id=0, **attributes):
    """A RadixAttention: its attributes, which back ends read."""
    defaults = dict(
        tp_q_head_num=num_heads,
        tp_k_head_num=num_heads_kv,
        tp_v_head_num=num_heads_kv,
        qk_head_dim=head_dim,
        v_head_dim=v_head_dim or head_dim,
        scaling=head_dim**-0.5,
        layer_id=layer_id,
        logit_cap=0.0,
        logit_capping_method="tanh",
        sliding_window_size=-1,
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
        xai_temperature_len=-1,
        k_scale=None,
        v_scale=None,
        k_scale_float=None,
        v_scale_float=None,
    )
    return SimpleNamespace(**defaults | attributes)


class Pool:
    """A token_to_kv_pool of one layer: size slots and page 0, which belongs to padding. Slots without a key are NaN."""

    def __init__(self, size, page_size, layer, dtype, device, by_heads=False):
        self.page_size, self.by_heads, self.dtype = page_size, by_heads, dtype
        shape = (size + page_size, layer.tp_k_head_num)
        if by_heads:
            shape = (shape[0] // page_size, layer.tp_k_head_num, page_size)
        widths = layer.qk_head_dim, layer.v_head_dim
        self.k_buffer, self.v_buffer = (
            torch.full((*shape, width), float("nan"), device=device).to(dtype) for width in widths
        )

    def get_key_buffer(self, layer_id):
        return self.k_buffer

    def get_value_buffer(self, layer_id):
        return self.v_buffer

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None):
        self.write(loc_info.loc, cache_k, cache_v, k_scale, v_scale)

    def write(self, loc, cache_k, cache_v, k_scale, v_scale):
        for buffer, x, scale in ((self.k_buffer, cache_k, k_scale), (self.v_buffer, cache_v, v_scale)):
            if x.dtype != self.dtype and scale is not None:
                x.div_(scale)
            if self.by_heads:
                buffer[loc // self.page_size, :, loc % self.page_size] = x.to(self.dtype)
            else:
                buffer[loc] = x.to(self.dtype)


class HybridPool:
    """A pool with slots of its own for window layers (SWAKVPool). Layer 1 has a window."""

    def __init__(self, size, page_size, layer, dtype, device):
        self.full, self.window = (Pool(size, page_size, layer, dtype, device) for _ in range(2))
        self.layers_mapping = {0: (0, False), 1: (0, True)}
        pages = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(size // page_size)))
        slots = pages[:, None] * page_size + torch.arange(page_size)
        self.full_to_swa_index_mapping = torch.cat((slots.flatten(), torch.tensor([-1]))).to(device)

    def translate_loc_from_full_to_swa(self, kv_indices):
        return self.full_to_swa_index_mapping[kv_indices]

    def _of(self, layer_id):
        return self.window if self.layers_mapping[layer_id][1] else self.full

    def get_key_buffer(self, layer_id):
        return self._of(layer_id).k_buffer

    def get_value_buffer(self, layer_id):
        return self._of(layer_id).v_buffer

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=1.0, v_scale=1.0):
        in_window = self.layers_mapping[layer.layer_id][1]
        loc = loc_info.swa_loc if in_window else loc_info.loc
        self._of(layer.layer_id).write(loc, cache_k, cache_v, k_scale, v_scale)


class Server:
    """A runner with its pools, and requests whose slots it allocates page by page in a random order."""

    def __init__(self, pool, page_size, device, context=32, max_requests=6, num_slots=128):
        self.device, self.page_size = device, page_size
        req_to_token = torch.zeros(max_requests, context, dtype=torch.int32, device=device)
        self.free = (1 + torch.randperm(num_slots // page_size)).tolist()
        self.lengths = [0] * max_requests
        self.runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=req_to_token),
            token_to_kv_pool=pool,
            page_size=page_size,
            use_mla_backend=False,
            kv_index_translator=SimpleNamespace(is_translating=False),
        )

    def batch(self, mode, requests, news):
        """The ForwardBatch in which request requests[i] gets news[i] tokens."""
        table = self.runner.req_to_token_pool.req_to_token
        slots, prefixes = [], [self.lengths[request] for request in requests]
        for request, new in zip(requests, news):
            for position in range(self.lengths[request], self.lengths[request] + new):
                offset = position % self.page_size
                page = self.free.pop() if offset == 0 else int(table[request, position - 1]) // self.page_size
                table[request, position] = page * self.page_size + offset
                slots.append(page * self.page_size + offset)
            self.lengths[request] += new
        tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=self.device)  # noqa: E731
        is_extend = not (mode.is_decode() or mode.is_idle())
        return SimpleNamespace(
            forward_mode=mode,
            batch_size=len(requests),
            req_pool_indices=tensor(requests),
            seq_lens=tensor([self.lengths[request] for request in requests]),
            seq_lens_cpu=None,
            out_cache_loc=tensor(slots),
            extend_seq_lens=tensor(news).int() if is_extend else None,
            extend_prefix_lens=tensor(prefixes).int() if is_extend else None,
            extend_seq_lens_cpu=list(news) if is_extend else None,
            extend_prefix_lens_cpu=prefixes if is_extend else None,
            encoder_lens=None,
            mha_return_lse=None,
            spec_info=None,
        )


def modules():
    """{name: module} of what the back end imports."""
    choices, backends = ["triton", "torch_native"], {}

    def register_attention_backend(name):
        return lambda create: backends.setdefault(name, create)

    names = {
        "arg_groups.choices": dict(ATTENTION_BACKEND_CHOICES=choices, add_attention_backend_choices=choices.extend),
        "layers.attention.attention_registry": dict(
            ATTENTION_BACKENDS=backends, register_attention_backend=register_attention_backend
        ),
        "layers.attention.base_attn_backend": dict(AttentionBackend=AttentionBackend),
        "mem_cache.memory_pool": dict(KVWriteLoc=KVWriteLoc),
        "runtime_context": dict(get_parallel=lambda: PARALLEL),
    }
    found = {}
    for name, contents in names.items():
        path = ["sglang", "srt", *name.split(".")]
        for i in range(1, len(path) + 1):
            found.setdefault(".".join(path[:i]), ModuleType(".".join(path[:i])))
        found[".".join(path)].__dict__.update(contents)
    assert not any(name in sys.modules for name in found)
    return found
