"""DynaMoE (arXiv 2502.12325) for transformers: a dense model whose FFNs are as wide as each token needs.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    model.set_budget(0.5)                            # half of the FFNs' width in the mean
    model.generate(**inputs, sensitivity=0.9)        # or for one call

The base's own class does everything but the FFNs. Letters in comments: T tokens, D hidden_size, I intermediate_size,
E experts, P neurons with separate weights for the smaller experts.
"""

import contextlib
import functools

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_dynamoe import DynaMoeConfig


class Router(nn.Module):
    """Scores each token for every expert but the largest; holds the layer's compensation too."""

    def __init__(self, config):
        super().__init__()
        section = config.dynamoe
        hidden, smaller = section["router"]["hidden_size"], len(section["expert_widths"]) - 1
        self.kind = section["router"]["kind"]
        if self.kind == "mlp":
            self.fc1 = nn.Linear(config.hidden_size, hidden)
            self.fc2 = nn.Linear(hidden, smaller)
        self.compensation = None
        if section["router"].get("compensation", False):
            self.compensation = nn.Parameter(torch.zeros(smaller, config.hidden_size))
        widths = section["expert_widths"]
        self.shares = [width / widths[-1] for width in widths[:-1]]

    def experts(self, x, sensitivity):
        """The expert of each row of x (T, D): the smallest whose score reaches the sensitivity, else the largest."""
        largest = len(self.shares)
        if sensitivity >= 1 or largest == 0:
            return torch.full((x.shape[0],), largest, device=x.device)
        if self.kind == "static":
            chosen = next((e for e, share in enumerate(self.shares) if share >= sensitivity), largest)
            return torch.full((x.shape[0],), chosen, device=x.device)
        # logits are compared, in f32, so that the rounding of a sigmoid decides nothing
        linear = lambda layer, x: F.linear(x, layer.weight.float(), layer.bias.float())
        logits = linear(self.fc2, F.silu(linear(self.fc1, x.float())))  # (T, E - 1)
        threshold = torch.logit(torch.tensor(sensitivity, dtype=torch.float64)).float().to(x.device)
        reached = torch.cat([logits >= threshold, logits.new_ones(x.shape[0], 1).bool()], 1)
        return reached.int().argmax(1)  # the first one that is true


class DynaMoeFfn(nn.Module):
    """The nested experts in place of a dense FFN, whose projections it takes over."""

    def __init__(self, dense, config):
        super().__init__()
        section = config.dynamoe
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        self.act_fn = ACT2FN[section.get("hidden_act", "silu")]
        self.widths = section["expert_widths"]
        self.router = Router(config)
        separate = section.get("own_shells", 0)
        if separate:
            width, hidden = self.widths[separate - 1], config.hidden_size
            self.own = nn.ModuleDict({
                "gate_proj": nn.Linear(hidden, width, bias=False),
                "up_proj": nn.Linear(hidden, width, bias=False),
                "down_proj": nn.Linear(width, hidden, bias=False),
            })
        self.separate_width = self.widths[separate - 1] if separate else 0
        self.sensitivity = section["sensitivity"]
        self.mean_width = None  # of the last forward, as a share of I

    def forward(self, x):
        if self.sensitivity >= 1:
            self.mean_width = 1.0
            return self.neurons(x, self, 0, self.widths[-1])
        rows = x.reshape(-1, x.shape[-1])  # (T, D)
        experts = self.router.experts(rows.detach(), self.sensitivity)
        self.mean_width = sum(self.widths[e] for e in experts.tolist()) / max(len(rows), 1) / self.widths[-1]
        y = torch.zeros_like(rows)
        for expert in experts.unique().tolist():
            mine = (experts == expert).nonzero()[:, 0]
            y = y.index_copy(0, mine, self.expert(rows[mine], expert).to(y.dtype))
        return y.reshape(x.shape)

    def expert(self, x, expert):
        """The output of one expert for all rows of x (T, D)."""
        width, largest = self.widths[expert], len(self.widths) - 1
        if expert == largest:
            return self.neurons(x, self, 0, width)
        first = min(self.separate_width, width)
        parts = [self.neurons(x, self, first, width)] if width > first else []
        if first:
            parts.insert(0, self.neurons(x, self.own, 0, first))
        y = sum(parts)
        if self.router.compensation is not None:
            y = y + self.router.compensation[expert].to(y.dtype)
        return y

    def neurons(self, x, of, start, end):
        """What the neurons from `start` to `end` of the matrices in `of` put out."""
        gate, up, down = ((of[name] if isinstance(of, nn.ModuleDict) else getattr(of, name)).weight
                          for name in ("gate_proj", "up_proj", "down_proj"))
        h = self.act_fn(F.linear(x, gate[start:end])) * F.linear(x, up[start:end])  # (T, end - start)
        return F.linear(h, down[:, start:end])


