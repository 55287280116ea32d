import csv

import pytest

from perf.commands import sizes
from perf.workloads import models


@pytest.mark.parametrize(
    ("model", "bytes_per_token"),
    [
        (models.LLAMA_2_7B, 2 * 32 * 128 * 32 * 2),
        (models.LLAMA_3_8B, 131072),
        (models.LLAMA_3_70B, 327680),
        (models.QWEN3_32B, 262144),
        (models.FALCON_7B, 8192),
        (models.DEEPSEEK_V3, 70272),
        (models.DEEPSEEK_V2_LITE, 31104),
    ],
)
def test_bytes_per_token_as_published(model, bytes_per_token):
    assert sizes.kv_cache_bytes(model, 1) == bytes_per_token
    assert sizes.kv_cache_bytes(model, 131072) == 131072 * bytes_per_token
    assert sizes.kv_cache_bytes(model, 1000, bytes_per_element=1) == 500 * bytes_per_token


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        (models.LLAMA_2_7B, "MHA"),
        (models.GEMMA_3_12B, "GQA"),
        (models.FALCON_7B, "MQA"),
        (models.DEEPSEEK_V2_LITE, "MLA"),
    ],
)
def test_kind_of_attention(model, attention):
    assert model.attention == attention


def test_windowed_layers_stop_growing_at_the_window():
    model = models.GPT_OSS_120B
    per_layer_token = 2 * 8 * 64 * 2
    assert sizes.kv_cache_bytes(model, 128) == 36 * 128 * per_layer_token
    assert sizes.kv_cache_bytes(model, 1024) == 18 * (128 + 1024) * per_layer_token


def test_run_writes_every_model_and_context(tmp_path, capsys):
    table, picture = sizes.run(tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == len(models.MODELS) * len(sizes.CONTEXTS)
    last = next(row for row in rows if row["model"] == "DeepSeek-V3" and row["context"] == "131072")
    assert int(last["bytes"]) == 70272 * 131072
    assert picture.stat().st_size > 10_000
    assert "70,272" in capsys.readouterr().out
