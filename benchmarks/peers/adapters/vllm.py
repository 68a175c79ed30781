"""vLLM's ``LLM(runner="pooling").classify`` with raw scores, prefix caching on and off.

All rows in one call: vLLM makes the batches. Each pass begins with an empty cache, else a second
one would find all prefixes of the first. The engine runs in this process, which spares it copies.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB, of each of the two
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, PoolingParams

PEERS = {"vllm": {"cache": True}, "vllm-no-cache": {"cache": False}}
# vllm-cpu and all it needs but torch and what torch brings; on a GPU: --python vllm=PYTHON
PINS = ["-r vllm.txt"]
SHOWS = ["vllm-cpu", "vllm"]


class Peer:
    def __init__(self, model, dtype, device, cache):
        self.engine = LLM(model, runner="pooling", dtype=dtype, enable_prefix_caching=cache)
        self.cache = cache

    def scores(self, rows):
        if self.cache:
            self.engine.reset_prefix_cache()
        prompts = [{"prompt_token_ids": row} for row in rows]
        raw = PoolingParams(use_activation=False)
        found = self.engine.classify(prompts, pooling_params=raw, use_tqdm=False)
        self.tokens = sum(map(len, rows)) - sum(one.num_cached_tokens or 0 for one in found)
        return [one.outputs.probs[0] for one in found]