class DynaMoeForCausalLM(PreTrainedModel):
    """Loads as `DynaMoeForCausalLM`; what is returned is the base's class with DynaMoE FFNs."""

    config_class = DynaMoeConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if config is None:
            config = DynaMoeConfig.from_pretrained(pretrained_model_name_or_path)
        if cls is DynaMoeForCausalLM:
            cls = _model_class(config.dynamoe["base_architecture"])
        return super(DynaMoeForCausalLM, cls).from_pretrained(
            pretrained_model_name_or_path, *args, config=config, **kwargs
        )

    @classmethod
    def _from_config(cls, config, **kwargs):
        if cls is DynaMoeForCausalLM:
            cls = _model_class(config.dynamoe["base_architecture"])
        return super(DynaMoeForCausalLM, cls)._from_config(config, **kwargs)


class _Dial:
    """The dial, for any base's class."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for layer in self.model.layers:
            layer.mlp = DynaMoeFfn(layer.mlp, config)

    def _ffns(self):
        return [layer.mlp for layer in self.model.layers]

    def set_sensitivity(self, sensitivity):
        """From 0 (the smallest expert) to 1 (the dense model): one number, or one for each layer."""
        ffns = self._ffns()
        values = list(sensitivity) if isinstance(sensitivity, (list, tuple)) else [sensitivity] * len(ffns)
        if len(values) != len(ffns) or not all(0 <= value <= 1 for value in values):
            raise ValueError(f"sensitivity must be from 0 to 1, one or {len(ffns)} of them, found {sensitivity}")
        for ffn, value in zip(ffns, values):
            ffn.sensitivity = float(value)

    def set_budget(self, budget):
        """The mean FFN width to aim at, as a share of the dense one, through the checkpoint's table of budgets."""
        if not 0 <= budget <= 1:
            raise ValueError(f"budget must be from 0 to 1, found {budget}")
        section, layers = self.config.dynamoe, len(self._ffns())
        widths = section["expert_widths"]
        each = lambda value: list(value) if isinstance(value, (list, tuple)) else [value] * layers
        table = [(row["width"], each(row["sensitivity"])) for row in section.get("budgets", [])]
        lowest = widths[0] / widths[-1]
        if not table and budget < 1:
            raise ValueError("the table of budgets is empty: run `moefy-train evaluate --budget …`, or set a sensitivity")
        table = [(lowest, [0.0] * layers), *table, (1.0, [1.0] * layers)]
        if budget <= lowest:
            return self.set_sensitivity(table[0][1])
        for (low, below), (high, above) in zip(table, table[1:]):
            if budget <= high:
                t = (budget - low) / (high - low) if high > low else 1.0
                return self.set_sensitivity([a + t * (b - a) for a, b in zip(below, above)])

    def mean_ffn_width(self):
        """Mean FFN width of the last forward pass, as a share of the dense one."""
        widths = [ffn.mean_width for ffn in self._ffns()]
        return sum(widths) / len(widths)

    @contextlib.contextmanager
    def dial(self, sensitivity=None, budget=None):
        """Sets the dial for as long as the context is open."""
        before = [ffn.sensitivity for ffn in self._ffns()]
        if sensitivity is not None:
            self.set_sensitivity(sensitivity)
        if budget is not None:
            self.set_budget(budget)
        try:
            yield self
        finally:
            self.set_sensitivity(before)

    def generate(self, *args, sensitivity=None, budget=None, **kwargs):
        """The base's, with a dial for this call."""
        with self.dial(sensitivity, budget):
            return super().generate(*args, **kwargs)


@functools.cache
def _model_class(base_architecture):
    base = getattr(transformers, base_architecture)
    members = {
        "config_class": DynaMoeConfig,
        # the places of neurons in the base, which only an export needs
        "_keys_to_ignore_on_load_unexpected": [r"\.mlp\.order$"],
        "__module__": __name__,
        "_keep_in_fp32_modules_strict": ["router"],
        "_keep_in_fp32_modules": ["router"],
    }
    return type("DynaMoeForCausalLM", (_Dial, DynaMoeForCausalLM, base), members)
