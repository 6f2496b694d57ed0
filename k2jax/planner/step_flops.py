"""Floating-point operations of a training step and of decoding, per device."""

import dataclasses

from k2jax.config import MeshConfig, ModelConfig, RunConfig
from k2jax.ops.limits import ATTENTION_BLOCK, LOGITS_BYTES, cut_into_query_blocks
from k2jax.params.counts import count_parameters


@dataclasses.dataclass(frozen=True)
class Case:
    """One run on one mesh, and the sizes that every formula needs."""

    run: RunConfig
    mesh: MeshConfig
    accumulate: int
    chip: str = "cpu"  # "tpu", "gpu" or "cpu": whose compiler it is

    @property
    def model(self) -> ModelConfig:
        """Sizes of the network."""
        return self.run.model

    @property
    def layers(self) -> int:
        """Layers of a step, those that predict further (MTP) too."""
        return self.model.layers + self.model.mtp_layers

    @property
    def mixtures(self) -> int:
        """Layers with routed experts."""
        return self.model.moe_layers + self.model.mtp_layers

    @property
    def predictions(self) -> int:
        """Tokens that are predicted from each one."""
        return 1 + self.model.mtp_layers

    @property
    def tokens(self) -> float:
        """Tokens of a device in a micro-batch."""
        mesh = self.mesh
        ways = mesh.replica * mesh.data * mesh.expert * mesh.context
        return self.run.data.rows // self.accumulate * self.run.data.context / ways

    @property
    def pairs(self) -> float:
        """Rows that a device's experts are given room for in a micro-batch."""
        choices = self.tokens * self.model.experts_per_token
        if self.exchanges:
            return min(self.run.train.buffer, self.mesh.expert) * choices
        return self.mesh.expert * choices  # sorted whole, other devices' choices last

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel to their experts, instead of all to all devices of `expert`."""
        return self.run.train.dispatch != "allgather" and self.mesh.expert > 1

    @property
    def blocks(self) -> bool:
        """Whether attention goes by blocks: its scores are never whole."""
        return self.run.data.context > ATTENTION_BLOCK

    @property
    def logits(self) -> float:
        """Bytes of a device's float32 logits, were they whole."""
        return 4 * self.tokens * self.model.vocab / self.mesh.model

    @property
    def hidden(self) -> int:
        """An expert's hidden width on a device, as it lies in memory: TPUs fill lanes of 128."""
        lane = 128 if self.chip == "tpu" else 1
        return -(-self.model.expert_ffw // (self.mesh.model * lane)) * lane

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.run.train.dtype == "float32" else 2

    @property
    def grad_width(self) -> int:
        """Bytes of a number of a gradient between devices."""
        return 4 if self.run.train.grad_dtype == "float32" else 2

    @property
    def gathers(self) -> int:
        """How often a layer's weights and tokens are brought together for one micro-batch."""
        return 1 if self.run.train.remat == "none" else 2


def _recompute_flops(case: Case, layers: float) -> float:
    """Products with weights that the backward pass repeats, for a token; `layers` are all of them.

    Nothing waits for the last product of an MLP. Experts' first two are repeated wherever tokens
    are exchanged: no round of the backward pass has what one of the forward pass made.
    """
    cfg, remat = case.model, case.run.train.remat
    routed = 2 * case.mixtures * cfg.experts_per_token * cfg.embed * cfg.expert_ffw
    if remat == "none":
        return 2 * routed if case.exchanges else 0
    if remat == "dots":
        return 2 * routed + 2 * case.mixtures * cfg.embed * cfg.experts  # and the router's
    shared = 2 * case.mixtures * cfg.embed * cfg.shared_ffw
    return layers - routed - shared - 2 * cfg.dense_layers * cfg.embed * cfg.ffw


def _count_keys(context: int) -> float:
    """Count the keys that a token's query is multiplied by, on average."""
    if context > ATTENTION_BLOCK:
        return ATTENTION_BLOCK * (-(-context // ATTENTION_BLOCK) + 1) / 2
    blocks = cut_into_query_blocks(context)
    return sum((block.stop - block.start) * block.stop for block in blocks) / context


def step_flops(case: Case) -> float:
    """Operations of a device in a step, recomputation included, without the optimizer."""
    cfg, run = case.model, case.run
    counted = count_parameters(cfg)
    head = 2 * cfg.vocab * cfg.embed
    layers = 2 * (counted["active_matmul_parameters"] + counted["mtp_active_matmul_parameters"])
    attention = 2 * case.layers * cfg.heads * (cfg.nope + cfg.rope + cfg.value)
    # Scores cost the hidden keys of a block too; backward makes the scores once more.
    seen = _count_keys(run.data.context)
    scores = 2 * case.layers * cfg.heads * (cfg.nope + cfg.rope) * seen
    mixing = attention * seen * (3 if run.train.remat == "none" else 4) + scores
    heads = (4 if case.logits > LOGITS_BYTES else 3) * case.predictions * head
    token = 3 * layers + _recompute_flops(case, layers) + heads + mixing
    return token * case.tokens * case.accumulate / case.mesh.model
