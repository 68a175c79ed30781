"""How fast this machine multiplies a model's matrices: the floor under a pass.

Run as an adapter is, in the rounds of the others. Weights are of the shapes of the model's linear
layers, some of each shape in turn, so that they come from memory as they do in the model.
"""

import itertools
import time
from collections import Counter
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

TIMES = 5  # timings of each shape, of which the median counts
LAUNCHES = 20  # in one timing on a GPU, which would time the launch else
MOST = 4096  # rows of a product


class Peer:
    def __init__(self, model, dtype, device):
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            body = AutoModelForSequenceClassification.from_config(config).base_model
        linear = (m for m in body.modules() if isinstance(m, torch.nn.Linear))
        self.shapes = Counter(tuple(m.weight.shape) for m in linear)  # [out, in]
        self.flops = sum(2 * o * i * count for (o, i), count in self.shapes.items())  # of a token
        self.dtype, self.device, self.tokens = getattr(torch, dtype), device, None

    def scores(self, rows):
        """FLOPs of a token, and FLOP/s of ``torch.matmul`` and with prepacked weights (0: none)."""
        count = min(MOST, sum(map(len, rows)))
        return [self.flops, self.rate(count, False), self.rate(count, True)]

    @torch.inference_mode()
    def rate(self, rows, prepacked):
        if prepacked and (self.device != "cpu" or not torch.backends.mkldnn.is_available()):
            return 0.0
        seconds = 0.0
        for (out, width), count in self.shapes.items():
            x = torch.randn(rows, width, device=self.device).to(self.dtype)
            weights = [
                torch.randn(out, width, device=self.device).to(self.dtype)
                for _ in range(min(count, TIMES + 1))
            ]
            if prepacked:
                weights = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
            turns = itertools.islice(itertools.cycle(weights), TIMES + 1)
            times = [self.timed(x, weight, prepacked) for weight in turns]
            seconds += count * median(times[1:])  # the first one warms up
        return rows * self.flops / seconds

    def timed(self, x, weight, prepacked):
        launches = 1 if self.device == "cpu" else LAUNCHES
        self.wait()
        start = time.perf_counter()
        for _ in range(launches):
            if prepacked:
                torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
            else:
                torch.matmul(x, weight.t())
        self.wait()
        return (time.perf_counter() - start) / launches

    def wait(self):
        if self.device != "cpu":
            torch.cuda.synchronize()
